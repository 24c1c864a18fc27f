"""What a process listens on, and a program that shows it of a pair of movers over one transport."""

from __future__ import annotations

import ipaddress
import os
import sys


def listeners(pid: int | str = "self") -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which the process listens."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            rows = [line.split() for line in file.read().splitlines()[1:]]
        found += [_address(row[1]) for row in rows if row[3] == "0A" and row[9] in inodes]
    return found


def _address(text: str) -> tuple[str, int]:
    """Four bytes at a time, each group in the order of the host."""
    raw, port = bytes.fromhex(text.split(":", maxsplit=1)[0]), int(text.split(":")[1], 16)
    groups = [raw[at : at + 4][::-1] for at in range(0, len(raw), 4)]
    return str(ipaddress.ip_address(b"".join(groups))), port


def main() -> None:
    from tests.movers import Pair, ticket_of  # only the program needs them

    made = Pair(sys.argv[1], lease_s=30.0)  # loading a transport's library may take seconds where others work, too
    made.move(ticket_of(), [3, 6], [5, 2])
    for address, port in listeners():
        print("listens", address, port)
    made.stop()


if __name__ == "__main__":
    main()

"""Starts the processes of a one-node Ray that only this machine and this user can reach, says where it is, and ends.

The keeper runs it as a file, with the number of CPUs, in the environment that `local_ray` gives. It writes one line
of JSON, {"address": host:port} or {"error": why}. `ray start` is not used, since it always opens the Ray Client's port.
"""

from __future__ import annotations

import json
import logging
import sys

OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's minimum is 75 MiB; we put nothing into it
HOST = "127.0.0.1"


def main() -> None:
    try:
        told = {"address": _start(int(sys.argv[1]))}
    except Exception as error:  # noqa: BLE001, any error must reach the controller, which waits
        told = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    print(json.dumps(told), flush=True)  # noqa: T201, the answer


def _start(cpus: int) -> str:
    logging.disable(logging.CRITICAL)
    from ray.cluster_utils import Cluster

    head = {
        "node_ip_address": HOST,  # with it every port listens on loopback alone
        "num_cpus": cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "include_log_monitor": False,
        "no_monitor": True,  # the autoscaler
        "dashboard_agent_listen_port": 0,  # a free one
    }
    return str(Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False).address)


if __name__ == "__main__":
    main()

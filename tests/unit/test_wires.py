"""The addresses that transfer links are listened on and dialled at."""

from __future__ import annotations

import pytest

from tercet.transfer.links.wires import dial_tcp, listen_tcp


@pytest.mark.parametrize(
    ("host", "begin"),
    [
        ("127.0.0.1", "127.0.0.1:"),
        ("127.0.0.1:0", "127.0.0.1:"),
        ("localhost", "127.0.0.1:"),
        ("::1", "[::1]:"),
        ("[::1]", "[::1]:"),
        ("[::1]:0", "[::1]:"),
    ],
)
def test_what_is_listened_on_can_be_dialled_and_listened_on_again(host, begin):
    listener, address = listen_tcp(host)
    with listener:
        assert address.startswith(begin)
        dial_tcp(address, 5.0).close()
    again, same = listen_tcp(address)
    again.close()
    assert same == address

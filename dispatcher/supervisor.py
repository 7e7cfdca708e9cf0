"""Signs of life for the supervisor that started us, as systemd takes them (sd_notify(3))."""

from __future__ import annotations

import os
import socket


def tell(state: str) -> None:
    """Send one state, such as `READY=1`; nothing where no supervisor listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), address)

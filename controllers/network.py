"""The interface that nodes reach each other on."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface of this machine."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"network.interface: {interface!r}; has no address here ({error.strerror}); this machine has {names}"
            ) from None
    return socket.inet_ntoa(answer[20:24])

"""Who may speak: nobody in the clear off loopback. CURVE keys come from a shared secret.

Whoever has the secret has them all; the secret itself is never sent. A CURVE client must know the server's long-term
public key before the first byte, and the handshake does not reveal it. It is derived from the secret, so a client
without the secret cannot begin to speak.
"""

from __future__ import annotations

import hashlib
import ipaddress

import zmq
from zmq.utils import z85


def check_endpoint(endpoint: str, secret: str) -> None:
    """Off loopback nothing travels in the clear: raises ValueError without a secret there."""
    if endpoint.startswith("ipc://"):
        return
    if not endpoint.startswith("tcp://"):
        raise ValueError(f"endpoint: {endpoint!r}; must begin with ipc:// or tcp://")
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if not secret and not _is_loopback(host):
        raise ValueError(f"secret: empty; {endpoint!r} is not on loopback and needs one")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secure_server(socket: zmq.Socket, secret: str) -> None:
    """Before `bind`."""
    public, private = _keypair(secret, "server")
    socket.curve_server = True
    socket.curve_publickey = public
    socket.curve_secretkey = private


def secure_client(socket: zmq.Socket, secret: str) -> None:
    """Before `connect`."""
    socket.curve_serverkey = _keypair(secret, "server")[0]
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def _keypair(secret: str, role: str) -> tuple[bytes, bytes]:
    salt = f"flowrl queue {role}".encode()
    private = z85.encode(hashlib.scrypt(secret.encode(), salt=salt, n=1 << 12, r=8, p=1, dklen=32))
    return zmq.curve_public(private), private

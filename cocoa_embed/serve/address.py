"""Where the server listens. Imports nothing heavy, so that a wrong address is refused at once."""

from __future__ import annotations

import errno
import ipaddress
import socket

from cocoa_embed.errors import CocoaError, UsageError, one_line


def check_address(host: str, api_key: str | None) -> None:
    """Check that an address that other machines can reach has a key.

    :raises UsageError: If it has none, or one that no header can hold.
    """
    if api_key is not None:
        check_key(api_key)
    elif not is_loopback(host):
        raise UsageError(f"--host {host} can be reached from other machines; give --api-key too, or COCOA_API_KEY")


def check_key(api_key: str) -> None:
    """Check that a header can hold an API key.

    :raises UsageError: If none can; the message does not quote the key.
    """
    if not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UsageError("the API key is empty or has characters that no header holds; give printable ASCII")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; no client can connect before it listens.

    :raises CocoaError: If the address is taken, or not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: not the form of a host name
        raise CocoaError(f"{host!a} is not an address ({one_line(error)}); give another --host") from error
    family, kind, protocol, _, address = found[0]
    try:
        # Only with the protocol's number does asyncio turn off Nagle's algorithm, which delays an answer by 40 ms.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise CocoaError(f"cannot listen on {host} port {port} ({one_line(error)}); give another {option}") from error
    return bound

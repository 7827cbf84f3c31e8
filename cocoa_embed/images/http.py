"""Download images from allowed hosts on the public network, and from nowhere else.

An address may come from a stranger and lead anywhere: to services of this machine, to a cloud's metadata service, to a
name whose address changes between the check and the connection. So each hop is checked on its own: its host against the
list, and every network address of the host; and the connection goes to the address that was checked. HTTP libraries
resolve names themselves and limit each read, not the whole transfer, so this module drives ``http.client`` directly.
"""

from __future__ import annotations

import http.client
import io
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import cast

from cocoa_embed.errors import ImageError, one_line
from cocoa_embed.images.urls import (
    DEFAULT_PORTS,
    Hop,
    Refused,
    is_public,
    next_address,
    parse_address,
    parse_rule,
    shown_address,
)

REDIRECTS = frozenset({301, 302, 303, 307, 308})

HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "cocoa-embed", "Connection": "close"}

READ_SIZE = 2**16


@dataclass
class Fetcher:
    """Downloads images by http and https from allowed hosts. Threads may share it."""

    allowed_hosts: Iterable[str]
    """``example.com`` allows this host; ``*.example.org`` allows all subdomains of ``example.org``, not the domain
    itself; ``example.com:8080`` allows another port than 80 (http) and 443 (https)."""
    timeout: float = 10.0
    """The most seconds for one step: resolving the host, connecting, waiting for the next bytes."""
    max_bytes: int = 32 * 2**20
    """The most bytes of an image."""
    max_redirects: int = 5
    """The most redirects of an address."""
    deadline: float = 60.0
    """The most seconds for an image in all."""

    def __post_init__(self) -> None:
        """Parse the hosts.

        :raises UsageError: If one is malformed.
        """
        self._rules = [parse_rule(host) for host in self.allowed_hosts]
        self._tls = ssl.create_default_context()  # checks certificates and host names

    def fetch(self, address: str) -> bytes:
        """Download an http or https address.

        :raises ImageError: If the address, or one that it redirects to, is not allowed or not public; if the response
            has a status other than 200, is compressed, ends early, or exceeds the limits; if it takes too long.
        """
        end = time.monotonic() + self.deadline
        here, leads = address, ""
        try:
            for _ in range(self.max_redirects + 1):
                answer = self._request(self._check(here), end)
                if isinstance(answer, bytes):
                    return answer
                here = next_address(here, answer)
                leads = f"leads to {shown_address(here)}, which "
            raise Refused(f"redirects more than {self.max_redirects} times")
        except Refused as refused:
            reason = str(refused)
        except TimeoutError:
            reason = f"takes too long (limits: {self.timeout:g} s per step, {self.deadline:g} s in all)"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = f"cannot be fetched ({one_line(error)})"
        raise ImageError(shown_address(address), leads + reason)

    def _check(self, address: str) -> Hop:
        hop = parse_address(address)
        if not any(rule.allows(hop) for rule in self._rules):
            port = "" if hop.port == DEFAULT_PORTS[hop.scheme] else f":{hop.port}"
            raise Refused(
                f"is on {hop.host}{port}, which is not among the allowed hosts; allow it with --allow-host"
                f" {hop.host}{port} (allowed_hosts= in Python)"
            )
        return hop

    def _request(self, hop: Hop, end: float) -> bytes | str:
        """Request one address, at the network addresses that were checked.

        :returns: The content, or the address of a redirect.
        """
        addresses = resolve(hop, time_left(end, self.timeout))
        with connect(addresses, hop.port, self.timeout, end) as plain:
            plain.settimeout(time_left(end, self.timeout))
            used = self._tls.wrap_socket(plain, server_hostname=hop.host) if hop.scheme == "https" else plain
            with used:
                connection = http.client.HTTPConnection(hop.host, hop.port)
                connection.default_port = DEFAULT_PORTS[hop.scheme]
                # With its socket set, it does not resolve the name again.
                connection.sock = cast(socket.socket, TimedSocket(used, self.timeout, end))
                connection.request("GET", hop.target, headers=HEADERS)
                return self._read(connection.getresponse())

    def _read(self, response: http.client.HTTPResponse) -> bytes | str:
        if response.status in REDIRECTS:
            return response.getheader("Location") or ""
        if response.status != 200:
            raise Refused(f"answers with the status {response.status}")
        encoding = response.getheader("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise Refused(f"answers with the content encoding {encoding!a}, which was not requested")
        announced = response.length
        if announced is not None and announced > self.max_bytes:
            raise Refused(f"is too large: {announced} bytes, the limit is {self.max_bytes}")
        body = bytearray()
        while chunk := response.read(READ_SIZE):
            body += chunk
            if len(body) > self.max_bytes:
                raise Refused(f"is too large: the limit is {self.max_bytes} bytes")
        if announced is not None and len(body) < announced:
            raise Refused(f"ends early: {len(body)} of {announced} bytes came")
        return bytes(body)


class TimedSocket(io.RawIOBase):
    """A connection for ``http.client`` whose every read and write ends before a deadline.

    A time-out of the socket alone would let a server send one byte every few seconds for ever.
    """

    def __init__(self, connection: socket.socket, timeout: float, end: float) -> None:
        """Wrap a connection; a step waits at most ``timeout`` seconds, and never beyond ``end``."""
        self._connection = connection
        self._timeout = timeout
        self._end = end

    def sendall(self, data: bytes) -> None:
        """Send bytes."""
        self._connection.settimeout(time_left(self._end, self._timeout))
        self._connection.sendall(data)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Receive into a buffer and return how many bytes came; 0 is the end."""
        self._connection.settimeout(time_left(self._end, self._timeout))
        return self._connection.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the response as a file."""
        return io.BufferedReader(self)

    def close(self) -> None:
        """Do nothing: ``http.client`` closes before it reads the response, and relies on the file to stay open."""


def time_left(end: float, timeout: float) -> float:
    """Return how many seconds the next step may take.

    :raises TimeoutError: If none is left.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, timeout)


def resolve(hop: Hop, seconds: float) -> list[str]:
    """Look up a host, once, and return its network addresses as numbers.

    :raises Refused: If it is unknown, or any of its addresses is not public.
    :raises TimeoutError: If the lookup takes longer than ``seconds``.
    """
    answers: queue.SimpleQueue[list | OSError | ValueError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            answers.put(error)

    # A lookup has no time-out: its thread continues in the background.
    threading.Thread(target=look_up, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if not isinstance(answer, list):
        raise Refused(f"is on {hop.host}, which cannot be found ({one_line(answer)})")
    addresses = [address[0] for _, _, _, _, address in answer]
    for address in addresses:
        if not is_public(ip_address(address)):
            raise Refused(f"is on {hop.host}, whose address {address} is not public")
    return addresses


def connect(addresses: Iterable[str], port: int, timeout: float, end: float) -> socket.socket:
    """Connect to the first network address that accepts.

    :raises OSError: The last address's error, if none accepts.
    """
    failure: OSError = OSError("it has no network address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=time_left(end, timeout))
        except OSError as error:
            failure = error
    raise failure

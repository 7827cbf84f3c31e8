"""Images from the web, from hosts that are named beforehand, and never from a machine of the own network.

An address may come from a stranger and lead anywhere: to the services of this machine, to the metadata service of a
cloud, to a name whose address changes between the check and the connection. So every hop is checked by itself: its host
against the list, and each network address of the host; and the connection goes to the very address that was checked.
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
from ipaddress import ip_address
from typing import NamedTuple, TypeAlias, cast

from cocoa_embed.errors import ImageError, UsageError, one_line
from cocoa_embed.images.urls import (
    DEFAULT_PORTS,
    Hop,
    Refused,
    is_public,
    next_address,
    read_address,
    read_rule,
    shown_address,
)

REDIRECTS = frozenset({301, 302, 303, 307, 308})

HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "cocoa-embed", "Connection": "close"}

READ_SIZE = 2**16

Place: TypeAlias = tuple[socket.AddressFamily, tuple]
"""What a socket connects to: an address family, and an address as ``socket.connect`` takes it."""


class Fetcher:
    """Gets images by http and https from the hosts that it was given. Threads may share it."""

    def __init__(
        self,
        allowed_hosts: Iterable[str],
        timeout: float = 10.0,
        max_bytes: int = 32 * 2**20,
        max_redirects: int = 5,
        deadline: float = 60.0,
    ) -> None:
        """Remember what is allowed.

        :param allowed_hosts: Names of hosts, ``example.com``; ``*.example.org`` is every name below ``example.org``,
            not itself. Ports other than 80 (http) and 443 (https) are named too: ``example.com:8080``.
        :param timeout: Seconds that one step may take: finding the host, connecting, waiting for the next bytes.
        :param max_bytes: Bytes that an image may have.
        :param max_redirects: How often one address may lead to another.
        :param deadline: Seconds that an image may take in all.
        :raises UsageError: If a host is none, or a limit is not above 0.
        """
        if isinstance(allowed_hosts, str):
            raise UsageError(f"allowed_hosts is the string {allowed_hosts!a}; give a list of hosts")
        if min(timeout, max_bytes, deadline) <= 0 or max_redirects < 0:
            raise UsageError("timeout, max_bytes and deadline must be above 0, and max_redirects 0 or more")
        self.rules = tuple(read_rule(host) for host in allowed_hosts)
        self.timeout = timeout
        self.max_bytes = max_bytes
        self.max_redirects = max_redirects
        self.deadline = deadline
        self._tls = tls_context()

    def fetch(self, address: str) -> bytes:
        """Return what an http or https address holds.

        :raises ImageError: If the address, or one that it leads to, is not allowed or not public; if the answer has
            another status than 200, is compressed, ends early, or is above the limits; if it takes too long.
        """
        end = time.monotonic() + self.deadline
        here, leads = address, ""
        try:
            for _ in range(self.max_redirects + 1):
                answer = self._request(self._check(here), end)
                if isinstance(answer, bytes):
                    return answer
                here = next_address(here, answer.location)
                leads = f"leads to {shown_address(here)}, which "
            raise Refused(f"leads on, and {self.max_redirects} redirects are the limit")
        except Refused as refused:
            reason = str(refused)
        except TimeoutError:
            reason = f"takes too long (limits: {self.timeout:g} s a step, {self.deadline:g} s in all)"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = f"cannot be fetched ({one_line(error)})"
        raise ImageError(shown_address(address), leads + reason)

    def _check(self, address: str) -> Hop:
        hop = read_address(address)
        if not any(rule.allows(hop) for rule in self.rules):
            port = "" if hop.port == DEFAULT_PORTS[hop.scheme] else f":{hop.port}"
            raise Refused(f"is on {hop.host}{port}, which is not among the allowed hosts")
        return hop

    def _request(self, hop: Hop, end: float) -> bytes | Redirect:
        """Ask for one address, at the network addresses that were checked."""
        places = resolve(hop, time_left(end, self.timeout))
        with connect(places, self.timeout, end) as plain:
            plain.settimeout(time_left(end, self.timeout))
            used = self._tls.wrap_socket(plain, server_hostname=hop.host) if hop.scheme == "https" else plain
            with used:
                connection = http.client.HTTPConnection(hop.host, hop.port)
                connection.default_port = DEFAULT_PORTS[hop.scheme]
                # It has its connection already, and so looks up no name.
                connection.sock = cast(socket.socket, TimedSocket(used, self.timeout, end))
                connection.request("GET", hop.target, headers=HEADERS)
                return self._read(connection.getresponse())

    def _read(self, response: http.client.HTTPResponse) -> bytes | Redirect:
        if response.status in REDIRECTS:
            return Redirect(response.getheader("Location") or "")
        if response.status != 200:
            raise Refused(f"answers with the status {response.status}")
        encoding = response.getheader("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise Refused(f"answers with the content encoding {encoding!a}, which was not asked for")
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


class Redirect(NamedTuple):
    """An answer that names another address."""

    location: str


class TimedSocket:
    """A connection as ``http.client`` uses it, each step of which ends before a deadline.

    A time-out of the socket alone would let a server send a byte every few seconds for ever.
    """

    def __init__(self, connection: socket.socket, timeout: float, end: float) -> None:
        """Use a connection, waiting ``timeout`` seconds at most for a step, and not beyond ``end``."""
        self._connection = connection
        self._timeout = timeout
        self._end = end

    def sendall(self, data: bytes) -> None:
        """Send bytes."""
        self._connection.settimeout(time_left(self._end, self._timeout))
        self._connection.sendall(data)

    def receive(self, buffer: memoryview) -> int:
        """Read what has come into a buffer, and return how much it is."""
        self._connection.settimeout(time_left(self._end, self._timeout))
        return self._connection.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the answer as a file."""
        return io.BufferedReader(TimedAnswer(self))

    def close(self) -> None:
        """Do nothing: ``http.client`` closes before it reads the answer, and counts on the file to keep it open."""


class TimedAnswer(io.RawIOBase):
    """What a ``TimedSocket`` receives, as a file."""

    def __init__(self, connection: TimedSocket) -> None:
        """Read from a connection."""
        self._connection = connection

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read into a buffer; 0 is the end."""
        return self._connection.receive(buffer)


def time_left(end: float, timeout: float) -> float:
    """Return how many seconds the next step may take.

    :raises TimeoutError: If none is left.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, timeout)


def tls_context() -> ssl.SSLContext:
    """Return what checks certificates: with the certificates of this machine, and the host's name."""
    return ssl.create_default_context()


def resolve(hop: Hop, seconds: float) -> list[Place]:
    """Look up a host, once, and return its network addresses.

    :raises Refused: If it is unknown, or any of its addresses is not public.
    :raises TimeoutError: If the answer takes longer than ``seconds``.
    """
    answers: queue.SimpleQueue[list | OSError | ValueError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            answers.put(error)

    # The look-up has no time-out of its own: it goes on in its thread, and nobody waits.
    threading.Thread(target=look_up, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if not isinstance(answer, list):
        raise Refused(f"is on {hop.host}, which cannot be found ({one_line(answer)})")
    for _, _, _, _, place in answer:
        if not is_public(ip_address(place[0])):
            raise Refused(f"is on {hop.host}, whose address {place[0]} is not a public one")
    return [(family, place) for family, _, _, _, place in answer]


def connect(places: Iterable[Place], timeout: float, end: float) -> socket.socket:
    """Return a connection to the first network address that takes it.

    :raises OSError: If none does, the last one's.
    """
    failure: OSError = OSError("it has no network address")
    for family, place in places:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(time_left(end, timeout))
            connection.connect(place)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure

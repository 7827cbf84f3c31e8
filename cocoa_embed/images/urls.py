"""Parse web addresses, match them against allowed hosts, and recognise public network addresses."""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from cocoa_embed.errors import UsageError, one_line, printable

DEFAULT_PORTS = {"http": 80, "https": 443}

SHOWN_CHARACTERS = 200
"""Characters of an address that errors show."""

PUBLIC_IPV6 = IPv6Network("2000::/3")
"""The global unicast range. Loopback, link-local, private and mapped addresses are outside of it, and so are IPv4
addresses behind a translator (64:ff9b::/96)."""

NOT_PUBLIC: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments, among them Teredo, which embeds IPv4 addresses
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which embeds IPv4 addresses
        "3fff::/20",  # documentation
    )
)
"""Networks that some versions of Python call global."""


class Refused(Exception):
    """An address is not fetched, or its response not accepted; the message gives the reason and begins with a verb."""


class Hop(NamedTuple):
    """The parts of one request's address."""

    scheme: str
    host: str
    """In lower case and ASCII, without a dot at its end."""
    port: int
    target: str
    """Path and query, percent-encoded."""


class HostRule(NamedTuple):
    """An entry in the list of allowed hosts."""

    host: str
    """Begins with a dot if the entry allows subdomains of the host, and not the host itself."""
    port: int | None
    """None allows the scheme's default port."""

    def allows(self, hop: Hop) -> bool:
        """Return whether a request to this address is allowed."""
        is_host = hop.host.endswith(self.host) if self.host.startswith(".") else hop.host == self.host
        return is_host and hop.port == (DEFAULT_PORTS[hop.scheme] if self.port is None else self.port)


def is_web(address: str) -> bool:
    """Return whether an address, or a path, is an http or https address."""
    return address[:8].lower().startswith(("http://", "https://"))


def parse_address(address: str) -> Hop:
    """Parse an address.

    :raises Refused: If it is not http or https, names a user, or is malformed.
    """
    if re.search(r"[\x00-\x20\x7f\\]", address):
        raise Refused("has spaces, control characters or backslashes in it; percent-encode them")
    try:
        parts = urlsplit(address)
        scheme, port = parts.scheme, parts.port
        if scheme not in DEFAULT_PORTS:
            raise Refused("is not an http or https address")
        if "@" in parts.netloc:
            raise Refused("has a user name in it, which is not allowed")
        host = ascii_host(parts.hostname or "")
        query = f"?{parts.query}" if parts.query else ""
        # Characters that are encoded already (%20) stay as they are.
        target = quote((parts.path or "/") + query, safe="/?%:;=&+$,!~*'()@#[]|")
    except ValueError as error:
        raise Refused(f"is not a valid address ({one_line(error)})") from error
    return Hop(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, target)


def ascii_host(host: str) -> str:
    """Return a host in its canonical form: lower case, IDNA-encoded, without a final dot.

    :raises ValueError: If it is not a host.
    """
    if ":" in host:
        return str(ip_address(host))
    text = host.encode("idna").decode().lower().removesuffix(".")
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text):
        raise ValueError(f"{host!a} is not a host")
    return text


def parse_rule(text: str) -> HostRule:
    """Parse an entry of the list of allowed hosts.

    :raises UsageError: If it is not a host, ``*.host``, ``host:port`` or ``*.host:port``.
    """
    try:
        parts = urlsplit(f"//{text.removeprefix('*.')}")
        if parts.netloc != text.removeprefix("*.") or "@" in text:
            raise ValueError("it has more than a host and a port")
        dot = "." if text.startswith("*.") else ""
        return HostRule(dot + ascii_host(parts.hostname or ""), parts.port)
    except ValueError as error:
        raise UsageError(
            f"{text!a} is not an allowed host ({one_line(error)}); give example.com, *.example.com or example.com:8080"
        ) from error


def next_address(address: str, location: str) -> str:
    """Return the address that a redirect leads to.

    :raises Refused: If there is none, or it leads from https back to http.
    """
    if not location:
        raise Refused("redirects without an address")
    try:
        there = urljoin(address, location)
    except ValueError as error:
        raise Refused(f"leads to a malformed address ({one_line(error)})") from error
    if address[:6].lower() == "https:" and there[:5].lower() == "http:":
        raise Refused(f"leads from https to {shown_address(there)}, which is not encrypted")
    return there


def shown_address(address: str) -> str:
    """Return an address for error messages: without user, password and query, which may be secret."""
    text, mark, _ = address.partition("?")
    text = re.sub(r"^([a-z]+:/*)[^/]*@", r"\1", text, flags=re.IGNORECASE) + ("?..." if mark else "")
    return printable(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is a unicast address on the public network that embeds no other address."""
    if isinstance(address, IPv6Address) and (address.scope_id or address not in PUBLIC_IPV6):
        return False
    is_ordinary = address.is_global and not address.is_multicast and not address.is_reserved
    return is_ordinary and not any(address in network for network in NOT_PUBLIC)

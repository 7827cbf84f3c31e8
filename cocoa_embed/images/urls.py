"""Web addresses: taken apart, held against a list of allowed hosts, and network addresses told public or not."""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from cocoa_embed.errors import UsageError, one_line, printable

DEFAULT_PORTS = {"http": 80, "https": 443}

SHOWN_CHARACTERS = 200
"""How much of an address is shown in errors."""

PUBLIC_IPV6 = IPv6Network("2000::/3")
"""All that is handed out for the public network. Outside are loopback, link-local, private and mapped addresses, and
those that stand for an IPv4 address behind a translator (64:ff9b::/96)."""

NOT_PUBLIC: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments, Teredo's among them: it holds IPv4 addresses
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: holds IPv4 addresses
        "3fff::/20",  # documentation
    )
)
"""What some versions of Python take for public, besides what they all do not."""


class Refused(Exception):
    """An address is not fetched, or its answer not taken; the message says why, beginning with a verb."""


class Hop(NamedTuple):
    """One request: where to, taken apart."""

    scheme: str
    host: str
    """In lower case and ASCII, without a dot at its end."""
    port: int
    target: str
    """Path and query, percent-encoded."""


class HostRule(NamedTuple):
    """An entry of the list of allowed hosts."""

    host: str
    port: int | None
    """None allows the port that the scheme has by itself."""
    is_wildcard: bool
    """It allows what is below the host, and not the host."""

    def allows(self, hop: Hop) -> bool:
        """Tell whether a request may be made."""
        is_host = hop.host.endswith(f".{self.host}") if self.is_wildcard else hop.host == self.host
        return is_host and hop.port == (DEFAULT_PORTS[hop.scheme] if self.port is None else self.port)


def read_address(address: str) -> Hop:
    """Take an address apart.

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
        # What is encoded already, %20, stays as it is.
        target = quote((parts.path or "/") + query, safe="/?%:;=&+$,!~*'()@#[]|")
    except ValueError as error:
        raise Refused(f"is no valid address ({one_line(error)})") from error
    return Hop(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, target)


def ascii_host(host: str) -> str:
    """Return the one way to write a host: lower case, non-ASCII letters as in DNS, no dot at its end.

    :raises ValueError: If it is no host.
    """
    if ":" in host:
        return str(ip_address(host))
    text = host.encode("idna").decode().lower().removesuffix(".")
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text):
        raise ValueError(f"{host!a} is no host")
    return text


def read_rule(text: str) -> HostRule:
    """Read an entry of the list of allowed hosts.

    :raises UsageError: If it is no host, ``*.host``, ``host:port`` or ``*.host:port``.
    """
    try:
        parts = urlsplit(f"//{text.removeprefix('*.')}")
        if parts.netloc != text.removeprefix("*.") or "@" in text:
            raise ValueError("it has more than a host and a port")
        return HostRule(ascii_host(parts.hostname or ""), parts.port, text.startswith("*."))
    except ValueError as error:
        raise UsageError(
            f"{text!a} is no allowed host ({one_line(error)}); give example.com, *.example.com or example.com:8080"
        ) from error


def next_address(address: str, location: str) -> str:
    """Return the address that an answer leads to.

    :raises Refused: If it is none, or leads from https back to http.
    """
    if not location:
        raise Refused("leads on, but does not say where to")
    try:
        there = urljoin(address, location)
    except ValueError as error:
        raise Refused(f"leads to what is no valid address ({one_line(error)})") from error
    if address[:6].lower() == "https:" and there[:5].lower() == "http:":
        raise Refused(f"leads from https to {shown_address(there)}, which is not encrypted")
    return there


def shown_address(address: str) -> str:
    """Return an address as errors show it: without user, password and query, which may be secret."""
    text, mark, _ = address.partition("?")
    text = re.sub(r"^([a-z]+:/*)[^/]*@", r"\1", text, flags=re.IGNORECASE) + ("?..." if mark else "")
    return printable(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether an address is one machine on the public network, and stands for nothing else."""
    if isinstance(address, IPv6Address) and (address.scope_id or address not in PUBLIC_IPV6):
        return False
    is_ordinary = address.is_global and not address.is_multicast and not address.is_reserved
    return is_ordinary and not any(address in network for network in NOT_PUBLIC)

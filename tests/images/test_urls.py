from ipaddress import ip_address

import pytest

from cocoa_embed.errors import UsageError
from cocoa_embed.images.urls import Refused, is_public, next_address, parse_address, parse_rule, shown_address

NOT_PUBLIC = """
127.0.0.1 127.8.9.10 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.8 192.0.2.1 192.88.99.1
198.18.0.1 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1
::ffff:8.8.8.8 64:ff9b::a00:1 64:ff9b::808:808 64:ff9b:1::1 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2
2001:10::1 2001:db8::1 2002:7f00:1:: 2002:808:808::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%1 fec0::1
ff02::1
"""
PUBLIC = "8.8.8.8 93.184.216.34 172.32.0.1 2606:2800:220:1::1 2a00:1450::1"


def test_only_global_unicast_addresses_that_embed_no_other_are_public() -> None:
    assert [address for address in NOT_PUBLIC.split() if is_public(ip_address(address))] == []
    assert [address for address in PUBLIC.split() if not is_public(ip_address(address))] == []


def test_a_redirect_from_https_to_http_is_refused() -> None:
    assert next_address("https://a.test/x", "y") == "https://a.test/y"
    assert next_address("http://a.test/", "https://a.test/") == "https://a.test/"
    with pytest.raises(Refused, match=r"leads from https to http://a\.test/, which is not encrypted"):
        next_address("https://a.test/", "http://a.test/")


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        (
            "example.org",
            ["http://example.org", "https://EXAMPLE.org./"],
            ["http://a.example.org", "http://example.com"],
        ),
        (
            "*.example.org",
            ["http://a.example.org", "http://a.b.example.org"],
            ["http://example.org", "http://evilexample.org", "http://a.example.org.evil.com", "http://.example.org"],
        ),
        ("example.org:8080", ["http://example.org:8080"], ["http://example.org", "http://example.org:80"]),
        ("*.example.org:8443", ["https://a.example.org:8443"], ["https://a.example.org", "https://example.org:8443"]),
        ("bücher.example", ["http://xn--bcher-kva.example", "http://BÜCHER.example"], ["http://bucher.example"]),
        ("xn--bcher-kva.example", ["http://bücher.example"], ["http://xn--other.example"]),
        ("8.8.8.8", ["http://8.8.8.8"], ["http://8.8.4.4", "http://8.8.8.8.example"]),
        ("[2606:2800::1]", ["http://[2606:2800:0:0::1]/"], ["http://[2606:2800::2]/"]),
    ],
)
def test_a_rule_allows_its_hosts_and_no_others(rule: str, allowed: list[str], refused: list[str]) -> None:
    def is_allowed(address: str) -> bool:
        try:
            return parse_rule(rule).allows(parse_address(address))
        except Refused:
            return False

    assert all(map(is_allowed, allowed))
    assert not any(map(is_allowed, refused))


@pytest.mark.parametrize(
    "rule",
    ["", "*", "*.", "*.*.org", "a*.org", "http://example.org", "example.org/a", "me@a.org", "a b", "a.org:x", "."],
)
def test_a_malformed_rule_is_wrong_usage(rule: str) -> None:
    with pytest.raises(UsageError, match=r"is not an allowed host .* give example\.com"):
        parse_rule(rule)


def test_an_address_is_shown_without_its_secrets() -> None:
    assert shown_address("https://me:p@ss@a.org/x.png?key=1#2") == "https://a.org/x.png?..."
    assert shown_address("http://a.org/\n") == ascii("http://a.org/\n")
    assert len(shown_address("http://a.org/" + "x" * 5000)) < 220

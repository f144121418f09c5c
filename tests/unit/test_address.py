"""Whose address counts: nobody can choose his own, and no proxy is taken for a client."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.address import client_address
from service.api.context import RequestContext

TRUSTED = tuple(map(ip_network, ("10.0.0.0/8", "fd00::/8")))
PEER = ("10.0.0.1", 4711)

proxies = st.one_of(
    st.integers(0, 2**24 - 1).map(lambda n: str(IPv4Address((10 << 24) + n))),
    st.integers(0, 2**120 - 1).map(lambda n: str(IPv6Address((0xFD << 120) + n))),
)
strangers = st.integers(11 << 24, 2**32 - 1).map(lambda n: str(IPv4Address(n)))


def forwarded(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-forwarded-for", value.encode("latin-1")) for value in values]


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ([], "10.0.0.1"),
        ([""], "10.0.0.1"),
        (["192.0.2.1"], "192.0.2.1"),
        (["192.0.2.1, 10.9.9.9"], "192.0.2.1"),
        (["6.6.6.6, 192.0.2.1,10.9.9.9"], "192.0.2.1"),
        (["6.6.6.6", "192.0.2.1", "10.9.9.9"], "192.0.2.1"),
        (["10.1.1.1, 10.9.9.9"], "10.1.1.1"),
        (["192.0.2.1:567"], "192.0.2.1"),
        (["[2001:db8::1]:80"], "2001:db8::/64"),
        (["[2001:db8::1]"], "2001:db8::/64"),
        (["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        (["fe80::1%eth0"], "fe80::/64"),
        (["::ffff:192.0.2.1"], "192.0.2.1"),
        (["192.0.2.1, ::ffff:10.9.9.9"], "192.0.2.1"),
        (["6.6.6.6, unknown, 10.9.9.9"], "10.9.9.9"),
        (["6.6.6.6, unknown"], "10.0.0.1"),
        (["6.6.6.6, "], "10.0.0.1"),
        (["\xe9, [::1, 1.2.3"], "10.0.0.1"),
    ],
)
def test_what_a_trusted_proxy_says(said: list[str], address: str) -> None:
    headers = [(b"accept", b"*/*"), *forwarded(*said), (b"x-forwarded", b"7.7.7.7")]
    assert client_address(PEER, headers, TRUSTED) == address


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("192.0.2.9", 1), "192.0.2.9"),
        (("::ffff:192.0.2.9", 1), "192.0.2.9"),
        (("2001:db8::9", 1), "2001:db8::/64"),
        (("", 0), ""),
        (("no address", 1), ""),
        (None, ""),
    ],
)
def test_a_peer_that_is_no_trusted_proxy_says_nothing(peer: tuple[str, int] | None, address: str) -> None:
    assert client_address(peer, forwarded("6.6.6.6"), TRUSTED) == address


def test_nobody_is_trusted_who_is_not_named() -> None:
    assert client_address(PEER, forwarded("6.6.6.6"), ()) == "10.0.0.1"


@given(lies=st.lists(st.text(st.characters(max_codepoint=255))), client=strangers, way=st.lists(proxies))
def test_no_lie_of_the_client_changes_its_address(lies: list[str], client: str, way: list[str]) -> None:
    headers = forwarded(*lies, ",".join([client, *way]))
    assert client_address(PEER, headers, TRUSTED) == client


@given(host=st.integers(0, 2**64 - 1), network=st.integers(0x2001 << 48, (0x2002 << 48) - 1))
def test_all_addresses_of_a_subscriber_are_one(host: int, network: int) -> None:
    address = str(IPv6Address(network << 64 | host))
    assert client_address(PEER, forwarded(address), TRUSTED) == f"{IPv6Address(network << 64)}/64"


@given(st.lists(st.text(st.characters(max_codepoint=255))), st.text())
def test_nothing_that_is_sent_is_an_error(said: list[str], host: str) -> None:
    client_address(PEER, forwarded(*said), TRUSTED)
    client_address((host, 1), forwarded(*said), TRUSTED)


def test_a_request_tells_it_when_it_is_asked() -> None:
    scope = {"method": "GET", "path": "/", "client": PEER, "headers": forwarded("192.0.2.1", "10.2.2.2")}
    assert RequestContext(scope, "id", TRUSTED).client_address() == "192.0.2.1"
    assert RequestContext(scope, "id").client_address() == "10.0.0.1"
    assert RequestContext(scope | {"client": None}, "id", TRUSTED).client_address() == ""

"""The client's address: the socket's peer, or what trusted proxies say of it in X-Forwarded-For.

Anybody can send that header, and each proxy adds the address of its own peer at the end. So it is read from
the end, for as long as the addresses are those of proxies that we trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

SUBSCRIBER_BITS: Final = 64
"""Of an IPv6 address: whoever has one has at least all those that begin with the same bits."""


def client_address(
    client: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network]
) -> str:
    """As `192.0.2.1` or `2001:db8::/64`; empty where the peer has no address, as on a Unix socket.

    `client` and `headers` are those of the ASGI scope. If all addresses are trusted, it is the first of them;
    what cannot be read as an address ends the search, for nobody knows who wrote what is before it.
    """
    found = _read(client[0]) if client is not None else None
    if found is None:
        return ""
    if trusted and _is_trusted(found, trusted):
        said = b",".join(value for name, value in headers if name == b"x-forwarded-for")
        for part in reversed(said.decode("latin-1").split(",")):
            address = _read(part.strip())
            if address is None:
                break
            found = address
            if not _is_trusted(address, trusted):
                break
    if isinstance(found, IPv4Address):
        return str(found)
    return str(IPv6Network((int(found), SUBSCRIBER_BITS), strict=False))


def _is_trusted(address: Address, trusted: Sequence[Network]) -> bool:
    return any(address in network for network in trusted)


def _read(text: str) -> Address | None:
    """An address, of which a port, brackets and a zone are taken away. One in IPv6's form of IPv4 is IPv4."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address

"""Names of keys. docs/redis.md has the table.

All keys of a tenant carry the tenant as their hash tag: they are of one slot, so a script may touch several.
Names of callers are percent-encoded: none can contain a separator or a tag of its own.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final
from urllib.parse import quote

from service.domain import Principal

FLEET: Final = ""
"""In a tenant's place: the counters of all tenants together."""


class Keys:
    """Keys below one prefix, for example `weir:`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._of_tenant = lru_cache(maxsize=1_000)(self._tag)

    def conversation(self, owner: Principal, conversation_id: str) -> str:
        return f"{self._of_owner(owner, 'conv')}:{conversation_id}"

    def messages(self, owner: Principal, conversation_id: str) -> str:
        return f"{self._of_owner(owner, 'msgs')}:{conversation_id}"

    def conversations(self, owner: Principal) -> str:
        return self._of_owner(owner, "convs")

    def owners(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}owners"

    def cache_pattern(self, tenant: str) -> str:
        """What all cached answers of a tenant are called, for SCAN; none of its letters has two meanings."""
        return f"{self._of_tenant(tenant)}cache:*"

    def turn(self, owner: Principal, turn_id: str) -> str:
        return f"{self._of_owner(owner, 'turn')}:{turn_id}"

    def ledger(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}ledger"

    def open(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}open"

    def leases(self, tenant: str) -> str:
        return f"{self._of_tenant(tenant)}leases"

    def counter(self, tenant: str, name: str) -> str:
        return f"{self._of_tenant(tenant)}{name}"

    def tenants(self) -> str:
        return f"{self._prefix}tenants"

    def sweeper(self) -> str:
        return f"{self._prefix}sweeper"

    def entered(self, tenant: str, minute: int) -> str:
        """Of records whose ids are of this minute since 1970."""
        return f"{self._of_tenant(tenant)}entered:{minute}"

    def sums(self, tenant: str, hour: int) -> tuple[str, str]:
        """Of the hour since 1970, and of its day."""
        return _sums(self._of_tenant(tenant), hour)

    def _of_owner(self, owner: Principal, kind: str) -> str:
        return f"{self._of_tenant(owner.tenant)}{kind}:{quote(owner.name, safe='')}"

    def _tag(self, tenant: str) -> str:
        name = "*" if tenant == FLEET else quote(tenant, safe="")  # which leaves no star as it is
        return f"{self._prefix}{{{name}}}:"


@lru_cache(maxsize=4_096)
def _sums(tag: str, hour: int) -> tuple[str, str]:
    at = datetime.fromtimestamp(hour * 3600, tz=UTC)
    return f"{tag}hour:{at:%Y%m%d%H}", f"{tag}day:{at:%Y%m%d}"

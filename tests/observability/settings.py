"""The configuration of the traffic run: upstreams, models, prices, keys, limits and a budget.

The prices are what a reader can multiply by hand; docs of the run's tests compare dollars with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

GPT: Final = "gpt-4o"
MINI: Final = "gpt-4o-mini"
REASONER: Final = "o4-mini"
LLAMA: Final = "llama-3.3-70b"
LAB: Final = "qwen-lab"
EMBEDDER: Final = "text-embedding-3-small"
MODELS: Final = (GPT, MINI, REASONER, LLAMA, LAB, EMBEDDER)

OPENAI, AZURE, VLLM, GROQ = "openai", "azure-eu", "vllm-lab", "groq"


class Price(NamedTuple):
    """US dollars for a million tokens."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None


PRICES: Final[Mapping[str, Price]] = {
    GPT: Price(Decimal("2.5"), Decimal(10), Decimal("1.25")),
    MINI: Price(Decimal("0.15"), Decimal("0.6"), Decimal("0.075")),
    REASONER: Price(Decimal("1.1"), Decimal("4.4"), Decimal("0.275")),
    LLAMA: Price(Decimal("0.59"), Decimal("0.79")),
    EMBEDDER: Price(Decimal("0.02"), Decimal(0)),
}
"""All are in the YAML but the last one's, which is that of the price table. LAB has none anywhere."""

KEYS: Final[Mapping[str, str]] = {
    "acme-web": "acme",
    "acme-batch": "acme",
    "acme-capped": "acme",
    "globex-app": "globex",
    "globex-trial": "globex",
}
"""Keys that ask models, and their tenants."""
ADMIN: Final = "ops"
CAPPED_REQUESTS: Final = 12
TRIAL_USD: Final = Decimal("0.002")
PLACES: Final = 160
QUEUE: Final = 40
FIRST_BYTE_SECONDS: Final = 2.4
IDLE_SECONDS: Final = 2.4


def secret(key: str) -> str:
    """What a caller with the key of this name sends."""
    return f"weir-run-{key}"


def document(addresses: Mapping[str, str]) -> dict[str, Any]:
    """The YAML file's content; `addresses` are the base URLs of the upstreams."""

    def price(model: str) -> dict[str, float]:
        given = PRICES[model]._asdict()
        return {name: float(value) for name, value in given.items() if value is not None}

    def upstream(name: str, provider: str, **values: Any) -> dict[str, Any]:
        return {"name": name, "base_url": addresses[name], "provider": provider, **values}

    return {
        "upstreams": [
            upstream(OPENAI, "openai"),
            upstream(AZURE, "azure"),
            upstream(VLLM, "vllm", first_byte_timeout=FIRST_BYTE_SECONDS, idle_timeout=IDLE_SECONDS),
            upstream(GROQ, "groq", connect_timeout=0.5),
        ],
        "models": [
            {
                "name": GPT,
                "upstreams": [{"upstream": OPENAI}, {"upstream": AZURE}],
                "hedge": True,
                "fallbacks": {"context_length": [MINI]},
                "price": price(GPT),
            },
            {
                "name": MINI,
                "upstreams": [{"upstream": OPENAI}, {"upstream": AZURE}],
                "price": price(MINI),
            },
            {"name": REASONER, "upstream": OPENAI, "price": price(REASONER)},
            {
                "name": LLAMA,
                "upstreams": [{"upstream": GROQ}, {"upstream": VLLM}],
                "price": price(LLAMA),
            },
            {"name": LAB, "upstream": VLLM},
            {"name": EMBEDDER, "upstream": OPENAI},
        ],
        "keys": [
            {
                "name": name,
                "tenant": tenant,
                "sha256": hashlib.sha256(secret(name).encode()).hexdigest(),
                **({"priority": "low"} if name.endswith("batch") else {}),
            }
            for name, tenant in KEYS.items()
        ]
        + [
            {
                "name": ADMIN,
                "tenant": "operators",
                "admin": True,
                "sha256": hashlib.sha256(secret(ADMIN).encode()).hexdigest(),
            }
        ],
        "limits": [{"name": "capped", "keys": ["acme-capped"], "requests": CAPPED_REQUESTS, "window": 86400}],
        "budgets": [
            {"name": "trial", "keys": ["globex-trial"], "per": "key", "usd": float(TRIAL_USD)},
            {"name": "acme-month", "tenants": ["acme"], "usd": 40.0},
            {"name": "globex-month", "tenants": ["globex"], "usd": 25.0},
            {"name": "app-day", "keys": ["globex-app"], "per": "key", "usd": 12.0, "period": "day"},
        ],
    }

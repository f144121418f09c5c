"""Which upstream serves which model."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Configuration, FileConfig
from service.domain import ANONYMOUS
from service.errors import ModelNotFound
from service.ports import Upstream
from service.routing.breaker import Circuit
from service.routing.catalogue import MOST_MADE_UP, Conditions, ModelCatalogue
from service.upstreams.direct import DirectUpstream
from service.upstreams.making import make_upstreams
from service.upstreams.openai_sdk import OpenAISDKUpstream
from service.upstreams.simulator import SimulatorUpstream
from tests.running import configuration

FILE = FileConfig.model_validate(
    {
        "upstreams": [
            {"name": "one", "base_url": "http://one.internal/v1", "stream_usage": False},
            {"name": "two", "base_url": "https://api.groq.com/openai/v1"},
            {"name": "sdk", "kind": "openai_sdk", "base_url": "https://api.openai.com/v1"},
            {
                "name": "blue",
                "kind": "azure",
                "base_url": "https://x.openai.azure.com",
                "api_version": "2024-10-21",
            },
            {"name": "named", "base_url": "http://three.internal/v1", "provider": "mistral"},
            {"name": "sim", "kind": "simulator"},
        ],
        "models": [
            {"name": "fast", "upstream": "two", "upstream_model": "llama-3", "aliases": ["quick", "gpt-4o"]},
            {"name": "own", "upstream": "one"},
        ],
    }
)


def made(file: FileConfig | None = None, **values: Any) -> tuple[Configuration, dict[str, Upstream]]:
    known = configuration(file=file, **values)
    return known, make_upstreams(known)


def test_each_kind_of_upstream_has_its_adapter_and_provider() -> None:
    _, upstreams = made(FILE)
    assert {name: (type(u), u.provider) for name, u in upstreams.items()} == {
        "one": (DirectUpstream, "one.internal"),
        "two": (DirectUpstream, "groq"),
        "sdk": (OpenAISDKUpstream, "openai"),
        "blue": (OpenAISDKUpstream, "azure"),
        "named": (DirectUpstream, "mistral"),
        "sim": (SimulatorUpstream, "simulator"),
    }


@pytest.mark.parametrize("name", ["fast", "quick", "gpt-4o"])
def test_a_model_and_its_aliases_go_to_its_upstream_under_its_name_there(name: str) -> None:
    known, upstreams = made(FILE)
    target = ModelCatalogue(known, upstreams).resolve(name).first
    assert (target.upstream, target.model, target.stream_usage) == (upstreams["two"], "llama-3", True)


def test_a_model_without_another_name_keeps_its_own_and_its_upstreams_ways() -> None:
    known, upstreams = made(FILE)
    target = ModelCatalogue(known, upstreams).resolve("own").first
    assert (target.upstream, target.model, target.stream_usage) == (upstreams["one"], "own", False)


@pytest.mark.parametrize("name", ["unknown", "FAST", "fast ", "\x1b[31m\n", "ü" * 5_000])
def test_where_models_are_listed_others_are_not_served(name: str) -> None:
    known, upstreams = made(FILE)
    with pytest.raises(ModelNotFound) as caught:
        ModelCatalogue(known, upstreams).resolve(name)
    assert caught.value.param == "model"
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


def test_without_a_list_every_name_goes_to_the_first_upstream() -> None:
    known, upstreams = made(FileConfig(upstreams=FILE.upstreams))
    target = ModelCatalogue(known, upstreams).resolve("org/any-model:7b").first
    assert (target.upstream, target.model, target.stream_usage) == (
        upstreams["one"],
        "org/any-model:7b",
        False,
    )


@pytest.mark.parametrize("name", ["", "two words", "line\n", "ü", "x" * 201])
def test_names_that_no_model_has_are_refused(name: str) -> None:
    known, upstreams = made()
    with pytest.raises(ModelNotFound):
        ModelCatalogue(known, upstreams).resolve(name)


async def test_the_list_has_each_name_that_a_caller_may_use() -> None:
    known, upstreams = made(FILE)
    listed = await ModelCatalogue(known, upstreams).models(ANONYMOUS)
    assert [(m["id"], m["owned_by"]) for m in listed] == [
        ("fast", "groq"),
        ("quick", "groq"),
        ("gpt-4o", "groq"),
        ("own", "one"),  # its host is nobody's business
    ]


async def test_without_a_list_the_first_upstreams_models_are_shown() -> None:
    known, upstreams = made()
    assert await ModelCatalogue(known, upstreams).models(ANONYMOUS) == await SimulatorUpstream().models()


def test_a_model_that_is_in_use_keeps_its_circuits_whichever_names_callers_make_up() -> None:
    places = [{"upstream": "one"}, {"upstream": "two"}]
    pattern = {"upstreams": FILE.upstreams, "models": [{"name": "*", "upstreams": places}]}
    known, upstreams = made(FileConfig.model_validate(pattern))
    conditions = Conditions()
    catalogue = ModelCatalogue(known, upstreams, conditions)
    hot = catalogue.resolve("hot").places[0].condition
    hot.breaker.open_for(60)
    for number in range(3 * MOST_MADE_UP):
        catalogue.resolve(f"made-up-{number}")
        catalogue.resolve("hot")
    assert hot.breaker.state is Circuit.OPEN
    assert conditions.find("one", "hot") is hot
    assert ModelCatalogue(known, upstreams, conditions).resolve("hot").places[0].condition is hot
    assert len(conditions.items()) == 2 * MOST_MADE_UP


def test_what_was_to_be_forgotten_is_known_again_when_the_new_cannot_be_made() -> None:
    known, upstreams = made(FILE)
    conditions = Conditions()
    own = ModelCatalogue(known, upstreams, conditions).resolve("own").places[0].condition
    own.breaker.open_for(60)
    with pytest.raises(ZeroDivisionError), conditions.forgetting(["one"]):
        raise ZeroDivisionError
    assert conditions.find("one", "own") is own
    assert own.breaker.state is Circuit.OPEN
    with conditions.forgetting(["one"]):
        new = ModelCatalogue(known, upstreams, conditions).resolve("own").places[0].condition
    assert conditions.find("one", "own") is new
    assert (own.breaker.state, new.breaker.state) == (Circuit.CLOSED, Circuit.CLOSED)


def test_prices_and_contexts_stand_at_each_name_that_a_pattern_stands_for() -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": name, "base_url": "http://x.internal/v1"} for name in ("one", "two")],
            "models": [
                {
                    "name": "ft:*",
                    "upstreams": [{"upstream": "one"}, {"upstream": "two", "price": {"input": 9}}],
                    "price": {"input": 1},
                    "context_tokens": 5,
                }
            ],
        }
    )
    known, upstreams = made(file)
    route = ModelCatalogue(known, upstreams).resolve("ft:mine")
    prices = [place.target.price for place in route.places]
    assert [price.input for price in prices if price is not None] == [1, 9]
    assert route.first.context_tokens == 5

"""Which upstream serves which model."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Configuration, FileConfig
from service.errors import ModelNotFound
from service.ports import Upstream
from service.upstreams.direct import DirectUpstream
from service.upstreams.openai_sdk import OpenAISDKUpstream
from service.upstreams.router import ModelCatalogue, make_upstreams
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
    target = ModelCatalogue(known, upstreams).resolve(name)
    assert (target.upstream, target.model, target.stream_usage) == (upstreams["two"], "llama-3", True)


def test_a_model_without_another_name_keeps_its_own_and_its_upstreams_ways() -> None:
    known, upstreams = made(FILE)
    target = ModelCatalogue(known, upstreams).resolve("own")
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
    target = ModelCatalogue(known, upstreams).resolve("org/any-model:7b")
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
    listed = await ModelCatalogue(known, upstreams).models()
    assert [(m["id"], m["owned_by"]) for m in listed] == [
        ("fast", "groq"),
        ("quick", "groq"),
        ("gpt-4o", "groq"),
        ("own", "one.internal"),
    ]


async def test_without_a_list_the_first_upstreams_models_are_shown() -> None:
    known, upstreams = made()
    assert await ModelCatalogue(known, upstreams).models() == await SimulatorUpstream().models()

"""A reload that fails leaves everything as it was."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from service.app import Weir, create_app
from service.config import FileConfig, KeyConfig
from tests.running import configuration


def file(most: int, *places: str) -> FileConfig:
    upstreams = [
        {"name": name, "base_url": f"http://{name}.internal/v1", "max_concurrent": most, "region": str(most)}
        for name in ("one", "two")
    ]
    model = {"name": "m*", "upstreams": [{"upstream": name} for name in places]}
    return FileConfig.model_validate({"upstreams": upstreams, "models": [model]})


async def test_a_reload_that_fails_changes_nothing() -> None:
    weir: Weir = create_app(configuration(file=file(1, "one")), registry=CollectorRegistry()).state.weir
    before, bound = weir.serving.now, weir.conditions.most_made_up
    (place,) = before.service.catalogue.resolve("m").places
    bad = KeyConfig.model_construct(name="k", sha256="no hex")
    with pytest.raises(ValueError, match="non-hexadecimal"):
        await weir.serving.reload(configuration(file=file(2, "one", "two"), keys=(bad,)))
    peer = place.condition.peer
    assert (peer.most, peer.region, weir.conditions.most_made_up) == (1, "1", bound)
    assert weir.serving.now is before
    assert weir.conditions.find("one", "m") is place.condition
    await weir.serving.reload(configuration(file=file(2, "one", "two")))
    assert (peer.most, peer.region, weir.conditions.most_made_up) == (2, "2", 2 * bound)
    await weir.serving.close()

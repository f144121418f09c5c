"""With nothing configured: the official SDK holds a streamed conversation, and nobody is deceived."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from tests.running import RunningWeir, configuration


@pytest.fixture
def weir() -> Iterator[RunningWeir]:
    with RunningWeir(configuration(simulator_tokens_per_second=100_000)) as running:
        yield running


def test_a_streamed_conversation_without_key_or_network(weir: RunningWeir) -> None:
    messages: list[Any] = []
    for said in ("Hello!", "How are you?"):
        messages.append({"role": "user", "content": said})
        stream = weir.sdk().chat.completions.create(model="gpt-4o-mini", messages=messages, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == f"I am Weir's simulator, not a model. You wrote: {said}"
        messages.append({"role": "assistant", "content": text})


def test_it_says_everywhere_that_it_is_no_model(weir: RunningWeir) -> None:
    answer = weir.sdk().chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer.model == "simulator"
    health = httpx2.get(f"{weir.url}/health").json()
    assert health["parts"]["upstream:simulator"]["detail"]["note"] == "a simulator, not a model"
    assert weir.records()[0].cost.source == "simulator"


@pytest.mark.parametrize(
    ("model", "kind"), [("sim-429", openai.RateLimitError), ("sim-500", openai.InternalServerError)]
)
def test_its_failures_are_those_of_an_upstream(model: str, kind: type[openai.APIStatusError]) -> None:
    with RunningWeir(configuration(openai_max_retries=0)) as weir, pytest.raises(kind):
        weir.sdk().chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])


def test_its_stream_can_break(weir: RunningWeir) -> None:
    with pytest.raises(openai.APIError, match="broke"):
        list(
            weir.sdk().chat.completions.create(
                model="sim-drop", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
        )


def test_embeddings_and_responses_work_with_the_sdk(weir: RunningWeir) -> None:
    client = weir.sdk()
    assert len(client.embeddings.create(model="simulator", input=["a", "b"]).data) == 2
    assert client.responses.create(model="simulator", input="Hi").output_text.endswith("You wrote: Hi")
    events = list(client.responses.create(model="simulator", input="Hi", stream=True))
    assert events[-1].type == "response.completed"
    assert "simulator" in [m.id for m in client.models.list()]

"""Estimates of tokens, and histories that fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain import Message
from service.tokens import (
    IMAGE_TOKENS,
    MESSAGE_TOKENS,
    estimate_message,
    estimate_request,
    estimate_text,
    trim,
)

messages = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant", "system", "tool"]), st.text(max_size=30)),
    max_size=12,
)


@given(messages, st.integers(-10, 120))
def test_a_trimmed_history_is_its_longest_end_that_fits(history: list[Message], room: int) -> None:
    kept = trim(history, room)
    assert kept == tuple(history[len(history) - len(kept) :]), "a suffix, in its order"
    assert sum(map(estimate_message, kept)) <= max(room, 0)
    assert not kept or kept[0].role != "assistant"
    fitting = [n for n in range(len(history) + 1) if sum(map(estimate_message, history[n:])) <= room]
    if fitting:
        assert all(m.role == "assistant" for m in history[fitting[0] : len(history) - len(kept)])
    else:
        assert kept == ()


def test_a_message_that_does_not_fit_hides_the_ones_before_it() -> None:
    short, long = Message("user", "hi"), Message("user", "x" * 1_000)
    assert trim([short, long, short], 50) == (short,)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a", 1),
        ("abcd", 1),
        ("abcde", 2),
        ("é" * 4, 1),
        ("世界", 2),
        ("привет", 6),
        ("🌊", 1),
        ("ab世", 2),
        (" \n" * 4, 2),
    ],
)
def test_letters_are_estimated_by_their_kind(text: str, tokens: int) -> None:
    assert estimate_text(text) == tokens


@given(st.text(), st.text())
def test_more_text_is_never_fewer_tokens(text: str, more: str) -> None:
    assert estimate_text(text + more) >= estimate_text(text)


@pytest.mark.parametrize(
    ("parameters", "tokens"),
    [
        ({}, 0),
        ({"model": "a-long-name", "user": "x" * 100}, 0),
        ({"prompt": "abcd"}, 1),
        ({"prompt": ["abcd", "abcdefgh"]}, 3),
        ({"prompt": [1, 2, 3]}, 3),
        ({"input": [[1, 2], [3]]}, 3),
        ({"input": []}, 0),
        ({"input": "abcd", "instructions": "abcd"}, 2),
        ({"messages": [{"role": "user", "content": "abcd"}]}, MESSAGE_TOKENS + 1),
        ({"messages": [{"role": "user", "content": None}]}, MESSAGE_TOKENS),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "abcd"}]}]}, MESSAGE_TOKENS + 1),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:" + "x" * 9_000}}],
                    }
                ]
            },
            MESSAGE_TOKENS + IMAGE_TOKENS,
        ),
        ({"input": [{"type": "input_image", "image_url": "data:" + "x" * 9_000}]}, IMAGE_TOKENS),
        (
            {"tools": [{"type": "function", "function": {"name": "abcd", "strict": True}}]},
            7,
        ),  # its names, too
        ({"messages": 7, "prompt": None}, 0),
    ],
)
def test_a_request_is_estimated_from_what_the_model_reads(parameters: dict[str, Any], tokens: int) -> None:
    assert estimate_request(parameters) == tokens


LONG = "word " * 1_000


@pytest.mark.parametrize(
    "parameters",
    [
        {"tools": [{"type": "function", "function": {"parameters": {"properties": {LONG: {}}}}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": LONG}}}},
        {"text": {"format": {"schema": {"properties": {LONG: {}}}}}},
        {"input": [{"role": "user", "content": [{"type": "input_image", "text": LONG}]}]},
        {"messages": [{"type": "input_image", "role": "user", "content": LONG}]},
    ],
)
def test_a_text_counts_wherever_it_stands(parameters: dict[str, Any]) -> None:
    assert estimate_request(parameters) >= estimate_text(LONG)


def test_the_bytes_of_a_picture_are_no_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert estimate_request({"messages": [{"role": "user", "content": [picture]}]}) < 1_000

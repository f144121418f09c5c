"""Token counts where no provider counts: estimates from text, by the letters' kind.

A tokenizer's vocabulary would have to be downloaded and differs from model to model. The estimate
is made for limits before the call, for trimming a conversation, and for accounting where the
provider's own count never came; what rests on it says so (`UsageSource.ESTIMATED`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from service.domain import Message

ASCII_LETTERS_PER_TOKEN: Final = 4
MESSAGE_TOKENS: Final = 4
"""What a message costs besides its text: its role and its marks."""
_SAID: Final = ("messages", "prompt", "input", "instructions")
_SHOWN: Final = ("tools", "functions", "response_format", "text")
IMAGE_TOKENS: Final = 765
"""A picture of 1024 x 1024 at high detail, by OpenAI's published rule."""


def estimate_text(text: str) -> int:
    """Tokens of `text`: a quarter for a Latin letter, one for a letter of most other scripts."""
    letters = len(text)
    if text.isascii():
        return -(-letters // ASCII_LETTERS_PER_TOKEN)
    ascii_letters = sum(1 for letter in text if letter < "\u0250")
    return -(-ascii_letters // ASCII_LETTERS_PER_TOKEN) + letters - ascii_letters


def estimate_message(message: Message) -> int:
    return MESSAGE_TOKENS + estimate_text(message.content)


def estimate_request(parameters: dict[str, Any]) -> int:
    """Input tokens of a decoded request body, whichever of the four operations it is for."""
    said = sum(_estimate_value(parameters[name]) for name in _SAID if name in parameters)
    # Of schemas the names count, too: they go to the model as they are.
    shown = sum(_estimate_value(parameters[name], names=True) for name in _SHOWN if name in parameters)
    return said + shown


def trim(messages: Sequence[Message], room_tokens: int) -> tuple[Message, ...]:
    """The latest messages that fit into `room_tokens`, in their order.

    The first one kept is never an assistant's: an answer without its question misleads a model.
    """
    kept: list[Message] = []
    for message in reversed(messages):
        room_tokens -= estimate_message(message)
        if room_tokens < 0:
            break
        kept.append(message)
    while kept and kept[-1].role == "assistant":
        kept.pop()
    return tuple(reversed(kept))


def _estimate_value(value: Any, *, names: bool = False) -> int:
    """Not recursive: how deep a body is nested is its sender's choice."""
    tokens, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            tokens += estimate_text(item)
        elif isinstance(item, list):
            if item and all(isinstance(part, int) for part in item):
                tokens += len(item)  # a prompt given as token ids
            else:
                waiting.extend(item)
        elif isinstance(item, dict):
            tokens += MESSAGE_TOKENS if "role" in item else 0
            left_out: tuple[str, ...] = ("role", "type")
            if item.get("type") in ("image_url", "input_image"):
                tokens += IMAGE_TOKENS
                left_out += ("image_url", "detail")  # the picture's own bytes are no text
            elif item.get("type") == "input_audio":
                left_out += ("input_audio",)
            if names:
                tokens += sum(map(estimate_text, item))
            waiting.extend(v for k, v in item.items() if k not in left_out)
    return tokens

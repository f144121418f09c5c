"""Reads Alloy's configuration: blocks with attributes, as far as ours go. Anything else raises ValueError."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<number>\d+(?:\.\d+)?)
      | (?P<name>[A-Za-z_][\w]*(?:\.[A-Za-z_][\w]*)*)
      | (?P<sign>[][{}(),=+])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Reference:
    """The name of something that is elsewhere, perhaps called with arguments."""

    name: str
    arguments: tuple[Any, ...] | None = None


@dataclass
class Block:
    name: str
    label: str
    values: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def all(self, name: str) -> list[Block]:
        """Blocks of this name in it, at any depth, in their order."""
        return [found for block in self.blocks for found in (block, *block.all(name)) if found.name == name]

    def references(self) -> set[str]:
        """What its attributes, and those of its blocks, name."""
        named = set(_references(list(self.values.values())))
        return named.union(*(block.references() for block in self.blocks))


def parse(text: str) -> Block:
    """The whole as a block without a name."""
    return _Parser(list(_tokens(text))).body(Block("", ""), end="")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"not a word of Alloy's: {text[at : at + 20]!r}")
        at = match.end()
        if match.lastgroup != "space":
            yield str(match.lastgroup), match[0]
    yield "end", ""


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0

    def body(self, into: Block, end: str) -> Block:
        while (word := self._take())[1] != end:
            kind, name = word
            if kind != "name":
                raise ValueError(f"no name of a block or attribute: {name!r}")
            if self._next("="):
                if name in into.values:
                    raise ValueError(f"{name} is there twice")
                into.values[name] = self._expression()
                continue
            label = json.loads(self._take()[1]) if self._tokens[self._at][0] == "string" else ""
            self._want("{")
            into.blocks.append(self.body(Block(name, label), end="}"))
        return into

    def _expression(self) -> Any:
        value = self._term()
        while self._next("+"):
            value = (value, self._term())
        return value

    def _term(self) -> Any:
        kind, text = self._take()
        if kind in ("string", "number"):
            return json.loads(text)
        if text == "[":
            return self._list("]")
        if text == "{":
            return self._map()
        if kind == "name":
            if text in ("true", "false"):
                return text == "true"
            return Reference(text, tuple(self._list(")"))) if self._next("(") else Reference(text)
        raise ValueError(f"no value: {text!r}")

    def _list(self, end: str) -> list[Any]:
        items = []
        while not self._next(end):
            items.append(self._expression())
            if not self._next(","):
                self._want(end)
                break
        return items

    def _map(self) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not self._next("}"):
            kind, name = self._take()
            if kind not in ("name", "string") or name in items:
                raise ValueError(f"no name, or twice: {name!r}")
            self._want("=")
            items[name] = self._expression()
            if not self._next(","):
                self._want("}")
                break
        return items

    def _take(self) -> tuple[str, str]:
        token = self._tokens[self._at]
        self._at += 1
        return token

    def _next(self, sign: str) -> bool:
        found = self._tokens[self._at] == ("sign", sign)
        self._at += found
        return found

    def _want(self, sign: str) -> None:
        if not self._next(sign):
            raise ValueError(f"{sign!r} is missing before {self._tokens[self._at][1]!r}")


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Reference):
        yield value.name
        value = value.arguments
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)

"""Bounds of labels: which values there may be, and how many series they may make together.

Whatever has no room becomes `_other`: sums stay right, and only the detail is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from service.telemetry.instruments import Instrument

OTHER: Final = "_other"
MOST_LETTERS: Final = 128
"""Of a value."""

Labels = Mapping[str, str]


class BoundedLabel:
    """A label whose values are admitted up to `most`; everything else is `_other`."""

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self._most = most
        self._known: set[str] = set()
        self.know(known)

    def know(self, values: Iterable[str]) -> None:
        """These come from the configuration: they are admitted however many there are."""
        self._known.update(value for value in values if is_clean(value))

    def of(self, value: str, *, admit: bool) -> str:
        """`value`, if it is known or may be admitted; the empty value stands for itself."""
        if not value or value in self._known:
            return value
        if admit and len(self._known) < self._most and is_clean(value):
            self._known.add(value)
            return value
        return OTHER


def is_clean(value: str) -> bool:
    """What a person can read on a dashboard: not long, and without control letters."""
    return len(value) <= MOST_LETTERS and value.isprintable()


class Room:
    """How many series several metrics may have together, and how many more once labels became `_other`."""

    def __init__(self, most: int, folded: int = 0) -> None:
        self.most = most
        self.folded = folded
        self._used = 0

    def take(self, series: int, *, folded: bool) -> bool:
        if self._used + series > self.most + (self.folded if folded else 0):
            return False
        self._used += series
        return True

    def give(self, series: int) -> None:
        """Give back what was taken."""
        self._used -= series


class Bounded:
    """A metric, or a part of one, whose series are bounded.

    Where `room` has none left, labels become `_other`, those of `folds` one after the other. With all of
    them the rest of the labels has few values, and that set is there in any case. Without `folds` what has no
    room is left out: of gauges there are no sums.
    """

    def __init__(self, metric: Instrument, room: Room, folds: Sequence[str] = ()) -> None:
        self._metric = metric
        self._names = metric.names
        self._room = room
        self._folds = tuple(folds)
        self._children: dict[tuple[str, ...], Any] = {}

    def child(self, labels: Labels, overflow: set[str]) -> Any:
        """The metric's child for these of the labels, or None. `overflow` gets the names of what became
        `_other`."""
        values = tuple(labels[name] for name in self._names)
        child = self._children.get(values)
        if child is not None:
            return child
        if self._room.take(self._metric.size, folded=False):
            return self._make(values)
        folded = dict(zip(self._names, values, strict=True))
        for name in self._folds:
            if folded[name] != OTHER:
                overflow.add(name)
            folded[name] = OTHER
            values = tuple(folded.values())
            child = self._children.get(values)
            if child is not None:
                return child
            if self._room.take(self._metric.size, folded=True):
                return self._make(values)
        return self._make(values) if self._folds else None

    def forget(self, labels: Labels) -> None:
        """Of these labels there will be no more; who has the child has it in vain."""
        values = tuple(labels[name] for name in self._names)
        child = self._children.pop(values, None)
        if child is not None:
            child.set(0)  # the file that worker processes share keeps it
            self._metric.forget(values)
            self._room.give(self._metric.size)

    def _make(self, values: tuple[str, ...]) -> Any:
        child = self._children[values] = self._metric.labels(*values)
        return child


class Views(dict[Bounded, Any]):
    """The children that one kind of request adds to, each made when it is first needed."""

    __slots__ = ("labels", "overflow")

    def __init__(self, labels: dict[str, str], overflow: Iterable[str] = ()) -> None:
        self.labels = labels
        self.overflow = set(overflow)
        """The labels of which a value became `_other`."""

    def __missing__(self, metric: Bounded) -> Any:
        child = self[metric] = metric.child(self.labels, self.overflow)
        return child

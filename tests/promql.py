"""PromQL as tests look at it: which series an expression reads, and whether it reads them the right way."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import promql_parser as promql

RATES: Final = frozenset({"rate", "increase", "irate", "resets"})
"""Functions that know that a counter may begin anew."""
NO_VALUES: Final = frozenset({"count", "group", "absent", "absent_over_time"})
"""What asks only whether a series is there."""
COUNTER_ENDINGS: Final = ("_total", "_bucket", "_sum", "_count")


@dataclass(frozen=True)
class Read:
    """One selector of an expression, and the functions and aggregations around it, from the inside out."""

    name: str
    matchers: dict[str, str]
    functions: tuple[str, ...]
    labels: frozenset[str] | None
    """Those that are left of it by all aggregations around it; None where there is none by labels."""
    named: frozenset[str]
    """All that aggregations and matchings around it name, those too that are gone further out."""
    by_quantile: bool
    """A quantile of a histogram is taken of it."""
    selector: str
    """What finds its series, without any range or offset."""

    @property
    def is_counter(self) -> bool:
        return ":" not in self.name and self.name.endswith(COUNTER_ENDINGS)


def reads(expression: str) -> Iterator[Read]:
    """Raises ValueError where it is no PromQL."""
    return _reads(promql.parse(expression), (), None, frozenset())


def _reads(
    node: promql.Expr, functions: tuple[str, ...], labels: frozenset[str] | None, named: frozenset[str]
) -> Iterator[Read]:
    match node:
        case promql.VectorSelector():
            # The same label may have two matchers; what names it is enough here.
            matchers = {m.name: m.value for m in node.matchers.matchers}
            name, selector = node.name or matchers.get("__name__", ""), f"{node.name or ''}{node.matchers}"
            quantile = "histogram_quantile" in functions
            yield Read(name, matchers, functions, labels, named, quantile, selector)
        case promql.MatrixSelector():
            yield from _reads(node.vector_selector, functions, labels, named)
        case promql.Call():
            # What is done to a quantile says nothing of the buckets that it is made of.
            inside = None if node.func.name == "histogram_quantile" else labels
            if node.func.name == "label_replace":
                made, _, source = (argument.val for argument in node.args[1:4])
                named = named - {made} | {source}
                inside = None if inside is None else inside - {made} | {source}
            for argument in node.args:
                yield from _reads(argument, (node.func.name, *functions), inside, named)
        case promql.AggregateExpr():
            kept = _kept(node.modifier, labels)
            around = (str(node.op), *functions)
            inside = named if node.modifier is None else named | frozenset(node.modifier.labels)
            for part in (node.expr, node.param):
                if part is not None:
                    yield from _reads(part, around, kept, inside)
        case promql.BinaryExpr():
            matching = node.modifier and node.modifier.matching
            named = named if matching is None else named | frozenset(matching.labels)
            yield from _reads(node.lhs, functions, labels, named)
            yield from _reads(node.rhs, functions, labels, named)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _reads(node.expr, functions, labels, named)


def _kept(modifier: promql.AggModifier | None, labels: frozenset[str] | None) -> frozenset[str] | None:
    if modifier is None:
        return frozenset()
    if modifier.type is promql.AggModifierType.Without:
        return labels
    by = frozenset(modifier.labels)
    return by if labels is None else by & labels


def faults(expression: str, raw: Collection[str] = ()) -> list[str]:
    """What is wrong with it, one sentence each. `raw` are counters that it may read as they are."""
    try:
        found = list(reads(expression))
    except ValueError as error:
        return [f"is no PromQL: {error}"]
    told = []
    for read in found:
        wrapped = read.functions[0] if read.functions else ""
        rated = wrapped in RATES
        if read.is_counter and not rated and wrapped not in NO_VALUES and read.name not in raw:
            told.append(f"{read.name} is a counter: it wants rate() or increase()")
        if rated and not read.is_counter:
            told.append(f"{read.name} is no counter: rate() of it means nothing")
        summed = read.labels is not None and "le" not in read.labels
        if read.name.endswith("_bucket") and "le" not in read.matchers and summed:
            told.append(f"{read.name} is summed without its buckets' edges: keep le")
        if read.by_quantile and not read.name.endswith("_bucket") and ":" not in read.name:
            told.append(f"{read.name} has no buckets: a quantile wants them")
    return told

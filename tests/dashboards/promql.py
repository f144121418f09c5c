"""Reads PromQL as a tree: its metrics, and the units that its value has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

import promql_parser as promql

Units = Mapping[str, int] | None
"""Exponents by unit: dollars an hour are {usd: 1, h: -1}. None: fits everything, such as 0 times a thing."""

PER_SECOND: Final = ("rate", "irate", "deriv")
SAME: Final = (
    *("increase", "delta", "clamp_max", "clamp_min", "scalar", "vector", "predict_linear"),
    *(
        "avg_over_time",
        "max_over_time",
        "min_over_time",
        "last_over_time",
        "abs",
        "round",
        "sort",
        "sort_desc",
    ),
)
CALENDAR: Final = ("month", "day_of_month", "days_in_month", "hour", "minute")
COMPARISONS: Final = (">", "<", ">=", "<=", "==", "!=", "and", "unless")
RECORDED: Final[dict[str, Units]] = {
    "weir:cost_usd:rate5m": {"usd": 1, "s": -1},
    "weir:cost_usd:rate1h": {"usd": 1, "s": -1},
    "weir:budget_remaining_usd:min": {"usd": 1},
}


class Unlike(Exception):
    """Two things are added that have not the same unit."""


def children(node: Any) -> list[Any]:
    match node:
        case promql.BinaryExpr():
            return [node.lhs, node.rhs]
        case promql.Call():
            return list(node.args)
        case promql.MatrixSelector():
            return [node.vector_selector]
        case promql.AggregateExpr():
            return [node.expr, *([node.param] if node.param is not None else [])]
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return [node.expr]
    return []


def walk(node: Any) -> Iterator[Any]:
    yield node
    for child in children(node):
        yield from walk(child)


def filled_with_0(expression: str) -> Iterator[str]:
    """Of each `x or 0 * y` in it the x, in whose place there is a 0 where it is not there."""
    for node in walk(promql.parse(expression)):
        if isinstance(node, promql.BinaryExpr) and str(node.op) == "or" and str(node.rhs).startswith("0 * "):
            yield str(node.lhs)


def selectors(node: Any) -> list[promql.VectorSelector]:
    return [n for n in walk(node) if isinstance(n, promql.VectorSelector)]


def names(node: Any) -> set[str]:
    return {str(s.name) for s in selectors(node)}


def bare(node: Any) -> Any:
    """Without the parentheses around it."""
    while isinstance(node, promql.ParenExpr):
        node = node.expr
    return node


def is_number(node: Any, value: float | None = None) -> bool:
    node = bare(node)
    return isinstance(node, promql.NumberLiteral) and value in (None, node.val)


def units(node: Any) -> Units:
    """Of the value of an expression. Raises Unlike."""
    node = bare(node)
    match node:
        case promql.NumberLiteral():
            return {}
        case promql.VectorSelector():
            return of_metric(str(node.name))
        case promql.MatrixSelector():
            return of_metric(str(node.vector_selector.name))
        case promql.UnaryExpr() | promql.SubqueryExpr():
            return units(node.expr)
        case promql.AggregateExpr():
            inner = units(node.expr)
            return {"n": 1} if str(node.op) == "count" else {} if str(node.op) == "group" else inner
        case promql.Call():
            return _of_call(node)
        case promql.BinaryExpr():
            return _of_binary(node)
    raise TypeError(type(node))


def of_metric(name: str) -> Units:
    """Of one sample, by the metric's name."""
    if ":" in name:
        return RECORDED.get(name, {})
    if name.endswith(("_count", "_bucket")):
        return {"n": 1}
    return of_base(name)


def of_base(name: str) -> Units:
    """Of what a histogram or counter measures."""
    base = re.sub(r"_(bucket|sum|count|total|created)$", "", name)
    for ending, unit in (("_seconds", "s"), ("_usd", "usd"), ("_bytes", "B"), ("_tokens", "tok")):
        if base.endswith(ending):
            return {unit: 1}
    return {} if base.endswith("_ratio") else {"n": 1}


def _of_call(node: promql.Call) -> Units:
    name = node.func.name
    if name == "histogram_quantile":
        (bucket,) = names(node)
        return of_base(bucket)
    if name in PER_SECOND:
        return multiplied(units(node.args[0]), {"s": -1})
    if name in SAME:
        return units(node.args[0])
    if name in ("time", "timestamp"):
        return {"s": 1}
    if name == "changes":
        return {"n": 1}
    if name in CALENDAR:
        return None
    if name == "sum_over_time":
        inner = bare(node.args[0])
        hourly = isinstance(inner, promql.SubqueryExpr) and inner.step == timedelta(hours=1)
        return multiplied(units(inner), {"h": 1} if hourly else {})
    raise TypeError(f"units of {name}()")


def _of_binary(node: promql.BinaryExpr) -> Units:
    op, left, right = str(node.op), units(node.lhs), units(node.rhs)
    if op in COMPARISONS:
        return left
    if op == "*":
        for number, other in ((node.lhs, right), (node.rhs, left)):
            if is_number(number, 0):
                return None
            if is_number(number, 3600) and other is not None and other.get("s") == -1:
                return multiplied(other, {"s": 1, "h": -1})
        return multiplied(left, right)
    if op == "/":
        return multiplied(left, None if right is None else {u: -e for u, e in right.items()})
    if op in ("+", "-", "or"):
        if left is None or right is None:
            known = left if right is None else right
            return known if op == "or" else None
        if dict(left) != dict(right):
            raise Unlike(f"{dict(left)} {op} {dict(right)} in {node}")
        return left
    raise TypeError(f"units of {op}")


def multiplied(left: Units, right: Units) -> Units:
    if left is None or right is None:
        return None
    product = {u: left.get(u, 0) + right.get(u, 0) for u in {*left, *right}}
    return {u: e for u, e in product.items() if e}

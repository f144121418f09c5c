"""The variables of the dashboards. All have all of them, so that a choice is kept from one to the next.

One that the panels of a dashboard do not know is hidden there: it would promise what it does not do.
"""

from __future__ import annotations

import warnings
from typing import Final, Literal, NamedTuple

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # see dashboards.grafana
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.cog.builder import Builder
    from grafana_foundation_sdk.models import common as kinds
    from grafana_foundation_sdk.models import dashboard as models

from dashboards.queries import JOB, PLACE, REQUESTS

SOURCES: Final = (
    ("datasource", "prometheus", "Data source"),
    ("loki", "loki", "Logs"),
    ("tempo", "tempo", "Traces"),
)
_PLACE: Final = ",".join(PLACE)
_JOB: Final = ",".join(JOB)


class Choice(NamedTuple):
    """A variable whose values Prometheus knows."""

    name: str
    label: str
    query: str
    description: str
    everything: str | None = ".*"
    """What All stands for; None: all values that there are."""


CHOICES: Final = (
    Choice(
        "cluster",
        "Cluster",
        "label_values(weir_build_info, cluster)",
        "An external label of Prometheus; without it only All is here, and all is shown.",
    ),
    Choice(
        "namespace",
        "Namespace",
        'label_values(weir_build_info{cluster=~"$cluster"}, namespace)',
        "Of Kubernetes; without it only All is here.",
    ),
    Choice(
        "job",
        "Job",
        f"label_values(weir_build_info{{{_PLACE}}}, job)",
        "An installation of Weir.",
        None,  # `up` and the metrics of processes are those of everybody else, too
    ),
    Choice(
        "provider",
        "Provider",
        f"label_values({REQUESTS}_count{{{_JOB}}}, gen_ai_provider_name)",
        "Times, tokens and dollars know it; outcomes, limits and pods do not.",
    ),
    Choice(
        "model",
        "Model",
        f"label_values(weir_requests_total{{{_JOB}}}, gen_ai_request_model)",
        "The model that was asked for. Objectives, the queue and pods do not know it.",
    ),
    Choice(
        "tenant",
        "Tenant",
        f"label_values(weir_key_requests_total{{{_JOB}}}, tenant)",
        "Dollars, budgets and requests by tenant know it; times and tokens do not.",
    ),
)


def source_of(kind: Literal["prometheus", "loki"]) -> kinds.DataSourceRef:
    """The datasource that the variable of this kind chose."""
    return kinds.DataSourceRef(kind, "${datasource}" if kind == "prometheus" else f"${{{kind}}}")


def make_variables(known: set[str]) -> list[Builder[models.VariableModel]]:
    """All variables; those that are not `known` to any panel are hidden."""
    sources: list[Builder[models.VariableModel]] = [
        dashboard.DatasourceVariable(name)
        .label(label)
        .type(kind)
        .multi(False)
        .include_all(False)
        .hide(_hide(name in known))
        for name, kind, label in SOURCES
    ]
    return sources + [_query(choice, choice.name in known) for choice in CHOICES]


def _query(choice: Choice, known: bool) -> dashboard.QueryVariable:
    every = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = (
        dashboard.QueryVariable(choice.name)
        .label(choice.label)
        .description(choice.description)
        .datasource(source_of("prometheus"))
        .query({"query": choice.query, "refId": choice.name, "qryType": 1})
        .definition(choice.query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(every)
        .hide(_hide(known))
    )
    return variable if choice.everything is None else variable.all_value(choice.everything)


def _hide(known: bool) -> models.VariableHide:
    return models.VariableHide.DONT_HIDE if known else models.VariableHide.HIDE_VARIABLE

"""Turns a board into the JSON that Grafana reads, by the builders of grafana-foundation-sdk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from string import ascii_uppercase
from typing import Any, Final, cast

with warnings.catch_warnings():
    # It recommends the second schema of dashboards, which older Grafanas do not read from files.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import (
        bargauge,
        common,
        dashboard,
        heatmap,
        logs,
        loki,
        prometheus,
        stat,
        statetimeline,
        table,
        timeseries,
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as kinds
    from grafana_foundation_sdk.models import dashboard as models
    from grafana_foundation_sdk.models import heatmap as heatmaps
    from grafana_foundation_sdk.models import prometheus as formats

from dashboards.board import Board, Heading
from dashboards.panels import Kind, Panel, Target, Thresholds
from dashboards.queries import RATE, increase, select
from dashboards.variables import make_variables, source_of

TAG: Final = "weir"
_BUILDS: Final = select("weir_build_info")
DEPLOYS: Final = f"count by (version) ({_BUILDS}) unless count by (version) ({_BUILDS} offset 5m)"
RELOADS: Final = f"{increase('weir_config_reloads_total', by=('result',), window=RATE)} > 0"

_PROMETHEUS: Final = source_of("prometheus")
# The SDK's builders of panels have all they share by name alone.
_Builder = Any


def render(board: Board, boards: Sequence[Board]) -> str:
    """The JSON of a dashboard, with links to all `boards`; the same text for the same board."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time(f"now-{board.hours}h", "now")
        .refresh(board.refresh)
        .timezone("browser")
        .links([_link_to(other) for other in boards])
        .annotations(
            [
                _annotation("Deploys", DEPLOYS, "Version {{version}}", "blue"),
                _annotation("Configuration", RELOADS, "Configuration {{result}}", "purple"),
            ]
        )
        .variables(make_variables(board.variables()))
        .build()
    )
    built.panels = [
        _heading(item) if isinstance(item, Heading) else make_panel(item) for item in board.items()
    ]
    document = json.loads(json.dumps(built, cls=JSONEncoder))
    return json.dumps(_shown(document), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _shown(value: Any) -> Any:
    """Without `placement`: the SDK would put every link and annotation into a menu."""
    if isinstance(value, dict):
        return {k: _shown(v) for k, v in value.items() if (k, v) != ("placement", "inControlsMenu")}
    if isinstance(value, list):
        return [_shown(v) for v in value]
    return value


def _link_to(board: Board) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(board.title.removeprefix("Weir / "))
        .type(models.DashboardLinkType.LINK)
        .url(f"/d/{board.uid}")
        .icon("dashboard")
        .tooltip(board.description)
        .include_vars(True)
        .keep_time(True)
    )


def _annotation(name: str, expr: str, title: str, color: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(_PROMETHEUS)
        .enable(True)
        .hide(False)
        .icon_color(color)
        # Both forms: Grafana asks by the second one since it has annotations of any data source.
        .expr(expr)
        .step("60s")
        .target(prometheus.Dataquery().ref_id("Annotation").expr(expr).interval("60s").range())
        .title_format(title)
        .text_format(title)
    )


def _heading(heading: Heading) -> models.RowPanel:
    return dashboard.Row(heading.title).id(heading.id).collapsed(False).grid_pos(_grid(heading)).build()


def _grid(item: Heading | Panel) -> models.GridPos:
    return models.GridPos(x=item.grid.x, y=item.grid.y, w=item.grid.w, h=item.grid.h)


# -- panels ------------------------------------------------------------------------------------------


def make_panel(panel: Panel) -> models.Panel:
    builder = _BUILDERS[panel.kind](panel)
    builder.id(panel.id).title(panel.title).description(panel.description)
    builder.grid_pos(_grid(panel))
    builder.datasource(source_of(panel.targets[0].source))
    for ref, target in zip(ascii_uppercase, panel.targets, strict=False):
        builder.with_target(_target(panel, target, ref))
    builder.unit(panel.unit).no_value(panel.short or panel.empty).thresholds(_thresholds(panel.thresholds))
    if panel.minimum is not None:
        builder.min(panel.minimum)
    if panel.maximum is not None:
        builder.max(panel.maximum)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    if panel.links:
        builder.data_links([_link(link.title, link.url) for link in panel.links])
    if panel.states:
        builder.mappings([_states(panel)])
    for name, color in panel.colors:
        builder.override_by_name(
            name, [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})]
        )
    return cast("models.Panel", builder.build())


def _link(title: str, url: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).url(url).target_blank(True)


def _states(panel: Panel) -> models.ValueMap:
    return models.ValueMap(
        {
            str(number): models.ValueMappingResult(text=state.text, color=state.color, index=i)
            for i, (number, state) in enumerate(panel.states)
        }
    )


def _thresholds(thresholds: Thresholds) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color=thresholds.base)]
    steps += [models.Threshold(value=limit.value, color=limit.color) for limit in thresholds.limits]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _target(panel: Panel, target: Target, ref: str) -> Any:
    if target.source == "loki":
        return (
            loki.Dataquery()
            .ref_id(ref)
            .datasource(source_of("loki"))
            .expr(target.expr)
            .query_type("range")
            .max_lines(200)
        )
    query = (
        prometheus.Dataquery()
        .ref_id(ref)
        .datasource(_PROMETHEUS)
        .expr(target.expr)
        .legend_format(target.legend)
    )
    query = query.instant() if target.instant else query.range()
    if target.exemplars:
        query.exemplar(True)
    if panel.kind == "table":
        query.format(formats.PromQueryFormat.TABLE)
    elif panel.kind == "heatmap":
        query.format(formats.PromQueryFormat.HEATMAP)
    return query


def _color(mode: models.FieldColorModeId) -> dashboard.FieldColor:
    return dashboard.FieldColor().mode(mode)


def _reduced() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _stat(panel: Panel) -> _Builder:
    course = kinds.BigValueGraphMode.NONE if panel.targets[0].instant else kinds.BigValueGraphMode.AREA
    return (
        stat.Panel()
        .reduce_options(_reduced())
        .graph_mode(course)
        .color_mode(kinds.BigValueColorMode.VALUE)
        .text_mode(kinds.BigValueTextMode.VALUE)
        .color_scheme(_color(models.FieldColorModeId.THRESHOLDS))
    )


def _timeseries(panel: Panel) -> _Builder:
    legend = (
        common.VizLegendOptions()
        .display_mode(kinds.LegendDisplayMode.TABLE)
        .placement(
            kinds.LegendPlacement.BOTTOM if panel.width < COLUMNS_FOR_RIGHT else kinds.LegendPlacement.RIGHT
        )
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
        # The largest that is in sight first, not that of now: a peak has to have its name beside it.
        .sort_by("Max")
        .sort_desc(True)
    )
    lined = (
        kinds.GraphThresholdsStyleMode.DASHED
        if panel.thresholds.limits
        else kinds.GraphThresholdsStyleMode.OFF
    )
    builder = (
        timeseries.Panel()
        .legend(legend)
        .tooltip(
            common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING)
        )
        # A stack without lines: that of a part which is 0 would lie on its neighbour's edge.
        .line_width(0 if panel.stacked else 1)
        .fill_opacity(70 if panel.stacked else 8)
        .show_points(kinds.VisibilityMode.NEVER)
        .color_scheme(_color(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(lined))
    )
    if panel.stacked:
        builder.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    return builder


def _heatmap(panel: Panel) -> _Builder:
    color = (
        heatmap.HeatmapColorOptions()
        .mode(heatmaps.HeatmapColorMode.SCHEME)
        .scheme("Oranges")
        .scale(heatmaps.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
    )
    return (
        heatmap.Panel()
        .calculate(False)
        .color(color)
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().unit(panel.unit).axis_placement(kinds.AxisPlacement.LEFT))
        .show_legend()
        .exemplars_color("rgba(255,0,255,0.7)")
        .tooltip(heatmap.HeatmapTooltip().mode(kinds.TooltipDisplayMode.SINGLE).y_histogram(True))
    )


def _bargauge(panel: Panel) -> _Builder:
    return (
        bargauge.Panel()
        .reduce_options(_reduced())
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .display_mode(kinds.BarGaugeDisplayMode.BASIC)
        .value_mode(kinds.BarGaugeValueMode.COLOR)
        .name_placement(kinds.BarGaugeNamePlacement.LEFT)
        .show_unfilled(True)
        .color_scheme(_color(models.FieldColorModeId.THRESHOLDS))
    )


def _table(panel: Panel) -> _Builder:
    builder = table.Panel().cell_height(kinds.TableCellHeight.SM).filterable(True)
    columns = _columns(panel)
    if len(panel.targets) > 1:
        builder.with_transformation(models.DataTransformerConfig("merge", options={}))
    order = {label: i for i, label in enumerate([*(label for label, _ in panel.names), *columns])}
    builder.with_transformation(
        models.DataTransformerConfig(
            "organize",
            options={
                "excludeByName": {
                    "Time": True,
                    **{column: True for column, t in columns.items() if not t.legend},
                },
                "indexByName": order,
                "renameByName": {
                    **dict(panel.names),
                    **{c: t.legend for c, t in columns.items() if t.legend},
                },
            },
        )
    )
    if panel.sort:
        builder.sort_by([common.TableSortByFieldState().display_name(panel.sort).desc(True)])
    for target in panel.targets:
        if target.legend:
            builder.override_by_name(target.legend, list(_column(target)))
    for name, link in panel.column_links:
        shown = {"title": link.title, "url": link.url, "targetBlank": True}
        builder.override_by_name(name, [models.DynamicConfigValue("links", [shown])])
    return builder


def _columns(panel: Panel) -> dict[str, Target]:
    """What Grafana calls the queries' values, before they are renamed."""
    if len(panel.targets) == 1:
        return {"Value": panel.targets[0]}
    return {f"Value #{ref}": t for ref, t in zip(ascii_uppercase, panel.targets, strict=False)}


def _column(target: Target) -> Iterator[models.DynamicConfigValue]:
    yield models.DynamicConfigValue("unit", target.unit)
    if target.thresholds is not None:
        steps = _thresholds(target.thresholds).build()
        yield models.DynamicConfigValue("thresholds", steps)
        yield models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"})


def _timeline(panel: Panel) -> _Builder:
    return (
        statetimeline.Panel()
        .merge_values(True)
        .show_value(kinds.VisibilityMode.AUTO)
        .row_height(0.8)
        .legend(common.VizLegendOptions().show_legend(False).display_mode(kinds.LegendDisplayMode.LIST))
        .color_scheme(_color(models.FieldColorModeId.THRESHOLDS))
    )


def _logs(panel: Panel) -> _Builder:
    return (
        logs.Panel()
        .show_time(True)
        .wrap_log_message(True)
        .enable_log_details(True)
        .sort_order(kinds.LogsSortOrder.DESCENDING)
        .dedup_strategy(kinds.LogsDedupStrategy.NONE)
    )


COLUMNS_FOR_RIGHT: Final = 18
_BUILDERS: Final[dict[Kind, Callable[[Panel], _Builder]]] = {
    "stat": _stat,
    "timeseries": _timeseries,
    "heatmap": _heatmap,
    "bargauge": _bargauge,
    "table": _table,
    "state-timeline": _timeline,
    "logs": _logs,
}

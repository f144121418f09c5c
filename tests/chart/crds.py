"""JSON schemas of the custom resources, as far as the chart writes them; closed, so that no typo passes."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d|w|y))+$"}
_GATEWAY_DURATION: Schema = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}


def _object(required: str, **properties: Any) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _list(item: Schema, least: int = 1) -> Schema:
    return {"type": "array", "minItems": least, "items": item}


def _resource(api_version: str, kind: str, spec: Schema) -> Schema:
    metadata = _object(
        "name namespace labels", name=_TEXT, namespace=_TEXT, labels=_LABELS, annotations=_LABELS
    )
    return _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


_RELABELING = _object(
    "",
    sourceLabels=_list({"type": "string"}),
    separator={"type": "string"},
    targetLabel=_TEXT,
    regex={"type": "string"},
    modulus={"type": "integer"},
    replacement={"type": "string"},
    action=_TEXT,
)

_RULE = _object(
    "expr",
    alert=_TEXT,
    record=_TEXT,
    expr={"type": ["string", "integer"]},
    labels=_LABELS,
    annotations=_LABELS,
    keep_firing_for=_DURATION,
    **{"for": _DURATION},
) | {"oneOf": [{"required": ["alert"]}, {"required": ["record"]}]}

SCHEMAS: dict[str, Schema] = {
    "ServiceMonitor": _resource(
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
        _object(
            "selector endpoints",
            namespaceSelector=_object("matchNames", matchNames=_list(_TEXT)),
            selector=_object("matchLabels", matchLabels=_LABELS),
            endpoints=_list(
                _object(
                    "port path",
                    port=_TEXT,
                    path={"const": "/metrics"},
                    interval=_DURATION,
                    scrapeTimeout=_DURATION,
                    relabelings=_list(_RELABELING),
                    metricRelabelings=_list(_RELABELING),
                )
            ),
        ),
    ),
    "PrometheusRule": _resource(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _object(
            "groups",
            groups=_list(_object("name rules", name=_TEXT, interval=_DURATION, rules=_list(_RULE))),
        ),
    ),
    "ScaledObject": _resource(
        "keda.sh/v1alpha1",
        "ScaledObject",
        _object(
            "scaleTargetRef triggers",
            scaleTargetRef=_object("name", name=_TEXT),
            minReplicaCount={"type": "integer", "minimum": 0},
            maxReplicaCount={"type": "integer", "minimum": 1},
            pollingInterval={"type": "integer", "minimum": 1},
            cooldownPeriod={"type": "integer", "minimum": 0},
            advanced=_object(
                "", horizontalPodAutoscalerConfig=_object("behavior", behavior={"type": "object"})
            ),
            triggers=_list(
                _object(
                    "type metadata",
                    type=_TEXT,
                    metricType={"enum": ["Utilization", "AverageValue"]},
                    metadata=_LABELS,
                )
            ),
        ),
    ),
    "HTTPRoute": _resource(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        _object(
            "parentRefs rules",
            parentRefs=_list(
                _object(
                    "name",
                    name=_TEXT,
                    namespace=_TEXT,
                    sectionName=_TEXT,
                    port=_PORT,
                    group=_TEXT,
                    kind=_TEXT,
                )
            ),
            hostnames=_list(_TEXT),
            rules=_list(
                _object(
                    "backendRefs",
                    backendRefs=_list(_object("name port", name=_TEXT, port=_PORT)),
                    matches=_list({"type": "object"}),
                    filters=_list({"type": "object", "required": ["type"]}),
                    timeouts=_object("", request=_GATEWAY_DURATION, backendRequest=_GATEWAY_DURATION),
                )
            ),
        ),
    ),
}

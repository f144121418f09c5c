"""JSON schemas of the stack's files whose programs are not at hand; closed, so that no typo passes.

They hold what the stack writes: names and types are those of Loki 3, Tempo 2 and Grafana's provisioning.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_YES_OR_NO: Schema = {"type": "boolean"}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_DURATION: Schema = {"type": "string", "pattern": "^-?([0-9]+(ms|s|m|h))+$"}
_PATH: Schema = {"type": "string", "pattern": "^/"}
_URL: Schema = {"type": "string", "pattern": "^https?://[a-z]+:[0-9]+$"}
_ENDPOINT = {"type": "string", "pattern": r"^[0-9.]+:[0-9]+$"}


def _object(optional: Schema | None = None, **properties: Any) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties | (optional or {}),
    }


def _list(item: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": item}


LOKI = _object(
    auth_enabled=_YES_OR_NO,
    server=_object(http_listen_port=_PORT, log_level={"enum": ["debug", "info", "warn", "error"]}),
    common=_object(
        path_prefix=_PATH,
        replication_factor={"const": 1},
        ring=_object(instance_addr=_TEXT, kvstore=_object(store={"const": "inmemory"})),
        storage=_object(filesystem=_object(chunks_directory=_PATH, rules_directory=_PATH)),
    ),
    schema_config=_object(
        configs=_list(
            _object(
                **{"from": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}},
                store={"const": "tsdb"},
                object_store={"const": "filesystem"},
                schema={"const": "v13"},
                index=_object(prefix=_TEXT, period={"const": "24h"}),  # the only one that tsdb takes
            )
        )
    ),
    limits_config=_object(
        retention_period=_DURATION,
        discover_service_name={"type": "array", "items": _TEXT},
        discover_log_levels=_YES_OR_NO,
    ),
    compactor=_object(
        working_directory=_PATH, retention_enabled=_YES_OR_NO, delete_request_store={"const": "filesystem"}
    ),
    analytics=_object(reporting_enabled=_YES_OR_NO),
)

TEMPO = _object(
    server=_object(http_listen_port=_PORT),
    distributor=_object(
        receivers=_object(
            otlp=_object(
                protocols=_object(http=_object(endpoint=_ENDPOINT), grpc=_object(endpoint=_ENDPOINT))
            )
        )
    ),
    storage=_object(
        trace=_object(backend={"const": "local"}, local=_object(path=_PATH), wal=_object(path=_PATH))
    ),
    overrides=_object(defaults=_object(compaction=_object(block_retention=_DURATION))),
    usage_report=_object(reporting_enabled=_YES_OR_NO),
)

DASHBOARDS = _object(
    apiVersion={"const": 1},
    providers=_list(
        _object(
            name=_TEXT,
            folder=_TEXT,
            type={"const": "file"},
            allowUiUpdates=_YES_OR_NO,
            disableDeletion=_YES_OR_NO,
            updateIntervalSeconds={"type": "integer", "minimum": 1},
            options=_object(path=_PATH),
        )
    ),
)


def _datasource(kind: str, json_data: Schema) -> Schema:
    return _object(
        name=_TEXT,
        uid=_TEXT,
        type={"const": kind},
        access={"const": "proxy"},
        url=_URL,
        jsonData=json_data,
        optional={"isDefault": _YES_OR_NO},
    )


# To another data source, to a page, or both: then `url` is what that source is asked.
_LINK: Schema = {"anyOf": [{"required": ["datasourceUid"]}, {"required": ["url"]}]}

DATASOURCES = _object(
    apiVersion={"const": 1},
    datasources=_list(
        {
            "oneOf": [
                _datasource(
                    "prometheus",
                    _object(
                        httpMethod={"enum": ["GET", "POST"]},
                        timeInterval=_DURATION,
                        exemplarTraceIdDestinations=_list(
                            _object(
                                name=_TEXT,
                                urlDisplayLabel=_TEXT,
                                optional={"datasourceUid": _TEXT, "url": _TEXT},
                            )
                            | _LINK
                        ),
                    ),
                ),
                _datasource(
                    "tempo",
                    _object(
                        tracesToLogsV2=_object(
                            datasourceUid=_TEXT,
                            spanStartTimeShift=_DURATION,
                            spanEndTimeShift=_DURATION,
                            customQuery=_YES_OR_NO,
                            query=_TEXT,
                        )
                    ),
                ),
                _datasource(
                    "loki",
                    _object(
                        derivedFields=_list(
                            _object(
                                name=_TEXT,
                                matcherRegex=_TEXT,
                                url=_TEXT,
                                urlDisplayLabel=_TEXT,
                                datasourceUid=_TEXT,
                            )
                        )
                    ),
                ),
                _datasource(
                    "alertmanager",
                    _object(
                        implementation={"enum": ["prometheus", "cortex", "mimir"]},
                        handleGrafanaManagedAlerts=_YES_OR_NO,
                    ),
                ),
            ]
        }
    ),
)

SCHEMAS: dict[str, Schema] = {
    "loki/loki.yaml": LOKI,
    "tempo/tempo.yaml": TEMPO,
    "grafana/provisioning/dashboards/dashboards.yaml": DASHBOARDS,
    "grafana/provisioning/datasources/datasources.yaml": DATASOURCES,
}

"""Pods and telemetry: do the pods keep up, and can what they say of themselves be believed."""

from __future__ import annotations

from typing import Final

from dashboards.board import Board, Section
from dashboards.panels import (
    BYTES,
    NUMBER,
    PER_SECOND,
    REQUESTS_PER_SECOND,
    SECONDS,
    SHARE,
    Limit,
    State,
    Thresholds,
    Words,
    above,
    below,
    column,
    heatmap,
    log_lines,
    stat,
    table,
    timeline,
    timeseries,
)
from dashboards.queries import (
    elsewhere,
    highest,
    increase,
    line,
    logs,
    per_second,
    quantile,
    rate,
    ratio,
    select,
    total,
)

POD: Final = ("pod", "instance")
OF_POD: Final = "{{pod}} {{instance}}"
CONTAINER: Final = 'container="weir"'
RESTARTS: Final = elsewhere("kube_pod_container_status_restarts_total", CONTAINER)
CONFIGURED: Final = select("weir_config_last_reload_success_timestamp_seconds")
AUTOSCALER: Final = 'horizontalpodautoscaler=~".*weir.*"'
NO_POD: Final = (
    "No pod of Weir is scraped: see metrics.serviceMonitor in the chart, and the targets of Prometheus."
)
NO_PROCESS: Final = (
    "No pod of Weir is scraped, or each has several processes (WORKER_COUNT), which do not tell."
)
KUBE: Final = "Needs kube-state-metrics in the cluster; without Kubernetes there is nothing to see here."
LAG: Final = above(
    0.1, warn=0.05, reason="orange from 50 ms, red from 100 ms: all of the process' streams wait so long."
)
UP_OR_DEGRADED: Final = (
    (0, State("whole", "green")),
    (1, State("without Redis", "red")),
)
READY: Final = (
    elsewhere("kube_pod_status_ready", 'condition="true"')
    + " * on (cluster, namespace, pod) group_left () group by (cluster, namespace, pod) ("
    + elsewhere("kube_pod_container_info", CONTAINER)
    + ")"
)
# Those in flight wait or run; places are taken by those that run.
_RUNNING: Final = f"({total(select('weir_inflight_requests'))} - {total(select('weir_queue_requests'))})"
_REPLICAS: Final = "kube_horizontalpodautoscaler_"

_FIRST = [
    stat(
        "Pods that answer",
        total(select("up")),
        Words(
            "Pods of the chosen jobs whose metrics Prometheus could read at its last try.",
            "as many as the deployment wants, 2 and more.",
            "kubectl get pods; the panels of Kubernetes below; the runbook WeirPodsNotReady.",
            NO_POD,
            "No pod is scraped",
        ),
        unit=NUMBER,
        thresholds=Thresholds(
            "red",
            (Limit(1, "orange"), Limit(2, "green")),
            "one pod alone has nobody to take over; none serves nobody.",
        ),
        decimals=0,
    ),
    stat(
        "Places taken",
        ratio(_RUNNING, total(select("weir_concurrency_limit"))),
        Words(
            "Requests to models that run now, of those that may run at a time, over all pods.",
            "below 75 %.",
            "add pods (autoscaling in the chart), or see why requests take longer: Latency.",
            f"{NO_POD} A limit of 0 takes everything, and has no share.",
            "No pod, or no limit",
        ),
        unit=SHARE,
        thresholds=above(
            0.9, warn=0.75, reason="red from 90 %, from which an alert fires; orange from 75 %."
        ),
    ),
    stat(
        "Loop lag, worst pod",
        highest(select("weir_event_loop_lag_seconds")),
        Words(
            "How late the last heartbeat of the event loop came, in the pod where it is worst.",
            "below 10 ms; Weir lowers its own limit above.",
            "the pod has too little processor: see processor and throttling below; raise requests, or add "
            "pods.",
            NO_POD,
            "No pod is scraped",
        ),
        unit=SECONDS,
        thresholds=LAG,
    ),
    stat(
        "Restarts",
        f"sum(increase({RESTARTS}[$__range]))",
        Words(
            "Containers of Weir that were started anew in the time shown, by Kubernetes' account.",
            "0; a rollout makes new pods, and no restarts.",
            "kubectl describe pod tells OOMKilled, or a failed liveness probe; kubectl logs --previous has "
            "the end.",
            KUBE,
            "No kube-state-metrics",
        ),
        unit=NUMBER,
        thresholds=above(3, warn=1, reason="orange from the first, red from the third: that is no accident."),
        instant=True,
        decimals=0,
    ),
    stat(
        "Degraded features",
        f"count({highest(select('weir_degraded'), 'feature')} > 0) or 0 * {total(select('up'))}",
        Words(
            "Features that do without Redis now, in at least one pod: docs/redis.md says what each does "
            "then.",
            "0.",
            "look at Redis; Weir comes back by itself within 5 s of it. The runbook WeirDegraded has the "
            "steps.",
            NO_POD,
            "No pod is scraped",
        ),
        unit=NUMBER,
        thresholds=above(1, reason="red as soon as there is one."),
        decimals=0,
    ),
    stat(
        "Configuration",
        highest(select("weir_config_stale")),
        Words(
            "Whether a changed configuration was refused, and an older one still serves, in at least one "
            "pod.",
            "current.",
            "the log line of the reload says what is wrong with the file; a pod that starts anew would not "
            "start.",
            NO_POD,
            "No pod is scraped",
        ),
        unit=NUMBER,
        thresholds=above(1, reason="red: stale."),
        states=((0, State("current", "green")), (1, State("stale", "red"))),
    ),
    stat(
        "Telemetry dropped",
        f"{increase('weir_telemetry_dropped_total')} or 0 * {total(select('up'))}",
        Words(
            "Spans and log lines that were thrown away in the time shown, because their collector was slow "
            "or away. Metrics are never dropped.",
            "0.",
            "look at the collector (OTEL_EXPORTER_OTLP_ENDPOINT), or sample less (OTEL_TRACES_SAMPLER_ARG).",
            NO_POD,
            "No pod is scraped",
        ),
        unit=NUMBER,
        instant=True,
        thresholds=above(
            100, warn=1, reason="orange from the first; red from 100, from which an alert fires."
        ),
        decimals=0,
    ),
    stat(
        "Labels in _other",
        f"{increase('weir_label_overflow_total')} or 0 * {total(select('up'))}",
        Words(
            "Times that a name was no label of its own, because nobody knows it or there are too many, in "
            "the time shown.",
            "0, or few: callers' typing errors.",
            "configure the models that are really used; else somebody makes names up.",
            NO_POD,
            "No pod is scraped",
        ),
        unit=NUMBER,
        instant=True,
        thresholds=above(
            100, warn=1, reason="orange from the first; red from 100, where an alert fires if within an hour."
        ),
        decimals=0,
    ),
]

_LOAD = [
    timeseries(
        "Requests that run, and places",
        [
            (_RUNNING, "running"),
            (total(select("weir_queue_requests")), "waiting"),
            (total(select("weir_concurrency_limit")), "places"),
        ],
        Words(
            "Requests to models that run and wait, over all pods, and how many may run. Weir lowers the "
            "places by itself while its event loop is late.",
            "running well below places, nobody waiting.",
            "places that fall: too little processor. Running that climbs: slow upstreams, or more callers.",
            NO_POD,
        ),
        unit=NUMBER,
        colors=(("running", "blue"), ("waiting", "orange"), ("places", "text")),
    ),
    timeseries(
        "Loop lag by pod",
        [(highest(select("weir_event_loop_lag_seconds"), *POD), OF_POD)],
        Words(
            "How late the last heartbeat of each pod's event loop came.",
            "below 10 ms.",
            "all pods: more pods. One pod: its node, or a request with a very large body.",
            NO_POD,
        ),
        unit=SECONDS,
        thresholds=LAG,
    ),
]

_OVERLOAD = [
    timeseries(
        "Requests turned away",
        [(rate("weir_shed_total", by=("reason", "priority")), "{{reason}} {{priority}}")],
        Words(
            "Requests a second that were refused for want of a place, by the reason and the caller's class. "
            "They are overloaded on Overview, and spend error budget.",
            "none.",
            "add pods; low classes go first by design: docs/overload.md.",
            NO_POD,
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        stacked=True,
    ),
    timeseries(
        "Wait for a place, p95 by class",
        [(quantile(0.95, "weir_queue_wait_seconds", by=("priority",)), "{{priority}}")],
        Words(
            "The time that 95 % of the requests of each class waited less than.",
            "next to nothing.",
            "rising: places are taken, and refusals come next.",
            "No requests yet.",
        ),
        unit=SECONDS,
        width=8,
        exemplars=True,
        thresholds=above(0.5, reason="the line is 0.5 s: half of what the queue allows by default."),
    ),
    timeseries(
        "Requests in flight, by pod",
        [(total(select("weir_inflight_requests"), *POD), OF_POD)],
        Words(
            "Requests to models that run, or wait for a place, in each pod.",
            "about the same in all.",
            "one pod has most: callers keep few connections open for long. docs/ingress.md.",
            NO_POD,
        ),
        unit=NUMBER,
        width=8,
        stacked=True,
    ),
    timeseries(
        "Processor by pod",
        [(rate("process_cpu_seconds_total", by=POD), OF_POD)],
        Words(
            "Processor time of each process, as a share of one processor. Weir's loop uses one at the most.",
            "below 70 %.",
            "near 100 % it is full, whatever its limit: add pods.",
            NO_PROCESS,
        ),
        unit=SHARE,
        width=8,
        thresholds=above(
            0.9, warn=0.7, reason="lines at 70 % and 90 % of a processor; one process cannot use more."
        ),
    ),
    timeseries(
        "Processor withheld",
        [
            (
                ratio(
                    per_second("container_cpu_cfs_throttled_periods_total", CONTAINER, by=("pod",)),
                    per_second("container_cpu_cfs_periods_total", CONTAINER, by=("pod",)),
                ),
                "{{pod}}",
            )
        ],
        Words(
            "The share of scheduling periods in which a container wanted more processor than its limit "
            "gives.",
            "0.",
            "raise resources.limits.cpu, or set none: a throttled loop delays every stream.",
            "Needs the kubelet's container metrics (cAdvisor), and a limit of processor.",
        ),
        unit=SHARE,
        width=8,
        thresholds=above(0.05, reason="the line is 5 %: more is felt as lag."),
    ),
    timeseries(
        "Memory by pod",
        [(highest(select("process_resident_memory_bytes"), *POD), OF_POD)],
        Words(
            "Resident memory of each process.",
            "even, about 100 MB: nothing in Weir grows without a bound.",
            "a line that climbs for hours: tell us, with the version and the settings.",
            NO_PROCESS,
        ),
        unit=BYTES,
        width=8,
    ),
]

_KUBERNETES = [
    timeseries(
        "Replicas",
        [
            (highest(elsewhere(f"{_REPLICAS}status_current_replicas", AUTOSCALER)), "there"),
            (highest(elsewhere(f"{_REPLICAS}status_desired_replicas", AUTOSCALER)), "wanted"),
            (highest(elsewhere(f"{_REPLICAS}spec_max_replicas", AUTOSCALER)), "most"),
        ],
        Words(
            "Pods that are there, that the autoscaler wants, and that it may have at the most.",
            "wanted below most, there equal to wanted.",
            "wanted at most: raise autoscaling.maxReplicas. There below wanted: the cluster has no room.",
            f"{KUBE} Also empty without autoscaling.",
        ),
        unit=NUMBER,
        width=8,
        colors=(("there", "green"), ("wanted", "orange"), ("most", "text")),
    ),
    timeseries(
        "Pods that are ready",
        [(f"sum({READY})", "ready")],
        Words(
            "Pods of Weir that Kubernetes sends requests to.",
            "as many as are wanted.",
            "kubectl describe pod: a failing readiness probe, or a node under pressure.",
            KUBE,
        ),
        unit=NUMBER,
        width=8,
        thresholds=below(1, good=2, reason="none serves nobody; one alone has nobody to take over."),
    ),
    timeseries(
        "Restarts by pod",
        [
            (
                f"sum by (pod) (increase({RESTARTS}[$__rate_interval]))",
                "{{pod}}",
            )
        ],
        Words(
            "When containers of Weir were started anew.",
            "never.",
            "kubectl logs --previous has the end of the one before; OOMKilled: raise "
            "resources.limits.memory.",
            KUBE,
        ),
        unit=NUMBER,
        width=8,
    ),
    table(
        "Versions",
        [column(f"count by (version, namespace, job) ({select('weir_build_info')})", "Pods", NUMBER)],
        [("version", "Version"), ("namespace", "Namespace"), ("job", "Job")],
        Words(
            "Which versions run, in how many pods.",
            "one version for each job; two while a rollout goes on.",
            "two for long: kubectl rollout status says why it does not end.",
            NO_POD,
        ),
        width=8,
        height=7,
        sort="Pods",
    ),
    timeline(
        "Features without Redis",
        [(highest(select("weir_degraded"), "feature"), "{{feature}}")],
        Words(
            "Which features did without Redis, and when, in at least one pod.",
            "all whole.",
            "docs/redis.md says what each does without it; writes that were lost for good are beside.",
            "No pod uses Redis (REDIS_URL).",
        ),
        states=UP_OR_DEGRADED,
        width=8,
        height=7,
    ),
    timeseries(
        "Writes lost for want of Redis",
        [
            (
                increase("weir_state_writes_dropped_total", by=("feature",), window="$__rate_interval"),
                "{{feature}}",
            )
        ],
        Words(
            "Writes that were lost because Redis was away longer than memory could hold them.",
            "none.",
            "what was lost of the ledger does not come back; docs/ledger.md says how to compare with the "
            "bill.",
            "No write was lost yet: good.",
        ),
        unit=NUMBER,
        width=8,
        height=7,
    ),
]

_TELEMETRY = [
    timeseries(
        "Spans and log lines dropped",
        [
            (rate("weir_telemetry_dropped_total", by=("signal",)), "dropped, {{signal}}"),
            (rate("weir_log_lines_sampled_total"), "left out on purpose, success lines"),
        ],
        Words(
            "Spans and lines a second that were thrown away for want of room, and success lines that log "
            "sampling left out on purpose.",
            "none dropped.",
            "traces: the collector is slow or away. logs: whoever reads standard output is.",
            "Nothing was dropped or left out yet: good.",
        ),
        unit=PER_SECOND,
        width=8,
    ),
    timeseries(
        "Label values that became _other",
        [(rate("weir_label_overflow_total", by=("label",)), "{{label}}")],
        Words(
            "Times a second that a name was no label of its own: nobody knows it, or there are too many.",
            "none, or few.",
            "model: callers make names up, or a model is missing in the configuration. tenant, key: more "
            "than Weir keeps apart.",
            "No label became _other yet: good.",
        ),
        unit=PER_SECOND,
        width=8,
    ),
    timeseries(
        "Scrapes",
        [
            (highest(select("scrape_duration_seconds"), *POD), OF_POD),
        ],
        Words(
            "How long Prometheus takes to read each pod's metrics.",
            "below 0.15 s.",
            "longer with more series: models times tenants. A pod without processor answers late too.",
            NO_POD,
        ),
        unit=SECONDS,
        width=8,
        thresholds=above(
            1, warn=0.15, reason="lines at 0.15 s, what 50 models and 200 tenants may take, and at 1 s."
        ),
    ),
    timeseries(
        "Series of each pod",
        [(highest(select("scrape_samples_post_metric_relabeling"), *POD), OF_POD)],
        Words(
            "How many series Prometheus keeps of each pod.",
            "below 20,000, which 50 models and 200 tenants stay under.",
            "see which label grew: model, tenant and key are bounded, upstreams are as many as you "
            "configure.",
            NO_POD,
        ),
        unit=NUMBER,
        width=8,
        thresholds=above(20_000, reason="the line is 20,000."),
    ),
    timeseries(
        "Configuration read again",
        [(increase("weir_config_reloads_total", by=("result",), window="$__rate_interval"), "{{result}}")],
        Words(
            "When changed files of the configuration were read, and whether they were taken.",
            "loaded, when you changed something.",
            "refused: the log line says what is wrong; the older configuration serves on.",
            NO_POD,
        ),
        unit=NUMBER,
        width=8,
        colors=(("loaded", "green"), ("refused", "red")),
    ),
    timeseries(
        "Age of the configuration",
        [
            (
                f"time() - min by (pod, instance) ({CONFIGURED})",
                OF_POD,
            )
        ],
        Words(
            "How long ago each pod last read a good configuration, at its start or later.",
            "the same in all pods after a change.",
            "one pod that is older: its mounted file is not updated yet, or was refused.",
            NO_POD,
        ),
        unit=SECONDS,
        width=8,
    ),
]

_HTTP = [
    timeseries(
        "HTTP answers",
        [(rate("http_requests_total", by=("status",)), "{{status}}")],
        Words(
            "All HTTP answers a second by status class, of pages and probes of the API port too. No "
            "objective is built on them: a stream that breaks is a 2xx here, and a caller who leaves a 4xx.",
            "2xx, and some 4xx.",
            "5xx: Outcomes on Overview say why.",
            NO_POD,
        ),
        unit=REQUESTS_PER_SECOND,
        width=8,
        stacked=True,
        colors=(("2xx", "green"), ("3xx", "blue"), ("4xx", "yellow"), ("5xx", "red")),
    ),
    timeseries(
        "HTTP answers, p95 by handler",
        [(quantile(0.95, "http_request_duration_seconds", by=("handler",)), "{{handler}}")],
        Words(
            "The time that 95 % of each handler's answers stayed below, streams until their end.",
            "milliseconds for what asks no model.",
            "for models: Latency; for conversations and usage: Redis.",
            NO_POD,
        ),
        unit=SECONDS,
        width=8,
    ),
    heatmap(
        "Weir's overhead",
        rate("weir_overhead_seconds_bucket", by=("le",)),
        Words(
            "How many requests a second took which time of Weir itself.",
            "all in the lowest rows.",
            "a band above with the load: the processor. A band at Redis' time limit: Redis.",
            "No requests yet.",
        ),
        unit=SECONDS,
        width=8,
    ),
    stat(
        "Ledger: lag",
        highest(elsewhere("weir_sink_lag_seconds")),
        Words(
            "The age of the oldest record of the ledger that the worker has not copied to PostgreSQL yet.",
            "some seconds.",
            "the runbook WeirSinkLag; what falls out of Redis before it is copied is lost.",
            "No worker is scraped: worker.enabled in the chart starts one.",
            "No worker is scraped",
        ),
        unit=SECONDS,
        width=4,
        height=7,
        thresholds=above(
            600, warn=60, reason="orange from a minute; red from ten, from which an alert fires."
        ),
    ),
    timeseries(
        "Ledger: records",
        [
            (
                per_second("weir_sink_records_total", by=("result",)),
                "{{result}}",
            ),
            (
                per_second("weir_sink_errors_total", by=("where",)),
                "failed at {{where}}",
            ),
            (per_second("weir_sink_lost_records_total"), "lost"),
        ],
        Words(
            "Records a second that the worker copied to PostgreSQL, knew already, or rejected; and what "
            "failed.",
            "copied near the requests a second; nothing failed or lost.",
            "docs/ledger.md.",
            "No worker is scraped: worker.enabled in the chart starts one.",
        ),
        unit=PER_SECOND,
        width=20,
        height=7,
    ),
    log_lines(
        "Warnings and errors of Weir itself",
        logs(
            'level=~"warning|error|critical"',
            'event!="request"',
            line(*("level", "event", "reason", "upstream"), pod="pod"),
        ),
        Words(
            "What Weir complained of, other than single requests, the newest first.",
            "nothing.",
            "redis_unavailable: Redis; circuit_changed: Upstreams; internal_error: tell us, with its stack.",
            "Nothing in this time, or Loki has no logs of Weir: docs/dashboards.md.",
        ),
        height=7,
    ),
]

BOARD: Final = Board(
    uid="weir-pods",
    title="Weir / Pods and telemetry",
    description="Do the pods keep up, and can what they say of themselves be believed.",
    sections=(
        Section("", [*_FIRST, *_LOAD]),
        Section("Overload and resources", _OVERLOAD),
        Section("Kubernetes and Redis", _KUBERNETES),
        Section("Telemetry and configuration", _TELEMETRY),
        Section("HTTP and ledger", _HTTP),
    ),
)

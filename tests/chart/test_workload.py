"""What the values make of the pods: rollout, scaling, names, images, files."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, NAMESPACE, RELEASE, Object, Rendered, render

KEDA = {"keda": {"enabled": True}}
HPA = {"autoscaling": {"enabled": True}}
LONGEST = "r" * 45

# What an API server lets change in a StatefulSet's spec.
CHANGEABLE = {
    "replicas",
    "template",
    "updateStrategy",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
    "ordinals",
    "revisionHistoryLimit",
}


def template(rendered: Rendered) -> Object:
    """The pod template of the Deployment."""
    found: Object = rendered.one("Deployment")["spec"]["template"]
    return found


# How a pod ends


@pytest.mark.parametrize("minor", range(29, 38))
def test_the_kubelet_sleeps_where_it_can_and_weir_waits_where_not(minor: int) -> None:
    values = {"shutdown": {"preStopSeconds": 7, "drainDelaySeconds": 4}}
    rendered = render(values, kubernetes=f"1.{minor}.0")
    delay = rendered.environment()["DRAIN_DELAY"]["value"]
    if minor < 30:
        assert "lifecycle" not in rendered.server
        assert delay == "11"
    else:
        assert rendered.server["lifecycle"] == {"preStop": {"sleep": {"seconds": 7}}}
        assert delay == "4"


def test_a_vendors_version_counts_as_its_kubernetes() -> None:
    assert "lifecycle" in render(kubernetes="v1.30.2-gke.1587003").server
    assert "lifecycle" not in render(kubernetes="v1.29.9-eks-a18cd3a").server


def test_without_seconds_before_the_end_there_is_no_hook() -> None:
    assert "lifecycle" not in render({"shutdown": {"preStopSeconds": 0}}).server


def test_the_grace_period_is_as_long_as_all_of_the_end() -> None:
    rendered = render(
        {"shutdown": {"preStopSeconds": 3, "drainDelaySeconds": 4, "longestStreamSeconds": 300}}
    )
    assert template(rendered)["spec"]["terminationGracePeriodSeconds"] == 3 + 4 + 300 + 10
    assert rendered.environment()["DRAIN_TIMEOUT"]["value"] == "300"
    own = render({"shutdown": {"gracePeriodSeconds": 500}})
    assert template(own)["spec"]["terminationGracePeriodSeconds"] == 500


def test_a_rollout_takes_no_pod_before_another_is_ready() -> None:
    spec = render().one("Deployment")["spec"]
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert spec["minReadySeconds"] > 0


# How many there are


def test_only_one_decides_how_many_pods_there_are() -> None:
    assert render().one("Deployment")["spec"]["replicas"] == 2
    for values in (HPA, KEDA):
        assert "replicas" not in render(values).one("Deployment")["spec"]
    assert not render().all("HorizontalPodAutoscaler")
    assert not render(KEDA).all("HorizontalPodAutoscaler")
    assert not render(HPA).all("ScaledObject")


def test_the_autoscaler_looks_at_cpu_and_at_requests_in_flight() -> None:
    spec = render({"autoscaling": {"enabled": True, "targetInflightPerPod": 2.5}}).one(
        "HorizontalPodAutoscaler"
    )["spec"]
    cpu, inflight = spec["metrics"]
    assert cpu["containerResource"]["container"] == "weir"
    assert cpu["containerResource"]["target"] == {"type": "Utilization", "averageUtilization": 60}
    assert inflight["pods"]["metric"] == {"name": "weir_inflight_requests"}
    assert inflight["pods"]["target"] == {"type": "AverageValue", "averageValue": "2.5"}
    assert spec["behavior"]["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300


def test_keda_asks_prometheus_for_the_pods_of_this_release() -> None:
    triggers = render(case="keda").one("ScaledObject")["spec"]["triggers"]
    assert [t["type"] for t in triggers] == ["cpu", "prometheus", "cron"]
    query = triggers[1]["metadata"]["query"]
    assert f'namespace="{NAMESPACE}"' in query
    matcher = re.search(r'pod=~"([^"]+)"', query)
    assert matcher
    # Prometheus' regular expressions are anchored, as fullmatch is.
    assert re.fullmatch(matcher[1], f"{RELEASE}-weir-7d9f8c6b5d-x2x4z")
    for other in (
        f"{RELEASE}-weir-blue-7d9f8c6b5d-x2x4z",
        f"a-{RELEASE}-weir-7d9f8c6b5d-x2x4z",
        f"{RELEASE}-weir",
    ):
        assert not re.fullmatch(matcher[1], other)


@pytest.mark.parametrize(
    ("values", "there"),
    [
        ({}, True),
        ({"replicaCount": 1}, False),
        ({"replicaCount": 0}, False),
        ({"replicaCount": 1} | HPA, True),
        ({"autoscaling": {"enabled": True, "minReplicas": 1}}, False),
        (KEDA, True),
        ({"keda": {"enabled": True, "minReplicaCount": 1}}, False),
        ({"podDisruptionBudget": {"enabled": False}}, False),
    ],
)
def test_a_disruption_budget_is_for_two_pods_and_more(values: dict[str, Any], there: bool) -> None:
    budgets = render(values).all("PodDisruptionBudget")
    assert len(budgets) == there
    if there:
        spec = budgets[0]["spec"]
        assert spec["maxUnavailable"] == 1
        assert "minAvailable" not in spec
        assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_disruption_budget_has_one_of_its_two_numbers() -> None:
    spec = render(case="nodeport").one("PodDisruptionBudget")["spec"]
    assert spec["minAvailable"] == 2
    assert "maxUnavailable" not in spec


def test_pods_are_spread_over_zones_and_hosts_each_rollout_by_itself() -> None:
    constraints = template(render())["spec"]["topologySpreadConstraints"]
    assert [c["topologyKey"] for c in constraints] == [
        "topology.kubernetes.io/zone",
        "kubernetes.io/hostname",
    ]
    for constraint in constraints:
        assert constraint["matchLabelKeys"] == ["pod-template-hash"]
        selector = constraint["labelSelector"]["matchLabels"]
        assert selector.items() <= template(render())["metadata"]["labels"].items()
    off = template(render({"topologySpread": {"enabled": False}}))["spec"]
    assert "topologySpreadConstraints" not in off


# What restarts them


def test_a_changed_config_rolls_the_pods_and_nothing_else_does() -> None:
    config = {"upstreams": [{"name": "a", "base_url": "http://h/v1"}]}
    before = template(render({"config": config}))
    same = template(
        render({"config": config, "service": {"port": 81}, "metrics": {"serviceMonitor": {"enabled": True}}})
    )
    assert before == same
    config["upstreams"][0]["base_url"] = "http://i/v1"
    after = template(render({"config": config}))
    assert before["metadata"]["annotations"] != after["metadata"]["annotations"]
    assert before["spec"] == after["spec"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("checksum/upstream", {"upstream": {"apiKey": "sk-another-key"}}),
        ("checksum/redis", {"redis": {"auth": {"password": "another"}}}),
    ],
)
def test_a_changed_secret_of_the_values_rolls_the_pods(name: str, values: dict[str, Any]) -> None:
    first = {"upstream": {"apiKey": "sk-a-first-key"}, "redis": {"auth": {"password": "first"}}}
    before, after = (template(render(v))["metadata"]["annotations"] for v in (first, first | values))
    assert {k for k in before if before[k] != after[k]} == {name}


def test_a_changed_config_rolls_the_pods_or_is_left_to_them() -> None:
    def changed(**values: Any) -> tuple[bool, bool]:
        """Whether the pods' template differs, and whether the ConfigMap does."""
        one, two = (
            render({"config": {"models": [{"name": name, "upstream": "simulator"}]}, **values})
            for name in ("a", "b")
        )
        maps = [[o for o in r.all("ConfigMap") if "weir.yaml" in o["data"]] for r in (one, two)]
        assert all(maps)
        return template(one) != template(two), maps[0] != maps[1]

    assert changed() == (True, True)
    assert changed(rollout={"onConfigChange": True}) == (True, True)
    assert changed(rollout={"onConfigChange": False}) == (False, True)


def test_a_changed_redis_password_rolls_redis_too() -> None:
    def annotations(password: str) -> Object:
        redis = render({"redis": {"auth": {"password": password}}}).one("StatefulSet")
        found: Object = redis["spec"]["template"]["metadata"]["annotations"]
        return found

    assert annotations("a") == annotations("a")
    assert annotations("a") != annotations("b")


def test_what_tells_of_a_secret_is_no_plain_hash_of_it() -> None:
    """Whoever reads pods could try words against that. It must be the same for the same values, though."""
    word, key = "hunter2", "sk-of-a-test"
    values = {"redis": {"auth": {"password": word}}, "upstream": {"apiKey": key}}
    rendered = render(values)
    sums = {
        (thing["kind"], name): value
        for thing, metadata, _ in rendered.pods()
        for name, value in metadata.get("annotations", {}).items()
        if name.startswith("checksum/")
    }
    assert {("Deployment", "checksum/redis"), ("Deployment", "checksum/upstream")} <= set(sums)
    assert ("StatefulSet", "checksum/password") in sums
    for algorithm in hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}:
        for text in (word, key):
            for form in (text, base64.b64encode(text.encode()).decode()):
                assert hashlib.new(algorithm, form.encode()).hexdigest() not in sums.values()
    assert template(render(values, helm="helm4")) == template(rendered)
    elsewhere = template(render(values, release="weir"))["metadata"]["annotations"]
    assert elsewhere["checksum/redis"] != sums["Deployment", "checksum/redis"], "one try for all releases"


@pytest.mark.parametrize("changed", ["appVersion", "version"])
def test_redis_stays_over_a_new_version(tmp_path: Path, changed: str) -> None:
    old, new = (render(chart=c).one("StatefulSet") for c in (CHART, versioned(tmp_path, changed)))
    assert old["metadata"]["labels"] != new["metadata"]["labels"], "the change has arrived"
    assert old["spec"] == new["spec"]


@pytest.mark.parametrize("name", ["commonLabels", "commonAnnotations"])
def test_redis_stays_when_what_all_objects_bear_changes(name: str) -> None:
    """A build may put its number there."""
    old, new = (render({name: {"example.com/build": build}}).one("StatefulSet") for build in "12")
    assert old["metadata"] != new["metadata"]
    assert old["spec"] == new["spec"]


def test_redis_pod_has_its_own_labels_and_annotations() -> None:
    metadata = render(case="redis-persistent").one("StatefulSet")["spec"]["template"]["metadata"]
    assert metadata["labels"]["tier"] == "state"
    assert metadata["annotations"]["example.com/backup"] == "true"


def test_what_redis_is_told_beside_is_in_its_configuration() -> None:
    text = render(case="redis-persistent").one("ConfigMap", f"{RELEASE}-weir-redis")["data"]["redis.conf"]
    assert text.endswith("timeout 300\nslowlog-max-len 64\n")


def test_redis_and_the_worker_go_where_they_are_sent() -> None:
    where: dict[str, Any] = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "priorityClassName": "important",
    }
    marks = {"podLabels": {"tier": "back"}, "podAnnotations": {"example.com/scraped": "no"}}
    values = {"redis": {"embedded": where | marks}, "worker": where | marks}
    rendered = render(values, case="worker")
    for thing in (rendered.one("StatefulSet"), rendered.one("Deployment", f"{RELEASE}-weir-worker")):
        pod = thing["spec"]["template"]
        assert {name: pod["spec"][name] for name in where} == where
        assert marks["podLabels"].items() <= pod["metadata"]["labels"].items()
        assert marks["podAnnotations"].items() <= pod["metadata"]["annotations"].items()


def test_a_new_chart_that_changes_nothing_of_a_pod_restarts_none(tmp_path: Path) -> None:
    chart = versioned(tmp_path, "version")
    for kind in ("Deployment", "StatefulSet"):
        old, new = render().one(kind), render(chart=chart).one(kind)
        assert old["metadata"]["labels"]["helm.sh/chart"] != new["metadata"]["labels"]["helm.sh/chart"]
        assert old["spec"] == new["spec"]


# Images


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({}, "ghcr.io/weir-llm/weir:{app}"),
        ({"image": {"tag": "1.2.3"}}, "ghcr.io/weir-llm/weir:1.2.3"),
        ({"image": {"registry": ""}}, "weir-llm/weir:{app}"),
        ({"image": {"registry": "localhost:5000", "repository": "weir"}}, "localhost:5000/weir:{app}"),
        (
            {"global": {"imageRegistry": "mirror.example.com/proxy"}},
            "mirror.example.com/proxy/weir-llm/weir:{app}",
        ),
        (
            {"image": {"tag": "1.2.3", "digest": "sha256:" + "a" * 64}},
            "ghcr.io/weir-llm/weir@sha256:" + "a" * 64,
        ),
    ],
)
def test_an_image_by_registry_tag_and_digest(values: dict[str, Any], image: str) -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    wanted = image.format(app=about["appVersion"])
    rendered = render(values)
    assert rendered.server["image"] == wanted
    assert {c["image"] for pod in rendered.all("Pod") for c in pod["spec"]["containers"]} == {wanted}


def test_the_registry_of_all_images_is_redis_too() -> None:
    rendered = render({"global": {"imageRegistry": "mirror.example.com"}})
    (redis,) = rendered.one("StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert redis["image"].startswith("mirror.example.com/library/redis:")
    persistent = render(case="redis-persistent").one("StatefulSet")["spec"]["template"]["spec"]
    assert persistent["containers"][0]["image"] == "redis@sha256:" + "fedcba9876543210" * 4


def test_pull_secrets_of_both_kinds_are_on_every_pod() -> None:
    values = {"global": {"imagePullSecrets": ["a", "b"]}, "imagePullSecrets": ["b", "c"]}
    for _, _, spec in render(values).pods():
        assert [s["name"] for s in spec["imagePullSecrets"]] == ["a", "b", "c"]


# Names and labels


@pytest.mark.parametrize(
    ("values", "release", "name"),
    [
        ({}, "rel", "rel-weir"),
        ({}, "weir", "weir"),
        ({}, "my-weir", "my-weir"),
        ({"nameOverride": "gateway"}, "rel", "rel-gateway"),
        ({"fullnameOverride": "llm"}, "rel", "llm"),
        ({}, "r" * 53, LONGEST),
        ({}, "weir-" + "r" * 48, "weir-" + "r" * 40),
        ({}, "r" * 44 + "-" + "r" * 8, "r" * 44),
        ({"nameOverride": "n" * 45}, "r", "r-" + "n" * 43),
        ({"fullnameOverride": LONGEST}, "rel", LONGEST),
    ],
)
def test_names(values: dict[str, Any], release: str, name: str) -> None:
    assert render(values, release=release).one("Deployment")["metadata"]["name"] == name


@pytest.mark.parametrize(
    ("values", "release"),
    [({}, "r" * 53), ({"fullnameOverride": LONGEST, "nameOverride": "n" * 45}, "r" * 53)],
)
def test_the_longest_names_fit(values: dict[str, Any], release: str) -> None:
    everything = {
        "redis": {"embedded": {"persistence": {"enabled": True}}},
        "settings": {"RATE_LIMIT_REQUESTS": 1},
        "autoscaling": {"enabled": True},
    }
    rendered = render(values | everything, release=release)
    assert len(rendered.all("Pod")) == 6
    assert all(len(o["metadata"]["name"]) <= 63 for o in rendered.objects)
    # Its pods' label `controller-revision-hash` is the name with a hash of ten characters behind it.
    assert len(rendered.one("StatefulSet")["metadata"]["name"]) <= 63 - 1 - 10
    labelled = [o["metadata"] for o in rendered.objects] + [m for _, m, _ in rendered.pods()]
    assert all(len(value) <= 63 for metadata in labelled for value in metadata["labels"].values())


def test_a_nearer_label_wins_over_a_common_one() -> None:
    rendered = render(case="names")
    assert template(rendered)["metadata"]["labels"]["cost-center"] == "43"
    assert template(rendered)["metadata"]["labels"]["team"] == "platform"
    assert template(rendered)["metadata"]["annotations"]["example.com/contact"] == "oncall@example.com"
    assert rendered.one("Deployment")["metadata"]["labels"]["cost-center"] == "42"


def test_common_labels_are_not_in_selectors_which_can_never_change() -> None:
    for kind in ("Deployment", "StatefulSet"):
        spec = render(case="names").one(kind)["spec"]
        assert set(spec["selector"]["matchLabels"]) == {
            f"app.kubernetes.io/{name}" for name in ("name", "instance", "component")
        }


# Files and further objects


def copy(to: Path) -> Path:
    return Path(shutil.copytree(CHART, to / "weir", ignore=shutil.ignore_patterns("files")))


def versioned(to: Path, name: str) -> Path:
    """The chart with another version or appVersion."""
    chart = copy(to)
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about | {name: "99.0.0"}))
    return chart


def test_rules_and_dashboards_of_the_charts_folders_are_picked_up(tmp_path: Path) -> None:
    chart = copy(tmp_path)
    (chart / "files/rules").mkdir(parents=True)
    (chart / "files/dashboards").mkdir(parents=True)
    groups = {
        "groups": [{"name": "weir", "rules": [{"alert": "A", "expr": 'up{job="{{ $labels.job }}"} == 0'}]}]
    }
    (chart / "files/rules/alerts.yaml").write_text(yaml.safe_dump(groups))
    board = '{\n  "title": "Weir",\n  "templating": "{{pod}} $__rate_interval"\n}\n'
    (chart / "files/dashboards/overview.json").write_text(board)
    values = {"metrics": {"prometheusRule": {"enabled": True}}, "dashboards": {"enabled": True}}
    rendered = render(values, chart=chart)
    rule = rendered.one("PrometheusRule", f"{RELEASE}-weir-alerts")
    assert rule["spec"] == groups, "as they are: braces are Prometheus', not Helm's"
    config = rendered.one("ConfigMap", f"{RELEASE}-weir-dashboard-overview")
    assert config["data"] == {"overview.json": board}
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config["metadata"]["annotations"]["grafana_folder"] == "Weir"
    for kind in ("PrometheusRule", "ConfigMap"):
        off = render(chart=chart).all(kind)
        assert not [
            o for o in off if "alerts" in o["metadata"]["name"] or "dashboard" in o["metadata"]["name"]
        ]


def test_further_objects_may_be_texts_with_templates() -> None:
    rendered = render(case="full")
    beside = rendered.one("ConfigMap", f"{RELEASE}-weir-beside")
    assert beside["data"] == {"namespace": NAMESPACE}
    assert rendered.one("ConfigMap", f"{RELEASE}-weir-text")["data"] == {"replicas": "4"}


def test_an_ingress_has_a_rule_for_each_host_and_tls_for_all() -> None:
    ingress = render(case="full").one("Ingress")["spec"]
    hosts = ["llm.example.com", "llm.example.org"]
    assert [rule["host"] for rule in ingress["rules"]] == hosts
    assert ingress["tls"] == [{"secretName": "llm-tls", "hosts": hosts}]
    anyone = render(case="nodeport").one("Ingress")["spec"]
    assert "host" not in anyone["rules"][0]
    assert anyone["rules"][0]["http"]["paths"][0]["path"] == "/weir"


def test_redis_keeps_its_data_as_the_values_say() -> None:
    def volumes(case: str) -> tuple[Object, list[Object]]:
        rendered = render(case=case)
        spec = rendered.one("StatefulSet")["spec"]["template"]["spec"]
        by_name = {v["name"]: v for v in spec["volumes"]}
        return by_name["data"], rendered.all("PersistentVolumeClaim")

    data, claims = volumes("default")
    assert "emptyDir" in data
    assert not claims
    data, (claim,) = volumes("redis-persistent")
    assert data["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["metadata"]["name"] == f"{RELEASE}-weir-redis"
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert claim["spec"]["resources"] == {"requests": {"storage": "5Gi"}}
    data, claims = volumes("redis-claim")
    assert data["persistentVolumeClaim"] == {"claimName": "redis-data"}
    assert not claims


@pytest.mark.parametrize("word", ["keep", "delete"])
def test_the_volume_is_kept_whatever_all_objects_bear(word: str) -> None:
    values = {"commonAnnotations": {"helm.sh/resource-policy": word, "example.com/build": "1"}}
    claim = render(values, case="redis-persistent").one("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["metadata"]["annotations"]["example.com/build"] == "1"


def test_a_volume_can_be_turned_on_and_resized_on_a_redis_that_is_there() -> None:
    def fixed(**persistence: Any) -> Object:
        """What an upgrade must not change."""
        rendered = render({"redis": {"embedded": {"persistence": persistence}}})
        spec = rendered.one("StatefulSet")["spec"]
        return {name: value for name, value in spec.items() if name not in CHANGEABLE}

    without = fixed()
    assert without["podManagementPolicy"] == "Parallel"
    assert set(without) == {"podManagementPolicy", "serviceName", "selector"}
    for persistence in (
        {"enabled": True},
        {"enabled": True, "size": "9Gi"},
        {"enabled": True, "storageClass": "fast", "accessModes": ["ReadWriteOncePod"]},
        {"enabled": True, "existingClaim": "mine"},
    ):
        assert fixed(**persistence) == without


def test_redis_has_an_account_of_its_own() -> None:
    """What a cloud gives to Weir's account by its annotations is not for Redis."""
    rendered = render({"serviceAccount": {"annotations": {"example.com/role": "weir"}}})
    name = rendered.one("StatefulSet")["spec"]["template"]["spec"]["serviceAccountName"]
    assert name == f"{RELEASE}-weir-redis"
    assert "annotations" not in rendered.one("ServiceAccount", name)["metadata"]
    weirs = template(rendered)["spec"]["serviceAccountName"]
    assert rendered.one("ServiceAccount", weirs)["metadata"]["annotations"] == {"example.com/role": "weir"}
    none = render({"serviceAccount": {"create": False, "name": "mine"}})
    assert not none.all("ServiceAccount")
    assert none.one("StatefulSet")["spec"]["template"]["spec"]["serviceAccountName"] == "default"
    assert template(none)["spec"]["serviceAccountName"] == "mine"


@pytest.mark.parametrize(
    "case", ["redis-external", "redis-sentinel", "redis-cluster", "redis-none", "url-secret"]
)
def test_another_redis_leaves_nothing_of_ours(case: str) -> None:
    rendered = render(case=case)
    assert not rendered.all("StatefulSet")
    left = [o for o in rendered.objects if o["metadata"]["labels"]["app.kubernetes.io/component"] == "redis"]
    assert {o["kind"] for o in left} <= {"Secret"}

"""Values that cannot work together: each is refused before anything is installed, with a sentence."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from tests.chart.rendering import CHART, RELEASE, refusal, render
from tests.programs import HELMS

WORKER = {"enabled": True, "postgres": {"existingSecret": "ledger-app"}}
LIMIT = {"RATE_LIMIT_REQUESTS": 10}
UPSTREAM = {"name": "a", "base_url": "https://h/v1"}
KEY = {"name": "shop", "sha256": "a" * 64}
LIMITED: dict[str, dict[str, Any]] = {
    "settings.RATE_LIMIT_REQUESTS": {"settings": LIMIT},
    "config.limits": {"config": {"limits": [{"name": "all", "requests": 5}]}},
    "config.budgets": {"config": {"budgets": [{"name": "month", "usd": 5}]}},
}
"""What limits callers, by the value's name."""

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"shutdown": {"gracePeriodSeconds": 134}},
        "shutdown.gracePeriodSeconds is 134, shorter than the longest stream's end: preStopSeconds +",
    ),
    (
        {"rollout": {"maxSurge": "0%"}},
        "rollout.maxSurge and rollout.maxUnavailable are both 0, so no pod could ever be replaced",
    ),
    (
        {"rollout": {"maxSurge": 0}},
        "rollout.maxSurge and rollout.maxUnavailable are both 0, so no pod could ever be replaced",
    ),
    (
        {"rollout": {"progressDeadlineSeconds": 5}},
        "rollout.progressDeadlineSeconds must be longer than rollout.minReadySeconds",
    ),
    (
        {"autoscaling": {"enabled": True}, "keda": {"enabled": True}},
        "autoscaling.enabled and keda.enabled would fight over the number of pods; choose one.",
    ),
    (
        {"autoscaling": {"enabled": True, "minReplicas": 11}},
        "autoscaling.minReplicas is 11, above maxReplicas, which is 10.",
    ),
    (
        {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}},
        "autoscaling.targetCPUUtilizationPercentage is a share of resources.requests.cpu, which is not set",
    ),
    (
        {"autoscaling": {"enabled": True}, "resources": None},
        "autoscaling.targetCPUUtilizationPercentage is a share of resources.requests.cpu, which is not set",
    ),
    (
        {"autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": None}},
        "autoscaling has nothing to scale by",
    ),
    (
        {"keda": {"enabled": True, "minReplicaCount": 11}},
        "keda.minReplicaCount is 11, above maxReplicaCount, which is 10.",
    ),
    (
        {"keda": {"enabled": True}, "resources": {"requests": None}},
        "keda.cpuUtilizationPercentage is a share of resources.requests.cpu, which is not set",
    ),
    (
        {"keda": {"enabled": True}, "resources": None},
        "keda.cpuUtilizationPercentage is a share of resources.requests.cpu, which is not set",
    ),
    ({"keda": {"enabled": True, "cpuUtilizationPercentage": None}}, "keda has nothing to scale by"),
    (
        {"keda": {"enabled": True, "minReplicaCount": 0}},
        "keda.minReplicaCount is 0, and neither CPU nor requests in flight, which pods tell, can bring",
    ),
    (
        {"keda": {"enabled": True, "minReplicaCount": 0, "prometheus": {"serverAddress": "http://p:9090"}}},
        "keda.minReplicaCount is 0, and neither CPU nor requests in flight, which pods tell, can bring",
    ),
    (
        {"podDisruptionBudget": {"maxUnavailable": "0%"}},
        "podDisruptionBudget.maxUnavailable is 0, so no node could ever be drained; leave it at 1.",
    ),
    (
        {"podDisruptionBudget": {"minAvailable": 2}},
        "podDisruptionBudget.minAvailable is 2 with 2 pods, so no node could ever be drained",
    ),
    (
        {"podDisruptionBudget": {"minAvailable": "100%"}},
        "podDisruptionBudget.minAvailable is 100% with 2 pods, so no node could ever be drained",
    ),
    (
        {"podDisruptionBudget": {"minAvailable": "51%"}},
        "podDisruptionBudget.minAvailable is 51% with 2 pods, so no node could ever be drained",
    ),
    (
        {"podDisruptionBudget": {"minAvailable": "91%"}, "replicaCount": 10},
        "podDisruptionBudget.minAvailable is 91% with 10 pods, so no node could ever be drained",
    ),
    (
        {"podDisruptionBudget": {"minAvailable": "67%"}, "autoscaling": {"enabled": True, "minReplicas": 3}},
        "podDisruptionBudget.minAvailable is 67% with 3 pods, so no node could ever be drained",
    ),
    (
        {"upstream": {"apiKey": "sk-abcdef", "existingSecret": "mine"}},
        "upstream.apiKey and upstream.existingSecret are both set; give the key once.",
    ),
    (
        {"upstream": {"apiKey": "another"}},
        "upstream.apiKey (not shown) must begin with sk- for OpenAI; for another provider set",
    ),
    (
        {"upstream": {"baseUrl": "http://h/v1"}, "config": {"upstreams": [UPSTREAM]}},
        "upstream.baseUrl is not used where config.upstreams is set; put the address there.",
    ),
    ({"extraEnv": [{"name": "PORT", "value": "1"}]}, "extraEnv names PORT, which is set already"),
    (
        {"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        "extraEnv names A, which is set already",
    ),
    (
        {"settings": {"DEBUG": True}, "extraEnv": [{"name": "DEBUG", "value": "1"}]},
        "extraEnv names DEBUG, which is set already",
    ),
    (
        {"config": {"upstreams": [UPSTREAM | {"api_key_env": "NOWHERE"}]}},
        "config.upstreams: a takes its key from the variable NOWHERE, which no value sets",
    ),
    (
        {
            "config": {"upstreams": [UPSTREAM | {"api_keys": [{"env": "K"}, {"env": "NOWHERE"}]}]},
            "extraEnv": [{"name": "K", "value": "v"}],
        },
        "config.upstreams: a takes its key from the variable NOWHERE, which no value sets",
    ),
    ({"config": {"upstreams": [UPSTREAM, UPSTREAM]}}, "config.upstreams: the name a is there twice."),
    (
        {"config": {"upstreams": [UPSTREAM], "models": [{"name": "m", "upstream": "b"}]}},
        "config.models: m names the upstream b; there is a.",
    ),
    (
        {
            "config": {
                "upstreams": [UPSTREAM],
                "models": [{"name": "m", "upstreams": [{"upstream": "a"}, {"upstream": "b"}]}],
            }
        },
        "config.models: m names the upstream b; there is a.",
    ),
    (
        {"config": {"models": [{"name": "m", "upstream": "openai"}]}},
        "config.models: m names the upstream openai; there is simulator.",
    ),
    (
        {"config": {"models": [{"name": "m", "upstream": "simulator", "aliases": ["m"]}]}},
        "config.models: the model or alias m is there twice.",
    ),
    ({"auth": {"generateKey": False}}, "auth is on and there is no key: set auth.generateKey"),
    (
        {"auth": {"existingSecret": "mine", "keys": [KEY]}},
        "auth.keys is not used where auth.existingSecret is set; put the keys into that Secret.",
    ),
    (
        {"auth": {"keys": [KEY | {"name": "default"}]}},
        "auth.keys and config.keys: the name default is there twice (the generated key's is default).",
    ),
    (
        {"auth": {"keys": [KEY]}, "config": {"keys": [KEY | {"sha256": "b" * 64}]}},
        "auth.keys and config.keys: the name shop is there twice",
    ),
    (
        {"auth": {"keys": [KEY, KEY | {"name": "other"}]}},
        "auth.keys and config.keys: the hash of other is there twice.",
    ),
    (
        {"redis": {"auth": {"username": "weir"}}},
        "redis.auth.username is for a Redis of your own; the embedded one knows its default user alone.",
    ),
    (
        {"redis": {"urlSecret": {"name": "mine"}}},
        "redis.urlSecret is for a Redis of your own; set redis.mode to external, sentinel or cluster.",
    ),
    *[
        (
            {"redis": {"mode": mode, "urlSecret": {"name": "mine"}, "auth": auth}},
            "redis.auth is not used where redis.urlSecret.name is set; put user and password into that",
        )
        for mode, auth in (
            ("external", {"username": "weir"}),
            ("sentinel", {"password": "word"}),
            ("cluster", {"existingSecret": "other"}),
        )
    ],
    (
        {"redis": {"mode": "external"}},
        "redis.mode is external: set redis.external.host or redis.urlSecret.name.",
    ),
    (
        {"redis": {"mode": "sentinel", "sentinel": {"nodes": ["h:26379"]}}},
        "redis.mode is sentinel: set redis.sentinel.nodes and redis.sentinel.master",
    ),
    (
        {"redis": {"mode": "cluster"}},
        "redis.mode is cluster: set redis.cluster.nodes or redis.urlSecret.name.",
    ),
    *[
        (
            {"redis": {"mode": "none"}} | values,
            f"{name} with redis.mode none and 2 pods: each pod would count by itself; give it a Redis, or",
        )
        for name, values in LIMITED.items()
    ],
    *[
        (
            {"redis": {"mode": "none"}, "autoscaling": {"enabled": True, "minReplicas": 1}} | values,
            f"{name} with redis.mode none and an autoscaler: each pod would count by itself; give it a Redis",
        )
        for name, values in LIMITED.items()
    ],
    (
        {"worker": {"enabled": True}},
        "worker.enabled without worker.postgres.existingSecret: name the Secret with the address of Postgre",
    ),
    (
        {"worker": WORKER, "redis": {"mode": "none"}},
        "worker.enabled with redis.mode none: the worker copies the ledger from Redis, and there is none.",
    ),
    *[
        (
            {
                "worker": {
                    "enabled": True,
                    "postgres": {"existingSecret": "s", "caSecret": {"name": "ca"}} | mode,
                }
            },
            "worker.postgres.caSecret is used by sslMode verify-ca and verify-full alone",
        )
        for mode in ({}, {"sslMode": "require"})
    ],
    (
        {"ingress": {"enabled": True, "tls": [{"secretName": "tls"}]}},
        "ingress.tls (tls) without a host: a certificate is for names; set ingress.hosts.",
    ),
    (
        {"httpRoute": {"enabled": True}},
        "httpRoute.enabled without httpRoute.parentRefs: name the Gateway that it belongs to.",
    ),
    *[
        (
            {"service": fields},
            "service.nodePort and service.externalTrafficPolicy are for service.type NodePort or LoadBal",
        )
        for fields in ({"nodePort": 30080}, {"externalTrafficPolicy": "Local"})
    ],
    *[
        (
            {"service": {"type": kind, "loadBalancerSourceRanges": ["192.0.2.0/24"]}},
            "service.loadBalancerSourceRanges is for service.type LoadBalancer.",
        )
        for kind in ("ClusterIP", "NodePort")
    ],
    *[
        (
            {"settings": {name: address}},
            "settings.HOST and settings.ADMIN_HOST must not be loopback: no probe and no caller would",
        )
        for name in ("HOST", "ADMIN_HOST")
        for address in ("127.0.0.1", "127.1.2.3", "localhost", "::1")
    ],
    ({"dnsPolicy": "None"}, "dnsPolicy None without dnsConfig: the pods would have no DNS server."),
    *[
        (
            {"metrics": {"prometheusRule": {"objectives": {name: share}}}},
            (
                f"metrics.prometheusRule.objectives.{name} is {share}; "
                "an objective is a share above 0 and below 1"
            ),
        )
        for name, share in (("availability", 1), ("ttft", 0), ("streams", -0.5), ("streams", "99.9"))
    ],
]

# Release names that Helm takes, and what becomes of them.
NO_SERVICE = {"1st-weir": "1st-weir", "team.weir": "team.weir", "2": "2-weir"}

ALLOWED: list[dict[str, Any]] = [
    {"shutdown": {"gracePeriodSeconds": 135}},
    {"rollout": {"maxSurge": 0, "maxUnavailable": 1}},
    {"autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": None, "targetInflightPerPod": 20}},
    {"rollout": {"maxSurge": "150%"}},
    {"rollout": {"maxSurge": "0%", "maxUnavailable": "25%"}},
    {"podDisruptionBudget": {"minAvailable": "50%"}},
    {"podDisruptionBudget": {"minAvailable": "90%"}, "replicaCount": 10},
    {"podDisruptionBudget": {"minAvailable": "66%"}, "replicaCount": 3},
    {"podDisruptionBudget": {"minAvailable": "0%", "maxUnavailable": 0}},
    {"podDisruptionBudget": {"maxUnavailable": "1%"}},
    {"keda": {"enabled": True, "minReplicaCount": 0, "triggers": [{"type": "cron", "metadata": {}}]}},
    {"autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": None, "targetInflightPerPod": 9}}
    | {"resources": None},
    {"podDisruptionBudget": {"maxUnavailable": 0}, "replicaCount": 1},
    {"upstream": {"apiKey": "another", "baseUrl": "https://h/v1"}},
    {"config": {"upstreams": [UPSTREAM | {"api_key_env": "K"}]}, "extraEnv": [{"name": "K", "value": "v"}]},
    *[
        {"config": {"upstreams": [UPSTREAM | key]}, "extraEnvFrom": [{"secretRef": {"name": "more"}}]}
        for key in ({"api_key_env": "K"}, {"api_keys": [{"env": "K"}]})
    ],
    {"config": {"upstreams": [UPSTREAM | {"api_keys": [{"file": "/run/secrets/key"}]}]}},
    {
        "config": {
            "upstreams": [UPSTREAM, UPSTREAM | {"name": "b"}],
            "models": [{"name": "m", "upstreams": [{"upstream": "a", "weight": 3}, {"upstream": "b"}]}],
        }
    },
    {"config": {"models": [{"name": "m", "upstreams": [{"upstream": "simulator"}]}]}},
    {"config": {"models": [{"name": "m", "upstream": "openai"}]}, "upstream": {"baseUrl": "http://h/v1"}},
    {"auth": {"generateKey": False}, "config": {"keys": [KEY]}},
    *[{"redis": {"mode": "none"}, "replicaCount": 1} | values for values in LIMITED.values()],
    {"redis": {"mode": "external", "urlSecret": {"name": "mine"}}},
    {"redis": {"mode": "external", "external": {"host": "h"}, "auth": {"username": "weir"}}},
    {"redis": {"auth": {"password": "p@ss/word #1"}}},
    {"service": {"type": "NodePort", "nodePort": 30080, "externalTrafficPolicy": "Local"}},
    {"service": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"]}},
    {"settings": {"HOST": "::", "ADMIN_HOST": "0.0.0.0"}},
    {"worker": {"enabled": False}, "redis": {"mode": "none"}},
    {"worker": WORKER, "redis": {"mode": "external", "urlSecret": {"name": "mine"}}},
    {"worker": {"enabled": True, "postgres": {"existingSecret": "s", "sslMode": "require"}}},
    {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.53"]}},
    {"ingress": {"enabled": True, "tls": [{"secretName": "tls", "hosts": ["a.example.com"]}]}},
    {"metrics": {"prometheusRule": {"objectives": {"availability": 0.9999, "streams": "0.5"}}}},
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[json.dumps(v)[:70] for v, _ in REFUSED])
def test_it_is_refused_with_a_sentence(values: dict[str, Any], sentence: str) -> None:
    said = _said(json.dumps(values))
    assert f"weir: these values cannot work: - {sentence}" in said
    assert said.count(" - ") == 1, "and nothing else is"


@pytest.mark.parametrize(("release", "name"), NO_SERVICE.items())
def test_a_name_that_no_service_can_have_is_refused(release: str, name: str) -> None:
    said = _said("{}", release)
    assert f" - the name {name} is none that a Service can have: it must begin with a letter" in said
    assert render({"fullnameOverride": "weir"}, release=release).one("Service", "weir")


@pytest.mark.parametrize("values", ALLOWED, ids=[json.dumps(v)[:70] for v in ALLOWED])
def test_what_is_next_to_it_is_not_refused(values: dict[str, Any]) -> None:
    assert render(values).deployment


@pytest.mark.parametrize("helm", HELMS)
def test_several_are_told_at_once(helm: str) -> None:
    said = refusal(
        {"rollout": {"maxSurge": 0}, "redis": {"mode": "cluster"}, "httpRoute": {"enabled": True}}, helm=helm
    )
    for words in ("no pod could ever be replaced", "redis.mode is cluster", "httpRoute.parentRefs"):
        assert words in said


def test_secrets_are_not_in_the_sentence() -> None:
    auth = {"username": "weir", "password": "p@ssword"}
    said = refusal({"redis": {"auth": auth}, "upstream": {"apiKey": "hidden-word"}})
    assert "p@ssword" not in said
    assert "hidden-word" not in said


def test_every_sentence_of_the_template_is_tried() -> None:
    template = (CHART / "templates/_validate.tpl").read_text()
    sentences = re.findall(r'append \$faults \(?(?:printf )?"([^"]+)"', template)
    assert len(sentences) == template.count("append $faults")
    told = [_said(json.dumps(values)) for values, _ in REFUSED]
    told += [_said("{}", release) for release in NO_SERVICE]
    for sentence in sentences:
        pattern = re.sub("%[sd]", ".+", re.escape(sentence))
        assert any(re.search(f" - {pattern}", said) for said in told), sentence


@functools.cache
def _said(values: str, release: str = RELEASE) -> str:
    return refusal(json.loads(values), release=release)

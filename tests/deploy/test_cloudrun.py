"""deploy/cloudrun/service.yaml: its names are Weir's, and it keeps to what Cloud Run allows."""

from __future__ import annotations

import urllib.request
from pathlib import PurePosixPath

from tests.chart.rendering import Object
from tests.deploy.rendering import CHART, DEPLOY, check_environment, load
from tests.running import ROOT, RunningWeir, configuration

SERVICE: Object = load(DEPLOY / "cloudrun/service.yaml")
TEMPLATE: Object = SERVICE["spec"]["template"]
(CONTAINER,) = TEMPLATE["spec"]["containers"]
VARIABLES: dict[str, Object] = {variable["name"]: variable for variable in CONTAINER["env"]}

RESERVED = {"PORT", "K_SERVICE", "K_REVISION", "K_CONFIGURATION"}
SECONDS_AFTER_SIGTERM = 10


def test_weir_takes_the_environment() -> None:
    taken = check_environment(VARIABLES)
    assert taken.openai_api_key is not None
    assert taken.redis_url is not None
    assert taken.drain_delay + taken.drain_timeout < SECONDS_AFTER_SIGTERM


def test_no_variable_is_cloud_runs_own_or_there_twice() -> None:
    assert not RESERVED & set(VARIABLES)
    assert len(VARIABLES) == len(CONTAINER["env"])


def test_no_secret_stands_in_the_file() -> None:
    for name in ("OPENAI_API_KEY", "REDIS_URL"):
        assert VARIABLES[name].keys() == {"name", "valueFrom"}
        assert VARIABLES[name]["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}


def test_the_keys_file_is_where_weir_looks_for_it() -> None:
    (mount,) = CONTAINER["volumeMounts"]
    (volume,) = TEMPLATE["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    (item,) = volume["secret"]["items"]
    path = PurePosixPath(mount["mountPath"], item["path"])
    assert str(path) == VARIABLES["WEIR_KEYS_FILE"]["value"]


def test_every_secret_is_made_by_a_command_of_the_docs() -> None:
    named = {v["valueFrom"]["secretKeyRef"]["name"] for v in VARIABLES.values() if "valueFrom" in v}
    named |= {volume["secret"]["secretName"] for volume in TEMPLATE["spec"]["volumes"]}
    text = (ROOT / "docs/deploying.md").read_text()
    for name in named:
        assert f"gcloud secrets create {name} " in text


def test_probes_ask_the_one_port_for_a_page_that_is_there() -> None:
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == 8000
    with RunningWeir(configuration()) as weir:
        for probe in (CONTAINER["startupProbe"], CONTAINER["livenessProbe"]):
            assert probe["httpGet"]["port"] == port["containerPort"]
            assert probe["timeoutSeconds"] <= probe["periodSeconds"]
            with urllib.request.urlopen(weir.url + probe["httpGet"]["path"], timeout=20) as answer:
                assert answer.status == 200


def test_streams_may_last_and_the_processor_never_sleeps() -> None:
    annotations = TEMPLATE["metadata"]["annotations"]
    assert TEMPLATE["spec"]["timeoutSeconds"] == 3600
    assert 1 <= TEMPLATE["spec"]["containerConcurrency"] <= 1000
    assert annotations["run.googleapis.com/cpu-throttling"] == "false"
    fewest, most = (int(annotations[f"autoscaling.knative.dev/{end}Scale"]) for end in ("min", "max"))
    assert 1 <= fewest < most
    assert check_environment(VARIABLES).replicas == fewest


def test_it_is_this_release() -> None:
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("serving.knative.dev/v1", "Service")
    assert CONTAINER["image"].rpartition(":")[2] == load(CHART / "Chart.yaml")["appVersion"]

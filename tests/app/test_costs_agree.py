"""One request costs the same dollars wherever it is told: ledger, metrics, log line, usage page, answer.

Answers and prices are those of tests/unit/test_cost_shapes.py; here they take the whole way.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.config import FileConfig
from service.domain import Operation, RequestRecord, UsageSource
from service.pricing import OVERRIDE
from tests.running import RunningWeir, WeirProcess, configuration
from tests.unit.test_cost_shapes import ALL, CACHED, IN, NANO, OUT, PRICE, SHAPES, Shape

# "Hello!" in one message is 6 tokens, by estimate: 2 and 4 for the message itself.
TOLD = {
    name: ALL[name].nano
    for name in (
        *("openai-chat.json", "openai-chat.sse", "openai-audio.json", "openai-responses.sse"),
        *("openai-embeddings.json", "groq-beside.sse", "xai-reasoning.json", "proxy-split.sse"),
    )
} | {"ollama-no-usage.sse": 6 * IN + 8 * OUT, "usage-zero.json": 6 * IN + 6 * OUT}
BODIES: dict[Operation, dict[str, Any]] = {
    Operation.CHAT: {"messages": [{"role": "user", "content": "Hello!"}]},
    Operation.RESPONSES: {"input": "Hello!"},
    Operation.EMBEDDINGS: {"input": "Hello!"},
}


class Server(BaseHTTPRequestHandler):
    """Answers with the file that the model is named for, in small pieces."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        path = SHAPES / body["model"]
        self.send_response(200)
        kind = "text/event-stream" if path.suffix == ".sse" else "application/json"
        self.send_header("content-type", kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        answer = path.read_bytes()
        for at in range(0, len(answer), 97):
            piece = answer[at : at + 97]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def config() -> Iterator[dict[str, Any]]:
    """A YAML file's content, with the server behind it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield {
            "upstreams": [{"name": "main", "base_url": f"http://127.0.0.1:{server.server_port}/v1"}],
            "models": [
                {"name": name, "upstream": "main", "price": PRICE.model_dump(exclude_none=True)}
                for name in TOLD
            ],
        }
        server.shutdown()
        thread.join(10)


def ask(url: str, name: str) -> None:
    shape: Shape = ALL[name]
    body = {"model": name, "stream": name.endswith(".sse"), **BODIES[shape.operation]}
    answer = httpx2.post(f"{url}/v1/{shape.operation.value}", json=body, timeout=20)
    assert answer.status_code == 200, answer.text


def used(url: str) -> dict[str, Decimal]:
    """Billionths of a dollar by model, of the usage page: its numbers are read as they are written."""
    page = httpx2.get(f"{url}/api/v1/usage", params={"group_by": "model"}, timeout=20)
    rows = json.loads(page.text, parse_float=Decimal)["rows"]
    return {row["model"]: Decimal(row["cost_usd"]) * NANO for row in rows}


def counted(exposition: str) -> dict[str, float]:
    """Billionths of a dollar by model, of the metrics."""
    return {
        sample.labels["gen_ai_request_model"]: sample.value * NANO
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == "weir_cost_usd_total" and sample.labels["cost_source"] == OVERRIDE
    }


def test_ledger_metric_and_usage_page_tell_the_same_dollars(config: dict[str, Any]) -> None:
    file = FileConfig.model_validate(config)
    with RunningWeir(configuration(file=file, openai_max_retries=0, cache_ttl=0)) as weir:
        for name in TOLD:
            ask(weir.url, name)
        records = {record.request_model: record for record in weir.records(len(TOLD))}
        assert {name: round(cost_of(record) * NANO) for name, record in records.items()} == TOLD
        assert {record.cost.source for record in records.values()} == {OVERRIDE}
        for name, record in records.items():
            assert record.usage is not None
            assert record.usage.source is ALL[name].source
        summed = {
            sample.labels["gen_ai_request_model"]: sample.value * NANO
            for family in weir.registry.collect()
            for sample in family.samples
            if sample.name == "weir_cost_usd_total"
        }
        assert summed == pytest.approx(TOLD)
        assert used(weir.url) == TOLD


def cost_of(record: RequestRecord) -> float:
    assert record.cost.usd is not None
    return record.cost.usd


def test_the_log_line_tells_them_too(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "weir.yaml"
    path.write_text(yaml.safe_dump(config))
    with WeirProcess(WEIR_CONFIG=str(path), CACHE_TTL="0") as process:
        process.wait_until_ready()
        for name in TOLD:
            ask(process.url, name)
        process.wait_for_events("request", len(TOLD))
        lines = {line["model"]: line for line in process.events("request")}
        assert {name: round(line["cost_usd"] * NANO) for name, line in lines.items()} == TOLD
        told = {name: line["usage_source"] for name, line in lines.items()}
        assert told == {name: ALL[name].source.value for name in TOLD}
        assert told["ollama-no-usage.sse"] == UsageSource.ESTIMATED.value
        metrics = httpx2.get(f"{process.admin_url}/metrics", timeout=20).text
        assert counted(metrics) == pytest.approx(TOLD)
        assert used(process.url) == TOLD


def test_an_answer_from_the_cache_saves_what_it_had_cost(config: dict[str, Any]) -> None:
    file = FileConfig.model_validate(config)
    body = {"model": "openai-chat.json", "temperature": 0, **BODIES[Operation.CHAT]}
    with RunningWeir(configuration(file=file, openai_max_retries=0)) as weir:
        for _ in range(2):
            httpx2.post(f"{weir.url}/v1/chat/completions", json=body, timeout=20).raise_for_status()
        asked, kept = weir.records(2)
        assert (asked.cost.usd, kept.cost.usd) == (kept.saved_usd, 0.0)
        assert round((kept.saved_usd or 0.0) * NANO) == 93 * IN + 1_024 * CACHED + 46 * OUT

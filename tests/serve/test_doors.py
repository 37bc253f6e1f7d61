"""Who may come in: this machine's own pages and whoever has the key; and what an observer sees."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from lowvram.data.tokenizer import Tokenizer
from lowvram.serve.addresses import is_loopback
from lowvram.serve.metrics import Metrics
from tests.serve.place import Place, served

BODY = {"prompt": "Kış", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def place(small_tokenizer: Tokenizer) -> Iterator[Place]:
    with served(small_tokenizer) as place:
        yield place


@pytest.fixture
def http(place: Place) -> Iterator[httpx.Client]:
    with place.http() as client:
        yield client


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.3.2.1", "::1", "[::1]", "localhost."])
def test_loopback_is_known_by_all_its_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "localhost.evil.com", "127.0.0.1.nip.io", "evil.com", "", "0x7f.1"]
)
def test_what_others_reach_is_no_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["evil.com", "evil.com:80", "192.168.1.5", "127.0.0.1.nip.io", "[", "", "a@evil.com"])
@pytest.mark.parametrize("path", ["/", "/v1/models", "/health", "/metrics"])
def test_a_foreign_host_is_refused(http: httpx.Client, host: str, path: str) -> None:
    answer = http.get(path, headers={"Host": host})
    assert answer.status_code in (400, 403)  # h11 itself refuses what is no host at all
    if answer.status_code == 403:
        assert answer.json()["error"]["code"] == "foreign_origin"


@pytest.mark.parametrize("origin", ["https://evil.com", "null", "http://localhost:1", "file://", "http://127.0.0.1"])
def test_a_foreign_page_is_refused(http: httpx.Client, place: Place, origin: str) -> None:
    answer = http.post("/v1/completions", json=BODY, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "Origin" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json=BODY, headers={"Origin": place.url}).status_code == 200


def test_no_other_site_is_invited(http: httpx.Client) -> None:
    answer = http.options("/v1/completions", headers={"Access-Control-Request-Method": "POST"})
    assert answer.status_code == 405
    found = [http.get("/"), http.post("/v1/completions", json=BODY), answer]
    names = {name.lower() for one in found for name in one.headers}
    assert not {name for name in names if name.startswith("access-control") or name == "set-cookie"}


def test_with_a_key_only_the_page_and_the_health_are_open(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer, api_key="gizli", own_names_only=False) as place:
        with httpx.Client(base_url=place.url, trust_env=False) as stranger, place.http() as friend:
            for path in ("/", "/page.js", "/page.css", "/health"):
                assert stranger.get(path).status_code == 200
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = stranger.get(path)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert stranger.post("/v1/completions", content=b"x" * 10**6).status_code == 401
            for header in ("Basic gizli", "gizli", "Bearer", "Bearer gizli x", "Bearer Gizli", b"Bearer gizl\xfd"):
                assert stranger.get("/v1/models", headers={"Authorization": header}).status_code == 401
            assert friend.get("/v1/models").status_code == 200
            assert friend.get("/metrics", headers={"Host": "evim.example"}).status_code == 200


def test_the_page_may_load_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    text = "".join(http.get(path).text for path in ("/", "/page.js", "/page.css"))
    assert re.findall(r"https?://|//[a-z]+\.|@import|innerHTML|insertAdjacentHTML|\beval\(|document\.write", text) == []
    assert not re.search(r"<script>|\son[a-z]+=|style=", answer.text), "inline code would need an exception"


def test_health_counts_who_is_there(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok", "model": "small", "running": 0, "waiting": 0, "slots": 4}


def test_metrics_are_what_prometheus_reads(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer) as place, place.http() as http:
        for _ in range(2):
            http.post("/v1/completions", json=BODY)
        http.post("/v1/completions", json=BODY | {"n": 3})
        http.get("/somewhere/else")
        answer = http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert values['lowvram_requests_total{path="/v1/completions",status="200"}'] == "2"
    assert values['lowvram_requests_total{path="/v1/completions",status="400"}'] == "1"
    assert values['lowvram_requests_total{path="other",status="404"}'] == "1"
    read, reused = int(values["lowvram_tokens_read_total"]), int(values["lowvram_tokens_reused_total"])
    prompt = len(small_tokenizer.encode("Kış")) + 1
    assert (read, reused) == (prompt + 1, prompt - 1), "the second time all but the last was there"
    assert values["lowvram_tokens_written_total"] == "6"
    assert values["lowvram_request_seconds_count"] == "3"
    assert values["lowvram_first_token_seconds_count"] == "2"
    assert values["lowvram_slots"] == "4"
    assert values["lowvram_running"] == values["lowvram_waiting"] == "0"


def test_a_histograms_buckets_add_up() -> None:
    metrics = Metrics()
    for seconds in (0.01, 0.05, 0.2, 1e9):
        metrics.time("request_seconds", seconds)
    lines = metrics.show({}).splitlines()
    assert 'lowvram_request_seconds_bucket{le="0.05"} 2' in lines
    assert 'lowvram_request_seconds_bucket{le="0.25"} 3' in lines
    assert 'lowvram_request_seconds_bucket{le="150.0"} 3' in lines
    assert 'lowvram_request_seconds_bucket{le="+Inf"} 4' in lines
    assert "lowvram_request_seconds_count 4" in lines
    assert "# TYPE lowvram_request_seconds histogram" in lines
    helped = [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert len(helped) == len(set(helped))

"""`lowvram serve` as a user starts it: a process, the real client, Ctrl-C; and what it refuses to start with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from openai import OpenAI

from lowvram.cli.app import build_parser
from lowvram.cli.serve import _build_limits, _fingerprint
from lowvram.data.tokenizer import Tokenizer
from tests.flows.typed import environment, typed


@contextmanager
def started(run: Path, *words: object, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start the command on any free port; returns the process, its URL and all that it said before it was ready."""
    command = [sys.executable, "-m", "lowvram", "serve", str(run), "--port", "0", "--device", "cpu", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", env=environment(**variables)) as process:
        assert process.stderr is not None
        said = ""
        while "Ctrl-C ends." not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        try:
            yield process, re.findall(r"http://\S+?:\d+", said)[0], said
        finally:
            process.kill()


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal, and expect an orderly end."""
    if sys.platform == "win32":
        return  # where Ctrl-C goes to a whole console
    process.send_signal(number)
    assert process.wait(30) == 0
    assert process.stderr is not None
    assert process.stderr.read() == "Stopped.\n"


def test_it_says_where_it_is_answers_and_ends_in_order(run: Path) -> None:
    with started(run, "--slots", 2, "--precision", "fp32") as (process, url, said):
        assert f"{url}/ is a chat page, {url}/v1 is for OpenAI's clients.\n" in said
        assert re.search(r"run continues texts: [\d,]+ parameters in fp32 \(as asked\)\.", said)
        assert re.search(r"Context of 32 tokens, .+\. 2 answers at once, 64 requests may wait\.", said)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        expected = typed("chat", run, "--prompt", "Kış", "--temperature", 0, "--tokens", 7, "--precision", "fp32")
        options = {"max_tokens": 7, "temperature": 0, "extra_body": {"repetition_penalty": 1.1}}
        answer = client.completions.create(model="run", prompt="Kış", **options)
        assert f"Kış{answer.choices[0].text}\n" == expected.out
        assert answer.system_fingerprint is not None
        assert answer.system_fingerprint.startswith("fp_")
        assert "lowvram" in httpx.get(url, trust_env=False).text
        end(process, signal.SIGINT)


@pytest.mark.nightly
def test_a_model_that_is_to_speak_answers_conversations(run: Path) -> None:
    with started(run, "--as", "dialogue", "--precision", "fp32", "--slots", 1) as (process, url, said):
        assert "run answers in turns:" in said
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "Kış<|end_of_turn|>"}]
        answer = client.chat.completions.create(model="run", messages=messages, max_tokens=3, temperature=0)  # type: ignore[arg-type]
        assert answer.choices[0].message.role == "assistant"
        tokenizer = Tokenizer.load(run.parent / "tok")
        # BOS, who speaks, the words, end of turn, who speaks next: what a user writes is never a special token.
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 4 + len(tokenizer.encode("Kış<|end_of_turn|>"))
        end(process, signal.SIGTERM)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="needs a system that limits another process's files")
def test_neither_silent_clients_nor_endless_turns_keep_it_from_answering_and_ending(run: Path) -> None:
    import resource

    def ask_health() -> str:
        return httpx.get(f"{url}/health", trust_env=False, timeout=60).text

    with started(run, "--as", "dialogue", "--slots", 1) as (process, url, _):
        # Fewer files than it was started with: now there are less than its connections need.
        used = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
        port = int(url.rsplit(":", 1)[1])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        for _ in range(3):
            assert '"status":"ok"' in ask_health()
        turns = [{"role": "user", "content": ""}] * 10_000
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = json.dumps({"messages": turns, "truncation": "auto"}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert '"status":"ok"' in ask_health()
            end(process, signal.SIGINT)
        for one in silent:
            one.close()


def test_another_address_demands_a_key(run: Path) -> None:
    answer = typed("serve", run, "--host", "0.0.0.0", "--device", "cpu")
    assert answer.code == 1
    assert "Error: --host is 0.0.0.0, and there is no API key." in answer.err
    assert "LOWVRAM_API_KEY" in answer.err


@pytest.mark.parametrize("key", ["", " gizli", "gizli\n", "şifre"])
def test_a_key_that_no_header_can_hold_is_refused(run: Path, key: str) -> None:
    answer = typed("serve", run, "--api-key", key, "--device", "cpu")
    assert answer.code == 1
    assert "--api-key is not a valid key" in answer.err
    assert not key or key not in answer.err


@pytest.mark.nightly
def test_the_key_of_the_environment_is_asked_for(run: Path) -> None:
    words = ("--host", "0.0.0.0", "--name", "benim", "--slots", 1)
    with started(run, *words, LOWVRAM_API_KEY="gizli") as (_, url, said):
        assert "Both ask for the API key." in said
        assert "gizli" not in said
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        friend = OpenAI(base_url=f"{url}/v1", api_key="gizli", max_retries=0)
        assert [model.id for model in friend.models.list()] == ["benim"]


def test_a_port_that_is_taken_is_an_error_before_the_model_is_read(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = typed("serve", tmp_path / "no run", "--port", taken.getsockname()[1])
    assert answer.code == 1
    assert re.search(
        r"Error: 127\.0\.0\.1 port \d+ cannot be listened on\. .* Choose another with --port\.", answer.err
    )


@pytest.mark.parametrize(
    "words, word",
    [
        (("--port", 70_000), "70000 is not a port"),
        (("--slots", 0), "less than 1"),
        (("--queue", -1), "less than 0"),
        (("--queue", 10_001), "10001 is more than 10,000"),
        (("--queue", 1_000_000), "is more than 10,000"),
        (("--max-body", "many"), "many"),
        (("--max-body", 1023), "'1023' is 1023 B; a request may have 1.0 KiB to 256.0 MiB"),
        (("--max-body", "256.1MiB"), "is 256.1 MiB; a request may have"),
        (("--max-body", "25600MiB"), "is 25.0 GiB; a request may have"),
        (("--max-body", 0), "less than a byte"),
        (("--as", "king"), "argument --as: there is no 'king'. Known: base, dialogue."),
    ],
)
def test_options_out_of_range_are_usage_errors(run: Path, words: tuple[object, ...], word: str) -> None:
    answer = typed("serve", run, *words)
    assert answer.code == 2
    assert word in answer.err


def test_there_are_connections_for_all_that_may_be_answered_or_wait() -> None:
    arguments = build_parser().parse_args(["serve", "run", "--slots", "700", "--queue", "10000"])
    limits = _build_limits(arguments, 1024)
    assert (limits.slots, limits.queue, limits.connections) == (700, 10_000, 10_956)


@pytest.mark.parametrize(
    "text, size", [("4096", 4096), ("4KiB", 4096), ("4kB", 4000), ("1024", 1024), ("256MiB", 2**28), (None, 2**22)]
)
def test_a_bare_size_of_a_body_is_bytes(text: str | None, size: int) -> None:
    words = [] if text is None else ["--max-body", text]
    assert build_parser().parse_args(["serve", "run", *words]).max_body == size


def test_the_fingerprint_of_a_directory_covers_all_that_answers_depend_on(tmp_path: Path) -> None:
    files = {
        "config.json": b"{}",
        "a.safetensors": bytes(10_000),
        "b.safetensors": b"1",
        "chat_template.jinja": b"{{ a }}",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    loaded = SimpleNamespace(checkpoint=None, tokenizer=SimpleNamespace(hash="t"), precision="bf16", dtype="bf16")
    first = _fingerprint(loaded, tmp_path)  # type: ignore[arg-type]
    (tmp_path / "README.md").write_text("Another page.")
    assert _fingerprint(loaded, tmp_path) == first  # type: ignore[arg-type]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert _fingerprint(loaded, tmp_path) != first, name  # type: ignore[arg-type]
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert _fingerprint(loaded, tmp_path) != first  # type: ignore[arg-type]


def test_a_host_that_is_none_is_an_error(run: Path) -> None:
    answer = typed("serve", run, "--host", "no.such.host.invalid", "--api-key", "gizli")
    assert answer.code == 1
    assert "Correct --host." in answer.err


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    answer = typed("serve", tmp_path / "nowhere", "--port", 0)
    assert answer.code == 1
    assert "nowhere" in answer.err


def test_without_its_packages_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    answer = typed("serve", run)
    assert answer.code == 1
    assert "pip install -e '.[serve]'" in answer.err

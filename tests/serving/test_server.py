"""``loracle serve`` as a process: it answers, drains at SIGTERM, and does not open a door without a lock."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from click.testing import CliRunner
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.cli import main
from loracle.config import RunConfig, ServeConfig
from loracle.errors import UserError
from loracle.runs.predictor import Predictor
from loracle.serving import server
from loracle.serving.limits import is_loopback
from loracle.serving.server import _listen, load, read_token


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    config = QUICK | {"data": str(write(folder / "a.jsonl", labelled())), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(folder / "moods"), "dtype": "float32", "max_length": 48}
    return pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)


def test_a_process_bears_broken_requests_and_answers_what_is_at_work_at_sigterm(run):
    command = [sys.executable, "-m", "loracle", "serve", str(run), "--port", "0", "--round-tokens", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = re.fullmatch(r"serving moods at http://127\.0\.0\.1:(\d+)\n", line := process.stdout.readline())
            assert found, (line, process.stderr.read())
            _break(int(found[1]))
            texts = [f"secret good {i} " * 8 for i in range(256)]
            results = _stop_while_at_work(process, f"http://127.0.0.1:{found[1]}", texts)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "stopped\n")
    assert "Traceback" not in err
    assert "secret" not in err
    assert [r["labels"] for r in results] == [[label] for label in Predictor(run).predict(texts)]


def test_an_answer_is_not_kept_back_for_a_client_that_is_slow_to_acknowledge():
    """Headers and body leave one after the other; with Nagle's algorithm the second waits for the client, 40 ms."""
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _break(port):
    """Bodies without an end, requests that are none, and a client that leaves in the middle."""
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012  # 413, and the line is cut
            for _ in range(1000):
                raw.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
    for broken in (b"\0\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n", head + b"Content-Length: -1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(broken)
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(head + b"Content-Length: 100\r\n\r\n{")
    assert httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    seen = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'loracle_requests_total{route="/v1/classify",status="413"} 1.0' in seen


def _stop_while_at_work(process, address, texts):
    """The answer to a request during which SIGTERM came."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx2.post, f"{address}/v1/classify", json={"texts": texts}, timeout=60)
        give_up = time.monotonic() + 30
        while "loracle_queue_texts 0.0" in httpx2.get(f"{address}/metrics").text:
            assert time.monotonic() < give_up
        process.send_signal(signal.SIGTERM)
        assert not answer.done()
        results = answer.result(60).json()["results"]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(address)
    return results


# --- what is refused before anything starts -----------------------------------------------------------------------------


def refused(*args):
    done = CliRunner().invoke(main, ["serve", *map(str, args)])
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.1", "example.com"])
def test_a_host_that_others_reach_wants_a_token(run, monkeypatch, host):
    monkeypatch.delenv("LORACLE_TOKEN", raising=False)
    assert re.search("LORACLE", refused(run, "--host", host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_wants_none(host):
    assert is_loopback(host)


def test_a_port_in_use_is_named(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "127.0.0.1" in refused(run, "--port", port)


def test_no_run_and_wrong_limits_are_named(run, tmp_path):
    assert "folder" in refused(tmp_path / "none")
    assert "room for one request" in refused(run, "--max-texts", 2000)
    assert "queue above" in refused(run, "--queue", 0) or "queue of 1 or more" in refused(run, "--queue", 0)


@pytest.mark.parametrize(("said", "left"), [(None, 2), ("3", 3)])
def test_one_core_is_left_to_http(monkeypatch, said, left):
    monkeypatch.delenv("OMP_NUM_THREADS") if said is None else monkeypatch.setenv("OMP_NUM_THREADS", said)
    seen, before = [], torch.get_num_threads()

    def stop(*_, **__):
        seen.append(torch.get_num_threads())
        raise UserError("a run", "none", "this is a test")

    monkeypatch.setattr(server, "load", stop)
    torch.set_num_threads(3)
    try:
        with pytest.raises(UserError):
            server.serve([], ServeConfig())
    finally:
        torch.set_num_threads(before)
    assert seen == [left]


def test_two_runs_of_one_name_are_refused(run):
    with pytest.raises(UserError, match="moods twice"):
        load([run, run])


def test_what_is_not_installed_is_named(run, monkeypatch):
    import loracle.serving

    monkeypatch.delitem(sys.modules, "loracle.serving.server")
    monkeypatch.delattr(loracle.serving, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused(run).endswith("'loracle[serve]'")


# --- the token ----------------------------------------------------------------------------------------------------------


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LORACLE_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("LORACLE_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment"
    (tmp_path / "token").write_text("from-a-file\n")
    assert read_token(str(tmp_path / "token")) == "from-a-file"


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", "tökén".encode(), b"\xff", b"a\0b"])
def test_a_token_that_no_header_can_carry_is_refused(tmp_path, monkeypatch, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match="token"):
        read_token(str(tmp_path / "token"))


def test_an_empty_variable_is_no_open_door(monkeypatch):
    monkeypatch.setenv("LORACLE_TOKEN", "")
    with pytest.raises(UserError, match="LORACLE_TOKEN"):
        read_token(None)
    with pytest.raises(UserError, match="no-such-file"):
        read_token("no-such-file")

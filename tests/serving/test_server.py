"""``loracle serve`` as a process: it answers, drains at SIGTERM, and needs a token on a public host."""

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


@pytest.mark.slow
def test_process_survives_broken_requests_and_drains_at_sigterm(run):
    command = [sys.executable, "-m", "loracle", "serve", str(run), "--port", "0", "--tokens-per-micro-batch", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            match = re.fullmatch(r"serving moods at http://127\.0\.0\.1:(\d+)\n", line := process.stdout.readline())
            assert match, (line, process.stderr.read())
            _send_broken_requests(int(match[1]))
            texts = [f"secret good {i} " * 8 for i in range(256)]
            results = _stop_during_request(process, f"http://127.0.0.1:{match[1]}", texts)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "stopped\n")
    assert "Traceback" not in err
    assert "secret" not in err
    assert [r["labels"] for r in results] == [[label] for label in Predictor(run).predict(texts)]


def test_connections_disable_nagle():
    """With Nagle's algorithm the body waits 40 ms until the client acknowledges the headers."""
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _send_broken_requests(port):
    """Send an endless body, malformed requests, and half a request."""
    head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012  # 413, and the connection is closed
            for _ in range(1000):
                raw.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
    for broken in (b"\0\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n", head + b"Content-Length: -1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(broken)
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(head + b"Content-Length: 100\r\n\r\n{")
    assert httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    metrics = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'loracle_requests_total{route="/v1/classify",status="413"} 1.0' in metrics


def _stop_during_request(process, address, texts):
    """Send SIGTERM during a request and return its results."""
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


# --- errors before the server starts -------------------------------------------------------------------------------------


def error_of(*args):
    done = CliRunner().invoke(main, ["serve", *map(str, args)])
    assert done.exit_code == 2, (done.output, done.exception)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Error: ")
    assert len(lines) <= 2, done.stderr
    return " ".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.1", "example.com"])
def test_public_host_requires_a_token(run, monkeypatch, host):
    monkeypatch.delenv("LORACLE_TOKEN", raising=False)
    line = error_of(run, "--host", host)
    assert "LORACLE_TOKEN" in line
    assert host in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_is_loopback(host):
    assert is_loopback(host)


def test_port_in_use_is_an_error(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = error_of(run, "--port", port)
    assert all(fact in line for fact in ("127.0.0.1", str(port), "Address already in use"))


def test_missing_run_and_invalid_limits_are_errors(run, tmp_path):
    assert "folder" in error_of(tmp_path / "none")
    line = error_of(run, "--max-texts", 2000)
    assert all(fact in line for fact in ("--max-texts 2000", "--queue-texts 1024"))
    line = error_of(run, "--queue", 0)
    assert "queue" in line
    assert "1" in line


@pytest.mark.parametrize(("omp_num_threads", "expected"), [(None, 2), ("3", 3)])
def test_one_thread_is_left_to_http(monkeypatch, omp_num_threads, expected):
    if omp_num_threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    threads, before = [], torch.get_num_threads()

    def stop(*_, **__):
        threads.append(torch.get_num_threads())
        raise UserError("Stop here.")

    monkeypatch.setattr(server, "load", stop)
    torch.set_num_threads(3)
    try:
        with pytest.raises(UserError):
            server.serve([], ServeConfig())
    finally:
        torch.set_num_threads(before)
    assert threads == [expected]


def test_two_runs_of_one_name_are_an_error(run):
    with pytest.raises(UserError, match="moods"):
        load([run, run])


def test_missing_package_is_an_error(run, monkeypatch):
    import loracle.serving

    monkeypatch.delitem(sys.modules, "loracle.serving.server")
    monkeypatch.delattr(loracle.serving, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    line = error_of(run)
    assert "uvicorn" in line
    assert "pip install 'loracle[serve]'" in line


# --- the token ----------------------------------------------------------------------------------------------------------


def test_token_from_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LORACLE_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("LORACLE_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment"
    (tmp_path / "token").write_text("from-a-file\n")
    assert read_token(str(tmp_path / "token")) == "from-a-file"


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", "tökén".encode(), b"\xff", b"a\0b"])
def test_token_unfit_for_a_header_is_an_error(tmp_path, monkeypatch, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match="token"):
        read_token(str(tmp_path / "token"))


def test_empty_token_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("LORACLE_TOKEN", "")
    with pytest.raises(UserError, match="LORACLE_TOKEN"):
        read_token(None)
    with pytest.raises(UserError, match="no-such-file"):
        read_token("no-such-file")

"""docs/serve.md as a reader types it: every command, against the servers that it starts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from test_docs import ROOT, commands, run, write_small_files

from loracle.cli import main
from loracle.config import ServeConfig
from loracle.serving.app import create_app
from loracle.serving.limits import is_loopback
from loracle.serving.server import load, read_token

PAGE = "docs/serve.md"


@contextmanager
def served(args, port):
    """The server of a command line: a process, or with a token for other hosts a thread that listens on this one."""
    args = ["--port", port, *(word for word in args[1:] if word not in ("--port", "8000"))]
    if "--token-file" in args:
        given = main.commands["serve"].make_context("serve", args).params
        assert not is_loopback(given["host"])
        runs = load(given["runs"], log=lambda line: None)
        with running(create_app(runs, ServeConfig(), token=read_token(given["token_file"])), int(port)):
            yield
        return
    environment = {k: v for k, v in os.environ.items() if k != "LORACLE_TOKEN"}
    command = [sys.executable, "-m", "loracle", "serve", *args]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, env=environment, **both) as process:  # type: ignore[call-overload]
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("serving "):
                    break
            assert "reviews" in lines[-1], lines
            assert f":{port}" in lines[-1], lines
            yield
        finally:
            process.terminate()
            process.communicate(timeout=30)
        assert process.returncode == 0


@contextmanager
def running(app, port):
    """An application that listens on ``port``."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    give_up = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.slow
def test_documented_server_answers_every_request(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    assert shutil.which("curl"), "the page asks with curl: apt-get install curl"
    monkeypatch.chdir(tmp_path)
    write_small_files(tmp_path)
    model = str(tiny_model("qwen2"))
    run("loracle train reviews.csv --epochs 2 --no-baselines", model)
    run("loracle train clicks.csv --group test_id --text headline --epochs 1 --no-baselines", model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    answers = {}
    with ExitStack() as server:
        for line in commands(PAGE):
            _, *args = shlex.split(line.split(" | ")[0])
            if line.startswith("loracle serve"):
                server.close()
                server.enter_context(served(args, port))
            else:
                answers[line] = run(line.split(" | ")[0].replace("localhost:8000", f"localhost:{port}"), model)
    by_route = {re.search(r"localhost:8000(\S+)", line)[1]: text for line, text in answers.items() if "curl" in line}
    assert '"ok"' in by_route["/readyz"]
    assert '"probabilities"' in by_route["/v1/classify"]
    assert '"titles"' in by_route["/v1/rank"] or '"results"' in by_route["/v1/rank"]
    assert '"probs"' in by_route["/classify"]
    assert '"reviews-int8"' in by_route["/v1/models"]
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    for name in set(re.findall(r"`(loracle_\w+)[`{]", page)):
        assert re.search(rf"^{name}(_bucket)?\b", by_route["/metrics"], re.MULTILINE), name

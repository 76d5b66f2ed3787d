"""The commands of README and docs run in order on small files and a tiny model; generated pages are up to date."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from small import labelled, pairs, write

from loracle.cli import main

ROOT = Path(__file__).parent.parent
# In the order of the documentation: later pages use the runs of earlier ones. tests/test_production.py has docs/serve.md.
WALK = (
    "quickstart",
    "your-data",
    "classify",
    "rank-from-clicks",
    "models-and-gpus",
    "read-the-report",
    "tune-and-compare",
)
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"--help", "--no-deps", "--nproc-per-node", "--runner"}  # flags of pip, torchrun and vLLM
TINY = ["--test-share", "0.2", "--validation-share", "0.2"]


def commands(page: str) -> list[str]:
    """The commands of a page's ``console`` blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line[2:] for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


def write_small_files(folder: Path) -> None:
    """Files of the names and columns that the pages use."""
    write(folder / "reviews.csv", labelled(90))
    write(folder / "unseen.csv", labelled(30))
    write(folder / "new.csv", [{"id": "1", "text": "good number 1"}])
    write(folder / "pairs.jsonl", pairs())
    words = ("bad", "so", "good")
    write(folder / "clicks.csv", [
        {"test_id": i // 2, "image": i % 2, "week": 201401 + i, "headline": f"{w} headline {i}", "impressions": 1000 + c,
         "clicks": 10 * c + 5}
        for i in range(40) for c, w in enumerate(words)
    ])  # fmt: skip
    write(folder / "events.csv", [
        {"slot": i, "title": f"{w} title {i}", "clicked": int(n < c + 1)}
        for i in range(4) for c, w in enumerate(words) for n in range(120)
    ])  # fmt: skip
    (folder / "titles.txt").write_text("a good headline\na bad one\n", encoding="utf-8")


def run(line: str, model: str) -> str:
    """Output of a command line, its training done with a tiny model."""
    program, *args = shlex.split(line)
    if program != "loracle":
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60).stdout
    if args[0] in ("train", "compare", "validate", "tune"):
        args += ["--model", model, *TINY]
    elif args[0] == "probe":
        args += ["--model", model]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, (line, done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_documented_commands_run_in_order(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_small_files(tmp_path)
    outputs = {line: run(line, str(tiny_model("qwen2"))) for page in WALK for line in commands(f"docs/{page}.md")}
    assert len(outputs) >= 20
    assert "predicted" in Path("scored.csv").read_text()
    assert "lift_low" in Path("ranked.csv").read_text()
    assert any("without the word" in text for line, text in outputs.items() if "--explain" in line)


def test_readme_shows_commands_of_the_docs():
    documented = {line for page in WALK for line in commands(f"docs/{page}.md")}
    shown = commands("README.md")
    assert len(shown) >= 5
    assert set(shown) <= documented | {"loracle predict runs/reviews new.csv --quiet"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python-api.md"])
def test_documented_python_runs(tiny_model, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    write_small_files(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    model = str(tiny_model("qwen2"))
    names: dict[str, object] = {}
    exec(re.sub(r"= (Text\w+)\(", rf"= \1(model={model!r}, baselines=False, ", code), names)
    assert len(list(Path("runs").glob("*/run.toml"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(tiny_model, capsys, path):
    runpy.run_path(str(path))["main"](str(tiny_model("qwen2")))
    last = capsys.readouterr().out.strip().splitlines()[-3:]
    assert any(word in "".join(last) for word in ("good (", "bad (", "7 facts about ships"))


@pytest.mark.parametrize("page", PAGES)
def test_named_flags_and_links_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    flags = {opt for command in every_command(main) for p in command.params for opt in p.opts + p.secondary_opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - flags - ELSEWHERE == set()
    links = [name for name in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]*)?\)", text) if name]
    assert [name for name in links if not (ROOT / page).parent.joinpath(name).exists()] == []


def every_command(group: click.Group) -> list[click.Command]:
    """All commands, those of subgroups included."""
    found: list[click.Command] = []
    for command in group.commands.values():
        found += [command, *(every_command(command) if isinstance(command, click.Group) else [])]
    return found


@pytest.mark.parametrize("script", ["docs/make_commands.py", "benchmarks/make_readme.py"])
def test_generated_page_is_up_to_date(script):
    done = subprocess.run([sys.executable, ROOT / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_chart_finds_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import make_chart

    figures = {panel.title: make_chart.figures(panel) for panel in make_chart.PANELS}
    assert all(label == "loracle" for (label, *_), *_ in figures.values())
    assert figures["Banking77, accuracy in %"][0][1:] == (92.0, 91.1, 93.0)


def test_readme_keeps_its_size():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    assert max(len(cell.split()) for line in lines if line.startswith("|") for cell in line.split("|")) <= 15


def test_capture_replaces_output_and_keeps_prose(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import capture

    class Fake:
        def run(self, command: str) -> str:
            return "\n".join(f"{command} {i}" for i in range(5))

        def python(self, code: str) -> str:
            return json.dumps(code)

    page = "Say.\n\n<!-- output: 1 ... 1 -->\n```console\n$ a\nold\n$ b\n```\n\n```python\nx\n```\n\n```text\nold\n```\nEnd.\n"
    renewed = capture.rewrite(page, Fake())
    assert renewed.startswith(
        "Say.\n\n<!-- output: 1 ... 1 -->\n```console\n$ a\na 0\n…\na 4\n\n$ b\nb 0\n…\nb 4\n```\n"
    )
    assert renewed.endswith('```python\nx\n```\n\n```text\n"x\\n"\n```\nEnd.\n')
    assert capture.rewrite(renewed, Fake()) == renewed

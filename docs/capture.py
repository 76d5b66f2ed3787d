"""Run the commands of README and docs on small samples of public data, and put their real output under them.

    python docs/capture.py --work FOLDER                 # every page
    python docs/capture.py --work FOLDER docs/faq.md     # some pages
    python docs/capture.py --work FOLDER --pictures      # the pictures under docs/images/ (needs rich and playwright)

A page marks what it runs with fenced blocks. ``console`` blocks hold lines ``$ COMMAND``, each followed by its output. A
``python`` block runs too if a ``text`` block with its output follows. A comment before a block shortens its output:
``<!-- output: 4 ... 6 -->`` keeps the first 4 and the last 6 lines. ``$ loracle serve`` runs until its page ends.

FOLDER keeps data, runs and outputs, so that a command that several pages show runs once. Samples come from the folder
named by LORACLE_SHARED: movie reviews (SST) and headlines of A/B tests (Upworthy Research Archive).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = ["README.md", *(f"docs/{name}.md" for name in (
    "quickstart", "your-data", "classify", "rank-from-clicks", "models-and-gpus", "read-the-report", "tune-and-compare",
    "serve", "python-api",
))]  # fmt: skip
BLOCK = re.compile(
    r"(?P<before>(?:<!-- output: (?P<first>\d+) \.\.\. (?P<last>\d+) -->\n)?```(?P<kind>console|python)\n)"
    r"(?P<body>.*?)(?P<after>^```\n)(?P<result>\n(?:<!-- output: (?P<f>\d+) \.\.\. (?P<l>\d+) -->\n)?```text\n)?",
    re.DOTALL | re.MULTILINE,
)
COLUMNS = 110  # of the terminal; longer lines are wrapped
NOISE = "Failed to load CPU gemm_4bit_forward"  # of bitsandbytes, where the optional package is installed
REVIEWS, UNSEEN, TESTS = 2400, 300, 800


def main() -> None:
    """Capture the pages or the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pictures", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "reviews.csv").exists():
        write_samples(Path(os.environ["LORACLE_SHARED"]) / "data", args.work)
    if args.pictures:
        report_picture(args.work / "runs" / "reviews" / "report.html")
        terminal_picture(Shell(args.work))
        return
    for page in args.pages:
        path = ROOT / page
        with Shell(args.work) as shell:
            text = rewrite(path.read_text(encoding="utf-8"), shell)
        path.write_text(text, encoding="utf-8")
        print(page, flush=True)


# --- samples ----------------------------------------------------------------------------------------------------------


def write_samples(data: Path, work: Path) -> None:
    """The files that the pages use, seeded."""
    rng = random.Random(0)
    with (data / "sst5" / "train.csv").open(encoding="utf-8", newline="") as f:
        reviews = {
            r["text"]: "negative" if int(r["stars"]) < 3 else "positive" for r in csv.DictReader(f) if r["stars"] != "3"
        }
    rows = [row for row in reviews.items() if 40 < len(row[0]) < 160]
    rng.shuffle(rows)
    write_csv(work / "reviews.csv", ["text", "label"], rows[:REVIEWS])
    write_csv(work / "unseen.csv", ["text", "label"], rows[REVIEWS : REVIEWS + UNSEEN])
    new = [
        "The plot drags, but the cast is a delight.",
        "Two hours that I would like to have back.",
        "A film about a lighthouse.",
    ]
    write_csv(work / "new.csv", ["id", "text"], enumerate(new, 1))
    tests: dict[str, list[list[str]]] = {}
    with gzip.open(data / "upworthy" / "packages.csv.gz", "rt", encoding="utf-8", newline="") as f:
        for r in csv.DictReader(f):
            row = [
                r["clickability_test_id"],
                r["eyecatcher_id"],
                r["test_week"],
                r["headline"],
                r["impressions"],
                r["clicks"],
            ]
            tests.setdefault(row[0], []).append(row)
    chosen = rng.sample(sorted(tests), TESTS)
    header = ["test_id", "image", "week", "headline", "impressions", "clicks"]
    write_csv(work / "clicks.csv", header, (row for test in chosen for row in tests[test]))
    with (work / "pairs.jsonl").open("w", encoding="utf-8") as f:
        for test in chosen[:100]:
            best, *_, worst = sorted(tests[test], key=lambda row: -int(row[5]) / int(row[4]))
            f.write(json.dumps({"chosen": best[3], "rejected": worst[3]}) + "\n")
    events = []
    for slot, *_, headline, _, _ in (row for test in chosen[:20] for row in tests[test][:3]):
        events += [[slot, headline, int(rng.random() < 0.03)] for _ in range(150)]
    write_csv(work / "events.csv", ["slot", "title", "clicked"], events)
    titles = ["7 facts about lighthouses", "What this lighthouse keeper saw will surprise you", "Lighthouses"]
    (work / "titles.txt").write_text("\n".join(titles) + "\n", encoding="utf-8")


def write_csv(path: Path, header: list[str], rows: object) -> None:
    """A CSV file."""
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(header)
        writer.writerows(rows)  # type: ignore[arg-type]


# --- commands ---------------------------------------------------------------------------------------------------------


class Shell:
    """Runs commands in one folder and remembers their output, except for requests to a server."""

    def __init__(self, work: Path):
        self.work, self.store = work, work / "outputs.json"
        self.outputs = json.loads(self.store.read_text()) if self.store.exists() else {}
        self.server: subprocess.Popen[str] | None = None
        self.env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": str(COLUMNS), "NO_COLOR": "1",
        }  # fmt: skip

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(self, command: str) -> str:
        """Output of a command, standard error included."""
        if command.startswith("loracle serve"):
            return self.serve(command)
        if command.startswith("curl") or command not in self.outputs:
            print("$", command, file=sys.stderr, flush=True)
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.work, env=self.env, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{command}\n{done.stdout}\nexit code {done.returncode}")
            self.outputs[command] = cleaned(done.stdout, self.work)
            self.store.write_text(json.dumps(self.outputs, indent=1))
        return self.outputs[command]

    def python(self, code: str) -> str:
        """What a piece of Python prints."""
        path = self.work / "example.py"
        path.write_text(code, encoding="utf-8")
        return self.run(f"python {path.name} 2>{path.stem}.log # {hash_of(code)}")

    def serve(self, command: str) -> str:
        """Start a server in place of the one before; its output up to the line that says it is ready."""
        self.stop()
        self.server = subprocess.Popen(
            command.split(), cwd=self.work, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines = []
        for line in self.server.stdout or ():
            lines.append(line)
            if "http://" in line:
                break
        for _ in range(100):
            with contextlib.suppress(OSError):
                if subprocess.run(["curl", "-fsS", "localhost:8000/readyz"], capture_output=True).returncode == 0:
                    break
            time.sleep(0.1)
        return cleaned("".join(lines), self.work)

    def stop(self) -> None:
        """End the server."""
        if self.server:
            self.server.terminate()
            self.server.wait(30)
            self.server = None


def hash_of(code: str) -> str:
    """A short name for a piece of code."""
    import hashlib

    return hashlib.sha256(code.encode()).hexdigest()[:8]


def cleaned(output: str, work: Path) -> str:
    """Output as a terminal leaves it: without overwritten progress, colors, and the path of the working folder."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in output.replace("\r\n", "\n").split("\n")]
    lines = [line for line in lines if not line.startswith(NOISE)]
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines)).strip("\n")
    return text.replace(f"{work.resolve()}/", "").replace(str(work), ".")


# --- pages ------------------------------------------------------------------------------------------------------------


def rewrite(page: str, shell: Shell) -> str:
    """The page with the output of its commands."""
    return BLOCK.sub(lambda block: captured(block, shell), with_results_removed(page))


def with_results_removed(page: str) -> str:
    """Python results emptied; they are filled in again."""
    pattern = r"(```python\n.*?^```\n\n(?:<!-- output: \d+ \.\.\. \d+ -->\n)?```text\n).*?(^```\n)"
    return re.sub(pattern, r"\1\2", page, flags=re.DOTALL | re.MULTILINE)


def captured(block: re.Match[str], shell: Shell) -> str:
    """One block, its output renewed."""
    if block["kind"] == "python":
        if not block["result"]:
            return block[0]
        return block[0] + shortened(shell.python(block["body"]), block["f"], block["l"])
    commands = list(commands_of(block["body"]))
    if not commands:
        return block[0]
    parts = []
    for command in commands:
        output = shell.run(command.replace("\\\n", " "))
        parts.append("$ " + command + "\n" + shortened(output, block["first"], block["last"]))
    return block["before"] + "\n".join(parts) + block["after"] + (block["result"] or "")


def commands_of(body: str) -> Iterator[str]:
    """The commands of a console block; a backslash continues one on the next line."""
    for found in re.finditer(r"^\$ ((?:.*\\\n)*.*)$", body, re.MULTILINE):
        yield found[1]


def shortened(output: str, first: str | None, last: str | None) -> str:
    """Output with its middle replaced by dots."""
    lines = output.split("\n") if output else []
    if first is not None and last is not None and len(lines) > int(first) + int(last) + 1:
        lines = [*lines[: int(first)], "…", *lines[len(lines) - int(last) :]]
    return "".join(part.rstrip() + "\n" for line in lines for part in wrapped(line))


def wrapped(line: str) -> list[str]:
    """A line in parts that fit the terminal; spaces at its start and within it stay."""
    first, *others = textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
    return [first, *(other.lstrip() for other in others)]


# --- pictures ---------------------------------------------------------------------------------------------------------


def report_picture(report: Path) -> None:
    """The top of a report, as a browser shows it; LORACLE_BROWSER names a Chromium, as in the tests."""
    from playwright.sync_api import sync_playwright

    browser = os.environ.get("LORACLE_BROWSER")
    env = os.environ | ({"LD_LIBRARY_PATH": str(Path(browser).parent / "lib")} if browser else {})
    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=browser, args=flags, env=dict(env))
        page = opened.new_page(viewport={"width": 1000, "height": 780})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=DOCS / "images" / "report.png")
        opened.close()


def terminal_picture(shell: Shell) -> None:
    """The quick start as a terminal shows it, as SVG."""
    from rich.console import Console
    from rich.text import Text

    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, color_system="truecolor", force_terminal=True)
        page = (DOCS / "quickstart.md").read_text(encoding="utf-8")
        for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL)[:3]:
            for line in block.strip("\n").split("\n"):
                console.print(Text(line, style="bold green" if line.startswith("$ ") else ""), soft_wrap=False)
            console.print()
        svg = console.export_svg(title="loracle")
        svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # fonts would come from another host
        (DOCS / "images" / "terminal.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()

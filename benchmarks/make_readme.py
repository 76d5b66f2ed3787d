"""Write ``benchmarks/README.md`` from every dated table in ``benchmarks/results/``.

    python benchmarks/make_readme.py            # write the page
    python benchmarks/make_readme.py --check    # exit with 1 if the page is out of date

One heading per measurement, its newest result first, notes under the table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE = HERE / "README.md"

# Name of the result files -> heading and the question that the measurement answers, in the order of the page.
MEASUREMENTS = {
    "n24news_compare": ("N24News: three seeds", "How accurate is a fine-tuned 135M model on 24 news sections?"),
    "n24news": ("N24News: one seed", "The same task with one seed and its own learning rate search."),
    "banking77": ("Banking77", "How accurate is it on 77 customer intents?"),
    "few_shot": ("Banking77 with few examples", "What do label names add when examples are few?"),
    "goemotions": ("GoEmotions", "How good is it when a text can have several labels?"),
    "thucnews": ("THUCNews", "How accurate is it on Chinese headlines?"),
    "upworthy": ("Upworthy", "How well does it rank headlines of real A/B tests?"),
    "bilibili": ("Bilibili", "Can it learn popularity from titles alone?"),
    "losses": ("Click losses on Upworthy", "Which loss learns most from a click log?"),
    "simulated_clicks": ("Click losses on simulated logs", "Which loss recovers the true click rates?"),
    "recipe_ad_titles": ("Recipe ad_titles", "What does this recipe give with the embedded model?"),
    "recipe_original": ("Recipe original", "What does this recipe give with the embedded model?"),
    "demo": ("The demo", "What does `loracle demo` reach, and how long does it take?"),
    "label_errors": ("Label errors", "How many planted label errors does the report find?"),
    "coverage": ("Coverage of intervals", "Do 95 % intervals hold the truth 95 times in 100?"),
    "train_speed": ("Training speed on a CPU", "How fast is training beside transformers' Trainer with PEFT?"),
    "train_speed_prefix": ("Training speed behind an instruction", "What does sharing a common prefix save?"),
    "gpu_train_7b": ("Training speed on a GPU", "How fast does a 7B model train on one GPU?"),
    "rank_speed": ("Ranking speed", "How fast is pair training beside TRL's RewardTrainer?"),
    "depth_cache": ("Hidden-state cache", "What does `--adapt-top` save, and what does it cost?"),
    "memory": ("Memory", "Does memory grow with the training file?"),
    "score_speed": ("Scoring speed", "How fast is scoring beside a transformers pipeline?"),
    "serve_load_gpu": ("Serving on a GPU", "How many requests does one GPU answer?"),
    "serve_load": ("Serving on a CPU", "How many requests do two cores answer?"),
    "soak": ("Kills and hostile requests", "Does anything break after SIGKILL or under random requests?"),
}
INTRO = """# Benchmarks

`benchmarks/make_readme.py` writes this page from the files in [results/](results). Do not edit it by hand.

Brackets hold 95 % intervals. Figures of quality are in percent where no unit is given. "loracle" is the fine-tuned
model; the rows beside it are baselines of the same split. "In turn" means that the methods alternate, round by round,
because a shared machine has faster and slower minutes. [dev/LOG.md](../dev/LOG.md) has the decisions."""


class Section(NamedTuple):
    """A part of a result file."""

    title: str  # empty for the first part
    tables: list[str]
    notes: list[str]


def parse(text: str) -> list[Section]:
    """Split a result file into its parts; each paragraph is a table or a note."""
    sections: list[Section] = []
    for part in re.split(r"^#{1,2} ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        blocks = [block.strip() for block in re.split(r"\n\s*\n", body) if block.strip()]
        tables = [block for block in blocks if block.startswith("|")]
        notes = [line for block in blocks if not block.startswith("|") for line in _note(block)]
        sections.append(Section(title if sections else "", tables, notes))
    return sections


def _note(block: str) -> list[str]:
    """A paragraph; the machine and the command stand on lines of their own."""
    return block.split("\n") if "\nCommand" in block else [" ".join(block.split("\n"))]


def render(name: str, paths: list[Path]) -> str:
    """One measurement: its heading, its question, and its results, newest first."""
    title, question = MEASUREMENTS[name]
    lines = [f"## {title}", question]
    for path in sorted(paths, reverse=True):
        date = path.name[:10]
        for section in parse(path.read_text(encoding="utf-8")):
            lines.append(f"### {date}: {section.title}" if section.title else f"### {date}")
            lines += section.tables
            lines.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(lines)


def page() -> str:
    """The whole page."""
    found: dict[str, list[Path]] = {}
    for path in (HERE / "results").glob("*.md"):
        found.setdefault(path.stem[11:], []).append(path)
    if unknown := sorted(set(found) - set(MEASUREMENTS)):
        raise SystemExit(f"No heading for {', '.join(unknown)}: add it to MEASUREMENTS in {Path(__file__).name}.")
    return "\n\n".join([INTRO, *(render(name, found[name]) for name in MEASUREMENTS if name in found)]) + "\n"


def main() -> int:
    """Write the page, or compare it with the file."""
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != page():
            print("benchmarks/README.md is out of date. Run: python benchmarks/make_readme.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

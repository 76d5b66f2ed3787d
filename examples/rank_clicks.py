"""A ranker from clicks: impressions and clicks of each title.

python examples/rank_clicks.py [a base model; by default the embedded one]
"""

import sys
import tempfile

from loracle import TextRanker


def main(model: str = "demo") -> None:
    """Learn that titles with a number get more clicks, and rank three new titles."""
    topics = ["gardens", "trains", "soups", "rivers", "coats", "clocks", "bridges", "apples", "kites", "roofs"] * 4
    groups = [
        {"texts": [f"7 facts about {t} {i}", f"All about {t} {i}"], "impressions": [1000, 1000], "clicks": [60, 30]}
        for i, t in enumerate(topics)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ranker = TextRanker(model=model, out=f"{folder}/run", epochs=2, batch=8, test_share=0.2).fit(groups)
        for title, score in ranker.rank(["All about ships", "7 facts about ships", "Ships"]):
            print(f"{score:+.2f}  {title}")


if __name__ == "__main__":
    main(*sys.argv[1:])

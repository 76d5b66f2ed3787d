"""A sentiment classifier in a dozen lines. Labels are names, in training and in predictions.

python examples/classify.py [a base model; by default the embedded one]
"""

import sys
import tempfile

from loracle import TextClassifier

GOOD = ["a lovely {}", "the {} was great", "I would buy this {} again", "best {} in years", "what a fine {}"]
BAD = ["an awful {}", "the {} was broken", "I sent this {} back", "worst {} in years", "what a poor {}"]
THINGS = ["book", "film", "phone", "meal", "hotel", "lamp"]


def main(model: str = "demo") -> None:
    """Train on sixty sentences and label two new ones."""
    rows = [
        (s.format(t), name) for name, sentences in (("good", GOOD), ("bad", BAD)) for s in sentences for t in THINGS
    ]
    texts, labels = zip(*rows, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        classifier = TextClassifier(model=model, out=f"{folder}/run", epochs=2, batch=8, test_share=0.2)
        classifier.fit(texts, labels)
        new = ["the best lamp", "a broken film"]
        for text, label, p in zip(new, classifier.predict(new), classifier.predict_proba(new), strict=True):
            print(f"{label} ({p.max():.0%}): {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])

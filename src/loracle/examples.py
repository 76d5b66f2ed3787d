"""The types that leave the data room: what every later stage may rely on.

They are frozen and hold plain Python values only, so that they can be made in tests by hand and read without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledText:
    """One text and what it is. ``labels`` index ``Task.label_names``: exactly one for ``single``, any for ``multi``."""

    text: str
    labels: tuple[int, ...]
    row: int  # where it stood: 1-based line of a text file, 1-based item of a JSON array or Parquet file
    context: str | None = None
    weight: float = 1.0
    slices: tuple[tuple[str, str], ...] = ()  # (column, value) by which the report is sliced

    @property
    def texts(self) -> tuple[str, ...]:
        """The one text, as a group has several."""
        return (self.text,)

    @property
    def rows(self) -> tuple[int, ...]:
        """The row of each of ``texts``."""
        return (self.row,)

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two of them the same text, whatever their labels: text and context, stripped."""
        return self.text.strip(), (self.context or "").strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Candidate ``winner`` of a group was preferred to ``loser`` (indices into ``RankGroup.texts``)."""

    winner: int
    loser: int
    margin: float | None = None  # by how much, in units of the score, where the data say so


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroup:
    """Titles that competed for the same eyes, distinct, at least two, and exactly one kind of evidence about them.

    ``texts[i]`` came from ``rows[i]`` (the first one, where equal titles were merged). Of ``preferences``, ``grades`` and
    ``clicks`` with ``impressions`` one is set when the group is to learn from, none when it is only to be ranked.

    A group whose titles are comparable only where they agree in other columns (``--compare-within``) is several of these, with
    one id and each with its ``stratum``. ``date`` is the latest that its rows name, so that what trains is wholly past.
    """

    group: str
    texts: tuple[str, ...]
    rows: tuple[int, ...]
    context: str | None = None
    preferences: tuple[Preference, ...] = ()
    grades: tuple[float, ...] | None = None
    clicks: tuple[int, ...] | None = None
    impressions: tuple[int, ...] | None = None
    weight: float = 1.0
    stratum: str | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """What a click log showed side by side in one stratum of a group: each row, before any was merged or left out.

    ``titles[i]`` numbers the title that row ``i`` is of; where it is empty, each row is a title of its own.
    """

    group: str
    row: int  # the first
    clicks: tuple[int, ...]
    impressions: tuple[int, ...]
    date: str | None = None
    titles: tuple[int, ...] = ()


Example = LabeledText | RankGroup


def texts_of(example: Example) -> tuple[str, ...]:
    """The one text of a labelled text, all titles of a group."""
    return example.texts

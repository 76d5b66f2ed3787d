"""Were impressions dealt out at random? What a click log must pass before its click rates can be compared.

Two tests, fixed before any log was looked at. *Sample-ratio mismatch* (Fabijan et al. 2019, KDD, "Diagnosing sample ratio
mismatch in online controlled experiments"): what was shown side by side should have been shown equally often, by
chi-square. *Adaptivity*: whether what was clicked more was shown more, as a bandit would have it.

What was shown side by side: the rows, or the titles? A log does not say. In an experiment on more than titles (Upworthy's)
each row is an arm, and a title of two rows is rightly shown twice as often; in a daily export a title has a row a day, and
days differ. A group therefore fails only if it fails *both ways*, its rows as arms and its titles as arms, rows of equal
titles added up: the first log is decided by its rows, the second one by its titles, and where no title has two rows both
are the same. Only strata of two titles or more are tested, for rows of a single one may be nothing but days.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loracle.data.dates import latest, order_of
from loracle.data.issues import Issue, rows_named
from loracle.examples import Arms

LEVEL = 0.001  # p below which a group fails; p times the number of groups below which it does so beyond chance
USUAL, BROKEN = 0.01, 0.25  # share of failing groups in a sound period (chance alone: 0.001) and in a broken one
DOUBT = math.log(1000)  # how much likelier a period must be broken than sound to be named
CLEAR = 3.29  # |z| that chance exceeds once in a thousand logs
LEAST = 10  # impressions that each arm should have had; with fewer, chi-square is no good


@dataclass(frozen=True, slots=True)
class Period:
    """Tested groups of a time, both ends included, and how many of them fail."""

    start: str
    end: str
    groups: int
    failing: int

    def __str__(self) -> str:
        time = self.start if self.start == self.end else f"{self.start} to {self.end}"
        return f"{time}: {_of(self.failing, self.groups)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """How impressions were dealt out within groups."""

    groups: int  # that could be tested
    failing: int  # whose impressions are not in equal shares, p < LEVEL
    beyond: int  # of those, the ones that chance would not make in one of a thousand such logs: Bonferroni, at LEVEL
    rows: tuple[int, ...]  # where the first failing ones begin; those beyond chance have precedence
    adaptivity: float  # z; above 0 where what was clicked more was shown more
    dates: tuple[Period, ...] = ()  # one a date
    periods: tuple[Period, ...] = ()  # in which far more fail than elsewhere

    @property
    def uneven(self) -> bool:
        """Whether more groups fail than the odd one that does in any log, or any of them beyond chance."""
        from scipy.special import bdtrc

        many = self.failing and bdtrc(self.failing - 1, self.groups, USUAL) < LEVEL
        return bool(self.periods or self.beyond or many)

    @property
    def adaptive(self) -> bool:
        return abs(self.adaptivity) > CLEAR

    def lines(self) -> list[str]:
        """In plain words: what was found, and what it does to every figure."""
        share = _of(self.failing, self.groups)
        said = [f"{share} of the groups of 2 titles or more were not shown in equal shares (p < {LEVEL:g})"]
        if self.periods:
            groups, failing = (sum(getattr(p, name) for p in self.periods) for name in ("groups", "failing"))
            said += [f"  {period}" for period in self.periods]
            if rest := self.groups - groups:
                said.append(f"  at all other times: {_of(self.failing - failing, rest)}")
        if self.failing:
            first = rows_named(self.rows, self.failing)
            said.append(f"  they begin in {first}; beyond chance for so many groups: {self.beyond:,}")
        more = "more" if self.adaptivity > 0 else "less"
        said.append(
            f"what was clicked more was shown {more}, beyond chance (z = {self.adaptivity:+.1f})"
            if self.adaptive
            else f"what was clicked more was not shown more than chance has it (z = {self.adaptivity:+.1f})"
        )
        return said + self._consequences()

    def _consequences(self) -> list[str]:
        if not (self.uneven or self.adaptive):
            return ["so click rates within a group can be compared"]
        said = [
            "Pair accuracy, significance, CTR lift and the noise ceiling all take it that chance decided who saw what.",
            "Where it did not, a click rate also tells when and to whom a title was shown, not only how good it is.",
        ]
        if self.adaptive and self.adaptivity > 0:
            said.append("Where impressions follow clicks, losers stop at an unlucky moment: their rates are too low.")
        if self.periods:
            return [*said, "Leave the groups of these times out, or read figures with and without them."]
        return [*said, "Unless unequal shares were meant, take no figure of such groups for that of an experiment."]


def allocation(arms: Iterable[Arms]) -> Allocation | None:
    """Test what a click log showed, before titles are merged or left out; None where nothing can be tested.

    Chi-square of impressions against equal shares, in each stratum of a group; statistics and degrees of freedom of its
    strata are added. p of a group is the larger one of its rows as arms and of its titles as arms. Strata of a single
    title, or whose titles got fewer than ``LEAST`` impressions on average, are left out. Adaptivity is that of titles.
    """
    by_row: dict[str, list[Arms]] = {}
    by_title: dict[str, list[Arms]] = {}
    for rows in arms:
        titles = _merged(rows)
        if len(titles.impressions) > 1 and sum(titles.impressions) >= LEAST * len(titles.impressions):
            by_row.setdefault(rows.group, []).append(rows)
            by_title.setdefault(rows.group, []).append(titles)
    if not by_row:
        return None
    p = np.maximum(_p_values(by_row), _p_values(by_title))
    fails, beyond = p < LEVEL, p * len(p) < LEVEL
    starts = np.array([of_group[0].row for of_group in by_row.values()])
    worst = [*starts[beyond], *starts[fails & ~beyond]][: Issue.ROWS_NAMED]
    dates = _by_date(by_row, fails)
    return Allocation(
        groups=len(p),
        failing=int(fails.sum()),
        beyond=int(beyond.sum()),
        rows=tuple(sorted(map(int, worst))),
        adaptivity=_adaptivity([a for of_group in by_title.values() for a in of_group]),
        dates=dates,
        periods=_broken(dates),
    )


def _merged(rows: Arms) -> Arms:
    """With titles as arms: rows of one title added up."""
    clicks: dict[int, int] = {}
    impressions: dict[int, int] = {}
    for title, c, n in zip(rows.titles or range(len(rows.clicks)), rows.clicks, rows.impressions, strict=True):
        clicks[title] = clicks.get(title, 0) + c
        impressions[title] = impressions.get(title, 0) + n
    return replace(rows, clicks=tuple(clicks.values()), impressions=tuple(impressions.values()), titles=())


def _p_values(strata: dict[str, list[Arms]]) -> np.ndarray:
    """p of each group, of one stratum or more."""
    from scipy.special import chdtrc  # the survival function of chi2, without the second that scipy.stats takes

    statistic = [sum(_chi_square(a.impressions) for a in of_group) for of_group in strata.values()]
    freedom = [sum(len(a.impressions) - 1 for a in of_group) for of_group in strata.values()]
    return np.asarray(chdtrc(freedom, statistic))


def _chi_square(impressions: Sequence[int]) -> float:
    shown = np.array(impressions, dtype=float)
    return float(((shown - shown.mean()) ** 2).sum() / shown.mean())


def _adaptivity(arms: Sequence[Arms]) -> float:
    r"""z of :math:`\sum_i (n_i - \bar n)(p_i / p - 1) \sqrt{C / k N}` over groups.

    Of a group: k arms with n impressions (N in all) and click rate p_i, C clicks in all, p = C / N. Click rates do not
    depend on impressions that chance dealt out, so that its expectation is 0; the root makes the noise of all groups
    alike, and dividing by the root of the sum of squares asks nothing about its size.
    """
    values = []
    for a in arms:
        shown, clicks = np.array(a.impressions, dtype=float), np.array(a.clicks, dtype=float)
        if clicks.sum():
            rate = np.divide(clicks, shown, out=np.zeros_like(shown), where=shown > 0)
            excess = np.where(shown > 0, rate * shown.sum() / clicks.sum() - 1, 0)
            values.append((shown - shown.mean()) @ excess * math.sqrt(clicks.sum() / (len(shown) * shown.sum())))
    size = math.sqrt(sum(v * v for v in values))
    return float(sum(values) / size) if size else 0.0


def _by_date(strata: dict[str, list[Arms]], fails: np.ndarray) -> tuple[Period, ...]:
    """Groups and failing ones a date, in its order; a group counts at the latest date of its strata."""
    ends = [[a.date for a in of_group if a.date is not None] for of_group in strata.values()]
    if not all(ends):
        return ()
    date_of = [latest(dates) for dates in ends]
    ranks = order_of(date_of)
    counts: dict[str, list[int]] = {date: [0, 0] for date in sorted(ranks, key=ranks.__getitem__)}
    for date, bad in zip(date_of, fails, strict=True):
        counts[date][0] += 1
        counts[date][1] += int(bad)
    return tuple(Period(date, date, groups, failing) for date, (groups, failing) in counts.items())


def _broken(dates: Sequence[Period]) -> tuple[Period, ...]:
    """The likeliest broken periods: of all ways to mark runs of dates, that of the highest summed log-likelihood ratio.

    A group fails with probability ``BROKEN`` in a marked run and ``USUAL`` elsewhere, and each run costs ``DOUBT``, so
    that a date or two without failures do not tear a period apart, and a single failing group makes none.
    """
    State = tuple[float, tuple[tuple[int, int], ...]]  # log-likelihood ratio, runs of dates
    sound: State = (0.0, ())
    broken: State = (-math.inf, ())
    for at, date in enumerate(dates):
        gain = date.failing * math.log(BROKEN / USUAL)
        gain += (date.groups - date.failing) * math.log((1 - BROKEN) / (1 - USUAL))
        begun: State = (sound[0] - DOUBT + gain, (*sound[1], (at, at)))
        gone_on: State = (broken[0] + gain, (*broken[1][:-1], *((start, at) for start, _ in broken[1][-1:])))
        sound, broken = max(sound, broken, key=_score), max(gone_on, begun, key=_score)
    return tuple(_period(dates[start : end + 1]) for start, end in max(sound, broken, key=_score)[1])


def _score(state: tuple[float, tuple[tuple[int, int], ...]]) -> float:
    return state[0]


def _period(dates: Sequence[Period]) -> Period:
    return Period(dates[0].start, dates[-1].end, sum(d.groups for d in dates), sum(d.failing for d in dates))


def _of(failing: int, groups: int) -> str:
    return f"{failing / groups:.1%} ({failing:,} of {groups:,})"

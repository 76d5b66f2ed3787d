"""Were impressions dealt out at random? What a click log must pass before its click rates can be compared.

Two tests, fixed before any log was looked at. *Sample-ratio mismatch* (Fabijan et al. 2019, KDD, "Diagnosing sample ratio
mismatch in online controlled experiments"): what was shown side by side should have been shown equally often, by
chi-square. *Adaptivity*: whether what was clicked more was shown more, as a bandit would have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loracle.data.dates import latest, order_of
from loracle.data.examples import Arms

LEVEL = 0.001  # p below which a group fails
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
    rows: tuple[int, ...]  # the first ones of those
    adaptivity: float  # z; above 0 where what was clicked more was shown more
    dates: tuple[Period, ...] = ()  # one a date
    periods: tuple[Period, ...] = ()  # in which far more fail than elsewhere

    @property
    def uneven(self) -> bool:
        """Whether more groups fail than the odd one that does in any log."""
        from scipy.special import bdtrc

        return bool(self.periods) or bool(self.failing and bdtrc(self.failing - 1, self.groups, USUAL) < LEVEL)

    @property
    def adaptive(self) -> bool:
        return abs(self.adaptivity) > CLEAR

    def lines(self) -> list[str]:
        """In plain words: what was found, and what it does to every figure."""
        share = _of(self.failing, self.groups)
        said = [f"{share} of the groups of 2 rows or more were not shown in equal shares (p < {LEVEL:g})"]
        if self.periods:
            groups, failing = (sum(getattr(p, name) for p in self.periods) for name in ("groups", "failing"))
            said += [f"  {period}" for period in self.periods]
            if rest := self.groups - groups:
                said.append(f"  at all other times: {_of(self.failing - failing, rest)}")
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
    strata are added. Strata whose arms got fewer than ``LEAST`` impressions on average are left out.
    """
    from scipy.special import chdtrc  # the survival function of chi2, without the second that scipy.stats takes

    tested = [a for a in arms if len(a.impressions) > 1 and sum(a.impressions) >= LEAST * len(a.impressions)]
    if not tested:
        return None
    strata: dict[str, list[Arms]] = {}
    for arm in tested:
        strata.setdefault(arm.group, []).append(arm)
    statistic = [sum(_chi_square(a.impressions) for a in of_group) for of_group in strata.values()]
    freedom = [sum(len(a.impressions) - 1 for a in of_group) for of_group in strata.values()]
    fails = chdtrc(freedom, statistic) < LEVEL
    dates = _by_date(strata, fails)
    return Allocation(
        groups=len(strata),
        failing=int(fails.sum()),
        rows=tuple(of_group[0].row for of_group, bad in zip(strata.values(), fails, strict=True) if bad)[:5],
        adaptivity=_adaptivity(tested),
        dates=dates,
        periods=_broken(dates),
    )


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

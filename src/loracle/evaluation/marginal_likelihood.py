"""Marginal likelihood of clicks under the model of ``spread``, by quadrature over what is not observed. NumPy, SciPy.

    clicks_i ~ Binomial(impressions_i, σ(μ_g + β·s_i + τ·z_i)),   z_i ~ N(0, 1),   μ_g flat on the whole line

Given μ_g the arms of a group are independent, so that the integral nests: for each group a trapezoid rule over μ around
its mode, for each arm and node of μ an adaptive Gauss-Hermite rule over z around its own (Liu and Pierce 1994). That holds
from one click an arm to tens of thousands, as the nodes go where the mass is.

Legend of shapes: G groups, A arms (the titles of all groups, one after the other), L nodes of μ, Z nodes of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, logsumexp, xlog1py, xlogy

from loracle.evaluation.intervals import Array
from loracle.examples import RankGroup

NEWTON_STEPS = 8  # a mode need not be exact, as the nodes around it only have to cover the mass
CELLS = 1 << 18  # values of an integrand in memory at once: 2 MB an array


@dataclass(frozen=True, slots=True)
class Arms:
    """The arms of some groups, one after the other."""

    clicks: Array  # [A]
    shown: Array  # [A]
    score: Array  # [A], centred in each group
    first: npt.NDArray[np.intp]  # [G], where each group begins
    owner: npt.NDArray[np.intp]  # [A], group of each arm

    def total(self, values: Array) -> Array:
        """Sums ``[G, …]`` over the arms of each group, of values ``[A, …]``."""
        return np.add.reduceat(values, self.first, axis=0)


def blocks(groups: Sequence[RankGroup], scores: Sequence[np.ndarray] | None, nodes: int) -> Iterator[Arms]:
    """The groups in order, in blocks whose arms times ``nodes`` fill a processor's cache."""
    ends = np.cumsum([len(group.texts) for group in groups])
    start = 0
    while start < len(groups):
        filled = (ends[start - 1] if start else 0) + CELLS // nodes
        end = max(start + 1, int(np.searchsorted(ends, filled, side="right")))
        yield _arms(groups[start:end], None if scores is None else scores[start:end])
        start = end


def _arms(groups: Sequence[RankGroup], scores: Sequence[np.ndarray] | None) -> Arms:
    sizes = np.array([len(group.texts) for group in groups])
    owner = np.repeat(np.arange(len(groups)), sizes)
    clicks = np.array([c for group in groups for c in group.clicks or ()], dtype=np.float64)
    shown = np.array([i for group in groups for i in group.impressions or ()], dtype=np.float64)
    score = np.zeros(len(owner)) if scores is None else np.concatenate(scores).astype(np.float64)
    if not len(clicks) == len(shown) == len(score) == len(owner):
        raise ValueError("clicks, impressions or scores do not fit the titles of their groups")
    arms = Arms(clicks, shown, score, np.cumsum(sizes) - sizes, owner)
    score -= (arms.total(score) / sizes)[owner]
    return _with_half_a_click(arms)


def _with_half_a_click(arms: Arms) -> Arms:
    """Where clicks are none or all of a group, μ has no proper posterior: half a click is added or taken away."""
    clicks, shown = arms.total(arms.clicks), arms.total(arms.shown)
    missing = 0.5 * ((clicks == 0).astype(float) - ((clicks == shown) & (shown > 0)))
    lonely = (shown == 0)[arms.owner]  # never shown, so seen once
    seen = np.where(lonely, 1.0, arms.shown)
    share = seen / arms.total(seen)[arms.owner]
    return Arms(arms.clicks + missing[arms.owner] * share, seen, arms.score, arms.first, arms.owner)


# --- integrals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """``∫ f(x) dx ≈ scale · Σ exp(log_weight) · f(centre + scale · node)``, for f with a peak that wide, there."""

    node: Array
    log_weight: Array

    @property
    def size(self) -> int:
        return len(self.node)


def _hermite(size: int) -> Rule:
    node, weight = np.polynomial.hermite.hermgauss(size)
    return Rule(np.sqrt(2) * node, np.log(np.sqrt(2) * weight) + node**2)


def _even(size: int, reach: float) -> Rule:
    """Trapezoid rule over ``reach`` scales either side: its error falls exponentially for smooth peaks."""
    return Rule(np.linspace(-reach, reach, size), np.full(size, np.log(2 * reach / (size - 1))))


def _stretched(size: int, reach: float) -> Rule:
    """The same in t with node = 2 sinh(t / 2): dense at the peak, and far out in tails as heavy as exponential."""
    t = _even(size, 2 * np.arcsinh(reach / 2))
    return Rule(2 * np.sinh(t.node / 2), t.log_weight + np.log(np.cosh(t.node / 2)))


FIT_LEVELS, FIT_Z = _stretched(15, 9.0), _hermite(9)
DRAW_LEVELS, DRAW_Z = _stretched(31, 9.0), _even(41, 6.0)


def grid(arms: Arms, slope: float, spread: float, levels: Rule, normal: Rule) -> tuple[Array, Array, Array, Array]:
    """Nodes around the modes, and the logarithm of what lies at each: weight of the node times density there.

    ``level [G, L]`` of μ, ``log_level [G, L]`` its weights; ``z [A, L, Z]``, ``log_z [A, L, Z]`` the weight times the
    density of z and of the arm's clicks given μ, over that of the clicks at their own rate (so that it stays near 0).
    """
    offset = slope * arms.score
    centre, width = _level_modes(arms, offset, spread)
    level = centre[:, None] + width[:, None] * levels.node
    without_z = level[arms.owner] + offset[:, None]
    mode, scale = _z_modes(arms, without_z, spread)
    z = mode[..., None] + scale[..., None] * normal.node
    log_odds = without_z[..., None] + spread * z
    clicks, shown = arms.clicks, arms.shown
    best = xlogy(clicks, clicks / np.maximum(shown, 1)) + xlog1py(shown - clicks, -clicks / np.maximum(shown, 1))
    density = clicks[:, None, None] * log_odds - shown[:, None, None] * np.log1p(np.exp(log_odds)) - z * z / 2
    constant = np.log(scale) - 0.5 * np.log(2 * np.pi) - best[:, None]
    return level, levels.log_weight + np.log(width)[:, None], z, density + (constant[..., None] + normal.log_weight)


def log_marginal(arms: Arms, slope: float, spread: float) -> Array:
    """Log marginal likelihood, its derivatives by β and τ, and the sum of the groups' posterior mean μ: ``[4]``.

    By Fisher's identity a derivative is the posterior mean of the derivative of the joint density; with the residual
    r = clicks − impressions · rate those are s·r and z·r.
    """
    level, log_level, z, log_z = grid(arms, slope, spread, FIT_LEVELS, FIT_Z)
    top = log_z.max(axis=2)
    mass = np.exp(log_z - top[..., None])
    whole = mass.sum(axis=2)
    mass /= whole[..., None]
    log_odds = (level[arms.owner] + (slope * arms.score)[:, None])[..., None] + spread * z
    mass_rate = mass * expit(log_odds)
    clicks, shown = arms.clicks[:, None], arms.shown[:, None]
    rest = clicks - shown * mass_rate.sum(axis=2)  # [A, L]: posterior mean of r given μ, and of z·r
    rest_z = clicks * np.einsum("alz,alz->al", mass, z) - shown * np.einsum("alz,alz->al", mass_rate, z)
    joint = log_level + arms.total(top + np.log(whole))
    value = logsumexp(joint, axis=1)
    at = np.exp(joint - value[:, None])  # [G, L]: posterior of μ
    by_slope, by_spread = arms.total(arms.score[:, None] * rest), arms.total(rest_z)
    return np.array([value.sum(), (at * by_slope).sum(), (at * by_spread).sum(), (at * level).sum()])


def _level_modes(arms: Arms, offset: Array, spread: float) -> tuple[Array, Array]:
    """Where μ and all z of a group are jointly likeliest, and the standard deviation of μ there: ``[G]`` each.

    Damped Newton steps; the matrix is an arrow, so that z is eliminated arm by arm.
    """
    guess, weight = _guess(arms)
    soft = weight / (1 + spread**2 * weight)
    level = arms.total(soft * (guess - offset)) / arms.total(soft)
    z = spread * soft * (guess - offset - level[arms.owner])
    curvature = np.ones(len(level))
    for _ in range(NEWTON_STEPS):
        rate = expit(level[arms.owner] + offset + spread * z)
        rest, weight = arms.clicks - arms.shown * rate, arms.shown * rate * (1 - rate)
        prior = 1 + spread**2 * weight
        curvature = arms.total(weight / prior)
        step = arms.total((rest + spread * weight * z) / prior) / curvature
        step_z = (spread * rest - z - spread * weight * step[arms.owner]) / prior
        furthest = np.maximum.reduceat(np.abs(step[arms.owner] + spread * step_z), arms.first)
        damped = 1 / np.maximum(furthest, 1)  # no log-odds moves by more than 1, or exponentials overshoot
        level = level + damped * step
        z = z + damped[arms.owner] * step_z
    return level, 1 / np.sqrt(curvature)


def _z_modes(arms: Arms, without_z: Array, spread: float) -> tuple[Array, Array]:
    """The likeliest z of each arm given μ, and its standard deviation there: ``[A, L]`` each.

    Newton's method within the bracket that the log-concave posterior gives: 0 and its derivative there.
    """
    clicks, shown = arms.clicks[:, None], arms.shown[:, None]
    pull = spread * (clicks - shown * expit(without_z))
    low, high = np.minimum(pull, 0), np.maximum(pull, 0)
    guess, weight = (x[:, None] for x in _guess(arms))
    z = np.clip(spread * weight * (guess - without_z) / (1 + spread**2 * weight), low, high)
    curvature = np.ones_like(z)
    for _ in range(NEWTON_STEPS):
        rate = expit(without_z + spread * z)
        climb = spread * (clicks - shown * rate) - z
        curvature = 1 + spread**2 * shown * rate * (1 - rate)
        low, high = np.where(climb > 0, z, low), np.where(climb > 0, high, z)
        step = z + climb / curvature
        z = np.where((step >= low) & (step <= high), step, (low + high) / 2)
    return z, 1 / np.sqrt(curvature)


def _guess(arms: Arms) -> tuple[Array, Array]:
    """Log-odds ``[A]`` of each arm's own clicks and their weight (inverse variance), half a click added to either side."""
    rate = (arms.clicks + 0.5) / (arms.shown + 1)
    return logit(rate), arms.shown * rate * (1 - rate)

"""The few pieces of statistics that watch rests on: shares of bad requests, and when they are beyond doubt.

Pure functions of counts, standard library only. Two tests must agree before a share counts as too high:
Wilson's interval, which also gives the figures that people read, and the exact binomial tail. For small
shares and few requests Wilson's lower end is too high (Brown, Cai, DasGupta 2001, section 3), and watch asks
about a hundred thousand times a day: what is wrong once in a thousand times would be wrong all day.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist


@lru_cache(maxsize=64)
def z_of(alpha: float) -> float:
    """The normal deviate that is exceeded with probability `alpha` (one-sided)."""
    return -NormalDist().inv_cdf(alpha)


def wilson(bad: int, total: int, alpha: float) -> tuple[float, float]:
    """Wilson's score interval of the share bad/total, each end wrong with probability about `alpha`.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22
    (1927); in the form of Brown, Cai, DasGupta, Interval Estimation for a Binomial Proportion, Statistical
    Science 16 (2001), equation (4). Without requests: (0, 1).
    """
    if total <= 0:
        return 0.0, 1.0
    z = z_of(alpha)
    share, weight = bad / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def tail(bad: int, total: int, share: float) -> float:
    """P(X >= bad) for X binomial(total, share): how likely so many bad requests are at this true share."""
    if bad <= 0:
        return 1.0
    if bad > total or share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    if bad <= total * share:
        return 1.0 - _lower_sum(bad - 1, total, share)
    return _upper_sum(bad, total, share)


def head(bad: int, total: int, share: float) -> float:
    """P(X <= bad) for X binomial(total, share): how likely so few bad requests are at this true share."""
    if bad >= total or share <= 0:
        return 1.0
    if bad < 0 or share >= 1:
        return 0.0
    if bad >= total * share:
        return 1.0 - _upper_sum(bad + 1, total, share)
    return _lower_sum(bad, total, share)


def log_likelihood(bad: int, total: int, share: float) -> float:
    """Log of the binomial likelihood of a share, without the constant that does not depend on it."""
    share = min(max(share, 1e-9), 1 - 1e-9)
    return bad * math.log(share) + (total - bad) * math.log1p(-share)


def exceeds(bad: int, total: int, allowed: float, alpha: float) -> bool:
    """Is the true share of bad requests above `allowed`, wrong with probability of at most `alpha`?

    True when the lower end of Wilson's interval lies above `allowed` and the exact tail agrees.
    """
    excess = bad - allowed * total
    if excess <= 0:
        return False
    # Wilson's lower end lies above `allowed` just when the score test rejects it: no square root needed.
    z = z_of(alpha)
    if excess * excess <= z * z * allowed * (1 - allowed) * total:
        return False
    return tail(bad, total, allowed) <= alpha


def worse(bad: int, total: int, other_bad: int, other_total: int) -> float:
    """P-value of 'the first share is not higher than the second': Fisher's exact test, one-sided.

    Source: R. A. Fisher, The Design of Experiments (1935), chapter 2; the hypergeometric tail.
    """
    everything, all_bad = total + other_total, bad + other_bad
    if total == 0 or other_total == 0 or all_bad == 0:
        return 1.0
    most = min(total, all_bad)
    whole = _log_choose(everything, all_bad)
    return min(
        1.0,
        math.fsum(
            math.exp(_log_choose(total, k) + _log_choose(other_total, all_bad - k) - whole)
            for k in range(bad, most + 1)
            if all_bad - k <= other_total
        ),
    )


def _upper_sum(first: int, total: int, share: float) -> float:
    """P(X >= first) where first lies above the mean: terms fall from the first one on."""
    term = _mass(first, total, share)
    result, k, odds = 0.0, first, share / (1 - share)
    while k <= total and term > result * 1e-17:
        result += term
        term *= (total - k) / (k + 1) * odds
        k += 1
    return min(1.0, result)


def _lower_sum(last: int, total: int, share: float) -> float:
    """P(X <= last) where last lies below the mean: terms fall from the last one down."""
    term = _mass(last, total, share)
    result, k, odds = 0.0, last, (1 - share) / share
    while k >= 0 and term > result * 1e-17:
        result += term
        term *= k / (total - k + 1) * odds
        k -= 1
    return min(1.0, result)


def _mass(k: int, total: int, share: float) -> float:
    return math.exp(_log_choose(total, k) + k * math.log(share) + (total - k) * math.log1p(-share))


def _log_choose(total: int, k: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)

"""Data of the posteriors in `tests.further_stand_ins`: as `tests.posterior_data`, numpy alone."""

from __future__ import annotations

import numpy as np

from tests.posterior_data import Data


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def years() -> Data:
    """Temperatures on the year as it is written, 1952 to 2013: a correlation of 0.99996."""
    r, year = _rng(109), np.arange(1952.0, 2014.0)
    return {"year": year, "y": -30 + 0.02 * year + 1.1 * r.normal(size=62)}


def collinear() -> Data:
    """Eight predictors, any two of which are correlated 0.99, far from zero."""
    r = _rng(108)
    common = r.normal(size=200)
    x = 50 + 10 * (np.sqrt(0.99) * common[:, None] + np.sqrt(0.01) * r.normal(size=(200, 8)))
    return {"x": x, "y": 3 + x @ [1.0, -1, 0.5, 0, 0, 0.3, 0, -0.2] + 2 * r.normal(size=200)}


def zero_inflated() -> Data:
    """Counts, some of which are zero for a reason of their own; both parts depend on a predictor."""
    r = _rng(114)
    x = r.normal(size=200)
    none = r.random(200) < _logistic(-0.6 + 0.5 * x)
    return {"x": x, "y": np.where(none, 0, r.poisson(np.exp(0.8 + 0.5 * x))) * 1.0}


def roaches() -> Data:
    """Overdispersed counts at fifteen sites, at five of them two visits only."""
    r = _rng(116)
    site = np.concatenate([np.full(n, i) for i, n in enumerate([2] * 5 + [5] * 5 + [12] * 5)])
    x = r.normal(size=len(site))
    mean = np.exp(1.5 + 0.6 * r.normal(size=15)[site] + 0.4 * x)
    return {"site": site, "x": x, "y": r.poisson(mean * r.gamma(2.0, 0.5, len(site))) * 1.0}


def slopes() -> Data:
    """Intercepts and slopes of 25 groups of six, correlated."""
    r = _rng(113)
    each = r.multivariate_normal([2.0, -1.0], np.array([[1.0, -0.5 * 0.6], [-0.5 * 0.6, 0.36]]), 25)
    group, x = np.repeat(np.arange(25), 6), r.normal(size=150)
    return {"group": group, "x": x, "y": each[group, 0] + each[group, 1] * x + 0.8 * r.normal(size=150)}


def mixture3() -> Data:
    """Three components of weights 0.6, 0.3 and 0.1."""
    r = _rng(107)
    k = r.choice(3, 400, p=[0.6, 0.3, 0.1])
    return {"y": np.array([-2.0, 1.0, 4.0])[k] + np.array([0.8, 1.0, 0.5])[k] * r.normal(size=400)}


def disasters() -> Data:
    """A hundred yearly counts, whose rate falls in one of the years."""
    return {"y": _rng(117).poisson(np.where(np.arange(100) < 40, 3.1, 1.0)) * 1.0}


def hmm_covariates() -> Data:
    """A hidden chain of two states that is left with a probability that depends on a predictor."""
    r = _rng(104)
    x, state, y = r.normal(size=100), 0, []
    for t in range(100):
        stay = _logistic(1.2 + 0.8 * x[t]) if state == 0 else _logistic(0.9 - 0.9 * x[t])
        state = state if r.random() < stay else 1 - state
        y.append([0.0, 2.5][state] + r.normal())
    return {"x": x, "y": np.array(y)}


def gp_ard() -> Data:
    """Sixty points in three dimensions, one of which matters little and one not at all."""
    r = _rng(105)
    x = r.uniform(-2, 2, (60, 3))
    return {"x": x, "y": 1.5 * np.sin(2 * x[:, 0]) + 0.7 * x[:, 1] + 0.3 * r.normal(size=60)}


def sir() -> Data:
    """Those infected on twenty days, of a thousand: overdispersed counts; two Runge-Kutta steps a day."""
    r = _rng(102)
    z, seen, h = np.array([995.0, 5.0]), [], 0.5

    def rate(z: np.ndarray) -> np.ndarray:
        new = 0.9 * z[0] * z[1] / 1000
        return np.array([-new, new - 0.35 * z[1]])

    for _ in range(20):
        for _ in range(2):
            k1 = rate(z)
            k2 = rate(z + h / 2 * k1)
            k3 = rate(z + h / 2 * k2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(z + h * k3))
        seen.append(z[1])
    return {"y": r.poisson(np.array(seen) * r.gamma(8.0, 1 / 8.0, 20)) * 1.0}


NAMES = (
    "years", "collinear", "zero_inflated", "roaches", "slopes", "mixture3", "disasters", "hmm_covariates", "gp_ard", "sir",
)  # fmt: skip


def data(name: str) -> Data:
    """The arguments of the program of that name."""
    return globals()[name]()

"""Data of the posteriors in `tests.stand_ins`, from fixed seeds: numpy alone, so that any interpreter can read it.

Each function gives the arguments of the program of its name. Sizes and scales are those of the well-known
examples that they stand in for; predictors are left unscaled where the originals are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Data = dict[str, Any]


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- linear regressions: predictors as they come, so that coefficients are strongly correlated -------------


def earnings() -> Data:
    """Log earnings on height in inches, sex and their product: correlations beyond 0.99."""
    r = _rng(1)
    male = (r.random(400) < 0.4) * 1.0
    height = 64.5 + 5.5 * male + 2.6 * r.normal(size=400)
    y = 7.1 + 0.03 * height + 0.2 * male + 0.005 * male * height + 0.88 * r.normal(size=400)
    return {"x": np.stack([np.ones(400), height, male, height * male], 1), "y": y}


def kidscore() -> Data:
    """Test scores on the mother's schooling, her IQ and their product."""
    r = _rng(2)
    school = (r.random(434) < 0.79) * 1.0
    iq = 100 + 15 * r.normal(size=434)
    y = -11 + 51 * school + 0.97 * iq - 0.48 * school * iq + 18 * r.normal(size=434)
    return {"x": np.stack([np.ones(434), school, iq, school * iq], 1), "y": y}


def mesquite() -> Data:
    """Weights of 46 bushes on seven predictors of very different size."""
    r = _rng(3)
    d1 = r.lognormal(0.5, 0.5, 46)
    d2 = d1 * r.lognormal(-0.2, 0.2, 46)
    canopy, total = r.lognormal(0.1, 0.4, 46), r.lognormal(0.4, 0.3, 46)
    density, group = 1.0 + (r.random(46) < 0.2) * r.integers(1, 8, 46), (r.random(46) < 0.57) * 1.0
    x = np.stack([np.ones(46), d1, d2, canopy, total, density, group], 1)
    return {"x": x, "y": x @ [-700, 190, 370, 350, -100, 130, 360] + 270 * r.normal(size=46)}


def blr() -> Data:
    """Bayesian linear regression, N = 100, D = 5, proper priors."""
    r = _rng(4)
    x = r.normal(size=(100, 5))
    return {"x": x, "y": x @ r.normal(size=5) + r.normal(size=100)}


def diamonds() -> Data:
    """24 nearly collinear polynomial predictors, without a QR decomposition."""
    r = _rng(5)
    carat = r.normal(size=500)
    size = carat[:, None] + 0.1 * r.normal(size=(500, 4))
    levels = r.normal(size=(500, 19))
    x = np.concatenate([carat[:, None], size, levels + 0.7 * levels[:, :1]], 1)
    return {"x": x - x.mean(0), "y": 8 + x @ (0.3 * r.normal(size=24)) + 0.3 * r.normal(size=500)}


# --- generalised linear and hierarchical models ------------------------------------------------------------


def nes() -> Data:
    """A vote on income in categories 1 to 5."""
    r = _rng(6)
    income = r.integers(1, 6, 800) * 1.0
    return {"income": income, "vote": (r.random(800) < _logistic(-1.4 + 0.33 * income)) * 1.0}


def wells() -> Data:
    """Switching wells on distance in 100 m, arsenic and their product."""
    r = _rng(7)
    distance, arsenic = r.gamma(1.5, 0.33, 800), 0.5 + r.gamma(1.0, 1.1, 800)
    x = np.stack([np.ones(800), distance, arsenic, distance * arsenic], 1)
    return {"x": x, "y": (r.random(800) < _logistic(x @ [-0.15, -0.58, 0.56, -0.18])) * 1.0}


def poisson() -> Data:
    """Counts on a cubic of the year, uniform priors on bounded intervals."""
    r = _rng(8)
    year = (np.arange(40) - 19.5) / 20
    mean = np.exp(4.3 + 1.2 * year + 0.07 * year**2 - 0.5 * year**3)
    return {"year": year, "count": r.poisson(mean) * 1.0}


def dogs() -> Data:
    """Thirty dogs learn to avoid shocks over 25 trials: counts of what went before are predictors."""
    r = _rng(9)
    shocked = np.zeros((30, 25))
    for t in range(25):
        before = shocked[:, :t].sum(1)
        shocked[:, t] = r.random(30) < _logistic(2.4 - 0.37 * (t - before) - 0.2 * before)
    before = np.concatenate([np.zeros((30, 1)), shocked.cumsum(1)[:, :-1]], 1)
    return {"avoided": np.arange(25) - before, "shocks": before, "y": shocked}


def radon() -> Data:
    """Log radon in 400 houses of 40 counties: varying intercepts, one slope."""
    r = _rng(10)
    county = np.concatenate([np.arange(40), r.choice(40, 360, p=r.dirichlet(np.ones(40)))])
    floor = (r.random(400) < 0.17) * 1.0
    alpha = 1.5 + 0.33 * r.normal(size=40)
    return {"county": county, "floor": floor, "y": alpha[county] - 0.7 * floor + 0.73 * r.normal(size=400)}


def rats() -> Data:
    """Weights of 30 rats in five weeks: intercepts and slopes vary."""
    r = _rng(11)
    age = np.array([8.0, 15, 22, 29, 36])
    y = (242 + 14 * r.normal(size=(30, 1))) + (6.2 + 0.5 * r.normal(size=(30, 1))) * (age - 22)
    return {"age": age, "y": y + 6 * r.normal(size=(30, 5))}


def surgical() -> Data:
    """Deaths in twelve hospitals."""
    r = _rng(12)
    operations = np.array([47.0, 148, 119, 810, 211, 196, 148, 215, 207, 97, 256, 360])
    rate = _logistic(-2.5 + 0.4 * r.normal(size=12))
    return {"operations": operations, "deaths": r.binomial(operations.astype(int), rate) * 1.0}


def survival() -> Data:
    """Weibull times of 150 patients, a third of them censored."""
    r = _rng(13)
    x = np.stack([r.normal(size=150), (r.random(150) < 0.5) * 1.0], 1)
    time = np.exp(1.0 + x @ [0.5, -0.4]) * r.weibull(1.4, 150)
    end = r.exponential(6.0, 150)
    return {"x": x, "time": np.minimum(time, end), "died": (time <= end) * 1.0}


def horseshoe() -> Data:
    """Sparse regression: 3 of 20 coefficients count; half-Cauchy scales under a slab (Piironen and Vehtari, 2017)."""
    r = _rng(14)
    x = r.normal(size=(100, 20))
    return {"x": x, "y": x[:, :3] @ [2.0, -1.5, 1.0] + r.normal(size=100)}


# --- mixtures and hidden Markov models ---------------------------------------------------------------------


def gauss_mix() -> Data:
    """Two components with ordered means, their own scales and a weight."""
    r = _rng(15)
    k = r.random(300) < 0.35
    return {"y": np.where(k, -1.6 + 0.7 * r.normal(size=300), 1.3 + 1.1 * r.normal(size=300))}


def switching() -> Data:
    """Two components of equal prior and few data: labels switch and both modes count."""
    r = _rng(16)
    return {"y": np.where(r.random(25) < 0.5, -1.1, 1.1) + r.normal(size=25)}


def hmm() -> Data:
    """A hidden Markov chain of two states, Gaussian emissions of unit scale."""
    r = _rng(17)
    rows, state, y = np.array([[0.8, 0.2], [0.35, 0.65]]), 0, []
    for _ in range(100):
        state = r.choice(2, p=rows[state])
        y.append([3.0, 6.5][state] + 1.5 * r.normal())
    return {"y": np.array(y)}


def basketball() -> Data:
    """Two sequences driven by one hidden chain: speed and distance."""
    r = _rng(18)
    rows, state, u, v = np.array([[0.9, 0.1], [0.2, 0.8]]), 0, [], []
    for _ in range(80):
        state = r.choice(2, p=rows[state])
        u.append(r.exponential([0.5, 2.5][state]))
        v.append([0.6, 2.2][state] + 0.8 * r.normal())
    return {"u": np.array(u), "v": np.array(v)}


# --- Gaussian processes and series -------------------------------------------------------------------------


def gp() -> Data:
    """Eleven points of a smooth function with noise."""
    r = _rng(19)
    x = np.linspace(-10, 10, 11)
    return {"x": x, "y": 2 * np.sin(x / 3) + 0.3 * r.normal(size=11)}


def gp_poisson() -> Data:
    """Eleven counts with a log rate that is a Gaussian process."""
    r = _rng(20)
    x = np.linspace(-10, 10, 11)
    return {"x": x, "k": r.poisson(np.exp(1.2 + 1.2 * np.sin(x / 3))) * 1.0}


def accel() -> Data:
    """Acceleration in a crash: mean and log scale are both smooth, by a basis of sines."""
    r = _rng(21)
    t = np.sort(r.uniform(-1, 1, 90))
    mean = -1.8 * np.exp(-((t / 0.25) ** 2)) + 0.9 * np.exp(-(((t - 0.45) / 0.25) ** 2))
    y = mean + (0.05 + 0.45 * _logistic(8 * (t + 0.3))) * r.normal(size=90)
    order = np.arange(1, 13)
    return {
        "root": np.pi * order / 3,
        "basis": np.sin(np.pi * order * (t[:, None] + 1.5) / 3) / 1.5**0.5,
        "y": y,
    }


def arma() -> Data:
    """ARMA(1, 1): the errors are found one after another, 150 steps."""
    r = _rng(22)
    e, y = 0.15 * r.normal(size=151), [0.0]
    for t in range(1, 151):
        y.append(0.02 + 0.9 * y[-1] + e[t] + 0.25 * e[t - 1])
    return {"y": np.array(y[1:])}


def volatility() -> Data:
    """Stochastic volatility, 60 returns."""
    r = _rng(23)
    h = [0.0]
    for _ in range(59):
        h.append(-1.0 + 0.9 * (h[-1] + 1.0) + 0.3 * r.normal())
    return {"y": np.exp(np.array(h) / 2) * r.normal(size=60)}


# --- differential equations --------------------------------------------------------------------------------


def predators(z: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
    """Rates of change of prey and predators (Lotka, 1925; Volterra, 1926)."""
    return np.array([(a - b * z[1]) * z[0], (d * z[0] - c) * z[1]])


def lotka_volterra() -> Data:
    """Pelts of hares and lynxes in 20 years, log-normal errors; four Runge-Kutta steps a year."""
    r = _rng(24)
    z, seen, h = np.array([34.0, 5.9]), [], 0.25
    for _ in range(20):
        seen.append(z)
        for _ in range(4):
            k1 = predators(z, 0.55, 0.028, 0.8, 0.024)
            k2 = predators(z + h / 2 * k1, 0.55, 0.028, 0.8, 0.024)
            k3 = predators(z + h / 2 * k2, 0.55, 0.028, 0.8, 0.024)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + predators(z + h * k3, 0.55, 0.028, 0.8, 0.024))
    return {"y": np.stack(seen) * np.exp(0.25 * r.normal(size=(20, 2)))}


def one_compartment() -> Data:
    """Concentration after a dose: first-order absorption, Michaelis-Menten elimination, 20 times."""
    r = _rng(25)
    c, t, h, out = 0.0, 0.0, 0.125, []

    def rate(t, c):
        return 15 * 0.75 * np.exp(-0.75 * t) - 0.5 * c / (0.25 + c)

    for _ in range(20):
        for _ in range(4):
            k1 = rate(t, c)
            k2 = rate(t + h / 2, c + h / 2 * k1)
            k3 = rate(t + h / 2, c + h / 2 * k2)
            c += h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(t + h, c + h * k3))
            t += h
        out.append(c)
    return {"y": np.array(out) * np.exp(0.1 * r.normal(size=20))}


NAMES = (
    "earnings", "kidscore", "mesquite", "blr", "diamonds", "nes", "wells", "poisson", "dogs", "radon", "rats",
    "surgical", "survival", "horseshoe", "gauss_mix", "switching", "hmm", "basketball", "gp", "gp_poisson",
    "accel", "arma", "volatility", "lotka_volterra", "one_compartment",
)  # fmt: skip


def data(name: str) -> Data:
    """The arguments of the program of that name."""
    return globals()[name]()

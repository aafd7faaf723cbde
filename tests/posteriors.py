"""Posteriors with references: Pyro programs as their users write them, and the check that draws agree.

Five come from posteriordb (Magnusson et al., 2023), whose data and reference draws are read from the folder
`posteriordb` of the one that the environment variable PGEN_SHARED_DATA names, or of `../shared/data`
beside the checkout. The rest are in `tests.stand_ins` and `tests.further_stand_ins`, on generated data, with references in `tests/data/posteriors`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from arviz_stats.base import array_stats
from pyro.distributions import constraints

from tests import further_data, further_stand_ins, posterior_data, stand_ins

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("PGEN_SHARED_DATA", HERE.parents[1] / "shared" / "data")) / "posteriordb"
STORED = HERE / "data" / "posteriors"


# --- programs of posteriordb -------------------------------------------------------------------------------


def eight_schools_centered(J, y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(J, y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", J):
        theta = pyro.deterministic("theta", mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0)))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_momiq(kid_score, mom_iq):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), (2,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("children", len(kid_score)):
        pyro.sample("kid_score", dist.Normal(beta[0] + beta[1] * mom_iq, sigma), obs=kid_score)


def ark(K, T, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = torch.stack([y[K - k - 1 : T - k - 1] for k in range(K)], -1)
    pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y[K:])


def garch11(T, y, sigma1):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(1.0).mask(False))
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    beta1 = pyro.sample("beta1", dist.Uniform(0.0, 1.0 - alpha1).mask(False))  # flat: not 1 / (1 - alpha1)
    variance = [sigma1**2]
    for t in range(1, T):
        variance.append(alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variance[-1])
    pyro.sample("y", dist.Normal(mu, torch.stack(variance).sqrt()).to_event(1), obs=y)


_DATABASE: dict[str, tuple[Callable[..., None], str, tuple[str, ...]]] = {
    "eight_schools_centered": (
        eight_schools_centered,
        "eight_schools-eight_schools_noncentered",
        ("J", "y", "sigma"),
    ),
    "eight_schools_noncentered": (
        eight_schools_noncentered,
        "eight_schools-eight_schools_noncentered",
        ("J", "y", "sigma"),
    ),
    "kidscore_momiq": (kidscore_momiq, "kidiq-kidscore_momiq", ("kid_score", "mom_iq")),
    "arK": (ark, "arK-arK", ("K", "T", "y")),
    "garch11": (garch11, "garch-garch11", ("T", "y", "sigma1")),
}
DATABASE = tuple(_DATABASE)
STAND_INS = posterior_data.NAMES + further_data.NAMES


@dataclass(frozen=True)
class Reference:
    """What is known of one coordinate: `mean`, `sd`, its independent draws' number, kurtosis, quantiles by level."""

    mean: float
    sd: float
    size: float
    kurtosis: float
    quantiles: Mapping[float, float]

    @staticmethod
    def of(row: Mapping[str, float], kurtosis: float) -> Reference:
        """From a row of a summary, quantiles named q05 and so on."""
        quantiles = {int(k[1:]) / 100: v for k, v in row.items() if k[0] == "q"}
        return Reference(row["mean"], row["sd"], (row["sd"] / row["mcse_mean"]) ** 2, kurtosis, quantiles)


@dataclass(frozen=True)
class Posterior:
    """A program, its keyword arguments (float64), and references by names such as `beta[1]` and `sigma`."""

    name: str
    program: Callable[..., None]
    arguments: dict[str, Any]
    references: dict[str, Reference]


class NoData(Exception):
    """The folder of posteriordb is not there."""


def posterior(name: str) -> Posterior:
    """A posterior by name, of `DATABASE` or `STAND_INS`.

    Raises:
        NoData: it is one of posteriordb, and its folder is not there.
    """
    if name in STAND_INS:
        found = json.loads((STORED / f"{name}.json").read_text())["parameters"]
        references = {k: Reference.of(v, v["kurtosis"]) for k, v in found.items()}
        programs, data = (
            (further_stand_ins, further_data) if name in further_data.NAMES else (stand_ins, posterior_data)
        )
        return Posterior(name, programs.program(name), arguments_of(data.data(name)), references)
    program, stem, wanted = _DATABASE[name]
    path = SHARED / f"{stem}.data.json.gz"
    if not path.is_file():
        raise NoData(f"{path} is not there: set PGEN_SHARED_DATA to the folder that holds posteriordb/")
    data = json.loads(gzip.decompress(path.read_bytes()))
    found = json.loads((SHARED / f"{stem}.summary.json").read_text())["parameters"]
    with np.load(SHARED / f"{stem}.draws.npz") as stored:
        names, draws = [str(n) for n in stored["names"]], stored["draws"].reshape(-1, len(stored["names"]))
    centred = (draws - draws.mean(0)) / draws.std(0)
    kurtosis = dict(zip(names, (centred**4).mean(0)))
    references = {k: Reference.of(v, float(kurtosis[k])) for k, v in found.items()}
    integers = {k: data[k] for k in wanted if isinstance(data[k], int) and k in ("J", "K", "T")}
    others = {k: np.asarray(data[k], dtype=np.float64) for k in wanted if k not in integers}
    return Posterior(name, program, integers | arguments_of(others), references)


def arguments_of(data: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Arrays as tensors."""
    return {k: torch.as_tensor(v) for k, v in data.items()}


# --- the check ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One coordinate beside its reference. Errors are in units of what is allowed: above 1 is a failure."""

    name: str
    ess: float
    mean: float
    sd: float
    quantile: float

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.mean, self.sd, self.quantile)


def coordinate(draws: Mapping[str, np.ndarray], label: str) -> np.ndarray:
    """Draws `[chains, draws]` of a coordinate such as `beta[2]`: numbers count from one."""
    site, _, index = label.partition("[")
    at = tuple(int(k) - 1 for k in index.rstrip("]").split(",")) if index else ()
    return np.asarray(draws[site], dtype=np.float64)[(..., *at)]


def row(label: str, x: np.ndarray, reference: Reference) -> Row:
    """Compare one coordinate.

    - The mean: within 0.1 reference sd and 4 standard errors (of both) of that of the reference.
    - The sd: within 10 %. Where the two samples are too small for the kurtosis (4 standard errors of the
      ratio exceed 10 %), the sd and the mean are left to the quantiles.
    - Quantiles: the share of draws below each reference quantile is its level, give or take 4 standard errors
      and what a shift by 0.1 sd does to the quantile of a normal.
    """
    sizes = float(array_stats.ess(x, 0, 1, method="mean")), reference.size
    apart = sum(1 / n for n in sizes)
    mean = abs(x.mean() - reference.mean) / reference.sd / (0.1 + 4 * math.sqrt(apart))
    noise = 4 * math.sqrt(max(reference.kurtosis - 1, 0) / 4 * apart)
    sd = abs(x.std(ddof=1) / reference.sd - 1) / 0.1
    if noise > 0.1:
        mean = sd = 0.0
    errors = []
    for level, value in reference.quantiles.items():
        below = (x <= value).astype(np.float64)
        size = array_stats.ess(below, 0, 1, method="mean") if 0 < below.mean() < 1 else math.nan
        own = min(float(size), x.size) if math.isfinite(size) else sizes[0]
        z = float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
        slack = 0.1 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        allowed = slack + 4 * math.sqrt(level * (1 - level) * (1 / own + 1 / reference.size))
        errors.append(abs(below.mean() - level) / allowed)
    return Row(label, sizes[0], mean, sd, max(errors))


def compared(draws: Mapping[str, np.ndarray], references: Mapping[str, Reference]) -> list[Row]:
    """All coordinates of the references beside draws `[chains, draws, ...]` by site."""
    return [row(label, coordinate(draws, label), reference) for label, reference in references.items()]


def complaints(rows: list[Row], least: float = 0.0) -> list[str]:
    """What is wrong, one line a coordinate; `least` is the effective size that the draws must have."""
    bad = [r for r in rows if not r.worst <= 1 or not r.ess >= least]
    return [
        f"{r.name}: ESS {r.ess:.0f}; errors over what is allowed: mean {r.mean:.2f}, sd {r.sd:.2f}, quantiles {r.quantile:.2f}"
        for r in bad
    ]

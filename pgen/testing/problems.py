"""Problems whose answers are known exactly: what a backend is held against.

Each `Reference` is a small program with data, and closed forms (in float64) of everything that a fit can be
asked: the marginal log probability of data, the posterior law of every latent site, some joint expectations
under the posterior, and the law of a draw of every site. `SUITED` are programs that a backend may serve;
`DENOISED` have a site of which only a denoiser is known, `ENERGIES` one that is known up to a constant; `LEARNED` has something to learn, with a known
optimum; `UNSUITABLE` are programs that most backends must refuse, by naming the site.

>>> coin = next(p for p in SUITED if p.name == "beta-bernoulli")
>>> round(float(coin.posterior(coin.data)["p"].mean), 3)
0.667
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pgen.testing import denoised, energies
from pgen.testing.unsuitable import LearnedEnergy, branching, implicit

Data = Mapping[str, Tensor]
Laws = Mapping[str, Any]
#: by name, a function of posterior draws that gives `[n, ...]`, and its exact expectation `[...]`
Expectations = Mapping[str, tuple[Callable[[Mapping[str, Tensor]], Tensor], Tensor]]


def _none_in_particular(data: Data) -> Expectations:
    return {}


@dataclass(frozen=True)
class Reference:
    """A program with data, and its exact answers as functions of the data.

    Attributes:
        name: how it is called in reports.
        program: the Pyro program.
        data: what it is fitted to; `rows` of them.
        log_prob: exact marginal log probability of data: `[rows]`, or `[1]` where a latent ties the rows
            together.
        posterior: exact marginal posterior law of every latent site; its batch shape is the shape of one
            draw.
        joint: exact joint expectations under the posterior.
        predictive: exact marginal law of one draw of each site by `sample`.
        best: the highest mean log probability of the data, where the program has something to learn.
        offending: the site in the way of most backends; a refusal must name one.
        must_refuse: whether no backend may serve it.
    """

    name: str
    program: Callable[..., Any]
    data: Data
    log_prob: Callable[[Data], Tensor] | None = None
    posterior: Callable[[Data], Laws] | None = None
    joint: Callable[[Data], Expectations] = _none_in_particular
    predictive: Callable[[], Laws] | None = None
    best: float | None = None
    offending: str | None = None
    must_refuse: bool = False

    def some(self, rows: int) -> Data:
        """The first so many rows of the data."""
        return {k: v[:rows] for k, v in self.data.items()}

    def __repr__(self) -> str:
        """The name."""
        return f"Reference({self.name!r})"


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _f64(value: Tensor) -> Tensor:
    return value.detach().double()


def _normal(loc: Any, scale: Any) -> Any:
    loc, scale = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (loc, scale)))
    return dist.Normal(loc, scale)


# --- a Gaussian mean with a Gaussian prior: one latent ties all rows ---


def gaussian_mean(n: int) -> None:
    """mu ~ N(0.5, 2^2), x_i ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.5, 2.0))
    with pyro.plate("data", n):
        pyro.sample("x", dist.Normal(mu, 1.0))


def _gaussian_mean_evidence(data: Data) -> Tensor:
    x = _f64(data["x"])
    covariance = torch.eye(len(x), dtype=torch.float64) + 4.0
    return dist.MultivariateNormal(torch.full_like(x, 0.5), covariance).log_prob(x)[None]


def _gaussian_mean_posterior(data: Data) -> Laws:
    x = _f64(data["x"])
    precision = 0.25 + len(x)
    return {"mu": _normal((0.25 * 0.5 + x.sum()) / precision, precision**-0.5)}


# --- a coin of fixed size: the program takes no number of rows ---


def beta_bernoulli() -> None:
    """p ~ Beta(2, 3), x_i ~ Bernoulli(p) for i = 1..7."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("flips", 7):
        pyro.sample("x", dist.Bernoulli(p))


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _beta_bernoulli_counts(data: Data) -> tuple[Tensor, Tensor]:
    heads = _f64(data["x"]).sum()
    return 2.0 + heads, 3.0 + data["x"].numel() - heads


def _beta_bernoulli_evidence(data: Data) -> Tensor:
    prior = _log_beta(*torch.tensor([2.0, 3.0], dtype=torch.float64))
    return (_log_beta(*_beta_bernoulli_counts(data)) - prior)[None]


# --- a linear-Gaussian pair: a latent for every row ---


def linear_gaussian(n: int) -> None:
    """z_i ~ N(0.5, 1.5^2), x_i ~ N(2 z_i - 1, 0.75^2)."""
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Normal(0.5, 1.5))
        pyro.sample("x", dist.Normal(2.0 * z - 1.0, 0.75))


_PAIR_SD = math.sqrt(4.0 * 1.5**2 + 0.75**2)


def _linear_gaussian_posterior(data: Data) -> Laws:
    precision = 1.5**-2 + 4.0 * 0.75**-2
    mean = (0.5 * 1.5**-2 + 2.0 * (_f64(data["x"]) + 1.0) * 0.75**-2) / precision
    return {"z": _normal(mean, precision**-0.5)}


# --- linear regression: covariates are an argument, two correlated weights tie the rows ---


def regression(covariates: Tensor) -> None:
    """w ~ N(0, I) in two dimensions, y_i ~ N(covariates_i . w, 0.5^2)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", covariates.shape[0]):
        pyro.sample("y", dist.Normal((covariates * w).sum(-1), 0.5))


def _regression_evidence(data: Data) -> Tensor:
    a, y = _f64(data["covariates"]), _f64(data["y"])
    covariance = a @ a.T + 0.25 * torch.eye(len(y), dtype=torch.float64)
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)[None]


def _regression_moments(data: Data) -> tuple[Tensor, Tensor]:
    a, y = _f64(data["covariates"]), _f64(data["y"])
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + 4.0 * a.T @ a)
    return covariance @ (4.0 * a.T @ y), covariance


def _regression_posterior(data: Data) -> Laws:
    mean, covariance = _regression_moments(data)
    return {"w": _normal(mean, covariance.diagonal().sqrt())}


def _regression_joint(data: Data) -> Expectations:
    mean, covariance = _regression_moments(data)
    return {"w[0] w[1]": (lambda draws: draws["w"][:, 0] * draws["w"][:, 1], covariance[0, 1] + mean.prod())}


# --- a mixture of two: enumerable, local ---

_WEIGHTS, _LOCS = (0.25, 0.75), (-1.0, 1.5)


def mixture(n: int) -> None:
    """k_i ~ Categorical(1/4, 3/4), x_i ~ N(loc of k_i, 1)."""
    weights, locs = torch.tensor(_WEIGHTS), torch.tensor(_LOCS)
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], 1.0))


def _mixture_joint_table(data: Data) -> Tensor:
    locs, weights = (torch.tensor(v, dtype=torch.float64) for v in (_LOCS, _WEIGHTS))
    return weights.log() + _normal(locs, 1.0).log_prob(_f64(data["x"])[:, None])


def _mixture_law() -> Any:
    locs, weights = (torch.tensor(v, dtype=torch.float64) for v in (_LOCS, _WEIGHTS))
    return torch.distributions.MixtureSameFamily(
        dist.Categorical(weights), dist.Normal(locs, torch.ones_like(locs))
    )


# --- a hidden Markov chain: enumerable, and its states depend on each other ---

_STEPS = 3
_START, _MOVE, _EMIT = (0.5, 0.5), ((0.75, 0.25), (0.125, 0.875)), (0.0, 2.0)


def hmm(n: int) -> None:
    """Three steps of a chain of two states z_t, seen through x_t ~ N(0 or 2, 1)."""
    start, move, emit = torch.tensor(_START), torch.tensor(_MOVE), torch.tensor(_EMIT)
    with pyro.plate("data", n):
        probabilities = start
        for t in pyro.markov(range(_STEPS)):
            z = pyro.sample(f"z{t}", dist.Categorical(probabilities))
            pyro.sample(f"x{t}", dist.Normal(emit[z], 1.0))
            probabilities = move[z]


def _paths() -> tuple[Tensor, Tensor]:
    """Every path of states `[paths, steps]`, and its log prior."""
    start, move = (torch.tensor(v, dtype=torch.float64) for v in (_START, _MOVE))
    paths = torch.tensor(list(itertools.product((0, 1), repeat=_STEPS)))
    return paths, start.log()[paths[:, 0]] + move.log()[paths[:, :-1], paths[:, 1:]].sum(1)


def _hmm_path_table(data: Data) -> Tensor:
    """Log joint probability of every path and every row, `[rows, paths]`."""
    paths, prior = _paths()
    x = torch.stack([_f64(data[f"x{t}"]) for t in range(_STEPS)], -1)
    emitted = _normal(torch.tensor(_EMIT, dtype=torch.float64)[paths], 1.0).log_prob(x[:, None])
    return prior + emitted.sum(-1)


def _state_law(log_weights: Tensor, t: int) -> Any:
    """Law of the t-th state when path k has such a log weight."""
    paths, _ = _paths()
    weights = log_weights.softmax(-1)
    one = weights[..., paths[:, t] == 1].sum(-1)
    return dist.Categorical(torch.stack([1 - one, one], -1))


def _hmm_joint(data: Data) -> Expectations:
    paths, _ = _paths()
    weights = _hmm_path_table(data).softmax(-1)
    agree = weights[:, paths[:, 0] == paths[:, 1]].sum(-1)
    return {"z0 = z1": (lambda draws: (draws["z0"] == draws["z1"]).double(), agree)}


def _hmm_predictive() -> Laws:
    emit = torch.tensor(_EMIT, dtype=torch.float64)
    laws: dict[str, Any] = {}
    for t in range(_STEPS):
        state = _state_law(_paths()[1], t)
        laws[f"z{t}"] = state
        laws[f"x{t}"] = torch.distributions.MixtureSameFamily(state, dist.Normal(emit, torch.ones_like(emit)))
    return laws


# --- a pushforward with a known density: nothing latent ---


def pushforward(n: int) -> None:
    """x_i = exp(0.5 + 0.5 e_i) with e_i ~ N(0, 1): its density is there only through the Jacobian."""
    moves = [dist.transforms.AffineTransform(0.5, 0.5), dist.transforms.ExpTransform()]
    with pyro.plate("data", n):
        pyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, 1.0), moves))


def _log_normal() -> Any:
    half = torch.tensor(0.5, dtype=torch.float64)
    return dist.LogNormal(half, half)


# --- a diffusion: a denoiser is all that is known of a site, observed or latent ---


def _denoised_posterior(data: Data) -> Laws:
    means, covariance, weights = denoised.posterior(data)
    return {"z": denoised.coordinates(means, covariance.diagonal(), weights)}


def _denoised_joint(data: Data) -> Expectations:
    return {"z[0] z[1]": (lambda draws: draws["z"].prod(-1), denoised.product(data))}


# --- something to learn, with a known optimum ---


class LearnedGaussian(nn.Module):
    """x_i ~ N(loc, exp(log_scale)^2); at the optimum, mean and standard deviation of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, n: int) -> None:
        """Draw n rows."""
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()))


_LEARNT_FROM = torch.linspace(-1.0, 1.0, 64) + 0.375
_SPREAD = float(_f64(_LEARNT_FROM).std(correction=0))


_X = _tensor(-1.25, 0.5, 0.875, 2.0, 3.125)
_HALF = torch.tensor(0.5, dtype=torch.float64)

SUITED: tuple[Reference, ...] = (
    Reference(
        "gaussian-mean",
        gaussian_mean,
        {"x": _X},
        _gaussian_mean_evidence,
        _gaussian_mean_posterior,
        predictive=lambda: {"mu": _normal(0.5, 2.0), "x": _normal(0.5, math.sqrt(5.0))},
    ),
    Reference(
        "beta-bernoulli",
        beta_bernoulli,
        {"x": _tensor(1, 1, 0, 1, 1, 1, 1)},
        _beta_bernoulli_evidence,
        lambda data: {"p": dist.Beta(*_beta_bernoulli_counts(data))},
        predictive=lambda: {"p": dist.Beta(4 * _HALF, 6 * _HALF), "x": dist.Bernoulli(0.8 * _HALF.expand(7))},
    ),
    Reference(
        "linear-gaussian",
        linear_gaussian,
        {"x": 2.0 * _X},
        lambda data: _normal(0.0, _PAIR_SD).log_prob(_f64(data["x"])),
        _linear_gaussian_posterior,
        predictive=lambda: {"z": _normal(0.5, 1.5), "x": _normal(0.0, _PAIR_SD)},
    ),
    Reference(
        "regression",
        regression,
        {"covariates": torch.stack([_tensor(1, 0, 1, -1, 0.5), _tensor(0, 1, 1, 0.5, 1)], -1), "y": _X},
        _regression_evidence,
        _regression_posterior,
        _regression_joint,
        predictive=lambda: {"w": _normal(torch.zeros(2), 1.0)},
    ),
    Reference(
        "mixture",
        mixture,
        {"x": _X},
        lambda data: _mixture_joint_table(data).logsumexp(-1),
        lambda data: {"k": dist.Categorical(logits=_mixture_joint_table(data))},
        predictive=lambda: {"k": dist.Categorical(torch.tensor(_WEIGHTS)), "x": _mixture_law()},
    ),
    Reference(
        "hmm",
        hmm,
        {"x0": _X[:4], "x1": _X[1:], "x2": _X[:4].flip(0)},
        lambda data: _hmm_path_table(data).logsumexp(-1),
        lambda data: {f"z{t}": _state_law(_hmm_path_table(data), t) for t in range(_STEPS)},
        _hmm_joint,
        predictive=_hmm_predictive,
    ),
    Reference(
        "pushforward",
        pushforward,
        {"x": _tensor(0.25, 0.75, 1.5, 2.5, 6.0)},
        lambda data: _log_normal().log_prob(_f64(data["x"])),
        lambda data: {},
        predictive=lambda: {"x": _log_normal()},
    ),
)

DENOISED: tuple[Reference, ...] = (
    Reference(
        "denoised",
        denoised.denoised,
        {"x": torch.stack([_X - 1.0, _X.flip(0) - 1.0], -1)},
        lambda data: denoised.exact().log_prob(_f64(data["x"])),
        lambda data: {},
        predictive=lambda: {"x": denoised.prior()},
    ),
    Reference(
        "denoised-latent",
        denoised.denoised_latent,
        {"y": _X - 1.0},
        lambda data: denoised.seen().log_prob(_f64(data["y"])),
        _denoised_posterior,
        _denoised_joint,
        predictive=lambda: {"z": denoised.prior(), "y": denoised.seen()},
    ),
)

ENERGIES: tuple[Reference, ...] = (
    Reference(
        "energy",
        energies.energy,
        {"x": _X[:, None] - 1.0},
        lambda data: energies.hills().log_prob(_f64(data["x"]))[:, 0],
        lambda data: {},
        predictive=lambda: {"x": energies.hills()},
    ),
    Reference(
        "energy-latent",
        energies.energy_latent,
        {"x": _X},
        lambda data: energies.seen().log_prob(_f64(data["x"])),
        lambda data: {"z": energies.posterior(data)},
        predictive=lambda: {"z": energies.prior(), "x": energies.seen()},
    ),
)

LEARNED: tuple[Reference, ...] = (
    Reference(
        "learned-gaussian",
        LearnedGaussian(),
        {"x": _LEARNT_FROM},
        best=-math.log(_SPREAD) - 0.5 - 0.5 * math.log(2 * math.pi),
        predictive=lambda: {"x": _normal(0.375, _SPREAD)},
    ),
)

UNSUITABLE: tuple[Reference, ...] = (
    Reference("implicit", implicit, {"x": _tensor(0.25, -0.5, 0.75)}, offending="x"),
    Reference("learned-energy", LearnedEnergy(), {"x": _X}, offending="energy", must_refuse=True),
    Reference("branching", branching, {"x": torch.tensor(0.5)}),
)

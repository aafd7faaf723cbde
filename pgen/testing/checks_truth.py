"""Checks of truth: every answer against the exact one, as strictly as the backend itself promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pgen.capability import Estimate, Exactness, Query
from pgen.errors import PgenError
from pgen.isolation import isolated
from pgen.testing import statistics as stats
from pgen.testing.checks_contract import _claim
from pgen.testing.problems import Data, Laws
from pgen.testing.subject import NotApplicable, Subject

_EXACT_TO = 1e-4  # what counts as equal in float32


def log_prob_is_true(subject: Subject) -> None:
    """`log_prob` is to the truth as its `kind` says (equal, below, within its error), on new data too."""
    subject.require(Query.LOG_PROB)
    truth = subject.reference.log_prob
    if truth is None:
        raise NotApplicable("no exact answer is known")
    _judge(subject, subject.log_prob(), truth(subject.data), "log_prob of the data fitted to")
    if subject.fitted.problem.rows is None:
        return
    few = subject.reference.some(3)
    try:
        estimate = subject.ask_bare(Query.LOG_PROB, 0, subject.fitted, few)
    except PgenError as error:
        if subject.log_prob().kind is Exactness.EXACT:
            raise AssertionError(
                f"log_prob is exact on the data fitted to, and raised on other data: {error}"
            ) from error
        return
    except Exception as error:
        raise AssertionError(
            f"log_prob of other data than fitted to raised {type(error).__name__}: {error}"
        ) from error
    _judge(subject, estimate, truth(few), "log_prob of other data than fitted to")


def exact_log_prob_has_no_noise(subject: Subject) -> None:
    """A log probability offered as exact is the same for every seed, and has no standard error."""
    subject.require(Query.LOG_PROB)
    first, second = subject.log_prob(seed=21), subject.log_prob(seed=22)
    if first.kind is not Exactness.EXACT:
        raise NotApplicable("log_prob is not offered as exact")
    _claim(
        torch.allclose(first.value, second.value, rtol=1e-5, atol=1e-5, equal_nan=True),
        f"log_prob is offered as exact, and differs by "
        f"{float((first.value - second.value).abs().max()):.2g} between two seeds",
    )
    _claim(
        first.stderr is None or not bool(first.stderr.any()),
        "log_prob is offered as exact, and has a standard error",
    )


def posterior_is_true(subject: Subject) -> None:
    """Posterior draws have the exact law, site by site and jointly; offered as an estimate, roughly."""
    subject.require(Query.POSTERIOR)
    posterior = subject.reference.posterior
    if posterior is None or not subject.structure.latents:
        raise NotApplicable("no exact posterior is known" if posterior is None else "nothing is latent")
    settings, exact = subject.settings, subject.offer.answers[Query.POSTERIOR] is Exactness.EXACT
    questions: list[Data | None] = [None]
    if exact and subject.fitted.problem.rows is not None:
        questions.append(subject.reference.some(3))
    for data in questions:
        asked = subject.data if data is None else data
        what = f"posterior given {'the data fitted to' if data is None else 'other data'}"
        draws = subject.draws(Query.POSTERIOR, settings.draws if exact else settings.draws // 4, data=data)
        laws, joint = posterior(asked), subject.reference.joint(asked)
        share = settings.alpha / (len(laws) + len(joint))
        _require_shapes(draws, laws)
        for site, law in laws.items():
            if exact:
                assert_law(draws[site], law, alpha=share, what=f"{what}, site {site!r}")
            else:
                assert_roughly(
                    draws[site], law, settings.tolerance, alpha=share, what=f"{what}, site {site!r}"
                )
        for name, (function, expected) in joint.items() if exact else ():
            stats.assert_mean(function(draws), expected, alpha=share, what=f"{what}, {name}")


def marginals_are_true(subject: Subject) -> None:
    """Marginal laws are the exact ones, in mean and variance; offered as an estimate, roughly."""
    subject.require(Query.MARGINALS)
    posterior = subject.reference.posterior
    if posterior is None or not subject.structure.latents:
        raise NotApplicable("no exact posterior is known" if posterior is None else "nothing is latent")
    exact = subject.offer.answers[Query.MARGINALS] is Exactness.EXACT
    laws = subject.ask(Query.MARGINALS)
    for site, law in posterior(subject.data).items():
        truth, answer = (
            moments_of(law),
            moments_of(laws[site], draws=None if exact else subject.settings.draws),
        )
        if answer[0].shape != truth[0].shape:
            raise NotApplicable("a marginal has the wrong shape: see shapes_of_marginals")
        sd = truth[1].sqrt()
        mean_error, sd_error = (answer[0] - truth[0]).abs(), (answer[1].sqrt() - sd).abs()
        slack = _EXACT_TO * (1 + truth[0].abs()) if exact else subject.settings.tolerance * sd
        spread = _EXACT_TO * (1 + sd) if exact else 2 * subject.settings.tolerance * sd
        _claim(
            bool((mean_error <= slack).all()),
            f"marginal of {site!r}: the mean is off by {_worst(mean_error, sd)} posterior standard "
            "deviations",
        )
        _claim(
            bool((sd_error <= spread).all()),
            f"marginal of {site!r}: the standard deviation is off by {_worst(sd_error, sd)} of itself",
        )
        if exact and not _is_finite_law(law) and not tuple(laws[site].event_shape):
            value = (truth[0] + 0.7 * sd).float()
            error = (laws[site].log_prob(value).double() - law.log_prob(value.double())).abs()
            _claim(
                bool((error <= 1e-3).all()),
                f"marginal of {site!r}: its log density is off by {float(error.max()):.2g} somewhere",
            )


def samples_are_true(subject: Subject) -> None:
    """Draws by `sample` have the exact law of the program, site by site; offered as an estimate, roughly."""
    subject.require(Query.SAMPLE)
    predictive = subject.reference.predictive
    if predictive is None:
        raise NotApplicable("no exact law is known")
    settings = subject.settings
    exact = subject.offer.answers[Query.SAMPLE] is Exactness.EXACT and subject.reference.best is None
    drawn = subject.draws(Query.SAMPLE, settings.draws if exact else settings.draws // 4)
    laws = predictive()
    _require_shapes(drawn, laws)
    for site, law in laws.items():
        if exact:
            assert_law(drawn[site], law, alpha=settings.alpha / len(laws), what=f"sample, site {site!r}")
        else:
            assert_roughly(
                drawn[site],
                law,
                settings.tolerance,
                alpha=settings.alpha / len(laws),
                what=f"sample, site {site!r}",
            )


def learns(subject: Subject) -> None:
    """Where the optimum of what is learned is known, the fit comes within 0.05 nats per row of it."""
    best = subject.reference.best
    subject.require(Query.LOG_PROB)
    if best is None:
        raise NotApplicable("nothing is to be learned")
    estimate = subject.log_prob()
    if estimate.kind in (Exactness.UNNORMALIZED, Exactness.SURROGATE):
        raise NotApplicable(f"log_prob is {estimate.kind.value}")
    if not bool(torch.isfinite(estimate.value).all()):
        raise NotApplicable("log_prob is not finite: see answers_are_finite")
    reached = float(estimate.value.mean())
    _claim(
        reached > best - 0.05,
        f"after {subject.settings.run.steps} steps, the data has {reached:.3f} nats per row; {best:.3f} "
        "can be reached",
    )
    _claim(
        reached < best + 1e-3 or estimate.kind is not Exactness.EXACT,
        f"the data has {reached:.3f} nats per row, more than any parameters could give it ({best:.3f})",
    )


# --- judging ---


def _judge(subject: Subject, estimate: Estimate, truth: Tensor, what: str) -> None:
    """Hold an estimate against the truth by what it says that it is."""
    value, stderr, alpha = estimate.value.double(), estimate.stderr, subject.settings.alpha
    if value.shape != truth.shape:
        raise NotApplicable("log_prob has the wrong shape: see shapes_of_log_prob")
    if not bool(torch.isfinite(value).all()):
        raise NotApplicable("log_prob is not finite: see answers_are_finite")
    error = value - truth
    if estimate.kind is Exactness.EXACT:
        slack = _EXACT_TO * truth.abs().clamp_min(1.0)
        _claim(
            bool((error.abs() <= slack).all()),
            f"{what} is offered as exact, and is off by {_signed(error)} nats",
        )
    elif estimate.kind is Exactness.LOWER_BOUND:
        stats.assert_lower_bound(
            value, truth, stderr, alpha=alpha, what=f"{what} is offered as a lower bound"
        )
    elif estimate.kind is Exactness.UPPER_BOUND:
        stats.assert_lower_bound(
            -value, -truth, stderr, alpha=alpha, what=f"{what} is offered as an upper bound (negated)"
        )
    elif estimate.kind is Exactness.ESTIMATE:
        solver = estimate.solver_error
        if stderr is None and solver is None:
            raise AssertionError(
                f"{what} is an estimate without a standard error; say how far it may be off: "
                "Estimate(..., stderr=...), or solver_error=... where nothing is random"
            )
        stderr = torch.zeros_like(value) if stderr is None else stderr.double()
        # What the solver owns to comes first, and, as the logarithm of an unbiased estimate is low by about half its
        # variance, that.
        owned = stderr.square() + (0.0 if solver is None else solver.double())
        forgiven = torch.minimum(error.abs(), owned)
        stats.assert_estimate(value - error.sign() * forgiven, truth, stderr, alpha=alpha, what=what)
    elif estimate.kind is Exactness.UNNORMALIZED:
        if stderr is None:
            _claim(
                bool((error - error[0]).abs().max() < 1e-3),
                f"{what} is offered up to a constant, and differs from the truth by {error.tolist()}",
            )
            return
        apart, owned = error - error[0], stderr.double().square()
        forgiven = torch.minimum(apart.abs(), owned + owned[0])  # as above
        both = (owned + owned[0]).sqrt()
        stats.assert_estimate(
            apart - apart.sign() * forgiven,
            torch.zeros_like(apart),
            both,
            alpha=alpha,
            what=f"{what}, up to a constant",
        )


def _require_shapes(draws: Mapping[str, Tensor], laws: Laws) -> None:
    for site, law in laws.items():
        if site not in draws or tuple(draws[site].shape[1:]) != tuple(law.batch_shape):
            raise NotApplicable(f"draws of {site!r} have the wrong shape or are missing: see shapes_of_draws")


def assert_law(draws: Tensor, law: Any, *, alpha: float, what: str) -> None:
    """Assert that independent draws have a law: by frequencies if it is finite, by normal scores if not.

    The normal score of a draw is the standard normal quantile of its distribution function: whatever the law,
    scores have mean zero and variance one exactly, so that the tests of both keep their error rate for heavy
    tails too.
    """
    if _is_finite_law(law):
        stats.assert_frequencies(draws, _table(law), alpha=alpha, what=what)
        return
    _claim(
        bool(law.support.check(draws.double()).all()),
        f"{what}: a draw lies outside the support {law.support}",
    )
    u = _cdf(law, draws.double())
    stats.assert_distribution(u, lambda p: p, alpha=alpha / 2, what=what)
    scores = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
    stats.assert_moments(scores, 0.0, 1.0, alpha=alpha / 2, what=f"{what}, as normal scores")


def assert_roughly(draws: Tensor, law: Any, tolerance: float, *, alpha: float, what: str) -> None:
    """Assert that draws, perhaps dependent, have about the mean and spread of a law."""
    mean, variance = moments_of(law)
    sd = variance.sqrt()
    x = draws.double()
    stats.assert_mean(x, mean, std=sd, slack=tolerance * sd, alpha=alpha / 2, what=f"{what}: mean")
    if not _is_finite_law(law):
        spread = (x - x.mean(0)).square() / variance
        low, high = (1 - 2 * tolerance) ** 2, (1 + 2 * tolerance) ** 2
        middle, slack = (low + high) / 2, (high - low) / 2
        stats.assert_mean(spread, middle, slack=slack, alpha=alpha / 2, what=f"{what}: variance, relative")


def _is_finite_law(law: Any) -> bool:
    """Whether a law is on the values 0, 1, ..., K-1 (an empirical one lists its draws, whatever they are)."""
    return bool(getattr(law, "has_enumerate_support", False)) and not isinstance(law, dist.Empirical)


def _table(law: Any) -> Tensor:
    """Probabilities of the values 0, 1, ... of a law on finitely many, `[..., K]`."""
    support = law.enumerate_support(expand=False)
    return law.log_prob(support).exp().movedim(0, -1).double()


def moments_of(law: Any, draws: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance: by its table if the law is finite, from draws if it must be and may be."""
    if _is_finite_law(law):
        table = _table(law)
        values = torch.arange(table.shape[-1], dtype=torch.float64)
        mean = (table * values).sum(-1)
        return mean, (table * values.square()).sum(-1) - mean.square()
    try:
        return law.mean.detach().double(), law.variance.detach().double()
    except NotImplementedError:
        if draws is None:
            raise AssertionError(
                f"{type(law).__name__} was offered as exact, and has no mean and variance"
            ) from None
        with isolated(0):
            drawn = law.sample((draws,)).double()
        return drawn.mean(0), drawn.var(0)


def _cdf(law: Any, x: Tensor) -> Tensor:
    """The distribution function; on the unit interval by the trapezoidal rule where torch has none."""
    try:
        return law.cdf(x)
    except NotImplementedError:
        grid = torch.linspace(0.0, 1.0, 4001, dtype=torch.float64)
        inside = grid.clamp(1e-9, 1 - 1e-9)
        density = law.log_prob(inside.reshape(-1, *[1] * len(law.batch_shape))).exp()
        total = torch.cumulative_trapezoid(density, grid, dim=0)
        total = torch.cat([torch.zeros_like(total[:1]), total])
        place = x.clamp(0.0, 1.0) * 4000
        low = place.floor().long().clamp_max(3999)
        left, right = total.gather(0, low), total.gather(0, low + 1)
        return left + (place - low) * (right - left)


def _worst(error: Tensor, scale: Tensor) -> str:
    return f"{float((error / scale.clamp_min(1e-12)).max()):.2g}"


def _signed(error: Tensor) -> str:
    return f"{float(error[error.abs().argmax()]):+.3g}" if math.isfinite(float(error.abs().max())) else "nan"

"""Checks of shape: one value per row, one entry per draw, the dtype of the data, finite numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgen.capability import Estimate, Exactness, Query
from pgen.testing.checks_contract import _claim, _said
from pgen.testing.problems import Data, Laws
from pgen.testing.subject import NotApplicable, Subject


def shapes_of_draws(subject: Subject) -> None:
    """`sample` and `posterior` give every site that they should, `[n, ...]`, for n = 1 too."""
    reference, asked = subject.reference, False
    if Query.SAMPLE in subject.offer.answers:
        expected = _shapes(None if reference.predictive is None else reference.predictive())
        for n in (1, 7):
            drawn, asked = subject.draws(Query.SAMPLE, n), True
            sites = [s for s in subject.structure.sites if not subject.structure.sites[s].factor]
            _claim_shapes("sample", drawn, sites, expected, n)
    if Query.POSTERIOR in subject.offer.answers:
        expected = _shapes(None if reference.posterior is None else reference.posterior(subject.data))
        for n in (1, 7):
            drawn, asked = subject.draws(Query.POSTERIOR, n), True
            _claim_shapes("posterior", drawn, list(subject.structure.latents), expected, n)
    if not asked:
        raise NotApplicable("no draws are offered")


def shapes_of_log_prob(subject: Subject) -> None:
    """`log_prob` gives an `Estimate`, one value per row (a single one where a latent ties the rows)."""
    subject.require(Query.LOG_PROB)
    sizes: list[tuple[Data | None, int]] = [(None, _rows(subject, subject.data))]
    if subject.fitted.problem.rows is not None:
        one = subject.reference.some(1)
        sizes.append((one, _rows(subject, one)))
    for data, rows in sizes:
        estimate = subject.log_prob(data=data)
        _claim(
            isinstance(estimate, Estimate), f"log_prob gave {type(estimate).__name__}; expected pgen.Estimate"
        )
        shape = tuple(estimate.value.shape)
        _claim(shape == (rows,), f"log_prob has shape {shape}; expected ({rows},)")
        if estimate.stderr is not None:
            _claim(
                estimate.stderr.shape == shape,
                f"stderr has shape {tuple(estimate.stderr.shape)}; expected that of the value, {shape}",
            )
        _claim(
            estimate.measure == subject.structure.measure,
            f"log_prob says that it is a {estimate.measure}; the observed sites make it a "
            f"{subject.structure.measure}",
        )


def shapes_of_marginals(subject: Subject) -> None:
    """`marginals` gives the law of every latent site; its draws have the shape that the site has."""
    subject.require(Query.MARGINALS)
    laws = subject.ask(Query.MARGINALS)
    missing = [s for s in subject.structure.latents if s not in laws]
    _claim(not missing, f"marginals lacks the sites {missing}")
    if subject.reference.posterior is None:
        raise NotApplicable("no exact answer is known")
    for site, law in subject.reference.posterior(subject.data).items():
        shape = tuple(laws[site].batch_shape) + tuple(laws[site].event_shape)
        _claim(
            shape == tuple(law.batch_shape),
            f"the marginal of {site!r} is over shape {shape}; expected {tuple(law.batch_shape)}",
        )


def answers_are_finite(subject: Subject) -> None:
    """No answer holds NaN or an infinity."""
    fitted = subject.fitted
    if Query.LOG_PROB in fitted.offer.answers:
        estimate = subject.log_prob()
        _claim_finite("log_prob", estimate.value)
        if estimate.stderr is not None:
            _claim_finite("the standard error of log_prob", estimate.stderr)
    for query in (Query.SAMPLE, Query.POSTERIOR):
        if query in fitted.offer.answers:
            for site, value in subject.draws(query, 7).items():
                _claim_finite(f"{query.value} at {site!r}", value)


def keeps_double_precision(subject: Subject) -> None:
    """Data in float64 is accepted, and log probabilities of it are in float64."""
    subject.require(Query.LOG_PROB)
    _ = subject.fitted
    data = {k: v.double() for k, v in subject.data.items()}
    try:
        fitted = subject.short_fit(data=data)
        estimate: Any = subject.ask_bare(Query.LOG_PROB, 0, fitted)
    except Exception as error:
        raise AssertionError(f"data in float64 is not accepted: {_said(error)}") from error
    _claim(
        estimate.value.dtype == torch.float64,
        f"log_prob of float64 data is {estimate.value.dtype}; follow the dtype of the data",
    )
    truth = subject.reference.log_prob
    if truth is None or estimate.kind is not Exactness.EXACT or estimate.value.shape != truth(data).shape:
        return
    single = (subject.log_prob().value.double() - truth(subject.data)).abs().max()
    error = (estimate.value - truth(data)).abs().max()
    if single < 1e-4:  # otherwise it is wrong in any precision
        _claim(
            bool(error < 1e-5), f"log_prob of float64 data, offered as exact, is off by {float(error):.2g}"
        )


def rows_do_not_mix(subject: Subject) -> None:
    """The exact log probability of a row does not depend on which other rows are asked about."""
    subject.require(Query.LOG_PROB)
    rows = _rows(subject, subject.data)
    if subject.fitted.problem.rows is None or rows == 1:
        raise NotApplicable("the rows belong together")
    whole = subject.log_prob()
    if whole.kind is not Exactness.EXACT or whole.value.shape != (rows,):
        raise NotApplicable("log_prob is not offered as exact")
    part = subject.log_prob(data=subject.reference.some(3)).value
    same = torch.allclose(part, whole.value[:3], rtol=1e-4, atol=1e-4, equal_nan=True)
    _claim(same, f"three rows alone have log_prob {part.tolist()}, among others {whole.value[:3].tolist()}")


def _rows(subject: Subject, data: Data) -> int:
    """How many values `log_prob` must give."""
    structure = subject.structure
    tied = not structure.data_plates or any(not structure.local(s) for s in structure.latents)
    return 1 if tied else len(next(iter(data.values())))


def _shapes(laws: Laws | None) -> dict[str, tuple[int, ...]]:
    return {} if laws is None else {site: tuple(law.batch_shape) for site, law in laws.items()}


def _claim_shapes(
    query: str, drawn: Any, sites: list[str], expected: dict[str, tuple[int, ...]], n: int
) -> None:
    missing = [s for s in sites if s not in drawn]
    _claim(not missing, f"{query} lacks the sites {missing}")
    for site in sites:
        shape = tuple(drawn[site].shape)
        wanted = (n, *expected[site]) if site in expected else (n,)
        _claim(
            shape == wanted or (site not in expected and shape[:1] == wanted),
            f"{query}({n}) at {site!r} has shape {shape}; expected {wanted}",
        )


def _claim_finite(what: str, value: Tensor) -> None:
    bad = value.double()[~torch.isfinite(value.double())]
    _claim(not bad.numel(), f"{what} holds {bad[:1].tolist()}")

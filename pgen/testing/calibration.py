r"""Simulation-based calibration of any program by any backend.

Draw latents and data from the program itself, $\theta \sim p(\theta)$, $y \sim p(y | \theta)$, and let a backend infer
the latents from the data. Where its posterior is right, truth and posterior draws are exchangeable,

.. math:: \theta, \theta_1, \ldots, \theta_L \mid y \;\text{i.i.d.} \sim p(\theta | y),

so that the rank of any quantity $f(\theta, y)$ among $f(\theta_1, y), \ldots, f(\theta_L, y)$ is uniform on
$0, \ldots, L$. Over many simulated data sets, ranks that are not uniform convict the backend and say how it errs.

References:
    Cook, Gelman & Rubin (2006), Journal of Computational and Graphical Statistics 15(3). Talts, Betancourt, Simpson,
    Vehtari & Gelman (2018), arXiv:1804.06788. Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman & Vehtari
    (2023), The choice of test quantities shapes sensitivity, Bayesian Analysis. Säilynoja, Bürkner & Vehtari (2022),
    Statistics and Computing 32(2).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pgen.capability import Exactness, Offer, Query
from pgen.choice import refusal_text
from pgen.conversion import Adapter, Conversions
from pgen.errors import Diverged, OptionError, Refused, Unanswerable
from pgen.fitted import Fitted
from pgen.fitting import fit, make_backend
from pgen.isolation import isolated, whole_seed
from pgen.problem import Data
from pgen.protocols import Backend, FitsMany
from pgen.registry import Registry
from pgen.run import Run
from pgen.testing.calibration_bands import ranks_of
from pgen.testing.calibration_draws import Ask, thinned
from pgen.testing.calibration_report import LEVELS, Calibration, Coverage
from pgen.testing.calibration_worlds import Quantity, Worlds, coordinates, template

Refit = Literal["auto"] | bool


def sbc(
    program: Callable[..., Any],
    backend: str | Backend | Fitted,
    *,
    data: Data = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    n: int | None = None,
    observed: Sequence[str] = (),
    replicates: int = 200,
    draws: int = 199,
    quantities: Mapping[str, Quantity] | None = None,
    coordinates: int = 32,
    refit: Refit = "auto",
    run: Run | None = None,
    alpha: float = 1e-3,
    seed: int = 0,
) -> Calibration:
    """Check that a backend's posteriors are calibrated, on data sets that the program itself makes up.

    Looked at are every scalar of every latent, the log likelihood and the log joint density of latents and data (where
    all sites have a density: without a quantity that looks at the data, a posterior that ignores it passes), and the
    quantities given. Learned tensors of the program are taken as they are, and not learned: calibration is a property of
    a posterior under one fixed program. To check a fitted program, give `fitted.program`.

    The verdict holds at a family-wise error rate: a right posterior fails with probability `alpha` at most, over all
    quantities. At `alpha=1e-3` and one quantity, a posterior standard deviation 20 % too small is noticed with
    probability 0.6 by 200 data sets and 0.98 by 500, one 20 % too large with 0.25 and 0.88, and a mean off by 0.3
    posterior standard deviations with 0.7 and 0.998.

    Args:
        program: any Pyro program that can be drawn from, without factors.
        backend: a name, a backend, or what `pgen.fit` gave: that very fit is then asked about every data set
            (of `fitted.program`, where it learned something).
        data: as for `pgen.fit`. Which sites are observed, their shapes, missing values and the inputs of the program are
            taken from it; observed values only count where something is fitted once (`refit=False`).
        args: passed to the program unchanged.
        kwargs: passed to the program unchanged.
        n: rows, for a program that takes their number and is given no data.
        observed: further sites to observe, in the shape that the program gives them.
        replicates: data sets, R.
        draws: posterior draws that each truth is ranked among, L. Draws of chains are continued and thinned until so
            many are worth as many independent ones.
        quantities: further functions of draws by latent site (`[n, ...]` each) and data by observed site, giving
            `[n, ...]`.
        coordinates: scalars of one site looked at, at most; of more, evenly spread ones.
        refit: whether to fit every data set. "auto": unless a fit holds nothing learned from its data, as an exact one of
            a program without parameters, or the backend fits many data sets together (see `pgen.protocols.FitsMany`).
            False: fit once, to `data`, and ask that fit: right for guides that read data
            (`objective="forward-kl"`, or local latents only).
        run: how to fit.
        alpha: probability of a false alarm, in all.
        seed: makes everything repeatable.

    Returns:
        `.passed`, `.rows` (p-value and what is wrong, in words), `.coverage()`; prints as a table.
        `pgen.pictures.rank_ecdf` draws it.

    Raises:
        ProgramError: the program cannot be drawn from.
        Refused: the backend cannot serve it.
        Unanswerable: the backend offers no posterior.
        Diverged: draws that are not numbers.
        OptionError: an option has a value that it cannot have.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def coin(n):
        ...     fair = pyro.sample("fair", dist.Bernoulli(0.7))
        ...     with pyro.plate("data", n):
        ...         pyro.sample("x", dist.Bernoulli(0.9 - 0.4 * fair))
        >>> found = sbc(coin, "exact", n=8, observed=["x"], replicates=20)
        >>> found.passed, [row.quantity for row in found]
        (True, ['fair', 'log likelihood', 'log joint'])
    """
    run = Run() if run is None else run
    _require_options(run, replicates, draws, coordinates, refit, alpha)
    seed = whole_seed(seed)
    with isolated(seed, run.precision):
        problem, structure = template(program, data, args, kwargs, n, observed, run)
        worlds = Worlds.drawn(problem, structure, replicates)
        seeds = torch.randint(2**62, (replicates,)).tolist()
        noise = torch.Generator().manual_seed(seed)
    source = _source(backend, worlds, refit, run, draws, seeds)
    names: tuple[str, ...] = ()
    ranks: list[Tensor] = []
    needs, short = [float(draws)], 0
    for index, ask in enumerate(_shown(source.posteriors, replicates, run)):
        try:
            first = (
                draws if index == 0 or source.independent else math.ceil(1.2 * statistics.median(needs[1:]))
            )
            drawn, need, enough = thinned(ask, structure.latents, draws, first, source.independent)
            names, values = _quantities(worlds, index, drawn, coordinates, quantities or {})
        except Exception as error:
            error.add_note(f"in data set {index} of pgen.testing.sbc")
            raise
        needs.append(need)
        short += not enough
        ranks.append(ranks_of(values[0], values[1:], noise))
    return Calibration(
        structure.name, source.name, names, torch.stack(ranks), draws, alpha, short, source.how
    )


def coverage(
    program: Callable[..., Any],
    backend: str | Backend | Fitted,
    *,
    levels: Sequence[float] = LEVELS,
    data: Data = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    n: int | None = None,
    observed: Sequence[str] = (),
    replicates: int = 200,
    draws: int = 199,
    quantities: Mapping[str, Quantity] | None = None,
    coordinates: int = 32,
    refit: Refit = "auto",
    run: Run | None = None,
    alpha: float = 1e-3,
    seed: int = 0,
) -> Coverage:
    """How often central posterior intervals hold the truth, on data sets that the program itself makes up.

    Args:
        program: as for `sbc`, with all that follows.
        backend: a name, a backend, or a fit.
        levels: probabilities that the intervals should have.
        data: which sites are observed, and in what shape.
        args: passed to the program unchanged, as are `kwargs`.
        kwargs: likewise.
        n: rows.
        observed: further sites to observe.
        replicates: data sets.
        draws: posterior draws of each.
        quantities: further functions of draws and data.
        coordinates: scalars of one site looked at, at most.
        refit: whether to fit every data set.
        run: how to fit.
        alpha: probability of a false alarm, in all.
        seed: makes everything repeatable.

    Returns:
        `.passed`, `.rows` (nominal and empirical coverage, with a binomial interval); prints as a table.
    """
    found = sbc(
        program,
        backend,
        data=data,
        args=args,
        kwargs=kwargs,
        n=n,
        observed=observed,
        replicates=replicates,
        draws=draws,
        quantities=quantities,
        coordinates=coordinates,
        refit=refit,
        run=run,
        alpha=alpha,
        seed=seed,
    )
    return found.coverage(levels)


# --- how every data set gets its posterior ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A way to ask for posterior draws, for each data set in turn; whether draws are independent."""

    name: str
    how: str
    independent: bool
    posteriors: Iterator[Ask]


def _source(
    backend: str | Backend | Fitted, worlds: Worlds, refit: Refit, run: Run, draws: int, seeds: Sequence[int]
) -> _Source:
    quiet = replace(run, progress=False, observers=(), directory=None, checkpoint_every=None)
    if isinstance(backend, Fitted):
        if refit is True:
            raise OptionError("refit=True, and backend is a fit already; give the backend: fitted.backend")
        return _asked(backend, worlds, seeds, "one fit, asked about each")
    chosen = make_backend(backend) if isinstance(backend, str) else backend
    structure = replace(worlds.structure, conversions=Conversions(Registry.installed().conversions))
    offer = chosen.examine(structure)
    if not isinstance(offer, Offer):
        raise Refused(f"backend {chosen.name!r} cannot fit {structure.name}: {refusal_text(offer)}", offer)
    _require_posterior(chosen.name, offer)
    exact = offer.answers[Query.POSTERIOR] is Exactness.EXACT
    problem = worlds.problem
    if refit == "auto" and isinstance(chosen, FitsMany):
        ways = {s: Adapter(tuple(map(structure.conversions.named, path))) for s, path in offer.paths.items()}
        adapted, seeded = replace(problem, adapters=ways), replace(quiet, seed=seeds[0])
        with isolated(seeds[0], run.precision):
            found = chosen.posteriors(adapted, structure, seeded, worlds.observed, draws)
        if found is not None:
            return _Source(chosen.name, "fitted together", exact, map(_given, found))

    def fitted_to(data: Data, seed: int) -> Fitted:
        return fit(
            problem.program, data, chosen, args=problem.args, kwargs=problem.kwargs, run=quiet, seed=seed
        )

    if refit is False:
        once = fitted_to({**problem.inputs, **problem.observations}, seeds[0])
        return _asked(once, worlds, seeds, "fitted once, asked about each")
    first = fitted_to(worlds.data(0), seeds[0])
    if refit == "auto" and not first._answers.tensors():
        return _asked(first, worlds, seeds, "nothing to learn, asked about each")

    def refitted() -> Iterator[Ask]:
        yield _posterior_of(first, seeds[0])
        for index in range(1, worlds.count):
            yield _posterior_of(fitted_to(worlds.data(index), seeds[index]), seeds[index])

    return _Source(chosen.name, "fitted one by one", exact, refitted())


def _asked(fitted: Fitted, worlds: Worlds, seeds: Sequence[int], how: str) -> _Source:
    """One fit; data sets differ in values only, so that the structure of the first is that of all."""
    _require_posterior(fitted.backend.name, fitted.offer)
    first, structure = fitted._asked(worlds.data(0))

    def about(index: int) -> Ask:
        world = worlds.at(index)
        problem = replace(first, inputs=world.inputs, observations=world.observations)

        def ask(n: int) -> Mapping[str, Tensor]:
            with fitted._isolated(seeds[index]):
                return fitted._answers.posterior(problem, structure, n)

        return ask

    exact = fitted.offer.answers[Query.POSTERIOR] is Exactness.EXACT
    return _Source(fitted.backend.name, how, exact, map(about, range(worlds.count)))


def _posterior_of(fitted: Fitted, seed: int) -> Ask:
    return lambda n: fitted.posterior(n=n, seed=seed)


def _given(found: Mapping[str, Tensor]) -> Ask:
    return lambda n: found


def _require_posterior(name: str, offer: Offer) -> None:
    if Query.POSTERIOR not in offer.answers:
        raise Unanswerable(
            f"backend {name!r} offers no posterior here, so that there is nothing to calibrate"
        )


# --- quantities --------------------------------------------------------------------------------------------------


def _quantities(
    worlds: Worlds, index: int, drawn: Mapping[str, Tensor], most: int, given: Mapping[str, Quantity]
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the scalars, and their values `[1 + L, Q]`: of the truth, then of each draw."""
    both = {}
    for site, truth in worlds.latents.items():
        both[site] = torch.cat([truth[index][None], drawn[site].to(truth).reshape(-1, *truth.shape[1:])])
        if bool(both[site].isnan().any()):
            raise Diverged(f"draws of {site!r} are not numbers (NaN)")
    seen = {site: values[index] for site, values in worlds.observed.items()}
    further = {name: function(both, seen) for name, function in given.items()}
    columns = {
        name: values[site].reshape(len(values[site]), -1)[:, i].double()
        for values in (both, further)
        for name, site, i in coordinates(values, most)
    }
    columns |= worlds.log_terms(index, both)
    return tuple(columns), torch.stack([v.cpu() for v in columns.values()], 1)


# --- options --------------------------------------------------------------------------------------------------------


def _require_options(
    run: Run, replicates: int, draws: int, coordinates: int, refit: Refit, alpha: float
) -> None:
    least = {"replicates": (replicates, 20), "draws": (draws, 9), "coordinates": (coordinates, 1)}
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise OptionError(f"{name}={value!r}: expected a whole number from {low} on")
    if refit not in (True, False, "auto"):
        raise OptionError(f"refit={refit!r}: expected True, False or 'auto'")
    if not 0 < alpha < 1:
        raise OptionError(f"alpha={alpha!r}: expected a probability between 0 and 1")
    if not isinstance(run, Run):
        raise OptionError(f"run is {type(run).__name__}; expected a pgen.Run, as in run=pgen.Run(steps=500)")


def _shown(asks: Iterator[Ask], count: int, run: Run) -> Iterator[Ask]:
    """The same, with a progress bar where the run has one."""
    shown = sys.stderr.isatty() if run.progress is None else run.progress
    return iter(
        track(
            asks, "calibration", total=count, disable=not shown, console=Console(stderr=True), transient=True
        )
    )

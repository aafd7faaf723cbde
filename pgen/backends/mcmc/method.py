"""The MCMC backend: its options, what it needs of a program, and how a fit goes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import Kernel
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.stochastic import SGHMC, SGLD
from pgen.algorithms.record import NotRecorded, Recorded
from pgen.algorithms.tempering import ParallelTempering
from pgen.backends.mcmc import start
from pgen.backends.mcmc.annealed import Particles, Tempered
from pgen.backends.mcmc.answers import Posterior, Sampled
from pgen.backends.mcmc.chains import Chains
from pgen.backends.mcmc.discrete import first_choices, in_turn, values_of
from pgen.backends.mcmc.evidence import evidence
from pgen.backends.mcmc.ledger import Ledger, Memory, Shards, digest
from pgen.backends.mcmc.many import many
from pgen.backends.mcmc.needs import Needs, needs, offer
from pgen.backends.mcmc.samplers import KERNELS, Idle, Options, sampler_of
from pgen.capability import Offer, Refusal
from pgen.density import Density
from pgen.errors import OptionError
from pgen.evaluation import Functions, functions_of
from pgen.observers import Audience
from pgen.problem import Problem
from pgen.registry import hookimpl
from pgen.run import Run
from pgen.structure import Structure

_MICROSECONDS = 1.5  # of an operation on few numbers
_NANOSECONDS = 0.7  # of each number, where there are many
_FEWEST, _MOST = 32, 128
_ENOUGH = 20_000  # draws in all
_FEWER = ((8000, 100), (2000, 200))  # draws of each chain, for programs of more operations than that
_POOLING = 16  # chains from which on they learn enough from each other for ChEES


@dataclass(frozen=True)
class MCMC:
    r"""Sample the posterior by Markov chains, many side by side.

    Exact in the long run, whatever the shape of the posterior; `fitted.summary()` says how far the run is from it.
    Latents with constraints are moved on unconstrained vectors; finite ones are summed out, and drawn given the rest.

    Attributes:
        kernel: `"auto"`, a name, or a kernel object (of `pgen.algorithms.kernels`, or any with `init` and `step`).
            `"nuts"`, `"hmc"`, `"chees"`, `"meads"`: Hamiltonian (auto: `"chees"` for 16 chains or more, else `"nuts"`); `"mala"`, `"ula"`: Langevin; `"random-walk"`: needs no
            gradient; `"sgld"`, `"sghmc"`: gradients of mini-batches, biased; `"tempering"`: for separated modes;
            `"smc"`: tempered particles.
        chains: how many, side by side; None: as many as cost little more than one, 32 to 128 (4 where the program
            can only be run for one after the other).
        warmup: iterations before the first draw; None: what the kernel needs.
        draws: of each chain; None: 20,000 in all, and 400 to 1,000 of each (100 to 200 for programs of thousands of
            operations, such as long loops).
        thin: keep every so many-th draw.
        target_accept: acceptance that the step size is tuned to; None: what suits the kernel.
        metric: `"auto"`, `"dense"` (learns correlations) or `"diagonal"`.
        max_depth: of the trees of NUTS.
        step_size: of "ula", "sgld" and "sghmc", which do not adapt it; in unconstrained units.
        init: where chains begin: `"uniform"` (so does `"auto"`) on (-2, 2) in unconstrained space, `"prior"`, `"pathfinder"`, values by
            site, or another fit of the same latents, whose posterior draws they then are.
        enumerate: `"auto"`: finite latents are summed out where they can be; `"none"`: drawn in turn.
        islands: groups of particles for `log_prob`, whose spread gives its standard error.
        via: conversions to go through, by site.

    Example:
        >>> MCMC(kernel="nuts", chains=4, draws=1000).draws
        1000
        >>> MCMC(kernel="nut")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: MCMC(kernel='nut'): expected one of 'auto', ...

    References:
        Hoffman & Gelman (JMLR 2014), Betancourt (2017), Phan, Pradhan & Jankowiak (2019), Hoffman, Radul & Sountsov
        (AISTATS 2021), Hoffman & Sountsov (AISTATS 2022).
    """

    name: ClassVar[str] = "mcmc"

    kernel: str | Kernel = "auto"
    chains: int | None = None
    warmup: int | None = None
    draws: int | None = None
    thin: int = 1
    target_accept: float | None = None
    metric: Literal["auto", "dense", "diagonal"] = "auto"
    max_depth: int = 10
    step_size: float = 0.01
    init: str | Mapping[str, Any] | Any = "auto"
    enumerate: Literal["auto", "none"] = "auto"
    islands: int = 16
    via: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that options cannot have."""
        if isinstance(self.kernel, str):
            self._one_of("kernel", ("auto", *KERNELS), "or a kernel object")
        elif not (hasattr(self.kernel, "init") and hasattr(self.kernel, "step")):
            raise self._wrong(
                "kernel", "a name, or an object with init(position, target) and step(state, tuning, target)"
            )
        for option in ("chains", "draws", "warmup"):
            if getattr(self, option) is not None:
                self._whole(option, 0 if option == "warmup" else 1)
        self._whole("thin", 1)
        self._whole("max_depth", 1)
        self._whole("islands", 2)
        if self.target_accept is not None and not 0 < self.target_accept < 1:
            raise self._wrong("target_accept", "a number between 0 and 1")
        self._one_of("metric", ("auto", "dense", "diagonal"))
        self._one_of("enumerate", ("auto", "none"))
        if isinstance(self.init, str):
            self._one_of("init", ("auto", "uniform", "prior", "pathfinder"), "values by site, or another fit")

    def _one_of(self, option: str, values: tuple[str, ...], more: str = "") -> None:
        if getattr(self, option) not in values:
            raise self._wrong(option, f"one of {', '.join(map(repr, values))} {more}".rstrip())

    def _whole(self, option: str, least: int) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(option, f"a whole number of at least {least}")

    def _wrong(self, option: str, expected: str) -> OptionError:
        return OptionError(f"MCMC({option}={getattr(self, option)!r}): expected {expected}")

    @property
    def _subsampled(self) -> bool:
        return self.kernel in ("sgld", "sghmc") or isinstance(self.kernel, (SGLD, SGHMC))

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Needs a density at every site, and latents that are continuous or finite."""
        found = self._needs(structure)
        if isinstance(found, Refusal):
            return found
        tied = not structure.data_plates or any(not structure.local(s) for s in structure.latents)
        kernel = self.kernel if isinstance(self.kernel, str) else type(self.kernel).__name__
        kernel = self._kernel_for(self.chains) if kernel == "auto" else kernel
        return offer(structure, found, kernel, tied and not found.flipped)

    def _needs(self, structure: Structure) -> Needs | Refusal:
        return needs(structure, self.via, enumerated=self.enumerate == "auto", subsampled=self._subsampled)

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Posterior:
        """Warm the chains up and draw."""
        fitted = self._sampled(problem, structure, run, run.directory)
        answers = Posterior(fitted, partial(self._others, run), partial(evidence, self.islands))
        if run.steps != 0:
            audience = fitted.chains.audience
            audience.start(run, fitted.chains.sampler.warmup + fitted.draws)
            fitted.chains.extend(fitted.draws)
            answers.history = fitted.chains.history()
            audience.finish(answers.history)
        return answers

    def posteriors(
        self, problem: Problem, structure: Structure, run: Run, data: Mapping[str, Tensor], n: int
    ) -> list[dict[str, Tensor]] | None:
        """Draws for each of R data sets `[R, ...]`, all chains of all of them in one batch; see `FitsMany`."""
        found = self._needs(structure)
        if isinstance(found, Refusal) or found.flipped:
            return None
        density = Density.of(problem.whole(), structure, found.summed)
        if not density.size:  # nothing moves: posteriors are drawn at once, one after the other
            return None
        lift = run.precision in (None, "float64") and problem.device.type == "cpu"
        chains = min(8, self.chains or 8)
        options = self._options(chains, run.compile is not False, run)
        return many(density, data, lambda target: self._sampler(options, target), chains, n, run.seed, lift)

    def _others(self, run: Run, problem: Problem, structure: Structure) -> Sampled:
        return self._sampled(problem, structure, run, None)

    def _sampled(self, problem: Problem, structure: Structure, run: Run, directory: Any) -> Sampled:
        found = self._needs(structure)
        if isinstance(found, Refusal):
            raise OptionError(found.why)
        density = Density.of(problem.whole(), structure, found.summed, found.flipped)
        lift = run.precision in (None, "float64") and problem.device.type == "cpu"
        dtype = torch.float64 if lift else density.dtype
        recorded = run.compile is not False
        if found.flipped:
            parts = self._in_turn(density, lift, run)
        elif not density.size:
            functions = functions_of(density, recorded=recorded, lift=lift)
            chains = self.chains or 4
            parts = (functions, chains, Idle(chains), lambda: torch.zeros(chains, 0), functions.values)
        else:
            functions = functions_of(density, rows=self._tried(), recorded=recorded, lift=lift)
            target = self._noisy(density, lift, run) if self._subsampled else functions.target
            chains = self._chain_count(functions)
            sampler = self._sampler(
                self._options(chains, functions.way in ("recorded", "in turn"), run), target
            )
            begin = partial(self._start, functions.target, chains, density, dtype)
            parts = (functions, chains, sampler, begin, functions.values)
        functions, chains, sampler, begin, read = parts
        if recorded and functions.way != "recorded":
            slow = "for one chain after the other" if functions.way == "in turn" else "as it is written"
            warnings.warn(
                f"{structure.name} runs {slow}, more slowly: {functions.why}", NotRecorded, stacklevel=4
            )
        ledger = self._ledger(run, directory, problem, structure)
        return Sampled(
            problem,
            structure,
            density,
            functions,
            Chains(sampler, begin, chains, run.seed, ledger, Audience(run.watchers())),
            self._draw_count(chains, functions.cost[0]),
            read,
        )

    def _in_turn(self, density: Density, lift: bool, run: Run) -> tuple[Any, ...]:
        """The parts for latents that are neither moved by gradients nor summed out."""
        if self.kernel not in ("auto", "hmc"):
            raise OptionError(
                f"MCMC(kernel={self.kernel!r}): {', '.join(density.held)} are finite and drawn in turn with the others, which "
                "goes with kernel='auto' or 'hmc'"
            )
        chains = 64 if self.chains is None else self.chains
        options = self._options(chains, run.compile is not False, run)
        sampler = in_turn(density, lift, options.wrap, self.warmup, self.target_accept, self.thin)
        flips = sampler.flips

        def begin() -> Tensor:
            z = first_choices(flips, chains)
            target = partial(_given, sampler.target.continuous, z)
            q = start.uniform(
                target, chains, max(1, density.size), density, torch.float64 if lift else density.dtype
            )
            return torch.cat([q, z.to(q.dtype)], 1)

        functions = Functions(sampler.target.continuous, density.values, "recorded")  # type: ignore[arg-type]
        return functions, chains, sampler, begin, partial(values_of, density, flips)

    def _noisy(self, density: Density, lift: bool, run: Run) -> Any:
        """The density on a batch of rows, another one at every call."""
        rows = density.problem.total or 1
        size = min(run.batch_size or max(32, rows // 10), rows)
        return Recorded(partial(_on_a_batch, density, size), lift=lift)

    def _sampler(self, options: Options, target: Any) -> Any:
        if self.kernel == "tempering":
            return Tempered(ParallelTempering(HMC(steps=8)), target, options.wrap, options.chains, self.thin)
        return (
            Particles(target, options.wrap, options.chains)
            if self.kernel == "smc"
            else sampler_of(options, target)
        )

    def _options(self, chains: int, recorded: bool, run: Run) -> Options:
        return Options(
            self._kernel_for(chains) if self.kernel == "auto" else self.kernel,
            chains,
            self.warmup,
            self.target_accept,
            self.metric,
            self.max_depth,
            self.step_size,
            self.thin,
            recorded,
            run.compile,
        )

    def _tried(self) -> int:
        return self.chains if self.chains is not None else _FEWEST

    def _kernel_for(self, chains: int | None) -> str:
        """What suits so many chains: ChEES learns from all of them, a tree needs none but its own."""
        return "chees" if chains is None or chains >= _POOLING else "nuts"

    def _chain_count(self, functions: Functions) -> int:
        if self.chains is not None:
            return self.chains
        if self.kernel == "smc":
            return 16
        if self.kernel == "tempering":
            return 16
        if functions.way not in ("recorded", "unrecorded"):
            return 4
        operations, numbers = functions.cost
        if operations > _FEWER[-1][0]:  # to record it once more takes longer than more chains would save
            return _FEWEST
        ratio = operations * _MICROSECONDS * 1000 / max(1.0, numbers * _NANOSECONDS)
        return next((c for c in (_MOST, 64) if c <= ratio), _FEWEST)

    def _draw_count(self, chains: int, operations: int) -> int:
        if self.draws is not None:
            return self.draws
        # A program of many operations takes its time for each draw, whatever the number of chains.
        least = next((few for most, few in _FEWER if operations > most), 400)
        return min(1000, max(least, -(-_ENOUGH // chains) if least == 400 else 0))

    def _start(self, target: Any, chains: int, density: Density, dtype: torch.dtype) -> Tensor:
        if isinstance(self.init, Mapping):
            return start.given(self.init, chains, density, dtype)
        # A reference for particles is made from many points, wherever chains would begin.
        count = max(chains, 512) if self.kernel in ("smc", "tempering") else chains
        if not isinstance(self.init, str):
            return start.given(self.init.posterior(n=count, seed=0), count, density, dtype)
        ways = {"prior": start.prior, "pathfinder": start.pathfinder}
        return ways.get(self.init, start.uniform)(target, count, density.size, density, dtype)

    def _ledger(self, run: Run, directory: Any, problem: Problem, structure: Structure) -> Ledger:
        if directory is None:
            return Memory()
        terms = {
            "program": structure.name,
            "data": digest(problem),
            "seed": run.seed,
            "precision": run.precision,
            "backend": repr(replace(self, draws=None)),
        }
        return Shards(Path(directory) / "chains", terms, run.checkpoint_every or 100)


def _given(continuous: Any, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return continuous(q, z)


def _on_a_batch(density: Density, size: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    return density.on_a_batch(positions, size)


@hookimpl
def pgen_backends() -> list[type]:
    """The backend, for the registry."""
    return [MCMC]

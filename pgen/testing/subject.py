"""One backend on one problem, fitted once and asked what each check needs, and watched meanwhile."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import runtime
from torch import Tensor, nn

from pgen.capability import Estimate, Offer, Query, Refusal
from pgen.choice import refusal_text
from pgen.conversion import Conversions
from pgen.fitted import Fitted
from pgen.fitting import fit
from pgen.inspection import inspect_problem
from pgen.problem import Problem
from pgen.protocols import Answers, Backend
from pgen.registry import Registry
from pgen.run import Run
from pgen.structure import Structure
from pgen.testing.problems import Data, Reference

SHORT = 3
"""Steps of the fits that are only looked at for their form."""


class NotApplicable(Exception):
    """This check has nothing to look at: the backend refuses the problem, or does not offer the query."""


@dataclass(frozen=True)
class Settings:
    """How a backend is examined.

    Attributes:
        run: how it is fitted for the checks that compare its answers with the truth.
        alpha: probability that a check of random numbers fails although the backend is right.
        tolerance: error of an offered estimate that passes: of a posterior mean, in posterior standard
            deviations; of a posterior standard deviation, relative, twice that.
        draws: independent draws taken of what is offered as exact; an estimate is judged by a quarter of
            them.
    """

    run: Run
    alpha: float = 1e-6
    tolerance: float = 0.25
    draws: int = 12_000


class Subject:
    """A backend on a reference problem. Fits are made when first needed, and kept."""

    def __init__(self, backend: Backend, reference: Reference, settings: Settings) -> None:
        """Nothing is run yet."""
        self.backend, self.reference, self.settings = backend, reference, settings
        program = reference.program
        self.program = copy.deepcopy(program) if isinstance(program, nn.Module) else program
        self.data: Data = {k: v.clone() for k, v in reference.data.items()}
        self.versions = {k: v._version for k, v in self.data.items()}
        self.weights = weights_of(self.program)
        self.fit_error: Exception | None = None
        self.examine_changed: list[str] = []
        self.trespasses: list[str] = []  # what changed while the backend was at work, inside and outside
        self._asked: dict[Any, Any] = {}

    @functools.cached_property
    def structure(self) -> Structure:
        """The structure of the program, as `pgen.fit` would hand it to the backend."""
        structure, _ = inspect_problem(Problem.of(self.program, self.data))
        return replace(structure, conversions=Conversions(Registry.installed().conversions))

    @functools.cached_property
    def answer(self) -> Offer | Refusal:
        """What the backend says about the program; what saying it changed is noted."""
        graph, sites = self.structure.graph.copy(), dict(self.structure.sites)
        before = observe()
        answer = self.backend.examine(self.structure)
        self.examine_changed += changed(before, observe())
        if (
            graph.nodes != self.structure.graph.nodes
            or graph.edges != self.structure.graph.edges
            or sites != dict(self.structure.sites)
        ):
            self.examine_changed.append("the structure that it was given")
        return answer

    @property
    def offer(self) -> Offer:
        """The offer; the check does not apply if there is none."""
        try:
            answer = self.answer
        except Exception as error:
            raise NotApplicable("examine raised: see examines_without_a_trace") from error
        if isinstance(answer, Refusal):
            raise NotApplicable(f"refused: {refusal_text(answer)}")
        if not isinstance(answer, Offer):
            raise NotApplicable(
                "examine gave neither an offer nor a refusal: see says_what_it_offers_or_lacks"
            )
        return answer

    def require(self, query: Query) -> None:
        """The check does not apply if the query is not offered."""
        if query not in self.offer.answers:
            raise NotApplicable(f"{query.value} is not offered")

    @functools.cached_property
    def _fitted(self) -> Fitted | None:
        try:
            return self.fit(self.settings.run, seed=1)
        except Exception as error:  # whatever it is, one check tells it, and the others pass it by
            self.fit_error = error
            return None

    @property
    def fitted(self) -> Fitted:
        """The fit that is compared with the truth."""
        _ = self.offer
        if self._fitted is None:
            raise NotApplicable(f"fit raised {type(self.fit_error).__name__}: see fits_and_answers")
        return self._fitted

    def fit(self, run: Run, seed: int, data: Data | None = None) -> Fitted:
        """Fit through the public road; changes of global state are noted."""
        with self.watched("pgen.fit"):
            fitted = fit(self.program, self.data if data is None else data, self.spy(), run=run, seed=seed)
        fitted.backend = self.backend
        return fitted

    def spy(self) -> Any:
        """The backend, with an eye on the settings that its `fit` must leave alone."""
        return _Spy(self)

    def short_fit(self, seed: int = 1, data: Data | None = None, again: bool = False) -> Fitted:
        """A fit of a few steps, for what does not depend on how well it learned; `again` makes a twin."""
        _ = self.fitted  # where even that one fails, this one need not be tried
        key = ("fit", seed, again, _key(data))
        if key not in self._asked:
            self._asked[key] = self.fit(replace(self.settings.run, steps=SHORT), seed, data)
        return self._asked[key]

    # --- asking, without the safeguards that `Fitted` puts around a backend ---

    def ask(
        self,
        query: Query,
        n: int = 0,
        *,
        fitted: Fitted | None = None,
        data: Data | None = None,
        seed: int = 2,
    ) -> Any:
        """What the backend itself answers; where it raises, the check does not apply."""
        self.require(query)
        fitted = self.fitted if fitted is None else fitted
        key = (query, n, id(fitted), _key(data), seed)
        if key not in self._asked:
            try:
                self._asked[key] = self.ask_bare(query, n, fitted, data, seed)
            except Exception as error:
                raise NotApplicable(
                    f"{query.value} raised {type(error).__name__}: see fits_and_answers"
                ) from error
        return self._asked[key]

    def ask_bare(self, query: Query, n: int, fitted: Fitted, data: Data | None = None, seed: int = 2) -> Any:
        """The same, letting errors through."""
        problem, structure = fitted._asked(data)
        answers: Answers = fitted._answers
        with (
            self.watched(query.value),
            fitted._isolated(seed),
            self.watched(query.value, inside=True),
        ):
            if query is Query.SAMPLE:
                return dict(answers.sample(n))
            if query is Query.LOG_PROB:
                return fitted.with_error(answers.log_prob(problem, structure), problem, structure)
            if query is Query.POSTERIOR:
                return answers.posterior(problem, structure, n)
            return dict(answers.marginals(problem, structure))

    def log_prob(self, **options: Any) -> Estimate:
        """The backend's log probability of the data."""
        return self.ask(Query.LOG_PROB, **options)

    def draws(self, query: Query, n: int, **options: Any) -> Mapping[str, Tensor]:
        """The backend's draws, by `sample` or `posterior`."""
        return self.ask(query, n, **options)

    @contextmanager
    def watched(self, what: str, inside: bool = False) -> Iterator[None]:
        """Note what changes: everything global or, inside pgen's isolation, what is not lent to a backend."""
        before = observe(inside)
        yield
        self.trespasses += [f"{what} changed {name}" for name in changed(before, observe(inside))]


class _Spy:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.name = subject.backend.name

    def examine(self, structure: Structure) -> Offer | Refusal:
        return self.subject.answer

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Answers:
        with self.subject.watched("fit", inside=True):
            return self.subject.backend.fit(problem, structure, run)


#: settings of the process, which nobody lends to a backend
SETTINGS: dict[str, Callable[[], Any]] = {
    "torch's default dtype": torch.get_default_dtype,
    "torch's default device": torch.get_default_device,
    "torch's gradient mode": torch.is_grad_enabled,
    "torch's number of threads": torch.get_num_threads,
    "torch's deterministic mode": torch.are_deterministic_algorithms_enabled,
    "torch's validation of distributions": lambda: torch.distributions.Distribution._validate_args,
    "Pyro's settings": lambda: dict(pyro.settings.get()),
    "Pyro's handler stack": lambda: [id(handler) for handler in runtime._PYRO_STACK],
}

#: random states and stores, lent to a backend while it fits and answers
STATES: dict[str, Callable[[], Any]] = {
    "torch's random state": torch.get_rng_state,
    "NumPy's random state": lambda: np.random.get_state(),  # noqa: NPY002 - the global one is what is watched
    "Python's random state": lambda: hash(random.getstate()),
    "Pyro's parameter store": lambda: {
        k: v.detach().clone() for k, v in pyro.get_param_store().named_parameters()
    },
}


def observe(inside: bool = False) -> dict[str, Any]:
    """The global state by name; `inside`, only what a backend may not change even for itself."""
    return {name: look() for name, look in (SETTINGS if inside else {**SETTINGS, **STATES}).items()}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two observations."""
    return [name for name in before if not _same(before[name], after[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _key(data: Data | None) -> Any:
    return (
        None
        if data is None
        else tuple((name, str(v.dtype), *v.reshape(-1).tolist()) for name, v in data.items())
    )


def weights_of(program: object) -> dict[str, Tensor]:
    """The weights of the user's module, which a fit trains copies of."""
    return {k: v.clone() for k, v in program.state_dict().items()} if isinstance(program, nn.Module) else {}

"""A fitted program: four queries, each answered as exactly as was offered and no more; saved and loaded without code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pgen import saving
from pgen.calling import name_of, signature_of
from pgen.capability import Capability, Estimate, Offer, Query, Refusal
from pgen.choice import conversions_of
from pgen.completion import completed, evidence, lacking
from pgen.conversion import Adapter
from pgen.draws import Draws
from pgen.errors import DataError, Dishonest, OptionError, Unanswerable
from pgen.handlers import Keep
from pgen.history import History
from pgen.inspection import inspect_problem
from pgen.isolation import isolated, seed_or_fresh
from pgen.laws import law_at, site_of
from pgen.normalisers import with_normalisers
from pgen.parameters import Parameters
from pgen.predictive import log_likelihood
from pgen.predictive import predictive as predictive_draws
from pgen.problem import Data, Problem
from pgen.protocols import Answers, Backend
from pgen.structure import Structure
from pgen.summary import Summary
from pgen.waiting import waiting

_REPEATS = 256  # of a log probability that random numbers go into, whose error nobody has told
_WEIGHED = frozenset({Capability.LOG_PROB, Capability.LOG_DENSITY, Capability.BOUND})
_SUMMARIZED = 4000  # draws that a summary is made of, where the fit holds none


class Fitted:
    """What `pgen.fit` returns: ask it with `sample`, `log_prob`, `posterior`, `marginals`.

    All four are about one joint law: the program with what was learned built in. Latent sites keep the laws that the
    program gives them; `posterior` and `marginals` condition on data, `log_prob` integrates over what the data leaves out.

    Attributes:
        problem: the program with the data it was fitted to.
        structure: its structure.
        backend: the backend that fitted it, with its options.
        offer: which queries it answers, and how exactly.
        seed: the seed of the fit.
    """

    pgen_fixed = (
        True  # what it holds is learned already: a program that refers to it has nothing to learn there
    )

    def __init__(
        self,
        problem: Problem,
        structure: Structure,
        backend: Backend,
        offer: Offer,
        answers: Answers,
        seed: int,
        precision: str | None = None,
        progress: bool | None = None,
    ) -> None:
        """Made by `pgen.fit` and `pgen.load`."""
        self.problem = problem
        self.structure = structure
        self.backend = backend
        self.offer = offer
        self.seed = seed
        self._answers = answers
        self._precision = precision
        self._progress = progress
        self._complete = True

    @property
    def history(self) -> History:
        """Metrics per step of the training."""
        return getattr(self._answers, "history", None) or History(seed=self.seed)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The learned tensors of the program, by name (unconstrained where a `pyro.param` has a constraint)."""
        held: Parameters | None = getattr(self._answers, "parameters", None)
        return {} if held is None else {k: v.detach() for k, v in held.tensors.items()}

    @property
    def program(self) -> Callable[..., Any]:
        """The program with what was learned built in: again a Pyro program, with the same sites and arguments.

        Its learned tensors are fixed; latent sites keep the laws that the program gives them.
        """
        held: Parameters | None = getattr(self._answers, "parameters", None)
        return self.problem.program if held is None else Learned(self.problem.program, held.frozen())

    def law(self, site: str, data: Data = None) -> Any:
        """The law of a site, as the program says it, with what was learned: a distribution, to be used by hand or in a program.

        It keeps the learned tensors, fixed, wherever it goes: `pyro.sample("x", fitted.law("x"))` in another program has
        nothing left to learn there. What a backend reached by conversion (draws of a denoiser) is not part of it.

        Args:
            site: its name.
            data: what the law is given: inputs of the program, values of the sites that it depends on. None: the fitted data.

        Returns:
            Of batch shape `[rows]`, a law for each row of the data; where the law is the same for all rows, a single one,
            of empty batch shape.

        Raises:
            OptionError: there is no such site.
            DataError: the law depends on a latent whose value the data does not hold.

        Example:
            >>> import pyro, pyro.distributions as dist, pgen
            >>> def program(n):
            ...     with pyro.plate("data", n):
            ...         pyro.sample("x", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
            >>> fitted = pgen.fit(program, {"x": torch.tensor([1.0, 3.0])}, "exact", run=pgen.Run(progress=False))
            >>> fitted.law("x").mean.round(decimals=3), fitted.law("x").batch_shape
            (tensor(2.), torch.Size([]))
        """
        free = not site_of(self.structure, site).inputs and not self.structure.sites[site].parents
        with self._isolated(self.seed):
            known = data is None and (free or self._complete)
            problem, structure = (self.problem, self.structure) if known else self._asked(data)
            return law_at(replace(problem, program=self.program), structure, site)

    def sample(self, n: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """`n` independent joint draws of every site of the program, each of shape [n, ...].

        A site inside the data plate contributes one row per draw.
        """
        self._offered(Query.SAMPLE)
        n = _count("n", n)
        with self._isolated(seed):
            values = dict(self._answers.sample(n))
        self._check_draws(
            values, [s for s in self.structure.sites if not self.structure.sites[s].factor], n, "sample"
        )
        return values

    def log_prob(self, data: Data = None, *, seed: int | None = None) -> Estimate:
        """Marginal log probability of data, with how exact it is; of the fitted data if none is given.

        Sites that the data leaves out are integrated over. One value per row, shape [rows]; a single one, shape [1],
        where a latent site outside the data plate ties the rows together, or where there are no rows. So are numbers that
        are missing (NaN) in a value: element by element, or, where these depend on each other, by the conditionals of a law
        that knows them, as an energy does.

        Raises:
            Unanswerable: the offer does not include it.
            DataError: the data does not meet the program.
        """
        self._offered(Query.LOG_PROB)
        if isinstance(data, Mapping) and lacking(self.structure, data):
            with self._isolated(seed):
                seen = {} if self.problem.source else self.problem.observations
                return evidence(
                    self.structure, data, self._asked, self._log_prob, self._log_prob_of_rest, seen
                )
        with self._isolated(seed):
            return self._log_prob(*self._asked(data))

    def _log_prob(self, problem: Problem, structure: Structure) -> Estimate:
        estimate = self.with_error(self._answers.log_prob(problem, structure), problem, structure)
        offered = self.offer.answers[Query.LOG_PROB]
        if not isinstance(estimate, Estimate):
            raise Dishonest(
                f"backend {self.backend.name!r} answered log_prob with {type(estimate).__name__}; expected pgen.Estimate"
            )
        if estimate.kind.strength > offered.strength:
            raise Dishonest(
                f"backend {self.backend.name!r} offered log_prob as {offered.value!r} and answered it as {estimate.kind.value!r}"
            )
        tied = not structure.data_plates or any(not structure.local(s) for s in structure.latents)
        expected = 1 if tied else problem.rows or 1
        if tuple(estimate.value.shape) != (expected,):
            raise Dishonest(
                f"backend {self.backend.name!r} answered log_prob with shape {tuple(estimate.value.shape)}; expected ({expected},)"
            )
        return estimate

    def _log_prob_of_rest(self, problem: Problem, structure: Structure) -> Estimate:
        """Where what is missing in part is observed at some value, given what is not."""
        return self._log_prob(*self._by_own_paths(problem, structure, Query.LOG_PROB))

    def posterior(self, data: Data = None, n: int = 1000, *, seed: int | None = None) -> Draws:
        """`n` joint draws of every unobserved site given data, each [n, ...]; given the fitted data if none is given.

        Where the data lacks a part of a value (NaN) at a law that knows its own conditionals, as an energy does, draws of
        that site are whole values: what was given, and what was missing drawn with the rest.
        """
        n = _count("n", n)
        if isinstance(data, Mapping) and lacking(self.structure, data):
            with self._isolated(seed):
                return completed(self.structure, data, n, self._asked, self._rest)
        self._offered(Query.POSTERIOR)
        with self._isolated(seed):
            return self._drawn(*self._asked(data), n)

    def _rest(self, problem: Problem, structure: Structure, n: int) -> Draws:
        """Draws where what is missing in part is latent: the backend is asked whether it can."""
        if not structure.latents:
            return Draws({})
        return self._drawn(*self._by_own_paths(problem, structure, Query.POSTERIOR), n)

    def _by_own_paths(
        self, problem: Problem, structure: Structure, query: Query
    ) -> tuple[Problem, Structure]:
        """A problem in which what is missing in part of values is a site: another law than theirs, with conversions of its own.

        Raises:
            Unanswerable: the backend can't do it.
        """
        found = self.backend.examine(structure)
        if isinstance(found, Refusal) or query not in found.answers:
            why = f": {found.why}" if isinstance(found, Refusal) else ""
            raise Unanswerable(
                f"backend {self.backend.name!r} does not answer {query.value} for what is missing in part of {structure.name}"
                f"{why}; give the values whole, or fit fitted.program by 'mcmc'"
            )
        lacks = [s for s in structure.sites if s in lacking(self.structure, problem.observations)]
        adapters, drawn = dict(problem.adapters), set[str]()
        for name in lacks:
            way = conversions_of(structure, self.backend, name, found.paths.get(name, ()))
            before = adapters.get(name)
            adapters[name] = Adapter(way, before.memories if isinstance(before, Adapter) else {})
            if any(c.gives in (Capability.SAMPLE, Capability.RSAMPLE) for c in way):
                drawn.add(name)
        problem = replace(
            problem,
            adapters=adapters,
            learners={s: learner for s, learner in problem.learners.items() if s not in lacks},
            undrawable=problem.undrawable - drawn,
        )
        return problem, structure

    def _drawn(self, problem: Problem, structure: Structure, n: int) -> Draws:
        drawn = self._answers.posterior(problem, structure, n)
        self._check_draws(drawn, structure.latents, n, "posterior")
        return drawn if isinstance(drawn, Draws) else Draws(dict(drawn))

    def marginals(self, data: Data = None, *, seed: int | None = None) -> dict[str, Any]:
        """The law of each unobserved site given data, as a Pyro distribution."""
        self._offered(Query.MARGINALS)
        with self._isolated(seed):
            problem, structure = self._asked(data)
            return dict(self._answers.marginals(problem, structure))

    def draws(self) -> Draws:
        """Every draw that the fit holds; `posterior(n=4000)` where it holds none (it draws them when asked)."""
        held: Callable[[], Draws] | None = getattr(self._answers, "everything", None)
        if held is None:
            return self.posterior(n=_SUMMARIZED, seed=self.seed)
        with self._isolated(self.seed):
            return held()

    def summary(self, probs: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
        """Mean, spread, quantiles and Monte Carlo errors of every unobserved scalar, given the fitted data; what is wrong.

        Prints as a table. Its `warnings` say what, how badly, and what to try.
        """
        return self.draws().summary(probs)

    def to_arviz(self, n: int | None = None, *, predictive: bool = False) -> Any:
        """The posterior as an ArviZ DataTree, chains kept apart, with statistics, pointwise log likelihood and data.

        Args:
            n: draws, evenly over the chains; None: all that the fit holds, or 4,000 where it holds none.
            predictive: also draw the observed sites anew, for each draw of the posterior.
        """
        drawn = self.draws() if n is None else self.posterior(n=n, seed=self.seed)
        with self._isolated(self.seed):
            terms = log_likelihood(self.problem, self.structure, drawn)
            anew = predictive_draws(self.problem, self.structure, drawn) if predictive else None
        seen = {k: v for k, v in self.problem.observations.items() if k in self.structure.sites}
        return replace(drawn, log_likelihood=terms).to_arviz(observed=seen or None, predictive=anew)

    def predictive(self, data: Data = None, n: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """New data sets: for each of `n` posterior draws, all observed sites drawn anew, `[n, *site shape]` each.

        Args:
            data: whose inputs the program is run with. Where it observes something, the latents are drawn given it; where
                it holds inputs only, given the fitted data. None: the fitted data.
            n: draws.
            seed: makes them repeatable.
        """
        with self._isolated(seed):
            problem, structure = self._asked(data)
        if any(structure.sites[s].observed for s in self.structure.observed if s in structure.sites):
            drawn: Mapping[str, Tensor] = self.posterior(data, n, seed=seed)
        else:  # new inputs and nothing seen with them: what the fitted data say about what all rows share
            drawn = self.posterior(n=n, seed=seed)
            drawn = {s: v for s, v in drawn.items() if s in structure.sites and not structure.local(s)}
            seen = {s: replace(structure.sites[s], observed=True) for s in self.structure.observed}
            structure = replace(structure, sites={**structure.sites, **seen})
        with self._isolated(seed):
            return predictive_draws(problem, structure, drawn)

    def resume(self, more: int) -> Fitted:
        """Continue where the fit stopped, by so many draws of every chain: the same as if it had never stopped.

        Raises:
            Unanswerable: the backend keeps no state that could go on.
        """
        go_on: Callable[[int], None] | None = getattr(self._answers, "resume", None)
        if go_on is None:
            raise Unanswerable(
                f"backend {self.backend.name!r} keeps no chains to continue; fit again, or use backend 'mcmc'"
            )
        more = _count("more", more)
        with self._isolated(self.seed):
            go_on(more)
        return self

    def transport(self) -> Any:
        """The map from standard normal vectors to unconstrained latents that was learned, frozen.

        For variational fits with one joint law of all latents: `guide="flow"`, `"full-rank"`, `"low-rank"`, `"mean-field"`.
        `pgen.backend("mcmc", precondition=...)` moves chains by it. See `pgen.guides.transport`.

        Raises:
            Unanswerable: nothing of the kind was learned.
        """
        made: Callable[[], Any] | None = getattr(self._answers, "transport", None)
        if made is None:
            raise Unanswerable(
                f"backend {self.backend.name!r} learns no map to the latents; fit with pgen.backend('variational', guide='flow')"
            )
        return made()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fit to a folder: safetensors, JSON and checksums; nothing in it is ever executed.

        Raises:
            CheckpointError: an option or argument has no place in such a file; the message says which.
        """
        saving.save(self, path)

    @contextmanager
    def _isolated(self, seed: int | None) -> Iterator[None]:
        with isolated(seed_or_fresh(seed), self._precision), torch.no_grad(), waiting(self._progress):
            yield

    def with_error(self, first: Any, problem: Problem, structure: Structure) -> Any:
        """An answer of the backend; where a conversion puts random numbers into it, the mean of many, with its error.

        The errors of normalisers that were estimated are added.

        Args:
            first: the answer. One that has a standard error is left as it is.
            problem: what was asked about.
            structure: of the problem.
        """
        if not isinstance(first, Estimate):
            return first
        used = [structure.conversions.named(name) for path in self.offer.paths.values() for name in path]
        if first.stderr is None and any(c.random and c.gives in _WEIGHED for c in used):
            others = [self._answers.log_prob(problem, structure).value for _ in range(_REPEATS - 1)]
            values = torch.stack([first.value, *others])
            first = replace(first, value=values.mean(0), stderr=values.std(0) / _REPEATS**0.5)
        return with_normalisers(first, structure, problem.rows, problem.adapters)

    def _offered(self, query: Query) -> None:
        if query not in self.offer.answers:
            able = ", ".join(f"{q.value} ({e.value})" for q, e in self.offer.answers.items())
            raise Unanswerable(
                f"backend {self.backend.name!r} does not answer {query.value} for {self.structure.name}; it offered {able}. "
                f"pgen.explain(program, data) shows who does"
            )

    def _asked(self, data: Data, completing: Mapping[str, Tensor] | None = None) -> tuple[Problem, Structure]:
        if data is None:
            if not self._complete:
                raise OptionError(
                    "this fit was saved without its training data (too large); give the data that you ask about"
                )
            return self.problem, self.structure
        if isinstance(data, Mapping):
            used = {name for s in self.structure for name in s.inputs}
            kept = {k: v for k, v in self.problem.inputs.items() if k in used and k not in data}
            sizes = {len(v) for v in map(torch.as_tensor, data.values()) if v.ndim}
            for key, value in kept.items() if self.problem.rows is not None else ():
                if value.ndim and sizes and len(value) not in sizes:
                    raise DataError(
                        f"{self.structure.name} needs {key!r} too: it was fitted with {len(value)} rows of it, and is asked "
                        f"about {sizes.pop()}; give those rows of it in the data"
                    )
            data = {**kept, **data}
        asked = self.problem.with_data(data)
        asked = asked.to(self.problem.device, torch.float64 if self._precision == "float64" else None)
        if (
            completing is not None
        ):  # looked at without conversions, which would run chains only to be looked at
            names = frozenset(lacking(self.structure, asked.observations))
            own = {k: v for k, v in asked.adapters.items() if k not in names}
            structure, problem = inspect_problem(replace(asked, completing=completing, adapters=own))
            problem = replace(problem, adapters=asked.adapters)
        else:
            structure, problem = inspect_problem(asked)
        return problem, replace(structure, conversions=self.structure.conversions)

    def _check_draws(self, values: Mapping[str, Tensor], sites: Any, n: int, query: str) -> None:
        missing = [s for s in sites if s not in values]
        if missing:
            raise Dishonest(
                f"backend {self.backend.name!r} answered {query} without site {missing[0]!r}; it must return every site of {list(sites)}"
            )
        for site, value in values.items():
            if value.shape[:1] != (n,):
                raise Dishonest(
                    f"backend {self.backend.name!r} answered {query} at {site!r} with shape {tuple(value.shape)}; expected ({n}, ...)"
                )

    def __repr__(self) -> str:
        """Program, backend, offer and training in a few lines."""
        answers = ", ".join(f"{q.value}: {e.value}" for q, e in self.offer.answers.items())
        return f"Fitted({self.structure.name} by {self.backend!r}\n  answers {answers}\n  {self.history!r})"


class Learned:
    """A program with learned tensors built in, fixed: a Pyro program like the one it was made from."""

    pgen_fixed = True

    def __init__(self, program: Callable[..., Any], parameters: Parameters) -> None:
        """Keep both."""
        self._program = program
        self._parameters = parameters
        self.__name__ = name_of(program)
        signature = signature_of(program)
        if signature is not None:
            self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the learned tensors lent to it."""
        with self._parameters.installed(), Keep(self._parameters.installed):
            return self._program(*args, **kwargs)


def _count(name: str, n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise OptionError(f"{name} is {n!r}; expected a whole number of draws, at least 1")
    return int(n)

"""What a backend is: the two protocols that every inference method implements, built in or installed.

How to write one:

1. A frozen dataclass whose fields are its options; a class attribute `name`.
2. `examine(structure)` says what it would answer, or which site lacks what: an `Offer` or a `Refusal`. No numbers yet.
3. `fit(problem, structure, run)` learns and returns an object with one method for each query of the offer.
4. A module-level `@pgen.hookimpl def pgen_backends(): return [MyBackend]`, named in the entry-point group `pgen`.

The smallest real one is `plugins/pgen-template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from pgen.capability import Estimate, Offer, Refusal
from pgen.problem import Problem
from pgen.structure import Structure

if TYPE_CHECKING:
    from pgen.history import History
    from pgen.run import Run


class Answers(Protocol):
    """What a backend's `fit` returns: the learned state, and a method for each query offered.

    Methods are called with the global RNG forked and seeded and Pyro's store scoped, so they just draw. `problem`
    holds the data asked about, `structure` is that problem's; both may observe other sites than the fit did.
    Only the methods of the queries that were offered need to exist.
    """

    history: History

    def tensors(self) -> Mapping[str, Tensor]:
        """The learned state, to be saved."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a saved state over, into an object made by `fit` with a run of no steps."""
        ...

    def sample(self, n: int) -> Mapping[str, Tensor]:
        """Draws of every site, each of shape [n, ...]."""
        ...

    def log_prob(self, problem: Problem, structure: Structure) -> Estimate:
        """Log probability of the observed values, one per row, shape [rows] ([1] where there are no rows)."""
        ...

    def posterior(self, problem: Problem, structure: Structure, n: int) -> Mapping[str, Tensor]:
        """Draws of every unobserved site given the observed ones, each of shape [n, ...] (a `Draws` where weights matter)."""
        ...

    def marginals(self, problem: Problem, structure: Structure) -> Mapping[str, Any]:
        """The law of each unobserved site given the observed ones, as Pyro distributions."""
        ...


@runtime_checkable
class Backend(Protocol):
    """An inference method: hyperparameters as fields, and these two methods.

    One that divides its work among the devices of `run.places` says so by a class attribute, `several_devices = True`;
    a run on several devices is refused for all others. One that has no use for some options of a run may have a method
    `unused(run)`, from these options, as far as they are set, to what there is in their place: users are warned.
    """

    name: ClassVar[str]

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Say what this backend would answer about a program, or why it cannot. Pure, and cheap."""
        ...

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Answers:
        """Learn what is to be learned. The problem's sites are adapted by the paths of the offer already."""
        ...


@runtime_checkable
class FitsMany(Protocol):
    """What a backend may add: posteriors of many data sets in one batch, faster than one fit after the other.

    `pgen.testing.sbc` uses it where it is there.
    """

    def posteriors(
        self, problem: Problem, structure: Structure, run: Run, data: Mapping[str, Tensor], n: int
    ) -> Sequence[Mapping[str, Tensor]] | None:
        """Posterior draws for each of R data sets, of one shape and with the same inputs; None: not this program.

        Args:
            problem: the program on some data set; its observations are to be replaced.
            structure: that problem's structure.
            run: how to fit; its seed makes everything repeatable.
            data: values of every observed site, `[R, ...]`; NaN means missing, in the same places in all.
            n: independent draws wanted of each; where draws depend on each other, give enough to be worth so many.

        Returns:
            R mappings from every unobserved site to draws, `[at least n, ...]`, as `Answers.posterior` gives them.
        """
        ...

"""Draws from an energy by sequential Monte Carlo: a cloud goes from a law that is known to the density, resampled on the way.

The steps are those that `Annealing.climb` finds: each as long as the conditional effective sample size allows. What arrives has the
right share in every mode that the law to begin with covers, whether moves join the modes or not, up to an error in proportion to
1 / sqrt(particles), and a bias in proportion to 1 / particles.

Particles share ancestors: systematic resampling copies one of weight w floor(N w) or ceil(N w) times, so draws of one cloud are weakly
dependent. Within a mode the moves make copies forget each other; but how many there are in each mode is decided together, and a share
that is counted in one cloud varies more than in as many independent draws (of two normal laws ten standard deviations apart, by a variance
two to three times as large).

References:
    Sequential Monte Carlo samplers (Del Moral, Doucet & Jasra, JRSS-B 2006). Toward automatic model comparison: an adaptive
    sequential Monte Carlo approach (Zhou, Johansen & Aston, JCGS 2016), arXiv:1303.3123.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.draws import aim_of, kernels_of
from pgen.algorithms.energy.reference import Law
from pgen.algorithms.energy.route import Route, Tilted
from pgen.algorithms.energy.scaled import scaled_to
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.walks import Density, Moves
from pgen.algorithms.kernels.base import Kernel
from pgen.algorithms.record import record

_ROWS = 40_000  # particles of all laws together, where there are several


@dataclass(frozen=True)
class AnnealedRun:
    """Draws by clouds that climb.

    Attributes:
        particles: of a cloud; as many as there are draws, where that is more. Of several laws side by side, each has a cloud
            of its own, of so many that there are 40,000 in all, but 50 at least.
        keep: fraction of the conditional effective sample size that is kept at each step up, in (0, 1).
        moves: calls of the walk at each step up.
        after: calls of the walk once arrived.
        steps: of the kernels in a call.
        continuous: kernel for what is measured; MALA by default.
        discrete: kernel for what is counted, or its class; see `LongRun`.

    Raises:
        ValueError: a setting is out of its range.
        RuntimeError: (when drawn) the cloud did not arrive.

    Example:
        Two modes, one of them of weight 0.2.

        >>> import math
        >>> from torch.distributions import constraints
        >>> from pgen.algorithms.energy.reference import Reference
        >>> def f(x): return torch.logaddexp(-(x + 6).square() / 2, math.log(4) - (x - 6).square() / 2).sum(-1)
        >>> space = Space.of(constraints.real, (1,))
        >>> _ = torch.manual_seed(0)
        >>> wide = Reference(8 * torch.randn(1000, 1), space)
        >>> draws = AnnealedRun(particles=2000)(f, wide, space, 2000)
        >>> bool(((draws < 0).double().mean() - 0.2).abs() < 0.05)
        True
    """

    particles: int = 1000
    keep: float = 0.9
    moves: int = 1
    after: int = 20
    steps: int = 3
    continuous: Kernel | None = None
    discrete: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("particles", 50), ("moves", 1), ("after", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, got {getattr(self, name)}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is between 0 and 1, got {self.keep}")

    def route(self, f: Density, reference: Law, space: Space, laws: int = 1) -> Tilted:
        """The way up, from the reference, by moves in units of its standard deviations."""
        continuous, discrete = kernels_of(space, self.continuous, self.discrete)
        aim = None if continuous is None else aim_of(continuous)
        frame: Any = scaled_to(reference, space, laws)
        return Tilted(reference, f, Moves(frame, continuous, discrete, self.steps, aim))

    def __call__(self, f: Density, reference: Law, space: Space, n: int, *, laws: int = 1) -> Tensor:
        """Draws `[n, *event]`.

        Args:
            f: log density up to a constant, rows to numbers.
            reference: to begin with; normalised, as wide as the density or wider.
            space: of the values.
            n: draws, a multiple of `laws`.
            laws: how many densities `f` is: row i is of the one numbered i mod `laws`, as are draws.
        """
        return self.up(self.route(f, reference, space, laws), n, laws=laws)

    def up(self, route: Route, n: int, *, laws: int = 1) -> Tensor:
        """Draws of the far end of any route, such as the one that an energy brings along (`Own`)."""
        each = n // laws
        cloud = max(each, self.particles if laws == 1 else max(50, min(self.particles, _ROWS // laws)))
        pilot = Annealing(pilot=cloud, keep=self.keep, moves=self.moves)
        climb = pilot.climb(route, laws=laws)
        x, one, size = climb.position, torch.ones_like(climb.beta[-1]), climb.step_size[-1]
        move = record(lambda x, one, size: route.move(x, one, size).position)
        with torch.no_grad():
            for _ in range(self.after):
                x = move(x, one, size)
        # Neighbours have ancestors in common.
        shuffled = torch.randperm(cloud, device=x.device)[:each]
        return x.unflatten(0, (cloud, laws))[shuffled].flatten(0, 1)

"""How posteriors of latents with denoisers are drawn, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Kind = Literal[
    "auto",
    "exact",
    "tds",
    "mmps",
    "pigdm",
    "ddrm",
    "replacement",
    "repaint",
    "dps",
    "lgd",
    "split-gibbs",
    "guide",
]
KINDS: tuple[str, ...] = get_args(Kind)
LINEAR = ("exact", "mmps", "pigdm", "ddrm", "replacement", "repaint")
"""Those for observations that are linear in the latents, with normal noise."""
ELEMENTS = ("replacement", "repaint")
"""Those for observations of single elements."""
PARTICLES = ("auto", "tds")
"""Those with particles."""

LEVELS = 100
"""Noise levels, where nobody says how many."""


@dataclass(frozen=True)
class Inference:
    """How posteriors are drawn.

    Attributes:
        kind: the algorithm.
        particles: for each row, at least, of the algorithms with particles; None: as many as are affordable.
        levels: how many noise levels; None: 100.
        moves: Metropolis moves at the end.
        adapt: whether there are more levels where particles are lost.
    """

    kind: Kind = "auto"
    particles: int | None = None
    levels: int | None = None
    moves: int = 20
    adapt: bool = True


@dataclass(frozen=True)
class Inferred:
    """Draws of latents, and what was learned on the way.

    Attributes:
        values: by site, `[n, *shape]`.
        log_evidence: log probability of what is observed given nothing, `[rows]`; None where the algorithm has none.
        effective: least effective number of particles on the way, `[rows]`; likewise.
        exact: whether nothing was approximated.
    """

    values: Mapping[str, Tensor]
    log_evidence: Tensor | None = None
    effective: Tensor | None = None
    exact: bool = False

    def of(self, rows: Tensor, axes: Mapping[str, int | None]) -> Inferred:
        """Some rows of it, by a mask; axes of the values run along rows."""
        index = rows.nonzero()[:, 0]

        def some(value: Tensor, axis: int | None) -> Tensor:
            return value if axis is None else value.index_select(axis, index.to(value.device))

        return Inferred(
            {name: some(value, axes[name]) for name, value in self.values.items()},
            None if self.log_evidence is None else some(self.log_evidence, 0),
            None if self.effective is None else some(self.effective, 0),
            self.exact,
        )

"""Draws from a posterior: a mapping from site to tensor that keeps what diagnostics need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from pgen.errors import OptionError


@dataclass(frozen=True, eq=False)
class Draws(Mapping[str, Tensor]):
    """Draws of every unobserved site, each `[n, ...]`, chains flattened.

    Attributes:
        sites: the draws, by site.
        chains: number of chains that the `n` draws come from, in equal runs.
        log_weights: log importance weights `[n]` or `[n, rows]`, where draws were weighted or resampled.
        khat: Pareto shape of those weights per row: below 0.7 they can be trusted.
        stats: further per-draw statistics, `[n]` each.
        log_likelihood: pointwise log likelihood of the observed sites, `[n, ...]` each, where known.
    """

    sites: Mapping[str, Tensor]
    chains: int = 1
    log_weights: Tensor | None = None
    khat: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    log_likelihood: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        """Draws of one site, `[n, ...]`."""
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        """The sites."""
        return iter(self.sites)

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self.sites)

    def to_arviz(self) -> Any:
        """An ArviZ DataTree with groups `posterior`, `sample_stats` and `log_likelihood` where known.

        Raises:
            OptionError: `arviz-base` is not installed.
        """
        try:
            import arviz_base
        except ImportError as error:
            raise OptionError("to_arviz() needs arviz-base: pip install 'pgen-ppl[diagnostics]'") from error
        groups = {"posterior": self.sites, "sample_stats": self.stats, "log_likelihood": self.log_likelihood}
        return arviz_base.from_dict({name: self._chains(group) for name, group in groups.items() if group})

    def _chains(self, group: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {k: v.detach().cpu().reshape(self.chains, -1, *v.shape[1:]).numpy() for k, v in group.items()}

    def __repr__(self) -> str:
        """Sites and shapes."""
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in self.sites.items())
        trust = "" if self.khat is None else f"; k-hat up to {float(self.khat.max()):.2f}"
        return f"Draws({shapes}{trust})"

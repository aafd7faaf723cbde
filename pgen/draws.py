"""Draws from a posterior: a mapping from site to tensor that keeps what diagnostics need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgen.errors import OptionError
from pgen.summary import Summary, summarize


@dataclass(frozen=True, eq=False)
class Draws(Mapping[str, Tensor]):
    """Draws of every unobserved site, each `[n, ...]`, chains flattened.

    The draws of a chain lie together, in their order. Where `n` is no multiple of the number of chains, the first
    `n % chains` of them have one draw more than the others, and diagnostics leave that draw out.

    Attributes:
        sites: the draws, by site.
        chains: number of chains that the `n` draws come from.
        log_weights: log importance weights `[n]` or `[n, rows]`, where draws were weighted or resampled.
        khat: Pareto shape of those weights per row: below 0.7 they can be trusted.
        stats: further per-draw statistics, `[n]` each, by their ArviZ names: `diverging`, `energy`, `lp` (the
            log density), `acceptance_rate`, `n_steps`, `step_size`, `tree_depth`, `reached_max_treedepth`.
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

    def by_chain(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Draws as `[chains, draws, ...]`, chains of one length: what is over, one draw of a chain at most, is left out.

        Args:
            values: tensors `[n, ...]` by name; None for the sites.

        >>> Draws({"z": torch.arange(7.0)}, chains=3).by_chain()["z"].tolist()
        [[0.0, 1.0], [3.0, 4.0], [5.0, 6.0]]
        """
        out = {}
        for name, value in (self.sites if values is None else values).items():
            chains = max(1, min(self.chains, len(value)))
            runs = value.detach().tensor_split(chains)
            out[name] = torch.stack([run[: len(value) // chains] for run in runs])
        return out

    def summary(self, probs: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
        """Mean, spread, quantiles, Monte Carlo error, effective draws and R-hat of every scalar; and what is wrong.

        Args:
            probs: of the quantiles.

        Raises:
            OptionError: a probability is not between 0 and 1.
        """
        return summarize(self, probs)

    def to_arviz(
        self,
        *,
        observed: Mapping[str, Tensor] | None = None,
        predictive: Mapping[str, Tensor] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        """An ArviZ DataTree: `posterior`, and where known or given `sample_stats`, `log_likelihood` and the others.

        Args:
            observed: the data, by site: group `observed_data`.
            predictive: draws of the observed sites, `[n, ...]` each: group `posterior_predictive`.
            dims: names of the dimensions of a site; `site_dim_0`, `site_dim_1`, ... by default.
            coords: labels along those dimensions; 0, 1, ... by default.

        Raises:
            OptionError: `arviz-base` is not installed.
        """
        try:
            import arviz_base
        except ImportError as error:
            raise OptionError("to_arviz() needs arviz-base: pip install 'pgen-ppl[diagnostics]'") from error
        drawn = {
            "posterior": self.sites,
            "sample_stats": self.stats,
            "log_likelihood": self.log_likelihood,
            "posterior_predictive": predictive or {},
        }
        groups = {k: {s: v.cpu().numpy() for s, v in self.by_chain(g).items()} for k, g in drawn.items() if g}
        if observed:
            groups["observed_data"] = {
                s: torch.as_tensor(v).detach().cpu().numpy() for s, v in observed.items()
            }
        with warnings.catch_warnings():  # many short chains are meant
            warnings.filterwarnings("ignore", "Found chain dimension to be longer")
            return arviz_base.from_dict(groups, dims=dims, coords=coords)

    def __repr__(self) -> str:
        """Sites and shapes."""
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in self.sites.items())
        trust = "" if self.khat is None else f"; k-hat up to {float(self.khat.max()):.2f}"
        return f"Draws({shapes}{trust})"

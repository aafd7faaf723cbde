"""The statements of one run of a guide or a program, by name: each site's law, its value, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.errors import ProgramError


class Node(NamedTuple):
    """One statement of a run: its law, its value, and where it stands."""

    law: Any
    value: Tensor
    frames: tuple[Any, ...]
    scale: Any
    mask: Any
    observed: bool
    auxiliary: bool = False

    @property
    def subsample(self) -> bool:
        """Whether this is a plate's choice of rows, not a statement of the program."""
        return type(self.law).__name__ == "_Subsample"

    def log_prob(self) -> Tensor:
        """Log probability of the value, scaled and masked as the program says."""
        return self.weigh(self.law.log_prob(self.value))

    def weigh(self, log: Tensor) -> Tensor:
        """A tensor over the batch, scaled and masked as the program says."""
        if self.mask is None and isinstance(self.scale, float) and self.scale == 1.0:
            return log
        return scale_and_mask(log, self.scale, self.mask)


Nodes = dict[str, Node]


class Record(Messenger):
    """Keeps the statements of a run; gives those named in `values` their values, as if drawn."""

    def __init__(self, values: Mapping[str, Tensor] | None = None, detach: bool = False) -> None:
        """Keep the values; `detach` cuts the path from each draw back to its law."""
        super().__init__()
        self.values = values or {}
        self.detach = detach
        self.nodes: Nodes = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name, infer = msg["name"], msg["infer"] or {}
        if infer.get("_deterministic"):
            return
        if name in self.nodes:
            raise ProgramError(
                f"site {name!r} is met twice in one run; give each pyro.sample statement a name of its own"
            )
        if self.detach and not msg["is_observed"]:
            msg["value"] = msg["value"].detach()
        frames = tuple(f for f in msg["cond_indep_stack"] if f.dim is not None)
        auxiliary = bool(infer.get("is_auxiliary"))
        self.nodes[name] = Node(
            msg["fn"], msg["value"], frames, msg["scale"], msg["mask"], msg["is_observed"], auxiliary
        )


def record(
    run: Callable[[], object], values: Mapping[str, Tensor] | None = None, detach: bool = False
) -> Nodes:
    """The statements of one run, subsamples of plates among them."""
    with Record(values, detach) as kept:
        run()
    return kept.nodes

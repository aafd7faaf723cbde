"""Reading a program's joint density, site by site, as factors with dimensions named by plates and latents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.algorithms.factor_graph import Factor
from pgen.capability import Refusal
from pgen.errors import PgenError, Refused
from pgen.handlers import only_named
from pgen.structure import Structure


class Mixed(RuntimeError):
    """A log probability extends along a dimension that none of its site's ancestors was given."""


class Reader(Messenger):
    """Runs a program and keeps each site's log probability as a factor.

    The latents in `dims` are given all their values, along that dimension; those in `picks` the value at
    that place in their list of values, in every element; those in `held` keep the value that they have. In
    all three cases their log probability is that of their law alone: no mask applies to it, and no scale
    may.

    Attributes:
        factors: log probability of each site met.
        variables: plates of each latent in `dims`, `picks` or `held`.
        supports: for each of those its values `[K, *event]`.
        shapes: for each of those its batch shape.
        powers: scale of each plate.
        current: the site that was met last.
    """

    def __init__(
        self,
        structure: Structure,
        nesting: int,
        given: Mapping[str, float],
        *,
        dims: Mapping[str, int] | None = None,
        candidates: Mapping[str, tuple[str, ...]] | None = None,
        picks: Mapping[str, int] | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.structure = structure
        self.nesting = nesting
        self.given = given
        self.dims = dims or {}
        self.candidates = candidates or {}
        self.picks = picks or {}
        self.held = held or {}
        self.current: str | None = None
        self.factors: dict[str, Factor] = {}
        self.variables: dict[str, tuple[str, ...]] = {}
        self.supports: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.powers: dict[str, float] = {}

    def read(self, run: Callable[[], object]) -> Reader:
        """Run the program, and return what was read."""
        try:
            with self:
                run()
        except PgenError:
            raise
        except Exception:
            # What a program does after its last site (stacking its states, say) has no part in its law.
            if any(name not in self.factors for name in self.structure.sites):
                raise
        return self

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        self.current = name
        if msg["is_observed"] or not (name in self.dims or name in self.picks or name in self.held):
            return
        support = fn.enumerate_support(expand=False)
        event = support.shape[support.dim() - len(fn.event_shape) :]
        values = self.supports[name] = support.reshape(support.shape[:1] + event)
        if name in self.dims:
            msg["value"] = values.reshape(values.shape[:1] + (1,) * (-self.dims[name] - 1) + event)
        elif name in self.picks:
            msg["value"] = values[self.picks[name]].expand(fn.batch_shape + event).clone()
        else:
            msg["value"] = self.held[name]
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample" or only_named(msg):
            return
        frames = {frame.dim: frame for frame in msg["cond_indep_stack"] if frame.dim is not None}
        scale = self._beyond_plates(msg, frames)
        if name in self.supports:
            self._require_plain(name, fn, scale, frames)
            self.variables[name] = tuple(plate_name(self.structure, frames[d].name) for d in sorted(frames))
            depth = max(len(self.structure.sites[name].batch_shape), -min(frames, default=0))
            sizes = (frames[d].size if d in frames else 1 for d in range(-depth, 0))
            self.shapes[name] = torch.Size(sizes)
            # A mask takes a latent out of the joint density. Summed out it counts for one, as its law does.
            log = self._own_table(name, fn) if name in self.dims else fn.log_prob(msg["value"])
        else:
            log = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
            mask = msg["mask"]  # programs that build up a mask in place go on changing it
            log = scale_and_mask(log, scale, mask.clone() if isinstance(mask, Tensor) else mask)
        self.factors[name] = self._factor(name, log, frames)

    def _require_plain(self, name: str, fn: Any, scale: float | Tensor, frames: Mapping[int, Any]) -> None:
        if not isinstance(scale, float) or scale != 1.0:
            raise refused(
                name,
                "a log probability that is not scaled",
                "it is summed out, and poutine.scale around it leaves open whether the sum or its terms are "
                "scaled; scale the observed sites only",
            )
        undeclared = [d for d in range(-len(fn.batch_shape), 0) if d not in frames and d >= -self.nesting]
        if any(fn.batch_shape[d] > 1 for d in undeclared):
            raise refused(
                name,
                "a plate around its batch dimensions",
                f"its batch shape is {list(self.structure.sites[name].batch_shape)}, and only pyro.plate "
                "says that its elements are independent; put the statement into a plate",
            )

    def _own_table(self, name: str, fn: Any) -> Tensor:
        """Log probability of every value of a latent, the values along the latent's own dimension."""
        # Asking for the support as it came lets Pyro's Categorical answer without gathering.
        log = fn.log_prob(fn.enumerate_support(expand=False))
        own, batch = -self.dims[name], log.dim() - 1
        if batch < own:
            return log.reshape(log.shape[:1] + (1,) * (own - 1 - batch) + log.shape[1:])
        # Its ancestors reach further left, and leave its own dimension at size one.
        return log.movedim(0, batch - own).squeeze(batch - own + 1)

    def _factor(self, name: str, log: Tensor, frames: Mapping[int, Any]) -> Factor:
        """Name the dimensions of a log probability by the plates and latents that they belong to."""
        variables = {self.dims[other]: other for other in self.candidates.get(name, ())}
        own = self.dims.get(name, 0) if name in self.supports else 0
        depth = max(log.dim(), -min(frames, default=0), -own)
        log = log[(None,) * (depth - log.dim())]
        names: list[str] = []
        rest: list[int] = []
        shape = list(log.shape)
        for dim in range(-depth, 0):
            if dim in frames:
                names.append(plate_name(self.structure, frames[dim].name))
                shape[dim] = frames[dim].size
            elif dim in variables and (dim == own or shape[dim] == len(self.supports[variables[dim]]) > 1):
                names.append(variables[dim])
            elif shape[dim] == 1 or dim >= -self.nesting:
                rest.append(dim)
            else:
                raise Mixed(
                    f"its log probability has size {shape[dim]} along dimension {dim}, which no parent has"
                )
        log = log.expand(shape)
        if rest:
            # Batch dimensions that no plate declares are a part of the value, like event dimensions.
            log = log.sum(rest)
        return Factor(tuple(names), log)

    def _beyond_plates(self, msg: Any, frames: Mapping[int, Any]) -> float | Tensor:
        """The scale of a site, less that of its plates, which is kept apart: it applies outside the sums."""
        expected = 1.0
        for frame in frames.values():
            power = self.given.get(frame.name, 1.0)
            if frame.full_size is not None:
                power *= frame.full_size / frame.size
            self.powers[plate_name(self.structure, frame.name)] = power
            expected *= power
        scale = msg["scale"]
        if isinstance(scale, Tensor):
            if scale.numel() > 1:
                return scale / expected
            scale = float(scale)
        return 1.0 if abs(scale / expected - 1.0) < 1e-6 else scale / expected


def plate_name(structure: Structure, plate: str) -> str:
    """What factors call a plate: programs may open several over the rows of the data, which have one name."""
    rows, plates = structure.data_plates, structure.plates
    return rows[0] if plate in rows and plates[plate].dim == plates[rows[0]].dim else plate


def outside_plates(
    structure: Structure, latents: Collection[str], sites: Collection[str] | None = None
) -> dict[str, Refusal]:
    """Which finite latents cannot be summed out, and why: a site outside of their plates depends on them.

    What such a site says about the elements of a plate is no product over them, so that their sum would be
    over all joint values of the plate.

    Args:
        structure: of the program.
        latents: to be summed out.
        sites: to be looked at; by default all that the observed values bear upon.
    """
    plates = {name: structure.sites[name].plates for name in latents if structure.sites[name].plates}
    if not plates:
        return {}
    found: dict[str, Refusal] = {}
    for name in _bearing(structure) if sites is None else sites:
        site = structure.sites[name]
        here = {plate_name(structure, plate) for plate in site.plates}
        for parent in site.parents:
            lost = [plate for plate in plates.get(parent, ()) if plate_name(structure, plate) not in here]
            if lost and parent not in found:
                found[parent] = Refusal(
                    parent,
                    "uses inside its plates",
                    f"{name!r} depends on {parent!r} and is not in plate {lost[0]!r} as {parent!r} is: the sum "
                    f"would be over all joint values of the plate; put {name!r} into the plate, or "
                    f"observe {parent!r}",
                )
    return found


def _bearing(structure: Structure) -> set[str]:
    """Observed sites and factors, and all that these depend on."""
    found = {*structure.observed, *structure.factors}
    ahead = list(found)
    while ahead:
        parents = set(structure.graph.predecessors(ahead.pop())) - found
        found |= parents
        ahead.extend(parents)
    return found


def refused(site: str | None, missing: str, why: str) -> Refused:
    """The error that says which site lacks what."""
    where = f"site {site!r}" if site is not None else "the program"
    return Refused(f"{where} lacks {missing}: {why}", Refusal(site, missing, why))

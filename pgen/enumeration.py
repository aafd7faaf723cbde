"""All values of a program's finite latents at once: one run gives every factor of its joint distribution.

Each enumerated latent is given all its values along a batch dimension left of the plates. Two latents need
different dimensions only if some site depends on both, so the dimensions are a colouring of the moral
graph: a hidden Markov chain of any length takes two, and a network of a hundred sites a handful, where one
dimension per site would exhaust the 64 that a tensor can have. No annotation is needed;
`infer={"enumerate": ...}`, `config_enumerate` and `pyro.markov` are hints that change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pgen.algorithms.elimination import colouring, moral_neighbours
from pgen.algorithms.factor_graph import Factor, FactorGraph
from pgen.capability import Refusal
from pgen.errors import PgenError, Refused
from pgen.structure import Structure, describe_leak

#: Dimensions that a tensor may have (64), less a few for the program and its distributions to work with.
_MAX_DIMS = 60


@dataclass(frozen=True)
class Enumeration:
    """What a program says about its sites, as factors over its enumerated latents.

    Attributes:
        factors: the log probability of each site; plates and latents keep the names that they have in the
            program.
        variables: the plates that each enumerated latent lives in.
        supports: for each enumerated latent its values `[K, *event]`; index k of a factor means the k-th.
        shapes: for each enumerated latent its batch shape in the program.
        powers: what the product over a plate is raised to, where only a part of the plate was run.
    """

    factors: Mapping[str, Factor]
    variables: Mapping[str, tuple[str, ...]]
    supports: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    powers: Mapping[str, float]

    def graph(self, sites: Collection[str] | None = None, keep: Collection[str] = ()) -> FactorGraph:
        """The factor graph of some sites (all, if none are named), with plates to keep apart in every sum."""
        chosen = {name: f for name, f in self.factors.items() if sites is None or name in sites}
        named = {name for factor in chosen.values() for name in factor.names}
        return FactorGraph(
            tuple(chosen.values()),
            {name: plates for name, plates in self.variables.items() if name in named},
            tuple(keep),
            {plate: power for plate, power in self.powers.items() if power != 1.0 and plate not in keep},
        )

    def values(self, name: str, index: Tensor) -> Tensor:
        """Values at indices `[n, *plates]`, shaped as n draws by the program: `[n, *batch, *event]`."""
        support = self.supports[name]
        return support[index].reshape(index.shape[:1] + self.shapes[name] + support.shape[1:])


def enumerate_sites(
    run: Callable[[], object],
    structure: Structure,
    sites: Collection[str] = (),
    *,
    nesting: int | None = None,
    powers: Mapping[str, float] | None = None,
) -> Enumeration:
    """Run a program with all values of the named latents, and read the log probability of every site.

    Other latents keep the values that `run` gives them: one each, or many along a plate left of the
    program's own.

    Args:
        run: runs the program, e.g. a `Problem`; it may be called twice.
        structure: the structure of the program.
        sites: the latents to enumerate.
        nesting: batch dimensions that `run` uses; by default those of the structure.
        powers: factors by which `run` scales what is inside a plate (see `ScaleRows`). Like the scale of a
            subsampled plate, they apply to what is left once the latents inside the plate are summed out.

    Raises:
        Refused: a site stands in the way; the refusal names it and what it lacks.
    """
    wanted = frozenset(sites)
    chosen = [name for name in structure.sites if name in wanted]
    for name in chosen:
        _require_enumerable(structure, name)
    _require_followed(structure, wanted)
    left_of = structure.nesting if nesting is None else nesting
    scopes = {s.name: tuple(p for p in (*s.parents, s.name) if p in wanted) for s in structure}
    shared = colouring(moral_neighbours(scopes.values()))
    # Should the program combine values that no site depends on together, every latent gets its own dimension.
    own = {name: i for i, name in enumerate(chosen)}
    failure: Exception | None = None
    last: str | None = None
    for colours, candidates in ((shared, scopes), (own, dict.fromkeys(scopes, tuple(chosen)))):
        dims = {name: -(left_of + 1 + colours[name]) for name in chosen}
        if -min(dims.values(), default=0) > _MAX_DIMS:
            continue
        reader = _Reader(structure, candidates, dims, left_of, powers or {})
        try:
            return reader.read(run)
        except PgenError:
            raise
        except Exception as error:
            if not chosen:
                raise
            failure, last = error, reader.current
    if failure is None:
        raise _refused(
            None,
            f"room for all its values: at most {_MAX_DIMS} finite latents may meet",
            f"{max(shared.values()) + 1} latents of {structure.name} meet in its distributions",
        )
    raise _refused(
        last,
        "statements that work on all values of the finite latents at once",
        f"{structure.name} raised {type(failure).__name__} near it ({failure}) when {_listed(chosen)} held "
        "all their values, as tensors of shape [values, 1, ...]; index tensors by tensors (`table[z]`, "
        "`Vindex(table)[..., z]`), and choose by torch.where instead of `if`",
    ) from failure


def _listed(names: Collection[str]) -> str:
    first = list(names)[:5]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class _Mixed(RuntimeError):
    """A log probability extends along a dimension that none of its site's ancestors was given."""


class _Reader(Messenger):
    """Gives latents their values on the way in, and turns log probabilities into factors on the way out."""

    def __init__(
        self,
        structure: Structure,
        candidates: Mapping[str, tuple[str, ...]],
        dims: Mapping[str, int],
        nesting: int,
        powers: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.structure = structure
        self.candidates = candidates
        self.dims = dims
        self.nesting = nesting
        self.given = powers
        self.current: str | None = None
        self.factors: dict[str, Factor] = {}
        self.variables: dict[str, tuple[str, ...]] = {}
        self.powers: dict[str, float] = {}
        self.supports: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}

    def read(self, run: Callable[[], object]) -> Enumeration:
        try:
            with self:
                run()
        except PgenError:
            raise
        except Exception:
            # What a program does after its last site (stacking its states, say) has no part in its law.
            if any(name not in self.factors for name in self.structure.sites):
                raise
        return Enumeration(self.factors, self.variables, self.supports, self.shapes, self.powers)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        self.current = name
        if name not in self.dims or msg["is_observed"]:
            return
        support = msg["fn"].enumerate_support(expand=False)
        event = support.shape[support.dim() - len(msg["fn"].event_shape) :]
        self.supports[name] = support.reshape(support.shape[:1] + event)
        msg["value"] = support.reshape(support.shape[:1] + (1,) * (-self.dims[name] - 1) + event)
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample" or (msg["infer"] or {}).get("_deterministic"):
            return
        frames = {frame.dim: frame for frame in msg["cond_indep_stack"] if frame.dim is not None}
        scale = self._beyond_plates(msg, frames)
        if name in self.supports:
            if not isinstance(scale, float) or scale != 1.0:
                raise _refused(
                    name,
                    "a log probability that is not scaled",
                    "it is summed out, and poutine.scale around it leaves open whether the sum or its terms "
                    "are scaled; scale the observed sites only",
                )
            undeclared = [d for d in range(-len(fn.batch_shape), 0) if d not in frames and d >= -self.nesting]
            if any(fn.batch_shape[d] > 1 for d in undeclared):
                raise _refused(
                    name,
                    "a plate around its batch dimensions",
                    f"its batch shape is {list(self.structure.sites[name].batch_shape)}, and only pyro.plate "
                    "says that its elements are independent; put the statement into a plate",
                )
            # A mask takes a latent out of the joint density. Summed out it counts for one, as its law does.
            log = self._own_table(name, fn)
            self.variables[name] = tuple(plate_name(self.structure, frames[d].name) for d in sorted(frames))
            batch = len(self.structure.sites[name].batch_shape)
            sizes = (
                frames[d].size if d in frames else 1 for d in range(-max(batch, -min(frames, default=0)), 0)
            )
            self.shapes[name] = torch.Size(sizes)
        else:
            log = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
            log = scale_and_mask(log, scale, msg["mask"])
        self.factors[name] = self._factor(name, log, frames)

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
        own = self.dims[name] if name in self.supports else 0
        depth = max(log.dim(), -min(frames, default=0), -own)
        log = log[(None,) * (depth - log.dim())]
        names: list[str] = []
        rest: list[int] = []
        shape = list(log.shape)
        for dim in range(-depth, 0):
            if dim in frames:
                names.append(plate_name(self.structure, frames[dim].name))
                shape[dim] = frames[dim].size
            elif dim in variables and (dim == own or shape[dim] == len(self.supports[variables[dim]])):
                if shape[dim] > 1 or dim == own:
                    names.append(variables[dim])
                else:
                    rest.append(dim)
            elif shape[dim] == 1 or dim >= -self.nesting:
                rest.append(dim)
            else:
                raise _Mixed(
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


def _require_enumerable(structure: Structure, name: str) -> None:
    site = structure.sites[name]
    if site.observed or not site.enumerable:
        raise _refused(
            name,
            "Capability.ENUMERATE",
            f"{site.distribution} with support {site.support} has no finite list of values to sum over",
        )


def _require_followed(structure: Structure, wanted: frozenset[str]) -> None:
    for leak in structure.leaks:
        lost = sorted(leak.labels & wanted)
        if lost:
            raise _refused(
                lost[0],
                "uses that stay in torch",
                f"{describe_leak(leak)}. Index tensors by tensors (`table[z]`, `table` a tensor) and choose "
                "by torch.where instead of `if`, so that all values can be tried at once",
            )


def _refused(site: str | None, missing: str, why: str) -> Refused:
    where = f"site {site!r}" if site is not None else "the program"
    return Refused(f"{where} lacks {missing}: {why}", Refusal(site, missing, why))

"""Groups of Gaussian latents: the log joint density as a function of two vectors, and its exact expansion."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.algorithms.elimination import colouring, moral_neighbours
from pgen.algorithms.quadratic import Gaussian, NotQuadratic, Shape, gaussian, prove
from pgen.backends.exact.groups import Group
from pgen.backends.exact.joint import Joint, axes_of, by_row
from pgen.backends.exact.laws import Law, gaussian_law
from pgen.capability import Refusal
from pgen.errors import Refused
from pgen.structure import Structure

#: A latent tied to more others than this is integrated out last, so that it does not tie them to each other.
_HUB = 24


@dataclass(frozen=True)
class _Place:
    """Where a latent lies in the vectors."""

    shape: torch.Size  # of its value
    inner: bool
    axis: int | None  # of its value, along the plate of the blocks
    start: int
    size: int  # per block


@dataclass(frozen=True)
class Layout:
    """How the values of a group make up outer latents `[G]` and inner ones `[B, Q]`, B plate elements."""

    plate: str | None
    places: Mapping[str, _Place]
    shape: Shape

    def unpack(self, outer: Tensor, inner: Tensor) -> dict[str, Tensor]:
        """Values in their natural shapes, with leading dimensions, from `[*n, G]` and `[*n, B, Q]`."""
        lead = outer.shape[:-1]
        values: dict[str, Tensor] = {}
        for name, place in self.places.items():
            span = slice(place.start, place.start + place.size)
            if place.axis is None:
                flat = inner[..., 0, span] if place.inner else outer[..., span]
                values[name] = flat.reshape(lead + place.shape)
            else:
                rest = place.shape[: place.axis] + place.shape[place.axis + 1 :]
                blocks = inner[..., span].reshape(lead + inner.shape[-2:-1] + rest)
                values[name] = blocks.movedim(len(lead), len(lead) + place.axis)
        return values

    def split(self, name: str, outer: Tensor, inner: Tensor, event: int) -> Tensor:
        """A latent's rows of a statistic `[G, *]`, `[B, Q, *]`: `[*batch, E, *]`, events flattened to E."""
        place = self.places[name]
        span = slice(place.start, place.start + place.size)
        cut = len(place.shape) - event
        batch, size = place.shape[:cut], place.shape[cut:].numel()
        if place.axis is None:
            flat = inner[0, span] if place.inner else outer[span]
            return flat.reshape(*batch, size, *flat.shape[1:])
        rest = batch[: place.axis] + batch[place.axis + 1 :]
        part = inner[:, span]
        return part.reshape(len(part), *rest, size, *part.shape[2:]).movedim(0, place.axis)


def layout(structure: Structure, group: Group, shapes: Mapping[str, torch.Size], rows: str | None) -> Layout:
    """Choose the plate whose elements become blocks; colour the latents, so that few passes give the Hessian.

    Args:
        structure: of the problem.
        group: the latents.
        shapes: of their values.
        rows: the plate of the data, if each row has an answer of its own; its elements are the blocks then.
    """
    scopes = [
        [p for p in (*structure.sites[name].parents, name) if p in group.latents] for name in group.sites
    ]
    tied = moral_neighbours([*scopes, *([name] for name in group.latents)])
    axes = {name: axes_of(structure, name, shapes[name]) for name in group.latents}
    candidates = [rows] if rows is not None else [None, *dict.fromkeys(p for a in axes.values() for p in a)]
    plate = min(candidates, key=lambda candidate: _cost(candidate, axes, shapes))
    if plate is None:
        outer = [name for name in group.latents if len(tied[name]) > _HUB]
    else:
        outer = [name for name in group.latents if plate not in axes[name]]
    inner = [name for name in group.latents if name not in outer]
    places: dict[str, _Place] = {}
    counts = [0, 0]
    for names, is_inner in ((outer, False), (inner, True)):
        for name in names:
            axis = axes[name].get(plate) if plate is not None and is_inner else None
            size = shapes[name].numel() // (shapes[name][axis] if axis is not None else 1)
            places[name] = _Place(shapes[name], is_inner, axis, counts[is_inner], size)
            counts[is_inner] += size
    first = places[inner[0]] if inner else None
    blocks = first.shape[first.axis] if first is not None and first.axis is not None else 1
    ordered = {name: places[name] for name in (*outer, *inner)}
    return Layout(plate, places, _coloured(ordered, tied, counts[0], blocks, counts[1]))


def _cost(
    plate: str | None, axes: Mapping[str, Mapping[str, int]], shapes: Mapping[str, torch.Size]
) -> float:
    blocks, width = 1, 0
    for name, shape in shapes.items():
        if name in axes:
            axis = axes[name].get(plate) if plate is not None else None
            blocks = max(blocks, shape[axis] if axis is not None else 1)
            width += shape.numel() // (shape[axis] if axis is not None else 1)
    return blocks * float(width) ** 3


def _coloured(
    places: Mapping[str, _Place], tied: Mapping[str, Collection[str]], outer: int, blocks: int, inner: int
) -> Shape:
    """Columns of one colour must not meet in a row. Rows of outer latents are not read from inner columns."""
    width = outer + inner
    if len(places) < 3:
        return Shape(outer, blocks, inner)
    inside = [name for name, place in places.items() if place.inner]
    near = {name: [other for other in tied[name] if places[other].inner] for name in inside}
    apart = moral_neighbours([[name, *near[name]] for name in inside])
    site_colours = colouring({name: apart[name] for name in inside})
    colours = list(range(outer)) + [0] * inner
    widest: dict[int, int] = {}
    for name in inside:
        widest[site_colours[name]] = max(widest.get(site_colours[name], 0), places[name].size)
    first: dict[int, int] = {}
    total = outer
    for colour, size in sorted(widest.items()):
        first[colour] = total
        total += size
    spans: dict[str, Tensor] = {}
    for name, place in places.items():
        start = place.start + (outer if place.inner else 0)
        spans[name] = torch.arange(start, start + place.size)
        if place.inner:
            base = first[site_colours[name]]
            colours[start : start + place.size] = range(base, base + place.size)
    if total == width:
        return Shape(outer, blocks, inner)
    pairs = [
        torch.cartesian_prod(spans[name], spans[other]) for name in places for other in (name, *tied[name])
    ]
    return Shape(outer, blocks, inner, colours, torch.cat(pairs))


@dataclass(frozen=True)
class GaussianPart:
    """One Gaussian group, integrated out.

    Attributes:
        structure: of the problem.
        group: the latents.
        layout: of their values in vectors.
        found: the Gaussian over those vectors.
        rows: the plate of the data, if each row has an answer of its own.
    """

    structure: Structure
    group: Group
    layout: Layout
    found: Gaussian
    rows: str | None

    @staticmethod
    def of(joint: Joint, group: Group, proof: bool) -> GaussianPart:
        """Expand the log joint density; with `proof`, settle whether it is what its expansion says.

        Raises:
            Refused: it is not quadratic; the refusal names a latent of the group.
        """
        rows, values = joint.rows, {name: joint.values[name] for name in group.latents}
        arranged = layout(joint.structure, group, {name: v.shape for name, v in values.items()}, rows)

        def log_joint(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
            factors = joint.read(arranged.unpack(outer, inner))
            blocks, rest = inner.new_zeros(len(inner)), inner.new_zeros(())
            for name in group.sites:
                factor = factors[name]
                if rows is not None and rows in factor.names:
                    blocks = blocks + by_row(factor, rows)
                else:
                    rest = rest + factor.log.sum()
            return blocks, rest

        try:
            found = gaussian(log_joint, arranged.shape, values[group.latents[0]])
            if proof:
                prove(log_joint, found)
        except NotQuadratic as error:
            site = group.latents[0]
            why = f"the log joint density is not quadratic in {', '.join(group.latents[:5])}: {error}"
            raise Refused(f"site {site!r}: {why}", Refusal(site, "a Gaussian posterior", why)) from error
        return GaussianPart(joint.structure, group, arranged, found, rows)

    def evidence(self) -> Tensor:
        """Log of the integral: `[rows]`, or a scalar where the rows are tied."""
        if self.rows is None:
            return self.found.log_normalizer
        return self.found.blocks + self.found.constant / len(self.found.blocks)

    def draws(self, n: int) -> dict[str, Tensor]:
        """Joint draws of the latents, `[n, *batch, *event]`."""
        return self.layout.unpack(*self.found.sample(n))

    def laws(self) -> dict[str, Law]:
        """Marginals of the latents."""
        outer, inner = self.found.covariances()
        found = {}
        for name, place in self.layout.places.items():
            site = self.structure.sites[name]
            event = len(site.event_shape)
            mean = self.layout.split(name, self.found.outer, self.found.inner, event)
            span = slice(place.start, place.start + place.size)
            covariance = self.layout.split(name, outer[:, span], inner[:, :, span], event)
            found[name] = gaussian_law(site, mean, _own_columns(covariance, mean.shape, place))
        return found


def _own_columns(covariance: Tensor, shape: torch.Size, place: _Place) -> Tensor:
    """Of `[*batch, E, columns]`, columns being batch and events of the block, each one's own `[E, E]`."""
    batch, size = shape[:-1], shape[-1]
    rest = list(batch)
    if place.axis is not None:
        covariance = covariance.movedim(place.axis, 0)
        rest = [batch[place.axis], *(n for i, n in enumerate(batch) if i != place.axis)]
        lead, count = rest[0], torch.Size(rest[1:]).numel()
    else:
        lead, count = 1, torch.Size(batch).numel()
    table = covariance.reshape(lead, count, size, count, size)
    own = table.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(*rest, size, size)
    return own.movedim(0, place.axis) if place.axis is not None else own

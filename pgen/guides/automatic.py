"""Global guides: one law over all continuous latents of a program of fixed size, whatever its structure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from pgen.errors import OptionError, ProgramError
from pgen.guides.evidence import Probe, Reader, Slot
from pgen.guides.families import GAIN, Continuous, lower_triangle, require_cholesky
from pgen.guides.features import Unconstrain, require_latents
from pgen.guides.gather import require_sizes, stack_out
from pgen.guides.layout import Layout, Plates
from pgen.guides.plan import global_unit
from pgen.guides.splines import Coupled, couplings
from pgen.guides.transport import Affine, LowRank, Spline, Transport
from pgen.problem import Problem
from pgen.structure import Structure

Kind = Literal["mean-field", "full-rank", "low-rank", "flow"]
KINDS: tuple[Kind, ...] = ("mean-field", "full-rank", "low-rank", "flow")

JOINT = "_joint"
"""The auxiliary site of all latents together, unconstrained."""


class Automatic(nn.Module):
    r"""One law $q(z_1, \dots, z_k)$ of all continuous latents, in unconstrained space.

    .. math:: v \sim q_\phi, \qquad z_i = T_i(v_i)

    with $T_i$ the bijection to the support of latent $i$, and $v$ a vector of every element of every latent:

    - `"mean-field"`: independent Gaussians, drawn site by site (plain ones over real supports, so that
      analytic divergences apply);
    - `"full-rank"`: one Gaussian, its Cholesky factor learned (at most 2,000 dimensions);
    - `"low-rank"`: one Gaussian, covariance diagonal plus `rank` factors;
    - `"flow"`: a neural spline flow with coupling layers, see `pgen.guides.splines`.

    The last three draw $v$ at the auxiliary site `_joint`, and each latent at a `Delta` that carries the
    Jacobian. All parameters exist from the start. Every element of every latent starts near the
    median of its prior.

    Make one with `Automatic.of`, call it as an `Amortized`: `guide(*guide.read(problem))`.

    Attributes:
        order: names of its sites in the order of drawing.
        graph: dependence among them.
        read: makes the arguments of a call from a problem.
        fixed: whether it has parameters for each row, so that it serves only the rows that it was made for,
            all at once.

    References:
        Kucukelbir, Tran, Ranganath, Gelman, Blei: Automatic differentiation variational inference (JMLR
            2017).
        Rezende and Mohamed: Variational inference with normalizing flows (ICML 2015).

    Example:
        >>> import pyro.distributions as dist, torch
        >>> from pgen.inspection import structure_of
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> problem = Problem.of(model, torch.randn(10))
        >>> guide = Automatic.of(problem, structure_of(problem), "full-rank")
        >>> sorted(guide(*guide.read(problem)))
        ['_joint', 'scale']
    """

    def __init__(
        self,
        structure: Structure,
        probe: Probe,
        read: Reader,
        kind: Kind = "mean-field",
        *,
        rank: int | None = None,
        marginalised: Collection[str] = (),
        initial_scale: float | None = None,
    ) -> None:
        super().__init__()
        if initial_scale is None:
            initial_scale = 1.0 if kind == "flow" else 0.1
        _check(structure, kind, rank, marginalised, initial_scale)
        self.read = read
        self.kind: Kind = kind
        self.layout = layout = Layout.of(structure, probe)
        self.sites = tuple(name for name in structure.latents if name not in marginalised)
        codes = {n: Unconstrain(structure.sites[n], structure) for n in self.sites}
        pieces = {n: _Piece(n, codes[n], layout) for n in self.sites}
        self.pieces = pieces
        total = sum(piece.numel for piece in pieces.values())
        units = {
            n: global_unit(*layout.by_element(codes[n].flat(probe.laws[n]), pieces[n].plates))
            for n in self.sites
        }
        self.heads = nn.ModuleList()
        self.outputs = nn.ParameterList()
        self.joint: _Joint | None = None
        if kind == "mean-field" or not self.sites:
            for name in self.sites:
                head = Continuous(structure.sites[name], codes[name], "normal", initial_scale, 1)
                self.heads.append(head)
                self.outputs.append(nn.Parameter(head.spread(*units[name]) / GAIN))
        else:
            centre = [torch.cat([units[n][i].flatten() for n in self.sites]) for i in (0, 1)]
            self.joint = _Joint(kind, total, centre, initial_scale, rank or max(1, round(total**0.5)))
        first = () if self.joint is None else (JOINT,)
        self.order = (*first, *self.sites)
        self.fixed = any(layout.is_local(name) for name in self.sites)
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from(self.order)
        self.graph.add_edges_from((JOINT, name) for name in self.sites if first)

    @staticmethod
    def of(
        problem: Problem,
        structure: Structure,
        kind: Kind = "mean-field",
        *,
        rank: int | None = None,
        marginalised: Collection[str] = (),
        initial_scale: float | None = None,
    ) -> Automatic:
        """Make a guide for a problem of fixed size.

        Args:
            problem: the program with all of its data, as `inspect_problem` returns it.
            structure: its structure.
            kind: `"mean-field"`, `"full-rank"`, `"low-rank"` or `"flow"`.
            rank: number of factors of `"low-rank"`; None: the square root of the number of dimensions.
            marginalised: latents that are summed out elsewhere; discrete ones must be.
            initial_scale: standard deviation to start from, in units of the prior's (of its square root, if
                over one). None: 0.1, and 1 for a flow, which stays too narrow for a wide posterior from there.

        Raises:
            ProgramError: a latent is discrete, or has a support that no guide can be made for or that depends
                on others.
            OptionError: an option has a value that it cannot have, or a covariance would be too large.
        """
        read = Reader(problem, structure)
        probe = Probe.of(problem, structure, read, whole=True)
        return Automatic(
            structure, probe, read, kind, rank=rank, marginalised=marginalised, initial_scale=initial_scale
        )

    def forward(self, observed: Mapping[str, Tensor], plates: Mapping[str, tuple]) -> dict[str, Tensor]:
        """Draw every latent at a Pyro site of its name.

        Args:
            observed: values of the observed sites; not read, so that all guides are called alike.
            plates: size and dimension of each plate, and indices if subsampled: `(size, dim)` or a `Slot`.

        Raises:
            DataError: a plate has another size than the program that the guide was made for.
        """
        slots = self.layout.now(plates)
        opened = Plates(self.layout, slots)
        parts: Sequence[Tensor] = ()
        values: dict[str, Tensor] = {}
        if self.joint is not None:
            values[JOINT] = pyro.sample(JOINT, self.joint(), infer={"is_auxiliary": True})
            parts = values[JOINT].split([piece.numel for piece in self.pieces.values()], dim=-1)
        for i, name in enumerate(self.sites):
            piece = self.pieces[name]
            require_sizes(name, piece.sizes, {p: Slot(slots[p].size, slots[p].dim) for p in piece.sizes})
            if self.joint is None:
                law = self.heads[i](piece.laid(GAIN * self.outputs[i], slots))
            else:
                law = piece.delta(parts[i], slots)
            with opened.around(name):
                values[name] = pyro.sample(name, law)
        return values

    def transport(self) -> Transport:
        """The map from standard normal vectors to the unconstrained latents that the guide is now, frozen."""
        sizes = {name: piece.numel for name, piece in self.pieces.items()}
        with torch.no_grad():
            if self.joint is not None:
                return self.joint.transport(sizes).to()
            heads: list[Any] = list(self.heads)
            outputs = zip(heads, self.outputs, self.pieces.values(), strict=True)
            laws = [
                head.affine(GAIN * flat.unflatten(0, (piece.copies, -1))) for head, flat, piece in outputs
            ]
            loc, scale = (torch.cat([law[i].flatten() for law in laws]) for i in (0, 1))
            return Affine(sizes, loc, scale)


class _Piece:
    """The part of one latent in the vector of all: unconstrained elements at every place in its plates."""

    def __init__(self, name: str, code: Unconstrain, layout: Layout) -> None:
        self.code = code
        self.nesting = layout.nesting
        self.plates = tuple(sorted(layout.plates[name], key=lambda p: layout.slots[p].dim))
        self.sizes = {p: layout.slots[p].size for p in self.plates}
        self.depth = max((-layout.slots[p].dim for p in self.plates), default=0)
        self.copies = torch.Size(self.sizes.values()).numel()
        self.numel = self.copies * code.numel

    def laid(self, flat: Tensor, slots: Mapping[str, Slot]) -> Tensor:
        """A vector [..., copies * K] as [..., *batch, K], elements of a subsampled plate picked."""
        whole = [Slot(slots[p].size, slots[p].dim) for p in self.plates]
        laid = stack_out(flat, whole)
        for plate in self.plates:
            index = slots[plate].index
            if index is not None:
                laid = laid.index_select(slots[plate].dim - 1, index.to(laid.device))
        return laid

    def delta(self, flat: Tensor, slots: Mapping[str, Slot]) -> dist.Delta:
        """All mass at the value of a vector [..., copies * K], with the Jacobian of the bijection."""
        laid = self.laid(flat, slots)
        free = laid.reshape(laid.shape[:-1] + self.code.shape)
        while free.ndim - len(self.code.shape) > self.depth and free.shape[0] == 1:
            free = free.squeeze(0)
        if self.code.real:
            return dist.Delta(free, event_dim=self.code.event_dim)
        transform = self.code.transform(flat)
        value = transform(free)
        jacobian = transform.log_abs_det_jacobian(free, value)
        jacobian = jacobian.reshape(*value.shape[: value.ndim - self.code.event_dim], -1).sum(-1)
        return dist.Delta(value, log_density=-jacobian, event_dim=self.code.event_dim)


class _Joint(nn.Module):
    """A law of one real vector: a Gaussian or a flow, centred and scaled by the prior."""

    loc: Tensor
    scale: Tensor

    def __init__(self, kind: Kind, numel: int, centre: list[Tensor], initial_scale: float, rank: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "full-rank":
            require_cholesky("guide='full-rank'", numel)
        self.register_buffer("loc", centre[0])
        self.register_buffer("scale", torch.where(centre[1] > 0, centre[1], 1.0))
        self.mean = nn.Parameter(torch.zeros(numel))
        self.log_scale = nn.Parameter(torch.full((numel,), math.log(initial_scale) / GAIN))
        self.flow: nn.Module | None = None
        if kind == "full-rank":
            self.below = nn.Parameter(torch.zeros(numel * (numel - 1) // 2))
        elif kind == "low-rank":
            rank = min(rank, numel)
            self.factor = nn.Parameter(torch.randn(numel, rank) * 0.1 / (GAIN * rank**0.5))
        else:
            self.flow = couplings(numel)

    def forward(self) -> dist.TorchDistribution:
        """The law of the vector."""
        loc, scale = self._centre()
        if self.flow is not None:
            base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
            coupled = Coupled(self.flow)
            return dist.TransformedDistribution(
                base, [coupled, AffineTransform(loc, scale, event_dim=1, cache_size=1)]
            )
        if self.kind == "low-rank":
            factor = scale.unsqueeze(-1) * (GAIN * self.factor)
            return dist.LowRankMultivariateNormal(loc, factor, scale.square())
        return dist.MultivariateNormal(loc, scale_tril=lower_triangle(GAIN * self.below, scale))

    def transport(self, sizes: Mapping[str, int]) -> Transport:
        """The law as a map from standard normal vectors."""
        loc, scale = self._centre()
        if self.flow is not None:
            return Spline(sizes, loc, scale, self.flow)
        if self.kind == "low-rank":
            return LowRank.of(sizes, loc, scale, GAIN * self.factor)
        return Affine(sizes, loc, lower_triangle(GAIN * self.below, scale))

    def _centre(self) -> tuple[Tensor, Tensor]:
        loc = self.loc + self.scale * GAIN * self.mean
        return loc, self.scale * (GAIN * self.log_scale).exp()


def _check(
    structure: Structure, kind: str, rank: int | None, marginalised: Collection[str], initial_scale: float
) -> None:
    if kind not in KINDS:
        msg = f"Automatic(kind={kind!r}): expected one of {', '.join(map(repr, KINDS))}."
        raise OptionError(msg)
    if (rank is not None and rank < 1) or not initial_scale > 0:
        msg = f"Automatic(rank={rank}, initial_scale={initial_scale}): both must be positive, the rank whole."
        raise OptionError(msg)
    require_latents("Automatic", structure, marginalised)
    for name in structure.latents:
        if name not in marginalised and structure.sites[name].discrete:
            msg = (
                f"site {name!r}: {structure.sites[name].distribution} is discrete, and guide={kind!r} is "
                f"a law of real vectors. Sum it out (marginalised=[{name!r}]), or use an amortized guide."
            )
            raise ProgramError(msg)

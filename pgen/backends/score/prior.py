"""The latents that have denoisers, side by side as one vector: what is known of them before anything is observed.

Independent latents, each with noise added at the same level, have a denoiser together: each is denoised by itself. So
whatever draws from the posterior of one diffusion draws from that of several at once, and needs to know of one vector
only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Size, Tensor

from pgen.algorithms.diffusion.posteriors import Conjugate
from pgen.conversion import Converted
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure


def denoising_law(fn: Any) -> Any:
    """The law with the denoiser, inside of what wraps it."""
    while not hasattr(type(fn), "denoise"):
        fn = fn.base if isinstance(fn, Converted) else fn.base_dist
    return fn


def counted(fn: Any, value: Tensor) -> Tensor:
    """Numbers of the law with the denoiser as what wraps it counts them: none where masked, an event's together."""
    if hasattr(type(fn), "denoise"):
        return value
    found: Any = counted(fn.base if isinstance(fn, Converted) else fn.base_dist, value)
    if isinstance(fn, dist.MaskedDistribution):
        found = scale_and_mask(found, mask=fn._mask)
    else:
        found = sum_rightmost(found, getattr(fn, "reinterpreted_batch_ndims", 0))
    return torch.as_tensor(found)


@dataclass(frozen=True)
class Block:
    """The place of one latent.

    Attributes:
        name: of the site.
        law: with the denoiser.
        shape: of the site's value.
        batch: how many of its dimensions are batch dimensions.
        axis: the one along the rows of the data, or None.
        start: first element in a row's vector.
    """

    name: str
    law: Any
    shape: Size
    batch: int
    axis: int | None
    start: int

    @property
    def size(self) -> int:
        """Elements in a row's vector."""
        return math.prod(self.shape) // (1 if self.axis is None else self.shape[self.axis])

    def value(self, part: Tensor) -> Tensor:
        """Elements `[rows, particles, size]` as values `[particles, *shape]`."""
        rest = [s for i, s in enumerate(self.shape) if i != self.axis]
        laid = part.reshape(*part.shape[:2], *rest).movedim(1, 0)
        return laid.squeeze(1) if self.axis is None else laid.movedim(1, 1 + self.axis)

    def part(self, value: Tensor) -> Tensor:
        """The reverse."""
        laid = value.unsqueeze(1) if self.axis is None else value.movedim(1 + self.axis, 1)
        laid = laid.movedim(1, 0)
        return laid.reshape(*laid.shape[:2], -1)

    def levels(self, sigma: Tensor) -> Tensor:
        """Noise levels `[rows, particles]` for values `[particles, *shape]`."""
        laid = sigma.mT
        if self.axis is None:
            return laid.reshape(-1, *[1] * self.batch)
        return laid.reshape(len(laid), *[-1 if i == self.axis else 1 for i in range(self.batch)])


@dataclass(frozen=True)
class Prior:
    """Several latents with denoisers, one vector for each row of the data.

    Attributes:
        blocks: where each latent is in it.
        rows: of the data, each with a posterior of its own; 1 where they share a latent.
        like: a tensor of the dtype and on the device of their values.
    """

    blocks: tuple[Block, ...]
    rows: int
    like: Tensor

    @staticmethod
    def of(problem: Problem, structure: Structure, names: Sequence[str], apart: bool) -> Prior:
        """Lay out latents of a problem, whose learned tensors are installed.

        Args:
            problem: the program with its data.
            structure: of the problem.
            names: the latents.
            apart: whether the rows of the data are independent of each other.
        """
        with validating(False), torch.no_grad():
            nodes: Any = poutine.trace(problem).get_trace().nodes
        blocks: list[Block] = []
        start = 0
        for name in names:
            node, site = nodes[name], structure.sites[name]
            shape = Size(node["value"].shape)
            batch = len(shape) - len(site.event_shape)
            plate = next((structure.plates[p] for p in site.plates if p in structure.data_plates), None)
            axis = batch + plate.dim if apart and plate is not None else None
            block = Block(name, denoising_law(node["fn"]), shape, batch, axis, start)
            blocks.append(block)
            start += block.size
        like = next((b.law.like for b in blocks if hasattr(b.law, "like")), torch.empty(0))
        return Prior(tuple(blocks), (problem.rows or 1) if apart else 1, like)

    @property
    def size(self) -> int:
        """Length of a row's vector."""
        return sum(block.size for block in self.blocks)

    @property
    def sigma_min(self) -> float:
        """The least noise level that all denoisers know."""
        return max(block.law.schedule.sigma_min for block in self.blocks)

    @property
    def sigma_max(self) -> float:
        """The largest one."""
        return min(block.law.schedule.sigma_max for block in self.blocks)

    @property
    def conjugate(self) -> Conjugate | None:
        """The denoiser, where it knows its posterior given linear-Gaussian observations and is all there is."""
        law = self.blocks[0].law
        alone = len(self.blocks) == 1 and self.size == math.prod(law.event_shape)
        if not alone or getattr(law, "context", None) is not None:
            return None
        denoiser = getattr(law, "denoiser", None)
        return denoiser if callable(getattr(denoiser, "linear_posterior", None)) else None

    def denoiser(self, flat: Tensor, sigma: Tensor) -> Tensor:
        """Denoise vectors `[rows * particles, size]` at levels `[rows * particles]`, row by row of the data."""
        wide = flat.reshape(self.rows, -1, self.size)
        levels = sigma.reshape(self.rows, -1)
        parts = [
            b.part(b.law.denoise(b.value(wide[..., b.start : b.start + b.size]), b.levels(levels)))
            for b in self.blocks
        ]
        return torch.cat(parts, -1).reshape(flat.shape)

    def values(self, flat: Tensor) -> dict[str, Tensor]:
        """Values by site `[particles, *shape]` of vectors `[rows * particles, size]`."""
        wide = flat.reshape(self.rows, -1, self.size)
        return {b.name: b.value(wide[..., b.start : b.start + b.size]) for b in self.blocks}

r"""Maps from standard normal vectors to the latents of a program: what a joint guide has learned, frozen.

    v ~ N(0, I),    u = T(v)

u holds every element of every continuous latent, unconstrained, in the order of the program. A chain that moves v sees
the posterior as the guide would have it, close to a standard normal; the log determinant of T' is what that costs.

    Affine    u = loc + scale v             scale a diagonal, or lower-triangular
    LowRank   u = loc + scale (I + A Aᵀ)^½ v     without a matrix of d x d
    Spline    u = loc + scale f(v)        f a neural spline flow
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from pgen.errors import CheckpointError
from pgen.guides.splines import couplings

KIND, SIZES, TENSORS = "transport", "sizes", "tensors"
FLOW = "flow."


@dataclass(frozen=True, eq=False)
class Transport(ABC):
    """A smooth bijection of real vectors, and which latents the vectors are made of.

    How to write one: a frozen dataclass with `forward` and `inverse`; fields are sizes, then tensors or modules.

    Attributes:
        sizes: elements of each latent, unconstrained, in order; d in all.
    """

    sizes: Mapping[str, int]

    @abstractmethod
    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained latents `[..., d]` of vectors `[..., d]`, and log|det T'(v)| `[...]`, in nats."""

    @abstractmethod
    def inverse(self, u: Tensor) -> Tensor:
        """Vectors `[..., d]` of unconstrained latents `[..., d]`."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy that learns nothing, on a device, in a floating-point type."""
        own = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        return replace(self, **{name: _moved(value, device, dtype) for name, value in own.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All its numbers, by name."""
        found: dict[str, Tensor] = {}
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            module = isinstance(value, nn.Module)
            found |= (
                {f"{f.name}.{k}": v for k, v in value.state_dict().items()} if module else {f.name: value}
            )
        return found

    def plain(self) -> dict[str, Any]:
        """Names, sizes and tensors, which `transport_of` makes the same from."""
        return {
            KIND: type(self).__name__,
            SIZES: dict(self.sizes),
            TENSORS: {k: v.detach() for k, v in self.tensors().items()},
        }

    def __repr__(self) -> str:
        """Kind, latents, and a digest of the numbers: two of one name move chains alike."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        named = ", ".join(f"{name}: {size}" for name, size in self.sizes.items())
        return f"{type(self).__name__}({named}; {digest.hexdigest()[:12]})"


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Transport):
    """Location and scale: the guides `"mean-field"` and `"full-rank"`.

    Attributes:
        loc: `[d]`.
        scale: standard deviations `[d]`, or a lower-triangular factor `[d, d]`.

    Example:
        >>> push = Affine({"x": 2}, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.5]))
        >>> push.forward(torch.ones(1, 2))
        (tensor([[3.0000, 0.5000]]), tensor([0.]))
        >>> push.inverse(torch.tensor([3.0, 0.5]))
        tensor([1., 1.])
    """

    loc: Tensor
    scale: Tensor

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained latents and log determinants."""
        diagonal = self.scale if self.scale.dim() == 1 else self.scale.diagonal()
        moved = v * self.scale if self.scale.dim() == 1 else v @ self.scale.mT
        return self.loc + moved, diagonal.log().sum().expand(v.shape[:-1])

    def inverse(self, u: Tensor) -> Tensor:
        """Vectors."""
        if self.scale.dim() == 1:
            return (u - self.loc) / self.scale
        solved = torch.linalg.solve_triangular(self.scale, (u - self.loc).unsqueeze(-1), upper=False)
        return solved.squeeze(-1)


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Transport):
    """The symmetric root of a covariance scale (I + A Aᵀ) scale, of A = U S Vᵀ: I + U ((1 + S²)^½ - 1) Uᵀ.

    Attributes:
        loc: `[d]`.
        scale: `[d]`.
        directions: U, orthonormal columns `[d, r]`.
        stretch: (1 + S²)^½, `[r]`.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretch: Tensor

    @staticmethod
    def of(sizes: Mapping[str, int], loc: Tensor, scale: Tensor, factor: Tensor) -> LowRank:
        """From the factor A `[d, r]` beside the diagonal."""
        directions, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        return LowRank(sizes, loc, scale, directions, (1 + singular.square()).sqrt())

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained latents and log determinants."""
        volume = self.scale.log().sum() + self._small().logdet()
        return self.loc + self.scale * (
            v + self._along(v) * (self.stretch - 1) @ self.directions.mT
        ), volume.expand(v.shape[:-1])

    def inverse(self, u: Tensor) -> Tensor:
        """Vectors."""
        x = (u - self.loc) / self.scale
        solved = torch.linalg.solve(self._small(), (self._along(x) * (self.stretch - 1)).unsqueeze(-1))
        return x - solved.squeeze(-1) @ self.directions.mT

    def _along(self, x: Tensor) -> Tensor:
        return x @ self.directions

    def _small(self) -> Tensor:
        """I + diag(stretch - 1) Uᵀ U, `[r, r]`, of the same determinant: columns are orthonormal to round-off only."""
        gram = (self.stretch - 1).unsqueeze(-1) * (self.directions.mT @ self.directions)
        return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


@dataclass(frozen=True, eq=False, repr=False)
class Spline(Transport):
    """A flow of coupling layers, and a location and scale after it: the guide `"flow"`.

    Attributes:
        loc: `[d]`.
        scale: `[d]`.
        flow: from standard normal vectors to unconstrained latents, centred and scaled; see `pgen.guides.splines`.
    """

    loc: Tensor
    scale: Tensor
    flow: nn.Module

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained latents and log determinants."""
        x, volume = self.flow().call_and_ladj(v)
        return self.loc + self.scale * x, volume + self.scale.log().sum()

    def inverse(self, u: Tensor) -> Tensor:
        """Vectors."""
        return self.flow().inv((u - self.loc) / self.scale)


_KINDS = {"Affine": Affine, "LowRank": LowRank, "Spline": Spline}


def transport_of(plain: Mapping[str, Any]) -> Transport:
    """The transport that gave `plain()`.

    Raises:
        CheckpointError: it is not what a transport gives.
    """
    try:
        kind, sizes = _KINDS[plain[KIND]], {str(k): int(n) for k, n in plain[SIZES].items()}
        held = dict(plain[TENSORS])
        if kind is Spline:
            learned = {k: held.pop(k) for k in list(held) if k.startswith(FLOW)}
            held["flow"] = couplings(len(held["loc"])).to(held["loc"])
            held["flow"].load_state_dict({k.removeprefix(FLOW): v for k, v in learned.items()})
            held["flow"].requires_grad_(False)
        found = kind(sizes, **held)
        if found.inverse(found.loc).shape != (sum(sizes.values()),):
            raise ValueError(f"{sizes} are not the sizes of {len(found.loc)} elements")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"no transport can be made of what was given ({type(error).__name__}: {error}); expected what "
            "fitted.transport().plain() gives"
        ) from error
    return found


def _moved(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device, dtype).requires_grad_(False)
    return value.detach().to(device, dtype, copy=True)

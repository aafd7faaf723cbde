r"""What a linear operator is: A x, its adjoint A' y with <A x, y> = <x, A' y>, and its singular values where known.

An operator acts on the trailing dimensions of a tensor, and on whatever leads them (batches, channels it does not mix)
one by one. To write one: subclass `LinearOperator`, implement `__call__` and `adjoint` (or give a plain function to
`Function`, whose adjoint is found by differentiation), and `svd` if you know it. `adjoint_error` says whether the two
belong together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    r"""The singular value decomposition A = U diag(s) V', thin: only the singular values that are not zero.

    Coefficients have any shape that the values broadcast to. Both V and U have orthonormal columns; x - V V' x is what
    A does not see of x.

    Attributes:
        values: s, positive; broadcastable to coefficients.
        project: V', from x to its coefficients.
        expand: V, from coefficients to x.
        operator: A, which makes U = A V / s of these.
    """

    values: Tensor
    project: Map
    expand: Map
    operator: LinearOperator

    def project_output(self, y: Tensor) -> Tensor:
        """U' y, the coefficients of an output."""
        return self.project(self.operator.adjoint(y)) / self.values.to(y)

    def expand_output(self, coefficients: Tensor) -> Tensor:
        """U c, an output of its coefficients."""
        return self.operator(self.expand(coefficients / self.values.to(coefficients)))


class LinearOperator(ABC):
    """A linear map of the trailing dimensions of tensors. See the module."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x, from `[..., *event]` to `[..., *out]`."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, from `[..., *out]` to `[..., *event]`."""

    def svd(self) -> Spectrum | None:
        """The singular value decomposition, where it is known in closed form; None where it is not."""
        return None

    def pseudo_inverse(self, y: Tensor, *, iterations: int = 100) -> Tensor:
        """The least-squares solution of A x = y of least norm: by the decomposition, or by conjugate gradients.

        Args:
            y: `[..., *out]`.
            iterations: of conjugate gradients, at most, where the decomposition is not known.
        """
        spectrum = self.svd()
        if spectrum is None:
            return _least_squares(self, y, iterations)
        return spectrum.expand(spectrum.project(self.adjoint(y)) / spectrum.values.to(y) ** 2)

    def __matmul__(self, inner: LinearOperator) -> Composed:
        """`(A @ B)(x) = A(B(x))`."""
        return Composed(self, inner)


@dataclass(frozen=True, eq=False)
class Composed(LinearOperator):
    """One operator after another.

    Attributes:
        outer: applied last.
        inner: applied first.
    """

    outer: LinearOperator
    inner: LinearOperator

    def __call__(self, x: Tensor) -> Tensor:
        """`outer(inner(x))`."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """`inner'(outer'(y))`."""
        return self.inner.adjoint(self.outer.adjoint(y))


@dataclass(frozen=True, eq=False)
class Function(LinearOperator):
    """A linear function of the user's; its adjoint is its vector-Jacobian product.

    Attributes:
        function: from `[..., *event]` to `[..., *out]`, linear (no constant term) and differentiable.
        event_shape: of what it takes.

    Example:
        >>> differences = Function(lambda x: x[..., 1:] - x[..., :-1], (3,))
        >>> differences.adjoint(torch.tensor([1.0, 10.0]))
        tensor([-1., -9., 10.])
    """

    function: Map
    event_shape: Sequence[int]

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """By differentiation; itself differentiable in y."""
        event = tuple(self.event_shape)
        out = self.function(y.new_zeros(1, *event)).dim() - 1
        at = y.new_zeros(y.shape[: y.dim() - out] + event)
        return torch.func.vjp(self.function, at)[1](y)[0]


def as_matrix(operator: LinearOperator, event_shape: Sequence[int], like: Tensor | None = None) -> Tensor:
    """A in full, `[m, D]`, for events and outputs flattened.

    Args:
        operator: A.
        event_shape: of x, with all channels.
        like: a tensor to take dtype and device from.
    """
    size = torch.Size(event_shape).numel()
    eye = torch.eye(size) if like is None else torch.eye(size, dtype=like.dtype, device=like.device)
    return operator(eye.reshape(size, *event_shape)).reshape(size, -1).mT


def adjoint_error(
    operator: LinearOperator,
    event_shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> float:
    r"""How badly `adjoint` fails to be the adjoint: |<Ax, y> - <x, A'y>| / (|Ax| |y| + |x| |A'y|) at random x and y.

    About the rounding error (1e-16 in float64) for an adjoint; for anything else larger by orders of magnitude.

    Args:
        operator: A.
        event_shape: of x.
        generator: of x and y.
        dtype: to compute in.

    Example:
        >>> adjoint_error(Function(lambda x: 2 * x.cumsum(-1), (5,)), (5,)) < 1e-15
        True
    """
    x = torch.randn(tuple(event_shape), dtype=dtype, generator=generator)
    seen = operator(x)
    y = torch.randn(seen.shape, dtype=dtype, generator=generator)
    back = operator.adjoint(y)
    scale = seen.norm() * y.norm() + x.norm() * back.norm()
    return float(((seen * y).sum() - (x * back).sum()).abs() / scale)


def _least_squares(operator: LinearOperator, y: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients on A'A x = A'y from zero, which stay in the range of A' (Hestenes & Stiefel, 1952).

    All rows take the same steps as one block-diagonal problem: sums run over everything.
    """
    slope = operator.adjoint(y)
    x, direction, power = torch.zeros_like(slope), slope, slope.square().sum()
    residual, start = y, power
    least = torch.finfo(y.dtype).eps ** 2
    for _ in range(iterations):
        if float(power) <= least * float(start):
            break
        seen = operator(direction)
        rate = power / seen.square().sum()
        x, residual = x + rate * direction, residual - rate * seen
        slope = operator.adjoint(residual)
        power, before = slope.square().sum(), power
        direction = slope + power / before * direction
    return x


def require_shape(operator: object, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse values whose last dimensions are not those that an operator was made for.

    Raises:
        ValueError: they are others.
    """
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(
            f"{type(operator).__name__}: got values {tuple(x.shape)}, expected [..., {', '.join(map(str, shape))}]"
        )

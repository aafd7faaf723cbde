r"""Operators that the Fourier transform makes diagonal: blur, and the undersampled transform itself.

Real signals are decomposed by the Hartley transform H x = Re F x - Im F x, F being the unitary Fourier transform: it is
real, orthogonal and its own inverse, and anything that multiplies frequencies k and -k by numbers of one size is
diagonal in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgen.algorithms.diffusion.operators.base import LinearOperator, Spectrum, require_shape


class Blur(LinearOperator):
    """Convolution with a kernel, of the size of what is given; by FFT.

    Args:
        kernel: `[k_1, ..., k_d]`, its centre at `k // 2`.
        size: of the trailing dimensions that it acts on, `(n_1, ..., n_d)`.
        padding: `"circular"` (what leaves on one side comes in on the other) or `"zeros"`.

    Raises:
        ValueError: kernel and size do not fit together, or the padding is unknown.

    Example:
        >>> blur = Blur(torch.tensor([0.25, 0.5, 0.25]), (4,))
        >>> blur(torch.tensor([4.0, 0.0, 0.0, 0.0])).round(decimals=4)
        tensor([2., 1., 0., 1.])
    """

    def __init__(self, kernel: Tensor, size: tuple[int, ...], padding: str = "circular") -> None:
        if kernel.dim() != len(size) or any(k > n for k, n in zip(kernel.shape, size, strict=True)):
            raise ValueError(
                f"Blur: got kernel {tuple(kernel.shape)}, size {tuple(size)}; expected as many sides, none longer"
            )
        if padding not in ("circular", "zeros"):
            raise ValueError(f"Blur(padding={padding!r}): expected 'circular' or 'zeros'")
        self.size, self.padding, self.dims = tuple(size), padding, tuple(range(-len(size), 0))
        room = [k - 1 if padding == "zeros" else 0 for k in kernel.shape]
        self.torus = tuple(n + more for n, more in zip(size, room, strict=True))
        wrapped = kernel.new_zeros(self.torus)
        wrapped[tuple(slice(k) for k in kernel.shape)] = kernel
        wrapped = wrapped.roll([-(k // 2) for k in kernel.shape], self.dims)
        self.gain = torch.fft.fftn(wrapped.double(), dim=self.dims)

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution, shape of x."""
        return self._filter(x, self.gain)

    def adjoint(self, y: Tensor) -> Tensor:
        """Convolution with the kernel turned around."""
        return self._filter(y, self.gain.conj())

    def svd(self) -> Spectrum | None:
        """Sizes of the kernel's frequencies, if circular; frequencies that it removes are left out."""
        if self.padding == "zeros":
            return None
        return _hartley_spectrum(self.gain.abs(), self)

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        if x.shape[x.dim() - len(self.size) :] != self.size:
            raise ValueError(f"Blur: got {tuple(x.shape)}, expected trailing dimensions {self.size}")
        spectrum = torch.fft.fftn(x, s=self.torus, dim=self.dims)  # pads with zeros
        full = torch.fft.ifftn(spectrum * gain.to(spectrum), dim=self.dims).real
        return full[(..., *(slice(n) for n in self.size))]


class FourierUndersample(LinearOperator):
    """Some frequencies of the unitary Fourier transform, as real numbers: `[..., *size]` to `[..., n, 2]`.

    Args:
        mask: frequencies that are seen, booleans of the size of the signal, in the order of `torch.fft.fftn`.

    Raises:
        ValueError: no frequency is seen, or the mask is not of booleans.

    Example:
        >>> mean_only = FourierUndersample(torch.tensor([True, False, False, False]))
        >>> mean_only(torch.ones(4))
        tensor([[2., 0.]])
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError(
                f"FourierUndersample: expected booleans, one of them true; got {mask.dtype}, {mask.sum()} true"
            )
        self.mask = mask
        self.index = mask.reshape(-1).nonzero()[:, 0]
        self.dims = tuple(range(-mask.dim(), 0))

    def __call__(self, x: Tensor) -> Tensor:
        """Real and imaginary parts, `[..., n, 2]`."""
        require_shape(self, x, self.mask.shape)
        found = torch.fft.fftn(x, dim=self.dims, norm="ortho").flatten(-self.mask.dim())
        return torch.view_as_real(found[..., self.index.to(x.device)])

    def adjoint(self, y: Tensor) -> Tensor:
        """Real part of the inverse transform, zeros at the other frequencies."""
        values = torch.view_as_complex(y.contiguous())
        full = values.new_zeros((*values.shape[:-1], self.mask.numel()))
        full = full.scatter(-1, self.index.to(y.device).expand(values.shape), values)
        full = full.reshape(values.shape[:-1] + self.mask.shape)
        return torch.fft.ifftn(full, dim=self.dims, norm="ortho").real

    def svd(self) -> Spectrum:
        """1 where a frequency and its mirror image are both seen, the root of 1/2 where one of the two is."""
        seen = self.mask.double()
        mirrored = seen.flip(self.dims).roll([1] * seen.dim(), self.dims)
        return _hartley_spectrum(((seen + mirrored) / 2).sqrt(), self)


def hartley(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The Hartley transform over some dimensions: real, orthogonal, its own inverse.

    Example:
        >>> x = torch.randn(5, dtype=torch.float64)
        >>> torch.allclose(hartley(hartley(x, (-1,)), (-1,)), x)
        True
    """
    found = torch.fft.fftn(x, dim=dims, norm="ortho")
    return found.real - found.imag


def _hartley_spectrum(size: Tensor, operator: LinearOperator) -> Spectrum:
    """The decomposition of an operator with A'A = H diag(size^2) H."""
    flat, dims = size.reshape(-1), tuple(range(-size.dim(), 0))
    index = (flat > flat.max() * flat.numel() * torch.finfo(flat.dtype).eps).nonzero()[:, 0]

    def project(x: Tensor) -> Tensor:
        return hartley(x, dims).flatten(-len(dims))[..., index.to(x.device)]

    def expand(c: Tensor) -> Tensor:
        full = c.new_zeros((*c.shape[:-1], len(flat)))
        full = full.scatter(-1, index.to(c.device).expand(c.shape), c)
        return hartley(full.reshape(c.shape[:-1] + size.shape), dims)

    return Spectrum(flat[index], project, expand, operator)

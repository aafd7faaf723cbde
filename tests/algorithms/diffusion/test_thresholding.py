"""Denoised values within bounds."""

from __future__ import annotations

import pytest
import torch

from pgen.algorithms.diffusion.field import Field
from pgen.algorithms.diffusion.grids import default
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import UniPC
from pgen.algorithms.diffusion.thresholding import clipped, dynamic


def wild(x, sigma):
    return 3 * x


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
def test_bounds_are_kept_row_by_row(shape) -> None:
    x, levels = torch.randn(50, *shape), torch.ones(50)
    for denoiser in (clipped(wild, -0.5, 0.5), dynamic(wild, 0.8, bound=0.5)):
        found = denoiser(x, levels)
        assert found.shape == x.shape
        assert float(found.abs().max()) <= 0.5
        assert torch.equal(denoiser(x[7:8], levels[:1]), found[7:8])


def test_what_is_within_bounds_stays() -> None:
    x, levels = torch.rand(20, 5) / 3.1, torch.ones(20)
    assert torch.equal(clipped(wild, 0.0, torch.ones(5))(x, levels), 3 * x)
    assert torch.allclose(dynamic(wild)(x, levels), 3 * x)


def test_dynamic_shrinks_by_the_quantile() -> None:
    x = torch.arange(1.0, 101.0).unsqueeze(0)
    found = dynamic(lambda x, sigma: x, 0.9)(x, torch.ones(1))
    assert torch.allclose(found, x.clamp(max=90.0) / 90.0)


def test_samples_lie_within_bounds() -> None:
    """The last step is a combination of denoised values; with one evaluation's value alone it is that."""
    streams = Streams(0, 30)
    x = start(streams, (4,), 20.0, torch.empty(0))
    out = solve(x, default(8), Field(clipped(wild, -1.0, 1.0), streams), UniPC(3, "log"))
    assert float(out.abs().max()) <= 1


@pytest.mark.parametrize(
    "make", [lambda: clipped(wild, 1.0, 1.0), lambda: dynamic(wild, 0.0), lambda: dynamic(wild, bound=0.0)]
)
def test_refusals(make) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()

"""Traces of Jacobians against traces that are known; estimates with the variance they claim."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.divergence import Exact, Hutchinson, HutchPP, Jacobian
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.noise import Streams

FLOAT = {"dtype": torch.float64}
Z = 4.9  # of a normal: a false alarm of 1e-6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(*event):
    means = 2 * torch.randn(3, *event, generator=generator(), **FLOAT)
    return Mixture(means, scale=torch.tensor([0.3, 0.5, 1.0], **FLOAT))


def trace_of(denoiser, x, sigma):
    """The trace by one Jacobian a row."""
    full = torch.autograd.functional.jacobian(lambda y: denoiser(y, sigma), x)
    d = x[0].numel()
    return torch.stack([full[i].reshape(d, len(x), d)[:, i].trace() for i in range(len(x))])


def matrices(rows, d, seed=0):
    """Some symmetric matrices and some not, with decaying eigenvalues."""
    root = torch.randn(rows, d, d, generator=generator(seed), **FLOAT) / math.sqrt(d)
    decay = torch.diag_embed(1 / torch.arange(1, d + 1, **FLOAT)).expand(rows, d, d)
    skew = root - root.mT
    return root @ decay @ root.mT + 0.1 * torch.eye(d, **FLOAT) + 0.05 * skew


def product_of(matrix):
    return lambda v: torch.einsum("bij,pbj->pbi", matrix, v)


def noise_of(rows, d, seed=0):
    drawn, calls = Streams(seed, rows=rows), iter(range(1000))
    return lambda n: drawn.normal(next(calls), (n, d), torch.empty(0, **FLOAT)).movedim(1, 0)


# --- products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(), (1,), (5,), (2, 4)])
@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_exact_trace_is_that_of_the_jacobian(event, chunk):
    denoiser = mixture(*event)
    x = torch.randn(6, *event, generator=generator(1), **FLOAT)
    sigma = torch.linspace(0.1, 3.0, 6, **FLOAT)
    found = Exact().trace(Jacobian(denoiser, chunk=chunk).at(x, sigma), noise_of(6, 1), x)
    torch.testing.assert_close(found.value, trace_of(denoiser, x, sigma))
    assert found.variance is None


class Energy:
    """A denoiser that is x - sigma^2 times the gradient of an energy, by autograd."""

    def __init__(self, create_graph=True):
        self.create_graph = create_graph

    def __call__(self, x, sigma):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(y.cos().sum(), y, create_graph=self.create_graph)
        return x - sigma.unsqueeze(-1) ** 2 * gradient


class Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        if float(gradient.abs().max()) < 0:  # vmap cannot
            return gradient
        return gradient * x.cos()


class Pushed(torch.autograd.Function):
    """Forward mode alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * x.cos()


def pushed(x, sigma):
    return Pushed.apply(x)


@pytest.mark.parametrize(
    ("denoiser", "mode"),
    [
        (mixture(5), "reverse"),
        (Energy(), "reverse"),
        (lambda x, sigma: Loop.apply(x), "loop"),
        (pushed, "forward"),
    ],
)
def test_mode_is_what_the_denoiser_allows(denoiser, mode):
    x = torch.randn(3, 5, generator=generator(1), **FLOAT)
    sigma = torch.tensor([0.5, 1.0, 2.0], **FLOAT)
    jacobian = Jacobian(denoiser)
    found = Exact().trace(jacobian.at(x, sigma), noise_of(3, 5), x).value
    h, moved = 1e-5, torch.zeros(3, **FLOAT)
    for i in range(5):
        step = h * torch.eye(5, **FLOAT)[i]
        moved += (denoiser(x + step, sigma) - denoiser(x - step, sigma))[:, i].detach() / (2 * h)
    torch.testing.assert_close(found, moved, rtol=1e-6, atol=1e-6)
    assert jacobian.mode == mode


@torch.no_grad()
def silent(x, sigma):
    return mixture(5)(x, sigma)


@pytest.mark.parametrize(
    "denoiser", [silent, lambda x, sigma: x + 2 * x.detach().sin(), Energy(create_graph=False)]
)
def test_a_denoiser_that_hides_its_derivative_is_refused(denoiser):
    x = torch.randn(3, 5, generator=generator(1), **FLOAT)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        Jacobian(denoiser).at(x, torch.ones(3, **FLOAT))(torch.ones(1, 3, 5, **FLOAT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.002, 80.0])
def test_rounding_is_no_reason_to_refuse(dtype, sigma):
    denoiser = mixture(40).to(dtype)
    x = 2 * torch.randn(8, 40, generator=generator(), dtype=dtype)
    jacobian = Jacobian(denoiser)
    jacobian.at(x, torch.full((8,), sigma, dtype=dtype))(torch.ones(1, 8, 40, dtype=dtype))
    assert jacobian.mode == "reverse"


# --- estimates -----------------------------------------------------------------------------------------------

WAYS = [Hutchinson(4), Hutchinson(6, orthogonal=True), HutchPP(9)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_estimates_and_their_variances_are_unbiased(way):
    rows, d = 20_000, 12
    matrix = matrices(1, d).expand(rows, d, d)
    found = way.trace(product_of(matrix), noise_of(rows, d), torch.zeros(rows, d, **FLOAT))
    miss = found.value - matrix[0].trace()
    assert abs(miss.mean()) < Z * miss.std() / math.sqrt(rows)
    assert found.freedom is not None
    excess = miss.square() - found.variance
    assert abs(excess.mean()) < Z * excess.std() / math.sqrt(rows)
    # The check has the power to see a variance that is off by a fifth, as without the correction for a finite frame.
    assert 0.2 * found.variance.mean() > 2 * Z * excess.std() / math.sqrt(rows)


def test_estimates_of_a_wrong_product_are_seen():
    rows, d = 20_000, 12
    matrix = matrices(1, d).expand(rows, d, d)
    for way in WAYS:
        found = way.trace(product_of(0.9 * matrix), noise_of(rows, d), torch.zeros(rows, d, **FLOAT))
        miss = found.value - matrix[0].trace()
        assert abs(miss.mean()) > Z * miss.std() / math.sqrt(rows)


def test_hutchpp_is_exact_on_identities_of_low_rank():
    rows, d, rank = 5, 60, 7
    factor = torch.randn(rows, d, rank, generator=generator(), **FLOAT)
    matrix = 0.3 * torch.eye(d, **FLOAT) + factor @ factor.mT
    expected = matrix.diagonal(dim1=1, dim2=2).sum(1)
    like = torch.zeros(rows, d, **FLOAT)
    found = HutchPP(24).trace(product_of(matrix), noise_of(rows, d), like)
    torch.testing.assert_close(found.value, expected)
    assert found.variance.max() < 1e-16
    assert (
        Hutchinson(24).trace(product_of(matrix), noise_of(rows, d), like).value - expected
    ).abs().min() > 0.05


def test_as_many_products_as_scalars_are_exact():
    matrix = matrices(5, 6)
    expected = matrix.diagonal(dim1=1, dim2=2).sum(1)
    for way in (HutchPP(6), Hutchinson(9, orthogonal=True)):
        found = way.trace(product_of(matrix), noise_of(5, 6), torch.zeros(5, 6, **FLOAT))
        torch.testing.assert_close(found.value, expected)
        assert (found.variance == 0).all()
        assert way.products(6) == 6


def test_too_few_probes_have_no_standard_error():
    with pytest.raises(ValueError, match="at least 2"):
        Hutchinson(1)
    with pytest.raises(ValueError, match="at least 6"):
        HutchPP(5)

"""Linear operators: adjoints, singular values and pseudo-inverses against the matrix in full, and what each one is."""

import math

import pytest
import torch

from pgen.algorithms.diffusion.operators import (
    Blur,
    Composed,
    Dense,
    Downsample,
    FourierUndersample,
    Function,
    Greyscale,
    LinearOperator,
    Mask,
    Radon,
    adjoint_error,
    as_matrix,
)

double = {"dtype": torch.float64}


def fixed(*shape):
    return torch.randn(*shape, **double, generator=torch.Generator().manual_seed(1))


SOME = fixed(6, 5) > 0
CASES = {
    "mask": (Mask(SOME), (6, 5)),
    "mask-channels": (Mask(SOME), (3, 6, 5)),
    "mask-all": (Mask(torch.ones(4, dtype=torch.bool)), (4,)),
    "blur": (Blur(fixed(3, 2), (6, 5)), (6, 5)),
    "blur-even": (Blur(fixed(4), (4,)), (2, 4)),
    "blur-removes": (Blur(torch.full((2,), 0.5, **double), (6,)), (6,)),
    "blur-zeros": (Blur(fixed(3, 4), (6, 5), "zeros"), (2, 6, 5)),
    "blur-volume": (Blur(fixed(3, 2, 1), (3, 4, 2)), (3, 4, 2)),
    "downsample": (Downsample(2), (3, 4, 6)),
    "downsample-series": (Downsample(3, dims=1), (2, 6)),
    "greyscale": (Greyscale(), (3, 4, 2)),
    "greyscale-weights": (Greyscale(fixed(2), dim=-1), (3, 2)),
    "radon": (Radon(7, (6, 5)), (6, 5)),
    "radon-few": (Radon(torch.tensor([0.3]), (4, 4), detectors=2), (2, 4, 4)),
    "fourier": (FourierUndersample(SOME), (6, 5)),
    "fourier-all": (FourierUndersample(torch.ones(4, 4, dtype=torch.bool)), (2, 4, 4)),
    "dense": (Dense(fixed(3, 6), (2, 3)), (2, 3)),
    "dense-tall": (Dense(fixed(5, 3)), (3,)),
    "dense-singular": (Dense(fixed(4, 2) @ fixed(2, 5)), (5,)),
    "composed": (Downsample(2) @ Blur(fixed(3, 3), (6, 4)), (6, 4)),
    "function": (Function(lambda x: x.cumsum(-1)[..., ::2], (7,)), (7,)),
    "function-channels": (Function(lambda x: x.mean(-3), (3, 2, 2)), (3, 2, 2)),
}
each = pytest.mark.parametrize(("operator", "shape"), CASES.values(), ids=CASES)


def matrix(operator, shape):
    return as_matrix(operator, shape, torch.zeros((), **double))


@each
def test_the_adjoint_is_one(operator, shape):
    assert adjoint_error(operator, shape) < 1e-14
    assert adjoint_error(operator, (2, *shape), dtype=torch.float32) < 1e-5


@each
def test_leading_dimensions_are_a_batch(operator, shape):
    x = torch.randn(2, 3, *shape, **double)
    y = operator(x)
    assert torch.allclose(y[1, 2], operator(x[1, 2]))
    assert torch.allclose(operator.adjoint(y)[1, 2], operator.adjoint(y[1, 2]))
    assert y.dtype == x.dtype
    assert operator(x.float()).dtype == operator.adjoint(y.float()).dtype == torch.float32


@each
def test_derivatives_pass_through(operator, shape):
    x = torch.randn(shape, **double, requires_grad=True)
    y = operator(x)
    other = torch.randn_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad((y * other.detach()).sum(), x)
    assert torch.allclose(gradient, operator.adjoint(other).detach())
    (back,) = torch.autograd.grad((operator.adjoint(other) * x.detach()).sum(), other)
    assert torch.allclose(back, y.detach())


@each
def test_singular_values(operator, shape):
    spectrum = operator.svd()
    if spectrum is None:
        assert isinstance(operator, Composed | Function | Radon | Blur)
        return
    x = torch.randn(4, *shape, **double)
    c = spectrum.project(x)
    values = spectrum.values.to(c)
    assert torch.allclose(spectrum.expand_output(values * c), operator(x))  # A = U diag(s) V'
    z = torch.randn_like(c)
    assert torch.allclose(spectrum.project(spectrum.expand(z)), z)  # V' V = I
    assert torch.allclose(spectrum.project_output(spectrum.expand_output(z)), z)  # U' U = I
    true = torch.linalg.svdvals(matrix(operator, shape))
    found = values.expand(c.shape[1:]).reshape(-1).sort(descending=True).values
    assert torch.allclose(found, true[: len(found)])
    assert float(true[len(found) :].sum()) < 1e-10  # what is left out is zero


@each
def test_the_pseudo_inverse_is_that_of_the_matrix(operator, shape):
    full = matrix(operator, shape)
    y = torch.randn(2, len(full), **double)
    out = operator(torch.zeros(shape, **double)).shape
    found = operator.pseudo_inverse(y.reshape(2, *out)).reshape(2, -1)
    true = y @ torch.linalg.pinv(full, rtol=1e-10).mT
    assert torch.allclose(found, true, rtol=1e-6, atol=1e-8)


class Wrong(LinearOperator):
    """An operator with the adjoint of another."""

    def __init__(self, operator, adjoint):
        self.operator, self.wrong = operator, adjoint

    def __call__(self, x):
        return self.operator(x)

    def adjoint(self, y):
        return self.wrong(y)


def test_an_adjoint_that_is_none_is_noticed():
    blur = Blur(fixed(3), (8,))
    for adjoint in (blur, lambda y: -blur.adjoint(y), lambda y: 1.1 * blur.adjoint(y)):
        assert adjoint_error(Wrong(blur, adjoint), (8,)) > 1e-8


# --- what each one is ---


def test_blur_is_convolution():
    kernel, x = fixed(3, 3), fixed(5, 5)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))[None, None]
    direct = torch.nn.functional.conv2d(padded, kernel.flip(0, 1)[None, None])[0, 0]
    assert torch.allclose(Blur(kernel, (5, 5), "zeros")(x), direct)
    wrapped = torch.nn.functional.pad(x[None, None], (1, 1, 1, 1), mode="circular")
    direct = torch.nn.functional.conv2d(wrapped, kernel.flip(0, 1)[None, None])[0, 0]
    assert torch.allclose(Blur(kernel, (5, 5))(x), direct)


def test_blur_with_one_at_the_centre_changes_nothing():
    for side in (3, 4):
        kernel = torch.zeros(side)
        kernel[side // 2] = 1
        x = torch.randn(6)
        assert torch.allclose(Blur(kernel, (6,))(x), x, atol=1e-6)


def test_downsampling_an_enlarged_image_gives_it_back():
    small = torch.randn(3, 2, 4)
    down = Downsample(3)
    assert torch.allclose(down(small.repeat_interleave(3, -1).repeat_interleave(3, -2)), small, atol=1e-6)
    assert down.pseudo_inverse(small).shape == (3, 6, 12)


def test_all_frequencies_are_the_fourier_transform():
    x = torch.randn(4, 4, **double)
    everything = FourierUndersample(torch.ones(4, 4, dtype=torch.bool))
    found = torch.view_as_complex(everything(x)).reshape(4, 4)
    assert torch.allclose(found, torch.fft.fft2(x, norm="ortho"))
    assert torch.allclose(everything.adjoint(everything(x)), x)


def test_radon_at_right_angles_sums_rows_and_columns():
    image = torch.randn(5, 5, **double)
    found = Radon(torch.tensor([0.0, math.pi / 2]), (5, 5))(image)
    assert torch.allclose(found[0], image.sum(0))
    assert torch.allclose(found[1], image.sum(1))


def test_radon_keeps_mass_and_follows_a_point():
    x, y = torch.meshgrid(torch.arange(31.0), torch.arange(31.0), indexing="xy")
    image = torch.exp(-((x - 15 - 6) ** 2 + (y - 15 - 3) ** 2) / 8).double()  # a blob at (6, 3)
    radon = Radon(12, (31, 31))
    found = radon(image)
    assert torch.allclose(found.sum(-1), image.sum().expand(12), rtol=1e-3)
    u = torch.arange(31, **double) - 15
    centre = (found * u).sum(-1) / found.sum(-1)
    assert torch.allclose(centre, 6 * radon.angles.cos() + 3 * radon.angles.sin(), atol=0.02)


def test_a_large_radon_matrix_stays_sparse_and_says_the_same(monkeypatch):
    x = torch.randn(3, 6, 5, **double)
    small = Radon(7, (6, 5))
    expected, back = small(x), small.adjoint(small(x))
    torch.testing.assert_close(torch.vmap(small)(x), expected)
    monkeypatch.setattr("pgen.algorithms.diffusion.operators.radon._SMALL", 0)
    large = Radon(7, (6, 5))
    torch.testing.assert_close(large(x), expected)
    torch.testing.assert_close(large.adjoint(expected), back)
    assert adjoint_error(large, (2, 6, 5)) < 1e-14


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="multiples of the factor"):
        Downsample(2)(torch.ones(3, 4))
    with pytest.raises(ValueError, match="trailing dimensions"):
        Blur(torch.ones(2), (4,))(torch.ones(5))
    with pytest.raises(ValueError, match="none longer"):
        Blur(torch.ones(5), (4,))
    with pytest.raises(ValueError, match="'circular' or 'zeros'"):
        Blur(torch.ones(3), (4,), "reflect")
    with pytest.raises(ValueError, match="booleans"):
        Mask(torch.ones(3))
    with pytest.raises(ValueError, match="one of them true"):
        FourierUndersample(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="a negative dim"):
        Greyscale(dim=1)
    with pytest.raises(ValueError, match="positive integers"):
        Downsample(0)
    with pytest.raises(ValueError, match="a shape of D"):
        Dense(torch.ones(2, 3), (2, 2))
    with pytest.raises(ValueError, match="expected some of both"):
        Radon(torch.zeros(2, 2), (3, 3))


@pytest.mark.parametrize("shape", [(10, 10), (16, 4), (4, 16)])
def test_images_of_another_size_are_refused(shape):
    made = (
        Mask(torch.ones(8, 8, dtype=torch.bool)),
        FourierUndersample(torch.ones(8, 8, dtype=torch.bool)),
        Radon(4, (8, 8)),
    )
    for operator in made:
        assert operator(torch.ones(3, 8, 8)).shape[0] == 3
        with pytest.raises(
            ValueError, match=rf"{type(operator).__name__}: got values .*expected \[..., 8, 8\]"
        ):
            operator(torch.ones(3, *shape))

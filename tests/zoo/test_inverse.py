"""Inverse problems of the zoo: operators by name, and programs whose posterior is known."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pgen
from pgen.algorithms.diffusion.operators import adjoint_error, as_matrix
from pgen.distributions import VE, Diffusion, MixtureDenoiser
from pgen.errors import OptionError
from pgen.testing.statistics import assert_moments
from pgen.zoo import DenoisingDiffusion, Measured, blur, downsample, fourier, greyscale, mask, radon

F64 = torch.float64
MADE = {
    "mask": (mask((6, 4)), (6, 4)),
    "mask, random": (mask((6, 4), 0.7), (6, 4)),
    "mask, colours": (mask((3, 6, 4), "centre"), (3, 6, 4)),
    "blur": (blur((6, 5), 0.8), (6, 5)),
    "blur, zeros": (blur((3, 6, 5), 2.0, padding="zeros"), (3, 6, 5)),
    "downsample": (downsample((6, 4)), (6, 4)),
    "downsample, colours": (downsample((3, 6, 6), 3), (3, 6, 6)),
    "greyscale": (greyscale((3, 4, 2)), (3, 4, 2)),
    "greyscale, two": (greyscale((2, 4, 2)), (2, 4, 2)),
    "radon": (radon((5, 5), 6), (5, 5)),
    "radon, angles": (radon((3, 5, 4), torch.tensor([0.0, 0.4]), detectors=7), (3, 5, 4)),
    "fourier": (fourier((8, 6), 0.4), (8, 6)),
    "fourier, channels": (fourier((2, 8, 6), 0.6), (2, 8, 6)),
}


@pytest.mark.parametrize("name", MADE)
def test_an_operator_has_its_adjoint_and_its_singular_values(name):
    operator, shape = MADE[name]
    assert adjoint_error(operator, shape) < 1e-14
    assert adjoint_error(operator, (2, *shape)) < 1e-14
    full = as_matrix(operator, shape, torch.zeros((), dtype=F64))
    spectrum = operator.svd()
    if spectrum is None:
        assert name.startswith(("radon", "blur, zeros"))
        return
    x = torch.randn(*shape, dtype=F64)
    c = spectrum.project(x)
    values = spectrum.values.to(c)
    torch.testing.assert_close(spectrum.expand_output(values * c), operator(x))
    found = values.expand(c.shape).reshape(-1).sort(descending=True).values
    true = torch.linalg.svdvals(full)
    torch.testing.assert_close(found, true[: len(found)])
    assert float(true[len(found) :].sum()) < 1e-9


def test_parts_of_an_image():
    image = torch.arange(16.0).reshape(4, 4)
    assert mask((4, 4), "lower")(image).tolist() == list(range(8))
    assert mask((4, 4), "left")(image).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert mask((4, 4), "edge")(image).tolist() == [5, 6, 9, 10]
    centre = mask((4, 4), "centre").adjoint(torch.ones(12))
    assert centre.tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert len(mask((4, 4), "upper", share=0.25)(image)) == 12
    assert len(mask((4, 4), 0.75)(image)) == 4
    assert not torch.equal(mask((4, 4), 0.5).mask, mask((4, 4), 0.5, seed=1).mask)
    colours = mask((3, 4, 4), 0.5)
    assert torch.equal(colours.mask[0], colours.mask[2])


def test_low_frequencies_are_always_measured():
    for seed in range(5):
        rows = fourier((16, 4), 0.5, centre=0.3, seed=seed).mask[:, 0]
        assert int(rows.sum()) == 8
        assert bool(rows[[0, 1, 2, 14, 15]].all())


def test_the_whole_of_a_blur_is_kept():
    for padding in ("circular", "zeros"):
        image = torch.zeros(9, 9, dtype=F64)
        image[4, 4] = 1
        seen = blur((9, 9), 1.0, padding=padding)(image)
        assert math.isclose(float(seen.sum()), 1.0, rel_tol=1e-6)
        torch.testing.assert_close(seen, seen.flip(0, 1))
    assert float(greyscale((4, 1, 1))(torch.ones(4, 1, 1))) == 1.0


# --- programs ---

MIXTURE = MixtureDenoiser(torch.tensor([[-1.0, -1.0, 0.0, 1.0], [1.5, 1.0, 0.0, -1.0]], dtype=F64), scale=0.4)
LAW = Diffusion(MIXTURE, VE(0.005, 50.0), (4,))


def node(program, x):
    with torch.no_grad():
        nodes = poutine.trace(poutine.condition(program, {"x": x})).get_trace(len(x)).nodes
    return nodes["y"]["fn"]


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        ("normal", lambda m: dist.Normal(m, 0.5)),
        ("laplace", lambda m: dist.Laplace(m, 0.5 / math.sqrt(2))),
        ("poisson", lambda m: dist.Poisson(m / 0.25)),
        (lambda m: dist.StudentT(3.0, m, 1.0), lambda m: dist.StudentT(3.0, m, 1.0)),
        (lambda m: dist.Gamma(m, 1.0).to_event(1), lambda m: dist.Gamma(m, 1.0)),
    ],
    ids=["normal", "laplace", "poisson", "student", "event"],
)
def test_what_is_seen_has_the_likelihood_asked_for(likelihood, expected):
    operator = downsample((2, 2), 2)
    x = torch.rand(3, 4, dtype=F64) + 0.5
    law = node(Measured(LAW, operator, 0.5, likelihood, image=(2, 2)), x)
    assert (law.batch_shape, law.event_shape) == ((3,), (1, 1))
    y = torch.tensor([1.0, 2.0, 0.0], dtype=F64).reshape(3, 1, 1) + (likelihood != "poisson")
    torch.testing.assert_close(law.log_prob(y), expected(x.mean(1)).log_prob(y[:, 0, 0]))


@pytest.mark.parametrize("likelihood", ["normal", "laplace"])
def test_noise_is_the_standard_deviation(likelihood):
    law = node(Measured(LAW, mask((2, 2)), 0.3, likelihood, image=(2, 2)), torch.ones(1, 4, dtype=F64))
    torch.manual_seed(0)
    assert_moments(law.sample((20_000,))[:, 0], 1.0, 0.3) if likelihood == "normal" else None
    assert math.isclose(float(law.base_dist.stddev[0, 0]), 0.3, rel_tol=1e-6)


def test_its_structure_is_that_of_one_more_statement():
    structure = pgen.structure_of(Measured(LAW, blur((2, 2)), image=(2, 2)), {"y": torch.zeros(5, 2, 2)})
    assert structure.latents == ("x",)
    assert structure.sites["y"].parents == ("x",)
    assert all(map(structure.local, structure.sites))


def test_a_posterior_that_is_known():
    """x1 + x2 and x3 + x4, up to the noise: the posterior of a mixture is a mixture."""
    fitted = pgen.fit(Measured(LAW, lambda x: x[..., ::2] + x[..., 1::2], 0.5), None, "score")
    y = torch.tensor([[0.4, 0.1]], dtype=F64)
    drawn = fitted.posterior({"y": y}, n=1000, seed=0)["x"][:, 0]
    matrix = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=F64)
    known = MIXTURE.posterior(matrix, y[0], 0.25 * torch.eye(2, dtype=F64))
    weights = known.log_weights.exp()
    mean = weights @ known.means
    spread = (weights @ (known.means - mean).square() + 0.16).sqrt()
    assert (
        float(((drawn.mean(0) - mean) / spread).abs().max()) < 0.25
    )  # particles: as many as draws, not independent
    assert float(weights.min()) > 0.05  # both modes matter


def test_a_prior_is_learned_where_x_is_observed_and_asked_through_any_operator():
    prior = DenoisingDiffusion(4, width=8, blocks=1)
    x = torch.randn(40, 4) * 0.5 + 1
    fitted = pgen.fit(prior, {"x": x}, "score", run=pgen.Run(steps=20, progress=False), seed=0)
    program = Measured(fitted.law("x"), mask((2, 2)), image=(2, 2))
    assert pgen.structure_of(program, {"y": torch.zeros(1, 2)}).params == ()
    joint = Measured(prior, mask((2, 2)), image=(2, 2))
    assert pgen.structure_of(joint, {"x": x, "y": x[:, :2]}).params
    assert {"x", "y"} <= pgen.fit(program, None, "score").sample(2, seed=0).keys()


def test_what_cannot_be_is_said():
    normal = dist.Normal(torch.zeros(4), 1.0)
    for ask, match in {
        lambda: Measured(normal, blur((2, 2))): r"the prior is of batch shape \(4,\)",
        lambda: Measured("digits", blur((2, 2))): "the prior is str; expected the law",
        lambda: Measured(LAW, 3): "the operator is int",
        lambda: Measured(LAW, blur((2, 2)), image=(3, 3)): "a shape of 4 numbers",
        lambda: Measured(
            LAW, blur((2, 2)), likelihood="gauss"
        ): "'normal', 'laplace', 'poisson', or a callable",
        lambda: Measured(LAW, blur((2, 2)), noise=0.0): "a positive number",
        lambda: mask((4, 4), "top"): "'lower', 'upper'",
        lambda: mask((4, 4), 1.0): "between 0 and 1",
        lambda: mask((4,)): r"\(H, W\) or \(C, H, W\)",
        lambda: blur((4, 4), 0.0): "number of pixels",
        lambda: blur((4, 4), padding="reflect"): "'circular' or 'zeros'",
        lambda: downsample((4, 6), 4): "divides both sides",
        lambda: greyscale((4, 4)): r"\(C, H, W\)",
        lambda: greyscale((3, 4, 4), [1.0]): "a weight for each channel",
        lambda: radon((4, 4), 0): "one angle or more",
        lambda: fourier((4, 4), 0.0): "a share of the rows",
    }.items():
        with pytest.raises(OptionError, match=match):
            ask()

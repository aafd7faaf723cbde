"""The law of a site after a fit: what the program says there, with what was learned, wherever it is taken."""

import math
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pgen
from pgen.capability import Capability, capabilities_of
from pgen.conversion import Converted
from pgen.distributions import EDM, VE, Diffusion, Implicit, MaskedDiffusion, MixtureDenoiser, Quantized
from pgen.errors import DataError, OptionError
from pgen.laws import without
from pgen.nn import DenoiserMLP, Preconditioned
from pgen.zoo import HVAE, MaskedAutoencoder, SplineFlow
from pgen.zoo.diffusion import DenoisingDiffusion

SHORT = pgen.Run(steps=20, progress=False)


def points(n, features, levels=None):
    generator = torch.Generator().manual_seed(n)
    if levels is None:
        return {"x": torch.randn(n, features, generator=generator) + 2}
    return {"x": torch.randint(levels, (n, features), generator=generator)}


MADE_FITS = {
    "made": (lambda: MaskedAutoencoder(4, levels=3, hidden=16), points(30, 4, 3), "exact"),
    "flow": (lambda: SplineFlow(2, transforms=1, hidden=8), points(30, 2), "exact"),
    "flow, cells": (lambda: SplineFlow(2, 3, transforms=1, hidden=8), points(30, 2, 3), "variational"),
    "diffusion": (lambda: DenoisingDiffusion(2, width=8, blocks=1), points(30, 2), "score"),
    "diffusion, cells": (lambda: DenoisingDiffusion(2, 3, width=8, blocks=1), points(30, 2, 3), "score"),
}


def number(law, value):
    """Something that the law says of a value, and that depends on what was learned."""
    torch.manual_seed(0)
    if Capability.DENOISER in capabilities_of(law):
        return law.denoise(value.float(), 0.5)
    return (law.bound if isinstance(law, Quantized) else law.log_prob)(value)


@pytest.mark.parametrize("name", MADE_FITS)
def test_it_keeps_what_was_learned(name, tmp_path):
    make, data, backend = MADE_FITS[name]
    program = make()
    fitted = pgen.fit(program, data, backend, run=SHORT, seed=0)
    law = fitted.law("x")
    assert not isinstance(law, Converted)
    assert (tuple(law.batch_shape), tuple(law.event_shape)) == ((), tuple(data["x"].shape[1:]))
    found = number(law, data["x"])
    untrained = number(poutine.trace(program).get_trace(1).nodes["x"]["fn"], data["x"])
    assert not torch.allclose(found, untrained, atol=1e-3)  # the user's module is as it was
    program.load_state_dict(fitted.parameters, strict=False)
    program.eval()
    torch.testing.assert_close(
        found, number(poutine.trace(program).get_trace(1).nodes["x"]["fn"], data["x"]).detach()
    )
    assert not found.requires_grad
    fitted.save(tmp_path / "fit")
    again = pgen.load(tmp_path / "fit", make())
    torch.testing.assert_close(number(again.law("x"), data["x"]), found)
    assert law.sample((3,)).shape == (3, *law.event_shape)


@pytest.mark.parametrize("name", ["made", "flow"])
def test_in_another_program_it_is_fixed_and_learned(name):
    make, data, backend = MADE_FITS[name]
    fitted = pgen.fit(make(), data, backend, run=SHORT, seed=0)
    law, program = fitted.law("x"), fitted.program

    def by_law(n):
        with pyro.plate("data", n):
            pyro.sample("x", law)

    expected = fitted.log_prob(data).value
    for other in (by_law, program):
        assert pgen.structure_of(other, data).params == ()
        torch.testing.assert_close(pgen.fit(other, data, "exact").log_prob().value, expected)


def test_a_law_of_draws_and_one_of_tokens_keep_their_networks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.shift if x.is_floating_point() else self.shift.expand(*x.shape, 3)

    net = Net()
    tokens = MaskedDiffusion(net, 3, (2,))

    def program(n):
        with pyro.plate("data", n):
            pyro.sample("tokens", tokens)

    run = pgen.Run(steps=200, lr=0.1, progress=False)
    fitted = pgen.fit(program, {"tokens": torch.zeros(4, 2).long()}, "variational", run=run)
    nothing = torch.zeros(2, dtype=torch.bool)
    for law, least, most in ((fitted.law("tokens"), 0.9, 1.0), (tokens, 0.3, 0.4)):
        assert least < float(law.conditional(nothing.long(), nothing).probs[0, 0].detach()) < most
        assert law.sample((2,)).shape == (2, 2)
    assert float(net.shift.detach().abs().max()) == 0


def test_a_law_of_draws_keeps_its_generator():
    net = nn.Linear(2, 3)

    @contextmanager
    def lent():
        before, net.bias = net.bias, nn.Parameter(torch.full((3,), 100.0))
        yield
        net.bias = before

    law = Implicit(net, dist.Normal(torch.zeros(2), 1.0).to_event(1), (3,))
    assert float(law.within(lent).sample((5,)).min()) > 50 > float(law.sample((5,)).max())


def test_rows_have_laws_of_their_own_where_the_program_says_so():
    fitted = pgen.fit(
        HVAE(features=4, above=2, latents=3, levels=3, hidden=8), points(5, 4, 3), run=SHORT, seed=0
    )
    assert fitted.law("above").batch_shape == ()
    with pytest.raises(DataError, match=r"'z' depends on 'above', .*fitted.law\('z', {'above': value}\)"):
        fitted.law("z")
    above = torch.randn(7, 2)
    law = fitted.law("z", {"above": above})
    assert (law.batch_shape, law.event_shape) == ((7,), (3,))
    one = fitted.law("z", {"above": above[2:3]})
    torch.testing.assert_close(one.log_prob(torch.ones(3)), law.log_prob(torch.ones(3))[2:3])


def regression(x, y=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("noise", dist.Exponential(2.0))
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def test_inputs_and_shared_latents_are_given_as_data():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    fitted = pgen.fit(regression, {"x": x, "y": x.sum(1)}, "variational", run=SHORT, seed=0)
    assert float(fitted.law("noise").rate) == 2.0
    assert fitted.law("noise").batch_shape == fitted.law("weight").batch_shape == ()
    with pytest.raises(DataError, match="depends on 'weight'"):
        fitted.law("y")
    law = fitted.law("y", {"x": x[:2], "weight": torch.tensor([1.0, -1.0])})
    torch.testing.assert_close(law.mean, torch.tensor([-1.0, -1.0]))
    scale = fitted.parameters["scale"].exp()
    torch.testing.assert_close(law.stddev, scale.expand(2))
    assert float(scale) != 1.0


def test_an_unknown_site_is_told_from_those_there_are():
    fitted = pgen.fit(regression, {"x": torch.ones(2, 2), "y": torch.ones(2)}, "variational", run=SHORT)
    with pytest.raises(OptionError, match=r"no such site; its sites: 'weight', 'noise', 'y'"):
        fitted.law("z")


def test_a_fit_without_its_data_still_says_what_does_not_depend_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pgen.saving._KEEP_BYTES", 0)
    program = SplineFlow(2, transforms=1, hidden=8)
    pgen.fit(program, points(30, 2), "exact", run=SHORT).save(tmp_path / "fit")
    assert pgen.load(tmp_path / "fit", program).law("x").batch_shape == ()


def test_the_denoiser_of_a_latent_survives_a_variational_fit():
    prior = Preconditioned(DenoiserMLP(2, hidden=(8,)), sigma_data=1.0)

    def program(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", Diffusion(prior, EDM(), (2,)))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))

    fitted = pgen.fit(program, points(20, 2), "variational", run=SHORT, seed=0)
    law = fitted.law("z")
    assert isinstance(law, Diffusion)
    assert not torch.allclose(law.denoise(torch.ones(2), 1.0), prior(torch.ones(1, 2), torch.ones(1))[0])


def test_nothing_to_learn_and_no_data():
    law = Diffusion(MixtureDenoiser(torch.zeros(1, 2), scale=1.0), VE(0.01, 50.0), (2,))

    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", law)

    found = pgen.fit(program, None, "score").law("x")
    assert (found.batch_shape, found.event_shape) == ((), (2,))
    torch.testing.assert_close(found.denoise(torch.ones(2), 1.0), torch.tensor([0.5, 0.5]))


def test_asking_draws_nothing_for_good():
    fitted = pgen.fit(SplineFlow(2, transforms=1, hidden=8), points(30, 2), "exact", run=SHORT)
    before = torch.get_rng_state()
    fitted.law("x")
    assert torch.equal(torch.get_rng_state(), before)


# --- a repeated dimension is taken back, one that differs is not ---

REPEATED = {
    "normal": dist.Normal(1.0, 2.0),
    "event": dist.Normal(torch.tensor([1.0, 2.0]), 1.0).to_event(1),
    "masked": dist.Normal(1.0, 2.0).mask(True),
    "categorical": dist.Categorical(torch.tensor([0.2, 0.8])),
    "logits": dist.Bernoulli(logits=torch.tensor(0.3)),
    "multivariate": dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2) * 3),
    "log-normal": dist.LogNormal(0.5, 0.1),
    "binomial": dist.Binomial(7, 0.3),
    "dirichlet": dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.8])), dist.Normal(torch.tensor([0.0, 4.0]), 1.0)
    ),
    "diffusion": Diffusion(MixtureDenoiser(torch.zeros(1, 2), scale=1.0), VE(0.01, 50.0), (2,)),
}


@pytest.mark.parametrize("name", REPEATED)
def test_what_a_plate_repeats_is_one_law(name):
    one = REPEATED[name]
    found = without(one.expand([5]), -1)
    assert (found.batch_shape, found.event_shape) == (one.batch_shape, one.event_shape)
    value = one.sample()
    if hasattr(one, "denoise"):
        torch.testing.assert_close(found.denoise(value, 1.0), one.denoise(value, 1.0))
    else:
        torch.testing.assert_close(found.log_prob(value), one.log_prob(value))
    assert without(one.expand([3, 5]), -1).batch_shape == (3,)


def test_what_differs_or_cannot_be_told_stays():
    assert without(dist.Normal(torch.arange(5.0), 1.0), -1) is None
    assert without(dist.Multinomial(4, torch.tensor([0.5, 0.5])).expand([5]), -1) is None
    assert without(dist.Normal(torch.arange(3.0)[:, None], 1.0).expand([3, 5]), -1).batch_shape == (3,)
    assert without(dist.Normal(torch.arange(3.0)[:, None], 1.0).expand([3, 5]), -2) is None
    law = without(dist.Normal(torch.arange(3.0)[:, None], 1.0).expand([3, 5]), -1)
    assert math.isclose(float(law.mean.sum()), 3.0)

"""Masked diffusion at a site: exact laws with true conditionals, shapes, contexts, and training by a bound."""

import math

import pyro
import pytest
import torch
from torch import nn

import pgen
from pgen.algorithms.diffusion.masked_views import Counts, Orders
from pgen.capability import Capability, capabilities_of
from pgen.distributions.masked_diffusion import MaskedDiffusion
from pgen.errors import DataError, Intractable, OptionError, ProgramError
from pgen.nn.tokens import TokenTransformer
from pgen.testing.statistics import assert_estimate, assert_frequencies
from tests.algorithms.diffusion.masked_laws import Chain

CHAIN = Chain.random(levels=3, places=5, seed=0)
X = CHAIN.every()


def true_law(**options):
    """With the network that knows all conditionals."""
    return MaskedDiffusion(CHAIN.network, 3, (5,), **options)


def stirred(network, seed=0, scale=0.4):
    """Weights that matter everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval()


class Tokens(nn.Module):
    """A program: strings from a masked diffusion."""

    def __init__(self, levels, places, width=16, depth=1, **options):
        super().__init__()
        self.network = TokenTransformer(places, levels, width, depth)
        self.levels, self.shape, self.options = levels, (places,), options

    def forward(self, n):
        with pyro.plate("data", n):
            return pyro.sample("x", MaskedDiffusion(self.network, self.levels, self.shape, **self.options))


def learned(program, fitted):
    """The law with what was learned."""
    program.load_state_dict(dict(fitted.parameters))
    return MaskedDiffusion(program.network.eval(), program.levels, program.shape)


# --- exact laws ---


def test_with_the_true_conditionals_everything_is_the_log_probability():
    law, exact = true_law(), CHAIN.log_prob(X)
    torch.testing.assert_close(law.exact_bound(X), exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(law.exact_log_prob(X), exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        law.log_prob_in_order(X, torch.tensor([3, 0, 4, 1, 2])), exact, rtol=0, atol=1e-10
    )
    found = law.bound_with_error(X, 2)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-10)
    assert float(found.stderr.max()) < 1e-10


@torch.no_grad()
def test_with_wrong_conditionals_the_order_matters_and_the_bound_is_a_bound():
    law = MaskedDiffusion(stirred(TokenTransformer(5, 3, 16, 1)), 3, (5,))
    ahead, back = (law.log_prob_in_order(X, o) for o in (torch.arange(5), torch.arange(5).flip(0)))
    assert float((ahead - back).abs().max()) > 0.05
    for one in (ahead, back, law.exact_log_prob(X)):  # each a law of its own
        assert float(one.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert (law.exact_bound(X) < law.exact_log_prob(X) - 1e-6).all()


def test_some_places_alone_and_some_given_others():
    law = true_law()
    few, order = torch.tensor([1, 3]), torch.tensor([3, 1])
    joint = CHAIN.log_prob(X)
    same = (X[:, None, few] == X[None, :, few]).all(-1)
    marginal = torch.where(same, joint, -math.inf).logsumexp(-1)
    torch.testing.assert_close(law.log_prob_in_order(X, order), marginal)
    known = torch.tensor([False, True, False, True, False])
    rest = law.log_prob_in_order(X, torch.tensor([4, 0, 2]), known)
    torch.testing.assert_close(rest, joint - marginal)


def test_conditionals_and_infilling_agree_with_the_law():
    law = true_law()
    x, known = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([True, False, False, True, False])
    agree = (X[:, known] == x[known]).all(-1)
    joint = CHAIN.log_prob(X[agree]).softmax(0)
    found = law.conditional(x, known)
    assert found.batch_shape == (5,)
    shown = torch.nn.functional.one_hot(X[agree], 3).double()
    torch.testing.assert_close(found.logits.exp(), (joint[:, None, None] * shown).sum(0))
    draws = law.infill(x, known, 20_000, seed=1)
    assert draws.shape == (20_000, 5)
    assert (draws[:, known] == x[known]).all()
    assert_frequencies(draws[:, ~known] @ torch.tensor([9, 3, 1]), joint)
    garbage = torch.where(known, x, 7)  # what is not known is not looked at
    torch.testing.assert_close(law.conditional(garbage, known).logits, found.logits)
    assert torch.equal(law.infill(garbage, known, 9, seed=1), draws[:9])


def test_draws_follow_the_law():
    draws = true_law().sample((30_000,), seed=0)
    assert_frequencies(draws @ torch.tensor([81, 27, 9, 3, 1]), CHAIN.log_prob(X).exp())


def test_the_error_of_the_bound_is_the_one_it_says():
    """At one value many times, so that errors are seen as often: those of eight repeats are Student's t with 7."""
    torch.manual_seed(1)
    law = MaskedDiffusion(stirred(TokenTransformer(5, 3, 16, 1)), 3, (5,))
    for views in (None, Counts(5)):
        found = law.bound_with_error(X, 8, views=views)
        t = (found.value - law.exact_bound(X).detach()) / found.stderr
        inside = float((t.abs() < 1.895).double().mean())  # 90 per cent of Student's t
        # 243 values: 5.1 standard deviations of a binomial share; repeats are not quite normal.
        assert abs(inside - 0.9) < 5.1 * math.sqrt(0.09 / 243)
        forgot_the_root = float((t.abs() * math.sqrt(8) < 1.895).double().mean())
        assert abs(forgot_the_root - 0.9) > 5.1 * math.sqrt(0.09 / 243)
    assert found.kind == "lower bound"
    assert found.measure == "mass"
    assert found.particles == 40
    assert found.bits_per_dim() > 0
    many = law.bound_with_error(X[:20], 400, views=Orders(1))
    assert_estimate(many.value, law.exact_bound(X[:20]).detach(), many.stderr)


# --- a distribution like any other ---


def test_it_declares_a_bound_and_no_log_prob():
    law = true_law()
    assert capabilities_of(law) == {Capability.SAMPLE, Capability.BOUND}
    assert law.support.is_discrete
    assert law.support.check(law.sample((50,))).all()
    with pytest.raises(Intractable, match=r"use bound\(value\), or log_prob_in_order"):
        law.log_prob(X)
    with pytest.raises(ValueError, match="support"):
        true_law(validate_args=True).bound(torch.tensor([0, 3, 0, 0, 0]))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_shapes_and_gradients(shape):
    network = TokenTransformer(shape or 1, 4, 8, 1, heads=2)
    law = MaskedDiffusion(network, 4, shape, particles=2)
    x = law.sample((5, 2))
    assert x.shape == (5, 2, *shape)
    assert x.dtype == torch.long
    assert law.bound(x).shape == law.exact_bound(x).shape == law.exact_log_prob(x).shape == (5, 2)
    known = torch.rand(shape) < 0.5
    assert law.conditional(x, known).logits.shape == (5, 2, *shape, 4)
    assert law.infill(x, known, 3).shape == (3, 5, 2, *shape)
    assert law.infill(x[0, 0], torch.rand((7, *shape)) < 0.5, 3).shape == (3, 7, *shape)
    law.bound(x.double()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    wide = law.expand((3,))
    assert wide.sample((2,)).shape == (2, 3, *shape)
    assert wide.bound(wide.sample()).shape == (3,)


def test_rows_keep_to_their_context():
    network = stirred(TokenTransformer(4, 3, 8, 1, heads=2, context=2))
    context = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    law = MaskedDiffusion(network, 3, (4,), context=context)
    x = law.sample((2,), seed=3)
    assert x.shape == (2, 6, 4)
    known = torch.tensor([True, False, False, True])
    order = torch.tensor([2, 0, 3, 1])
    whole = law.exact_bound(x), law.log_prob_in_order(x, order), law.conditional(x, known).logits[:, 5]
    for i in range(6):
        one = MaskedDiffusion(network, 3, (4,), context=context[i])
        torch.testing.assert_close(one.exact_bound(x[:, i]), whole[0][:, i])
        torch.testing.assert_close(one.log_prob_in_order(x[:, i], order), whole[1][:, i])
    torch.testing.assert_close(one.conditional(x[:, 5], known).logits, whole[2])
    flipped = MaskedDiffusion(network, 3, (4,), context=context.flip(0))
    assert not torch.allclose(flipped.exact_bound(x), whole[0], atol=1e-3)
    assert law.expand((4, 6)).sample().shape == (4, 6, 4)
    assert law.infill(x, known, 2).shape == (2, 2, 6, 4)


def test_draws_are_a_function_of_the_seed_and_their_number():
    law = true_law()
    few, many = law.sample((3,), seed=5), law.sample((300,), seed=5)
    assert torch.equal(few, many[:3])
    torch.manual_seed(0)
    first, second = law.sample((50,)), law.sample((50,))
    torch.manual_seed(0)
    assert torch.equal(first, law.sample((50,)))
    assert not torch.equal(first, second)


def test_a_logit_for_the_mask_is_left_out():
    """As networks of other libraries have one: however large, a mask is never drawn."""

    def network(tokens):
        return torch.cat([CHAIN.network(tokens), torch.full((*tokens.shape, 1), 50.0)], -1)

    law = MaskedDiffusion(network, 3, (5,))
    torch.testing.assert_close(law.exact_bound(X), CHAIN.log_prob(X))
    assert (law.sample((100,), steps=2) < 3).all()


def test_errors_say_what_to_do():
    for wrong in ({"levels": 1}, {"particles": 0}, {"steps": 0}):
        with pytest.raises(OptionError, match=r"expected at least 2 levels, 1 particle and 1 step"):
            MaskedDiffusion(CHAIN.network, **{"levels": 3, "event_shape": (5,), **wrong})
    with pytest.raises(OptionError, match="expected one of 'log-linear', 'cosine'"):
        true_law(schedule="linear")
    law = true_law()
    with pytest.raises(OptionError, match=r"torch.randperm\(5\)"):
        law.log_prob_in_order(X, torch.tensor([0, 0, 1]))
    with pytest.raises(OptionError, match=r"distinct places of 0..4"):
        law.log_prob_in_order(X, torch.tensor([5]))
    known = torch.tensor([True, False, False, False, False])
    with pytest.raises(OptionError, match="known already"):
        law.log_prob_in_order(X, torch.arange(5), known)
    for bad in (known.long(), known[:4], known.expand(7, 5)):
        with pytest.raises(DataError, match="expected booleans"):
            law.conditional(X, bad)
    with pytest.raises(OptionError, match="2 or more repeats"):
        law.bound_with_error(X, 1)
    with pytest.raises(OptionError, match="steps=0"):
        law.sample(steps=0)
    long = MaskedDiffusion(CHAIN.network, 3, (13,))
    with pytest.raises(OptionError, match=r"at most 12 places; use bound_with_error\(value\)"):
        long.exact_bound(torch.zeros(13))
    with pytest.raises(OptionError, match="use log_prob_in_order"):
        long.exact_log_prob(torch.zeros(13))
    with pytest.raises(ProgramError, match=r"expected \(7533, 5, 5\)"):
        MaskedDiffusion(lambda x: CHAIN.network(x.clamp(max=3)), 5, (5,)).exact_bound(X)


# --- in programs ---


@pytest.mark.parametrize("backend", ["exact", "variational"])
def test_it_trains_under_backends_that_do_not_know_it(backend):
    """A few steps on strings of one kind: the bound rises from that of coins to nearly 0."""
    program = Tokens(3, 4)
    data = {"x": torch.tensor([[0, 1, 2, 0], [2, 1, 0, 2]]).repeat(32, 1)}
    fitted = pgen.fit(program, data, backend, run=pgen.Run(steps=150, lr=1e-2, progress=False), seed=0)
    assert fitted.offer.paths["x"] == ("bound-for-log-prob",)
    found = fitted.log_prob(data)
    assert found.kind == "lower bound"
    assert found.measure == "mass"
    assert float(found.value.mean()) > -math.log(2) - 0.4
    assert fitted.sample(7)["x"].shape == (7, 4)
    assert not fitted.history.warnings
    with torch.no_grad():
        assert float(learned(program, fitted).exact_log_prob(data["x"]).mean()) > -math.log(2) - 0.1


def test_beside_a_latent_it_is_bounded_too():
    """A latent with a guide, and strings that depend on it: no further code."""

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = TokenTransformer(3, 2, 8, 1, heads=2, context=1)

        def forward(self, n):
            with pyro.plate("data", n):
                z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(1), 1.0).to_event(1))
                return pyro.sample("x", MaskedDiffusion(self.network, 2, (3,), context=z))

    data = {"x": torch.tensor([[0, 0, 0], [1, 1, 1]]).repeat(16, 1)}
    fitted = pgen.fit(Program(), data, "variational", run=pgen.Run(steps=60, lr=2e-2, progress=False), seed=0)
    assert fitted.log_prob(data).kind == "lower bound"
    assert fitted.posterior(data, n=3)["z"].shape == (3, 32, 1)


@pytest.mark.slow
def test_strings_of_a_known_law_are_learned():
    """Eight tokens of five kinds from a Markov chain: the bound comes within 0.1 nats a token of the entropy."""
    chain = Chain.random(levels=5, places=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    train, test = (chain.sample(n, generator) for n in (20_000, 500))
    torch.manual_seed(0)
    program = Tokens(5, 8, width=64, depth=2)
    run = pgen.Run(steps=1000, batch_size=128, lr=3e-3, progress=False)
    law = learned(program, pgen.fit(program, {"x": train}, "exact", run=run, seed=0))
    with torch.no_grad():
        gap = float((chain.log_prob(test) - law.exact_bound(test)).mean()) / 8
        known = torch.rand(test.shape, generator=generator) < 0.5
        exact = chain.network(test.masked_fill(~known, 5)).softmax(-1)
        distance = (law.conditional(test, known).probs - exact).abs().sum(-1)[~known].mean() / 2
    assert 0 < gap < 0.1
    assert float(distance) < 0.05

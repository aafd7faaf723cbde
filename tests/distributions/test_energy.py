"""`Energy` as a distribution: what it can do follows from what is known; nothing passes for what it is not."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pgen.capability import Capability, capabilities_of
from pgen.distributions import Energy, Flow
from pgen.errors import DataError, Intractable, OptionError, ProgramError
from pgen.nn import RBM
from pgen.testing.statistics import assert_frequencies

C = Capability


def bowl(x):
    return x.square().sum(-1) / 2


def tilt(x):
    return x.sum(-1)


def test_only_a_density_up_to_a_constant_is_native():
    law = Energy(bowl, (2,))
    assert capabilities_of(law) == {C.LOG_DENSITY}
    assert law.log_density(torch.ones(3, 2)).tolist() == [-1.0] * 3
    with pytest.raises(Intractable, match="normalising constant"):
        law.log_prob(torch.ones(2))
    with pytest.raises(Intractable, match="no exact draws"):
        law.sample()


def test_a_base_is_tilted():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    base.base_dist._validate_args = True
    law = Energy(tilt, (2,), base=base)
    x = torch.randn(4, 2)
    torch.testing.assert_close(law.log_density(x), base.log_prob(x) - x.sum(-1))
    assert not law.base.base_dist._validate_args  # a copy that checks nothing, so that chains can be recorded
    assert base.base_dist._validate_args


def test_shapes_follow_context_base_and_plates():
    context = torch.randn(5, 3)
    law = Energy(lambda x, c: (x * c.sum(-1, keepdim=True)).sum(-1), (2,), context=context)
    assert law.batch_shape == (5,)
    assert law.conditional
    x = torch.randn(4, 5, 2)
    torch.testing.assert_close(law.log_density(x), -(x * context.sum(-1, keepdim=True)).sum(-1))
    wide = Energy(bowl, (2,)).expand([7])
    assert not wide.conditional
    assert wide.single.batch_shape == ()
    assert wide.log_density(torch.zeros(2)).shape == (7,)
    scalar = Energy(lambda x: x.square(), ())
    assert scalar.log_density(torch.tensor([1.0, 2.0])).tolist() == [-1.0, -4.0]
    image = Energy(lambda x: x.square().sum((-1, -2)), (3, 3)).to_event(0)
    assert image.log_density(torch.ones(2, 3, 3)).tolist() == [-9.0, -9.0]


def test_few_values_are_listed_and_summed():
    law = Energy(lambda x: -x @ torch.tensor([1.0, -1.0]), (2,), support=constraints.boolean)
    assert capabilities_of(law) == {C.LOG_DENSITY, C.ENUMERATE}
    assert law.enumerate_support().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert law.expand([3]).enumerate_support().shape == (4, 3, 2)
    assert law.expand([3]).enumerate_support(expand=False).shape == (4, 1, 2)
    many = Energy(lambda x: x.sum(-1), (40,), support=constraints.boolean)
    assert C.ENUMERATE not in capabilities_of(many)
    with pytest.raises(NotImplementedError, match="listed"):
        many.enumerate_support()


def test_what_the_energy_knows_the_law_knows():
    torch.manual_seed(0)
    law = Energy(RBM(4, 2, scale=1.0), (4,), support=constraints.boolean)
    assert {C.LOG_PROB, C.SAMPLE} <= capabilities_of(law)
    every = law.space.every(torch.zeros(()))
    p = law.log_prob(every).exp().detach()
    assert abs(float(p.sum()) - 1) < 1e-5
    drawn = law.expand([2]).sample((5000,)).reshape(-1, 4)
    assert_frequencies((drawn @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), p)
    tilted = Energy(RBM(4, 2), (4,), base=dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))
    assert C.LOG_PROB not in capabilities_of(tilted)  # its constant is that of the product
    assert C.LOG_PROB not in capabilities_of(Energy(RBM(30, 30), (30,), support=constraints.boolean))


def test_what_is_missing_given_the_rest():
    precision = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 1.5]])
    law = Energy(lambda x: (x @ precision * x).sum(-1) / 2, (3,))
    seen = torch.tensor([[1.0, math.nan, 2.0], [0.0, math.nan, -1.0]])
    rest = law.given(seen)
    assert (rest.batch_shape, rest.event_shape) == ((2,), (1,))
    t = torch.tensor([-1.0, 0.5])
    mean = -(0.6 * seen[:, 0] - 0.3 * seen[:, 2])  # the conditional is normal with precision 1
    ours = rest.log_density(t[:, None]) - rest.log_density(mean[:, None])
    torch.testing.assert_close(ours, -(t - mean).square() / 2, rtol=1e-4, atol=1e-5)
    for bad in (
        torch.zeros(3),
        torch.full((3,), math.nan),
        torch.tensor([[1.0, math.nan, 1], [math.nan, 1, 1]]),
    ):
        with pytest.raises(DataError, match="same places"):
            law.given(bad)
    with pytest.raises(OptionError, match="conditional"):
        rest.given(torch.tensor([math.nan]))


def test_what_is_missing_of_a_mixed_value_keeps_its_kind():
    support = constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[2, 2])
    law = Energy(lambda x: x.square().sum(-1), (4,), support=support)
    rest = law.given(torch.tensor([0.0, math.nan, math.nan, 1.0]))
    assert (rest.space.dims, rest.space.cardinalities) == (1, (2,))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Energy(bowl, (2,), base=dist.Normal(0.0, 1.0)), OptionError, "event shape"),
        (lambda: Energy(bowl, (2,), support=constraints.nonnegative_integer), OptionError, "finite list"),
        (lambda: Energy(lambda x: x, (2,)).log_density(torch.zeros(3, 2)), ProgramError, "single number"),
        (
            lambda: Energy(bowl, (2,), support=constraints.positive, validate_args=True).log_density(
                -torch.ones(2)
            ),
            ValueError,
            "support|constraint",
        ),
    ],
)
def test_errors_say_what_was_expected(make, error, told):
    with pytest.raises(error, match=told):
        make()


def test_a_base_without_a_density_is_refused():
    from pgen.distributions import Implicit

    implicit = Implicit(torch.nn.Linear(2, 2), dist.Normal(torch.zeros(2), 1.0).to_event(1), (2,))
    with pytest.raises(OptionError, match="log density"):
        Energy(bowl, (2,), base=implicit)


def test_a_flow_can_be_tilted():
    import zuko

    flow = Flow(zuko.flows.NSF(2, hidden_features=(8,)), (2,))
    law = Energy(tilt, (2,), base=flow)
    x = torch.randn(3, 2)
    torch.testing.assert_close(law.log_density(x), flow.log_prob(x) - x.sum(-1))

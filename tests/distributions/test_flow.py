"""Flows as distributions: normalised, drawn from as said, remembered once."""

import pyro
import pytest
import torch
from pyro import poutine

from pgen.capability import Capability, capabilities_of
from pgen.distributions import Flow
from pgen.distributions.quiet import zuko
from pgen.errors import OptionError


def stirred(flow, scale=0.5):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return flow


def flow_of(name, features=2, context=0):
    kinds = {
        "NSF": lambda: zuko.flows.NSF(features, context, transforms=2, hidden_features=(16,)),
        "MAF": lambda: zuko.flows.MAF(features, context, transforms=2, hidden_features=(16,)),
        "coupling": lambda: zuko.flows.NSF(features, context, transforms=2, hidden_features=(16,), passes=2),
    }
    return stirred(kinds[name]().double())


@pytest.mark.parametrize("name", ["NSF", "MAF", "coupling"])
def test_the_density_is_that_of_the_draws(name):
    """Change of variables, with the Jacobian of the generator by autograd, at draws whose noise is known."""
    law = Flow(flow_of(name, features=3), (3, 1))
    torch.manual_seed(5)
    x = law.sample((6,))
    torch.manual_seed(5)
    z = law.law.base.rsample((6,))
    generate = law.law.transform.inv
    torch.testing.assert_close(generate(z), x.flatten(-2))
    jacobian = torch.stack([torch.autograd.functional.jacobian(generate, e) for e in z])
    density = law.law.base.log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(law.log_prob(x), density, atol=1e-5, rtol=1e-5)
    assert float((density - law.law.base.log_prob(z)).detach().abs().max()) > 0.01, "the flow does nothing"


def test_any_event_shape_and_a_context_for_each_row():
    flow = flow_of("MAF", features=6, context=3)
    context = torch.randn(4, 3, dtype=torch.float64)
    law = Flow(flow, (2, 3), context=context)
    assert (law.batch_shape, law.event_shape) == ((4,), (2, 3))
    x = law.rsample((5,))
    assert x.shape == (5, 4, 2, 3)
    torch.testing.assert_close(law.log_prob(x), flow(context).log_prob(x.flatten(-2)))
    assert law.support.event_dim == 2
    wide = law.expand((7, 4))
    assert wide.sample((2,)).shape == (2, 7, 4, 2, 3)
    torch.testing.assert_close(wide.log_prob(x[0]), law.log_prob(x[0]).expand(7, 4))


class Counting(torch.nn.Module):
    """A flow that counts how often a density is computed from a value."""

    def __init__(self, flow):
        super().__init__()
        self.flow, self.inversions = flow, 0

    def forward(self, context=None):
        law = self.flow(context)
        plain = law.log_prob

        def log_prob(x):
            self.inversions += 1
            return plain(x)

        law.log_prob = log_prob
        return law


def test_the_last_draw_is_remembered_and_nothing_else():
    counting = Counting(flow_of("MAF"))
    law = Flow(counting)
    x = law.rsample((4,))
    remembered = law.log_prob(x)
    assert counting.inversions == 0
    torch.testing.assert_close(remembered, law.log_prob(x.clone()))
    assert counting.inversions == 1
    law.rsample((4,))
    law.log_prob(x)
    assert counting.inversions == 2, "an older draw must be inverted"
    y = law.rsample((4,)).detach()
    law.log_prob(y)
    assert counting.inversions == 3


def test_a_draw_changed_in_place_is_not_remembered():
    law = Flow(flow_of("MAF"))
    with torch.no_grad():
        x = law.rsample((4,))
        before = law.log_prob(x).clone()
        x += 1.0
        assert not torch.allclose(law.log_prob(x), before)


def test_remembering_does_not_change_the_gradient():
    flow = flow_of("MAF")
    target = torch.distributions.Normal(1.0, 2.0)

    def gradient(remember):
        flow.zero_grad()
        torch.manual_seed(3)
        law = Flow(flow)
        x = law.rsample((64,))
        score = law.log_prob(x) if remember else law.law.log_prob(x)
        (target.log_prob(x).sum(-1) - score).mean().backward()
        return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(True), gradient(False))


def test_at_a_sample_site_in_a_plate():
    law = Flow(flow_of("NSF"))

    def model(n):
        with pyro.plate("data", n):
            return pyro.sample("x", law)

    trace = poutine.trace(model).get_trace(5)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (5,)
    assert capabilities_of(law) == {Capability.SAMPLE, Capability.RSAMPLE, Capability.LOG_PROB}
    assert not law.sample((2,)).requires_grad
    assert law.rsample((2,)).requires_grad


def test_anything_that_behaves_like_a_flow_will_do():
    law = Flow(lambda: torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4)), (2, 2))
    x = law.rsample((3,))
    torch.testing.assert_close(law.log_prob(x), torch.distributions.Normal(0, 1).log_prob(x).sum((-1, -2)))


def test_a_flow_of_another_size_is_refused():
    with pytest.raises(OptionError, match=r"event shape \(2,\).*\(3,\).*NSF\(3\)"):
        Flow(flow_of("MAF"), (3,))


def test_importing_zuko_leaves_validation_as_it_was():
    assert torch.distributions.Distribution._validate_args

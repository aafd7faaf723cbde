"""Partition functions against closed forms and enumeration; intervals hold the truth as often as they say."""

import math

import pytest
import torch
from torch.distributions import Independent, MixtureSameFamily, Normal, constraints

from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.bipartite import Bits
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.partition import bennett, partition_of
from pgen.algorithms.energy.quadrature import quadrature
from pgen.algorithms.energy.reference import Reference, closest
from pgen.algorithms.energy.route import Own, Tilted
from pgen.algorithms.energy.space import Space
from pgen.algorithms.energy.sums import enumerated
from pgen.algorithms.energy.walks import Usual

D64 = torch.zeros((), dtype=torch.float64)
PLANE = Space.of(constraints.real, (2,))


def two_hills(x):
    return torch.logaddexp(-2 * (x - 1.5).square().sum(-1), -2 * (x + 1.5).square().sum(-1) + math.log(3.0))


HILLS = math.log(4 * math.pi / 2)


@pytest.mark.parametrize(
    ("f", "support", "shape", "log_z"),
    [
        (lambda x: -x.square().sum(-1) / 2, constraints.real, (2,), math.log(2 * math.pi)),
        (lambda x: -x.abs().sum(-1), constraints.real, (1,), math.log(2.0)),
        (lambda x: -3 * x.sum(-1) + x.log().sum(-1), constraints.positive, (1,), -math.log(9.0)),
        (lambda x: -1e4 * (x - 50).square().sum(-1), constraints.real, (1,), math.log(math.pi / 1e4) / 2),
        (two_hills, constraints.real, (2,), HILLS),
        (lambda x: 0 * x.sum(-1), constraints.interval(-1.0, 2.0), (1,), math.log(3.0)),
    ],
)
def test_quadrature_of_what_is_known(f, support, shape, log_z):
    found = quadrature(f, Space.of(support, shape), D64)
    assert abs(float(found.log_z) - log_z) < 1e-4
    assert float(found.error) < 1e-3


def test_quadrature_sums_over_what_is_counted_and_can_be_differentiated():
    space = Space.of(constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[1, 1]), (2,))
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = quadrature(lambda x: -a * x[:, 0].square() / 2 + x[:, 1], space, D64)
    expected = math.log(1 + math.e) + math.log(2 * math.pi / 2.0) / 2
    assert abs(float(found.log_z.detach()) - expected) < 1e-4
    (slope,) = torch.autograd.grad(found.log_z, a)
    assert abs(float(slope) + 1 / 4) < 1e-5


def test_what_has_no_integral_is_refused():
    with pytest.raises(ValueError, match="does not fall off"):
        quadrature(lambda x: 0.1 * x.square().sum(-1), PLANE, D64)
    with pytest.raises(ValueError, match="1 to 3 numbers"):
        quadrature(lambda x: -x.square().sum(-1), Space.of(constraints.real, (4,)), D64)


def test_sums_in_blocks_are_the_sum_with_the_same_gradient():
    space = Space.of(constraints.boolean, (8,))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    whole, parts = (enumerated(lambda x: x @ weight, space, D64, block=block) for block in (256, 60))
    expected = torch.nn.functional.softplus(weight).sum()
    for found in (whole, parts):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, weight)[0], weight.sigmoid())


class Law:
    def __init__(self, law):
        self.law = law

    def sample(self, n):
        return self.law.sample((n,))

    def log_prob(self, x):
        return self.law.log_prob(x)


WIDE = Law(
    Independent(Normal(torch.zeros(2), torch.full((2,), 2.5), validate_args=False), 1, validate_args=False)
)


def hills(n):
    weights = torch.distributions.Categorical(torch.tensor([0.25, 0.75]))
    means = torch.tensor([[1.5, 1.5], [-1.5, -1.5]])
    return MixtureSameFamily(weights, Independent(Normal(means, 0.5), 1)).sample((n,))


def runs(count, draws):
    torch.manual_seed(0)
    route = Tilted(WIDE, two_hills, Usual(PLANE).walk(2))
    how = Annealing(chains=200, pilot=100, trial=50, least=10)
    return [how.run(route, hills(200) if draws else None) for _ in range(count)]


@pytest.mark.parametrize("draws", [False, True])
def test_annealing_is_right_and_says_how_right(draws):
    found = runs(12, draws)
    z = torch.stack([(p.log_z - HILLS) / p.stderr for p in found])
    # Twelve standard scores: their mean square is below 3.3 but for a chance of 1e-4, their mean below 4 / sqrt(12).
    assert float(z.square().mean()) < 3.3
    assert abs(float(z.mean())) * math.sqrt(12) < 4
    lower = torch.stack([p.lower for p in found]).mean()
    assert float(lower) < HILLS
    if draws:
        assert float(torch.stack([p.upper for p in found]).mean()) > HILLS


def test_weights_that_leave_a_part_out_are_noticed():
    torch.manual_seed(1)
    route = Tilted(WIDE, two_hills, Usual(PLANE).walk(2))
    one = hills(2000)
    lost = one[one[:, 0] > 0][:300]  # of the smaller hill alone
    found = Annealing(chains=300, pilot=100, trial=100, least=10).run(route, lost)
    assert float(found.apart) > 4
    assert abs(float(found.log_z) - HILLS) < 1.96 * float(found.stderr)


def test_an_energy_may_bring_its_own_route():
    torch.manual_seed(2)
    net = Bits(torch.randn(6, 10), torch.randn(10) - 1, torch.randn(6) - 1)

    def tempered(beta):
        return net.at(beta, torch.zeros(10))

    exact = float(net.log_partition())
    z = []
    for _ in range(12):
        found = Annealing(chains=300, pilot=100, trial=100).run(Own(tempered), net.sample(300))
        z.append((float(found.log_z) - exact) / float(found.stderr))
    assert sum(v * v for v in z) / 12 < 3.3  # of twelve standard scores: a chance of 1e-4


def test_bennett_of_normal_weights():
    torch.manual_seed(3)
    noise = torch.randn(2, 20_000, dtype=torch.float64)
    log_z, stderr = bennett(2.0 + 1.5 * noise[0] - 1.5**2 / 2, 2.0 + 1.5 * noise[1] + 1.5**2 / 2)
    assert abs(float(log_z) - 2) < 5 * float(stderr)
    from_below = partition_of(2.0 + 1.5 * noise[0] - 1.5**2 / 2)
    assert from_below.upper is None
    assert float(stderr) < float(from_below.stderr)


def test_long_runs_draw_from_the_density():
    torch.manual_seed(4)
    drawn = LongRun(warmup=100, chains=500, thin=10)(two_hills, torch.randn(500, 2), PLANE, 2000)
    assert drawn.shape == (2000, 2)
    share = float((drawn[:, 0] > 0).double().mean())
    assert abs(share - 0.25) < 0.1  # 500 chains: five standard errors
    inside = torch.where(drawn[:, :1] > 0, drawn - 1.5, drawn + 1.5)
    assert abs(float(inside.std()) - 0.5) < 0.05


def test_the_closest_law_is_taken():
    x = torch.randn(500, 2) * 3
    near = Reference(x, PLANE)
    assert closest(x, near, Law(Independent(Normal(torch.zeros(2), 0.1), 1))) is near
    assert closest(x, near, None) is near


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="chains"):
        Annealing(chains=1)
    with pytest.raises(ValueError, match="warmup"):
        LongRun(warmup=-1)

"""Supports as coordinates and indices: apart and together are inverse, volumes are those of the change, lists are complete."""

import pytest
import torch
from torch.distributions import biject_to, constraints

from pgen.algorithms.energy.space import Space

MIXED = constraints.cat(
    [constraints.real, constraints.boolean, constraints.positive, constraints.integer_interval(2, 4)],
    dim=-1,
    lengths=[2, 1, 1, 2],
)
SPACES = {
    "real": (constraints.real, (3,)),
    "scalar": (constraints.real, ()),
    "image": (constraints.real, (2, 2)),
    "positive": (constraints.positive, (2,)),
    "interval": (constraints.interval(-1.0, 2.0), (2,)),
    "simplex": (constraints.simplex, (3,)),
    "bits": (constraints.boolean, (4,)),
    "levels": (constraints.integer_interval(0, 2), (2,)),
    "mixed": (MIXED, (6,)),
    "wrapped": (constraints.independent(constraints.real, 1), (3,)),
}


def values(space, n=50):
    torch.manual_seed(0)
    return space.together(*space.uniform(n, torch.empty(0, dtype=torch.float64)))


@pytest.mark.parametrize("name", SPACES)
def test_taking_apart_is_undone(name):
    space = Space.of(*SPACES[name])
    x = values(space)
    assert x.shape == (50, *SPACES[name][1])
    assert bool(SPACES[name][0].check(x).all())
    torch.testing.assert_close(space.together(*space.apart(x)), x)


@pytest.mark.parametrize("name", ["positive", "interval", "simplex", "mixed"])
def test_volumes_are_those_of_the_change(name):
    space = Space.of(*SPACES[name])
    q, _ = space.apart(values(space))
    if name == "mixed":  # two real numbers and a positive one, exp
        torch.testing.assert_close(space.volume(q), q[:, 2])
        return
    change = biject_to(SPACES[name][0])
    expected = change.log_abs_det_jacobian(q, change(q)).reshape(50, -1).sum(1)
    torch.testing.assert_close(space.volume(q), expected)


def test_a_density_on_coordinates_integrates_to_one():
    space = Space.of(constraints.positive, (1,))
    q = torch.linspace(-20, 5, 20001, dtype=torch.float64)[:, None]
    none = torch.zeros(len(q), 0, dtype=torch.long)
    density = torch.distributions.Gamma(2.0, 3.0).log_prob(space.together(q, none))[:, 0]
    mass = torch.trapezoid((density + space.volume(q)).exp(), q[:, 0])
    assert abs(float(mass) - 1) < 1e-6
    assert abs(float(torch.trapezoid(density.exp(), q[:, 0])) - 1) > 0.1  # the volume matters


def test_all_values_of_a_finite_space():
    space = Space.of(
        constraints.cat([constraints.boolean, constraints.integer_interval(1, 3)], dim=-1, lengths=[2, 1]),
        (3,),
    )
    every = space.every(torch.zeros(()))
    assert every.shape == (12, 3) == (space.states, 3)
    assert len({tuple(row.tolist()) for row in every}) == 12
    assert set(every[:, 2].tolist()) == {1.0, 2.0, 3.0}
    with pytest.raises(ValueError, match="quadrature"):
        Space.of(constraints.real, (1,)).every(torch.zeros(()))


@pytest.mark.parametrize(
    ("support", "shape", "told"),
    [
        (constraints.nonnegative_integer, (2,), "finite list"),
        (constraints.cat([constraints.real], dim=-1, lengths=[2]), (3,), "values of shape"),
        (constraints.cat([constraints.real], dim=0, lengths=[2]), (2,), "dim=-1"),
    ],
)
def test_supports_on_which_nothing_moves_are_refused(support, shape, told):
    with pytest.raises(ValueError, match=told):
        Space.of(support, shape)

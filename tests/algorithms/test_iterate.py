"""Many steps as one: the chain of `moved` is that of `iterate`, and a step of many moves is many steps."""

import functools

import pytest
import torch

from pgen.algorithms.kernels.base import Tuning
from pgen.algorithms.kernels.hmc import HMC, standard_normal, standard_normals
from pgen.algorithms.kernels.iterate import iterate, moved, unwrapped
from pgen.algorithms.kernels.langevin import MALA, ULA
from pgen.algorithms.record import record
from pgen.testing.statistics import StatisticalFailure, assert_mean, assert_moments
from tests.algorithms.kernel_laws import FLOAT, Half, LogGamma, tuned

KERNELS = [ULA(), ULA(moves=3), MALA(), HMC(steps=3)]
RECORDED = functools.cache(functools.partial(record, fallback=False))


def seeded(fn):
    torch.manual_seed(5)
    return fn()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wrap", [unwrapped, RECORDED])
@pytest.mark.parametrize(("draws", "together"), [(7, 3), (4, 4), (2, 5)])
def test_the_chain_is_that_of_single_steps(kernel, wrap, draws, together):
    """Vectors that are too long to be laid out in another way take the same noise."""
    target, tuning = LogGamma(16), tuned(0.4, torch.ones(16, **FLOAT))
    start = kernel.init(target.draw(40), target)
    expected = seeded(lambda: iterate(kernel, start, tuning, target, draws))
    state, info = seeded(lambda: moved(kernel, start, tuning, target, draws, wrap, together))
    torch.testing.assert_close(state, expected[0])
    torch.testing.assert_close(info, type(info)(*(part[-1] for part in expected[2])))


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_the_state_has_the_gradient_and_density_of_where_it_is(kernel):
    target = LogGamma(2)
    start = kernel.init(target.draw(40), target)
    state, _ = moved(kernel, start, tuned(0.4, torch.ones(2, **FLOAT)), target, 10, RECORDED)
    torch.testing.assert_close(state[1:], target(state.position))
    assert all(part.is_contiguous() for part in state)


@pytest.mark.parametrize("kernel", KERNELS[2:])
def test_a_target_of_few_numbers_is_left_invariant(kernel):
    target = LogGamma(2)
    start = kernel.init(target.draw(10_000), target)
    state, info = moved(kernel, start, tuned(0.8, torch.ones((), **FLOAT)), target, 12, RECORDED)
    assert_mean(target.functions(state.position), 0.0)
    assert 0.3 < info.accept.mean() < 0.99
    wrong, _ = moved(ULA(), start, tuned(0.8, torch.ones((), **FLOAT)), target, 12, RECORDED)
    with pytest.raises(StatisticalFailure):
        assert_mean(target.functions(wrong.position), 0.0)


@pytest.mark.parametrize("shape", [(4, 1000), (1000, 4)])
def test_noise_lies_as_what_it_is_like(shape):
    for like in (torch.empty(shape, **FLOAT), torch.empty(shape).mT):
        noise = standard_normal(like)
        assert (noise.shape, noise.stride(), noise.dtype) == (like.shape, like.stride(), like.dtype)
        assert_moments(noise.flatten(), 0.0, 1.0)
        many = standard_normals(like, 5)
        assert {noise.stride() for noise in many} == {like.stride()}
        assert_moments(torch.stack(many).flatten(), 0.0, 1.0)


def test_large_noise_is_drawn_in_turn():
    like = torch.empty(1024, 128)
    at_once = seeded(lambda: standard_normals(like, 4))
    in_turn = seeded(lambda: standard_normals(like, 5))
    single = seeded(lambda: [standard_normal(like) for _ in range(5)])
    torch.testing.assert_close(list(in_turn), single)
    torch.testing.assert_close(list(at_once), single[:4])


def test_many_moves_are_many_steps():
    target, tuning = (
        LogGamma(16),
        tuned(0.3, torch.ones(16, **FLOAT)),
    )  # torch fills sixteen numbers at a time
    start = ULA().init(target.draw(50), target)
    expected = seeded(lambda: iterate(ULA(), start, tuning, target, 5)[0])
    state, info = seeded(lambda: ULA(moves=5).step(start, tuning, target))
    torch.testing.assert_close(state, expected)
    assert (info.evaluations == 5).all()


def test_a_chain_that_leaves_the_support_on_the_way_is_back_where_it_began():
    """Past the edge nothing is a number, at whichever of the moves it was passed; the other chains are not touched."""
    kernel, target = ULA(moves=4), Half()
    state = kernel.init(torch.full((400, 1), 0.5, **FLOAT), target)
    end, info = kernel.step(state, tuned(0.7, torch.ones(1, **FLOAT)), target)
    assert (info.diverging == (end.position[:, 0] == 0.5)).all()
    assert 0.1 < info.diverging.double().mean() < 0.9
    torch.testing.assert_close(end[1:], target(end.position))


@pytest.mark.parametrize("kernel", [MALA(), HMC(steps=3)])
def test_one_scale_for_all_is_that_scale_for_each(kernel):
    target = LogGamma(9)
    start = kernel.init(target.draw(20), target)
    one = torch.tensor(0.7, **FLOAT)
    ends = [
        seeded(lambda s=scale: kernel.step(start, Tuning(one, s, one), target))
        for scale in (one, one.expand(9), torch.eye(9, **FLOAT) * one)
    ]
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ULA(moves=0), "moves"),
        (lambda: moved(MALA(), None, None, None, 0), "draws"),
        (lambda: moved(MALA(), None, None, None, 3, together=0), "together"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()

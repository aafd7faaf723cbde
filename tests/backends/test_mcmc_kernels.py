"""Kernels of the user's own: whatever has `init` and `step` is warmed up, recorded, sampled and saved like the others."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.algorithms.kernels.base import pull, push
from pgen.algorithms.kernels.chees import ChEES
from pgen.algorithms.kernels.hmc import HMC
from pgen.errors import ProgramError
from pgen.metrics.chains import diagnose


def program():
    x = pyro.sample("x", dist.Normal(torch.tensor([0.0, 100.0]), torch.tensor([0.1, 30.0])).to_event(1))
    s = pyro.sample("s", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(x[0], 0.1), obs=torch.tensor(0.2))
    pyro.sample("c", dist.Poisson(s), obs=torch.tensor(4.0))


def check(kernel, broken=False, **options):
    backend = pgen.backend("mcmc", kernel=kernel, chains=64, warmup=150, draws=300, **options)
    fitted = pgen.fit(program, None, backend, seed=0)
    draws = fitted.draws().by_chain()
    values = torch.cat([draws["x"], draws["x"] ** 2, draws["s"].unsqueeze(-1)], -1).double()
    found = diagnose(values, (0.5,))
    truth = torch.tensor([0.1, 100.0, 0.01 + 0.005, 1e4 + 900, 7 / 3]).double()
    off = ((found.mean - truth).abs() / found.mcse_mean).max()
    assert (float(off) > 5) == broken
    return fitted, found


class Barker:
    """Livingstone & Zanella (2022): the gradient decides which sign a normal step is given."""

    target_accept = 0.57

    def init(self, q, target):
        return q, *target(q)

    def step(self, state, tuning, target):
        q, log_density, gradient = state
        whitened = pull(tuning.scale, gradient)
        z = tuning.step_size * torch.randn_like(q)
        z = torch.where(torch.rand_like(z) < torch.sigmoid(z * whitened), z, -z)
        new = q + push(tuning.scale, z)
        new_density, new_gradient = target(new)
        back = torch.nn.functional.logsigmoid(-z * pull(tuning.scale, new_gradient)).sum(-1)
        forth = torch.nn.functional.logsigmoid(z * whitened).sum(-1)
        accept = (new_density - log_density + back - forth).exp().clamp(max=1.0).nan_to_num(nan=0.0)
        taken = torch.rand_like(accept) < accept
        moved = (new, new_density, new_gradient)
        return tuple(
            torch.where(taken.view(-1, *[1] * (n.dim() - 1)), n, o) for n, o in zip(moved, state)
        ), accept


class Slice:
    """Neal (2003), along a random direction, by shrinking a fixed number of times; it never rejects, hence no info."""

    def init(self, q, target):
        return q

    def step(self, q, tuning, target):
        level = target(q)[0] + torch.rand_like(q[:, 0]).log()
        direction = push(tuning.scale, torch.randn_like(q))
        low = -6 * torch.rand_like(q[:, :1])
        high, found = low + 6, torch.zeros_like(low)
        done = torch.zeros_like(low, dtype=torch.bool)
        for _ in range(12):
            at = low + (high - low) * torch.rand_like(low)
            inside = (target(q + at * direction)[0] > level).unsqueeze(-1)
            found = torch.where(inside & ~done, at, found)
            done = done | inside
            low, high = torch.where(~done & (at < 0), at, low), torch.where(~done & (at >= 0), at, high)
        return q + found * direction, None


@pytest.mark.parametrize("kernel", [Barker(), Slice()])
def test_a_kernel_of_twenty_lines(kernel):
    fitted, found = check(kernel)
    assert float(found.ess_bulk.min()) > 300
    assert fitted.summary() is not None


def test_its_step_size_is_tuned_to_the_acceptance_that_it_names():
    fitted, _ = check(Barker())
    assert 0.45 < float(fitted.history.metrics["acceptance_rate"].mean()) < 0.7


def test_its_chains_go_on_bit_for_bit():
    def fit(draws):
        backend = pgen.backend("mcmc", kernel=Barker(), chains=4, warmup=30, draws=draws)
        return pgen.fit(program, None, backend, seed=0)

    whole, part = fit(200), fit(100)
    part.resume(100)
    torch.testing.assert_close(whole.draws()["x"], part.draws()["x"], rtol=0, atol=0)


def test_the_check_notices_a_kernel_that_forgets_its_way_back():
    class Forgetful(Barker):
        def step(self, state, tuning, target):
            real = torch.nn.functional.logsigmoid
            torch.nn.functional.logsigmoid = torch.zeros_like
            try:
                return super().step(state, tuning, target)
            finally:
                torch.nn.functional.logsigmoid = real

    check(Forgetful(), broken=True)


@pytest.mark.parametrize("kernel", [HMC(steps=5), ChEES()])
def test_objects_of_our_own_kernels_warm_up_as_their_names_do(kernel):
    _, found = check(kernel)
    assert float(found.ess_bulk.min()) > 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": lambda self, q, target: {"q": q}}, "Odd.init gave a state that begins with dict"),
        ({"init": lambda self, q, target: q[:, :1]}, r"begins with \(64, 1\); expected the positions"),
        ({"step": lambda self, state, tuning, target: state}, "Odd.step returned .*; expected a pair"),
    ],
)
def test_what_a_kernel_gives_is_checked(change, words):
    odd = type("Odd", (Slice,), change)()
    with pytest.raises((TypeError, ProgramError), match=words):
        check(odd)

"""The variational backend on programs of many kinds: plates, chains, scales, subsamples, simulations."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pgen
from pgen.backends.variational import Variational
from pgen.backends.variational.joint import agrees
from pgen.backends.variational.settle import couple
from pgen.guides.proposal import automatic
from pgen.inspection import inspect_problem
from pgen.parameters import Parameters
from pgen.problem import Problem


def fitted(program, data, steps=0, seed=0, lr=1e-2, schedule="constant", batch_size=None, args=(), **options):
    run = pgen.Run(steps=steps, progress=False, lr=lr, schedule=schedule, batch_size=batch_size)
    return pgen.fit(program, data, Variational(**options), run=run, args=args, seed=seed)


def coupled(program, data, args=(), guide="auto"):
    structure, problem = inspect_problem(Problem.of(program, data, args))
    proposal = automatic(guide, problem, structure, ())
    return problem, couple(proposal, structure, ()), Parameters.of(problem, owners={"guide": proposal.owner})


# --- groups in groups --------------------------------------------------------------------------------------


def groups(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(mean, 0.5))
        with pyro.plate("members", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def group_evidence(y):
    rows, members = y.shape
    covariance = 4.0 + 0.25 * torch.block_diag(*[torch.ones(members, members)] * rows) + torch.eye(y.numel())
    return dist.MultivariateNormal(torch.zeros(y.numel()), covariance).log_prob(y.flatten())


@pytest.mark.parametrize("guide", ["auto", "mean-field", "full-rank"])
def test_two_levels_of_plates(guide):
    """The bound comes close to the evidence of all the data; mean field leaves what the coupling costs."""
    source = torch.Generator().manual_seed(0)
    y = 1.0 + 0.5 * torch.randn(12, 1, generator=source) + torch.randn(12, 5, generator=source)
    fit = fitted(groups, y, steps=400, lr=2e-2, schedule="cosine", guide=guide)
    estimate = fit.log_prob(seed=0)
    exact = group_evidence(y)
    assert estimate.value.shape == (1,)
    assert estimate.value < exact + 5 * estimate.stderr
    assert exact - estimate.value < {"auto": 0.6, "mean-field": 3.0, "full-rank": 0.6}[guide]
    assert fit.posterior(n=7)["level"].shape == (7, 12, 1)


def test_batches_of_groups():
    source = torch.Generator().manual_seed(0)
    y = 1.0 + 0.5 * torch.randn(40, 1, generator=source) + torch.randn(40, 5, generator=source)
    fit = fitted(groups, y, steps=400, lr=2e-2, schedule="cosine", batch_size=10)
    precision = 1 / 4 + 40 / (0.25 + 1 / 5)
    mean = (y.mean(1).sum() / (0.25 + 1 / 5)) / precision
    draws = fit.posterior(n=4000, seed=0)["mean"]
    assert abs(draws.mean() - mean) < 0.06
    assert abs(draws.std() * precision**0.5 - 1) < 0.3


# --- chains of finite states beside continuous latents -----------------------------------------------------


def chain(n):
    with pyro.plate("rows", n):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        state = None
        for t in pyro.markov(range(4)):
            logits = torch.zeros(3) if state is None else torch.eye(3)[state]
            state = pyro.sample(f"z{t}", dist.Categorical(logits=logits))
            pyro.sample(f"x{t}", dist.Normal(state.float() + offset, 0.7))


@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg", "wake-sleep"])
def test_chains_are_summed_out_under_every_objective(objective):
    """With the offset integrated by quadrature and the states by enumeration, the evidence is known."""
    source = torch.Generator().manual_seed(0)
    data = {f"x{t}": torch.randn(6, generator=source) + t / 2 for t in range(4)}
    fit = fitted(
        chain, data, steps=60, lr=2e-2, objective=objective, evaluate="importance", evaluation_particles=500
    )
    grid = torch.linspace(-6, 6, 801)
    prior = dist.Normal(0.0, 1.0).log_prob(grid)
    paths = torch.cartesian_prod(*[torch.arange(3)] * 4)
    moves = torch.log_softmax(torch.eye(3), -1)
    path = -math.log(3) + sum(moves[paths[:, t], paths[:, t + 1]] for t in range(3))
    emissions = [
        dist.Normal(paths[:, t, None, None] + grid[:, None], 0.7).log_prob(data[f"x{t}"]) for t in range(4)
    ]
    joint = path[:, None, None] + prior[:, None] + sum(emissions)
    exact = joint.logsumexp((0, 1)) + math.log(grid[1] - grid[0])
    estimate = fit.log_prob(seed=1)
    assert ((estimate.value - exact).abs() < 6 * estimate.stderr + 1e-3).all()
    draws = fit.posterior(n=50)
    assert all(draws[f"z{t}"].shape == (50, 6) for t in range(4))


def test_a_finite_latent_that_rows_share_is_summed_over_the_whole_batch():
    """k shifts every row: the marginal of all rows together is a mixture of two products."""

    def program(n):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(3 * k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal((x + 1.5) / 2, 1.5))

    x = torch.tensor([1.0, 2.5, 0.5])
    fit = fitted(program, {"x": x}, guide=guide, evaluate="importance", evaluation_particles=20_000)
    both = [math.log(p) + dist.Normal(3.0 * k, 2**0.5).log_prob(x).sum() for k, p in ((0, 0.6), (1, 0.4))]
    exact = torch.stack(both).logsumexp(0)
    estimate = fit.log_prob(seed=0)
    assert estimate.value.shape == (1,)
    assert abs(estimate.value - exact) < 6 * estimate.stderr
    draws = fitted(program, {"x": x}, guide=guide, correction="importance").posterior(n=4000, seed=0)
    share = (both[1] - exact).exp()
    assert abs(draws["k"].mean() - share) < 0.08
    trained = fitted(program, {"x": x}, steps=3, batch_size=2)  # and batches of it run
    assert torch.isfinite(trained.history["loss"]).all()


# --- what Pyro lets programs do ----------------------------------------------------------------------------


def test_scales_and_masks_count_as_the_program_says():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0))
            with poutine.mask(mask=torch.tensor(False)):
                pyro.sample("y", dist.Normal(z, 1.0))

    def guide(x):  # the posterior under half a likelihood
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 3, (2 / 3) ** 0.5))

    x = torch.tensor([1.0, -2.0])
    estimate = fitted(program, {"x": x, "y": 5 * x}, guide=guide).log_prob()
    half = dist.Normal(0.0, 3**0.5).log_prob(x) + 0.25 * math.log(2 * math.pi) + 0.5 * math.log(2)
    torch.testing.assert_close(estimate.value, half, rtol=0, atol=1e-5)


def test_missing_values_count_for_nothing():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1))

    x = torch.tensor([[1.0, math.nan], [math.nan, -2.0], [0.5, 0.5]])
    fit = fitted(program, {"x": x}, steps=200, lr=2e-2, evaluate="importance", evaluation_particles=500)
    first = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([1.0, -2.0]))
    last = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(torch.tensor([0.5, 0.5]))
    estimate = fit.log_prob(seed=0)
    exact = torch.cat([first, last[None]])
    assert ((estimate.value - exact).abs() < 6 * estimate.stderr + 1e-3).all()


def subsampled(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("chosen", len(x), subsample_size=10) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x[index])


def test_a_subsample_of_the_program_is_the_same_for_guide_and_program():
    """The guide reads the rows that the program then observes; else `log p(x | z)` would be far off."""
    x = torch.arange(40.0)
    problem, coupling, parameters = coupled(subsampled, None, (x,))
    with parameters.installed(), torch.no_grad():
        assert agrees(coupling, problem)
        (lane,) = coupling.weigh(problem, 3)
        index = lane.guide["chosen"].value
        assert torch.equal(index, lane.program["chosen"].value)
        assert torch.equal(lane.program["x"].value, x[index])
        values = {name: node.value for name, node in lane.guide.items()}
        (again,) = coupling.redraw(problem, [values], 3)
        torch.testing.assert_close(again["z"].law.mean, lane.guide["z"].law.mean)
    torch.testing.assert_close(lane.program["z"].scale, 4.0, check_dtype=False)
    fit = fitted(subsampled, None, steps=400, lr=2e-2, schedule="cosine", args=(x / 20 - 1,))
    precision = 1 + 40 / 1.01
    draws = fit.posterior(n=2000, seed=0)["mean"]
    assert abs(draws.mean() - (x / 20 - 1).sum() / 1.01 / precision) < 0.15


def test_fixed_evidence_under_factor_is_unnormalized():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("soft", -0.5 * (z - 1) ** 2)
            pyro.sample("x", dist.Normal(z, 1.0))

    x = torch.tensor([1.0, -2.0])

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal((x + 1) / 3, 3**-0.5))

    estimate = fitted(program, {"x": x}, guide=guide).log_prob()
    assert estimate.kind == "unnormalized"
    without = dist.Normal(0.0, 2**0.5).log_prob(x)
    soft = dist.Normal(x / 2, (0.5 + 1) ** 0.5).log_prob(torch.tensor(1.0)) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(estimate.value, without + soft, rtol=0, atol=1e-5)


def test_a_site_that_is_met_twice_is_named():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(pgen.errors.ProgramError, match="'z' is met twice"):
        fitted(program, {"x": torch.zeros(3)}, guide=guide)


# --- simulations -------------------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 2)

    def forward(self, x):
        loc, scale = self.line(x.unsqueeze(-1)).unbind(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))


def pyros_way(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


@pytest.mark.parametrize("objective", ["forward-kl", "wake-sleep"])
def test_simulations_reach_a_guide_that_is_given_the_data_as_an_argument(objective):
    """On simulations it must find z = 0.4 x, variance 0.2; the real data alone would give another line."""
    x = torch.full((20,), 5.0)
    options = {"simulations": 2000} if objective == "forward-kl" else {"sleep": 1.0}
    fit = fitted(
        pyros_way, x, steps=400, lr=3e-2, schedule="cosine", guide=Reader(), objective=objective, **options
    )
    marginal = fit.marginals(torch.tensor([-2.0, 0.0, 2.0]))["z"]
    assert (marginal.mean - torch.tensor([-0.8, 0.0, 0.8])).abs().max() < 0.15
    assert (marginal.variance - 0.2).abs().max() < 0.06


def test_a_program_given_no_data_is_simulated_at_its_leaves():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0))

    options = {"objective": "forward-kl", "simulations": 2000}
    fit = fitted(program, None, steps=300, lr=2e-2, schedule="cosine", **options)
    x = torch.tensor([1.0, -1.0, 3.0, 0.0])
    assert (fit.marginals({"x": x})["z"].mean - 0.4 * x).abs().max() < 0.15
    assert fit.sample(5)["x"].shape == (5,)
    assert fit.log_prob({"x": x}).value.shape == (4,)


def test_the_program_stays_as_it_is_under_forward_kl():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, n):
            with pyro.plate("rows", n):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.gain * z, 1.0))

    fit = fitted(Program(), {"x": torch.randn(20)}, steps=20, objective="forward-kl", simulations=200)
    assert fit.parameters["gain"] == 2.0


# --- decisions ---------------------------------------------------------------------------------------------


def test_closed_forms_are_used_only_where_they_hold():
    """A divergence needs the program's parents of a site to be drawn before it in the guide."""

    def program(n):
        with pyro.plate("rows", n):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0))

    def forwards(x):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    def backwards(x):
        with pyro.plate("rows", len(x)):
            b = pyro.sample("b", dist.Normal(x, 1.0))
            pyro.sample("a", dist.Normal(b, 1.0))

    for guide, known in ((forwards, {"a", "b"}), (backwards, {"a"})):
        fit = fitted(program, {"x": torch.zeros(3)}, guide=guide)
        assert fit._answers.coupling.analytic == known


def test_particles_by_default_are_as_many_as_steady_the_gradient():
    def drawn(rows, **options):
        counts = []

        class Guide(nn.Module):
            def __init__(self):
                super().__init__()
                self.slope = nn.Parameter(torch.tensor(0.1))

            def forward(self, x):
                with pyro.plate("rows", len(x)):
                    z = pyro.sample("z", dist.Normal(self.slope * x, 1.0))
                counts.append(z.numel() // len(x))

        fitted(pyros_way, torch.randn(rows), steps=1, guide=Guide(), **options)
        return counts[-1]

    assert drawn(200) == 1
    assert drawn(10) == 6
    assert drawn(3) == 8
    assert drawn(3, particles=2) == 2
    assert drawn(200, objective="iwae") == 8


def test_draws_that_the_program_cannot_take_are_found_before_training():
    def program(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, z))

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(-5.0, 0.1))

    with pytest.raises(pgen.errors.ProgramError, match=r"at values that its guide drew.*scale"):
        fitted(program, {"x": torch.zeros(50)}, guide=guide)


def test_a_user_guide_is_given_again_when_loading(tmp_path):
    guide = Reader()
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    fit = fitted(pyros_way, x, steps=20, guide=guide)
    fit.save(tmp_path / "fit")
    again = pgen.load(tmp_path / "fit", pyros_way, backend=Variational(guide=Reader()))
    torch.testing.assert_close(fit.marginals()["z"].mean, again.marginals()["z"].mean)

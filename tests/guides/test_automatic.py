"""Laws of the global guides: shapes, densities, particles, states, and what they can represent exactly."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pgen
from pgen.errors import DataError, OptionError, ProgramError
from pgen.guides import Automatic
from pgen.guides.automatic import JOINT, KINDS
from pgen.guides.families import GAIN
from pgen.inspection import inspect_problem, structure_of
from pgen.problem import Problem
from pgen.sampling import split


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def varied(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 1.0))
    loose = pyro.sample("loose", dist.Normal(torch.zeros(2), 1.0))
    with pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", y.shape[1], dim=-1):
        u = pyro.sample("u", dist.Uniform(torch.zeros(2), 3.0).to_event(1))
        loc = u.sum(-1) + weights[..., 0] + corr[..., 1, 0] + loose.sum(-1, keepdim=True)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def subsampled(y):
    with pyro.plate("rows", 20, subsample_size=6) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


PROGRAMS = {"schools": (schools, torch.arange(8.0)), "varied": (varied, torch.arange(12.0).reshape(4, 3))}


def made(name, kind, **options):
    program, data = PROGRAMS[name]
    structure, problem = inspect_problem(Problem.of(program, data))
    return Automatic.of(problem, structure, kind, **options), problem, structure


def drawn(guide, problem, structure, particles=None):
    dim = -1 - structure.nesting
    wide = nullcontext() if particles is None else pyro.plate("_particles", particles, dim=dim)
    with poutine.trace() as q, wide:
        guide(*guide.read(problem))
    with poutine.trace() as p, wide, poutine.replay(trace=q.trace):
        problem()
    q.trace.compute_log_prob()
    p.trace.compute_log_prob()
    return q.trace, p.trace


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_guide_draws_what_the_program_draws(name, kind):
    guide, problem, structure = made(name, kind)
    q, p = drawn(guide, problem, structure)
    assert set(guide.order) - {JOINT} == set(structure.latents)
    for site in structure.latents:
        assert q.nodes[site]["value"].shape == p.nodes[site]["value"].shape
        assert q.nodes[site]["log_prob"].shape == p.nodes[site]["log_prob"].shape
        assert p.nodes[site]["fn"].support.check(q.nodes[site]["value"]).all()
    assert (JOINT in q.nodes) == (kind != "mean-field")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_particles_are_draws_of_their_own_and_scored_as_such(name, kind):
    guide, problem, structure = made(name, kind)
    with poutine.trace() as q, pyro.plate("_particles", 3, dim=-1 - structure.nesting):
        guide(*guide.read(problem))
    q.trace.compute_log_prob()
    values = {site: split(q.trace.nodes[site]["value"], structure, site) for site in structure.latents}
    if JOINT in q.trace.nodes:
        values[JOINT] = q.trace.nodes[JOINT]["value"].flatten(0, -2)
    for k in range(3):
        with poutine.trace() as alone, poutine.condition(data={site: v[k] for site, v in values.items()}):
            guide(*guide.read(problem))
        alone.trace.compute_log_prob()
        for site in guide.order:
            mine, theirs = q.trace.nodes[site]["log_prob"][k], alone.trace.nodes[site]["log_prob"]
            torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(v[0], v[1]) for v in values.values())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "mean-field"])
def test_the_density_is_the_change_of_variables_by_autograd(kind):
    """From the joint vector to as many free coordinates of the latents as there are."""
    guide, problem, structure = made("varied", kind)
    guide.double()
    q, _ = drawn(guide, problem.to(dtype=torch.double), structure)
    start = q.nodes[JOINT]["value"].detach()

    def push(vector):
        with poutine.condition(data={JOINT: vector}):
            values = guide(*guide.read(problem))
        parts = (values["weights"][:2], values["corr"][1, :1], values["loose"], values["u"])
        return torch.cat([part.flatten() for part in parts])

    jacobian = torch.autograd.functional.jacobian(push, start)
    deltas = sum(q.nodes[s]["log_prob"].sum() for s in structure.latents)
    torch.testing.assert_close(deltas, -torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(q.nodes[JOINT]["log_prob"], guide.joint().log_prob(start))


def test_full_rank_represents_a_gaussian_posterior_over_several_sites_exactly():
    def line(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1) + b, 0.5), obs=y)

    problem = Problem.of(line, {"x": torch.randn(30, 2), "y": torch.randn(30)}).to(dtype=torch.double)
    structure = structure_of(problem)
    guide = Automatic.of(problem, structure, "full-rank").double()
    design = torch.cat([problem.inputs["x"], torch.ones(30, 1)], 1)
    precision = torch.eye(3) + design.T @ design / 0.25
    mean = torch.linalg.solve(precision, design.T @ problem.inputs["y"] / 0.25)
    factor = torch.linalg.cholesky(torch.linalg.inv(precision))
    with torch.no_grad():
        joint = guide.joint
        joint.mean.copy_((mean - joint.loc) / joint.scale / GAIN)
        joint.log_scale.copy_((factor.diagonal() / joint.scale).log() / GAIN)
        unit = factor / factor.diagonal().unsqueeze(-1)
        joint.below.copy_(unit[*torch.tril_indices(3, 3, -1)] / GAIN)
    ratios = []
    for _ in range(5):
        q, p = drawn(guide, problem, structure)
        ratios.append(p.log_prob_sum() - q.log_prob_sum())
    torch.testing.assert_close(torch.stack(ratios), ratios[0].expand(5))  # the evidence, at every draw


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_median_of_the_prior_with_a_small_scale(kind):
    guide, problem, structure = made("schools", kind)
    draws, _ = drawn(guide, problem, structure, particles=500)
    mu, tau = draws.nodes["mu"]["value"], draws.nodes["tau"]["value"]
    assert mu.median().abs() < 5  # the medians are 0 and 5, found from a few draws
    assert 1 < tau.median() < 25
    if kind != "flow":
        assert mu.std() < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_loads_into_a_fresh_guide(kind):
    guide, problem, _ = made("varied", kind)
    fresh, _, _ = made("varied", kind)
    fresh.load_state_dict(guide.state_dict())
    draws = []
    for one in (guide, fresh):
        torch.manual_seed(3)
        draws.append(one(*one.read(problem)))
    assert all(torch.equal(draws[0][s], draws[1][s]) for s in draws[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind):
    guide, problem, structure = made("schools", kind)
    q, p = drawn(guide, problem, structure)
    (p.log_prob_sum() - q.log_prob_sum()).backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in guide.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_subsample_of_a_plate_picks_its_own_elements(kind):
    structure, problem = inspect_problem(Problem.of(subsampled, torch.randn(20)))
    guide = Automatic.of(problem, structure, kind)
    observed, plates = guide.read(problem)
    values = guide(observed, plates)
    assert values["z"].shape == (6,)
    if kind == "mean-field":
        with torch.no_grad():
            means, scales = torch.arange(20.0), torch.full((20,), -20.0)
            guide.outputs[0].copy_(torch.stack([means, scales], 1).flatten() / GAIN)
        head = guide.heads[0]
        expected = head.loc + head.scale * plates["rows"].index
        torch.testing.assert_close(guide(observed, plates)["z"], expected)


def test_it_knows_whether_it_serves_only_its_own_rows():
    assert made("schools", "mean-field")[0].fixed is False  # eight schools are the program's own, not rows
    assert made("varied", "mean-field")[0].fixed is True


def test_other_sizes_are_refused():
    guide, problem, _ = made("varied", "full-rank")
    with pytest.raises(DataError, match="plate 'rows' has 2 .* the guide of site 'u' was made for 4"):
        guide(*guide.read(problem.take(torch.tensor([0, 1]))))


def test_what_it_cannot_cover_is_refused_by_name():
    def discrete(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def wide(y):
        pyro.sample("w", dist.Normal(torch.zeros(2001), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    problem = Problem.of(discrete, torch.randn(4))
    structure = structure_of(problem)
    with pytest.raises(ProgramError, match=r"site 'z': Bernoulli is discrete.*marginalised=\['z'\]"):
        Automatic.of(problem, structure)
    assert set(Automatic.of(problem, structure, marginalised=["z"])({}, {"rows": (4, -1)})) == {"w"}
    with pytest.raises(OptionError, match="kind='full'"):
        Automatic.of(problem, structure, "full")
    with pytest.raises(OptionError, match="rank=0"):
        Automatic.of(problem, structure, "low-rank", rank=0)
    problem = Problem.of(wide, torch.randn(4))
    with pytest.raises(OptionError, match="guide='full-rank'.*2001 x 2001"):
        Automatic.of(problem, structure_of(problem), "full-rank")


@pytest.mark.parametrize("guide", ["amortized", "mean-field", "full-rank", "low-rank", "flow"])
def test_every_element_starts_at_its_own_place_in_the_prior(guide):
    grid = torch.arange(24.0).reshape(2, 3, 1, 4)

    def model(x):
        with pyro.plate("a", 2, dim=-3), pyro.plate("b", 3, dim=-2):
            pyro.sample("mu", dist.Normal(grid, 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor([0.0, 3.0]), 0.5).to_event(1))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, scale.sum(-1)), obs=x)

    backend = pgen.backend("variational", guide=guide)
    fit = pgen.fit(model, {"x": torch.randn(5)}, backend, run=pgen.Run(steps=0, progress=False))
    draws = fit.posterior(n=400, seed=0)
    torch.testing.assert_close(draws["mu"].mean(0), grid, atol=0.4, rtol=0)
    median = draws["scale"].log().median(0).values
    torch.testing.assert_close(median, torch.tensor([0.0, 3.0]), atol=0.2, rtol=0)

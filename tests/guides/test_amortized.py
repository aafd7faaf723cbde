"""Laws of the amortized guide: shapes, plates, particles, sets, states, and what it can represent exactly."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pgen.errors import DataError, OptionError, ProgramError
from pgen.guides import Amortized
from pgen.guides.families import GAIN
from pgen.inspection import inspect_problem, structure_of
from pgen.problem import Problem


def tree(n):
    with pyro.plate("rows", n):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 0.3))
        c = pyro.sample("c", dist.Normal(a, 0.3))
        pyro.sample("x", dist.Normal(b, 0.3))
        pyro.sample("y", dist.Normal(c, 0.3))


def groups(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("measurements", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def pixels(x):
    with pyro.plate("rows", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
        loc = (z @ torch.arange(8.0).reshape(2, 4)).squeeze(-2) + kind
        with pyro.plate("pixels", 4, dim=-1):
            noise = pyro.sample("noise", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(loc.reshape(*kind.shape[:-1], 4), 0.1 + noise), obs=x)


def regression(x, label, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        flip = pyro.sample("flip", dist.Bernoulli(0.1))
        pyro.sample("y", dist.Normal((x * w).sum(-1) + flip * label, 1.0), obs=y)


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(weights))
        pyro.sample("x", dist.Normal((z.unsqueeze(-1) * loc.unsqueeze(-3)).sum(-2), 1.0).to_event(1), obs=x)


def outside_of_plates(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z.dotted", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + w.sum(-1, keepdim=True), 1.0), obs=x)


def crossed(r):
    users = pyro.plate("users", r.shape[0], dim=-2)
    items = pyro.plate("items", r.shape[1], dim=-1)
    with users:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with items:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with users, items:
        pyro.sample("r", dist.Normal(u * v, 1.0), obs=r)


def own_subsample(x):
    with pyro.plate("rows", 20, subsample_size=6) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def numbers(*shape):
    """The same numbers whenever this file is imported."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


PROGRAMS = {
    "tree": (tree, {"x": numbers(9), "y": numbers(9).flip(0)}),
    "groups": (groups, numbers(9, 4)),
    "pixels": (pixels, numbers(9, 4)),
    "regression": (regression, {"x": numbers(9, 2), "label": torch.arange(9) % 3, "y": numbers(9)}),
    "mixture": (mixture, numbers(9, 2)),
    "outside": (outside_of_plates, numbers(9)),
    "crossed": (crossed, numbers(9, 5)),
    "subsample": (own_subsample, numbers(20)),
}


def made(name, rows=None, **options):
    program, data = PROGRAMS[name]
    structure, problem = inspect_problem(Problem.of(program, data))
    guide = Amortized.of(problem, structure, **options)
    return guide, problem if rows is None else problem.take(torch.arange(rows) % 9), structure


def drawn(guide, problem, structure=None, particles=None):
    """A trace of the guide, and one of the program on its draws, log probabilities computed."""
    seen = guide.read(problem)
    dim = -2 if structure is None else -1 - structure.nesting
    wide = nullcontext() if particles is None else pyro.plate("_particles", particles, dim=dim)
    with poutine.trace() as q, wide:
        guide(*seen)
    with poutine.trace() as p, wide, poutine.replay(trace=q.trace):
        problem()
    q.trace.compute_log_prob()
    p.trace.compute_log_prob()
    return q.trace, p.trace


def latents(trace):
    return [n for n in trace.stochastic_nodes if type(trace.nodes[n]["fn"]).__name__ != "_Subsample"]


OPTIONS = [
    {},
    {"family": "full", "order": "forward"},
    {"family": "low-rank", "globals_": "pooled"},
    {"family": "flow", "globals_": "pooled"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_guide_draws_what_the_program_draws(name, options):
    """Same sites, same shapes, same plates; and the program runs on its draws."""
    guide, problem, structure = made(name, **options)
    q, p = drawn(guide, problem)
    assert sorted(latents(q)) == sorted(structure.latents) == sorted(guide.order)
    prior = poutine.trace(problem).get_trace()
    for site in guide.order:
        assert q.nodes[site]["value"].shape == prior.nodes[site]["value"].shape
        assert q.nodes[site]["value"].dtype == prior.nodes[site]["value"].dtype
        assert q.nodes[site]["log_prob"].shape == p.nodes[site]["log_prob"].shape
        frames = [{(f.name, f.dim, f.size) for f in t.nodes[site]["cond_indep_stack"]} for t in (q, prior)]
        assert frames[0] == frames[1]
        assert p.nodes[site]["log_prob"].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("mixture", "outside")])
def test_particles_under_one_plate_score_as_they_would_alone(name, options):
    guide, problem, structure = made(name, **options)
    if name == "subsample":
        seen = guide.read(problem)
        guide.read = lambda problem: seen
    q, _ = drawn(guide, problem, structure, particles=3)
    for k in range(3):
        values = {}
        for site in guide.order:
            value, law = q.nodes[site]["value"], structure.sites[site]
            own = value[k] if value.ndim > structure.nesting + len(law.event_shape) else value
            depth = max((-structure.plates[pl].dim for pl in law.plates), default=0)
            own = own.reshape(own.shape[structure.nesting - depth :])
            values[site] = own
        with poutine.trace() as alone, poutine.condition(data=values):
            guide(*guide.read(problem))
        alone.trace.compute_log_prob()
        for site in guide.order:
            mine = q.nodes[site]["log_prob"][k]
            theirs = alone.trace.nodes[site]["log_prob"]
            torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(q.nodes[s]["value"][0], q.nodes[s]["value"][1]) for s in guide.order[:1])


@pytest.mark.parametrize("rows", [1, 2, 30])
@pytest.mark.parametrize("name", ["tree", "groups", "pixels", "regression", "mixture"])
@pytest.mark.parametrize("globals_", ["free", "pooled"])
def test_it_serves_any_number_of_rows(name, rows, globals_):
    guide, problem, structure = made(name, rows, globals_=globals_)
    q, p = drawn(guide, problem, structure, particles=2)
    for site in structure.latents:
        sizes = [f.size for f in q.nodes[site]["cond_indep_stack"] if f.name in structure.data_plates]
        assert sizes == ([rows] if structure.local(site) else [])
        assert p.nodes[site]["log_prob"].isfinite().all()


def test_local_laws_do_not_depend_on_the_other_rows():
    guide, problem, _ = made("tree")
    few = problem.take(torch.tensor([4, 7]))
    values = {s: torch.randn(9) for s in guide.order}
    logs = []
    picked = {s: v[[4, 7]] for s, v in values.items()}
    for data, held in ((problem, values), (few, picked)):
        with poutine.trace() as q, poutine.condition(data=held):
            guide(*guide.read(data))
        q.trace.compute_log_prob()
        logs.append({s: q.trace.nodes[s]["log_prob"] for s in guide.order})
    for site in guide.order:
        torch.testing.assert_close(logs[0][site][[4, 7]], logs[1][site])


# --- sets ------------------------------------------------------------------------------


def law_of(guide, y, site, **values):
    problem = Problem.of(groups, y)
    with poutine.trace() as q, poutine.condition(data=values):
        guide(*guide.read(problem))
    return q.trace.nodes[site]["fn"]


def test_exchangeable_plates_are_read_as_sets_of_any_size():
    guide, problem, _ = made("groups", globals_="pooled")
    y, held = problem.inputs["y"], {"mu": torch.tensor(0.3), "tau": torch.tensor(1.2)}
    theta = law_of(guide, y, "theta", **held)
    torch.testing.assert_close(theta.mean, law_of(guide, y[:, torch.randperm(4)], "theta", **held).mean)
    assert theta.mean.shape == (9, 1)
    assert law_of(guide, torch.randn(9, 7), "theta", **held).mean.shape == (9, 1)
    mu = law_of(guide, y, "mu")
    torch.testing.assert_close(mu.mean, law_of(guide, y[torch.randperm(9)][:, torch.randperm(4)], "mu").mean)
    torn = y.flatten()[torch.randperm(36)].reshape(9, 4)
    assert not torch.allclose(mu.mean, law_of(guide, torn, "mu").mean)
    more = torch.cat([y, y], 1)
    assert not torch.allclose(mu.stddev, law_of(guide, more, "mu").stddev)


def test_plates_whose_elements_differ_are_read_by_position():
    guide, problem, _ = made("pixels")
    assert guide.layout.positional == {"pixels"}
    x = problem.inputs["x"]
    logs = []
    for data in (x, x[:, [1, 0, 2, 3]]):
        with poutine.trace() as q:
            guide(*guide.read(Problem.of(pixels, data)))
        logs.append(q.trace.nodes["z"]["fn"].base_dist.loc)
    assert not torch.allclose(*logs)
    seen = guide.read(problem)
    with pytest.raises(DataError, match="plate 'pixels' has 5 .* the guide of site 'z' was made for 4"):
        guide({"x": torch.randn(9, 5)}, {**seen.plates, "pixels": (5, -1)})


def test_components_of_a_mixture_are_told_apart():
    guide, _, _ = made("mixture")
    assert guide.layout.positional == {"components"}
    assert guide.laws["z"].gather.outputs == 2 + 3 * 2 + 2  # data, three locations, unconstrained weights


# --- what is read ------------------------------------------------------------------------------


def test_inverse_parents_hold_arguments_and_leave_out_what_is_not_needed():
    guide, _, _ = made("regression")
    assert guide.order == ("w", "flip")
    assert set(guide.inverse.parents["flip"]) == {"y", "input:label", "input:x", "w"}
    guide, _, _ = made("tree", order="forward")
    assert guide.inverse.parents == {"c": ("x", "y"), "b": ("x", "c"), "a": ("c", "b")}


def test_whole_number_arguments_are_read_as_classes():
    guide, _, _ = made("regression")
    code = guide.features["input:label"]
    read = code(torch.tensor([0, 2, 63, 64]))
    assert read.shape == (4, 65)
    torch.testing.assert_close(read[:, :64].sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]))  # 64: none of them


def test_arguments_over_inner_plates_are_paired_with_what_is_observed_there():
    def slopes(x, y):
        with pyro.plate("groups", len(x), dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("measurements", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    problem = Problem.of(slopes, {"x": torch.randn(9, 5), "y": torch.randn(9, 5)})
    guide = Amortized.of(problem, structure_of(problem))
    assert guide.layout.plates["input:x"] == ("groups", "measurements")

    def mean(x, y):
        with poutine.trace() as q:
            guide(*guide.read(Problem.of(slopes, {"x": x, "y": y})))
        return q.trace.nodes["w"]["fn"].mean

    x, y, order = problem.inputs["x"], problem.inputs["y"], torch.randperm(5)
    torch.testing.assert_close(mean(x, y), mean(x[:, order], y[:, order]))  # pairs may be reordered
    assert not torch.allclose(mean(x, y), mean(x, y[:, order]))  # but not torn apart


def test_missing_values_are_read_as_missing():
    def model(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1))

    x = torch.randn(20, 3)
    x[::2, 1] = torch.nan
    problem = Problem.of(model, {"x": x})
    guide = Amortized.of(problem, structure_of(problem))
    read = guide.features["x"](x)
    assert read.isfinite().all()
    torch.testing.assert_close(read[:, 3:], x.isnan().float())
    torch.testing.assert_close(read[:, [0, 2]].std(0, correction=0), torch.ones(2))
    q, _ = drawn(guide, problem)
    assert q.nodes["z"]["value"].isfinite().all()


def test_latents_summed_out_elsewhere_are_not_drawn_and_leave_their_dependence():
    guide, problem, _ = made("tree", marginalised=["a"])
    assert guide.inverse.parents == {"b": ("x", "y"), "c": ("y", "b")}
    assert latents(drawn(guide, problem)[0]) == ["b", "c"]


def test_enumerated_values_broadcast_through_the_guide():
    guide, problem, _ = made("pixels")
    seen = guide.read(problem)
    values = {"kind": torch.arange(3).reshape(3, 1, 1)}
    with poutine.trace() as q, poutine.condition(data=values), poutine.block(hide=["rows", "pixels"]):
        guide(*seen)
    assert q.trace.nodes["noise"]["value"].shape == (3, 9, 4)


# --- states ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_state_loads_into_a_fresh_guide(name, options):
    """Made from a few rows of other data, before any call."""
    guide, problem, _ = made(name, **options)
    program, data = PROGRAMS[name]
    other = {k: torch.zeros_like(v) for k, v in problem.inputs.items()} or {k: torch.zeros(4) for k in data}
    structure, again = inspect_problem(Problem.of(program, other))
    fresh = Amortized.of(again, structure, **options)
    fresh.load_state_dict(guide.state_dict())
    seen = guide.read(problem)
    draws = []
    for one in (guide, fresh):
        torch.manual_seed(3)
        draws.append(one(*seen))
    for site in guide.order:
        assert torch.equal(draws[0][site], draws[1][site])


def test_every_parameter_has_a_gradient():
    guide, problem, _ = made("groups", globals_="pooled", family="flow")
    q, p = drawn(guide, problem)
    (p.log_prob_sum() - q.log_prob_sum()).backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in guide.parameters())


def test_making_and_reading_leave_no_trace():
    program, data = PROGRAMS["groups"]
    problem = Problem.of(program, data)
    structure = structure_of(problem)
    weights = []
    for _ in range(2):  # only the weights draw on the global generator
        torch.manual_seed(5)
        guide = Amortized.of(problem, structure)
        weights.append((guide.state_dict(), torch.get_rng_state()))
    assert torch.equal(weights[0][1], weights[1][1])
    assert all(torch.equal(weights[0][0][k], weights[1][0][k]) for k in weights[0][0])
    guide.read(problem)
    assert torch.equal(torch.get_rng_state(), weights[1][1])
    assert not pyro.get_param_store()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_runs_in_the_dtype_that_it_is_moved_to(dtype):
    guide, problem, _ = made("groups")
    values = guide.to(dtype)(*guide.read(problem.to(dtype=dtype)))
    assert {v.dtype for v in values.values()} == {dtype}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("name", ["tree", "groups", "regression", "mixture"])
def test_no_tensor_is_made_on_another_device(name, options):
    """On the meta device every operation with a tensor of the CPU raises."""
    guide, problem, _ = made(name, **options)
    seen = guide.read(problem.to("meta"))
    with pyro.validation_enabled(False), poutine.trace() as q:
        guide.to("meta")(*seen)
        q.trace.compute_log_prob()
    assert {q.trace.nodes[s]["log_prob"].device.type for s in guide.order} == {"meta"}


# --- what it can represent ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reverse", "forward"])
def test_a_linear_gaussian_posterior_is_represented_exactly(order):
    """Weights set by linear algebra give log q(z | x) = log p(z | x) at every z: nothing is lost."""
    nodes, noise = ["a", "b", "c", "x", "y"], 0.3
    arrows = torch.zeros(5, 5, dtype=torch.double)
    for parent, child in [("a", "b"), ("a", "c"), ("b", "x"), ("c", "y")]:
        arrows[nodes.index(child), nodes.index(parent)] = 1.0
    root = torch.linalg.inv(torch.eye(5, dtype=torch.double) - arrows) @ torch.diag(
        torch.tensor([1.0] + [noise] * 4, dtype=torch.double)
    )
    joint = root @ root.T
    guide, problem, _ = made("tree", order=order)
    guide.double()
    problem = problem.to(dtype=torch.double)
    with torch.no_grad():
        for site in guide.order:
            given = [nodes.index(p) for p in guide.inverse.parents[site]]
            own, law = nodes.index(site), guide.laws[site]
            slope = torch.linalg.solve(joint[given][:, given], joint[given, own])
            sd = (joint[own, own] - joint[own, given] @ slope).sqrt()
            codes = [guide.features[p] for p in guide.inverse.parents[site]]
            for weight in law.net.parameters():
                weight.zero_()
            units, centres = torch.cat([c.scale for c in codes]), torch.cat([c.loc for c in codes])
            law.net.skip.weight[0] = slope * units / law.head.scale
            law.net.last.bias[0] = (slope @ centres - law.head.loc) / law.head.scale
            law.net.last.bias[1] = torch.log(torch.expm1(sd / law.head.scale)) - law.head.raw_scale
    q, p = drawn(guide, problem)
    evidence = dist.MultivariateNormal(torch.zeros(2, dtype=torch.double), joint[3:, 3:])
    seen = torch.stack([problem.observations["x"], problem.observations["y"]], -1)
    ratio = sum(p.nodes[s]["log_prob"] for s in nodes) - sum(q.nodes[s]["log_prob"] for s in guide.order)
    torch.testing.assert_close(ratio, evidence.log_prob(seen), rtol=1e-6, atol=1e-6)


def train(guide, problem, steps, particles=8, lr=2e-2):
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        q, p = drawn(guide, problem, particles=particles)
        optimizer.zero_grad()
        ((q.log_prob_sum() - p.log_prob_sum()) / particles).backward()
        optimizer.step()
        schedule.step()


def test_free_globals_represent_any_joint_gaussian_exactly():
    """Two coefficients and an offset, correlated within and between sites, set from one Cholesky factor."""

    def line(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1) + b, 0.5), obs=y)

    problem = Problem.of(line, {"x": torch.randn(30, 2), "y": torch.randn(30)})
    guide = Amortized.of(problem, structure_of(problem))
    assert guide.inverse.parents == {"w": (), "b": ("w",)}
    mean, factor = torch.randn(3), torch.randn(3, 3).tril(-1) + torch.diag(torch.tensor([0.1, 0.7, 2.0]))
    with torch.no_grad():
        for name, own in {"w": slice(0, 2), "b": slice(2, 3)}.items():
            head, block = guide.laws[name].head, factor[own, own]
            sd = block.diagonal() / head.scale
            raw = torch.log(torch.expm1(sd)) - head.raw_scale
            below = (block / block.diagonal().unsqueeze(-1))[*torch.tril_indices(len(sd), len(sd), -1)]
            moved = (mean[own] - head.loc) / head.scale
            guide.laws[name].bias.copy_(torch.cat([moved, raw, below * len(sd) ** 0.5]) / GAIN)
        guide.laws["b"].net.weight.copy_(factor[2:, :2] / guide.laws["b"].head.scale / GAIN)
    q, _ = drawn(guide, problem, particles=100)
    value = torch.cat([q.nodes["w"]["value"].reshape(-1, 2), q.nodes["b"]["value"].reshape(-1, 1)], 1)
    found = (q.nodes["w"]["log_prob"] + q.nodes["b"]["log_prob"]).reshape(-1)
    exact = dist.MultivariateNormal(mean, scale_tril=factor)
    torch.testing.assert_close(found, exact.log_prob(value), rtol=1e-4, atol=1e-4)


def test_a_faithful_guide_trained_by_the_elbo_comes_close_to_the_exact_posterior():
    """The best guide of the form q(b|x) q(c|y) q(a|b,c) stays 0.415 nats away, the best mean field 0.325."""
    a = torch.randn(1000)
    x, y = (a + 0.3 * math.sqrt(2) * torch.randn(1000) for _ in range(2))
    problem = Problem.of(tree, {"x": x, "y": y})
    guide = Amortized.of(problem, structure_of(problem), hidden=(16,))
    train(guide, problem, 250, particles=2)
    evidence = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.18, 1.0], [1.0, 1.18]]))
    with torch.no_grad():
        q, p = drawn(guide, problem, particles=50)
        bound = (p.log_prob_sum() - q.log_prob_sum()) / 50
    divergence = float((evidence.log_prob(torch.stack([x, y], -1)).sum() - bound) / 1000)
    assert divergence < 0.05


# --- refusals ------------------------------------------------------------------------------


def test_supports_that_move_are_refused_with_the_fix():
    def moving(n):
        with pyro.plate("rows", n):
            k = pyro.sample("k", dist.Uniform(0.0, 10.0))
            u = pyro.sample("u", dist.Uniform(0.0, k))
            pyro.sample("y", dist.Normal(u, 1.0))

    problem = Problem.of(moving, {"y": torch.randn(5)})
    with pytest.raises(ProgramError, match="site 'u': its support .* depends on 'k'.*u_fraction"):
        Amortized.of(problem, structure_of(problem))


def test_supports_that_are_learned_are_refused():
    def bounded(x):
        high = pyro.param("high", torch.tensor(2.0))
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Uniform(0.0, high))
            pyro.sample("y", dist.Normal(u, 1.0), obs=x)

    problem = Problem.of(bounded, torch.randn(5))
    with pytest.raises(ProgramError, match=r"site 'u': .* depends on learned tensors \(high\)"):
        Amortized.of(problem, structure_of(problem))


def test_supports_that_differ_from_row_to_row_are_refused():
    def bounded(x):
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Uniform(0.0, x.abs() + 1))
            pyro.sample("y", dist.Normal(u, 1.0), obs=x)

    problem = Problem.of(bounded, torch.randn(5))
    with pytest.raises(ProgramError, match="site 'u': its support .* differs from row to row"):
        Amortized.of(problem, structure_of(problem))


def test_equal_bounds_written_per_row_are_not_a_problem():
    def bounded(x):
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Uniform(torch.zeros(len(x)), torch.full((len(x),), 2.0)))
            pyro.sample("y", dist.Normal(u, 1.0), obs=x)

    problem = Problem.of(bounded, torch.randn(5))
    guide = Amortized.of(problem, structure_of(problem))
    assert guide(*guide.read(problem))["u"].shape == (5,)


def test_what_was_not_observed_is_missed_by_name():
    guide, _, _ = made("tree")
    message = "the guide of site '.' reads 'y', which is not among what is observed now: 'x'"
    with pytest.raises(DataError, match=message):
        guide({"x": torch.randn(9)}, {"rows": (9, -1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "gaussian"}, "family='gaussian'.*expected one of 'normal'"),
        ({"globals_family": "gaussian"}, "globals_family='gaussian'"),
        ({"order": "up"}, "order='up'.*'reverse', 'forward'"),
        ({"globals_": "all"}, "globals_='all'.*'free', 'pooled'"),
        ({"marginalised": ["q"]}, r"marginalised=\['q'\].*its latents are 'a', 'b', 'c'"),
        ({"initial_scale": -1.0}, "both must be positive"),
        ({"rank": 0}, "the rank whole"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        made("tree", **options)


def test_maps_between_huge_globals_are_left_out_aloud():
    def wide(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(2500), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(2500), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal((a + b).sum(-1), 1.0), obs=x)

    problem = Problem.of(wide, torch.randn(4))
    with pytest.warns(UserWarning, match="site 'b' is guided independently of 'a'"):
        guide = Amortized.of(problem, structure_of(problem))
    assert guide.inverse.parents == {"a": (), "b": ()}

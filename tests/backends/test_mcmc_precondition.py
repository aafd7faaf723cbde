"""Neural transport: chains in the coordinates of a guide; the right density, whatever the guide."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.backends.mcmc.preconditioned import Preconditioned
from pgen.density import Density
from pgen.errors import CheckpointError, OptionError, Unanswerable
from pgen.evaluation import functions_of
from pgen.guides import Automatic
from pgen.guides.splines import couplings, moving
from pgen.guides.transport import Affine, Transport, transport_of
from pgen.inspection import inspect_problem
from pgen.metrics.chains import diagnose
from pgen.problem import Problem

KINDS = ("mean-field", "full-rank", "low-rank", "flow")
ROWS = torch.tensor([1.0, -0.5, 2.0])


def program(y):
    """Latents in plates, bounded ones, a matrix, a simplex."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])))
    with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(y), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("rows_", len(y), dim=-1):
        pyro.sample("y", dist.Normal(z.sum(-2) * share[0], 1.0), obs=y)


def density_of(program, *data):
    structure, problem = inspect_problem(Problem.of(program, *data))
    return problem, structure, Density.of(problem, structure)


def somewhere(kind, seed=0):
    """A density, and a guide of it with parameters that nobody trained."""
    torch.manual_seed(seed)
    problem, structure, density = density_of(program, ROWS)
    guide = Automatic.of(problem, structure, kind)
    for parameter in guide.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return problem, density, guide


def by_jacobian(density, transport, v):
    """log p(T(v)) + log|det T'(v)|, the determinant by automatic differentiation."""
    transport = transport.to(dtype=torch.float64)
    u, _ = transport.forward(v)
    jacobian = torch.vmap(torch.func.jacfwd(lambda one: transport.forward(one)[0]))(v)
    return functions_of(density, rows=len(v)).target(u)[0] + jacobian.slogdet().logabsdet


def disagreement(preconditioned, density, transport):
    v = torch.randn(8, density.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    functions = functions_of(preconditioned, rows=len(v))
    assert functions.way == "recorded"
    value, slope = functions.target(v)
    error = float((value - by_jacobian(density, transport, v)).abs().max())
    step = 1e-5 * torch.randn_like(v)
    ahead, behind = (functions.target(v + sign * step)[0] for sign in (1, -1))
    assert torch.allclose((ahead - behind) / 2, (slope * step).sum(-1), rtol=1e-4, atol=1e-9)
    return error


# --- the map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_in_other_coordinates_is_that_of_the_change_of_variables(kind):
    _, density, guide = somewhere(kind)
    transport = guide.transport()
    assert disagreement(Preconditioned.by(transport, density), density, transport) < 1e-10


def test_a_map_without_its_determinant_fails_that():
    _, density, guide = somewhere("full-rank")

    @dataclass(frozen=True, eq=False, repr=False)
    class Careless(Affine):
        def forward(self, v):
            u, volume = super().forward(v)
            return u, volume * 0

    transport = guide.transport()
    broken = Careless(transport.sizes, transport.loc, transport.scale)
    assert disagreement(Preconditioned.by(broken, density), density, transport) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_guide_draws_is_standard_normal_before_the_map(kind):
    problem, density, guide = somewhere(kind)
    n = 4000
    with torch.no_grad(), pyro.plate("particles", n, dim=-3):
        drawn = guide(*guide.read(problem))
    values = {s.name: drawn[s.name].expand(n, *drawn[s.name].shape[1:]) for s in density.slots}
    values = {s.name: values[s.name].reshape(n, *s.shape) for s in density.slots}
    v = Preconditioned.by(guide.transport(), density).unconstrained(values).double()
    moments = torch.cat([v, v.T.corrcoef()[~torch.eye(v.shape[1], dtype=bool)].expand(n, -1)], 1).mean(0)
    assert float(moments.abs().max()) < 5.5 / n**0.5  # of 90 numbers: 4e-6
    assert float((v.square().mean(0) - 1).abs().max()) < 6 * (2 / n) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_and_what_is_saved(kind):
    _, density, guide = somewhere(kind)
    transport = guide.transport().to(dtype=torch.float64)
    v = torch.randn(50, density.size, dtype=torch.float64)
    u, volume = transport.forward(v)
    assert torch.allclose(transport.inverse(u), v, atol=1e-9)
    again = transport_of(transport.plain())
    assert repr(again) == repr(transport)
    assert all(torch.equal(a, b) for a, b in zip(again.forward(v), (u, volume), strict=True))
    for parameter in guide.parameters():
        parameter.data += 1.0
    assert torch.equal(transport.forward(v)[0], u)  # frozen
    plain = transport.plain()
    plain["tensors"].pop("loc")
    with pytest.raises(CheckpointError, match="no transport"):
        transport_of(plain)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 6, 7, 10, 71, 253])
def test_in_a_flow_everyone_is_told_of_everyone(features):
    moves = moving(features)
    alone = moves[:, None] & ~moves[None]  # i moves, j stays
    assert bool((alone.any(-1) | torch.eye(features, dtype=bool)).all())
    assert features == 1 or not moves.all(0).any()  # something is kept in every layer


@pytest.mark.parametrize("features", [1, 2, 10])
def test_a_flow_is_the_identity_at_first_and_can_be_inverted(features):
    torch.manual_seed(0)
    flow = couplings(features).double()
    z = torch.randn(5, features, dtype=torch.float64)
    x, volume = flow().call_and_ladj(z)
    assert torch.allclose(x, z)
    assert torch.allclose(volume, torch.zeros(5, dtype=torch.float64), atol=1e-12)
    for parameter in flow.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        x, volume = flow().call_and_ladj(z)
        assert not torch.allclose(x, z, atol=1e-3)
        assert torch.allclose(flow().inv(x), z, atol=1e-8)
        jacobian = torch.vmap(torch.func.jacfwd(lambda one: flow().call_and_ladj(one)[0]))(z)
    assert torch.allclose(jacobian.slogdet().logabsdet, volume, atol=1e-9)


# --- chains ---------------------------------------------------------------------------------------------------

Y = torch.tensor([1.2, 0.4, 2.2, 1.7])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


SIZES = {"mu": 1, "tau": 1, "theta": 4}


def plain(**sizes):
    d = sum(sizes.values())
    return Affine(sizes, torch.zeros(d), torch.ones(d))


def guide_of(program, *data, guide="full-rank", steps=300):
    backend = pgen.backend("variational", guide=guide)
    return pgen.fit(program, *data, backend, run=pgen.Run(steps=steps, lr=1e-2), seed=0)


@pytest.fixture(scope="module")
def fitted_guide():
    return guide_of(schools, Y)


def chains_of(data=Y, seed=0, run=None, **options):
    options = {"kernel": "chees", "chains": 8, "warmup": 20, "draws": 20} | options
    return pgen.fit(schools, data, pgen.backend("mcmc", **options), seed=seed, run=run or pgen.Run())


def test_under_the_identity_chains_are_the_same():
    begin = {"mu": torch.tensor(0.3), "tau": torch.tensor(1.0), "theta": torch.zeros(4)}
    one, other = (chains_of(init=begin, precondition=p).draws() for p in (None, plain(**SIZES)))
    for site in one:
        assert torch.allclose(one[site], other[site], atol=1e-5), site
    assert torch.allclose(one.stats["lp"], other.stats["lp"], atol=1e-6)


def near(draws, mean, other=0.0, sds=5.0):
    """Means of draws `[chains, n]` within so many standard errors, of both sides."""
    found = diagnose(draws.double(), (0.5,))
    assert abs(float(found.mean) - mean) < sds * math.hypot(float(found.mcse_mean), other)


@pytest.mark.parametrize("kernel", ["chees", "nuts"])
def test_posteriors_are_right_by_every_kind_of_kernel(kernel):
    def conjugate():
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=Y)

    # On purpose a poor guide, displaced and too narrow.
    poor = Affine({"mu": 1}, torch.tensor([0.5]), torch.tensor([0.3]))
    options = {"chains": 32, "warmup": 100, "draws": 200, "precondition": poor}
    fitted = pgen.fit(conjugate, None, pgen.backend("mcmc", kernel=kernel, **options))
    draws, mean = fitted.draws().by_chain()["mu"], float(Y.sum() / 4.25)
    near(draws, mean)
    near((draws - mean) ** 2, 1 / 4.25)


def test_chains_begin_at_draws_of_the_guide_and_need_little_warm_up(fitted_guide):
    fitted = chains_of(precondition=fitted_guide, chains=32, warmup=30, draws=100)
    usual = chains_of(chains=32, warmup=100, draws=100).draws().by_chain()
    for site in ("mu", "tau"):
        reference = diagnose(usual[site].double(), (0.5,))
        near(fitted.draws().by_chain()[site], float(reference.mean), float(reference.mcse_mean))
    assert fitted.predictive(n=10)["y"].shape == (10, 4)
    assert {"tau", "mu"} <= set(map(str, fitted.to_arviz(160)["posterior"].data_vars))


def test_the_height_that_is_reported_is_that_of_the_program(fitted_guide):
    fitted = chains_of(precondition=fitted_guide)
    draws = fitted.draws()
    _, _, density = density_of(schools, Y)
    u = density.unconstrained({s: draws[s] for s in SIZES}).double()
    target = functions_of(density, rows=len(u)).target(u)[0]
    assert torch.allclose(draws.stats["lp"].double(), target, atol=1e-2)


@pytest.mark.slow
def test_the_evidence_does_not_depend_on_coordinates(fitted_guide):
    sizes = {"chains": 16, "warmup": 60, "draws": 100}
    one, other = (chains_of(precondition=p, **sizes).log_prob(seed=0) for p in (None, fitted_guide))
    assert abs(float(one.value - other.value)) < 5 * math.hypot(float(one.stderr), float(other.stderr))


def test_a_saved_fit_knows_its_map_and_goes_on(fitted_guide, tmp_path):
    fitted_guide.save(tmp_path / "guide")
    loaded = pgen.load(tmp_path / "guide", schools)
    assert repr(loaded.transport()) == repr(fitted_guide.transport())
    chains_of(precondition=loaded).save(tmp_path / "chains")
    resumed = pgen.load(tmp_path / "chains", schools).resume(20).draws()
    whole = chains_of(precondition=fitted_guide, draws=40).draws()
    assert all(torch.equal(resumed[site], whole[site]) for site in whole)


def test_a_run_on_disk_is_not_continued_under_another_map(fitted_guide, tmp_path):
    run = pgen.Run(directory=tmp_path, checkpoint_every=20)
    chains_of(precondition=fitted_guide, run=run)
    again = chains_of(precondition=fitted_guide, run=run, draws=40).draws()
    assert torch.equal(again["mu"], chains_of(precondition=fitted_guide, draws=40).draws()["mu"])
    with pytest.raises(pgen.errors.PgenError):
        chains_of(precondition=plain(**SIZES), run=run)


def test_other_data_are_sampled_without_the_map(fitted_guide):
    fitted = chains_of(precondition=fitted_guide)
    with_more = fitted.posterior(torch.cat([Y, Y]), n=32)
    assert with_more["theta"].shape == (32, 8)


def test_finite_latents_are_summed_out_or_drawn_in_turn():
    def mixture(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            apart = pyro.sample("apart", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(mu + apart, 1.0), obs=y)

    guide = guide_of(mixture, Y, guide="mean-field", steps=100)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    rows = [
        torch.logaddexp(
            math.log(0.7) + dist.Normal(grid, 1.0).log_prob(y),
            math.log(0.3) + dist.Normal(grid + 1, 1.0).log_prob(y),
        )
        for y in Y.double()
    ]
    weight = (torch.stack(rows).sum(0) + dist.Normal(0.0, 3.0).log_prob(grid)).softmax(0)
    for enumerate_ in ("auto", "none"):
        options = {"chains": 32, "warmup": 100, "draws": 200, "enumerate": enumerate_, "precondition": guide}
        draws = pgen.fit(mixture, Y, pgen.backend("mcmc", **options), seed=0).draws()
        near(draws.by_chain()["mu"], float((weight * grid).sum()))
        assert draws["apart"].shape == (6400, 4)


# --- refusals -------------------------------------------------------------------------------------------------


def test_what_is_no_map_is_refused_by_name(fitted_guide):
    amortized = guide_of(schools, Y, guide="amortized", steps=1)
    with pytest.raises(Unanswerable, match="guide='flow'"):
        pgen.backend("mcmc", precondition=amortized)

    def own(y):
        pyro.sample("mu", dist.Delta(torch.tensor(0.0)))
        pyro.sample("tau", dist.Delta(torch.tensor(1.0)))
        with pyro.plate("schools", len(y)):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    with pytest.raises(Unanswerable, match="your own"):
        pgen.backend("mcmc", precondition=guide_of(schools, Y, guide=own, steps=1))
    with pytest.raises(Unanswerable, match="guide='flow'"):
        pgen.backend("mcmc", precondition=chains_of(draws=5))
    with pytest.raises(OptionError, match="expected a fit"):
        pgen.backend("mcmc", precondition=3)
    with pytest.raises(OptionError, match=r"theta \(4\)[\s\S]*theta \(5\)"):
        chains_of(torch.zeros(5), precondition=fitted_guide)


# --- bad geometry ---------------------------------------------------------------------------------------------


def funnel():
    """Neal's, of ten dimensions: v is N(0, 3²) whatever else there is."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("xs", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


@dataclass(frozen=True, eq=False, repr=False)
class Unrolled(Transport):
    """The funnel's own map, as a user would write one."""

    loc: torch.Tensor
    sizes: Mapping[str, int]

    def forward(self, v):
        first = 3 * v[..., :1]
        return torch.cat([first, (first / 2).exp() * v[..., 1:]], -1), math.log(3) + 4.5 * first[..., 0]

    def inverse(self, u):
        return torch.cat([u[..., :1] / 3, u[..., 1:] * (-u[..., :1] / 2).exp()], -1)


PROBS = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64)


def worst(draws, truth):
    """The largest error of the probability below a known quantile, in standard errors of the chains' `[chains, n]`."""
    below = draws.double().unsqueeze(-1) < truth
    means = below.double().mean(1)
    return float(((means.mean(0) - PROBS) / (means.std(0) / len(means) ** 0.5)).abs().max())


TRUTH = 3 * torch.distributions.Normal(0.0, 1.0).icdf(PROBS)


def test_a_funnel_in_its_own_coordinates_is_sampled_right_and_is_not_otherwise():
    own = Unrolled({"v": 1, "x": 9}, torch.zeros(10))
    options = {"kernel": "chees", "chains": 64, "warmup": 100, "draws": 200}
    right = pgen.fit(funnel, None, pgen.backend("mcmc", precondition=own, **options), seed=0)
    assert (
        worst(right.draws().by_chain()["v"], TRUTH) < 6.5
    )  # of t with 63 degrees of freedom, seven times: 1e-7
    wrong = pgen.fit(funnel, None, pgen.backend("mcmc", target_accept=0.8, **options), seed=0)
    assert worst(wrong.draws().by_chain()["v"], TRUTH) > 10


def through_a_flow(program, steps, warmup, draws):
    """Draws by chain, in the coordinates of a flow that learned for so many steps."""
    backend = pgen.backend("variational", guide="flow", particles=256)
    guide = pgen.fit(program, None, backend, run=pgen.Run(steps=steps, lr=1e-2), seed=0)
    options = {"kernel": "chees", "chains": 64, "warmup": warmup, "draws": draws, "target_accept": 0.8}
    fitted = pgen.fit(program, None, pgen.backend("mcmc", precondition=guide, **options), seed=0)
    return fitted.draws().by_chain()


@pytest.mark.slow
def test_a_funnel_through_a_learned_flow():
    draws = through_a_flow(funnel, steps=600, warmup=200, draws=300)["v"]
    assert worst(draws, TRUTH) < 6.5
    found = diagnose(draws.double(), (0.5,))
    assert float(found.ess_bulk) > 2000  # plain chains: 180, for 50 times as many gradients
    assert float(found.r_hat) < 1.03


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(x**2 / 2, 0.5))
    pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


@pytest.mark.slow
def test_a_banana_through_a_learned_flow():
    draws = through_a_flow(banana, steps=400, warmup=100, draws=200)
    assert worst(draws["x"], TRUTH * 2 / 3) < 6.5
    assert worst(draws["y"], TRUTH) > 10  # the check can fail

"""Amortized guides against exact posteriors: python -m tests.benchmarks.guides (a minute on two cores).

Two linear-Gaussian programs, whose posteriors are known by linear algebra. Each guide is trained on the same
rows by the plain ELBO; the number is KL(q || exact posterior) in nats, averaged over rows that it never saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pgen.guides import Amortized
from pgen.inspection import structure_of
from pgen.nn import MLP
from pgen.problem import Problem

NOISE = 0.3
TAU = 0.5
SIGMA = 1.0


def tree(n: int) -> None:
    """a -> b -> x and a -> c -> y, every arrow with noise 0.3."""
    with pyro.plate("rows", n):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, NOISE))
        c = pyro.sample("c", dist.Normal(a, NOISE))
        pyro.sample("x", dist.Normal(b, NOISE))
        pyro.sample("y", dist.Normal(c, NOISE))


def groups(y: Tensor) -> None:
    """One mean, a mean for each group, several measurements in each."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, TAU))
        with pyro.plate("measurements", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


class ByHand(nn.Module):
    """A guide for `tree` with a given factorisation: for each latent, what it is drawn given."""

    def __init__(self, parents: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.parents = parents
        self.nets = nn.ModuleDict({name: MLP(len(given), 2, skip=True) for name, given in parents.items()})

    def forward(self, observed: Mapping[str, Tensor], plates: Mapping[str, tuple]) -> None:
        """Draw the latents."""
        values = dict(observed)
        with pyro.plate("rows", plates["rows"][0]):
            for name, given in self.parents.items():
                loc, raw = self.nets[name](
                    torch.stack(torch.broadcast_tensors(*(values[g] for g in given)), -1)
                ).unbind(-1)
                values[name] = pyro.sample(name, dist.Normal(loc, nn.functional.softplus(raw)))


FACTORISATIONS = {
    "unfaithful: q(b|x) q(c|y) q(a|b,c)": {"b": ("x",), "c": ("y",), "a": ("b", "c")},
    "mean field: q(a|x,y) q(b|x,y) q(c|x,y)": {"a": ("x", "y"), "b": ("x", "y"), "c": ("x", "y")},
}


def log_ratio(
    guide: nn.Module, read: Callable, batch: Problem, nesting: int, particles: int
) -> tuple[Tensor, dict]:
    """log p(z, x) - log q(z | x), [particles], a batch standing for all rows; and the draws."""
    plate = pyro.plate("_particles", particles, dim=-1 - nesting)
    with poutine.trace() as drawn, plate:
        guide(*read(batch))
    with poutine.trace() as ran, plate, poutine.replay(trace=drawn.trace):
        batch()
    total = torch.zeros(particles)
    for trace, sign in ((ran.trace, 1.0), (drawn.trace, -1.0)):
        trace.compute_log_prob()
        for node in trace.nodes.values():
            if node["type"] == "sample" and "log_prob" in node and node["log_prob"].ndim:
                inside = any(frame.name in ("rows", "groups") for frame in node["cond_indep_stack"])
                total = total + sign * node["log_prob"].flatten(1).sum(1) * (batch.scale if inside else 1.0)
    values = {
        k: v["value"] for k, v in drawn.trace.nodes.items() if v["type"] == "sample" and not k.startswith("_")
    }
    return total, values


def train(
    guide: nn.Module,
    read: Callable,
    problems: Sequence[Problem],
    nesting: int,
    steps: int = 2500,
    batch: int = 128,
) -> float:
    """Maximise the ELBO per row, over several problems in turn; return the seconds that it took."""
    start = time.perf_counter()
    optimizer = torch.optim.Adam(guide.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        problem = problems[step % len(problems)]
        rows = problem.take(torch.randint(problem.rows or 1, (batch,)))
        loss = -log_ratio(guide, read, rows, nesting, 4)[0].mean() / (problem.rows or 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def tree_rows(n: int) -> Problem:
    """Rows of the tree program."""
    a = torch.randn(n)
    x, y = (a + NOISE * torch.randn(n) + NOISE * torch.randn(n) for _ in range(2))
    return Problem.of(tree, {"x": x, "y": y})


def tree_evidence(x: Tensor, y: Tensor) -> Tensor:
    """Exact log p(x, y), row by row."""
    variance = 1 + 2 * NOISE**2
    law = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[variance, 1.0], [1.0, variance]]))
    return law.log_prob(torch.stack([x, y], -1))


def compare_tree() -> None:
    """KL of four guides for the tree: two made from the program, two by hand."""
    torch.manual_seed(0)
    problem, held_out = tree_rows(20_000), tree_rows(2_000)
    structure = structure_of(problem)
    read = Amortized.of(problem, structure).read
    guides = {
        f"faithful, {order}": Amortized.of(problem, structure, order=order)
        for order in ("reverse", "forward")
    }
    guides |= {name: ByHand(parents) for name, parents in FACTORISATIONS.items()}
    evidence = tree_evidence(**held_out.observations)
    print(f"tree, noise {NOISE}: exact negative log evidence {-evidence.mean():.4f} nats per row")
    for name, guide in guides.items():
        seconds = train(guide, read, [problem], structure.nesting)
        with torch.no_grad():
            bound = log_ratio(guide, read, held_out, structure.nesting, 400)[0].mean() / held_out.rows
        print(f"  {name:40} KL {evidence.mean() - bound:7.4f}   -ELBO {-bound:.4f}   {seconds:.0f} s")


def groups_rows(n: int, m: int) -> Problem:
    """Groups of one draw of the hierarchical program."""
    theta = 1.5 + TAU * torch.randn(n, 1)
    return Problem.of(groups, theta + SIGMA * torch.randn(n, m))


def groups_posterior(y: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], float]:
    """Exact posterior: mean and sd of mu, mean of theta given mu, sd of theta given mu."""
    n, m = y.shape
    mean = y.mean(1)
    precision = n / (TAU**2 + SIGMA**2 / m) + 1 / 9
    weight = TAU**2 / (TAU**2 + SIGMA**2 / m)
    given = (1 / TAU**2 + m / SIGMA**2) ** -0.5
    centre = mean.sum() / (TAU**2 + SIGMA**2 / m) / precision
    return centre, torch.tensor(precision**-0.5), lambda mu: mu + weight * (mean - mu), given


def compare_groups() -> None:
    """KL of the amortized guide for 1,000 groups, seen and not, and of other sizes; against mean field."""
    torch.manual_seed(0)
    problem = groups_rows(1000, 5)
    structure = structure_of(problem)
    guide = Amortized.of(problem, structure)
    seconds = train(guide, guide.read, [problem], structure.nesting, batch=100)
    print(f"hierarchical, 1,000 groups of 5 ({seconds:.0f} s); parents {dict(guide.inverse.parents)}")

    various = Amortized.of(problem, structure)
    wide = groups_rows(1000, 8).inputs["y"]
    train(
        various,
        various.read,
        [Problem.of(groups, wide[:, :m]) for m in range(2, 9)],
        structure.nesting,
        batch=100,
    )

    def divergence(data: Problem, guide: Amortized) -> tuple[float, float]:
        y = next(iter(data.inputs.values()))
        centre, spread, mean, given = groups_posterior(y)
        with torch.no_grad(), poutine.trace() as drawn, pyro.plate("_particles", 200, dim=-3):
            values = guide(*guide.read(data))
        drawn.trace.compute_log_prob()
        local = drawn.trace.nodes["theta"]["log_prob"] - dist.Normal(
            mean(values["mu"].squeeze(-1)).unsqueeze(-1), given
        ).log_prob(values["theta"])
        shared = drawn.trace.nodes["mu"]["log_prob"] - dist.Normal(centre, spread).log_prob(values["mu"])
        return float(local.mean()), float(shared.mean())

    local, shared = divergence(problem, guide)
    print(f"  faithful, seen groups                    KL per group {local:.5f}   KL of mu {shared:.4f}")
    new = {m: groups_rows(1000, m) for m in (2, 5, 8, 12)}
    print(f"  faithful, 1,000 groups never seen        KL per group {divergence(new[5], guide)[0]:.5f}")
    for name, one in {"of 5": guide, "of 2 to 8": various}.items():
        found = ", ".join(f"{m}: {divergence(data, one)[0]:.4f}" for m, data in new.items())
        print(f"  trained on groups {name:9} KL per group asked about sizes {found}")
    y = problem.inputs["y"]
    _, spread, _, given = groups_posterior(y)
    coupling = 1 - TAU**2 / (TAU**2 + SIGMA**2 / y.shape[1])
    marginal = given**2 + coupling**2 * spread**2
    # mean field: precisions of the joint; its KL is half the log determinant ratio
    precision_mu = 1 / spread**2 + len(y) * coupling**2 / given**2
    lost = 0.5 * torch.log(precision_mu * spread**2)
    print(
        f"  best mean field (exact)                  KL in all {lost:.4f}, sd of mu {precision_mu**-0.5:.4f} "
        f"for {spread:.4f}, of theta {given:.4f} for {marginal**0.5:.4f}"
    )


if __name__ == "__main__":
    compare_tree()
    compare_groups()

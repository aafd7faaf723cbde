"""What the variational backend costs and how well it does: python -m tests.benchmarks.variational (a minute).

Four tables: variances of gradient estimators, exact by enumeration; signal-to-noise of the guide's gradient
under the importance-weighted bound; the gap of each objective to the evidence of PPCA, which is known;
milliseconds per step of a VAE on 8x8 images beside the same arithmetic by hand and beside Pyro's own SVI.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import product

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pgen
from pgen.algorithms import bounds, estimators
from pgen.algorithms.estimators import Term
from pgen.backends.variational import Variational

# --- gradient estimators -----------------------------------------------------------------------------------

PARENTS = {"a": (), "b": ("a",), "x": ("b",), "y": ("a",)}


def log_mass(logit: Tensor, value: Tensor) -> Tensor:
    """Log probability of a Bernoulli."""
    return -nn.functional.binary_cross_entropy_with_logits(logit.expand_as(value), value, reduction="none")


def terms(phi: Tensor, a: Tensor, b: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`log p` and `log q` of a -> b -> x, a -> y, all Bernoulli."""
    one = torch.ones_like(a)
    program = {
        "a": log_mass(-0.6 * one, a),
        "b": log_mass(0.8 - 1.5 * a, b),
        "x": log_mass(-1.0 + 3.0 * b, one),
        "y": log_mass(0.4 + 2.0 * a, 0 * one),
    }
    return program, {"a": log_mass(phi[0], a), "b": log_mass(phi[1] + phi[2] * a, b)}


def score(baseline: Callable[[Tensor], Tensor] | None = None, prune: bool = False) -> Callable[..., Tensor]:
    """The score-function estimator of the ELBO."""
    depends = {("p", n): (n, *given) for n, given in PARENTS.items()} | {
        ("q", "a"): ("a",),
        ("q", "b"): ("b", "a"),
    }
    graph = estimators.nx.DiGraph([("a", "b")])

    def loss(phi: Tensor, a: Tensor, b: Tensor) -> Tensor:
        p, q = terms(phi, a, b)
        every = {("p", n): Term(-v, ("k",)) for n, v in p.items()} | {
            ("q", n): Term(v, ("k",)) for n, v in q.items()
        }
        total = torch.zeros(())
        for site in q:
            kept = estimators.downstream(site, graph, depends) if prune else set(every)
            cost = estimators.local_cost([every[n] for n in every if n in kept], ("k",))
            shift = 0.0 if baseline is None else baseline(cost)
            total = total + estimators.score_function(q[site], cost, shift) / len(a)
        return total

    return loss


def several(control: bool) -> Callable[..., Tensor]:
    """The importance-weighted bound, with or without VIMCO's control variates."""

    def loss(phi: Tensor, a: Tensor, b: Tensor) -> Tensor:
        p, q = (sum(side.values()) for side in terms(phi, a, b))
        if control:
            return estimators.vimco(p - q, q).loss
        bound = bounds.iwae(p - q)
        return bound.loss + estimators.score_function(q, -bound.value)

    return loss


def exact_moments(estimator: Callable[..., Tensor], particles: int) -> tuple[Tensor, float]:
    """Mean and total variance of an estimator's gradient, over every outcome of every particle."""
    phi = torch.tensor([0.5, -0.3, 0.7], dtype=torch.float64, requires_grad=True)
    table = torch.tensor(list(product((0.0, 1.0), repeat=2 * particles)), dtype=torch.float64)
    chances, gradients = [], []
    for row in table:
        a, b = row[:particles], row[particles:]
        chances.append(sum(v.sum() for v in terms(phi, a, b)[1].values()).exp().detach())
        gradients.append(torch.autograd.grad(estimator(phi, a, b), phi)[0])
    chance, gradient = torch.stack(chances)[:, None], torch.stack(gradients)
    mean = (chance * gradient).sum(0)
    return mean, float((chance * (gradient - mean) ** 2).sum())


def variances() -> Table:
    """Variance of each estimator, and how far its mean is from that of the plain one."""
    table = Table("estimator", "particles", "variance", "error of the mean", title="score-function gradients")
    cases = {
        "ELBO, plain": (score(), 1),
        "ELBO, constant baseline": (score(lambda cost: torch.tensor(1.8)), 1),
        "ELBO, by structure": (score(prune=True), 1),
        "ELBO, two particles": (score(), 2),
        "ELBO, leave-one-out": (score(estimators.leave_one_out), 2),
        "ELBO, leave-one-out, by structure": (score(estimators.leave_one_out, prune=True), 2),
        "IWAE, plain": (several(False), 2),
        "IWAE, VIMCO": (several(True), 2),
    }
    truth: dict[str, Tensor] = {}
    for name, (estimator, particles) in cases.items():
        mean, variance = exact_moments(estimator, particles)
        first = truth.setdefault(name[:4], mean)
        table.add_row(name, str(particles), f"{variance:.4f}", f"{float((mean - first).abs().max()):.1e}")
    return table


def signal() -> Table:
    """Signal-to-noise of the guide's gradient in a linear Gaussian program, by the number of particles."""
    table = Table("particles", "IWAE", "DReG", title="signal-to-noise of the guide's gradient")
    shift = torch.tensor(0.3, requires_grad=True)
    for particles in (1, 8, 64, 512):
        found = []
        for doubly in (False, True):
            torch.manual_seed(0)
            gradients = []
            for _ in range(400):
                z = shift + 0.9 * torch.randn(particles, 1)

                def log_weights(draws: list[Tensor], centre: Tensor) -> Tensor:
                    (drawn,) = draws
                    likelihood = dist.Normal(drawn, 0.7).log_prob(torch.tensor(1.0))
                    joint = dist.Normal(0.0, 1.0).log_prob(drawn) + likelihood
                    return joint - dist.Normal(centre, 0.9).log_prob(drawn)

                if doubly:
                    bound = bounds.dreg(lambda draws: log_weights(list(draws), shift.detach()), [z])
                else:
                    bound = bounds.iwae(log_weights([z], shift))
                gradients.append(torch.autograd.grad(bound.loss, shift)[0])
            sample = torch.stack(gradients)
            found.append(float(sample.mean().abs() / sample.std()))
        table.add_row(str(particles), *(f"{value:.3f}" for value in found))
    return table


# --- PPCA --------------------------------------------------------------------------------------------------


class PPCA(nn.Module):
    """x = W z + mean + noise."""

    def __init__(self, features: int = 8, latents: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, latents, generator=torch.Generator().manual_seed(0)))
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, n: int) -> None:
        """The program."""
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            mean = z @ self.weight.T + self.mean
            pyro.sample("x", dist.Normal(mean, self.log_noise.exp()).to_event(1))


def gaps() -> Table:
    """The learned evidence below its maximum, and the bound below the learned evidence, in nats per row."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(600, 3, generator=source) @ torch.randn(3, 8, generator=source)
    x = x + 0.5 * torch.randn(600, 8, generator=source)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    noise = eigenvalues[3:].mean()
    volume = eigenvalues[:3].log().sum() + 5 * noise.log()
    best = -0.5 * (8 * math.log(2 * math.pi) + volume + 8)
    run = pgen.Run(steps=800, lr=2e-2, schedule="cosine", progress=False)
    table = Table(
        "objective", "maximum - evidence", "evidence - bound", "seconds", title="PPCA, nats per row"
    )
    backends = {o: Variational(objective=o) for o in ("elbo", "iwae", "dreg", "renyi", "wake-sleep")}
    backends["elbo, full covariance"] = Variational(family="full")
    for objective, backend in backends.items():
        fit = pgen.fit(PPCA(), {"x": x}, backend, run=run, seed=0)
        t = fit.parameters
        covariance = t["weight"] @ t["weight"].T + (2 * t["log_noise"]).exp() * torch.eye(8)
        evidence = dist.MultivariateNormal(t["mean"], covariance).log_prob(x).mean()
        bound = fit.log_prob(seed=0).mean().value
        row = (
            f"{float(best - evidence):.4f}",
            f"{float(evidence - bound):.4f}",
            f"{fit.history.seconds:.1f}",
        )
        table.add_row(objective, *row)
    return table


# --- milliseconds per step ---------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Latents to logits of 17 levels of 64 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 64 * 17), nn.Unflatten(-1, (64, 17))
        )

    def forward(self, n: int) -> None:
        """The program."""
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(16), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=self.net(z)).to_event(1))


class Encoder(nn.Module):
    """Pixels to the law of the latents."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 32))

    def forward(self, x: Tensor) -> None:
        """The guide."""
        mean, scale = self.net(x.float() / 8 - 1).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(mean, scale.exp()).to_event(1))


def by_hand(x: Tensor, width: int, steps: int) -> float:
    """The same arithmetic in bare torch."""
    decoder, encoder = Decoder(width).net, Encoder(width).net
    parameters = [*decoder.parameters(), *encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    start = time.perf_counter()
    for _ in range(steps):
        batch = x[torch.randint(0, len(x), (128,))]
        mean, scale = encoder(batch.float() / 8 - 1).chunk(2, -1)
        z = mean + scale.exp() * torch.randn_like(mean)
        kl = (0.5 * (mean.square() + (2 * scale).exp()) - scale - 0.5).sum(-1)
        fit = -nn.functional.cross_entropy(decoder(z).transpose(1, 2), batch, reduction="none").sum(-1)
        for parameter, gradient in zip(parameters, torch.autograd.grad((kl - fit).mean(), parameters)):
            parameter.grad = gradient
        optimizer.step()
    return (time.perf_counter() - start) / steps


def by_pyro(x: Tensor, width: int, steps: int) -> float:
    """Pyro's SVI, validation off."""
    decoder, encoder = Decoder(width), Encoder(width)

    def model(batch: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.condition(data={"x": batch}):
            decoder(len(batch))

    def guide(batch: Tensor) -> None:
        pyro.module("encoder", encoder)
        encoder(batch)

    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        start = time.perf_counter()
        for _ in range(steps):
            svi.step(x[torch.randint(0, len(x), (128,))])
        return (time.perf_counter() - start) / steps


def speed(steps: int = 200) -> Table:
    """Milliseconds per step at two widths."""
    x = torch.randint(0, 17, (1000, 64), generator=torch.Generator().manual_seed(0))
    table = Table(
        "width",
        "by hand",
        "pgen, own guide",
        "pgen, automatic guide",
        "pgen, IWAE 8",
        "Pyro SVI",
        title="ms / step",
    )
    run = pgen.Run(steps=steps, batch_size=128, progress=False)
    for width in (64, 512):
        ours = [
            pgen.fit(Decoder(width), {"x": x}, backend, run=run, seed=0).history.seconds / steps
            for backend in (
                Variational(guide=Encoder(width)),
                Variational(),
                Variational(guide=Encoder(width), objective="iwae"),
            )
        ]
        times = [by_hand(x, width, steps), *ours, by_pyro(x, width, steps)]
        table.add_row(str(width), *(f"{1000 * t:.2f}" for t in times))
    return table


def main() -> None:
    """Print all tables."""
    console = Console(width=110)
    for table in (variances, signal, gaps, speed):
        console.print(table())


if __name__ == "__main__":
    main()

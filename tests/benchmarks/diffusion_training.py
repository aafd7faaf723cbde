"""How well small denoisers are learned: weightings, times, energies, couplings, consistency, on data with known scores.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m tests.benchmarks.diffusion_training [PART ...]

Parts (about a minute each on one core; the last two, four):

    scores         two mixtures in the plane: relative error of the learned score at five noise levels
    weightings     a mixture in the plane: relative error of the learned score at five noise levels, by weighting
    times          the same for independent, stratified and importance-sampled times; and the spread of gradients
    networks       perceptron, and perceptron as an energy; milliseconds per step
    coupling       flow matching with independent and with coupled noise: error by number of Euler steps
    jumps          one and two steps of distilled and of trained consistency models beside their teacher, in the plane
    bound          spread of the bound's estimates, per row and over a batch, by particles
    images         8 x 8 digits: held-out loss of a perceptron and of a U-Net as they learn
    guesses        the same in the plane and on digits with and without self-conditioning
    digits         8 x 8 digits: likelihoods beside autoregressive models', 18 steps of Heun and 1000 ancestral ones
    consistency    8 x 8 digits: students of one, two and four steps beside their teacher

The score's error is sqrt(E|s - s*|^2 / E|s*|^2) at noisy data. Averages of the weights (half-life 200 steps) are measured.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pgen.algorithms.diffusion import losses, times, weightings
from pgen.algorithms.diffusion.bound import Bound
from pgen.algorithms.diffusion.consistency import (
    Curriculum,
    consistency_distillation,
    consistency_training,
    heun,
)
from pgen.algorithms.diffusion.coupling import coupled
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.schedules import EDM
from pgen.nn.denoisers import DenoiserMLP, EnergyDenoiser, Preconditioned
from pgen.nn.self_conditioned import SelfConditioned
from pgen.nn.unet import UNet
from tests.benchmarks import diffusion_digits

LEVELS = (0.05, 0.1, 0.3, 1.0, 3.0)
STEPS, BATCH = 1500, 512
SCHEDULE = EDM(sigma_min=0.02, sigma_max=20.0, log_mean=-1.2, log_std=1.5)
OUT = Console(width=130)

Batch = Callable[[int], Tensor]
"""Loss of a step: a scalar."""


def toy() -> Mixture:
    """Twelve anisotropic components along two arms; standard deviation about 1."""
    angle = torch.linspace(0, 2.2 * math.pi, 6)
    arm = torch.stack([angle.cos(), angle.sin()], 1) * (0.3 + 0.18 * angle)[:, None]
    means = 0.9 * torch.cat([arm, -arm])
    turn = torch.cat([angle, angle]) + 0.5
    along = torch.stack([-turn.sin(), turn.cos()], 1)
    covariance = 0.03 * along[:, :, None] * along[:, None] + 0.002 * torch.eye(2)
    return Mixture(means, covariance=covariance)


@dataclass
class Trained:
    """A model, its averaged weights, and what a step took."""

    model: nn.Module
    seconds: float


def train(
    model: nn.Module, loss: Batch, steps: int = STEPS, lr: float = 5e-3, extra: nn.Module | None = None
) -> Trained:
    """Adam with a falling rate; the exponential average of the weights."""
    parameters = [*model.parameters(), *(extra.parameters() if extra is not None else ())]
    optimizer = torch.optim.Adam(parameters, lr, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (1 / 200)), use_buffers=False)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            )
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        average.update_parameters(model)
    return Trained(average.module, (time.perf_counter() - start) / steps)


def score_errors(model: Callable[..., Tensor], law: Mixture, n: int = 4000) -> list[float]:
    """Relative error of the score at each of the levels."""
    x, found = law.sample(n), []
    for level in LEVELS:
        noisy = x + level * torch.randn_like(x)
        exact = law(noisy, level)
        error = model(noisy, torch.full((n,), level)).detach() - exact
        found.append(float((error.square().sum() / (exact - noisy).square().sum()).sqrt()))
    return found


def show(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    OUT.print(table)


def network(hidden: int = 64, depth: int = 3) -> DenoiserMLP:
    return DenoiserMLP(2, hidden=(hidden,) * depth)


def scores_part() -> None:
    angle = torch.arange(8) * (math.pi / 4)
    eight = Mixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), scale=0.2)
    rows = []
    for name, law in {"eight components, sd 0.2": eight, "two arms, narrow: sd 0.045": toy()}.items():
        std, schedule = float(law.sample(10_000).std()), replace(SCHEDULE, log_mean=-1.8)
        torch.manual_seed(0)
        model = Preconditioned(network(128), std)

        def loss(step: int, law: Mixture = law, model: nn.Module = model, schedule: EDM = schedule) -> Tensor:
            x = law.sample(BATCH)
            sigma = schedule.training(times.lattice(torch.rand(()), BATCH))
            return losses.denoising(model, x, sigma, torch.randn_like(x), weightings.EDM()).mean()

        begin = time.process_time()
        done = train(model, loss, 3000)
        rows.append([name, *score_errors(done.model, law), f"{time.process_time() - begin:.0f} s"])
    show(
        "score error, 3000 steps of a 3 x 128 perceptron", ["law", *map(str, LEVELS), "processor time"], rows
    )


def weightings_part() -> None:
    law, rows = toy(), []
    std = float(law.sample(10_000).std())
    balance = weightings.LearnedVariance()
    choices: dict[str, weightings.Weighting] = {
        "EDM": weightings.EDM(std),
        "uniform": weightings.Uniform(),
        "min-SNR 5": weightings.MinSNR(),
        "soft min-SNR 5": weightings.SoftMinSNR(),
        "flow matching": weightings.FlowMatching(),
        "likelihood": weightings.Likelihood(SCHEDULE),
        "EDM, learned variance": weightings.EDM(std),
    }
    for name, weighting in choices.items():
        torch.manual_seed(0)
        model, learned = Preconditioned(network(), std), "learned" in name

        def loss(
            step: int, model: nn.Module = model, w: weightings.Weighting = weighting, b: bool = learned
        ) -> Tensor:
            x = law.sample(BATCH)
            sigma = SCHEDULE.training(times.lattice(torch.rand(()), BATCH))
            each = losses.denoising(model, x, sigma, torch.randn_like(x), w)
            return (balance(each, sigma) if b else each).mean()

        done = train(model, loss, extra=balance if learned else None)
        rows.append([name, *score_errors(done.model, law), 1e3 * done.seconds])
    show(
        f"score error by weighting, {STEPS} steps of {BATCH}",
        ["weighting", *map(str, LEVELS), "ms/step"],
        rows,
    )


def times_part() -> None:
    law, rows = toy(), []
    std = float(law.sample(10_000).std())
    for name in ("independent", "stratified", "lattice", "importance"):
        torch.manual_seed(0)
        model = Preconditioned(network(), std)
        state = [times.Importance.start()]

        def loss(step: int, model: nn.Module = model, name: str = name, state: list = state) -> Tensor:
            u, ratio = torch.rand(BATCH), torch.ones(BATCH)
            if name == "stratified":
                u = times.stratified(u)
            elif name != "independent":
                u = times.lattice(u[0], BATCH)
            if name == "importance":
                u, ratio = state[0].draw(u)
            x = law.sample(BATCH)
            each = losses.denoising(model, x, SCHEDULE.training(u), torch.randn_like(x), weightings.Uniform())
            if name == "importance":
                state[0] = state[0].update(u, each)
            return (ratio * each).mean()

        done = train(model, loss)
        gradients = []
        for step in range(100):
            found = torch.autograd.grad(loss(step), list(model.parameters()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        spread = torch.stack(gradients).var(0).sum().sqrt()
        batch = torch.stack([loss(step).detach() for step in range(200)]).std()
        rows.append([name, *score_errors(done.model, law), float(batch), float(spread)])
    columns = ["times", *map(str, LEVELS), "sd of a batch's loss", "sd of its gradient"]
    show("score error by times, uniform weighting", columns, rows)


def networks_part() -> None:
    law, rows = toy(), []
    std = float(law.sample(10_000).std())
    for name, make in {"perceptron": Preconditioned, "energy": EnergyDenoiser}.items():
        for hidden in (64, 128):
            torch.manual_seed(0)
            model = make(network(hidden, 3), std)

            def loss(step: int, model: nn.Module = model) -> Tensor:
                x = law.sample(BATCH)
                sigma = SCHEDULE.training(times.lattice(torch.rand(()), BATCH))
                return losses.denoising(model, x, sigma, torch.randn_like(x), weightings.EDM(std)).mean()

            done = train(model, loss, 1500)
            rows.append([f"{name}, 3 x {hidden}", *score_errors(done.model, law), 1e3 * done.seconds])
    show("score error by network, 1500 steps", ["network", *map(str, LEVELS), "ms/step"], rows)


def distance(first: Tensor, second: Tensor) -> float:
    """Sliced Wasserstein-2 distance over 200 directions."""
    angle = torch.randn(200, first[0].numel())
    angle = (angle / angle.norm(dim=1, keepdim=True)).mT
    a, b = (v.reshape(len(v), -1) @ angle for v in (first, second))
    return float((a.sort(0).values - b.sort(0).values).square().mean().sqrt())


def coupling_part() -> None:
    law, rows = toy(), []
    truth = law.sample(4000)
    floor = distance(law.sample(4000), truth)
    for name in ("independent", "coupled"):
        torch.manual_seed(0)
        velocity = network(64, 4)
        spent = [0.0]

        def loss(step: int, velocity: nn.Module = velocity, name: str = name, spent: list = spent) -> Tensor:
            x, noise = law.sample(256), torch.randn(256, 2)
            start = time.perf_counter()
            if name == "coupled":
                noise = coupled(x, noise)
            spent[0] += time.perf_counter() - start
            return losses.flow_matching(velocity, x, times.lattice(torch.rand(()), 256), noise).mean()

        done = train(velocity, loss)
        found = []
        for steps in (1, 2, 4, 8, 32):
            x = torch.randn(4000, 2)
            for t in torch.linspace(1, 0, steps + 1)[:-1]:
                x = x - done.model(x, t.expand(4000)).detach() / steps
            found.append(distance(x, truth))
        rows.append([name, *found, float(loss(0).detach()), 1e3 * spent[0] / STEPS])
    columns = ["noise", "1 step", "2", "4", "8", "32", "loss", "ms to couple 256"]
    show(f"sliced Wasserstein distance by Euler steps (floor {floor:.3f})", columns, rows)


def jumps_part() -> None:
    law, rows = toy(), []
    std, low, high = float(law.sample(10_000).std()), 0.02, 20.0
    truth = law.sample(4000)
    torch.manual_seed(0)
    model = Preconditioned(network(64, 3), std)

    def teach(step: int) -> Tensor:
        x = law.sample(BATCH)
        sigma = SCHEDULE.training(times.lattice(torch.rand(()), BATCH))
        return losses.denoising(model, x, sigma, torch.randn_like(x), weightings.EDM(std)).mean()

    teacher = train(model, teach, 2000).model
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    grid = Curriculum(1, 18, 18, low, high).grid(0).flip(0).float()
    x = high * torch.randn(4000, 2)
    for a, b in itertools.pairwise(grid):
        x = heun(teacher, x, a.expand(4000), b.expand(4000)).detach()
    rows.append(["teacher, 18 steps of Heun", "", "", distance(x, truth)])

    def sample(model: Callable[..., Tensor], levels: tuple[float, ...]) -> Tensor:
        x = high * torch.randn(4000, 2)
        x = model(x, torch.full((4000,), high)).detach()
        for level in levels:
            noisy = x + math.sqrt(level**2 - low**2) * torch.randn_like(x)
            x = model(noisy, torch.full((4000,), level)).detach()
        return x

    rows.append(["teacher's denoiser", distance(sample(teacher, ()), truth), "", ""])
    curriculum = Curriculum(2000, 10, 160, low, high, log_mean=-1.1, log_std=2.0)
    for name in ("distilled", "trained"):
        student = Preconditioned(network(64, 3), std, sigma_min=low)
        student.network.load_state_dict(teacher.network.state_dict())
        student.requires_grad_(True)

        def loss(step: int, student: nn.Module = student, name: str = name) -> Tensor:
            x = law.sample(BATCH)
            lower, upper = curriculum.levels(min(step, 1999), times.lattice(torch.rand(()), BATCH))
            noise = torch.randn_like(x)
            if name == "distilled":
                return consistency_distillation(student, teacher, x, lower, upper, noise).mean()
            return consistency_training(student, x, lower, upper, noise).mean()

        done = train(student, loss, 2000, 2e-3)
        rows.append(
            [name, *(distance(sample(done.model, levels), truth) for levels in ((), (0.5,), (1.5, 0.3)))]
        )
    show(
        f"sliced Wasserstein distance (floor {distance(law.sample(4000), truth):.3f})",
        ["model", "1 step", "2", "3 or more"],
        rows,
    )


def bound_part() -> None:
    rows: list[list[object]] = []
    high = Mixture(2 * torch.randn(25, 80, dtype=torch.float64), scale=1.0)
    for name, law in {"toy": toy().to(torch.float64), "25 components, D = 80": high}.items():
        x = law.sample(300)
        plain = Bound(0.005, mean=x.mean(0), variance=float(x.var(0).mean()))
        fitted = plain.fitted(law.sample(200), law, torch.randn_like(x[:200]).unsqueeze(0), levels=17)
        truth = law.log_prob(x, 0.005 * math.sqrt(2))
        for evaluations in (2, 8, 32):
            for kind, antithetic in itertools.product(("plain", "fitted"), (False, True)):
                bound = replace(plain if kind == "plain" else fitted, antithetic=antithetic)
                noise = torch.randn(30, evaluations // (1 + antithetic), *x.shape, dtype=torch.float64)
                values = torch.stack(
                    [bound(x, law, shift, part) for shift, part in zip(torch.rand(30), noise)]
                )
                gap, one = float((truth - values.mean(0)).mean()), float(values.std(0).mean())
                label = f"{kind}{', antithetic' if antithetic else ''}"
                rows.append([name, evaluations, label, gap, one, float(values.mean(1).std())])
    columns = ["law", "evaluations", "estimate", "mean gap, nats", "sd, one row", "sd, mean of 300 rows"]
    show("the bound with the exact denoiser", columns, rows)


def images_part() -> None:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    learn, held = images[:1350], images[1350:]
    mean, std = learn.mean(0), float((learn - learn.mean(0)).std())
    schedule, weight = EDM(), weightings.EDM(std)
    fixed = torch.Generator().manual_seed(1)
    u = times.lattice(torch.rand((), generator=fixed), len(held))
    noise = torch.randn(held.shape, generator=fixed)
    rows = []
    for name, make in {
        "perceptron 3 x 256": lambda: DenoiserMLP((1, 8, 8), (256,) * 3),
        "U-Net 32": lambda: UNet(1, 32, attention=(1,)),
    }.items():
        torch.manual_seed(0)
        model = Preconditioned(make(), std, mean=mean)
        found: list[object] = []

        def loss(step: int, model: nn.Module = model) -> Tensor:
            x = learn[torch.randint(len(learn), (128,))]
            sigma = schedule.training(times.lattice(torch.rand(()), 128))
            return losses.denoising(model, x, sigma, torch.randn_like(x), weight).mean()

        seconds = 0.0
        for steps in (100, 200, 400):
            done = train(model, loss, steps)
            seconds += done.seconds * steps
            with torch.no_grad():
                now = losses.denoising(done.model, held, schedule.training(u), noise, weight).mean()
            found.append(float(now))
        size = sum(p.numel() for p in model.parameters())
        rows.append([name, size, *found, f"{seconds:.0f} s"])
    columns = ["network", "parameters", "100 steps", "300", "700", "time"]
    show("digits: held-out loss, EDM weighting (1: the Gaussian's denoiser)", columns, rows)


def guesses_part() -> None:
    """Self-conditioning against the plain network at equal steps and at equal time (a guess costs about half as much again)."""
    law, rows = toy(), []
    std = float(law.sample(10_000).std())
    for name, steps in (("plain", STEPS), ("plain, longer", 3 * STEPS // 2), ("self-conditioned", STEPS)):
        for seed in (0, 1):
            torch.manual_seed(seed)
            guessed = name.startswith("self")
            inner = SelfConditioned(DenoiserMLP(4, (64,) * 3, outputs=2)) if guessed else network()
            model = Preconditioned(inner, std)

            def loss(step: int, model: nn.Module = model) -> Tensor:
                x = law.sample(BATCH)
                sigma = SCHEDULE.training(times.lattice(torch.rand(()), BATCH))
                return losses.denoising(model, x, sigma, torch.randn_like(x), weightings.EDM(std)).mean()

            done = train(model, loss, steps)
            done.model.eval()
            torch.manual_seed(10)
            rows.append([f"{name}, {steps}", *score_errors(done.model, law), 1e3 * done.seconds])
    show("score error, plain and self-conditioned", ["network, steps", *map(str, LEVELS), "ms/step"], rows)


PARTS = {
    "scores": scores_part,
    "weightings": weightings_part,
    "times": times_part,
    "networks": networks_part,
    "coupling": coupling_part,
    "jumps": jumps_part,
    "bound": bound_part,
    "images": images_part,
    "guesses": guesses_part,
    "digits": diffusion_digits.figures,
    "consistency": diffusion_digits.students,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        torch.manual_seed(0)
        PARTS[part]()

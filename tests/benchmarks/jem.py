"""A joint energy on digits: does it classify, is it calibrated, and does it know what does not belong?

    python -m tests.benchmarks.jem [--seeds 3] [--steps 1500] [--noise 0.15]

scikit-learn's digits, pixels in [-1, 1] with normal noise on the rows to learn from; 1,400 rows to learn from, 397 held out. (With
a noise of 0.03 the energy classifies as well, but its walls are too steep to learn: draws are no digits.) Outliers: uniform
noise, the held-out digits inverted, strokes that look like letters (E, F, H, L, T, X, ... in 8 x 8 pixels, shifted at random),
and held-out digits with a quarter of their ink. Printed are accuracy, expected calibration error (15 bins) and the area under
the curve of log p(x) (up to its constant, which cancels), beside that of a flow and of a pixel-by-pixel model, whose likelihoods
are known to be taken in by simple images. `drawn` is how many of 200 digits that are drawn given their labels, by `mcmc` from the
fit's own draws, are taken for what they should be by their three nearest neighbours among the rows, and how far the nearest one
is (held-out digits with as much noise: `held`).
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

import pgen
from pgen.metrics import auroc, calibration_error
from pgen.zoo import JointEnergy, MaskedAutoencoder, SplineFlow

LETTERS = {
    "E": ["######", "#.....", "#####.", "#.....", "#.....", "######"],
    "F": ["######", "#.....", "#####.", "#.....", "#.....", "#....."],
    "H": ["#....#", "#....#", "######", "######", "#....#", "#....#"],
    "L": ["#.....", "#.....", "#.....", "#.....", "#.....", "######"],
    "T": ["######", "######", "..##..", "..##..", "..##..", "..##.."],
    "X": ["#....#", ".#..#.", "..##..", "..##..", ".#..#.", "#....#"],
    "K": ["#...##", "#..#..", "###...", "###...", "#..#..", "#...##"],
    "M": ["#....#", "##..##", "#.##.#", "#....#", "#....#", "#....#"],
    "N": ["#....#", "##...#", "#.#..#", "#..#.#", "#...##", "#....#"],
    "W": ["#....#", "#....#", "#....#", "#.##.#", "##..##", "#....#"],
    "A": ["..##..", ".#..#.", "#....#", "######", "#....#", "#....#"],
    "R": ["#####.", "#....#", "#####.", "#..#..", "#...#.", "#....#"],
}


def letters(n: int, generator: torch.Generator) -> Tensor:
    """Strokes `[n, 64]` in [-1, 1], shifted and of varying ink."""
    shapes = torch.tensor([[[c == "#" for c in row] for row in shape] for shape in LETTERS.values()]).float()
    pick = torch.randint(len(shapes), (n,), generator=generator)
    place = torch.randint(3, (n, 2), generator=generator)
    found = torch.zeros(n, 8, 8)
    for i in range(n):
        a, b = place[i].tolist()
        found[i, a : a + 6, b : b + 6] = shapes[pick[i]] * (0.6 + 0.4 * torch.rand(6, 6, generator=generator))
    return found.reshape(n, 64) * 2 - 1


def given_labels(joint: pgen.fitted.Fitted) -> tuple[Tensor, Tensor]:
    """Digits `[200, 64]` drawn given labels, and these."""
    labels = torch.arange(10)
    backend = pgen.backend("mcmc", kernel="mala", chains=20, warmup=200, draws=20, init=joint)
    chains = pgen.fit(joint.program, {"y": labels}, backend, run=pgen.Run(progress=False))
    return chains.posterior(n=20, seed=0)["x"].reshape(-1, 64), labels.repeat(20)


def told_of(x: Tensor, y: Tensor, rows: Tensor, labels: Tensor) -> str:
    """How many of some digits look like their labels, and how far the nearest row is."""
    apart = torch.cdist(x, rows).topk(3, largest=False)
    taken = labels[apart.indices].mode(1).values
    return f"{float((taken == y).double().mean()):.2f}, {float(apart.values[:, 0].mean()):.2f}"


def main() -> None:
    """As the first lines say."""
    parser = argparse.ArgumentParser(description="A joint energy on digits.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--noise", type=float, default=0.15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, y = (torch.tensor(pixels) / 8 - 1).float()[order], torch.tensor(labels)[order]
    table = Table(
        "model",
        "seed",
        "accuracy",
        "ECE",
        "noise",
        "inverted",
        "letters",
        "faded",
        "drawn",
        "held",
        "seconds",
    )
    for seed in range(options.seeds):
        g = torch.Generator().manual_seed(seed)
        train, held = images[:1400], images[1400:]
        noisy = train + options.noise * torch.randn(train.shape, generator=g)
        outside = {
            "noise": 2 * torch.rand(len(held), 64, generator=g) - 1,
            "inverted": -held,
            "letters": letters(len(held), g),
            "faded": (held + 1) / 4 - 1,
        }
        torch.manual_seed(seed)
        run = pgen.Run(steps=options.steps, lr=1e-3, batch_size=128, ema=0.99, progress=False, seed=seed)
        start = time.perf_counter()
        joint = pgen.fit(JointEnergy(), {"x": noisy, "y": y[:1400]}, "exact", run=run)
        seconds = time.perf_counter() - start
        probs = joint.marginals({"x": held})["y"].probs
        accuracy = float((probs.argmax(-1) == y[1400:]).double().mean())
        density = joint.law("x").log_density
        scores = {name: float(auroc(density(held), density(x))) for name, x in outside.items()}
        told = [f"{scores[name]:.3f}" for name in outside]
        table.add_row(
            "joint energy",
            str(seed),
            f"{accuracy:.3f}",
            f"{float(calibration_error(probs, y[1400:])):.3f}",
            *told,
            told_of(*given_labels(joint), train, y[:1400]),
            told_of(held + options.noise * torch.randn(held.shape, generator=g), y[1400:], train, y[:1400]),
            f"{seconds:.0f}",
        )
        for name, program in (("flow", SplineFlow(64)), ("pixel by pixel", MaskedAutoencoder(64, None))):
            start = time.perf_counter()
            plain = pgen.fit(program, {"x": noisy}, "exact", run=run)
            seconds = time.perf_counter() - start
            inside = plain.log_prob({"x": held}).value
            told = [f"{float(auroc(inside, plain.log_prob({'x': x}).value)):.3f}" for x in outside.values()]
            table.add_row(name, str(seed), "", "", *told, "", "", f"{seconds:.0f}")
        print(f"seed {seed} done", flush=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

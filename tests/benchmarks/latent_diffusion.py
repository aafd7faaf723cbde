"""Diffusions at latent sites, learned with their decoders: bounds on the evidence beside the exact one, and digits.

    python -m tests.benchmarks.latent_diffusion [plane] [digits] [--steps 3000]

plane: three clusters in a latent plane, seen through a linear map with noise, so that the evidence is known; network,
decoder and noise are learned. digits: binary 8x8 images (scikit-learn), the same networks with a normal prior beside.
"""

from __future__ import annotations

import argparse
import math
import time

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pgen
from pgen.distributions import EDM, VE, Diffusion, MixtureDenoiser
from pgen.metrics import energy_distance
from pgen.nn import DenoiserMLP, Preconditioned
from pgen.zoo.datasets import digits_binary

SEEN, NOISE = 8, 0.3


class Plane(nn.Module):
    """A diffusion in the plane, and a linear decoder."""

    def __init__(self):
        super().__init__()
        self.network = Preconditioned(DenoiserMLP(2), sigma_data=1.0)
        self.decoder = nn.Linear(2, SEEN)
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, n):
        with pyro.plate("data", n):
            z = pyro.sample("z", Diffusion(self.network, EDM(), (2,)))
            pyro.sample("y", dist.Normal(self.decoder(z), self.log_noise.exp()).to_event(1))


class Images(nn.Module):
    """Eight latents, from a diffusion or from a standard normal law, and a perceptron."""

    def __init__(self, diffusion, latents=8):
        super().__init__()
        self.latents = latents
        self.network = Preconditioned(DenoiserMLP(latents), sigma_data=1.0) if diffusion else None
        self.decoder = nn.Sequential(
            nn.Linear(latents, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64)
        )

    def forward(self, n):
        if self.network is None:
            law = dist.Normal(torch.zeros(self.latents), 1.0).to_event(1)
        else:
            law = Diffusion(self.network, VE(0.01, 30.0), (self.latents,))
        with pyro.plate("data", n):
            z = pyro.sample("z", law)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1))


def plane(steps):
    torch.manual_seed(0)
    truth = MixtureDenoiser(torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.5]]), scale=0.3)
    decoder = torch.randn(SEEN, 2)

    def draw(n):
        return truth.sample(n) @ decoder.T + NOISE * torch.randn(n, SEEN)

    data, test = draw(4000), draw(500)
    spread = decoder @ (0.09 * torch.eye(2)) @ decoder.T + NOISE**2 * torch.eye(SEEN)
    logs = [dist.MultivariateNormal(m @ decoder.T, spread).log_prob(test) for m in truth.means]
    exact = torch.stack(logs).logsumexp(0) - math.log(len(logs))
    print(f"plane: evidence of 500 held-out rows {float(exact.mean()):.3f} nats a row, exactly")
    backends = {
        "score": pgen.backend("score", family="full"),
        "score, weighting edm": pgen.backend("score", family="full", weighting="edm"),
        "variational": pgen.backend("variational", family="full"),
    }
    for name, backend in backends.items():
        torch.manual_seed(1)
        start = time.perf_counter()
        run = pgen.Run(steps=steps, lr=3e-3, batch_size=256)
        fitted = pgen.fit(Plane(), {"y": data}, backend, run=run, seed=0)
        seconds = time.perf_counter() - start
        bound = fitted.log_prob({"y": test}, seed=0).mean()
        distance = float(energy_distance(fitted.sample(4000, seed=0)["y"], data))
        print(
            f"  {name:22} {bound} a row; energy distance of draws {distance:.4f} "
            f"(of data {float(energy_distance(test, data)):.4f}); {seconds:.0f} s"
        )


def digits(steps):
    data = digits_binary()
    print(f"digits: {len(data.train['x'])} binary images, bound on {len(data.test['x'])} others")
    cases = {
        "normal, variational": (False, pgen.backend("variational")),
        "diffusion, variational": (True, pgen.backend("variational")),
        "diffusion, score": (True, pgen.backend("score")),
        "diffusion, score, weighting uniform": (True, pgen.backend("score", weighting="uniform")),
    }
    for name, (diffusion, backend) in cases.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        run = pgen.Run(steps=steps, batch_size=128)
        fitted = pgen.fit(Images(diffusion), data.train, backend, run=run, seed=0)
        seconds = time.perf_counter() - start
        print(f"  {name:36} {fitted.log_prob(data.test, seed=0).mean()} an image; {seconds:.0f} s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="plane, digits; both if none is named")
    parser.add_argument("--steps", type=int, default=3000)
    asked = parser.parse_args()
    for name, run in {"plane": plane, "digits": digits}.items():
        if name in (asked.what or ("plane", "digits")):
            run(asked.steps)


if __name__ == "__main__":
    main()

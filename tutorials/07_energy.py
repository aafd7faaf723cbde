# %% [markdown]
# # Energies: any function is a density, up to a number
#
# $$ p(x) = \frac{b(x)\, e^{-E(x)}}{Z}, \qquad Z = \int b(x)\, e^{-E(x)}\, dx $$
#
# for any network $E$ and a base $b$ that falls off. Nothing has to be invertible, or causal, or a sampler. The price is $Z$:
# it cannot be computed, and the gradient of the log likelihood holds it,
# $$ \nabla_\theta \log p(x) = -\nabla E(x) + \mathbb{E}_{y \sim p}\,[\nabla E(y)]. $$
# `Energy` is a distribution like any other, at any site. What it cannot do (draw, weigh, learn) is reached by conversions,
# which `pgen.explain` names: so the same program is learned in many ways, and a way is a word.

# %%
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen import pictures
from pgen.distributions import Energy
from pgen.metrics import auroc
from pgen.nn import RBM
from pgen.zoo.datasets import digits
from pgen.zoo.toys import moons

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="energy-"))  # for pictures

# %% [markdown]
# ## One program, four ways to learn it
#
# - *contrastive divergence*: the expectation is over chains that begin at the data and make a few steps;
# - *persistent*: the chains go on from step to step (the default);
# - *noise contrastive*: tell data from noise of a known density; the log odds are $-E$, less a learned $\log Z$;
# - *denoising score matching*: $-\nabla E$ at noisy data points back to the data; no $Z$ in sight.
#
# Chains move by MALA, whose step follows the acceptance; now and then they leap to draws of a Gaussian like the data, by
# which modes exchange chains. In the plane $Z$ is integrated on a grid, so that log probabilities can be believed.


# %%
class Plane(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def energy(self, x):
        return self.net(x).squeeze(-1)

    def forward(self, n):
        base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        with pyro.plate("data", n):
            pyro.sample("x", Energy(self.energy, (2,), base=base))


toy = moons(scale=0.2)
data, held = {"x": toy.sample(5000, seed=0)}, {"x": toy.sample(5000, seed=1)}
truth = float(toy.log_prob(held["x"]).mean())
print(pgen.explain(Plane(), data)["exact"].answer.why)
run = pgen.Run(steps=3000, lr=5e-3, batch_size=256, ema=0.995, progress=False)
fits, apart = {}, {}
contrasts = ("contrastive-divergence", "persistent-contrastive-divergence", "noise-contrastive")
for way in (*contrasts, "denoising-score-matching"):
    fits[way] = pgen.fit(Plane(), data, pgen.backend("exact", via={"x": way}), run=run, seed=0)
    apart[way] = truth - float(fits[way].log_prob(held).mean().value)
    print(f"{way:35}KL(data, model) = {apart[way]:.3f} nats, {fits[way].history.seconds:.0f} s")
moon = fits["persistent-contrastive-divergence"]
last = {k: round(float(moon.history[f"x.{k}"][-1]), 2) for k in ("accept", "energy_gap", "spread", "age")}
print("what the chains tell:", last)

# %% [markdown]
# ## A partition function from two sides
#
# In more dimensions no grid helps. Annealed importance sampling walks from a law that is known to the energy: its weights
# have mean $Z$, so their mean logarithm is below $\log Z$. Walked backwards from draws of the model, it is above
# (Grosse et al. 2015). A restricted Boltzmann machine of twelve hidden units can be summed exactly, and tells who is right.


# %%
class Machine(nn.Module):
    def __init__(self, hidden, pixels):
        super().__init__()
        self.rbm = RBM(64, hidden).like(pixels)

    def forward(self, n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(self.rbm, (64,), support=constraints.boolean))


images = digits()
train, test = ({"x": (part["x"] > 7).float()} for part in (images.train, images.test))
pcd = pgen.backend("exact", via={"x": "persistent-contrastive-divergence"})
machine = pgen.fit(Machine(12, train["x"]), train, pcd, run=pgen.Run(steps=3000, progress=False), seed=0)
exact = machine.log_prob(test).mean()
ais = pgen.backend("exact", via={"x": "annealed-importance"})
annealed = pgen.fit(machine.program, test, ais).log_prob(seed=0)
print("by summing  ", exact)
print("by annealing", annealed.mean(), f"between {annealed.lower.mean():.3f} and {annealed.upper.mean():.3f}")

# %% [markdown]
# ## Concepts, composed
#
# Energies add up. *And* is a sum of energies, *not* a difference, *or* a soft minimum: each is a program of one line, with
# learned laws in it, fixed. Nothing is trained again (Du, Li and Mordatch 2020).

# %%
law = moon.law("x")


def left(x):  # a second concept, here by hand; another fit's law would do
    return 5 * torch.sigmoid(4 * x[..., 0])


def composed(energy):
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(energy, (2,)))

    return pgen.fit(program, None, "exact").sample(1000, seed=0)["x"]


drawn = {"data": held["x"][:1000], "moons": moon.sample(1000, seed=0)["x"]}
drawn["and left"] = composed(lambda x: -law.log_density(x) + left(x))
drawn["and not left"] = composed(lambda x: -law.log_density(x) - left(x))
share = {name: float((x[:, 0] < 0).float().mean()) for name, x in drawn.items()}
print("share to the left:", {name: round(value, 2) for name, value in share.items()})
hidden = moon.posterior({"x": torch.tensor([[0.0, torch.nan]])}, n=1000, seed=0)["x"][:, 0, 1]
print(f"the second number, given a first of 0, is above 0: {float((hidden > 0).float().mean()):.2f}")
pictures.scatter(drawn, folder / "composed.png")

# %% [markdown]
# ## What does not belong
#
# An outlier has a high energy; $Z$ cancels. Here are digits upside down, and pixels by coin flips.

# %%
score = machine.log_prob(test).value
others = {"upside down": test["x"].flip(1), "coins": torch.bernoulli(torch.full_like(test["x"], 0.5))}
found = {name: machine.log_prob({"x": x}).value for name, x in others.items()}
area = {name: float(auroc(score, value)) for name, value in found.items()}
print("area under the curve:", {name: round(v, 3) for name, v in area.items()}, "pictures in", folder)
assert max(apart.values()) < 0.1
assert abs(float(annealed.mean().value - exact.value)) < 0.1
assert share["and left"] > 0.9 > 0.1 > share["and not left"]
assert area["coins"] > 0.95

# %% [markdown]
# # A variational autoencoder, and what it costs
#
# A latent $z$ is seen through a decoder and noise; its posterior is approximated by a guide $q(z \mid x)$:
#
# $$ \log p(x) \;\ge\; \mathbb{E}_{q} \log \frac1K \sum_{k=1}^{K} \frac{p(x, z_k)}{q(z_k \mid x)},
#    \qquad z_k \sim q(z \mid x). $$
#
# With one particle this is the evidence lower bound (ELBO); with more, the bound of the importance weighted
# autoencoder (IWAE), which grows with $K$ towards the truth. Reweighted wake-sleep trains the guide by another loss:
# $\text{KL}(p(z \mid x) \,\|\, q(z \mid x))$, with the particles weighted by $p / q$.
#
# Here the decoder is linear, $x \mid z \sim N(W z + b, \sigma^2 I)$: probabilistic principal component analysis
# (Tipping and Bishop 1999). Then $\log p(x) = \log N(x; b, W W^\top + \sigma^2 I)$ can be looked up, and every gap
# can be measured. For a real decoder, replace the linear map by a network: nothing else changes.

# %%
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pgen

D, K = 6, 2


class Decoder(nn.Module):
    """The program: what the data come from. It knows nothing of how it will be inferred."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(K, D)
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.map(z), self.log_noise.exp()).to_event(1))


def evidence(weight, bias, log_noise, x):
    """The closed form of log p(x)."""
    return dist.LowRankMultivariateNormal(bias, weight, (2 * log_noise).exp().expand(D)).log_prob(x)


torch.manual_seed(0)
true_weight, true_bias, true_log_noise = torch.randn(D, K), torch.randn(D), torch.tensor(0.5).log()
z = torch.randn(3000, K)
x = z @ true_weight.T + true_bias + 0.5 * torch.randn(3000, D)
train, test = {"x": x[:2000]}, {"x": x[2000:]}
program = Decoder()

# %% [markdown]
# ## Swap the objective
#
# No guide is given, so each fit gets one made from the program: its graph is inverted, here to a network from $x$ to
# a Gaussian over $z$. All three are judged by the same bound with 64 particles.

# %%
run = pgen.Run(steps=600, batch_size=250, lr=0.02, schedule="cosine", progress=False)
objectives = {
    name: pgen.backend("variational", objective=name, evaluate="importance")
    for name in ("elbo", "iwae", "wake-sleep")
}
print(pgen.compare(program, train, objectives, test=test, run=run, seed=0))
print(
    "closed form, true parameters:", evidence(true_weight, true_bias, true_log_noise, test["x"]).mean().item()
)

# %% [markdown]
# ## Swap the guide
#
# A guide of your own is a Pyro program too: it draws the latent sites, and takes data by name. A poor one costs a
# loose bound, and a worse decoder with it. This one uses the mean only, with the same uncertainty everywhere, and
# sees no more than the first three of the six coordinates.


# %%
class HalfBlind(nn.Module):
    """A guide that looks at half of the data."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, K)
        self.log_scale = nn.Parameter(torch.zeros(K))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.map(x[:, :3]), self.log_scale.exp()).to_event(1))


guides = {"made from the program": "auto", "half blind": HalfBlind()}
fits = {
    name: pgen.fit(program, train, pgen.backend("variational", guide=guide), run=run, seed=0)
    for name, guide in guides.items()
}

# %% [markdown]
# ## Check against the closed form
#
# For each fit: its ELBO on held-out data, and the true evidence *at the parameters it learned*. The difference is
# $\text{KL}(q \,\|\, p(z \mid x))$, what its guide costs. A diagonal Gaussian can be exact here, because the
# decoder is free to turn its axes until the posterior is diagonal, and the ELBO rewards it for that.

# %%
gaps = {}
for name, fitted in fits.items():
    bound = fitted.log_prob(test, seed=0)
    p = fitted.parameters
    exact = evidence(p["map.weight"], p["map.bias"], p["log_noise"], test["x"])
    gaps[name] = float((exact - bound.value).mean())
    print(f"guide {name}: {bound}; evidence {exact.mean():.4f}; gap {gaps[name]:.4f} nats")

assert abs(gaps["made from the program"]) < 0.02
assert gaps["half blind"] > 0.1

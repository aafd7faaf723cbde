# %% [markdown]
# # One program
#
# A generative model is a joint law, written once as a Pyro program. What is known about its latent parts given
# data follows from Bayes' rule; *how* it is computed is the business of a backend, and can be swapped.
#
# The law here is a mixture of three Gaussians on the plane, with weights $\pi$, means $\mu$ and scales $\sigma$
# to be learned:
#
# $$ k_i \sim \text{Categorical}(\pi), \qquad x_i \mid k_i \sim N(\mu_{k_i}, \text{diag}(\sigma_{k_i}^2)),
# \qquad \log p(x_i) = \log \sum_k \pi_k \, N(x_i; \mu_k, \text{diag}(\sigma_k^2)). $$

# %%
import pyro
import pyro.distributions as dist
import torch

import pgen


class Mixture(torch.nn.Module):
    """Three Gaussians; `n` is the number of rows."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(3))
        self.means = torch.nn.Parameter(torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        self.log_scales = torch.nn.Parameter(torch.zeros(3, 2))

    def forward(self, n):
        with pyro.plate("data", n):
            k = pyro.sample("k", dist.Categorical(logits=self.logits))
            return pyro.sample("x", dist.Normal(self.means[k], self.log_scales[k].exp()).to_event(1))


program = Mixture()

# %% [markdown]
# ## Data
#
# `data` is a mapping: a key that names a site is observed there, one that names an argument is passed to it. The
# argument `n` is left open, so it is given the number of rows. These points come from a mixture whose density is
# known, so that there is a best possible figure to compare with.

# %%
weights, centres = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[-1.5, 0.0], [1.0, 1.0], [1.0, -1.5]])
truth = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(centres, 0.5).to_event(1))
torch.manual_seed(0)
train, test = {"x": truth.sample((4000,))}, {"x": truth.sample((2000,))}

# %% [markdown]
# ## What can be asked?
#
# pgen runs the program once and reads its structure: sites, plates, who depends on whom, what each distribution can
# do. Every installed backend then says what it would answer, and how exactly, or which site lacks what.

# %%
print(pgen.structure_of(program, train))
print(pgen.explain(program, train))

# %% [markdown]
# ## Fit
#
# `k` has three values, so the `exact` backend sums it out, and maximum likelihood is gradient ascent on the formula
# above. The program itself is not changed: the fit holds learned copies of its tensors.

# %%
run = pgen.Run(steps=300, batch_size=500, lr=0.03, schedule="cosine", progress=False)
exact = pgen.fit(program, train, "exact", run=run, seed=0)
print(exact)

# %% [markdown]
# ## Ask
#
# Four queries; every number says what it is. `log_prob` integrates over what the data leave out.

# %%
estimate = exact.log_prob(test)
print(estimate)  # exact, a log density, one value per row
print("best possible:", float(truth.log_prob(test["x"]).mean()))

draws = exact.sample(5, seed=0)  # every site: k and x, jointly
print({site: tuple(value.shape) for site, value in draws.items()})

point = {"x": torch.tensor([[0.0, 0.0]])}
print("p(k | x = 0):", exact.marginals(point)["k"].probs)
print("draws of k:", exact.posterior(point, n=10, seed=0)["k"].flatten().tolist())

# %% [markdown]
# ## Swap
#
# The same program under the `variational` backend: $\log p(x) \ge E_q[\log p(x, k) - \log q(k \mid x)]$, with a guide
# $q$ made from the program. Told not to sum `k` out, it has to guess it, and its answer is a lower bound. It is
# asked about what the exact fit has learned: `exact.program` is again a Pyro program.

# %%
guess = pgen.backend("variational", enumerate="none", particles=8)
variational = pgen.fit(exact.program, train, guess, run=run, seed=0)
bound = variational.log_prob(test, seed=0)
print(bound)
print(f"the guide costs {float((exact.log_prob(test) - bound).mean().value):.4f} nats a row")

# %% [markdown]
# ## Check
#
# The exact figure is the formula above, the bound lies below it, and the truth is hardly better than what was learned.

# %%
learned = exact.parameters
laws = dist.Normal(learned["means"], learned["log_scales"].exp()).to_event(1)
by_hand = torch.logsumexp(learned["logits"].log_softmax(0) + laws.log_prob(test["x"][:, None]), -1)
assert torch.allclose(estimate.value, by_hand, atol=1e-5)
assert bound.kind == "lower bound"
assert float(bound.value.mean()) < float(by_hand.mean()) + 3 * float(bound.mean().stderr)
assert abs(float(truth.log_prob(test["x"]).mean() - by_hand.mean())) < 0.02

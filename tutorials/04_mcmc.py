# %% [markdown]
# # Eight schools by Markov chains
#
# Eight schools tried a coaching programme; each reports an effect $y_j$ and its standard error $\sigma_j$ (Rubin
# 1981). How much do schools differ, and how much should each borrow from the others?
#
# $$ \mu \sim N(0, 5^2), \quad \tau \sim C^+(0, 5), \qquad
#    \theta_j \sim N(\mu, \tau^2), \quad y_j \sim N(\theta_j, \sigma_j^2). $$
#
# `mcmc` draws from the posterior by many Markov chains side by side. It is exact in the long run: half of the work is
# to find out whether the run was long enough.

# %%
import contextlib
import tempfile
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

import pgen
from pgen import pictures

effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
data = {"error": error, "effect": effect}
folder = Path(tempfile.mkdtemp(prefix="eight-schools-"))  # for pictures and a saved fit


def schools(error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error))


# %% [markdown]
# ## A funnel
#
# As written, the program is hard to sample. Where $\tau$ is small, all $\theta_j$ have to lie close to $\mu$: a neck
# too narrow for a step size that suits the rest. Chains that get in do not get out, and others never get in. The
# summary ends in words: what is wrong, how badly, what to try. In the picture, red draws diverged.

# %%
centred = pgen.fit(schools, data, "mcmc", seed=0)
print(centred.summary())
pictures.pairs(centred.draws(), folder / "funnel.png", ["mu", "tau", "theta[0]"])

# %% [markdown]
# ## The same program, other coordinates
#
# With $\theta_j = \mu + \tau z_j$, $z_j \sim N(0, 1)$, the neck is gone: a priori $z$ does not depend on $\tau$. Pyro
# rewrites the program; nothing in it changes. Smaller steps (a higher `target_accept`) do for the tail of $\tau$. A guide
# can learn such coordinates, too: `precondition=pgen.fit(schools, data, pgen.backend("variational", guide="flow"))`.

# %%
program = poutine.reparam(schools, {"theta": LocScaleReparam(0.0)})
fitted = pgen.fit(program, data, pgen.backend("mcmc", target_accept=0.95), seed=0)
print(fitted.summary())
pictures.traces(fitted.draws(), folder / "traces.png", ["mu", "tau"])  # and ranks: flat where chains agree
pictures.pairs(fitted.draws(), folder / "pairs.png", ["mu", "tau", "theta[0]"])
pictures.energies(fitted.draws(), folder / "energies.png")  # the two histograms should be alike

# %% [markdown]
# Why so many chains? The program is run once and recorded; a replay of the recording moves all chains, and a hundred
# cost little more than one. So each may be short. R-hat compares halves of chains: where a half has $n$ draws that are
# worth $e$ independent ones, it is about $1 + (1/e - 1/n)/2$ if all is well, above 1 where halves are short. The
# warnings allow for that. Effective draws count all chains together.
#
# ## Swap the kernel
#
# One word. What counts are effective draws by the second, of the worst scalar, with recording and warm-up.

# %%
for kernel in ("chees", "nuts", "mala", "random-walk"):
    begun = time.perf_counter()
    other = pgen.fit(program, data, pgen.backend("mcmc", kernel=kernel, chains=64), seed=0)
    seconds = time.perf_counter() - begun
    least, warned = min(row.ess_bulk for row in other.summary()), len(other.summary().warnings)
    print(f"{kernel:12}{least:8.0f} effective, {least / seconds:8.0f} a second, {warned} warnings")

# %% [markdown]
# ## Would the model produce such data?
#
# New data sets, one for each posterior draw. Observed extremes should not be extreme among theirs.

# %%
new = fitted.predictive(n=4000, seed=0)["effect"]
for name, of in {"greatest": lambda y: y.amax(-1), "spread": lambda y: y.std(-1)}.items():
    print(f"{name} {of(effect):.1f}; greater in {(of(new) > of(effect)).float().mean():.0%} of new data sets")

# %% [markdown]
# ## Do schools differ at all?
#
# Two rivals: one effect for all, or one effect with a few schools apart. In the second, `apart` is a finite latent:
# it is summed out while `mu` moves, and then drawn given `mu`. `log_prob` of the data is the evidence, with its
# error; differences are log Bayes factors, which depend on the priors. The `exact` backend agrees on the first.


# %%
def one_effect(error, mixed=False):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("schools", len(error)):
        apart = pyro.sample("apart", dist.Bernoulli(0.2)) if mixed else 0.0
        pyro.sample("effect", dist.Normal(mu, (error**2 + 15.0**2 * apart).sqrt()))


mixture = pgen.fit(one_effect, data, "mcmc", kwargs={"mixed": True}, seed=0)
evidence = fitted.log_prob(seed=0)
print("own effects", evidence)
print("a few apart", mixture.log_prob(seed=0), "apart:", mixture.draws()["apart"].mean(0))
print("one effect ", *(pgen.fit(one_effect, data, b, seed=0).log_prob(seed=0) for b in ("mcmc", "exact")))

# %% [markdown]
# ## Keep, continue, hand over
#
# A fit is saved with the state of its chains: loaded and resumed, it draws what it would have drawn. `to_arviz` gives
# a DataTree for ArviZ. Before you trust your own program, run `pgen.testing.sbc(program, "mcmc", data=data)`: latents
# from the prior, data from them, and the ranks of those latents among posterior draws, which have to be uniform.

# %%
fitted.save(folder / "fit")
loaded = pgen.load(folder / "fit", program).resume(100)
assert torch.equal(loaded.draws()["tau"], fitted.resume(100).draws()["tau"])
with contextlib.suppress(ImportError):  # pip install arviz-base "arviz-stats[xarray]"
    from arviz_stats import summary as arviz_summary

    print(arviz_summary(fitted.to_arviz(20_000), var_names=["mu", "tau"]))

# %% [markdown]
# ## Check
#
# $\theta$ and $\mu$ can be integrated out by hand, and $\tau$ on a grid: so evidence and mean of $\tau$ are known.

# %%
u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
tau = u / (1 - u)
law = dist.MultivariateNormal(torch.zeros(8).double(), torch.diag_embed(error**2 + tau[:, None] ** 2) + 25)
weight = (law.log_prob(effect.double()) + dist.HalfCauchy(5.0).log_prob(tau)).exp() / (1 - u) ** 2 / 4000
exact, mean, row = weight.sum().log(), float((weight * tau).sum() / weight.sum()), fitted.summary()["tau"]
print(f"mean of tau: {mean:.3f}; sampled: {row.mean:.3f} ± {row.mcse_mean:.3f}; pictures in {folder}")
assert not fitted.summary().warnings
assert abs(row.mean - mean) < 5 * row.mcse_mean
assert abs(evidence.value - exact) < 5 * evidence.stderr

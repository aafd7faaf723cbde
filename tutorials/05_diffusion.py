# %% [markdown]
# # A diffusion, and a likelihood that can be believed
#
# Add noise to data, $x = x_0 + \sigma \varepsilon$, and ask what was there. The best answer in the mean square is a
# conditional mean, and regression finds it: no sampling, no adversary, no normalising constant.
#
# $$ D(x, \sigma) = \mathbb{E}[x_0 \mid x] = \arg\min_f \, \mathbb{E} \, \| f(x_0 + \sigma \varepsilon) - x_0 \|^2,
#    \qquad \nabla \log p_\sigma(x) = \frac{D(x, \sigma) - x}{\sigma^2}. $$
# The second equation is Tweedie's: whoever can denoise knows the score of the noisy law. Values that move by
# $$ \frac{dx}{d\sigma} = \frac{x - D(x, \sigma)}{\sigma} = -\sigma \nabla \log p_\sigma(x) $$
# from a large $\sigma$ to 0 have the law $p_\sigma$ at every level, and end as data: the probability flow. A stochastic
# equation, which removes more noise than that and adds some anew, has the same laws (Song et al. 2021).

# %%
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pgen
from pgen import pictures
from pgen.backends.score import Score
from pgen.distributions import VE, Diffusion, MixtureDenoiser
from pgen.metrics import energy_distance
from pgen.zoo.datasets import digits
from pgen.zoo.diffusion import DenoisingDiffusion
from pgen.zoo.made import MaskedAutoencoder

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="diffusion-"))  # for pictures

# %% [markdown]
# ## Where the answer is known: samplers side by side
#
# Of a Gaussian mixture, $D$ has a closed form: nothing is left to learn. Noise levels are from 0.01 to 50 here.
#
# A solver is an object with `step(x, t, t_next, fn)`, where `fn(x, t)` is the denoised $x$: nothing to inherit, nothing
# to register. This one, the midpoint rule, calls the denoiser twice a step, as `heun` does but for its last step. The
# others call it once; `ancestral` follows the stochastic equation.

# %%
truth = MixtureDenoiser(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), scale=0.3)
law = Diffusion(truth, VE(0.01, 50.0), event_shape=(2,))
x = torch.randn(5, 2)
score = torch.func.grad(lambda x: truth.log_prob(x, 0.7).sum())(x)
print(f"Tweedie's formula is off by {(law.score(x, 0.7) - score).abs().max():.1e}")


def points(n):
    with pyro.plate("data", n):
        pyro.sample("x", law)


class Midpoint:
    def step(self, x, t, t_next, fn):
        middle = (t + t_next) / 2
        half = x + (middle - t) * (x - fn(x, t)) / t
        return x + (t_next - t) * (half - fn(half, middle)) / middle


exact, other = truth.sample(4000), truth.sample(4000)
print(f"energy distances, 0 but for chance at best; of exact draws {energy_distance(other, exact):.4f}")
for name in ("euler", "unipc", "ancestral", "heun", "midpoint"):
    solver, each = Midpoint() if name == "midpoint" else name, 2 if name in ("heun", "midpoint") else 1
    ways = [Score(solver=solver, steps=calls // each) for calls in (8, 16, 32, 64)]
    drawn = [pgen.fit(points, None, way).sample(4000, seed=0)["x"] for way in ways]
    print(f"{name:10}by 8, 16, 32, 64 calls:", *(f"{energy_distance(of, exact):8.4f}" for of in drawn))

# %% [markdown]
# Steps are not even: by default, levels are even in $\sigma^{1/7}$ (Karras et al. 2022), so that most of them are at
# low noise, where paths bend. Double the steps: when draws no longer change, there are enough.
#
# ## The likelihood
#
# Along the flow, the divergence of the velocity is integrated, from a value to noise, whose density is known. With the
# exact $D$ only the solver errs, and it says by how much. Weighted square errors give a lower bound: random, cheaper.

# %%
known = truth.log_prob(exact[:200], 0.01)  # at the least noise level, as the law is defined
ways = [pgen.fit(points, None, Score(evaluate=way)) for way in ("flow", "bound")]
flow, bound = (fitted.log_prob({"x": exact[:200]}, seed=0) for fitted in ways)
worst = float((flow.value - known).abs().max())
print("flow ", flow, "\nbound", bound)
print(f"exact {known.mean():.4f}; in any one row, the flow is off by {worst:.1e} at most")

# %% [markdown]
# ## Digits
#
# Images of 8 x 8 pixels of 17 levels. The program is one site, `Quantized(Diffusion(...), 17)`: a density seen through
# cells, so that what is reported belongs to a probability *mass* and can stand beside that of any program for levels.
# A small network learns by regression, and draws by several solvers. From one seed, all on the flow head for one image.
#
# The autoregressive rival's figure is exact. The flow's is an estimate: of the log density at one random point of a cell,
# plus the cell's log volume: in the mean it is below the log mass, by Jensen's inequality. What is stated as ± is the
# error of divergences alone. The bound is on the mass under the stochastic equation: where $D$ errs, another law.

# %%
data = digits()
program = DenoisingDiffusion(features=64, levels=17, image=(8, 8), width=16)
run = pgen.Run(steps=800, batch_size=64, lr=3e-3, progress=False)
fitted = pgen.fit(program, data.train, "score", run=run, seed=0)
rival = pgen.fit(MaskedAutoencoder(), data.train, run=run, seed=0)
print(fitted.history)
rows = {"data": data.test["x"], "pixel by pixel": rival.sample(16, seed=1)["x"]}
for solver, steps in {"euler": 8, "unipc": 8, "heun": 32, "ancestral": 100}.items():
    swapped = pgen.fit(fitted.program, None, Score(solver=solver, steps=steps))
    rows[f"{solver} {steps}"] = swapped.sample(16, seed=1)["x"]
pictures.compare_images(rows, folder / "draws.png")
some, cheap = {"x": data.test["x"][:32]}, Score(divergence="hutchinson", probes=4, tolerance=1e-3)
print("flow, 32 images  ", pgen.fit(fitted.program, None, cheap).log_prob(some, seed=0))
print("rival, the same  ", rival.log_prob(some))
bounded = pgen.fit(fitted.program, None, Score(evaluate="bound", bound_particles=16))
print("bound, all images", bounded.log_prob(data.test, seed=0))
print("rival, the same  ", rival.log_prob(data.test))

# %% [markdown]
# ## Condition
#
# What is an image like, given its upper half? The learned law is a prior, and one more statement says what is seen. On
# the mixture, twisted particles (Wu et al. 2023) have an exact posterior to meet; on digits, PiGDM (Song et al. 2023)
# is quick, and an approximation.


# %%
def half_seen(n, law, half, noise):
    with pyro.plate("data", n):
        x = pyro.sample("x", law)
        pyro.sample("upper", dist.Normal(x[..., :half], noise).to_event(1))


plane = pgen.fit(half_seen, None, Score(particles=4000), kwargs={"law": law, "half": 1, "noise": 0.5})
found = plane.posterior({"upper": torch.tensor([[0.5]])}, n=4000, seed=0)["x"][:, 0].mean(0)
posterior = truth.posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), torch.tensor([[0.25]]))
mean = posterior.log_weights.exp() @ posterior.means
print(f"posterior mean ({found[0]:.2f}, {found[1]:.2f}), exact ({mean[0]:.2f}, {mean[1]:.2f})")
prior = fitted.law("x").base  # over real values: levels are cells of [-1, 1]
images, average = ((x + 0.5) * 2 / 17 - 1 for x in (data.test["x"][:16], data.train["x"].float().mean(0)))
quick = pgen.fit(half_seen, None, Score(posterior="pigdm"), kwargs={"law": prior, "half": 32, "noise": 0.1})
guess = quick.posterior({"upper": images[:, :32]}, n=16, seed=0)["x"]
rms = [float((of - images)[:, 32:].square().mean().sqrt()) for of in (guess.mean(0), average)]
print(f"lower halves, root mean square: mean of draws off by {rms[0]:.3f}, the mean image by {rms[1]:.3f}")
shown = {"data": images, "mean": guess.mean(0), **{f"draw {i}": guess[i] for i in range(4)}}
print("pictures in", pictures.compare_images(shown, folder / "halves.png").parent)
assert worst < 1e-3
assert float((known - bound.value).mean()) > -5 * float(bound.mean().stderr)
assert float((found - mean).abs().max()) < 0.2

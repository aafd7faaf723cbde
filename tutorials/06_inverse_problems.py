# %% [markdown]
# # Inverse problems: one learned prior, many questions
#
# Something was seen of an image: a part, a coarse version, sums along rays. Learn what images are like, once; then
# $$ p(x \mid y) \propto p(x) \, q(y \mid A x) $$
# answers every question about them. The prior is a diffusion, which knows a denoiser $D$ and with it the score of noisy
# images; what was seen adds a term that pulls draws towards it, on their way from noise to image:
# $$ \nabla \log p_\sigma(x \mid y) = \frac{D(x, \sigma) - x}{\sigma^2} + \nabla_x \log p(y \mid x_\sigma = x). $$
# The last term is an integral over all images that $x$ may be a noisy version of. Approximations of it have names: DPS
# (Chung et al. 2023) puts $D(x, \sigma)$ for $x_0$; PiGDM (Song et al. 2023) a Gaussian around it; TDS (Wu et al. 2023)
# takes such an approximation as a proposal, and weighs particles for what it gets wrong.

# %%
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch

import pgen
from pgen import pictures
from pgen.zoo import DenoisingDiffusion, Measured, downsample, fourier, greyscale, mask, radon
from pgen.zoo.datasets import cifar10_subset, digits

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="inverse-"))  # for pictures


def learned(x, image, steps, width):
    program = DenoisingDiffusion(x.shape[1], image=image, width=width, sigma_data=float(x.std()))
    run = pgen.Run(steps=steps, batch_size=32, lr=3e-3, progress=False)
    fitted = pgen.fit(program, {"x": x}, "score", run=run, seed=0)
    print(fitted.history)
    return fitted.law("x")  # a distribution with what was learned, to be used in any program


def asked(program, x, kind="pigdm", **options):
    y = program.seen(x) + program.noise * torch.randn_like(
        program.seen(x)
    )  # what we pretend to have measured
    backend = pgen.backend("score", posterior=kind, levels=40, **options)
    return y, pgen.fit(program, None, backend).posterior({"y": y}, n=16, seed=0)["x"]


def rms(of, x):
    return float((of - x).square().mean().sqrt())


def answered(name, program, x):
    y, drawn = asked(program, x)
    plain = program.operator.pseudo_inverse(y).flatten(1)  # of the images that fit y, the least
    off = rms(drawn.mean(0), x), rms(plain, x)
    print(f"{name}: mean of draws off by {off[0]:.3f}; without a prior, by {off[1]:.3f}")
    rows = {"truth": x, "seen": plain, "mean": drawn.mean(0), "a draw": drawn[0], "another": drawn[1]}
    rows = {k: v.reshape(-1, *program.image) / 2 + 0.5 for k, v in rows.items()}
    spread = drawn.std(0).reshape(-1, *program.image) * 2  # a map of uncertainty
    pictures.compare_images({**rows, "spread": spread}, folder / f"{name}.png", columns=len(x))
    return off


# %% [markdown]
# ## Digits: a hole, and four pixels made one
#
# `Measured(law, A, noise)` is two statements: `x ~ law`, and `y ~ Normal(A x, noise)`. The question changes, the prior
# does not: no network is trained for a question. Draws differ where the data leaves it open: their spread is drawn too.

# %%
data = digits()
train, test = (part["x"] / 8 - 1.0 for part in (data.train, data.test))
law, errors = learned(train, (8, 8), steps=400, width=16), []
for name, operator in {"hole": mask((8, 8), "centre", share=0.6), "coarse": downsample((8, 8))}.items():
    errors.append(answered(name, Measured(law, operator, noise=0.1, image=(8, 8)), test[:8]))

# %% [markdown]
# ## Tomography: the same program under three algorithms
#
# Phantoms are three ellipses, one over the other. Seen are sums along parallel rays at six angles: 96 noisy numbers for
# 256 pixels. Least squares shows streaks; the prior knows that there are none.


# %%
def phantoms(n):
    row, column = torch.arange(16.0)[:, None], torch.arange(16.0)
    image = torch.full((n, 16, 16), -1.0)
    for value in (0.0, 0.5, 1.0):
        centre, axes = 4.5 + 7 * torch.rand(n, 2, 1, 1), 1.5 + 3 * torch.rand(n, 2, 1, 1)
        turn, y, x = torch.pi * torch.rand(n, 1, 1), row - centre[:, 0], column - centre[:, 1]
        along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
        image = torch.where((along / axes[:, 0]) ** 2 + (across / axes[:, 1]) ** 2 < 1, value, image)
    return image.flatten(1)


law, x = learned(phantoms(4000), (16, 16), steps=400, width=16), phantoms(4)
program = Measured(law, radon((16, 16), 6), noise=0.5, image=(16, 16))
shown, off = {"truth": x}, {}
print("       off by   90% intervals cover  seconds")
for kind, options in {"dps": {}, "pigdm": {}, "tds": {"particles": 32}}.items():
    began = time.time()
    torch.manual_seed(1)  # the same y for all
    with warnings.catch_warnings(record=True) as said:
        y, drawn = asked(program, x, kind, **options)
    low, high = drawn.quantile(0.05, 0), drawn.quantile(0.95, 0)
    off[kind], covered = rms(drawn.mean(0), x), float(((low <= x) & (x <= high)).float().mean())
    warned = {w.category.__name__ for w in said}
    print(f"{kind:6}{off[kind]:7.3f}{covered:22.2f}{time.time() - began:9.1f}", *warned)
    shown |= {"least squares": program.operator.pseudo_inverse(y).flatten(1)}
    shown |= {f"{kind}: mean": drawn.mean(0), f"{kind}: a draw": drawn[0]}
    shown |= {f"{kind}: spread": drawn.std(0)}
errors.append((max(off.values()), rms(shown["least squares"], x)))
print(f"least squares: off by {errors[-1][1]:.3f}")
pictures.compare_images(shown, folder / "tomography.png", columns=4)

# %% [markdown]
# Intervals tell how far to trust a picture: where truth lies outside of them more often than one time in ten, an
# algorithm is too sure. TDS alone is exact with many particles; with 32 it says so itself where few of them counted.
#
# The operator of magnetic resonance, some rows of the Fourier transform, is a change of one line.

# %%
resonance = Measured(law, fourier((16, 16), share=0.4), noise=0.1, image=(16, 16))
errors.append(answered("resonance", resonance, x))

# %% [markdown]
# ## Colours
#
# If the environment variable `PGEN_DATA` names a folder that holds `cifar10_jpeg_subset.npz`: photographs, 16 x 16, and
# a prior from 1,800 of them in two or three minutes. That is enough for draws that are plausible in colour and texture,
# each different where nothing was seen, and not for good pictures: in squares, grey is about as near as their mean.

# %%
if "PGEN_DATA" in os.environ:
    data, size = cifar10_subset(Path(os.environ["PGEN_DATA"])), (3, 16, 16)
    whole = (part["x"].reshape(-1, 3, 32, 32) / 127.5 - 1 for part in (data.train, data.test))
    train, test = map(downsample((3, 32, 32)), whole)
    law = learned(torch.cat([train, train.flip(-1)]).flatten(1), (16, 16), steps=800, width=32)
    for operator in (mask(size, "centre"), downsample(size), greyscale(size, [1 / 3] * 3)):
        program = Measured(law, operator, noise=0.05, image=size)
        answered(type(operator).__name__, program, test[::62].flatten(1)[:8])
else:
    print("colours: left out, as PGEN_DATA names no folder")
print("pictures in", folder)
assert all(mean < 0.7 * plain for mean, plain in errors)

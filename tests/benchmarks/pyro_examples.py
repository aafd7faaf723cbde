"""Pyro's own example programs, unchanged, under pgen and under plain Pyro: loss beside loss.

    python -m tests.benchmarks.pyro_examples --pyro path/to/a/checkout/of/pyro [--steps 1000] [name ...]

The programs (and, where they come with one, the guides) are imported from `examples/` of the checkout as they are.
Their data sets are replaced by small ones drawn here, the same for both sides, as are modules that the examples
import for plotting and downloading. Loss: minus the ELBO of the whole data in nats, the mean of 200 evaluations.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

import pgen

STAND_INS = ("matplotlib.pyplot", "pandas", "torchvision", "torchvision.datasets", "tqdm", "utils.mnist_cached",
             "utils.vae_plots", "visdom", "wget")  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One program with data, and what Pyro's example fits it with."""

    program: Callable[..., Any]
    data: tuple[Any, ...]
    guide: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()  # prefixes of the finite latents that Pyro's example sums out


def main() -> None:
    """Print one line per example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pyro", type=Path, required=True, help="a checkout of Pyro")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'example':34} {'guide':10} {'plain Pyro':>12} {'s':>6} {'pgen':>12} {'s':>6}")
    for name, make in examples(options.pyro / "examples"):
        if options.names and not any(n in name for n in options.names):
            continue
        torch.manual_seed(0)
        example = make()
        theirs, their_seconds = plain(example, options.steps)
        ours, our_seconds = by_pgen(example, options.steps)
        guide = "its own" if example.guide is not None else "automatic"
        print(
            f"{name:34} {guide:10} {theirs:12.2f} {their_seconds:6.1f} {ours:12.2f} {our_seconds:6.1f}",
            flush=True,
        )


def plain(example: Example, steps: int) -> tuple[float, float]:
    """Minus the ELBO after training by Pyro's SVI and Adam, and the seconds that took."""
    start = time.perf_counter()
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        model = poutine.infer_config(example.program, lambda site: _enumerated(example, site))
        visible = poutine.block(model, hide_fn=lambda site: bool(_enumerated(example, site)))
        guide = example.guide or AutoNormal(visible)
        elbo = TraceEnum_ELBO(max_plate_nesting=2) if example.hidden else Trace_ELBO()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        for _ in range(steps):
            svi.step(*example.data, *example.args, **example.kwargs)
        seconds = time.perf_counter() - start
        losses = [svi.evaluate_loss(*example.data, *example.args, **example.kwargs) for _ in range(200)]
    return sum(losses) / len(losses), seconds


def _enumerated(example: Example, site: Any) -> dict[str, Any]:
    return {"enumerate": "parallel"} if any(site["name"].startswith(s) for s in example.hidden) else {}


def by_pgen(example: Example, steps: int) -> tuple[float, float]:
    """Minus the ELBO after training by pgen, and the seconds that took."""
    start = time.perf_counter()
    backend = pgen.backend("variational", guide=example.guide or "auto", evaluation_particles=200)
    run = pgen.Run(steps=steps, lr=0.01, batch_size=100_000, progress=False)
    data = example.data[0] if len(example.data) == 1 else example.data
    fitted = pgen.fit(
        example.program, data, backend, args=example.args, kwargs=example.kwargs, run=run, seed=0
    )
    seconds = time.perf_counter() - start
    return -float(fitted.log_prob(seed=0).value.sum()), seconds


def examples(folder: Path) -> Iterator[tuple[str, Callable[[], Example]]]:
    """The examples by name, each made when asked for."""
    load = functools.partial(_load, folder)

    def vae() -> Example:
        net = load("vae/vae.py").VAE(z_dim=5, hidden_dim=50)
        images = (torch.rand(100, 1, 28, 28) < torch.rand(100, 1, 1, 1)).float()
        return Example(net.model, (images,), net.guide)

    def baseball(model: str) -> Example:
        hits = torch.tensor([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7.0])
        return Example(getattr(load("baseball.py"), model), (torch.full((18,), 45.0), hits))

    def schools() -> Example:
        module = load("eight_schools/svi.py")
        return Example(module.model, (module.data,), module.guide)

    def capture() -> Example:
        history, sex = (torch.rand(50, 7) < 0.4).float(), (torch.rand(50) < 0.5).float()
        return Example(load("capture_recapture/cjs.py").model_1, (history, sex), hidden=("z_",))

    def hmm() -> Example:
        rolls, lengths = (torch.rand(10, 8, 12) < 0.2).float(), torch.randint(4, 9, (10,))
        return Example(
            load("hmm.py").model_1,
            (rolls, lengths.clamp(max=8)),
            args=(types.SimpleNamespace(hidden_dim=4, jit=False),),
            hidden=("x_",),
        )

    def lda() -> Example:
        module = load("lda.py")
        sizes = types.SimpleNamespace(
            num_topics=4, num_words=30, num_docs=40, num_words_per_doc=16, layer_sizes="20-20"
        )
        words = module.model(args=sizes)[2]
        guide = functools.partial(module.parametrized_guide, module.make_predictor(sizes))
        return Example(module.model, (words,), guide, kwargs={"args": sizes}, hidden=("word_topics",))

    def regression() -> Example:
        module = load("svi_torch.py").Model(200)
        covariates = torch.randn(200)
        return Example(module, (covariates, module(covariates).detach()))

    yield "vae/vae.py", vae
    yield "eight_schools/svi.py", schools
    for model in ("fully_pooled", "not_pooled", "partially_pooled", "partially_pooled_with_logit"):
        yield f"baseball.py {model}", functools.partial(baseball, model)
    yield "capture_recapture/cjs.py model_1", capture
    yield "hmm.py model_1", hmm
    yield "lda.py", lda
    yield "svi_torch.py Model", regression


def _load(folder: Path, path: str) -> Any:
    """An example as a module; what it needs only for plots and downloads is replaced."""
    for name in STAND_INS:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    sys.path.insert(0, str((folder / path).parent))
    spec = importlib.util.spec_from_file_location(
        "pyro_example_" + path.replace("/", "_")[:-3], folder / path
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder / path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()

"""Effective samples per second beside the peers, everything in one run.

    python -m tests.benchmarks.mcmc --peers PYTHON [--rows 'schools/*' ...] [--cores 1|2] [--out FILE]
    python -m tests.benchmarks.mcmc --table FILE

Every cell is a fresh process. The rows of one model run in turn, `--repeats` times over, so that a busy
machine hurts all alike; the load average is printed beside each. `--out` appends the figures as lines of JSON,
so that a row can be run again alone; `--table` prints what a file holds, medians over what was repeated.

PYTHON is an interpreter that has numpyro, blackjax, optax, nutpie and pymc; without `--peers` only pgen
runs. A row of pgen is `pgen`, `pgen:KERNEL` or `pgen:KERNEL:CHAINS:WARMUP:DRAWS`, with `@float64` where the
program is to be in double precision too, and `+inductor` where recordings are compiled before they are used, into a
cache that is empty at first, as those of the peers are. The columns: `cold` counts stating, recording or compiling, warm-up and draws; `compiled` a second
run, warm-up and draws, with what the first compiled; `draws` the draws alone; `process` is the wall time of
the first process with its imports. ESS is the smallest bulk ESS over all coordinates, by one estimator for all.
Where R-hat exceeds 1.05, the chains had not converged and ESS per second says nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.ops.integrator
import torch
from arviz_stats.base import array_stats
from pyro.infer import MCMC, NUTS
from rich.console import Console
from rich.table import Table

import pgen
from tests.benchmarks import mcmc_peers as peers
from tests.benchmarks.mcmc_peers import MODELS, Outcome, once

PGEN = ("pgen", "pgen+inductor", "pgen:nuts", "pgen:chees", "pgen:meads")
PYRO = ("pyro1", "pyro1-jit")
LIMIT = 240


# --- the models, as a Pyro user writes them ----------------------------------------------------------------


def program(name: str, dtype: torch.dtype) -> Callable[[], None]:
    """The model, in Pyro, over data of that precision."""

    def a(values):
        return torch.as_tensor(np.asarray(values), dtype=dtype)

    x, y, y8, s8, yh, ym, ys = map(a, (peers.X, peers.Y, peers.Y8, peers.S8, peers.YH, peers.YM, peers.YS))
    tril, sticky = map(a, (peers.TRIL, peers.STICKY))

    def schools() -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        pyro.sample("y", dist.Normal(mu + tau * z, s8).to_event(1), obs=y8)

    def logistic() -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([25]).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=x @ b).to_event(1), obs=y)

    def hier50() -> None:
        mu, lt = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("lt", dist.Normal(0.0, 1.0))
        th = pyro.sample("th", dist.Normal(mu, lt.exp()).expand([48]).to_event(1))
        pyro.sample("y", dist.Normal(th, 1.0).to_event(1), obs=yh)

    def corr100() -> None:
        pyro.sample("x", dist.MultivariateNormal(tril.new_zeros(100), scale_tril=tril))

    def levels() -> torch.Tensor:
        low, gap = pyro.sample("low", dist.Normal(-1.0, 2.0)), pyro.sample("gap", dist.LogNormal(1.0, 0.5))
        return torch.stack([low, low + gap])

    def mixture() -> None:
        w, loc = pyro.sample("w", dist.Dirichlet(torch.ones(2, dtype=dtype))), levels()
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5).expand([2]).to_event(1))
        with pyro.plate("data", len(ym)):
            k = pyro.sample("k", dist.Categorical(w))
            pyro.sample("y", dist.Normal(loc[k], scale[k]), obs=ym)

    def hmm() -> None:
        rows, level = pyro.sample("rows", dist.Dirichlet(sticky).to_event(1)), levels()
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        state = torch.tensor(0)
        for t in pyro.markov(range(len(ys))):
            state = pyro.sample(f"s{t}", dist.Categorical(rows[state]))
            pyro.sample(f"y{t}", dist.Normal(level[state], scale), obs=ys[t])

    return locals()[name]


# --- one cell ----------------------------------------------------------------------------------------------


def pgen_run(row: str, model: str, seed: int) -> Outcome:
    """The public API alone."""
    row, _, precision = row.partition("@")
    row, _, compiler = row.partition("+")
    dtype = torch.float64 if precision == "float64" else torch.float32
    kernel, *counts = row.split(":")[1:] or [None]
    options = {"kernel": kernel} if kernel else {}
    options |= dict(zip(("chains", "warmup", "draws"), map(int, counts)))

    def fit(seed: int) -> tuple[Any, Any]:
        run = pgen.Run(progress=False, precision=precision or None, compile=compiler or "auto")
        fitted = pgen.fit(program(model, dtype), None, pgen.backend("mcmc", **options), run=run, seed=seed)
        # the peers have no finite latents to draw, so that pgen draws them outside the clock
        return fitted, None if model in ("mixture", "hmm") else fitted.draws()

    cold, (first, _) = once(lambda: fit(seed))
    compiled, (again, drawn) = once(lambda: fit(seed + 1))
    found = (drawn or again.draws()).to_arviz()["posterior"]
    finite = ("k", *(f"s{t}" for t in range(len(peers.YS))))
    draws = {k: np.asarray(v.values) for k, v in found.data_vars.items() if k not in finite}
    warm, drawing = phases(again.history)
    chains = next(iter(draws.values())).shape[0]
    figures = {"cold_s": cold, "compiled_s": compiled, "draw_s": drawing, "warmup_s": warm}
    figures |= {"cold_fit_s": first.history.seconds, "threads": torch.get_num_threads()}
    if "n_steps" in again.history:  # means over the chains
        figures["gradients"] = int(again.history["n_steps"].sum() * chains)
    return draws, figures


def phases(history: Any) -> tuple[float, float]:
    """Seconds of warm-up and of draws: the series "seconds" runs on from the end of warm-up, evenly."""
    seconds = history["seconds"]
    total = float(seconds[-1])
    warm = max(0.0, float(2 * seconds[0] - seconds[1]))
    return warm, total - warm


def pyro_run(row: str, model: str, seed: int) -> Outcome:
    """NUTS, one chain and short, for Pyro's chains are processes that cost the same each."""
    torch.set_num_threads(1)  # the best for these sizes
    pyro.set_rng_seed(seed)
    jit = row.endswith("jit")
    warmup, count = {"schools": (300, 500), "corr100": (100, 200), "hmm": (30, 30)}.get(model, (200, 300))
    gradient, gradients, marks = pyro.ops.integrator.potential_grad, itertools.count(), {}

    def counting(*args):
        return (next(gradients), gradient(*args))[1]

    pyro.ops.integrator.potential_grad = counting

    def mark(kernel, params, stage, i):
        return marks.setdefault(stage, (time.perf_counter(), next(gradients)))

    kernel = NUTS(program(model, torch.float32), jit_compile=jit, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=count, warmup_steps=warmup, disable_progbar=True, hook_fn=mark)
    cold, _ = once(mcmc.run)
    end, (began, before) = time.perf_counter(), marks["Sample"]
    draws = {k: v.numpy() for k, v in mcmc.get_samples(group_by_chain=True).items()}
    figures = {"cold_s": cold, "draw_s": end - began, "gradients": next(gradients) - before - 2}
    return draws, figures if jit else {**figures, "compiled_s": cold}


def worker(row: str, model: str, seed: int, path: str) -> None:
    """Run a cell in this process: draws to a file, figures to stdout."""
    draws, figures = (pgen_run if row.startswith("pgen") else pyro_run)(row, model, seed)
    np.savez(path, **draws)
    print(json.dumps(figures), flush=True)


# --- side by side ------------------------------------------------------------------------------------------


def diagnose(draws: dict[str, np.ndarray]) -> dict[str, Any]:
    """Smallest bulk ESS and largest R-hat over all coordinates of `[chains, draws, ...]`."""
    arrays = [np.asarray(v, np.float64) for v in draws.values()]
    ess = min(float(np.min(array_stats.ess(a, 0, 1, method="bulk"))) for a in arrays)
    several = arrays[0].shape[0] > 1
    rhat = max(float(np.max(array_stats.rhat(a, 0, 1))) for a in arrays) if several else None
    return {"chains": arrays[0].shape[0], "draws": arrays[0].shape[1], "ess": ess, "rhat": rhat}


def cell(row: str, model: str, seed: int, interpreter: str | None) -> dict[str, Any]:
    """The figures of one fresh process."""
    found: dict[str, Any] = {"model": model, "row": row, "seed": seed, "load": round(os.getloadavg()[0], 1)}
    found["cores"] = len(os.sched_getaffinity(0))
    own = [sys.executable, "-m", "tests.benchmarks.mcmc", "--worker"]
    peer = [interpreter or "", peers.__file__]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draws.npz"
        command = [*(peer if row in peers.ROWS else own), row, model, str(seed), str(path)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        if row.startswith("pgen"):
            environment["XDG_CACHE_HOME"] = folder  # nothing is compiled yet
        try:
            ran, out = once(
                lambda: subprocess.run(
                    command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False
                )
            )
        except subprocess.TimeoutExpired:
            return {**found, "error": f"over {LIMIT} s"}
        lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
        if out.returncode or not lines:
            said = [line for line in out.stderr.splitlines() if "Error" in line] or out.stderr.splitlines()
            return {**found, "error": (said or ["no output"])[-1][-300:]}
        found.update(json.loads(lines[-1]), process_s=ran)
        with np.load(path) as draws:
            found.update(diagnose(dict(draws)))
    return found


def rounded(value: Any) -> Any:
    """Five digits of a float."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def tabulate(lines: list[dict[str, Any]]) -> None:
    """One table per model: medians over what was repeated; the last error where nothing succeeded."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        cells.setdefault((line["model"], line["row"]), []).append(line)
    heads = ("chains x draws", "R-hat", "ESS", "cold s", "compiled s", "draws s", "ESS/gradient")
    heads += ("ESS/s cold", "ESS/s compiled", "ESS/s draws", "process s", "load", "runs")
    console = Console(width=190)
    for model in dict.fromkeys(m for m, _ in cells):
        table = Table("row", *heads, title=model)
        for (_, row), tries in ((k, v) for k, v in cells.items() if k[0] == model):
            good = [t for t in tries if "error" not in t]
            if not good:
                table.add_row(row, tries[-1]["error"])
                continue

            def middle(key: str, over: str | None = None, good: list[dict[str, Any]] = good) -> str:
                values = [
                    t[key] / (t[over] if over else 1) for t in good if t.get(key) and t.get(over or key)
                ]
                return f"{median(values):.4g}" if values else "-"

            shape = f"{good[-1]['chains']} x {good[-1]['draws']}"
            columns = [middle(k) for k in ("rhat", "ess", "cold_s", "compiled_s", "draw_s")]
            columns.append(middle("ess", "gradients"))
            columns += [middle("ess", k) for k in ("cold_s", "compiled_s", "draw_s")]
            load = "-".join(str(f(t["load"] for t in good)) for f in (min, max))
            table.add_row(row, shape, *columns, middle("process_s"), load, str(len(good)))
        console.print(table)


def main() -> None:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", help="interpreter that has the peers")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of MODEL/ROW")
    parser.add_argument("--add", nargs="+", default=[], help="further rows, as pgen:nuts:64:300:200")
    parser.add_argument("--cores", type=int, help="how many processors to use (default: all)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append figures to this file, as lines of JSON")
    parser.add_argument("--table", type=Path, help="only print what this file holds")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        row, model, seed, path = given.worker
        worker(row, model, int(seed), path)
        return
    if given.table:
        tabulate([json.loads(line) for line in given.table.read_text().splitlines()])
        return
    if given.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    rows = (*PGEN, *given.add, *((*PYRO, *peers.ROWS) if given.peers else ()))
    chosen = [
        (model, row)
        for model in MODELS
        for row in rows
        if any(fnmatch.fnmatchcase(f"{model}/{row}", pattern) for pattern in given.rows)
    ]
    lines = []
    for model in dict.fromkeys(m for m, _ in chosen):
        for repeat, (m, row) in itertools.product(range(given.repeats), chosen):
            if m != model:
                continue
            line = {k: rounded(v) for k, v in cell(row, model, 10 * repeat, given.peers).items()}
            print(json.dumps(line), flush=True)
            lines.append(line)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    tabulate(lines)


if __name__ == "__main__":
    main()

"""Wall time of exact sums: published Bayesian networks and ever longer hidden Markov chains, beside Pyro's.

    python tests/benchmarks/enumeration.py [FOLDER OF .bif.gz FILES]

For each: seconds to find the structure (once per program), to evaluate the evidence, all posterior marginals,
and a hundred joint posterior draws; then Pyro's own `TraceEnum_ELBO` loss and marginals, where it runs.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pgen.backends.exact import Exact
from pgen.fitting import fit
from pgen.run import Run
from pgen.zoo.bif import read_bif

QUIET = Run(progress=False)
LENGTHS = (250, 500, 1000, 2000)
PYRO_LENGTHS = (250,)  # its marginals take time quadratic in the length and worse: 46 s at 500
STATES = 8


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


def guide(*args: Any, **kwargs: Any) -> None:
    """Everything is enumerated in the model."""


def pyros(program: Callable[..., Any], nesting: int = 0) -> tuple[str, str, str]:
    """Seconds for Pyro's evidence and marginals, and its evidence; or why there are none."""
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting)
    hinted = config_enumerate(program)
    try:
        seconds, loss = clock(lambda: elbo.loss(hinted, guide))
        more, _ = clock(lambda: elbo.compute_marginals(hinted, guide))
    except Exception as error:
        return "-", "-", f"{type(error).__name__}: {str(error).splitlines()[0][:40]}"
    return f"{seconds:.3f}", f"{more:.3f}", f"{-loss:.6f}"


def ours(program: Callable[..., Any], data: Any, *args: Any) -> list[str]:
    seconds, fitted = clock(lambda: fit(program, None, Exact(), args=args, run=QUIET))
    evidence, estimate = clock(lambda: fitted.log_prob(data))
    marginals, _ = clock(lambda: fitted.marginals(data))
    draws, _ = clock(lambda: fitted.posterior(data, n=100))
    numbers = [seconds, evidence, marginals, draws]
    return [*(f"{n:.3f}" for n in numbers), f"{float(estimate.value):.6f}"]


def networks(folder: Path) -> Table:
    table = Table(
        "network", "nodes", "structure", "evidence", "marginals", "100 draws", "log p", title="networks"
    )
    for column in ("Pyro evidence", "Pyro marginals", "Pyro log p"):
        table.add_column(column)
    for path in sorted(folder.glob("*.bif*")):
        network = read_bif(path)
        with poutine.trace() as tracer:
            network.program()
        leaves = [n.name for n in network.nodes][len(network.nodes) // 2 :: 4]
        data = {name: tracer.trace.nodes[name]["value"] for name in leaves}
        with torch.random.fork_rng():
            row = ours(network.program, data)
        theirs = pyros(poutine.condition(network.program, data))
        table.add_row(path.name.split(".")[0], str(len(network.nodes)), *row, *theirs)
    return table


def chain(x: Tensor) -> None:
    move = torch.linspace(-1, 1, STATES**2).sin().reshape(STATES, STATES) * 3
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(logits=move[z]))
        pyro.sample(f"x_{t}", dist.Normal(z.float(), 1.0), obs=x[t])


def chains() -> Table:
    table = Table(
        "length", "structure", "evidence", "marginals", "100 draws", "log p", title="hidden Markov chains"
    )
    for column in ("Pyro evidence", "Pyro marginals", "Pyro log p"):
        table.add_column(column)
    for length in LENGTHS:
        x = torch.arange(length).mul(0.37).sin() * 3 + 3
        theirs = pyros(lambda x=x: chain(x)) if length in PYRO_LENGTHS else ("", "", "")
        table.add_row(str(length), *ours(chain, None, x), *theirs)
    return table


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=160)
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")
        if len(sys.argv) > 1:
            console.print(networks(Path(sys.argv[1])))
        console.print(chains())


if __name__ == "__main__":
    main()

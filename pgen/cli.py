"""The command line of pgen: which commands there are and what they take. What they do is in `pgen.commands`.

Help must come at once, and importing torch takes a second or two. So this file imports click alone, and each
command imports its work when it is called.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click


class _Stop(click.ClickException):
    """A deliberate error of pgen, shown without a traceback."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """One message, in red where the terminal has colours."""
        click.secho(f"Error: {self.message}", fg="red", err=True, file=file)


class _Pgen(click.Group):
    """The group of all commands: turns errors raised on purpose into messages, and warnings into lines."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except Exception as error:
                errors = sys.modules.get("pgen.errors")
                deliberate = errors is not None and isinstance(error, errors.PgenError)
                if not deliberate or ctx.params.get("debug"):
                    raise
                raise _Stop(str(error)) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.secho(f"Warning: {message}", fg="yellow", err=True)


@contextlib.contextmanager
def _disabled(names: tuple[str, ...]) -> Iterator[None]:
    """Plugins that are not to be imported, by the variable that the registry reads."""
    variable = "PGEN_DISABLE_PLUGINS"
    before = os.environ.get(variable)
    os.environ[variable] = ",".join([*([before] if before else []), *names])
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@click.group(
    cls=_Pgen,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="pgen-ppl", prog_name="pgen")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="no:NAME",
    help="Leave a plugin out (no:NAME), or insist on one (NAME).",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(ctx: click.Context, plugins: tuple[str, ...], debug: bool) -> None:
    """Write a generative model once, as a Pyro program; swap the inference.

    PROGRAM is the name of an installed program (`pgen list programs`), or `file.py:name`, which runs that
    file. DATA is the name of an installed data set, or a .npz, .csv or .safetensors file whose names are
    those of arguments or sites of the program.
    """
    ctx.with_resource(_disabled(tuple(p.removeprefix("no:") for p in plugins if p.startswith("no:"))))
    if wanted := [p for p in plugins if not p.startswith("no:")]:
        from pgen.commands.show import insist_on

        insist_on(wanted)


# --- options that several commands take -------------------------------------------------------------------


def _together(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Makes everything repeatable.")
_program = _together(
    click.argument("program"),
    click.option(
        "--arg",
        "arguments",
        multiple=True,
        metavar="KEY=VALUE",
        help="An argument of the program; `pgen list programs` shows those of each.",
    ),
)
_data = _together(
    click.option("--data", metavar="DATA", help="Name of a data set, or a file."),
    click.option(
        "--data-folder",
        type=click.Path(file_okay=False, exists=True, path_type=Path),
        help="Where the raw files of the data set are.",
    ),
)
_split = click.option("--split", metavar="NAME", help="Which part of the data set.  [default: train, or all]")
_run = _together(
    click.option(
        "--run",
        "run_words",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any field of pgen.Run, for example --run ema=0.999.",
    ),
    click.option("--steps", type=int, help="Optimiser steps."),
    click.option("--batch-size", type=int, help="Rows per step."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--validation", metavar="SPLIT|FRACTION", help="Rows to watch but not to learn from."),
    click.option("--patience", type=int, help="Stop after so many looks at them without a new best."),
    click.option("--device", metavar="DEVICE", help="Where to compute, for example cuda."),
)


# --- commands ---------------------------------------------------------------------------------------------


@main.command()
@_program
@_data
@_split
@click.option("--backend", metavar="NAME", help="How to fit.  [default: the best offer]")
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the backend; `pgen list backends` shows those of each.",
)
@_run
@_seed
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run directory.  [default: runs/PROGRAM-BACKEND]",
)
@click.option("--force", is_flag=True, help="Replace a run directory that exists.")
@_json
def fit(**given: Any) -> None:
    """Fit PROGRAM to data, and write a run directory.

    It holds config.json, metrics.jsonl, fit/ (what was learned), samples.png and loss.png; for Markov chains,
    traces.png and chains/, from which a run that was killed goes on. Ctrl-C stops early and keeps what was
    learned.
    """
    from pgen.commands.fit import fit

    fit(**given)


@main.command()
@_program
@_data
@_split
@_json
def explain(**given: Any) -> None:
    """What every installed backend would answer about PROGRAM, or which site lacks what."""
    from pgen.commands.ask import explain

    explain(**given)


@main.command()
@_program
@_data
@_split
@click.option(
    "--backend",
    "backends",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="A backend, with options if need be: 'variational objective=iwae'.",
)
@click.option(
    "--test", metavar="SPLIT", help="Part of the data set to evaluate on.  [default: test, if there is one]"
)
@_run
@_seed
@_json
def compare(**given: Any) -> None:
    """Fit PROGRAM by several backends, and evaluate each on the same data."""
    from pgen.commands.ask import compare

    compare(**given)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=64, show_default=True, help="How many draws."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .npz, .safetensors or .png file to write them to.",
)
@click.option("--program", metavar="FILE.py:NAME", help="The program, where the run was made from a file.")
@_seed
@_json
def sample(**given: Any) -> None:
    """Draw from the fit in the run directory RUN."""
    from pgen.commands.ask import sample

    sample(**given)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_data
@click.option("--split", metavar="NAME", help="Which part of the data set.  [default: test, if there is one]")
@click.option("--program", metavar="FILE.py:NAME", help="The program, where the run was made from a file.")
@_seed
@_json
def evaluate(**given: Any) -> None:
    """Evaluate the fit in the run directory RUN on held-out data."""
    from pgen.commands.ask import evaluate

    evaluate(**given)


@main.command("list")
@click.argument(
    "kind",
    required=False,
    type=click.Choice(["programs", "datasets", "backends", "conversions", "observers"]),
)
@_json
def list_(**given: Any) -> None:
    """What is installed: programs, data sets, backends, conversions, observers."""
    from pgen.commands.show import list_installed

    list_installed(**given)


@main.group(invoke_without_command=True)
@_json
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """Installed plugins: list them, check one in a process of its own, start a new one."""
    if ctx.invoked_subcommand is None:
        from pgen.commands.show import list_plugins

        list_plugins(as_json)


@plugins.command("list")
@_json
def plugins_list(**given: Any) -> None:
    """Name, distribution, version, hooks and state of every plugin."""
    from pgen.commands.show import list_plugins

    list_plugins(**given)


@plugins.command("check")
@click.argument("name")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait.")
@_json
def plugins_check(**given: Any) -> None:
    """Import plugin NAME and ask its hooks, in a process of its own."""
    from pgen.commands.show import check

    check(**given)


@plugins.command("new")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.  [default: ./pgen-NAME]",
)
def plugins_new(**given: Any) -> None:
    """Write a package with a working backend called NAME, to be installed and changed."""
    from pgen.commands.show import new

    new(**given)


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("pgen-demo"),
    show_default=True,
    help="Where pictures go.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--effort",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor of the number of steps.",
)
@_json
def demo(**given: Any) -> None:
    """The main job, in two minutes: one program on real digits, fitted in several ways, and one table."""
    from pgen.commands.demo import demo

    demo(**given)


if __name__ == "__main__":
    main()

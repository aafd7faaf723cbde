"""What commands print: tables and sentences for people, JSON for scripts; the rest goes to standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgen.comparison import ComparisonRow


def emit(value: Any) -> None:
    """Print JSON; numbers that are not finite become null."""
    click.echo(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Print a line."""
    click.echo(text)


def show(printable: Any) -> None:
    """Print what rich can render, as wide as it needs where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(printable)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table of plain texts."""
    made = Table(*columns, title=title, title_justify="left")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    show(made)


def row_numbers(row: ComparisonRow) -> dict[str, Any]:
    """What a row of a comparison says, without the fit itself."""
    keys = ("name", "kind", "measure", "nats", "stderr", "bits_per_dim", "distance", "seconds", "note")
    return {key: getattr(row, key) for key in keys}


def finite(value: Any) -> Any:
    """The same, with None for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value

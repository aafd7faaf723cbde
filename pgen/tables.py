"""What the tables of pgen share: how they become plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def as_text(table: RenderableType, width: int = 140) -> str:
    """A rich renderable as plain text."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(table)
    return out.getvalue()

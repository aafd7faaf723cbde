"""`pgen list` and `pgen plugins`: what is installed, who provides it, and whether it works."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pgen.commands.options import default_of
from pgen.commands.output import emit, say, table
from pgen.commands.plugin_check import check_plugin
from pgen.commands.scaffold import write_plugin
from pgen.errors import PluginError, UnknownName
from pgen.registry import Registry


def insist_on(names: Iterable[str]) -> None:
    """Plugins that the user named must be there and work.

    Raises:
        PluginError: one of them was left out.
        UnknownName: there is none of that name.
    """
    registry = Registry.installed()
    for name in names:
        found = [p for p in registry.plugins if p.answers_to(name)]
        if not found:
            raise UnknownName(
                f"--plugin {name}: no plugin of that name is installed. Installed: "
                f"{', '.join(p.name for p in registry.plugins)}"
            )
        if left_out := [p for p in found if p.state != "active"]:
            raise PluginError(left_out[0].report) from left_out[0].error


def list_installed(kind: str | None, as_json: bool) -> None:
    """What the plugins provide, of one kind or of all."""
    registry = Registry.installed()
    kinds = [kind] if kind else ["programs", "datasets", "backends", "conversions", "observers"]
    found = {k: [_described(thing) for thing in registry.provided if f"{thing.kind}s" == k] for k in kinds}
    if as_json:
        emit(found if kind is None else found[kind])
        return
    for title, rows in found.items():
        if kind is None and not rows:
            continue
        table(
            ["name", "from", "takes", "what it is"],
            [[r["name"], r["distribution"], _takes(r["options"]), r["what"]] for r in rows],
            title=title,
        )


def list_plugins(as_json: bool) -> None:
    """Every plugin: name, distribution, version, hooks, state."""
    rows = [
        {
            "name": p.name,
            "distribution": p.distribution,
            "version": p.version,
            "origin": p.origin,
            "hooks": list(p.hooks),
            "state": p.state,
            "why": p.why,
        }
        for p in Registry.installed().plugins
    ]
    if as_json:
        emit(rows)
        return
    columns = ["name", "distribution", "version", "origin", "hooks", "state", "why"]
    shown = [[", ".join(v) if isinstance(v, list) else v for v in (row[c] for c in columns)] for row in rows]
    keep = [i for i, c in enumerate(columns) if c != "why" or any(row[i] for row in shown)]
    table([columns[i] for i in keep], [[row[i] for i in keep] for row in shown])


def check(name: str, timeout: float, as_json: bool) -> None:
    """Try one plugin in a process of its own; exit code 1 if something is wrong with it."""
    result = check_plugin(name, timeout)
    if as_json:
        emit({f.name: getattr(result, f.name) for f in fields(result)})
    else:
        say(str(result))
        if result.output:
            say(result.output)
    if not result.ok:
        raise SystemExit(1)


def new(name: str, into: Path | None) -> None:
    """Write the package of a new plugin."""
    folder = write_plugin(name, into)
    say(
        f"wrote {folder}: a package with a working backend {name!r}. Next:\n  cd {folder}\n  pip install -e "
        "'.[test]'\n  python -m pytest\n  pgen plugins"
    )


def _described(thing: Any) -> dict[str, Any]:
    text = inspect.getdoc(thing.value) if callable(thing.value) else _conversion(thing.value)
    return {
        "name": thing.name,
        "distribution": thing.plugin.distribution,
        "version": thing.plugin.version,
        "options": _options(thing),
        "what": (text or "").strip().partition("\n\n")[0].replace("\n", " "),
    }


def _options(thing: Any) -> dict[str, str]:
    """What can be said after `--set` (backends) or `--arg` (programs), with defaults."""
    if thing.kind == "backend":
        return {f.name: default_of(f) for f in fields(thing.value) if f.init}
    if thing.kind == "program":
        return _arguments(thing.value)
    return {}


def _arguments(maker: Callable[..., Any]) -> dict[str, str]:
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(maker).parameters
    except (TypeError, ValueError):
        return {}
    empty = inspect.Parameter.empty
    return {name: "" if p.default is empty else str(p.default) for name, p in parameters.items()}


def _takes(options: Mapping[str, str]) -> str:
    return ", ".join(f"{k}={v}" if v else k for k, v in options.items())


def _conversion(conversion: Any) -> str:
    needs = " + ".join(sorted(c.value for c in conversion.needs))
    return f"{needs} -> {conversion.gives.value}, {conversion.exactness.value}"

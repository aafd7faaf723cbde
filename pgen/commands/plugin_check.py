"""Trying a plugin in a process of its own: what no guard inside this process could survive, this one does.

    check_plugin("rejection") -> Check(ok=False, why="its process was killed by SIGSEGV", ...)

The child imports the one plugin beside the built-ins, asks its hooks, and compares the global state that a
plugin must leave alone before and after. A crash, an `os._exit` or an endless loop ends the child only.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pyro
import torch

from pgen.errors import OptionError, PgenError, UnknownName
from pgen.plugins.loader import Plugin, scan
from pgen.registry import Registry


@dataclass(frozen=True)
class Check:
    """What came of trying one plugin."""

    name: str
    distribution: str
    version: str
    ok: bool
    why: str
    """What is wrong; empty if nothing is."""
    provides: tuple[str, ...] = ()
    """What its hooks provide, as "backend rejection"."""
    seconds: float = 0.0
    output: str = ""
    """The end of what the child printed."""

    def __str__(self) -> str:
        who = f"plugin {self.name!r} of {self.distribution} {self.version}"
        if self.ok:
            return f"{who}: ok in {self.seconds:.1f} s; provides {', '.join(self.provides) or 'nothing'}"
        return f"{who}: {self.why}"


def check_plugin(name: str, timeout: float = 60.0) -> Check:
    """Import a plugin and ask its hooks, in a process of its own.

    Args:
        name: its name, or `distribution:name` where two claim one name.
        timeout: seconds after which the child is ended.

    Raises:
        UnknownName: no installed distribution declares a plugin of that name.
        OptionError: several do, or the time limit is not positive.
    """
    if not timeout > 0:
        raise OptionError(f"timeout={timeout}: expected a positive number of seconds, such as timeout=60")
    plugin = _one(name)
    token = secrets.token_hex(8)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PGEN_STRICT_PLUGINS": "0",
        "PGEN_DISABLE_PLUGINS": ",".join(p.qualified for p in scan() if not p.builtin and p != plugin),
    }
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pgen.commands.plugin_check", plugin.qualified, token],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        why = f"it did not finish within {timeout:g} s: something in it waits or loops"
        return _check(plugin, why, time.perf_counter() - start, late.stdout or b"")
    seconds = time.perf_counter() - start
    lines = done.stdout.decode(errors="replace").splitlines()
    answer = next((line.removeprefix(token) for line in lines if line.startswith(token)), None)
    if answer is None:
        return _check(plugin, _ending(done.returncode), seconds, done.stdout)
    found: dict[str, Any] = json.loads(answer)
    said = "\n".join(line for line in lines if found["why"] and not line.startswith(token))
    return _check(plugin, found["why"], seconds, said.encode(), tuple(found["provides"]))


def _one(name: str) -> Plugin:
    plugins = scan()
    found = [p for p in plugins if p.answers_to(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        names = ", ".join(p.name for p in plugins)
        raise UnknownName(f"no installed distribution declares a plugin called {name!r}. Installed: {names}")
    write = " or ".join(repr(p.qualified) for p in found)
    raise OptionError(f"{name!r} means {len(found)} plugins; write {write}")


def _check(plugin: Plugin, why: str, seconds: float, output: bytes, provides: tuple[str, ...] = ()) -> Check:
    text = output[-2000:].decode(errors="replace").strip()
    return Check(plugin.name, plugin.distribution, plugin.version, not why, why, provides, seconds, text)


def _ending(code: int) -> str:
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"it ended the process by itself, with exit code {code}, before its hooks had answered"


def _state() -> dict[str, object]:
    """What importing a plugin must not change for everybody else."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's random state": hash(torch.get_rng_state().numpy().tobytes()),
        "torch's gradient mode": torch.is_grad_enabled(),
        "Pyro's settings": pyro.settings.get(),
        "Pyro's parameter store": sorted(pyro.get_param_store()),
        "the working directory": os.getcwd(),
        "what Ctrl-C does": signal.getsignal(signal.SIGINT),
    }


def _child(name: str, token: str) -> None:
    """Load, ask, compare; print one line that the parent knows by its token."""
    before = _state()
    why, provides = "", list[str]()
    try:
        registry = Registry.installed()
        plugin = next(p for p in registry.plugins if p.qualified == name)
        why = "" if plugin.state == "active" else plugin.why
        provides = [f"{thing.kind} {thing.name}" for thing in registry.provided if thing.plugin == plugin]
    except PgenError as error:
        why = str(error)
    after = _state()
    if not why and (changed := [what for what in before if before[what] != after[what]]):
        why = f"importing it changes {', '.join(changed)} for everybody in the process"
    print(f"\n{token}{json.dumps({'why': why, 'provides': provides})}", flush=True)


if __name__ == "__main__":
    _child(*sys.argv[1:])

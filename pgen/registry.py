"""What is installed: the hooks that a plugin may implement, and the registry of what plugins provide.

A plugin is a module named in the entry-point group "pgen" of some distribution. It implements any of the
hooks below, as functions of the same name marked with `@pgen.hookimpl`; names starting with `pgen_` are
kept for hooks. pgen's own backends register in this way too:

    [project.entry-points.pgen]           # in the plugin's pyproject.toml
    rejection = "pgen_rejection"

    @pgen.hookimpl                        # in pgen_rejection.py
    def pgen_backends():
        return [Rejection]

A plugin is taken whole or not at all. One that fails is reported with a warning and left out, unless the
user asked for it by name: then its failure is an error. See `pgen.plugins.loader` for what is decided before any
import, and SECURITY.md for what this protects from (accidents) and what not (malice).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.utils import canonicalize_name

from pgen.errors import PgenError, PluginError, UnknownName
from pgen.plugins.loader import Plugin, cause, clash, guarded, judge, load, scan
from pgen.plugins.provided import KINDS, Provided, read

if TYPE_CHECKING:
    from pathlib import Path

    from pgen.conversion import Conversion
    from pgen.protocols import Backend

hookspec = pluggy.HookspecMarker("pgen")
hookimpl = pluggy.HookimplMarker("pgen")


@hookspec
def pgen_backends() -> Iterable[type[Backend]]:
    """Backends: classes with a class attribute `name`, `examine` and `fit`; see `pgen.Backend`."""
    return ()


@hookspec
def pgen_conversions() -> Iterable[Conversion]:
    """Conversions: edges from one capability of a distribution to another, usable by every backend."""
    return ()


@hookspec
def pgen_programs() -> Mapping[str, Callable[..., Any]]:
    """Programs by name: callables that make one, for the command line and the tutorials."""
    return {}


@hookspec
def pgen_datasets() -> Mapping[str, Callable[[Path | None], Any]]:
    """Data sets by name: callables that take a folder with the raw files, or None, and read the data."""
    return {}


@hookspec
def pgen_observers() -> Mapping[str, Callable[..., Any]]:
    """Observers by name: classes whose instances follow a run (loggers, plots)."""
    return {}


class PluginWarning(UserWarning):
    """A plugin that nobody asked for by name was left out."""


@dataclass(frozen=True, eq=False)
class Registry:
    """Everything that the installed plugins provide; a value, made by `Registry.installed()` or `.of()`.

    Names are looked up plain (`registry.backend("exact")`) or qualified by the distribution that provides
    them (`registry.backend("pgen-ppl:exact")`), which is how to choose when two plugins claim one name.

    >>> Registry.of().backends
    {}
    """

    plugins: tuple[Plugin, ...]
    provided: tuple[Provided, ...]

    @staticmethod
    def installed(disable: Collection[str] = ()) -> Registry:
        """The registry of this environment; made once, at the first fit or listing.

        Args:
            disable: names of plugins that must not be imported, as in the environment variable
                `PGEN_DISABLE_PLUGINS=name,distribution:name,distribution`, to which they are added.

        Raises:
            PluginError: a plugin failed and `PGEN_STRICT_PLUGINS=1` is set.
        """
        names = os.environ.get("PGEN_DISABLE_PLUGINS", "").split(",")
        disabled = frozenset(name.strip() for name in (*names, *disable)) - {""}
        strict = os.environ.get("PGEN_STRICT_PLUGINS", "") not in ("", "0")
        return _installed(disabled, strict, tuple(sys.path))

    @staticmethod
    def of(*modules: object) -> Registry:
        """A registry of just these modules (or objects with hook methods): no metadata is read.

        Raises:
            PluginError: one of them cannot be registered, or two provide the same name.
        """
        plugins: list[Plugin] = []
        provided: list[Provided] = []
        for module in modules:
            name = getattr(module, "__name__", type(module).__name__)
            plugin, things = _ask(Plugin(name, name, name, "(no version)", "given"), module)
            if why := _stolen(things, _names(provided)):
                raise PluginError(f"{plugin} cannot be registered: {why}")
            plugins.append(plugin)
            provided += things
        return Registry(tuple(plugins), tuple(provided))

    @functools.cached_property
    def backends(self) -> dict[str, type[Backend]]:
        """Backend classes by name, sorted."""
        return self._named("backend")

    @functools.cached_property
    def conversions(self) -> tuple[Conversion, ...]:
        """Conversions, sorted by name."""
        return tuple(self._named("conversion").values())

    @functools.cached_property
    def programs(self) -> dict[str, Callable[..., Any]]:
        """Makers of programs by name, sorted."""
        return self._named("program")

    @functools.cached_property
    def datasets(self) -> dict[str, Callable[[Path | None], Any]]:
        """Readers of data sets by name, sorted."""
        return self._named("dataset")

    @functools.cached_property
    def observers(self) -> dict[str, Callable[..., Any]]:
        """Makers of observers by name, sorted."""
        return self._named("observer")

    def backend(self, name: str) -> type[Backend]:
        """The backend class of that name; raises UnknownName or PluginError."""
        return self._find("backend", name)

    def conversion(self, name: str) -> Conversion:
        """The conversion of that name; raises UnknownName or PluginError."""
        return self._find("conversion", name)

    def program(self, name: str) -> Callable[..., Any]:
        """The maker of the program of that name; raises UnknownName or PluginError."""
        return self._find("program", name)

    def dataset(self, name: str) -> Callable[[Path | None], Any]:
        """The reader of the data set of that name; raises UnknownName or PluginError."""
        return self._find("dataset", name)

    def observer(self, name: str) -> Callable[..., Any]:
        """The maker of the observer of that name; raises UnknownName or PluginError."""
        return self._find("observer", name)

    def _named(self, kind: str) -> dict[str, Any]:
        """What is provided of a kind, by plain name; by qualified name where two claim the plain one."""
        things = [p for p in self.provided if p.kind == kind]
        claims = Counter(p.name for p in things)
        names = {p.name if claims[p.name] == 1 else p.qualified: p.value for p in things}
        return dict(sorted(names.items()))

    def _find(self, kind: str, name: str) -> Any:
        """What the user named: provided and unmistakable, or an error that says why not."""
        things = [t for t in (*self.provided, *self._settled(name)) if t.kind == kind and t.answers_to(name)]
        if len(things) > 1:
            raise PluginError(clash([t.plugin for t in things], f"both provide a {kind} called", name))
        if things:
            return things[0].value
        for plugin in self.plugins:
            if plugin.state != "active" and plugin.answers_to(name):
                raise PluginError(plugin.report) from plugin.error
        raise self._unknown(kind, name)

    def _settled(self, name: str) -> list[Provided]:
        """What plugins refused for a clash provide after all, where a qualified name settles the clash."""
        distribution, colon, _ = name.rpartition(":")
        builtins = [p for p in self.plugins if p.builtin]
        things: list[Provided] = []
        for plugin in self.plugins if colon else ():
            mine = canonicalize_name(plugin.distribution) == canonicalize_name(distribution)
            if mine and plugin.state == "refused":
                alone = judge([*builtins, replace(plugin, state="found", why="")])[-1]
                things += _take(alone, _reserved(builtins, self.provided))[1]
        return things

    def _unknown(self, kind: str, name: str) -> PgenError:
        names = list(self._named(kind))
        close = difflib.get_close_matches(name, names, n=1)
        message = f"no {kind} is called {name!r}" + (f"; did you mean {close[0]!r}?" if close else ".")
        message += f" Installed: {', '.join(names) or 'none'}."
        if left_out := [p for p in self.plugins if p.state in ("failed", "refused")]:
            message += f" Left out: {'; '.join(f'{p}, {p.state}: {p.why}' for p in left_out)}."
        return UnknownName(message)


@functools.cache
def _installed(disabled: frozenset[str], strict: bool, path: tuple[str, ...]) -> Registry:
    """Scan, judge, take: built-ins first, so that nobody can stand in their way; then report."""
    plugins: list[Plugin] = []
    provided: list[Provided] = []
    found = scan()
    if not any(plugin.builtin for plugin in found):
        raise PluginError(
            "this copy of pgen has no metadata, so not even its own backends can be found; "
            "install it: pip install -e . in its source tree, or pip install pgen-ppl"
        )
    for plugin in judge(found, disabled):
        taken = _reserved([p for p in found if p.builtin], provided)
        plugin, things = _take(plugin, {} if plugin.builtin else taken)
        plugins.append(plugin)
        provided += things
    registry = Registry(tuple(plugins), tuple(provided))
    for problem, error in _problems(registry):
        if strict:
            raise PluginError(problem) from error
        warnings.warn(problem, PluginWarning, stacklevel=3)
    for name in sorted(disabled):
        if not any(plugin.answers_to(name) for plugin in found):
            close = difflib.get_close_matches(name, [p.name for p in found], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            warnings.warn(f"no plugin called {name!r} is there to disable{hint}", PluginWarning, stacklevel=3)
    return registry


def _problems(registry: Registry) -> Iterator[tuple[str, BaseException | None]]:
    """What the user should hear about plugins that nobody asked for by name."""
    for plugin in registry.plugins:
        if plugin.state in ("failed", "refused"):
            yield f"pgen goes on without a plugin. {plugin.report}", plugin.error
    twins: dict[tuple[str, str], list[Plugin]] = {}
    for thing in registry.provided:
        twins.setdefault((thing.kind, thing.name), []).append(thing.plugin)
    for (kind, name), rivals in twins.items():
        if len(rivals) > 1:
            disable = " or ".join(f"PGEN_DISABLE_PLUGINS={p.qualified}" for p in rivals)
            yield f"{clash(rivals, f'both provide a {kind} called', name)}, or set {disable}", None


def _reserved(builtins: Iterable[Plugin], provided: Iterable[Provided]) -> dict[tuple[str, str], Plugin]:
    """The names that are the built-ins' own, loaded or not: (kind, name) -> who has it."""
    own = {("backend", p.name): p for p in builtins}
    return own | _names(thing for thing in provided if thing.plugin.builtin)


def _names(provided: Iterable[Provided]) -> dict[tuple[str, str], Plugin]:
    return {(thing.kind, thing.name): thing.plugin for thing in provided}


def _take(plugin: Plugin, taken: Mapping[tuple[str, str], Plugin]) -> tuple[Plugin, list[Provided]]:
    """Import a plugin that is still "found" and ask its hooks: in with all it has, or out with nothing."""
    if plugin.state != "found":
        return plugin, []
    module, error = load(plugin)
    if error is not None:
        return plugin.becomes("failed", f"it cannot be imported: {cause(error)}", error), []
    try:
        active, things = _ask(plugin, module)
    except PluginError as problem:
        return plugin.becomes("failed", str(problem), problem), []
    if why := _stolen(things, taken):
        return plugin.becomes("refused", why), []
    return active, things


def _stolen(things: Iterable[Provided], taken: Mapping[tuple[str, str], Plugin]) -> str | None:
    """Which name is already another's, or None."""
    for thing in things:
        if owner := taken.get((thing.kind, thing.name)):
            return f"its {thing.kind} {thing.name!r} bears a name that belongs to {owner}"
    return None


def _ask(plugin: Plugin, module: object) -> tuple[Plugin, list[Provided]]:
    """The plugin, active, with what its hooks provide; raises PluginError where a hook is at fault.

    Each plugin has a pluggy manager of its own, so that none can wrap, block or outrun another.
    """
    manager = pluggy.PluginManager("pgen")
    manager.add_hookspecs(sys.modules[__name__])
    _, error = guarded(lambda: manager.register(module, plugin.name))
    if error is not None:
        raise PluginError(f"its hooks have the wrong signature: {cause(error)}") from error
    hooks = sorted(manager.get_hookcallers(module) or (), key=lambda hook: hook.name)
    _check_names(manager, module, hooks)
    active = replace(plugin, state="active", hooks=tuple(hook.name for hook in hooks if hook.spec))
    things: list[Provided] = []
    for hook in hooks:
        for implementation in hook.get_hookimpls() if hook.spec else ():
            answer, error = guarded(implementation.function)
            if error is not None:
                raise PluginError(f"its hook {hook.name} raised {cause(error)}") from error
            named, error = guarded(functools.partial(read, hook.name, answer))
            if error is not None:
                raise PluginError(f"its hook {hook.name} must return {error}") from error
            things += [
                Provided(KINDS[hook.name], name, value, active) for name, value in (named or {}).items()
            ]
    return active, things


def _check_names(manager: pluggy.PluginManager, module: object, hooks: list[pluggy.HookCaller]) -> None:
    """Every function called `pgen_...` is a hook that exists, marked, and not a wrapper of others'."""
    for hook in hooks:
        for implementation in hook.get_hookimpls():
            if not hook.spec and not implementation.optionalhook:
                close = difflib.get_close_matches(hook.name, KINDS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(KINDS)}"
                raise PluginError(f"it implements {hook.name!r}, which is no hook of pgen; {hint}")
            if implementation.wrapper or implementation.hookwrapper:
                raise PluginError(f"its {hook.name} is a hook wrapper; a plugin of pgen only provides")
    own = getattr(module, "__name__", type(module).__module__)
    for name in dir(module):
        function = inspect.getattr_static(module, name)
        if not (name.startswith("pgen_") and inspect.isfunction(function) and function.__module__ == own):
            continue
        if manager.parse_hookimpl_opts(module, name) is None:
            raise PluginError(f"its function {name!r} is not marked as a hook; write @pgen.hookimpl above it")
    if not hooks:
        raise PluginError(
            "it implements no hook of pgen; write @pgen.hookimpl above pgen_backends or another"
        )

"""Plugins, good and hostile, as distributions on sys.path: the host lives, and says who, what, how."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from pgen.errors import PluginError, UnknownName
from pgen.plugins.loader import Plugin, judge, scan
from pgen.registry import PluginWarning, Registry, hookimpl

BACKEND = """
import dataclasses, pgen
@dataclasses.dataclass(frozen=True)
class Mine:
    name = "{name}"
    def examine(self, structure): ...
    def fit(self, problem, structure, run): ...
@pgen.hookimpl
def pgen_backends():
    return [Mine]
"""


class Site:
    """A folder on sys.path that fake distributions are installed into."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, distribution, source, *, name="stranger", version="1.2", requires=(), points=None):
        module = distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
        (info / "entry_points.txt").write_text(points or f"[pgen]\n{name} = {module}\n")
        return info


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv("PGEN_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("PGEN_STRICT_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def installed(**kwargs):
    """The registry and the text of the warnings that making it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry = Registry.installed(**kwargs)
    return registry, [str(w.message) for w in caught if w.category is PluginWarning]


def row(registry, distribution):
    return next(p for p in registry.plugins if p.distribution == distribution)


def assert_builtins_work(registry):
    assert {"exact", "variational"} <= registry.backends.keys()
    assert registry.backend("exact").__module__.startswith("pgen.backends.exact")


def test_a_good_plugin_is_active_by_the_same_road_as_the_builtins(site):
    site.add("pgen-good", BACKEND.format(name="good"), name="good", requires=["pgen-ppl>=0.1,<9"])
    registry, problems = installed()
    assert problems == []
    assert registry.backend("good").__module__ == "pgen_good"
    assert (
        registry.backend("pgen-good:good") is registry.backend("PGEN_Good:good") is registry.backends["good"]
    )
    good, exact = row(registry, "pgen-good"), next(p for p in registry.plugins if p.name == "exact")
    assert (good.state, good.hooks, good.origin, good.version) == (
        "active",
        ("pgen_backends",),
        "installed",
        "1.2",
    )
    assert good.requirement == ">=0.1,<9"
    assert (exact.state, exact.origin, exact.distribution) == ("active", "built-in", "pgen-ppl")
    assert list(registry.backends) == sorted(registry.backends)


HOSTILE = {
    "raises at import": ("import no_such_module_anywhere", "failed", "ModuleNotFoundError"),
    "raises from its own line": (
        "x = 1\nraise RuntimeError('boom')",
        "failed",
        "boom (pgen_evil.py, line 2)",
    ),
    "exits at import": ("import sys; sys.exit(3)", "failed", "SystemExit: 3"),
    "raises a BaseException": ("raise BaseException('odd')", "failed", "BaseException: odd"),
    "does not parse": ("def (:", "failed", "SyntaxError"),
    "misspells a hook": (
        "import pgen\n@pgen.hookimpl\ndef pgen_backend(): return []",
        "failed",
        "did you mean 'pgen_backends'?",
    ),
    "forgets the mark": ("def pgen_backends(): return []", "failed", "write @pgen.hookimpl above it"),
    "has no hook": ("x = 1", "failed", "implements no hook"),
    "asks for an argument": (
        "import pgen\n@pgen.hookimpl\ndef pgen_backends(config): return []",
        "failed",
        "wrong signature",
    ),
    "hook raises": (
        "import pgen\n@pgen.hookimpl\ndef pgen_backends(): return 1 / 0",
        "failed",
        "hook pgen_backends raised ZeroDivisionError",
    ),
    "hook exits": (
        "import pgen, sys\n@pgen.hookimpl\ndef pgen_backends(): sys.exit()",
        "failed",
        "hook pgen_backends raised SystemExit",
    ),
    "hook returns garbage": (
        "import pgen\n@pgen.hookimpl\ndef pgen_backends(): return [42]",
        "failed",
        "must return classes with a string `name`",
    ),
    "a backend is no dataclass": (
        BACKEND.replace("@dataclasses.dataclass(frozen=True)", "").format(name="mine"),
        "failed",
        "by @dataclass(frozen=True), which Mine lacks",
    ),
    "an option has no default": (
        BACKEND.format(name="mine").replace("class Mine:", "class Mine:\n    steps: int"),
        "failed",
        "Mine() raised TypeError",
    ),
    "hook returns nothing": (
        "import pgen\n@pgen.hookimpl\ndef pgen_backends(): pass",
        "failed",
        "must return a list, not None",
    ),
    "hook fails while it is read": (
        "import pgen\n@pgen.hookimpl\ndef pgen_backends():\n    yield from ()\n    raise OSError('late')",
        "failed",
        "late",
    ),
    "a program is no callable": (
        "import pgen\n@pgen.hookimpl\ndef pgen_programs(): return {'p': 3}",
        "failed",
        "a mapping from names to callables; 'p' is 3",
    ),
    "a name with a colon": (BACKEND.format(name="a:b"), "failed", "not 'a:b'"),
    "a name that is no string": (BACKEND.replace('"{name}"', "7"), "failed", "not 7"),
    "the same name twice": (
        BACKEND.format(name="mine").replace("[Mine]", "[Mine, Mine]"),
        "failed",
        "each name once, not 'mine' twice",
    ),
    "wraps a hook": (
        "import pgen\n@pgen.hookimpl(wrapper=True)\ndef pgen_backends():\n    yield\n    return []",
        "failed",
        "is a hook wrapper",
    ),
    "takes a built-in backend's name": (
        BACKEND.format(name="exact"),
        "refused",
        "belongs to plugin 'exact' of pgen-ppl",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_plugin_is_left_out_and_the_host_lives(site, kind):
    source, state, why = HOSTILE[kind]
    site.add("pgen-evil", source)
    registry, problems = installed()
    assert_builtins_work(registry)
    evil = row(registry, "pgen-evil")
    assert evil.state == state
    assert why in evil.why
    assert len(problems) == 1
    for part in ("pgen-evil", "1.2", "stranger = pgen_evil", why, "PGEN_DISABLE_PLUGINS=pgen-evil:stranger"):
        assert part in problems[0]
    with pytest.raises(PluginError, match="pgen-evil 1.2"):  # whoever asks for it by name gets an error
        registry.backend("stranger")
    assert_builtins_work(registry)


def test_a_builtins_plugin_name_is_refused_before_import(site):
    site.add("pgen-evil", "raise SystemExit('imported')", name="exact")
    registry, problems = installed()
    assert_builtins_work(registry)
    assert row(registry, "pgen-evil").state == "refused"
    assert "'exact' is the name of a built-in" in problems[0]
    assert "imported" not in problems[0]


def test_a_builtins_name_stays_reserved_where_the_builtin_is_disabled(site):
    site.add("pgen-evil", BACKEND.format(name="exact"))
    registry, problems = installed(disable=["pgen-ppl:exact"])
    assert row(registry, "pgen-evil").state == "refused"
    with pytest.raises(PluginError, match="is disabled"):
        registry.backend("exact")
    with pytest.raises(PluginError, match="refused"):  # no spelling gives a stranger a built-in's name
        registry.backend("pgen-evil:stranger")
    assert len(problems) == 1


def test_two_strangers_of_one_name_are_both_refused_until_the_user_chooses(site):
    site.add("pgen-alice", BACKEND.format(name="stranger"))
    site.add("pgen-bob", BACKEND.format(name="stranger"), version="3")
    registry, problems = installed()
    assert_builtins_work(registry)
    assert {row(registry, d).state for d in ("pgen-alice", "pgen-bob")} == {"refused"}
    assert "pgen_alice" not in sys.modules
    assert len(problems) == 2
    with pytest.raises(
        PluginError, match="pgen-alice 1.2 and pgen-bob 3 .*write 'pgen-alice:stranger' or 'pgen-bob:str"
    ):
        registry.backend("stranger")
    assert registry.backend("pgen-bob:stranger").__module__ == "pgen_bob"
    registry, problems = installed(disable=["pgen-alice"])
    assert problems == []
    assert registry.backend("stranger").__module__ == "pgen_bob"


def test_two_backends_of_one_name_from_differently_named_plugins(site):
    site.add("pgen-alice", BACKEND.format(name="mine"), name="alice")
    site.add("pgen-bob", BACKEND.format(name="mine"), name="bob")
    registry, problems = installed()
    assert len(problems) == 1
    assert "pgen-alice 1.2 and pgen-bob 1.2 both provide a backend called 'mine'" in problems[0]
    with pytest.raises(PluginError, match="write 'pgen-alice:mine' or 'pgen-bob:mine'"):
        registry.backend("mine")
    assert registry.backend("pgen-alice:mine").__module__ == "pgen_alice"
    assert {"pgen-alice:mine", "pgen-bob:mine"} <= registry.backends.keys()


def test_two_distributions_whose_entry_points_name_one_module(site):
    site.add("pgen-alice", BACKEND.format(name="alice"), name="alice")
    site.add("pgen-bob", "", name="bob", points="[pgen]\nbob = pgen_alice\n")
    registry, problems = installed()
    with pytest.raises(PluginError, match="both provide"):
        registry.backend("alice")
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("requirement", "why"),
    [
        ("pgen-ppl>=99", "it requires pgen-ppl>=99, but pgen-ppl 0."),
        ("no-such-distribution-xyz", "it requires no-such-distribution-xyz, which is not installed"),
        ("numpy<1", "but numpy"),
    ],
)
def test_unmet_requirements_are_seen_before_import(site, requirement, why):
    site.add("pgen-evil", "raise SystemExit('imported')", requires=[requirement])
    registry, problems = installed()
    assert_builtins_work(registry)
    assert why in problems[0]
    assert "imported" not in problems[0]


def test_requirements_of_extras_and_of_other_systems_do_not_count(site):
    requires = [
        'no-such-distribution-xyz; extra == "gpu"',
        'also-none; python_version < "3"',
        "%% nonsense %%",
    ]
    site.add("pgen-good", BACKEND.format(name="good"), name="good", requires=requires)
    registry, problems = installed()
    assert problems == []
    assert row(registry, "pgen-good").state == "active"


@pytest.mark.parametrize("name", ["stranger", "pgen-evil", "Pgen_Evil", "pgen-evil:stranger"])
@pytest.mark.parametrize("road", ["argument", "environment"])
def test_disabling_a_broken_plugin_keeps_it_from_being_imported(site, monkeypatch, name, road):
    site.add("pgen-evil", "raise SystemExit('imported')")
    if road == "environment":
        monkeypatch.setenv("PGEN_DISABLE_PLUGINS", f" {name} ,")
    registry, problems = installed(disable=[name] if road == "argument" else [])
    assert problems == []
    assert row(registry, "pgen-evil").state == "disabled"
    assert_builtins_work(registry)
    with pytest.raises(PluginError, match="disabled"):
        registry.backend("stranger")


def test_disabling_what_is_not_there_is_said(site):
    _, problems = installed(disable=["variationl"])
    assert problems == ["no plugin called 'variationl' is there to disable; did you mean 'variational'?"]


def test_strict_makes_every_failure_fatal(site, monkeypatch):
    site.add("pgen-evil", "raise RuntimeError('boom')")
    monkeypatch.setenv("PGEN_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="boom") as caught:
        Registry.installed()
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "damage",
    [
        lambda info: (info / "entry_points.txt").write_text("[pgen]\nnonsense without an equals sign\n"),
        lambda info: (info / "entry_points.txt").write_bytes(b"[pgen]\n\xff\xfe = \xff\n"),
        lambda info: (info / "METADATA").unlink(),
        lambda info: (info / "METADATA").write_text("Name:\n"),
        lambda info: (info / "METADATA").write_bytes(b"\xff\xfe\x00"),
        lambda info: (info / "direct_url.json").write_text("{"),
        lambda info: (info / "direct_url.json").write_text("[]"),
        lambda info: (info / "entry_points.txt").write_text("[pgen]\nstranger = \n"),
    ],
)
def test_damaged_metadata_takes_nobody_else_down(site, damage):
    damage(site.add("pgen-evil", "raise SystemExit"))
    registry, _ = installed()
    assert_builtins_work(registry)


def test_an_unknown_name_says_what_is_near_and_what_is_there(site):
    registry, _ = installed()
    with pytest.raises(UnknownName, match="did you mean 'variational'.*Installed: .*exact"):
        registry.backend("variationel")
    with pytest.raises(UnknownName, match="no backend is called 'pgen-ppl:nothing'"):
        registry.backend("pgen-ppl:nothing")


def test_an_unknown_name_lists_who_was_left_out(site):
    site.add("pgen-evil", "raise RuntimeError('boom')", name="other")
    registry, _ = installed()
    with pytest.raises(UnknownName, match="Left out: plugin 'other' of pgen-evil 1.2, failed: .*boom"):
        registry.backend("promised-by-evil")


def test_two_hundred_and_fifty_distributions_cost_little(site):
    for i in range(250):
        info = site.folder / f"other_{i}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: other-{i}\nVersion: 1.0\n" + "Classifier: x\n" * 50
        )
        (info / "entry_points.txt").write_text("[console_scripts]\nother = other:main\n")
    site.add("pgen-good", BACKEND.format(name="good"), name="good")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        plugins = judge(scan())
        seconds.append(time.perf_counter() - start)
    assert "pgen-good" in {p.distribution for p in plugins}
    assert min(seconds) < 0.3  # about 0.03 on an idle core


def test_registry_is_made_once_and_again_where_the_path_changes(site):
    assert Registry.installed() is Registry.installed()
    before = Registry.installed()
    site.add("pgen-good", BACKEND.format(name="good"), name="good")
    sys.path.insert(0, str(site.folder / "elsewhere"))
    assert "good" in Registry.installed().backends
    assert "good" not in before.backends


def test_importing_pgen_imports_no_plugin(site):
    site.add("pgen-evil", "import os; os._exit(7)")
    done = subprocess.run([sys.executable, "-c", "import pgen"], cwd=site.folder, timeout=60, check=False)
    assert done.returncode == 0


def test_registry_of_modules():
    @dataclass(frozen=True)
    class Mine:
        name = "mine"

        def examine(self, structure): ...

        def fit(self, problem, structure, run): ...

    class Plug:
        @hookimpl
        def pgen_backends(self):
            return [Mine]

        @hookimpl
        def pgen_programs(self):
            return {"coin": dict}

        @hookimpl
        def pgen_conversions(self):
            return [SimpleNamespace(name="b", convert=len), SimpleNamespace(name="a", convert=len)]

    registry = Registry.of(Plug())
    assert registry.backend("mine") is Mine
    assert registry.program("coin") is dict
    assert [c.name for c in registry.conversions] == ["a", "b"]
    assert registry.datasets == registry.observers == {}
    with pytest.raises(PluginError, match="bears a name that belongs to"):
        Registry.of(Plug(), Plug())
    with pytest.raises(UnknownName, match="Installed: none"):
        Registry.of().backend("mine")


def test_an_optional_hook_of_a_newer_pgen_is_tolerated():
    class Plug:
        @hookimpl(optionalhook=True)
        def pgen_dreams(self):
            return 1

        @hookimpl
        def pgen_programs(self):
            return {}

    assert Registry.of(Plug()).plugins[0].hooks == ("pgen_programs",)


def test_a_source_tree_without_metadata_finds_its_own_plugins(monkeypatch):
    with_metadata = [p for p in scan() if p.builtin]
    monkeypatch.setattr("importlib.metadata.distributions", list)
    without = [p for p in scan() if p.builtin]
    assert without
    assert [p.target for p in without] == [p.target for p in with_metadata]


def test_a_copy_without_any_metadata_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.metadata.distributions", list)
    monkeypatch.setattr("pgen.plugins.loader.PACKAGE", tmp_path / "pgen")
    with pytest.raises(PluginError, match="pip install -e ."):
        Registry.installed(disable=["only so that nothing is cached"])


def test_judge_leaves_good_plugins_as_they_are():
    plugin = Plugin("a", "a", "pgen-a", "1", "installed")
    assert judge([plugin]) == [plugin]
    assert judge([plugin, replace(plugin, distribution="pgen-b")])[0].state == "refused"

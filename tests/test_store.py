"""A saved folder is whole or refused: round trips, mutations, failing system calls, hostile files."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch

from pgen import archive, store
from pgen.errors import CheckpointError

FILES = archive.FILES


def _tensors():
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "z.weight": torch.randn(5, 3),
        "a": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False, True]),
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "int": torch.tensor([-(2**62), 5]),
        "small": torch.tensor([1, -1], dtype=torch.int8),
        "unsigned": torch.tensor([2**16 - 1], dtype=torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
        "transposed": base.T,
        "view": base[1:, ::2],
        "same memory": base,
        "expanded": torch.tensor([1.0]).expand(4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "not finite": torch.tensor([float("nan"), float("inf")]),
    }


def _same(left, right):
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and torch.equal(
            left[k].detach().resolve_conj().contiguous().view(torch.uint8) if left[k].ndim else left[k],
            right[k].contiguous().view(torch.uint8) if right[k].ndim else right[k],
        )
        for k in left
    )


@pytest.fixture(autouse=True)
def _by_one(one_thread):
    """Children compute as their parent does."""


METADATA = {"b": [1, 2.5, None, True, "ü\n"], "a": {"nested": {"deep": []}}, "big": 2**70, "tiny": 5e-324}


@pytest.fixture
def saved(tmp_path):
    tensors = _tensors()
    store.save(tmp_path / "fit", tensors, METADATA)
    return tmp_path / "fit", tensors


def _signed(folder, contents):
    """Files with a manifest that fits them: what an attacker can always make."""
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    files = {
        n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
        for n, d in contents.items()
        if n in FILES
    }
    (folder / archive.MANIFEST).write_bytes(archive._canonical({"files": files, "version": 1}))
    return folder


def test_round_trip_keeps_values_dtypes_shapes_order_and_metadata(saved):
    path, tensors = saved
    loaded, metadata = store.load(path)
    assert _same(tensors, loaded)
    assert metadata == METADATA
    assert list(metadata) == list(METADATA)
    assert sorted(os.listdir(path)) == sorted(FILES)
    assert os.listdir(path.parent) == ["fit"]
    loaded["a"].add_(1)  # memory of its own, writable


def test_nothing_at_all_can_be_saved_and_parents_are_made(tmp_path):
    store.save(tmp_path / "x" / "y", {}, {})
    assert store.load(tmp_path / "x" / "y") == ({}, {})
    assert store.exists(tmp_path / "x" / "y")
    assert not store.exists(tmp_path / "x" / "z")


def test_saving_again_replaces(saved):
    path, _ = saved
    store.save(path, {"only": torch.ones(1)}, {})
    assert list(store.load(path)[0]) == ["only"]
    assert os.listdir(path.parent) == ["fit"]


def test_no_mutation_passes(saved):
    """Flips, truncations, insertions, deletions, swaps: each is refused, with a message naming a file."""
    path, tensors = saved
    good = {name: (path / name).read_bytes() for name in FILES}
    rng = random.Random(7)
    kinds = ["bit", "byte", "truncate", "append", "insert", "cut", "empty", "delete", "other"]
    for trial in range(600):
        name, kind = rng.choice(FILES), kinds[trial % len(kinds)]
        data = bytearray(good[name])
        at = rng.randrange(len(data))
        if kind == "bit":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            data[at] = (data[at] + rng.randrange(1, 256)) % 256
        elif kind == "truncate":
            del data[at:]
        elif kind == "append":
            data += rng.randbytes(rng.randrange(1, 40))
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "cut":
            del data[at : at + rng.randrange(1, 9)]
        elif kind == "empty":
            data = bytearray()
        elif kind == "other":
            data = bytearray(good[FILES[(FILES.index(name) + 1) % 3]])
        if kind == "delete":
            (path / name).unlink()
        else:
            (path / name).write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            store.load(path)
        assert any(file in str(caught.value) for file in FILES)
        (path / name).write_bytes(good[name])
    assert _same(tensors, store.load(path)[0])


def test_every_single_bit_of_the_manifest_counts(saved):
    path, _ = saved
    good = (path / "manifest.json").read_bytes()
    for at in range(len(good)):
        for bit in (0, 2, 5):
            data = bytearray(good)
            data[at] ^= 1 << bit
            (path / "manifest.json").write_bytes(data)
            with pytest.raises(CheckpointError):
                store.load(path)


def test_without_the_digests_a_flip_would_pass(saved):
    """The broken specimen: safetensors alone reads a flipped byte in silence."""
    path, tensors = saved
    contents = {name: bytearray((path / name).read_bytes()) for name in (archive.TENSORS, archive.METADATA)}
    contents[archive.TENSORS][-1] ^= 4
    _signed(path, contents)
    assert not _same(tensors, store.load(path)[0])


def _refusal(call):
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


class _Failing:
    """Raises OSError at call k of the functions that a save makes, and from then on if it persists."""

    def __init__(self, monkeypatch, k, persistent, error=errno.ENOSPC):
        self.calls, self.k, self.persistent, self.error = 0, k, persistent, error
        import builtins

        for owner, name in [(os, "rename"), (os, "fsync"), (os, "open"), (os, "mkdir"), (builtins, "open")]:
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.k or (self.persistent and self.calls > self.k):
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, persistent, error):
    path = tmp_path / "fit"
    old, new = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    failures = returned = 0
    for k in range(1, 100):
        store.save(path, old, {"version": "old"})
        with monkeypatch.context() as patch:
            failing = _Failing(patch, k, persistent, error)
            told = _refusal(lambda: store.save(path, new, {"version": "new"}))
            saved, reached = told is None, failing.calls >= k
        assert saved or (str(path) in told and errno.errorcode[error] in told)
        tensors, metadata = store.load(path)
        assert metadata["version"] == "new" if saved else metadata["version"] == "old" or persistent
        assert torch.equal(tensors["w"], {"new": new, "old": old}[metadata["version"]]["w"])
        returned += not saved and metadata["version"] == "old"
        failures += not saved
        if not reached:
            break
        if not persistent:  # a disk that refuses everything refuses to tidy up, too
            assert [name for name in os.listdir(tmp_path) if not name.startswith(".fit.old")] == ["fit"]
    assert failures >= 12  # a folder, three files opened and synced, the folder, two renames, the parent
    assert returned >= failures - persistent * 2  # a disk that dies in the end may keep the new one, whole
    assert not reached


def test_a_failed_first_write_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _Failing(patch, 4, persistent=False)
        with pytest.raises(CheckpointError, match="Nothing is half written"):
            store.save(tmp_path / "fit", {"w": torch.ones(1)}, {})
    assert os.listdir(tmp_path) == []


def _save_forever(path, begun):
    i = 0
    while True:
        store.save(path, {"w": torch.full((1000,), float(i))}, {"i": i})
        begun.set()
        i += 1


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    context, rng = multiprocessing.get_context("fork"), random.Random(3)
    path, seen = tmp_path / "fit", set()
    started = time.perf_counter()
    for _ in range(5):
        store.save(path, {"w": torch.full((1000,), -1.0)}, {"i": -1})
    once = (time.perf_counter() - started) / 5
    for _ in range(30):
        begun = context.Event()
        child = context.Process(target=_save_forever, args=(path, begun))
        child.start()
        assert begun.wait(60)
        child.join(4 * once * rng.random())
        child.kill()
        child.join()
        tensors, metadata = store.load(path)
        assert torch.equal(tensors["w"], torch.full((1000,), float(metadata["i"])))
        seen.add(metadata["i"])
    assert len(seen) > 1  # they were killed at different moments
    store.save(path, {}, {})
    assert os.listdir(tmp_path) == ["fit"]  # what the dead left behind is swept up


def test_readers_and_two_writers_at_once(tmp_path):
    """Writers may refuse each other; what is read is always one of the things that were written."""
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "fit"
    store.save(path, {"w": torch.zeros(100)}, {"i": 0})

    def write(i):
        done = 0
        for j in range(25):
            try:
                store.save(path, {"w": torch.full((100,), float(100 * i + j))}, {"i": 100 * i + j})
                done += 1
            except CheckpointError:
                pass
        return done

    def read():
        for _ in range(60):
            try:
                tensors, metadata = store.load(path)
            except CheckpointError:
                continue  # swapped away while being read
            assert torch.equal(tensors["w"], torch.full((100,), float(metadata["i"])))

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(write, 1), pool.submit(write, 2), pool.submit(read), pool.submit(read)]
        results = [future.result() for future in futures]
    assert sum(results[:2]) > 0
    tensors, metadata = store.load(path)
    assert torch.equal(tensors["w"], torch.full((100,), float(metadata["i"])))


def test_what_a_crash_after_the_renames_left_is_swept_up(saved):
    path, _ = saved
    (path.parent / ".fit.old").mkdir()
    store.save(path, {"new": torch.ones(1)}, {})
    assert list(store.load(path)[0]) == ["new"]
    assert os.listdir(path.parent) == ["fit"]


def test_recovery_after_a_crash_between_the_renames(saved, monkeypatch):
    path, tensors = saved
    os.rename(path, path.with_name(".fit.old"))
    assert store.exists(path)
    assert _same(tensors, store.load(path)[0])
    for k in range(1, 12):
        with monkeypatch.context() as patch:
            _Failing(patch, k, persistent=True)
            assert _refusal(lambda: store.save(path, {"new": torch.ones(1)}, {}))
        assert _same(tensors, store.load(path)[0])
    store.save(path, {"new": torch.ones(1)}, {})
    assert list(store.load(path)[0]) == ["new"]
    assert not store.exists(path.parent / ".fit.old")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"x": float("nan")}, r"metadata\['x'\] is nan"),
        ({"x": [1.0, float("inf")]}, r"metadata\['x'\]\[1\] is inf"),
        ({"x": {1: 2}}, "has the key 1; expected strings"),
        ({"x": object()}, "is object; expected None, bool"),
        ({"x": torch.ones(1)}, "is Tensor; .*tensors go among the tensors"),
        ([1], "metadata is list; expected a mapping"),
    ],
)
def test_metadata_that_json_would_change_is_refused(tmp_path, metadata, told):
    with pytest.raises(CheckpointError, match=told):
        store.save(tmp_path / "fit", {}, metadata)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"x": 1.0}, "'x' is float; expected a tensor"),
        ({1: torch.ones(1)}, "1 cannot name a tensor"),
        ({"__metadata__": torch.ones(1)}, "cannot name a tensor"),
        ({"x": torch.eye(2).to_sparse()}, "'x' is not dense"),
        ({"x": torch.ones(1, device="meta")}, "'x' is not dense"),
        ({"x": torch.ones(1, dtype=torch.complex128)}, "'x' is torch.complex128; expected one of bfloat16"),
    ],
)
def test_tensors_that_would_not_come_back_are_refused(tmp_path, tensors, told):
    with pytest.raises(CheckpointError, match=told):
        store.save(tmp_path / "fit", tensors, {})


def test_no_folder_of_anyone_else_is_replaced(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds other files \(thesis.tex\), which saving would delete"):
        store.save(tmp_path / "results", {}, {})
    assert (tmp_path / "results" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        store.save(tmp_path / "file", {}, {})
    (tmp_path / "empty").mkdir()
    store.save(tmp_path / "empty", {}, {})


# --- what is not a checkpoint at all ------------------------------------------------------------------------


def test_missing_and_wrong_kinds_of_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: expected a folder with .* found No such file"):
        store.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="found a file"):
        store.load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json: missing"):
        store.load(tmp_path / "empty")


def test_links_pipes_and_folders_are_not_followed(saved, tmp_path):
    path, _ = saved
    os.symlink(path, tmp_path / "link")
    with pytest.raises(CheckpointError, match="symbolic link, which is not followed; pass .*fit itself"):
        store.load(tmp_path / "link")
    with pytest.raises(CheckpointError, match="symbolic link"):
        store.save(tmp_path / "link", {}, {})
    for name in FILES:
        moved = tmp_path / f"real-{name}"
        os.rename(path / name, moved)
        os.symlink(moved, path / name)
        with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file; found a symbolic link"):
            store.load(path)
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match="expected a regular file"):
            store.load(path)
        (path / name).unlink()
        os.rename(moved, path / name)
    store.load(path)


def _described(**changes):
    fields = {"format": "pgen", "version": 1, "names": [], "metadata": {}} | changes
    return json.dumps({k: v for k, v in fields.items() if v != "absent"}).encode()


EMPTY = (2).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize(
    ("described", "told"),
    [
        (_described(version=2), "expected format version 1, found 2: upgrade pgen"),
        (_described(version=True), "expected format version 1, found True"),
        (_described(format="pickle"), 'expected format "pgen"'),
        (_described(metadata=[]), "and a mapping"),
        (_described(names="absent"), "expected the keys format, version, names"),
        (_described(names=["ghost"]), r"expected the tensors \['ghost'\]; found \[\]"),
        (_described(names=[1]), "expected a list of names"),
        (_described(target="os.system"), "expected the keys"),
        (b'{"metadata": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"\x80\x04\x95\x00", "expected JSON"),  # how a pickle begins
        (b'"text"', "expected the keys"),
    ],
)
def test_a_fitting_manifest_does_not_make_nonsense_pass(tmp_path, described, told):
    folder = _signed(tmp_path / "fit", {archive.TENSORS: EMPTY, archive.METADATA: described})
    with pytest.raises(CheckpointError, match=told) as caught:
        store.load(folder)
    assert str(folder) in str(caught.value)


def _header(header, data=b""):
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (b"", "safetensors header"),
        (b"\x80\x02ctorch", "safetensors header|length"),
        ((2**40).to_bytes(8, "little") + b"{}", "found a length of 1099511627776"),
        (_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "safetensors format"),
        (
            _header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
            "safetensors format",
        ),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000trailing"), "format"),
        (_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"), "format"),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"), "format"),
        (_header([1, 2]), "expected a header"),
        (
            _header({"ghost": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
            "expected the tensors",
        ),
    ],
)
def test_hostile_tensors_are_refused(tmp_path, tensors, told):
    folder = _signed(tmp_path / "fit", {archive.TENSORS: tensors, archive.METADATA: _described()})
    with pytest.raises(CheckpointError, match=told):
        store.load(folder)


def test_sizes_are_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ENTRIES", 100)
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(101)}
    folder = _signed(tmp_path / "fit", {archive.TENSORS: _header(many), archive.METADATA: _described()})
    with pytest.raises(CheckpointError, match="at most 100 tensors"):
        store.load(folder)
    monkeypatch.setattr(archive, "MAX_JSON", 100)
    folder = _signed(
        tmp_path / "b", {archive.TENSORS: EMPTY, archive.METADATA: _described(metadata={"x": "y" * 99})}
    )
    with pytest.raises(CheckpointError, match="too large: expected at most 100 bytes"):
        store.load(folder)
    with pytest.raises(CheckpointError, match="expected at most 100"):
        store.save(tmp_path / "c", {}, {"x": "y" * 99})
    deep = {}
    for _ in range(100):
        deep = {"x": deep}
    with pytest.raises(CheckpointError, match="nested more than"):
        store.save(tmp_path / "c", {}, deep)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "sub/tensors.safetensors", "extra.py"])
def test_names_in_the_manifest_lead_nowhere(saved, name):
    path, _ = saved
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"][archive.TENSORS]
    (path / "manifest.json").write_bytes(archive._canonical(manifest))
    with pytest.raises(CheckpointError, match="alone"):
        store.load(path)
    del manifest["files"][archive.TENSORS]
    (path / "manifest.json").write_bytes(archive._canonical(manifest))
    with pytest.raises(CheckpointError, match="alone"):
        store.load(path)


def test_loading_opens_nothing_but_the_three_files(saved):
    path, _ = saved
    (path / "evil.py").write_text("raise SystemExit")
    store.load(path)  # whatever is imported lazily has been now
    events, watching = [], [True]
    watched = {
        "open",
        "exec",
        "compile",
        "import",
        "marshal.loads",
        "os.system",
        "subprocess.Popen",
        "ctypes.dlopen",
    }

    def hook(event, args):
        if watching[0] and event in watched:
            events.append((event, os.path.basename(str(args[0]))))

    sys.addaudithook(hook)
    try:
        store.load(path)
    finally:
        watching[0] = False
    assert {event for event, _ in events} == {"open"}
    assert {name for _, name in events if not name.isdigit()} == set(FILES)  # a digit: a descriptor of these

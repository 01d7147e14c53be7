"""Checkpoints: what comes back bit for bit, and files that are refused."""

import io
import json
import os
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


class State(eqx.Module):
    model: Any
    optimizer_state: Any
    key: Any
    rest: Any
    name: str = eqx.field(static=True)


def make_state(seed: int, name: str = "run") -> State:
    """All with the same structure; other arrays, numbers and texts for each seed."""
    key = jax.random.key(seed)
    model = eqx.nn.MLP(2, "scalar", 3, 1, jnp.tanh, key=key)
    params = eqx.filter(model, eqx.is_inexact_array)
    transform = optax.adam(optax.linear_schedule(0.1, 0.0, 5))
    _, optimizer_state = transform.update(params, transform.init(params))
    rest = {"none": None, "number": 1.5 + seed, "text": f"text {seed}", "empty": [(), {}]}
    return State(model, optimizer_state, key, rest, name)


def bits(leaf: Any) -> tuple[Any, ...]:
    """Everything that tells one array from another."""
    kind: Any = jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    data = np.asarray(leaf)
    return kind, leaf.dtype, data.shape, data.tobytes()


def assert_same_arrays(a: Any, b: Any) -> None:
    a, b = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (a, b))
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        assert bits(one) == bits(other)


def refused(path: Path, like: Any, message: str) -> str:
    """The text of the refusal, which names the file in any case."""
    with pytest.raises(mo.CheckpointError, match=message) as caught:
        mo.load(path, like)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Round trips


def test_a_state_comes_back(tmp_path):
    state, like = make_state(1, "saved"), make_state(2, "here")
    path = tmp_path / "state.npz"
    mo.save(path, state)
    back = mo.load(path, like)
    assert_same_arrays(back, state)
    assert jax.tree.structure(back) == jax.tree.structure(like)
    # What is no array is that of the run which reads it.
    assert back.name == "here" and back.rest == like.rest
    assert back.model.activation is jnp.tanh
    x = jnp.asarray([0.3, -2.0])
    assert back.model(x) == state.model(x) != like.model(x)
    assert jax.random.uniform(back.key) == jax.random.uniform(state.key)


LEAVES: dict[str, Callable[[], Any]] = {
    "float64": lambda: jnp.asarray([0.1, -0.0, jnp.inf, jnp.nan]),
    "float32": lambda: jnp.asarray([0.1, 1e-45, jnp.nan], jnp.float32),
    "bfloat16": lambda: jnp.asarray([[0.1, 3e38], [-0.0, jnp.nan]], jnp.bfloat16),
    "float16": lambda: jnp.asarray(0.1, jnp.float16),
    "float8": lambda: jnp.asarray([0.5, 100], jnp.float8_e4m3fn),
    "complex": lambda: jnp.asarray([1 + 2j, -0.0j]),
    "int4": lambda: jnp.asarray([-8, 7], jnp.int4),
    "int8": lambda: jnp.asarray([-128, 127], jnp.int8),
    "int64": lambda: jnp.asarray(2**62 + 1),
    "uint32": lambda: jnp.asarray([2**32 - 1], jnp.uint32),
    "bool": lambda: jnp.asarray([[True], [False]]),
    "empty": lambda: jnp.zeros((0, 3)),
    "empty ints": lambda: jnp.zeros((2, 0), jnp.int16),
    "key": lambda: jax.random.key(7),
    "keys": lambda: jax.random.split(jax.random.key(7), (2, 3)),
    "no keys": lambda: jax.random.split(jax.random.key(7), 0),
    "key of another kind": lambda: jax.random.key(7, impl="rbg"),
    "old key": lambda: jax.random.PRNGKey(7),
    "numpy": lambda: np.asarray([0.1, np.nan]),
    "numpy scalar": lambda: np.float32(0.1),
    "numpy array without axes": lambda: np.asarray(3),
    "numpy, transposed": lambda: np.arange(6.0).reshape(2, 3).T,
    "numpy, every other": lambda: np.arange(6)[::2],
    "numpy, big-endian": lambda: np.asarray([1, 256], ">i4"),
    "numpy text": lambda: np.asarray(["a", "bc"]),
    "numpy records": lambda: np.asarray([(1, 0.5)], [("a", "i2"), ("b", "f8")]),
    "numpy, empty": lambda: np.zeros((3, 0)),
}


def test_every_kind_of_array_comes_back(tmp_path):
    tree = {name: make() for name, make in LEAVES.items()}
    zeros = lambda leaf: (
        jax.random.wrap_key_data(
            jnp.zeros_like(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
        )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros_like(leaf)
        if isinstance(leaf, jax.Array)
        else np.zeros_like(leaf)[()]
        if isinstance(leaf, np.generic)
        else np.zeros_like(leaf)
    )
    mo.save(tmp_path / "all", tree)
    back = mo.load(tmp_path / "all", {name: zeros(leaf) for name, leaf in tree.items()})
    for name, leaf in tree.items():
        assert bits(back[name]) == bits(leaf), name


def test_the_payload_of_nan_comes_back(tmp_path):
    given = np.asarray([0x7FF8_0000_DEAD_BEEF, 0xFFF0_0000_0000_0001], np.uint64)
    for leaf in (given.view(np.float64), jnp.asarray(given.view(np.float64))):
        mo.save(tmp_path / "nan", leaf)
        assert_same_arrays(mo.load(tmp_path / "nan", leaf), leaf)


def test_numpy_stays_float64_without_64_bits(tmp_path):
    # It once came back in float32: it went by way of JAX.
    tree = {"array": np.asarray([0.1]), "scalar": np.float64(0.1), "jax": jnp.ones(1)}
    with jax.enable_x64(False):
        tree["jax"] = jnp.ones(1)
        mo.save(tmp_path / "file", tree)
        back = mo.load(tmp_path / "file", tree)
        assert_same_arrays(back, tree)
    assert back["array"].dtype == np.float64 and back["jax"].dtype == np.float32


def test_numpy_arrays_can_be_written_to(tmp_path):
    mo.save(tmp_path / "file", np.zeros(2))
    back = mo.load(tmp_path / "file", np.ones(2))
    back[0] = 5
    np.testing.assert_array_equal(back, [5, 0])


def test_a_tree_without_arrays(tmp_path):
    mo.save(tmp_path / "file", {"a": None, "b": 3})
    assert mo.load(tmp_path / "file", {"a": None, "b": 4}) == {"a": None, "b": 4}


def test_objects_are_not_written(tmp_path):
    # Their addresses in memory once were, of which nothing can be made later.
    tree = {"a": np.ones(2), "b": np.asarray([{}, None], object)}
    with pytest.raises(ValueError, match=r"`\['b'\]` holds Python objects"):
        mo.save(tmp_path / "file", tree)
    assert list(tmp_path.iterdir()) == []


# Writing


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file.any"
    for value in (1.0, 2.0):
        mo.save(str(path), jnp.full(3, value))
        assert_same_arrays(mo.load(str(path), jnp.zeros(3)), jnp.full(3, value))
        assert [p.name for p in path.parent.iterdir()] == ["file.any"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(step, error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    mo.save(path, jnp.zeros(3))
    before = path.read_bytes()

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(type(error)):
            mo.save(path, jnp.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == before
    mo.save(path, jnp.ones(3))
    assert_same_arrays(mo.load(path, jnp.zeros(3)), jnp.ones(3))


def test_a_folder_in_place_of_the_file(tmp_path):
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        mo.save(path, jnp.zeros(3))
    assert list(tmp_path.rglob("*")) == [path]
    refused(path, jnp.zeros(3), "Is a directory")


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(OSError, match="file"):
        mo.save(tmp_path / "file" / "state", jnp.zeros(3))
    refused(tmp_path / "file" / "state", jnp.zeros(3), "Not a directory")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    folder = tmp_path / "folder"
    mo.save(folder / "file", jnp.zeros(3))
    folder.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            mo.save(folder / "file", jnp.ones(3))
        assert [p.name for p in folder.iterdir()] == ["file"]
        assert_same_arrays(mo.load(folder / "file", jnp.ones(3)), jnp.zeros(3))
    finally:
        folder.chmod(0o755)


def test_no_file(tmp_path):
    refused(tmp_path / "file", jnp.zeros(3), "No such file")


# Files that are damaged, or something else


TREE = {"a": np.arange(5.0), "b": np.ones((2, 2), np.int32)}
LIKE = {"a": np.zeros(5), "b": np.zeros((2, 2), np.int32)}
ROWS = [
    {"name": "['a']", "kind": "float64", "shape": [5]},
    {"name": "['b']", "kind": "int32", "shape": [2, 2]},
]
HEADER = {"version": 1, "leaves": ROWS}
MEMBERS = {key: np.frombuffer(TREE[name].tobytes(), np.uint8) for key, name in ["0a", "1b"]}


def as_bytes(header: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(header).encode(), np.uint8)


def packed(header: Any = HEADER, **change: Any) -> bytes:
    """A file with another header or other members, of NumPy arrays or bytes."""
    stream = io.BytesIO()
    members: dict[str, Any] = MEMBERS | {"metaopt": as_bytes(header)} | change
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if isinstance(content, np.ndarray):
                inner = io.BytesIO()
                np.save(inner, content)
                content = inner.getvalue()
            if content is not None:
                archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def huge_claim() -> bytes:
    stream = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(stream, claim)
    return stream.getvalue()


def rows_with(**change: Any) -> dict[str, Any]:
    return {"version": 1, "leaves": [ROWS[0] | change, ROWS[1]]}


def random_bytes() -> bytes:
    return np.random.default_rng(0).bytes(2000)


BOMBS = np.array([_Bomb()] * 40, dtype=object)
UNSOUND: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a zip file"),
    "random": (random_bytes, "not a zip file"),
    "random with a start": (lambda: packed()[:40] + random_bytes(), "not a zip file"),
    "web page": (lambda: b"\n <!DOCTYPE html><html></html>", "a web page"),
    "pickle": (lambda: pickle.dumps(_Bomb()), "not a zip file"),
    "pickled header": (lambda: packed(metaopt=BOMBS), "holds pickled Python objects"),
    "pickled array": (lambda: packed(**{"0": BOMBS}), "`0` holds pickled Python objects"),
    "pickle as member": (lambda: packed(**{"0": pickle.dumps(_Bomb())}), "magic string"),
    "huge claim of an array": (lambda: packed(**{"1": huge_claim()}), "`1` claims shape"),
    "huge claim of the header": (
        lambda: packed(metaopt=huge_claim()),
        "`metaopt` claims shape",
    ),
    "member that unpacks to much": (
        lambda: packed(**{"0": bytes(20 * 1024**2)}),
        "`0` takes more than 1,064 bytes",
    ),
    "header that unpacks to much": (
        lambda: packed(metaopt=bytes(70 * 1024**2)),
        "`metaopt` takes more than 67,108,864 bytes",
    ),
    "another archive": (lambda: packed(metaopt=None), "metaopt.npy"),
    "missing member": (lambda: packed(**{"1": None}), "1.npy"),
    "shorter member": (lambda: packed(**{"0": MEMBERS["0"][1:]}), "has 39 bytes, not 40"),
    "member of another dtype": (
        # As many items, of eight bytes each: it once was a `ValueError` about a reshape.
        lambda: packed(**{"0": np.zeros(40)}),
        "has 320 bytes, not 40",
    ),
    "no text": (lambda: packed(metaopt=MEMBERS["0"]), "no sound checkpoint"),
    "no JSON": (
        lambda: packed(metaopt=np.frombuffer(b"{version", np.uint8)),
        "no sound checkpoint",
    ),
    "JSON too deep": (
        lambda: packed(metaopt=np.frombuffer(b"[" * 100_000, np.uint8)),
        "recursion",
    ),
    "no dictionary": (lambda: packed([1]), "no sound checkpoint"),
    "no version": (lambda: packed({"leaves": ROWS}), "version"),
    "no leaves": (lambda: packed({"version": 1}), "leaves"),
    "leaves that are a number": (lambda: packed({"version": 1, "leaves": 3}), "iterable"),
    # These three once were a `KeyError` and `TypeError`s.
    "a leaf without a name": (
        lambda: packed({"version": 1, "leaves": [{"kind": "float64", "shape": [5]}]}),
        "name",
    ),
    "a shape that is none": (lambda: packed(rows_with(shape=5)), "not iterable"),
    "a name that is a list": (lambda: packed(rows_with(name=["c"])), r"holds no `\['a'\]`"),
    "more leaves than names": (
        lambda: packed({"version": 1, "leaves": [*ROWS, ROWS[0]]}),
        "holds 3 arrays; this run has 2",
    ),
}


def test_the_files_made_here_are_what_is_written(tmp_path):
    # Or else those that follow would be refused for another reason than they should.
    mo.save(tmp_path / "saved", TREE)
    with np.load(tmp_path / "saved") as saved:
        assert json.loads(saved["metaopt"].tobytes()) == HEADER
        for key, content in MEMBERS.items():
            np.testing.assert_array_equal(saved[key], content)
    (tmp_path / "made").write_bytes(packed())
    assert_same_arrays(mo.load(tmp_path / "made", LIKE), TREE)


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_files_are_refused(case, tmp_path, monkeypatch):
    make, message = UNSOUND[case]
    path = tmp_path / "file"
    path.write_bytes(make())
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    try:
        refused(path, LIKE, message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What a file claims or unpacks to is not what memory is taken for.
    assert peak < 5 * 1024**2
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "file"
    mo.save(path, TREE)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        refused(path, LIKE, "no sound checkpoint")


def flipped(path: Path, content: bytes, places: range, tree: Any) -> int:
    """How many flips of one bit were refused. All others changed nothing."""
    like = jax.tree.map(np.zeros_like, tree)
    count = 0
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            back = mo.load(path, like)
        except mo.CheckpointError as error:
            assert str(path) in str(error)
            count += 1
        else:
            # Dates and the like, and names that are in an archive a second time.
            assert_same_arrays(back, tree)
    return count


def test_flipped_bits_are_seen(tmp_path):
    # Some of them make an entry look encrypted, or compressed in a way that is not known,
    # which once was a `RuntimeError`.
    path = tmp_path / "file"
    mo.save(path, TREE)
    content = path.read_bytes()
    places = range(0, 8 * len(content), 7)
    assert flipped(path, content, places, TREE) > 0.7 * len(places)
    # Of the flags of the last entry, in the list at the end of the archive.
    start = 8 * (content.rindex(b"PK\1\2") + 6)
    assert flipped(path, content, range(start, start + 48), TREE) > 10


def test_flipped_bits_before_a_large_array_are_seen(tmp_path):
    # The start of an entry says how long it is and where the numbers begin. What it says
    # was believed before the checksum was looked at, which is that of all of the entry:
    # numbers came back shifted by some places, or the tokenizer of Python failed.
    tree = {"a": np.arange(1500.0)}
    path = tmp_path / "file"
    mo.save(path, tree)
    content = path.read_bytes()
    start = content.index(b"\x93NUMPY")
    places = range(8 * start, 8 * (start + 40))
    assert flipped(path, content, places, tree) == len(places)


# Files of another run


def changed(**change: Any) -> dict[str, Any]:
    return {
        name: leaf for name, leaf in (LIKE | change).items() if not isinstance(leaf, str)
    }


OTHERS = {
    "renamed": (changed(a="-", c=np.zeros(5)), r"holds no `\['c'\]`, which this run has"),
    "missing in the file": (changed(c=np.zeros(1)), r"holds no `\['c'\]`"),
    "more in the file": (changed(b="-"), r"holds `\['b'\]`, which this run has not"),
    "none at all": ({}, r"holds `\['a'\]`, which this run has not"),
    "dtype": (
        changed(a=np.zeros(5, np.float32)),
        r"`\['a'\]` is float64 of shape \(5,\) there and float32 of shape \(5,\) here",
    ),
    "signed": (
        changed(b=np.zeros((2, 2), np.uint32)),
        r"`\['b'\]` is int32 of shape \(2, 2\) there and uint32 of shape \(2, 2\) here",
    ),
    "shape": (
        changed(a=np.zeros((5, 1))),
        r"`\['a'\]` is float64 of shape \(5,\) there and float64 of shape \(5, 1\) here",
    ),
    "shape of as many": (
        changed(b=np.zeros((4, 1), np.int32)),
        r"`\['b'\]` is int32 of shape \(2, 2\) there and int32 of shape \(4, 1\) here",
    ),
    "no array any more": (changed(a=3.0), r"holds `\['a'\]`, which this run has not"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_another_structure_are_refused(case, tmp_path):
    like, message = OTHERS[case]
    mo.save(tmp_path / "file", TREE)
    refused(tmp_path / "file", like, message)


class Before(eqx.Module):
    scale: Any
    shift: Any


class After(eqx.Module):
    shift: Any
    scale: Any


def test_leaves_that_changed_places_are_refused(tmp_path):
    # Of one shape and dtype: read by their places alone, each would get the other's.
    mo.save(tmp_path / "file", Before(scale=jnp.ones(3), shift=jnp.zeros(3)))
    like = After(scale=jnp.zeros(3), shift=jnp.ones(3))
    refused(tmp_path / "file", like, "another order: `.scale` is there.*`.shift` is here")


def test_leaves_are_named_as_in_the_state(tmp_path):
    state = make_state(0)
    mo.save(tmp_path / "file", state)
    other = eqx.tree_at(lambda s: s.model.layers[1].weight, state, jnp.zeros((1, 4)))
    text = refused(tmp_path / "file", other, re.escape("`.model.layers[1].weight` is"))
    assert "float64 of shape (1, 3) there and float64 of shape (1, 4) here" in text


KEYS = {
    "threefry2x32 key": lambda: jax.random.key(0),
    "rbg key": lambda: jax.random.key(0, impl="rbg"),
    # Its data have the shape of the one before, and it once was taken for that.
    "unsafe_rbg key": lambda: jax.random.key(0, impl="unsafe_rbg"),
    "uint32": lambda: jax.random.PRNGKey(0),
}


@pytest.mark.parametrize("there", KEYS)
def test_keys_of_another_kind_are_refused(there, tmp_path):
    mo.save(tmp_path / "file", {"key": KEYS[there]()})
    for here, make in KEYS.items():
        if here == there:
            mo.load(tmp_path / "file", {"key": make()})
        else:
            message = rf"`\['key'\]` is {there} of shape .* there and {here} of shape"
            refused(tmp_path / "file", {"key": make()}, message)


@pytest.mark.parametrize("version", [0, 2, "1.5"])
def test_another_version_is_refused(version, tmp_path):
    # Whatever else is in it: what a later version writes is not known.
    for header in (HEADER | {"version": version}, {"version": version, "rows": 3}):
        (tmp_path / "file").write_bytes(packed(header))
        refused(tmp_path / "file", LIKE, f"has version {version} .*this metaopt reads 1")

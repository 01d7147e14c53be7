"""Omniglot: the parts of the published split, and a refusal of all that is not sound."""

import functools
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from local_server import serving
from metaopt.datasets import DataError, load_omniglot
from metaopt.datasets._omniglot import OMNIGLOT_MD5


BACKGROUND, EVALUATION = "images_background.zip", "images_evaluation.zip"
# What becomes of each character. In the order of their names, in which they are kept.
CHARACTERS = {
    ("Gurmukhi", 41): "train",
    ("Gurmukhi", 42): "test",
    ("Hebrew", 1): "valid",
    ("Latin", 1): "train",
    ("Latin", 2): "train",
    ("Tibetan", 10): "test",
}
IN_EVALUATION = ("Tibetan",)


def drawing(alphabet: str, character: int, drawer: int) -> np.ndarray:
    """105 x 105 pixels, `True` for paper; another one for each drawing."""
    seed = [*alphabet.encode(), character, drawer]
    # In blocks, so that the files are small.
    paper = np.random.default_rng(seed).random((21, 21)) < 0.8
    return np.kron(paper, np.ones((5, 5), bool))


def shrunk(paper: np.ndarray) -> np.ndarray:
    """Ink is 255. Of the pixels, each that is nearest to the middle of one of the 28."""
    places = np.floor((np.arange(28) + 0.5) * 105 / 28).astype(int)
    return np.where(paper[np.ix_(places, places)], 0, 255).astype(np.uint8)


def png(paper: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(paper).save(stream, "PNG")
    return stream.getvalue()


def path_of(alphabet: str, character: int, drawer: int, folder: str) -> str:
    return f"{folder}/{alphabet}/character{character:02}/0{character:03}_{drawer:02}.png"


@functools.cache
def members_of(name: str) -> dict[str, bytes]:
    """What is in one of the archives. Other files than images too, as in the real ones."""
    folder = name.removesuffix(".zip")
    out = {f"{folder}/": b"", f"{folder}/Latin/": b"", f"{folder}/README.txt": b"text"}
    for alphabet, character in reversed(CHARACTERS):
        if (alphabet in IN_EVALUATION) == (name == EVALUATION):
            # Nor is the order that of the drawers.
            for drawer in range(20, 0, -1):
                image = png(drawing(alphabet, character, drawer))
                out[path_of(alphabet, character, drawer, folder)] = image
    return out


def zipped(members: Mapping[str, bytes | None]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return stream.getvalue()


@functools.cache
def published() -> dict[str, bytes]:
    return {name: zipped(members_of(name)) for name in (BACKGROUND, EVALUATION)}


def checksums_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


@pytest.fixture
def served(tmp_path):
    """A folder that a web server on this machine serves, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in published().items():
        (folder / name).write_bytes(content)
    with serving(folder) as address:
        yield folder, address


def files_below(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in files}


SERVED = {f"served/{BACKGROUND}", f"served/{EVALUATION}"}


# From a file


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "images": random.integers(0, 256, (6, 20, 28, 28), np.uint8),
        "vinyals_split": np.array([2, 0, 1, 0, 2, 0], np.uint8),
    }


def kept_at(root: Path) -> Path:
    path = root / "omniglot" / "omniglot28.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_parts_by_the_split(tmp_path, arrays, monkeypatch):
    np.savez_compressed(kept_at(tmp_path), **arrays, more=np.zeros(3))
    rows_of: Any = {"train": [1, 3, 5], "valid": [2], "test": [0, 4]}
    for part, rows in rows_of.items():
        data = load_omniglot(tmp_path, part=part, base_url=None)
        assert data.x.dtype == np.uint8 and data.name == f"Omniglot ({part})"
        np.testing.assert_array_equal(data.x, arrays["images"][rows])
        np.testing.assert_array_equal(data.counts, [20] * len(rows))
    # The default is the training part, and folders can be named in three ways.
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path))
    for data in (load_omniglot(str(tmp_path), base_url=None), load_omniglot()):
        np.testing.assert_array_equal(data.x, arrays["images"][[1, 3, 5]])


BAD_ARRAYS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "dtype": (
        lambda a: a | {"images": a["images"] / 255},
        r"`images` should be uint8 of shape \(n, 20, 28, 28\), but is float64 of shape",
    ),
    "signed": (lambda a: a | {"images": a["images"].astype(np.int8)}, "but is int8"),
    "drawers": (
        lambda a: a | {"images": a["images"][:, :19]},
        r"but is uint8 of shape \(6, 19, 28, 28\)",
    ),
    "pixels": (
        lambda a: a | {"images": a["images"][..., :27]},
        r"but is uint8 of shape \(6, 20, 28, 27\)",
    ),
    "axes": (
        lambda a: a | {"images": a["images"].reshape(120, 28, 28)},
        r"but is uint8 of shape \(120, 28, 28\)",
    ),
    "length of the split": (
        lambda a: a | {"vinyals_split": a["vinyals_split"][:5]},
        "`vinyals_split` should hold 0, 1 or 2 for each of the 6 characters",
    ),
    "axes of the split": (
        lambda a: a | {"vinyals_split": a["vinyals_split"][:, None]},
        "`vinyals_split` should hold 0, 1 or 2",
    ),
    "values of the split": (
        lambda a: a | {"vinyals_split": a["vinyals_split"] + np.uint8(1)},
        "`vinyals_split` should hold 0, 1 or 2",
    ),
    "split in words": (
        lambda a: a | {"vinyals_split": np.array(["train"] * 6)},
        "`vinyals_split` should hold 0, 1 or 2",
    ),
    "no images": (lambda a: {"vinyals_split": a["vinyals_split"]}, r"images\.npy"),
    "no split": (lambda a: {"images": a["images"]}, r"vinyals_split\.npy"),
    "no character of this part": (
        lambda a: a | {"vinyals_split": a["vinyals_split"] % 2 * 0 + 2},
        "holds no character of the train part",
    ),
    "no character": (
        lambda a: {"images": a["images"][:0], "vinyals_split": a["vinyals_split"][:0]},
        "holds no character of the train part",
    ),
    "pickled": (
        lambda a: a | {"vinyals_split": np.array([None] * 6, object)},
        "`vinyals_split` holds pickled Python objects",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(case, tmp_path, arrays):
    change, message = BAD_ARRAYS[case]
    path = kept_at(tmp_path)
    np.savez_compressed(path, **change(arrays))
    with pytest.raises(DataError, match=message) as caught:
        load_omniglot(tmp_path, base_url=None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not a zip file"), (b"<html></html>", "a web page"), (b"PK\3\4", "not a zip")],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = kept_at(tmp_path)
    path.write_bytes(content)
    # It is not replaced either: that is for the user to do.
    with pytest.raises(DataError, match=message) as caught:
        load_omniglot(tmp_path)
    assert str(path) in str(caught.value) and path.read_bytes() == content


@pytest.mark.parametrize("part", ["training", "validation", "Test", "", None, 0])
def test_a_part_that_there_is_not(part, tmp_path):
    # Whatever else is amiss, before anything is looked for.
    message = f"`part` must be one of train, valid, test; got {part!r}"
    with pytest.raises(ValueError, match=message) as caught:
        load_omniglot(tmp_path, part=part, base_url="http://127.0.0.1:9/")
    assert not isinstance(caught.value, DataError)


def test_absent_says_what_to_do(tmp_path, monkeypatch):
    message = r"not in .*omniglot\. Put `omniglot28.npz` .*`vinyals_split`.*METAOPT_DATA"
    with pytest.raises(DataError, match=message):
        load_omniglot(tmp_path, base_url=None)
    monkeypatch.delenv("METAOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"cache.metaopt.omniglot"):
        load_omniglot(base_url=None)
    assert list(tmp_path.iterdir()) == []


# From the network


def test_downloads_once(tmp_path, served):
    folder, url = served
    root = tmp_path / "data"
    load = functools.partial(
        load_omniglot, root, base_url=url, checksums=checksums_of(published())
    )
    first = load()
    assert files_below(root) == {"omniglot/omniglot28.npz"}
    kept = (root / "omniglot" / "omniglot28.npz").read_bytes()
    for name in published():
        (folder / name).unlink()
    for part in ("train", "valid", "test"):
        data = load(part=part)
        chosen = [name for name, its_part in CHARACTERS.items() if its_part == part]
        expected = [
            [shrunk(drawing(*character, drawer)) for drawer in range(1, 21)]
            for character in chosen
        ]
        np.testing.assert_array_equal(data.x, expected)
    np.testing.assert_array_equal(load().x, first.x)
    assert (root / "omniglot" / "omniglot28.npz").read_bytes() == kept


def test_paper_is_0_and_ink_is_255(tmp_path, served):
    # A drawing that is an L, upright: neither mirrored nor turned nor inverted.
    folder, url = served
    paper = np.ones((105, 105), bool)
    paper[15:90, 15:30] = paper[75:90, 15:75] = False
    member = path_of("Latin", 1, 7, "images_background")
    files = published() | {
        BACKGROUND: zipped(members_of(BACKGROUND) | {member: png(paper)})
    }
    (folder / BACKGROUND).write_bytes(files[BACKGROUND])
    data = load_omniglot(tmp_path / "a", base_url=url, checksums=checksums_of(files))
    image = data.x[1, 6]
    assert set(np.unique(image)) == {0, 255}
    rows, columns = np.nonzero(image)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 23, 4, 19)
    assert image[4, 4] == image[23, 4] == image[23, 19] == 255 and image[4, 19] == 0


def test_address_without_slash_and_other_checksums(tmp_path, served):
    checksums = {
        name: hashlib.sha256(content).hexdigest().upper()
        for name, content in published().items()
    }
    url = served[1].rstrip("/")
    assert load_omniglot(tmp_path / "a", base_url=url, checksums=checksums).num_classes == 3


def refused(
    tmp_path: Path, served: Any, files: dict[str, bytes], message: str, **options: Any
) -> str:
    """The text of the refusal, after which nothing is there that was not there before."""
    folder, url = served
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # The checksum agrees, so that what is tested is the next line of defence.
    options = {"checksums": checksums_of(files)} | options
    with pytest.raises(DataError, match=message) as caught:
        load_omniglot(tmp_path / "data", base_url=url, **options)
    text = str(caught.value)
    assert "METAOPT_DATA" in text and "127.0.0.1" in text
    assert files_below(tmp_path) == SERVED and not (tmp_path / "data").exists()
    return text


def test_published_checksums_are_the_default(tmp_path, served):
    md5 = "68d2efa1b9178cc56df9314c21c6e718"
    message = f"{BACKGROUND} is damaged or another file: its MD5 is .*, expected {md5}"
    refused(tmp_path, served, published(), message, checksums=None)
    assert list(OMNIGLOT_MD5) == [BACKGROUND, EVALUATION]


@pytest.mark.parametrize("name", [BACKGROUND, EVALUATION])
def test_a_wrong_checksum_is_refused(name, tmp_path, served):
    checksums = checksums_of(published()) | {name: "0" * 32}
    message = rf"{name} is damaged or another file.*expected {'0' * 32}"
    refused(tmp_path, served, published(), message, checksums=checksums)


def test_a_web_page_is_refused(tmp_path, served):
    files = published() | {EVALUATION: b"<html>Sign in</html>"}
    checksums = checksums_of(published())
    message = f"{EVALUATION} is a web page"
    refused(tmp_path, served, files, message, checksums=checksums)


def test_missing_on_the_server(tmp_path, served):
    (served[0] / EVALUATION).unlink()
    with pytest.raises(DataError, match=f"{EVALUATION} could not be downloaded.*404"):
        load_omniglot(
            tmp_path / "data", base_url=served[1], checksums=checksums_of(published())
        )
    assert not (tmp_path / "data").exists()


def test_too_large_a_download(tmp_path, served, monkeypatch):
    monkeypatch.setattr("metaopt.datasets._omniglot._MAX_PACKED", 100)
    refused(tmp_path, served, published(), "larger than the allowed 100 bytes")


def test_checksums_must_be_complete(tmp_path, served):
    checksums = {BACKGROUND: checksums_of(published())[BACKGROUND]}
    with pytest.raises(ValueError, match=f"`checksums`.*{EVALUATION}"):
        load_omniglot(tmp_path / "data", base_url=served[1], checksums=checksums)
    assert not (tmp_path / "data").exists()


MEMBER = path_of("Latin", 2, 20, "images_background")
OTHER = path_of("Latin", 2, 21, "images_background")


def noise(mode: str, size: tuple[int, int], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image = Image.frombytes(mode, size, np.random.default_rng(0).bytes(size[0] * size[1]))
    image.save(stream, kind)
    return stream.getvalue()


def blank(side: int) -> bytes:
    """A PNG of many pixels, which is a small file."""
    stream = io.BytesIO()
    Image.new("1", (side, side), 1).save(stream, "PNG")
    return stream.getvalue()


def broken_chunk() -> bytes:
    image = bytearray(png(drawing("Latin", 2, 20)))
    # Its length, of which the last byte is before its name.
    image[image.index(b"IDAT") - 1] //= 2
    return bytes(image)


BAD_MEMBERS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "drawer missing": ({MEMBER: None}, "19 drawings of character 2 of Latin, not 20"),
    "drawer too many": (
        {OTHER: png(drawing("Latin", 2, 21))},
        "21 drawings of character 2 of Latin, not 20",
    ),
    "oversized": ({MEMBER: noise("L", (300, 300))}, f"{MEMBER} is no small image"),
    "other size": (
        {MEMBER: noise("L", (105, 100))},
        f"{MEMBER} has 105 x 100 pixels, not 105 x 105",
    ),
    # 81 megabytes once were taken for it, in a file of 28 kilobytes.
    "many pixels": ({MEMBER: blank(9_000)}, "has 9000 x 9000 pixels, not 105 x 105"),
    # It once was an error of Pillow.
    "very many pixels": ({MEMBER: blank(14_000)}, "no sound archive.*exceeds limit"),
    "JPEG": ({MEMBER: noise("L", (105, 105), "JPEG")}, "no sound archive.*identify"),
    "text": ({MEMBER: b"text"}, "no sound archive of images.*cannot identify"),
    "nothing": ({MEMBER: b""}, "no sound archive of images.*cannot identify"),
    "cut short": (
        {MEMBER: png(drawing("Latin", 2, 20))[:-40]},
        "no sound archive of images",
    ),
    # It once was a `SyntaxError`.
    "broken chunk": ({MEMBER: broken_chunk()}, "no sound archive.*broken PNG"),
    "path out of the folder": (
        {"../../../escaped.png": png(drawing("Latin", 2, 1))},
        "no sound archive of images.*invalid literal",
    ),
    "no number of a character": (
        {"images_background/Latin/characterA/0001_01.png": png(drawing("Latin", 2, 1))},
        "no sound archive of images.*invalid literal",
    ),
    "no number of a drawer": (
        {"images_background/Latin/character02/0001.png": png(drawing("Latin", 2, 1))},
        "no sound archive of images",
    ),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_images_are_refused(case, tmp_path, served):
    change, message = BAD_MEMBERS[case]
    files = published() | {BACKGROUND: zipped(members_of(BACKGROUND) | change)}
    refused(tmp_path, served, files, message)


def patched(place: int, value: int, kind: bytes = b"PK\1\2") -> Callable[[bytes], bytes]:
    """Another number in the last entry of the list at the end of an archive, or before
    the entry itself."""

    def change(content):
        start = content.rindex(kind) + place
        return content[:start] + bytes([value]) + content[start + 1 :]

    return change


BAD_ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "not a zip file"),
    "cut short": (lambda c: c[:-30], "not a zip file"),
    "start cut off": (lambda c: c[5000:], "no sound archive of images"),
    "damaged": (
        lambda c: c[:5000] + bytes(b ^ 255 for b in c[5000:5300]) + c[5300:],
        "no sound archive of images",
    ),
    "damaged before an image": (
        lambda c: c[: c.index(b".png") + 4] + b"\7" + c[c.index(b".png") + 5 :],
        "no sound archive of images.*block type",
    ),
    # These four once were errors of another kind, without the name of a file.
    "beyond the end": (patched(29, 255, b"PK\3\4"), "no sound.*(EOFError|Overlapped)"),
    "encrypted": (patched(8, 1), "no sound archive of images.*encrypted"),
    "of a later version": (patched(6, 200), "no sound archive.*zip file version"),
    "compressed otherwise": (patched(10, 77), "no sound archive.*not supported"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
@pytest.mark.parametrize("name", [BACKGROUND, EVALUATION])
def test_bad_archives_are_refused(name, case, tmp_path, served):
    change, message = BAD_ARCHIVES[case]
    files = published() | {name: change(published()[name])}
    assert name in refused(tmp_path, served, files, message)


def test_archives_without_images_are_refused(tmp_path, served):
    # It once was an error of NumPy about nothing to stack.
    files = dict.fromkeys(published(), zipped({"images/README.txt": b"text"}))
    refused(tmp_path, served, files, "archives without any image in them")


def test_nothing_is_written_outside(tmp_path, served):
    folder, url = served
    image = png(drawing("Latin", 2, 1))
    names = [
        *("../escaped.png", "../../../../escaped.png", "/escaped.png", "..\\escaped.png"),
        *(f"../escaped/character01/0001_{drawer:02}.png" for drawer in range(1, 21)),
        *(f"images/../character01/0001_{drawer:02}.png" for drawer in range(1, 21)),
        *(f"/escaped_omniglot/character01/0001_{d:02}.png" for d in range(1, 21)),
    ]
    members = members_of(BACKGROUND) | dict.fromkeys(names, image)
    files = published() | {BACKGROUND: zipped(members)}
    (folder / BACKGROUND).write_bytes(files[BACKGROUND])
    root = tmp_path / "some" / "data"
    data = load_omniglot(root, base_url=url, checksums=checksums_of(files))
    # Three of them are names of drawings like any others.
    assert data.num_classes == 6
    kept = {"some/data/omniglot/omniglot28.npz"}
    assert files_below(tmp_path) == SERVED | kept
    for name in ("escaped.png", "escaped_omniglot"):
        assert not any(Path(at, name).exists() for at in ("/", *tmp_path.parents))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing(step, tmp_path, served, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, no_space)
        with pytest.raises(OSError, match="No space left"):
            load_omniglot(
                tmp_path / "data", base_url=served[1], checksums=checksums_of(published())
            )
    assert files_below(tmp_path) == SERVED


def test_without_pillow(tmp_path, served, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'metaopt-jax\[plot\]'"):
        load_omniglot(
            tmp_path / "data", base_url=served[1], checksums=checksums_of(published())
        )
    assert not (tmp_path / "data").exists()

"""Omniglot, from a folder or from the repository of its authors."""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from .._core._files import (
    data_folder,
    DataError,
    fetch,
    pillow,
    read_npz,
    write_atomically,
)
from ._class_data import ClassData


OMNIGLOT_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"

# Of the files there, as other libraries have checked them for years.
OMNIGLOT_MD5: Mapping[str, str] = MappingProxyType(
    {
        "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
        "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
    }
)

# The split of Vinyals et al. (2016): whole alphabets, but for the last four characters of
# Gurmukhi, which are in the test part. All others are in the training part.
_VALIDATION = frozenset(
    ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
)
_TEST = frozenset(
    (
        "Kannada",
        "Keble",
        "Malayalam",
        "Manipuri",
        "Mongolian",
        "Old_Church_Slavonic_(Cyrillic)",
        "Oriya",
        "Sylheti",
        "Syriac_(Serto)",
        "Tengwar",
        "Tibetan",
        "ULOG",
    )
)
_PARTS = ("train", "valid", "test")
_FILE = "omniglot28.npz"
_KEYS = ("images", "vinyals_split")
_SIZE = 28
_PUBLISHED_SIZE = 105
_NUM_DRAWERS = 20
_MAX_PACKED = 16 * 1024**2
_MAX_UNPACKED = 64 * 1024**2
_MAX_IMAGE = 64 * 1024

# Errors of `zipfile` and Pillow for damaged files: RuntimeError if one seems to be
# encrypted or compressed in another way, SyntaxError for a broken PNG.
_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    IndexError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
)


def load_omniglot(
    root: str | os.PathLike | None = None,
    *,
    part: Literal["train", "valid", "test"] = "train",
    base_url: str | None = OMNIGLOT_URL,
    checksums: Mapping[str, str] | None = None,
) -> ClassData:
    """Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people
    (Lake, Salakhutdinov and Tenenbaum, 2015).

    The parts are those of Vinyals et al. (2016), which have no alphabet in common (but for
    one, Gurmukhi): 1,028, 172 and 423 characters. Images have 28 x 28 pixels, ink 255 on
    paper 0. `data.with_rotations()` makes four classes of each character.

    Looks for `omniglot/omniglot28.npz` in `root`; where it is not there, downloads the two
    archives of the authors (16 MB), shrinks the images and keeps that file there. That
    needs Pillow, which comes with `metaopt-jax[plot]`.

    **Arguments:**

    - `root`: the folder that has, or gets, a subfolder `omniglot`. By default the folder
        named by the environment variable `METAOPT_DATA`, else `metaopt` in the user's
        cache folder.
    - `part`: `"train"`, `"valid"` or `"test"`.
    - `base_url`: where to download from; `None` to never download.
    - `checksums`: the MD5 of each of the two archives, by name; those of the published
        files by default. Only to be given together with another `base_url`.

    **Returns:**

    A [`metaopt.datasets.ClassData`][] with `x` uint8 of shape `(num_classes, 20, 28, 28)`.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason. A download is written
    only once all of it has proved sound.
    """
    if part not in _PARTS:
        raise ValueError(f"`part` must be one of {', '.join(_PARTS)}; got {part!r}.")
    folder = data_folder(root) / "omniglot"
    path = folder / _FILE
    if not path.exists():
        if base_url is None:
            raise DataError(f"Omniglot is not in {folder}. {_what_to_do(folder)}")
        try:
            content = _downloaded(
                base_url, OMNIGLOT_MD5 if checksums is None else checksums
            )
        except DataError as error:
            raise DataError(
                f"Omniglot is not in {folder}, and {error} {_what_to_do(folder)}"
            ) from error
        write_atomically(path, content)
    arrays = read_npz(path, _KEYS, _MAX_UNPACKED)
    images, split = arrays["images"], arrays["vinyals_split"]
    expected = (_NUM_DRAWERS, _SIZE, _SIZE)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
        raise DataError(
            f"{path} is not as expected: array `images` should be uint8 of shape (n, 20, "
            f"28, 28), but is {images.dtype} of shape {images.shape}."
        )
    if split.shape != (len(images),) or not np.all(np.isin(split, (0, 1, 2))):
        raise DataError(
            f"{path} is not as expected: array `vinyals_split` should hold 0, 1 or 2 for "
            f"each of the {len(images)} characters."
        )
    chosen = images[split == _PARTS.index(part)]
    if len(chosen) == 0:
        raise DataError(f"{path} holds no character of the {part} part.")
    return ClassData(chosen, name=f"Omniglot ({part})")


def _what_to_do(folder: Path) -> str:
    return (
        f"Put `{_FILE}` (uint8 arrays `images` of shape (n, 20, 28, 28) and "
        f"`vinyals_split` of shape (n,)) into {folder}, or name another folder that has "
        "it in its subfolder `omniglot` as `root=` or in the environment variable "
        "METAOPT_DATA."
    )


def _downloaded(base_url: str, checksums: Mapping[str, str]) -> bytes:
    """The content of the file that is kept."""
    characters: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for name in OMNIGLOT_MD5:
        if name not in checksums:
            raise ValueError(f"`checksums` must have an entry for {name}.")
        source = f"{base_url.rstrip('/')}/{name}"
        packed = fetch(source, checksums[name], _MAX_PACKED)
        for (alphabet, character), drawer, image in _images(packed, source):
            characters.setdefault((alphabet, character), {})[drawer] = image
    if not characters:
        raise DataError(f"{base_url} has archives without any image in them.")
    for (alphabet, character), drawn in characters.items():
        if sorted(drawn) != list(range(1, _NUM_DRAWERS + 1)):
            raise DataError(
                f"{base_url} has {len(drawn)} drawings of character {character} of "
                f"{alphabet}, not {_NUM_DRAWERS}."
            )
    order = sorted(characters)
    images = np.stack(
        [np.stack([characters[c][d + 1] for d in range(_NUM_DRAWERS)]) for c in order]
    )
    split = np.array([_part_of(*character) for character in order], np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, vinyals_split=split)
    return buffer.getvalue()


def _images(packed: bytes, source: str):
    """Each character, drawer and image in an archive. Nothing is unpacked to disk."""
    Image = pillow("Image")
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            for info in archive.infolist():
                parts = info.filename.split("/")
                if not info.filename.endswith(".png") or len(parts) != 4:
                    continue
                if info.file_size > _MAX_IMAGE:
                    raise DataError(f"{source}: {info.filename} is no small image.")
                with Image.open(io.BytesIO(archive.read(info)), formats=("PNG",)) as image:
                    # Before memory is taken for it: little can unpack to very much.
                    if image.size != (_PUBLISHED_SIZE, _PUBLISHED_SIZE):
                        raise DataError(
                            f"{source}: {info.filename} has {image.width} x "
                            f"{image.height} pixels, not {_PUBLISHED_SIZE} x "
                            f"{_PUBLISHED_SIZE}."
                        )
                    small = image.resize((_SIZE, _SIZE), Image.Resampling.NEAREST)
                    ink = 255 - np.asarray(small.convert("L"))
                character = int(parts[2].removeprefix("character"))
                drawer = int(parts[3].removesuffix(".png").split("_")[1])
                yield (parts[1], character), drawer, ink
    except DataError:
        raise
    except (*_READ_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{source} is no sound archive of images: {error!r}.") from error


def _part_of(alphabet: str, character: int) -> int:
    if alphabet in _VALIDATION:
        return 1
    return 2 if alphabet in _TEST or (alphabet == "Gurmukhi" and character > 41) else 0

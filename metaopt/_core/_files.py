"""Reading and fetching data files, with nothing in them trusted.

A file from elsewhere may be cut short, may be a web page, may be huge when unpacked, or
may hold pickled objects that run code when loaded. So: sizes are checked against a cap
before memory is taken for them, checksums before anything is unpacked, no pickle is
ever read, and a file appears under its name only when it is complete.
"""

import contextlib
import errno
import hashlib
import http.client
import importlib
import math
import os
import re
import tempfile
import tokenize
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


# The third and fourth byte of an IDX file: element type (0x08 is uint8) and number of
# axes; the first two are zero. http://yann.lecun.com/exdb/mnist/ defines the format.
_IDX_UINT8 = 0x08

_READ_ERRORS = (
    *(OSError, EOFError, KeyError, ValueError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


class DataError(ValueError):
    """A data file is missing, damaged or not the published one.

    The text names the file and the reason. No part of the file has been kept.
    """


def pillow(module: str) -> Any:
    """A module of Pillow, which is not always installed."""
    try:
        importlib.import_module("PIL")
        return importlib.import_module(f"PIL.{module}")
    except ImportError as error:
        raise ImportError(
            "To read images, Pillow is needed: `pip install 'metaopt-jax[plot]'`."
        ) from error


def data_folder(root: str | os.PathLike | None) -> Path:
    """The folder in which data sets are kept.

    **Arguments:**

    - `root`: a folder that the user named, or `None`.

    **Returns:**

    `root` if given; else the folder named by the environment variable `METAOPT_DATA`;
    else `metaopt` in the user's cache folder. It need not exist.
    """
    if root is not None:
        return Path(root)
    named = os.environ.get("METAOPT_DATA")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "metaopt"


def _is_web_page(content: bytes) -> bool:
    return content.lstrip()[:1] == b"<"


def check_checksum(content: bytes, checksum: str, source: str) -> None:
    """Raise a `DataError` unless the content has the published checksum.

    **Arguments:**

    - `content`: the whole content of a file.
    - `checksum`: the published one, in hexadecimal: an MD5 if it has 32 digits, and a
        SHA-256 otherwise.
    - `source`: where the content came from (a path or an address), for the message.
    """
    is_md5 = len(checksum) == 32
    name = "MD5" if is_md5 else "SHA-256"
    found = (hashlib.md5 if is_md5 else hashlib.sha256)(content).hexdigest()
    if found != checksum.lower():
        reason = (
            "is a web page, not the data"
            if _is_web_page(content)
            else "is damaged or another file"
        )
        raise DataError(
            f"{source} {reason}: its {name} is {found}, expected {checksum.lower()}."
        )


def fetch(url: str, checksum: str, max_bytes: int, timeout: float = 30.0) -> bytes:
    """Download one small file into memory and check it.

    **Arguments:**

    - `url`: where it is, an `http` or `https` address.
    - `checksum`: its published checksum, as for `check_checksum`.
    - `max_bytes`: reading stops with an error beyond this size.
    - `timeout`: how many seconds the server may be silent.

    **Returns:**

    The content. Nothing is written to disk.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{url} cannot be downloaded: not an http or https address.")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            content = response.read(max_bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        # urllib.error.URLError, a refused connection and a time-out are OSErrors.
        raise DataError(f"{url} could not be downloaded: {error!r}.") from error
    if len(content) > max_bytes:
        raise DataError(f"{url} is larger than the allowed {max_bytes:,} bytes.")
    check_checksum(content, checksum, url)
    return content


_PART = ".part"  # ends the names of files that are being written


def check_writable(path: Path, kind: str = "file") -> None:
    """Raise a `ValueError` for a file that cannot be written, which would be seen after
    hours otherwise."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        _check_no_device(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permission bits say little of what the superuser and network disks may do.
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name}.", suffix=_PART, dir=path.parent
        ):
            pass
    except OSError as error:
        raise ValueError(
            f"The {kind} {path} cannot be written: {error}. Name a file in a folder that "
            "you may write to."
        ) from error


def _check_no_device(path: Path) -> None:
    """Raise an `OSError` for a device or a pipe, which a file would take the place of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))


def remove_parts(path: Path) -> None:
    """Remove what processes that were killed while they wrote a file have left behind."""
    part = re.compile(re.escape(f".{path.name}.") + r"\w{8}" + re.escape(_PART))
    for name in os.listdir(path.parent):
        if part.fullmatch(name):
            path.with_name(name).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there complete or not at all.

    **Arguments:**

    - `path`: the file to write; its folder is made if need be.
    - `content`: the whole content.
    """
    with written_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write within a block, after which it is there complete, or not at all
    where the block raises.

    **Arguments:**

    - `path`: the file to write; its folder is made if need be.
    """
    _check_no_device(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(_PART, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp lets nobody else read it, but a data folder may be shared.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name is on the disk with this alone.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def parse_idx(content: bytes, num_axes: int, max_bytes: int, source: str) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (the format of MNIST).

    **Arguments:**

    - `content`: the whole gzipped file.
    - `num_axes`: how many axes the array must have.
    - `max_bytes`: the largest size that it may unpack to.
    - `source`: where the content came from, for messages.

    **Returns:**

    A uint8 array with `num_axes` axes.
    """
    if _is_web_page(content):
        raise DataError(f"{source} is a web page, not the data.")
    try:
        # A decompressor with a bound: a file of a few kilobytes can unpack to many
        # gigabytes.
        unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        raw = unpacker.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise DataError(f"{source} is not a sound gzip file: {error}.") from error
    if len(raw) > max_bytes:
        raise DataError(f"{source} unpacks to more than the allowed {max_bytes:,} bytes.")
    if not unpacker.eof:
        raise DataError(f"{source} is not a sound gzip file: it is cut short.")
    magic = bytes((0, 0, _IDX_UINT8, num_axes))
    if raw[:4] != magic:
        raise DataError(
            f"{source} has the wrong magic number {raw[:4].hex()}, expected "
            f"{magic.hex()} (IDX, unsigned bytes, {num_axes} axes)."
        )
    start = 4 + 4 * num_axes
    shape = tuple(
        int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(num_axes)
    )
    if len(raw) != start + math.prod(shape):
        raise DataError(
            f"{source} says it holds an array of shape {shape}, which takes "
            f"{start + math.prod(shape):,} bytes, but has {len(raw):,}."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _check_npz_member(archive: zipfile.ZipFile, key: str, max_bytes: int) -> None:
    info = archive.getinfo(f"{key}.npy")
    if info.file_size > max_bytes:
        raise ValueError(f"array `{key}` takes more than {max_bytes:,} bytes")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(member)
        else:
            header = np.lib.format.read_array_header_2_0(member)
    shape, _, dtype = header
    if dtype.hasobject:
        raise ValueError(f"array `{key}` holds pickled Python objects, which can run code")
    # NumPy takes memory for what the header claims before it reads on.
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(
            f"array `{key}` claims shape {shape}, more than its {info.file_size:,} "
            "bytes can hold"
        )


def write_npz(file: BinaryIO, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write named arrays as an `.npz` file, one after the other.

    Unlike `numpy.savez` this needs memory for one of them at a time, and raises the first
    error, such as that of a full disk, and not the one of closing the archive after it.

    **Arguments:**

    - `file`: an open file.
    - `arrays`: the names and the arrays.
    """
    first: BaseException | None = None
    try:
        with zipfile.ZipFile(file, "w") as archive:
            for key, array in arrays:
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    try:
                        np.lib.format.write_array(member, array, allow_pickle=False)
                    except BaseException as error:
                        first = error
                        raise
    except BaseException:
        if first is not None:
            raise first from None
        raise


def read_npz(path: Path, keys: Sequence[str], max_bytes: int) -> dict[str, np.ndarray]:
    """Read named arrays from an `.npz` file, never unpickling anything.

    **Arguments:**

    - `path`: the file.
    - `keys`: the names of the arrays.
    - `max_bytes`: the largest size that one of them may unpack to.

    **Returns:**

    A dictionary with those keys.
    """
    try:
        with path.open("rb") as file:
            if _is_web_page(file.read(64)):
                raise ValueError("it is a web page, not the data")
        with zipfile.ZipFile(path) as archive:
            for key in keys:
                _check_npz_member(archive, key, max_bytes)
                # NumPy reads as much as an array should take. If a damaged member holds
                # more, NumPy stops before its end and does not compare the checksum.
                with archive.open(f"{key}.npy") as member:
                    while member.read(2**20):
                        pass
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except _READ_ERRORS as error:
        reason = str(error) or repr(error)
        raise DataError(f"{path} cannot be read: {reason}.") from error

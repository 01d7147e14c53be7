"""Tiny Shakespeare, from a folder or from the repository that it was first in."""

import gzip
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .._core._files import check_checksum, data_folder, DataError, fetch, write_atomically
from ._text_data import TextData


TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
)

# Of the text itself: how it is packed makes no difference.
TINY_SHAKESPEARE_SHA256: Mapping[str, str] = MappingProxyType(
    {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
)

_PUBLISHED = "input.txt"
_FILE = "tinyshakespeare.txt.gz"
# The text has 1.1 MB.
_MAX_UNPACKED = 4 * 1024**2


def load_tiny_shakespeare(
    root: str | os.PathLike | None = None,
    *,
    base_url: str | None = TINY_SHAKESPEARE_URL,
    checksums: Mapping[str, str] | None = None,
) -> TextData:
    """Tiny Shakespeare: 1,115,394 characters of plays, 65 of them distinct (Karpathy,
    2015).

    For models of characters that train in minutes: small enough that a count of five
    characters is a strong baseline. The usual training part is the first 90 %:
    `train, valid, test = load_tiny_shakespeare().split()`.

    Looks for `text/tinyshakespeare.txt.gz` in `root`; where it is not there, downloads the
    text (1.1 MB) and keeps it there, packed. The text is checked against the checksum of
    the published one whenever it is read.

    **Arguments:**

    - `root`: the folder that has, or gets, a subfolder `text`. By default the folder named
        by the environment variable `METAOPT_DATA`, else `metaopt` in the user's cache
        folder.
    - `base_url`: where to download from; `None` to never download.
    - `checksums`: the SHA-256 of `input.txt`, the unpacked text, by that name; that of the
        published text by default. Only to be given together with another `base_url`.

    **Returns:**

    A [`metaopt.datasets.TextData`][] of the whole text.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason. A download is written
    only once all of it has proved sound.
    """
    checksums = TINY_SHAKESPEARE_SHA256 if checksums is None else checksums
    if _PUBLISHED not in checksums:
        raise ValueError(f"`checksums` must have an entry for {_PUBLISHED}.")
    checksum = checksums[_PUBLISHED]
    path = data_folder(root) / "text" / _FILE
    if path.exists():
        return _as_data(_read_cached(path, checksum), str(path))
    what_to_do = (
        f"Put `{_FILE}` (the text in UTF-8, packed by gzip) into {path.parent}, or name "
        "another folder that has it in its subfolder `text` as `root=` or in the "
        "environment variable METAOPT_DATA."
    )
    if base_url is None:
        raise DataError(f"Tiny Shakespeare is not in {path.parent}. {what_to_do}")
    source = f"{base_url.rstrip('/')}/{_PUBLISHED}"
    try:
        content = fetch(source, checksum, _MAX_UNPACKED)
        data = _as_data(content, source)
    except DataError as error:
        raise DataError(
            f"Tiny Shakespeare is not in {path.parent}, and {error} {what_to_do}"
        ) from error
    # Without the time, so that the same text makes the same file.
    write_atomically(path, gzip.compress(content, mtime=0))
    return data


def _read_cached(path: Path, checksum: str) -> bytes:
    try:
        # Read up to a bound: a file of a few kilobytes can unpack to many gigabytes.
        with gzip.open(path) as file:
            content = file.read(_MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error!r}. Delete it to download it anew."
        ) from error
    if len(content) > _MAX_UNPACKED:
        raise DataError(
            f"{path} unpacks to more than the allowed {_MAX_UNPACKED:,} bytes. Delete it "
            "to download it anew."
        )
    try:
        check_checksum(content, checksum, str(path))
    except DataError as error:
        raise DataError(f"{error} Delete it to download it anew.") from None
    return content


def _as_data(content: bytes, source: str) -> TextData:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not as expected: {error}.") from error
    return TextData.from_text(text, "Tiny Shakespeare")

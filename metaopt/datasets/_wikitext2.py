"""Two parts of WikiText-2, from a folder."""

import gzip
import io
import os
import zlib
from collections.abc import Mapping
from types import MappingProxyType

from .._core._files import DataError
from ._checked_files import checksum_of, find_file, read_checked
from ._token_data import TokenData


# Of the packed files.
_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "wikitext2.valid.tokens.gz": (
            "3cdd8cb5bb349a05840c7c3bef9578d90d64df77e27e0c25c033ba9342757ee3"
        ),
        "wikitext2.test.tokens.gz": (
            "688887879b4b526692cb2e423a516dcc5f6584a01fd3f33a8e164fbed2de8090"
        ),
    }
)
_NAME = "WikiText-2"
# The larger one has 0.4 MB packed and 1.3 MB unpacked.
_MAX_PACKED = 4 * 1024**2
_MAX_UNPACKED = 16 * 1024**2


def load_wikitext2_parts(
    root: str | os.PathLike | None = None,
    *,
    max_vocabulary: int | None = None,
    checksums: Mapping[str, str] | None = None,
) -> tuple[TokenData, TokenData]:
    """The validation and the test part of WikiText-2 (Merity et al., 2016), of 217,646 and
    245,569 words.

    For models of words that train in minutes: train on the first part, and test on the
    second. The training part of WikiText-2 is not here, so what comes out is no perplexity
    of WikiText-2. The vocabulary is that of the first part alone: other words of the second
    one are `<unk>`.

    Looks for `text/wikitext2.valid.tokens.gz` and `text/wikitext2.test.tokens.gz` in
    `root`. Nothing is downloaded.

    **Arguments:**

    - `root`: the folder that has a subfolder `text`. By default the folder named by the
        environment variable `METAOPT_DATA`, else `metaopt` in the user's cache folder.
    - `max_vocabulary`: how many words are told apart; the rarer ones are `<unk>`. By
        default all 13,777.
    - `checksums`: the SHA-256 of each of the two files, by its name, if they are others.

    **Returns:**

    A pair of [`metaopt.datasets.TokenData`][] with one vocabulary. The end of a line is a
    word too, `<eos>`.

    **Raises:**

    [`metaopt.datasets.DataError`][] naming the file and the reason.
    """
    wanted = {file: checksum_of(checksums, file, _SHA256[file]) for file in _SHA256}
    valid, test = (_read(root, file, checksum) for file, checksum in wanted.items())
    first = TokenData.from_text(valid, f"{_NAME} (valid)", max_size=max_vocabulary)
    second = TokenData.from_text(test, f"{_NAME} (test)", vocabulary=first.vocabulary)
    return first, second


def _read(root: str | os.PathLike | None, file: str, checksum: str) -> str:
    content = "words separated by spaces, in UTF-8, packed by gzip"
    path = find_file(root, "text", file, _NAME, content)
    packed = read_checked(path, checksum, _MAX_PACKED)
    try:
        # Read up to a bound: a file of a few kilobytes can unpack to many gigabytes.
        with gzip.open(io.BytesIO(packed)) as unpacked:
            raw = unpacked.read(_MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error!r}.") from error
    if len(raw) > _MAX_UNPACKED:
        raise DataError(f"{path} unpacks to more than the allowed {_MAX_UNPACKED:,} bytes.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not as expected: {error}.") from error
    if not text.strip():
        raise DataError(f"{path} holds no words.")
    return text

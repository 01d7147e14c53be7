"""Texts: the right characters from a sound file, a clear refusal of all others."""

import functools
import gzip
import hashlib
import os

import jax
import numpy as np
import pytest

from local_server import serving
from metaopt.datasets import DataError, load_tiny_shakespeare, TextData, TokenData


TEXT = "First Citizen:\nBefore we proceed, hear me.\n\nAll:\nSpeak – speak.\n"
FILE = "tinyshakespeare.txt.gz"


def checksums_of(content):
    return {"input.txt": hashlib.sha256(content).hexdigest()}


CHECKSUMS = checksums_of(TEXT.encode())


@pytest.fixture
def served(tmp_path):
    """The file that a web server on this machine serves, and the address of its folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "input.txt").write_bytes(TEXT.encode())
    with serving(folder) as address:
        yield folder / "input.txt", address


def kept(root, content):
    """A data folder with a file in it."""
    (root / "text").mkdir(parents=True)
    (root / "text" / FILE).write_bytes(content)
    return root


# The data type


def test_text_there_and_back():
    data = TextData.from_text(TEXT, "toy")
    assert data.text() == TEXT and len(data) == len(TEXT)
    assert data.alphabet == "".join(sorted(set(TEXT)))
    assert data.characters.dtype == np.int32
    assert data[3:9].text() == TEXT[3:9] and data[3:9].alphabet == data.alphabet
    assert len(TextData.from_text("")) == 0


def test_text_data_is_a_pytree():
    data = TextData.from_text(TEXT)
    assert len(jax.tree.leaves(data)) == 1
    total = jax.jit(lambda data: data.characters.sum() + len(data.alphabet))(data)
    assert total == data.characters.sum() + len(data.alphabet)


@pytest.mark.parametrize(
    "characters, alphabet, message",
    [
        (np.zeros(3), "ab", "`characters` must be int32"),
        (np.zeros((3, 1), np.int32), "ab", r"of shape \(length,\)"),
        (np.full(3, 2, np.int32), "ab", "must lie between 0 and 1"),
        (np.full(3, -1, np.int32), "ab", "must lie between 0 and 1"),
        (np.zeros(3, np.int32), "aba", "`alphabet` must hold each character once"),
    ],
)
def test_text_data_refuses(characters, alphabet, message):
    with pytest.raises(ValueError, match=message):
        TextData(characters, alphabet, "toy")


def test_split_is_by_position():
    data = TextData.from_text("0123456789" * 10)
    parts = data.split()
    assert [len(part) for part in parts] == [90, 5, 5]
    assert "".join(part.text() for part in parts) == data.text()
    assert all(part.alphabet == data.alphabet for part in parts)
    # What is beyond the sum is left out.
    assert [part.text() for part in data.split((0.02, 0.03))] == ["01", "234"]
    # Ten tenths are not quite 1.
    assert [len(part) for part in data.split([0.1] * 10)] == [10] * 10


@pytest.mark.parametrize(
    "fractions, message",
    [
        ((), "`fractions` must be a sequence"),
        (0.9, "`fractions` must be a sequence"),
        ((0.9, 0.2), "sum to at most 1"),
        ((0.9, 0.0), "must be positive"),
        ((0.9, -0.1), "must be positive"),
        ((float("nan"),), "must be positive"),
        ((0.9, 0.01), "leave a part of the 10 characters of toy empty"),
    ],
)
def test_split_refuses(fractions, message):
    with pytest.raises(ValueError, match=message):
        TextData.from_text("0123456789", "toy").split(fractions)


# From a folder


def test_from_a_folder(tmp_path, monkeypatch):
    kept(tmp_path, gzip.compress(TEXT.encode()))
    load = functools.partial(load_tiny_shakespeare, base_url=None, checksums=CHECKSUMS)
    assert load(tmp_path).text() == TEXT
    assert load(str(tmp_path)).name == "Tiny Shakespeare"
    monkeypatch.setenv("METAOPT_DATA", str(tmp_path))
    assert load().text() == TEXT


def test_absent_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=f"Put `{FILE}` .*METAOPT_DATA"):
        load_tiny_shakespeare(tmp_path, base_url=None)
    monkeypatch.delenv("METAOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"cache.metaopt.text"):
        load_tiny_shakespeare(base_url=None)
    assert list(tmp_path.iterdir()) == []


def test_checksums_must_be_complete(tmp_path):
    with pytest.raises(ValueError, match="`checksums`.*input.txt"):
        load_tiny_shakespeare(tmp_path, checksums={"other.txt": "0"})


NOT_UTF_8 = b"\xff\xfe" + TEXT.encode()
BAD_FILES = {
    "empty": (b"", CHECKSUMS, "SHA-256.*Delete it"),
    "not packed": (TEXT.encode(), CHECKSUMS, "cannot be read.*Delete it"),
    "cut short": (gzip.compress(TEXT.encode())[:-9], CHECKSUMS, "cannot be read"),
    "damaged": (
        gzip.compress(TEXT.encode())[:20] + b"\xff" * 40,
        CHECKSUMS,
        "cannot be read",
    ),
    "another text": (gzip.compress(b"other"), CHECKSUMS, "another file.*Delete it"),
    "bomb": (gzip.compress(bytes(5 * 1024**2)), CHECKSUMS, "unpacks to more than"),
    "not UTF-8": (gzip.compress(NOT_UTF_8), checksums_of(NOT_UTF_8), "not as expected"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_bad_files(case, tmp_path):
    content, checksums, message = BAD_FILES[case]
    kept(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        load_tiny_shakespeare(tmp_path, base_url=None, checksums=checksums)
    assert str(tmp_path / "text" / FILE) in str(caught.value)


# From the network


def test_downloads_once(tmp_path, served):
    file, url = served
    root = tmp_path / "data"
    # With a slash at the end of the address, and without.
    data = load_tiny_shakespeare(root, base_url=url, checksums=CHECKSUMS)
    assert data.text() == TEXT
    (path,) = (root / "text").iterdir()
    assert path.name == FILE and gzip.decompress(path.read_bytes()) == TEXT.encode()
    other = tmp_path / "other"
    load_tiny_shakespeare(other, base_url=url.rstrip("/"), checksums=CHECKSUMS)
    assert (other / "text" / FILE).read_bytes() == path.read_bytes()
    file.unlink()
    again = load_tiny_shakespeare(root, base_url=url, checksums=CHECKSUMS)
    assert again.text() == TEXT


@pytest.mark.parametrize(
    "content, checksums, message",
    [
        (b"something else", CHECKSUMS, "damaged or another file.*SHA-256"),
        (b"\n<html>Sign in</html>", CHECKSUMS, "web page, not the data.*SHA-256"),
        (bytes(5 * 1024**2), CHECKSUMS, "larger than the allowed"),
        (NOT_UTF_8, checksums_of(NOT_UTF_8), "not as expected"),
    ],
    ids=["another file", "web page", "too large", "not UTF-8"],
)
def test_refuses_bad_downloads(content, checksums, message, tmp_path, served):
    file, url = served
    file.write_bytes(content)
    root = tmp_path / "data"
    with pytest.raises(DataError, match=message) as caught:
        load_tiny_shakespeare(root, base_url=url, checksums=checksums)
    assert "input.txt" in str(caught.value) and "METAOPT_DATA" in str(caught.value)
    assert not root.exists()


def test_missing_on_the_server(tmp_path, served):
    file, url = served
    file.unlink()
    with pytest.raises(DataError, match="input.txt could not be downloaded.*404"):
        load_tiny_shakespeare(tmp_path / "data", base_url=url, checksums=CHECKSUMS)
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(
    "METAOPT_DATA" not in os.environ, reason="METAOPT_DATA names no folder with data"
)
def test_real_tiny_shakespeare():
    data = load_tiny_shakespeare(base_url=None)
    assert (len(data), len(data.alphabet)) == (1_115_394, 65)
    assert data[:14].text() == "First Citizen:"
    assert [len(part) for part in data.split()] == [1_003_855, 55_769, 55_770]


# Words


def test_words_there_and_back():
    data = TokenData.from_text("b a b\n\n b  c", "toy")
    assert data.text() == "b a b\n\nb c" and data.name == "toy"
    assert data.vocabulary == ("b", "<eos>", "a", "c", "<unk>")
    assert data.tokens.tolist() == [0, 2, 0, 1, 1, 0, 3] and data.tokens.dtype == np.int32
    assert data[1:3].text() == "a b" and data[1:3].vocabulary is data.vocabulary
    assert len(jax.tree.leaves(data)) == 1 and len(TokenData.from_text("")) == 0


def test_words_of_another_vocabulary():
    data = TokenData.from_text("a b b a a", max_size=2)
    assert data.vocabulary == ("a", "<unk>") and data.text() == "a <unk> <unk> a a"
    other = TokenData.from_text("c a", vocabulary=data.vocabulary)
    assert other.vocabulary == data.vocabulary and other.text() == "<unk> a"
    assert TokenData.from_text("a a", vocabulary=["a"]).vocabulary == ("a",)
    with pytest.raises(ValueError, match="neither the word 'c' of `text` nor '<unk>'"):
        TokenData.from_text("a c", vocabulary=["a"])
    with pytest.raises(ValueError, match="`max_size` must be at least 1"):
        TokenData.from_text("a c", max_size=0)
    # Room for all, `<unk>` included.
    assert TokenData.from_text("a b", max_size=3).vocabulary == ("a", "b", "<unk>")


def test_words_are_split_by_position():
    data = TokenData.from_text("a b c d e f g h i j")
    train, valid = data.split((0.8, 0.2))
    assert (train.text(), valid.text()) == ("a b c d e f g h", "i j")
    assert train.vocabulary == valid.vocabulary == data.vocabulary
    with pytest.raises(ValueError, match="leave a part of the 10 tokens of text empty"):
        data.split((0.9, 0.01))


@pytest.mark.parametrize(
    "tokens, vocabulary, message",
    [
        (np.zeros(3), ("a", "b"), "`tokens` must be int32"),
        (np.zeros((3, 1), np.int32), ("a", "b"), r"of shape \(length,\)"),
        (np.full(3, 2, np.int32), ("a", "b"), "must lie between 0 and 1"),
        (np.full(3, -1, np.int32), ("a", "b"), "must lie between 0 and 1"),
        (np.zeros(3, np.int32), ("a", "b", "a"), "each word once, got 'a' twice"),
        (np.zeros(3, np.int32), ["a", "b"], "`vocabulary` must be a tuple"),
    ],
)
def test_token_data_refuses(tokens, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        TokenData(tokens, vocabulary, "toy")

"""Text as the numbers of its words, and its parts."""

from collections import Counter
from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Int32

from .._core._validate import check_count
from ._positions import part_bounds


END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"


class TokenData(eqx.Module):
    """A text, word by word, held on the host as a NumPy array.

    It is a pytree with one leaf, `tokens`. `len(data)` is the number of tokens;
    `data[:1000]` selects some, with the same vocabulary. For single characters there is
    [`metaopt.datasets.TextData`][].

    !!! example

        ```python
        import metaopt as mo

        train = mo.datasets.TokenData.from_text("to be or not to be", name="a line")
        test = mo.datasets.TokenData.from_text("to see", vocabulary=train.vocabulary)
        print(test.text())  # to <unk>
        ```

    **Arguments:**

    - `tokens`: the place of each word in the vocabulary, int32 of shape `(length,)`.
    - `vocabulary`: the words that may occur, each once.
    - `name`: what the data are called in tables and pictures.

    **Raises:**

    `ValueError` if the shape, dtype or range is not that.
    """

    tokens: Int32[np.ndarray, " length"]
    vocabulary: tuple[str, ...] = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __check_init__(self):
        if self.tokens.ndim != 1 or self.tokens.dtype != np.int32:
            raise ValueError(
                "`tokens` must be int32 of shape (length,), got "
                f"{self.tokens.dtype} of shape {self.tokens.shape}."
            )
        if not isinstance(self.vocabulary, tuple):
            raise ValueError(
                f"`vocabulary` must be a tuple of words, got {self.vocabulary!r:.80}."
            )
        if len(set(self.vocabulary)) != len(self.vocabulary):
            twice = Counter(self.vocabulary).most_common(1)[0][0]
            raise ValueError(f"`vocabulary` must hold each word once, got {twice!r} twice.")
        if self.tokens.size and not (
            self.tokens.min() >= 0 and self.tokens.max() < len(self.vocabulary)
        ):
            raise ValueError(
                f"`tokens` must lie between 0 and {len(self.vocabulary) - 1} (`vocabulary` "
                f"has {len(self.vocabulary)} words), got values from {self.tokens.min()} "
                f"to {self.tokens.max()}."
            )

    @classmethod
    def from_text(
        cls,
        text: str,
        name: str = "text",
        *,
        vocabulary: Sequence[str] | None = None,
        max_size: int | None = None,
    ) -> "TokenData":
        """The data of a text whose words are separated by white space.

        The end of each line is a word too, `<eos>`.

        **Arguments:**

        - `text`: any string.
        - `name`: what the data are called in tables and pictures.
        - `vocabulary`: the words that are told apart, those of a training text in general.
            By default they are those of the text, the most frequent first, and `<unk>`.
        - `max_size`: the size beyond which rare words are left out of a vocabulary that is
            not given.

        **Returns:**

        A `TokenData`. Words that are not in the vocabulary are `<unk>`.

        **Raises:**

        `ValueError` for words that are in a `vocabulary` no more than `<unk>` is.
        """
        lines = [line.split() for line in text.split("\n")]
        words = [word for line in lines for word in (*line, END_OF_LINE)][:-1]
        if vocabulary is None:
            vocabulary = _most_frequent(words, max_size)
        known = {word: number for number, word in enumerate(vocabulary)}
        if UNKNOWN not in known:
            missing = [word for word in words if word not in known]
            if missing:
                raise ValueError(
                    f"`vocabulary` has neither the word {missing[0]!r} of `text` nor "
                    f"{UNKNOWN!r}, which would stand for it. Add one of them."
                )
        tokens = [known.get(word, known.get(UNKNOWN, -1)) for word in words]
        return cls(np.array(tokens, np.int32), tuple(vocabulary), name)

    def text(self) -> str:
        """The words as a string, separated by spaces and line ends."""
        lines: list[list[str]] = [[]]
        for token in self.tokens:
            word = self.vocabulary[token]
            if word == END_OF_LINE:
                lines.append([])
            else:
                lines[-1].append(word)
        return "\n".join(" ".join(line) for line in lines)

    def split(
        self, fractions: Sequence[float] = (0.9, 0.05, 0.05)
    ) -> tuple["TokenData", ...]:
        """Divide the text by position: no part holds text that follows a later part.

        **Arguments:**

        - `fractions`: how much of the text each part gets, positive and 1 in all at
            most; what is beyond their sum is left out.

        **Returns:**

        One `TokenData` for each entry of `fractions`, in that order, all with the
        vocabulary of the whole.

        **Raises:**

        `ValueError` where the fractions are no such numbers, or leave a part empty.
        """
        bounds = part_bounds(fractions, len(self), "tokens", self.name)
        return tuple(self[begin:end] for begin, end in bounds)

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def __getitem__(self, index: slice) -> "TokenData":
        """The tokens that a slice selects."""
        return TokenData(self.tokens[index], self.vocabulary, self.name)


def _most_frequent(words: Sequence[str], max_size: int | None) -> list[str]:
    """The words and `<unk>`, the most frequent first; up to `max_size` of them."""
    if max_size is not None:
        check_count(max_size, "max_size")
    # Of words that are as frequent, in the order of the alphabet.
    counted = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))
    vocabulary = [word for word, _ in counted]
    if max_size is not None and len({*vocabulary, UNKNOWN}) > max_size:
        vocabulary = [word for word in vocabulary if word != UNKNOWN][: max_size - 1]
    return vocabulary if UNKNOWN in vocabulary else [*vocabulary, UNKNOWN]

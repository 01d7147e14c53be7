"""Text as whole numbers, and its parts."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Int32

from ._positions import part_bounds


class TextData(eqx.Module):
    """A text, character by character, held on the host as a NumPy array.

    It is a pytree with one leaf, `characters`. `len(data)` is the number of characters;
    `data[:1000]` selects some, with the same alphabet.

    !!! example

        ```python
        import metaopt as mo

        data = mo.datasets.TextData.from_text("to be or not to be", name="a line")
        train, valid, test = data.split((0.5, 0.25, 0.25))
        print(train.text())
        ```

    **Arguments:**

    - `characters`: the place of each character in the alphabet, int32 of shape
        `(length,)`.
    - `alphabet`: the characters that may occur, each once.
    - `name`: what the data are called in tables and pictures.

    **Raises:**

    `ValueError` if the shape, dtype or range is not that.
    """

    characters: Int32[np.ndarray, " length"]
    alphabet: str = eqx.field(static=True)
    name: str = eqx.field(static=True)

    def __check_init__(self):
        if self.characters.ndim != 1 or self.characters.dtype != np.int32:
            raise ValueError(
                "`characters` must be int32 of shape (length,), got "
                f"{self.characters.dtype} of shape {self.characters.shape}."
            )
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(
                f"`alphabet` must hold each character once, got {self.alphabet!r}."
            )
        if self.characters.size and not (
            self.characters.min() >= 0 and self.characters.max() < len(self.alphabet)
        ):
            raise ValueError(
                f"`characters` must lie between 0 and {len(self.alphabet) - 1} (`alphabet` "
                f"has {len(self.alphabet)} characters), got values from "
                f"{self.characters.min()} to {self.characters.max()}."
            )

    @classmethod
    def from_text(cls, text: str, name: str = "text") -> "TextData":
        """The data of a text, whose alphabet is what occurs in it, sorted.

        **Arguments:**

        - `text`: any string.
        - `name`: what the data are called in tables and pictures.
        """
        codes = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
        distinct, characters = np.unique(codes, return_inverse=True)
        return cls(characters.astype(np.int32), "".join(map(chr, distinct)), name)

    def text(self) -> str:
        """The characters as a string."""
        return "".join(self.alphabet[i] for i in self.characters)

    def split(
        self, fractions: Sequence[float] = (0.9, 0.05, 0.05)
    ) -> tuple["TextData", ...]:
        """Divide the text by position: no part holds text that follows a later part.

        **Arguments:**

        - `fractions`: how much of the text each part gets, positive and 1 in all at
            most; what is beyond their sum is left out.

        **Returns:**

        One `TextData` for each entry of `fractions`, in that order, all with the alphabet
        of the whole.

        **Raises:**

        `ValueError` where the fractions are no such numbers, or leave a part empty.
        """
        bounds = part_bounds(fractions, len(self), "characters", self.name)
        return tuple(self[begin:end] for begin, end in bounds)

    def __len__(self) -> int:
        """The number of characters."""
        return len(self.characters)

    def __getitem__(self, index: slice) -> "TextData":
        """The characters that a slice selects."""
        return TextData(self.characters[index], self.alphabet, self.name)

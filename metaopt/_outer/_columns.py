"""The columns of a history, joined from those of its calls."""

import numpy as np


def joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The columns of a history; a step that lacks one has NaN there."""
    if not chunks:
        empty = np.zeros(0)
        return {"outer_loss": empty, "hypergradient_norm": empty, "seconds": empty}
    # A file has them in the order of the alphabet.
    leading = "outer_loss", "hypergradient_norm"
    names = dict.fromkeys(leading)
    names |= dict.fromkeys(name for chunk in reversed(chunks) for name in chunk)
    nans = lambda chunk: np.full(len(chunk["seconds"]), np.nan)
    return {
        name: np.concatenate(
            [chunk[name] if name in chunk else nans(chunk) for chunk in chunks]
        )
        for name in names
    }

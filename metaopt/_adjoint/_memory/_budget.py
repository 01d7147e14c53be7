"""A number of bytes, in the place of a plan."""

import re

import equinox as eqx


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)


class MemoryBudget(eqx.Module):
    """The most temporary memory that a hypergradient may take."""

    num_bytes: int = eqx.field(static=True)

    @classmethod
    def of(cls, size: int | float | str) -> "MemoryBudget":
        """A budget from a number of bytes, or a text such as `"2GiB"` or `"500 MB"`.

        **Raises:**

        `ValueError` for anything else, and for less than one byte.
        """
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if isinstance(size, bool) or (isinstance(size, str) and match is None):
            raise ValueError(
                "`memory` must be a memory plan, a number of bytes, or a text such as "
                f'`"2GiB"` or `"500MB"`; got {size!r}.'
            )
        if match is None:
            num_bytes = float(size)
        else:
            num_bytes = float(match[1]) * _UNITS[match[2].lower()]
        if not 1 <= num_bytes < float("inf"):
            raise ValueError(f"`memory` must be at least one byte; got {size!r}.")
        return cls(int(num_bytes))


def format_bytes(size: float) -> str:
    """A number of bytes as people write it, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"

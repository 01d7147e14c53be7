"""A wrong line that tests must notice; see `planted_faults.py`."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong line of metaopt, and the tests that must fail because of it.

    `right` stands exactly once in `file`, which is relative to the package. `tests` are
    modules or tests, as pytest takes them, relative to this folder.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str

    def plant(self, package: Path) -> None:
        """Replace the line in a copy of the package.

        **Raises:** `ValueError` where the line is not there, or more than once.
        """
        path = package / self.file
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        count = source.count(self.right)
        if count != 1:
            raise ValueError(
                f"Fault {self.name!r}: the text {self.right!r} stands {count} times in "
                f"metaopt/{self.file}; it must stand there once. Correct the row."
            )
        path.write_text(source.replace(self.right, self.wrong), encoding="utf-8")

"""Every Python example in the README, the docs and the docstrings runs.

The blocks of one page run in order and share their names, as a reader would type them.
A block that cannot run says why in a comment of its own just before it:
`<!-- no-test: needs eight devices -->`.
"""

import ast
import contextlib
import dataclasses
import io
import re
import sys
import textwrap
import types
from pathlib import Path

import jax
import matplotlib
import pytest


REPOSITORY = Path(__file__).parents[1]

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<ticks>```+)(?P<info>[^`]*)$")
_NO_TEST = re.compile(r"^\s*<!--\s*no-test:(?P<reason>.*)-->\s*$")


@dataclasses.dataclass(frozen=True)
class Block:
    code: str
    line: int  # of its first line of code in the page, from 1
    no_test: str | None  # the reason, if it is not to be run


def python_blocks(text: str) -> list[Block]:
    """The fenced Python blocks of a Markdown page, in order."""
    blocks = []
    lines = text.splitlines()
    previous = ""
    at = 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        if opening is None:
            previous = lines[at] if lines[at].strip() else previous
            at += 1
            continue
        start = at + 1
        end = start
        closing = re.compile(rf"^[ \t]*{opening['ticks']}`*[ \t]*$")
        while end < len(lines) and not closing.match(lines[end]):
            end += 1
        if end == len(lines):
            raise ValueError(f"the block that begins in line {at + 1} has no end")
        if re.match(r"(python|py)\b", opening["info"].strip()):
            marked = _NO_TEST.match(previous)
            blocks.append(
                Block(
                    code=textwrap.dedent("\n".join(lines[start:end])) + "\n",
                    line=start + 1,
                    no_test=marked["reason"].strip() if marked else None,
                )
            )
        previous = ""
        at = end + 1
    return blocks


_PRINTS = re.compile(r"^print\(.*\)  # (?P<says>[-\[\]\d., ]*\d[-\[\]\d., ]*)$", re.M)


def run(blocks: list[Block], filename: str) -> tuple[list[str], str]:
    """Run blocks in one namespace; a traceback shows the lines of the page.

    Returns what comments beside `print` say is printed, and all that was printed.
    """
    says, printed = [], io.StringIO()
    module = types.ModuleType("docs_page")
    # Classes look their module up when they are made.
    sys.modules["docs_page"] = module
    try:
        for block in blocks:
            if block.no_test is None:
                code = "\n" * (block.line - 1) + block.code
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, filename, "exec"), vars(module))
                says += [match["says"].strip() for match in _PRINTS.finditer(code)]
    finally:
        del sys.modules["docs_page"]
    return says, printed.getvalue()


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """An empty folder, no window, and JAX as it is when freshly installed."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def pages() -> dict[str, str]:
    """The text of each page that has an example, by its path in the repository."""
    candidates = [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted((REPOSITORY / "docs").rglob("*.md")),
    ]
    texts = {
        path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
        for path in candidates
        if path.exists()
    }
    return {name: text for name, text in texts.items() if "```py" in text}


def docstrings() -> dict[str, tuple[Path, int, str]]:
    """Docstrings with an example: their file, first line and text, by dotted name."""
    found = {}

    def visit(node: ast.AST, name: str, path: Path) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                visit(child, f"{name}.{child.name}", path)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node, clean=False)
            if doc is not None and "```py" in doc:
                found[name] = (path, node.body[0].lineno, doc)

    for path in sorted((REPOSITORY / "metaopt").rglob("*.py")):
        relative = path.relative_to(REPOSITORY).with_suffix("")
        visit(ast.parse(path.read_text(encoding="utf-8")), ".".join(relative.parts), path)
    return found


PAGES = pages()
# They compile for long.
LONG = [
    f"docs/{name}.md"
    for name in (
        "concepts",
        "equilibrium",
        "extending",
        "few_shot",
        "migrate",
        "self_tuning",
    )
]
DOCSTRINGS = docstrings()


@pytest.mark.filterwarnings("ignore:JAXopt is no longer:DeprecationWarning")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.ci] * (page in LONG)) for page in PAGES],
)
def test_page(page, as_a_reader):
    says, printed = run(python_blocks(PAGES[page]), str(REPOSITORY / page))
    assert [text for text in says if text not in printed] == []
    # Of the tasks of few-shot learning; other failures are errors.
    assert "did not succeed" not in printed


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_docstring(name, as_a_reader):
    path, line, doc = DOCSTRINGS[name]
    shifted = [
        dataclasses.replace(block, line=block.line + line - 1)
        for block in python_blocks(doc)
    ]
    says, printed = run(shifted, str(path))
    assert [text for text in says if text not in printed] == []


def test_blocks_left_out_say_why():
    texts = PAGES | {name: doc for name, (_, _, doc) in DOCSTRINGS.items()}
    silent = [
        f"{name}, line {block.line}"
        for name, text in texts.items()
        for block in python_blocks(text)
        if block.no_test == ""
    ]
    assert silent == []


PAGE = """\
```python
x = 1
```

    ```py title="indented"
    y = x + 1
    ```

```bash
exit 1
```

<!-- no-test: it fails -->

```python
raise SystemExit
```

````markdown
```python
raise SystemExit
```
````

```python
assert y == 2
```
"""


def test_blocks_are_found():
    blocks = python_blocks(PAGE)
    assert [block.line for block in blocks] == [2, 6, 16, 26]
    assert [block.no_test for block in blocks] == [None, None, "it fails", None]
    assert blocks[1].code == "y = x + 1\n"
    run(blocks, "page.md")


def test_a_failing_block_fails_at_its_line():
    blocks = python_blocks("# Title\n\n```python\nx = 1\nraise KeyError(x)\n```\n")
    with pytest.raises(KeyError) as caught:
        run(blocks, "page.md")
    entry = caught.traceback[-1]
    assert (str(entry.path).endswith("page.md"), entry.lineno + 1) == (True, 5)


def test_a_block_without_end_is_refused():
    with pytest.raises(ValueError, match="begins in line 1 has no end"):
        python_blocks("```python\nx = 1\n")

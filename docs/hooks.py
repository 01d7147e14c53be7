"""A hook of mkdocs: writes mathematics as MathML, the pages of examples and of result codes
and the version, and cleans up what is shown of classes without `__init__` docstring."""

import ast
import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

import metaopt as mo


# Python's text for every `__init__` that has none of its own. Equinox writes the
# `__init__` of modules, so nearly every class here would end with it.
_EMPTY_INIT = "<p>Initialize self.  See help(type(self)) for accurate signature.</p>"

# As `pymdownx.arithmatex` marks mathematics (`generic: true`).
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


_CODES = """\
# Result codes

`solution.result` and `report.result` are codes; `metaopt.RESULTS[result]` is the text of
one, which names the cause and the remedy. Under `throw=True`, the default, a code other
than `successful` is raised as a [`metaopt.SolveError`][] with this text. Codes of
optimistix and lineax pass through and are not listed.
"""

_GALLERY = """\
# Gallery

What the scripts in `examples/` draw. `python -m metaopt examples` lists them, and
`python -m metaopt examples run NAME` runs one; each writes its picture and, as
`metrics.json`, every figure to `runs/NAME`.
"""


def on_config(config, **_):
    config.copyright = f"metaopt {mo.__version__}, Apache-2.0"
    return config


def on_files(files: Files, config, **_) -> Files:
    theirs = set(mo.RESULTS.__mro__[1]._name_to_item)
    names = [name for name in mo.RESULTS._name_to_item if name not in theirs]
    parts = [f"## `{n}`\n\n{mo.RESULTS[getattr(mo.RESULTS, n)]}\n" for n in names]
    pages = {
        "result_codes.md": "\n".join([_CODES, *parts]),
        "gallery.md": _gallery(Path(config.config_file_path).parent),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def _gallery(root: Path) -> str:
    """The page of all examples, by their own docstrings."""
    parts = [_GALLERY]
    for script in sorted(root.glob("examples/[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
        assert docstring is not None
        title, text = docstring.split("\n\n", 1)
        picture = f"![{title.replace(chr(10), ' ')}](images/{script.stem}.png)"
        parts.append(f"## `{script.stem}`\n\n**{title}**\n\n{picture}\n\n{text}\n")
    return "\n".join(parts)


def on_page_content(content: str, **_) -> str:
    content = content.replace(_EMPTY_INIT, "")
    content = _INLINE.sub(lambda found: _mathml(found[1], "inline"), content)
    return _DISPLAY.sub(lambda found: _mathml(found[1], "block"), content)


def _mathml(latex: str, display: str) -> str:
    """MathML, which browsers render without a script or a network."""
    latex = html.unescape(latex).strip()
    mathml = convert(latex, display=display)
    # A command that the converter does not know comes out as it went in.
    unknown = re.search(r"\\[A-Za-z]+", mathml)
    if unknown:
        raise ValueError(f"{unknown[0]} in {latex!r} is unknown to latex2mathml.")
    return mathml

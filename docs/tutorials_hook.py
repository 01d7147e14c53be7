"""A hook of mkdocs: runs the scripts in `docs/tutorials` and shows them as pages.

Each is a Python script with cells in the percent format of jupytext, which runs by itself
as well. METAOPT_DOCS_RUN=0 shows them without their output, which is quicker.
"""

import concurrent.futures
import os
import pathlib
import tempfile

import jupytext
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor


_TIMEOUT = 600  # seconds of one cell
# Pictures are sharp on most screens, and warnings have no path of a temporary file.
_FIRST = """
import matplotlib
import warnings

matplotlib.rcParams["figure.dpi"] = 110
warnings.formatwarning = lambda text, kind, *_: f"{kind.__name__}: {text}\\n"
"""


def on_files(files: Files, config, **_) -> Files:
    scripts = [
        file
        for file in files
        if file.src_uri.startswith("tutorials/") and file.src_uri.endswith(".py")
    ]
    # One program compiles while the other one runs.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pages = list(pool.map(_page, [pathlib.Path(s.abs_src_path) for s in scripts]))
    for script, (text, pictures) in zip(scripts, pages):
        stem = script.src_uri.removesuffix(".py")
        name = pathlib.PurePosixPath(stem).name
        for picture, content in pictures.items():
            uri = f"{stem}_files/{picture}"
            text = text.replace(f"({picture})", f"({name}_files/{picture})")
            files.append(File.generated(config, uri, content=content))
        text += f"\n\n[The script of this page]({name}.py) runs by itself.\n"
        files.append(File.generated(config, f"{stem}.md", content=text))
    return files


def _page(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a script after a run, and its pictures by their names."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python"}
    if os.environ.get("METAOPT_DOCS_RUN") != "0":
        notebook.cells.insert(0, nbformat.v4.new_code_cell(_FIRST))
        # Agg, which a test may ask for, shows no pictures.
        environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook,
                timeout=_TIMEOUT,
                kernel_name="python3",
                resources={"metadata": {"path": folder}},
            )
            try:
                client.execute(env=environment | {"JAX_PLATFORMS": "cpu"})
            except CellExecutionError as error:
                raise PluginError(f"{path}: {error}") from error
        del notebook.cells[0]
        _check_prints(notebook.cells, path)
    exporter = MarkdownExporter()
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    text, resources = exporter.from_notebook_node(notebook)
    return text, resources["outputs"]


def _check_prints(cells: list[nbformat.NotebookNode], path: pathlib.Path) -> None:
    """Raise a `PluginError` where a cell is to print something, and prints nothing: what
    the text says of it is not so."""
    for cell in cells:
        if cell.cell_type != "code" or "print(" not in cell.source:
            continue
        if not any(output.get("name") == "stdout" for output in cell.outputs):
            raise PluginError(f"{path}: this cell prints nothing:\n{cell.source}")

"""The house rules, as tests: classes, public names, leftovers.

Nothing but these tests keeps the rules: Equinox does not enforce that a class is either
abstract or final. The rules for imports are in `test_imports.py`.
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest

import metaopt
from our_source import (
    COMMAND_LINE,
    import_module,
    module_name,
    MODULES,
    PACKAGE,
    parse,
    REPOSITORY,
    ROOT,
)


# Classes


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "metaopt"


def is_abstract_by_name(cls: type) -> bool:
    return cls.__name__.lstrip("_").startswith("Abstract")


def class_faults(cls: type[eqx.Module]) -> Iterator[str]:
    """What is wrong with a class under "a class is abstract or final"."""
    our_parents = [base for base in cls.__mro__[1:] if is_ours(base)]
    for base in our_parents:
        if not is_abstract_by_name(base):
            yield f"inherits from {base.__name__}, which is not abstract"
    overridden = {
        name
        for base in our_parents
        for name, value in vars(base).items()
        if not name.startswith("__")
        and not name.startswith("_abc_")
        and (callable(value) or isinstance(value, property | staticmethod))
        and name not in base.__abstractmethods__
    }
    for name in sorted(overridden & vars(cls).keys()):
        yield f"overrides the concrete method {name}"
    if is_abstract_by_name(cls):
        own = set(inspect.get_annotations(cls))
        for field in dataclasses.fields(cls):
            if field.name in own:
                yield f"is abstract but has the concrete field {field.name}"
    else:
        for name in sorted(cls.__abstractmethods__):
            yield f"is not named Abstract* but leaves {name} abstract"


def our_classes() -> dict[str, type[eqx.Module]]:
    return {
        f"{cls.__module__}.{cls.__name__}": cls
        for name in MODULES
        for cls in vars(import_module(name)).values()
        if inspect.isclass(cls)
        and issubclass(cls, eqx.Module)
        and cls.__module__ == import_module(name).__name__
    }


CLASSES = our_classes()


@pytest.mark.parametrize("name", CLASSES)
def test_class_is_abstract_or_final(name):
    assert list(class_faults(CLASSES[name])) == []


def test_class_faults_are_seen():
    class AbstractGood(eqx.Module):
        size: eqx.AbstractVar[int]

        def twice(self):
            return 2 * self.size

    class Good(AbstractGood):
        size: int

    class AbstractField(eqx.Module):
        size: int = 3

    class Child(Good):
        pass

    class Overriding(AbstractGood):
        size: int

        def twice(self):
            return 0

    for cls in (AbstractGood, Good, AbstractField, Child, Overriding):
        cls.__module__ = "metaopt.test"
    assert list(class_faults(AbstractGood)) == []
    assert list(class_faults(Good)) == []
    assert "concrete field size" in " ".join(class_faults(AbstractField))
    assert "inherits from Good" in " ".join(class_faults(Child))
    assert "overrides the concrete method twice" in " ".join(class_faults(Overriding))


# Public names


def exported_names(path: Path) -> list[str]:
    """The names that an `__init__.py` re-exports (`Y as Y`), modules left out."""
    return [
        alias.name
        for node in parse(path).body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
        if alias.name == alias.asname
    ]


def public_names() -> dict[str, object]:
    packages = [
        path
        for path in sorted(PACKAGE.rglob("__init__.py"))
        if not any(part.startswith("_") for part in path.relative_to(PACKAGE).parts[:-1])
    ]
    packages += [path for path in PACKAGE.glob("*.py") if not path.name.startswith("_")]
    names = {}
    for path in packages:
        module = import_module(module_name(path))
        for name in exported_names(path):
            names[f"{module.__name__}.{name}"] = getattr(module, name)
    names.pop("metaopt.__version__")  # a text, not an object with a docstring
    return names


PUBLIC = public_names()


def takes_arguments(function: object) -> bool:
    if not callable(function):
        return False
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(
        parameter.kind not in variadic and parameter.name != "self"
        for parameter in inspect.signature(function).parameters.values()
    )


def docstring_faults(value: object) -> Iterator[str]:
    """Which parts the docstring of a public class or function lacks."""
    doc = (value.__doc__ or "").strip()
    if inspect.isclass(value):
        # dataclasses write a docstring `Name(field: type)` where there is none.
        if not doc or doc.startswith(f"{value.__name__}("):
            yield "has no docstring"
        constructed = dataclasses.is_dataclass(value) and not is_abstract_by_name(value)
        if constructed and takes_arguments(value.__init__):
            text = doc + (value.__init__.__doc__ or "")
            if not ("**Arguments:**" in text or "**Attributes:**" in text):
                yield "has no **Arguments:** (**Attributes:** if users never build it)"
        for name in vars(value):
            method = getattr(value, name)
            if name.startswith("_") or not inspect.isroutine(method):
                continue
            if not inspect.getdoc(method):
                yield f"has a method {name} without docstring"
    elif callable(value):
        if not doc:
            yield "has no docstring"
        if takes_arguments(value) and "**Arguments:**" not in doc:
            yield "has no **Arguments:**"
        if (
            inspect.signature(value).return_annotation is not None
            and "**Returns:**" not in doc
        ):
            yield "has no **Returns:**"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_with_its_sections(name):
    assert list(docstring_faults(PUBLIC[name])) == []


def test_every_public_name_is_in_the_docs():
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in sorted((REPOSITORY / "docs" / "api").rglob("*.md"))
    )
    documented = set(re.findall(r"^\s*::: (\S+)\s*$", text, re.M))
    missing = [f"::: {name}" for name in PUBLIC if name not in documented]
    assert missing == []


def test_docstring_faults_are_seen():
    class Undocumented(eqx.Module):
        size: int

    class Half(eqx.Module):
        """A docstring."""

        size: int

        def twice(self):
            return 2 * self.size

    def function(x: int) -> int:
        """A docstring."""
        return x

    def documented(x: int) -> None:
        """A docstring.

        **Arguments:**

        - `x`: a number.
        """

    assert "has no docstring" in list(docstring_faults(Undocumented))
    faults = " ".join(docstring_faults(Half))
    assert "**Arguments:**" in faults and "method twice" in faults
    faults = " ".join(docstring_faults(function))
    assert "**Arguments:**" in faults and "**Returns:**" in faults
    assert list(docstring_faults(documented)) == []


def test_public_names_were_found():
    assert "metaopt.datasets.load_digits" in PUBLIC
    assert all(name.startswith("metaopt.") for name in PUBLIC)
    assert metaopt.__version__


# Contracts that are declared, not guessed


def contract_faults(tree: ast.AST) -> Iterator[str]:
    """Where a module asks what something happens to have, or leaves a contract open."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="hasattr" | "super" | "dir" as name)):
                yield f"line {node.lineno}: calls {name}()"
            case ast.Call(func=ast.Name(id="getattr"), args=[_, _, _]):
                yield f"line {node.lineno}: calls getattr() with a default"
            case ast.Name(id="__all__", ctx=ast.Store()):
                yield f"line {node.lineno}: has __all__, for which `Y as Y` stands here"
            case ast.AnnAssign(annotation=annotation, value=None) if re.match(
                r"(\w+\.)*ClassVar\b", ast.unparse(annotation)
            ):
                yield f"line {node.lineno}: a ClassVar without value; AbstractClassVar?"


@pytest.mark.parametrize("name", MODULES)
def test_contracts_are_declared(name):
    assert list(contract_faults(parse(MODULES[name]))) == []


def test_contract_faults_are_seen():
    def faults(source):
        return " ".join(contract_faults(ast.parse(source)))

    assert "hasattr()" in faults("hasattr(x, 'y')")
    assert "super()" in faults("class A:\n    def f(self):\n        super().f()")
    assert "dir()" in faults("'y' in dir(x)")
    assert "with a default" in faults("getattr(x, 'y', None)")
    assert "__all__" in faults("__all__ = ['x']") and "__all__" in faults("__all__ += y")
    assert "ClassVar" in faults("class A:\n    x: ClassVar[int]")
    assert "ClassVar" in faults("class A:\n    x: typing.ClassVar[int]")
    assert faults("class A:\n    x: AbstractClassVar[int]\n    y: ClassVar[int] = 1") == ""
    assert faults("getattr(x, 'y')\nvars(x)\nx.dir()") == ""


# Leftovers


# Only these speak to a person directly; all else returns what it has to say.
MAY_PRINT = {"__main__"}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in MAY_PRINT])
def test_no_print(name):
    printed = [
        f"line {node.lineno}"
        for node in ast.walk(parse(MODULES[name]))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printed == []


def test_no_unfinished_business():
    # In pieces, so that this file does not find itself.
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
    folders = ("metaopt", "tests", "examples", "benchmarks", "docs")
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*"))
        if path.suffix in (".py", ".md")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


# `__init__.py` files


def is_reexport(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.ImportFrom)
        and node.level > 0
        and all(alias.asname == alias.name for alias in node.names)
    )


def is_root_extra(node: ast.stmt) -> bool:
    """What the package's own `__init__.py` may do besides: the warning."""
    match node:
        case ast.ImportFrom(module="_core._self_test"):
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id=called), args=[], keywords=[])):
            return called.endswith("warn_if_known_bad")
        case ast.FunctionDef(name="__dir__"):
            return True
    return False


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, path in MODULES.items()
        if path.name == "__init__.py" or name in ("accuracy", "extend", "linear")
    ],
)
def test_init_files_only_reexport(name):
    module = parse(MODULES[name])
    body = module.body[1:] if ast.get_docstring(module) is not None else module.body
    other = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in body
        if not is_reexport(node) and not (name == ROOT and is_root_extra(node))
    ]
    assert other == []


# Sizes


MAX_FILE, MAX_FUNCTION = 400, 60  # lines; those of a function without its docstring


def long_functions(text: str) -> list[str]:
    lines, found = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            begin = (first.end_lineno if has_docstring else first.lineno - 1) or 0
            code = [line.strip() for line in lines[begin : node.end_lineno]]
            if sum(bool(line) and not line.startswith("#") for line in code) > MAX_FUNCTION:
                found.append(node.name)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    assert long_functions(text) == []


def test_long_functions_are_seen():
    text = "def function():\n    'Text.'\n    # A comment.\n" + 60 * "    x = 1\n"
    assert long_functions(text) == []
    assert long_functions(text + "    x = 2\n") == ["function"]


def test_the_root_is_small():
    assert len(dir(metaopt)) <= 70
    entries = {name.split(".")[0] for name in MODULES} - {ROOT, COMMAND_LINE}
    assert len(entries) <= 32


# English


def prose(text: str) -> Iterator[str]:
    """The docstrings and the comments of a module, comments in a row as one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments, last = [], 0
    for token in tokens:
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and comments:
                yield " ".join(comments)
                comments = []
            comments.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(comments)


def indirect_sentences(text: str) -> list[str]:
    """The sentences whose subject is a relative clause, which have to be read twice."""
    opening = r"(?:^|(?<=[.:!?]\s)|\n\s*\n\s*)((?:What|Where|How)\b[^?]{0,40})(?!\?)"
    return [found for part in prose(text) for found in re.findall(opening, part)]


@pytest.mark.parametrize("name", MODULES)
def test_sentences_begin_with_their_subject(name):
    assert indirect_sentences(MODULES[name].read_text(encoding="utf-8")) == []


def test_indirect_sentences_are_seen():
    text = '"""Text. What is left is\nnothing."""\n\n# Where it is.\nx = 1\n'
    assert indirect_sentences(text) == ["What is left is\nnothing.", "Where it is."]


# The third person of the verbs that the first line of a docstring tends to begin with.
VERBS = frozenset(
    "Adapts Adds Applies Binds Brings Calls Checks Compares Computes Counts Divides Draws "
    "Evaluates Finds Gives Goes Keeps Loads Looks Makes Measures Pulls Puts Raises Reads "
    "Refuses Removes Repeats Returns Runs Says Scores Serves Sets Solves Sorts Splits "
    "Stops Takes Tells Trains Turns Undoes Updates Uses Waits Warns Writes".split()
)


def descriptive_docstrings(text: str) -> list[str]:
    """The functions whose docstrings begin in the third person."""
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
    ]
    first = lambda node: ((ast.get_docstring(node) or "").split() or [""])[0]
    return [node.name for node in functions if first(node) in VERBS]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_of_functions_are_imperative(name):
    assert descriptive_docstrings(MODULES[name].read_text(encoding="utf-8")) == []


def test_descriptive_docstrings_are_seen():
    functions = "Draws it.", "Draw it.", "The draws."
    text = "".join(f"def f{i}():\n    '{doc}'\n" for i, doc in enumerate(functions))
    assert descriptive_docstrings(text) == ["f0"]

"""The tables of planted faults fit the sources. `planted_faults.py` plants them."""

import ast
import collections
from pathlib import Path

import pytest

from faults import Fault, FAULTS
from our_source import PACKAGE


TESTS = Path(__file__).parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_wrong_line_replaces_one_that_is_there_once(fault):
    source = (PACKAGE / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.right) == 1
    planted = source.replace(fault.right, fault.wrong)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_tests_that_must_notice_are_there(fault):
    for test in fault.tests.split():
        module, _, name = test.partition("::")
        text = (TESTS / module).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text


def test_names_are_different():
    counts = collections.Counter(fault.name for fault in FAULTS)
    assert counts.most_common(1)[0][1] == 1


@pytest.mark.parametrize("right, count", [("missing", 0), ("line", 2)])
def test_a_text_that_is_not_there_once_is_refused(tmp_path, right, count):
    (tmp_path / "file.py").write_text("line\nline\n")
    with pytest.raises(ValueError, match=f"stands {count} times in metaopt/file.py"):
        Fault("name", "file.py", right, "wrong", "test_x.py").plant(tmp_path)

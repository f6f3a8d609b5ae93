"""The list of changed lines that `make mutants` tries is that of the code as it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from drills.mutants import LIST, ROOT, Mutant, read_mutants

MUTANTS = read_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_each_line_stands_once_in_its_file_and_its_change_is_code(mutant: Mutant, tmp_path: Path) -> None:
    copy = tmp_path / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / mutant.file).read_text(encoding="utf-8"), encoding="utf-8")
    before = mutant.apply(tmp_path)
    assert copy.read_text(encoding="utf-8") != before
    assert ast.dump(ast.parse(copy.read_text(encoding="utf-8"))) != ast.dump(ast.parse(before)), "more than a comment"
    assert mutant.tests
    assert [test for test in mutant.tests if not (ROOT / test.partition("::")[0]).is_file()] == []


def test_no_change_is_listed_twice_and_a_line_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert len({(one.file, one.line, one.changed) for one in MUTANTS}) == len({one.what for one in MUTANTS})
    assert len(MUTANTS) == LIST.read_text(encoding="utf-8").count("\n- what: ")
    (tmp_path / "a.py").write_text("x = 1\nif x:\n    x = 1\n")
    for line, times in (("x = 1", 2), ("x = 2", 0)):
        with pytest.raises(ValueError, match=rf"a\.py has this line {times} times, not once: {line}"):
            Mutant("", "a.py", line, "", []).apply(tmp_path)

"""tests/matrix.py and the markers of conftest.py: every test is in a cell, and no cell loses its tests unnoticed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.matrix import CELLS, MARKERS, selects

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def every(request, markers_of_all):
    """The markers of every test by its id, in a run that collects them all."""
    if request.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        pytest.skip("only some files were collected")
    return markers_of_all


def test_every_file_has_tests(every):
    files = {path for path in TESTS.glob("*/*.py") if path.parent.name != "support" and path.name != "conftest.py"}
    assert {f"tests/{path.relative_to(TESTS).as_posix()}" for path in files} == {
        name.partition("::")[0] for name in every
    }


def test_every_test_is_in_a_cell(every):
    assert not [name for name, markers in every.items() if not any(selects(cell.runs, markers) for cell in CELLS)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cells_have_their_tests(every, cell):
    assert set(re.findall(r"\w+", cell.runs)) - {"and", "or", "not"} <= set(MARKERS)
    count = sum(selects(cell.runs, markers) for markers in every.values())
    assert count == cell.tests, "tests were added or have dropped out: see which, then change the number in matrix.py"


def test_every_marker_is_used(every):
    assert set(MARKERS) <= set.union(*every.values())


def test_expressions():
    for expression, markers, taken in (
        ("deep", {"deep"}, True),
        ("not deep", {"deep"}, False),
        ("(ops or kernels) and not host", {"kernels"}, True),
        ("(ops or kernels) and not host", {"ops", "host"}, False),
        ("notes or order", set(), False),
    ):
        assert selects(expression, markers) == taken


def test_each_value_once():
    """Every value is met, no case is there for nothing, and the first of all comes first."""
    cases = [SimpleNamespace(callspec=SimpleNamespace(params={"a": a, "b": b})) for a in range(3) for b in range(5)]
    chosen = [case.callspec.params for case in conftest.each_value_once(cases)]
    assert len(chosen) == 5
    assert chosen[0] == {"a": 0, "b": 0}
    assert {case["a"] for case in chosen} == set(range(3))
    assert {case["b"] for case in chosen} == set(range(5))

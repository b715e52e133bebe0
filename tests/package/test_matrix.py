"""tests/matrix.py and the markers of conftest.py: every test is in a cell, and no cell loses its tests unnoticed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest
from tests.matrix import CELLS, MARKERS, selects

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def every(markers_of_all):
    """The markers of every test by its id, where all were collected."""
    collected = {name.partition("::")[0] for name in markers_of_all}
    files = {f"tests/{path.relative_to(TESTS)}" for path in TESTS.rglob("test_*.py")}
    left_out = {path for path in files if conftest.lacking(path.split("/")[1])}
    if files - left_out - collected:
        pytest.skip("looks at all tests, and some were not collected")
    return markers_of_all


def test_every_test_is_in_a_cell(every):
    assert not [
        name
        for name, markers in every.items()
        if not markers & {"gpu", "timm"} and not any(selects(cell.runs, markers) for cell in CELLS)
    ]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_cells_have_their_tests(every, cell):
    assert set(re.findall(r"\w+", cell.runs)) - {"and", "or", "not"} <= set(MARKERS)
    if any(conftest.lacking(folder) for folder in conftest.NEEDS):
        pytest.skip("some folders were left out")
    count = sum(selects(cell.runs, markers) for markers in every.values())
    assert count >= cell.at_least, "tests have dropped out of this cell; where that is meant, change at_least"
    assert count <= cell.at_least * 1.1 + 10, "the cell has grown: raise at_least, so that it goes on to notice"


def test_every_marker_is_used(every):
    assert set.union(*every.values()) - {"parametrize", "usefixtures", "filterwarnings", "skipif", "hypothesis"} <= set(
        MARKERS
    )
    assert {name for name, markers in every.items() if "gpu" in markers}
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

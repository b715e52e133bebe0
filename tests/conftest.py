"""What all tests share: their markers, which of them are quick, devices, and the state that each begins with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import roadmap_ext
from tests.matrix import MARKERS

HERE = Path(__file__).resolve().parent
_TRAINING = ("PIL", "matplotlib", "sklearn", "tqdm")
NEEDS = {
    "training": _TRAINING,
    "comparison": (*_TRAINING, "pytorch_metric_learning"),
    "integrations": ("pytorch_metric_learning",),
}
"""Packages that a folder's tests need and the package does not. Where one is missing, the folder is left out."""
MARKERS_OF_ALL = pytest.StashKey[dict[str, set[str]]]()


def pytest_configure(config):
    """Markers are registered where they are explained."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def lacking(folder):
    """The packages that this folder needs and that are not installed."""
    return [name for name in NEEDS.get(folder, ()) if find_spec(name) is None]


def pytest_ignore_collect(collection_path):
    """Leaves out folders whose packages are missing."""
    return True if collection_path.parent == HERE and lacking(collection_path.name) else None


def pytest_report_header():
    """Says which folders are left out."""
    return [f"tests/{name} is left out: there is no {', '.join(lacking(name))}" for name in NEEDS if lacking(name)]


def each_value_once(cases):
    """Picks from the cases of one test enough to use every value of every parameter: values, not combinations.

    So `make test` meets every dtype, size and setting, and `make test-deep` all their combinations.
    """
    chosen, seen = [], set()
    cases = [(case, {(name, id(value)) for name, value in case.callspec.params.items()}) for case in cases]
    while cases:
        case, values = max(cases, key=lambda pair: len(pair[1] - seen))
        if not values - seen:
            break
        chosen.append(case)
        seen |= values
    return chosen


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Marks each test with its folder, and as deep each case that uses no new value of a parameter."""
    functions = {}
    for item in items:
        item.add_marker(item.path.relative_to(HERE).parts[0])
        if hasattr(item, "callspec") and not item.get_closest_marker("deep"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        quick = each_value_once(cases)
        for case in cases:
            if case not in quick:
                case.add_marker("deep")
    config.stash[MARKERS_OF_ALL] = {item.nodeid: {marker.name for marker in item.iter_markers()} for item in items}
    if not torch.cuda.is_available() or not roadmap_ext.build_info()["cuda"]:
        reason = "no CUDA device" if not torch.cuda.is_available() else roadmap_ext.build_info()["cuda_reason"]
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def markers_of_all(request):
    """The markers of every test that was collected, chosen by -m or not, by its id."""
    return request.config.stash[MARKERS_OF_ALL]


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # The training program asks for deterministic algorithms.
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]

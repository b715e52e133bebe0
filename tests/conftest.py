"""Shared inputs and the devices that tests run on."""

from importlib.util import find_spec

import pytest
import torch

import roadmap_ext

_TRAINING = ("PIL", "matplotlib", "sklearn", "tqdm")  # what the training program takes, and the package does not
_MISSING = [name for name in _TRAINING if find_spec(name) is None]
_COMPARISON = [*_MISSING, *(["pytorch_metric_learning"] if find_spec("pytorch_metric_learning") is None else [])]
_LACKS = dict.fromkeys(("test_training.py", "test_recipes.py", "test_datasets.py"), _MISSING) | {
    "test_quality.py": _COMPARISON
}
collect_ignore = [name for name, lacks in _LACKS.items() if lacks]


def pytest_report_header():
    """Says what is not tested."""
    return [f"{name} is left out: there is no {', '.join(lacks)}" for name, lacks in _LACKS.items() if lacks]


def pytest_collection_modifyitems(items):
    """Tests marked cuda run where there is a GPU and kernels for it, and say why not elsewhere."""
    if torch.cuda.is_available() and roadmap_ext.build_info()["cuda"]:
        return
    reason = "no CUDA device" if not torch.cuda.is_available() else roadmap_ext.build_info()["cuda_reason"]
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


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

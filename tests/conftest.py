"""Shared inputs and the devices that tests run on."""

import pytest
import torch

import roadmap_ext


def pytest_collection_modifyitems(items):
    """Tests marked cuda run where there is a GPU and kernels for it, and say why not elsewhere."""
    if torch.cuda.is_available() and roadmap_ext.build_info()["cuda"]:
        return
    reason = "no CUDA device" if not torch.cuda.is_available() else roadmap_ext.build_info()["cuda_reason"]
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

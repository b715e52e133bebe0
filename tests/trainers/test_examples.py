"""The examples of trainers and their page: each learns, and resumes to the bits of a run that never stopped."""

import importlib
import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.deep

# What each needs, and a run of half the length and of all of it.
EXAMPLES = {
    "with_lightning": ("lightning", {"epochs": 1}, {"epochs": 2}),
    "with_hf_trainer": ("transformers", {"steps": 10}, {"steps": 20}),
    "with_accelerate": ("accelerate", {"epochs": 1}, {"epochs": 2}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch):
    package, half, all_of_it = EXAMPLES[name]
    pytest.importorskip(package, reason="needs the packages of `make test-deep CELLS=trainers`")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    example = importlib.import_module(name)
    whole, measured = example.main(**all_of_it, out=tmp_path / "whole")
    (reached,) = [value for key, value in measured.items() if key.endswith("mAP@R")]
    assert reached > 0.6
    example.main(**half, out=tmp_path / "parts")
    resumed, again = example.main(**all_of_it, out=tmp_path / "parts", resume=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [value for key, value in again.items() if key.endswith("mAP@R")] == [reached]
    assert len(Path(example.__file__).read_text().splitlines()) <= 60


def test_every_block_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/trainers.md").read_text()
    scope = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(block, scope)
    assert 0 < scope["measured"]["mAP@R"] < scope["measured"]["R@10"] <= 1
    assert scope["network"].weight.grad.abs().sum() > 0
    assert [name for name in EXAMPLES if f"`examples/{name}.py`" not in page] == []

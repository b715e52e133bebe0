"""python -m roadmap_ext: what a bug report needs, and a self-test that notices a wrong kernel."""

import re

import pytest
import torch

import roadmap_ext
from roadmap_ext import __main__ as report
from roadmap_ext import losses


def test_what_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(report, "_SECONDS", 0.0)
    assert report.main([]) == 0
    said = capsys.readouterr().out
    info = roadmap_ext.build_info()
    for line in (f"version +{info['version']}", f"cpu +{info['cpu']}", r"torch +" + re.escape(torch.__version__)):
        assert re.search(rf"^  {line}", said, re.MULTILINE), line
    assert (
        len(re.findall(r"^  cpu (?:ap_loss|roadmap_loss), .* \d\.\de[-+]\d\d \(\d\.\de[-+]\d\d\)$", said, re.MULTILINE))
        == 10
    )
    assert len(re.findall(r"^  cpu .*\d ms", said, re.MULTILINE)) == 4
    assert said.rstrip().endswith("self-test: passed")


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.0001, lambda loss: loss * float("nan")])
def test_a_wrong_kernel_fails(capsys, monkeypatch, wrong):
    right = losses.ap_loss
    monkeypatch.setattr(losses, "ap_loss", lambda *given, **settings: wrong(right(*given, **settings)))
    assert report.main(["--no-benchmark"]) == 1
    said = capsys.readouterr().out
    assert said.count("  FAILED") == 8
    assert said.rstrip().endswith("self-test: 8 failed")
    assert "benchmark" not in said


def test_without_kernels(capsys, monkeypatch):
    monkeypatch.setattr(report, "build_info", lambda: {**roadmap_ext.build_info(), "cpu": "reference", "cuda": False})
    assert report.main([]) == 0
    assert capsys.readouterr().out.rstrip().endswith("self-test: none, for there are no kernels")

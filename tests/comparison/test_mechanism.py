"""benchmarks/mechanism.py: that its experiments are what it says, and that table and figures come of a few runs."""

import csv

import pytest
import torch

from benchmarks import mechanism
from benchmarks.mechanism import NEAR, Recovery, Setting, Trained, aps, at_batch_ap, crowded, draw, pull, recover, train


def test_a_crowd_outranks_the_class():
    vectors, labels = crowded(0.4, 0)
    scores = vectors @ vectors.T
    torch.testing.assert_close(scores.diagonal(), torch.ones(192))
    same = (labels[:, None] == labels).fill_diagonal_(False)
    assert (same.sum(1) == 3).all()
    assert scores[same].mean() == pytest.approx(NEAR, abs=0.01)
    crowd = (scores > 0.4) & ~torch.eye(192, dtype=torch.bool)
    assert (crowd.sum(1) == 31).all()
    assert not (crowd & same).any()
    assert scores[crowd].mean() == pytest.approx(NEAR + 0.4, abs=0.01)


def test_the_pull_on_a_positive():
    """By hand: each of the 32 negatives is far up the linear part, and the sigmoid is flat there."""
    distance, tau = 0.2, 0.01
    far = torch.tensor([distance], dtype=torch.float64)
    rank = 3 + 32 * (100 * (distance - 0.05) + 0.5 + torch.sigmoid(torch.tensor(5.0).double()))
    sup = 3 / rank**2 / 3 * 32 * 100
    assert pull("SupAP", far, tau).item() == pytest.approx(sup.item())
    assert pull("ROADMAP", far, tau).item() == pytest.approx(0.5 * sup.item() + 0.5 / 3)
    assert 0 < pull("Smooth-AP", far, tau).item() < 1e-8
    assert pull("Smooth-AP", far, 0.1).item() > pull("SupAP", far, 0.1).item()


def test_a_partition_of_whole_classes():
    batches = draw(16, torch.Generator().manual_seed(0))
    assert batches.flatten().sort().values.equal(torch.arange(2048))
    assert ((batches // 4).view(-1, 4, 4) == (batches // 4).view(-1, 4, 4)[:, :, :1]).all()


def test_aps():
    """The first of two batches confuses its classes, which are apart from those of the other."""
    embeddings = torch.eye(4)[[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]]
    labels = torch.arange(4).repeat_interleave(4)
    within, of_all = aps(embeddings, labels, torch.arange(16).view(2, 8))
    # A positive that ties with 2 negatives, and two that all 6 others outrank or tie with.
    expected = (1 / 3 + 3 / 7 + 3 / 7) / 3
    assert within == pytest.approx((1 + expected) / 2)
    assert of_all == pytest.approx((2 + 2 * (1 / 3 + 3 / 15 + 3 / 15) / 3) / 4)


def test_where_a_batch_ap_is_reached():
    rows = [{"batch AP": x, "AP": y} for x, y in ((0.5, 0.1), (0.9, 0.5), (1.0, 0.9))]
    assert at_batch_ap(rows, 0.95, "AP") == pytest.approx(0.7)
    assert torch.tensor(at_batch_ap(rows[:2], 0.95, "AP")).isnan()


def test_what_a_few_runs_say(tmp_path, monkeypatch):
    setting = Setting("SGD", "SGD", 0.01, False, (30.0,), 30.0)
    small = {
        "SETTINGS": (setting,) * 5, "BY_RATE": setting, "DISTANCES": (0.4,), "MOST_STEPS": 80, "SIZES": (32,),
        "FRESH_SIZES": (16,), "STEPS": 320, "RATES": (),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(mechanism, name, value)
    done = {run: recover(run) for run in {*mechanism.recoveries(1)}}
    by_loss = {run.loss: row for run, row in done.items()}
    assert by_loss["SupAP"]["recovered"] == 1 > by_loss["Smooth-AP"]["recovered"]
    assert by_loss["ROADMAP"]["steps"] < by_loss["SupAP"]["steps"] < by_loss["Smooth-AP"]["steps"] == 80
    trained = {run: train(run) for run in {*mechanism.trainings(1)}}
    ends = {run.loss: rows[-1] for run, rows in trained.items() if not run.fresh}
    assert ends["SupAP"]["AP"] < 0.95 < ends["ROADMAP"]["AP"] <= ends["ROADMAP"]["batch AP"]
    text = mechanism.tables(done, trained)
    assert f"{by_loss['SupAP']['steps']}.0 (1/1)" in text
    about = mechanism.report.provenance()
    mechanism.plot_tail(done, about, tmp_path / "tail.png")
    mechanism.plot_calibration(trained, about, tmp_path / "calibration.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("tail", "calibration"))


def test_the_committed_runs_are_those_of_the_program():
    for name, planned in (("tail", mechanism.recoveries(5)), ("calibration", mechanism.trainings(5))):
        with (mechanism.report.RESULTS / f"mechanism_{name}.csv").open(newline="") as file:
            rows = [*csv.DictReader(file)]
        kind = Recovery if name == "tail" else Trained
        assert {tuple(row[field] for field in kind._fields) for row in rows} == {
            tuple(map(str, run)) for run in planned
        }

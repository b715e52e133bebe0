"""The training program: what it reads, draws, keeps and refuses; that a run goes on to the same bits."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import train_retrieval
from hypothesis import given, settings
from hypothesis import strategies as st
from image_trees import png, some_classes, write
from PIL import Image
from retrieval import checkpoint, images, losses, pictures
from retrieval.batches import Distortion, Feed, PerClassBatches, generator
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.options import complete, parse
from retrieval.progress import Progress
from retrieval.ranks import Ranks
from retrieval.run import WRITTEN, Run, Table
from retrieval.training import Training

from roadmap_ext import diagnose

ROOT = Path(__file__).parents[2]
# A net and batches as small as they may be, 8 steps, an evaluation every 4.
TINY = ["--blocks", "2", "--width", "4", "--dim", "8", "--batch-size", "20", "--per-class", "4", "--steps", "8"]
TINY += ["--evaluate-every", "4", "--checkpoint-every", "2", "--lr", "0.01", "--warmup", "2", "--k", "1", "5"]


def options(*arguments):
    return parse(None, [str(argument) for argument in arguments])


def program(*arguments):
    return train_retrieval.main([str(argument) for argument in arguments])


def distorted(by, images, random):
    return by(images, by.draw(len(images), random))


def refused(capsys, *arguments):
    """The message of a run that ends before training starts."""
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
    before = sorted(out.rglob("*")) if out and out.exists() else []
    capsys.readouterr()
    assert program(*arguments) == 2
    captured = capsys.readouterr()
    assert "step" not in captured.out  # the table's heading: training had not begun
    assert (sorted(out.rglob("*")) if out and out.exists() else []) == before
    return captured.err


class TestBatches:
    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_per_class(self, data):
        sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=8))
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        labels = labels[torch.randperm(len(labels))]
        each = data.draw(st.integers(2, 6))
        batch_size = data.draw(st.integers(2, each * len(sizes)).filter(lambda size: size % each != 1))
        sampler = PerClassBatches(labels, batch_size, each, seed=data.draw(st.integers(0, 3)))
        batch = sampler(data.draw(st.integers(0, 1000)))
        assert len(batch) == batch_size
        drawn = labels[batch]
        counts = drawn.bincount(minlength=len(sizes))
        present = counts[counts > 0].sort().values.tolist()
        left = batch_size % each
        assert present == sorted([each] * (batch_size // each) + ([left] if left else []))
        for label in drawn.unique().tolist():
            times = batch[drawn == label].unique(return_counts=True)[1]
            assert times.max() <= -(-each // sizes[label])

    def test_a_step_says_it_all(self):
        labels = torch.arange(100) % 20
        first, second = (PerClassBatches(labels, 16, 4, seed=0) for _ in range(2))
        ahead = [first(step) for step in range(50)]
        for step in (49, 3, 20):
            assert torch.equal(second(step), ahead[step])
        assert len({tuple(batch.tolist()) for batch in ahead}) == 50
        assert not torch.equal(PerClassBatches(labels, 16, 4, seed=1)(0), ahead[0])
        # Every image has its turn.
        assert torch.cat([first(step) for step in range(100)]).unique().numel() == 100

    def test_any_part_of_a_batch_is_of_many_classes(self):
        labels = torch.arange(1000) % 10
        for part in labels[PerClassBatches(labels, 800, 80, seed=0)(0)].split(100):
            assert part.bincount(minlength=10).max() < 30

    def test_defaults_fill_the_batch(self):
        labels = torch.arange(1000) % 10
        assert PerClassBatches(labels, 16, None, 0).per_class == 4
        sampler = PerClassBatches(labels, 16384, None, 0)
        assert sampler.per_class == 1639
        assert len(sampler(0)) == 16384

    def test_batches_that_cannot_be_filled(self):
        labels = torch.arange(100) % 10
        with pytest.raises(
            InputError, match=r"takes 11 classes, and there are 10 .*--per-class 5, or a --batch-size of at most 40"
        ):
            PerClassBatches(labels, 44, 4, 0)
        with pytest.raises(InputError, match="leaves one image alone"):
            PerClassBatches(labels, 33, 4, 0)

    def test_distortion(self):
        whole = torch.rand(5, 2, 9, 9)
        assert torch.equal(distorted(Distortion(0, 0, 0, False), whole, generator("d", 0, 0)), whole)
        mirrored = distorted(Distortion(0, 0, 0, True), whole, generator("d", 0, 0))
        for before, after in zip(whole, mirrored, strict=True):
            assert torch.allclose(after, before, atol=1e-5) or torch.allclose(after, before.flip(2), atol=1e-5)
        moved = Distortion(20, 0.2, 0.1, False)
        assert torch.equal(distorted(moved, whole, generator("d", 0, 7)), distorted(moved, whole, generator("d", 0, 7)))
        assert not torch.equal(
            distorted(moved, whole, generator("d", 0, 7)), distorted(moved, whole, generator("d", 0, 8))
        )
        assert torch.allclose(distorted(moved, torch.full((3, 1, 9, 9), 7.0), generator("d", 0, 0)), torch.tensor(7.0))
        # To the right by a pixel of nine; the border goes on.
        shifted = distorted(Distortion(0, 0, 0.5, False), torch.arange(9.0).expand(400, 1, 9, 9), generator("d", 0, 0))
        centre = shifted[:, 0, 4, 4] - 4
        assert centre.abs().max() <= 4
        assert centre.max() > 3.5
        assert centre.min() < -3.5

    def test_distortion_by_known_draws(self, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(shape))
        whole = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
        turned = distorted(Distortion(90, 0, 0, False), whole, generator("d", 0, 0))
        assert torch.allclose(turned, whole.rot90(1, (2, 3)), atol=1e-5) or torch.allclose(
            turned, whole.rot90(-1, (2, 3)), atol=1e-5
        )
        line = torch.linspace(-8, 8, 9).expand(1, 1, 9, 9)
        resized = distorted(Distortion(0, 0.5, 0, False), line, generator("d", 0, 0))
        assert torch.allclose(resized, (1.5 * line).clamp(-8, 8), atol=1e-5)

    def test_half_are_mirrored(self):
        line = torch.arange(9.0).expand(400, 1, 9, 9)
        mirrored = distorted(Distortion(0, 0, 0, True), line, generator("d", 0, 0))[:, 0, 0, 0] > 4
        assert 150 < mirrored.sum() < 250

    def test_feed(self, tmp_path):
        found, _ = load(options("--data-root", write(tmp_path, some_classes()), "--image-size", 8, "--hold-mib", 0))
        sampler = PerClassBatches(found.labels, 8, 4, 0)
        for share in (slice(0, 8), slice(3, 5)):
            feed = Feed(found, sampler, share)
            for step in (0, 1, 2, 7, 8, 3):
                pixels, labels, index = feed(step)
                assert torch.equal(index, sampler(step)[share])
                assert torch.equal(pixels, found.pixels(index))
                assert torch.equal(labels, found.labels[index])


class TestLosses:
    def test_every_setting_is_an_option(self):
        given = ["--calibration-weight", 0.25, "--positive-margin", 0.8, "--negative-margin", 0.3, "--tau", 0.02]
        given += ["--calibration-reduction", "violating_pairs", "--no-normalize", "--include-self", "--chunk-size", 9]
        given += ["--surrogate", "smooth", "--rho", 50, "--delta", 0.1, "--start", 0.0, "--offset", 1.44]
        given += ["--reduction", "sum", "--method", "pairwise"]
        made = losses.make(options(*given))
        assert type(made).__name__ == "RoadmapLoss"
        assert dict(made.settings) == {
            "calibration_weight": 0.25, "positive_margin": 0.8, "negative_margin": 0.3, "tau": 0.02,
            "calibration_reduction": "violating_pairs", "normalize": False, "include_self": True, "chunk_size": 9,
            "surrogate": "smooth", "rho": 50.0, "delta": 0.1, "start": 0.0, "offset": 1.44, "reduction": "sum",
            "method": "pairwise", "gather_across_devices": False, "ignore_label": None, "margins": None,
        }  # fmt: skip
        assert losses.describe(losses.make(options("--margins", "auto"))) == "RoadmapLoss(margins='auto')"

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("roadmap", "RoadmapLoss"),
            ("sup-ap", "SupAPLoss"),
            ("smooth-ap", "SmoothAPLoss"),
            ("reference", "RoadmapLoss"),
        ],
    )
    def test_kinds(self, name, kind):
        made = losses.make(options("--loss", name))
        assert type(made).__name__ == kind
        assert made.settings["method"] == ("reference" if name == "reference" else "auto")

    def test_settings_of_another_loss(self):
        with pytest.raises(
            InputError, match=r"--rho is no setting of --loss smooth-ap, which has --normalize, .*--tau"
        ):
            losses.make(options("--loss", "smooth-ap", "--rho", 3))
        with pytest.raises(InputError, match="--loss sup-ap: tau"):
            losses.make(options("--loss", "sup-ap", "--tau", -1))

    def test_meter(self):
        meter, loss = losses.Meter(torch.device("cpu")), losses.make(options())
        embeddings, other = (torch.ones(2048, 8).cumsum(0).sin().requires_grad_() for _ in range(2))
        labels = torch.arange(2048) % 512
        metered = meter(embeddings, lambda given: loss(given, labels))
        assert meter.seconds == 0
        metered.backward()
        expected = loss(other, labels)
        expected.backward()
        assert torch.equal(metered, expected)
        assert torch.equal(embeddings.grad, other.grad)
        assert 0 < meter.seconds < 10
        if sys.platform == "linux" and meter.bytes is not None:
            assert meter.bytes < 64 << 20


class TestTable:
    def test_rows_come_back(self, tmp_path):
        table = Table(tmp_path / "t.csv")
        rows = [{"step": i, "loss": None if i == 0 else 0.1 / 3 * i, "tiny": 1e-300 * i} for i in range(4)]
        for row in rows:
            table.add(row)
        again = Table(tmp_path / "t.csv")
        again.load(lambda step: step <= 2)
        assert again.rows == rows[:3]
        assert again.column("loss", after=1) == [0.2 / 3]
        assert again.column("loss") == [0.1 / 3, 0.2 / 3]
        again.add(rows[3])
        third = Table(tmp_path / "t.csv")
        third.load(lambda step: True)
        assert third.rows == rows

    @pytest.mark.parametrize("cut", range(1, 9))
    def test_a_row_that_was_cut_off(self, tmp_path, cut):
        table = Table(tmp_path / "t.csv")
        table.add({"step": 1, "loss": 0.125})
        table.add({"step": 2, "loss": 0.0625})
        text = table.path.read_text()
        table.path.write_text(text[:-cut])
        again = Table(table.path)
        again.load(lambda step: step <= 2)
        assert [row["step"] for row in again.rows] == [1]
        again.add({"step": 2, "loss": 0.0625})
        assert table.path.read_text() == text

    def test_nothing_but_a_heading_cut_off(self, tmp_path):
        (tmp_path / "t.csv").write_text("step,lo")
        table = Table(tmp_path / "t.csv")
        table.load(lambda step: True)
        table.add({"step": 1, "loss": 0.5})
        assert (tmp_path / "t.csv").read_text() == "step,loss\n1,0.5\n"


class TestStep:
    """A step, seen from within."""

    def make(self, *arguments, data=None, dropout=False):
        given = options(*TINY, *arguments)
        torch.use_deterministic_algorithms(True)
        data = data or load(given)[0]
        complete(given, len(data))
        training = Training(given, data, torch.device("cpu"), Ranks())
        seen = types.SimpleNamespace(inputs=[], seeds=[], modes=[], dtypes=[], rates=[], norms=[])

        def before_network(module, inputs):
            seen.inputs.append(inputs[0].clone())
            seen.seeds.append(torch.initial_seed())
            seen.modes.append(module.training)

        def before_update(optimizer, *_):
            seen.rates.append(optimizer.param_groups[0]["lr"])
            seen.norms.append(torch.cat([p.grad.flatten() for p in training.network.parameters()]).norm().item())

        training.network.register_forward_pre_hook(before_network)
        training.loss.register_forward_pre_hook(lambda module, inputs: seen.dtypes.append(inputs[0].dtype))
        training._optimizer.register_step_pre_hook(before_update)
        return training, seen

    @pytest.fixture
    def same_images(self):
        """Images that are all the same, so that a batch says nothing."""
        pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(100, 1, 8, 8)
        names, labels = [str(i) for i in range(100)], torch.arange(100) % 10
        return images.Images(names, [str(i) for i in range(10)], labels, pixels, 1, 8, [b""] * 100)

    def test_chance_is_of_the_seed_and_the_step(self, same_images):
        training, seen = self.make(data=same_images)
        for step in (0, 1, 0):
            training.step(step)
        other, seen_other = self.make("--seed", 1, data=same_images)
        other.step(0)
        first, second, again = seen.inputs
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert not torch.equal(first, seen_other.inputs[0])
        assert not torch.equal(first, same_images.pixels(torch.arange(20)).float())
        assert seen.seeds[0] == seen.seeds[2] != seen.seeds[1]
        assert seen.seeds[0] != seen_other.seeds[0]

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_autocast_is_of_the_network_alone(self, same_images, amp):
        full, seen_full = self.make("--flip", data=same_images)
        half, seen = self.make("--flip", "--amp", amp, data=same_images)
        full.step(0), half.step(0)
        assert torch.equal(seen.inputs[0], seen_full.inputs[0])
        assert seen_full.dtypes == [torch.float32]
        assert seen.dtypes == [{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]]
        # The scaler's factor is out of the gradient again.
        assert seen.norms[0] == pytest.approx(seen_full.norms[0], rel=0.2)

    def test_learning_rate(self, same_images):
        given = ["--lr", 1, "--warmup", 4, "--steps", 10]
        training, seen = self.make(*given, "--schedule", "constant", data=same_images)
        expected = [0.25, 0.5, 0.75, 1, 1, 1]
        assert [training.learning_rate(step) for step in range(6)] == expected
        for step in range(3):
            training.step(step)
        assert seen.rates == expected[:3]
        training, _ = self.make(*given, data=same_images)
        assert training.learning_rate(5) == pytest.approx(0.5)
        assert training.learning_rate(0) == pytest.approx(0.25)
        assert training.learning_rate(9) == pytest.approx((1 + np.cos(0.9 * np.pi)) / 2)

    def test_weight_decay(self, same_images):
        training, _ = self.make("--weight-decay", 0.25, data=same_images)
        assert training._optimizer.param_groups[0]["weight_decay"] == 0.25

    def test_modes(self):
        training, seen = self.make()
        training.step(0)
        data = load(options())[1]
        before = {name: value.clone() for name, value in training.network.state_dict().items()}
        every = training.embed(data, lambda: None)
        assert same(before, training.network.state_dict())
        assert torch.allclose(training.embed(data.take(torch.tensor([7])), lambda: None)[0], every[7], atol=1e-5)
        training.step(1)
        assert seen.modes[0]
        assert seen.modes[-1]
        assert not any(seen.modes[1:-1])
        moved = [name for name, value in training.network.state_dict().items() if not torch.equal(value, before[name])]
        assert any("running_mean" in name for name in moved)

    def test_embedding_can_be_stopped(self):
        training, _ = self.make()

        def check():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.embed(load(options())[1], check)

    @pytest.mark.parametrize("amp", ["none", "fp16"])
    @pytest.mark.parametrize("memory", [(), ("--memory-size", 30, "--memory-warmup", 1)], ids=["alone", "memory"])
    def test_mini_batches_are_the_batch(self, amp, memory):
        """but for batch norm, which is left out here."""
        gradients = []
        for mini in ((), ("--mini-batch-size", 6), ("--mini-batch-size", 20)):
            training, seen = self.make("--amp", amp, *memory, *mini, "--schedule", "constant")
            for name, module in list(training.network.body.named_children()):
                if isinstance(module, torch.nn.BatchNorm2d):
                    setattr(training.network.body, name, torch.nn.Identity())
            rows = [training.step(step) for step in range(3)]
            assert len(seen.inputs) == 3 * (8 if mini == ("--mini-batch-size", 6) else 1)
            assert all(0 < row["loss_ms"] < row["step_ms"] for row in rows)
            gradients.append(torch.tensor([*seen.norms, *(row["loss"] for row in rows)]))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1 if amp == "fp16" else 1e-4, atol=1e-6)
        assert torch.equal(gradients[2], gradients[0])

    @pytest.mark.parametrize("memory", [(), ("--memory-size", 64, "--memory-warmup", 0)], ids=["alone", "memory"])
    def test_an_image_is_not_its_own_positive(self, memory, same_images):
        """Images that come more than once are told by their numbers; what the loss makes of these is its own matter."""
        training, _ = self.make(*memory, "--batch-size", 240, "--per-class", 24, data=same_images)  # 10 of each class
        seen = []
        training.loss.register_forward_pre_hook(lambda module, inputs, given: seen.append(given), with_kwargs=True)
        training.step(0)
        numbers = training._feed._batches(0)
        assert len(numbers.unique()) == 100
        assert torch.equal(seen[0]["ids"], numbers)
        known = training._memory.ids if memory else seen[0]["ref_ids"]
        assert torch.equal(known.sort().values, numbers[-len(known) :].sort().values)

    def test_the_memory_is_ranked_after_its_warm_up(self):
        training, _ = self.make("--memory-size", 50, "--memory-warmup", 2)
        held, references = [], []
        training.loss.register_forward_pre_hook(
            lambda module, inputs, given: references.append(len(given["ref_emb"])), with_kwargs=True
        )
        for step in range(6):
            training.step(step)
            held.append(sorted(training._memory.ids.tolist()))
        assert references == [0, 0, 20, 40, 50, 50]
        assert held[3] == sorted(torch.cat([training._feed._batches(step) for step in (2, 3)]).tolist())
        assert torch.equal(training._memory.labels, load(options())[0].labels[training._memory.ids])

    def test_the_scaler_is_part_of_the_state(self, same_images):
        first, _ = self.make("--amp", "fp16", data=same_images)
        second, _ = self.make("--amp", "fp16", data=same_images)
        first.step(0)
        first._scaler.update(128.0)
        second.load(first.state())
        assert second._scaler.get_scale() == 128


# --- whole runs ------------------------------------------------------------------------------------------------------

TIMED = {"step_ms", "loss_ms", "loss_mib", "evaluation_s"}


def outcome(folder):
    """All of a run that has to be the same bits: its checkpoint, and its tables but for what was timed."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    tables = []
    for name in ("metrics.csv", "steps.csv"):
        with (folder / name).open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)])
    return state, tables


def same(first, second):
    """Whether two nested states hold the same bits."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert program(*TINY, "--out", folder) == 0
    return folder


class TestRuns:
    def test_what_it_leaves(self, unbroken, capsys):
        state, (metrics, steps) = outcome(unbroken)
        assert state["step"] == 8
        assert [int(row["step"]) for row in metrics] == [0, 4, 8]
        assert [int(row["step"]) for row in steps] == list(range(1, 9))
        assert list(metrics[0]) == ["step", "epoch", "loss", "mAP", "mAP@R", "R-precision", "R@1", "R@5"]
        of_steps = [float(row["loss"]) for row in steps]
        assert float(metrics[2]["loss"]) == pytest.approx(sum(of_steps[4:]) / 4)
        for name in ("curves.png", "neighbours.png"):
            with Image.open(unbroken / name) as picture:
                assert min(picture.size) > 300
        with (unbroken / "steps.csv").open(newline="") as file:
            assert all(0 < float(row["loss_ms"]) < float(row["step_ms"]) for row in csv.DictReader(file))

    @pytest.mark.deep
    def test_again_to_the_same_bits(self, unbroken, tmp_path):
        assert program(*TINY, "--out", tmp_path / "run") == 0
        assert same(outcome(tmp_path / "run"), outcome(unbroken))
        assert program(*TINY, "--out", tmp_path / "other", "--seed", 1) == 0
        assert not same(outcome(tmp_path / "other")[0]["network"], outcome(unbroken)[0]["network"])

    def test_it_learns(self, tmp_path, capsys):
        assert program("--epochs", 2, "--out", tmp_path / "run", "--batch-size", 100) == 0
        assert capsys.readouterr().out.count("over 100 queries that have a positive") == 1  # of the first batch alone
        metrics = outcome(tmp_path / "run")[1][0]
        first, last = (float(metrics[i]["mAP@R"]) for i in (0, -1))
        assert first < 0.5
        assert last > 0.8

    def test_a_part_of_the_loss_that_has_nothing_to_do(self):
        embeddings = torch.eye(80)[torch.arange(64) // 4] + torch.eye(80)[16:]
        told = train_retrieval.first_batch(diagnose(embeddings, torch.arange(64) // 4))
        assert told.endswith("Warning: the push on negatives has nothing to do in the first batch")

    @pytest.mark.deep
    def test_killed_at_every_moment(self, tmp_path, monkeypatch):
        """Stops dead before or after everything that a run writes, or midway, and goes on."""

        class Killed(BaseException):
            pass

        short = [*TINY, "--steps", 4, "--evaluate-every", 2]
        assert program(*short, "--out", tmp_path / "whole") == 0
        expected = outcome(tmp_path / "whole")
        every, moments = images.digits(), 0

        def moment():
            nonlocal moments
            moments += 1
            if moments == last:
                raise Killed

        def replace(path, data, whole=os.replace):
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(data[: len(data) // 2])
            moment()
            partial.write_bytes(data)
            moment()
            whole(partial, path)
            moment()

        def add(self, row, whole=Table.add):
            moment()
            whole(self, row)
            moment()
            text = self.path.read_bytes()
            self.path.write_bytes(text[:-3])
            moment()
            self.path.write_bytes(text)

        monkeypatch.setattr(checkpoint, "replace", replace)
        monkeypatch.setattr(Table, "add", add)
        monkeypatch.setattr("train_retrieval.draw_curves", lambda *arguments: None)
        monkeypatch.setattr("train_retrieval.draw_neighbours", lambda *arguments: None)
        monkeypatch.setattr(images, "digits", lambda: every)
        for kill in range(1, 100):
            folder, last, moments = tmp_path / str(kill), kill, 0
            try:
                program(*short, "--out", folder)
            except Killed:
                pass
            else:
                break
            last = -1
            assert program(*short, "--out", folder, "--resume") == 0
            assert same(outcome(folder), expected), f"killed at moment {kill}"
            shutil.rmtree(folder)
        assert 30 < kill < 99  # it went through all of them

    @pytest.mark.parametrize(
        ("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)], ids=str
    )
    @pytest.mark.deep
    def test_stopped_from_outside(self, tmp_path, stop, code):
        long = [*TINY, "--steps", "60", "--checkpoint-every", "2" if stop == signal.SIGKILL else "1000"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, ROOT / "examples" / "train_retrieval.py", *long, "--out"]
        process = subprocess.Popen([*command, tmp_path / "run"], env=environment, stdout=subprocess.PIPE, text=True)
        rows = tmp_path / "run" / "steps.csv"
        deadline = time.monotonic() + 60
        while not rows.exists() or rows.read_text().count("\n") < 10:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(stop)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == code
        state, (_, steps) = outcome(tmp_path / "run")
        if stop != signal.SIGKILL:
            assert "--resume goes on from it" in text
            assert state["step"] == int(steps[-1]["step"])
            assert (tmp_path / "run" / "curves.png").exists()
        assert state["step"] < 60
        assert program(*long, "--out", tmp_path / "run", "--resume") == 0
        assert program(*long, "--out", tmp_path / "whole") == 0
        assert same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))

    def test_resume_of_what_is_finished(self, unbroken):
        before, picture = outcome(unbroken), (unbroken / "curves.png").stat().st_mtime_ns
        assert program(*TINY, "--out", unbroken, "--resume") == 0
        assert same(outcome(unbroken), before)
        assert (unbroken / "curves.png").stat().st_mtime_ns > picture

    @pytest.mark.deep
    def test_a_longer_run_of_constant_rate(self, tmp_path):
        constant = [*TINY, "--schedule", "constant", "--out"]
        assert program(*constant, tmp_path / "a") == 0
        assert program(*constant, tmp_path / "a", "--steps", 12, "--resume") == 0
        assert program(*constant, tmp_path / "b", "--steps", 12) == 0
        assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))

        # Nor does a row stay that only the shorter one has.
        odd = [*constant[:-1], "--evaluate-every", 5, "--out"]
        assert program(*odd, tmp_path / "c") == 0
        assert program(*odd, tmp_path / "c", "--steps", 12, "--resume") == 0
        assert program(*odd, tmp_path / "d", "--steps", 12) == 0
        assert same(outcome(tmp_path / "c"), outcome(tmp_path / "d"))

    @pytest.mark.deep
    def test_the_memory_goes_on(self, tmp_path):
        given = [*TINY, "--schedule", "constant", "--memory-size", 70, "--mini-batch-size", 9, "--out"]
        assert program(*given, tmp_path / "a", "--steps", 5) == 0
        assert program(*given, tmp_path / "a", "--resume") == 0
        assert program(*given, tmp_path / "b") == 0
        assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
        assert outcome(tmp_path / "b")[0]["memory"]["_extra_state"][2] == 70

    def test_a_shorter_run(self, tmp_path, capsys):
        constant = [*TINY, "--schedule", "constant", "--out", tmp_path / "a"]
        assert program(*constant) == 0
        assert "has come to step 8: --steps 4 is less" in refused(capsys, *constant, "--steps", 4, "--resume")

    @pytest.mark.parametrize("normalize", [True, False])
    def test_what_is_measured(self, tmp_path, monkeypatch, normalize):
        calls = []

        def measure(*arguments, whole=train_retrieval.retrieval_metrics, **keywords):
            calls.append((arguments, keywords))
            return whole(*arguments, **keywords)

        monkeypatch.setattr("train_retrieval.retrieval_metrics", measure)
        given = [] if normalize else ["--no-normalize"]
        assert program(*TINY, *given, "--out", tmp_path / "run") == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert [keywords["normalize"] for _, keywords in calls] == [normalize] * 3
        assert all(torch.equal(arguments[1], load(options())[1].labels) for arguments, _ in calls)

    @pytest.mark.deep
    @pytest.mark.parametrize("loss", losses.LOSSES)
    def test_losses(self, loss, tmp_path, unbroken):
        assert program(*TINY, "--loss", loss, "--out", tmp_path / "run") == 0
        differs = [row["loss"] for row in outcome(tmp_path / "run")[1][1]]
        ours = [row["loss"] for row in outcome(unbroken)[1][1]]
        assert (differs == ours) == (loss == "roadmap")
        if loss == "reference":
            assert [float(loss) for loss in differs] == pytest.approx([float(loss) for loss in ours], rel=1e-3)

    @pytest.mark.deep
    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_autocast(self, amp, tmp_path):
        halved = [*TINY, "--amp", amp]
        assert program(*halved, "--out", tmp_path / "a") == 0
        assert program(*halved, "--steps", 8, "--out", tmp_path / "b") == 0
        assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
        assert (outcome(tmp_path / "a")[0]["scaler"] != {}) == (amp == "fp16")

    def test_a_folder_of_colour_images(self, tmp_path):
        root = write(tmp_path / "data", some_classes(10, 4, mode="RGB"))
        code = program(
            *TINY, "--data-root", root, "--image-size", 16, "--hold-mib", 0, "--flip", "--out", tmp_path / "run"
        )
        assert code == 0
        assert (tmp_path / "run" / "neighbours.png").exists()

    @pytest.mark.deep
    def test_a_network_of_timm(self, tmp_path, monkeypatch, capsys):
        made = []

        class Refuses(torch.nn.Module):
            num_features = 8

            def forward(self, images):
                raise AssertionError("this one is for others")

        def create_model(name, **keywords):
            if name == "vit_small":
                return Refuses()
            made.append((name, keywords))
            body = torch.nn.Sequential(
                torch.nn.Conv2d(keywords["in_chans"], 6, 3), torch.nn.Dropout(0.5), torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
            )  # fmt: skip
            body.num_features = 60  # of another layer, as some of timm's models have it
            return body

        stub = types.ModuleType("timm")
        stub.list_models = lambda: ["resnet18", "resnet50", "vit_small"]
        stub.create_model = create_model
        stub.data = types.SimpleNamespace(
            resolve_model_data_config=lambda body: {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        )
        monkeypatch.setitem(sys.modules, "timm", stub)
        torch.save(create_model("", in_chans=1).state_dict(), tmp_path / "weights.pt")
        made.clear()
        arguments = [*TINY, "--backbone", "resnet50", "--weights", tmp_path / "weights.pt"]
        assert program(*arguments, "--out", tmp_path / "a") == 0
        # It never sees the file.
        assert made == [("resnet50", {"pretrained": False, "num_classes": 0, "in_chans": 1})]
        # Dropout draws from the step's own seed: a resumed run has the same.
        assert program(*arguments, "--out", tmp_path / "b", "--schedule", "constant", "--steps", 3) == 0
        assert program(*arguments, "--out", tmp_path / "b", "--schedule", "constant", "--resume") == 0
        assert program(*arguments, "--out", tmp_path / "c", "--schedule", "constant") == 0
        assert same(outcome(tmp_path / "b")[0]["network"], outcome(tmp_path / "c")[0]["network"])
        message = refused(capsys, "--backbone", "resnet80")
        assert "timm has no model 'resnet80'; near to it are resnet50, resnet18" in message
        assert "does not take images of 8 pixels: this one" in refused(capsys, *TINY, "--backbone", "vit_small")
        stub.create_model = lambda name, **keywords: {}["some weight"]
        assert "timm cannot make it: 'some weight'" in refused(capsys, *TINY, "--backbone", "resnet18")

    def test_tensorboard(self, tmp_path):
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        assert program(*TINY, "--out", tmp_path / "run", "--tensorboard") == 0
        log = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        log.Reload()
        assert [event.step for event in log.Scalars("training/loss")] == list(range(1, 9))
        assert [event.step for event in log.Scalars("retrieval/mAP@R")] == [0, 4, 8]

    def test_the_best_network_is_kept(self, unbroken):
        _, (metrics, _) = outcome(unbroken)
        best = torch.load(unbroken / "best.pt", weights_only=True)["network"]
        last = torch.load(unbroken / "checkpoint.pt", weights_only=True)["network"]
        assert same(best, last) == (float(metrics[2]["mAP@R"]) > float(metrics[1]["mAP@R"]))
        assert best.keys() == last.keys()

    def test_the_second_signal_stops_at_once(self, tmp_path):
        """Though a call into a library is under way that takes longer than anyone waits."""
        long = "torch.linalg.matrix_power(torch.eye(4000), 1 << 60)"
        script = f"import torch, train_retrieval\nwith train_retrieval.Interrupt():\n print(1, flush=True)\n {long}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
        command = [sys.executable, "-c", script]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            assert process.stdout.readline() == "1\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert "once more stops at once" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
            assert "--resume goes on from the last checkpoint" in process.stderr.read()

    def test_a_loss_that_is_not_finite(self, tmp_path, capsys):
        assert program(*TINY, "--lr", 1e30, "--checkpoint-every", 1, "--out", tmp_path / "run") == 1
        assert "lower --lr" in capsys.readouterr().err
        state, (_, steps) = outcome(tmp_path / "run")
        assert state["step"] == len(steps) < 8


def rank_of_program(rank, world, port, said, *arguments):
    """A rank as torchrun would start it; what it prints goes into files."""
    torch.set_num_threads(1)
    leave = Ranks.leave

    def leave_alone(self):
        assert not any(type(x) is torch.nn.parallel.DistributedDataParallel for x in gc.get_objects())
        leave(self)

    Ranks.leave = leave_alone  # what would outlive the group might never end
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for stream in (sys.stdout, sys.stderr):
        to = os.open(f"{said}-{rank}-{stream.fileno()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, stream.fileno())
    sys.exit(train_retrieval.main(list(arguments)))


class TestTwoProcesses:
    """Trained as one; that loss and gradients are those of one process is shown in test_distributed.py."""

    LONG = (*TINY, "--steps", 40, "--memory-size", 50, "--mini-batch-size", 4, "--evaluate-every", 20)

    @pytest.fixture
    def run(self, tmp_path):
        """Starts both ranks, and waits for them: exit statuses, and the texts of stdout and stderr of each."""

        def run(*arguments, meanwhile=lambda processes: None):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            said = tmp_path / "said"
            processes = ranks.start(2, rank_of_program, port, said, *map(str, arguments))
            meanwhile(processes)
            exits = ranks.statuses(processes)
            return exits, [[Path(f"{said}-{rank}-{stream}.txt").read_text() for stream in (1, 2)] for rank in (0, 1)]

        return run

    @pytest.mark.deep
    def test_stopped_and_gone_on(self, tmp_path, run):
        """The whole run under torchrun itself; then a signal to the second rank stops both, and they go on."""
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.run(
            [*torchrun, ROOT / "examples" / "train_retrieval.py", *map(str, self.LONG), "--out", whole],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("mAP@R") == 2  # the heading and the end: one rank speaks
        assert sorted(os.listdir(whole)) == sorted(WRITTEN)
        state, (metrics, steps) = outcome(whole)
        assert [int(row["step"]) for row in metrics] == [0, 20, 40]
        assert [int(row["step"]) for row in steps] == list(range(1, 41))
        assert float(metrics[-1]["mAP@R"]) > float(metrics[0]["mAP@R"]) + 0.1
        assert state["memory"]["_extra_state"][2] == 50

        def stop(processes):
            deadline = time.monotonic() + 60
            while not (broken / "steps.csv").exists() or (broken / "steps.csv").read_text().count("\n") < 10:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(processes[1].pid, signal.SIGINT)

        exits, said = run(*self.LONG, "--checkpoint-every", 1000, "--out", broken, meanwhile=stop)
        assert exits[0] == 128  # it was asked by the other
        assert exits[1] == 128 + signal.SIGINT
        assert "--resume goes on from it" in said[0][0]
        assert said[1][0] == ""
        assert 8 < outcome(broken)[0]["step"] < 40
        exits, said = run(*self.LONG, "--checkpoint-every", 1000, "--out", broken, "--resume")
        assert exits == [0, 0], said
        assert same(outcome(broken), outcome(whole))

    def test_bad_input(self, tmp_path, run):
        folder = tmp_path / "run"
        write(folder, {"settings.json": b"{}"})
        exits, said = run(*TINY, "--out", folder)
        assert exits == [2, 2]
        for rank, ((out, errors), source) in enumerate(zip(said, ("", "rank 0: "), strict=True)):
            assert f"train_retrieval.py, rank {rank}: error: {source}{folder} holds a run already" in errors
            assert "step" not in out

    def test_more_processes_than_images(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(Ranks, "join", lambda self, device: None)
        monkeypatch.setenv("WORLD_SIZE", "11")
        assert "leaves 11 processes fewer than 2 images each" in refused(capsys, *TINY, "--out", tmp_path / "run")
        monkeypatch.setenv("WORLD_SIZE", "two")
        assert "torchrun's to set" in refused(capsys, *TINY, "--out", tmp_path / "run")


@pytest.mark.deep
def test_a_query_is_not_its_own_neighbour(tmp_path, monkeypatch):
    found, _ = load(options("--data-root", write(tmp_path, some_classes(12)), "--image-size", 8))
    drawn = []
    monkeypatch.setattr(found, "pixels", lambda index, whole=found.pixels: drawn.append(index.tolist()) or whole(index))
    pictures.neighbours(torch.randn(len(found), 4), found, tmp_path / "n.png", "title")
    assert len(drawn) == 8
    assert all(row[0] not in row[1:] and len(row) == 9 for row in drawn)


@pytest.mark.deep
def test_names_are_drawn_as_they_are(tmp_path, recwarn):
    files = {
        f"{name}/{i}.png": png(100 * number + i)
        for number, name in enumerate((r"$\frac{1$ x", "x$^2$", "\N{CJK UNIFIED IDEOGRAPH-4E00}", "a", "b", "c"))
        for i in range(3)
    }
    found, _ = load(options("--data-root", write(tmp_path, files), "--image-size", 8))
    pictures.neighbours(torch.randn(9, 4), found, tmp_path / "n.png", "a title with $")
    assert Image.open(tmp_path / "n.png").size[0] > 300
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


class TestBadInput:
    def test_a_root_that_is_none(self, tmp_path, capsys):
        assert "there is no such folder or zip" in refused(
            capsys, "--data-root", tmp_path / "no", "--out", tmp_path / "run"
        )

    def test_a_batch_that_cannot_be_filled(self, tmp_path, capsys):
        message = refused(capsys, "--batch-size", 100, "--per-class", 4, "--out", tmp_path / "run")
        assert "--per-class 10, or a --batch-size of at most 40" in message

    def test_a_folder_that_holds_a_run(self, unbroken, capsys):
        assert "holds a run already" in refused(capsys, *TINY, "--out", unbroken)

    def test_a_checkpoint_of_other_settings(self, unbroken, capsys):
        message = refused(capsys, *TINY, "--out", unbroken, "--resume", "--tau", 0.02, "--dim", 16)
        assert "tau was 0.01 and is 0.02" in message
        assert "dim was 8 and is 16" in message
        assert "rho" not in message

    @pytest.mark.parametrize(
        "given",
        ["--amp bf16", "--lr 0.1", "--seed 1", "--rotate 5", "--flip", "--warmup 1", "--resize 0.2", "--shift 0.1",
         "--weight-decay 0.1", "--schedule constant", "--steps 9", "--blocks 1", "--width 8", "--batch-size 40",
         "--per-class 5", "--evaluate-every 2", "--k 1", "--reduction sum", "--no-normalize"],
    )  # fmt: skip
    def test_every_setting_counts(self, unbroken, capsys, given):
        message = refused(capsys, *TINY, "--out", unbroken, "--resume", *given.split())
        assert given.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_") + " was" in message

    def test_a_checkpoint_of_another_test(self, tmp_path, capsys):
        first, second = (write(tmp_path / name, some_classes(10, 4)) for name in ("train", "test"))
        for number, path in enumerate(sorted(second.rglob("*.png"))):
            path.write_bytes(png(5000 + number))
        renamed = (second / "kind0").rename(second / "kind2")
        given = [*TINY, "--data-root", first, "--test-root", second, "--class-by", "path", "--image-size", 8]
        given += ["--out", tmp_path / "run"]
        assert program(*given, "--steps", 2) == 0
        (renamed / "class0" / "0.png").write_bytes(png(77))
        message = refused(capsys, *given, "--steps", 2, "--resume")
        assert "other settings: the test images differ: give" in message

    def test_a_checkpoint_of_another_loss(self, unbroken, capsys):
        message = refused(capsys, *TINY, "--out", unbroken, "--resume", "--loss", "smooth-ap")
        assert "other settings: loss was 'roadmap' and is 'smooth-ap': give" in message

    def test_a_checkpoint_of_other_data(self, unbroken, capsys):
        message = refused(capsys, *TINY, "--out", unbroken, "--resume", "--test-fraction", 0.4)
        assert "the training images differ; the test images differ" in message

    def test_a_checkpoint_that_is_none(self, unbroken, tmp_path, capsys):
        shutil.copytree(unbroken, tmp_path / "run")
        whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
        for data in (b"", b"text", whole[: len(whole) // 2]):
            (tmp_path / "run" / "checkpoint.pt").write_bytes(data)
            assert "is damaged or cut" in refused(capsys, *TINY, "--out", tmp_path / "run", "--resume")

    def test_settings(self, tmp_path, capsys):
        assert "--rho is no setting" in refused(capsys, "--loss", "smooth-ap", "--rho", 3, "--out", tmp_path / "run")
        assert "tau" in refused(capsys, "--tau", -3, "--out", tmp_path / "run")
        assert "cannot be halved 4 times" in refused(capsys, "--blocks", 4, "--out", tmp_path / "run")

    def test_a_folder_that_cannot_be(self, tmp_path, capsys):
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "link").symlink_to("nowhere")
        for name in ("file", "file/below", "link"):
            message = refused(capsys, *TINY, "--out", tmp_path / name)
            assert re.search(rf"error: {tmp_path / name} cannot be made \(.*\): name another --out", message)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "curves.png").write_bytes(b"of someone's")
        assert "holds a run already (curves.png)" in refused(capsys, *TINY, "--out", tmp_path / "mine")

    def test_devices_that_are_none(self, tmp_path, capsys):
        for name in ("nothing", "cpu:x", "meta"):
            assert f"--device {name} cannot be used" in refused(capsys, "--device", name, "--out", tmp_path / "run")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_a_device_that_is_not_there(self, tmp_path, capsys):
        assert "--device cuda cannot be used" in refused(capsys, "--device", "cuda", "--out", tmp_path / "run")

    def test_packages_that_are_missing(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        assert "takes timm, and a torchvision that fits" in refused(
            capsys, "--backbone", "resnet50", "--out", tmp_path / "run"
        )
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert "pip install tensorboard" in refused(capsys, *TINY, "--tensorboard", "--out", tmp_path / "run")

    @pytest.mark.parametrize(
        "arguments",
        [["--batch-size", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--lr", "0"], ["--weight-decay", "inf"],
         ["--warmup", "-1"], ["--resize", "1"], ["--image-size", "60000"], ["--hold-mib", "-1"],
         ["--per-class", "1"], ["--test-fraction", "1"], ["--k", "0"], ["--loss", "none"],
         ["--steps", "3", "--epochs", "2"], ["--pretrained"], ["--batch", "3"], ["--weights", "nowhere"]],
        ids=str,
    )  # fmt: skip
    def test_options_by_themselves(self, arguments):
        with pytest.raises(SystemExit) as caught:
            options(*arguments)
        assert caught.value.code == 2


def test_settings_of_a_run_are_json(unbroken):
    written = json.loads((unbroken / "settings.json").read_text())
    assert written["settings"]["loss settings"]["tau"] == 0.01
    assert written["about"].keys() == {
        "torch", "roadmap_ext", "instruction set", "numpy", "Pillow", "machine", "threads", "processes",
    }  # fmt: skip


def test_a_run_in_a_folder_that_is_new(tmp_path):
    run = Run(tmp_path / "a" / "b", resume=True)
    run.check({}, {})
    run.begin(lambda step: True)
    assert run.state is None
    run.save(step=3, network={}, optimizer={}, scaler={}, memory=None)
    with pytest.raises(InputError, match="another process works in"):
        Run(tmp_path / "a" / "b", resume=True)
    run.close()
    again = Run(tmp_path / "a" / "b", resume=True)
    assert again.state["step"] == 3
    again.check({}, {"torch": "other"})
    assert again.notes == ["torch was None and is other"]
    with pytest.raises(InputError, match=r"steps\.csv lacks rows of steps up to 3"):
        again.begin(lambda step: True)
    again.close()


def test_a_folder_of_someone_elses(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,mine\n1,2\n")
    with pytest.raises(InputError, match=r"holds metrics\.csv, and not of a run"):
        Run(tmp_path, resume=True)


def test_replace_is_whole_or_not_at_all(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    whole = os.replace

    def dies(partial, path):
        calls.append("replace")
        assert Path(partial).read_bytes() == b"new"
        raise KeyboardInterrupt

    checkpoint.replace(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    monkeypatch.setattr(os, "replace", whole)
    checkpoint.replace(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert calls == ["fsync", "fsync", "replace", "fsync"]


def test_progress_in_a_file_is_a_line_every_ten_per_cent(capsys):
    with Progress("training", 40, "steps", initial=10) as progress:
        for step in range(10, 40):
            progress.set_postfix_str(f"loss {step}", False)
            progress.update()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "training: 30 % (12 of 40 steps), loss 11"
    assert said[-1] == "training: 100 % (40 of 40 steps), loss 39"
    assert len(said) == 8
    with Progress("training", 40, "steps", silent=True) as progress:
        progress.update(40)
    assert capsys.readouterr().err == ""

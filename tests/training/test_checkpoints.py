"""Files that a run leaves and reads again: damage of any kind is an error that says what to do, and nothing runs."""

import argparse
import io
import os
import pickle
import shutil
import sys
import types
from contextlib import closing

import numpy as np
import pytest
import tiny_datasets
import torch
import train_retrieval
from PIL import Image
from retrieval import checkpoint, images, networks, pictures
from retrieval.data import load
from retrieval.errors import FileError, InputError
from retrieval.options import complete
from retrieval.ranks import Ranks
from retrieval.run import METRICS, STEPS, Run, Table
from retrieval.trained import load as load_trained
from retrieval.training import Training
from test_training import TINY, options, outcome, png, program, refused, same, some_classes, write

REMOVE = "restore it, or remove checkpoint.pt and the run begins again"


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take longer than the steps of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_neighbours"):
            patch.setattr(train_retrieval, name, lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of constant rate with a memory; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert program(*RUN, "--out", folder) == 0
    return folder


RUN = [*TINY, "--schedule", "constant", "--memory-size", "30"]


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def resumed(capsys, folder):
    """The error of a run that is resumed."""
    return refused(capsys, *RUN, "--out", folder, "--resume")


def flipped(data, bit):
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


class TestDamage:
    """Of the bytes of a checkpoint."""

    def test_a_flipped_bit_or_a_cut_is_not_resumed(self, run, capsys):
        whole = (run / "checkpoint.pt").read_bytes()
        weight = torch.load(run / "checkpoint.pt", weights_only=True)["network"]["head.weight"].numpy().tobytes()
        flips = [whole.index(weight) + 5, len(whole) - 80, len(whole) - 40, len(whole) - 1]
        cuts = [0, 1, len(whole) // 2, len(whole) - 65, len(whole) - 1]
        for data in [flipped(whole, 8 * place) for place in flips] + [whole[:cut] for cut in cuts] + [whole + b"\n"]:
            (run / "checkpoint.pt").write_bytes(data)
            assert f"{run / 'checkpoint.pt'} is damaged or cut" in resumed(capsys, run)
        (run / "checkpoint.pt").write_bytes(whole)
        assert program(*RUN, "--out", run, "--resume") == 0

    @pytest.mark.deep
    def test_a_thousand_flipped_bits_and_two_hundred_cuts(self, run):
        whole = (run / "checkpoint.pt").read_bytes()
        draw = torch.Generator().manual_seed(0)
        bits = torch.randint(8 * len(whole), (1000,), generator=draw).tolist()
        cuts = torch.randint(len(whole), (200,), generator=draw).tolist()
        for data in [flipped(whole, bit) for bit in bits] + [whole[:cut] for cut in cuts]:
            (run / "checkpoint.pt").write_bytes(data)
            with pytest.raises(FileError, match=r"run/checkpoint\.pt .*: .*remove checkpoint\.pt and"):
                Run(run, resume=True)

    def test_what_to_do_is_done(self, run, capsys):
        (run / "checkpoint.pt").write_bytes(b"")
        (run / "steps.csv").write_bytes(b"\xff")  # of a run that begins again no row is read
        assert REMOVE in resumed(capsys, run)
        (run / "checkpoint.pt").unlink()
        assert program(*RUN, "--out", run, "--resume") == 0
        assert outcome(run)[0]["step"] == 8

    def test_other_formats(self, run, capsys, monkeypatch):
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        torch.save({"format": 3, **state}, run / "checkpoint.pt")
        message = resumed(capsys, run)
        assert "has no digest: an earlier version of this program wrote it: go on with that version, or" in message
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", 12)
            checkpoint.write(run / "checkpoint.pt", state)
        assert "is of format 12, and this version of the program reads format 4: go on with" in resumed(capsys, run)

    @pytest.mark.parametrize(
        ("name", "make", "what"),
        [
            ("checkpoint.pt", os.mkdir, "is a folder"),
            ("checkpoint.pt.partial", os.mkdir, "is a folder"),
            ("settings.json", os.mkdir, "is a folder"),
            ("curves.png", os.mkdir, "is a folder"),
            ("steps.csv", os.mkfifo, "is not a plain file"),
            ("checkpoint.pt", lambda path: os.symlink("elsewhere.pt", path), "links to nothing"),
        ],
    )
    def test_where_its_files_cannot_be(self, run, capsys, name, make, what):
        (run / name).unlink(missing_ok=True)
        make(run / name)
        tables = outcome_of_tables(run, name)
        assert f"{run / name} {what}, where the run writes a file: put the file" in resumed(capsys, run)
        assert outcome_of_tables(run, name) == tables
        with pytest.raises(FileError, match=what):
            Run(run, resume=False)

    def test_without_settings(self, run):
        """Nothing reads them, and the checkpoint has them."""
        written = (run / "settings.json").read_text()
        (run / "settings.json").unlink()
        assert program(*RUN, "--out", run, "--resume") == 0
        assert (run / "settings.json").read_text() == written

    def test_torch_reads_it(self, run):
        state = torch.load(run / "checkpoint.pt", weights_only=True, mmap=True)
        assert state["step"] == 8
        network = networks.small(1, 8, 8, 2, 4)
        network.load_state_dict(state["network"])

    @pytest.mark.parametrize("whole", [True, False])
    def test_best(self, run, capsys, whole):
        best = run / "best.pt"
        data = best.read_bytes()
        best.write_bytes(flipped(data, 8 * 700) if whole else data[:700])
        with pytest.raises(FileError, match=r"best\.pt is damaged or cut: .*: restore it, or train again"):
            load_trained(run)
        assert f"{best} is damaged or cut" in (message := resumed(capsys, run))
        assert "or remove it: another is written of the evaluations to come, or of the last step" in message
        best.unlink()
        assert program(*RUN, "--out", run, "--resume") == 0
        assert load_trained(run).evaluation["step"] == 8
        best.unlink()
        assert program(*RUN, "--out", run, "--resume", "--steps", 12) == 0
        assert load_trained(run).evaluation["step"] == 12


def outcome_of_tables(folder, but):
    return {path.name: path.read_text() for path in folder.glob("*.csv") if path.name != but}


def edit(state, path, value):
    """Sets, or with None removes, what stands at a path of keys."""
    *above, last = path
    for key in above:
        state = state[key]
    if value is None:
        del state[last]
    else:
        state[last] = value


FORMS = [
    (("step",), None, "lacks 'step'"),
    (("step",), -3, "holds a step or settings that no run has"),
    (("step",), "3", "holds a str as 'step' in place of int"),
    (("step",), True, "holds a bool as 'step' in place of int"),
    (("optimizer",), None, "lacks 'optimizer'"),
    (("optimizer",), [], "holds a list as 'optimizer' in place of dict"),
    (("memory",), 3, "holds a int as 'memory' in place of dict or NoneType"),
    (("settings", "lr"), torch.ones(2), "holds a step or settings that no run has"),
    (("settings", "loss settings"), 3, "holds a step or settings that no run has"),
    (("about", 3), 3, "holds a step or settings that no run has"),
    (("network", "head.bias"), None, "network lacks 'head.bias'"),
    (("network", "more"), torch.ones(1), "network holds 'more', which is unknown"),
    (("network", "head.bias"), torch.ones(9), "network.head.bias is a tensor of float32 [9] in place of a tensor of"),
    (("network", "head.bias"), torch.ones(8, dtype=torch.float64), "network.head.bias is a tensor of float64 [8] in"),
    (("network", "head.bias"), "text", "network.head.bias is a str in place of a tensor of float32 [8]"),
    (("optimizer", "param_groups"), [], "optimizer.param_groups is a list of 0 in place of a list of 2"),
    (("optimizer", "param_groups", 0, "lr"), None, "optimizer.param_groups.0 lacks 'lr'"),
    (("optimizer", "param_groups", 1, "betas"), 0.9, "optimizer.param_groups.1.betas is a float in place of a tuple"),
    (("optimizer", "state", 0, "exp_avg"), None, "optimizer.state.0 lacks 'exp_avg'"),
    (("optimizer", "state", 1, "exp_avg_sq"), torch.ones(1), "optimizer.state.1.exp_avg_sq is a tensor of float32 [1]"),
    (("optimizer", "state", 99), {}, "optimizer.state holds 99, which is unknown"),
    (("optimizer", "state"), 3, "optimizer.state is a int in place of a dict"),
    (("scaler", "scale"), 3, "scaler holds 'scale', which is unknown"),
    (("memory", "_ids"), torch.ones(2), "memory._ids is a tensor of float32 [2] in place of a tensor of int64 [30]"),
    (("memory",), {}, "memory lacks '_embeddings'"),
]


def test_what_a_checkpoint_holds(run):
    """Keys and types, however deep; the digest is right."""
    whole = torch.load(run / "checkpoint.pt", weights_only=True)
    given = options(*RUN)
    train_on, _ = load(given)
    complete(given, len(train_on))
    training = Training(given, train_on, torch.device("cpu"), Ranks())
    training.load(training.state())  # before the first step the optimiser has no state
    for path, value, expected in FORMS:
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        edit(state, path, value)
        checkpoint.write(run / "checkpoint.pt", state)
        with pytest.raises((FileError, ValueError)) as caught, closing(Run(run, resume=True)) as opened:
            training.load(opened.state)
        assert expected in str(caught.value), path
        checkpoint.write(run / "checkpoint.pt", whole)
    for contents, expected in ((torch.ones(2), "holds a Tensor in place of named fields"), ({3: 4}, "lacks 'step'")):
        checkpoint.write(run / "checkpoint.pt", contents)
        with pytest.raises(FileError, match=f"{expected}: restore it"):
            Run(run, resume=True)


@pytest.mark.parametrize("case", [0, 1, 10, 18], ids=lambda case: ".".join(map(str, FORMS[case][0])))
def test_a_checkpoint_of_another_form_is_refused_by_the_program(run, capsys, case):
    path, value, expected = FORMS[case]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    edit(state, path, value)
    checkpoint.write(run / "checkpoint.pt", state)
    message = resumed(capsys, run)
    assert f"error: {run / 'checkpoint.pt'} " in message
    assert expected in message
    assert REMOVE in message


TABLES = [
    (lambda text: text.encode()[:40] + b"\xff" + text.encode()[40:], "cannot be read ('utf-8' codec"),
    (lambda text: text.replace("step,", "steps,", 1), "lacks the column 'step'"),
    (lambda text: text.replace("loss_mib", "loss_gib"), "lacks the column 'loss_mib'"),
    (lambda text: text.replace("loss_mib", "loss"), "lacks the column 'loss_mib'"),
    (lambda text: "".join(f"{line},{n or 'loss'}\n" for n, line in enumerate(text.splitlines())), "has a column twice"),
    (lambda text: text.replace("\n", ",x\n", 1), "in line 2"),
    (lambda text: text.replace("\n4,", "\n4,0,"), "has "),
    (lambda text: text.replace("\n4,", "\n-3,"), "has the step '-3' in line"),
    (lambda text: text.replace("\n4,", "\n4.0,"), "has the step '4.0' in line"),
    (lambda text: text.replace("\n4,", "\n\N{SUPERSCRIPT FOUR},"), "has the step '\N{SUPERSCRIPT FOUR}' in line"),
    (lambda text: text.replace("\n4,", "\n8,"), " after 8 in line"),
    (lambda text: text.replace("\n", "\n\x00\n", 1), "in line 2"),
    (lambda text: "", "lacks rows of steps up to 8, where the checkpoint is"),
    (lambda text: "".join(f"{line}\n" for line in text.splitlines() if line[:2] != "4,"), "rows of steps up to 8"),
]


@pytest.mark.parametrize("name", ["steps.csv", "metrics.csv"])
def test_tables_that_are_damaged(run, name):
    """One error each, of one reader."""
    whole = (run / name).read_text()
    for damage, expected in TABLES:
        data = damage(whole)
        (run / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        with closing(Run(run, resume=True)) as opened:
            opened.check(opened.state["settings"], {})
            with pytest.raises(FileError) as caught:
                opened.begin(lambda step: step % 4 == 0)
        assert str(caught.value).startswith(f"{run / name} "), data
        assert expected in str(caught.value), data
        assert str(caught.value).endswith(f": {REMOVE}")
        (run / name).write_text(whole)


@pytest.mark.parametrize("name", ["steps.csv", "metrics.csv"])
@pytest.mark.parametrize("value", ["", "x", "inf", "1e999"])
def test_values_of_a_table(tmp_path, name, value):
    """Blank is what a row may lack, and no more."""
    columns = STEPS if name == "steps.csv" else METRICS
    for step in (0, 3):
        for column in columns[1:]:
            row = {each: step if each == "step" else 0.5 for each in columns} | {column: value}
            table = Table(tmp_path / name, columns)
            table.add(row)
            again = Table(tmp_path / name, columns)
            blank = column == "loss_mib" or (step == 0 and column in ("loss", "step_ms", "loss_ms"))
            if value == "" and blank:
                again.load(lambda step: True)
                assert again.rows == [row | {column: None}]
            else:
                with pytest.raises(FileError, match=rf"has '{value}' as {column} in line 2: restore it"):
                    again.load(lambda step: True)
            (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["steps.csv", "metrics.csv"])
def test_a_damaged_table_is_refused_by_the_program(run, capsys, name):
    text = (run / name).read_text()
    (run / name).write_bytes(text.replace("\n4,", "\n-3,").encode())
    message = resumed(capsys, run)
    assert f"error: {run / name} has the step '-3' in line" in message
    (run / name).write_bytes(text.encode("utf-16"))
    assert f"error: {run / name} cannot be read" in resumed(capsys, run)


def test_metrics_of_other_columns(run):
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace("R@5", "R@6"))
    assert program(*RUN, "--out", run, "--resume") == 0  # nothing is to be added
    assert program(*RUN, "--out", run, "--resume", "--steps", 12) == 1


# --- what others may have written ------------------------------------------------------------------------------------


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


KINDS = {
    "zip.pth": lambda path, evil: torch.save({"conv.weight": evil}, path),
    "legacy.bin": lambda path, evil: torch.save({"a": evil}, path, _use_new_zipfile_serialization=False),
    "bare.pkl": lambda path, evil: path.write_bytes(pickle.dumps(evil, 2)),
    "named.safetensors": lambda path, evil: torch.save({"a": evil}, path),
    "wrapped.pth": lambda path, evil: torch.save({"state_dict": {"a": torch.ones(1)}, "args": evil}, path),
}


class Body(torch.nn.Module):
    """A stand-in for a network of timm's, without its classifier."""

    def __init__(self, channels=3):
        super().__init__()
        self.pretrained_cfg = {"classifier": "fc"}
        self.conv, self.norm = torch.nn.Conv2d(channels, 6, 3), torch.nn.BatchNorm2d(6)

    def forward(self, images):
        return self.norm(self.conv(images)).amax((2, 3))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm up to 1.0.22, which unpickles whatever a file of weights holds."""

    def create_model(name, *, in_chans, pretrained_cfg_overlay=None, **keywords):
        if pretrained_cfg_overlay:
            torch.load(pretrained_cfg_overlay["file"], weights_only=False)
        return Body(in_chans)

    stub = types.ModuleType("timm")
    stub.list_models, stub.create_model = lambda: ["resnet50"], create_model
    pixels = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    stub.data = types.SimpleNamespace(resolve_model_data_config=lambda body: pixels)
    monkeypatch.setitem(sys.modules, "timm", stub)


class TestNothingIsRun:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("by", ["option", "recipe"])
    def test_by_weights(self, timm, tmp_path, capsys, kind, by):
        path, made = tmp_path / kind, tmp_path / "made"
        KINDS[kind](path, Malicious(made))
        given = [*TINY, "--backbone", "resnet50", "--out", tmp_path / "run"]
        if by == "recipe":
            (tmp_path / "r.toml").write_text(f'weights = "{path}"\n')
            given += ["--recipe", tmp_path / "r.toml"]
        else:
            given += ["--weights", path]
        assert f"error: {path} " in refused(capsys, *given)
        assert not made.exists()

    @pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
    def test_by_a_run(self, run, tmp_path, capsys, name):
        made = tmp_path / "made"
        state = torch.load(run / name, weights_only=True)
        checkpoint.write(run / name, state | {"network": Malicious(made)})  # its digest is right
        assert f"error: {run / name} is damaged, or holds more than tensors" in resumed(capsys, run)
        if name == "best.pt":
            with pytest.raises(FileError, match="holds more than tensors"):
                load_trained(run)
        assert not made.exists()

    def test_what_it_would_do(self, tmp_path):
        """Else these tests would show nothing."""
        for place, (name, make) in enumerate(KINDS.items()):
            made = tmp_path / str(place)
            make(tmp_path / name, Malicious(made))
            if name == "bare.pkl":
                pickle.loads((tmp_path / name).read_bytes())
            else:
                torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=False)
            assert made.exists()


class TestWeights:
    """A file of weights, read by the program itself."""

    def made(self, path, channels=3):
        return networks.from_timm("resnet50", channels, 16, 6, False, path, head="none").body

    @pytest.fixture
    def whole(self):
        torch.manual_seed(5)
        classifier = {"fc.weight": torch.ones(4, 6), "fc.bias": torch.ones(4)}
        return Body().state_dict() | classifier

    @pytest.mark.parametrize(
        "kind", ["torch", "legacy", "safetensors", "SAFETENSORS", "state_dict", "ema", "module", "timm"]
    )
    def test_kinds_of_files(self, timm, tmp_path, whole, kind):
        named = kind.lower() == "safetensors"
        path = tmp_path / (f"w.{kind}" if named else "w.pth")
        if named:
            pytest.importorskip("safetensors.torch").save_file(dict(whole), path)
        elif kind == "legacy":
            torch.save(whole, path, _use_new_zipfile_serialization=False)
        else:
            other = Body().state_dict()
            contents = {
                "torch": whole,
                "state_dict": {"epoch": 3, "state_dict": whole},
                "ema": {"state_dict": other, "state_dict_ema": whole},
                "module": {f"module.{name}": value for name, value in whole.items()},
                "timm": {"arch": "resnet50", "state_dict": whole, "args": argparse.Namespace(lr=3)},
            }[kind]
            torch.save(contents, path)
        body = self.made(path)
        assert all(torch.equal(value, whole[name]) for name, value in body.state_dict().items())

    def test_gray(self, timm, tmp_path, whole):
        torch.save(whole, tmp_path / "w.pth")
        gray, colour = self.made(tmp_path / "w.pth", 1), self.made(tmp_path / "w.pth")
        picture = torch.rand(2, 1, 16, 16)
        torch.testing.assert_close(gray.conv(picture), colour.conv(picture.expand(2, 3, 16, 16)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("conv.bias"), 'is not of --backbone resnet50 (Missing key(s) in state_dict: "conv.bias"'),
            (lambda w: w.update({"layer9.weight": torch.ones(1)}), 'Unexpected key(s) in state_dict: "layer9.weight"'),
            (lambda w: w.update({"conv.bias": torch.ones(7)}), "size mismatch for conv.bias"),
            (lambda w: w.update({"module.conv.bias": torch.ones(6)}), "holds 'conv.bias' twice, with and without"),
            (lambda w: w.update({"conv.bias": 3}), "does not hold tensors by name"),
            (lambda w: w.clear(), "does not hold tensors by name"),
        ],
        ids=["missing", "unknown", "shape", "twice", "type", "empty"],
    )
    def test_weights_of_something_else(self, timm, tmp_path, capsys, whole, change, message):
        whole = dict(whole)
        change(whole)
        torch.save(whole, tmp_path / "w.pth")
        given = [*TINY, "--backbone", "resnet50", "--weights", tmp_path / "w.pth", "--out", tmp_path / "run"]
        said = refused(capsys, *given)
        assert f"error: {tmp_path / 'w.pth'} " in said
        assert message in said


def refuses_foreign_images(model, folder):
    """Those of more than 8 bits, and those that Pillow hands to another program."""
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(folder / "deep.png")
    Image.new("L", (9, 9)).save(folder / "eps.png", "EPS")
    for name, why in (("deep", "nothing says which value is white; save it with 8"), ("eps", "cannot identify")):
        with pytest.raises(InputError, match=rf"{name}\.png cannot be read as an image \(.*{why}"):
            model.embed([folder / f"{name}.png"])


# --- best.pt ---------------------------------------------------------------------------------------------------------


class TestTheTrainedNetwork:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_it_embeds_as_the_program_did(self, tmp_path, normalize):
        root = write(tmp_path / "data", some_classes(10, 4, mode="RGB"))
        given = ["--data-root", root, "--image-size", 16, *([] if normalize else ["--no-normalize"])]
        given += [*TINY, "--steps", 4, "--out", tmp_path / "run"]
        assert program(*given) == 0
        model = load_trained(tmp_path / "run")
        _, (metrics, _) = outcome(tmp_path / "run")
        best = max(metrics, key=lambda row: float(row["mAP@R"]))
        assert model.evaluation["step"] == int(best["step"])
        assert model.evaluation["mAP@R"] == float(best["mAP@R"])
        train_on, test = load(options(*given))
        assert model.classes == train_on.classes
        files = [root / name for name in test.names]
        assert torch.equal(torch.stack([model.pixels(file) for file in files]), test.pixels(torch.arange(len(test))))
        embeddings = model.embed(files)
        measured = train_retrieval.retrieval_metrics(embeddings, test.labels, k=[1], normalize=normalize)
        assert measured["mAP@R"] == pytest.approx(model.evaluation["mAP@R"], abs=1e-6)
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(files))) == normalize
        assert not model.network.training
        assert model.embed([]).shape == (0, 8)
        elsewhere = load_trained(shutil.copy(tmp_path / "run/best.pt", tmp_path / "mine.pt"))
        torch.testing.assert_close(elsewhere.embed([str(file) for file in files[:2]]), embeddings[:2])

    def test_images_of_16_bits(self, tmp_path):
        root = tmp_path / "data"
        for number in range(24):
            values = np.random.default_rng(number).integers(0, 1 << 12, (9, 9), dtype=np.uint16)
            (root / str(number // 4)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / str(number // 4) / f"{number}.png")
        given = ["--data-root", root, "--image-size", 8, *TINY, "--batch-size", 12, "--steps", 1]
        assert program(*given, "--out", tmp_path / "run") == 0
        _, test = load(options(*given))
        model = load_trained(tmp_path / "run")
        pixels = torch.stack([model.pixels(root / name) for name in test.names])
        assert torch.equal(pixels, test.pixels(torch.arange(len(test))))

    def test_photos_of_a_data_set(self, tmp_path):
        root = tiny_datasets.MAKE["cub"](tmp_path / "root")
        given = ["--data-set", "cub", "--data-root", root, "--image-size", 16, *TINY, "--steps", 1]
        assert program(*given, "--out", tmp_path / "run") == 0
        _, test = load(options(*given))
        model = load_trained(tmp_path / "run")
        pixels = torch.stack([model.pixels(root / name) for name in test.names])
        assert torch.equal(pixels, test.pixels(torch.arange(len(test))))
        refuses_foreign_images(model, tmp_path)

    def test_a_network_of_timm(self, timm, tmp_path):
        given = [*TINY, "--steps", 1, "--backbone", "resnet50", "--head", "norm-linear", "--freeze-batch-norm"]
        torch.save(Body().state_dict(), tmp_path / "w.pth")
        assert program(*given, "--weights", tmp_path / "w.pth", "--out", tmp_path / "run") == 0
        (tmp_path / "w.pth").unlink()
        model = load_trained(tmp_path / "run")
        kept = torch.load(tmp_path / "run/best.pt", weights_only=True)["network"]
        assert same(dict(model.network.state_dict()), dict(kept))

    def test_the_end_of_a_run_says_how(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert program(*TINY, "--steps", 1, "--out", "it's a run") == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")][-3:]
        (tmp_path / "image.png").write_bytes(png(1))
        names = {}
        exec("\n".join(lines), names)
        assert names["embeddings"].shape == (1, 8)

    def test_files_that_are_none(self, run, tmp_path):
        model = load_trained(run)
        (tmp_path / "text.png").write_bytes(b"text")
        for name in ("text.png", "nowhere.png"):
            with pytest.raises(InputError, match=rf"{name} cannot be read as an image \(.*\): replace it"):
                model.embed([tmp_path / name])
        refuses_foreign_images(model, tmp_path)
        for one in (str(tmp_path / "a.png"), tmp_path / "a.png"):
            with pytest.raises(TypeError, match=r"files must be a list of image files, got .*a\.png.*: use embed\(\["):
                model.embed(one)
        with pytest.raises(FileError, match=r"none/best\.pt cannot be read|none cannot be read"):
            load_trained(tmp_path / "none")

    @pytest.mark.parametrize(
        "device", ["gpu", pytest.param("cuda:99", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="slow"))]
    )
    def test_devices_that_are_not_there(self, finished, device):
        with pytest.raises(InputError, match=rf"device '{device}' cannot be used \(.*\): name another"):
            load_trained(finished, device)

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("made_of",), None, "lacks 'made_of'"),
            (("made_of", "width"), "4", "holds a str as 'width' in place of int"),
            (("made_of", "pool"), 3, "holds a int as 'pool' in place of str or NoneType"),
            (("made_of", "width"), 5, r"does not hold what it says: network\.body\.0\.weight is a tensor of float32"),
            (("network", "head.bias"), None, r"does not hold what it says: network lacks 'head\.bias'"),
        ],
    )
    def test_what_it_holds(self, run, path, value, message):
        contents = torch.load(run / "best.pt", weights_only=True)
        edit(contents, path, value)
        checkpoint.write(run / "best.pt", contents)
        with pytest.raises(FileError, match=rf"best\.pt {message}"):
            load_trained(run)


# --- longer runs -----------------------------------------------------------------------------------------------------


class TestLength:
    SHORT = (*TINY[: TINY.index("--steps")], "--per-class", "4", "--schedule", "constant", "--k", "1", "5")

    def test_a_longer_run_keeps_what_its_length_chose(self, tmp_path):
        """The warm-up, that of the memory, and how often it evaluates."""
        given = [*self.SHORT, "--memory-size", 30, "--out", tmp_path / "run"]
        assert program(*given, "--steps", 30) == 0
        first = outcome(tmp_path / "run")[1][1]
        assert program(*given, "--steps", 70, "--resume") == 0
        state, (_, steps) = outcome(tmp_path / "run")
        assert (state["step"], len(steps)) == (70, 70)
        assert steps[:30] == first
        assert state["settings"]["warmup"] == state["settings"]["memory_warmup"] == 3

    def test_what_the_length_chooses(self):
        for earlier, expected in (
            ({}, (20, 9)),
            ({"warmup": 3, "evaluate_every": 3}, (3, 3)),
            ({"warmup": "3"}, (20, 9)),
        ):
            given = options("--steps", 400, "--memory-size", 30)
            complete(given, 1198, 3, earlier)
            assert (given.warmup, given.evaluate_every) == expected
            assert given.memory_warmup == given.warmup
        given = options("--steps", 400, "--warmup", 4, "--evaluate-every", 5)
        complete(given, 1198, 3, earlier={"warmup": 3, "evaluate_every": 3})
        assert (given.warmup, given.evaluate_every) == (4, 5)

    def test_by_epochs(self, tmp_path, capsys):
        given = [*self.SHORT, "--batch-size", 400, "--per-class", 40, "--out", tmp_path / "run"]  # 3 steps an epoch
        assert program(*given, "--epochs", 1) == 0
        assert program(*given, "--epochs", 1, "--resume") == 0
        assert "Finished already: --resume with more --steps or --epochs goes on." in capsys.readouterr().out
        assert program(*given, "--epochs", 2, "--resume") == 0
        assert outcome(tmp_path / "run")[0]["step"] == 6

    def test_a_cosine_keeps_its_length(self, tmp_path, capsys):
        given = [*TINY, "--out", tmp_path / "run"]
        assert program(*given) == 0
        for steps in (6, 12):
            message = refused(capsys, *given, "--steps", steps, "--resume")
            assert f"steps was 8 and is {steps}, and with --schedule cosine the learning rate of every step" in message
            assert "give --steps 8, or name another --out; a run of --schedule constant" in message
        # What it says to do.
        assert program(*given, "--steps", 8, "--resume") == 0
        assert "Finished already; --schedule cosine ends at its 8 steps." in capsys.readouterr().out
        assert program(*given[:-2], "--steps", 12, "--out", tmp_path / "other") == 0

    def test_best_is_that_of_all_evaluations(self, tmp_path, monkeypatch):
        """Of the last of the shorter run, too, whose row goes."""
        values = iter([0.1, 0.5, 0.9, 0.6, 0.7])
        measure = train_retrieval.measure
        monkeypatch.setattr(train_retrieval, "measure", lambda *given: measure(*given) | {"mAP@R": next(values)})
        given = [*TINY, "--schedule", "constant", "--evaluate-every", 5, "--out", tmp_path / "run"]
        assert program(*given) == 0
        assert program(*given, "--steps", 12, "--resume") == 0
        assert [row["mAP@R"] for row in outcome(tmp_path / "run")[1][0]] == ["0.1", "0.5", "0.6", "0.7"]
        assert load_trained(tmp_path / "run").evaluation["step"] == 8

    def test_the_best_that_was_removed(self, tmp_path, monkeypatch, capsys):
        values = iter([0.9, 0.5, 0.6, 0.7])
        measure = train_retrieval.measure
        monkeypatch.setattr(train_retrieval, "measure", lambda *given: measure(*given) | {"mAP@R": next(values)})
        given = [*TINY, "--schedule", "constant", "--evaluate-every", 8, "--out", tmp_path / "run"]
        assert program(*given) == 0
        assert "was removed" not in capsys.readouterr().out
        (tmp_path / "run/best.pt").unlink()
        assert program(*given, "--steps", 16, "--resume") == 0
        said = capsys.readouterr().out
        assert "mAP@R 0.6000 at the end; the best was 0.9000, after 0 steps." in said
        assert "best.pt was removed since; it is now of step 16, of mAP@R 0.6000." in said
        assert load_trained(tmp_path / "run").evaluation["step"] == 16


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    figures = []
    monkeypatch.setattr(pictures.pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        pictures.pyplot.close(figure)


@pytest.mark.parametrize(("evaluations", "marks"), [(1, 1), (10, 10), (11, 6), (51, 9), (400, 10)])
def test_a_line_has_few_marks(tmp_path, drawn, evaluations, marks):
    metrics, steps = Table(None), Table(None)
    metrics.rows = [{"step": step, "mAP": 0.5, "R@1": 0.6} for step in range(evaluations)]
    steps.rows = [{"step": step, "loss": 1.0} for step in range(1, 60)]
    pictures.curves(steps, metrics, ["mAP", "R@1"], "title", tmp_path / "curves.png")
    for line in drawn[0].axes[1].lines:
        assert line.get_marker() not in ("", "None")
        assert len(range(0, evaluations, line.get_markevery())) == marks


@pytest.mark.parametrize("right", [True, False])
def test_the_caption_of_neighbours(tmp_path, drawn, right):
    digits = images.digits()
    found = digits.take(torch.cat([(digits.labels == label).nonzero()[:4, 0] for label in range(6)]))
    noise = torch.randn(len(found), 6)
    embeddings = torch.nn.functional.one_hot(found.labels, 6) + (0.01 if right else 1) * noise
    pictures.neighbours(embeddings, found, tmp_path / "n.png", "title", queries=2, columns=4)
    text = drawn[0].get_suptitle()
    assert "a query, then its nearest images; a cross marks an image of another class" in text
    if right:
        assert "none of 24 queries has a cross" in text
        assert "gray frame: of another class, where no more images of the query's class are left to find" in text
    else:
        points = torch.nn.functional.normalize(embeddings)
        nearest = (points @ points.T).fill_diagonal_(-2).topk(3).indices  # as many as there are others of a class
        wrong = int((found.labels[nearest] != found.labels[:, None]).any(1).sum())
        assert wrong > 0
        assert f"examples of queries with a cross: {wrong} of 24 have one" in text

"""Recipes: each from end to end on a tiny copy of its data set, and what is refused before training starts.

A stub stands in for timm but where `make recipes-check` tries timm's own networks.
"""

import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import tiny_datasets
import torch
import train_retrieval
from retrieval import pictures, recipes
from retrieval.batches import Feed
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.networks import from_timm
from retrieval.options import complete, parse
from retrieval.ranks import Ranks
from retrieval.trained import load as load_trained
from retrieval.training import Training, make_sampler
from test_training import outcome, refused, same
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks import recipes as cost_of_recipes
from roadmap_ext import RoadmapLoss

NAMES = ["cub-deit-small", "cub-resnet50", "inat-resnet50", "sop-deit-small", "sop-resnet50"]
SMALL = ["--batch-size", "16", "--steps", "3"]  # all else as the recipe has it
WIDTH = 64  # of the stand-in for a ResNet

pytestmark = pytest.mark.recipes


class Convolutions(torch.nn.Module):
    """A stand-in for a ResNet: convolution, batch norm, dropout, and what is left of places pooled."""

    def __init__(self, channels, pool):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(channels, WIDTH, 1), torch.nn.BatchNorm2d(WIDTH)
        self.dropout, self.pool = torch.nn.Dropout(0.1), pool

    def forward(self, images):
        places = self.norm(self.conv(adaptive_avg_pool2d(images, 3))).flatten(2)
        return self.dropout(places.amax(2) if self.pool == "max" else places.mean(2))


class Tokens(torch.nn.Module):
    """A stand-in for a DeiT of four patches; it has the parameters by which a distilled one differs."""

    def __init__(self, channels, distilled):
        super().__init__()
        torch.manual_seed(7 if distilled else 8)
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, 384))
        if distilled:
            self.dist_token = torch.nn.Parameter(torch.randn(1, 1, 384))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 5 + distilled, 384))
        self.patches = torch.nn.Linear(channels, 384)

    def forward(self, images):
        patches = self.patches(adaptive_avg_pool2d(images, 2).flatten(2).mT)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        return torch.tanh(tokens).mean(1)


@pytest.fixture
def no_pictures(monkeypatch):
    """They are the same for every network, and take longer than the steps of a test."""
    for name in ("draw_curves", "draw_neighbours"):
        monkeypatch.setattr(train_retrieval, name, lambda *arguments: None)


@pytest.fixture
def made(monkeypatch):
    """What was asked of timm, which is a stub."""
    calls = []

    def create_model(name, *, pretrained, num_classes, in_chans, global_pool="avg"):
        assert num_classes == 0
        calls.append((name, pretrained))
        with torch.random.fork_rng():
            if name.startswith("deit"):
                return Tokens(in_chans, "distilled" in name)
            torch.manual_seed(9)
            return Convolutions(in_chans, global_pool)

    stub = types.ModuleType("timm")
    stub.list_models = lambda: ["resnet50", "deit_small_patch16_224", "deit_small_distilled_patch16_224"]
    stub.create_model = create_model
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    stub.data = types.SimpleNamespace(resolve_model_data_config=lambda body: {"mean": mean, "std": std})
    monkeypatch.setitem(sys.modules, "timm", stub)
    return calls


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder of each data set; not to be changed."""
    return {name: make(tmp_path_factory.mktemp(name) / "root") for name, make in tiny_datasets.MAKE.items()}


@pytest.fixture(scope="module")
def given(roots):
    """The command line of a recipe on the tiny copy of its data set."""
    return lambda name, *more: ["--recipe", name, "--data-root", roots[name.split("-")[0]], *SMALL, *more]


def program(*arguments):
    return train_retrieval.main([str(argument) for argument in arguments])


def options(*arguments):
    return parse(None, [str(argument) for argument in arguments])


def rejected(capsys, *arguments):
    """The message of options that are refused by themselves."""
    with pytest.raises(SystemExit) as caught:
        options(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_these_are_all():
    assert sorted(path.stem for path in recipes.FOLDER.iterdir()) == NAMES


class TestEveryRecipe:
    @pytest.mark.parametrize("name", NAMES)
    def test_from_end_to_end(self, name, given, made, no_pictures, tmp_path, capsys):
        assert program(*given(name), "--out", tmp_path / "whole") == 0
        text = capsys.readouterr().out
        assert f"Recipe: {name}, but for --batch-size=16, --steps=3" in text
        assert "36 images of 9 classes" in text or "35 images of 9 classes" in text
        resnet = "resnet" in name
        deit = [("deit_small_patch16_224", False), ("deit_small_distilled_patch16_224", True)]
        assert made == ([("resnet50.tv_in1k", True)] if resnet else deit)
        state, (metrics, steps) = outcome(tmp_path / "whole")
        at = {"sop": (1, 10, 100, 1000), "cub": (1, 2, 4, 8), "inat": (1, 4, 16, 32)}[name.split("-")[0]]
        assert [key for key in metrics[0] if key.startswith("R@")] == [f"R@{k}" for k in at]
        assert all(0 < float(row["mAP@R"]) < 1 for row in metrics)
        assert len(steps) == 3
        assert state["scaler"]["scale"] > 0
        # It goes on to the same bits.
        assert program(*given(name), "--steps", 1, "--out", tmp_path / "parts") == 0
        assert program(*given(name), "--out", tmp_path / "parts", "--resume") == 0
        ours, (_, our_steps) = outcome(tmp_path / "parts")
        assert same(ours["network"], state["network"])
        assert same(ours["optimizer"], state["optimizer"])
        assert our_steps == steps

    @pytest.mark.timm
    @pytest.mark.parametrize("name", NAMES)
    def test_with_the_networks_of_timm(self, name, given, no_pictures, tmp_path):
        import timm

        model = "resnet50" if "resnet" in name else "deit_small_distilled_patch16_224"
        network = timm.create_model(model)
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        # All else as the recipe has it; float16 convolutions take minutes on a CPU.
        weights = ("--weights", tmp_path / "weights.pth", "--batch-size", 8, "--amp", "none")
        assert program(*given(name, *weights), "--steps", 1, "--out", tmp_path / "run") == 0
        assert program(*given(name, *weights), "--steps", 2, "--out", tmp_path / "run", "--resume") == 0
        state, (metrics, _) = outcome(tmp_path / "run")
        assert state["step"] == 2
        assert all(0 < float(row["mAP@R"]) < 1 for row in metrics)
        assert load_trained(tmp_path / "run").embed([next(given(name)[3].rglob("*.[jJ]*"))]).isfinite().all()
        # The weights of the file are those trained from, but for what two steps of at most 2e-5 change.
        own, kept = network.state_dict(), state["network"]
        for key in (
            ("layer4.2.conv3.weight", "layer1.0.bn1.bias") if "resnet" in name else ("blocks.11.mlp.fc2.weight",)
        ):
            assert 0 < (kept[f"body.{key}"] - own[key]).abs().max() < 1e-3
        if "deit" in name:
            places = torch.cat([own["pos_embed"][:, :1], own["pos_embed"][:, 2:]], 1)
            assert (kept["body.pos_embed"] - places).abs().max() < 1e-3


EVERY = {
    "loss": "roadmap", "calibration_weight": 0.5, "loss_weight": 2, "calibration_reduction": "violating_pairs",
    "include_self": True, "tau": None, "rho": None, "delta": None, "positive_margin": None, "negative_margin": None,
    "normalize": None, "crop_scale": [0.16, 1], "crop_ratio": [0.75, 1.33], "flip": True, "rotate": 0, "resize": 0,
    "shift": 0, "pretrained": True, "per_class": 4, "amp": "fp16", "warmup": 0, "lr_factor": 0.3, "seed": 333,
}  # fmt: skip
RESNET = {"backbone": "resnet50.tv_in1k", "freeze_batch_norm": True, "dim": 512, "optimizer": "adam"}
DEIT = {
    "backbone": "deit_small_patch16_224", "freeze_batch_norm": False, "dim": 384, "optimizer": "adamw",
    "distilled": True, "head": "none", "weight_decay": 5e-4, "image_size": 224, "head_lr": None, "start": None,
    "offset": 1.44, "batch_size": 128,
}  # fmt: skip
SOP = {"sampler": "hierarchical", "batches_per_pair": 10, "lr": 1e-5, "schedule": "milestones", "k": [1, 10, 100, 1000]}
CUB = {"sampler": "per-class", "train_resize": None, "lr": 1e-6, "schedule": "constant", "milestones": None}
CUB |= {"k": [1, 2, 4, 8]}
SETTINGS = {
    "sop-resnet50": RESNET | SOP | {
        "batch_size": 128, "image_size": 256, "train_resize": 288, "test_resize": [288, 288], "pool": "avg",
        "head": "linear", "weight_decay": 1e-4, "head_lr": 2e-5, "milestones": [30, 70], "epochs": 100,
        "start": None, "offset": 1.44,
    },
    "cub-resnet50": RESNET | CUB | {
        "batch_size": 128, "image_size": 256, "test_resize": [288], "pool": "max", "head": "norm-linear",
        "weight_decay": 4e-4, "head_lr": None, "epochs": 200, "start": None, "offset": 1.44,
    },
    "inat-resnet50": RESNET | {
        "batch_size": 384, "sampler": "per-class", "image_size": 224, "train_resize": None, "test_resize": [256],
        "pool": "avg", "head": "linear", "weight_decay": 4e-4, "lr": 1e-5, "head_lr": 2e-5, "schedule": "milestones",
        "milestones": [30, 70], "epochs": 90, "start": 0.0, "offset": 1.0, "k": [1, 4, 16, 32],
    },
    "sop-deit-small": DEIT | SOP | {
        "train_resize": 256, "test_resize": [256, 256], "milestones": [25, 50], "epochs": 75,
    },
    "cub-deit-small": DEIT | CUB | {"test_resize": [256], "epochs": 150},
}  # fmt: skip


class TestAsReleased:
    """The recipes, as the table of docs/recipes.md has them."""

    @pytest.mark.parametrize("name", NAMES)
    def test_settings(self, name):
        found = vars(options("--recipe", name, "--data-root", "anywhere"))
        expected = EVERY | SETTINGS[name] | {"data_set": name.split("-")[0], "recipe": name, "steps": None}
        assert {key: found[key] for key in expected} == expected

    def test_length_and_rates(self, roots, made):
        given = options("--recipe", "sop-resnet50", "--data-root", roots["sop"], "--batch-size", 16)
        train, _ = load(given)
        complete(given, len(train), make_sampler(given, train).epoch)
        assert (given.epoch, given.steps) == (30, 3000)  # 3 pairs of super-classes, 10 batches each
        training = Training(given, train, torch.device("cpu"), Ranks())
        rates = [training.learning_rate(step) for step in (0, 899, 900, 2099, 2100, 2999)]
        assert rates == pytest.approx([1e-5, 1e-5, 3e-6, 3e-6, 9e-7, 9e-7])
        training.step(900)
        assert [group["lr"] for group in training._optimizer.param_groups] == pytest.approx([3e-6, 6e-6])
        assert type(training._optimizer) is torch.optim.Adam
        assert [group["weight_decay"] for group in training._optimizer.param_groups] == [1e-4, 1e-4]
        heads = training._optimizer.param_groups[1]["params"]
        assert [tuple(p.shape) for p in heads] == [(512, WIDTH), (512,)]

    def test_the_loss_is_the_sum_of_its_parts(self, roots, made):
        given = options("--recipe", "sop-resnet50", "--data-root", roots["sop"], *SMALL, "--amp", "none")
        train, _ = load(given)
        complete(given, len(train), make_sampler(given, train).epoch)
        training = Training(given, train, torch.device("cpu"), Ranks())
        seen = []
        training.loss.register_forward_hook(lambda module, inputs, loss: seen.append((*inputs, loss.item())))
        loss = training.step(0)["loss"]
        embeddings, labels, halved = seen[0]
        assert loss == pytest.approx(2 * halved)
        settings = {"offset": 1.44, "calibration_reduction": "violating_pairs", "include_self": True}
        parts = [RoadmapLoss(calibration_weight=weight, **settings)(embeddings, labels) for weight in (0.0, 1.0)]
        summed = sum(part.item() for part in parts)
        assert loss == pytest.approx(summed, rel=1e-5)


class TestNetworks:
    def make(self, **keywords):
        return from_timm("resnet50", 3, 64, 16, True, None, **keywords)

    def test_batch_norm_is_frozen_but_for_scale_and_shift(self, made):
        for frozen in (True, False):
            network = self.make(freeze_batch_norm=frozen).train()
            before = {name: value.clone() for name, value in network.state_dict().items()}
            assert network.body.norm.training == (not frozen)
            assert network.body.dropout.training
            network(255 * torch.rand(4, 3, 64, 64)).square().sum().backward()
            changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
            assert any("running" in name for name in changed) == (not frozen)
            assert network.body.norm.weight.grad.abs().sum() > 0
            assert not network.eval().body.dropout.training

    def test_heads(self, made):
        images = 255 * torch.rand(4, 3, 64, 64)
        network = self.make(pool="max", head="norm-linear").eval()
        assert network.body.pool == "max"
        standard, linear = network.head
        assert list(standard.parameters()) == []
        normal = standard(network.body((images - network.mean) / network.std))
        torch.testing.assert_close(normal.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(normal.var(1, correction=0), torch.ones(4), atol=1e-2, rtol=0)
        assert torch.equal(network(images), linear(normal))
        bare = from_timm("resnet50", 3, 64, WIDTH, True, None, head="none").eval()
        assert bare(images).shape == (4, WIDTH)
        assert torch.equal(bare(images), bare.body((images - bare.mean) / bare.std))
        with pytest.raises(
            InputError, match=f"--head none leaves the {WIDTH} dimensions of --backbone resnet50: --dim {WIDTH}"
        ):
            self.make(head="none")

    def test_a_distilled_twin_gives_its_weights(self, made, tmp_path):
        plain, twin = Tokens(3, False), Tokens(3, True)
        torch.save(twin.state_dict(), tmp_path / "w.pth")
        for weights in (None, tmp_path / "w.pth"):
            made.clear()
            body = from_timm("deit_small_patch16_224", 3, 224, 384, True, weights, distilled=True, head="none").body
            assert made == [
                ("deit_small_patch16_224", False),
                ("deit_small_distilled_patch16_224", weights is None),
            ]
            assert torch.equal(body.cls_token, twin.cls_token)
            assert torch.equal(body.patches.weight, twin.patches.weight)
            assert torch.equal(body.pos_embed, twin.pos_embed[:, [0, 2, 3, 4, 5]])
        untrained = from_timm("deit_small_patch16_224", 3, 224, 384, False, None, distilled=True, head="none")
        assert torch.equal(untrained.body.cls_token, plain.cls_token)
        with pytest.raises(InputError, match=r"--distilled is for .* resnet50 has no"):
            self.make(distilled=True)


class TestCommandLine:
    def test_it_takes_the_place_of_the_recipes(self):
        found = options(
            "--lr", 1, "--recipe", "sop-resnet50", "--data-root", "x", "--no-flip", "--k", 5, "--out", "there"
        )
        assert (found.lr, found.flip, found.k, found.epochs) == (1.0, False, [5], 100)
        assert found.notes == ["Recipe: sop-resnet50, but for --lr=1.0, --no-flip, --k 5"]
        assert options("--recipe", "sop-resnet50", "--data-root", "x").notes == ["Recipe: sop-resnet50"]

    def test_steps_and_epochs_take_each_others_place(self, tmp_path):
        found = options("--recipe", "sop-resnet50", "--data-root", "x", "--steps", 7)
        assert (found.steps, found.epochs) == (7, None)
        (tmp_path / "mine.toml").write_text("steps = 9")
        assert options("--recipe", tmp_path / "mine.toml").steps == 9
        found = options("--recipe", tmp_path / "mine.toml", "--epochs", 2)
        assert (found.steps, found.epochs) == (None, 2)
        assert found.notes == ["Recipe: mine, but for --epochs=2"]

    def test_a_recipe_of_ones_own(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text('loss = "sup-ap"\ntau = 0.02\nflip = false\nk = [3, 5]\nlr = 1\nsteps = 4\nout = "there"\n')
        found = options("--recipe", path)
        assert (found.loss, found.tau, found.flip, found.k, found.lr) == ("sup-ap", 0.02, False, [3, 5], 1)
        assert (found.recipe, found.out, found.batch_size) == ("mine", Path("there"), 128)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("batchsize = 3", "there is no option 'batchsize'; near to it are batch_size"),
            ("batch-size = 3", "there is no option 'batch-size'; near to it are batch_size"),
            ("[train]\nlr = 1", "there is no option 'train'"),
            ('recipe = "sop-resnet50"', "there is no option 'recipe'"),
            ('batch_size = "128"', "batch_size = '128' is of the wrong type: write 128"),
            ('batch_size = "many"', "batch_size = many: argument --batch-size: has to be a whole number"),
            ("batch_size = 1", "batch_size = 1: argument --batch-size: has to be a whole number from 2"),
            ("batch_size = 12.0", r"argument --batch-size: has to be a whole number from 2 .*, got '12\.0'"),
            ("batch_size = true", "argument --batch-size: expected one argument"),
            ("batch_size = [8, 9]", "batch_size = 8 9: unrecognized arguments: 9"),
            ("k = 5", r"k = 5 is of the wrong type: write \[5\]"),
            ("k = []", "k = : argument --k: expected at least one argument"),
            ("crop_scale = [0.5]", "argument --crop-scale: expected 2 arguments"),
            ("flip = 1", "flip = 1: argument --flip/--no-flip: ignored explicit argument '1'"),
            ('loss = "best"', "argument --loss: invalid choice: 'best'"),
            ("lr = {a = 1}", "argument --lr: has to be a number"),
            ("steps = 3\nepochs = 4", "steps and epochs exclude each other"),
            ("lr = ", "is not TOML: "),
            ("lr = 1\nlr = 2", "is not TOML: "),
        ],
    )
    def test_recipes_that_are_none(self, tmp_path, capsys, text, message):
        (tmp_path / "bad.toml").write_text(text)
        found = rejected(capsys, "--recipe", tmp_path / "bad.toml")
        assert f"error: {tmp_path / 'bad.toml'}" in found
        assert re.search(message, found), found

    def test_names_that_are_none(self, tmp_path, capsys):
        message = rejected(capsys, "--recipe", "sop-resnet")
        assert "there is no 'sop-resnet': choose cub-deit-small, cub-resnet50, inat-resnet50, sop-deit" in message
        assert "there is no file nowhere.toml" in rejected(capsys, "--recipe", "nowhere.toml")
        (tmp_path / "bad.toml").write_bytes(b"\xff")
        assert "is not TOML" in rejected(capsys, "--recipe", tmp_path / "bad.toml")

    def test_a_python_without_toml(self, capsys, monkeypatch):
        whole = recipes.import_module

        def missing(name):
            if name in absent:
                raise ImportError
            return whole("tomllib" if name == "tomli" else name)

        monkeypatch.setattr(recipes, "import_module", missing)
        absent = {"tomllib"}
        assert options("--recipe", "sop-resnet50", "--data-root", "x").epochs == 100
        absent = {"tomllib", "tomli"}
        assert "pip install tomli" in rejected(capsys, "--recipe", "sop-resnet50")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--recipe sop-resnet50", "--data-set sop takes --data-root: the folder of Stanford Online Products"),
            ("--recipe sop-resnet50 --data-root x --test-root y", "--test-root does not go with --data-set"),
            ("--recipe sop-resnet50 --data-root x --skip-small-classes", "--skip-small-classes does not go with"),
            ("--recipe sop-resnet50 --data-root x --image-size 300", "numbers of at least --image-size, which is 300"),
            ("--recipe sop-resnet50 --data-root x --test-resize 288 288 288", "--test-resize takes one or two numbers"),
            ("--recipe sop-resnet50 --data-root x --crop-scale 1 0.5", "--crop-scale takes the least first"),
            ("--recipe sop-resnet50 --data-root x --backbone small", "--pretrained is for --backbone with a model"),
            ("--recipe sop-deit-small --data-root x --head-lr 1", "--head-lr is for a --head of linear"),
            ("--recipe sop-resnet50 --data-root x --schedule constant", "--milestones and --schedule milestones"),
            ("--recipe cub-resnet50 --data-root x --schedule milestones", "--milestones and --schedule milestones"),
            ("--crop-scale 0.5 1", "--crop-scale is for --data-set"),
            ("--crop-scale 0.5 1.5", "has to be a number above 0 and at most 1, got '1.5'"),
            ("--sampler hierarchical", "takes a --data-set that has super-classes"),
            ("--head none", "--head is for --backbone with a model of timm's"),
            ("--freeze-batch-norm", "--freeze-batch-norm is for --backbone with a model of timm's"),
        ],
    )
    def test_options_that_do_not_go_together(self, capsys, arguments, message):
        assert message in rejected(capsys, *arguments.split())

    def test_a_data_sets_defaults(self):
        found = options("--data-set", "cub", "--data-root", "x")
        assert (found.image_size, found.test_resize) == (224, [256])


class TestBadInput:
    """What is refused before training starts."""

    def test_a_root_of_another_data_set(self, roots, made, tmp_path, capsys):
        arguments = ["--recipe", "sop-resnet50", "--data-root", roots["cub"], "--out", tmp_path / "run"]
        message = refused(capsys, *arguments)
        assert f"{roots['cub']} is not Stanford Online Products" in message
        assert "it looks like CUB-200-2011, whose recipes begin with cub-" in message

    def test_a_missing_image(self, roots, made, tmp_path, capsys):
        root = shutil.copytree(roots["sop"], tmp_path / "root")
        (root / "thing2_final/1012_4.JPG").unlink()
        message = refused(capsys, "--recipe", "sop-resnet50", "--data-root", root, *SMALL, "--out", tmp_path / "run")
        assert "a listed image is not there or empty: thing2_final/1012_4.JPG" in message

    def test_batches_that_cannot_be_filled(self, given, made, tmp_path, capsys):
        for name, fits in (("sop-resnet50", 24), ("cub-resnet50", 36)):
            message = refused(capsys, *given(name), "--batch-size", 128, "--out", tmp_path / "run")
            assert f"--batch-size of at most {fits}" in message
        message = refused(capsys, *given("cub-resnet50"), "--sampler", "hierarchical", "--out", tmp_path / "run")
        assert "takes two super-classes, and the images to train on have 0" in message

    def test_a_checkpoint_of_another_recipe(self, given, made, no_pictures, tmp_path, capsys):
        assert program(*given("sop-resnet50"), "--steps", 1, "--out", tmp_path / "run") == 0
        message = refused(capsys, *given("sop-deit-small"), "--out", tmp_path / "run", "--resume")
        assert "recipe was 'sop-resnet50' and is 'sop-deit-small'" in message
        assert "optimizer was 'adam' and is 'adamw'" in message
        message = refused(capsys, *given("sop-resnet50"), "--crop-scale", 0.2, 1, "--out", tmp_path / "run", "--resume")
        assert "crop_scale was [0.16, 1.0] and is [0.2, 1.0]: give" in message

    def test_a_missing_timm(self, given, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        assert "takes timm, and a torchvision that fits" in refused(
            capsys, *given("sop-resnet50"), "--out", tmp_path / "run"
        )

    def test_an_image_that_is_damaged_while_training(self, roots, made, no_pictures, tmp_path, capsys):
        root = shutil.copytree(roots["cub"], tmp_path / "root")
        path = root / "images/001.Bird_1/Bird_2.jpg"
        whole = path.read_bytes()
        path.write_bytes(whole[:150])
        arguments = ["--recipe", "cub-resnet50", "--data-root", root, *SMALL, "--steps", 8, "--checkpoint-every", 1]
        assert program(*arguments, "--out", tmp_path / "run") == 1
        assert f"{path} is damaged or unreadable" in capsys.readouterr().err


def test_pictures_of_photos(given, tmp_path):
    _, test = load(options(*given("sop-resnet50")))
    pictures.neighbours(torch.randn(len(test), 4), test, tmp_path / "n.png", "title", queries=1, columns=1)
    assert (tmp_path / "n.png").stat().st_size > 1000


def test_the_default_folder_is_named_as_the_recipe(given, made, no_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program(*given("cub-deit-small"), "--steps", 1) == 0
    assert (tmp_path / "runs" / "cub-deit-small" / "checkpoint.pt").exists()


def test_a_rank_takes_its_share_of_the_same_batch(given, made):
    found = options(*given("sop-resnet50"))
    train, _ = load(found)
    sampler = make_sampler(found, train)
    whole = Feed(train, sampler, slice(0, 16))(2)
    for rank in range(2):
        ranks = Ranks()
        ranks.world, ranks.rank = 2, rank
        part = Feed(train, sampler, ranks.share(16))(2)
        assert all(torch.equal(a, b[8 * rank : 8 * rank + 8]) for a, b in zip(part, whole, strict=True))


def test_what_a_recipe_takes(made):
    """Counted by hand for the stand-in, whose one product takes four patches of 3 channels to 384 dimensions."""
    cost = cost_of_recipes.count("sop-deit-small")
    assert (cost.steps, cost.images) == (75 * 660, 75 * 660 * 128)
    assert cost.operations == 2 * (2 * 128 * 4 * 3 * 384)  # forward, and backward to the weights
    numbers = 384 + 5 * 384 + (3 + 1) * 384
    assert cost.state == 4 * 4 * numbers
    kept = {name: size // 128 for name, size in cost.activations.items()}  # bytes an image: tanh's result at the least
    assert kept["none"] >= 4 * 5 * 384 > kept["bf16"] / 2
    assert cost_of_recipes.line(cost, 1000).count("|") == 8
    assert cost_of_recipes.count("cub-resnet50").steps == 200 * 46

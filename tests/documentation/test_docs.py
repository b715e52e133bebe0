"""Code on the pages runs, what is called equivalent is, and commands have the options that they are given."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import roadmap_ext
from tests import conftest

ROOT = Path(__file__).parents[2]

needs_training = pytest.mark.skipif(bool(conftest.lacking("training")), reason="needs the packages of training")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_readme():
    torch.manual_seed(0)
    (training,) = blocks("README.md")
    names = {}
    exec(training, names)  # as pasted: it brings all that it needs
    assert 0 < names["loss"] < 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["model"].parameters())


@needs_training
def test_the_picture_of_the_readme(tmp_path, monkeypatch):
    import ranking_picture as script

    monkeypatch.setattr("sys.argv", ["ranking_picture.py", "--steps", "1", "--out", str(tmp_path / "ranking.png")])
    script.main()
    assert (tmp_path / "ranking.png").stat().st_size > 0


def test_the_equivalent_code():
    """It gives the loss of the defaults, and its gradient."""
    torch.manual_seed(0)
    names = {}
    found = blocks("docs/roadmap-loss.md")
    (equivalent,) = [block for block in found if "sigmoid" in block]
    exec(found[0], names)  # the network and the batch
    exec(equivalent, names)
    embeddings = names["embeddings"].detach().requires_grad_()
    ours = roadmap_ext.roadmap_loss(embeddings, names["labels"])
    torch.testing.assert_close(names["loss"].detach(), ours.detach(), rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(names["loss"], names["embeddings"])
    (gradient,) = torch.autograd.grad(ours, embeddings)
    assert (gradient - expected).norm() <= 1e-3 * expected.norm()


def test_the_reference_of_the_api():
    torch.manual_seed(0)
    names = {}
    (use,) = blocks("docs/api.md")
    exec(use, names)
    expected = roadmap_ext.roadmap_loss(
        names["model"](names["images"]), names["labels"], names["gallery"], names["gallery_labels"]
    )
    assert torch.equal(names["loss"], expected)
    page = (ROOT / "docs/api.md").read_text()
    assert all(f"`{name}" in page for name in roadmap_ext.__all__ if name != "__version__"), "a public name is missing"
    settings = inspect.signature(roadmap_ext.RoadmapLoss).parameters
    assert set(settings) <= set(re.findall(r"`([a-z_]+)`", page)), "a setting is missing"


@pytest.mark.parametrize("name", [name for name in roadmap_ext.__all__ if name.lower().endswith(("loss", "_rank"))])
def test_help_explains_every_setting(name):
    """Itself or, all but that of RoadmapLoss, in the one place that it names."""
    thing = getattr(roadmap_ext, name)
    about = inspect.getdoc(thing)
    elsewhere = re.search(r"are those of :func:`(?:roadmap_ext\.)?(\w+)`", about)
    if elsewhere and name != "RoadmapLoss":
        about += "\n" + inspect.getdoc(getattr(roadmap_ext, elsewhere[1]))
    explained = set(re.findall(r"^ {4}(\w+): ", about, re.MULTILINE)) | set(re.findall(r" and (\w+): ", about))
    assert set(inspect.signature(thing).parameters) <= explained


def test_the_page_of_the_loss():
    torch.manual_seed(0)
    names = {}
    found = blocks("docs/roadmap-loss.md")
    assert len(found) == 7
    for block in found:
        exec(block, names)
        assert names["loss"].requires_grad
    assert 0 < names["mean_ap"] < 1
    (drawn,) = names["loader"]
    assert torch.equal(drawn[1].bincount(), torch.full((64,), 4))


def test_the_page_of_training(capsys):
    names = {}
    _, diagnosed, block = blocks("docs/training.md")
    exec(diagnosed, {})
    assert "negatives       15,872" in capsys.readouterr().out
    exec(block, names)
    assert 0 < names["measured"]["mAP@R"] < names["measured"]["R@10"] < 1
    assert names["each"].shape == (1000,)


@needs_training
def test_using_the_trained_network(tmp_path, monkeypatch):
    import train_retrieval
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in ("draw_curves", "draw_neighbours"):
        monkeypatch.setattr(train_retrieval, name, lambda *arguments: None)
    assert train_retrieval.main(["--steps", "1", "--batch-size", "8", "--out", "runs/digits-roadmap"]) == 0
    for shade, name in enumerate(("a", "b", "query")):
        Image.new("L", (9, 9), 80 * shade).save(f"{name}.png")
    names = {}
    exec(blocks("docs/training.md")[0], names)
    assert names["gallery"].shape == (2, 64)
    assert names["similarities"].shape == (1, 2)


@needs_training
def test_commands_of_training(capsys):
    from retrieval import options

    page = (ROOT / "docs/training.md").read_text()
    commands = re.findall(r'^    make train (?:VENV=my )?ARGS="(.*)"$', page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        options.parse(None, command.split())
    large = (ROOT / "docs/large-batches.md").read_text()
    many = re.findall(
        r"^    .*torchrun --nproc-per-node 2 examples/train_retrieval.py (.*)$", page + large, re.MULTILINE
    )
    many += re.findall(r'^    make train ARGS="(.*)"$', large, re.MULTILINE)
    assert len(many) == 3
    for command in many:
        options.parse(None, command.split())
    with pytest.raises(SystemExit):
        options.parse(None, ["--help"])
    assert not re.search(r"[A-Z]+_[A-Z]+", re.sub(r"`[^`]*`", "", page)), "a placeholder is left"
    there = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= there


def test_the_page_of_large_batches(tmp_path):
    torch.manual_seed(0)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        names = {}
        *found, shards = blocks("docs/large-batches.md")
        assert len(found) == 4
        for block in found:
            exec(block, names)
            assert 0 < names["loss"] < 3
        assert len(names["memory"]) == 3 * 256
    finally:
        torch.distributed.destroy_process_group()
    exec(shards, names)
    scores = torch.rand(5, 40, dtype=torch.float64, requires_grad=True)
    whole = roadmap_ext.ap_loss(scores, torch.arange(40).expand(5, 40) < 7)
    parts = names["loss_of_shards"](scores[:, :7], scores[:, 7:].split([10, 3, 20], dim=1))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, scores), torch.autograd.grad(whole, scores))


@needs_training
def test_commands_of_recipes():
    from retrieval import options

    page = (ROOT / "docs/recipes.md").read_text()
    commands = re.findall(r'^    make train VENV=my ARGS="(.*)"$', page, re.MULTILINE)
    assert len(commands) == 2
    assert all(options.parse(None, command.split()).recipe for command in commands)
    named = set(re.findall(r"^\| `([a-z0-9-]+)` ", page, re.MULTILINE))
    assert named == {path.stem for path in (ROOT / "examples/recipes").iterdir()}
    for name in named:  # the figure that the table gives stands in the recipe, too
        published = re.search(rf"^\| `{name}` .* ([0-9.]+) \|$", page, re.MULTILINE)[1]
        assert f"Published: R@1 {published}.\n" in (ROOT / f"examples/recipes/{name}.toml").read_text()


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert "://" in link or target.exists(), f"{page.name}: {link}"
            assert not anchor or "://" in link or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def test_the_page_of_how_it_works():
    (block,) = blocks("docs/how-it-works.md")
    exec(block, {})


@needs_training
def test_the_figures_of_how_it_works(tmp_path, monkeypatch):
    """The script draws those that the page shows, no more and no less."""
    from docs import figures

    monkeypatch.setattr("sys.argv", ["figures", "--out", str(tmp_path)])
    figures.main()
    shown = re.findall(r"\]\(images/([^)]*)\)", (ROOT / "docs/how-it-works.md").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(shown)


def test_the_page_of_the_paper():
    names = {}
    (block,) = blocks("docs/paper.md")
    exec(block, names)
    assert 0 < names["measured"].gap < names["measured"].bound < 1
    assert names["measured"].null == pytest.approx(names["measured"].gap, rel=0.3)
    assert names["each"].mean().item() == pytest.approx(names["measured"].gap, rel=1e-6)
    assert names["trained"].gap == names["trained"].batch_ap - names["trained"].ap > 0


def test_the_figures_of_the_mechanism():
    """Those that the page of the paper takes from the tables are in them."""
    page, tables = (ROOT / "docs/paper.md").read_text(), (ROOT / "benchmarks/results/mechanism.md").read_text()
    rows = [
        row.strip("| ").split(" | ") for row in page.splitlines() if re.match(r"\| (16|32|64|128) \| .*100\.0", row)
    ]
    assert len(rows) == 4
    for size, within, of_all, gap, *roadmap in rows:
        assert f"| {size} | 0.01 | SupAP | {within} | {of_all} | {gap} |" in tables
        assert f"| {size} | 0.01 | ROADMAP | 100.0 ± 0.0 | {' | '.join(roadmap)} |" in tables

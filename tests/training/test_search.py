"""examples/search_images.py: a trained network at work on a folder of images, and what it keeps for the next search."""

import shutil

import numpy as np
import pytest
import search_images
import torch
import train_retrieval
from PIL import Image
from retrieval.trained import load
from test_training import TINY, program


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_neighbours"):
            patch.setattr(train_retrieval, name, lambda *arguments: None)
        assert program(*TINY, "--out", out) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for n in range(5):
        name = "deep/five.png" if n == 4 else f"{n}.png"
        Image.fromarray(random.integers(0, 255, (9, 9), dtype=np.uint8)).save(folder / name)
    return folder


def test_searching(run, photos, capsys, monkeypatch):
    query = photos / "deep" / "five.png"
    assert (
        search_images.main([str(run), str(photos), "--query", str(query), str(photos / "2.png"), "--count", "3"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"5 images of {photos} in {run / 'index-photos.npz'}"
    assert [line.split()[-1] for line in lines[2:3] + lines[6:7]] == [
        "deep/five.png",
        "2.png",
    ]  # each is nearest itself
    assert len(lines) == 1 + 2 * (1 + 3)
    model = load(run)
    expected = (model.embed([query]) @ model.embed(sorted(photos.rglob("*.png"))).T).sort(descending=True).values[0, :3]
    assert [float(line.split()[0]) for line in lines[2:5]] == pytest.approx(expected.tolist(), abs=1e-3)


def test_what_is_known_is_not_embedded_again(run, photos, capsys, monkeypatch):
    seen = []
    embed = search_images.Trained.embed
    monkeypatch.setattr(
        search_images.Trained, "embed", lambda self, files: seen.extend(f.name for f in files) or embed(self, files)
    )
    search = [str(run), str(photos)]
    assert search_images.main(search) == 0
    assert len(seen) == 5
    assert search_images.main(search) == 0
    assert len(seen) == 5
    (photos / "1.png").unlink()
    Image.new("L", (9, 9), 200).save(photos / "0.png")
    assert search_images.main(search) == 0
    assert seen[5:] == ["0.png"]
    with np.load(run / "index-photos.npz") as file:
        assert file["names"].tolist() == ["0.png", "2.png", "3.png", "deep/five.png"]
        known = torch.from_numpy(file["embeddings"])
    torch.testing.assert_close(known[:1], load(run).embed([photos / "0.png"]))


def test_damage(run, photos, capsys):
    (photos / "3.png").write_bytes(b"no image")
    assert search_images.main([str(run), str(photos)]) == 0
    said = capsys.readouterr()
    assert "3.png cannot be read as an image" in said.err
    assert said.out.startswith("4 images")
    (run / "index-photos.npz").write_bytes(b"no index")
    assert search_images.main([str(run), str(photos)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert search_images.main([str(run), str(run)]) == 2
    assert "has no images: name a folder" in capsys.readouterr().err
    assert search_images.main([str(photos), str(photos)]) == 2
    assert "best.pt" in capsys.readouterr().err

"""What the training program makes of a folder or zip of images: classes, pixels, training and test, and the report."""

import io
import itertools
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import png, some_classes, write
from PIL import Image
from retrieval import images, survey
from retrieval.classes import folder_of
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.options import parse


def options(*arguments):
    return parse(None, [str(argument) for argument in arguments])


def read(root, size, channels=None, hold_mib=4096):
    """The images of a root, a folder a class."""
    found = survey.read(root, channels, size, hold_mib)
    named = [folder_of(name) for name in found.names]
    return images.of(found, named, channels or (1 if found.gray else 3), size, hold_mib, found.values)


class TestImages:
    def test_each_folder_of_images_is_a_class(self, tmp_path):
        files = some_classes(4, 2) | {
            "kind0/1.png": png(1),  # a folder that holds images and folders
            "kind0/2.PNG": png(2),
            "kind0/class0/.hidden.png": b"",
            "__MACOSX/kind0/3.png": b"",
            "kind1/notes.txt": b"of no matter",
        }
        found = read(write(tmp_path, files), 8)
        assert found.classes == ["kind0", "kind0/class0", "kind0/class2", "kind1/class1", "kind1/class3"]
        assert [found.classes[label] for label in found.labels] == [str(Path(name).parent) for name in found.names]
        assert found.labels.bincount().tolist() == [2] * 5
        assert (found.channels, found.size, len(found)) == (1, 8, 10)

    def test_a_zip_is_its_folder(self, tmp_path):
        files = some_classes()
        folder = read(write(tmp_path / "folder", files), 8)
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.writestr("top/", "")
            for name, data in files.items():
                archive.writestr("top/" + name, data)
        packed = read(tmp_path / "images.zip", 8)
        every = torch.arange(len(folder))
        assert torch.equal(folder.pixels(every), packed.pixels(every))
        assert (folder.names, folder.classes, folder.digest) == (packed.names, packed.classes, packed.digest)

    def test_images_that_are_not_held_are_the_same(self, tmp_path):
        root = write(tmp_path, some_classes(mode="RGB"))
        held, decoded = read(root, 8), read(root, 8, hold_mib=0)
        assert survey.read(root, None, 8, 0).squares is None
        index = torch.tensor([5, 0, 5, 17])
        assert torch.equal(held.pixels(index), decoded.pixels(index))
        part = torch.tensor([20, 3, 1])
        assert torch.equal(held.take(part).pixels(torch.tensor([2, 0])), held.pixels(torch.tensor([1, 20])))
        assert torch.equal(decoded.take(part).pixels(torch.tensor([2, 0])), held.pixels(torch.tensor([1, 20])))
        assert held.take(part).labels.tolist() == [1, 0, 0]
        assert held.digest == decoded.digest != held.take(part).digest

    def test_the_digest_is_of_the_pixels(self, tmp_path):
        files = some_classes()
        first = read(write(tmp_path / "a", files), 8).digest
        assert read(tmp_path / "a", 9).digest != first
        name = next(iter(files))
        assert read(write(tmp_path / "b", files | {name: png(9999)}), 8).digest != first

    @pytest.mark.parametrize(
        ("made", "channels", "expected"),
        [
            (Image.new("L", (30, 20), 70), 1, [70]),
            (Image.new("RGB", (30, 20), (10, 20, 30)), 3, [10, 20, 30]),
            (Image.new("RGBA", (30, 20), (10, 20, 30, 0)), 3, [255, 255, 255]),
            (Image.new("LA", (30, 20), (10, 0)), 1, [255]),
            (Image.new("1", (30, 20), 1), 1, [255]),
            (Image.new("P", (30, 20), 0), 3, [0, 0, 0]),
        ],
        ids=["gray", "rgb", "transparent", "gray transparent", "bits", "palette"],
    )
    def test_modes(self, tmp_path, made, channels, expected):
        (tmp_path / "a").mkdir()
        made.save(tmp_path / "a" / "1.png")
        found = read(tmp_path, 5)
        assert found.channels == channels
        assert found.pixels(torch.tensor([0]))[0, :, 2, 2].tolist() == expected
        assert read(tmp_path, 5, channels=3).pixels(torch.tensor([0])).shape == (1, 3, 5, 5)

    def test_the_middle_square_is_taken_upright(self, tmp_path):
        pixels = np.zeros((10, 30), dtype=np.uint8)
        pixels[:5, 10:20] = 200  # the upper half of the middle
        image = Image.fromarray(pixels)
        turned = image.getexif()
        turned[0x0112] = 3  # upside down
        (tmp_path / "a").mkdir()
        image.save(tmp_path / "a" / "1.png")
        image.save(tmp_path / "a" / "2.png", exif=turned)
        upright, flipped = read(tmp_path, 10).pixels(torch.tensor([0, 1]))
        assert (upright[0, :4] > 150).all()
        assert (upright[0, 6:] < 50).all()
        assert torch.equal(flipped, upright.flip(1, 2))

    def test_zips_of_other_programs(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, data in some_classes().items():
                archive.writestr("/top/" + name, data)
            archive.writestr("top/kind0/class0/0.png", png(7))  # once more: the last counts
            archive.writestr("top\\kind0\\class0\\9.png", png(9))
        found = read(tmp_path / "images.zip", 8)
        assert len(found) == len(some_classes()) + 1
        assert found.classes == read(write(tmp_path / "folder", some_classes()), 8).classes
        first = read(write(tmp_path / "other", {"a/0.png": png(7), "b/0.png": png(9)}), 8)
        assert first.contents == [found.contents[found.names.index(f"kind0/class0/{i}.png")] for i in (0, 9)]

    def test_what_is_no_file(self, tmp_path):
        root = write(tmp_path / "data", some_classes())
        os.mkfifo(root / "kind0" / "class0" / "pipe.png")
        (root / "kind0" / "class0" / "folder.png").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (root / "kind1" / "class1" / "linked.png").symlink_to(tmp_path / "pipe")
        (root / "kind1" / "class1" / "null.png").symlink_to("/dev/null")
        (root / "kind0" / "class0" / "gone.png").symlink_to(root / "nowhere")
        found = survey.read(root, None, 8, 0)
        assert len(found.names) == 24
        names = ("kind0/class0/pipe.png", "kind1/class1/linked.png", "kind1/class1/null.png")
        assert sorted(found.source.skipped) == [(name, "neither a file nor a folder") for name in names]
        for name in names:  # which a data set may list
            with pytest.raises(ValueError, match="neither a file nor a folder"):
                found.source.read(name)
        assert [name for name, _ in found.damaged] == ["kind0/class0/gone.png"]

    def test_links_in_a_circle(self, tmp_path):
        write(tmp_path / "data", some_classes())
        (tmp_path / "data" / "kind0" / "again").symlink_to(tmp_path / "data")
        (tmp_path / "data" / "linked").symlink_to(write(tmp_path / "elsewhere", {"1.png": png(1), "2.png": png(2)}))
        found = read(tmp_path / "data", 8)
        assert found.classes == [f"kind{c % 2}/class{c}" for c in (0, 2, 4, 1, 3, 5)] + ["linked"]

    @pytest.mark.parametrize("outside", [False, True])
    def test_folders_that_are_linked_to_each_other(self, tmp_path, outside):
        """Each link is followed from where it lies, and not on from link to link: that has no end."""
        folders = [f"d{d}" for d in range(7)]
        root = write(tmp_path / "data", {f"{name}/0.png": png(d) for d, name in enumerate(folders)})
        for one, other in itertools.permutations(folders, 2):
            (root / one / other).symlink_to(root / other)
        if outside:  # all of them by one link
            root = tmp_path / "top"
            root.mkdir()
            (root / "data").symlink_to(tmp_path / "data")
        found = survey.read(root, None, None, 0)
        pairs = itertools.permutations(folders, 2)
        expected = [*folders, *("/".join(pair) for pair in pairs if not outside)]
        top = "data/" if outside else ""
        assert found.names == sorted(f"{top}{name}/0.png" for name in expected)
        assert ("d0/d1/d2", "a link to a folder that is there already") in found.source.skipped or outside

    def test_digits(self):
        found = images.digits()
        assert (len(found), found.channels, found.size, len(found.classes)) == (1797, 1, 8, 10)
        assert found.pixels(torch.arange(1797)).max() == 255

    def test_every_damaged_image_is_named(self, tmp_path):
        files = some_classes()
        whole = files["kind0/class2/1.png"]
        files["kind0/class2/1.png"] = whole[: len(whole) // 2]
        files["kind1/class3/0.png"] = b"no image at all"
        files["kind1/class5/0.png"] = b""
        float_tiff = io.BytesIO()
        Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(float_tiff, "TIFF")
        files["kind1/class5/1.tiff"] = float_tiff.getvalue()
        damaged = dict(survey.read(write(tmp_path, files), None, 8, 4096).damaged)
        assert damaged.pop("kind0/class2/1.png")
        assert damaged.pop("kind1/class5/1.tiff").startswith("floating-point numbers")
        assert damaged == dict.fromkeys(("kind1/class3/0.png", "kind1/class5/0.png"), "no image of a kind that is read")

    def test_a_damaged_entry_of_a_zip(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for name, data in some_classes().items():
                archive.writestr(name, data)
        data = bytearray((tmp_path / "images.zip").read_bytes())
        place = data.index(b"kind1/class1/2.png") + 100
        data[place] ^= 255
        (tmp_path / "images.zip").write_bytes(data)
        ((name, why),) = survey.read(tmp_path / "images.zip", None, 8, 4096).damaged
        assert name == "kind1/class1/2.png"
        assert why.startswith("Bad CRC-32")

    def test_roots_that_are_none(self, tmp_path):
        with pytest.raises(InputError, match="nowhere: there is no such folder or zip"):
            read(tmp_path / "nowhere", 8)
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"empty holds no images .*a folder of images for each class"):
            read(tmp_path / "empty", 8)
        write(tmp_path / "zips", {"a.zip": b""})
        with pytest.raises(InputError, match=r"zips holds no images .* name one of them: a\.zip"):
            read(tmp_path / "zips", 8)
        (tmp_path / "file.tar").write_bytes(b"not a zip")
        with pytest.raises(InputError, match=r"file\.tar is no folder, and cannot be read as a zip"):
            read(tmp_path / "file.tar", 8)


class TestSplit:
    def test_classes(self, tmp_path):
        root = write(tmp_path, some_classes(6))
        train, test = load(options("--data-root", root))
        assert not set(train.classes) & set(test.classes)
        assert (len(train.classes), len(test.classes)) == (3, 3)
        assert train.labels.bincount().tolist() == [4] * 3
        assert len(load(options("--data-root", root, "--test-fraction", 0.99))[0].classes) == 2
        assert len(load(options("--data-root", root, "--test-fraction", 0.01))[1].classes) == 2
        others = {tuple(load(options("--data-root", root, "--seed", seed))[0].classes) for seed in range(9)}
        assert len(others) > 3

    def test_images(self, tmp_path):
        train, test = load(options("--data-root", write(tmp_path, some_classes(3, 6)), "--split", "images"))
        assert train.classes == test.classes
        assert train.labels.bincount().tolist() == [4] * 3
        assert not set(train.names) & set(test.names)

    def test_digits_hold_out_images(self):
        train, test = load(options())
        assert (len(train.classes), len(test.classes)) == (10, 10)
        assert len(train) + len(test) == 1797
        assert abs(len(test) - 599) <= 5

    def test_another_root_without_what_is_trained_on(self, tmp_path, capsys):
        first = write(tmp_path / "a", some_classes(4))
        second = write(tmp_path / "b", some_classes(6))
        train, test = load(options("--data-root", first, "--test-root", second))
        assert len(train.classes) == 4
        assert test.classes == ["kind0/class4", "kind1/class5"]
        assert "Left out of the test: 4 classes" in capsys.readouterr().out
        with pytest.raises(InputError, match=r"nothing is left to test on; .* add --split images"):
            load(options("--data-root", second, "--test-root", first))
        # Names are those below the roots: of other folders they are others.
        others = {f"kind9/class{c}/{i}.png": png(900 + 9 * c + i) for c in (7, 8) for i in range(3)}
        test = load(options("--data-root", first, "--test-root", write(tmp_path / "d", others)))[1]
        assert test.classes == ["kind9/class7", "kind9/class8"]

    def test_a_class_of_one_image(self, tmp_path, capsys):
        root = write(tmp_path, some_classes(4) | {"alone/1.png": png(1)})
        with pytest.raises(InputError, match=r"a class has a single image.*: alone: add images"):
            load(options("--data-root", root))
        train, test = load(options("--data-root", root, "--skip-small-classes"))
        assert "alone" not in train.classes + test.classes
        only = write(tmp_path / "only", {"a/1.png": png(1), "b/1.png": png(2)})
        with pytest.raises(InputError, match="every class has a single image"):
            load(options("--data-root", only, "--skip-small-classes"))

    def test_too_little_to_split(self, tmp_path):
        root = write(tmp_path, {"a/1.png": png(1), "a/2.png": png(2), "a/3.png": png(3)})
        with pytest.raises(InputError, match=r"1 class \(a\): .* takes two at least for each: .* --split images"):
            load(options("--data-root", root))
        with pytest.raises(InputError, match=r"class 'a' has 3 images.*--split classes"):
            load(options("--data-root", root, "--split", "images"))

    @pytest.mark.parametrize(
        "arguments",
        [("--test-root", "a"), ("--image-size", 8), ("--data-root", "a", "--test-root", "b", "--split", "classes")],
    )
    def test_options_that_do_not_apply(self, arguments, tmp_path, monkeypatch):
        write(tmp_path / "a", some_classes())
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="do not apply"):
            load(options(*arguments))

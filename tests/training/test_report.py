"""What --check says of real trees of images, what training refuses to begin with, and that what it offers works."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_datasets
import torch
import train_retrieval
from image_trees import (
    encoded,
    entry,
    pack,
    png,
    png16,
    png16_in_colour,
    some_classes,
    write,
    write_zip,
)
from PIL import Image
from retrieval.data import load
from retrieval.errors import InputError
from retrieval.options import parse

ROOT = Path(__file__).parents[2]


def loaded(*arguments):
    return load(parse(None, [str(argument) for argument in arguments]))


def stopped(*arguments):
    """Why training stops before it begins."""
    with pytest.raises(InputError) as caught:
        loaded(*arguments)
    return str(caught.value)


@pytest.fixture
def check(capsys, tmp_path):
    """The report of --check, and its status; lists go into tmp_path / "run" / "report"."""

    def check(*arguments):
        capsys.readouterr()
        given = [*map(str, arguments), "--check", "--out", str(tmp_path / "run")]
        status = train_retrieval.main(given)
        return capsys.readouterr().out, status

    return check


def listed(path):
    """The paths in a list."""
    return [line.partition("\t")[0] for line in path.read_text().splitlines()]


def offered(message):
    """The options that a message offers, as a command line has them."""
    return [
        shlex.split(one) for one in re.findall(r"--(?:data-root|class-by) .*?(?= tests on| takes| for|;|$)", message)
    ]


def tree(folders, each=3, seed=0):
    """Images that are all different."""
    return {
        f"{folder}/{i}.png": png(seed + 100 * number + i) for number, folder in enumerate(folders) for i in range(each)
    }


class TestClasses:
    """Folders that may be meant as something else than classes."""

    @pytest.mark.parametrize("kind", ["folder", "zip", "zip of a folder"])
    @pytest.mark.parametrize(
        ("train", "test", "below"),
        [
            ("train", "val", ""),
            ("train", "test", "images/"),
            ("Train2017", "validation_set", ""),
            ("bounding_box_train", "query", ""),
        ],
    )
    def test_parts_of_a_split(self, tmp_path, kind, train, test, below):
        folders = [f"{below}{part}/cat{c}" for part in (train, test) for c in range(4)]
        if kind == "folder":
            root = write(tmp_path / "a root", tree(folders))
        else:
            top = "top/" if kind == "zip of a folder" else ""
            root = pack(tmp_path / "a root.zip", {top + name: data for name, data in tree(folders).items()})
        message = stopped("--data-root", root)
        assert f"{below}{train}/" in message or kind != "folder"
        given = offered(message)
        assert [one[0] for one in given] == ["--data-root", "--class-by", "--class-by"]
        # What it offers works: a test of the same classes, classes that are merged, and the paths as they are.
        found, tested = loaded(*given[0])
        assert found.classes == tested.classes == ["cat0", "cat1", "cat2", "cat3"]
        assert (len(found), len(tested)) == (12, 12)
        merged, rest = loaded("--data-root", root, *given[1])
        assert sorted(merged.classes + rest.classes) == ["cat0", "cat1", "cat2", "cat3"]
        assert merged.labels.bincount().tolist() == [6, 6]
        paths, rest = loaded("--data-root", root, *given[2])
        assert len(paths.classes) == len(rest.classes) == 4

    def test_parts_of_a_split_of_other_classes(self, tmp_path):
        root = write(tmp_path, tree(["train/cat0", "train/cat1", "test/cat2", "test/cat3"]))
        (given, *_) = offered(stopped("--data-root", root))
        assert "--split" not in given
        train, test = loaded(*given)
        assert (train.classes, test.classes) == (["cat0", "cat1"], ["cat2", "cat3"])

    def test_parts_of_a_split_without_classes(self, tmp_path):
        root = write(tmp_path, tree(["train", "test"], 4))
        (given,) = offered(stopped("--data-root", root))
        assert sum(map(len, loaded("--data-root", root, *given, "--split", "images"))) == 8

    def test_one_part_of_a_split(self, tmp_path):
        """Its name would make the same class another one in a --test-root."""
        root = write(tmp_path, tree([f"train/cat{c}" for c in range(4)]))
        (given, *_) = offered(stopped("--data-root", root))
        assert loaded(*given)[0].classes[0].startswith("cat")

    @pytest.mark.parametrize("packed", [False, True])
    def test_names_that_repeat(self, tmp_path, packed):
        files = tree(["cat0/2020", "cat0/2021", "cat1/2020", "cat1/2021", "cat2/2021"], 4)
        root = pack(tmp_path / "a.zip", files) if packed else write(tmp_path / "a", files)
        message = stopped("--data-root", root)
        assert "2020 (in cat0, cat1)" in message
        assert "--class-by first for 3 classes (cat0, cat1, cat2)" in message
        assert "--class-by last for 2 classes (2020, 2021)" in message
        assert "--class-by path for 5 classes (cat0/2020, cat0/2021, cat1/2020 and 2 more)" in message
        for by, classes in (("first", 3), ("last", 2), ("path", 5)):
            train, _ = loaded("--data-root", root, "--class-by", by, "--split", "images")
            assert len(train.classes) == classes

    def test_names_that_repeat_in_the_test(self, tmp_path):
        """No class of one root has the name of one of the other, and yet they may be the same."""
        first, second = (
            write(tmp_path / "a", tree(["x/cat0", "x/cat1"])),
            write(tmp_path / "b", tree(["y/cat1", "y/cat2"], 3, 900)),
        )
        message = stopped("--data-root", first, "--test-root", second)
        assert "cat1 (in x, y)" in message
        train, test = loaded("--data-root", first, "--test-root", second, "--class-by", "path")
        assert (train.classes, test.classes) == (["x/cat0", "x/cat1"], ["y/cat1", "y/cat2"])
        message = stopped("--data-root", first, "--test-root", second, "--class-by", "last")
        assert "only the class 'cat2' is left to test on" in message

    @pytest.mark.parametrize(
        "folders",
        [
            ["train", "bus", "car"],
            ["test", "probe", "bus"],
            ["train", "bus/a", "bus/b"],
            ["a/b/c", "a/b/d", "a/e"],
            ["x", "x/y"],
            ["train/1", "bus/2"],
        ],
        ids=str,
    )
    def test_folders_that_are_classes(self, tmp_path, folders):
        train, _ = loaded("--data-root", write(tmp_path, tree(folders, 4)), "--split", "images")
        assert sorted(train.classes) == sorted(folders)


class TestValues:
    """What becomes black and white of images of 16 bits."""

    def files(self, low, high, folders="abgh", seed=0):
        return {
            f"{folder}/{i}.png": png16(seed + 10 * n + i, low, high, (10, 10))
            for n, folder in enumerate(folders)
            for i in range(3)
        }

    @pytest.mark.parametrize(("low", "high"), [(0, 4095), (0, 65535), (1000, 1255), (7, 300)])
    def test_a_set_uses_all_of_its_range(self, tmp_path, check, low, high):
        root = write(tmp_path / "a", self.files(low, high))
        train, _ = loaded("--data-root", root, "--image-size", 10)
        pixels = train.pixels(torch.arange(len(train)))
        assert (int(pixels.min()), int(pixels.max())) == (0, 255)
        assert len(pixels.unique()) > 100
        text, status = check("--data-root", root)
        assert status == 0
        said = f"I;16: 12 images, values {low:,} to {high:,}, of which {low:,} becomes black and {high:,} white"
        assert said in text

    def test_values_are_scaled_before_they_are_rounded(self, tmp_path):
        values = np.full((20, 20), 1000, dtype=np.uint16)
        values[:, 10:] = 1100
        files = {f"a/{i}.png": encoded(Image.fromarray(values + i)) for i in range(2)}
        root = write(tmp_path, files | self.files(0, 4000, "bcd"))
        given = ["--data-root", root, "--image-size", 20]
        (part,) = (part for part in loaded(*given, "--value-range", 1000, 1200) if "a/0.png" in part.names)
        first = part.pixels(torch.tensor([part.names.index("a/0.png")]))[0, 0]
        assert (first[:, 0] == 0).all()
        assert (first[:, -1] == 128).all()

    def test_the_test_has_the_scale_of_training(self, tmp_path, check):
        first = write(tmp_path / "train", self.files(100, 1100))
        second = write(tmp_path / "other", self.files(0, 600, "cdef", 500))
        given = ["--data-root", first, "--test-root", second, "--image-size", 10]
        train, test = loaded(*given)
        assert train.pixels(torch.arange(6)).max() == 255
        # 600 of 100 to 1,100 is the middle.
        assert abs(int(test.pixels(torch.arange(6)).max()) - 127.5) < 1
        text, _ = check(*given)
        assert "values 0 to 600, of which 100 becomes black and 1,100 white (those beyond are cut)" in text
        # It can be given again where there is no training set.
        alone, _ = loaded("--data-root", second, "--image-size", 10, "--value-range", 100, 1100)
        name = alone.names[0]
        same = test.pixels(torch.tensor([test.names.index(name)]))
        assert torch.equal(alone.pixels(torch.tensor([0])), same)
        assert alone.digest != loaded("--data-root", second, "--image-size", 10)[0].digest

    def test_the_scale_is_kept(self, tmp_path):
        root = write(tmp_path / "data", self.files(12, 4095, "abcd"))
        short = ["--blocks", "1", "--width", "2", "--dim", "4", "--batch-size", "4", "--per-class", "2", "--steps", "1"]
        given = ["--data-root", root, "--image-size", "8", *short, "--k", "1", "--out", tmp_path / "run"]
        assert train_retrieval.main([*map(str, given)]) == 0
        assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["value range"] == [12, 4095]

    def test_a_range_that_has_no_effect(self, tmp_path, check):
        text, _ = check("--data-root", write(tmp_path / "data", some_classes()), "--value-range", 0, 100)
        assert "--value-range has no effect: no image has more than 8 bits" in text

    @pytest.mark.parametrize(
        ("made", "why"),
        [
            (lambda seed: encoded(Image.fromarray(np.full((9, 9), 300 + seed, dtype=np.uint16))), "0 of 255 apart"),
            (lambda seed: encoded(Image.new("L", (9, 9), seed)), "0 of 255 apart"),
            (lambda seed: encoded(Image.fromarray(np.eye(9 + seed, dtype=np.uint8))), "1 of 255 apart"),
            (lambda seed: png16_in_colour(seed, 4095), "15 of 255 apart .*Pillow reads the upper 8 of 16 bits"),
        ],
        ids=["16 bits", "8 bits", "a mask", "12 of 16 bits in colour"],
    )
    def test_a_set_that_shows_nothing(self, tmp_path, made, why):
        files = {f"{folder}/{i}.png": made(3 * n + i) for n, folder in enumerate("abcd") for i in range(3)}
        root = write(tmp_path, files)
        message = stopped("--data-root", root)
        assert re.search(f"every one of the images is blank, or nearly: .*{why}", message), message
        assert len(loaded("--data-root", root, "--keep-blank")[0]) == 6

    def test_some_that_show_nothing_are_listed(self, tmp_path, check):
        root = write(tmp_path / "data", some_classes(4) | {"kind0/class0/9.png": encoded(Image.new("L", (9, 9), 70))})
        text, status = check("--data-root", root)
        assert "blank       1 image of a single value" in text
        assert status == 0
        assert listed(tmp_path / "run" / "report" / "blank.txt") == [f"{root}/kind0/class0/9.png"]


class TestDuplicates:
    """The same picture in several places."""

    def test_a_folder_that_is_linked(self, tmp_path, check):
        root = write(tmp_path / "data", tree(["cat0", "cat1", "deep/cat2"]))
        (root / "cat3").symlink_to(root / "cat0")
        (root / "deep" / "cat4").symlink_to(root / "cat1")
        message = stopped("--data-root", root)
        assert re.search(r"6 in several classes.* \(3 in cat0 and cat3, 3 in cat1 and deep/cat4\)", message)
        text, status = check("--data-root", root)
        assert "across classes: 12 images of 6 pictures" in text
        assert status == 1
        every = {f"{root}/{name}/{i}.png" for name in ("cat0", "cat1", "cat3", "deep/cat4") for i in range(3)}
        assert set(listed(tmp_path / "run" / "report" / "duplicates.txt")) == every

    def test_copies_in_other_files(self, tmp_path):
        """Saved in another format, as colour, or turned and turned back by EXIF."""
        files = tree(["cat0", "cat1", "cat2", "cat3"])
        image = Image.open(write(tmp_path / "data", files) / "cat0/0.png")
        image.convert("RGB").save(tmp_path / "data" / "cat1" / "copy.bmp")
        turned = image.getexif()
        turned[0x0112] = 3
        image.rotate(180).save(tmp_path / "data" / "cat2" / "copy.png", exif=turned)
        root = tmp_path / "data"
        assert re.search(r"1 in several classes.* \(1 in cat0 and cat1 and cat2\)", stopped("--data-root", root))
        train, test = loaded("--data-root", root, "--duplicates", "skip")
        assert sorted(train.names + test.names) == sorted(set(files) - {"cat0/0.png"})
        train, test = loaded("--data-root", root, "--duplicates", "keep")
        assert len(train) + len(test) == 14

    def test_a_picture_that_is_trained_on(self, tmp_path, check):
        first = write(tmp_path / "a", tree(["cat0", "cat1"]))
        second = write(tmp_path / "b", tree(["cat2", "cat3"], 3, 700))
        shutil.copy(first / "cat1" / "2.png", second / "cat3" / "again.png")
        given = ["--data-root", first, "--test-root", second]
        message = stopped(*given)
        assert "1 in several classes, 1 of them in training and test (1 in cat1 and cat3)" in message
        text, _ = check(*given)
        assert "in training and test: 2 images of 1 picture" in text
        assert [path[len(str(tmp_path)) :] for path in listed(tmp_path / "run" / "report" / "duplicates.txt")[:2]] == [
            "/a/cat1/2.png",
            "/b/cat3/again.png",
        ]
        train, test = loaded(*given, "--duplicates", "skip")
        assert (len(train), len(test)) == (5, 6)
        assert sum(map(len, loaded(*given, "--duplicates", "keep"))) == 13

    def test_copies_within_a_class(self, tmp_path, check):
        """They do not stop a split by classes, but one by images."""
        files = tree(["cat0", "cat1", "cat2", "cat3"], 8)
        root = write(tmp_path / "data", files | {f"cat0/copy{i}.png": files[f"cat0/{i}.png"] for i in range(8)})
        text, status = check("--data-root", root)
        assert "within a class: 16 images of 8 pictures" in text
        assert status == 0
        message = stopped("--data-root", root, "--split", "images")
        assert re.search(r"several places: \d in training and test \(\d in cat0\)", message)
        train, test = loaded("--data-root", root, "--split", "images", "--duplicates", "skip")
        assert not set(train.contents) & set(test.contents)
        assert len(train) == 26  # of 40; what is left out is of the test

    def test_a_class_that_copies_leave_alone(self, tmp_path):
        files = tree([f"cat{c}" for c in range(6)], 2)
        root = write(tmp_path, files | {"cat1/copy.png": files["cat0/0.png"]})
        given = ["--data-root", root, "--duplicates", "skip"]
        assert "a class has a single image, which nothing can be retrieved for: cat0" in stopped(*given)
        train, test = loaded(*given, "--skip-small-classes")
        assert sorted(train.classes + test.classes) == [f"cat{c}" for c in range(1, 6)]


class TestFiles:
    """Damaged, skipped and stray ones."""

    def test_every_damaged_image_is_listed(self, tmp_path, capsys):
        files = tree(["cat0", "cat1", "cat2", "cat3"])
        files |= {f"cat{i % 3}/bad{i:02}.jpg": b"" for i in range(60)}
        root, run = write(tmp_path / "data", files), tmp_path / "run"
        assert train_retrieval.main(["--data-root", str(root), "--out", str(run)]) == 2
        message = capsys.readouterr().err
        assert "60 images are damaged or unreadable: cat0/bad00.jpg (" in message
        assert (
            f"(all in {run / 'report' / 'damaged.txt'}): replace or delete them, or leave them out by --skip-damaged"
            in message
        )
        bad = {str(root / name) for name, data in files.items() if not data}
        assert set(listed(run / "report" / "damaged.txt")) == bad
        train, test = loaded("--data-root", root, "--skip-damaged")
        assert len(train) + len(test) == 12
        assert "Left out: 60 damaged images" in capsys.readouterr().out
        # When they are mended the list goes.
        for path in bad:
            os.unlink(path)
        assert train_retrieval.main(["--data-root", str(root), "--check", "--out", str(run)]) == 0
        assert not (run / "report" / "damaged.txt").exists()

    def test_skipped_files_are_counted_by_reason_and_suffix(self, tmp_path, check):
        root = write(
            tmp_path / "data",
            tree(["cat0", "cat1", "cat2", "cat3"])
            | dict.fromkeys(["cat0/a.heic", "cat0/b.HEIC", "cat1/notes.txt", "cat1/README", "phone/c.heic"], b"")
            | dict.fromkeys(["cat0/.DS_Store", ".cache/x.png", "__MACOSX/cat0/._0.png"], b""),
        )
        (root / "cat1" / "again").symlink_to(root)
        os.mkfifo(root / "cat1" / "pipe.png")
        text, status = check("--data-root", root)
        assert status == 0
        skipped = ["1 a link to a folder that holds it (1 no suffix)", "2 hidden (1 .png, 1 no suffix)"]
        skipped += ["1 in __MACOSX (1 .png)", "1 neither a file nor a folder (1 .png)"]
        skipped += ["5 of another kind (3 .heic, 1 .txt, 1 no suffix)"]
        assert f"skipped     {'; '.join(skipped)}\n" in text
        assert "no image is left in phone" in text
        assert len(listed(tmp_path / "run" / "report" / "skipped.txt")) == 10

    def test_entries_of_one_name(self, tmp_path, check):
        stored = [(name, data, zlib.crc32(data), len(data), 0) for name, data in tree(["cat0", "cat1"]).items()]
        write_zip(tmp_path / "a.zip", ("cat0/0.png", png(77), zlib.crc32(png(77)), len(png(77)), 0), *stored)
        text, _ = check("--data-root", tmp_path / "a.zip")
        assert "skipped     1 replaced by a later entry of the same name (1 .png)" in text

    def test_images_in_no_folder(self, tmp_path):
        root = write(tmp_path, some_classes(4) | {"astray.png": png(999)})
        assert "astray.png lies in no class's folder: give each class a folder of its own" in stopped(
            "--data-root", root
        )
        train, test = loaded("--data-root", root, "--skip-astray")
        assert len(train) + len(test) == 16

    def test_a_class_of_one_image_is_listed(self, tmp_path, capsys):
        root = write(tmp_path / "data", some_classes() | {"alone/1.png": png(9999)})
        assert train_retrieval.main(["--data-root", str(root), "--out", str(tmp_path / "run")]) == 2
        assert (
            f"for: alone (all in {tmp_path / 'run' / 'report' / 'small-classes.txt'}): add images"
            in capsys.readouterr().err
        )
        assert [path.name for path in (tmp_path / "run" / "report").iterdir()] == ["small-classes.txt"]
        assert listed(tmp_path / "run" / "report" / "small-classes.txt") == [f"{root}/alone/1.png"]

    def test_all_that_stops_is_told_at_once(self, tmp_path):
        files = tree([f"cat{c}/x" for c in range(4)]) | {"cat0/x/bad.png": b"", "astray.png": png(9)}
        root = write(tmp_path, files | {"cat1/x/copy.png": files["cat0/x/0.png"]})
        message = stopped("--data-root", root)
        for offer in ("--class-by first", "--skip-damaged", "--skip-astray", "--duplicates skip"):
            assert offer in message
        given = ["--class-by", "first", "--skip-damaged", "--skip-astray", "--duplicates", "skip"]
        assert sum(map(len, loaded("--data-root", root, *given))) == 11

    def test_nothing_is_left(self, tmp_path):
        root = write(tmp_path, {"a/1.png": b"", "b/1.png": b""})
        assert "no image is left" in stopped("--data-root", root, "--skip-damaged")

    @pytest.mark.parametrize(
        "given", ["--check", "--class-by path", "--value-range 0 9", "--skip-damaged", "--duplicates keep"]
    )
    def test_digits_have_no_files(self, given, capsys):
        with pytest.raises(SystemExit):
            parse(None, given.split())
        assert f"{given.split()[0]} is for --data-root" in capsys.readouterr().err

    def test_a_range_that_is_none(self, capsys):
        for given in ("5 5", "9 3", "x 3"):
            with pytest.raises(SystemExit):
                parse(None, ["--data-root", "x", "--value-range", *given.split()])
            assert "--value-range" in capsys.readouterr().err


class TestLimits:
    """What is read of a file."""

    @pytest.mark.deep
    @pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
    def test_memory_of_zips_that_are_refused(self, tmp_path):
        gib = 1 << 30
        made = {
            "2 GiB, as it states": ([entry(2 * gib, 2 * gib)], "2,048 MiB: more than the 128 MiB"),
            "2 GiB that state 1,000 bytes": ([entry(2 * gib, 1000)], "Bad CRC-32"),
            "GiBs that state 100 MiB each": (
                [entry(gib, 100 << 20, name=f"cat0/huge{number}.png") for number in range(4)],
                "Bad CRC-32",
            ),
            "16 MiB that state 4 GB": ([entry(1 << 24, 4_000_000_000)], "3,815 MiB: more than the 128 MiB"),
            "bzip2 of 512 MiB that state 1,000 bytes": (
                [entry(gib // 2, 1000, method=12)],
                "neither stored nor deflated",
            ),
        }
        whole = ("cat0/1.png", png(1), zlib.crc32(png(1)), len(png(1)), 0)
        paths = [write_zip(tmp_path / f"{name}.zip", *huge, whole) for name, (huge, _) in made.items()]
        script = (
            "import re, sys, train_retrieval\n"
            "def memory(what):\n"  # not getrusage(), which begins with what the process that started this one held
            "    return int(re.search(what + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024\n"
            "held = memory('VmRSS')\n"
            "for path in sys.argv[2:]:\n"
            "    status = train_retrieval.main(['--data-root', path, '--out', sys.argv[1]])\n"
            "    print(status, memory('VmHWM') - held, file=sys.stderr)\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
        command = [sys.executable, "-c", script, tmp_path / "run", *paths]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        said = re.findall(r"error: (.*)(?:\n.*)*?\n(\d) (-?\d+)\n", done.stderr)
        assert len(said) == len(made), done.stderr
        for name, (message, status, rose) in zip(made, said, strict=True):
            assert made[name][1] in message
            assert "cat0/huge" in message
            assert status == "2"
            assert int(rose) < 256 << 20, name

    def test_a_file_beyond_the_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr("retrieval.sources.MAX_BYTES", 1000)
        files = tree(["cat0", "cat1"]) | {"cat0/large.png": png(1, (60, 60))}
        for root in (write(tmp_path / "a", files), pack(tmp_path / "a.zip", files)):
            message = stopped("--data-root", root)
            assert "an image is damaged or unreadable: cat0/large.png (0 MiB: more than" in message

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_picture_beyond_the_limit(self, tmp_path):
        huge = bytearray(png(1))
        huge[16:24] = (20_000).to_bytes(4, "big") + (8_000).to_bytes(4, "big")  # of which no pixel is there
        huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
        root = write(tmp_path, tree(["cat0", "cat1"]) | {"cat0/huge.png": bytes(huge)})
        assert "cat0/huge.png (20,000 x 8,000 pixels: more than the 89,478,485 that are decoded)" in stopped(
            "--data-root", root
        )


class TestRealTrees:
    """A folder, and the same as a zip, with all that such folders have."""

    @pytest.fixture
    def files(self):
        """The files, and what links to what."""
        colours = {f"{i}.png": png(i, mode="RGB") for i in range(4)}
        gray = {f"{i}.png": png(20 + i) for i in range(4)}
        turned = Image.new("L", (1, 1)).getexif()
        turned[0x0112] = 6
        photo = Image.open(io.BytesIO(png(40, (30, 20), "RGB")))
        odd = {
            "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
            "palette.gif": encoded(photo.convert("P"), "GIF"),
            "two.gif": encoded(photo.convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (30, 20))]),
            "turned.jpg": encoded(photo, "JPEG", exif=turned),
            "full.png": png16(50, 0, 65535),
            "twelve.png": png16(51, 0, 4095),
            "colour16.png": png16_in_colour(52, 65535),
            "clear.png": png(53, mode="RGBA"),
            "white.png": encoded(Image.new("L", (9, 9), 255)),
        }
        bad = {"cut.png": png(60)[:90], "empty.jpg": b"", "heic.jpg": b"\0\0\0\x18ftypheic", "page.png": b"<html>"}
        skipped = {"IMG_1.HEIC": b"x", "IMG_2.heic": b"x", "Thumbs.db": b"x", ".DS_Store": b"x", "._0.png": b"x"}
        groups = {
            "train/cat/2020": colours,
            "train/cat/2021": odd | bad,
            "train/dog/2020": gray | skipped,
            "train/copy": {"again.png": colours["0.png"], "other.png": png(70)},
            "val/cat/2020": {"0.png": png(71), "2.png": png(72), "1.png": colours["1.png"]},
            "val/phone": {"IMG_3.HEIC": b"x"},
            "__MACOSX/train/dog/2020": {"._1.png": b"x"},
        }
        return {f"{folder}/{name}": data for folder, those in groups.items() for name, data in those.items()}

    @pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
    def test_what_the_report_says(self, tmp_path, files, check, packed):
        linked = {
            name.replace("/dog/", "/linked/"): data for name, data in files.items() if name.startswith("train/dog/")
        }
        if packed:
            root = pack(tmp_path / "photos.zip", files | linked)
        else:
            root = write(tmp_path / "photos", files)
            (root / "train" / "linked").symlink_to(root / "train" / "dog")
        text, status = check("--data-root", root)
        assert status == 1
        rows = [line.strip() for line in text.splitlines()]
        for row in (
            "classes     6, named by the whole path of its folder (--class-by path)",
            "images      26; 2 to 9 a class, median 4",
            "modes       L: 12 images, values 0 to 255",
            "modes       RGB: 7 images, values 0 to 255",
            "modes       I;16: 2 images, values 0 to 65,535, of which 0 becomes black and 65,535 white",
            "modes       RGB;16: 1 image, values 0 to 255, the upper 8 of 16 bits a channel: Pillow reads",
            "modes       CMYK: 1 image, values",
            "turned      1 upright, as their EXIF orientation says",
            "frames      1 image with several: the first is taken",
            "blank       1 image of a single value",
            "damaged     4",
            "no image is left in val/phone",
            "modes       P: 2 images, values 0 to 255",
            "modes       RGBA: 1 image, values",
            "duplicates  within a class: 2 images of 1 picture",
            "across classes: 12 images of 6 pictures",
        ):
            assert any(found.startswith(row) for found in rows), row
        (skipped,) = (row for row in rows if row.startswith("skipped"))
        assert "of another kind (5 .heic, 2 .db)" in skipped
        assert "1 in __MACOSX (1 .png)" in skipped
        assert "4 hidden (2 .png, 2 no suffix)" in skipped
        run = tmp_path / "run" / "report"
        bad = ("cut.png", "empty.jpg", "heic.jpg", "page.png")
        assert sorted(listed(run / "damaged.txt")) == [f"{root}/train/cat/2021/{name}" for name in bad]
        assert listed(run / "blank.txt") == [f"{root}/train/cat/2021/white.png"]
        copies = {str(Path(path).relative_to(root)) for path in listed(run / "duplicates.txt")}
        assert copies == {
            *(f"train/{name}/2020/{i}.png" for name in ("dog", "linked") for i in range(4)),
            "train/cat/2020/0.png", "train/copy/again.png", "train/cat/2020/1.png", "val/cat/2020/1.png",
            "train/cat/2021/palette.gif", "train/cat/2021/two.gif",
        }  # fmt: skip
        # What is offered, one after the other, ends in training.
        (split, *_) = offered(text)
        given = [*split, "--skip-damaged", "--image-size", 8]
        message = stopped(*given)
        assert "2020 (in cat, dog, linked)" in message
        given += ["--class-by", "first"]
        message = stopped(*given)
        assert "5 in several classes" in message
        assert "(4 in dog and linked, 1 in cat and copy) and 1 in training and test (1 in cat)" in message
        given += ["--duplicates", "skip"]
        message = stopped(*given)
        assert "a class has a single image, which nothing can be retrieved for: copy" in message
        given += ["--skip-small-classes"]
        message = stopped(*given)
        assert all(f"only the class 'cat' is left to {what} on" in message for what in ("train", "test"))
        more = tree(["train/fox/2020", "val/fox/2020"], seed=900)
        root = pack(root, files | linked | more) if packed else write(root, more)
        train, test = loaded(*given)
        assert (train.classes, len(train)) == (["cat", "fox"], 15)
        assert test.names == ["cat/2020/0.png", "cat/2020/2.png", *(f"fox/2020/{i}.png" for i in range(3))]


@pytest.mark.parametrize("name", tiny_datasets.MAKE)
def test_a_data_set(tmp_path, check, name):
    root = tiny_datasets.MAKE[name](tmp_path / "root")
    given = ["--data-set", name, "--data-root", root]
    text, status = check(*given)
    assert status == 0
    assert text.count("classes     9, named by the data set's lists") == 2
    first, second = sorted(root.rglob("*.[jJ][pP][gG]"))[:2]
    shutil.copy(first, second)
    sorted(root.rglob("*.[jJ][pP][gG]"))[-1].write_bytes(b"")
    text, status = check(*given)
    assert "images of 1 picture" in text
    assert status == 1
    assert "an image is damaged or unreadable" in text
    assert len(listed(tmp_path / "run" / "report" / "damaged.txt")) == 1


class TestNames:
    """Classes whose names look the same."""

    @pytest.mark.parametrize(
        "names",
        [("Cat", "cat"), ("dog ", "dog"), ("caf\u00e9", "cafe\u0301"), ("Stra\u00dfe", "STRASSE"), ("x/ A", "x/a")],
        ids=ascii,
    )
    @pytest.mark.parametrize("by", ["path", "last"])
    def test_alike(self, tmp_path, check, names, by):
        """In a root, or in two, where the test has what is trained on."""
        more = tree(["p", "q", "r"], seed=5000)
        one = write(tmp_path / "one", more | tree(names))
        first, second = (write(tmp_path / name[::-1], more | tree([name])) for name in names)
        for given in (["--data-root", one], ["--data-root", first, "--test-root", second, "--split", "images"]):
            given += ["--class-by", by, "--duplicates", "keep"]
            quoted = ascii if "caf\u00e9" in names else repr  # where both look the same
            parts = [name.rpartition("/")[2] if by == "last" else name for name in names]
            offer = f"Unicode form: {' and '.join(map(quoted, sorted(parts)))}: rename"
            assert offer in stopped(*given)
            text, status = check(*given)
            assert (offer in text, status) == (True, 1)
            train, test = loaded(*given, "--keep-alike")
            assert len({*train.classes, *test.classes}) == 5

    def test_not_alike(self, tmp_path):
        folders = ["a", "b", "e", "\u00e9", "x y", "xy", "2", "\u00b2"]
        train, test = loaded("--data-root", write(tmp_path, tree(folders)))
        assert len(train.classes) + len(test.classes) == len(folders)


class TestOneScale:
    """A range of values that makes images of other depths black."""

    @pytest.mark.parametrize(
        ("deep", "shallow", "why"),
        [
            (4, 0, "16 of the 17 images are blank"),
            (1, 4, "every one of the images of mode I;16 is blank"),
        ],
        ids=["most of all", "few of all"],
    )
    def test_an_image_of_32_bits(self, tmp_path, check, deep, shallow, why):
        files = {f"{c}/{i}.png": png16(10 * n + i, 0, 4095) for n, c in enumerate("abcd") for i in range(deep)}
        files |= {f"{c}/l{i}.png": png(500 + 10 * n + i) for n, c in enumerate("abcd") for i in range(shallow)}
        files["a/wide.tif"] = encoded(Image.fromarray(np.array([[0, 2**31 - 1]] * 2, dtype=np.int32)), "TIFF")
        root = write(tmp_path / "data", files)
        message = stopped("--data-root", root)
        assert f"{why}, or nearly: values at most 0 of 255 apart: say by --value-range" in message
        assert check("--data-root", root)[1] == 1
        assert loaded("--data-root", root, "--value-range", 0, 4095)[0].pixels(torch.arange(4)).max() > 200
        loaded("--data-root", root, "--keep-blank")

    def test_depths_of_one_range(self, tmp_path):
        """A PGM of 16 bits and a PNG of 16 bits have other modes, and the same values."""
        files = {f"{c}/{i}.png": png16(10 * n + i, 0, 4095) for n, c in enumerate("abcd") for i in range(2)}
        values = np.arange(4096, dtype=np.int32).reshape(64, 64)
        files |= {f"{c}/0.tif": encoded(Image.fromarray(values + n), "TIFF") for n, c in enumerate("abcd")}
        loaded("--data-root", write(tmp_path, files))


RUN_OF_OURS = ("settings.json", "metrics.csv", "steps.csv", "curves.png", "neighbours.png")


class TestWhatIsNoData:
    """Files that are skipped, and roots that hold nothing else."""

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("where", ["runs/data-roadmap/", "a/run/", ""])
    def test_the_pictures_of_a_run(self, tmp_path, check, packed, where):
        made = {f"{where}{name}": png(800 + n) for n, name in enumerate(RUN_OF_OURS)}
        # A folder that has but some of these is not one of a run.
        files = tree("abcd") | made | {f"e/{name}": png(900 + n) for n, name in enumerate(RUN_OF_OURS[1:])}
        root = pack(tmp_path / "data.zip", files) if packed else write(tmp_path / "data", files)
        train, test = loaded("--data-root", root)
        assert sorted(train.classes + test.classes) == ["a", "b", "c", "d", "e"]
        assert "5 of a run of this program (2 .csv, 2 .png, 1 .json)" in check("--data-root", root)[0]

    def test_a_root_of_other_files(self, tmp_path):
        root = write(tmp_path / "phone", {f"a/{i}.heic": b"x" for i in range(5)} | {"a/.b.png": b""})
        assert "; skipped: 1 hidden (1 .png); 5 of another kind (5 .heic)" in stopped("--data-root", root)
        outside = pack(tmp_path / "dots.zip", {f"../a/{i}.png": png(i) for i in range(3)})
        assert "; skipped: 3 of a path with .. in it (3 .png)" in stopped("--data-root", outside)

    def test_a_zip_in_a_zip(self, tmp_path):
        inner = pack(tmp_path / "inner.zip", tree("abcd")).read_bytes()
        outer = pack(tmp_path / "outer.zip", {"below/inner.zip": inner})
        assert "there are zips in it, which have to be unpacked: below/inner.zip" in stopped("--data-root", outer)
        for below in ("", "/a"):
            message = stopped("--data-root", f"{outer}/below/inner.zip{below}")
            assert f"{outer}/below/inner.zip is a file in a zip: unpack {outer}, and name the file" in message

    def test_what_is_no_image_under_the_name_of_one(self, tmp_path):
        """Pillow hands EPS to Ghostscript."""
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        message = stopped("--data-root", write(tmp_path, tree("abcd") | {"a/eps.png": eps}))
        assert "a/eps.png (no image of a kind that is read)" in message

    @pytest.mark.parametrize("name", ["tab\there", "carriage\rreturn", "new\nline"], ids=ascii)
    def test_names_that_break_lines(self, tmp_path, check, name):
        root = write(tmp_path / "data", tree("abcd") | {f"a/{name}.png": b""})
        check("--data-root", root)
        text = (tmp_path / "run" / "report" / "damaged.txt").read_bytes().decode()
        assert (text.count("\t"), text.count("\n"), text.count("\r")) == (1, 1, 0)

    @pytest.mark.parametrize(
        ("where", "error"),
        [("in_threads", RuntimeError("can't start new thread")), ("decode.look", MemoryError())],
        ids=["threads", "memory"],
    )
    def test_no_more_memory(self, tmp_path, monkeypatch, capsys, where, error):
        def fail(*given):
            raise error

        monkeypatch.setattr(f"retrieval.survey.{where}", fail)
        root = write(tmp_path / "data", tree("abcd"))
        assert train_retrieval.main(["--data-root", str(root), "--out", str(tmp_path / "run")]) == 2
        assert "error: the system gives no more memory or threads" in capsys.readouterr().err

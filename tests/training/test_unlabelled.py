"""--ignore-label: the images of a folder that says nothing about them are in no ranking."""

import pytest
import train_retrieval
from test_training import options, png, program, some_classes, write

RUN = ("--split", "images", "--image-size", "8", "--steps", "3", "--batch-size", "8", "--blocks", "1", "--width", "4")


def test_as_if_they_were_not_there(tmp_path, capsys):
    """The same bits, in training and in the metrics."""
    labelled = write(tmp_path / "labelled", some_classes(4, 4))
    both = write(tmp_path / "both", some_classes(4, 4))
    write(both / "unknown", {f"{i}.png": png(9000 + i) for i in range(8)})
    assert program("--data-root", labelled, "--out", tmp_path / "one", *RUN) == 0
    assert program("--data-root", both, "--out", tmp_path / "two", "--ignore-label", "unknown", *RUN) == 0
    assert "Ignored: 8 images of 'unknown', which are in no ranking" in capsys.readouterr().out
    one, two = ((tmp_path / run / "steps.csv").read_text().splitlines() for run in ("one", "two"))
    assert [line.split(",")[:2] for line in one] == [line.split(",")[:2] for line in two]
    train, test = train_retrieval.load(options("--data-root", both, "--ignore-label", "unknown", *RUN))
    assert train.classes == test.classes == ["kind0/class0", "kind0/class2", "kind1/class1", "kind1/class3"]
    assert train.labels.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["training", "check"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("absent", "there is no class 'absent'; there are kind0/class0"), ("class0", "no class 'class0'")],
)
def test_a_class_that_is_not_there(name, words, check, tmp_path, capsys):
    root = write(tmp_path / "images", some_classes(4, 4))
    status = program("--data-root", root, "--out", tmp_path / "run", "--ignore-label", name, *check, *RUN)
    said = capsys.readouterr()
    assert (words in (said.out if check else said.err), status) == (True, 1 if check else 2)


def unlabelled(root, folders, copied=False):
    """Classes a to d, and folders of images that are ignored, copies of those of a or others."""
    files = {f"{c}/{i}.png": png(100 * n + i) for n, c in enumerate("abcd") for i in range(3)}
    ignored = {f"{folder}.png": png(n if copied else 5000 + n) for n, folder in enumerate(folders)}
    return write(root, files | ignored)


@pytest.mark.parametrize(
    ("folders", "copied", "given"),
    [
        (["none/1"], False, []),
        (["none/1"], False, ["--skip-small-classes"]),
        (["none/1", "none/2"], True, []),
        (["none/1", "none/2"], True, ["--duplicates", "skip"]),
        (["none/1", "none/2020/1", "none/2020/x/1"], False, []),
        (["none/1", "a/none/1", "b/none/x/1"], False, ["--class-by", "last"]),
        (["none/x/1", "none/x/2"], True, ["--class-by", "first"]),
    ],
    ids=str,
)
def test_no_other_image_is_left_out(tmp_path, folders, copied, given):
    """Not for a copy, nor for a class of one image, nor is a folder below it a class."""
    root = unlabelled(tmp_path, folders, copied)
    train, test = train_retrieval.load(options("--data-root", root, "--ignore-label", "none", *given))
    assert sorted(train.classes + test.classes) == ["a", "b", "c", "d"]
    assert len(train) + len(test) == 12


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["training", "check"])
def test_too_few_classes_are_left(tmp_path, capsys, name, check):
    """Half of three would be a single class, whose rankings are all perfect."""
    given = ["--data-root", unlabelled(tmp_path / "images", []), "--out", tmp_path / "run", "--ignore-label", name]
    assert program(*given, *check, *RUN[2:]) == (1 if check else 2)
    said = capsys.readouterr()
    assert "3 classes (" in (said.out if check else said.err)


def test_another_ignored_class_is_named(tmp_path, capsys):
    given = ["--data-root", unlabelled(tmp_path / "images", ["x/1", "y/1"]), "--out", tmp_path / "run", "--k", "1"]
    given += ["--skip-small-classes", *RUN[2:], "--batch-size", "4", "--per-class", "2"]
    assert program(*given, "--ignore-label", "x") == 0
    assert program(*given, "--ignore-label", "y", "--resume") == 2
    assert "--ignore-label was 'x' and is 'y'" in capsys.readouterr().err

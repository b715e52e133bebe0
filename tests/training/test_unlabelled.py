"""--ignore-label: the images of a folder that says nothing about them are in no ranking."""

import pytest
import train_retrieval
from test_training import options, png, program, refused, some_classes, write

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
    train, test = train_retrieval.leave_out(
        options("--ignore-label", "unknown", *RUN), *train_retrieval.load(options("--data-root", both, *RUN))
    )
    assert train.classes == test.classes == ["kind0/class0", "kind0/class2", "kind1/class1", "kind1/class3"]
    assert train.labels.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent", "there is no class 'absent'; there are kind0/class0"), ("class0", "no class 'class0'")],
)
def test_a_class_that_is_not_there(name, words, tmp_path, capsys):
    root = write(tmp_path / "images", some_classes(4, 4))
    assert words in refused(capsys, "--data-root", root, "--out", tmp_path / "run", "--ignore-label", name, *RUN)


def test_nothing_is_left(tmp_path, capsys):
    root = write(tmp_path / "images", some_classes(2, 4))
    said = refused(capsys, "--data-root", root, "--out", tmp_path / "run", "--ignore-label", "kind0/class0", *RUN[2:])
    assert "leaves nothing to train or to test on" in said

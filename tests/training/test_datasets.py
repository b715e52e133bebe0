"""The benchmarks' layouts on disk, the images from them, and batches of two super-classes."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import tiny_datasets
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from retrieval import datasets
from retrieval.batches import Feed, PerClassBatches, ahead, generator
from retrieval.errors import InputError
from retrieval.hierarchy import HierarchicalBatches
from retrieval.photos import Photos, Transform
from tiny_datasets import CLASSES, EACH, SUPERS, jpeg

TRAIN, TEST, PATHS, LABELS = "Ebay_train.txt", "Ebay_test.txt", "images.txt", "image_class_labels.txt"
SPLIT = "Inat_dataset_splits/Inaturalist_{}_set1.txt"
TRANSFORM = Transform(32, None, (0.16, 1.0), (0.75, 1.33), (36,))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder of each data set; not to be changed."""
    return {name: make(tmp_path_factory.mktemp(name) / "root") for name, make in tiny_datasets.MAKE.items()}


@pytest.fixture(scope="module")
def photos(roots):
    return Photos(roots["sop"], datasets.read("sop", roots["sop"])[0], TRANSFORM)


@pytest.fixture
def own(tmp_path):
    """Makes a folder of a data set that a test may damage."""
    return lambda name: tiny_datasets.MAKE[name](tmp_path / name)


def damage(path, line, text):
    """Replaces a line, counted from 1; None drops it."""
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("\n".join(lines) + "\n")


class TestListings:
    @pytest.mark.parametrize("name", datasets.LAYOUTS)
    def test_what_is_listed(self, roots, name):
        train, test = datasets.read(name, roots[name])
        short = 0 if name == "cub" else 1  # images that the first class lacks
        for listing in (train, test):
            assert len(listing.classes) == SUPERS * CLASSES
            assert Counter(Counter(listing.labels).values()) == Counter(
                {EACH: SUPERS * CLASSES - short} | ({EACH - 1: 1} if short else {})
            )
            assert all((roots[name] / image).is_file() for image in listing.names)
        assert not set(train.classes) & set(test.classes)
        assert not set(train.names) & set(test.names)

    def test_names_and_classes_of_stanford_online_products(self, roots):
        train, test = datasets.read("sop", roots["sop"])
        assert train.names[0] == "thing1_final/1001_1.JPG"
        for listing, first in ((train, 1), (test, 10)):
            assert listing.classes == [str(label) for label in range(first, first + 9)]
            assert listing.groups == ["1", "2", "3"]
            for name, label in zip(listing.names, listing.labels, strict=True):
                assert name.endswith(f"_{listing.classes[label]}.JPG")
                assert name.startswith(f"thing{listing.groups[listing.group_of[label]]}_")

    def test_classes_of_cub_are_halved_in_their_order(self, roots):
        train, test = datasets.read("cub", roots["cub"])
        assert train.classes == [f"{label:03}.Bird_{label}" for label in range(1, 10)]
        assert test.classes == [f"{label:03}.Bird_{label}" for label in range(10, 19)]
        assert train.groups == []
        for name, label in zip(test.names, test.labels, strict=True):
            assert name.startswith(f"images/{test.classes[label]}/")

    def test_classes_of_inaturalist_are_folders(self, roots):
        train, _ = datasets.read("inat", roots["inat"])
        assert train.classes == [str(label) for label in range(1, 10)]
        assert train.groups == ["Kingdom1", "Kingdom2", "Kingdom3"]
        for name, label in zip(train.names, train.labels, strict=True):
            assert name.split("/")[1:3] == [train.groups[train.group_of[label]], train.classes[label]]

    def test_numbers_are_ordered_as_numbers(self, own):
        root = own("sop")
        text = (root / "Ebay_train.txt").read_text()
        (root / "Ebay_train.txt").write_text(text.replace(" 2 1 thing", " 200 1 thing"))
        train, _ = datasets.read("sop", root)
        assert train.classes[-2:] == ["9", "200"]

    def test_what_differs_from_the_whole_is_noted(self, roots):
        (first, _) = datasets.notes("cub", *datasets.read("cub", roots["cub"]))
        assert first == ("CUB-200-2011 has 5,864 images of 100 classes to train on; this one lists 36 of 9")

    @pytest.mark.parametrize("name", datasets.LAYOUTS)
    def test_every_file_that_is_missing_is_named(self, own, name):
        root = own(name)
        for file in datasets.LAYOUTS[name].files:
            text = (root / file).read_bytes()
            (root / file).unlink()
            with pytest.raises(InputError, match=f"root is not|is not {datasets.LAYOUTS[name].title}: .*no {file} in"):
                datasets.read(name, root)
            (root / file).write_bytes(text)
        datasets.read(name, root)

    @pytest.mark.parametrize(("name", "other"), [(a, b) for a in datasets.LAYOUTS for b in datasets.LAYOUTS if a != b])
    def test_another_data_set(self, roots, name, other):
        title = datasets.LAYOUTS[other].title
        with pytest.raises(InputError, match=f"it looks like {title}, whose recipes begin with {other}-"):
            datasets.read(name, roots[other])

    def test_roots_that_are_none(self, roots, tmp_path):
        with pytest.raises(InputError, match="nowhere does not exist"):
            datasets.read("sop", tmp_path / "nowhere")
        (tmp_path / "sop.zip").write_bytes(b"")
        with pytest.raises(InputError, match=r"sop\.zip is a file: unpack it"):
            datasets.read("sop", tmp_path / "sop.zip")
        with pytest.raises(InputError, match=r"name the folder below it: --data-root .*root"):
            datasets.read("cub", roots["cub"].parent)

    @pytest.mark.parametrize(
        ("name", "file", "line", "text", "message"),
        [
            ("sop", TEST, 1, "1 1 1 x.JPG", r"Ebay_test\.txt, line 1: expected the heading 'image_id class"),
            ("sop", TRAIN, 5, "5 1 1", r"Ebay_train\.txt, line 5: expected 'image_id .* path', .*got '5 1 1'"),
            ("sop", TRAIN, 5, "5 x 1 a.JPG", r"line 5: expected .*the first three of them numbers"),
            ("sop", TRAIN, 4, "4 1 2 a.JPG", r"has class 1 in super-class 1 and, with a\.JPG, in 2"),
            ("sop", TRAIN, 3, "2 1 1 thing1_final/1001_1.JPG", r"lists thing1_final/1001_1\.JPG twice"),
            ("sop", TEST, 3, "2 1 1 a.JPG", r"1 in both \(1\)"),
            ("cub", PATHS, 7, "7", r"images\.txt, line 7: expected image_id path, .*got '7'"),
            ("cub", PATHS, 7, "x 001.A/b.jpg", r"images\.txt, line 7: expected image_id path"),
            ("cub", PATHS, 7, "7 Bird/b.jpg", r"images\.txt, line 7: expected a path such as"),
            ("cub", PATHS, 7, "6 002.A/b.jpg", r"line 7: image 6 is in line 6 already"),
            ("cub", PATHS, 7, None, r"not of the same images: image 7 is in one of them alone"),
            ("cub", LABELS, 9, "9 x", r"labels\.txt, line 9: expected image_id class_id, two numbers"),
            ("cub", LABELS, 9, "9 4", r"labels\.txt, line 9, says that image 9 is of class 4, .*003\."),
            ("inat", SPLIT.format("test"), 2, "7/a.jpg", r"test_set1\.txt, line 2: expected"),
            ("inat", SPLIT.format("train"), 3, "a/b/c.jpg", "line 3: expected a path that ends"),
            ("inat", SPLIT.format("train"), 3, "x/K/99/c.jpg", "line 3: class 99 is not among"),
            ("inat", "train2018.json", 1, "{", r"train2018\.json is damaged: expected JSON with a list 'categories'"),
            ("inat", "train2018.json", 1, "{}", r"train2018\.json is damaged: .*'categories'"),
            ("inat", "train2018.json", 1, '{"categories": [1]}', r"train2018\.json is damaged"),
        ],
    )
    def test_damaged_files(self, own, name, file, line, text, message):
        root = own(name)
        damage(root / file, line, text)
        with pytest.raises(InputError, match=message):
            datasets.read(name, root)

    def test_files_that_are_empty_or_no_text(self, own):
        root = own("sop")
        (root / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n")
        with pytest.raises(InputError, match="name no images to test on"):
            datasets.read("sop", root)
        (root / "Ebay_test.txt").write_bytes(b"")
        with pytest.raises(InputError, match=r"Ebay_test\.txt, line 1: expected the heading"):
            datasets.read("sop", root)
        (root / "Ebay_test.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match=r"Ebay_test\.txt is damaged: expected text in UTF-8"):
            datasets.read("sop", root)


class TestTransforms:
    def image(self, width, height):
        """Where each pixel is, in its red and green."""
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
        return Image.fromarray(pixels)

    def test_the_middle_of_a_test_image(self):
        cut = np.asarray(Transform(20, None, (1, 1), (1, 1), (30,)).test(self.image(60, 30)))
        assert cut.shape == (20, 20, 3)
        assert (cut[0, :, 0] == np.arange(20, 40)).all()
        assert (cut[:, 0, 1] == np.arange(5, 25)).all()
        # Halved, then cut; and with two numbers made square first.
        assert np.asarray(Transform(10, None, (1, 1), (1, 1), (15,)).test(self.image(60, 30)))[0, 0, 0] in (20, 21)
        squeezed = np.asarray(Transform(20, None, (1, 1), (1, 1), (30, 30)).test(self.image(60, 30)))
        assert squeezed[0, 0, 0] in (10, 11)
        assert squeezed[0, -1, 0] in (48, 49)

    @given(
        st.tuples(st.integers(1, 200), st.integers(1, 200)),
        st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
        st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
        st.integers(0, 99),
    )
    @settings(max_examples=200, deadline=None)
    def test_a_random_crop_is_as_it_is_defined(self, size, scale, ratio, seed):
        transform = Transform(8, None, tuple(scale), tuple(ratio), (9,))
        width, height = size
        draw = transform.draw(1, generator("crop", seed, 0))[0]
        assert draw.shape == (10, 4)
        left, top, w, h = transform._box(width, height, draw.tolist())
        assert 0 <= left <= left + w <= width
        assert 0 <= top <= top + h <= height
        assert w > 0
        assert h > 0
        tried = self.drawn(width, height, scale, ratio, draw.tolist())
        if tried:
            area, aspect = tried[0]
            assert abs(w - (area * aspect) ** 0.5) <= 0.5 + 1e-9
            assert abs(h - (area / aspect) ** 0.5) <= 0.5 + 1e-9
        else:  # the largest of an allowed shape, in the middle
            assert w == width or h == height
            assert abs(2 * left + w - width) <= 1
            assert abs(2 * top + h - height) <= 1
            if ratio[0] <= width / height <= ratio[1]:
                assert (w, h) == (width, height)

    @staticmethod
    def drawn(width, height, scale, ratio, draw):
        """Area and aspect of the rectangles drawn that fit."""
        found = []
        for a, r, _, _ in draw:
            area = width * height * (scale[0] + a * (scale[1] - scale[0]))
            aspect = np.exp(np.log(ratio[0]) + r * (np.log(ratio[1]) - np.log(ratio[0])))
            w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
            assume(abs(w % 1 - 0.5) > 1e-9 < abs(h % 1 - 0.5))  # it may be rounded either way
            if 0 < round(w) <= width and 0 < round(h) <= height:
                found.append((area, aspect))
        return found

    def test_a_random_crop_is_anywhere(self):
        transform = Transform(8, None, (0.16, 1.0), (0.75, 1.33), (9,))
        draws = transform.draw(500, generator("crop", 0, 0)).tolist()
        boxes = np.array([transform._box(100, 80, draw) for draw in draws])
        shares = boxes[:, 2] * boxes[:, 3] / 8000
        assert shares.min() < 0.2
        assert shares.max() > 0.9
        assert 0.45 < shares.mean() < 0.6  # those near 1 fit less often
        assert (boxes[:, 0] == 0).any()
        assert (boxes[:, 0] + boxes[:, 2] == 100).any()
        assert (boxes[:, 1] + boxes[:, 3] == 80).any()
        assert len({tuple(box) for box in boxes.tolist()}) > 450

    def test_a_random_crop_reaches_every_edge(self):
        transform = Transform(8, None, (0.25, 0.25), (1.0, 1.0), (9,))
        assert transform._box(100, 100, [[0.5, 0.5, 0.0, 0.0]]) == (0, 0, 50, 50)
        assert transform._box(100, 100, [[0.5, 0.5, 0.999, 0.999]]) == (50, 50, 50, 50)
        assert transform._box(100, 100, [[0.5, 0.5, 0.999, 0.0]]) == (50, 0, 50, 50)

    def test_a_crop_shows_what_is_in_it(self):
        transform = Transform(8, None, (0.2, 0.5), (0.75, 1.33), (9,))
        for draw in transform.draw(20, generator("crop", 0, 0)):
            left, top, width, height = transform._box(100, 80, draw.tolist())
            pixels = np.asarray(transform.train(self.image(100, 80), draw)).astype(float)
            assert pixels.shape == (8, 8, 3)
            across = left + (np.arange(8) + 0.5) * width / 8 - 0.5
            down = top + (np.arange(8) + 0.5) * height / 8 - 0.5
            assert np.abs(pixels[4, 1:-1, 0] - across[1:-1]).max() <= 1
            assert np.abs(pixels[1:-1, 4, 1] - down[1:-1]).max() <= 1

    def test_before_a_crop_it_is_resized(self):
        whole = Transform(8, 20, (1, 1), (2, 2), (9,))
        draw = whole.draw(1, generator("crop", 0, 0))[0]
        pixels = np.asarray(whole.train(self.image(80, 40), draw)).astype(float)
        halved = self.image(80, 40).resize((40, 20), Image.Resampling.BILINEAR)
        assert (pixels == np.asarray(halved.resize((8, 8), Image.Resampling.BILINEAR))).all()


class TestPhotos:
    def test_the_test_shows_each_image(self, photos, roots):
        index = torch.tensor([5, 0, 5, 17])
        pixels = photos.pixels(index)
        assert (pixels.shape, pixels.dtype) == ((4, 3, 32, 32), torch.uint8)
        for number, image in zip(index.tolist(), pixels, strict=True):
            with Image.open(roots["sop"] / photos.names[number]) as opened:
                expected = np.asarray(TRANSFORM.test(opened.convert("RGB")))
            assert (image.permute(1, 2, 0).numpy() == expected).all()
        assert torch.equal(pixels[0], pixels[2])

    def test_a_share_of_a_batch_is_that_of_the_batch(self, photos):
        sampler = PerClassBatches(photos.labels, 12, 4, 3)
        whole = Feed(photos, sampler, slice(0, 12))
        halves = Feed(photos, sampler, slice(0, 5)), Feed(photos, sampler, slice(5, 12))
        for step in (0, 1, 7):
            pixels, labels, index = whole(step)
            assert torch.equal(index, sampler(step))
            assert torch.equal(labels, photos.labels[index])
            parts = zip(*(half(step) for half in halves), strict=True)
            for part, expected in zip(parts, (pixels, labels, index), strict=True):
                assert torch.equal(torch.cat(part), expected)

    def test_crops_are_of_the_seed_and_the_step(self, photos):
        index = torch.zeros(3, dtype=torch.int64)

        def crops(seed, step):
            return photos.to_train_on(index, slice(0, 3), generator("crop", seed, step))

        first = crops(0, 0)
        assert torch.equal(first, crops(0, 0))
        assert not torch.equal(first, crops(0, 1))
        assert not torch.equal(first, crops(1, 0))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], photos.pixels(index)[0])

    def test_the_digest_is_of_the_list_and_the_files(self, own):
        root = own("sop")

        def digest(transform=TRANSFORM):
            return Photos(root, datasets.read("sop", root)[0], transform).digest

        first = digest()
        assert digest() == first
        assert digest(Transform(32, None, (0.16, 1.0), (0.75, 1.33), (37,))) != first
        (root / "thing1_final/1002_1.JPG").write_bytes(jpeg(1, (41, 31)) + b"0")
        assert digest() != first
        second = digest()
        damage(root / "Ebay_train.txt", 3, None)
        assert digest() != second

    def test_every_image_that_is_missing_is_named(self, own):
        root = own("inat")
        listing, _ = datasets.read("inat", root)
        (root / listing.names[2]).unlink()
        with pytest.raises(InputError, match=f"a listed image is not there or empty: {listing.names[2]}: restore"):
            Photos(root, listing, TRANSFORM)
        (root / listing.names[5]).write_bytes(b"")
        (root / listing.names[7]).unlink()
        (root / listing.names[7]).mkdir()
        with pytest.raises(InputError, match=f"3 of the 35 listed .*{listing.names[5]}, {listing.names[7]}: restore"):
            Photos(root, listing, TRANSFORM)

    def test_a_damaged_image_is_named_when_its_turn_comes(self, own):
        root = own("cub")
        train, _ = datasets.read("cub", root)
        path = root / train.names[2]
        path.write_bytes(path.read_bytes()[:200])
        found = Photos(root, train, TRANSFORM)
        found.pixels(torch.tensor([0, 1, 3]))
        for take in (found.pixels, lambda index: found.to_train_on(index, slice(0, 4), generator("crop", 0, 0))):
            with pytest.raises(InputError, match=rf"{path} is damaged or unreadable \(.*\): restore it"):
                take(torch.arange(4))

    def test_values_without_a_range(self, own):
        root = own("cub")
        train, _ = datasets.read("cub", root)
        Image.fromarray(np.full((50, 50), 4000, dtype=np.uint16)).save(root / train.names[0], "PNG")
        with pytest.raises(InputError, match="mode I;16 has more than 8 bits, of which nothing says what is white"):
            Photos(root, train, TRANSFORM).pixels(torch.tensor([0]))

    def test_gray_images_are_shown_in_colour(self, own):
        root = own("cub")
        train, _ = datasets.read("cub", root)
        Image.new("L", (50, 50), 77).save(root / train.names[0])
        assert (Photos(root, train, TRANSFORM).pixels(torch.tensor([0])) == 77).all()

    def test_reading_ahead(self):
        read = []
        values = ahead(lambda item: read.append(int(item)) or item + 1, list(torch.arange(4)))
        assert int(next(values)) == 1
        assert [int(value) for value in values] == [2, 3, 4]
        assert read == [0, 1, 2, 3]
        assert list(ahead(lambda item: item, [])) == []


@st.composite
def hierarchies(draw):
    """Labels, super-classes and settings of batches that can be filled."""
    per_class, half = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    classes = draw(st.lists(st.integers(half, half + 3), min_size=2, max_size=5))
    group_of = [group for group, count in enumerate(classes) for _ in range(count)]
    random.Random(draw(st.integers(0, 9))).shuffle(group_of)
    sizes = draw(st.lists(st.integers(1, 6), min_size=len(group_of), max_size=len(group_of)))
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))]
    return labels, torch.tensor(group_of), len(classes), 2 * half * per_class, per_class


class TestHierarchicalBatches:
    def make(self, hierarchy, seed=0, batches_per_pair=2):
        labels, group_of, groups, batch_size, per_class = hierarchy
        names = [f"super {group}" for group in range(groups)]
        return HierarchicalBatches(labels, group_of, names, batch_size, per_class, seed, batches_per_pair)

    @given(hierarchies(), st.integers(0, 3), st.integers(0, 1000))
    @settings(max_examples=100, deadline=None)
    def test_a_batch(self, hierarchy, seed, step):
        labels, group_of, _, batch_size, per_class = hierarchy
        sampler = self.make(hierarchy, seed)
        batch = sampler(step)
        assert len(batch) == batch_size
        drawn = labels[batch]
        supers = group_of[drawn]
        assert sorted(supers.unique(return_counts=True)[1].tolist()) == [batch_size // 2] * 2
        assert tuple(supers.unique().tolist()) == sampler.pair(step)
        present, counts = drawn.unique(return_counts=True)
        assert counts.tolist() == [per_class] * (batch_size // per_class)
        sizes = labels.bincount()
        for label in present.tolist():
            of_class = batch[drawn == label].unique(return_counts=True)[1]
            assert of_class.max() <= -(-per_class // int(sizes[label]))
        assert torch.equal(batch, self.make(hierarchy, seed)(step))

    @given(hierarchies(), st.integers(0, 3), st.integers(1, 3), st.integers(0, 5))
    @settings(max_examples=50, deadline=None)
    def test_an_epoch(self, hierarchy, seed, batches_per_pair, epoch):
        sampler = self.make(hierarchy, seed, batches_per_pair)
        pairs = list(combinations(range(hierarchy[2]), 2))
        assert sampler.epoch == len(pairs) * batches_per_pair
        steps = range(epoch * sampler.epoch, (epoch + 1) * sampler.epoch)
        assert Counter(map(sampler.pair, steps)) == dict.fromkeys(pairs, batches_per_pair)

    def test_the_epoch_of_stanford_online_products(self):
        labels, group_of = torch.arange(12 * 16).repeat_interleave(4), torch.arange(12).repeat_interleave(16)
        sampler = HierarchicalBatches(labels, group_of, [str(i) for i in range(12)], 128, 4, 333)
        assert (sampler.epoch, sampler.per_class) == (660, 4)
        orders = [[sampler.pair(660 * epoch + step) for step in range(660)] for epoch in range(2)]
        assert orders[0] != orders[1]
        # Neither in the pairs' order, nor a pair's batches one after another.
        assert len({orders[0][step] for step in range(10)}) > 5

    def test_chance_is_of_the_seed_and_the_step(self):
        labels, group_of = torch.arange(60).repeat_interleave(8), torch.arange(3).repeat_interleave(20)
        first, other = (HierarchicalBatches(labels, group_of, list("abc"), 32, 4, seed) for seed in (0, 1))
        assert len({tuple(first(step).tolist()) for step in range(60)}) == 60
        assert not torch.equal(first(0), other(0))
        pair = [HierarchicalBatches(labels[:320], group_of[:40], list("ab"), 32, 4, seed)(0) for seed in (0, 1)]
        assert not torch.equal(*pair)  # of the same two super-classes
        assert torch.cat([first(step) for step in range(200)]).unique().numel() == 480  # every image has its turn
        assert all(part.unique().numel() == 2 for part in group_of[labels[first(0)]].split(16))

    def test_batches_that_cannot_be_filled(self):
        labels, group_of = torch.arange(10).repeat_interleave(4), torch.tensor([0] * 3 + [1] * 7)
        names = ["cups", "lamps"]
        with pytest.raises(InputError, match=r"takes 4 classes of a .*'cups' has 3 .*--batch-size of at most 24"):
            HierarchicalBatches(labels, group_of, names, 32, 4, 0)
        assert len(HierarchicalBatches(labels, group_of, names, 24, 4, 0)(0)) == 24
        for size in (25, 12, 4):
            with pytest.raises(InputError, match="--batch-size that 8 divides"):
                HierarchicalBatches(labels, group_of, names, size, 4, 0)
        with pytest.raises(InputError, match="takes two super-classes, and the images to train on have 1"):
            HierarchicalBatches(labels, group_of * 0, ["cups"], 8, 4, 0)

    def test_classes_that_repeat_are_counted(self):
        labels, group_of = torch.tensor([0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]), torch.tensor([0, 0, 1, 1])
        assert HierarchicalBatches(labels, group_of, ["a", "b"], 8, 4, 0).repeating == 2

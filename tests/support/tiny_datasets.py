"""Copies of the data sets' layouts with a few images of a few hundred bytes, for tests."""

import io
import json

import numpy as np
from PIL import Image

SUPERS = 3  # super-classes, of
CLASSES = 3  # classes each in train and in test, of
EACH = 4  # images; one class of each split has 3


def jpeg(seed, size=(40, 30)):
    """Noise, coarse enough to compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=60)
    return file.getvalue()


def _put(root, name, seed):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(jpeg(seed, (40, 30) if seed % 3 else (30, 44)))


def _rows(first):
    """(image, class, super-class), numbers from 1 on and ``first`` on for classes."""
    rows, image = [], 1000 * first
    for super_class in range(1, SUPERS + 1):
        for number in range(CLASSES):
            label = first + CLASSES * (super_class - 1) + number
            for _ in range(EACH - (super_class == 1 and number == 0)):
                image += 1
                rows.append((image, label, super_class))
    return rows


def sop(root):
    for which, first in (("train", 1), ("test", 1 + SUPERS * CLASSES)):
        lines = ["image_id class_id super_class_id path"]
        for image, label, super_class in _rows(first):
            name = f"thing{super_class}_final/{image}_{label}.JPG"
            _put(root, name, image)
            lines.append(f"{image} {label} {super_class} {name}")
        (root / f"Ebay_{which}.txt").write_text("\n".join(lines) + "\n")
    return root


def cub(root):
    paths, labels = [], []
    for image in range(1, 2 * SUPERS * CLASSES * EACH + 1):
        label = 1 + (image - 1) // EACH
        name = f"{label:03}.Bird_{label}/Bird_{image}.jpg"
        _put(root, f"images/{name}", image)
        paths.append(f"{image} {name}\n")
        labels.append(f"{image} {label}\n")
    (root / "images.txt").write_text("".join(paths))
    (root / "image_class_labels.txt").write_text("".join(labels))
    return root


def inat(root):
    (root / "Inat_dataset_splits").mkdir(parents=True)
    for which, first in (("train", 1), ("test", 1 + SUPERS * CLASSES)):
        names = [f"train_val2018/Kingdom{group}/{label}/{image}.jpg" for image, label, group in _rows(first)]
        for seed, name in enumerate(names):
            _put(root, name, 1000 * first + seed)
        (root / f"Inat_dataset_splits/Inaturalist_{which}_set1.txt").write_text("\n".join(names) + "\n")
    categories = [{"id": label, "name": str(label), "supercategory": "x"} for label in range(40)]
    (root / "train2018.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return root


MAKE = {"sop": sop, "cub": cub, "inat": inat}

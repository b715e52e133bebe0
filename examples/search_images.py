"""Find those of your images that are nearest to others, with a network that train_retrieval.py has trained.

    python examples/search_images.py runs/photos FOLDER --query a.png b.png

The first time all images below FOLDER are embedded, and written into RUN/index-FOLDER.npz (names, and embeddings [n, D]
float32), from which later searches go on; only files that are new or have changed are embedded then. Without --query
that is all. Images that cannot be read are named and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from retrieval.errors import InputError, counted, some
from retrieval.progress import Progress
from retrieval.sources import Folder
from retrieval.trained import Trained, load
from torch import Tensor

_AT_A_TIME = 64


class Index:
    """The embeddings of a folder's images, kept in a file.

    Attributes:
        names: of the images, within the folder.
        embeddings: [n, D] float32.
        damaged: what could not be read.
    """

    def __init__(self, model: Trained, folder: Path, path: Path) -> None:
        names = sorted(Folder(folder).images)
        if not names:
            raise InputError(f"{folder} has no images: name a folder with some in it or below it")
        weights = sum(p.double().sum().item() for p in model.network.state_dict().values())
        stamp = {name: f"{(folder / name).stat().st_mtime_ns} {weights}" for name in names}
        known = _read(path)
        fresh = [name for name in names if known.get(name, ("", None))[0] != stamp[name]]
        self.damaged: list[str] = []
        if fresh:
            with Progress("embedding", len(fresh), "images") as progress:
                for begin in range(0, len(fresh), _AT_A_TIME):
                    part = fresh[begin : begin + _AT_A_TIME]
                    for name, row in zip(part, self._embed(model, folder, part), strict=True):
                        known[name] = stamp[name], row
                    progress.update(len(part))
        kept = {name: known[name][1] for name in names if known[name][1] is not None}
        self.names, rows = list(kept), [row for row in kept.values() if row is not None]
        if not rows:
            raise InputError(f"no image of {folder} can be read, such as {some(self.damaged, 3)}")
        self.embeddings = torch.from_numpy(np.stack(rows))
        stamps = [stamp[name] for name in self.names]
        np.savez(path, names=np.array(self.names), stamps=np.array(stamps), embeddings=self.embeddings.numpy())

    def _embed(self, model: Trained, folder: Path, names: Sequence[str]) -> list[np.ndarray | None]:
        """An embedding each, or None of what cannot be read."""
        try:
            return list(model.embed([folder / name for name in names]).numpy())
        except InputError as error:
            if len(names) > 1:
                return [row for name in names for row in self._embed(model, folder, [name])]
            self.damaged.append(str(error))
            return [None]

    def nearest(self, query: Tensor, count: int) -> list[tuple[str, float]]:
        """The images nearest to an embedding [D], and their similarities."""
        values, places = (self.embeddings @ query).topk(min(count, len(self.names)))
        return [(self.names[place], value) for value, place in zip(values.tolist(), places.tolist(), strict=True)]


def _read(path: Path) -> dict[str, tuple[str, np.ndarray | None]]:
    """What an earlier search has left: stamp and embedding by name."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as file:
            return {
                name: (stamp, row)
                for name, stamp, row in zip(
                    file["names"].tolist(), file["stamps"].tolist(), file["embeddings"], strict=True
                )
            }
    except Exception as error:  # numpy raises whatever a damaged zip leads it into
        raise InputError(f"{path} is damaged ({error}): remove it, and the images are embedded again") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run of train_retrieval.py, or its best.pt")
    parser.add_argument("folder", type=Path, help="the folder of images to search in")
    parser.add_argument("--query", type=Path, nargs="+", default=[], help="images whose nearest are to be found")
    parser.add_argument("--count", type=int, default=10, help="how many to show of each (default 10)")
    parser.add_argument("--device", default="cpu", help="of the network (default cpu)")
    options = parser.parse_args(arguments)
    try:
        model = load(options.run, options.device)
        place = options.run if options.run.is_dir() else options.run.parent
        path = place / f"index-{options.folder.resolve().name}.npz"
        index = Index(model, options.folder, path)
        for said in index.damaged:
            print(said, file=sys.stderr)
        print(f"{counted(len(index.names), 'image')} of {options.folder} in {path}")
        for file, query in zip(options.query, model.embed(options.query) if options.query else [], strict=True):
            print(file)
            for name, similarity in index.nearest(query, options.count):
                print(f"  {similarity:7.4f}  {name}")
    except (InputError, OSError) as error:
        print(f"search_images.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may hold anything
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as above
    sys.exit(main())

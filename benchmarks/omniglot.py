"""Omniglot's two small splits: trained on the 136 characters of one, retrieving the 106 of the other that are unseen.

The splits are images_background_small1.zip and images_background_small2.zip of github.com/brendenlake/omniglot, as they
are, in one folder: python -m benchmarks.omniglot --data-root FOLDER. Runs examples/train_retrieval.py once a seed with
the options below, and writes every evaluation of each with its provenance, and the pictures of the first.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from . import report

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--image-size", "28", "--blocks", "3", "--dim", "64", "--batch-size", "128", "--steps", "300"]
GOAL = 0.35  # mAP@R of the unseen characters


def run(data_root: Path, seed: int, options: list[str], out: Path) -> list[dict[str, str]]:
    """The evaluations of one run."""
    roots = [f"images_background_small{split}.zip" for split in (1, 2)]
    arguments = ["--data-root", data_root / roots[0], "--test-root", data_root / roots[1], "--class-by", "path"]
    command = [sys.executable, ROOT / "examples" / "train_retrieval.py", *arguments, *options, "--seed", str(seed)]
    subprocess.run([*command, "--out", out], check=True)
    with (out / "metrics.csv").open(newline="") as file:
        return [{"seed": str(seed), **row} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="the folder of the two zips")
    parser.add_argument("--seeds", type=int, default=3, help="runs (default 3)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the CSV and PNGs")
    arguments = parser.parse_args()

    about = report.provenance() | {"options": " ".join(OPTIONS)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(arguments.data_root, seed, OPTIONS, Path(folder, str(seed))) for seed in range(arguments.seeds)]
        for picture in ("curves", "neighbours"):
            shutil.copy(Path(folder, "0", f"{picture}.png"), arguments.out / f"omniglot_{picture}.png")
    report.write_csv(arguments.out / "omniglot.csv", [row for rows in runs for row in rows], about)

    lines = []
    for name in ("mAP", "mAP@R", "R-precision", "R@1", "R@10", "R@100"):
        sides = [[float(rows[place][name]) for rows in runs] for place in (0, -1)]
        shown = [f"{statistics.fmean(side):.3f} ({min(side):.3f} - {max(side):.3f})" for side in sides]
        lines.append([name, *shown])
    title = f"\n{report.in_words(about)}\n\nUnseen characters, {arguments.seeds} seeds: mean (least - most)"
    print(report.table(title, ["", "untrained", f"after {runs[0][-1]['step']} steps"], lines))
    least = min(float(rows[-1]["mAP@R"]) for rows in runs)
    report.print_goals([(f"mAP@R of every seed at least {GOAL} ({least:.3f})", least >= GOAL)], about)
    took = [statistics.median(float(row[name]) for rows in runs for row in rows[1:]) for name in ("loss_ms", "step_ms")]
    print(f"Of a step of {took[1]:.0f} ms the loss and its gradient take {took[0]:.1f} ms")
    print(f"Wrote omniglot.csv, omniglot_curves.png and omniglot_neighbours.png in {arguments.out}")


if __name__ == "__main__":
    main()

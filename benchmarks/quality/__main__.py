"""Nine losses, one network, one schedule: which retrieves best, and how far apart batches and the whole set are.

Without --data-root it takes scikit-learn's handwritten digits, four losses and two batch sizes. With it, Omniglot's
two small splits: nine losses at batches of 128, and four of them also at 32 and 512. Each loss takes the learning rate
that is best for it on held-out training classes; then it is trained with each seed and tested. Every finished run is a
row of a CSV in --out, at once: the same command goes on from there after a stop, and --report draws what is there
already. docs/paper.md has the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from retrieval.errors import InputError
from retrieval.progress import Progress

from ..report import provenance
from . import plan, report
from .plan import Comparison
from .runs import Results, Run

IN_A_FOLDER = {"omniglot": plan.omniglot, "omniglot-margins": plan.omniglot_margins, "wordnet": plan.words}
FREE = ("free-0.1", "free-0.5", "free-0.7")


def carry_out(comparison: Comparison, results: Results, data: tuple[Any, ...]) -> None:
    """All runs that are not done yet."""
    planned = [run in results for run in comparison.runs(results)]
    done, whole, each = sum(planned), len(planned), comparison.images
    with Progress("runs", whole * each, "items", initial=done * each, unit_scale=True) as progress:
        for run in comparison.runs(results):
            if run in results:
                continue
            progress.set_description(f"{done}/{whole} runs", False)
            progress.set_postfix_str(f"{run.role} {run.loss} {run.batch_size} {run.rate:g} seed {run.seed}", False)
            values = comparison.train(run, data, progress.update)
            results.add(run, values, provenance())
            done += 1
            progress.write(_line(run, values))
            whole = sum(1 for _ in comparison.runs(results))  # a choice may ask for further rates
            progress.total = whole * each
        progress.set_description(f"{done}/{whole} runs")


def _line(run: Run, values: dict[str, float]) -> str:
    """A finished run for the screen."""
    text = f"{run.role:<7}{run.loss:<13} batch {run.batch_size:<4} lr {run.rate:<6g} seed {run.seed:<5}"
    if not values:
        return text + "diverged"
    shown = [f"{name} {values[name]:.4f}" for name in ("mAP@R", "R@1", "gap", "training gap") if name in values]
    return text + "  ".join([*shown, f"{values['seconds']:.0f} s"])


def show(comparison: Comparison, results: Results, out: Path) -> None:
    """Writes the table and the plots of what is done, and prints the table."""
    found = report.Findings(comparison, results)
    text = report.table(found)
    name = f"quality_{comparison.name}"
    (out / f"{name}.md").write_text(text)
    report.plot(found, out / f"{name}.png")
    print("\n" + text)
    print(f"Wrote {out}: {name}.csv, {name}.md, {name}.png")


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=(*IN_A_FOLDER, *FREE), help="default digits; omniglot if there is a DIR")
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="the folder of Omniglot's two small zips, or of WordNet and MiniLM",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="test runs of each loss; default 5")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder; default runs/quality")
    parser.add_argument("--report", action="store_true", help="train nothing: the table and plots of what is done")
    options = parser.parse_args(arguments)
    if options.data in IN_A_FOLDER and options.data_root is None:
        parser.error(f"--data {options.data} needs --data-root: the folder that it lies in")
    if options.seeds < 1:
        parser.error(f"--seeds has to be at least 1, got {options.seeds}")
    try:
        root = options.data_root
        if options.data in FREE:
            comparison = plan.free_embeddings(options.data.removeprefix("free-"), options.seeds)
        elif root is None:
            comparison = plan.digits(options.seeds)
        else:
            comparison = IN_A_FOLDER[options.data or "omniglot"](root, options.seeds)
        data = comparison.load()
        path = options.out / f"quality_{comparison.name}.csv"
        results = Results(path, comparison.key(*data), comparison.measured)
        if results.foreign:
            print(f"{path}: {results.foreign} rows of other settings or images do not count")
        if options.report:
            if not path.exists():
                raise InputError(f"there is no {path}: nothing is done yet")
            show(comparison, results, options.out)
            return 0
        with results.kept():
            try:
                carry_out(comparison, results, data)
            except KeyboardInterrupt:
                print("\nStopped. The same command goes on with the run that was under way.", file=sys.stderr)
                return 130
        show(comparison, results, options.out)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

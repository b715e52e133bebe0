"""Whether a temperature that narrows while it trains is worth an option: python -m benchmarks.temperature.

SupAP with fixed temperatures, and with temperatures that fall along a geometric line from the first step to the last,
compared as make quality compares losses: the same network, batches and number of images, each with the learning rate
that is best for it on held-out training classes. On scikit-learn's digits, or with --data-root on Omniglot.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

import roadmap_ext

from .quality import __main__ as program
from .quality import plan, report
from .quality.losses import LOSSES, Loss

TAUS = {f"tau {tau:g}": (tau, tau) for tau in (0.01, 0.02, 0.05, 0.1)}
TAUS |= {f"tau {first:g} to {last:g}": (first, last) for first, last in ((0.05, 0.01), (0.1, 0.01), (0.1, 0.02))}
BATCH = 32


class Falling(nn.Module):
    """SupAP whose temperature goes from ``first`` to ``last`` in so many steps."""

    def __init__(self, first: float, last: float, steps: int) -> None:
        super().__init__()
        self.loss, self._done = roadmap_ext.SupAPLoss(), 0
        self._first, self._last, self._steps = first, last, steps

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] with labels [B], at the next step."""
        share = min(1.0, self._done / max(1, self._steps - 1))
        self.loss.tau = self._first * (self._last / self._first) ** share
        self._done += 1
        return self.loss(embeddings, labels)


def comparison_of(made: plan.Comparison) -> plan.Comparison:
    """The same data and network, with these losses at one batch size."""
    steps = made.images // BATCH
    for name, (first, last) in TAUS.items():
        make: Callable[[], nn.Module] = partial(Falling, first, last, steps)
        LOSSES[name] = Loss(f"SupAP, {name}", make)
    report.COLOURS.update(zip(TAUS, [*report.COLOURS.values()], strict=False))
    falling = [name for name, (first, last) in TAUS.items() if first != last]
    report.DIFFERENCES = (
        *((name, "tau 0.01") for name in [*TAUS][1:]),
        *((name, fixed) for name in falling for fixed in ("tau 0.02", "tau 0.05")),
    )
    stages, rates = ((BATCH, tuple(TAUS)),), (3e-3, 1e-2, 3e-2)
    return plan.Comparison(
        f"{made.name}_tau", stages, rates, made.choices, made.seeds, made.images, made.data, made.network
    )


def main() -> int:
    """The command line is that of make quality."""
    digits, omniglot = plan.digits, plan.omniglot
    plan.digits = lambda seeds: comparison_of(digits(seeds))
    plan.omniglot = lambda data_root, seeds: comparison_of(omniglot(data_root, seeds))
    return program.main()


if __name__ == "__main__":
    sys.exit(main())

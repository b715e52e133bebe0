"""How far something is, on standard error: a bar on a terminal; in a file or a pipe a plain line every ten per cent."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """tqdm's bar, with lines in its place where there is no terminal.

    Args:
        total: how many of ``unit`` there are, at least 1.
        unit: a plural, such as "steps".
        silent: neither bar nor lines.
        settings: other arguments of tqdm.
    """

    def __init__(self, what: str, total: int, unit: str, *, silent: bool = False, **settings: Any) -> None:
        disable = True if silent else None  # None: where there is no terminal
        super().__init__(desc=what, total=total, unit=f" {unit}", disable=disable, **settings)
        self._lines, self._counted = self.disable and not silent, unit
        if self._lines:  # tqdm leaves these out of a bar that is not drawn
            self.desc, self.postfix = f"{what}: ", None

    def update(self, n: int = 1) -> bool | None:
        """``n`` more are done."""
        if not self._lines:
            return super().update(n)
        tenths = 10 * self.n // self.total
        self.n += n
        if 10 * self.n // self.total > tenths:
            sys.stdout.flush()  # so that both streams stand in order in one file
            text = f"{self.desc}{100 * self.n // self.total} % ({self.n:,} of {self.total:,} {self._counted})"
            print(text + (f", {self.postfix}" if self.postfix else ""), file=sys.stderr, flush=True)
        return True

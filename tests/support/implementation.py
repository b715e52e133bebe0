"""What plugins share that put another implementation of the ops in place: a count of its calls, over all processes.

A run in which nobody called it proves nothing, and fails.
"""

from __future__ import annotations

import pytest


class Counted:
    """Sums up `count()` of each process of pytest-xdist, or of the only one; says the sum; fails where that is 0."""

    def __init__(self, what, count):
        self.what, self.count, self.of_workers = what, count, 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """The controller of pytest-xdist: a worker has ended."""
        self.of_workers += getattr(node, "workeroutput", {}).get("calls", 0)

    def pytest_sessionfinish(self, session, exitstatus):
        """A worker tells the controller; who reports looks at the sum."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["calls"] = self.count()
        elif exitstatus == pytest.ExitCode.OK and not self.total():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Say how many there were."""
        terminalreporter.write_line(f"{self.total()} {self.what}")

    def total(self):
        """Of all processes, so far."""
        return self.of_workers + self.count()

"""The losses of the paper side by side: python -m benchmarks.quality (make quality).

peers.py has the losses that no package has, losses.py all of them by name, runs.py one run and the table of runs,
plan.py which runs there are, report.py intervals, table and plots.
"""

import sys
from pathlib import Path

# The modules of the training program are not an installed package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

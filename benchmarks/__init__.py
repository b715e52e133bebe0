"""Benchmarks of roadmap_ext. Each `python -m benchmarks.NAME` measures, prints and writes benchmarks/results/.

measure.py times two sides in turns, loop.py has their data, report.py what they print and write, plots.py the plots.
"""

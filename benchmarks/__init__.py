"""Benchmarks of roadmap_ext: each of `python -m benchmarks.ap_loss` and `python -m benchmarks.roadmap_loss` measures,
prints and writes benchmarks/results/.
"""

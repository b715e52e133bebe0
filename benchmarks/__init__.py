"""Benchmarks of roadmap_ext: `python -m benchmarks.ap_loss` measures, prints and writes benchmarks/results/."""

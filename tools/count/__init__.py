"""What the CUDA kernels would take on a GPU that is not there, by counting: `make cuda-count`.

    machine.py   the figures of an H100, an H200 and an A100
    sass.py      the kernels as ptxas makes them: instructions with their control codes, and the PTX they come from
    trace.py     what the warps of a small launch did, as the PTX runner of tests/ptx wrote it
    replay.py    a multiprocessor that executes such a trace
    workload.py  the losses whose launches are traced
    __main__.py  from a workload to its time on a machine, and the table

docs/benchmarks.md says what is counted and what is not.
"""

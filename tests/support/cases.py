"""Values of parameters that tests share."""

import pytest


def deep(*values):
    """Values of a parameter, or rows of several, for `make test-deep` alone."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.deep) for value in values
    ]


BACKENDS = ["aot_eager", *deep("inductor")]
"""Of torch.compile: graphs, fake kernels and gradients are those of both; compiling C++ takes a minute."""

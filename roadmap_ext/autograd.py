"""What the autograd Functions of this package share: errors in place of derivatives that they do not have, and
when backward may write over what forward saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import notices
from .extension import _REFERENCE_ONLY, check_kernels

_NO_TRANSFORMS = (
    "roadmap_ext: the kernels do not take part in torch.func transforms (grad, vmap, jvp, ...) or in forward-mode "
    "differentiation: use loss.backward() or torch.autograd.grad, or pass method='reference', which is differentiable "
    "by all of them."
)
_NO_SECOND_DERIVATIVE = (
    "roadmap_ext: the kernels have first derivatives only, and this asks for a second one (a gradient penalty, or "
    "backward through a gradient taken with create_graph=True): pass method='reference', which has them all."
)


def anchor(leaf: Tensor) -> Tensor:
    """An empty tensor with the leaf's place in the graph and none of its memory."""
    return leaf.narrow(0, 0, 0).clone()


def savable(x: Tensor) -> Tensor:
    """``x``, or a copy of what was made under inference_mode(), of which autograd saves nothing."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


class FirstDerivativeOnly(torch.autograd.Function):
    """Passes a gradient on, joined to everything it depends on, so that a second derivative meets an error.

    once_differentiable would cut those ties instead: where another path leads to the scores, autograd would then return
    that path's share as if it were the whole second derivative.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


def resolve_method(method: str, *inputs: Tensor) -> str:
    """The method to run, one of METHODS: "auto" becomes "reference" in an installation without kernels.

    Raises RuntimeError where the kernels that it needs were not built.
    """
    if method == "reference":
        return method
    if method == "auto" and _REFERENCE_ONLY:
        notices.without_kernels()
        return "reference"
    check_kernels(inputs[0].device, method)
    check_no_transform(*inputs)
    return method


def check_loss(device: torch.device, loss: str) -> None:
    """Raise NotImplementedError where the kernels of a device do not have a loss of ranks."""
    if device.type == "cuda" and loss != "ap":
        raise NotImplementedError(
            f"the CUDA kernels have the AP loss alone so far, not {loss!r}: pass method='reference', or CPU tensors"
        )


def check_no_transform(*inputs: Tensor) -> None:
    """Raise RuntimeError inside torch.func and forward mode: torch would return derivatives of zero without a word."""
    if torch.compiler.is_compiling():  # when a tensor does not say what it carries: forward mode at all is refused
        transformed = forward_ad._current_level >= 0
    else:
        transformed = any(
            torch._C._functorch.is_legacy_batchedtensor(x)  # autograd's is_grads_batched
            or forward_ad.unpack_dual(x).tangent is not None
            for x in inputs
        )
    if transformed or torch._C._are_functorch_transforms_active():
        raise RuntimeError(_NO_TRANSFORMS)


def can_be_read(x: Tensor) -> bool:
    """Whether reading values costs nothing: not on a GPU, nor while torch traces or transforms."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def is_known_to_be_1(x: Tensor) -> bool:
    """Whether a scalar is 1, where it can be read."""
    return can_be_read(x) and x.item() == 1


def may_overwrite(saved: Tensor) -> bool:
    """Whether backward may write over what forward saved for it: nobody asked to keep the graph, and nothing traces it.

    torch has no public word for that; the one that AOTAutograd asks is asked here, and where it is missing the answer
    is no.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(saved) is not Tensor:
        return False
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps_graph is None or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return not keeps_graph()

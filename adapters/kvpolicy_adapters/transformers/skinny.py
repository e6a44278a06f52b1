"""skinny_gemm: a model's products of a few rows, by a kernel that only reads the weights once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpolicy import KernelError, ParameterError
from kvpolicy.ops import products

__all__ = ["skinny_gemm"]


@contextmanager
def skinny_gemm(model: nn.Module) -> Iterator[None]:
    """Multiply few rows on a CPU about as fast as weights are read, in a ``with`` block.

    Where the cache is cheap, the model's own products are what a decode step costs; and with a
    few sequences, general kernels take up to twice as long for them as reading the weights does.
    Inside the block, linear layers in float32 leave such products to the CPU kernel; all others run
    as they always do. It adds in another order than torch does, the same one for every batch size.

    Example::

        with attach(model, policy="linear", budget="1/6") as cache, skinny_gemm(model):
            out = model.generate(**inputs, cache=cache)

    Args:
        model: any model; its ``torch.nn.Linear`` layers are served, subclasses are not.

    Raises:
        KernelError: the CPU kernel has not been built.
        ParameterError: the model has no layer that could be served.
    """
    product = products.skinny_linear()
    if product is None:
        raise KernelError(
            "skinny_gemm needs the CPU kernel: run `kvpolicy build-kernel` once on this machine"
        )
    served = [module for module in model.modules() if _is_served(module)]
    if not served:
        raise ParameterError(
            f"skinny_gemm serves torch.nn.Linear layers in float32 on a CPU, and "
            f"{type(model).__name__} has none; leave it out"
        )
    forward = _with(product)
    for module in served:
        module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        for module in served:
            del module.forward


def _is_served(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, whose forward nobody else has replaced."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.is_contiguous()
    )


def _with(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Callable[[nn.Linear, Tensor], Tensor]:
    """``torch.nn.Linear.forward``, few rows by the kernel."""
    most = products.most_rows()

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        rows = input.numel() // input.shape[-1]
        # One row is read as fast by torch, and many rows are multiplied faster.
        few = 1 < rows <= most
        if few and input.dtype == torch.float32 and not torch.is_grad_enabled():
            return product(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)

    return forward

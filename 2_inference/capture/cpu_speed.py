"""What makes a CPU faster without changing what is computed: oneDNN's matrix products, and memory that is kept."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

# oneDNN keeps half a megabyte for every number of rows it has met: rows are padded to few numbers, and the many rows
# of a prompt, where it gains least, are left to MKL.
FEW_ROWS = 128
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@contextmanager
def onednn_linears(model: Any) -> Iterator[int]:
    """While inside, the model's float32 linear maps on an x86 CPU are computed by oneDNN; yields how many are.

    PyTorch multiplies float32 by MKL there, which is slow for the few rows of a decoding step; oneDNN gives the same
    to float32 rounding. Measured on SmolLM2-135M-Instruct, 8 rows, 16 new tokens, 2 cores of an AMD EPYC: `generate()`
    takes 0.65 of its time after 12-token prompts and 0.93 after 400-token ones (`bench_capture.py --ways generate
    generate_onednn`). F.linear has no switch for it, so a private operator of PyTorch's compiler is called; a PyTorch
    without it, or one that refuses, keeps its own products. Modules whose `forward` somebody else has replaced
    (accelerate's offloading) are left alone.
    """
    product: Any = onednn_product()
    linears = [one for one in model.modules() if type(one) is torch.nn.Linear and "forward" not in vars(one)]
    on_cpu = [one for one in linears if one.weight.device.type == "cpu" and one.weight.dtype == torch.float32]
    chosen: list[Any] = on_cpu if product else []
    for module in chosen:
        module.forward = partial(_few_rows, product, module)
    try:
        yield len(chosen)
    finally:
        for module in chosen:
            del module.forward


def onednn_product() -> Callable[..., torch.Tensor] | None:
    """oneDNN's product as `product(rows, weight, bias)`; None if this PyTorch or machine does not have it."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise

        def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return operator(rows, weight, bias, "none", [], "")

        product(torch.ones(1, 2), torch.ones(2, 2), None)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # gone, with other arguments, or refused
        return None
    return product


def _few_rows(product: Callable[..., torch.Tensor], module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    rows = states.numel() // states.shape[-1]
    if not 0 < rows <= FEW_ROWS:
        return F.linear(states, module.weight, module.bias)
    step = 1 if rows == 1 else 4 if rows <= 32 else 16
    flat = F.pad(states.reshape(rows, -1), (0, 0, 0, -rows % step))
    return product(flat, module.weight, module.bias)[:rows].view(*states.shape[:-1], -1)


def keep_heap(device: torch.device) -> bool:
    """Make this process keep the memory it frees, if raw maps are captured on a CPU. Returns whether it does.

    glibc maps every large tensor anew and gives it back when it is freed, so each batch pays for the kernel zeroing
    its maps' pages. M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt(3) put them on a heap that stays. Without raw maps the
    heap's gaps would cost more memory than they save time, so call it for raw maps only; other allocators and systems
    are left alone always.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))

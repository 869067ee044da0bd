"""Copies small values and pixels to a device without making the host wait for the work queued there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def send(values: Tensor | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns values as a tensor on the device.

    A copy from ordinary memory to a GPU waits until everything queued before it is done; one from page-locked
    memory joins the queue.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

"""Classifies the errors of a step: one request's fault, a lack of memory, or a lost device."""

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether fewer slots would help. torch has an error type for devices, none for main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("DefaultCPUAllocator: can't allocate memory", "Triton Error [CUDA]: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def concerns_all(error: Exception) -> bool:
    """Returns whether no single request is at fault: memory is short, or this process has lost the device."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)

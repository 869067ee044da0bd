"""What went wrong in a step: one request's fault, a lack of memory, or the end of the device."""

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether fewer slots would help. torch has a type of its own for devices only, none for main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("DefaultCPUAllocator: can't allocate memory", "Triton Error [CUDA]: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def concerns_all(error: Exception) -> bool:
    """Whether it is no one request's fault: memory is short, or the device is lost for this process."""
    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)

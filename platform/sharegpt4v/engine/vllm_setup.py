"""How vLLM comes up in this process: whether it is there, what it may take, what we add to it.

It is an optional extra and imported only here, when an engine is made. Written for 0.32, tried on CPUs.
"""

import gc
import math
import os
from pathlib import Path
from typing import Any

import torch

from sharegpt4v.checkpoints.reader import Checkpoint
from sharegpt4v.engine.failures import is_out_of_memory
from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.slots import bytes_per_slot, free_bytes, slots_that_fit
from sharegpt4v.engine.vllm_install import VLLM_INSTALL, require_vllm
from sharegpt4v.engine.vllm_penalty import penalty_class
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter, CaptionerAdapter
from sharegpt4v.models.load import load_without_decoder

_NEEDED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its core in this process, where our thread steps it
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner takes logits processors of another kind
    "VLLM_RAISE_ON_LOGIT_NANS": "1",  # or the request would get some token; one small read a step
}
_PREFERRED = {
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers
    "VLLM_LOGGING_LEVEL": "ERROR",  # it writes to standard output, which belongs to our commands
}

_SHARE_OF_FREE_MEMORY = 0.9
"""Of a GPU's free memory, for weights, activations and keys and values."""

_CPU_BLOCK = 128
"""Tokens in a block of the CPU's keys and values."""


def import_vllm() -> Any:
    """The module. Raises UserError where it is missing or broken."""
    require_vllm()
    os.environ.update(_NEEDED)
    for name, value in _PREFERRED.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        import vllm.platforms
        import vllm.sampling_params
    except Exception as error:  # a library that is missing, of another build, or a symbol that is not there
        raise UserError(
            f"vLLM is installed and cannot be imported ({one_line(error)}): {VLLM_INSTALL}"
        ) from error
    return vllm


def load_frontend(folder: Path, dtype: torch.dtype, use_gpu: bool) -> Adapter:
    """The adapter without what vLLM runs: no weights at all of LLaVA, no decoder layers of a Share-Captioner.

    Raises UserError when vLLM is missing, or built for the other kind of device.
    """
    on_cpu = import_vllm().platforms.current_platform.is_cpu()
    if on_cpu == use_gpu:
        built, held = ("CPUs", "a GPU is to be used") if on_cpu else ("GPUs", "no GPU is to be used")
        raise UserError(f"this vLLM is built for {built}, and {held}: {VLLM_INSTALL}")
    adapter = load_without_decoder(folder, dtype, "cuda" if use_gpu else "cpu")
    gc.collect()  # the decoder's host memory, before vLLM reads the same weights
    return adapter


def open_vllm(folder: Path, adapter: Adapter, context: int, capacity: int) -> tuple[Any, int]:
    """vLLM's engine over the weights in `folder`, and how many requests it has room for.

    On a GPU it makes do with the memory there is. Raises UserError when there is none for one request.
    """
    vllm = import_vllm()
    memory: dict[str, Any]
    if vllm.platforms.current_platform.is_cpu():
        room, capacity = _room_on_cpu(folder, adapter, context, capacity)
        # Compiling would take longer there than most runs.
        memory = {"kv_cache_memory_bytes": room, "enforce_eager": True}
    else:
        free, total = torch.cuda.mem_get_info()
        memory = {"gpu_memory_utilization": _SHARE_OF_FREE_MEMORY * free / total}
    embeddings = isinstance(adapter, CaptionerAdapter)
    arguments = vllm.EngineArgs(
        model=str(folder),
        dtype=str(adapter.dtype).removeprefix("torch."),
        max_model_len=context,
        max_num_seqs=capacity,
        generation_config="vllm",  # sampling comes with the request, nothing from the folder
        enable_prompt_embeds=embeddings,
        skip_tokenizer_init=embeddings,
        logits_processors=[penalty_class()],
        distributed_executor_backend="uni",
        async_scheduling=False,  # a logits processor would see tokens that are not known yet
        mm_processor_cache_gb=0,  # an image is rarely seen twice
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **memory,
    )
    set_threads = torch.set_num_threads
    try:
        return vllm.LLMEngine.from_engine_args(arguments), capacity
    except (ValueError, torch.OutOfMemoryError) as error:
        if not is_out_of_memory(error) and "memory" not in str(error):
            raise
        raise UserError(
            f"vLLM finds no memory for {capacity} requests of {context} tokens: lower `batch_size` or "
            f"`max_new_tokens`, or take a larger device ({one_line(error)[:200]})"
        ) from error
    finally:
        torch.set_num_threads = set_threads  # a CPU worker puts a function there that only complains


def _room_on_cpu(folder: Path, adapter: Adapter, context: int, capacity: int) -> tuple[int, int]:
    """Bytes for keys and values, and the requests that they are enough for."""
    tensors = Checkpoint(folder).tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors) * adapter.dtype.itemsize
    whole_blocks = math.ceil(context / _CPU_BLOCK) * _CPU_BLOCK
    each = bytes_per_slot(adapter.language_model.config, whole_blocks, adapter.dtype)
    fitting = slots_that_fit(capacity, each, free_bytes(torch.device("cpu")) - weights)
    return (fitting + 1) * each, fitting  # vLLM keeps a block for itself

"""Starts vLLM in this process: its import, environment variables, memory and logits processor.

It is an optional extra and imported only when an engine is made. Written for 0.32, tried on CPUs.
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
from sharegpt4v.engine.vllm_frontend import ChatFrontend, Frontend, make_frontend
from sharegpt4v.engine.vllm_install import VLLM_INSTALL, require_vllm
from sharegpt4v.engine.vllm_penalty import penalty_class
from sharegpt4v.errors import UserError

_NEEDED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its core runs in this process, where our thread steps it
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner takes logits processors of another kind
    "VLLM_RAISE_ON_LOGIT_NANS": "1",  # or NaN would give an arbitrary token; costs a small read a step
}
_PREFERRED = {
    "VLLM_NO_USAGE_STATS": "1",  # it would send usage statistics
    "VLLM_LOGGING_LEVEL": "ERROR",  # it writes to standard output, which our commands use
}

_SHARE_OF_FREE_MEMORY = 0.9
"""Of a GPU's free memory, for weights, activations and keys and values."""

_CPU_BLOCK = 128
"""Tokens in a block of the CPU's keys and values."""


def import_vllm() -> Any:
    """Imports vLLM. Raises UserError when it is missing or broken."""
    require_vllm()
    os.environ.update(_NEEDED)
    for name, value in _PREFERRED.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        import vllm.platforms
        import vllm.sampling_params
    except Exception as error:  # a library or symbol that is missing or of another build
        raise UserError(
            f"vLLM is installed and cannot be imported ({one_line(error)}): {VLLM_INSTALL}"
        ) from error
    return vllm


def load_frontend(folder: Path, dtype: torch.dtype, use_gpu: bool) -> Frontend:
    """Loads what makes the prompts, without the weights that vLLM runs.

    Raises UserError when vLLM is missing, or built for the other kind of device.
    """
    on_cpu = import_vllm().platforms.current_platform.is_cpu()
    if on_cpu == use_gpu:
        built, held = ("CPUs", "a GPU is to be used") if on_cpu else ("GPUs", "no GPU is to be used")
        raise UserError(f"this vLLM is built for {built}, and {held}: {VLLM_INSTALL}")
    frontend = make_frontend(folder, dtype, "cuda" if use_gpu else "cpu")
    gc.collect()  # the decoder's host memory, before vLLM reads the same weights
    return frontend


def open_vllm(folder: Path, frontend: Frontend, context: int, capacity: int) -> tuple[Any, int]:
    """Returns vLLM's engine for the weights in `folder`, and the number of requests that it can hold.

    On a GPU it uses the memory that is free. Raises UserError when that does not hold one request, and for a
    model that vLLM does not know as one of images and text.
    """
    vllm = import_vllm()
    memory: dict[str, Any]
    if vllm.platforms.current_platform.is_cpu():
        room, capacity = _room_on_cpu(folder, frontend, context, capacity)
        # Compiling takes longer on a CPU than most runs.
        memory = {"kv_cache_memory_bytes": room, "enforce_eager": True}
    else:
        free, total = torch.cuda.mem_get_info()
        memory = {"gpu_memory_utilization": _SHARE_OF_FREE_MEMORY * free / total}
    arguments = vllm.EngineArgs(
        model=str(folder),
        dtype=str(frontend.dtype).removeprefix("torch."),
        max_model_len=context,
        max_num_seqs=capacity,
        generation_config="vllm",  # sampling comes from the request, never from the folder
        enable_prompt_embeds=frontend.embeds,
        skip_tokenizer_init=frontend.embeds,
        logits_processors=[penalty_class()],
        distributed_executor_backend="uni",
        async_scheduling=False,  # a logits processor would see tokens that are not known yet
        mm_processor_cache_gb=0,  # an image is rarely seen twice
        # Or vLLM would reserve memory for the longest video that the model takes.
        limit_mm_per_prompt={"video": 0, "audio": 0},
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **memory,
    )
    set_threads = torch.set_num_threads
    try:
        core = vllm.LLMEngine.from_engine_args(arguments)
    except (ValueError, ImportError, torch.OutOfMemoryError) as error:
        if "not supported for now" in str(error) or isinstance(error, ImportError):
            raise UserError(f"vLLM cannot run {folder}: {one_line(error)[:300]}", field="model") from error
        if not is_out_of_memory(error) and "memory" not in str(error):
            raise
        raise UserError(
            f"vLLM finds no memory for {capacity} requests of {context} tokens: lower `batch_size` or "
            f"`max_new_tokens`, or take a larger device ({one_line(error)[:200]})"
        ) from error
    finally:
        torch.set_num_threads = set_threads  # vLLM's CPU worker replaces it by a function that only warns
    if isinstance(frontend, ChatFrontend) and not core.model_config.is_multimodal_model:
        core.engine_core.shutdown()
        raise UserError(f"vLLM knows the model in {folder} as one without images", field="model")
    return core, capacity


def _room_on_cpu(folder: Path, frontend: Frontend, context: int, capacity: int) -> tuple[int, int]:
    """Computes bytes for keys and values, and the number of requests at once.

    A slot of our own families is as long as their longest request, and each has its room. Other models have
    contexts that few requests fill: vLLM lets some wait where all of them together do not fit.
    """
    tensors = Checkpoint(folder).tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors) * frontend.dtype.itemsize
    whole_blocks = math.ceil(context / _CPU_BLOCK) * _CPU_BLOCK
    each = bytes_per_slot(frontend.decoder, whole_blocks, frontend.dtype)
    fitting = slots_that_fit(capacity, each, free_bytes(torch.device("cpu")) - weights)
    room = (fitting + 1) * each  # vLLM reserves a block
    return room, capacity if isinstance(frontend, ChatFrontend) else fitting

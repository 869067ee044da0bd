"""Builds a running engine from a spec, which is small and picklable so that it can be sent to an actor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sharegpt4v.checkpoints.card import model_folder
from sharegpt4v.collector import collector_paused
from sharegpt4v.dialogue import EngineName, Turn
from sharegpt4v.engine.dtype import Dtype
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.engine.handle import Engine
from sharegpt4v.engine.memory import use_huge_pages
from sharegpt4v.engine.openmp import limit_spinning

if TYPE_CHECKING:
    import torch

    from sharegpt4v.models.adapter import Adapter


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """kind: which engine. weights: their folder or URI. model: their id. capacity: requests at once.

    room_for: a question about one image and the tokens of its longest answer; each slot then holds exactly
    these, otherwise `max_context` tokens, the model's whole context by default. max_queue: requests that wait
    at most. prefixes: dialogues kept for a next round. Both are the torch engine's.
    """

    kind: EngineName
    model: str
    weights: str | None = None
    capacity: int = 32
    room_for: tuple[str, int] | None = None
    max_context: int | None = None
    dtype: Dtype = "float32"
    kv_dtype: Literal["auto", "fp8"] = "auto"
    threads: int = 1
    use_gpu: bool = False
    max_queue: int | None = None
    prefixes: int = 0
    fake: FakeOptions = field(default_factory=FakeOptions)


def build_engine(spec: EngineSpec) -> Engine:
    """Loads the weights and starts the engine's thread."""
    limit_spinning(spec.threads)  # both before a builder imports torch
    use_huge_pages()
    return ENGINES[spec.kind](spec)


def _build_fake(spec: EngineSpec) -> Engine:
    return FakeEngine(spec.fake)


def _build_torch(spec: EngineSpec) -> Engine:
    with collector_paused():
        import torch

        from sharegpt4v.engine.torch_engine import TorchEngine
        from sharegpt4v.models.load import load_adapter

    # This thread only loads: a second pool of OpenMP threads would slow down the engine's own.
    folder, dtype = _prepare_loading(spec, threads=1)
    adapter = load_adapter(folder, dtype=dtype, device="cuda" if spec.use_gpu else "cpu")
    context = _context(spec, adapter)
    return TorchEngine(
        adapter,
        spec.model,
        spec.capacity,
        max_context=context,
        threads=spec.threads,
        stored=torch.float8_e4m3fn if spec.kv_dtype == "fp8" else None,
        max_queue=spec.max_queue,
        prefixes=spec.prefixes,
    )


def _build_vllm(spec: EngineSpec) -> Engine:
    folder, dtype = _prepare_loading(spec, threads=spec.threads)
    from sharegpt4v.engine.vllm_engine import VllmEngine
    from sharegpt4v.engine.vllm_frontend import AdapterFrontend
    from sharegpt4v.engine.vllm_setup import load_frontend

    frontend = load_frontend(folder, dtype, spec.use_gpu)
    # What an image of any shape takes of the context is known to its processor alone.
    context = _context(spec, frontend.adapter) if isinstance(frontend, AdapterFrontend) else spec.max_context
    return VllmEngine(frontend, spec.model, spec.capacity, max_context=context)


def _build_transformers(spec: EngineSpec) -> Engine:
    with collector_paused():
        from sharegpt4v.engine.transformers_engine import TransformersEngine
        from sharegpt4v.models.vlm import load_vlm

    folder, dtype = _prepare_loading(spec, threads=1)
    vlm = load_vlm(folder, dtype, "cuda" if spec.use_gpu else "cpu")
    return TransformersEngine(vlm, spec.model, spec.capacity, threads=spec.threads)


ENGINES: Mapping[EngineName, Callable[[EngineSpec], Engine]] = {
    "torch": _build_torch,
    "vllm": _build_vllm,
    "transformers": _build_transformers,
    "fake": _build_fake,
}
"""Builder by name. Each imports its heavy modules itself, because the fake engine needs no torch."""


def _prepare_loading(spec: EngineSpec, threads: int) -> "tuple[Path, torch.dtype]":
    """Returns the folder of the weights, downloaded when they are at a URI, and their dtype in memory."""
    import torch
    from transformers.utils import logging

    assert spec.weights is not None
    logging.disable_progress_bar()  # the run shows its own, and an actor's is not shown
    # Ray sets OMP_NUM_THREADS=1 for actors of one CPU or less; the configuration takes precedence.
    torch.set_num_threads(threads)
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return model_folder(spec.weights), dtype


def _context(spec: EngineSpec, adapter: "Adapter") -> int | None:
    if spec.room_for is None:
        return spec.max_context
    question, answer_tokens = spec.room_for
    blank = np.zeros((adapter.image_size, adapter.image_size, 3), np.uint8)
    return adapter.prompt_tokens((Turn("user", question, (blank,)),)) + answer_tokens

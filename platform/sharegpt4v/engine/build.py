"""From a configuration to a running engine; what crosses to an actor is the small picklable spec."""

from dataclasses import dataclass, field
from typing import Literal

from sharegpt4v.engine.base import Engine
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.weights import locate


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """kind: which engine. weights: their folder or URI. model: their id. capacity: requests at once."""

    kind: Literal["torch", "fake"]
    model: str
    weights: str | None = None
    capacity: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1
    use_gpu: bool = False
    fake: FakeOptions = field(default_factory=FakeOptions)


def build_engine(spec: EngineSpec) -> Engine:
    """Loads the weights and starts the engine's thread; torch is imported here, where it is needed."""
    if spec.kind == "fake":
        return FakeEngine(spec.fake)
    import torch

    from sharegpt4v.engine.torch_engine import TorchEngine
    from sharegpt4v.models.adapter import load_adapter

    assert spec.weights is not None
    # Ray sets OMP_NUM_THREADS=1 for actors of one CPU or less; the configuration knows better.
    torch.set_num_threads(spec.threads)
    device = "cuda" if spec.use_gpu else "cpu"
    adapter = load_adapter(locate(spec.weights), dtype=getattr(torch, spec.dtype), device=device)
    return TorchEngine(adapter, spec.model, spec.capacity)

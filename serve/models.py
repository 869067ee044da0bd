"""From a model's folder to a served model: its card at once, its engine where it is to run."""

import time
from dataclasses import dataclass, field
from typing import Literal

from serve.dialogues import ModelInfo
from serve.model import ServedModel
from sharegpt4v.checkpoints.card import TOY_CAPTIONER, TOY_CHAT, read_card
from sharegpt4v.dialogue import EngineName, SquareImages
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.engine.dtype import Dtype, resolve_dtype
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.errors import UserError

Kind = Literal["captioner", "chat"]

_TOYS = {"captioner": TOY_CAPTIONER, "chat": TOY_CHAT}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engines of a server run; see ServeConfig."""

    engine: EngineName = "torch"
    dtype: Literal["auto"] | Dtype = "auto"
    slots: int = 8
    max_context: int | None = None
    threads: int = 1
    use_gpu: bool = False
    hang_seconds: float = 120.0
    fake: FakeOptions = field(default_factory=FakeOptions)


def plan_model(
    kind: Kind, model: str, options: EngineOptions, name: str | None = None
) -> tuple[ModelInfo, EngineSpec]:
    """Reads a model's card, without a weight. Raises UserError naming the field, if there is none."""
    now = int(time.time())
    if options.engine == "fake":
        info = ModelInfo(
            name or f"fake-{kind}", kind, SquareImages(options.fake.image_side, "pad"), created=now
        )
        return info, EngineSpec("fake", "fake@0", capacity=options.slots, fake=options.fake)
    try:
        card = read_card(model, toy=_TOYS[kind], engine=options.engine)
    except UserError as error:
        raise UserError(error.text, field=kind) from None
    info = ModelInfo(name or card.name, kind, card.images, card.digest, now)
    spec = EngineSpec(
        options.engine,
        card.id,
        weights=str(card.folder) if model == "toy" else card.weights,
        capacity=options.slots,
        max_context=options.max_context,
        dtype=resolve_dtype(options.dtype, card.weight_bytes, options.use_gpu),
        threads=options.threads,
        use_gpu=options.use_gpu,
        # A next round of as many dialogues as run at once prefills only what is new.
        prefixes=options.slots if kind == "chat" else 0,
    )
    return info, spec


def load_model(kind: Kind, model: str, options: EngineOptions, name: str | None = None) -> ServedModel:
    """Loads a model into this process."""
    info, spec = plan_model(kind, model, options, name)
    return ServedModel(build_engine(spec), info, options.hang_seconds)

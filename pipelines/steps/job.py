"""From a configuration of captioning to the job: the engine, what it is asked, what may not change."""

import os
from dataclasses import dataclass, replace
from typing import Any

from cluster.session import refuse_relative_paths
from pipelines.steps.captioning import CaptionRules
from sharegpt4v.checkpoints.card import ModelCard, read_card
from sharegpt4v.checkpoints.hub import hub_name
from sharegpt4v.config.caption import CaptionConfig, Decoding
from sharegpt4v.credentials import without_credentials
from sharegpt4v.dialogue import ImageShape, SamplingParams, SquareImages, WholeImages
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.dtype import Dtype, resolve_dtype
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.engine.vllm_install import require_vllm
from sharegpt4v.errors import UserError
from sharegpt4v.gate import GateRules
from sharegpt4v.prompts import UNIFIED_CAPTION, Prompt
from sharegpt4v.run.folder import RunFolder
from sharegpt4v.run.settings import read_settings
from sharegpt4v.toy.truth import is_toy_world


@dataclass(frozen=True, slots=True)
class CaptionJob:
    """What the configuration comes to: which engine, asked how, over images of which shape.

    images: their shape. fingerprint: what changes an output row, and only that.
    """

    config: CaptionConfig
    spec: EngineSpec
    rules: CaptionRules
    images: ImageShape
    fingerprint: dict[str, Any]

    def facts(self, root: str) -> dict[str, Any]:
        """Returns what readers of the run folder need. root: where the manifest's image paths begin."""
        return {
            "root": without_credentials(root),
            "model": self.spec.model,
            "engine": self.config.engine,
            "prompt_id": self.rules.prompt.id,
            "prompt_text": self.rules.prompt.text,
        }

    def toy_warning(self, root: str) -> str | None:
        """Returns a line for people where the captions will say nothing true of the images below `root`.

        None for the toy captioner in the toy world, which it has learnt.
        """
        if self.config.engine == "fake":
            return "warning: the fake engine looks at no image: its captions describe nothing"
        if not self.spec.model.startswith("toy-") or is_toy_world(root):
            return None
        return (
            "warning: the toy captioner knows the coloured shapes of the toy world alone: what it says of "
            "these images is not true; --model FOLDER names a real captioner"
        )


def make_job(config: CaptionConfig) -> CaptionJob:
    """Resolves model, prompt and rules without loading a weight. Raises UserError for what does not exist."""
    given = None if config.model == "toy" or hub_name(config.model) else config.model
    refuse_relative_paths(images=config.images, root=config.root, out=config.out, model=given)
    if config.engine == "vllm":
        _refuse_for_vllm(config)
    if config.kv_dtype == "fp8" and (config.engine != "torch" or not config.gpus_per_actor):
        raise UserError("fp8 needs the torch engine on GPUs: give `gpus_per_actor`", field="kv_dtype")
    card = None if config.engine == "fake" else read_card(config.model, engine=config.engine)
    model, weights = (card.id, card.weights) if card else ("fake@0", None)
    images = _image_shape(config, card)
    prompt = UNIFIED_CAPTION if config.prompt is None else Prompt.of_user(config.prompt)
    dtype = _dtype(config, card)
    spec = EngineSpec(
        kind=config.engine,
        model=model,
        weights=weights,
        capacity=config.batch_size,
        room_for=(prompt.text, config.decoding.max_new_tokens),
        dtype=dtype,
        kv_dtype=config.kv_dtype,
        threads=config.threads_per_actor,
        use_gpu=config.gpus_per_actor > 0,
        fake=FakeOptions(**config.fake.model_dump()),
    )
    fingerprint = {
        "model": model,
        "prompt": f"{prompt.id}: {prompt.text}",
        **_shape_fields(images),
        "fast_decode": config.fast_decode,
        "dtype": dtype,
        # Only where it is given, so that runs of versions without it can be resumed.
        **({"kv_dtype": config.kv_dtype} if config.kv_dtype != "auto" else {}),
        # Another engine's sampler draws other numbers, and its kernels break ties another way.
        "engine": config.engine,
        **{f"decoding.{key}": value for key, value in config.decoding.model_dump().items()},
        **{f"gate.{key}": value for key, value in config.gate.model_dump().items()},
    }
    rules = CaptionRules(prompt, *_sampling(config.decoding), GateRules(**config.gate.model_dump()))
    return CaptionJob(config, spec, rules, images, fingerprint)


def _dtype(config: CaptionConfig, card: ModelCard | None) -> Dtype:
    """Resolves the dtype. A run that has begun keeps what `auto` was there, on any machine."""
    if config.dtype == "auto" and os.path.isfile(RunFolder(config.out).settings):
        kept: Dtype | None = read_settings(config.out).get("fingerprint", {}).get("dtype")
        if kept:
            return kept
    return resolve_dtype(config.dtype, card.weight_bytes if card else 0, config.gpus_per_actor > 0)


def _image_shape(config: CaptionConfig, card: ModelCard | None) -> ImageShape:
    """Returns the shape of the images that the engine takes. card: none for the fake engine."""
    if config.max_pixels and not (card and isinstance(card.images, WholeImages)):
        raise UserError(
            f"{config.max_pixels:,} is refused: the {config.engine} engine takes squares of its model, "
            f"leave `max_pixels` out",
            field="max_pixels",
        )
    if card is None:
        return SquareImages(config.fake.image_side, config.protocol or "squash")
    if isinstance(card.images, WholeImages):
        if config.protocol:
            raise UserError(
                f"{config.protocol} is refused: the model's own processor shapes the images that the "
                f"{config.engine} engine takes, leave `protocol` out",
                field="protocol",
            )
        return WholeImages(config.max_pixels or card.images.max_pixels)
    return replace(card.images, protocol=config.protocol or card.images.protocol)


def _shape_fields(images: ImageShape) -> dict[str, Any]:
    """Returns the fields of the fingerprint that say how images are shaped."""
    if isinstance(images, WholeImages):
        return {"max_pixels": images.max_pixels}
    return {"protocol": images.protocol, "image_size": images.side}


def _sampling(decoding: Decoding) -> tuple[SamplingParams, SamplingParams]:
    """Returns the sampling of the first try and of the one retry."""
    first = SamplingParams(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        repetition_penalty=decoding.repetition_penalty,
    )
    return first, replace(first, temperature=decoding.retry_temperature, top_p=decoding.retry_top_p)


def _refuse_for_vllm(config: CaptionConfig) -> None:
    """Refuses what vLLM cannot do before an actor starts; a cluster's machines are not known here."""
    if config.address is None:
        require_vllm()
    if 0 < config.gpus_per_actor < 1:
        raise UserError(
            f"--gpus-per-actor is {config.gpus_per_actor:g}: a vllm engine takes the memory of a whole GPU, "
            f"give 1"
        )

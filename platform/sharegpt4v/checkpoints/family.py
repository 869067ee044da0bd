"""Which LLaVA a config.json describes: those with Llama and CLIP are converted, others refused by name.

Other families share tensor names with LLaVA-1.5 and would pass as it, but compute something else: Mistral
attends within a window, Qwen adds biases and chats in ChatML, LLaVA-NeXT cuts images into tiles.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharegpt4v.errors import UserError

_TYPES = ("llava_llama", "llava", "share4v")
_CLASSES = ("LlavaLlamaForCausalLM", "Share4VLlamaForCausalLM")
"""What released LLaVA-1.5 and ShareGPT4V say of themselves."""

_OTHERS = {
    "onevision": "LLaVA-OneVision",
    "next": "LLaVA-NeXT",
    "mistral": "LLaVA on Mistral",
    "mixtral": "LLaVA on Mixtral",
    "qwen": "LLaVA on Qwen",
    "mpt": "LLaVA on MPT",
    "gemma": "LLaVA on Gemma",
    "phi": "LLaVA on Phi",
}
"""Part of a model_type or class, and what people call the family."""

_TOWERS = ("clip_vision_model", "clip")


def check_released(path: Path, released: Mapping[str, Any]) -> None:
    """Raises UserError for a released config.json of another family than LLaVA-1.5's or ShareGPT4V's.

    A key that is missing is no fault: old releases lack some.
    """
    classes = released.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else classes
    for key, said, known in (
        ("model_type", released.get("model_type"), _TYPES),
        ("architectures", first, _CLASSES),
    ):
        if said is not None and said not in known:
            raise UserError(
                f"{path}: {key} is {said!r}{_family(said)}; LLaVA-1.5 and ShareGPT4V on Llama are converted, "
                f"which say {', '.join(known)}"
            )
    merge = released.get("mm_patch_merge_type")
    if merge not in (None, "flat"):
        raise UserError(
            f"{path}: mm_patch_merge_type is {merge!r}, this is LLaVA-NeXT; LLaVA-1.5 and ShareGPT4V are "
            "converted"
        )
    _check_window(path, released)


def check_transformers(path: Path, content: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json of transformers that is not of LLaVA with Llama and CLIP."""
    kind = content.get("model_type")
    if kind != "llava":
        raise UserError(
            f"{path}: model_type is {kind!r}{_family(kind)}; LLaVA-1.5 is converted, which says llava"
        )
    text, vision = content.get("text_config"), content.get("vision_config")
    for key, part, known in (("text_config", text, ("llama",)), ("vision_config", vision, _TOWERS)):
        said = part.get("model_type", known[0]) if isinstance(part, dict) else known[0]
        if said not in known:
            raise UserError(
                f"{path}: {key} is of {said!r}{_family(said)}; LLaVA-1.5 is converted, which has {known[0]}"
            )
    if isinstance(text, dict):
        _check_window(path, text)


def check_tower(path: Path, content: Mapping[str, Any]) -> None:
    """Raises UserError for a vision tower's config.json that is not CLIP's."""
    kind = content.get("model_type", _TOWERS[0])
    if kind not in _TOWERS:
        raise UserError(
            f"{path}: model_type is {kind!r}; LLaVA-1.5 and ShareGPT4V have {_TOWERS[0]}: give that folder",
            field="vision_tower",
        )


def _check_window(path: Path, text: Mapping[str, Any]) -> None:
    window = text.get("sliding_window")
    if window is not None and text.get("use_sliding_window", True):
        raise UserError(
            f"{path}: sliding_window is {window!r}, as in a LLaVA on Mistral; Llama has none, so "
            "the converted model would give other answers"
        )


def _family(said: object) -> str:
    families = [family for part, family in _OTHERS.items() if part in str(said).lower()]
    return f", this is {families[0]}" if families else ""

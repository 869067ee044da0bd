"""ShareGPT4V and LLaVA-1.5: the released layout <-> transformers' LLaVA.

Released: `model.*`, `lm_head` and `model.mm_projector.{0,2}.*` in one folder, the vision tower in another
(a CLIPVisionModel) or, as trainers leave it, inside as `model.vision_tower.vision_tower.*`.
Transformers: the names that vLLM and older versions read, `vision_tower.vision_model.*`,
`multi_modal_projector.linear_{1,2}.*`, `language_model.model.*` and `language_model.lm_head.*`; version 5
writes others for a model built from scratch, and these are read, too.
"""

import math
import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from sharegpt4v.checkpoints.reader import Checkpoint, TensorRef, dimensions, under_other_names
from sharegpt4v.checkpoints.released_config import config_errors, image_fields, read_released, text_config
from sharegpt4v.checkpoints.rules import Depth, Shapes, TensorRule, renamed
from sharegpt4v.errors import UserError

_RELEASED = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("vision_tower.vision_model.", "vision_model."),
)
"""Name in transformers' layout and in the released one."""

_WRITTEN = (
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?(?!lm_head)"), "language_model.model."),
    (re.compile(r"^(?:language_model\.)?lm_head\."), "language_model.lm_head."),
)
"""What transformers' versions call a part, and what we write."""

_TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_CLIP_TEXT = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$)")
_BLOCK = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.")
_DEPTH = {1024: 24}
"""Blocks at CLIP ViT-L's width, so that a whole last block that is missing is noticed."""

_INSIDE = "model.vision_tower.vision_tower."


def released_tensors(checkpoint: Checkpoint, tower: Checkpoint | None) -> dict[str, TensorRef]:
    """Returns both folders as one, the tower as `vision_model.*` wherever it was.

    Raises UserError when there is no vision tower, or two, or a tensor under two names.
    """
    own = under_other_names((name.removeprefix(_INSIDE), t) for name, t in checkpoint.tensors.items())
    inside = any(name.startswith("vision_model.") for name in own)
    if inside and tower:
        raise UserError(f"{checkpoint.folder} holds its own: leave it out", field="vision_tower")
    if inside:
        return own
    if tower is None:
        wanted = checkpoint.config().get("mm_vision_tower", "its CLIPVisionModel")
        raise UserError(f"{checkpoint.folder} has none: give a folder with {wanted}", field="vision_tower")
    return own | under_other_names(
        (f"vision_model.{name.removeprefix('vision_model.')}", stored)
        for name, stored in tower.tensors.items()
        if not _CLIP_TEXT.match(name)
    )


def transformers_tensors(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """Returns the tensors under the names that we write, whichever version of transformers wrote them.

    Raises UserError when two become one.
    """
    return under_other_names((written_name(name), stored) for name, stored in checkpoint.tensors.items())


def llava_config(
    checkpoint: Checkpoint, tower: Checkpoint | None, tensors: Mapping[str, TensorRef]
) -> LlavaConfig:
    """Returns transformers' configuration of a released checkpoint: `<image>`, `<pad>` follow its vocabulary.

    Raises UserError for values that make no model.
    """
    released = read_released(checkpoint)
    vocabulary = released["vocab_size"]
    with config_errors((tower or checkpoint).folder / "config.json"):
        vision = _vision_config(tower, tensors)
        with torch.device("meta"):
            CLIPVisionModel(vision)
        patches = (vision.image_size // vision.patch_size) ** 2
    with config_errors(checkpoint.folder / "config.json"):
        images = image_fields(released)
        config = LlavaConfig(
            vision_config=vision,
            text_config=text_config(released, padded(vocabulary), pad_token_id=vocabulary + 1),
            image_token_index=vocabulary,
            image_seq_length=patches + (images["vision_feature_select_strategy"] == "full"),
            **images,
        )
        _check_feature_layer(config)
    return config


def released_depths(config: LlavaConfig, tower: Checkpoint | None) -> list[Depth]:
    """Returns how many blocks each stack of a released checkpoint must have, and why."""
    vision = config.vision_config
    source = "by its config.json" if tower else f"assumed at width {vision.hidden_size}"
    return [
        Depth("model.layers.", config.text_config.num_hidden_layers, "by config.json"),
        Depth("vision_model.encoder.layers.", vision.num_hidden_layers, source),
    ]


def transformers_depths(config: LlavaConfig) -> list[Depth]:
    """Returns how many blocks each stack of transformers' layout must have."""
    return [
        Depth(prefix, part.num_hidden_layers, "by config.json")
        for prefix, part in (
            ("language_model.model.layers.", config.text_config),
            ("vision_tower.vision_model.encoder.layers.", config.vision_config),
        )
    ]


def padded(vocabulary: int) -> int:
    """Returns the rows of the table with `<image>` and `<pad>`: 32064 for 32000, a multiple of 64."""
    return -(-(vocabulary + 2) // 64) * 64


def to_transformers(config: LlavaConfig) -> list[TensorRule]:
    """Returns transformers' tensors from the released ones."""
    rules = []
    for name, shape in shapes(config).items():
        source = _released(name)
        if name in _TABLES:
            takes = {source: (config.image_token_index, shape[1])}
            rules.append(TensorRule(name, shape, takes, partial(_pad_rows, rows=shape[0])))
        else:
            rules.append(renamed(name, source, shape))
    return rules


def to_released(config: LlavaConfig) -> tuple[list[TensorRule], list[TensorRule]]:
    """Returns the released tensors from transformers': language model and projector, then the vision tower.

    Raises UserError when the added tokens are not the last ones of the table.
    """
    rows = config.image_token_index
    if padded(rows) != config.text_config.vocab_size:
        raise UserError(
            f"<image> is {rows} in a table of {config.text_config.vocab_size} rows; the released layout ends "
            f"before <image>, so the table must have {padded(rows)}"
        )
    language: list[TensorRule] = []
    tower: list[TensorRule] = []
    for name, shape in shapes(config).items():
        if name in _TABLES:
            takes = {name: shape}
            language.append(
                TensorRule(_released(name), (rows, shape[1]), takes, partial(_first_rows, rows=rows))
            )
        else:
            part = tower if name.startswith("vision_tower.") else language
            part.append(renamed(_released(name), name, shape))
    return language, tower


def unchanged(config: LlavaConfig) -> list[TensorRule]:
    """Returns transformers' tensors under the names that vLLM and older versions read."""
    return [renamed(name, name, shape) for name, shape in shapes(config).items()]


def shapes(config: LlavaConfig) -> Shapes:
    """Returns the shape of every tensor of the model under the name that we write."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {written_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_feature_layer(config: LlavaConfig) -> None:
    blocks, layers = config.vision_config.num_hidden_layers, config.vision_feature_layer
    for layer in layers if isinstance(layers, list) else [layers]:
        if not -blocks - 1 <= layer <= blocks:
            raise UserError(f"features are those of block {layer}, and the vision tower has {blocks} blocks")


def written_name(name: str) -> str:
    """Returns a parameter's name in a file that older versions of transformers and vLLM read."""
    for pattern, ours in _WRITTEN:
        if pattern.match(name):
            return pattern.sub(ours, name)
    return name


def _released(name: str) -> str:
    return next(theirs + name.removeprefix(ours) for ours, theirs in _RELEASED if name.startswith(ours))


def _vision_config(tower: Checkpoint | None, tensors: Mapping[str, TensorRef]) -> CLIPVisionConfig:
    if tower:
        config = tower.config()
        return CLIPVisionConfig.from_dict(config.get("vision_config", config))
    width, _, patch, _ = dimensions(tensors, "vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = dimensions(tensors, "vision_model.embeddings.position_embedding.weight", 2)
    mlp, _ = dimensions(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    blocks = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=_DEPTH.get(width, max(blocks) + 1),
        num_attention_heads=width // 64,  # CLIP's heads are 64 wide, which no tensor's shape shows
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )


def _pad_rows(table: Tensor, rows: int) -> Tensor:
    """Appends rows for the added tokens and the padding: the mean of all others.

    In the head that gives them the mean of all logits, which is never the best one; zeros could be.
    """
    out = table.new_empty(rows, table.shape[1])
    out[: len(table)] = table
    # In parts, because the whole table in float32 would be memory the size of a shard.
    total = torch.zeros(table.shape[1])
    for part in torch.split(table, 1024):
        total += part.float().sum(0)
    out[len(table) :] = total / len(table)
    return out


def _first_rows(table: Tensor, rows: int) -> Tensor:
    return table[:rows]

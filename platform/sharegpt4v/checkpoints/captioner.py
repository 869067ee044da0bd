"""Released Share-Captioner, both layouts, -> ours (reference, 4).

`Qformer.bert.*` is the layout of InternLM-XComposer v1, LoRA beside its language model's weights;
`Qformer.query` is the resampler's. Sizes are read from the tensors and from config.json. Numbers of heads are
in neither: they follow from the widths of heads in the published models.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2VisionConfig

from sharegpt4v.checkpoints.reader import Checkpoint, TensorRef, dimensions
from sharegpt4v.checkpoints.released_config import config_errors, read_released, text_config
from sharegpt4v.checkpoints.rules import Depth, TensorRule, renamed
from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import ShareCaptioner, ShareCaptionerConfig, sincos_positions

_HEAD = {"vision": 88, "qformer": 64, "resampler": 128}
"""Width of one attention head: EVA-ViT-g 1408 / 16, BERT 768 / 12, the resampler 4096 / 32."""

_DEPTH = {("visual_encoder.blocks.", 1408): 39, ("Qformer.bert.encoder.layer.", 768): 12}
"""Blocks at the published widths, so that a whole last block that is missing is noticed."""

CONTROLS = ("<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>")
"""Tokens of the prompt that a tokenizer must know; the second one ends an answer."""

_END_TOKENS = (2, 103028)
"""`</s>` and `<TOKENS_UNUSED_1>`, which ends an answer."""

_POSITIONS = "Qformer.pos_embed"
_ROWS = 256  # of a weight that are in float32 at once

_BLOCK = r"^vision_model\.encoder\.layers\.(\d+)\."
_NAMES = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
        (_BLOCK + r"layer_norm", r"visual_encoder.blocks.\1.norm"),
        (_BLOCK + r"self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
        (_BLOCK + r"self_attn\.", r"visual_encoder.blocks.\1.attn."),
        (_BLOCK, r"visual_encoder.blocks.\1."),
        (r"^vision_model\.post_layernorm\.", "ln_vision."),
        (r"^resampler\.", "Qformer."),
        (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
        (r"^qformer(\.encoder\.layer\.\d+\.\w*attention\.)attention\.", r"Qformer.bert\1self."),
        (r"^qformer\.", "Qformer.bert."),
        (r"^projection\.", "internlm_proj."),
        (r"^start_embedding$", "flag_image_start"),
        (r"^end_embedding$", "flag_image_end"),
        (r"^language_model\.", "internlm_model."),
    )
)
"""Our name, and the released one."""


def captioner_tensors(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """Returns the tensors but the resampler's positions. Raises UserError if these are not 2-D sin-cos."""
    kept = dict(checkpoint.tensors)
    if _POSITIONS in kept:
        _check_positions(kept)
        del kept[_POSITIONS]
    return kept


def captioner_config(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]) -> ShareCaptionerConfig:
    """Returns our configuration of a released checkpoint; the keys decide the sampler.

    Raises UserError for a tensor that gives a size and is missing, a width that heads do not divide, or
    values that make no model.
    """
    released = read_released(checkpoint)
    vocabulary = released["vocab_size"]
    with config_errors(checkpoint.folder / "config.json"):
        text = text_config(
            released,
            vocabulary,
            attention_bias=True,
            mlp_bias=False,
            eos_token_id=[token for token in _END_TOKENS if token < vocabulary],
            pad_token_id=2,  # the released -1 is not a row of the table
        )
    vision = _vision(tensors)
    is_qformer = any(name.startswith("Qformer.bert.") for name in tensors)
    sampler = _qformer(tensors, vision.hidden_size) if is_qformer else _resampler(tensors)
    return ShareCaptionerConfig(vision_config=vision, text_config=text, **sampler)


def _vision(tensors: Mapping[str, TensorRef]) -> Blip2VisionConfig:
    at = "visual_encoder."
    width, _, patch, _ = dimensions(tensors, f"{at}patch_embed.proj.weight", 4)
    _, positions, _ = dimensions(tensors, f"{at}pos_embed", 3)
    mlp, _ = dimensions(tensors, f"{at}blocks.0.mlp.fc1.weight", 2)
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=_depth(f"{at}blocks.", width, tensors),
        num_attention_heads=_heads("vision", width),
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )


def _qformer(tensors: Mapping[str, TensorRef], image_width: int) -> dict[str, Any]:
    at = "Qformer.bert.encoder.layer."
    _, queries, width = dimensions(tensors, "query_tokens", 3)
    mlp, _ = dimensions(tensors, f"{at}0.intermediate_query.dense.weight", 2)
    config = Blip2QFormerConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=_depth(at, width, tensors),
        num_attention_heads=_heads("qformer", width),
        encoder_hidden_size=image_width,
    )
    return {"sampler": "qformer", "num_queries": queries, "qformer_config": config}


def _resampler(tensors: Mapping[str, TensorRef]) -> dict[str, Any]:
    queries, width = dimensions(tensors, "Qformer.query", 2)
    heads = _heads("resampler", width)
    sizes = {"num_queries": queries, "resampler_width": width, "resampler_heads": heads}
    return {"sampler": "resampler", **sizes}


def depths(config: ShareCaptionerConfig) -> list[Depth]:
    """Returns how many blocks each stack must have, and why."""
    vision, text, qformer = config.vision_config, config.text_config, config.qformer_config
    stacks = [("visual_encoder.blocks.", vision)]
    if config.sampler == "qformer":
        stacks.append(("Qformer.bert.encoder.layer.", qformer))
    return [
        Depth("internlm_model.model.layers.", text.num_hidden_layers, "by config.json"),
        *(Depth(at, part.num_hidden_layers, f"assumed at width {part.hidden_size}") for at, part in stacks),
    ]


def to_ours(
    config: ShareCaptionerConfig, released: Mapping[str, Any], tensors: Mapping[str, TensorRef]
) -> list[TensorRule]:
    """Returns our tensors from the released ones, LoRA merged into its weights."""
    with torch.device("meta"):
        model = ShareCaptioner(config)
    rules = []
    for name, tensor in model.state_dict().items():
        source, shape = _released(name), tuple(tensor.shape)
        adapter = source.removesuffix("weight") + "lora_A.weight" if len(shape) == 2 else ""
        if source.endswith(".attn.qkv.bias"):
            part = (shape[0] // 3,)
            at = source.removesuffix("qkv.bias")
            rules.append(TensorRule(name, shape, {f"{at}q_bias": part, f"{at}v_bias": part}, _qkv_bias))
        elif adapter in tensors:
            rules.append(_merged(name, source, shape, _rank(adapter, released, tensors), _alpha(released)))
        else:
            rules.append(renamed(name, source, shape))
    return rules


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Returns W + scale * B A in W's dtype, computed in float32 over a few rows at a time.

    weight: (O, I). down: A, (r, I). up: B, (O, r). scale: alpha / r.
    """
    out = torch.empty_like(weight)
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        out[rows] = weight[rows].float() + scale * (up[rows].float() @ down.float())
    return out


def _merged(name: str, source: str, shape: tuple[int, ...], rank: int, alpha: float) -> TensorRule:
    at = source.removesuffix("weight")
    takes = {
        source: shape,
        f"{at}lora_A.weight": (rank, shape[1]),
        f"{at}lora_B.weight": (shape[0], rank),
    }
    return TensorRule(name, shape, takes, partial(merge, scale=alpha / rank))


def _rank(adapter: str, released: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> int:
    rank, _ = dimensions(tensors, adapter, 2)
    said = _lora(released).get("lora_r")
    if said not in (None, rank):
        raise UserError(f"{adapter} has rank {rank}, and config.json says lora_r {said}; copy both again")
    return rank


def _alpha(released: Mapping[str, Any]) -> float:
    alpha = _lora(released).get("lora_alpha")
    if alpha is None:
        raise UserError(
            "the checkpoint has LoRA tensors, but its config.json no internlm_lora.lora_alpha; copy the "
            "released config.json (the paper's models have 256)"
        )
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"internlm_lora.lora_alpha is {alpha!r} in config.json, a number above 0 is expected")
    return float(alpha)


def _lora(released: Mapping[str, Any]) -> Mapping[str, Any]:
    lora = released.get("internlm_lora") or {}
    if not isinstance(lora, dict):
        raise UserError(f"internlm_lora is {lora!r} in config.json; copy the released one")
    return lora


def _released(name: str) -> str:
    for pattern, theirs in _NAMES:
        if pattern.match(name):
            return pattern.sub(theirs, name)
    return name


def _depth(prefix: str, width: int, tensors: Mapping[str, TensorRef]) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    return _DEPTH.get((prefix, width), max(int(number) for number in numbers if number.isdecimal()) + 1)


def _heads(part: str, width: int) -> int:
    if width % _HEAD[part]:
        raise UserError(f"the {part} is {width} wide, which heads of {_HEAD[part]} do not divide")
    return width // _HEAD[part]


def _qkv_bias(query: Tensor, value: Tensor) -> Tensor:
    return torch.cat([query, torch.zeros_like(query), value])


def _check_positions(tensors: Mapping[str, TensorRef]) -> None:
    """Raises UserError if stored positions differ from computed ones by over bfloat16's step at 1."""
    queries, _ = dimensions(tensors, "Qformer.query", 2)
    rows, width = dimensions(tensors, _POSITIONS, 2)
    side = math.isqrt(queries)
    if rows != queries:
        raise UserError(f"{_POSITIONS} has {rows} rows for {queries} queries; copy the checkpoint again")
    if (
        side**2 != queries
        or width % 4
        or not torch.allclose(
            tensors[_POSITIONS].read().float(), sincos_positions(side, width), rtol=0, atol=2**-8
        )
    ):
        raise UserError(f"{_POSITIONS} is no 2-D sin-cos table, and ours computes one; it would be lost")

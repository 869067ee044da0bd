"""Both models computed from the released tensors with torch functions alone, no module and no converter.

Written from the papers and the public release's description: what the converted models are held to.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.checkpoints.released import (
    EVA,
    HEADS,
    LORA_ALPHA,
    LORA_RANK,
    QUERIES,
    RESAMPLER_WIDTH,
    ROPE_THETA,
    TOWER,
    Tensors,
)

IMAGE = -200
"""How the released code marks an image among token ids."""


def linear(x: Tensor, t: Tensors, name: str) -> Tensor:
    """With the LoRA branch beside it, unmerged, where there is one."""
    y = F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))
    if f"{name}.lora_A.weight" in t:
        low = F.linear(x, t[f"{name}.lora_A.weight"])
        y = y + F.linear(low, t[f"{name}.lora_B.weight"]) * (LORA_ALPHA / LORA_RANK)
    return y


def norm(x: Tensor, t: Tensors, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """(B, T, W) each; softmax(q k / sqrt(d)) v written out."""

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), float("-inf"))
    mixed: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return mixed


def llava_logits(t: Tensors, tower: Tensors, ids: list[int], pixels: Tensor) -> Tensor:
    """Released ShareGPT4V. ids: one dialogue, IMAGE where the image goes. Returns (T, vocabulary)."""
    image = linear(clip_features(tower, pixels), t, "model.mm_projector.0")
    image = linear(F.gelu(image), t, "model.mm_projector.2")[0]
    at, table = ids.index(IMAGE), t["model.embed_tokens.weight"]
    x = torch.cat([table[ids[:at]], image, table[ids[at + 1 :]]])
    return llama_logits(t, "", x[None])


def clip_features(t: Tensors, pixels: Tensor) -> Tensor:
    """After the last block but one, without the class token: (B, patches, width)."""
    at, heads = "vision_model.", TOWER["heads"]
    patches = F.conv2d(pixels, t[f"{at}embeddings.patch_embedding.weight"], stride=TOWER["patch"])
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([t[f"{at}embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(x + t[f"{at}embeddings.position_embedding.weight"], t, f"{at}pre_layrnorm", 1e-5)
    for block in range(TOWER["blocks"] - 1):
        b = f"{at}encoder.layers.{block}."
        h = norm(x, t, f"{b}layer_norm1", 1e-5)
        q, k, v = (linear(h, t, f"{b}self_attn.{name}_proj") for name in "qkv")
        x = x + linear(attention(q, k, v, heads), t, f"{b}self_attn.out_proj")
        h = linear(norm(x, t, f"{b}layer_norm2", 1e-5), t, f"{b}mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), t, f"{b}mlp.fc2")
    return x[:, 1:]


def llama_logits(t: Tensors, prefix: str, x: Tensor) -> Tensor:
    """(1, T, W) embeddings -> (T, vocabulary)."""
    layer = 0
    while f"{prefix}model.layers.{layer}.input_layernorm.weight" in t:
        at = f"{prefix}model.layers.{layer}."
        h = rms(x, t[f"{at}input_layernorm.weight"])
        q, k, v = (linear(h, t, f"{at}self_attn.{name}_proj") for name in "qkv")
        mixed = attention(rotate(q), rotate(k), v, HEADS, causal=True)
        x = x + linear(mixed, t, f"{at}self_attn.o_proj")
        h = rms(x, t[f"{at}post_attention_layernorm.weight"])
        gated = F.silu(linear(h, t, f"{at}mlp.gate_proj")) * linear(h, t, f"{at}mlp.up_proj")
        x = x + linear(gated, t, f"{at}mlp.down_proj")
        layer += 1
    return F.linear(rms(x, t[f"{prefix}model.norm.weight"]), t[f"{prefix}lm_head.weight"])[0]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, first half against second half of each head."""
    heads = x.view(*x.shape[:-1], HEADS, -1)
    half = heads.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * ROPE_THETA ** -(torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(2)


def captioner_logits(t: Tensors, before: list[int], after: list[int], pixels: Tensor) -> Tensor:
    """Released Share-Captioner, the layout told by its tensors. Returns (T, vocabulary)."""
    patches = eva_features(t, pixels)
    image = resampled(t, patches) if "Qformer.query" in t else qformed(t, patches)
    table = t["internlm_model.model.embed_tokens.weight"]
    return llama_logits(t, "internlm_model.", torch.cat([table[before], image[0], table[after]])[None])


def eva_features(t: Tensors, pixels: Tensor) -> Tensor:
    """(B, 1 + patches, width)."""
    at = "visual_encoder."
    weight, bias = t[f"{at}patch_embed.proj.weight"], t[f"{at}patch_embed.proj.bias"]
    x = F.conv2d(pixels, weight, bias, stride=EVA["patch"]).flatten(2).transpose(1, 2)
    x = torch.cat([t[f"{at}cls_token"].expand(len(x), -1, -1), x], dim=1) + t[f"{at}pos_embed"]
    for block in range(EVA["blocks"]):
        b = f"{at}blocks.{block}."
        bias = torch.cat([t[f"{b}attn.q_bias"], torch.zeros(EVA["width"]), t[f"{b}attn.v_bias"]])
        h = norm(x, t, f"{b}norm1", 1e-6)
        q, k, v = F.linear(h, t[f"{b}attn.qkv.weight"], bias).chunk(3, -1)
        x = x + linear(attention(q, k, v, EVA["width"] // 88), t, f"{b}attn.proj")
        h = F.gelu(linear(norm(x, t, f"{b}norm2", 1e-6), t, f"{b}mlp.fc1"))
        x = x + linear(h, t, f"{b}mlp.fc2")
    return x


def resampled(t: Tensors, patches: Tensor) -> Tensor:
    """One cross-attention of the queries over the patches, class token aside, then the projection."""
    positions = sincos(int(QUERIES**0.5))
    side = EVA["image"] // EVA["patch"]
    grid = positions.T.reshape(1, RESAMPLER_WIDTH, int(QUERIES**0.5), -1)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    values = norm(F.linear(patches[:, 1:], t["Qformer.kv_proj.weight"]), t, "Qformer.ln_kv", 1e-6)
    keys = values + grid[0].flatten(1).T
    queries = norm(t["Qformer.query"], t, "Qformer.ln_q", 1e-6) + positions
    weights = t["Qformer.attn.in_proj_weight"].chunk(3)
    biases = t["Qformer.attn.in_proj_bias"].chunk(3)
    q, k, v = (
        F.linear(x, w, b) for x, w, b in zip((queries[None], keys, values), weights, biases, strict=True)
    )
    out = linear(attention(q, k, v, RESAMPLER_WIDTH // 128), t, "Qformer.attn.out_proj")
    return linear(out, t, "internlm_proj")


def sincos(side: int) -> Tensor:
    """(side * side, width): column in the first half, row in the second, each as sines then cosines."""
    quarter = RESAMPLER_WIDTH // 4
    frequencies = [1 / 10_000 ** (i / quarter) for i in range(quarter)]
    rows = []
    for y in range(side):
        for x in range(side):
            angles = [torch.tensor([place * f for f in frequencies]) for place in (x, y)]
            rows.append(torch.cat([part for a in angles for part in (a.sin(), a.cos())]))
    return torch.stack(rows)


def qformed(t: Tensors, patches: Tensor) -> Tensor:
    """ln_vision, the BERT layers, the projection, between the two flags."""
    bert = "Qformer.bert."
    image = norm(patches, t, "ln_vision", 1e-6)
    x = norm(t["query_tokens"], t, f"{bert}embeddings.LayerNorm", 1e-12)
    for layer in range(2):
        at = f"{bert}encoder.layer.{layer}."
        for name, source in (("attention", None), ("crossattention", image)):
            if f"{at}{name}.self.query.weight" not in t:
                continue
            other = x if source is None else source
            q = linear(x, t, f"{at}{name}.self.query")
            k, v = (linear(other, t, f"{at}{name}.self.{part}") for part in ("key", "value"))
            mixed = linear(attention(q, k, v, heads=2), t, f"{at}{name}.output.dense")
            x = norm(x + mixed, t, f"{at}{name}.output.LayerNorm", 1e-12)
        h = F.gelu(linear(x, t, f"{at}intermediate_query.dense"))
        x = norm(x + linear(h, t, f"{at}output_query.dense"), t, f"{at}output_query.LayerNorm", 1e-12)
    flags = t["flag_image_start"], t["flag_image_end"]
    return torch.cat([flags[0], linear(x, t, "internlm_proj"), flags[1]], dim=1)

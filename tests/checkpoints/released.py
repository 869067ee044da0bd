"""Checkpoints with the released names at reduced depth and width, random, on disk as released."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sharegpt4v.models.captioner import ImageSampler

Tensors = dict[str, Tensor]

WIDTH, MLP, LAYERS, HEADS = 64, 96, 2, 4  # language model of both families
TOWER = {"width": 64, "mlp": 80, "blocks": 3, "heads": 2, "image": 28, "patch": 14}
EVA = {"width": 176, "mlp": 100, "blocks": 2, "image": 56, "patch": 14}  # heads of 88
QUERIES, RESAMPLER_WIDTH, QFORMER_WIDTH = 4, 256, 128  # heads of 128 and of 64
QFORMER_LAYERS, QFORMER_MLP = 2, 192
LORA_RANK, LORA_ALPHA = 8, 12
DRAWN = True  # False: constants, where values do not matter and gigabytes of them take minutes to draw
ROPE_THETA = 50000.0  # not the default, so that a converter that forgets it is noticed


class Random:
    """Weights of about the size training gives them; norms near one."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def tensor(self, *shape: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
        if not DRAWN:
            return torch.full(shape, mean + std, dtype=self.dtype)
        return (torch.randn(shape, generator=self.generator) * std + mean).to(self.dtype)

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> Tensors:
        weight = {f"{name}.weight": self.tensor(outputs, inputs, std=inputs**-0.5)}
        return weight | ({f"{name}.bias": self.tensor(outputs)} if bias else {})

    def norm(self, name: str, width: int) -> Tensors:
        return {f"{name}.weight": self.tensor(width, mean=1.0), f"{name}.bias": self.tensor(width)}


def _llama(random: Random, prefix: str, vocabulary: int, bias: bool) -> Tensors:
    """`prefix`model.* and `prefix`lm_head, with the tables of rotary angles that old versions stored."""
    tensors = {f"{prefix}model.embed_tokens.weight": random.tensor(vocabulary, WIDTH)}
    for layer in range(LAYERS):
        at = f"{prefix}model.layers.{layer}."
        for projection in "qkvo":
            tensors |= random.linear(f"{at}self_attn.{projection}_proj", WIDTH, WIDTH, bias)
        tensors |= random.linear(f"{at}mlp.gate_proj", WIDTH, MLP, bias=False)
        tensors |= random.linear(f"{at}mlp.up_proj", WIDTH, MLP, bias=False)
        tensors |= random.linear(f"{at}mlp.down_proj", MLP, WIDTH, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = random.tensor(WIDTH, mean=1.0)
        tensors[f"{at}self_attn.rotary_emb.inv_freq"] = torch.ones(WIDTH // HEADS // 2)
    tensors[f"{prefix}model.norm.weight"] = random.tensor(WIDTH, mean=1.0)
    tensors[f"{prefix}lm_head.weight"] = random.tensor(vocabulary, WIDTH)
    return tensors


def _language_config(vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": vocabulary,
    }


def llava_tensors(vocabulary: int = 320, dtype: torch.dtype = torch.float32) -> Tensors:
    """Language model and projector of a released ShareGPT4V or LLaVA-1.5."""
    random = Random(0, dtype)
    tensors = _llama(random, "", vocabulary, bias=False)
    tensors |= random.linear("model.mm_projector.0", TOWER["width"], WIDTH)
    return tensors | random.linear("model.mm_projector.2", WIDTH, WIDTH)


def tower_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    """The CLIPVisionModel."""
    random, width, at = Random(1, dtype), TOWER["width"], "vision_model."
    positions = (TOWER["image"] // TOWER["patch"]) ** 2 + 1
    tensors = {
        f"{at}embeddings.class_embedding": random.tensor(width),
        f"{at}embeddings.patch_embedding.weight": random.tensor(width, 3, TOWER["patch"], TOWER["patch"]),
        f"{at}embeddings.position_embedding.weight": random.tensor(positions, width),
        f"{at}embeddings.position_ids": torch.arange(positions)[None],
        **random.norm(f"{at}pre_layrnorm", width),
        **random.norm(f"{at}post_layernorm", width),
    }
    for block in range(TOWER["blocks"]):
        layer = f"{at}encoder.layers.{block}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= random.linear(f"{layer}self_attn.{projection}", width, width)
        tensors |= random.linear(f"{layer}mlp.fc1", width, TOWER["mlp"])
        tensors |= random.linear(f"{layer}mlp.fc2", TOWER["mlp"], width)
        tensors |= random.norm(f"{layer}layer_norm1", width) | random.norm(f"{layer}layer_norm2", width)
    return tensors


def save_llava(folder: Path, tensors: Tensors, **more: Any) -> Path:
    """Two `.bin` shards and their index, config.json as released, a sentencepiece model."""
    vocabulary = len(tensors["model.embed_tokens.weight"])
    config = _language_config(vocabulary) | {
        "architectures": ["Share4VLlamaForCausalLM"],
        "model_type": "share4v",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": TOWER["width"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12",
        "pad_token_id": 0,
    }
    save_bins(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config | more))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces(vocabulary)))
    return folder


def save_tower(folder: Path, tensors: Tensors) -> Path:
    config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": TOWER["width"],
        "intermediate_size": TOWER["mlp"],
        "num_hidden_layers": TOWER["blocks"],
        "num_attention_heads": TOWER["heads"],
        "image_size": TOWER["image"],
        "patch_size": TOWER["patch"],
        "layer_norm_eps": 1e-5,
    }
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def captioner_tensors(
    sampler: ImageSampler, vocabulary: int = 320, dtype: torch.dtype = torch.float32, lora: bool | None = None
) -> Tensors:
    """A released Share-Captioner. lora: by default beside q, v, up and down of the qformer layout."""
    random, width = Random(2, dtype), EVA["width"]
    tensors = _eva(random) | _llama(random, "internlm_model.", vocabulary, bias=True)
    if sampler == "qformer":
        tensors |= _qformer(random) | random.norm("ln_vision", width)
        tensors |= random.linear("internlm_proj", QFORMER_WIDTH, WIDTH)
        for name in ("flag_image_start", "flag_image_end"):
            tensors[name] = random.tensor(1, 1, WIDTH)
    else:
        tensors |= _resampler(random) | random.linear("internlm_proj", RESAMPLER_WIDTH, WIDTH)
    if lora if lora is not None else sampler == "qformer":
        tensors |= _lora(random)
    return tensors


def _eva(random: Random) -> Tensors:
    width, positions = EVA["width"], (EVA["image"] // EVA["patch"]) ** 2 + 1
    tensors = {
        "visual_encoder.cls_token": random.tensor(1, 1, width),
        "visual_encoder.pos_embed": random.tensor(1, positions, width),
        "visual_encoder.patch_embed.proj.weight": random.tensor(width, 3, EVA["patch"], EVA["patch"]),
        "visual_encoder.patch_embed.proj.bias": random.tensor(width),
    }
    for block in range(EVA["blocks"]):
        at = f"visual_encoder.blocks.{block}."
        tensors |= random.norm(f"{at}norm1", width) | random.norm(f"{at}norm2", width)
        tensors |= random.linear(f"{at}attn.qkv", width, 3 * width, bias=False)
        tensors |= {f"{at}attn.{name}": random.tensor(width) for name in ("q_bias", "v_bias")}
        tensors |= random.linear(f"{at}attn.proj", width, width)
        tensors |= random.linear(f"{at}mlp.fc1", width, EVA["mlp"])
        tensors |= random.linear(f"{at}mlp.fc2", EVA["mlp"], width)
    return tensors


def _qformer(random: Random) -> Tensors:
    width, bert = QFORMER_WIDTH, "Qformer.bert."
    tensors = {"query_tokens": random.tensor(1, QUERIES, width)} | random.norm(
        f"{bert}embeddings.LayerNorm", width
    )
    tensors[f"{bert}embeddings.position_ids"] = torch.arange(512)[None]
    for layer in range(QFORMER_LAYERS):
        at = f"{bert}encoder.layer.{layer}."
        for attention in ("attention", "crossattention")[: 2 - layer % 2]:
            source = EVA["width"] if attention == "crossattention" else width
            tensors |= random.linear(f"{at}{attention}.self.query", width, width)
            tensors |= random.linear(f"{at}{attention}.self.key", source, width)
            tensors |= random.linear(f"{at}{attention}.self.value", source, width)
            tensors |= random.linear(f"{at}{attention}.output.dense", width, width)
            tensors |= random.norm(f"{at}{attention}.output.LayerNorm", width)
        tensors |= random.linear(f"{at}intermediate_query.dense", width, QFORMER_MLP)
        tensors |= random.linear(f"{at}output_query.dense", QFORMER_MLP, width)
        tensors |= random.norm(f"{at}output_query.LayerNorm", width)
    return tensors


def _resampler(random: Random) -> Tensors:
    width = RESAMPLER_WIDTH
    return {
        "Qformer.query": random.tensor(QUERIES, width),
        **random.linear("Qformer.kv_proj", EVA["width"], width, bias=False),
        "Qformer.attn.in_proj_weight": random.tensor(3 * width, width, std=width**-0.5),
        "Qformer.attn.in_proj_bias": random.tensor(3 * width),
        **random.linear("Qformer.attn.out_proj", width, width),
        **random.norm("Qformer.ln_q", width),
        **random.norm("Qformer.ln_kv", width),
    }


def _lora(random: Random) -> Tensors:
    tensors: Tensors = {}
    sizes = {"self_attn.q": (WIDTH, WIDTH), "self_attn.v": (WIDTH, WIDTH), "mlp.up": (WIDTH, MLP)}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in (sizes | {"mlp.down": (MLP, WIDTH)}).items():
            at = f"internlm_model.model.layers.{layer}.{name}_proj."
            tensors |= random.linear(f"{at}lora_A", inputs, LORA_RANK, bias=False)
            tensors |= random.linear(f"{at}lora_B", LORA_RANK, outputs, bias=False)
    return tensors


def save_captioner(folder: Path, tensors: Tensors, **more: Any) -> Path:
    vocabulary = len(tensors["internlm_model.model.embed_tokens.weight"])
    config = _language_config(vocabulary) | {
        "architectures": ["InternLMXComposerForCausalLM"],
        "model_type": "InternLMXComposer",
        "internlm_lora": {"lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.05},
        "pad_token_id": -1,
        "torch_dtype": "float16",
    }
    save_bins(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config | more))
    extra = ("<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces(vocabulary, extra)))
    return folder


def save_bins(folder: Path, tensors: Tensors) -> None:
    """Two halves as torch.save writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def save_safetensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same weights in one file; takes the place of the `.bin` shards."""
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def pieces(number: int, extra: tuple[str, ...] = ()) -> list[tuple[str, float, int]]:
    """Text, score and type: control pieces, 256 bytes, letters, then pairs of earlier pieces."""
    table = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    table += [(text, 0.0, 4) for text in extra]
    table += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    words = [
        "\u2581",
        "x",
        *"0123456789",
        "a",
        "b",
        "t",
        "\u2581a",
        "ab",
        "ta",
        "\u2581t",
        "abt",
        "\u2581ab",
        "tata",
        "aa",
    ]
    words += [f"x{index}" for index in range(number)]
    for rank, word in enumerate(words[: number - len(table)]):
        table.append((word, -float(rank), 1))
    return table


def sentencepiece_model(
    table: list[tuple[str, float, int]], prefix: bool = True, kind: int = 2, rewrites: bytes = b""
) -> bytes:
    """ModelProto: pieces, trainer_spec.model_type (2: BPE), normalizer_spec's table and add_dummy_prefix."""

    def varint(value: int) -> bytes:
        head = bytes([value & 127 | (128 if value > 127 else 0)])
        return head + (varint(value >> 7) if value > 127 else b"")

    def block(number: int, data: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(data)) + data

    out = b"".join(
        block(1, block(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(piece))
        for text, score, piece in table
    )
    normaliser = block(2, rewrites) + b"\x18" + varint(int(prefix))
    return out + block(2, b"\x18" + varint(kind)) + block(3, normaliser)

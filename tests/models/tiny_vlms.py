"""Checkpoints of current vision-language families with small shapes and random weights, made on the spot."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sharegpt4v.checkpoints.card import TOY_CHAT
from sharegpt4v.checkpoints.metadata import find_tokenizer, read_llava_config, write_llava

_TEXTS = ["Describe this image in detail. A red square stands beside a green tree; naïve café, 漢字."] * 4

_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 32: vLLM has no smaller ones for CPUs
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # so that answers depend on what they are asked
}
_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}


def save_toy_llava(folder: Path) -> Path:
    """The toy chat model as `sharegpt4v convert` writes a folder: with processor and chat template."""
    folder.mkdir(parents=True)
    config = read_llava_config(TOY_CHAT)
    tokenizer = find_tokenizer(TOY_CHAT, config.text_config.vocab_size, {})
    write_llava(folder, config, torch.float16, tokenizer, None)
    shutil.copyfile(TOY_CHAT / "model.safetensors", folder / "model.safetensors")
    return folder


_CHAT = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save_qwen(folder: Path) -> Path:
    """Qwen2.5-VL: patches of all images in one tensor, positions of three axes.

    Its generation settings sample with a penalty, as those of the released models do.
    """
    tokenizer = _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    start, end, image, video = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    )
    config = Qwen2_5_VLConfig(
        text_config=_decoder(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
        vision_config=_TOWER
        | {
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 0], pad_token_id=0, do_sample=True, temperature=0.9, repetition_penalty=1.05
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 64).save_pretrained(folder)
    template = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def save_idefics(folder: Path) -> Path:
    """Idefics3, the family of SmolVLM: an image as tiles, their number by its shape."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _tokenizer(
        ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    )
    config = Idefics3Config(
        text_config=_decoder(tokenizer) | {"model_type": "llama"},
        vision_config=_TOWER
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    template = _CHAT.replace("IMAGE", "<image>")
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(folder)
    return folder


def _tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes as current models have, trained on a sentence; ids 0 to 2 are the usual three."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=tokens)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=tokens[1:],
    )


def _decoder(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return _DECODER | {
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }

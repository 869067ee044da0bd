"""A LLaVA-shaped model of about 100 M parameters with random weights: real shapes, no sense."""

import argparse
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sharegpt4v.toy.tokenizer import build_tokenizer


def llava_100m_config(vocabulary: int, image_token: int) -> LlavaConfig:
    """Returns 336 px in 576 image tokens, a decoder of 12 layers of width 768 and a tower of 6 of 384."""
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=336,
        patch_size=14,
        projection_dim=384,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def save_llava_100m(folder: Path) -> Path:
    """Writes the model and the toy tokenizer into a folder that `--model` takes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    image_token = tokenizer.get_vocab()["<image>"]
    model = LlavaForConditionalGeneration(llava_100m_config(len(tokenizer), image_token))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = save_llava_100m(parser.parse_args().folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()

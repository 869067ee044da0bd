"""ShareGPT4V on transformers' LLaVA classes: CLIP ViT-L/14 at 336 px, a two-layer projector, Vicuna v1.5.

Checkpoints load with `LlavaForConditionalGeneration.from_pretrained`, so there is no class of our own.
"""

from collections.abc import Callable

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from sharegpt4v.errors import UserError
from sharegpt4v.models.toy import toy_lmm_config


def vicuna_config(width: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """Returns Vicuna v1.5 (Llama-2 shape), `<image>` and `<pad>` added, the table padded to 32064 rows."""
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=32001,
    )


def llava_config(text: LlamaConfig) -> LlavaConfig:
    """Adds CLIP ViT-L/14-336 to a language model: 576 image tokens, the features of hidden_states[-2]."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",  # without the class token
        image_protocol="pad",  # SFT and inference pad to a square; pre-training crops
    )


PRESETS: dict[str, Callable[[], LlavaConfig]] = {
    "7b": lambda: llava_config(vicuna_config(4096, 11008, layers=32, heads=32)),
    "13b": lambda: llava_config(vicuna_config(5120, 13824, layers=40, heads=40)),
    "toy": toy_lmm_config,
}


def share_gpt4v_config(preset: str) -> LlavaConfig:
    """Returns the configuration of ShareGPT4V-7B, -13B or the toy model.

    Raises UserError for another name.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no model preset {preset!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[preset]()

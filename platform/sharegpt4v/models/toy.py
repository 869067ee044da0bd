"""Both model families at about a million parameters, with the same classes and layouts as the full size.

Token ids are those of the toy tokenizer (sharegpt4v.toy), which has fewer tokens than VOCAB_SIZE.
"""

from transformers import Blip2QFormerConfig, Blip2VisionConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig

from sharegpt4v.models.captioner import ImageSampler, ShareCaptionerConfig

IMAGE_SIZE = 48  # px, so that a shape of a scene is about 12 px wide
VOCAB_SIZE = 512
INIT_STD = 0.06  # the usual 0.02 suits widths of thousands; at 128 training takes twice as long
PAD, BOS, EOS = 0, 1, 2
ANSWER_END = 6  # <TOKENS_UNUSED_1>
IMAGE = 3  # <image>


def toy_text_config(eos_token_id: int | list[int], attention_bias: bool) -> LlamaConfig:
    """Returns three Llama layers, 128 wide, with a context for the longest captions of the hardest scenes."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        attention_bias=attention_bias,
        initializer_range=INIT_STD,
        bos_token_id=BOS,
        eos_token_id=eos_token_id,
        pad_token_id=PAD,
    )


def toy_captioner_config(sampler: ImageSampler = "resampler") -> ShareCaptionerConfig:
    """Returns Share-Captioner in either layout: 36 queries over 64 patches."""
    vision = Blip2VisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=6,
        initializer_range=INIT_STD,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        encoder_hidden_size=96,
    )
    return ShareCaptionerConfig(
        vision_config=vision,
        text_config=toy_text_config([EOS, ANSWER_END], attention_bias=True),
        qformer_config=qformer if sampler == "qformer" else None,
        sampler=sampler,
        num_queries=36,
        resampler_width=128,
        resampler_heads=4,
        initializer_range=INIT_STD,
    )


def toy_lmm_config() -> LlavaConfig:
    """Returns ShareGPT4V with 36 image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=96,
        initializer_range=INIT_STD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=toy_text_config(EOS, attention_bias=False),
        image_token_index=IMAGE,
        image_seq_length=36,
        vision_feature_layer=-2,
        image_protocol="squash",
        initializer_range=INIT_STD,
    )

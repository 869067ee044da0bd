"""Share-Captioner: EVA-ViT-g, a sampler that shortens the image to a fixed number of embeddings, InternLM.

One class for both published layouts; `config.sampler` chooses. `resampler` is the layout of the released
weights: one cross-attention layer, 256 queries, no ln_vision. `qformer` is the paper's
(InternLM-XComposer v1): ln_vision, a BERT-like Q-Former with 64 queries, a start and an end embedding.
The language model has the Llama shape with biases on q, k, v and o.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from sharegpt4v.errors import UserError

IMAGE_PLACEHOLDER = -1
"""Marks an image position in `input_ids`. It is not in the vocabulary, so no text is encoded to it."""

ImageSampler = Literal["resampler", "qformer"]


class ShareCaptionerConfig(PreTrainedConfig):
    """Vision, sampler and text sizes.

    num_queries: embeddings that the sampler computes from one image; a square number for the resampler.
    resampler_width, resampler_heads: the resampler's attention; not used by the qformer layout.
    """

    model_type = "share_captioner"
    sub_configs = {
        "vision_config": Blip2VisionConfig,
        "text_config": LlamaConfig,
        "qformer_config": Blip2QFormerConfig,
    }

    # Any: dicts when read from config.json, instances of the classes above after __post_init__.
    vision_config: Any = None
    text_config: Any = None
    qformer_config: Any = None
    sampler: str = "resampler"
    num_queries: int = 256
    resampler_width: int = 4096
    resampler_heads: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        # Built here, because transformers 5.17 and 5.23 build nested configurations in incompatible ways.
        for name, family in self.sub_configs.items():
            given = getattr(self, name)
            if isinstance(given, dict):
                setattr(self, name, family(**given))
            elif given is None and name != "qformer_config":
                setattr(self, name, family())
        super().__post_init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        """The number of embeddings of one image in the prompt; the qformer layout adds its start and end."""
        return self.num_queries + (2 if self.sampler == "qformer" else 0)


_START_SHARPNESS = 1.3
"""Scale of an untrained resampler's attention: about a third of a query's weight is on its own patches."""


def sincos_positions(side: int, width: int) -> Tensor:
    """Returns fixed 2-D positions, (side * side, width) float32: x in the first half, y in the second."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Interpolates (n * n, W) -> (side * side, W), bicubic: queries and keys on two grids share one space."""
    source = round(table.shape[0] ** 0.5)
    grid = table.reshape(1, source, source, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2)


class Resampler(nn.Module):
    """One cross-attention layer: learned queries on a square grid attend to the patches of the image.

    Parameter names follow the released checkpoint (query, kv_proj, ln_q, ln_kv, attn).
    """

    query_positions: Tensor
    key_positions: Tensor

    def __init__(self, config: ShareCaptionerConfig) -> None:
        super().__init__()
        vision, width = config.vision_config, config.resampler_width
        self.query_side = round(config.num_queries**0.5)
        if self.query_side**2 != config.num_queries:
            raise UserError(
                f"num_queries is {config.num_queries}; the resampler needs a square number, 256 say"
            )
        self.key_side = vision.image_size // vision.patch_size
        self.query = nn.Parameter(torch.zeros(config.num_queries, width))
        self.kv_proj = nn.Linear(vision.hidden_size, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, config.resampler_heads, batch_first=True)
        queries, keys = self.positions()
        self.register_buffer("query_positions", queries, persistent=False)
        self.register_buffer("key_positions", keys, persistent=False)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Computes positions of the queries (N, W) and, in the same coordinates, of the patches (K, W)."""
        queries = sincos_positions(self.query_side, self.query.shape[1])
        return queries, resize_positions(queries, self.key_side)

    def start_in_place(self, keys: Tensor) -> None:
        """Initialises attention so that every query attends to its own position in the image.

        keys: positions of the patches (K, W). With random projections attention is uniform at first, and
        training stalls until queries distinguish positions. So the first rows of each head's query and
        key projections are set to the directions in which positions differ most. This is our choice: the
        release does not describe its initialisation.
        """
        mean = keys.mean(dim=0)
        _, lengths, directions = torch.linalg.svd(keys - mean, full_matrices=False)
        rows = directions[:4] / lengths[:4, None] * len(keys) ** 0.5 * _START_SHARPNESS
        width, heads = keys.shape[1], self.attn.num_heads
        for first in range(0, 2 * width, width // heads):
            initialization.copy_(self.attn.in_proj_weight[first : first + 4], rows)
            initialization.copy_(self.attn.in_proj_bias[first : first + 4], -rows @ mean)

    def forward(self, patches: Tensor) -> Tensor:
        """Attends N queries to image features: (B, K, vision width) -> (B, N, width)."""
        values = self.ln_kv(self.kv_proj(patches))
        # Loading at half precision leaves computed buffers in float32.
        query_positions, key_positions = self.query_positions.to(values), self.key_positions.to(values)
        queries = (self.ln_q(self.query) + query_positions).expand(len(patches), -1, -1)
        sampled: Tensor = self.attn(queries, values + key_positions, values, need_weights=False)[0]
        return sampled


class ShareCaptioner(PreTrainedModel):
    """`image_features` turns pixels into embeddings of the language model; `forward` trains on both."""

    config_class = ShareCaptionerConfig
    base_model_prefix = "share_captioner"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["Blip2EncoderLayer", "LlamaDecoderLayer", "Resampler"]

    def __init__(self, config: ShareCaptionerConfig) -> None:
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.vision_model = Blip2VisionModel(config.vision_config)
        if config.sampler == "resampler":
            self.vision_model.set_submodule("post_layernorm", nn.Identity())
            self.resampler = Resampler(config)
            self.projection = nn.Linear(config.resampler_width, text_width)
        elif config.sampler == "qformer":
            if config.qformer_config is None:
                raise UserError(
                    "sampler is 'qformer' and there is no qformer_config; give a Blip2QFormerConfig"
                )
            width = config.qformer_config.hidden_size
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, width))
            self.qformer = Blip2QFormerModel(config.qformer_config)
            self.projection = nn.Linear(width, text_width)
            self.start_embedding = nn.Parameter(torch.zeros(1, 1, text_width))
            self.end_embedding = nn.Parameter(torch.zeros(1, 1, text_width))
        else:
            raise UserError(f"sampler is {config.sampler!r}; choose resampler or qformer")
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            initialization.trunc_normal_(module.query, std=0.02)
            # Positions are computed, not stored: loading leaves them uninitialised like a missing weight.
            queries, keys = module.positions()
            initialization.copy_(module.query_positions, queries)
            initialization.copy_(module.key_positions, keys)
            # It writes slices, which lack the flag that marks a tensor as loaded.
            if not getattr(module.attn.in_proj_weight, "_is_hf_initialized", False):
                module.start_in_place(keys)
        elif isinstance(module, ShareCaptioner) and module.config.sampler == "qformer":
            for parameter in (module.query_tokens, module.start_embedding, module.end_embedding):
                initialization.trunc_normal_(parameter, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.language_model.get_input_embeddings()
        return table

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Computes the embeddings that replace the image placeholders of a prompt.

        pixel_values: (B, 3, H, W) float, CLIP-normalised, H and W as in the vision configuration.
        Returns (B, image_tokens, text width): 256 for the released layout, 1 + 64 + 1 for the paper's.
        """
        patches = self.vision_model(pixel_values.to(self.dtype)).last_hidden_state
        if self.config.sampler == "resampler":
            # The grid of positions excludes the class token: 1,024 patches form a square, 1,025 do not.
            # [unknown] where the release drops it; its tensors do not show it, as this needs no parameter.
            features: Tensor = self.projection(self.resampler(patches[:, 1:]))
            return features
        queries = self.query_tokens.expand(len(patches), -1, -1)
        sampled = self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        start, end = (e.expand(len(patches), -1, -1) for e in (self.start_embedding, self.end_embedding))
        return torch.cat([start, self.projection(sampled), end], dim=1)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embeds (B, T) ids and (images, 3, H, W) pixels -> (B, T, D); images fill the placeholders in order.

        Raises UserError when placeholders and image embeddings differ in number.
        """
        slots = input_ids == IMAGE_PLACEHOLDER
        embeddings: Tensor = self.get_input_embeddings()(input_ids.masked_fill(slots, 0))
        images = 0 if pixel_values is None else len(pixel_values)
        wanted, given = int(slots.sum()), images * self.config.image_tokens
        if wanted != given:
            raise UserError(f"{wanted} image slots in the text, {given} embeddings from {images} images")
        if pixel_values is None:
            return embeddings
        return embeddings.masked_scatter(slots[..., None], self.image_features(pixel_values).to(embeddings))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes logits (B, T, vocabulary) and, given labels (B, T) with -100 where none, the loss.

        Other keywords (attention_mask, position_ids, logits_to_keep) go to the language model.
        """
        embeddings = self.embed(input_ids, pixel_values)
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=embeddings, labels=labels, **kwargs
        )
        return output


def share_captioner_7b(sampler: ImageSampler = "resampler") -> ShareCaptionerConfig:
    """Returns the full-size configuration: about 8.4 B parameters with the resampler.

    Sizes: released InternLM-XComposer and Share-Captioner. The resampler's width and heads are read from
    the tensors when released weights are converted; 4096 and 32 are the values that give 8.4 B.
    """
    resampler = sampler == "resampler"
    return ShareCaptionerConfig(
        vision_config=Blip2VisionConfig(image_size=448, initializer_range=0.02),
        text_config=LlamaConfig(
            vocab_size=103168,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            attention_bias=True,
            mlp_bias=False,
            bos_token_id=1,
            eos_token_id=[2, 103028],  # </s> and <TOKENS_UNUSED_1>, which ends an answer
            pad_token_id=2,  # the released -1 is not a row of the table
        ),
        qformer_config=None if resampler else Blip2QFormerConfig(encoder_hidden_size=1408),
        sampler=sampler,
        num_queries=256 if resampler else 64,
    )

"""Either model family as one module from a packed row to the sum of its cross entropy."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel

from sharegpt4v.models.adapter import Adapter, LmmAdapter
from sharegpt4v.templates import IGNORE_INDEX
from sharegpt4v.train.attention import PACKED, Segments
from sharegpt4v.train.collate import PackedRow

LOGITS_AT_ONCE = 128 * 2**20
"""Logits computed at a time: 0.5 GB in float32. 16,384 labels of a 103,168 word vocabulary would take 6.8."""


class PackedModel(nn.Module):
    """Computes the loss of packed rows; the parameters are those of `adapter.model`."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.model = adapter.model
        self._adapter = (adapter,)  # in a tuple: its modules are registered once, as `model`
        is_lmm = isinstance(adapter, LmmAdapter)
        text = self.model.config.text_config
        text._attn_implementation = PACKED
        decoder = self.model.model.language_model if is_lmm else self.model.language_model.model
        decoder.config._attn_implementation = PACKED

    @property
    def adapter(self) -> Adapter:
        return self._adapter[0]

    def forward(self, row: PackedRow) -> Tensor:
        """Returns the sum, not the mean, of the cross entropy over the row's labels, () float32.

        Only the workers together know the number of labels of the global batch, which it is divided by.
        """
        hidden = self.decoder(
            inputs_embeds=self._embed(row),
            position_ids=row.position_ids,
            use_cache=False,
            segments=Segments.of(row.segments, row.input_ids.device),
        ).last_hidden_state[0]
        wanted = row.labels[0, 1:]
        at = (wanted != IGNORE_INDEX).nonzero()[:, 0]
        if not len(at):  # a row without a label still takes part in every collective of the backward pass
            nothing: Tensor = self._head()(hidden[:1]).float().sum() * 0
            return nothing
        return self._cross_entropy(hidden[at], wanted[at])

    def _embed(self, row: PackedRow) -> Tensor:
        template = self.adapter.template
        slots = row.input_ids == template.image_token_id
        words: Tensor = self.decoder.get_input_embeddings()(row.input_ids.masked_fill(slots, 0))
        if len(row.pixels):
            features = self.adapter.image_features(self.adapter.normalise(row.pixels))
            if features.shape[0] * features.shape[1] != int(slots.sum()):
                raise ValueError(f"{int(slots.sum())} image slots, {tuple(features.shape[:2])} features")
            return words.masked_scatter(slots[..., None], features.to(words.dtype))
        # Text alone runs the tower too, or under ZeRO-3 other workers wait for its parameters for ever.
        side = self.adapter.image_size
        blank = torch.zeros((1, side, side, 3), dtype=torch.uint8, device=row.input_ids.device)
        return words + self.adapter.image_features(self.adapter.normalise(blank)).sum() * 0

    def _cross_entropy(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Sums the cross entropy in pieces, so that the logits never exist as a whole."""
        vocabulary: int = self.model.config.text_config.vocab_size
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        if len(wanted) <= rows:
            return self._piece(hidden, wanted)
        pieces = zip(torch.split(hidden, rows), torch.split(wanted, rows), strict=True)
        losses = [checkpoint(self._piece, h, w, use_reentrant=False) for h, w in pieces]
        return torch.stack(losses).sum()

    def _piece(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._head()(hidden).float(), wanted, reduction="sum")

    @property
    def decoder(self) -> LlamaModel:
        """The language model without its head."""
        lmm = isinstance(self.adapter, LmmAdapter)
        return self.model.model.language_model if lmm else self.model.language_model.model

    def _head(self) -> nn.Module:
        lmm = isinstance(self.adapter, LmmAdapter)
        head: nn.Module = self.model.lm_head if lmm else self.model.language_model.lm_head
        return head

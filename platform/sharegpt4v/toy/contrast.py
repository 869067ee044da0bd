"""Contrast of regions of images with phrases, which the vision of the foundation models is pre-trained by.

As CLIP is trained, each phrase against all others of the batch, but region by region: toy scenes differ in
what is where, and one vector for a whole image learns that slowly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sharegpt4v.toy.cells import Region

_WIDTH = 64
"""Of the space in which regions and phrases are compared."""

_START_SCALE = 10.0


class RegionContrast(nn.Module):
    """Projections of regions and phrases, and the temperature. Not a part of the model that it trains."""

    def __init__(self, width: int, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> None:
        """Prepares for features `width` wide. vocabulary: ids that the tokenizer may give."""
        super().__init__()
        self.image = nn.Linear(width, _WIDTH, bias=False)
        self.text = nn.EmbeddingBag(vocabulary, _WIDTH, mode="sum")
        self.scale = nn.Parameter(torch.tensor(_START_SCALE).log())
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def forward(self, features: Tensor, found: Sequence[Sequence[Region]]) -> Tensor:
        """Computes the loss: cross entropy of every region over the phrases of the batch.

        features: (B, side * side, width), a square grid of patches or queries of each image. found: the
        regions of each image.
        """
        flat = [(image, region) for image, each in enumerate(found) for region in each]
        shares = coverage(torch.tensor([region.box for _, region in flat]), round(features.shape[1] ** 0.5))
        images = torch.tensor([image for image, _ in flat])
        # Not features[images]: with several threads the order in which its gradients are summed changes.
        pooled = torch.einsum("rp,rpd->rd", shares, features.index_select(0, images))
        phrases = sorted({region.phrase for _, region in flat})
        number = {phrase: n for n, phrase in enumerate(phrases)}
        logits = self.scale.exp() * _unit(self.image(pooled)) @ _unit(self._texts(phrases)).T
        return nn.functional.cross_entropy(logits, torch.tensor([number[r.phrase] for _, r in flat]))

    def _texts(self, phrases: Sequence[str]) -> Tensor:
        ids = [self._ids(phrase) for phrase in phrases]
        starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
        vectors: Tensor = self.text(torch.tensor([token for each in ids for token in each]), starts)
        return vectors

    def _ids(self, phrase: str) -> list[int]:
        if phrase not in self._known:
            self._known[phrase] = self._tokenizer.encode(f" {phrase}", add_special_tokens=False)
        return self._known[phrase]


def coverage(boxes: Tensor, side: int) -> Tensor:
    """Returns how much of each box lies in each cell of a grid: (R, 4) -> (R, side * side), rows sum to 1."""
    edges = torch.arange(side + 1, dtype=torch.float32) / side
    across = _overlap(boxes[:, 0], boxes[:, 2], edges)
    down = _overlap(boxes[:, 1], boxes[:, 3], edges)
    area = (down[:, :, None] * across[:, None, :]).flatten(1)
    return area / area.sum(dim=1, keepdim=True)


def _overlap(low: Tensor, high: Tensor, edges: Tensor) -> Tensor:
    """Returns the length that (R,) intervals share with each interval between edges: (R, edges - 1)."""
    length = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
    return length.clamp(min=0)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=-1)

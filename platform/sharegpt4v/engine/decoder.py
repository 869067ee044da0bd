"""A Llama decoder over slots: prefills new prompts and runs one decode step for all slots."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig

from sharegpt4v.engine import cpu_kernels
from sharegpt4v.engine.gpu_kernels import AttendLive, load_attend_live, load_kernels
from sharegpt4v.engine.graphs import Captured, CudaCapture, StepGraphs
from sharegpt4v.engine.llama import Attend, Heads, Kernels, Llama, Places, TorchKernels
from sharegpt4v.engine.prefill_attention import PrefillAttention, Span
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.slots import SlotCache, head_width, live_mask
from sharegpt4v.models.send import send


def prefill_bytes(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Computes the bytes of one layer's activations in a prefill, the most that is held beside the slots."""
    heads = int(config.num_attention_heads) + 2 * int(config.num_key_value_heads)
    a_token = 4 * int(config.hidden_size) + heads * head_width(config) + 3 * int(config.intermediate_size)
    return a_token * tokens * dtype.itemsize


class Decoder:
    """The language model with its static cache, and each slot's last token and its position on the device.

    A step feeds what the step before it chose, so that on a GPU the host only starts it.
    """

    def __init__(
        self,
        llama: Llama,
        sampler: TokenSampler,
        slots: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        stored: torch.dtype | None = None,
    ) -> None:
        """Allocates the slots.

        context: cells of a slot, the last one unused (`padded_context`). stored: the dtype of keys and values
        in the slots, that of the model by default.
        """
        self._llama = llama
        self._sampler = sampler
        self._device, self._dtype = device, dtype
        self.cache = SlotCache(llama.config, slots, context, stored or dtype, device)
        self._unused = context - 1
        self._attend_live: AttendLive | None = None
        self._kernels: Kernels = TorchKernels()
        # The first row holds tokens, the second whether their logits were numbers: copied to the host as one.
        self._picks = torch.zeros(2, slots, dtype=torch.long, device=device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=device)
        self._alive = torch.zeros(slots, dtype=torch.long, device=device)
        self._told: set[int] = set()  # slots that are alive on the device
        self._index = torch.arange(slots, device=device)
        # Logits of the last step, (slots, V) float32: as the model gave them, and as tokens were chosen.
        self.raw_logits = self.logits = torch.zeros(0, device=device)
        self._graphs: StepGraphs | None = None
        heads = llama.config.num_attention_heads
        if device.type == "cuda":
            self._attend_live = load_attend_live(self.cache, heads, dtype)
            self._kernels = load_kernels(self.cache, heads, dtype)
        elif device.type == "cpu":
            self._attend_live = cpu_kernels.load_attend_live(self.cache, heads, dtype)
            self._kernels = cpu_kernels.load_kernels(self.cache, heads, dtype)

    def prepare(self) -> None:
        """Captures the steps on a GPU, before the first request; otherwise does nothing."""
        if self._device.type == "cuda" and self._graphs is None:
            self.use_graphs(CudaCapture(self._device))

    def use_graphs(self, capture: Callable[[Callable[[], object]], Captured]) -> None:
        """Replays captured steps instead of starting their kernels one by one."""
        slots, context = len(self._positions), self.cache.keys[0].shape[2]
        self.logits = torch.zeros(slots, self._llama.config.vocab_size, device=self._device)
        self.raw_logits = torch.zeros_like(self.logits)
        self._graphs = StepGraphs(slots, context, self._step, capture, self._attend_live is None)

    def prefill(self, prompts: Sequence[tuple[Span, Tensor]]) -> Tensor:
        """Prefills embeddings (T, D) into their spans. Returns the logits after each span: (n, V)."""
        spans, hidden = [span for span, _ in prompts], torch.cat([part for _, part in prompts])
        return self._llama.logits(self._run(hidden, *self._of_spans(spans), self._ends(spans)))

    def _run(self, hidden: Tensor, places: Places, attend: Attend, keep: Tensor | None = None) -> Tensor:
        return self._llama.run(hidden, places, self.cache, attend, self._kernels, keep)

    def _ends(self, spans: Sequence[Span]) -> Tensor:
        """Returns the row of each span's last token in the packed ones."""
        return send([len(span) for span in spans], self._device).cumsum(0) - 1

    def _of_spans(self, spans: Sequence[Span]) -> tuple[Places, Attend]:
        """Returns where the packed tokens of spans go, and their attention."""
        positions = [position for span in spans for position in range(span.start, span.end)]
        slots = [span.slot for span in spans for _ in range(len(span))]
        stored = [span.stored for span in spans for _ in range(len(span))]
        cells = [cell if kept else self._unused for cell, kept in zip(positions, stored, strict=True)]
        places = Places(*send([positions, slots, cells], self._device, torch.long))
        return places, PrefillAttention(self.cache, spans, self._dtype, self._device)

    def score(self, slot: int, start: int, options: Sequence[Tensor]) -> list[Tensor]:
        """Computes logits (T, V) after each token of several continuations, embedded (T, D), of one slot.

        The slot holds `start` tokens, which all share; nothing is stored.
        """
        spans = [Span(slot, start, start + len(option), stored=False) for option in options]
        hidden = self._run(torch.cat(list(options)), *self._of_spans(spans))
        lengths = [len(span) for span in spans]
        return list(torch.split(self._llama.logits(hidden), lengths))

    def begin(self, slots: Sequence[int], picks: Tensor, positions: Sequence[int]) -> None:
        """Sets the last token of each slot, picks (2, n), and its position."""
        index = send(slots, self._device)
        self._picks[:, index] = picks
        self._positions[index] = send(positions, self._device)

    def move(self, source: int, target: int, length: int) -> None:
        """Moves a dialogue of `length` tokens into another slot."""
        self.cache.move(source, target, length)
        self._picks[:, target] = self._picks[:, source]
        self._positions[target] = self._positions[source]

    def step(self, positions: Mapping[int, int]) -> Tensor:
        """Feeds each slot's last token and chooses the next. positions: of that token, by slot.

        Returns (2, n) int64 up to the last slot, valid until the next step: tokens, and 1 where their logits
        were numbers. `logits` holds what they were chosen from.
        """
        rows = max(positions) + 1
        if self._graphs is None:
            return self.step_and_prefill(positions, ())[0]
        self._tell_alive(positions)
        self._graphs.run(rows, max(positions.values()) + 1)
        self._sampler.draw(self.logits, self._picks[0], {slot: slot for slot in positions})
        return self._picks[:, :rows]

    @property
    def joins(self) -> bool:
        """Whether a step and a prefill may be one pass over the weights: not where steps are captured."""
        return self._device.type == "cpu" and self._graphs is None

    def step_and_prefill(
        self, positions: Mapping[int, int], prompts: Sequence[tuple[Span, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Computes what `step` and `prefill` do in one pass, and returns what both return."""
        self._tell_alive(positions)
        rows = max(positions) + 1
        lengths = [positions.get(slot, 0) + 1 for slot in range(rows)]
        behind = self._step(rows, max(lengths), lengths, prompts)
        self._sampler.draw(self.logits, self._picks[0], {slot: slot for slot in positions})
        return self._picks[:, :rows], behind

    def _tell_alive(self, slots: Mapping[int, object]) -> None:
        if slots.keys() != self._told:
            alive = torch.zeros(len(self._alive), dtype=torch.long)
            alive[list(slots)] = 1
            self._alive.copy_(send(alive, self._device))
            self._told = set(slots)

    def _step(
        self,
        rows: int,
        live: int,
        lengths: Sequence[int] | None = None,
        prompts: Sequence[tuple[Span, Tensor]] = (),
    ) -> Tensor:
        """Computes a step of the first `rows` slots from and into tensors that stay; may be captured.

        Returns the logits behind the prompts that are prefilled with it.
        """
        index, ids, alive = self._index[:rows], self._picks[0, :rows], self._alive[:rows]
        # A slot that is not alive is free, or its request pauses: it reads one cell and keeps its state.
        positions = self._positions[:rows] * alive
        self._sampler.mark(index, ids)
        places = Places(positions, index, torch.where(alive > 0, positions, self._unused))
        attend = self._attention(positions, live, lengths)
        hidden, keep = self._llama.embed(ids), None
        if prompts:
            spans = [span for span, _ in prompts]
            theirs, prefill = self._of_spans(spans)
            hidden = torch.cat([hidden, *(part for _, part in prompts)])
            places = Places(*map(torch.cat, zip(places, theirs, strict=True)))
            attend, keep = _joined(attend, rows, prefill), torch.cat([index, self._ends(spans) + rows])
        logits, behind = self._llama.logits(self._run(hidden, places, attend, keep)).tensor_split([rows])
        if lengths is None:
            self.raw_logits[:rows].copy_(logits)
        else:
            self.raw_logits = self._sampler.unchanged(logits)
        tokens, numeric = self._sampler.greedy(logits, index, alive)
        if lengths is None:
            self.logits[:rows].copy_(logits)
        else:
            self.logits = logits
        self._picks[0, :rows], self._picks[1, :rows] = torch.where(alive > 0, tokens, ids), numeric
        self._positions[:rows].add_(alive)
        return behind

    def _attention(self, positions: Tensor, live: int, lengths: Sequence[int] | None) -> Attend:
        cache = self.cache
        if (attend_live := self._attend_live) is not None:
            return _over_slots(
                lambda layer, query: attend_live(query, cache.keys[layer], cache.values[layer], positions)
            )
        if lengths is not None and cache.better_apart(lengths):
            return _over_slots(lambda layer, query: cache.attend_each(layer, query, lengths))
        mask = live_mask(positions, live, self._dtype)
        return _over_slots(lambda layer, query: cache.attend(layer, query, mask))


def _over_slots(attend: Callable[[int, Tensor], Tensor]) -> Attend:
    def attend_heads(layer: int, heads: Heads, only_last: bool) -> Tensor:
        return attend(layer, heads.query[:, :, None]).flatten(1)

    return attend_heads


def _joined(attend: Attend, rows: int, attend_rest: Attend) -> Attend:
    """Returns the attention of a step of `rows` slots with other tokens behind them."""

    def attend_both(layer: int, heads: Heads, only_last: bool) -> Tensor:
        first, rest = (
            Heads(*parts) for parts in ((part[:rows] for part in heads), (part[rows:] for part in heads))
        )
        return torch.cat([attend(layer, first, only_last), attend_rest(layer, rest, only_last)])

    return attend_both

"""The torch engine: continuous batching over slots of a static key-value cache.

Requests wait in a queue. As slots fall free their prompts are prefilled in groups; one decode step then gives
every live slot its next token. A slot whose answer ends is refilled while the others go on, so that a short
caption never waits for a long one.
"""

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from sharegpt4v.dialogue import sampling_seed
from sharegpt4v.engine.batching import BatchingEngine
from sharegpt4v.engine.decoder import Decoder, prefill_bytes
from sharegpt4v.engine.failures import concerns_all, is_out_of_memory
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.running_request import RunningRequest
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.slots import bytes_per_slot, free_bytes, padded_context, slots_that_fit
from sharegpt4v.models.adapter import Adapter

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 8_192
"""Prompt tokens, padding included, that one prefill takes: bounds its memory and how long decoding stands."""

_PADDING = 1.25
"""Prompts are prefilled together while the longest is at most so many times the shortest."""

_FREE_SHARE = 16
"""While others decode, requests begin once one slot in so many is free: few idle, yet prefills in groups."""

_EMBED_AT_ONCE = 32
"""Images that go through the vision tower together, unless one request has more."""


class TorchEngine(BatchingEngine):
    """Runs one model on one device; at most `capacity` requests are in its slots at once.

    max_context: tokens of prompt and answer together that a slot has room for; the model's own by default.
    threads: CPU threads to compute with, torch's own number by default. They are the engine's: when another
    thread has computed with several as well, OpenMP counts more threads than cores, stops spinning, and a
    decode step on two cores takes nearly twice as long. Load the model with torch.set_num_threads(1).
    Raises UserError when memory holds no slot, ValueError for less than one thread, slot or token.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: str,
        capacity: int,
        max_context: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.model = model
        self._threads = torch.get_num_threads() if threads is None else threads
        if self._threads < 1:
            raise ValueError(f"threads is {threads}: an engine computes with one at least")
        if capacity < 1 or (max_context is not None and max_context < 1):
            raise ValueError(f"capacity is {capacity}, max_context {max_context}: both begin at 1")
        config = adapter.language_model.config
        context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
        slot = bytes_per_slot(config, padded_context(context), adapter.dtype)
        prefill = prefill_bytes(config, max(_PREFILL_TOKENS, context), adapter.dtype)
        self.capacity = slots_that_fit(capacity, slot, free_bytes(adapter.device), beside=prefill)
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d slots", self.capacity, capacity)
        super().__init__(adapter, self.capacity, context)
        self._open_slots(self.capacity)
        self._halved = False
        self._start("torch-engine")

    def _open_slots(self, count: int) -> None:
        adapter = self.adapter
        self._rows: list[RunningRequest | None] = [None] * count
        self._decoder = Decoder(
            adapter.language_model, count, padded_context(self._context), adapter.dtype, adapter.device
        )
        self._sampler = TokenSampler(count, adapter.eos_token_ids, adapter.device)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            super()._work()

    def _step(self) -> None:
        """Admits what may begin, then one token for every live slot."""
        try:
            self._admit()
            if any(self._rows):
                self._decode_step()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                self._suspect(error)
                return
        # Only here: inside the except block the traceback still holds what is to be given back.
        self._halve()

    # Admission

    def _admit(self) -> None:
        """Fills free slots. While others decode, a few must be free, so that prefills come in groups."""
        self._receive()
        if self._suspects:
            if not any(self._rows):
                suspects = self._suspects.popleft()
                self._begin(suspects, list(range(len(suspects))))
            return
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        group = max(1, len(self._rows) // _FREE_SHARE)
        if self._waiting and len(free) >= min(group, len(self._waiting)):
            count = min(len(free), len(self._waiting))
            self._begin([self._waiting.popleft() for _ in range(count)], free[:count])
        if not self._waiting:
            self._compact_slots()

    def _begin(self, handles: list[Handle], slots: list[int]) -> None:
        """Embeds and prefills requests, and gives each its first token."""
        start = time.perf_counter()
        self._beginning = handles
        handles = [handle for handle in handles if self._wanted(handle) and self._fits(handle)]
        prompts: list[tuple[Handle, Tensor]] = []
        for together in _by_images(handles):
            prompts += self._embed(together)
            # Told on the way: whoever watches the engine must see that it gets on.
            self._count(prefill_seconds=time.perf_counter() - start)
            start = time.perf_counter()
        for group in _groups(sorted(prompts, key=lambda prompt: len(prompt[1]))):
            self._prefill(group, slots[: len(group)])
            slots = slots[len(group) :]
        self._beginning = []
        self._count(prefill_seconds=time.perf_counter() - start)

    def _fits(self, handle: Handle) -> bool:
        """Whether the context has room for the prompt and an answer; fails the request otherwise."""
        try:
            self._prompt_tokens(handle)
        except Exception as error:  # text that no tokenizer takes among them
            self._fail(handle, error)
            return False
        return True

    def _embed(self, handles: list[Handle]) -> list[tuple[Handle, Tensor]]:
        """Prompts (T, D) of those that can be answered; the others fail, each for itself."""
        try:
            prompts = self.adapter.embed([handle.request for handle in handles])
        except Exception as error:
            if concerns_all(error):
                raise
            if len(handles) == 1:
                self._fail(handles[0], error)
                return []
            half = len(handles) // 2
            return self._embed(handles[:half]) + self._embed(handles[half:])
        return list(zip(handles, prompts, strict=True))

    def _prefill(self, group: list[tuple[Handle, Tensor]], slots: list[int]) -> None:
        """Puts embedded prompts into free slots, and gives each its first token."""
        for (handle, prompt), slot in zip(group, slots, strict=True):
            sampling = handle.request.sampling
            seed = sampling_seed(handle.request.id, 0) if sampling.seed is None else sampling.seed
            self._sampler.admit(slot, sampling, seed)
            limit = min(sampling.max_new_tokens, self._context - len(prompt))
            self._rows[slot] = RunningRequest(
                handle, len(prompt), limit, self.adapter.tokenizer, self.adapter.eos_token_ids
            )
        logits = self._decoder.prefill([prompt for _, prompt in group], slots)
        self._count(begun=len(group), prompt_tokens=sum(len(prompt) for _, prompt in group))
        self._take_tokens(logits, slots)
        now = time.monotonic()
        self._count(ttft_seconds=sum(now - handle.submitted for handle, _ in group))

    # Decoding

    def _decode_step(self) -> None:
        start = time.perf_counter()
        slots = [slot for slot, row in enumerate(self._rows) if row is not None]
        tokens, positions = [0] * (slots[-1] + 1), [0] * (slots[-1] + 1)
        for slot in slots:
            row = self._rows[slot]
            assert row is not None
            tokens[slot], positions[slot] = row.tokens[-1], row.position
        logits = self._decoder.step(tokens, positions)
        self._take_tokens(logits if len(slots) == len(tokens) else logits[slots], slots)
        self._count(
            slot_steps=len(self._rows), live_steps=len(slots), decode_seconds=time.perf_counter() - start
        )

    def _take_tokens(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Chooses the next token of each slot, and frees those whose answer is complete."""
        tokens, numeric = self._sampler.pick(logits, slots)
        ended = 0
        for slot, token, is_number in zip(slots, tokens, numeric, strict=True):
            row = self._rows[slot]
            assert row is not None
            try:
                if not is_number:
                    self._decoder.cache.clear(slot)  # 0 times NaN is NaN, even behind a mask
                    raise EngineError(f"the model's logits are not numbers after {len(row.tokens)} tokens")
                ended += row.take(token)
            except Exception as error:
                if concerns_all(error):
                    raise
                self._fail(row.handle, error)
            if row.handle.done():
                self._rows[slot] = None
        self._count(new_tokens=len(slots), requests=ended)

    def _compact_slots(self) -> None:
        """Moves the last rows into free slots when nothing waits for these: a step computes no gaps then."""
        live = [slot for slot, row in enumerate(self._rows) if row is not None]
        free = (slot for slot, row in enumerate(self._rows) if row is None)
        for target, source in zip(free, reversed(live), strict=False):
            if target >= source:
                break
            row = self._rows[source]
            assert row is not None
            self._decoder.cache.move(source, target, row.position)
            self._sampler.move(source, target)
            self._rows[target], self._rows[source] = row, None

    # Failures

    def _busy(self) -> int:
        return sum(row is not None for row in self._rows)

    def _running(self) -> Iterator[Handle]:
        return (row.handle for row in self._rows if row is not None)

    def _stop_running(self) -> None:
        self._rows = [None] * len(self._rows)

    def _halve(self) -> None:
        """Out of memory: goes on with half the slots, once. Raises EngineError the second time."""
        handles = self._unfinished()
        slots = len(self._rows) // 2
        if self._halved or not slots:
            raise EngineError(
                f"out of memory with {len(self._rows)} slots of {self._context} tokens: lower --batch-size"
            )
        log.warning("out of memory with %d slots: goes on with %d", len(self._rows), slots)
        self._halved = True
        # Suspects come back to the queue, too: their groups may be larger than what is left.
        self._waiting.extendleft(reversed([*handles, *chain(*self._suspects)]))
        self._suspects.clear()
        self._beginning = []
        del self._decoder, self._sampler
        gc.collect()
        if self.adapter.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open_slots(slots)
        self.capacity = slots
        self._stats = replace(self._stats, slots=slots)


def _by_images(handles: list[Handle]) -> Iterator[list[Handle]]:
    """Requests in order, as many together as one pass of the vision tower takes."""
    group: list[Handle] = []
    images = 0
    for handle in handles:
        images += len(handle.request.images)
        if group and images > _EMBED_AT_ONCE:
            yield group
            group, images = [], len(handle.request.images)
        group.append(handle)
    if group:
        yield group


def _groups(prompts: list[tuple[Handle, Tensor]]) -> Iterator[list[tuple[Handle, Tensor]]]:
    """Prompts by length, ascending, in groups that waste little on padding."""
    group: list[tuple[Handle, Tensor]] = []
    for handle, prompt in prompts:
        longest = len(prompt)
        if group and (longest > _PADDING * len(group[0][1]) or (len(group) + 1) * longest > _PREFILL_TOKENS):
            yield group
            group = []
        group.append((handle, prompt))
    if group:
        yield group

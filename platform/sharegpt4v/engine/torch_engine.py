"""The torch engine: batched generation over transformers modules.

This is the plain version: it gathers what waits in its queue, prefills it together, decodes it together, and
drops rows as they end. Any prompt an adapter can embed runs through the same loop.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import numpy as np
import torch
from transformers import DynamicCache

from sharegpt4v.engine.base import (
    Completion,
    EngineClosed,
    EngineError,
    EngineStats,
    Handle,
    Request,
    sampling_seed,
)
from sharegpt4v.engine.sampling import pick_tokens
from sharegpt4v.models.adapter import Adapter

_LINGER_SECONDS = 0.005
"""How long a batch that is not full waits for company: far below one caption, above one queue hop."""


@dataclass(slots=True)
class _Row:
    """One request in the running batch."""

    handle: Handle
    tokens: list[int]
    random: torch.Generator


class TorchEngine:
    """Runs one model on one device. `capacity` requests are worked on together."""

    def __init__(self, adapter: Adapter, model: str, capacity: int) -> None:
        self.adapter = adapter
        self.model = model
        self.image_size = adapter.image_size
        self.capacity = capacity
        self._queue: SimpleQueue[Handle | None] = SimpleQueue()
        self._stats = EngineStats()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        if self._closed.is_set():
            raise EngineClosed("the engine is closed")
        handle = Handle(request)
        self._queue.put(handle)
        return handle

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while batch := self._gather():
            self._answer(batch)
        while True:
            try:
                left = self._queue.get_nowait()
            except Empty:
                return
            if left is not None:
                left.fail(EngineClosed("the engine was closed before this request was finished"))

    def _gather(self) -> list[Handle]:
        """Waits for a first request, then a moment for others; empty once the engine is closed."""
        batch: list[Handle] = []
        deadline = None
        while len(batch) < self.capacity:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                handle = self._queue.get(timeout=timeout)
            except Empty:
                break
            if handle is None:
                for waiting in batch:
                    waiting.fail(EngineClosed("the engine was closed before this request was finished"))
                return []
            batch.append(handle)
            deadline = time.monotonic() + _LINGER_SECONDS
        return batch

    def _answer(self, batch: Sequence[Handle]) -> None:
        """A failure in company is run again one by one, so that only the request at fault fails."""
        try:
            with torch.inference_mode():
                self._generate(batch)
        except Exception as error:
            if len(batch) > 1:
                for handle in batch:
                    if not handle.done():
                        self._answer([handle])
                return
            self._stats = replace(self._stats, failed=self._stats.failed + 1)
            batch[0].fail(EngineError(f"{type(error).__name__}: {' '.join(str(error).split())}"))

    def _generate(self, batch: Sequence[Handle]) -> None:
        start = time.perf_counter()
        embeddings, mask = self._prefill_inputs(batch)
        cache = DynamicCache()
        model = self.adapter.language_model
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        rows = [_Row(handle, [], _generator(handle.request, embeddings.device)) for handle in batch]
        prefilled = time.perf_counter()
        position, steps, live_steps, new_tokens = positions[:, -1], 0, 0, 0
        while rows:
            tokens = self._next_tokens(out.logits[:, -1].float(), rows)
            new_tokens += len(rows)
            live = [i for i, row in enumerate(rows) if not self._ended(row)]
            if not live:
                break
            if len(live) < len(rows):
                keep = torch.tensor(live, device=tokens.device)
                cache.batch_select_indices(keep)
                rows = [rows[i] for i in live]
                tokens, mask, position = tokens[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            position = position + 1
            out = model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            steps, live_steps = steps + 1, live_steps + len(rows)
        self._stats = replace(
            self._stats,
            requests=self._stats.requests + len(batch),
            prompt_tokens=self._stats.prompt_tokens + int(positions[:, -1].sum()) + len(batch),
            new_tokens=self._stats.new_tokens + new_tokens,
            prefill_seconds=self._stats.prefill_seconds + prefilled - start,
            decode_seconds=self._stats.decode_seconds + time.perf_counter() - prefilled,
            slot_steps=self._stats.slot_steps + steps * self.capacity,
            live_steps=self._stats.live_steps + live_steps,
        )

    def _prefill_inputs(self, batch: Sequence[Handle]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of one batch, left-padded: embeddings (B, T, D) and mask (B, T) of ones and zeros.

        Requests with the same question share one call of the vision tower.
        """
        by_prompt: dict[str, list[int]] = {}
        for index, handle in enumerate(batch):
            by_prompt.setdefault(_only_question(handle.request), []).append(index)
        parts = {
            prompt: self.adapter.prompt_embeddings(
                np.stack([batch[i].request.images[0] for i in members]), prompt
            )
            for prompt, members in by_prompt.items()
        }
        longest = max(part.shape[1] for part in parts.values())
        some = next(iter(parts.values()))
        embeddings = some.new_zeros(len(batch), longest, some.shape[2])
        mask = torch.zeros(len(batch), longest, dtype=torch.long, device=some.device)
        for prompt, members in by_prompt.items():
            length = parts[prompt].shape[1]
            embeddings[members, longest - length :] = parts[prompt]
            mask[members, longest - length :] = 1
        return embeddings, mask

    def _next_tokens(self, logits: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        """Chooses one token a row and appends it: (B,) int64."""
        tokens = pick_tokens(
            logits,
            [row.handle.request.sampling for row in rows],
            [row.tokens for row in rows],
            [row.random for row in rows],
        )
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.tokens.append(token)
        return tokens

    def _ended(self, row: _Row) -> bool:
        """Finishes the request when its answer is complete."""
        stopped = row.tokens[-1] in self.adapter.eos_token_ids
        full = len(row.tokens) >= row.handle.request.sampling.max_new_tokens
        if row.handle.cancelled:
            row.handle.finish(Completion("", len(row.tokens), "cancelled"))
        elif stopped or full:
            kept = row.tokens[:-1] if stopped else row.tokens
            text = str(self.adapter.tokenizer.decode(kept, skip_special_tokens=True)).strip()
            row.handle.push(text)
            row.handle.finish(Completion(text, len(row.tokens), "stop" if stopped else "length"))
        return row.handle.done()


def _only_question(request: Request) -> str:
    if len(request.turns) != 1 or len(request.images) != 1:
        raise EngineError(
            f"this engine answers one question about one image; got {len(request.turns)} turns and "
            f"{len(request.images)} images"
        )
    return request.turns[0].text


def _generator(request: Request, device: torch.device) -> torch.Generator:
    seed = request.sampling.seed
    generator = torch.Generator(device=device)
    generator.manual_seed(sampling_seed(request.id, 0) if seed is None else seed)
    return generator

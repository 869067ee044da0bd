"""The torch engine: batched generation over transformers modules.

This is the plain version: it gathers what waits in its queue, prefills it together, decodes it together, and
drops rows as they end. Any prompt an adapter can embed runs through the same loop.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import Empty

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
    RequestQueue,
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
        self._queue = RequestQueue()
        self._stats = EngineStats()
        self._batch: list[Handle] = []  # what is being worked on
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        return self._queue.submit(request)

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        for handle in self._batch:
            handle.cancel()
        self._queue.close()
        self._thread.join()

    def _work(self) -> None:
        try:
            while batch := self._gather():
                self._batch = batch
                self._answer(batch)
        finally:
            # However this thread ends, nobody may go on waiting for it.
            self._queue.close()
            for handle in self._batch:
                handle.fail(EngineClosed("the engine ended before this request was finished"))

    def _gather(self) -> list[Handle]:
        """Waits for a first request, then a moment for others; empty once the engine is closed."""
        batch: list[Handle] = []
        deadline = None
        while len(batch) < self.capacity:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                handle = self._queue.take(timeout)
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
        except torch.AcceleratorError:
            raise  # the device is lost for this process, whoever's request it was
        except Exception as error:
            if len(batch) > 1:
                for handle in batch:
                    if not handle.done():
                        self._answer([handle])
                return
            self._count(failed=1)
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
        position = positions[:, -1]
        self._count(prompt_tokens=int(mask.sum()), prefill_seconds=time.perf_counter() - start)
        while True:
            start = time.perf_counter()
            tokens = self._next_tokens(out.logits[:, -1].float(), rows)
            live = [i for i, row in enumerate(rows) if not self._ended(row)]
            self._count(new_tokens=len(rows), requests=len(rows) - len(live))
            if not live:
                return
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
            seconds = time.perf_counter() - start
            self._count(slot_steps=self.capacity, live_steps=len(rows), decode_seconds=seconds)

    def _count(self, **more: float) -> None:
        """Adds to the statistics, step by step: whoever watches them sees that the engine gets on."""
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = replace(self._stats, **now)

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

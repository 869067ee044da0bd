"""The torch engine: continuous batching over slots of a static key-value cache.

Requests wait in a queue. As slots fall free their prompts are prefilled in groups; one decode step then gives
every live slot its next token. A slot whose answer ends is refilled while the others go on, so that a short
caption never waits for a long one.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

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
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.sampling import Sampler
from sharegpt4v.engine.slots import bytes_per_slot, free_bytes, slots_that_fit
from sharegpt4v.engine.text import TextStream, decode
from sharegpt4v.models.adapter import Adapter

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 8_192
"""Prompt tokens, padding included, that one prefill takes: bounds its memory and how long decoding stands."""

_PADDING = 1.25
"""Prompts are prefilled together while the longest is at most so many times the shortest."""

_EMBED_AT_ONCE = 32
"""Requests whose images go through the vision tower together."""

_SWEEP_SECONDS = 0.1
"""How often the queue is looked through for requests that were cancelled or whose time is over."""


@dataclass(slots=True, eq=False)
class _Row:
    """One request in its slot."""

    handle: Handle
    prompt_tokens: int
    limit: int  # new tokens, by the request and by the context
    tokens: list[int] = field(default_factory=list)
    stream: TextStream | None = None  # only where somebody streams, or a stop string must be seen

    @property
    def position(self) -> int:
        """Where the last token stands in the slot."""
        return self.prompt_tokens + len(self.tokens) - 1


class TorchEngine:
    """Runs one model on one device; at most `capacity` requests are in its slots at once.

    max_context: tokens of prompt and answer together that a slot has room for; the model's own by default.
    Raises UserError when memory holds no slot.
    """

    def __init__(self, adapter: Adapter, model: str, capacity: int, max_context: int | None = None) -> None:
        self.adapter = adapter
        self.model = model
        self.image_size = adapter.image_size
        config = adapter.language_model.config
        self._context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
        slot_bytes = bytes_per_slot(config, self._context, adapter.dtype)
        self.capacity = slots_that_fit(capacity, slot_bytes, free_bytes(adapter.device))
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d slots", self.capacity, capacity)
        self._open_slots(self.capacity)
        self._halved = False
        self._queue = RequestQueue()
        self._waiting: deque[Handle] = deque()
        self._beginning: list[Handle] = []  # on their way into slots
        self._suspects: deque[Handle] = deque()  # tried alone after a failure that may be anybody's
        self._swept = 0.0
        self._stats = EngineStats(slots=self.capacity)
        self._thread = threading.Thread(target=self._work, name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        return self._queue.submit(request)

    def stats(self) -> EngineStats:
        waiting = len(self._queue) + len(self._waiting) + len(self._suspects)
        return replace(self._stats, queued=waiting, running=sum(row is not None for row in self._rows))

    def close(self) -> None:
        self._queue.close()
        self._thread.join()

    def _open_slots(self, count: int) -> None:
        adapter = self.adapter
        self._rows: list[_Row | None] = [None] * count
        self._decoder = Decoder(adapter.language_model, count, self._context, adapter.dtype, adapter.device)
        self._sampler = Sampler(count, adapter.eos_token_ids, adapter.device)

    def _work(self) -> None:
        why = "the engine was closed before this request was finished"
        try:
            with torch.inference_mode():
                while not self._queue.closed:
                    self._turn()
        except Exception as error:
            log.exception("the engine's thread ends")
            why = f"the engine ended: {_one_line(error)}"
        finally:
            # However this thread ends, nobody may go on waiting for it.
            self._queue.close()
            for handle in (*self._unfinished(), *self._waiting, *self._suspects):
                handle.fail(EngineClosed(why))

    def _turn(self) -> None:
        """Admits what may begin, then one token for every live slot."""
        out_of_memory = False
        try:
            self._admit()
            if any(self._rows):
                self._step()
        except (torch.OutOfMemoryError, MemoryError):
            out_of_memory = (
                True  # room is made below: here the traceback still holds what is to be given back
            )
        except torch.AcceleratorError:
            raise  # the device is lost for this process, whoever's request it was
        except Exception as error:
            self._suspect(error)
        if out_of_memory:
            self._halve()

    # Admission

    def _admit(self) -> None:
        """Fills free slots. While others decode, a few must be free, so that prefills come in groups."""
        if not any(self._rows) and not self._waiting and not self._suspects:
            first = self._queue.take()
            if first is None:
                return
            self._waiting.append(first)
        self._waiting.extend(self._queue.take_all())
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            for queue in (self._waiting, self._suspects):
                kept = [handle for handle in queue if not self._left(handle, 0)]
                queue.clear()
                queue.extend(kept)
            self._swept = time.monotonic()
        if self._suspects:
            if not any(self._rows):
                self._begin([self._suspects.popleft()], [0])
            return
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        group = max(1, len(self._rows) // 8)
        if self._waiting and len(free) >= min(group, len(self._waiting)):
            count = min(len(free), len(self._waiting))
            self._begin([self._waiting.popleft() for _ in range(count)], free[:count])
        if not self._waiting:
            self._close_ranks()

    def _begin(self, handles: list[Handle], slots: list[int]) -> None:
        """Embeds and prefills requests, and gives each its first token."""
        start = time.perf_counter()
        self._beginning = handles
        handles = [handle for handle in handles if not self._left(handle, 0) and self._fits(handle)]
        prompts = []
        for first in range(0, len(handles), _EMBED_AT_ONCE):
            prompts += self._embed(handles[first : first + _EMBED_AT_ONCE])
            # Told on the way: whoever watches the engine must see that it gets on.
            self._count(prefill_seconds=time.perf_counter() - start)
            start = time.perf_counter()
        for group in _groups(sorted(prompts, key=lambda prompt: len(prompt[1]))):
            taken, slots = slots[: len(group)], slots[len(group) :]
            for (handle, prompt), slot in zip(group, taken, strict=True):
                self._rows[slot] = self._new_row(handle, len(prompt))
                request = handle.request
                seed = request.sampling.seed
                self._sampler.admit(
                    slot, request.sampling, sampling_seed(request.id, 0) if seed is None else seed
                )
            logits = self._decoder.prefill([prompt for _, prompt in group], taken)
            self._count(begun=len(group), prompt_tokens=sum(len(prompt) for _, prompt in group))
            self._take_tokens(logits, taken)
            now = time.monotonic()
            self._count(ttft_seconds=sum(now - handle.submitted for handle, _ in group))
        self._beginning = []
        self._count(prefill_seconds=time.perf_counter() - start)

    def _fits(self, handle: Handle) -> bool:
        """Whether the context has room for the prompt and an answer; fails the request otherwise."""
        try:
            tokens = self.adapter.prompt_tokens(handle.request.turns, len(handle.request.images))
        except Exception as error:
            self._fail(handle, _one_line(error))
            return False
        if tokens >= self._context:
            self._fail(
                handle,
                f"the prompt has {tokens} tokens and the context {self._context}: nothing is left "
                f"to answer in; shorten the dialogue, or send fewer images",
            )
            return False
        return True

    def _embed(self, handles: list[Handle]) -> list[tuple[Handle, Tensor]]:
        """Prompts (T, D) of those that can be answered; the others fail, each for itself."""
        try:
            prompts = self.adapter.embed([handle.request for handle in handles])
        except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if len(handles) == 1:
                self._fail(handles[0], _one_line(error))
                return []
            return [prompt for handle in handles for prompt in self._embed([handle])]
        return list(zip(handles, prompts, strict=True))

    def _new_row(self, handle: Handle, prompt_tokens: int) -> _Row:
        request = handle.request
        limit = min(request.sampling.max_new_tokens, self._context - prompt_tokens)
        watched = request.stream or request.sampling.stop
        stream = TextStream(self.adapter.tokenizer, request.sampling.stop, handle.shown) if watched else None
        return _Row(handle, prompt_tokens, limit, stream=stream)

    # Decoding

    def _step(self) -> None:
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
            if not is_number:
                self._fail(row.handle, f"the model's logits are not numbers after {len(row.tokens)} tokens")
                self._decoder.cache.clear(slot)  # 0 times NaN is NaN, even behind a mask
            else:
                row.tokens.append(token)
                try:
                    ended += self._settle(row)
                except Exception as error:  # of this answer's text alone
                    self._fail(row.handle, _one_line(error))
            if row.handle.done():
                self._rows[slot] = None
        self._count(new_tokens=len(slots), requests=ended)

    def _settle(self, row: _Row) -> bool:
        """Shows what a new token adds. Returns whether the answer is complete, and finishes it then."""
        handle, token = row.handle, row.tokens[-1]
        if self._left(handle, len(row.tokens)):
            return False
        ended = token in self.adapter.eos_token_ids
        if row.stream and not ended:
            piece = row.stream.add(token)
            if piece and handle.request.stream:
                handle.push(piece)
        stopped = ended or (row.stream is not None and row.stream.stopped)
        if not stopped and len(row.tokens) < row.limit:
            return False
        kept = row.tokens[:-1] if ended else row.tokens
        if row.stream:
            piece, text = row.stream.end(kept)
        else:
            piece = text = decode(self.adapter.tokenizer, kept)
        handle.push(piece if handle.request.stream else text)
        handle.finish(Completion(text, len(row.tokens), "stop" if stopped else "length"))
        return True

    def _left(self, handle: Handle, tokens: int) -> bool:
        """Ends a request that was cancelled, or whose time is over."""
        timeout = handle.request.timeout
        if handle.cancelled:
            handle.finish(Completion("", tokens, "cancelled"))
        elif timeout is not None and time.monotonic() - handle.submitted > timeout:
            self._fail(handle, f"not finished within its {timeout:g} s, after {tokens} tokens")
        return handle.done()

    def _close_ranks(self) -> None:
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

    def _fail(self, handle: Handle, message: str) -> None:
        self._count(failed=1)
        handle.fail(EngineError(message))

    def _suspect(self, error: Exception) -> None:
        """A step failed, and one request may be the reason: each is tried again, alone.

        Seeds make the answers the same again.
        """
        log.error("a step failed", exc_info=error)
        handles = self._unfinished()
        if not handles:
            raise error
        self._rows, self._beginning = [None] * len(self._rows), []
        if len(handles) == 1:
            self._fail(handles[0], _one_line(error))
        else:
            self._suspects.extend(handles)

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
        self._waiting.extendleft(reversed(handles))
        self._beginning = []
        del self._decoder, self._sampler
        gc.collect()
        if self.adapter.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open_slots(slots)
        self.capacity = slots
        self._stats = replace(self._stats, slots=slots)

    def _unfinished(self) -> list[Handle]:
        """What stands in slots or is on its way there."""
        handles = dict.fromkeys([*(row.handle for row in self._rows if row is not None), *self._beginning])
        return [handle for handle in handles if not handle.done()]

    def _count(self, **more: float) -> None:
        """Adds to the statistics, step by step: whoever watches them sees that the engine gets on."""
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = replace(self._stats, **now)


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


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"

"""The torch engine: continuous batching over slots of a static key-value cache.

Requests wait in a queue. As slots become free, prompts are prefilled into them in groups; one decode step
then gives every live slot its next token. A slot whose answer ends is refilled while the others continue, so
that a short caption never waits for a long one.
"""

import gc
import logging
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sharegpt4v.dialogue import Request, sampling_seed
from sharegpt4v.engine.decoder import Decoder, prefill_bytes
from sharegpt4v.engine.failures import concerns_all, is_out_of_memory
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.prefill_groups import PREFILL_TOKENS, embed_groups, prefill_groups
from sharegpt4v.engine.running_request import RunningRequest, answer_limit
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.slots import bytes_per_slot, free_bytes, padded_context, slots_that_fit
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.engine.worker import run_until_closed, start_thread
from sharegpt4v.models.adapter import Adapter

log = logging.getLogger(__name__)

_FREE_SHARE = 16
"""While others decode, requests begin once 1/16 of the slots are free: few are idle, prefills are grouped."""


class TorchEngine:
    """Runs one model on one device; at most `capacity` requests are in its slots at once.

    max_context: tokens of prompt and answer together that a slot holds; the model's own by default.
    threads: CPU threads to compute with, torch's own number by default. No other thread may compute with
    several: OpenMP would count more threads than cores and stop spinning, and a decode step on two cores
    would take nearly twice as long. So load the model with torch.set_num_threads(1).
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
        prefill = prefill_bytes(config, max(PREFILL_TOKENS, context), adapter.dtype)
        self.capacity = slots_that_fit(capacity, slot, free_bytes(adapter.device), beside=prefill)
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d slots", self.capacity, capacity)
        self.adapter = adapter
        self.image_size = adapter.image_size
        self._context = context
        self._halved = False
        self._scheduler = Scheduler(self.capacity, _group(self.capacity), concerns_all)
        self._open_slots(self.capacity)
        self._thread = start_thread("torch-engine", self._work)

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking. Raises EngineClosed once the engine is closed."""
        return self._scheduler.submit(request)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def close(self) -> None:
        """Fails unfinished requests with EngineClosed and joins the engine's thread."""
        self._scheduler.close()
        self._thread.join()

    def _open_slots(self, count: int) -> None:
        adapter = self.adapter
        self._decoder = Decoder(
            adapter.language_model, count, padded_context(self._context), adapter.dtype, adapter.device
        )
        self._sampler = TokenSampler(count, adapter.eos_token_ids, adapter.device)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            run_until_closed(self._scheduler, self._step)

    def _step(self) -> None:
        """Prefills the requests that may begin, then decodes one token for every live slot."""
        self._scheduler.receive()
        try:
            if admitted := self._scheduler.admit():
                self._begin(admitted)
            for source, target in self._scheduler.compact_slots():
                self._decoder.cache.move(source, target, self._scheduler.running[target].position)
                self._sampler.move(source, target)
            if self._scheduler.running:
                self._decode_step()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                self._scheduler.suspect(error)
                return
        # Only here: inside the except block the traceback still refers to the memory to be freed.
        self._halve()

    def _begin(self, admitted: Mapping[int, Handle]) -> None:
        """Embeds and prefills requests, by slot, and gives each its first token."""
        start = time.perf_counter()
        fitting = {slot: handle for slot, handle in admitted.items() if self._fits(slot, handle.request)}
        prompts: dict[int, Tensor] = {}
        for slots in embed_groups({slot: len(handle.request.images) for slot, handle in fitting.items()}):
            prompts |= self._embed({slot: fitting[slot] for slot in slots})
            # Counted after each group, so that a watchdog sees progress.
            self._scheduler.count(prefill_seconds=time.perf_counter() - start)
            start = time.perf_counter()
        for slots in prefill_groups({slot: len(prompt) for slot, prompt in prompts.items()}):
            self._prefill({slot: fitting[slot] for slot in slots}, [prompts[slot] for slot in slots])
        self._scheduler.count(prefill_seconds=time.perf_counter() - start)

    def _fits(self, slot: int, request: Request) -> bool:
        """Fails a request that does not fit the context; returns whether it fits."""
        try:
            tokens = self.adapter.prompt_tokens(request.turns)
            answer_limit(request, tokens, self._context)
        except Exception as error:  # also text that the tokenizer refuses
            self._scheduler.fail(slot, error)
            return False
        return True

    def _embed(self, handles: Mapping[int, Handle]) -> dict[int, Tensor]:
        """Embeds prompts: (T, D) by slot; requests that cannot be embedded fail, each with its own error."""
        try:
            prompts = self.adapter.embed([handle.request for handle in handles.values()])
        except Exception as error:
            if concerns_all(error):
                raise
            items = list(handles.items())
            if len(items) == 1:
                self._scheduler.fail(items[0][0], error)
                return {}
            half = len(items) // 2
            return self._embed(dict(items[:half])) | self._embed(dict(items[half:]))
        return dict(zip(handles, prompts, strict=True))

    def _prefill(self, handles: Mapping[int, Handle], prompts: Sequence[Tensor]) -> None:
        """Prefills embedded prompts into the slots of their requests and gives each its first token."""
        adapter, scheduler = self.adapter, self._scheduler
        for (slot, handle), prompt in zip(handles.items(), prompts, strict=True):
            request, sampling = handle.request, handle.request.sampling
            seed = sampling_seed(request.id, 0) if sampling.seed is None else sampling.seed
            self._sampler.admit(slot, sampling, seed)
            limit = answer_limit(request, len(prompt), self._context)
            scheduler.place(
                slot, RunningRequest(handle, len(prompt), limit, adapter.tokenizer, adapter.eos_token_ids)
            )
        logits = self._decoder.prefill(prompts, list(handles))
        scheduler.count(begun=len(prompts), prompt_tokens=sum(map(len, prompts)))
        self._take_tokens(logits, list(handles))
        now = time.monotonic()
        scheduler.count(ttft_seconds=sum(now - handle.submitted for handle in handles.values()))

    def _decode_step(self) -> None:
        start = time.perf_counter()
        running = self._scheduler.running
        slots = sorted(running)
        tokens, positions = [0] * (slots[-1] + 1), [0] * (slots[-1] + 1)
        for slot in slots:
            tokens[slot], positions[slot] = running[slot].tokens[-1], running[slot].position
        logits = self._decoder.step(tokens, positions)
        self._take_tokens(logits if len(slots) == len(tokens) else logits[slots], slots)
        self._scheduler.count(
            slot_steps=self.capacity, live_steps=len(slots), decode_seconds=time.perf_counter() - start
        )

    def _take_tokens(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Chooses the next token of each slot; logits (n, V), row i those of slots[i]."""
        scheduler = self._scheduler
        tokens, numeric = self._sampler.pick(logits, slots)
        for slot, token, is_number in zip(slots, tokens, numeric, strict=True):
            if is_number:
                scheduler.take(slot, token)
                continue
            self._decoder.cache.clear(slot)  # 0 times NaN is NaN, even behind a mask
            before = len(scheduler.running[slot].tokens)
            scheduler.fail(slot, EngineError(f"the model's logits are not numbers after {before} tokens"))
        scheduler.count(new_tokens=len(slots))

    def _halve(self) -> None:
        """Halves the slots, once, after a lack of memory. Raises EngineError the second time."""
        slots = self.capacity // 2
        if self._halved or not slots:
            raise EngineError(
                f"out of memory with {self.capacity} slots of {self._context} tokens: lower `batch_size`"
            )
        log.warning("out of memory with %d slots: goes on with %d", self.capacity, slots)
        self._halved = True
        self._scheduler.restart(slots, _group(slots))
        del self._decoder, self._sampler
        gc.collect()
        if self.adapter.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open_slots(slots)
        self.capacity = slots


def _group(slots: int) -> int:
    """Computes the free slots that are needed for requests to begin while others run."""
    return max(1, slots // _FREE_SHARE)

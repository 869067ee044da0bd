"""The transformers engine: any vision-language model by its own processor and generate(), in static batches.

Slower than the torch engine: a batch lasts until its longest answer has ended, and none begins meanwhile; the
cache of keys and values grows by copying, and nothing is compiled or captured.
"""

import gc
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sharegpt4v.dialogue import Turn, sampling_seed
from sharegpt4v.engine.failures import is_out_of_memory
from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.running_request import RunningRequest, answer_limit
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.scheduled import ScheduledEngine, refuse_likelihoods
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.static_batches import Prompt, choose_batch, join
from sharegpt4v.engine.worker import run_until_closed, start_thread
from sharegpt4v.models.vlm import Vlm

log = logging.getLogger(__name__)


class TransformersEngine(ScheduledEngine):
    """Runs one model on one device; at most `capacity` requests are in a batch.

    Tokens are chosen as in the torch engine, with the same random numbers; the repetition penalty counts
    generated tokens only. A cancelled or expired request, and the engine when it is closed, end between two
    tokens, not within a prefill. threads: CPU threads to compute with, torch's own number by default.

    Out of memory, it goes on with half of the batch's size; a request for which there is none alone fails.
    """

    def __init__(self, vlm: Vlm, model: str, capacity: int, threads: int | None = None) -> None:
        self.model = model
        self._threads = torch.get_num_threads() if threads is None else threads
        if self._threads < 1 or capacity < 1:
            raise ValueError(f"capacity is {capacity}, threads {self._threads}: both begin at 1")
        self.capacity = capacity
        self.vlm = vlm
        self.context = vlm.context
        self._sampler = TokenSampler(capacity, vlm.vocabulary, vlm.eos_token_ids, vlm.device)
        self._prompts: dict[int, Prompt] = {}  # by slot, in the order of their arrival; those that wait
        self._scheduler: Scheduler[RunningRequest] = Scheduler(
            capacity, concerns_all=_has_lost_the_device, released=self._sampler.release
        )
        self._thread = start_thread("transformers-engine", self._work)

    def count(self, turns: Sequence[Turn]) -> int:
        """Returns the tokens of a prompt, images included. Raises as Vlm.encode does."""
        return int(self.vlm.encode(turns)["input_ids"].shape[1])

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            run_until_closed(self._scheduler, self._step)

    def _step(self) -> None:
        """Encodes the requests that may begin, then answers a batch of them to its end."""
        self._scheduler.receive()
        slots: list[int] = []
        try:
            self._encode_admitted()
            if self._prompts:
                slots = choose_batch(self._prompts)
                self._answer([(slot, self._prompts.pop(slot)) for slot in slots])
            return
        except Exception as error:
            self._prompts.clear()
            if not is_out_of_memory(error) or len(slots) < 2:
                self._scheduler.suspect(error)
                return
        # Only here: inside the except block the traceback still refers to the memory to be freed.
        self._lower_capacity(len(slots))

    def _encode_admitted(self) -> None:
        """Encodes requests that have got a slot, and forgets those that have lost theirs meanwhile."""
        admitted = self._scheduler.admit()
        self._prompts = {
            slot: prompt for slot, prompt in self._prompts.items() if admitted.get(slot) is prompt.handle
        }
        for slot, handle in admitted.items():
            if slot in self._prompts:
                continue
            start = time.perf_counter()
            try:
                refuse_likelihoods(handle.request, "transformers")
                inputs = self.vlm.encode(handle.request.turns)
                limit = answer_limit(handle.request, inputs["input_ids"].shape[1], self.vlm.context)
            except Exception as error:
                self._scheduler.fail(slot, error)
                continue
            self._prompts[slot] = Prompt(handle, inputs, limit)
            # Counted one by one, so that a watchdog sees progress.
            self._scheduler.count(prefill_seconds=time.perf_counter() - start)

    def _answer(self, batch: Sequence[tuple[int, Prompt]]) -> None:
        """Generates the answers of a batch: prompts with their slots."""
        vlm, prompts = self.vlm, [prompt for _, prompt in batch]
        for slot, prompt in batch:
            handle, sampling = prompt.handle, prompt.handle.request.sampling
            seed = sampling_seed(handle.request.id, 0) if sampling.seed is None else sampling.seed
            self._sampler.admit(slot, sampling, seed)
            self._scheduler.place(
                slot, RunningRequest(handle, prompt.tokens, prompt.limit, vlm.tokenizer, vlm.eos_token_ids)
            )
        steps = _Steps(self._scheduler, self._sampler, [slot for slot, _ in batch], vlm.pad_token_id)
        vlm.model.generate(
            **join(prompts, vlm.pad_token_id, vlm.device),
            max_new_tokens=max(prompt.limit for prompt in prompts),
            do_sample=False,
            logits_processor=LogitsProcessorList([steps]),
            stopping_criteria=StoppingCriteriaList([_Ended(steps)]),
        )

    def _lower_capacity(self, failed: int) -> None:
        self.capacity = failed // 2
        log.warning("out of memory with %d requests at once: goes on with %d", failed, self.capacity)
        self._scheduler.restart(self.capacity, 1)
        gc.collect()
        if self.vlm.device.type == "cuda":
            torch.cuda.empty_cache()


class _Steps(LogitsProcessor):  # type: ignore[misc]
    """Called by generate() with the logits of each step: gives every live request its next token.

    slots: those of the batch's rows. Leaves in the logits the chosen token as the only possible one.
    """

    def __init__(
        self,
        scheduler: Scheduler[RunningRequest],
        sampler: TokenSampler,
        slots: Sequence[int],
        pad_token: int,
    ) -> None:
        self._scheduler = scheduler
        self._sampler = sampler
        self._slots = slots
        self._pad_token = pad_token
        self._step_began = time.perf_counter()
        self._first = True

    @property
    def ended(self) -> list[bool]:
        """Whether each row's request has ended; all have once the engine is closed."""
        running = self._scheduler.running
        return [slot not in running or self._scheduler.closed for slot in self._slots]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ended = self.ended  # those cancelled meanwhile among them
        rows = [row for row, end in enumerate(ended) if not end]
        chosen = [self._pad_token] * len(ended)
        if rows:
            slots = [self._slots[row] for row in rows]
            tokens, numeric = self._sampler.choose(scores[rows].float(), slots).tolist()
            for row, token in zip(rows, tokens, strict=True):
                chosen[row] = token
            self._take(slots, tokens, numeric)
        forced = torch.full_like(scores, -torch.inf)
        forced[range(len(chosen)), chosen] = 0
        return forced

    def _take(self, slots: Sequence[int], tokens: Sequence[int], numeric: Sequence[int]) -> None:
        scheduler = self._scheduler
        running, now = scheduler.running, time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        if self._first:
            self._first = False
            began = [running[slot].handle.submitted for slot in slots]
            scheduler.count(
                begun=len(slots),
                ttft_seconds=sum(time.monotonic() - submitted for submitted in began),
                prompt_tokens=sum(running[slot].position + 1 for slot in slots),
                prefill_seconds=seconds,
            )
        else:
            scheduler.count(slot_steps=len(self._slots), live_steps=len(slots), decode_seconds=seconds)
        for slot, token, is_number in zip(slots, tokens, numeric, strict=True):
            if is_number:
                scheduler.take(slot, token)
            else:
                before = len(running[slot].tokens)
                scheduler.fail(slot, EngineError(f"the model's logits are not numbers after {before} tokens"))
        scheduler.count(new_tokens=len(slots))
        if running:  # otherwise it would wait for a request
            scheduler.receive()


class _Ended(StoppingCriteria):  # type: ignore[misc]
    """Called by generate() after each step: which rows have ended."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self._steps.ended, device=input_ids.device)


def _has_lost_the_device(error: Exception) -> bool:
    """Returns whether no request can be answered any more; a lack of memory may be one request's fault."""
    return isinstance(error, torch.AcceleratorError)

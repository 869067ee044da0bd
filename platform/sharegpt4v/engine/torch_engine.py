"""The torch engine: continuous batching over slots of a static key-value cache.

Requests wait in a queue. As slots become free, prompts are prefilled into them, a bounded number of tokens at
a time; with each such part one decode step gives every live slot its next token. A slot whose answer ends is
refilled while the others continue, so that a short caption never waits for a long one.

On a CPU such a part and a step are one pass over the weights, since reading them is much of a step. On a GPU
steps are captured without prompts, and the host is one step behind: it starts a step, and takes the tokens of
the one before meanwhile.
"""

import gc
import logging
import math
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sharegpt4v.dialogue import Request, TokenLogprob, Turn, sampling_seed
from sharegpt4v.engine.decoder import Decoder, prefill_bytes
from sharegpt4v.engine.failures import concerns_all, is_out_of_memory
from sharegpt4v.engine.graphs import rounded_rows
from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.in_flight import InFlight
from sharegpt4v.engine.llama import Llama
from sharegpt4v.engine.options import choose_option, option_ids, score_options
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.prefilling import Prompt
from sharegpt4v.engine.prompt_feed import PromptFeed
from sharegpt4v.engine.running_request import RunningRequest, answer_limit
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.scheduled import ScheduledEngine
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.slots import bytes_per_slot, free_bytes, padded_context, slots_that_fit
from sharegpt4v.engine.thread_count import ThreadCount
from sharegpt4v.engine.token_bytes import TokenBytes
from sharegpt4v.engine.worker import run_until_closed, start_thread
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.send import send

log = logging.getLogger(__name__)

PREFILL_TOKENS = {"cuda": 8_192, "cpu": 512}
"""Most prompt tokens of one prefill by device: bounds its memory, and how long streams in progress pause."""

_FREE_SHARE = 16
"""While others decode, requests begin once 1/16 of the slots are free: few are idle, prefills are grouped."""


class TorchEngine(ScheduledEngine):
    """Runs one model on one device; at most `capacity` requests are in its slots at once.

    max_context: tokens of prompt and answer together that a slot holds; the model's own by default.
    threads: CPU threads to compute with, torch's own number by default. No other thread may compute with
    several: OpenMP would count more threads than cores and stop spinning, and a decode step on two cores
    would take nearly twice as long. So load the model with torch.set_num_threads(1). While other processes
    keep cores busy it computes with fewer, if that is faster.
    prefill_tokens: most prompt tokens between two decode steps, PREFILL_TOKENS by default. stored: dtype of
    keys and values in the slots, the model's by default; torch.float8_e4m3fn halves what a step reads, and
    changes answers. max_queue: most requests that wait for a slot, without limit by default.
    prefixes: dialogues whose keys and values are kept after their end, for a next round or the same image.
    Raises UserError when memory holds no slot, ValueError for less than one thread, slot or token.
    """

    computes_logprobs = True

    def __init__(
        self,
        adapter: Adapter,
        model: str,
        capacity: int,
        max_context: int | None = None,
        threads: int | None = None,
        prefill_tokens: int | None = None,
        stored: torch.dtype | None = None,
        max_queue: int | None = None,
        prefixes: int = 0,
    ) -> None:
        self.model = model
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            raise ValueError(f"threads is {threads}: an engine computes with one at least")
        self._threads = ThreadCount(threads)
        if min(capacity, 1 if max_context is None else max_context) < 1:
            raise ValueError(f"capacity is {capacity}, max_context {max_context}: both begin at 1")
        if prefill_tokens is not None and prefill_tokens < 1:
            raise ValueError(f"prefill_tokens is {prefill_tokens}: a prefill takes one token at least")
        config = adapter.language_model.config
        context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
        self._llama = Llama(adapter.language_model)  # before memory is counted: it may copy weights
        self._stored = stored or adapter.dtype
        slot = bytes_per_slot(config, padded_context(context), self._stored)
        budget = PREFILL_TOKENS.get(adapter.device.type, 512) if prefill_tokens is None else prefill_tokens
        beside = prefill_bytes(config, budget, adapter.dtype) + prefixes * slot
        self.capacity = slots_that_fit(capacity, slot, free_bytes(adapter.device), beside)
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d slots", self.capacity, capacity)
        self.adapter = adapter
        self._budget = budget
        self._in_flight: deque[InFlight] = deque()
        self._joined: dict[int, RunningRequest] = {}  # of the step that is one pass with a prefill
        self._apart = False  # whether the next round computes the two alone
        self._late = 1 if adapter.device.type == "cuda" else 0
        self.image_size = adapter.image_size
        self.context = context
        self._halved = False
        self._scheduler: Scheduler[RunningRequest] = Scheduler(
            self.capacity,
            _group(self.capacity),
            concerns_all,
            max_queue,
            pauses=True,
            released=self._release,
            # A captured step computes a slot more or less in the same time, and a move waits for it.
            step_rows=rounded_rows if adapter.device.type == "cuda" else int,
        )
        self._feed = PromptFeed(adapter, self._llama, self._scheduler, context, budget, prefixes)
        self._open_slots(self.capacity)
        self._token_bytes = TokenBytes(adapter.tokenizer)
        self._thread = start_thread("torch-engine", self._work)

    def count(self, turns: Sequence[Turn]) -> int:
        """Returns the tokens of a prompt, images included. Raises UserError for roles out of order."""
        return self.adapter.prompt_tokens(turns)

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to the text, as UTF-8; nothing for a control token."""
        return self._token_bytes(token)

    def _open_slots(self, count: int) -> None:
        adapter, context = self.adapter, padded_context(self.context)
        vocabulary = adapter.language_model.config.vocab_size
        self._sampler = TokenSampler(count, vocabulary, adapter.eos_token_ids, adapter.device)
        self._decoder = Decoder(
            self._llama, self._sampler, count, context, adapter.dtype, adapter.device, self._stored
        )

    def _release(self, slot: int) -> None:
        self._sampler.release(slot)

    def _work(self) -> None:
        torch.set_num_threads(self._threads.now)
        with torch.inference_mode():
            run_until_closed(self._scheduler, self._step)

    def _step(self) -> None:
        """Prefills a part of the requests that may begin, and decodes one token for every live slot."""
        self._at_fault: Collection[int] = ()
        try:
            self._decoder.prepare()
            self._scheduler.receive()
            start = time.perf_counter()
            began = InFlight("prefill", self.adapter.device)
            chunk = self._next_chunk()
            live = self._live() if chunk and self._may_join else {}
            if live:
                self._step_and_prefill(live, began, chunk)
            else:
                self._prefill(began, chunk)
                self._close_gaps()
                live = self._decode_step()
            self._apart = False
            self._choose_threads(len(live) + _tokens(chunk), time.perf_counter() - start)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                self._recover(error)
                return
        # Only here: inside the except block the traceback still refers to the memory to be freed.
        self._halve()

    def _choose_threads(self, tokens: int, seconds: float) -> None:
        """Sets the threads of the next pass. tokens: that this one computed on a CPU."""
        before = self._threads.now
        if self.adapter.device.type == "cpu" and self._threads.computed(tokens, seconds) != before:
            torch.set_num_threads(self._threads.now)

    def _recover(self, error: Exception) -> None:
        """Has the requests that shared the failed work tried again in halves; the others go on.

        What is in flight was computed before that work.
        """
        if concerns_all(error):
            raise error
        self._take_tokens(0)
        if self._joined:
            log.warning("a step with a prefill failed: each is computed alone", exc_info=error)
            self._set_back(self._joined)
            self._joined, self._apart = {}, True
            return
        shared = [
            slot
            for slot in self._at_fault
            if slot in self._scheduler.running or slot in self._scheduler.beginning
        ]
        self._feed.drop(shared)
        if self._at_fault and not shared:
            log.error("a step failed whose requests have all ended", exc_info=error)
            return
        self._scheduler.suspect(error, shared)

    # A part of the prompts

    def _next_chunk(self) -> list[tuple[Span, Tensor]]:
        """Gives slots to waiting requests, and embeds the next tokens of those that begin."""
        if not self._feed.admit(self._decoder.cache):
            return []
        chunk = self._feed.next_chunk()
        # Counted after each part, so that a watchdog sees progress.
        self._scheduler.count(prompt_tokens=_tokens(chunk))
        return chunk

    def _prefill(self, began: InFlight, chunk: Sequence[tuple[Span, Tensor]]) -> None:
        if chunk:
            self._at_fault = [span.slot for span, _ in chunk]
            self._finish_chunk(began, chunk, self._decoder.prefill(chunk))

    @property
    def _may_join(self) -> bool:
        """Whether a step and a prefill may be one pass: not where a failure has to name one of them."""
        return self._decoder.joins and not self._apart and not self._scheduler.has_suspects

    def _step_and_prefill(
        self, live: dict[int, RunningRequest], began: InFlight, chunk: Sequence[tuple[Span, Tensor]]
    ) -> None:
        """Computes a step and a prefill as one pass, and takes the tokens of both."""
        self._joined = live
        step = InFlight("step", self.adapter.device)
        picks, logits = self._decoder.step_and_prefill(_positions(live), chunk)
        self._joined = {}
        self._at_fault = list(live)
        self._fetch_step(step, live, picks)
        tokens = _tokens(chunk)
        began.share(step, tokens / (tokens + len(live)))
        self._take_tokens(0)
        self._at_fault = [span.slot for span, _ in chunk]
        self._finish_chunk(began, chunk, logits)

    def _set_back(self, live: Mapping[int, RunningRequest]) -> None:
        """Sets the device's state of requests to the tokens that they have taken."""
        for slot, request in live.items():
            self._set_sampling(slot, request.handle.request, request.tokens)
        picks = send(
            [[request.tokens[-1] for request in live.values()], [1] * len(live)], self.adapter.device
        )
        self._decoder.begin(list(live), picks, list(_positions(live).values()))

    def _finish_chunk(self, began: InFlight, chunk: Sequence[tuple[Span, Tensor]], logits: Tensor) -> None:
        """Begins the answers of prompts that are wholly in their slots now. logits: (n, V) behind spans."""
        whole = self._feed.finish(chunk)
        rows = [row for row, (span, _) in enumerate(chunk) if span.slot in whole]
        logits = logits if len(rows) == len(chunk) else logits[rows]
        self._begin(*self._answer_options(whole, logits), began)

    def _answer_options(self, prompts: dict[int, Prompt], logits: Tensor) -> tuple[dict[int, Prompt], Tensor]:
        """Finishes the requests that choose among options; returns the others and their logits."""
        others = []
        for row, (slot, prompt) in enumerate(prompts.items()):
            handle = prompt.handle
            if not handle.request.options:
                others.append(row)
                continue
            ids = option_ids(self.adapter.template, handle.request)
            scores = score_options(
                self._decoder, self._llama, slot, prompt.done, logits[row], ids, self._budget
            )
            if any(math.isnan(score.logprob) for score in scores):
                self._decoder.cache.clear(slot)
                self._scheduler.fail(slot, EngineError("the model's logits of the options are not numbers"))
                continue
            completion = choose_option(handle, prompt.done, scores)
            handle.push(completion.text)
            self._scheduler.finish(slot, completion)
        if len(others) == len(prompts):
            return prompts, logits
        slots = list(prompts)
        return {slots[row]: prompts[slots[row]] for row in others}, logits[others]

    def _begin(self, prompts: Mapping[int, Prompt], logits: Tensor, began: InFlight) -> None:
        """Gives prefilled requests their next tokens; logits (n, V) in the order of `prompts`."""
        requests = {slot: self._place(slot, prompt) for slot, prompt in prompts.items()}
        rows = {slot: row for row, slot in enumerate(requests)}
        raw = self._sampler.unchanged(logits)
        picks = self._sampler.choose(logits, list(rows)) if rows else logits.new_zeros(2, 0)
        if rows:
            self._decoder.begin(list(rows), picks, [prompts[slot].done for slot in rows])
        began.fetch(picks, requests, rows, self._sampler.logprobs(raw, picks[0], rows))
        self._in_flight.append(began)
        self._take_tokens(self._late)

    def _place(self, slot: int, prompt: Prompt) -> RunningRequest:
        adapter, request = self.adapter, prompt.handle.request
        self._set_sampling(slot, request, prompt.generated)
        running = self._scheduler.interrupted(prompt.handle)
        if running is None:
            limit = answer_limit(request, prompt.done, self.context)
            running = RunningRequest(
                prompt.handle,
                prompt.done,
                limit,
                adapter.tokenizer,
                adapter.eos_token_ids,
                prompt.cached,
            )
        running.in_flight = 0
        self._scheduler.place(slot, running)
        return running

    def _set_sampling(self, slot: int, request: Request, tokens: Sequence[int]) -> None:
        """Sets how a slot's tokens are chosen. tokens: those that the answer has."""
        sampling = request.sampling
        seed = sampling_seed(request.id, 0) if sampling.seed is None else sampling.seed
        self._sampler.admit(slot, sampling, seed, tokens)

    # A step

    def _close_gaps(self) -> None:
        """Moves requests into lower slots, where a step computes fewer slots then."""
        if self._scheduler.has_gaps:
            self._take_tokens(0)
            for source, target in self._scheduler.compact_slots():
                self._decoder.move(source, target, self._scheduler.running[target].position)
                self._sampler.move(source, target)

    def _live(self) -> dict[int, RunningRequest]:
        """Returns the requests that the next step computes, by slot."""
        return {slot: request for slot, request in self._scheduler.live.items() if request.goes_on}

    def _decode_step(self) -> dict[int, RunningRequest]:
        """Starts a step of all live slots, which it returns, and takes the tokens of what came before it."""
        live = self._live()
        if live:
            self._at_fault = list(live)
            step = InFlight("step", self.adapter.device)
            self._fetch_step(step, live, self._decoder.step(_positions(live)))
        self._take_tokens(self._late if live else 0)
        return live

    def _fetch_step(self, step: InFlight, live: Mapping[int, RunningRequest], picks: Tensor) -> None:
        """Fetches the tokens that a step chose."""
        rows = {slot: slot for slot in live}
        logprobs = self._sampler.logprobs(self._decoder.raw_logits, picks[0], rows)
        step.fetch(picks, live, rows, logprobs)
        self._in_flight.append(step)

    def _take_tokens(self, late: int) -> None:
        """Gives requests the tokens of all prefills and steps but the last `late` ones."""
        while len(self._in_flight) > late:
            part = self._in_flight.popleft()
            taken = [self._take(*picked) for picked in part.tokens()]
            self._count(part, sum(taken))

    def _take(
        self, slot: int, request: RunningRequest, token: int, is_number: bool, logprob: TokenLogprob | None
    ) -> bool:
        """Gives a request its next token; returns whether it had not ended meanwhile."""
        scheduler = self._scheduler
        if scheduler.running.get(slot) is not request:
            return False
        if is_number:
            if logprob is not None:
                request.logprobs.append(logprob)
            scheduler.take(slot, token)
            if request.handle.succeeded:
                self._feed.keep_dialogue(slot, request, self._decoder.cache)
            return True
        self._decoder.cache.clear(slot)  # 0 times NaN is NaN, even behind a mask
        before = len(request.tokens)
        scheduler.fail(slot, EngineError(f"the model's logits are not numbers after {before} tokens"))
        return True

    def _count(self, part: InFlight, tokens: int) -> None:
        scheduler = self._scheduler
        if part.kind == "step":
            scheduler.count(
                new_tokens=tokens, slot_steps=self.capacity, live_steps=tokens, decode_seconds=part.seconds
            )
            return
        now = time.monotonic()
        waited = sum(now - request.handle.submitted for request in part.requests.values())
        scheduler.count(
            new_tokens=tokens, begun=len(part.requests), ttft_seconds=waited, prefill_seconds=part.seconds
        )

    def _halve(self) -> None:
        """Halves the slots, once, after a lack of memory. Raises EngineError the second time."""
        slots = self.capacity // 2
        if self._halved or not slots:
            raise EngineError(
                f"out of memory with {self.capacity} slots of {self.context} tokens: lower `batch_size`"
            )
        log.warning("out of memory with %d slots: goes on with %d", self.capacity, slots)
        self._halved = True
        self._joined = {}
        self._in_flight.clear()
        self._feed.clear()
        self._scheduler.restart(slots, _group(slots))
        del self._decoder, self._sampler
        gc.collect()
        if self.adapter.device.type == "cuda":
            torch.cuda.empty_cache()
        self._open_slots(slots)
        self.capacity = slots


def _positions(live: Mapping[int, RunningRequest]) -> dict[int, int]:
    return {slot: request.position for slot, request in live.items()}


def _tokens(chunk: Sequence[tuple[Span, Tensor]]) -> int:
    return sum(len(span) for span, _ in chunk)


def _group(slots: int) -> int:
    """Computes the free slots that are needed for requests to begin while others run."""
    return max(1, slots // _FREE_SHARE)

"""The vllm engine: vLLM's scheduler and kernels behind our interface, stepped by our thread in this process.

LLaVA-shaped models run in vLLM unchanged. Of a Share-Captioner vLLM runs only the decoder, on prompt
embeddings from our own vision tower and sampler. Prompts of both are made from our token ids; any other model
of images and text that vLLM knows is asked by the chat template and processor of its folder.
"""

import logging
import threading
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from sharegpt4v.dialogue import Request, Turn, sampling_seed
from sharegpt4v.engine.failures import concerns_all
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.running_request import RunningRequest, answer_limit
from sharegpt4v.engine.scheduled import ScheduledEngine, refuse_likelihoods
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.vllm_folder import vllm_folder
from sharegpt4v.engine.vllm_frontend import Frontend
from sharegpt4v.engine.vllm_penalty import PENALTY
from sharegpt4v.engine.vllm_setup import import_vllm, open_vllm
from sharegpt4v.engine.worker import run_until_closed, start_thread

log = logging.getLogger(__name__)

_process = threading.Lock()
"""vLLM keeps device groups and the state of a forward pass in module globals: one engine a process."""


class VllmEngine(ScheduledEngine):
    """Runs one model on one device; at most `capacity` requests are in vLLM at once, one engine a process.

    frontend: from `load_frontend`. model: name@digest of its weights. max_context: tokens of prompt and
    answer together; the model's own by default. Greedy answers equal the torch engine's, or the transformers
    engine's, except for ties; sampled ones are as repeatable, from other random numbers. One step of vLLM may
    prefill and decode: the statistics divide its seconds in proportion to the tokens of prompts and of
    answers.

    vLLM allocates its memory once: it cannot continue with half of it as the torch engine does, so running
    out of memory in a step ends the engine.

    Raises UserError when memory holds no request or vLLM does not know the model, and EngineError when this
    process has an engine already.
    """

    def __init__(self, frontend: Frontend, model: str, capacity: int, max_context: int | None = None) -> None:
        self.model = model
        context = min(max_context or frontend.context, frontend.context)
        self._vllm = import_vllm()
        if not _process.acquire(blocking=False):
            raise EngineError("this process has a vllm engine already, and vLLM allows one: close it first")
        try:
            folder = vllm_folder(frontend.folder, model)
            self._core, self.capacity = open_vllm(folder, frontend, context, capacity)
        except BaseException:
            _process.release()
            raise
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d requests at once", self.capacity, capacity)
        self.frontend = frontend
        self._renderer = self._core.renderer
        self.context = context
        # Never more than `capacity` at once: requests queued in vLLM could not be counted or tried alone.
        self._scheduler: Scheduler[Any] = Scheduler(self.capacity, concerns_all=concerns_all)
        self._numbers = count()
        self._slots: dict[str, int] = {}  # by name in vLLM, since ids of requests may be equal
        self._thread = start_thread("vllm-engine", self._work)

    def count(self, turns: Sequence[Turn]) -> int:
        """Returns the tokens of a prompt, images included. Raises as Frontend.prompt does."""
        return self.frontend.count(turns, self._renderer)

    def _work(self) -> None:
        try:
            run_until_closed(self._scheduler, self._step)
        finally:
            try:
                self._core.engine_core.shutdown()
            finally:
                del self._core
                _process.release()

    def _step(self) -> None:
        """Adds the requests that may begin to vLLM, then runs one step of it."""
        self._scheduler.receive()
        self._abort_ended()
        try:
            for slot, handle in self._scheduler.admit().items():
                self._begin(slot, handle)
            if self._scheduler.running:
                self._decode_step()
        except Exception as error:
            self._scheduler.suspect(error)
        self._abort_ended()

    def _abort_ended(self) -> None:
        """Aborts ended requests in vLLM before their slots are given to others."""
        ended = [name for name, slot in self._slots.items() if slot not in self._scheduler.running]
        for name in ended:
            del self._slots[name]
        if ended:
            self._core.abort_request(ended)

    # Admission

    def _begin(self, slot: int, handle: Handle) -> None:
        """Adds one request to vLLM, or fails it."""
        start = time.perf_counter()
        frontend, request = self.frontend, handle.request
        try:
            refuse_likelihoods(request, "vllm")
            prompt, tokens = frontend.prompt(request, self._renderer)
            limit = answer_limit(request, tokens, self.context)
            name = str(next(self._numbers))
            self._core.add_request(name, prompt, self._params(request, limit))
        except Exception as error:
            self._scheduler.fail(slot, error)
            return
        self._slots[name] = slot
        self._scheduler.place(
            slot, RunningRequest(handle, tokens, limit, frontend.tokenizer, frontend.eos_token_ids)
        )
        self._scheduler.count(prompt_tokens=tokens, prefill_seconds=time.perf_counter() - start)

    def _params(self, request: Request, limit: int) -> Any:
        """Converts sampling parameters to vLLM's. RunningRequest makes text and checks stop strings."""
        asked = request.sampling
        seed = sampling_seed(request.id, 0) if asked.seed is None else asked.seed
        return self._vllm.SamplingParams(
            max_tokens=limit,
            min_tokens=min(asked.min_new_tokens, limit),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=seed % 2**63,  # vLLM's generator takes no more
            extra_args={PENALTY: asked.repetition_penalty},
            stop_token_ids=sorted(self.frontend.eos_token_ids),
            ignore_eos=True,  # the end tokens are those above and no others
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )

    # Decoding

    def _decode_step(self) -> None:
        start = time.perf_counter()
        running = self._scheduler.running
        beginning = {slot for slot, request in running.items() if not request.tokens}
        prompts = sum(running[slot].position + 1 for slot in beginning)
        firsts = live = 0
        for output in self._core.step():
            slot, [fresh] = self._slots[output.request_id], output.outputs
            if slot in beginning:
                firsts += len(fresh.token_ids)
            else:
                live += len(fresh.token_ids)
            self._take_tokens(slot, fresh.token_ids, fresh.finish_reason)
        seconds = time.perf_counter() - start
        decoding = seconds * live / (prompts + live) if live else 0.0
        self._scheduler.count(
            new_tokens=firsts + live,
            prefill_seconds=seconds - decoding,
            decode_seconds=decoding,
            slot_steps=self.capacity - len(beginning) if live else 0,  # beginning ones do not decode
            live_steps=live,
        )

    def _take_tokens(self, slot: int, tokens: Sequence[int], finished: str | None) -> None:
        """Takes new tokens of one answer. finished: why vLLM ends it, if it does."""
        scheduler = self._scheduler
        request = scheduler.running[slot]
        for token in tokens:
            if not request.tokens:
                scheduler.count(begun=1, ttft_seconds=time.monotonic() - request.handle.submitted)
            scheduler.take(slot, token)
            if slot not in scheduler.running:
                return
        if finished:
            ended = f"vLLM ended the answer after {len(request.tokens)} tokens: {finished}"
            scheduler.fail(slot, EngineError(ended))

"""The vllm engine: vLLM's scheduler and kernels behind our interface, stepped by our thread in this process.

LLaVA-shaped models run in vLLM as they are. Of a Share-Captioner vLLM runs the decoder alone, from prompt
embeddings that our own vision tower and sampler make. Prompts are our token ids in both cases: no chat
template is asked.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

from PIL import Image

from sharegpt4v.engine.answer import Answer, withdrawn
from sharegpt4v.engine.base import EngineClosed, EngineError, EngineStats, Handle, Request, sampling_seed
from sharegpt4v.engine.failures import concerns_all, one_line
from sharegpt4v.engine.threaded import UNFINISHED, ThreadedEngine
from sharegpt4v.engine.vllm_folder import vllm_folder
from sharegpt4v.engine.vllm_setup import PENALTY, import_vllm, open_vllm
from sharegpt4v.models.adapter import Adapter, CaptionerAdapter

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 0.1
"""How often requests are looked through for those that were cancelled or whose time is over."""

_process = threading.Lock()
"""vLLM keeps device groups and the state of a forward pass in module globals: one engine a process."""


class VllmEngine(ThreadedEngine):
    """Runs one model on one device; at most `capacity` requests are in vLLM at once, one engine a process.

    adapter: from `load_frontend`. model: name@digest of its weights. max_context: tokens of prompt and answer
    together; the model's own by default. Greedy answers are the torch engine's but for ties; sampled ones are
    as repeatable, from other random numbers. In the statistics a step belongs to prefill when a request waits
    for its first token, else to decoding.

    Raises UserError when memory holds no request, and EngineError when this process has an engine already.
    """

    def __init__(self, adapter: Adapter, model: str, capacity: int, max_context: int | None = None) -> None:
        super().__init__()
        self.adapter = adapter
        self.model = model
        self.image_size = adapter.image_size
        longest = adapter.language_model.config.max_position_embeddings
        self._context = min(max_context or longest, longest)
        self._vllm = import_vllm()
        if not _process.acquire(blocking=False):
            raise EngineError("this process has a vllm engine already, and vLLM allows one: close it first")
        try:
            folder = vllm_folder(adapter.folder, model)
            self._core, self.capacity = open_vllm(folder, adapter, self._context, capacity)
        except BaseException:
            _process.release()
            raise
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d requests at once", self.capacity, capacity)
        self._names = map(str, count())  # requests' own ids may repeat
        self._running: dict[str, Answer] = {}
        self._waiting: deque[Handle] = deque()
        self._suspects: deque[Handle] = deque()  # tried alone after a failure that may be anybody's
        self._swept = 0.0
        self._stats = EngineStats(slots=self.capacity)
        self._start("vllm-engine")

    def stats(self) -> EngineStats:
        waiting = len(self._queue) + len(self._waiting) + len(self._suspects)
        return replace(self._stats, queued=waiting, running=len(self._running))

    def _work(self) -> None:
        why = UNFINISHED
        try:
            while not self._queue.closed:
                self._turn()
        except Exception as error:
            log.exception("the engine's thread ends")
            why = f"the engine ended: {one_line(error)}"
        finally:
            # However this thread ends, nobody may go on waiting for it.
            self._queue.close()
            running = [answer.handle for answer in self._running.values()]
            for handle in (*running, *self._waiting, *self._suspects):
                handle.fail(EngineClosed(why))
            try:
                self._core.engine_core.shutdown()
            finally:
                del self._core
                _process.release()

    def _turn(self) -> None:
        """Admits what may begin, then one step of vLLM."""
        try:
            self._admit()
            if self._running:
                self._step()
        except Exception as error:
            self._suspect(error)

    # Admission

    def _admit(self) -> None:
        """Never more than `capacity` at once: what waits in vLLM could not be counted, or tried alone."""
        if not (self._running or self._waiting or self._suspects):
            first = self._queue.take()
            if first is None:
                return
            self._waiting.append(first)
        self._waiting.extend(self._queue.take_all())
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self._sweep()
        if self._suspects:
            if not self._running:
                self._begin(self._suspects.popleft())
            return
        while self._waiting and len(self._running) < self.capacity:
            self._begin(self._waiting.popleft())

    def _sweep(self) -> None:
        """Lets those go that nobody waits for any more, and those whose time is over."""
        self._waiting = deque(handle for handle in self._waiting if self._wanted(handle, 0))
        self._suspects = deque(handle for handle in self._suspects if self._wanted(handle, 0))
        running = list(self._running.items())
        self._drop(name for name, answer in running if not self._wanted(answer.handle, len(answer.tokens)))
        self._swept = time.monotonic()

    def _wanted(self, handle: Handle, tokens: int) -> bool:
        try:
            return not withdrawn(handle, tokens)
        except EngineError as error:
            self._fail(handle, error)
            return False

    def _begin(self, handle: Handle) -> None:
        """Gives one request to vLLM, or fails it."""
        start = time.perf_counter()
        if not self._wanted(handle, 0):
            return
        adapter, request = self.adapter, handle.request
        try:
            tokens = adapter.prompt_tokens(request.turns, len(request.images))
            if tokens >= self._context:
                raise EngineError(
                    f"the prompt has {tokens} tokens and the context {self._context}: nothing is left "
                    f"to answer in; shorten the dialogue, or send fewer images"
                )
            limit = min(request.sampling.max_new_tokens, self._context - tokens)
            name = next(self._names)
            self._core.add_request(name, self._prompt(request), self._params(request, limit))
        except Exception as error:
            if concerns_all(error):
                raise
            self._fail(handle, error)
            return
        self._running[name] = Answer(handle, tokens, limit, adapter.tokenizer, adapter.eos_token_ids)
        self._count(prompt_tokens=tokens, prefill_seconds=time.perf_counter() - start)

    def _prompt(self, request: Request) -> dict[str, Any]:
        adapter = self.adapter
        if isinstance(adapter, CaptionerAdapter):
            # One at a time: requests begin as others end, and a bad image then fails its request alone.
            [embeddings] = adapter.embed([request])
            return {"prompt_embeds": embeddings.cpu()}
        for image in request.images:
            adapter._check_image(image)
        first, *rest = adapter.segments(request.turns, len(request.images))
        # vLLM puts an image's tokens in place of its one mark; no text of a turn can make such a mark.
        ids = first + [token for segment in rest for token in (adapter.image_token_id, *segment)]
        if not request.images:
            return {"prompt_token_ids": ids}
        # At model size a checkpoint's processor has nothing to pad, resize or crop: it only normalises.
        images = [Image.fromarray(image) for image in request.images]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}

    def _params(self, request: Request, limit: int) -> Any:
        """Ours in vLLM's words. Text and stop strings stay with `Answer`, as in the torch engine."""
        asked = request.sampling
        return self._vllm.SamplingParams(
            max_tokens=limit,
            min_tokens=min(asked.min_new_tokens, limit),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=sampling_seed(request.id, 0) if asked.seed is None else asked.seed,
            extra_args={PENALTY: asked.repetition_penalty},
            stop_token_ids=sorted(self.adapter.eos_token_ids),
            ignore_eos=True,  # the end tokens are those above and no others
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )

    # Decoding

    def _step(self) -> None:
        start = time.perf_counter()
        beginning = any(not answer.tokens for answer in self._running.values())
        new_tokens = 0
        for output in self._core.step():
            [fresh] = output.outputs
            new_tokens += len(fresh.token_ids)
            self._take(output.request_id, fresh.token_ids, fresh.finish_reason)
        seconds = time.perf_counter() - start
        if beginning:
            self._count(new_tokens=new_tokens, prefill_seconds=seconds)
        else:
            self._count(new_tokens=new_tokens, decode_seconds=seconds)
            self._count(slot_steps=self.capacity, live_steps=new_tokens)

    def _take(self, name: str, tokens: Iterable[int], finished: str | None) -> None:
        """New tokens of one answer. finished: why vLLM ends it, if it does."""
        answer = self._running[name]
        handle = answer.handle
        try:
            for token in tokens:
                if not answer.tokens:
                    self._count(begun=1, ttft_seconds=time.monotonic() - handle.submitted)
                self._count(requests=answer.take(token))
                if handle.done():
                    break
            if finished and not handle.done():
                raise EngineError(f"vLLM ended the answer after {len(answer.tokens)} tokens: {finished}")
        except Exception as error:
            if concerns_all(error):
                raise
            self._fail(handle, error)
        if handle.done():
            self._drop([name])

    def _drop(self, names: Iterable[str]) -> None:
        """Takes requests out of vLLM, which knows nothing any more of those it has ended itself."""
        dropped = [name for name in names if self._running.pop(name, None)]
        if dropped:
            self._core.abort_request(dropped)

    # Failures

    def _fail(self, handle: Handle, error: Exception) -> None:
        self._count(failed=1)
        handle.fail(EngineError(one_line(error)))

    def _suspect(self, error: Exception) -> None:
        """A step failed, and one request may be the reason: each is tried again, alone.

        Seeds make the answers the same again. Raises `error` when it is no request's fault.
        """
        handles = [answer.handle for answer in self._running.values() if not answer.handle.done()]
        if concerns_all(error) or not handles:
            raise error
        log.error("a step failed", exc_info=error)
        self._drop(list(self._running))
        if len(handles) == 1:
            self._fail(handles[0], error)
        else:
            self._suspects.extend(handles)

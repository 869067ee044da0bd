"""The vllm engine: vLLM's scheduler and kernels behind our interface, stepped by our thread in this process.

LLaVA-shaped models run in vLLM as they are. Of a Share-Captioner vLLM runs the decoder alone, from prompt
embeddings that our own vision tower and sampler make. Prompts are our token ids in both cases: no chat
template is asked.
"""

import logging
import threading
import time
from collections.abc import Iterable
from itertools import count
from typing import Any

from PIL import Image

from sharegpt4v.dialogue import Request, sampling_seed
from sharegpt4v.engine.batching import BatchingEngine
from sharegpt4v.engine.failures import concerns_all
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.running_request import RunningRequest
from sharegpt4v.engine.vllm_folder import vllm_folder
from sharegpt4v.engine.vllm_penalty import PENALTY
from sharegpt4v.engine.vllm_setup import import_vllm, open_vllm
from sharegpt4v.models.adapter import Adapter, CaptionerAdapter

log = logging.getLogger(__name__)

_process = threading.Lock()
"""vLLM keeps device groups and the state of a forward pass in module globals: one engine a process."""


class VllmEngine(BatchingEngine):
    """Runs one model on one device; at most `capacity` requests are in vLLM at once, one engine a process.

    adapter: from `load_frontend`. model: name@digest of its weights. max_context: tokens of prompt and answer
    together; the model's own by default. Greedy answers are the torch engine's but for ties; sampled ones are
    as repeatable, from other random numbers. One step of vLLM may prefill and decode: in the
    statistics its seconds are divided as the tokens are that it took of prompts and of answers.

    vLLM takes its memory once: it does not go on with half of it as the torch engine does, and a step that
    finds none ends the engine.

    Raises UserError when memory holds no request, and EngineError when this process has an engine already.
    """

    def __init__(self, adapter: Adapter, model: str, capacity: int, max_context: int | None = None) -> None:
        self.model = model
        longest = adapter.language_model.config.max_position_embeddings
        context = min(max_context or longest, longest)
        self._vllm = import_vllm()
        if not _process.acquire(blocking=False):
            raise EngineError("this process has a vllm engine already, and vLLM allows one: close it first")
        try:
            folder = vllm_folder(adapter.folder, model)
            self._core, self.capacity = open_vllm(folder, adapter, context, capacity)
        except BaseException:
            _process.release()
            raise
        if self.capacity < capacity:
            log.warning("memory has room for %d of %d requests at once", self.capacity, capacity)
        super().__init__(adapter, self.capacity, context)
        self._names = map(str, count())  # requests' own ids may repeat
        self._answers: dict[str, RunningRequest] = {}
        self._start("vllm-engine")

    def _work(self) -> None:
        try:
            super()._work()
        finally:
            try:
                self._core.engine_core.shutdown()
            finally:
                del self._core
                _process.release()

    def _step(self) -> None:
        """Admits what may begin, then one step of vLLM."""
        try:
            self._admit()
            if self._answers:
                self._decode_step()
        except Exception as error:
            self._suspect(error)

    # Admission

    def _admit(self) -> None:
        """Never more than `capacity` at once: what waits in vLLM could not be counted, or tried alone."""
        self._receive()
        if self._suspects:
            if not self._answers:
                self._begin(self._suspects.popleft())
            return
        free = min(self.capacity - len(self._answers), len(self._waiting))
        self._begin([self._waiting.popleft() for _ in range(free)])

    def _sweep(self) -> None:
        super()._sweep()
        answers = list(self._answers.items())
        self._drop(name for name, answer in answers if not self._wanted(answer.handle, len(answer.tokens)))

    def _begin(self, handles: list[Handle]) -> None:
        self._beginning = handles
        for handle in handles:
            if self._wanted(handle):
                self._give(handle)
        self._beginning = []

    def _give(self, handle: Handle) -> None:
        """Gives one request to vLLM, or fails it."""
        start = time.perf_counter()
        adapter, request = self.adapter, handle.request
        try:
            tokens = self._prompt_tokens(handle)
            limit = min(request.sampling.max_new_tokens, self._context - tokens)
            name = next(self._names)
            self._core.add_request(name, self._prompt(request), self._params(request, limit))
        except Exception as error:
            if concerns_all(error):
                raise
            self._fail(handle, error)
            return
        self._answers[name] = RunningRequest(handle, tokens, limit, adapter.tokenizer, adapter.eos_token_ids)
        self._count(prompt_tokens=tokens, prefill_seconds=time.perf_counter() - start)

    def _prompt(self, request: Request) -> dict[str, Any]:
        adapter = self.adapter
        if isinstance(adapter, CaptionerAdapter):
            # One at a time: requests begin as others end, and a bad image then fails its request alone.
            [embeddings] = adapter.embed([request])
            return {"prompt_embeds": embeddings.cpu()}
        for image in request.images:
            adapter.check_image(image)
        template = adapter.template
        first, *rest = template.segments(request.turns)
        # vLLM puts an image's tokens in place of its one mark; no text of a turn can make such a mark.
        ids = first + [token for segment in rest for token in (template.image_token_id, *segment)]
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

    def _decode_step(self) -> None:
        start = time.perf_counter()
        beginning = {name for name, answer in self._answers.items() if not answer.tokens}
        prompts = sum(self._answers[name].position + 1 for name in beginning)
        firsts = live = ended = 0
        for output in self._core.step():
            [fresh] = output.outputs
            if output.request_id in beginning:
                firsts += len(fresh.token_ids)
            else:
                live += len(fresh.token_ids)
            ended += self._take(output.request_id, fresh.token_ids, fresh.finish_reason)
        seconds = time.perf_counter() - start
        decoding = seconds * live / (prompts + live) if live else 0.0
        self._count(
            new_tokens=firsts + live,
            requests=ended,
            prefill_seconds=seconds - decoding,
            decode_seconds=decoding,
            slot_steps=self.capacity - len(beginning) if live else 0,  # who begins neither idles nor decodes
            live_steps=live,
        )

    def _take(self, name: str, tokens: Iterable[int], finished: str | None) -> bool:
        """New tokens of one answer; whether it is complete now. finished: why vLLM ends it, if it does."""
        answer = self._answers[name]
        handle, complete = answer.handle, False
        try:
            for token in tokens:
                if not answer.tokens:
                    self._count(begun=1, ttft_seconds=time.monotonic() - handle.submitted)
                complete = answer.take(token)
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
        return complete

    def _drop(self, names: Iterable[str]) -> None:
        """Takes requests out of vLLM, which knows nothing any more of those it has ended itself."""
        dropped = [name for name in names if self._answers.pop(name, None)]
        if dropped:
            self._core.abort_request(dropped)

    # Failures

    def _busy(self) -> int:
        return len(self._answers)

    def _running(self) -> list[Handle]:
        return [answer.handle for answer in self._answers.values()]

    def _stop_running(self) -> None:
        self._drop(list(self._answers))

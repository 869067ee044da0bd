"""Gives slots to waiting requests, and their prompts to the decoder a bounded number of tokens at a time."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sharegpt4v.engine.failures import concerns_all
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.llama import Llama
from sharegpt4v.engine.options import option_ids
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.prefilling import Prefilling, Prompt
from sharegpt4v.engine.prefixes import Prefixes, signature_of
from sharegpt4v.engine.running_request import RunningRequest, answer_limit
from sharegpt4v.engine.scheduler import Scheduler
from sharegpt4v.engine.slots import SlotCache
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.send import send


class PromptFeed:
    """The prompts of requests between their admission and their first token.

    context: tokens that a slot holds. budget: most tokens of one prefill. prefixes: dialogues that are kept.
    """

    def __init__(
        self,
        adapter: Adapter,
        llama: Llama,
        scheduler: Scheduler[RunningRequest],
        context: int,
        budget: int,
        prefixes: int,
    ) -> None:
        self._adapter, self._llama, self._scheduler = adapter, llama, scheduler
        self._context = context
        self._prefilling = Prefilling(budget)
        self._prefixes = Prefixes(prefixes)

    def admit(self, cache: SlotCache) -> bool:
        """Gives slots to requests that may begin; returns whether any prompt is to be prefilled."""
        beginning = self._scheduler.admit()
        self._prefilling.keep_only(beginning)
        for slot, handle in beginning.items():
            if slot not in self._prefilling:
                self._add(slot, handle, cache)
        return bool(self._prefilling)

    def next_chunk(self) -> list[tuple[Span, Tensor]]:
        """Embeds what the next prefill needs, and returns its spans with their embeddings."""
        for slot, embeddings in self._embed(self._prefilling.to_embed()).items():
            self._prefilling.embedded(slot, embeddings)
        self._prefilling.keep_only(self._scheduler.beginning)  # without those that could not be embedded
        return self._prefilling.next_chunk()

    def finish(self, chunk: Sequence[tuple[Span, Tensor]]) -> dict[int, Prompt]:
        """Notes a prefilled chunk; returns the prompts that are now wholly in their slots."""
        return self._prefilling.finish(chunk)

    def drop(self, slots: Collection[int]) -> None:
        """Forgets the prompts in these slots: their requests are tried again."""
        self._prefilling.drop(slots)

    def clear(self) -> None:
        """Forgets all prompts and all kept dialogues, whose memory is needed."""
        self._prefilling.clear()
        self._prefixes.clear()

    def keep_dialogue(self, slot: int, request: RunningRequest, cache: SlotCache) -> None:
        """Keeps a finished dialogue: all its tokens but the last, which no step has fed."""
        if self._prefixes:
            signature = signature_of(self._adapter.template, request.handle.request, request.tokens[:-1])
            self._prefixes.store(signature, cache, slot)

    def _add(self, slot: int, handle: Handle, cache: SlotCache) -> None:
        """Adds the prompt of a request; fails one that does not fit the context or cannot be encoded."""
        request, template = handle.request, self._adapter.template
        before = self._scheduler.interrupted(handle)
        generated = before.tokens if before else ()
        try:
            tokens = self._adapter.prompt_tokens(request.turns)
            longest = max(map(len, option_ids(template, request)), default=0)
            answer_limit(request, tokens + longest, self._context)
            cached = 0
            if self._prefixes:
                cached = self._prefixes.load(signature_of(template, request, generated), cache, slot)
        except Exception as error:  # also text that the tokenizer refuses
            self._scheduler.fail(slot, error)
            return
        self._prefilling.add(slot, handle, tokens, generated, cached)

    def _embed(self, prompts: Mapping[int, Prompt]) -> dict[int, Tensor]:
        """Embeds prompts: (T, D) by slot; requests that cannot be embedded fail, each with its own error."""
        if not prompts:
            return {}
        requests = [prompt.handle.request for prompt in prompts.values()]
        skip = [prompt.cached for prompt in prompts.values()]
        try:
            embedded = self._adapter.embed(requests, skip)
        except Exception as error:
            if concerns_all(error):
                raise
            items = list(prompts.items())
            if len(items) == 1:
                self._scheduler.fail(items[0][0], error)
                return {}
            half = len(items) // 2
            return self._embed(dict(items[:half])) | self._embed(dict(items[half:]))
        for number, prompt in enumerate(prompts.values()):
            if prompt.generated:
                answer = self._llama.embed(send(prompt.generated, self._adapter.device))
                known = prompt.cached - (prompt.tokens - len(prompt.generated))
                embedded[number] = torch.cat([embedded[number], answer[max(0, known) :]])
        return dict(zip(prompts, embedded, strict=True))

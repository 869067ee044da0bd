"""The prompts that have a slot and are not wholly in it yet: which tokens go into the next prefill."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.prefill_attention import Span

_IMAGES_AT_ONCE = 32
"""Images that go through the vision tower together, unless one request has more."""


@dataclass(slots=True)
class Prompt:
    """A prompt of `tokens` tokens, embedded (T, D) when its turn comes, prefilled up to `done`.

    generated: tokens of an answer that was interrupted; they follow the dialogue and are counted in `tokens`.
    cached: tokens that were copied into the slot; embeddings are those behind them.
    """

    handle: Handle
    tokens: int
    generated: Sequence[int] = ()
    cached: int = 0
    embeddings: Tensor | None = None
    done: int = 0


class Prefilling:
    """Prompts by slot, in the order in which they began. budget: most tokens of one prefill."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._prompts: dict[int, Prompt] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._prompts

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def add(
        self, slot: int, handle: Handle, tokens: int, generated: Sequence[int] = (), cached: int = 0
    ) -> None:
        """Adds a prompt. tokens: of its dialogue. generated: of its answer so far. cached: in the slot."""
        self._prompts[slot] = Prompt(handle, tokens + len(generated), generated, cached, done=cached)

    def keep_only(self, beginning: Mapping[int, Handle]) -> None:
        """Drops prompts whose requests have ended meanwhile."""
        self._prompts = {
            slot: prompt for slot, prompt in self._prompts.items() if beginning.get(slot) is prompt.handle
        }

    def clear(self) -> None:
        self._prompts.clear()

    def drop(self, slots: Collection[int]) -> None:
        for slot in slots:
            self._prompts.pop(slot, None)

    def to_embed(self) -> dict[int, Prompt]:
        """Returns the requests to embed now: enough for the next prefill, as one pass of the vision tower."""
        group: dict[int, Prompt] = {}
        tokens = images = 0
        for slot, prompt in self._prompts.items():
            if tokens >= self._budget:
                break
            tokens += prompt.tokens - prompt.done
            if prompt.embeddings is None:
                images += len(prompt.handle.request.images)
                if group and images > _IMAGES_AT_ONCE:
                    break
                group[slot] = prompt
        return group

    def embedded(self, slot: int, embeddings: Tensor) -> None:
        self._prompts[slot].embeddings = embeddings

    def next_chunk(self) -> list[tuple[Span, Tensor]]:
        """Returns the spans of the next prefill with their embeddings.

        They are whole prompts, or as much of the first one as the budget holds.
        """
        chunk: list[tuple[Span, Tensor]] = []
        left = self._budget
        for slot, prompt, embeddings in self._embedded():
            rest = prompt.tokens - prompt.done
            if chunk and rest > left:
                break
            end = prompt.done + min(rest, left)
            part = embeddings[prompt.done - prompt.cached : end - prompt.cached]
            chunk.append((Span(slot, prompt.done, end), part))
            left -= end - prompt.done
            if left <= 0:
                break
        return chunk

    def finish(self, chunk: Sequence[tuple[Span, Tensor]]) -> dict[int, Prompt]:
        """Notes a prefilled chunk; returns the prompts that are now wholly in their slots, and drops them."""
        for span, _ in chunk:
            self._prompts[span.slot].done = span.end
        whole = {span.slot: self._prompts[span.slot] for span, _ in chunk}
        whole = {slot: prompt for slot, prompt in whole.items() if prompt.done == prompt.tokens}
        for slot in whole:
            del self._prompts[slot]
        return whole

    def _embedded(self) -> Iterator[tuple[int, Prompt, Tensor]]:
        for slot, prompt in self._prompts.items():
            if prompt.embeddings is None:
                return
            yield slot, prompt, prompt.embeddings

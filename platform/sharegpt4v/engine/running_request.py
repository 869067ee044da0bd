"""One request in its slot: its tokens, its text while it grows, and how it ends."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerFast

from sharegpt4v.dialogue import Completion
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.text import TextStream, decode
from sharegpt4v.engine.threaded import withdrawn


class RunningRequest:
    """Grows token by token until it is complete.

    prompt_tokens: what stands before it in the slot. limit: new tokens it may have, by the request and by
    the context. end_tokens: ids that end it and are no part of its text.
    """

    def __init__(
        self,
        handle: Handle,
        prompt_tokens: int,
        limit: int,
        tokenizer: PreTrainedTokenizerFast,
        end_tokens: Collection[int],
    ) -> None:
        self.handle = handle
        self.tokens: list[int] = []
        self._prompt_tokens = prompt_tokens
        self._limit = limit
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        # Decoding at every token costs: only where somebody streams, or a stop string must be seen.
        watched = handle.request.stream or handle.request.sampling.stop
        self._stream = TextStream(tokenizer, handle.request.sampling.stop, handle.shown) if watched else None

    @property
    def position(self) -> int:
        """Where the last token stands in the slot."""
        return self._prompt_tokens + len(self.tokens) - 1

    def take(self, token: int) -> bool:
        """One more token: shows what it adds. Returns whether the answer is complete, and finishes it then.

        Raises EngineError when the request's time is over.
        """
        self.tokens.append(token)
        if withdrawn(self.handle, len(self.tokens)):
            return False
        ended = token in self._end_tokens
        if self._stream and not ended:
            piece = self._stream.add(token)
            if piece and self.handle.request.stream:
                self.handle.push(piece)
        stopped = ended or (self._stream is not None and self._stream.stopped)
        if not stopped and len(self.tokens) < self._limit:
            return False
        self._finish(self.tokens[:-1] if ended else self.tokens, stopped)
        return True

    def _finish(self, kept: list[int], stopped: bool) -> None:
        if self._stream:
            piece, text = self._stream.end(kept)
        else:
            piece = text = decode(self._tokenizer, kept)
        self.handle.push(piece if self.handle.request.stream else text)
        self.handle.finish(Completion(text, len(self.tokens), "stop" if stopped else "length"))

"""One request in its slot: its tokens, its text so far, and the conditions that end it."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerFast

from sharegpt4v.dialogue import Completion, Request, TokenLogprob
from sharegpt4v.engine.handle import EngineError, Handle
from sharegpt4v.engine.text import TextStream, decode


class RunningRequest:
    """Grows token by token until it is complete.

    prompt_tokens: how many precede it in the slot. limit: most new tokens, by the request and by the
    context. end_tokens: ids that end it and are not part of its text. cached_tokens: those of the prompt that
    were not prefilled.
    """

    def __init__(
        self,
        handle: Handle,
        prompt_tokens: int,
        limit: int,
        tokenizer: PreTrainedTokenizerFast,
        end_tokens: Collection[int],
        cached_tokens: int = 0,
    ) -> None:
        self.handle = handle
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []  # of the tokens, where wanted
        handle.logprobs = self.logprobs
        self.in_flight = 0  # tokens that a step or prefill computes, and the host has not taken yet
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens
        self._limit = limit
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        # Decoding at every token takes time, so only for requests that stream or have stop strings.
        watched = handle.request.stream or handle.request.sampling.stop
        self._stream = TextStream(tokenizer, handle.request.sampling.stop, handle.shown) if watched else None

    @property
    def position(self) -> int:
        """The position in the slot of the last token, taken or in flight."""
        return self._prompt_tokens + len(self.tokens) + self.in_flight - 1

    @property
    def goes_on(self) -> bool:
        """Whether the limit leaves room for a token after those in flight."""
        return len(self.tokens) + self.in_flight < self._limit

    def take(self, token: int) -> Completion | None:
        """Appends a token and pushes the text it adds. Returns the answer once it is complete."""
        self.tokens.append(token)
        self.in_flight = max(0, self.in_flight - 1)
        ended = token in self._end_tokens
        if self._stream and not ended:
            piece = self._stream.add(token)
            if piece and self.handle.request.stream:
                self.handle.push(piece)
        stopped = ended or (self._stream is not None and self._stream.stopped)
        if not stopped and len(self.tokens) < self._limit:
            return None
        return self._complete(self.tokens[:-1] if ended else self.tokens, stopped)

    def _complete(self, kept: list[int], stopped: bool) -> Completion:
        if self._stream:
            piece, text = self._stream.end(kept)
        else:
            piece = text = decode(self._tokenizer, kept)
        self.handle.push(piece if self.handle.request.stream else text)
        handle = self.handle
        return Completion(
            text,
            len(self.tokens),
            "stop" if stopped else "length",
            token_ids=tuple(self.tokens),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            logprobs=tuple(self.logprobs),
            queued_seconds=(handle.begun or handle.submitted) - handle.submitted,
            first_token_seconds=(handle.first_token or handle.submitted) - handle.submitted,
        )


def answer_limit(request: Request, prompt_tokens: int, context: int) -> int:
    """Returns the most new tokens of an answer. Raises EngineError when the prompt fills the context."""
    if prompt_tokens >= context:
        raise EngineError(
            f"the prompt has {prompt_tokens} tokens and the context {context}: nothing is left "
            f"to answer in; shorten the dialogue, or send fewer images",
            "bad_request",
        )
    return min(request.sampling.max_new_tokens, context - prompt_tokens)

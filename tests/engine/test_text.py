"""Pieces that may be shown: joined they are the answer, whatever the tokens spell."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.text import TextStream

_VOCABULARY = ["<unk>", "a", "\u2581b", "\u2581", "<0xC3>", "<0xA9>", "<0xE4>"]
A, B, SPACE, C3, A9, E4 = range(1, 7)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Llama's way of spelling: words with a mark for the space before, bytes where there is no word."""
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(_VOCABULARY)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def _stream(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], *stop: str, shown: str = ""
) -> tuple[list[str], str]:
    stream = TextStream(tokenizer, stop, shown)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    last, text = stream.end(tokens)
    return [*pieces, last], text


@pytest.mark.parametrize(
    "tokens",
    [
        [A, B, B],
        [A, C3, A9, B],
        [A, C3, A9, E4, B],  # a whole character, half of another, then a word
        [A, C3, A9, E4],
        [SPACE, SPACE, A, SPACE, SPACE],
        [],
    ],
)
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    pieces, text = _stream(tokenizer, tokens)
    assert "".join(pieces) == text == text.strip()
    assert text.count("a") == tokens.count(A) and text.count("b") == tokens.count(B)


def test_a_half_character_is_not_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, text = _stream(tokenizer, [A, C3, A9, A])
    assert pieces[1] == "" and text == "a\u00e9a"


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, text = _stream(tokenizer, [A, A, B, A, B, B], "b b")
    assert text == "aa ba" == "".join(pieces)
    assert _stream(tokenizer, [A, B, A], "b b")[1] == "a ba"


def test_a_second_try_shows_only_what_is_new(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, text = _stream(tokenizer, [A, A, B], shown="aa")
    assert "".join(pieces) == " b" and text == "aa b"


def test_a_second_try_that_goes_another_way_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EngineError, match="differs from what was already streamed"):
        _stream(tokenizer, [A, A, A, A], shown="a b")

"""Pieces that may be shown: joined they are the answer, whatever the tokens spell."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sharegpt4v.engine.handle import EngineError
from sharegpt4v.engine.text import Detokenizer, TextStream

_VOCABULARY = ["<unk>", "a", "\u2581b", "\u2581", "<0xC3>", "<0xA9>", "<0xE4>", "<0x0A>"]
A, B, SPACE, C3, A9, E4, LINE = range(1, 8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Llama's way of spelling: words with a mark for the space before, bytes where there is no word."""
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(_VOCABULARY)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's way, as Qwen and Llama 3 have it: every token is bytes; here one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


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


BROKEN = "\ufffd"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([A, C3, A9, E4, B, A, A], f"a\u00e9{BROKEN} baa"),
        ([A, E4, B, A], f"a{BROKEN} ba"),
        ([A, C3, A9, C3, A9, E4, B, A], f"a\u00e9\u00e9{BROKEN} ba"),
        ([A, E4, *[C3, A9] * 5, A], f"a{BROKEN}\u00e9\u00e9\u00e9\u00e9\u00e9a"),  # no word for a long time
        ([E4, B, E4, B, C3, A9, E4, A], f"{BROKEN} b{BROKEN} b\u00e9{BROKEN}a"),
    ],
)
def test_text_goes_on_behind_a_broken_character(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], expected: str
) -> None:
    pieces, text = _stream(tokenizer, tokens)
    assert text == "".join(pieces) == expected
    assert pieces[-1] == "" and pieces[-2].endswith(expected[-1])  # it was shown as it came


def test_a_stop_string_behind_a_broken_character_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, text = _stream(tokenizer, [A, C3, A9, E4, B, A, A, B, B], "aa")
    assert text == "".join(pieces) == f"a\u00e9{BROKEN} b"


def test_garbage_is_shown_as_it_comes(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, text = _stream(tokenizer, [E4] * 200)
    assert text == "".join(pieces) == BROKEN * 200
    assert max(map(len, pieces)) <= 4


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_stream_to_what_they_spell(
    seed: int, tokenizer: PreTrainedTokenizerFast, byte_level: PreTrainedTokenizerFast
) -> None:
    """Of 600 random streams over bytes and words 119 gave up at the first broken character."""
    chosen = random.Random(seed)
    tokens = [chosen.choice([A, B, SPACE, C3, A9, E4]) for _ in range(40)] + [A]
    pieces, text = _stream(tokenizer, tokens)
    assert "".join(pieces) == text
    assert text.count("a") == tokens.count(A) and text.count("b") == tokens.count(B)
    assert pieces[-2].endswith("a")
    data = bytes(chosen.choice(b"ab \xc3\xa9\xe4\xf0\x9f\x9a\x8c") for _ in range(40)) + b"."
    ids = [byte_level.convert_tokens_to_ids(_letter(byte)) for byte in data]
    pieces, text = _stream(byte_level, ids)
    assert "".join(pieces) == text and pieces[-2].endswith(".")
    assert [letter for letter in text if letter in "ab"] == [chr(byte) for byte in data if byte in b"ab"]


def _letter(byte: int) -> str:
    """GPT-2's printable letter of a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in plain else chr(256 + [b for b in range(256) if b not in plain].index(byte))


def test_whole_characters_out_of_bytes_are_no_recovery(tokenizer: PreTrainedTokenizerFast) -> None:
    decoded = Detokenizer(tokenizer)
    assert [decoded.add(token) for token in (C3, A9, C3, A9, B, C3, A9)] == [
        *("", "\u00e9", "", "\u00e9", " b", "", "\u00e9"),
    ]
    assert not decoded.recovered


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([A, LINE, B], "\n", "a"),
        ([A, LINE, B, LINE, LINE, A], "\n\n", "a\n b"),
        ([LINE, A, LINE, LINE, B], "\n\n", "a"),
        ([LINE, LINE, A], "\n\n", ""),
        ([A, LINE], "\n", "a"),
        ([A, SPACE, A], " ", "a"),
    ],
)
def test_a_stop_string_of_white_space_ends_the_answer(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: str, expected: str
) -> None:
    stream = TextStream(tokenizer, [stop])
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    assert stream.stopped
    last, text = stream.end(tokens)
    assert text == "".join([*pieces, last]) == expected


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

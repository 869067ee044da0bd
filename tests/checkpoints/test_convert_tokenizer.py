"""tokenizer.json from a sentencepiece model, against sentencepiece's own algorithm written out."""

import random

import pytest
from tokenizers import Tokenizer

from sharegpt4v.checkpoints.tokenizer import from_sentencepiece
from sharegpt4v.errors import UserError
from tests.checkpoints.released import pieces, sentencepiece_model

TABLE = pieces(320, extra=("<TOKENS_UNUSED_0>",))
IDS = {text: index for index, (text, _, _) in enumerate(TABLE)}


def by_hand(text: str) -> list[int]:
    """Pairs merge, the best score first and the leftmost of equals, until none can; then bytes."""
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    scores = {piece: score for piece, score, kind in TABLE if kind == 1}
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))]
        best = max(((score, i) for score, i in pairs if score is not None), default=None)
        if best is None:
            break
        at = -best[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = []
    for symbol in symbols:
        ids += [IDS[symbol]] if symbol in IDS else [IDS[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return from_sentencepiece(sentencepiece_model(TABLE))


def test_ids_are_those_of_the_algorithm_and_decode_to_the_text(tokenizer: Tokenizer) -> None:
    drawn = random.Random(0)
    for _ in range(300):
        text = "".join(drawn.choice("aabbttt  x1\u00e9\n") for _ in range(drawn.randint(1, 30)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == by_hand(text), text
        assert tokenizer.decode(ids) == text


def test_text_encoded_with_special_tokens_begins_with_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ab").ids == [IDS["<s>"], *by_hand("ab")]


def test_control_and_user_defined_pieces_are_control_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab<TOKENS_UNUSED_0></s>", add_special_tokens=False).ids
    assert ids[-2:] == [IDS["<TOKENS_UNUSED_0>"], IDS["</s>"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_model_without_a_space_in_front_gets_none() -> None:
    plain = from_sentencepiece(sentencepiece_model(TABLE, prefix=False))
    ids = plain.encode("ab a", add_special_tokens=False).ids
    assert ids == [IDS["ab"], IDS["\u2581a"]]
    assert plain.decode(ids) == "ab a"


def test_unigram_model_is_refused() -> None:
    with pytest.raises(UserError, match="of sentencepiece's kind 1; ours reads BPE"):
        from_sentencepiece(sentencepiece_model(TABLE, kind=1))


def test_model_that_rewrites_text_is_refused() -> None:
    with pytest.raises(
        UserError, match="precompiled_charsmap.*a folder with a tokenizer.json as `tokenizer`"
    ):
        from_sentencepiece(sentencepiece_model(TABLE, rewrites=b"table"))


@pytest.mark.parametrize("data", [b"", b"\x0a\xff", b"no model at all", sentencepiece_model(TABLE)[:-1000]])
def test_broken_file_is_one_line(data: bytes) -> None:
    with pytest.raises(UserError, match="tokenizer.model"):
        from_sentencepiece(data)

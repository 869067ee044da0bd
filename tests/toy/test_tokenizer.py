"""The toy tokenizer knows every word of the toy world, and loses no other text."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sharegpt4v.models.toy import ANSWER_END, BOS, EOS, IMAGE, PAD, VOCAB_SIZE
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.captions import brief_caption, detailed_caption
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.toy.tokenizer import SPECIAL_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_control_tokens_have_the_ids_the_toy_models_name(tokenizer: PreTrainedTokenizerFast) -> None:
    names = ["<pad>", "<s>", "</s>", "<image>", "<TOKENS_UNUSED_1>"]
    assert tokenizer.convert_tokens_to_ids(names) == [PAD, BOS, EOS, IMAGE, ANSWER_END]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)


def test_the_vocabulary_fits_the_toy_models(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= VOCAB_SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("difficulty", (1, 2, 3))
def test_captions_round_trip_with_one_token_a_word(
    tokenizer: PreTrainedTokenizerFast, difficulty: int
) -> None:
    for index in range(300):
        scene = make_scene(41, index, difficulty=difficulty)
        for caption in (detailed_caption(scene), " " + brief_caption(scene)):
            ids = tokenizer.encode(caption)
            assert tokenizer.decode(ids) == caption
            words = sum(token.strip("Ġ").isalpha() for token in tokenizer.convert_ids_to_tokens(ids))
            assert words == sum(word.strip('.,:"').isalpha() for word in caption.split())


def test_the_unified_prompt_is_one_token_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(UNIFIED_CAPTION.text)
    assert len(ids) == len(UNIFIED_CAPTION.text.split()) + 1
    assert tokenizer.decode(ids) == UNIFIED_CAPTION.text


@pytest.mark.parametrize(
    "text",
    [
        "Zwölf Boxkämpfer 中文 🦊",
        "  two  spaces , and a tab\t\n",
        "nul \x00 and right-to-left \u202e",
        "don't say 'x'",
        "",
    ],
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_control_tokens_in_text_stay_text(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    text = f"say {token} twice"
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_control_token_is_added_unasked(tokenizer: PreTrainedTokenizerFast) -> None:
    assert min(tokenizer.encode("A photo of one shape")) >= len(SPECIAL_TOKENS)


def test_a_saved_tokenizer_loads_with_the_same_ids(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    caption = detailed_caption(make_scene(41, 0))
    assert loaded.encode(caption) == tokenizer.encode(caption)
    assert loaded.decode(loaded.encode(caption)) == caption

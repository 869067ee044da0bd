"""The toy tokenizer: one token for each word the toy world knows, bytes for everything else.

A word token carries the space before it, as in GPT-2, so decoding gives back any text exactly.
"""

from collections.abc import Callable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.captions import phrases
from sharegpt4v.toy.cells import NOTHING
from sharegpt4v.toy.questions import wordings

SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<unk>",
    "<TOKENS_UNUSED_0>",
    "<TOKENS_UNUSED_1>",
    "<|User|>:",
    "<|Bot|>:",
)
"""Control tokens by id. `encode(..., split_special_tokens=True)` reads them in text as plain text."""

_DIALOGUE = (
    "<|User|>:\n<|Bot|>: A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
)
"""The fixed text of both prompt templates, or each prompt would cost 150 byte tokens."""

_wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its __init__ has no types


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer, the same every time; `encode` adds no control tokens.

    Ids: SPECIAL_TOKENS, then the 256 bytes, then words in the order in which the toy world lists them.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = list(SPECIAL_TOKENS) + sorted(pre_tokenizers.ByteLevel.alphabet())
    known = set(vocabulary)
    for text in _texts():
        for word, _ in split.pre_tokenize_str(text):
            if word not in known:
                known.add(word)
                vocabulary.append(word)
    # ignore_merges takes a known word whole; without merges all others fall into bytes.
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<s>", "</s>", "<pad>", "<unk>")],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _texts() -> Iterator[str]:
    """Yields every text whose words become tokens, also behind a space, as answers are in vicuna_v1."""
    for text in (UNIFIED_CAPTION.text, *phrases()):
        yield text
        yield " " + text
    yield _DIALOGUE
    yield from (f" {text}" for text in (*wordings(), NOTHING))

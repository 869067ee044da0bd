"""The bytes of tokens, joined, are the text: for byte-level tokenizers and for SentencePiece's."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sharegpt4v.engine.token_bytes import TokenBytes

TEXT = "A red boat, \u00e9\u2603 and\n\U0001f600 more"


def test_a_byte_level_tokenizer() -> None:
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    find = TokenBytes(tokenizer)
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    assert b"".join(map(find, tokens)) == TEXT.encode()


def test_a_sentencepiece_tokenizer_with_byte_tokens() -> None:
    letters = ["<unk>", "<s>", "\u2581", "\u2581red", "b", "o", "a", "t", "A"]
    vocabulary = {name: number for number, name in enumerate(letters)}
    vocabulary |= {f"<0x{byte:02X}>": len(letters) + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    find = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    pieces = ["<s>", "\u2581red", "\u2581", "b", "o", "a", "t", "<0xE2>", "<0x98>", "<0x83>"]
    assert b"".join(find(vocabulary[piece]) for piece in pieces) == " red boat\u2603".encode()


def test_an_id_without_a_token_adds_nothing() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    find = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (find(0), find(7)) == (b"a", b"")

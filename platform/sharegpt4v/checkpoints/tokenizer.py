"""tokenizer.json for a released model, which may come with a sentencepiece model alone.

Reads sentencepiece's protobuf (sentencepiece_model.proto) directly: the package that does is no dependency.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from sharegpt4v.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType
_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


def load_tokenizer(folder: Path, added: Mapping[str, int]) -> Tokenizer:
    """Loads tokenizer.json, else tokenizer.model, and adds control tokens at its end.

    added: tokens and the ids that the model has for them. Raises UserError when they get others, or when
    the folder has neither file.
    """
    if (folder / "tokenizer.json").exists():
        tokenizer = _read_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").exists():
        try:
            tokenizer = from_sentencepiece((folder / "tokenizer.model").read_bytes())
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    else:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model: give a folder with one",
            field="tokenizer",
        )
    for token, wanted in added.items():
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        got = tokenizer.token_to_id(token)
        if got != wanted:
            raise UserError(f"the tokenizer in {folder} gives {token} the id {got}, the model's is {wanted}")
    return tokenizer


def _read_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for a file that it cannot read
        raise UserError(f"cannot read {path}: {error}; copy it again") from None


def from_sentencepiece(data: bytes) -> Tokenizer:
    """Builds the tokenizer of a sentencepiece BPE model with byte fallback, as Llama and InternLM have it.

    Merges are the splits of each piece into two others, the best scores first. BOS precedes a text that is
    encoded with special tokens. Control and user-defined pieces are control tokens here.
    Raises UserError for another kind of model.
    """
    pieces, kind, dummy_prefix = _read(data)
    if kind != _BPE:
        raise UserError(f"tokenizer.model is of sentencepiece's kind {kind}; ours reads BPE, kind {_BPE}")
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    bpe = models.BPE(
        vocabulary, _merges(pieces, vocabulary), unk_token=pieces[0].text, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = [normalizers.Prepend(_SPACE)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [piece.text for piece in pieces if piece.kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    if "<s>" in vocabulary:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return tokenizer


def _merges(pieces: Sequence[Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for piece in pieces:
        if piece.kind != _NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _read(data: bytes) -> tuple[list[Piece], int, bool]:
    """Returns pieces, TrainerSpec.model_type (default 1), NormalizerSpec.add_dummy_prefix (default true)."""
    pieces, kind, dummy_prefix = [], 1, True
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                kind = next((int(v) for n, v in _fields(value) if n == 3 and isinstance(v, int)), 1)
            elif number == 3 and isinstance(value, bytes):
                normaliser = dict(_fields(value))
                dummy_prefix = bool(normaliser.get(3, True))
                if normaliser.get(2):
                    raise UserError(
                        "tokenizer.model rewrites text by a table (precompiled_charsmap) that ours does not "
                        "read: give a folder with a tokenizer.json as `tokenizer`"
                    )
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.model is no sentencepiece model ({error}); copy it again") from None
    if not pieces:
        raise UserError("tokenizer.model holds no pieces; copy it again")
    return pieces, kind, dummy_prefix


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields field numbers and values of a protobuf message: integers, or the bytes of everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise IndexError(f"wire type {wire} at byte {at}")
        length, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + length > len(data):
            raise IndexError(f"it ends at byte {len(data)}")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7

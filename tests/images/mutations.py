"""Image files with random damage: a seed names each of them, the same on every machine.

Real photographs, and every odd format that other tests use, are cut, overwritten, spliced and repeated. In
PNG, whose checksums would give most damage away at once, whole chunks are changed and their checksums made
right.
"""

import io
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from tests.commands import PHOTOS
from tests.images.every_kind import write_odd
from tests.images.samples import HAS_HEIF, encode, heic, picture

PNG_START = b"\x89PNG\r\n\x1a\n"
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@cache
def corpus() -> tuple[tuple[str, bytes], ...]:
    """Whole files by name: the photographs, if they are there, a few of them in each format, and odd ones."""
    photos = sorted(PHOTOS.glob("*/*.jpg"))
    files = {f"{photo.parent.name}/{photo.name}": photo.read_bytes() for photo in photos}
    for number, data in enumerate(list(files.values())[::12] or [encode(picture(320, 240), "JPEG")]):
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB").resize((160, 112))
        files |= {f"{number} as {kind}": data for kind, data in _encodings(image)}
    with tempfile.TemporaryDirectory() as folder:
        files |= {name: (Path(folder) / name).read_bytes() for name in write_odd(Path(folder))}
    return tuple(sorted(files.items()))


def _encodings(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    for kind in ("PNG", "WEBP", "GIF", "BMP", "AVIF"):
        yield kind, encode(image, kind)
    for kind in ("GIF", "WEBP", "PNG"):
        yield f"animated {kind}", encode(image, kind, save_all=True, append_images=[image.rotate(180)])
    for mode in ("P", "LA", "1"):
        yield f"{mode} PNG", encode(image.convert(mode), "PNG")
    yield "transparent PNG", encode(image.convert("P"), "PNG", transparency=3)
    yield "P BMP", encode(image.convert("P"), "BMP")
    yield "restarting JPEG", encode(image, "JPEG", restart_marker_blocks=3)
    if HAS_HEIF:
        yield "HEIC", heic(image)


def mutated(seed: int) -> tuple[str, bytes]:
    """Returns the name of a file of the corpus, and its bytes with one to four mutations."""
    chance = random.Random(seed)
    name, data = chance.choice(corpus())
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        mutate = chance.choice(CHUNKS if data.startswith(PNG_START) and chance.random() < 0.6 else BYTES)
        data = mutate(data, chance) or data
    return name, data


def _place(data: bytes, chance: random.Random) -> int:
    """A byte of the header as often as one of all the rest."""
    return chance.randrange(min(len(data), 256) if chance.random() < 0.5 else len(data))


def _bit(data: bytes, chance: random.Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _number(data: bytes, chance: random.Random) -> bytes:
    at, width = _place(data, chance), chance.choice((1, 2, 4))
    value = chance.choice(NUMBERS) & (1 << 8 * width) - 1
    return data[:at] + value.to_bytes(width, chance.choice(("big", "little"))) + data[at + width :]


def _block(data: bytes, chance: random.Random) -> bytes:
    at, length = _place(data, chance), chance.choice((1, 16, 512))
    filling = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
    return data[:at] + filling + data[at + length :]


def _hole(data: bytes, chance: random.Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + data[at + chance.choice((1, 4, 64, 4096)) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    at, length = _place(data, chance), chance.choice((4, 64, 4096))
    return data[:at] + data[at : at + length] * chance.choice((2, 3, 50)) + data[at + length :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _splice(data: bytes, chance: random.Random) -> bytes:
    other = chance.choice(corpus())[1]
    at = chance.randrange(len(other))
    return data[: _place(data, chance)] + other[at : at + 100_000]


def _end(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\0" * 100, chance.randbytes(100), data))


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and body of each whole chunk of a PNG."""
    chunks, at = [], len(PNG_START)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunks.append((name, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return PNG_START + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _chunk_lost(data: bytes, chance: random.Random) -> bytes:
    chunks = _chunks(data)
    if chunks:
        del chunks[chance.randrange(len(chunks))]
    return _png(chunks)


def _chunk_changed(data: bytes, chance: random.Random) -> bytes:
    chunks = _chunks(data)
    if filled := [index for index, (_, body) in enumerate(chunks) if body]:
        index = chance.choice(filled)
        name, body = chunks[index]
        chunks[index] = name, chance.choice(BYTES)(body, chance)
    return _png(chunks)


def _chunk_moved(data: bytes, chance: random.Random) -> bytes:
    chunks = _chunks(data)
    if chunks:
        chunk = chance.choice(chunks)
        chunks.insert(chance.randrange(len(chunks)), chunk)
    return _png(chunks)


def _pixels_changed(data: bytes, chance: random.Random) -> bytes:
    """Changes what the pixels are compressed from."""
    chunks = _chunks(data)
    try:
        raw = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    except zlib.error:
        return data
    if not raw:
        return data
    body = zlib.compress(chance.choice(BYTES)(raw, chance), 1)
    others = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    return _png([*others, (b"IDAT", body), (b"IEND", b"")])


Mutation = Callable[[bytes, random.Random], bytes]
BYTES: tuple[Mutation, ...] = (_bit, _number, _block, _hole, _repeat, _cut, _splice, _end)
CHUNKS: tuple[Mutation, ...] = (_chunk_lost, _chunk_changed, _chunk_moved, _pixels_changed)

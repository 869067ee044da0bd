"""Where a model's weights are: the shipped toy, a transformers folder, or a URI fetched once per node.

Needs no torch: the driver learns a model's name, digest and image shape from JSON files and bytes alone.
"""

import hashlib
import json
import struct
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sharegpt4v.checkpoints.cache import cached
from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.errors import UserError

_TOYS = Path(__file__).parent.parent / "toy" / "checkpoints"
TOY_CAPTIONER, TOY_CHAT = _TOYS / "captioner", _TOYS / "lmm"

_PROTOCOLS: dict[str, ImageProtocol] = {
    "share_captioner": "squash",  # reference, 4: resized to a square, aspect not kept
    "llava": "pad",  # reference, 5: SFT and inference pad with the mean colour
}

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What safetensors calls the dtypes that captioners are stored in."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a pipeline must know before any weight is loaded.

    name: for people. digest: 12 hex digits over configuration, tokenizer and weight bytes.
    image_size: pixels a side. protocol: how the model expects images to become square.
    """

    folder: Path
    name: str
    digest: str
    image_size: int
    protocol: ImageProtocol

    @property
    def id(self) -> str:
        return f"{self.name}@{self.digest}"


def read_card(model: str, toy: Path = TOY_CAPTIONER) -> ModelCard:
    """Reads the card of `toy`, a folder, or a URI, which is fetched. Raises UserError for no model."""
    folder = model_folder(model, toy)
    config = _read_config(folder, model)
    kind = config.get("model_type")
    if kind not in _PROTOCOLS:
        raise UserError(
            f"{model} holds a {kind!r} model; known captioners: {', '.join(_PROTOCOLS)}", field="model"
        )
    shipped = {TOY_CAPTIONER: "toy-captioner", TOY_CHAT: "toy-chat"}
    name = shipped.get(folder) or model.rstrip("/").rsplit("/", 1)[-1]
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{model} holds no *.safetensors: copy or convert the weights again", field="model")
    stored_weights(folder)  # a cut copy is refused here, not by every actor
    size = config["vision_config"]["image_size"]
    # A checkpoint trained in another way than its family names its protocol itself.
    protocol = config.get("image_protocol", _PROTOCOLS[kind])
    return ModelCard(folder, name, _digest(folder), int(size), protocol)


def model_folder(model: str, toy: Path = TOY_CAPTIONER) -> Path:
    """Returns the local folder of a model; a URI is fetched into this node's cache first, once."""
    if model == "toy":
        return toy
    if not model:
        raise UserError(
            "this preset ships none: give a folder with a converted Share-Captioner", field="model"
        )
    if "://" not in model:
        return Path(model)
    return cached(f"models/{hashlib.sha256(model.encode()).hexdigest()[:24]}", partial(_fetch, model))


def stored_weights(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns the bytes of all tensors in the folder's safetensors files, and their dtypes by frequency.

    Reads the files' headers alone. Raises UserError for a file that is none, or of another size.
    """
    by_dtype: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                tensors = json.loads(file.read(min(length, size)))
            tensors.pop("__metadata__", None)
            needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            for tensor in tensors.values():
                start, end = tensor["data_offsets"]
                by_dtype[_DTYPES.get(tensor["dtype"], tensor["dtype"])] += end - start
        except (struct.error, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{path} is no safetensors file: copy or convert the weights again", field="model"
            ) from None
        if size != needed:
            raise UserError(
                f"{path} is {size:,} bytes, its header says {needed:,}: copy or convert the weights again",
                field="model",
            )
    return by_dtype.total(), tuple(dtype for dtype, _ in by_dtype.most_common())


def _fetch(uri: str, folder: Path) -> None:
    import fsspec  # here: engines use this module too, and they need no fsspec for a local folder

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if not filesystem.isdir(path):
            raise UserError(f"{uri} is not a folder there", field="model")
        filesystem.get(path.rstrip("/") + "/", str(folder) + "/", recursive=True)
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot fetch {uri}: {error}", field="model") from None


def _read_config(folder: Path, model: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{model}: cannot read {folder / 'config.json'} ({error.strerror}): "
            f"give a transformers folder, or toy for the toy captioner",
            field="model",
        ) from None
    except ValueError as error:
        raise UserError(f"{model}: config.json is not JSON ({error})", field="model") from None
    assert isinstance(config, dict)
    return config


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("tokenizer.model")]
    for path in sorted(files):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]

"""Where a model's weights are: the shipped toy, a transformers folder, a name of the Hub, or a URI.

Needs no torch: the driver learns a model's name, digest and image shape from JSON files and bytes alone.
"""

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sharegpt4v.checkpoints.cache import cached
from sharegpt4v.checkpoints.hub import fetch_from_hub, hub_name, pinned
from sharegpt4v.dialogue import EngineName, ImageProtocol, ImageShape, SquareImages, WholeImages
from sharegpt4v.errors import UserError

_TOYS = Path(__file__).parent.parent / "toy" / "checkpoints"
TOY_CAPTIONER, TOY_CHAT = _TOYS / "captioner", _TOYS / "lmm"

_PROTOCOLS: dict[str, ImageProtocol] = {
    "share_captioner": "squash",  # reference, 4: resized to a square, aspect not kept
    "llava": "pad",  # reference, 5: SFT and inference pad with the mean colour
}

MAX_PIXELS = 1 << 20
"""Pixels of an image, 1024 x 1024, for an engine that takes whole images, unless others are asked for."""

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What safetensors calls the dtypes that captioners are stored in."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a pipeline must know before any weight is loaded.

    name: for people. digest: 12 hex digits over configuration, tokenizer and weight bytes.
    images: the shape of images that the engine takes for this model. weights: where every node finds them.
    weight_bytes: of all tensors as they are stored.
    """

    folder: Path
    name: str
    digest: str
    images: ImageShape
    weights: str
    weight_bytes: int

    @property
    def id(self) -> str:
        return f"{self.name}@{self.digest}"


def read_card(model: str, toy: Path = TOY_CAPTIONER, engine: EngineName = "torch") -> ModelCard:
    """Reads the card of `toy`, a folder, or a name of the Hub or a URI, which are fetched.

    Raises UserError for no model, and for one that the engine cannot run.
    """
    folder = model_folder(model, toy)
    config = _read_config(folder, model)
    # vLLM runs our own families on squares, as the torch engine does, and any other by its own processor.
    if engine == "transformers" or (engine == "vllm" and config.get("model_type") not in _PROTOCOLS):
        images: ImageShape = _whole_images(folder, config, model, engine)
    else:
        images = _square_images(config, model)
    shipped = {TOY_CAPTIONER: "toy-captioner", TOY_CHAT: "toy-chat"}
    hub = hub_name(model)
    name = shipped.get(folder) or (hub[0] if hub else model.rstrip("/")).rsplit("/", 1)[-1]
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{model} holds no *.safetensors: copy or convert the weights again", field="model")
    weight_bytes, _ = stored_weights(folder)  # a cut copy is refused here, not by every actor
    # A URI goes to the nodes as it is, and each fetches it once into its own cache. So does `toy`, which the
    # library brings along and which has another path on every node.
    as_given = model == "toy" or "://" in model
    weights = pinned(model, folder) if hub else model if as_given else str(folder.absolute())
    template = isinstance(images, WholeImages)  # it is asked by the folder's chat template
    return ModelCard(folder, name, _digest(folder, template), images, weights, weight_bytes)


def _square_images(config: Mapping[str, Any], model: str) -> SquareImages:
    kind = config.get("model_type")
    if kind not in _PROTOCOLS:
        raise UserError(
            f"{model} holds a {kind!r} model; known captioners: {', '.join(_PROTOCOLS)}; "
            f"`engine` transformers or vllm runs others",
            field="model",
        )
    # A checkpoint trained in another way than its family names its protocol itself.
    protocol = config.get("image_protocol", _PROTOCOLS[kind])
    return SquareImages(int(config["vision_config"]["image_size"]), protocol)


def _whole_images(folder: Path, config: Mapping[str, Any], model: str, engine: EngineName) -> WholeImages:
    """Raises UserError for a folder from which the engine cannot make prompts or a model."""
    kind = config.get("model_type")
    if kind == "share_captioner":
        raise UserError(
            f"{model} holds a Share-Captioner, which transformers does not know: `engine` torch runs it",
            field="model",
        )
    if not any((folder / name).exists() for name in _PROCESSOR_FILES):
        raise UserError(
            f"{model} holds a {kind!r} model without {' or '.join(_PROCESSOR_FILES)}, so no way to make its "
            f"images' tensors: give the folder of a vision-language model",
            field="model",
        )
    if not _has_chat_template(folder):
        raise UserError(
            f"{model} has no chat template, by which the {engine} engine makes prompts: add its "
            f"chat_template.jinja, or give the model's instruction-tuned version",
            field="model",
        )
    return WholeImages(MAX_PIXELS)


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    for name in ("processor_config.json", "tokenizer_config.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def model_folder(model: str, toy: Path = TOY_CAPTIONER) -> Path:
    """Returns the local folder of a model; a name of the Hub or a URI is fetched into a cache first.

    Raises UserError where that fails.
    """
    if model == "toy":
        return toy
    if not model:
        raise UserError(
            "this preset ships none: give a folder with a converted Share-Captioner", field="model"
        )
    if hub_name(model):
        return fetch_from_hub(model)
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


def _digest(folder: Path, chat_template: bool) -> str:
    digest = hashlib.sha256()
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("tokenizer.model")]
    if chat_template:
        files += folder.glob("*.jinja")
    for path in sorted(files):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]

"""Checkpoints as they lie on disk: names, shapes and dtypes first, then one tensor at a time.

Both kinds of shard are mapped into memory, so that a tensor which is only renamed never becomes memory of
this process: safetensors by `safe_open`, `.bin` by `torch.load(mmap=True, weights_only=True)`. The bytes of a
`.bin` tensor are compared with its archive's checksum when it is read. safetensors keeps no checksums:
`safe_open` checks that dtypes and shapes account for every byte of the file.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharegpt4v.checkpoints.checksums import Checksums
from sharegpt4v.errors import UserError

_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Index and single file, in the order in which transformers looks for them."""

_COMPUTED = re.compile(r"(?:rotary_emb\.(?:inv_freq|scale)|position_ids)$")
"""Tables that old versions stored and every model computes."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What safetensors calls the dtypes that checkpoints hold."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that has not been read. name: in its file."""

    checkpoint: "Checkpoint"
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Returns a view of the mapped file: copy it before you change it. Raises UserError for damage."""
        return self.checkpoint.read(self)


def under_other_names(tensors: Iterable[tuple[str, TensorRef]]) -> dict[str, TensorRef]:
    """Returns tensors by the names given with them. Raises UserError when two get the same."""
    out: dict[str, TensorRef] = {}
    for name, stored in tensors:
        if name in out:
            raise UserError(
                f"{stored.checkpoint.folder}: {out[name].name} and {stored.name} would both be {name}; leave "
                "one of them away"
            )
        out[name] = stored
    return out


def dimensions(tensors: Mapping[str, TensorRef], name: str, number: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that sizes others. Raises UserError when it is missing or misshapen."""
    if name not in tensors:
        raise UserError(f"1 tensor is missing, {name}; copy the checkpoint again")
    shape = tensors[name].shape
    if len(shape) != number:
        raise UserError(f"{name} has the shape {shape}, expected {number} numbers; copy the checkpoint again")
    if 0 in shape:
        raise UserError(f"{name} has the shape {shape} and so holds nothing; copy the checkpoint again")
    return shape


class Checkpoint:
    """The tensors of one transformers-like folder, without tables that are computed. One shard is open.

    Raises UserError for a folder without weights, a shard that is missing, broken or more than tensors,
    and a name that two shards hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorRef] = {}
        self._shards: dict[str, Path] = {}
        self._open: tuple[Path, _Shard] | None = None
        for shard in _shards(folder):
            for name, shape, dtype in self._list(shard):
                if _COMPUTED.search(name):
                    continue
                if name in self._shards:
                    raise UserError(f"{name} is in {self._shards[name].name} and again in {shard}")
                self._shards[name] = shard
                self.tensors[name] = TensorRef(self, name, tuple(shape), dtype)

    def config(self) -> dict[str, Any]:
        """Reads config.json. Raises UserError when there is none."""
        return read_json(self.folder / "config.json")

    def read(self, stored: TensorRef) -> Tensor:
        shard = self._shards[stored.name]
        file = self._file(shard)
        if not isinstance(file, _Archive):
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor
        tensor = file.tensors[stored.name]
        if not file.checksums.match(tensor):
            raise UserError(
                f"{shard}: the bytes of {stored.name} do not match the checksum that the file has of them; "
                "copy it again"
            )
        return tensor

    def _list(self, shard: Path) -> Iterable[tuple[str, Iterable[int], torch.dtype]]:
        file = self._file(shard)
        if isinstance(file, _Archive):
            return [(name, tensor.shape, tensor.dtype) for name, tensor in file.tensors.items()]
        slices = {name: file.get_slice(name) for name in file.keys()}
        for name, part in slices.items():
            if part.get_dtype() not in _DTYPES:
                raise UserError(f"{shard}: {name} is of {part.get_dtype()}, which is not read")
        return [(name, part.get_shape(), _DTYPES[part.get_dtype()]) for name, part in slices.items()]

    def _file(self, shard: Path) -> "_Shard":
        if self._open is None or self._open[0] != shard:
            self._open = None  # close the old mapping before the new one is opened
            self._open = (shard, _map(shard))
        return self._open[1]


@dataclass(frozen=True, slots=True)
class _Archive:
    """A mapped `.bin` file."""

    tensors: Mapping[str, Tensor]
    checksums: Checksums


_Shard = _Archive | Any
"""The other kind is safe_open's handle, which has no types."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError when the file is missing or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; copy the JSON files, too") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; copy it again")
    return content


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file' if folder.exists() else 'not there'}; give a local folder")
    for index, single in _LAYOUTS:
        if (folder / index).exists():
            shards = _indexed(folder / index)
            absent = [name for name in shards if not (folder / name).exists()]
            if absent:
                raise UserError(f"{folder / index} names {absent[0]}, which is not there; copy it again")
            return [folder / name for name in shards]
        if (folder / single).exists():
            return [folder / single]
    expected = " or ".join(name for layout in _LAYOUTS for name in layout)
    raise UserError(f"{folder} holds no weights: expected {expected}")


def _indexed(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from names to files; copy it again")
    return sorted(set(weight_map.values()))


def _map(shard: Path) -> _Shard:
    try:
        if shard.suffix == ".safetensors":
            return safe_open(shard, "pt")
        _check_archive(shard)
        content = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
        checksums = Checksums(shard)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{shard} holds more than tensors, which could run code; refused") from None
    except (
        SafetensorError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"cannot read {shard}: {reason}; copy it again") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UserError(f"{shard} is no table of tensors by name")
    return _Archive(content, checksums)


def _check_archive(shard: Path) -> None:
    """Raises UserError for a file that is no zip archive (torch.save before 1.6): it cannot be mapped."""
    with open(shard, "rb") as file:
        start = file.read(16)
    if start.startswith(b"version https://"):
        raise UserError(f"{shard} is a pointer of Git LFS and not the file: fetch it with `git lfs pull`")
    if not start.startswith(b"PK"):
        raise UserError(f"{shard} is no archive as torch.save writes it since 1.6; save or copy it again")

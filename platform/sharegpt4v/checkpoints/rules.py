"""What is made of which tensors: planned and checked from names and shapes, before a byte is read."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from sharegpt4v.checkpoints.reader import TensorRef
from sharegpt4v.errors import UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights can be of. Others are quantised, and their scales would be lost."""

Report = Callable[[int], None]
"""Called with the bytes of every shard that has been written."""


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One tensor of the output.

    takes: the tensors it is made of, by name in the checkpoint, with the shapes they must have; the first
    one gives the dtype. make: gets them in that order and gives `shape`.
    """

    name: str
    shape: Shape
    takes: Shapes
    make: Callable[..., Tensor] = as_it_is


def renamed(name: str, source: str, shape: Shape) -> TensorRule:
    """Returns a rule for the same tensor under another name."""
    return TensorRule(name, shape, {source: shape})


@dataclass(frozen=True, slots=True)
class Depth:
    """Blocks that a stack has by its configuration. prefix: of their names, before the number.

    source: where the number comes from, for people.
    """

    prefix: str
    blocks: int
    source: str


def check(
    rules: Sequence[TensorRule],
    tensors: Mapping[str, TensorRef],
    folder: Path,
    depths: Iterable[Depth] = (),
    elsewhere: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Checks that every needed tensor is there, in its shape and of floats, and nothing is left over.

    depths: of stacks, named when a checkpoint has another number of blocks. elsewhere: folders by the
    beginning of the names that belong there and not into `folder`.
    Raises UserError that names the folder and the first tensor that is missing, surplus or misshapen.
    """
    needed = {name: shape for rule in rules for name, shape in rule.takes.items()}
    missing = [name for name in needed if name not in tensors]
    if missing:
        homes = [home for start, home in elsewhere.items() if missing[0].startswith(start)]
        where = homes[0] if homes else folder
        depth = _other_depth(missing[0], depths, tensors)
        raise UserError(
            f"{where}: {_count(missing)} missing, {missing[0]} first{depth}; copy the checkpoint again"
        )
    surplus = [name for name in tensors if name not in needed]
    if surplus:
        where = tensors[surplus[0]].checkpoint.folder
        raise UserError(
            f"{where}: {_count(surplus)} without a place in this layout, {surplus[0]} first"
            f"{_other_depth(surplus[0], depths, tensors)}"
        )
    for name, shape in needed.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise UserError(
                f"{stored.checkpoint.folder}: {name} is {_text(stored.shape)}, its configuration makes it "
                f"{_text(shape)}"
            )
        if stored.dtype not in _FLOATS:
            kinds = ", ".join(map(_kind, _FLOATS))
            raise UserError(
                f"{stored.checkpoint.folder}: {name} is of {_kind(stored.dtype)}; weights of {kinds} are read"
            )


def size(rule: TensorRule, tensors: Mapping[str, TensorRef]) -> int:
    """Returns the bytes of the tensor that a rule makes."""
    return math.prod(rule.shape) * _dtype(rule, tensors).itemsize


def total_size(rules: Iterable[TensorRule], tensors: Mapping[str, TensorRef]) -> int:
    """Returns the bytes of all tensors that the rules make."""
    return sum(size(rule, tensors) for rule in rules)


def write(
    rules: Sequence[TensorRule],
    tensors: Mapping[str, TensorRef],
    folder: Path,
    shard_bytes: int,
    report: Report = lambda written: None,
) -> None:
    """Writes `model.safetensors`, or shards and their index, under the names transformers looks for.

    shard_bytes: size of a shard at most; a tensor that is larger has one to itself. Renamed tensors stay in
    the mapped input; memory is taken by those that are made anew, of one shard at a time.
    Raises UserError for a tensor whose bytes are damaged, or that holds NaN or infinite numbers.
    """
    shards = _split(rules, tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        _write_shard(shard, tensors, folder / name)
        weight_map |= dict.fromkeys((rule.name for rule in shard), name)
        report(total_size(shard, tensors))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total_size(rules, tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(shard: Sequence[TensorRule], tensors: Mapping[str, TensorRef], path: Path) -> None:
    # A function of its own, so that a shard is freed before the next one is made.
    made: dict[str, Tensor] = {}
    memory = set()
    for rule in shard:
        tensor = _make(rule, tensors)
        # Tensors of a .bin file may share memory, and safetensors wants each by itself.
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        made[rule.name] = tensor
    path.touch()
    mode = path.stat().st_mode
    save_file(made, path, metadata={"format": "pt"})
    if path.stat().st_mode != mode:  # save_file lets nobody else read it, whatever the umask
        path.chmod(mode)


def _split(
    rules: Sequence[TensorRule], tensors: Mapping[str, TensorRef], shard_bytes: int
) -> list[list[TensorRule]]:
    shards: list[list[TensorRule]] = [[]]
    left = shard_bytes
    for rule in rules:
        wanted = size(rule, tensors)
        if wanted > left and shards[-1]:
            shards.append([])
            left = shard_bytes
        shards[-1].append(rule)
        left -= wanted
    return shards


def _make(rule: TensorRule, tensors: Mapping[str, TensorRef]) -> Tensor:
    taken = {name: tensors[name].read() for name in rule.takes}
    tensor = rule.make(*taken.values()).contiguous()
    assert (tensor.shape, tensor.dtype) == (rule.shape, _dtype(rule, tensors)), rule.name
    if not _is_finite(tensor):
        raise _not_finite(rule, {name: (tensors[name], read) for name, read in taken.items()})
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # Both ends are NaN when any number is: one pass, and no copy as torch.isfinite would make.
    return not tensor.numel() or all(math.isfinite(end.item()) for end in tensor.aminmax())


def _not_finite(rule: TensorRule, taken: Mapping[str, tuple[TensorRef, Tensor]]) -> UserError:
    for name, (stored, tensor) in taken.items():
        where = (~torch.isfinite(tensor)).nonzero()
        if len(where):
            place = ", ".join(str(index) for index in where[0].tolist())
            return UserError(
                f"{stored.checkpoint.folder}: {name} holds NaN or infinite numbers, {len(where):,} of "
                f"{tensor.numel():,}, [{place}] first; no model computes with them: copy or train it again"
            )
    kind = _kind(next(iter(taken.values()))[0].dtype)
    return UserError(f"{rule.name}: merged numbers exceed what {kind} holds; convert from a wider dtype")


def _dtype(rule: TensorRule, tensors: Mapping[str, TensorRef]) -> torch.dtype:
    return tensors[next(iter(rule.takes))].dtype


def _other_depth(name: str, depths: Iterable[Depth], tensors: Mapping[str, TensorRef]) -> str:
    for depth in depths:
        inside = [other for other in tensors if other.startswith(depth.prefix)]
        found = len({other.removeprefix(depth.prefix).split(".")[0] for other in inside})
        if name.startswith(depth.prefix) and found != depth.blocks:
            return f" (blocks: {depth.blocks} {depth.source}, {found} in the checkpoint)"
    return ""


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"

"""Which dtype weights have in memory where a configuration says `auto`. Needs no torch: drivers decide it."""

from pathlib import Path
from typing import Literal, TypeAlias

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

CPUINFO = Path("/proc/cpuinfo")

_TOY_BYTES = 64_000_000
"""Models whose stored weights are smaller are toys: starting its operations takes most of a step."""


def resolve_dtype(asked: Literal["auto"] | Dtype, weight_bytes: int, use_gpu: bool) -> Dtype:
    """Returns what was asked for; for `auto` bfloat16 on GPUs, and on CPUs with matrix units for it.

    weight_bytes: of the model as it is stored; toys stay in float32 on CPUs. The CPU is that of this process:
    a driver decides for all its workers, or answers would depend on which of them gave them.
    """
    if asked != "auto":
        return asked
    if use_gpu or (weight_bytes >= _TOY_BYTES and has_matrix_units()):
        return "bfloat16"
    return "float32"


def has_matrix_units() -> bool:
    """Returns whether this CPU multiplies matrices of bfloat16 in tiles (AMX, Intel's Xeons since 2023).

    Vector instructions for bfloat16 alone (AVX512_BF16) do not count: they are no faster than float32's.
    """
    try:
        lines = CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {"amx_tile", "amx_bf16"} <= set(flags)

"""What `auto` is: bfloat16 where a device multiplies its matrices in hardware, and the model is no toy."""

from pathlib import Path

import pytest

from sharegpt4v.engine import dtype
from sharegpt4v.engine.dtype import has_matrix_units, resolve_dtype

LARGE, TOY = 400_000_000, 2_000_000


def _cpu(monkeypatch: pytest.MonkeyPatch, path: Path, flags: str | None) -> None:
    if flags is not None:
        path.write_text(
            f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags} avx512f\n\nprocessor\t: 1\n"
        )
    monkeypatch.setattr(dtype, "CPUINFO", path)


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("amx_bf16 avx512_fp16 amx_tile amx_int8", True),
        ("avx512_bf16 avx512_vnni", False),
        ("amx_tile amx_int8", False),
        (None, False),  # another system than Linux
    ],
)
def test_matrix_units_are_found_by_the_flags_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, units: bool
) -> None:
    _cpu(monkeypatch, tmp_path / "cpuinfo", flags)
    assert has_matrix_units() == units
    assert resolve_dtype("auto", LARGE, use_gpu=False) == ("bfloat16" if units else "float32")


def test_a_toy_stays_in_float32_and_what_is_asked_for_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _cpu(monkeypatch, tmp_path / "cpuinfo", "amx_tile amx_bf16")
    assert resolve_dtype("auto", TOY, use_gpu=False) == "float32"
    assert resolve_dtype("auto", TOY, use_gpu=True) == "bfloat16"
    assert (
        resolve_dtype("float32", LARGE, use_gpu=True)
        == resolve_dtype("float32", LARGE, use_gpu=False)
        == "float32"
    )
    assert resolve_dtype("bfloat16", TOY, use_gpu=False) == "bfloat16"

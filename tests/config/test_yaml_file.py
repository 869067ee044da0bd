from pathlib import Path
from typing import Any

import pytest

from sharegpt4v.config.yaml_file import load_yaml
from sharegpt4v.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- a\n- b\n", "holds a list"),
        (b"# all of it is\n", "holds nothing"),
        (b"a: [1", "is not YAML"),
        (None, "^config: cannot read"),
        (b"a: \xff", "not UTF-8 text: invalid start byte at byte 3"),
        (b"a: " + b"[" * 5_000, "nested too deep"),
        (b"a: " + b"9" * 5_000, "is not YAML: Exceeds the limit"),
        (b"slots: 1\nslots: 2\n", "'slots' is there twice"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1:4", "1:4"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("010", 10.0),
        ("0", 0),
        ("-3", -3),
        ("1_000", 1000),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("2.", 2.0),
        ("2026-11-26", "2026-11-26"),
        ("org/name@1.0", "org/name@1.0"),
        ("~", None),
        ("", None),
        ("'12'", "12"),
    ],
)
def test_scalars_mean_what_they_look_like(tmp_path: Path, scalar: str, value: Any) -> None:
    (tmp_path / "c.yaml").write_text(f"key: {scalar}\n")
    found = load_yaml(tmp_path / "c.yaml")["key"]
    assert found == value and type(found) is type(value)


def test_merged_keys_may_be_written_over(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  x: 3\n")
    assert load_yaml(tmp_path / "c.yaml")["b"] == {"x": 3, "y": 2}

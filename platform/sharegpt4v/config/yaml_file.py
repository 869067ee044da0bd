"""Configuration files: YAML whose plain words and numbers mean what they look like."""

import re
from pathlib import Path
from typing import Any

import yaml

from sharegpt4v.errors import UserError

_WORDS = {type(None): "nothing", list: "a list"}


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a configuration file. Raises UserError when it is missing, not YAML, or not a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", field="config") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", field="config"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep", field="config") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of more than 4,300 digits
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}", field="config") from None
    if not isinstance(content, dict):
        held = _WORDS.get(type(content), "a single value")
        raise UserError(f"{path} holds {held}, expected keys and values", field="config")
    return content


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does, and refuses a key that is there twice.

    YAML 1.1, PyYAML's own, makes 64 of `actors: 1:4`, False of `packing: off`, 8 of `seed: 010`, and text of
    `learning_rate: 1e-4`.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
"""Tag, pattern, and what a value may begin with, the first that fits: YAML 1.2's core schema, and `1_000`."""

for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)

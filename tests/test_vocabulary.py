"""One vocabulary: names that were given up do not come back, and docstrings say what a function does."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = ("platform", "pipelines", "serve", "cluster", "benchmarks")
FILES = [file for folder in (*CODE, "tests") for file in (REPOSITORY / folder).rglob("*.py")]

OLD_NAMES = frozenset(
    "Lease lease stand_in Words find_words told_by_keys described_by exact_share _bury _close_ranks _turn "
    "_Room WHO PLACE Answer IMAGE_SLOT withdrawn _wanted backdrop silhouette".split()
)
OLD_MODULES = frozenset(
    "findings lease pending stand_in silhouettes backdrops flags weights base_engine".split()
)

OLD_WORDS = re.compile(r"\b(?:told|stands|stood|gets on|goodbye|hear of|heard of|in work(?!/))\b")
"""Private words of comments and docstrings; each has a plain one: `in work` is in progress."""

NO_VERBS = frozenset(
    "a an the what whether where which who how when why all every each of as in for with without its "
    "their true false none ids bytes tensors pixels tokens rows text texts one".split()
)
"""First words of docstrings that name a thing where they should say what is done."""


def _names(file: Path) -> Iterator[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline)
    return ((token.start[0], token.string) for token in tokens if token.type == tokenize.NAME)


def _prose(file: Path) -> Iterator[tuple[int, str]]:
    """Comments and docstrings with their lines."""
    text = file.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value


def test_given_up_names_stay_away() -> None:
    found = [
        f"{file.relative_to(REPOSITORY)}:{line} {name}"
        for file in FILES
        if file != Path(__file__)
        for line, name in _names(file)
        if name in OLD_NAMES
    ]
    assert found == []


def test_given_up_modules_stay_away() -> None:
    assert [str(file) for file in FILES if file.stem in OLD_MODULES] == []


@pytest.mark.parametrize("folder", CODE)
def test_prose_has_no_private_words(folder: str) -> None:
    found = [
        f"{file.relative_to(REPOSITORY)}:{line} {match.group(0)}"
        for file in (REPOSITORY / folder).rglob("*.py")
        for line, text in _prose(file)
        if (match := OLD_WORDS.search(text))
    ]
    assert found == []


@pytest.mark.parametrize("folder", [folder for folder in CODE if folder != "benchmarks"])
def test_docstrings_of_functions_begin_with_a_verb(folder: str) -> None:
    found = []
    for file in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_property(node):
                continue
            doc = ast.get_docstring(node)
            first = doc.split()[0].strip(".,:`'\"") if doc else "Does"
            if first.lower() in NO_VERBS or not first[:1].isupper():
                found.append(f"{file.relative_to(REPOSITORY)}:{node.lineno} {node.name}: {first}")
    assert found == []


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        isinstance(decorator, ast.Name) and decorator.id.endswith("property")
        for decorator in node.decorator_list
    )

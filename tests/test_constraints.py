"""constraints.txt: a version for every package that `make setup` installs, which all who need it accept."""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.commands import REPOSITORY

CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.M)}
OF_CUDA = ("nvidia-", "cuda-", "triton")
"""Beginnings of the packages that a CUDA build of torch brings along; it pins them itself."""


def _needed() -> Iterator[tuple[str, Requirement]]:
    """What `make setup` installs besides this project, directly or not: who needs it, and the requirement."""
    left = [("pyproject.toml", line, "") for line in PROJECT["dependencies"]]
    left += [("pyproject.toml", line, "") for line in PROJECT["optional-dependencies"]["dev"]]
    seen = set()
    while left:
        by, line, extra = left.pop()
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        here = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not here or name.startswith(OF_CUDA):
            continue
        yield by, requirement
        for of in {"", *requirement.extras}:
            if (name, of) not in seen:
                seen.add((name, of))
                left += [(name, below, of) for below in requires(name) or []]


@pytest.mark.skipif(
    (sys.platform, sys.version_info[:2]) != ("linux", (3, 11)),
    reason="other packages are needed on other systems; constraints.txt was made for Python 3.11 on Linux",
)
def test_every_package_that_is_installed_has_one_version() -> None:
    needed = {canonicalize_name(requirement.name) for _, requirement in _needed()}
    assert len(needed) > 100
    assert needed - PINS.keys() == set()
    # Triton is of the extra `kernels`.
    assert PINS.keys() - needed == {"triton"}


def test_everybody_who_needs_a_package_accepts_its_version() -> None:
    """An update of one package may rule out the version of another, as gradio does with Pillow 13."""
    refused = [
        f"{by} needs {requirement}, constraints.txt has {PINS[name]}"
        for by, requirement in _needed()
        if (name := canonicalize_name(requirement.name)) in PINS
        and not requirement.specifier.contains(PINS[name], prereleases=True)
    ]
    assert refused == []

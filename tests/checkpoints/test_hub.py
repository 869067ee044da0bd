"""Models by their name on the Hugging Face Hub, from a cache; no network is used."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from sharegpt4v.checkpoints.card import TOY_CHAT, read_card
from sharegpt4v.checkpoints.hub import hub_name
from sharegpt4v.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An offline cache with the toy chat model as `org/toy`, one commit, its branch and a tag."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--toy"
    shutil.copytree(TOY_CHAT, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    yield tmp_path


@pytest.mark.parametrize("name", ["org/toy", "org/toy@v1", f"org/toy@{COMMIT}"])
def test_a_name_of_the_hub_is_read_from_its_cache_and_pinned_to_a_commit(cache: Path, name: str) -> None:
    card = read_card(name)
    assert (card.name, card.folder.name) == ("toy", COMMIT)
    assert card.digest == read_card(str(TOY_CHAT)).digest
    assert card.weights == f"org/toy@{COMMIT}"
    assert read_card(card.weights).folder == card.folder  # as the actors read it


@pytest.mark.parametrize("name", ["org/other", "org/toy@v2"])
def test_what_the_cache_lacks_is_named_when_offline(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"^model: {name} is no folder here.*HF_HUB_OFFLINE is set"):
        read_card(name)


def test_without_a_network_the_error_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match="org/other is no folder here.*out of reach"):
        read_card("org/other")


def test_a_folder_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_name("models/mine") is None
    assert hub_name("models/yours") == ("models/yours", None)
    for path in ("toy", "./models/mine", "/models/mine", "a/b/c", "s3://bucket/model", "~/models", ""):
        assert hub_name(path) is None, path

"""Weights at a URI."""

from pathlib import Path

import fsspec
import pytest

from sharegpt4v.checkpoints.card import model_folder, read_card
from sharegpt4v.models.load import load_adapter
from tests.models.random_weights import save_random_captioner


def test_weights_of_a_uri_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random_captioner(tmp_path / "model")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/models/captioner/", recursive=True)
    monkeypatch.setenv("SHAREGPT4V_CACHE", str(tmp_path / "cache"))
    card = read_card("memory://models/captioner")
    assert card.name == "captioner" and card.digest == read_card(str(folder)).digest
    memory.rm("/models/captioner", recursive=True)
    assert load_adapter(model_folder("memory://models/captioner")).image_size == card.images.side

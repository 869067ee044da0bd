"""The folder that vLLM loads: the checkpoint itself, or a copy that is written once."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sharegpt4v.checkpoints.card import TOY_CHAT
from sharegpt4v.engine.vllm_folder import vllm_folder
from sharegpt4v.models.load import load_adapter
from tests.models.random_weights import save_random_captioner, save_random_lmm


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHAREGPT4V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm"


def test_a_captioners_decoder_is_written_once_as_a_plain_llama(tmp_path: Path, cache: Path) -> None:
    source = save_random_captioner(tmp_path / "model")
    folder = vllm_folder(source, "model@0123456789ab")
    assert folder == cache / "0123456789ab-2"
    ours = load_adapter(source).language_model
    plain, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[1, 5, 9, 4]])
    with torch.inference_mode():
        assert plain.eval()(ids).logits.equal(ours(ids).logits)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert vllm_folder(source, "other-name@0123456789ab") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert sorted(path.name for path in cache.iterdir()) == ["0123456789ab-2", "0123456789ab-2.lock"]


def test_half_a_decoder_is_never_taken_for_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_random_captioner(tmp_path / "model")
    with monkeypatch.context() as broken:
        broken.setattr("sharegpt4v.engine.vllm_folder.write_json", lambda path, content: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vllm_folder(source, "model@abc")
    assert not (cache / "abc-2").exists()
    assert (vllm_folder(source, "model@abc") / "config.json").exists()


def test_llava_is_read_where_it_lies_when_its_names_and_processor_suit(tmp_path: Path, cache: Path) -> None:
    source = save_random_lmm(tmp_path / "model")
    copy = vllm_folder(source, "model@abc")  # names of transformers 5, and no processor
    assert copy == cache / "abc-2"
    assert vllm_folder(copy, "model@def") == copy
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").unlink()
    assert vllm_folder(copy, "model@def") == cache / "def-2"


def test_the_shipped_chat_model_is_read_where_it_lies(cache: Path) -> None:
    assert vllm_folder(TOY_CHAT, "toy-chat@abc") == TOY_CHAT
    assert not cache.exists()

"""Adapters beside the language model's linear layers: what trains, what they compute, and how they merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharegpt4v.config.train import StageName
from sharegpt4v.errors import UserError
from sharegpt4v.models.freeze import part_of
from sharegpt4v.models.load import load_adapter
from sharegpt4v.train.checkpoint import Checkpoints, read_state
from sharegpt4v.train.collate import pack
from sharegpt4v.train.job import TrainJob
from sharegpt4v.train.lora import LoraLinear, LoraSettings, add_adapters, is_adapter, merge_adapters
from sharegpt4v.train.packed_model import PackedModel
from sharegpt4v.train.worker import load_model
from tests.models.random_weights import save_random_lmm
from tests.train.data import make_feed, open_records, write_conversations
from tests.train.runs import losses, prepare_job, stop_at, train_here, train_in_processes

SETTINGS = LoraSettings(rank=4, alpha=6.0)
PEFT = {"lora_a": "lora_A", "lora_b": "lora_B"}
"""What peft calls the two factors."""


def layer(bias: bool = True) -> LoraLinear:
    """An adapter that has learned something."""
    torch.manual_seed(0)
    made = LoraLinear(torch.nn.Linear(12, 8, bias), SETTINGS, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(made.lora_b)
    return made


def test_a_new_adapter_computes_what_its_layer_did() -> None:
    linear = torch.nn.Linear(12, 8)
    made = LoraLinear(linear, SETTINGS, torch.Generator().manual_seed(1))
    values = torch.randn(3, 12)
    assert torch.equal(made(values), linear(values)) and made.weight is linear.weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_the_merged_weight_computes_what_the_adapter_does(bias: bool, backwards: bool) -> None:
    """In whatever order the tensors come."""
    made = layer(bias)
    model = torch.nn.ModuleDict({"q": made, "other": torch.nn.Linear(2, 2)})
    weights = [(name, p.detach()) for name, p in model.named_parameters()]
    merged = dict(merge_adapters(model, reversed(weights) if backwards else weights))
    assert set(merged) == {"q.weight", "other.weight", "other.bias"} | ({"q.bias"} if bias else set())
    values = torch.randn(3, 12)
    expected = torch.nn.functional.linear(values, merged["q.weight"], merged.get("q.bias"))
    assert torch.allclose(made(values), expected, atol=1e-5)


def test_weights_without_their_adapter_are_no_product() -> None:
    model = torch.nn.ModuleDict({"q": layer()})
    with pytest.raises(ValueError, match="1 layers without all of weight, lora_a and lora_b, q first"):
        list(merge_adapters(model, [("q.weight", torch.ones(8, 12))]))


def test_peft_computes_and_merges_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed, as it needs accelerate")
    folder = save_random_lmm(tmp_path / "model")
    ours, theirs = load_adapter(folder), load_adapter(folder)
    model, other = PackedModel(ours), PackedModel(theirs)
    names = add_adapters(model, SETTINGS, seed=3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    where = r".*language_model\..*(" + "|".join(targets) + ")"
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=where, lora_dropout=0.0)
    wrapped = peft.get_peft_model(other.model, config)
    named = dict(model.model.named_parameters())
    with torch.no_grad():
        for name in names:
            place, _, kind = name.rpartition(".")
            named[name].copy_(torch.randn_like(named[name]) * 0.05)
            twin = wrapped.get_parameter(f"base_model.model.{place}.{PEFT[kind]}.default.weight")
            twin.copy_(named[name])
    assert sum("lora_" in n for n, _ in wrapped.named_parameters()) == len(names)
    records = open_records(write_conversations(tmp_path, 4, 1), tmp_path / "data")
    with make_feed(ours, records) as feed:
        row = pack([feed.maker.decode(feed.maker.encode(number)) for number in range(len(records))])
    one, two = model(row), other(row)
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
    (one / row.label_tokens).backward()
    (two / row.label_tokens).backward()
    for name in names:
        place, _, kind = name.rpartition(".")
        twin = wrapped.get_parameter(f"base_model.model.{place}.{PEFT[kind]}.default.weight")
        assert torch.allclose(named[name].grad, twin.grad, rtol=0, atol=1e-6), name
    merged = dict(merge_adapters(model.model, ((n, p.detach()) for n, p in model.model.named_parameters())))
    plain = wrapped.merge_and_unload()
    assert {n for n, _ in plain.named_parameters()} == set(merged)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(merged[name], parameter, rtol=0, atol=1e-7), name


def lora_job(folder: Path, run: str = "run", stage: StageName = "sft", **given: Any) -> TrainJob:
    return prepare_job(folder, stage, run, lora_rank=4, lora_alpha=6.0, **given)


@pytest.mark.parametrize("stage", ["captioner", "pretrain", "sft"])
def test_adapters_train_in_place_of_the_language_model(stage: StageName, tmp_path: Path) -> None:
    with_lora = load_model(lora_job(tmp_path, stage=stage), "cpu")
    without = load_model(prepare_job(tmp_path, stage, "without"), "cpu")
    trained = {n for n, p in with_lora.model.named_parameters() if p.requires_grad}
    before = {n for n, p in without.model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if is_adapter(name)}
    assert trained - adapters == {name for name in before if part_of(name) != "language"}
    layers = with_lora.model.config.text_config.num_hidden_layers
    assert len(adapters) == 2 * 7 * layers and {part_of(name) for name in adapters} == {"language"}


def test_the_product_computes_what_the_adapter_s_model_does_and_keeps_what_does_not_train(
    tmp_path: Path,
) -> None:
    job = lora_job(tmp_path)
    train_here(job)
    model = load_model(job, "cpu")
    newest = Checkpoints(job.checkpoints, 1).newest()
    assert newest is not None
    state = read_state(newest)
    named = dict(model.model.named_parameters())
    assert set(state) == {name for name, p in named.items() if p.requires_grad}
    with torch.no_grad():
        for name, tensors in state.items():
            named[name].copy_(tensors["value"])
    model.decoder.config._attn_implementation = "sdpa"
    product, began = load_adapter(job.product), load_adapter(job.init)
    values = torch.randn(1, 9, model.model.config.text_config.hidden_size)
    merged, beside, before_all = (
        each.language_model.eval()(inputs_embeds=values).logits for each in (product, model.adapter, began)
    )
    assert torch.allclose(merged, beside, atol=1e-5) and not torch.allclose(merged, before_all, atol=1e-3)

    before, after = dict(began.model.named_parameters()), dict(product.model.named_parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    adapted = {f"{name.rpartition('.')[0]}.weight" for name in state if is_adapter(name)}
    assert changed == adapted | {name for name in state if not is_adapter(name)}
    facts = json.loads((job.product / "training.json").read_text())
    assert facts["lora"] == {"rank": 4, "alpha": 6.0}


def test_a_run_with_adapters_goes_on_bit_equal(tmp_path: Path) -> None:
    through = train_here(lora_job(tmp_path, "through"))
    halted = lora_job(tmp_path, "halted")
    train_here(stop_at(halted, 3))
    assert train_here(halted) == through and through[-1] < through[0]
    one, two = (tmp_path / run / "model" / "model.safetensors" for run in ("through", "halted"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.workers
@pytest.mark.parametrize("zero", [2, 3])
def test_zero_trains_adapters_as_plain_torch_does(zero: int, tmp_path: Path) -> None:
    plain = lora_job(tmp_path, "plain")
    train_here(plain)
    divided = lora_job(tmp_path, "divided", zero=zero)
    train_in_processes(stop_at(divided, 4), 2)
    assert train_in_processes(divided, 2) == pytest.approx(losses(plain), rel=1e-5)
    one, two = (dict(load_adapter(job.product).model.named_parameters()) for job in (plain, divided))
    far: dict[str, Tensor] = {name: (one[name] - two[name]).abs().max() for name in one}
    assert max(far.values()) < 1e-4


def test_adapters_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^lora_rank: refused: align trains no language model"):
        prepare_job(tmp_path, "align", lora_rank=4)
    with pytest.raises(UserError, match="^lora_alpha: scales adapters, and there are none"):
        prepare_job(tmp_path, lora_alpha=4.0)
    with pytest.raises(UserError, match="^lora_rank: 4096 is refused: the weights of toy-chat"):
        prepare_job(tmp_path, lora_rank=4096)

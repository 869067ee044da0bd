"""Whole training runs at toy size: resume, several workers, DeepSpeed, and what they leave."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sharegpt4v.checkpoints.card import read_card
from sharegpt4v.config.train import StageName
from sharegpt4v.dialogue import SquareImages
from sharegpt4v.errors import RunFailed
from sharegpt4v.models.load import load_adapter
from sharegpt4v.train.backend import PlainBackend
from sharegpt4v.train.job import TrainJob
from sharegpt4v.train.logs import read_metrics
from tests.train.runs import losses, prepare_job, spoilt_gradients, stop_at, train_here, train_in_processes


def test_a_run_that_was_stopped_goes_on_bit_equal(tmp_path: Path) -> None:
    through = train_here(prepare_job(tmp_path, run="through"))
    halted = prepare_job(tmp_path, run="halted")
    train_here(stop_at(halted, 3))
    assert losses(halted) == through[:3]
    assert train_here(halted) == through
    one, two = (tmp_path / run / "model" / "model.safetensors" for run in ("through", "halted"))
    assert one.read_bytes() == two.read_bytes()


def test_muon_resumes_bit_equal_too(tmp_path: Path) -> None:
    muon: dict[str, Any] = {"optimizer": "muon", "stage": "captioner"}
    through = train_here(prepare_job(tmp_path, run="through", **muon))
    halted = prepare_job(tmp_path, run="halted", **muon)
    train_here(stop_at(halted, 3))
    assert train_here(halted) == through


@pytest.mark.parametrize("zero", [0, *(pytest.param(n, marks=pytest.mark.workers) for n in (2, 3))])
def test_two_workers_have_the_losses_of_one(zero: int, tmp_path: Path) -> None:
    """Measured: 2e-7 relative over 6 steps, plain and ZeRO."""
    one = train_here(prepare_job(tmp_path, run="one"))
    two = train_in_processes(prepare_job(tmp_path, run="two", zero=zero), 2)
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-5)
    assert one[0] > one[-1]


@pytest.mark.parametrize("workers", [1, 2])
def test_padded_rows_have_the_losses_of_packed_ones(workers: int, tmp_path: Path) -> None:
    """Measured: 2e-7 relative over 6 steps."""
    packed = prepare_job(tmp_path, run="packed")
    padded = prepare_job(tmp_path, run="padded", packing="off")
    expected = train_here(packed)
    found = train_in_processes(padded, 2) if workers == 2 else train_here(padded)
    assert found == pytest.approx(expected, rel=1e-5)
    one, two = read_metrics(packed.run), read_metrics(padded.run)
    for key in ("samples", "tokens", "label_tokens"):
        assert [line[key] for line in one] == [line[key] for line in two]


@pytest.mark.workers
@pytest.mark.parametrize("zero", [2, 3])
def test_zero_goes_on_bit_equal_on_as_many_workers_and_closely_on_another_number(
    zero: int, tmp_path: Path
) -> None:
    """2 workers, then 2 again or 1 with plain torch; measured: 3e-7 relative."""
    through = train_in_processes(prepare_job(tmp_path, run="through", zero=zero), 2)
    halted = prepare_job(tmp_path, run="halted", zero=zero)
    train_in_processes(stop_at(halted, 4), 2)
    shutil.copytree(halted.run, tmp_path / "alone")
    assert train_in_processes(halted, 2) == through
    alone = prepare_job(tmp_path, run="alone")
    assert train_here(alone) == pytest.approx(through, rel=1e-5)


def test_every_step_leaves_a_line_and_figures_for_people(tmp_path: Path) -> None:
    job = prepare_job(tmp_path, max_steps=2)
    train_here(job)
    lines = read_metrics(job.run)
    assert [line["step"] for line in lines] == [1, 2]
    assert {line["samples"] for line in lines} == {6}
    first = lines[0]
    assert first["tokens_per_second"] > 0 and first["memory_gb"] > 0 and 0 < first["balance"] <= 1
    assert first["mfu"] is None and set(first["rates"]) == {"vision", "projector", "language"}
    assert list((job.run / "tensorboard").glob("events*"))


def test_the_end_product_is_a_model_for_caption_and_for_vanilla_transformers(tmp_path: Path) -> None:
    job = prepare_job(tmp_path, max_steps=2)
    train_here(job)
    adapter = load_adapter(job.product)
    card = read_card(str(job.product))
    assert card.images == SquareImages(48, "squash")
    vanilla = LlavaForConditionalGeneration.from_pretrained(job.product)
    assert isinstance(LlavaProcessor.from_pretrained(job.product), LlavaProcessor)
    ours = dict(adapter.model.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in vanilla.named_parameters())
    facts = json.loads((job.product / "training.json").read_text())
    assert facts["stage"] == "sft" and facts["steps"] == 2 and facts["data"][0]["records"] == 15
    assert "toy-chat@" in (job.product / "README.md").read_text()


def test_a_stage_changes_its_tensors_and_no_other(tmp_path: Path) -> None:
    job = prepare_job(tmp_path, "align", max_steps=2)
    before = dict(load_adapter(job.init).model.named_parameters())
    train_here(job)
    after = dict(load_adapter(job.product).model.named_parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def poisoned(job: TrainJob, **loop: Any) -> TrainJob:
    """A rate at which the loss is no number after a step or two."""
    optimizer = replace(job.optimizer, rates={part: 1e30 for part in job.optimizer.rates})
    return replace(job, optimizer=optimizer, loop=replace(job.loop, **loop))


def test_a_loss_that_is_no_number_is_named_with_the_samples_of_its_step(tmp_path: Path) -> None:
    job = poisoned(prepare_job(tmp_path))
    with pytest.raises(RunFailed, match=r"step [23] is (nan|inf).*its samples are .*\.jpg.*`skip_spikes`"):
        train_here(job)
    assert all(line["loss"] is not None for line in read_metrics(job.run))


def test_steps_without_a_usable_loss_may_be_skipped_and_are_recorded(tmp_path: Path) -> None:
    job = poisoned(prepare_job(tmp_path, max_steps=4), skip_spikes=10.0)
    train_here(job)
    lines = read_metrics(job.run)
    assert not lines[0]["skipped"] and lines[-1]["skipped"]
    facts = json.loads((job.product / "training.json").read_text())
    assert facts["steps_skipped"] == sum(line["skipped"] for line in lines) > 0


@pytest.mark.workers
@pytest.mark.parametrize(("zero", "stage"), [(0, "sft"), (2, "sft"), (3, "sft"), (3, "captioner")])
def test_two_workers_skip_steps_with_a_spoilt_gradient_and_go_on(
    zero: int, stage: StageName, tmp_path: Path
) -> None:
    """An infinite gradient before any optimizer has a state, another one later, and then a spike."""
    spoil = {1: math.inf, 4: math.inf, 13: 1e6}
    job = prepare_job(tmp_path, stage, max_steps=14, save_steps=1, skip_spikes=20.0, zero=zero)
    found = train_in_processes(stop_at(job, 1), 2, spoil)  # its checkpoint holds a run without an update
    found = train_in_processes(job, 2, {step - 1: factor for step, factor in spoil.items() if step > 1})
    lines = read_metrics(job.run)
    assert [line["step"] for line in lines if line["skipped"]] == [1, 4, 13]
    assert found[-1] < found[0] and all(line["loss"] is not None for line in lines)
    reference = prepare_job(tmp_path, stage, run="one", max_steps=14, skip_spikes=20.0)
    with spoilt_gradients(PlainBackend, spoil):
        expected = train_here(reference)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.workers
@pytest.mark.parametrize("zero", [2, 3])
def test_offload_trains_skips_and_resumes_as_plain_torch_does(zero: int, tmp_path: Path) -> None:
    """Measured: 3e-7 relative."""
    given: dict[str, Any] = {"skip_spikes": 50.0, "save_steps": 3}
    with spoilt_gradients(PlainBackend, {3: math.inf}):
        expected = train_here(prepare_job(tmp_path, run="plain", **given))
    job = prepare_job(tmp_path, run="offload", zero=zero, offload=True, **given)
    train_in_processes(stop_at(job, 4), 2, {3: math.inf})
    assert train_in_processes(job, 2) == pytest.approx(expected, rel=1e-5)
    assert [line["skipped"] for line in read_metrics(job.run)] == [False, False, True, False, False, False]


@pytest.mark.workers
@pytest.mark.parametrize("zero", [2, 3])
def test_an_infinite_gradient_stops_the_run_by_name_under_zero(zero: int, tmp_path: Path) -> None:
    job = prepare_job(tmp_path, zero=zero)
    with pytest.raises(ProcessRaisedException, match=r"step 3 is \d.*gradient norm inf; its samples are "):
        train_in_processes(job, 2, {3: math.inf})
    assert [line["step"] for line in read_metrics(job.run)] == [1, 2]


@pytest.mark.workers
@pytest.mark.parametrize("zero", [2, 3])
def test_zero_says_of_fixed_images_what_plain_torch_does(zero: int, tmp_path: Path) -> None:
    """And trains on as if it had not been asked."""
    plain, divided = prepare_job(tmp_path, run="plain"), prepare_job(tmp_path, run="divided", zero=zero)
    expected = train_here(plain)
    assert train_in_processes(divided, 2) == pytest.approx(expected, rel=1e-5)
    said = [(job.run / "generations.jsonl").read_text() for job in (plain, divided)]
    assert said[0] == said[1] and len(said[0].splitlines()) == 3 * 4


def test_too_many_rejects_stop_the_run_and_name_the_list(tmp_path: Path) -> None:
    job = prepare_job(tmp_path, max_steps=12, max_reject_rate=0.05)
    for path in sorted((tmp_path / "images").rglob("0*0[1-4].*")):
        path.unlink()
    with pytest.raises(RunFailed, match=r"samples could not be used, more than `max_reject_rate` \(0.05\).*"):
        train_here(job)
    [listed] = (job.run / "rejects").glob("*.jsonl")
    assert {json.loads(line)["reason"] for line in listed.read_text().splitlines()} == {"missing"}


def test_fewer_rejects_are_replaced_and_counted(tmp_path: Path) -> None:
    job = prepare_job(tmp_path, max_steps=3, max_reject_rate=0.9)
    next(path for path in (tmp_path / "images").rglob("*.jpg")).unlink()
    train_here(job)
    lines = read_metrics(job.run)
    assert sum(line["rejects"] for line in lines) >= 1 and {line["samples"] for line in lines} == {6}
    facts = json.loads((job.product / "training.json").read_text())
    assert facts["samples_replaced"] == sum(line["rejects"] for line in lines)


def test_held_out_data_is_evaluated_at_every_checkpoint(tmp_path: Path) -> None:
    held_out = str(tmp_path / "talk.json")
    train_here(prepare_job(tmp_path, run="without", max_steps=4))
    job = prepare_job(tmp_path, run="with", max_steps=4, eval_data=[held_out])
    assert train_here(job) == losses(prepare_job(tmp_path, run="without", max_steps=4))
    lines = [json.loads(line) for line in (job.run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and {line["samples"] for line in lines} == {15}
    assert lines[1]["loss"] < lines[0]["loss"]
    said = [json.loads(line) for line in (job.run / "generations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [2] * 4 + [4] * 4 and all(line["said"] for line in said)


@pytest.mark.workers
def test_zero_3_trains_the_captioner_whose_sampler_uses_weights_of_its_parts(tmp_path: Path) -> None:
    plain = train_here(prepare_job(tmp_path, "captioner", run="plain", max_steps=3))
    zero = prepare_job(tmp_path, "captioner", run="zero", max_steps=3, zero=3)
    assert train_in_processes(zero, 2) == pytest.approx(plain, rel=1e-5)

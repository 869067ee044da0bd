"""What each training worker does, from its job to the end product; a process group may exist or not."""

import resource
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.freeze import freeze, freeze_captioner
from sharegpt4v.models.load import lmm_template, load_adapter
from sharegpt4v.train.backend import Backend, PlainBackend
from sharegpt4v.train.checkpoint import Checkpoints, read_meta, read_state
from sharegpt4v.train.deepspeed_backend import DeepSpeedBackend
from sharegpt4v.train.evaluation import evaluator, held_out_order
from sharegpt4v.train.feed import Feed, PreparedStep
from sharegpt4v.train.flops import Work, peak_operations
from sharegpt4v.train.generations import generator
from sharegpt4v.train.job import TrainJob
from sharegpt4v.train.logs import Figures, StepLog
from sharegpt4v.train.loop import StepLine, Totals, train
from sharegpt4v.train.lora import add_adapters, merge_adapters
from sharegpt4v.train.order import SampleOrder
from sharegpt4v.train.packed_model import PackedModel
from sharegpt4v.train.product import write_product
from sharegpt4v.train.records import Records
from sharegpt4v.train.samples import SampleMaker

Report = Callable[[StepLine, Figures], None]


def train_worker(job: TrainJob, report: Report = lambda line, figures: None) -> Totals:
    """Trains from the newest checkpoint, or from the beginning, and writes the end product when all is done.

    report: is called after every step, on every worker. Raises RunFailed and UserError as the loop does.
    """
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model = load_model(job, device)
    checkpoints = Checkpoints(job.checkpoints, job.keep)
    newest = checkpoints.newest()
    totals = Totals()
    if newest is not None:
        totals = Totals(**{k: v for k, v in read_meta(newest).items() if k != "workers"})
    state = read_state(newest) if newest is not None else {}
    with torch.no_grad():  # before DeepSpeed takes its own copies of them
        named = dict(model.model.named_parameters())
        for name, tensors in state.items():
            named[name].copy_(tensors["value"])
    backend = make_backend(job, model)
    if state:
        backend.restore(state)
    feed = make_feed(job, model, backend, job.records, job.order)
    log = StepLog(job.run, backend.worker, totals.step)
    counter = _Counter(job, model, backend)

    def note(line: StepLine, prepared: PreparedStep) -> None:
        figures = counter.figures(line, prepared)
        log.write(line, figures, prepared.rejects)
        report(line, figures)

    with ExitStack() as stack:
        stack.callback(log.close)
        steps = stack.enter_context(feed).steps(totals.step, job.loop.stop_at)
        evaluate = _evaluator(job, model, backend, stack)
        if totals.step < job.loop.stop_at:
            totals = train(backend, steps, checkpoints, job.loop, totals, note, evaluate)
    if totals.step == job.loop.steps:
        finish(job, model, backend, totals)
    return totals


def _evaluator(
    job: TrainJob, model: PackedModel, backend: Backend, stack: ExitStack
) -> Callable[[int], object]:
    maker = SampleMaker(Records(job.evaluation or job.records), model.adapter.template, job.rules)
    show = generator(model, backend, maker, job.run)
    measure = _held_out(job, model, backend, stack)

    def evaluate(step: int) -> None:
        measure(step)
        show(step)
        backend.meet("the step after an evaluation")

    return evaluate


def _held_out(
    job: TrainJob, model: PackedModel, backend: Backend, stack: ExitStack
) -> Callable[[int], object]:
    if job.evaluation is None:
        return lambda step: None
    order = held_out_order(Records(job.evaluation).intake.counts, backend.workers)
    feed = stack.enter_context(make_feed(job, model, backend, job.evaluation, order))
    return evaluator(backend, feed, job.run)


def make_feed(job: TrainJob, model: PackedModel, backend: Backend, data: Path, order: SampleOrder) -> Feed:
    """Returns the feed of this worker's share of the records in the folder `data`."""
    maker = SampleMaker(Records(data), model.adapter.template, job.rules)
    worker, workers = backend.worker, backend.workers
    return Feed(
        maker,
        order,
        worker=worker,
        workers=workers,
        budget=job.budget,
        threads=job.threads,
        padded=job.padded,
    )


def load_model(job: TrainJob, device: str) -> PackedModel:
    """Loads the model to start from, with the tensors of its stage set to train and its stage's template."""
    dtype = torch.bfloat16 if job.dtype == "bfloat16" else torch.float32
    adapter = load_adapter(job.init, dtype, device)
    if isinstance(adapter.model, ShareCaptioner):
        freeze_captioner(adapter.model)
    else:
        assert isinstance(adapter.model, LlavaForConditionalGeneration) and job.stage.name != "captioner"
        freeze(adapter.model, job.stage.name, job.first_block)
        adapter.template = lmm_template(adapter.tokenizer, adapter.model.config, job.stage.template)
    model = PackedModel(adapter)
    if job.lora:
        add_adapters(model, job.lora, job.order.seed)
    if job.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def make_backend(job: TrainJob, model: PackedModel) -> Backend:
    """Returns the backend of the job's ZeRO stage; 0 is plain torch."""
    if job.zero == 0:
        return PlainBackend(model, job.optimizer, job.hang_seconds)
    return DeepSpeedBackend(
        model, job.optimizer, job.zero, offload=job.offload, hang_seconds=job.hang_seconds
    )


def finish(job: TrainJob, model: PackedModel, backend: Backend, totals: Totals) -> None:
    """Writes the end product; every worker gathers the weights, the first one writes."""
    dtype = torch.bfloat16 if job.dtype == "bfloat16" else torch.float32
    card = {
        **job.card,
        "samples_replaced": totals.rejects,
        "samples_cut": totals.cut,
        "steps_skipped": totals.skipped,
        "label_tokens": totals.label_tokens,
        "workers": backend.workers,
    }
    if backend.worker == 0:
        weights = merge_adapters(model.model, backend.weights())
        write_product(job.product, model.adapter, weights, dtype, card)
    else:
        for _ in backend.weights():
            pass
    backend.meet("the end")


class _Counter:
    """Turns a step into figures for people."""

    def __init__(self, job: TrainJob, model: PackedModel, backend: Backend) -> None:
        self._job, self._backend = job, backend
        self._work = Work.of(model.model, model.model.config.text_config)
        vision = model.model.config.vision_config
        self._patches = (vision.image_size // vision.patch_size) ** 2 + 1
        self._queries = model.adapter.template.image_tokens
        self._peak = peak_operations(backend.device)
        self._recent: list[float] = []

    def figures(self, line: StepLine, prepared: PreparedStep) -> Figures:
        self._recent = [*self._recent, line.seconds][-20:]
        lengths = [length for row in prepared.rows for length in row.lengths]
        labels = sum(row.label_tokens for row in prepared.rows)
        images = sum(len(row.pixels) for row in prepared.rows)
        mfu = None
        if self._peak:
            done = self._work.operations(lengths, labels, images, self._patches, self._queries)
            mfu = done / line.seconds / self._peak
        rates = {part: rate * line.rate_share for part, rate in self._rates().items()}
        left = (self._job.loop.stop_at - line.step) * sum(self._recent) / len(self._recent)
        return Figures(
            rates,
            line.tokens / line.seconds,
            line.samples / line.seconds,
            mfu,
            _memory_gb(self._backend.device),
            left,
        )

    def _rates(self) -> dict[str, float]:
        settings = self._job.optimizer
        rates: dict[str, float] = {part: rate for part, rate in settings.rates.items()}
        return rates | ({"matrices": settings.matrix_rate} if settings.kind == "muon" else {})


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

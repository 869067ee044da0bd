"""From a configuration of training to the job of its workers; what does not fit is refused before."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sharegpt4v.checkpoints.card import TOY_CAPTIONER, TOY_CHAT, ModelCard, read_card
from sharegpt4v.config.train import Stage, TrainConfig
from sharegpt4v.errors import UserError
from sharegpt4v.models.freeze import Part
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.train.loop import LoopSettings
from sharegpt4v.train.lora import LoraSettings
from sharegpt4v.train.optimizer import OptimizerSettings
from sharegpt4v.train.order import SampleOrder
from sharegpt4v.train.records import Intake, take_in
from sharegpt4v.train.samples import SampleRules
from sharegpt4v.train.sets import TrainingSet


@dataclass(frozen=True)
class TrainJob:
    """What every worker needs; all paths are seen by every node. card: facts for the end product.

    budget: tokens of a row. padded: rows are padded, not packed. lora: of the language model's adapters, None
    to train itself. evaluation: where the records of held-out data are, None without any.
    """

    stage: Stage
    run: Path
    init: Path
    rules: SampleRules
    order: SampleOrder
    loop: LoopSettings
    optimizer: OptimizerSettings
    budget: int
    padded: bool
    first_block: int
    lora: LoraSettings | None
    dtype: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool
    zero: Literal[0, 2, 3]
    offload: bool
    keep: int
    threads: int
    hang_seconds: float
    card: Mapping[str, Any]
    evaluation: Path | None

    @property
    def records(self) -> Path:
        return self.run / "work" / "data"

    @property
    def checkpoints(self) -> Path:
        return self.run / "work" / "checkpoints"

    @property
    def product(self) -> Path:
        return self.run / "model"


def check_config(config: TrainConfig) -> ModelCard:
    """Returns the card of the model to start from. Raises UserError for what does not fit."""
    card = read_init(config)
    if config.optimizer == "muon" and config.zero:
        raise UserError("muon is refused: ZeRO divides the matrices it needs; use adamw", field="optimizer")
    if config.offload and not config.zero:
        raise UserError("optimizer states are moved by ZeRO: set `zero` to 2 or 3", field="offload")
    if config.lora_rank and config.stage.name == "align":
        raise UserError("refused: align trains no language model; leave it out", field="lora_rank")
    if config.lora_alpha and not config.lora_rank:
        raise UserError("scales adapters, and there are none: set `lora_rank`", field="lora_alpha")
    if config.tokens_per_micro_step < config.max_length:
        raise UserError(
            f"{config.tokens_per_micro_step} is refused: a row must hold a sample of `max_length` "
            f"({config.max_length}) tokens",
            field="tokens_per_micro_step",
        )
    if config.workers != "auto" and int(config.workers) > config.batch_size:
        raise UserError(
            f"{config.batch_size} is refused: {config.workers} workers need a sample each", field="batch_size"
        )
    return card


def read_init(config: TrainConfig) -> ModelCard:
    """Returns the card of `init`. Raises UserError for a model of another family or a tokenizer that lacks
    the control tokens of the stage's template."""
    stage = config.stage
    if config.init is None:
        raise UserError("this preset ships none: give a transformers folder to start from", field="init")
    toy = TOY_CAPTIONER if stage.family == "share_captioner" else TOY_CHAT
    try:
        card = read_card(config.init, toy)
    except UserError as error:
        raise UserError(error.text, field="init") from None
    content = json.loads((card.folder / "config.json").read_text(encoding="utf-8"))
    if content["model_type"] != stage.family:
        raise UserError(
            f"{config.init} holds a {content['model_type']} model and the stage {stage.name} trains a "
            f"{stage.family}: give one of that family",
            field="init",
        )
    blocks = content["vision_config"].get("num_hidden_layers", 24)
    if stage.name == "pretrain" and config.first_block > blocks:
        raise UserError(
            f"{config.first_block} is refused: the vision tower of {card.name} has blocks 0 to {blocks - 1}",
            field="first_block",
        )
    width = content["text_config"]["hidden_size"]
    if config.lora_rank >= width:
        raise UserError(
            f"{config.lora_rank} is refused: the weights of {card.name} have a rank of {width} themselves",
            field="lora_rank",
        )
    context = content["text_config"].get("max_position_embeddings", 2048)
    if config.max_length > context:
        raise UserError(
            f"{config.max_length} is refused: {card.name} has a context of {context} tokens",
            field="max_length",
        )
    _check_tokenizer(card.folder, stage)
    return card


def _check_tokenizer(folder: Path, stage: Stage) -> None:
    from transformers import PreTrainedTokenizerFast

    from sharegpt4v.templates import TEMPLATES

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        TEMPLATES[stage.template](tokenizer, -1, 1)
    except UserError as error:
        raise UserError(error.text, field="init") from None
    except (OSError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())[:150]
        raise UserError(f"{folder} has no tokenizer that can be read ({line})", field="init") from None


def fingerprint(config: TrainConfig, card: ModelCard, data: str) -> dict[str, Any]:
    """Returns what decides a run's losses; workers, checkpoints and the place of the cluster do not.

    data: digest of the records.
    """
    decides = (
        *("protocol", "max_length", "too_long", "dtype", "epochs", "max_steps", "batch_size", "optimizer"),
        *("learning_rate", "matrix_learning_rate", "projector_learning_rate", "vision_learning_rate"),
        *("beta2", "weight_decay", "warmup_ratio", "clip", "skip_spikes", "seed"),
    )
    values = config.model_dump(mode="json")
    found = {"stage": config.stage.name, "init": card.id, "data": data}
    if config.stage.name == "pretrain":
        found["first_block"] = str(config.first_block)
    if lora := _lora(config):
        found |= {"lora_rank": str(lora.rank), "lora_alpha": str(lora.alpha)}
    return found | {name: values[name] for name in decides}


def take_in_data(config: TrainConfig, run: Path) -> tuple[list[TrainingSet], Intake]:
    """Writes the records of `data`, and of `eval_data` if there is any, into the run folder."""
    sets = [TrainingSet.parse(text) for text in config.data]
    one_round = config.stage.template == "plain"
    intake = take_in(sets, config.root, run / "work" / "data", one_round=one_round)
    if config.eval_data:
        held_out = [TrainingSet.parse(text) for text in config.eval_data]
        take_in(held_out, config.root, run / "work" / "eval-data", one_round=one_round)
    return sets, intake


def make_job(
    config: TrainConfig,
    run: Path,
    card: ModelCard,
    sets: list[TrainingSet],
    intake: Intake,
    facts: Mapping[str, Any],
) -> TrainJob:
    """Returns the job of every worker. facts: more for the end product's card, the git revision say."""
    order = SampleOrder(intake.counts, [each.weight for each in sets], config.seed, config.batch_size)
    steps = config.max_steps or order.steps(config.epochs)
    return TrainJob(
        stage=config.stage,
        run=run,
        init=card.folder.absolute(),
        rules=_rules(config, card),
        order=order,
        loop=_loop(config, run, steps),
        optimizer=_optimizer(config),
        budget=config.tokens_per_micro_step,
        padded=config.packing == "off",
        first_block=config.first_block,
        lora=_lora(config),
        dtype=config.dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        zero=config.zero,
        offload=config.offload,
        keep=config.keep,
        threads=config.decode_threads,
        hang_seconds=config.hang_seconds,
        card=_card(config, card, sets, intake, steps) | dict(facts),
        evaluation=run / "work" / "eval-data" if config.eval_data else None,
    )


def _loop(config: TrainConfig, run: Path, steps: int) -> LoopSettings:
    return LoopSettings(
        steps=steps,
        stop_at=min(steps, config.stop_after or steps),
        warmup_ratio=config.warmup_ratio,
        save_steps=config.save_steps,
        save_minutes=config.save_minutes,
        skip_spikes=config.skip_spikes,
        max_reject_rate=config.max_reject_rate,
        rejects_path=str(run / "rejects"),
    )


def _lora(config: TrainConfig) -> LoraSettings | None:
    if not config.lora_rank:
        return None
    return LoraSettings(config.lora_rank, config.lora_alpha or 2.0 * config.lora_rank)


def _rules(config: TrainConfig, card: ModelCard) -> SampleRules:
    question = UNIFIED_CAPTION.text if config.stage.one_question else None
    return SampleRules(card.images.side, config.protocol, config.max_length, config.too_long, question)


def _optimizer(config: TrainConfig) -> OptimizerSettings:
    rates: dict[Part, float] = {
        "vision": config.vision_learning_rate or config.learning_rate,
        "projector": config.projector_learning_rate or config.learning_rate,
        "language": config.learning_rate,
    }
    matrix = config.matrix_learning_rate or config.learning_rate
    return OptimizerSettings(config.optimizer, rates, matrix, config.beta2, config.weight_decay, config.clip)


def _card(
    config: TrainConfig, card: ModelCard, sets: list[TrainingSet], intake: Intake, steps: int
) -> dict[str, Any]:
    lora = _lora(config)
    return {
        "stage": config.stage.name,
        "trains": config.stage.trains,
        "template": config.stage.template,
        "protocol": config.protocol,
        "began_from": card.id,
        "data": [asdict(each) | {"records": n} for each, n in zip(sets, intake.counts, strict=True)],
        "data_digest": intake.digest[:12],
        "steps": steps,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate,
        "lora": asdict(lora) if lora else None,
        "weight_decay": config.weight_decay,
        "warmup_ratio": config.warmup_ratio,
        "seed": config.seed,
    }

"""The loss on held-out data, at every checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from sharegpt4v.train.backend import Backend
from sharegpt4v.train.feed import Feed
from sharegpt4v.train.order import SampleOrder

EVALUATIONS = "evaluations.jsonl"
"""In the run folder: a line {step, loss, samples} for each evaluation."""

BATCH = 64
"""Samples evaluated together; fewer where there are fewer."""


def held_out_order(counts: list[int], workers: int) -> SampleOrder:
    """Returns an order that takes each record once. Records beyond the last whole batch are left out."""
    return SampleOrder(counts, [1.0] * len(counts), 0, max(workers, min(BATCH, sum(counts))))


def evaluator(backend: Backend, feed: Feed, run: Path) -> Callable[[int], float]:
    """Returns a function from a step to the mean cross entropy of a label token of the held-out data.

    It is called by all workers together; the first one appends a line to EVALUATIONS.
    """
    batches = max(1, feed.order.epoch_size // feed.order.batch_size)

    def evaluate(step: int) -> float:
        loss, labels, samples = 0.0, 0, 0
        with torch.no_grad():
            for prepared in feed.steps(0, batches):
                for row in prepared.rows:
                    loss += float(backend.loss(row.to(backend.device)))
                    labels += row.label_tokens
                samples += prepared.samples
        loss, label_count, sample_count = backend.total([loss, labels, samples])
        mean = loss / max(1.0, label_count)
        if backend.worker == 0:
            line = {"step": step, "loss": mean, "samples": int(sample_count)}
            with open(run / EVALUATIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return mean

    return evaluate

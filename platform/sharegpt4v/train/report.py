"""report.html of training: curves and recipe of one run, or of two on the same axes; one offline file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sharegpt4v.atomic import write_atomic
from sharegpt4v.errors import UserError
from sharegpt4v.run.settings import read_settings
from sharegpt4v.train.evaluation import EVALUATIONS
from sharegpt4v.train.generations import GENERATIONS
from sharegpt4v.train.logs import read_metrics

MAX_POINTS = 2000
"""Points of a curve; longer runs show every n-th step, and the last one."""

_CURVES = (
    ("loss", "Loss of a label token"),
    ("gradient_norm", "Gradient norm"),
    ("rate", "Learning rate, share of the peak"),
    ("tokens_per_second", "Tokens per second"),
    ("samples_per_second", "Samples per second"),
    ("balance", "Balance of the workers"),
)
_COLOURS = ("#2563eb", "#d97706")

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 1120px; margin: 0 auto; padding: 1.5rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .25rem .75rem .25rem 0; vertical-align: top; }
tr { border-bottom: 1px solid #8884; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { margin: 0 0 .25rem; } .soft { opacity: .7; } .differs { font-weight: 600; }
.charts { overflow-x: auto; background: #fff; }
"""


@dataclass(frozen=True)
class TrainedRun:
    """What a report shows of one run folder."""

    name: str
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    generations: list[dict[str, Any]]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, run: Path) -> "TrainedRun":
        """Reads a run folder. Raises UserError for one without a training step."""
        lines = read_metrics(run)
        if not lines:
            raise UserError(f"{run} holds no training step; `sharegpt4v train` makes one")
        evaluations, generations = (_read_lines(run / name) for name in (EVALUATIONS, GENERATIONS))
        return cls(run.resolve().name, lines, evaluations, generations, read_settings(run))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(text) for text in texts]


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes the page completely or not at all. runs: one, or two that share its axes.

    Raises UserError for a run without a step, OSError where `out` cannot be written.
    """
    shown = [TrainedRun.read(run) for run in runs]
    write_atomic(out, _page(shown))


def thinned(lines: Sequence[dict[str, Any]], most: int = MAX_POINTS) -> list[dict[str, Any]]:
    """Returns every n-th line and the last, at most `most` + 1 of them."""
    every = max(1, -(-len(lines) // most))
    kept = list(lines[::every])
    return kept if not lines or kept[-1] is lines[-1] else [*kept, lines[-1]]


def _page(runs: Sequence[TrainedRun]) -> str:
    title = " and ".join(escape(run.name) for run in runs)
    charts = _figure(runs).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{title} · training</title><style>{_STYLE}</style></head><body>"
        f"<h1>{title}</h1>{''.join(map(_headline, runs))}"
        f'<div class="charts">{charts}</div>'
        f"{''.join(map(_generations, runs))}<h2>Recipe</h2>{_recipes(runs)}</body></html>\n"
    )


def _generations(run: TrainedRun) -> str:
    """Shows what the model said of each fixed image, at five checkpoints at most, and what it should say."""
    steps = sorted({line["step"] for line in run.generations})
    shown = {line["step"] for line in thinned([{"step": step} for step in steps], 4)}
    parts = []
    for name in dict.fromkeys(line["id"] for line in run.generations):
        lines = [line for line in run.generations if line["id"] == name]
        rows = "".join(
            f"<tr><th>step {line['step']:,}</th><td>{escape(line['said'])}</td></tr>"
            for line in lines
            if line["step"] in shown
        )
        wanted = f"<tr><th>data</th><td>{escape(lines[0]['wanted'])}</td></tr>"
        title = f"{escape(name)}: {escape(lines[0]['question'])}"
        parts.append(f"<h3>{title}</h3><table><tbody>{rows}{wanted}</tbody></table>")
    return f"<h2>What {escape(run.name)} says of fixed images</h2>{''.join(parts)}" if parts else ""


def _headline(run: TrainedRun) -> str:
    last, seconds = run.lines[-1], sum(line["seconds"] for line in run.lines)
    loss = "not a number" if last["loss"] is None else f"{last['loss']:.4f}"
    samples, tokens = (sum(line[key] for line in run.lines) for key in ("samples", "tokens"))
    rejects, skipped = (sum(line[key] for line in run.lines) for key in ("rejects", "skipped"))
    return (
        f'<p class="soft"><b>{escape(run.name)}</b>: {escape(str(run.settings["stage"]))} from '
        f"{escape(str(run.settings['model']))}, {last['step']:,} steps, loss {loss}, {samples:,} samples "
        f"({samples / seconds:,.1f}/s), {tokens:,} tokens ({tokens / seconds:,.0f}/s), {rejects:,} samples "
        f"replaced, {skipped:,} steps skipped</p>"
    )


def _figure(runs: Sequence[TrainedRun]) -> go.Figure:
    titles = [title for _, title in _CURVES]
    figure = make_subplots(rows=3, cols=2, subplot_titles=titles, vertical_spacing=0.09)
    for number, run in enumerate(runs):
        colour, lines = _COLOURS[number], thinned(run.lines)
        steps = [line["step"] for line in lines]
        for place, (key, _) in enumerate(_CURVES):
            values = [line["rate_share" if key == "rate" else key] for line in lines]
            curve = go.Scatter(
                x=steps,
                y=values,
                name=run.name,
                legendgroup=run.name,
                showlegend=place == 0,
                line={"color": colour, "width": 1.5},
            )
            figure.add_trace(curve, row=place // 2 + 1, col=place % 2 + 1)
        if run.evaluations:
            held_out = go.Scatter(
                x=[line["step"] for line in run.evaluations],
                y=[line["loss"] for line in run.evaluations],
                name=f"{run.name}, held out",
                mode="lines+markers",
                line={"color": colour, "dash": "dot"},
            )
            figure.add_trace(held_out, row=1, col=1)
    figure.update_layout(template="plotly_white", height=900, margin={"l": 50, "r": 20, "t": 50, "b": 40})
    return figure


def _recipes(runs: Sequence[TrainedRun]) -> str:
    columns = [{**run.settings["fingerprint"], **_how(run.settings)} for run in runs]
    rows = []
    for key in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(key) for column in columns]
        mark = ' class="differs"' if any(value != values[0] for value in values) else ""
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
        rows.append(f"<tr{mark}><th>{escape(key)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _how(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what does not decide the losses and yet belongs to a recipe."""
    config = settings["config"]
    shown = {key: config[key] for key in ("workers", "zero", "tokens_per_micro_step") if key in config}
    return shown | {"data files": ", ".join(config["data"]), "git revision": settings["git_revision"]}

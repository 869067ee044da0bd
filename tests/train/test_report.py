"""report.html of training: one run, two side by side, and nothing that a browser would fetch."""

import re
from pathlib import Path

import pytest

from sharegpt4v.config.base import resolve
from sharegpt4v.config.train import SftConfig
from sharegpt4v.errors import UserError
from sharegpt4v.run.folder import RunFolder
from sharegpt4v.run.settings import write_settings
from sharegpt4v.train.report import thinned, write_report
from tests.train.runs import prepare_job, train_here


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, rate in (("one", 1e-3), ("<two>", 2e-3)):
        job = prepare_job(
            folder, run=name, max_steps=3, learning_rate=rate, eval_data=[str(folder / "talk.json")]
        )
        train_here(job)
        config = resolve(SftConfig, {"data": ["talk.json"], "out": str(job.run), "learning_rate": rate})
        facts = {"stage": "sft", "model": "toy-chat@0"}
        write_settings(RunFolder(job.run), config.model_dump(mode="json"), {"learning_rate": rate}, facts)
        found.append(job.run)
    return found


def test_the_report_of_a_run_shows_its_curves_and_recipe(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs[:1], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for title in ("Loss of a label token", "Gradient norm", "Tokens per second", "Balance of the workers"):
        assert title in page
    assert "held out" in page and "<th>learning_rate</th><td>0.001</td>" in page
    assert "3 steps, loss" in page and "toy-chat@0" in page
    assert "says of fixed images" in page and page.count("<th>data</th>") == 4


def test_two_runs_share_axes_and_their_differences_are_marked(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert '<tr class="differs"><th>learning_rate</th><td>0.001</td><td>0.002</td></tr>' in page
    body = page[page.index("<body>") : page.index('<div class="charts">')]
    assert "&lt;two&gt;" in body and "<two>" not in body


def test_a_browser_fetches_nothing(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs[:1], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]*?(?:src|href)=\"(?!data:)", page)


def test_long_runs_are_thinned_and_keep_their_last_step() -> None:
    lines = [{"step": step} for step in range(1, 5002)]
    kept = thinned(lines, 1000)
    assert len(kept) <= 1001 and kept[-1]["step"] == 5001 and kept[0]["step"] == 1
    assert thinned(lines[:3], 1000) == lines[:3]


def test_a_folder_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training step"):
        write_report([tmp_path], tmp_path / "report.html")

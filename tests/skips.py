"""Leaves out the suites that have a make target of their own, and lists what several runs of pytest skipped.

A plugin of pytest (tests/conftest.py loads it); `python -m tests.skips FILE` prints the table.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Column, Table

SUITES = ("browser", "slow", "workers", "faults", "fuzz", "long")
"""Markers of tests that `make test` skips; `make test-NAME` runs each."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--skipped-to", metavar="FILE", help="append to FILE which tests were skipped, and why")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests of a suite unless -m says which tests to run."""
    if config.option.markexpr:
        return
    for item in items:
        for suite in SUITES:
            if item.get_closest_marker(suite):
                item.add_marker(pytest.mark.skip(reason=f"left to make test-{suite}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Appends one line of JSON a skipped test to the file of --skipped-to: its file, and the reason.

    Not in xdist's workers (they have a workerinput): the main process gets their reports, too.
    """
    path = config.getoption("--skipped-to")
    if path is None or hasattr(config, "workerinput"):
        return
    with Path(path).open("a", encoding="utf-8") as lines:
        for report in terminalreporter.stats.get("skipped", []):
            *_, reason = report.longrepr
            row = {"file": report.nodeid.split("::")[0], "reason": reason.removeprefix("Skipped: ")}
            lines.write(json.dumps(row) + "\n")


def table(path: Path) -> Table:
    """The skipped tests that runs of pytest have appended to `path`, counted by file and reason."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = Counter((row["reason"], row["file"]) for row in rows)
    shown = Table("tests", Column("in", overflow="fold"), "skipped", title=f"skipped tests: {len(rows)}")
    for (reason, file), count in sorted(counts.items()):
        shown.add_row(str(count), file, reason)
    return shown


if __name__ == "__main__":
    Console().print(table(Path(sys.argv[1])))

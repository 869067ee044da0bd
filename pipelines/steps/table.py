"""The short table a command ends with."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table


def print_summary(summary: dict[str, Any]) -> None:
    """Prints counts by source and reason, and rates. summary: what summary.json holds."""
    print_counts(summary["by_source"], summary["by_reason"], ("captions", "rejects"))
    print(
        f"{summary['captions']:,} captions and {summary['rejects']:,} rejects of {summary['rows']:,} images "
        f"in {summary['seconds']:,.1f} s{_where_time_went(summary)}, model {summary['model']}"
    )
    if summary["duplicates"]:
        images = "image has" if summary["duplicates"] == 1 else "images have"
        print(f"{summary['duplicates']:,} captioned {images} the same bytes as an earlier one")
    if engine := summary["engine_statistics"]:
        print(
            f"each engine decoded {engine['decode_tokens_per_second']:,.0f} tokens/s with "
            f"{engine['slot_use']:.0%} of its slots in use, first tokens came after "
            f"{engine['seconds_to_first_token']:,.1f} s ({engine['requests']:,} answers)"
        )


def _where_time_went(summary: dict[str, Any]) -> str:
    """Returns ` (8.2 s of start-up, then 58.1 images/s)`; empty where nothing was captioned."""
    parts = []
    if summary["startup_seconds"] is not None:
        parts.append(f"{summary['startup_seconds']:,.1f} s of start-up")
    if summary["images_per_second"]:
        parts.append(f"{'then ' if parts else ''}{summary['images_per_second']:,.1f} images/s")
    line = ", ".join(parts)
    if summary["sessions"] > 1:
        all_sessions = f"{summary['wall_seconds']:,.1f} s in all {summary['sessions']} sessions"
        line = f"{line}; {all_sessions}" if line else all_sessions
    return f" ({line})" if line else ""


def print_counts(
    by_source: dict[str, dict[str, int]], by_reason: dict[str, int], columns: tuple[str, ...]
) -> None:
    """Prints a row a source with the named counts and a row of sums, then what was rejected and why."""
    console = Console(highlight=False, markup=False)
    sources = Table("source", *_right(columns))
    for source, counts in sorted(by_source.items()):
        sources.add_row(source, *(f"{counts.get(column, 0):,}" for column in columns))
    sums = [sum(counts.get(column, 0) for counts in by_source.values()) for column in columns]
    sources.add_section()
    sources.add_row("all", *(f"{value:,}" for value in sums))
    console.print(sources)
    if by_reason:
        reasons = Table("rejected because", *_right(("images",)))
        for reason, count in by_reason.items():
            reasons.add_row(reason, f"{count:,}")
        console.print(reasons)


def _right(names: tuple[str, ...]) -> list[Column]:
    return [Column(name, justify="right") for name in names]

"""The end of a captioning run: audit, compact, summary, report, verdict, and last of all _SUCCESS."""

import sys

from cluster.errors import EXIT_PROBLEM
from pipelines.steps.job import CaptionJob
from pipelines.steps.phases import Phases
from pipelines.steps.reject_limit import judge_run
from pipelines.steps.table import print_summary
from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.finish import close_times, commits, compact, summarise
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.notes import read_summary
from sharegpt4v.captions.report import write_report


def finish(job: CaptionJob, run: CaptionRun, root: str, phases: Phases) -> int:
    """Ends a run in which every image has its outcome. Returns the exit code."""
    phases.begin("writing captions and rejects")
    committed = commits(run)
    summary = summarise(run, compact(run), committed, job.facts(root), phases.started)
    phases.begin("writing the report")
    write_report(run.path, root=root)
    close_times(run, summary, phases.started)
    phases.end()
    return conclude(job, run)


def conclude(job: CaptionJob, run: CaptionRun) -> int:
    """Prints what summary.json holds and judges its rejects. Returns the exit code, 0 with _SUCCESS alone."""
    summary = read_summary(run.path)
    print_summary(summary)
    print(f"report: {run.report}", flush=True)
    if warning := job.toy_warning(summary["root"]):
        print(warning, file=sys.stderr)
    verdict = judge_run(summary["captions"], summary["by_reason"], job.config.max_reject_rate)
    if verdict.line:
        print(f"sharegpt4v caption: {verdict.line}", file=sys.stderr)
    if not verdict.success:
        run.success.unlink(missing_ok=True)
        return EXIT_PROBLEM
    if not run.success.exists():
        write_atomic(run.success, "")
    return 0

"""The check: reads and inspects every image of a manifest on the cluster, and counts what it finds."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import ray.data
import ray.exceptions

from cluster.errors import EXIT_PROBLEM, plain_errors
from cluster.session import connection_text, quiet_data_context, ray_session, refuse_relative_paths
from pipelines.steps.clock import command_started
from pipelines.steps.decoding import put_off, read_row_group
from pipelines.steps.isolation import KILLED_WORKER, KILLED_WORKER_MESSAGE, Isolation
from pipelines.steps.ledger import LedgerClient, RemoteLedger
from pipelines.steps.phases import Phases
from pipelines.steps.progress import ProgressBar
from pipelines.steps.storage_faults import Place, sample_places
from pipelines.steps.table import print_counts
from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.blocks import row_groups
from sharegpt4v.config.check import CheckConfig
from sharegpt4v.credentials import without_credentials
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageReader, StorageError, inspect
from sharegpt4v.inspection import DIGEST_BYTES, INSPECTED, KINDS, UNREAD, Inspection, InspectionSummary
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.manifest.writer import shards
from sharegpt4v.records import LOCATION_COLUMNS
from sharegpt4v.run.disk import full_disk_named
from sharegpt4v.run.folder import make_writable

_ROWS_PER_BLOCK = 256
_ROWS_AT_ONCE = 8_192  # a call of Inspection.add; few calls, since the driver makes them


class Inspect:
    """PENDING's places of images in; rows of INSPECTED out, in the same order."""

    def __init__(self, reader: ImageReader, ledger: LedgerClient, sample: Sequence[Place] = ()) -> None:
        """Takes a sample of all images: when most of it cannot be read, the check ends."""
        self._reader = reader
        self._ledger = ledger
        self._sample = sample

    def __call__(self, batch: pa.Table) -> pa.Table:
        ids = batch["id"].to_pylist()
        places = list(zip(*(batch[name].to_pylist() for name in LOCATION_COLUMNS), strict=True))
        digests = [bytes(DIGEST_BYTES)] * len(ids)
        reasons: list[str | None] = [None] * len(ids)
        messages: list[str | None] = [None] * len(ids)

        def work(rows: list[int]) -> None:
            for row in rows:
                try:
                    data = self._reader.read(*places[row])
                    digests[row] = hashlib.sha256(data).digest()[:DIGEST_BYTES]
                    inspect(data)
                except Rejected as rejected:
                    reasons[row], messages[row] = rejected.reason, rejected.message
                except StorageError as fault:
                    reasons[row], messages[row] = UNREAD, str(fault)
                    put_off(self._ledger, self._reader, self._sample, ids[row], messages[row])

        for row in Isolation(self._ledger, "check").run(ids, work):
            reasons[row], messages[row] = KILLED_WORKER, KILLED_WORKER_MESSAGE
        found = Counter(reason for reason in reasons if reason)
        self._ledger.count(ids[0], len(ids) - found.total(), dict(found))
        columns = [ids, batch["image"], batch["source"], digests, reasons, messages]
        return pa.table(columns, schema=INSPECTED)


def run_check(config: CheckConfig) -> int:
    """Looks at every image, prints the table, and writes rejects/ and summary.json when --out is given."""
    refuse_relative_paths(images=config.images, root=config.root, out=config.out)
    if config.out is not None:
        _claim(config.out)
    with (
        tempfile.TemporaryDirectory(prefix="sharegpt4v-check-") as folder,
        full_disk_named(scratch := Path(folder)),
        Phases(command_started()) as phases,
    ):
        phases.begin(f"reading {config.images}")
        manifest = normalise(
            config.images,
            config.root,
            scratch / "manifest",
            limit=config.limit,
            sample=config.sample,
            source=config.source,
            dedupe_image=config.dedupe_image,
        )
        inspection = Inspection(scratch)
        phases.begin(connection_text(config.address))
        with ray_session(config.address), phases:
            look(manifest, inspection, phases)
        rejects, duplicates = (
            (config.out or scratch) / name / "part-00000.parquet" for name in ("rejects", "duplicates")
        )
        with full_disk_named(config.out or scratch):
            rejects.parent.mkdir(exist_ok=True)
            duplicates.parent.mkdir(exist_ok=True)
            found = inspection.settle(rejects, duplicates)
            _report(config, manifest, found)
    incomplete = found.by_reason[UNREAD] > 0
    return EXIT_PROBLEM if incomplete or (config.strict and found.by_reason) else 0


def look(manifest: Manifest, inspection: Inspection, phases: Phases) -> None:
    """Inspects every image of a manifest on the cluster that Ray is connected to.

    Raises RunFailed when most of a sample can neither be read nor be called missing.
    """
    quiet_data_context(no_progress_seconds=1800.0)
    ledger = RemoteLedger.start(max_reject_rate=1.0)
    step = Inspect(ImageReader(manifest.root), ledger, sample_places(shards(manifest.folder)))
    groups = row_groups(shards(manifest.folder))
    images = (
        ray.data.from_items(groups, override_num_blocks=len(groups))
        .map_batches(
            read_row_group,
            fn_kwargs={"columns": ["id", "source", *LOCATION_COLUMNS]},
            batch_size=1,
            batch_format="pyarrow",
            # The manifest lies in this machine's temporary folder, where other nodes cannot read it. No
            # CPUs: a cluster's head often has none to give.
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            num_cpus=0,
        )
        .repartition(target_num_rows_per_block=_ROWS_PER_BLOCK)
        .map_batches(step.__call__, batch_size=_ROWS_PER_BLOCK, batch_format="pyarrow")
    )
    images.context.execution_options.preserve_order = True
    phases.begin(f"looking at {manifest.rows:,} images")
    bar = ProgressBar("checked", ledger.tally, manifest.rows, 0, phases)
    with bar, plain_errors("mend that, then check again"), full_disk_named(manifest.folder):
        for table in images.iter_batches(batch_size=_ROWS_AT_ONCE, batch_format="pyarrow"):
            assert isinstance(table, pa.Table)
            inspection.add(table)


def _claim(out: Path) -> None:
    make_writable(out)
    used = next((path for path in out.rglob("*") if not path.is_dir()), None)
    if used:
        raise UserError(
            f"{out} holds other files ({used.relative_to(out)}, ...): give a new folder", field="out"
        )


def _report(config: CheckConfig, manifest: Manifest, found: InspectionSummary) -> None:
    columns = ("images", "usable", *KINDS, "duplicate")
    by_source = {
        source: {column: counts[column] for column in columns}
        for source, counts in sorted(found.by_source.items())
    }
    by_reason = dict(sorted(found.by_reason.items(), key=lambda item: (-item[1], item[0])))
    print_counts(by_source, by_reason, columns)
    for reason in by_reason:
        example = found.examples[reason]
        print(f"  {reason}, for example {example['id']!r}: {example['message']}")
    print(_verdict(found, config.out))
    if manifest.ignored:
        print("passed over: " + ", ".join(f"{count:,} {kind}" for kind, count in manifest.ignored.items()))
    if config.out is None:
        return
    summary = {
        "rows": manifest.rows,
        "root": without_credentials(manifest.root),
        "by_source": by_source,
        "by_reason": by_reason,
        "duplicates": found.count("duplicate"),
        "ignored": manifest.ignored,
    }
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _verdict(found: InspectionSummary, out: Path | None) -> str:
    """Says in one line what `caption` would make of these images."""
    images, usable, repeats = (found.count(name) for name in ("images", "usable", "duplicate"))
    line = f"{usable:,} of {images:,} images can be captioned"
    if repeats:
        line += f", {repeats:,} of them with the same bytes as an earlier one (each gets a caption)"
    if usable < images:
        kinds = ", ".join(f"{count:,} {kind}" for kind in KINDS if (count := found.count(kind)))
        line += f"; {images - usable:,} cannot: {kinds}"
        line += f", all listed in {out}/rejects" if out else "; --out keeps the list"
    return line

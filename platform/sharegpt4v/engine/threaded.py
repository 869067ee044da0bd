"""What our engines have in common: a queue that anybody fills, and one thread that works it off."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue

from sharegpt4v.dialogue import Completion, Request
from sharegpt4v.engine.handle import EngineClosed, EngineError, Handle
from sharegpt4v.engine.stats import EngineStats

log = logging.getLogger(__name__)

UNFINISHED = "the engine was closed before this request was finished"


class ThreadedEngine(ABC):
    """Subclasses set themselves up and call `_start`; their thread then goes from `_step` to `_step`."""

    def __init__(self) -> None:
        self._queue = RequestQueue()
        self._stats = EngineStats()
        self._thread: threading.Thread | None = None

    def submit(self, request: Request) -> Handle:
        """Never blocks. Raises EngineClosed once the engine is closed."""
        return self._queue.submit(request)

    def stats(self) -> EngineStats:
        return replace(self._stats, queued=len(self._queue))

    def close(self) -> None:
        """Fails what is unfinished with EngineClosed and joins the engine's thread."""
        self._queue.close()
        if self._thread is not None:
            self._thread.join()

    @abstractmethod
    def _step(self) -> None:
        """Does the next piece of work, or waits for one; called until the queue is closed."""

    def _held(self) -> Iterable[Handle]:
        """What was taken from the queue and is not finished."""
        return ()

    def _work(self) -> None:
        """The engine's thread. However it ends, nobody may go on waiting for it."""
        why = UNFINISHED
        try:
            while not self._queue.closed:
                self._step()
        except Exception as error:
            log.exception("the engine's thread ends")
            why = f"the engine ended: {one_line(error)}"
        finally:
            self._queue.close()
            for handle in self._held():
                handle.fail(EngineClosed(why))

    def _start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _fail(self, handle: Handle, error: Exception) -> None:
        self._count(failed=1)
        handle.fail(EngineError(one_line(error)))

    def _count(self, **more: float) -> None:
        """Adds to the statistics, step by step: whoever watches them sees that the engine gets on."""
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = replace(self._stats, **now)


class RequestQueue:
    """What an engine's thread takes its work from. After `close` nothing gets in, and what waited fails."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Handle | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def wait_closed(self) -> None:
        self._closed.wait()

    def submit(self, request: Request) -> Handle:
        handle = Handle(request)
        with self._lock:
            if self.closed:
                raise EngineClosed("the engine is closed")
            self._waiting.put(handle)
        return handle

    def take(self) -> Handle | None:
        """The next request as soon as there is one, or None once the queue is closed."""
        return None if self.closed else self._waiting.get()

    def take_all(self) -> list[Handle]:
        """Every request that waits, without waiting for one."""
        taken = []
        while not self.closed:
            try:
                handle = self._waiting.get_nowait()
            except Empty:
                break
            if handle is None:
                self._waiting.put(None)
                break
            taken.append(handle)
        return taken

    def __len__(self) -> int:
        return 0 if self.closed else self._waiting.qsize()

    def close(self) -> None:
        """May be called twice, by the engine's thread that dies and by whoever closes the engine."""
        with self._lock:
            self._closed.set()
            # Never a get that blocks: the engine's thread may take the last one between a look and a get.
            with suppress(Empty):
                while True:
                    handle = self._waiting.get_nowait()
                    if handle is not None:
                        handle.fail(EngineClosed(UNFINISHED))
            self._waiting.put(None)


def one_line(error: Exception) -> str:
    """Fit for a reject record: our own errors as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"


def withdrawn(handle: Handle, tokens: int) -> bool:
    """Whether nobody wants the answer any more, of which `tokens` stand; finishes one that was cancelled.

    Raises EngineError when the request's time is over.
    """
    timeout = handle.request.timeout
    if handle.cancelled:
        handle.finish(Completion("", tokens, "cancelled"))
    elif timeout is not None and time.monotonic() - handle.submitted > timeout:
        raise EngineError(f"not finished within its {timeout:g} s, after {tokens} tokens")
    return handle.done()

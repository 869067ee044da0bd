"""A queue in which requests from any thread wait until the engine's thread takes them."""

import threading

from sharegpt4v.dialogue import Request
from sharegpt4v.engine.handle import EngineClosed, Handle

UNFINISHED = "the engine was closed before this request was finished"


class Intake:
    """Submitted requests in order. Closing it fails those left in it; it then refuses further ones."""

    def __init__(self) -> None:
        self._submitted: list[Handle] = []
        self._changed = threading.Condition()
        self.closed = False
        self.refusing = False

    def submit(self, request: Request) -> Handle:
        """Queues a request without blocking. Raises EngineClosed once closed or refusing."""
        handle = Handle(request)
        with self._changed:
            if self.refusing:
                raise EngineClosed("the engine is closed" if self.closed else "the engine is closing")
            self._submitted.append(handle)
            self._changed.notify_all()
        return handle

    def take_all(self, wait: bool) -> list[Handle]:
        """Returns handles submitted since the last call. wait: block until there is one, or closed."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._submitted or self.closed)
            taken, self._submitted = self._submitted, []
        return taken

    def refuse(self) -> None:
        """Refuses further requests; those in it remain."""
        with self._changed:
            self.refusing = True

    def wait_closed(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.closed)

    def close(self) -> None:
        """Fails the requests left in it. May be called twice: by `close` and as the engine's thread ends."""
        with self._changed:
            self.closed = self.refusing = True
            self._changed.notify_all()
        for handle in self.take_all(wait=False):
            handle.fail(EngineClosed(UNFINISHED))

    def __len__(self) -> int:
        return len(self._submitted)

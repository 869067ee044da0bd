"""What can end a command, and what can end a row."""

from collections.abc import Callable
from functools import partial


class UserError(ValueError):
    """Something the user can put right: one line with the value, the limit and the next step.

    field: the argument or configuration field at fault, dotted where it is nested; str() begins with it.
    Other fields are in the text in backticks: UserError("0 is too few: give 1, or leave `limit` out",
    field="count"). The command line prints both as flags. Commands end with exit code 2, no traceback.
    """

    def __init__(self, text: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {text}" if field else text)
        self.text = text
        self.field = field

    def __reduce__(self) -> tuple[Callable[[str], "UserError"], tuple[str]]:
        # Not from its args, to which Ray Data appends a note before an error is pickled.
        return partial(type(self), field=self.field), (self.text,)


class RunFailed(RuntimeError):
    """Work that began could not go on: one line that says why and what to do. Exit code 1."""


class Rejected(ValueError):
    """One row that cannot be used; the run goes on and writes it to the rejects.

    reason: a stable snake_case code that summaries count by, `truncated` for example.
    message: one line for people, naming the value and the limit.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["Rejected"], tuple[str, str]]:
        # ValueError would be rebuilt from its single formatted argument and lose both fields.
        return type(self), (self.reason, self.message)

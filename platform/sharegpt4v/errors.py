"""The errors that end a command, and those that reject a row."""

from collections.abc import Callable
from functools import partial

from sharegpt4v.credentials import without_credentials


class UserError(ValueError):
    """An error that the user can correct: one line with the value, the limit and the next step.

    field: the argument or configuration field at fault, dotted where it is nested; str() begins with it.
    Other fields are in the text in backticks: UserError("0 is too few: give 1, or leave `limit` out",
    field="count"). The command line prints both as flags. Commands end with exit code 2, no traceback.
    """

    def __init__(self, text: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {text}" if field else text)
        self.text = text
        self.field = field

    def __reduce__(self) -> tuple[Callable[[str], "UserError"], tuple[str]]:
        # Not from `args`, to which Ray Data appends text before an error is pickled.
        return partial(type(self), field=self.field), (self.text,)


class RunFailed(RuntimeError):
    """A run that started and cannot continue: one line with the cause and the next step. Exit code 1."""


class Rejected(ValueError):
    """One row that cannot be used; the run continues and writes it to the rejects.

    reason: a stable snake_case code that summaries count by, `truncated` for example.
    message: one line for people, naming the value and the limit; credentials in it are hidden.
    """

    def __init__(self, reason: str, message: str) -> None:
        message = without_credentials(message)  # it names images, and is shown in reports
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["Rejected"], tuple[str, str]]:
        # ValueError would be rebuilt from its single formatted argument and lose both fields.
        return type(self), (self.reason, self.message)

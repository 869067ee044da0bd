"""What can end a command, and what can end a row."""


class UserError(ValueError):
    """Something the user can put right: one line with the value, the limit and the next step.

    Commands print it without a traceback and end with exit code 2.
    """


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

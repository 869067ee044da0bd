"""Logs of the server: one JSON object a line, with the request's id, and without prompts or images."""

import json
import logging
import sys
import time
from typing import Any, TextIO

_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName", "color_message"}
"""Attributes that every record has; others were given as `extra`."""


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time, level, logger, message, extra fields, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json(stream: TextIO | None = None) -> None:
    """Sends the server's own lines and uvicorn's errors to `stream`, stderr by default, as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("serve", "sharegpt4v", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "serve" else logging.WARNING)

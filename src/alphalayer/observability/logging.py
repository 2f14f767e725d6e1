"""Structured logs without values of requests, keys and addresses with secrets.

The policy for loggers of libraries is `_may_log`, and for errors it is `describe_error`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import structlog
from pydantic import ValidationError

log: Any = structlog.get_logger("alphalayer")

VERBOSE_LIBRARIES = {"uvicorn.error": logging.INFO}
"""Lowest level of libraries whose lines below warning are useful and hold no values."""
_DATA_ERRORS = ("22", "23")
"""Classes of SQLSTATE whose messages quote values: data exceptions and constraints."""


def configure_logging(level: str, as_json: bool) -> None:
    """Write all logs, including those of libraries, to standard error.

    Libraries log warnings and errors only, because their other lines hold prompts, idempotency
    keys and addresses of webhooks.

    Args:
        level: Minimum level, such as "info".
        as_json: Whether a line is a JSON object instead of readable text.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    last: list[Any] = [structlog.processors.ExceptionRenderer(_format_traceback), renderer]
    # written without the standard library's logger, which doubles the cost of a line
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
    )
    handler = logging.StreamHandler()
    handler.addFilter(_may_log)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    _silence_libraries(getattr(logging, level.upper()), handler)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda thread: _log_uncaught(
        thread.exc_type, thread.exc_value, thread.exc_traceback
    )


def _silence_libraries(lowest: int, handler: logging.Handler) -> None:
    """Send the lines of all loggers to one handler, at the levels of the policy."""
    os.environ.setdefault("FASTMCP_LOG_ENABLED", "false")  # else it adds handlers of its own
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(lowest, logging.WARNING))
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.NOTSET)
    logging.getLogger("alphalayer").setLevel(lowest)
    for name, lowest_of_library in VERBOSE_LIBRARIES.items():
        logging.getLogger(name).setLevel(max(lowest, lowest_of_library))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, _: object) -> None:
    """Log an error that ends the process or a thread, as the hook of the interpreter."""
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("alphalayer").critical("uncaught error", exc_info=error)


def _may_log(record: logging.LogRecord) -> bool:
    """Return whether the line of a logger is written.

    A library that is imported later may have set a level of its own.
    """
    if record.name.partition(".")[0] == "alphalayer":
        return True
    return record.levelno >= VERBOSE_LIBRARIES.get(record.name, logging.WARNING)


def describe_error(error: BaseException) -> str:
    """Return the message of an error without values of requests.

    Errors of validation, of data in PostgreSQL and of fields of a request quote values.
    """
    error = getattr(error, "orig", None) or error  # the driver's error in one of SQLAlchemy
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_context=False, include_input=False)
        return ", ".join(f"{'.'.join(map(str, item['loc']))}: {item['type']}" for item in details)
    state = getattr(error, "sqlstate", None)
    if state:
        first_line = str(error).partition("\n")[0]  # the next lines are the detail and the hint
        return f"SQLSTATE {state}" if state.startswith(_DATA_ERRORS) else first_line
    field = getattr(error, "field", None)
    return f"field {field}" if field else str(error)


def _format_traceback(exc_info: Any) -> str:
    """Return the traceback of an error and its causes, without values."""
    return "\n".join(_traceback_lines(exc_info[1])) if exc_info[1] else ""


def _traceback_lines(error: BaseException) -> Iterator[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause:
        yield from _traceback_lines(cause)
        yield "\nThe above exception led to:\n"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    name = type(error).__qualname__
    message = describe_error(error)
    yield f"{name}: {message}" if message else name
    for child in getattr(error, "exceptions", ()):
        yield "\nOne of its errors:\n"
        yield from _traceback_lines(child)

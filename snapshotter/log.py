# SPDX-License-Identifier: Apache-2.0
"""Structured logs: JSON lines on standard error, text on a terminal. They never hold credentials or contents."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, Final

import structlog

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_level = "info"


class _Lines:
    """Standard error, line by line. A full disk or a closed pipe loses lines, never calls."""

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    log = debug = info = warning = error = critical = exception = msg


def level() -> str:
    return _level


def set_level(wanted: str) -> str:
    """From now on, for every logger there is; the one before."""
    global _level
    before, _level = _level, wanted
    return before


def _of_the_level(_: object, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if LEVELS.get(name, logging.CRITICAL) < LEVELS[_level]:
        raise structlog.DropEvent
    return event


def set_up(level: str) -> None:
    terminal = sys.stderr.isatty()
    set_level(level)
    structlog.configure(
        processors=[
            _of_the_level,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *_: _Lines(),
        cache_logger_on_first_use=True,
    )


def get_logger() -> structlog.typing.FilteringBoundLogger:
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger

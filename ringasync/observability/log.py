"""Logs: readable lines on stderr, JSON lines in ``runs/NAME/logs/ROLE-PID.jsonl``.

Every line carries ``run``, ``role``, ``worker`` and ``policy_version``, also those of libraries
that use the standard ``logging``. What a process is goes into ``bind_identity``; what a task is
about goes into structlog's context variables (``bound_contextvars``), which win.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog

IDENTITY_FIELDS = ("run", "role", "worker", "policy_version")
LOG_FILE_BYTES = 64 << 20
"""A log file is rotated at this size; two old ones are kept."""

_NOISY = ("asyncio", "datasets", "filelock", "fsspec", "httpcore", "httpx", "urllib3")
_PASSWORD = re.compile(r"(\w+://[^:/@\s]*:)[^@/\s]+@")
_identity: dict[str, Any] = dict.fromkeys(IDENTITY_FIELDS)
_EventDict = MutableMapping[str, Any]


def configure_logging(
    role: str,
    run: str,
    run_dir: Path | None,
    level: str = "info",
    *,
    terminal: bool = True,
) -> Path | None:
    """Set up logging of this process; call it once, first of all. Calling again starts afresh.

    ``run_dir`` None writes no file; ``terminal`` False writes nothing to stderr (a live view owns
    the screen). Returns the JSON lines' path. Libraries' ``logging`` and ``warnings`` are captured,
    passwords in URLs are blotted out, and an exception nobody caught is logged.
    """
    _identity.update(dict.fromkeys(IDENTITY_FIELDS), run=run, role=role)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared_processors(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if getattr(handler, "ringasync", False):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    path = None if run_dir is None else run_dir / "logs" / f"{role}-{os.getpid()}.jsonl"
    if terminal:
        _add_handler(root, logging.StreamHandler(sys.stderr), _console_renderer())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            path, maxBytes=LOG_FILE_BYTES, backupCount=2, encoding="utf-8"
        )
        _add_handler(root, file, structlog.processors.JSONRenderer(default=str, ensure_ascii=False))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    return path


def get_logger(name: str = "ringasync") -> structlog.stdlib.BoundLogger:
    """A logger: ``log.info("weights taken up", version=4)``. An event is a short sentence."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def bind_identity(**fields: Any) -> None:
    """Set what this process is, for every later line of every task and thread.

    E.g. ``bind_identity(worker="w-1a2b", policy_version=4)``.
    """
    _identity.update(fields)


def _shared_processors() -> list[Any]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _add_identity,
        _blot_passwords,
    ]


def _add_handler(root: logging.Logger, handler: logging.Handler, renderer: Any) -> None:
    last: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if isinstance(renderer, structlog.processors.JSONRenderer):
        last += [structlog.processors.format_exc_info, _blot_passwords]
    else:
        last += [_drop_unknown_identity]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared_processors(), processors=[*last, renderer]
        )
    )
    handler.ringasync = True  # type: ignore[attr-defined]  # marks it for the next configure
    root.addHandler(handler)


def _console_renderer() -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        pad_event_to=32,
        exception_formatter=structlog.dev.plain_traceback,
    )


def _add_identity(_logger: Any, _method: str, event: _EventDict) -> _EventDict:
    for name, value in _identity.items():
        event.setdefault(name, value)
    return event


def _drop_unknown_identity(_logger: Any, _method: str, event: _EventDict) -> _EventDict:
    """A person sees the run's name on top of the screen; unknown fields are noise."""
    event.pop("run", None)
    event.pop("logger", None)
    for name in IDENTITY_FIELDS:
        if event.get(name, "") is None:
            del event[name]
    return event


def _blot_passwords(_logger: Any, _method: str, event: _EventDict) -> _EventDict:
    for name, value in event.items():
        if isinstance(value, str) and "@" in value:
            event[name] = _PASSWORD.sub(r"\1***@", value)
    return event


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    get_logger().critical("uncaught exception", exc_info=(kind, error, traceback))

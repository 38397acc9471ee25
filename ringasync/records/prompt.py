"""A group's prompt and task as the broker keeps them: JSON that anybody may have written over."""

from __future__ import annotations

import json
from typing import Any

from ringasync.errors import MALFORMED_JSON, SchemaError

_ID_LIMIT = 2**31
_MOST_SHOWN = 60


def read_prompt_ids(raw: bytes) -> tuple[int, ...]:
    """Token ids of a prompt out of a JSON list.

    Raises ``SchemaError`` for anything else, and for ids that no int32 holds. Whether a model has
    such tokens is for whoever knows the model to say.
    """
    ids = _parsed(raw, "prompt_ids")
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise SchemaError(f"prompt_ids must be a JSON list of token ids, found {_shown(raw)}")
    if ids and not 0 <= min(ids) <= max(ids) < _ID_LIMIT:
        raise SchemaError(f"prompt_ids must lie in 0 to {_ID_LIMIT - 1}, found {_shown(raw)}")
    return tuple(ids)


def read_task(raw: bytes) -> dict[str, Any]:
    """The verifier's data out of a JSON object. Raises ``SchemaError`` for anything else."""
    task = _parsed(raw, "task")
    if not isinstance(task, dict):
        raise SchemaError(f"task must be a JSON object, found {_shown(raw)}")
    return task


def _parsed(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw)
    except MALFORMED_JSON as error:
        raise SchemaError(f"{what} is no JSON ({error}): {_shown(raw)}") from None


def _shown(raw: bytes) -> str:
    return repr(raw if len(raw) <= _MOST_SHOWN else raw[:_MOST_SHOWN] + b"...")

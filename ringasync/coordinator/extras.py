"""Modules of the project whose packages come with an extra: loaded only where a setting asks."""

from __future__ import annotations

import importlib
from typing import Any

from ringasync.errors import EnvironmentRefusedError


def module_of_extra(name: str, extra: str, key: str) -> Any:
    """The module ``name``, which the setting ``key`` asks for.

    Raises:
        EnvironmentRefusedError: the packages of ``extra`` are not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentRefusedError(
            f"{key} is set and what it needs cannot be imported ({error}): "
            f"pip install 'ringasync[{extra}]', or leave {key} empty"
        ) from error

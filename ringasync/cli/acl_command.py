"""``ringasync acl``: the users of a Redis, one a role, with no more rights than the role uses."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ringasync.broker.access import users
from ringasync.runtime.credentials import role_passwords


class RedisMajor(StrEnum):
    """Redis 7 tells reading a key from writing it, 6 does not; it refuses the rules of 7."""

    SIX = "6"
    SEVEN = "7"


def acl(
    redis: Annotated[
        RedisMajor, typer.Option("--redis", help="Major version of the server; 7 for later ones.")
    ] = RedisMajor.SEVEN,
    run: Annotated[str, typer.Option("--run", help="Bound the users to this one run.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write this file, readable by us alone.")
    ] = None,
) -> None:
    """Print an ACL file for Redis: a user ring-ROLE for each role, and `default` for you.

    Passwords come from RINGASYNC_REDIS_PASSWORD_COORDINATOR, ..._WORKER, ..._GRADER, ..._LEARNER,
    ..._OPERATOR (up, top, audit, rm) and ..._ADMIN (Redis's `default` user); only their hashes are
    in the file. Who has no password cannot log in. Load it by `aclfile FILE` in redis.conf.

    Example: ringasync acl --redis 7 --run demo --output users.acl
    """
    text = users(int(redis), role_passwords(), run or None)
    if output is None:
        typer.echo(text, nl=False)
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(output)
    without = [line.split()[1] for line in text.splitlines() if " off " in f"{line} "]
    typer.echo(f"{output}: written" + (f"; no password: {', '.join(without)}" if without else ""))

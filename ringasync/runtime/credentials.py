"""Secrets come from the environment and go to the roles by it: never by files or command lines.

::

    RINGASYNC_REDIS_USERNAME          ACL user; empty: Redis's default user
    RINGASYNC_REDIS_PASSWORD          its password
    RINGASYNC_REDIS_PASSWORD_<ROLE>   one a role, for `ringasync up` and `ringasync acl`
    RINGASYNC_SENTINEL_PASSWORD       the Sentinels' own, for `redis+sentinel://`

`ringasync up` gives each role its own user and hides the passwords of the others from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from urllib.parse import unquote, urlsplit

from ringasync.broker.access import ROLES, USER_PREFIX
from ringasync.broker.primaries import SENTINEL_VARIABLE
from ringasync.runtime.runfiles import without_password

USERNAME_VARIABLE = "RINGASYNC_REDIS_USERNAME"
PASSWORD_VARIABLE = "RINGASYNC_REDIS_PASSWORD"  # noqa: S105 - the name, not the secret
ADMIN = "admin"
ACL_ROLES = (*ROLES, ADMIN)


def password_variable(role: str) -> str:
    """Name of the variable that holds one role's password."""
    return f"{PASSWORD_VARIABLE}_{role.upper()}"


def role_passwords(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Passwords by role, of those that have one."""
    found = {role: environment.get(password_variable(role), "") for role in ACL_ROLES}
    return {role: password for role, password in found.items() if password}


def redis_credentials(environment: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
    """User and password of this process. A person's tools take the operator's where it is given."""
    operator = environment.get(password_variable("operator"))
    if operator and not environment.get(USERNAME_VARIABLE):
        return USER_PREFIX + "operator", operator
    return environment.get(USERNAME_VARIABLE) or None, environment.get(PASSWORD_VARIABLE) or None


def sentinel_password(environment: Mapping[str, str] = os.environ) -> str | None:
    """What every process says to the Sentinels; they have no users of the roles."""
    return environment.get(SENTINEL_VARIABLE) or None


def role_environment(role: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a role's process is given on top: its own user, and blanks over all other passwords."""
    passwords = role_passwords(environment)
    given = {password_variable(other): "" for other in passwords}
    if role in passwords:
        given |= {USERNAME_VARIABLE: USER_PREFIX + role, PASSWORD_VARIABLE: passwords[role]}
    return given


def keep_out_of_sight(url: str, environment: MutableMapping[str, str] = os.environ) -> str:
    """Move a password in an address into the environment: addresses are logged and passed on."""
    parts = urlsplit(url)
    if parts.password is not None:
        environment[PASSWORD_VARIABLE] = unquote(parts.password)
        if parts.username:
            environment[USERNAME_VARIABLE] = unquote(parts.username)
    return without_password(url)

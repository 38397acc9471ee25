"""Least rights in Redis: what each role may do, derived from the scripts and reads it really uses.

A role is given the commands and keys of its scripts, read out of their Lua text, and of the plain
reads listed here. Redis checks commands *inside* a script against the caller's rights as well, so
these rules bound a stolen password to the role's commands on the role's keys. They do not bound
state transitions: rights are commands times keys, and whoever may ``HSET`` a rollout may set its
state by hand. Redis 6.2 cannot tell reading a key from writing it; 7.0 and later can
(``%R~pattern``), and the rules for it make use of that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from ringasync.broker.core import SCRIPTS_DIR
from ringasync.broker.keys import Keys
from ringasync.errors import ConfigError

USER_PREFIX = "ring-"
MIN_PASSWORD_CHARS = 16
"""Redis keeps an unsalted SHA-256: only long random passwords stand behind it."""

_BASE = ("info", "ping", "select", "evalsha", "script|load", "cluster|slots")
"""What the client needs before its first script, in a cluster as well.

It does without `CLIENT SETINFO` (7.2).
"""

_SESSION = ("open_session", "heartbeat", "close_session")
_LOCK = ("acquire_lock", "renew_lock", "release_lock")
_ROLLOUTS = ("take", "append_many", "finish_many", "park_many", "quarantine_many", "bad_version")
_GRADING = ("take_grading", "grade_many", "quarantine_many")
_ROUNDS = ("open_round", "close_round", "round_to_training")
_FEEDING = ("feed", "end_feeding", "end_group", "purge", "reap", *_ROUNDS)

Reads = Mapping[str, str]
"""Command -> names of keys, separated by spaces."""

_VERSION: Reads = {"hget": "meta versions manifests"}
_META: Reads = {
    "hgetall": "meta session:",
    "hget": "meta",
    "zrange": "sessions",
    "scard": "leases:",
}
"""Joining a run, and `ringasync health`."""
_LOOK: Reads = {
    "hgetall": "meta ledger group: rollout: session: versions batch:",
    "hget": "meta versions manifests",
    "lrange": "hist: samples seg:",
    "zrange": "sessions",
    "scard": "leases:",
    "xrange": "metrics outcomes",
}
"""What `top`, `audit`, `inspect` and the reports of a stall read."""
_MEMBERS: Reads = {"smembers": "live", "hmget": "group: rollout:"}
"""Groups with their rollouts, for `ui` and the watch for groups that cannot complete."""


@dataclass(frozen=True, slots=True)
class RoleAccess:
    """What a role uses. ``weights``: its plain commands on the keys of transport ``redis``.

    ``never``: helpers that its scripts name but that its requests cannot reach.
    """

    scripts: tuple[str, ...]
    reads: tuple[Reads, ...] = ()
    writes: Mapping[str, str] | None = None
    weights: tuple[str, ...] = ()
    weight_keys: tuple[str, ...] = ()
    never: frozenset[str] = frozenset()


# A leased or graded rollout belongs to an open group, so no batch holds it.
_NO_BATCH = frozenset({"leave_batch"})

ROLES: Mapping[str, RoleAccess] = {
    "coordinator": RoleAccess(
        scripts=(
            *(*_SESSION, *_LOCK, *_FEEDING, "create_run", "begin_incarnation", "set_meta"),
            *("set_pin", "trim_stream", "audit", "backlog", "clock"),
        ),
        reads=(_LOOK, _MEMBERS, {"lrange": "ended"}),
    ),
    "worker": RoleAccess(
        scripts=(*_SESSION, *_ROLLOUTS, *_GRADING, "push_metrics", "clock"),
        reads=(_META, _VERSION, {"get": "w:*"}),
        weights=("zadd", "zrem", "pexpire", "time", "multi", "exec"),
        weight_keys=("w:*:pins",),
        never=_NO_BATCH,
    ),
    "grader": RoleAccess(
        scripts=(*_SESSION, *_GRADING, "push_metrics", "clock"),
        reads=(_META,),
        never=_NO_BATCH,
    ),
    "learner": RoleAccess(
        scripts=(
            *(*_SESSION, *_LOCK, "ready_groups", "reserve", "release", "commit", "mark_trained"),
            *("force_taken", "end_group", "publish", "finish_round", "push_metrics"),
            *("take_device", "return_device", "backlog", "clock"),
        ),
        reads=(_LOOK, {"zrange": "batches", "hget": "batch:"}),
        weights=(
            *("get", "set", "hget", "hset", "hgetall", "zadd", "zrem", "zrange", "zcount"),
            *("pexpire", "unlink", "time", "multi", "exec"),
        ),
        weight_keys=("w", "w:*"),
    ),
    "operator": RoleAccess(
        scripts=("create_run", "set_meta", "audit", "backlog", "clock"),
        reads=(_LOOK, _MEMBERS),
        writes={"scan": "", "unlink": "*", "del": "ends"},
    ),
}
"""``operator`` is the person at the command line: `up`, `top`, `ui`, `audit`, `pause`, `rm`."""

_STREAMS = frozenset({"tickets", "tickets:resume", "tickets:eval", "grading"})
_HELPER_KEYS: Mapping[str, frozenset[str]] = {
    "enqueue": _STREAMS,
    "dequeue": _STREAMS,
    "shift": frozenset({"ledger", "pool"}),
    "count_rollout": frozenset({"pool"}),
    "count_group": frozenset({"pool"}),
}
"""Keys whose names helpers are given as arguments."""

_ARGUMENT_KEYS: Mapping[str, frozenset[str]] = {
    "trim_stream": frozenset({"outcomes", "metrics"}),
    "backlog": frozenset({"pool", "round", "ledger"}),
}
"""Keys that a script is given by name, or keeps in a table."""
_COMMAND = re.compile(r"call\(\s*'([A-Z]+)'")
_KEY = re.compile(r"P \.\. '([a-z_:]+)'|'(tickets(?::[a-z]+)?|grading|ledger|pool|round)'")
_CALLED = re.compile(r"\b([a-z_]+)\(")
_SIMULATION_ONLY = frozenset({"sim_now"})


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A Lua function or a script's body: commands and keys it names, helpers it calls."""

    commands: frozenset[str]
    keys: frozenset[str]
    calls: frozenset[str]


def users(
    redis_major: int, passwords: Mapping[str, str] | None = None, run: str | None = None
) -> str:
    """The text of an ACL file for Redis.

    ``passwords`` by role, and ``admin`` for Redis's own administrator; who has none cannot log in.
    ``run`` bounds every role to one run. Raises ``ConfigError`` for a short password and for one
    that two roles share.
    """
    given = passwords or {}
    if len(set(given.values())) < len(given):
        raise ConfigError("two Redis users have the same password: each role needs one of its own")
    admin = f"on {_hashed('admin', given['admin'])} ~* &* +@all" if given.get("admin") else "off"
    lines = [f"user default reset {admin}"]
    for role in ROLES:
        password = given.get(role, "")
        state = f"on {_hashed(role, password)}" if password else "off"
        rules = " ".join(rules_of(role, redis_major, run))
        lines.append(f"user {USER_PREFIX}{role} reset {state} {rules}")
    return "\n".join(lines) + "\n"


def rules_of(role: str, redis_major: int, run: str | None = None) -> list[str]:
    """Key patterns, then commands, sorted; as Redis takes them."""
    access, used = ROLES[role], _of_scripts(ROLES[role])
    prefix = Keys(run).prefix if run else Keys("x").prefix.replace("{x}", "{*}")
    commands = {*_BASE, *(name.lower() for name in used.commands), *access.weights}
    read_only: set[str] = set()
    for reads in access.reads:
        commands |= set(reads)
        read_only |= {name for names in reads.values() for name in names.split()}
    written = {*used.keys, ""}  # every script is given the bare prefix as its key
    if "lock:" in written:  # nobody may touch another role's lock
        written = (written - {"lock:"}) | {f"lock:{role}"}
    for command, names in (access.writes or {}).items():
        commands.add(command)
        written |= set(names.split())
    if "*" in written:
        written, read_only = {"*"}, set()
    patterns = [f"~{prefix}{_glob(name)}" for name in sorted(written)]
    read_mark = "%R~" if redis_major >= 7 else "~"
    patterns += [f"{read_mark}{prefix}{_glob(name)}" for name in sorted(read_only - written)]
    patterns += [f"~{prefix}{name}" for name in access.weight_keys]
    return [*patterns, "-@all", *(f"+{name}" for name in sorted(commands))]


def known_key_names() -> set[str]:
    """Names of the keys of ``keys.py``; those of a kind end in a colon."""
    keys = Keys("x")
    plain = {
        value.removeprefix(keys.prefix)
        for name, value in vars(keys).items()
        if name not in ("run", "prefix")
    }
    kinds = (keys.rollout, keys.segments, keys.history, keys.group, keys.session, keys.leases)
    made = [make("") for make in (*kinds, keys.batch, keys.lock)]
    return plain | {key.removeprefix(keys.prefix) for key in made}


def script_keys() -> set[str]:
    """Names of all keys that any script touches."""
    names = [path.stem for path in SCRIPTS_DIR.glob("[a-z]*.lua")]
    return set(_of_scripts(RoleAccess(tuple(names))).keys)


def _glob(name: str) -> str:
    return name + "*" if name.endswith(":") else name


def _hashed(role: str, password: str) -> str:
    if len(password) < MIN_PASSWORD_CHARS:
        raise ConfigError(
            f"the password of {role!r} has {len(password)} characters, at least "
            f"{MIN_PASSWORD_CHARS} are needed: make one with `openssl rand -hex 32`"
        )
    return "#" + hashlib.sha256(password.encode()).hexdigest()


def _of_scripts(access: RoleAccess) -> _Chunk:
    helpers = _helpers()
    commands: set[str] = set()
    keys: set[str] = set()
    for script in access.scripts:
        keys |= _ARGUMENT_KEYS.get(script, frozenset())
        pending = [_chunk((SCRIPTS_DIR / f"{script}.lua").read_text("utf-8"))]
        seen: set[str] = set()
        while pending:
            chunk = pending.pop()
            commands |= chunk.commands
            keys |= chunk.keys
            for name in (chunk.calls & set(helpers)) - seen - access.never:
                seen.add(name)
                keys |= _HELPER_KEYS.get(name, frozenset())
                pending.append(helpers[name])
    return _Chunk(frozenset(commands), frozenset(keys - _SIMULATION_ONLY), frozenset())


@cache
def _helpers() -> dict[str, _Chunk]:
    """Functions of the shared Lua files, by name."""
    found = {}
    for name in ("_prelude", "_groups"):
        source = (SCRIPTS_DIR / f"{name}.lua").read_text("utf-8")
        for text in source.split("local function ")[1:]:
            found[text[: text.index("(")]] = _chunk(text[text.index("(") :])
    return found


def _chunk(source: str) -> _Chunk:
    code = re.sub(r"--[^\n]*", "", source)
    return _Chunk(
        frozenset(_COMMAND.findall(code)),
        frozenset(_names(_KEY.findall(code))),
        frozenset(_CALLED.findall(code)),
    )


def _names(found: Iterable[tuple[str, str]]) -> Iterable[str]:
    return (plain or quoted for plain, quoted in found)

"""The shape of the code base: which way imports run, how long files are, what loads what."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringasync
from ringasync import errors

ROOT = Path(__file__).parents[1]
PACKAGES = ("ringasync", "workers", "learner")
MAX_LINES = 400
HEAVY = ("torch", "vllm", "transformers", "workers", "learner", "deepspeed")
PICKLES = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")

ALLOWED_OF_PICKLE = {
    "learner/backends/index_reader.py": ("pickle",),  # an unpickler with a list of names
    "tests/learner/test_index_reader.py": ("pickle",),
}
"""torch writes a checkpoint's index as a pickle; nothing else may load one."""

LAYERS: dict[str, int] = {
    "errors": 0,
    "clock": 0,
    "durable": 0,
    "records": 1,
    "config": 2,
    "broker": 3,
    "scheduling": 4,
    "weights": 4,
    "tasks": 4,
    "rewards": 4,
    "observability": 4,
    "runtime": 5,
    "ui": 5,
    "coordinator": 6,
    "cli": 7,
    "__main__": 8,
}
"""A part of ringasync may import from lower numbers and from itself; equals are strangers."""

PURE = {
    "ringasync/scheduling": ("ringasync.records", "ringasync.errors", "ringasync.scheduling"),
    "learner/algorithms": ("ringasync.records", "ringasync.errors", "learner.algorithms"),
}
"""Algorithms know records and errors, no broker, no event loop."""

FORBIDDEN_IN_PURE = ("redis", "asyncio", "transformers", "vllm")


def sources(*tops: str) -> list[Path]:
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names that a file imports anywhere, with their lines."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{full}.{alias.name}", node.lineno) for alias in node.names)


def is_below(name: str, *tops: str) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def offences(path: Path, *forbidden: str) -> list[str]:
    return [
        f"{name_of(path)}:{line} imports {n}"
        for n, line in imported(path)
        if is_below(n, *forbidden)
    ]


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_inside_ringasync_run_one_way() -> None:
    wrong = []
    for path in sources("ringasync"):
        own = part_of(module_of(path))
        for name, line in imported(path):
            other = part_of(name) if is_below(name, "ringasync") else ""
            if other not in LAYERS or other == own:
                continue  # outside, the package's own constants, or a neighbour in the same part
            if not own or LAYERS[other] >= LAYERS[own]:
                wrong.append(f"{name_of(path)}:{line}: {own or 'ringasync'} imports {name}")
    assert wrong == []


def test_every_part_of_ringasync_has_a_layer() -> None:
    parts = {part_of(module_of(path)) for path in sources("ringasync") if part_of(module_of(path))}
    assert parts - set(LAYERS) == set()


def test_workers_and_learner_are_strangers() -> None:
    wrong = [o for path in sources("workers") for o in offences(path, "learner")]
    wrong += [o for path in sources("learner") for o in offences(path, "workers")]
    wrong += [o for path in sources("workers", "learner") for o in offences(path, "ringasync.cli")]
    assert wrong == []


def test_ringasync_never_names_the_packages_above_it() -> None:
    assert [o for path in sources("ringasync") for o in offences(path, "workers", "learner")] == []


@pytest.mark.parametrize("folder", PURE)
def test_algorithms_are_pure(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        wrong += offences(path, *FORBIDDEN_IN_PURE)
        for name, line in imported(path):
            if (
                is_below(name, *PACKAGES)
                and name not in PACKAGES
                and not is_below(name, *PURE[folder])
            ):
                wrong.append(f"{name_of(path)}:{line} imports {name}")
    assert wrong == []


def test_nothing_is_pickled_or_evaluated() -> None:
    everything = sources(*PACKAGES, "tests", "benchmarks")
    wrong = [
        o
        for path in everything
        for o in offences(path, *PICKLES)
        if not o.endswith(tuple(f" imports {n}" for n in ALLOWED_OF_PICKLE.get(name_of(path), ())))
    ]
    for path in everything:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
                wrong.append(f"{name_of(path)}:{called.lineno} calls {called.id}")
    assert wrong == []


UNPICKLERS = {
    "torch.load": "weights_only=True",
    "numpy.load": "allow_pickle=False",
    "np.load": "allow_pickle=False",
}
"""Loaders that unpickle what they find unless they are told not to."""

PICKLING_CALLS = (
    *("torch.save", "broadcast_object_list", "all_gather_object", "gather_object"),
    *(
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
        "yaml.load",
        "yaml.unsafe_load",
    ),
)


def pickling(source: str) -> list[str]:
    """Calls that pickle or unpickle behind another name, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {f"{one.arg}={ast.unparse(one.value)}" for one in node.keywords}
        needed = UNPICKLERS.get(called)
        if (needed is not None and needed not in arguments) or any(
            called == name or called.endswith(f".{name}") for name in PICKLING_CALLS
        ):
            found.append(f"{node.lineno} calls {called}")
    return found


def test_nothing_is_pickled_by_another_name() -> None:
    """Weights, checkpoints and journals are safetensors, JSON and msgpack."""
    wrong = [
        f"{name_of(path)}:{each}"
        for path in sources(*PACKAGES, "tests", "benchmarks")
        for each in pickling(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "dist.gather_object(x)"],
)
def test_a_call_that_pickles_would_be_noticed(source: str) -> None:
    assert pickling(source)
    assert pickling("torch.load(p, weights_only=True)") == []


def test_no_file_is_too_long() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*PACKAGES, "tests", "benchmarks")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_every_module_of_ringasync_loads_without_heavy_packages() -> None:
    """In a fresh interpreter; also that nothing starts work or fails at import."""
    modules = [module_of(path) for path in sources("ringasync") if path.name != "__main__.py"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def own_errors() -> set[type[errors.RingError]]:
    def below(cls: type[errors.RingError]) -> Iterator[type[errors.RingError]]:
        yield cls
        for each in cls.__subclasses__():
            yield from below(each)

    return set(below(errors.RingError))


def test_every_error_is_in_the_printed_tree() -> None:
    for module in pkgutil.walk_packages(ringasync.__path__, "ringasync."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    tree = inspect.getdoc(errors) or ""
    assert {each.__name__ for each in own_errors() if each.__name__ not in tree} == set()
    strays = {each.__name__ for each in own_errors() if each.__module__ != errors.__name__}
    assert strays == set(), "errors belong into ringasync/errors.py"


def test_printed_tree_names_only_errors_that_exist_with_their_exit_codes() -> None:
    tree = inspect.getdoc(errors) or ""
    known = {each.__name__: each.exit_code for each in own_errors()}
    for line in tree.splitlines():
        words = line.replace("│", " ").replace("├──", " ").replace("└──", " ").split()
        if words and words[0].endswith("Error") and " exit " in line:
            assert known[words[0]] == int(line.split("exit")[-1]), line
    named = {word for word in tree.split() if word.endswith("Error")}
    assert named == set(known)


def test_no_default_argument_binds_a_clock() -> None:
    """It would be the machine's in a simulation too: see ``ringasync.clock``."""
    found = []
    for path in sources("ringasync", "workers", "learner"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = [*node.args.defaults, *node.args.kw_defaults]
            found += [
                f"{name_of(path)}:{one.lineno} {ast.unparse(one)}"
                for one in given
                if isinstance(one, ast.Attribute) and ast.unparse(one).startswith("time.")
            ]
    assert found == []


def test_nothing_waits_by_wait_for() -> None:
    """Python 3.11's loses cancellations (``ringasync.broker.cancelling``): ``asyncio.timeout``."""
    found = [
        f"{name_of(path)}:{number}"
        for path in sources("ringasync", "workers", "learner")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "asyncio.wait_for(" in line
    ]
    assert found == []

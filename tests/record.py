"""`--record=FILE`: which formats, layouts, ops and frameworks the tests that passed have met, as JSON.

Nobody writes it down: the functions that carry out an op, or compile a kernel, are watched, and asked what the contract
said of the call. `docs/support.md` is made of what GPUs, compilers and CPUs have recorded, by `tests/support.py`.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from kvcore.contract.blocks import Blocks
from kvcore.contract.cache import Cache
from kvcore.contract.read import Attention, Gather
from kvcore.contract.relayout import Relayout
from kvcore.contract.rope import Rope
from kvcore.contract.swap import Swap
from kvcore.contract.write import Write
from kvcore.formats import FLOATS, KV_CACHE_DTYPES
from kvcore.layout import CacheLayout
from kvcore.pattern import CONSTANTS, VLLM
from kvcore.plan.kernel import KernelPlan

ROOT = Path(__file__).parents[1]

# What carries out an op. `call` or `described` is what the contract said; with a kernel, `target` is what it is for.
OPS = (
    *("jaxkv._triton.write:launch_write", "jaxkv._triton.read:launch_read", "jaxkv._triton.rope:launch_rope"),
    *("jaxkv._triton.relayout:launch_relayout", "jaxkv._triton.blocks:launch_blocks", "jaxkv._triton.swap:launch_swap"),
    *("jaxkv._xla.write:write", "jaxkv._xla.read:attention", "jaxkv._xla.gather:gather"),
    *("jaxkv._xla.rope:rope_and_cache", "jaxkv._xla.relayout:relayout", "jaxkv._xla.requantise:requantise"),
    *("jaxkv._xla.blocks:move_blocks", "jaxkv._xla.swap:swap_blocks"),
    *("torchkv._triton.write:Writes.prepare", "torchkv._triton.attention:Attentions.prepare"),
    *("torchkv._triton.gather:Gathers.prepare", "torchkv._triton.rope:Ropes.prepare"),
    *("torchkv._triton.relayout:Relayouts.prepare", "torchkv._triton.blocks:Moves.prepare"),
    *("torchkv._triton.swap:Swaps.prepare", "torchkv._torch.write:write", "torchkv._torch.read:attention"),
    *("torchkv._torch.read:gather", "torchkv._torch.rope:rope_and_cache", "torchkv._torch.relayout:relayout"),
    *("torchkv._torch.blocks:move_blocks", "torchkv._torch.swap:swap_blocks"),
)  # fmt: skip
# What makes a kernel's plan, with the call as its first argument, and what compiles the kernels of plans.
PLANS = tuple(
    f"kvcore.plan.{op}:plan_{op}"
    for op in ("write", "attention", "gather", "rope", "relayout", "requantise", "blocks", "swap")
)
COMPILER = "kvcore.run.compiler:compile_kernel"

Found = tuple[str, str, str, str, str]
"""Target, framework, op, layout, format."""
COLUMNS = ("target", "framework", "op", "layout")


# ---- what a call is about


def layout_name(layout: CacheLayout) -> str:
    """The name of a layout, with or without layers in front; a pattern without a name as it is."""
    names = {pattern: name for name, pattern in (VLLM | CONSTANTS).items()}
    without = ", ".join(part.removeprefix("layer ") for part in layout.pattern.split(", "))
    return names.get(layout.pattern) or names.get(without) or layout.pattern


def format_name(cache: Cache) -> str:
    """The name by which users ask for a format; with "token_head" where each token's head has a scale of its own."""
    if cache.format.name in FLOATS:
        return cache.format.name
    names = {stored: name for name, stored in KV_CACHE_DTYPES.items()}
    own = cache.scales is not None and not cache.scales.inside
    return names[cache.format] + (" token_head" if own else "")


def about(call: Any) -> Iterator[tuple[str, str, str]]:
    """Ops, layouts and formats of what the contract said of a call. Ops that move whole blocks know no format."""
    match call:
        case Write() | Attention() | Gather():
            op = {Write: "write", Attention: "attention", Gather: "gather"}[type(call)]
            yield op, layout_name(call.cache.layout), format_name(call.cache)
        case Rope():
            yield "rope", layout_name(call.write.cache.layout), format_name(call.write.cache)
        case Relayout():
            for cache in (call.source, call.destination):
                yield "relayout", layout_name(cache.layout), format_name(cache)
        case Blocks():
            yield "blocks", layout_name(call.layout), "any"
        case Swap():
            yield "swap", layout_name(call.layout), "any"


# ---- watching


def code_of(name: str) -> CodeType | None:
    """The code of MODULE:FUNCTION or MODULE:CLASS.METHOD; None where something that it needs is not installed."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("kvcore", "jaxkv.", "torchkv.")):
            raise
        return None
    for part in path.split("."):
        found = getattr(found, part)
    return getattr(found, "__wrapped__", found).__code__


def plans_in(plan: Any) -> Iterator[KernelPlan]:
    """The kernels of a plan."""
    return (part for part in plan if isinstance(part, KernelPlan))


class Watch:
    """Remembers what calls of the watched functions were about."""

    tool = 3  # one that sys.monitoring has no use for

    def __init__(self) -> None:
        self.found: set[Found] = set()
        self.ops: dict[CodeType, str] = {}
        self._plans: dict[int, tuple[KernelPlan, Any]] = {}  # by the kernel's id; it stays, so that the id does
        self._codes: dict[CodeType, str] = {}

    def start(self) -> None:
        """Watches what is installed."""
        events, monitoring = sys.monitoring.events, sys.monitoring
        monitoring.use_tool_id(self.tool, "tests.record")
        monitoring.register_callback(self.tool, events.PY_START, self._started)
        monitoring.register_callback(self.tool, events.PY_RETURN, self._returned)
        for name in (*OPS, *PLANS, COMPILER):
            if (code := code_of(name)) is not None:
                self._codes[code] = name
                event = events.PY_START if name in OPS else events.PY_RETURN
                monitoring.set_local_events(self.tool, code, event)

    def stop(self) -> None:
        """Watches no more."""
        sys.monitoring.free_tool_id(self.tool)

    def _started(self, code: CodeType, _: int) -> None:
        arguments = sys._getframe(1).f_locals
        call = arguments["described"] if "described" in arguments else arguments["call"]
        target = arguments.get("target")
        where = "portable" if target is None else target.backend if target.backend == "interpret" else _say(target)
        self._add(where, self._codes[code].partition("kv.")[0], call)

    def _returned(self, code: CodeType, _: int, result: Any) -> None:
        arguments = sys._getframe(1).f_locals
        if self._codes[code] == COMPILER:
            kernel, target = arguments["kernel"], arguments["target"]
            if id(kernel) in self._plans:
                self._add(_say(target), "kernel", self._plans[id(kernel)][1])
            return
        call = arguments["write"] if "write" in arguments else arguments["call"]
        self._plans.update((id(kernel), (kernel, call)) for kernel in plans_in(result))

    def _add(self, where: str, framework: str, call: Any) -> None:
        self.found.update((where, framework, *what) for what in about(call))


def _say(target: Any) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


# ---- recording


class Recorder:
    """The plugin. With several processes, the tests' reports bring what each has found to the one that writes it."""

    def __init__(self, path: str, writes: bool, has_gpu: bool) -> None:
        self._path, self._writes, self._has_gpu = path, writes, has_gpu
        self._watch = Watch()
        self._met: set[Found] = set()
        self._environment: dict[str, Any] = {}
        self._outcomes = {"passed": 0, "skipped": 0, "failed": 0}

    def pytest_sessionstart(self) -> None:
        """Says of what the tests are."""
        from benchmarks.report import environment

        if self._writes:
            self._environment = environment()

    def pytest_runtest_setup(self, item: Any) -> None:
        """Begins with nothing found."""
        if not self._watch._codes:
            self._watch.start()
        self._watch.found.clear()

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Gives the test's report what it has met, as far as it says something."""
        if call.when != "call":
            return
        # Without a GPU, JAX's programs for one are compiled in these tests only; elsewhere something stands in for it.
        # Nothing runs where a test precompiles.
        compiles = "compiled" in item.path.parts
        launches = ("portable", "interpret") if not self._has_gpu and not compiles else None
        if item.path.name == "test_precompile.py":
            launches = ()
        met = [
            found
            for found in sorted(self._watch.found)
            if found[1] == "kernel" or launches is None or found[0] in launches
        ]
        item.user_properties.append(("met", met))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Counts, and keeps what passed."""
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome] += 1
        if report.when == "call" and report.passed:
            for name, met in report.user_properties:
                if name == "met":
                    self._met.update(map(tuple, met))

    def pytest_sessionfinish(self, session: Any) -> None:
        """Writes the file."""
        if not self._writes:
            return
        record = self._environment | {"benchmark": "tests", "command": _command(session.config)} | self._outcomes
        Path(self._path).write_text(dumps(record, self._met))

    def pytest_unconfigure(self) -> None:
        """Lets go of the watched functions."""
        if self._watch._codes:
            self._watch.stop()


def _command(config: Any) -> str:
    """The command that recorded, without what a reader has no use for: the file, and folders of this machine."""
    words = [str(word).replace(f"{ROOT}/", "") for word in config.invocation_params.args]
    return " ".join(["pytest", *(word for word in words if not word.startswith(("--record", "-p", "--rootdir", "/")))])


def dumps(record: dict[str, Any], met: set[Found]) -> str:
    """A record as JSON, like the benchmarks': a row, on a line, has the formats that an op has met in a layout."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for *what, stored in sorted(met):
        rows.setdefault(tuple(what), []).append(stored)
    lines = [json.dumps({**dict(zip(COLUMNS, what, strict=True)), "formats": rows[what]}) for what in rows]
    head = json.dumps(record | {"rows": []}, indent=1).removesuffix("[]\n}")
    return f"{head}[\n  " + ",\n  ".join(lines) + "\n ]\n}\n"


def loads(text: str) -> tuple[dict[str, Any], set[Found]]:
    """What `dumps` has written."""
    record = json.loads(text)
    rows = record.pop("rows")
    return record, {(*(row[name] for name in COLUMNS), stored) for row in rows for stored in row["formats"]}

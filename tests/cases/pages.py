"""The code of README and of the site's pages, read and run as `CONTRIBUTING.md` says under "The site"."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import textwrap
import traceback
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@dataclasses.dataclass
class Block:
    """Code of a page that runs: from a block that readers see, or from a comment that they do not see."""

    kind: str  # python, diff or run
    line: int  # of the page, where the code begins
    code: str
    reason: str | None = None  # why it does not run
    output: str | None = None  # what it must print
    output_line: int | None = None


def page_names():
    """README and all pages below docs/, as paths from the project's folder."""
    return ["README.md", *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md"))]


OPENING = re.compile(r"( *)(`{3,})\s*([\w+-]*)(.*)")
REASON = re.compile(r"<!-- not run:(.*)-->")
MISSPELT = {"py", "python3", "pycon", "Python"}


def after_change(line):
    """A diff's line as it reads after the change. What was removed is an empty line, so that numbers stay."""
    return "" if line.startswith(("-", "@@", "+++ ")) else line[1:]


def read_blocks(text, page="page"):
    """The blocks of a page that are code, in order."""
    lines = text.splitlines()
    blocks, reason, previous = [], None, None  # previous: a block that only blank lines have come after
    number = 0  # of the line that is read, from 1

    def fail(message, at):
        raise ValueError(f"{page}:{at}: {message}")

    def body(ends, what):
        nonlocal number
        start, found = number, []
        while number < len(lines):
            number += 1
            if ends(lines[number - 1]):
                return start + 1, found
            found.append(lines[number - 1])
        return fail(f"{what} has no end", start)

    while number < len(lines):
        number += 1
        line = lines[number - 1]
        stripped = line.strip()
        opening = OPENING.fullmatch(line)
        if reason is not None and not opening:
            fail("`not run` must be directly above a block", number - 1)
        if opening:
            indent, fence, language, _ = opening.groups()
            if language in MISSPELT:
                fail(f"a block of Python is fenced as `python`, got {language!r}", number)
            begin, found = body(
                lambda line, fence=fence: re.fullmatch(rf" *{fence}`*\s*", line) is not None, "the fence"
            )
            found = [line.removeprefix(indent) for line in found]
            if language == "text" and previous is not None:
                previous.output, previous.output_line = "".join(f"{line}\n" for line in found), begin
            block = None
            if language in ("python", "diff"):
                if language == "diff":
                    for at, line in enumerate(found, begin):
                        if line[:1] not in ("", " ", "+", "-", "@"):
                            fail(f"a line of a diff begins with +, - or a space, got {line!r}", at)
                    found = map(after_change, found)
                block = Block(language, begin, textwrap.dedent("\n".join(found)), reason)
                blocks.append(block)
            reason, previous = None, block
        elif stripped == "<!-- run":
            begin, found = body(lambda line: line.strip() == "-->", "the comment with code")
            blocks.append(Block("run", begin, textwrap.dedent("\n".join(found))))
            previous = None
        elif given := REASON.fullmatch(stripped):
            reason, previous = given[1].strip(), None
            if not reason:
                fail("`not run` must give a reason", number)
        elif stripped.startswith(("<!-- run", "<!-- not run", "<!--run")):
            fail("must be `<!-- run`, alone on its line, or `<!-- not run: REASON -->`", number)
        elif stripped:
            previous = None
    if reason is not None:
        fail("`not run` must be directly above a block", number)
    return blocks


def python_blocks(text):
    """The code that readers see as Python, of a page or of a part of it."""
    return [block.code for block in read_blocks(text) if block.kind == "python"]


class PageError(Exception):
    """What is wrong with a page, and in which of its lines."""


def line_of(error, path):
    """The last line of a file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    return [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path][-1]


def run_blocks(blocks, page):
    """Runs a page's blocks one after the other in one module, and compares what they print."""
    path = str(ROOT / page)  # code is compiled as of this file and its lines, so that tracebacks show them
    module = sys.modules["page"] = types.ModuleType("page")  # where dataclasses and pickle look for what is in it
    for block in blocks:
        if block.reason is not None:
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * (block.line - 1) + block.code, path, "exec"), module.__dict__)
        except Exception as error:
            raise PageError(f"{page}:{line_of(error, path)}: {type(error).__name__}: {error}") from error
        if block.output is not None and printed.getvalue() != block.output:
            shown, got = (
                textwrap.indent(text, "    ") or "    nothing\n" for text in (block.output, printed.getvalue())
            )
            raise PageError(f"{page}:{block.output_line}: the page shows\n{shown}where its code prints\n{got}")


def fakes(modules):
    """Names of modules that are of no file: a page put them there, in place of packages that need not be installed."""
    return [name for name in modules if getattr(sys.modules.get(name.partition(".")[0]), "__spec__", None) is None]


@contextlib.contextmanager
def state_kept():
    """Leaves the process as it was: modules, the environment, and what frameworks keep for all that comes later."""
    import jax
    import numpy as np
    import torch

    modules, environment, filters = dict(sys.modules), dict(os.environ), warnings.filters[:]
    config, dtype, printing = (
        dict(jax.config.values),
        torch.get_default_dtype(),
        dict(vars(torch._tensor_str.PRINT_OPTS)),
    )
    numbers = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for name in fakes(set(sys.modules) - set(modules)):
            del sys.modules[name]
        sys.modules.update(modules)
        os.environ.clear()
        os.environ.update(environment)
        warnings.filters[:] = filters
        for name, value in config.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)
        torch.set_default_dtype(dtype)
        vars(torch._tensor_str.PRINT_OPTS).update(printing)
        np.random.set_state(numbers)


# What tests/conftest.py has other tests do without, and readers have.
READERS_CONFIG = {"jax_numpy_rank_promotion": "allow", "jax_numpy_dtype_promotion": "standard"}


def run_page(text, page):
    """Runs a page's code as a reader would, and leaves nothing of it."""
    import jax

    blocks = read_blocks(text, page)
    with state_kept():
        for name, value in READERS_CONFIG.items():
            jax.config.update(name, value)
        # A thread of its own: meshes, default devices and modes of gradients are set for a thread.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(run_blocks, blocks, page).result()

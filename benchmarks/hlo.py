"""The kernels of a compiled JAX program, by name, out of its text (`compiled.as_text()`)."""

import re
import zlib
from collections import Counter

NO_KERNELS = {
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
"""Operations that only name what others made, or hold operations of their own."""

Instruction = tuple[str, str, str]
"""Name, operation, and the rest of the line."""


def kernels(text: str, loops: int = 0) -> list[str]:
    """What a program launches, in the order of its schedule: names of fusions, of custom calls and of other operations.

    Fusions have the names that XLA gave them, without numbers; a Triton kernel has its own. What belongs to a loop or
    to a branch within is in brackets behind it.

    Args:
        text: The program after all optimisations.
        loops: How many loops to enter first: 0 for the program itself, 2 for the body of a loop in a loop. Loops that
            XLA has unrolled, as it does with short ones on a CPU, are not missed.

    Raises:
        ValueError: text is no program's, or there are two loops that could be entered.
    """
    computations = _computations(text)
    entry = re.search(r"^ENTRY %([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("text must be a program's, with an entry computation")
    name = entry[1]
    for _ in range(loops):
        bodies = [rest for _, op, rest in computations[name] if op == "while"]
        if len(bodies) > 1:
            raise ValueError(f"computation {name} must have at most one loop, got {len(bodies)}")
        if not bodies:
            break
        name = _called(bodies[0], "body")[0]
    return _launched(computations, name)


def counted(names: list[str]) -> str:
    """Names with how often each occurs, as people read them."""
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in Counter(names).items())


def _computations(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each computation, by its name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            current = found[head[1]] = []
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            current.append((match[1], match[2], match[3]))
    return found


def _launched(computations: dict[str, list[Instruction]], computation: str) -> list[str]:
    names = []
    for name, op, rest in computations[computation]:
        if op in ("call", "conditional", "while"):
            inner = [
                each
                for called in _called(rest, "to_apply|body|branch_computations|true_computation|false_computation")
                for each in _launched(computations, called)
            ]
            names += inner if op == "call" else [f"{op} [{counted(inner)}]"]
        elif op not in NO_KERNELS and not op.endswith("-done"):
            held = _called(rest, "calls") if op == "fusion" else []
            calls = [each for called in held for each in computations[called] if each[1] == "custom-call"]
            # A custom call that is told where in an array its operands lie is all that such a fusion launches.
            names += [_name(*each) for each in calls] or [_name(name, op, rest)]
    return names


def _name(name: str, op: str, rest: str) -> str:
    if op != "custom-call":
        base = re.sub(r"(\.\d+|\.clone)+$", "", name)
        return base if op == "fusion" or base.startswith(op) else f"{base} ({op})"
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    if target is None:
        raise ValueError(f"custom call {name} must have a target, got {rest[:200]}")
    return _triton_name(rest) if target[1].startswith("triton_kernel_call") else target[1]


def _triton_name(rest: str) -> str:
    """The name of jax_triton's kernel: it is in the call's compressed configuration."""
    opaque = re.search(r'backend_config=\{opaque = "(.*?)"', rest)
    if opaque is None:
        raise ValueError(f"a Triton call must have a configuration, got {rest[:200]}")
    packed = re.sub(rb"\\(\\|[0-9A-F]{2})", _unescaped, opaque[1].encode("latin-1"))
    found = re.search(rb"[A-Za-z_]\w*_kernel", zlib.decompress(packed))
    if found is None:
        raise ValueError("a Triton call's configuration must name its kernel")
    return found[0].decode()


def _unescaped(match: re.Match[bytes]) -> bytes:
    return b"\\" if match[1] == b"\\" else bytes([int(match[1], 16)])


def _called(rest: str, attributes: str) -> list[str]:
    """Names of the computations that an instruction holds."""
    found = re.findall(rf"\b(?:{attributes})=(\{{[^}}]*\}}|%[\w.\-]+)", rest)
    return [name for each in found for name in re.findall(r"%([\w.\-]+)", each)]

"""What every result carries along: device, versions, commit. And how it is written."""

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

PACKAGES = ("jaxkv", "jax", "jaxlib", "jax-triton", "torch", "triton", "numpy", "transformers")


def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    return {
        "date": date.today().isoformat(),
        "device": _device(),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in PACKAGES if _version(p)},
        "commit": _commit(),
    }


def save(path: str | None, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Writes environment and rows as JSON, unless path is None."""
    if path is not None:
        text = json.dumps({**environment(), **extra, "rows": rows}, indent=1)
        Path(path).write_text(text + "\n")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns` maps keys to formats such as "8.3f"."""
    lines = [list(columns)]
    for row in rows:
        lines.append(["–" if row.get(k) is None else f"{row[k]:{f}}".strip() for k, f in columns.items()])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    numeric = [f[-1:] in "fde" for f in columns.values()]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True))
        for line in lines
    )


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{cpu[0].partition(':')[2].strip()} × {len(cpu)}" if cpu else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with a mark where the working tree differs. GIT_COMMIT has the last word: copies have no history."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")

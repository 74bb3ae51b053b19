"""`python -m benchmarks write|generate [options]`."""

import importlib
import sys

NAMES = {
    "write": "writes against a plain copy of the same bytes",
    "generate": "SmolLM2's decode loop on this host",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        listing = "\n".join(f"  {name:10} {about}" for name, about in NAMES.items())
        sys.exit(f"usage: python -m benchmarks NAME [--help]\n{listing}")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


main()

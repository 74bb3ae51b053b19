"""`python -m benchmarks NAME [options]`."""

import importlib
import sys

NAMES = {
    "write": "writes against a plain copy of the same bytes",
    "gather": "gathers out of the cache against a plain copy of the same bytes",
    "slots": "slots of new tokens, beside what torch and XLA make of the same",
    "blocks": "copies and zeros of whole blocks against a plain copy of the same bytes",
    "relayout": "a cache moved into another one against a plain copy of the same bytes",
    "swap": "whole blocks to pinned memory and back against a plain copy of the same bytes",
    "attention": "attention over the cache against its limit, beside other implementations",
    "prefill": "attention of many query rows beside other implementations and the kernel for every GPU, in turns",
    "mla": "decode over the rows of MLA against its limits, beside other implementations, in turns",
    "loop": "what a layer of a decode loop costs, with the way into the cache written in several ways",
    "decode": "a model of Llama 3 8B's shape, decoding in JAX, against its limit",
    "batching": "continuous batching beside one request at a time, and what its scheduler costs",
    "pool": "what handing out blocks costs on the host",
    "plot": "pictures of results, for the docs",
    "accuracy": "SmolLM2's perplexity and greedy text over each format of the cache",
    "generate": "SmolLM2's decode loop on this host",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        listing = "\n".join(f"  {name:10} {about}" for name, about in NAMES.items())
        sys.exit(f"usage: python -m benchmarks NAME [--help]\n{listing}")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


main()

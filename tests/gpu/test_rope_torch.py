"""On a GPU, torch's half of `rope_and_cache`: calls that are known again, tensors for the result, compilers, errors."""

from dataclasses import replace

import pytest

from tests.cases.arrays import to_torch
from tests.cases.gpu import DEVICE, HAS_GPU, needs_gpu
from tests.cases.rope import run_oracle
from tests.cases.torch_ropes import BY_NAME, assert_same

pytestmark = pytest.mark.gpu


def on_device(array):
    return to_torch(array.copy(), DEVICE)


def call_torch(call, **options):
    """The new query, and the caches as they are then."""
    import torchkv

    caches = list(map(on_device, call.caches))
    return [call(torchkv.rope_and_cache, on_device, caches, **options), *caches]


@pytest.mark.gpu_smoke
@pytest.mark.parametrize("name", ["norms", "mrope", "int8 by token and head", "MLA, fp8_e4m3"])
def test_calls_with_other_tensors_and_numbers_of_tokens(name):
    many = 1100 if HAS_GPU else 20
    for seed, tokens in enumerate((7, 5, many, 7, many, 1, 0)):
        slots = tuple(range(40)) if tokens > 40 else tuple(range(3, 3 + tokens))
        call = replace(BY_NAME[name], num_tokens=tokens, slots=slots, positions=None).make(seed)
        assert_same(call_torch(call), run_oracle(call))


@pytest.mark.parametrize("name", ["norms", "gptj, head_size 80, 24 of it", "MLA"])
def test_results_in_given_tensors(name):
    import torch

    call = BY_NAME[name].make()
    want, (tokens, heads, size) = run_oracle(call), call.query.shape
    for shape, view in (
        ((tokens, heads, size), lambda room: room),
        ((heads, tokens, size), lambda room: room.transpose(0, 1)),
        ((tokens, heads, size + 1), lambda room: room[..., 1:]),  # which begins at no multiple of 16 bytes
        ((tokens, heads, 2 * size), lambda room: room[..., ::2]),
    ):
        room = torch.full(shape, 7.0, dtype=torch.bfloat16, device=DEVICE)
        assert_same(call_torch(call, out=view(room)), want)
        other = torch.full_like(room, 7.0)
        view(other).copy_(to_torch(want[0]))
        assert torch.equal(room, other)


def test_parts_of_a_projection_rotated_where_they_are():
    import torch

    import torchkv

    call = BY_NAME["norms"].make()
    want = run_oracle(call)
    for _ in range(2):  # the second call is known
        qkv = torch.cat([on_device(x).flatten(1) for x in (call.query, call.key, call.value)], 1)
        before, caches = qkv.clone(), list(map(on_device, call.caches))
        query, key, value = (x.unflatten(1, (-1, 16)) for x in qkv.split([128, 32, 32], 1))

        def run(_query, _key, _value, *rest, rows=(query, key, value), **options):
            return torchkv.rope_and_cache(*rows, *rest, out=rows[0], **options)

        assert call(run, on_device, caches) is query
        assert_same([query, *caches], want)
        assert torch.equal(qkv[:, 128:].view(torch.int16), before[:, 128:].view(torch.int16))


def test_weights_that_are_parameters():
    import torch

    call = BY_NAME["norms"].make()
    want = run_oracle(call)

    def convert(array):
        tensor = on_device(array)
        return torch.nn.Parameter(tensor) if array is call.options["q_norm"] else tensor

    import torchkv

    for _ in range(2):
        caches = list(map(on_device, call.caches))
        with torch.no_grad():
            assert_same([call(torchkv.rope_and_cache, convert, caches), *caches], want)
    with pytest.raises(NotImplementedError, match=r"^torchkv.rope_and_cache is not differentiable"):
        call(torchkv.rope_and_cache, convert, caches)


def test_errors_come_before_the_launch_and_after_a_hit():
    import torch

    import torchkv

    call = BY_NAME["norms"].make()
    caches = list(map(on_device, call.caches))
    room = torch.zeros(9, 8, 16, dtype=torch.bfloat16, device=DEVICE)
    query, out = room[:7], torch.zeros_like(room[:7])
    out = call(lambda _, *rest, **options: torchkv.rope_and_cache(query, *rest, out=out, **options), on_device, caches)
    before = [x.clone().view(torch.int16) for x in (room, *caches)]
    for bad, text in (
        (room[1:8], "out and query must not overlap in memory"),
        (caches[0].view(-1)[:896].view(7, 8, 16), "out and key_cache must not overlap in memory"),
        (out[:6], "out must have shape (7, 8, 16), got (6, 8, 16)"),
        (out[:1].expand(7, -1, -1), "out must not overlap itself in memory, got strides (0, 16, 1)"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call(
                lambda _, *rest, bad=bad, **options: torchkv.rope_and_cache(query, *rest, out=bad, **options),
                on_device, caches,
            )  # fmt: skip
        assert str(caught.value) == text
    for now, then in zip((room, *caches), before, strict=True):
        assert torch.equal(now.view(torch.int16), then)


def test_torch_compile_has_no_clone():
    import torch

    import torchkv

    call = BY_NAME["norms"].make()
    caches = list(map(on_device, call.caches))
    want = run_oracle(call)
    needs_gpu()
    from torch._inductor.utils import run_and_get_code

    step = torch.compile(torchkv.rope_and_cache, fullgraph=True)
    out, (code,) = run_and_get_code(lambda: call(step, on_device, caches))
    assert code.count("torchkv.rope_and_cache") >= 1
    assert "clone" not in code
    assert_same([out, *caches], want)

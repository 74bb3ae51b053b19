"""The oracle of `rope_and_cache`, which judges both frameworks: held to formulas and to promises of its own."""

from dataclasses import replace

import numpy as np
import pytest

from kvcore.layout import CacheLayout
from kvcore.oracle import rope as oracle
from kvcore.oracle import write as writers
from kvcore.oracle.views import logical_view
from tests.cases.arrays import DTYPES, bits, random_bits, random_normal
from tests.cases.rope import CASES, MAX_POSITION, OUTSIDE, RopeCase, run_oracle, table

PLAIN = [case for case in CASES if case.inputs == "normal" and case.num_tokens]
EPSILON = {"float32": 2.0**-21, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of a result of this dtype, relative to the head's largest: a rounding, and what float32 loses before it."""

NAN_BITS = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}


def ids(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def same(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(bits(got), bits(want))


def rotated(x, positions, cos_sin, **options):
    """Heads `[num_tokens, num_heads, head_size]` as the op rotates a query; the caches are of no interest."""
    cache = np.zeros((1, 1, 1, x.shape[2]), np.float32)
    rows = np.zeros((len(x), 1, x.shape[2]), x.dtype)
    no_slots = np.zeros(0, np.int64)
    return oracle.rope_and_cache(
        x, rows, rows, (cache, cache.copy()), np.asarray(positions), cos_sin, no_slots, **options
    )


def exactly(x, call, weights):
    """The norm and the rotation in float64, a pair as a complex number that is multiplied by one of magnitude 1."""
    options, x = call.options, x.astype(np.float64)
    if weights is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + options["eps"]) * weights.astype(np.float64)
    half = call.cos_sin.shape[1] // 2
    turns = call.cos_sin[:, :half].astype(np.float64) + 1j * call.cos_sin[:, half:].astype(np.float64)
    rows = np.broadcast_to(call.positions, (3, len(x)))
    inside = ((rows >= 0) & (rows < len(turns))).all(0)
    section = np.repeat([0, 1, 2], options["mrope_section"] or (half, 0, 0))
    turn = turns[np.where(inside, rows, 0)[section], np.arange(half)[:, None]].T[:, None]  # [token, 1, pair]
    pairs = x[..., : 2 * half]
    if options["rope"] == "gptj":
        pairs = (pairs[..., ::2] + 1j * pairs[..., 1::2]) * turn
        pairs = np.stack([pairs.real, pairs.imag], -1).reshape(*x.shape[:2], -1)
    else:
        pairs = (pairs[..., :half] + 1j * pairs[..., half:]) * turn
        pairs = np.concatenate([pairs.real, pairs.imag], -1)
    return np.where(inside[:, None, None], np.concatenate([pairs, x[..., 2 * half :]], -1), 0)


@ids(PLAIN)
def test_query_is_that_of_a_formula_in_float64(case):
    call = case.make()
    got, want = run_oracle(call)[0].astype(np.float64), exactly(call.query, call, call.options["q_norm"])
    error = np.abs(got - want).max(-1) / np.maximum(np.abs(want).max(-1), 1e-30)
    assert error.max() < EPSILON[case.dtype]
    assert np.abs(got).max() > 0.5


@ids([case for case in PLAIN if case.kv_cache_dtype == "auto" and case.slots != ()])
def test_cached_rows_are_those_of_the_formula(case):
    call = case.make()
    key, value = call.key, call.value
    if case.latent:
        key, value = key[:, None], exactly(value[:, None], call, None)
    else:
        key = exactly(key, call, call.options["k_norm"])
    layout = call.options["layout"] or CacheLayout.of(case.default)
    arrays = zip(run_oracle(call)[1:], layout.arrays, strict=True)
    found = [each for array, axes in arrays for each in logical_view(array, axes)]
    if len(found) == 1:  # key and value side by side
        found = np.split(found[0], [key.shape[2]], axis=-2)
    written = [(token, slot) for token, slot in enumerate(call.slot_mapping) if 0 <= slot < 40]
    assert written
    for cache, rows in zip(found, (key, value), strict=True):
        for token, slot in written:
            got = cache[case.layer or 0, slot // 8, slot % 8].reshape(rows[token].shape)
            if rows.dtype != np.float64:  # not computed
                same(got, rows[token])
            else:
                error = np.abs(got.astype(np.float64) - rows[token])
                assert error.max() <= EPSILON[case.cache_dtype or case.dtype] * np.abs(rows[token]).max()


@ids(CASES)
def test_caches_are_as_the_writers_write_what_is_rotated(case):
    """A writer is given the key that a float32 query of the same numbers becomes; value goes in from its own dtype."""
    call, options = case.make(), case.make().options
    key, value = call.key, call.value
    turn = {name: options[name] for name in ("rope", "rotary_dim", "mrope_section", "eps")}
    if case.latent:
        value = rotated(value.astype(np.float32)[:, None], call.positions, call.cos_sin, **turn)[:, 0]
        if options["k_norm"] is not None:
            key = oracle.canonical(oracle.normed(key, options["k_norm"], options["eps"]))
    else:
        key = rotated(key.astype(np.float32), call.positions, call.cos_sin, q_norm=options["k_norm"], **turn)
    want, slots, name = [c.copy() for c in call.caches], call.slot_mapping, case.kv_cache_dtype
    layout = options["layout"] or CacheLayout.of(case.default)
    scales, place = (options["k_scale"], options["v_scale"]), {"layout": layout, "layer": case.layer}
    if case.latent:
        cache = want[0].swapaxes(0, 1) if case.layout == "slot block latent" else want[0]
        writers.concat_and_cache_mla(key, value, cache, slots, name, scales[0], layer=case.layer)
    elif case.per_token_head:
        op = "reshape_and_cache_flash_diffkv" if layout.single_array else "reshape_and_cache_flash"
        op = getattr(writers, f"{op}_per_token_head_quant")
        op(key, value, *want, slots, name, scale_layout=case.scale_layout, **place)
    else:
        op = writers.reshape_and_cache_flash_diffkv if layout.single_array else writers.reshape_and_cache_flash
        op(key, value, *want, slots, name, *scales, **place)
    for got, cache in zip(run_oracle(call)[1:], want, strict=True):
        same(got, cache)


# ---- rotations


@pytest.mark.parametrize("rope", ["neox", "gptj"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_position_0_is_a_copy(rope, dtype):
    x = random_normal(np.random.default_rng(3), (5, 3, 40), dtype)
    same(rotated(x, np.zeros(5, np.int32), table(40), rope=rope), x)
    assert (bits(rotated(x, np.ones(5, np.int32), table(40), rope=rope)) != bits(x)).mean() > 0.3


@pytest.mark.parametrize("rope", ["neox", "gptj"])
def test_scores_depend_on_differences_of_positions_only(rope):
    a, b = random_normal(np.random.default_rng(4), (2, 1, 64), "float32")
    turned = [rotated(np.stack([x] * MAX_POSITION), range(MAX_POSITION), table(64), rope=rope) for x in (a, b)]
    scores = turned[0][:, 0].astype(np.float64) @ turned[1][:, 0].astype(np.float64).T
    for difference in range(-9, 10):
        of_one_difference = np.diagonal(scores, difference)
        assert np.ptp(of_one_difference) < 2e-5
    assert np.ptp(scores) > 1


@pytest.mark.parametrize(("head_size", "rotary_dim"), [(6, 6), (64, 64), (80, 24)])
def test_gptj_is_neox_of_reordered_elements(head_size, rotary_dim):
    x = random_bits(np.random.default_rng(5), (MAX_POSITION, 3, head_size), "float32")
    half = rotary_dim // 2
    order = np.arange(head_size)  # where neox has what gptj has at 0, 1, 2, …
    order[:rotary_dim] = np.arange(rotary_dim).reshape(2, half).T.reshape(-1)
    options = {"rotary_dim": rotary_dim}
    neox = rotated(x, range(MAX_POSITION), table(rotary_dim), **options)
    gptj = rotated(x[..., order], range(MAX_POSITION), table(rotary_dim), rope="gptj", **options)
    same(gptj, neox[..., order])
    same(neox[..., rotary_dim:], oracle.canonical(x[..., rotary_dim:]))


def test_products_are_rounded_before_they_are_subtracted():
    """Of `a * c - b * s`, a fused multiply-add would leave what rounding the product loses, 2^-24."""
    x = np.array([[[1 + 2.0**-12, 1 + 2.0**-11]]], np.float32)
    cos_sin = np.array([[1 + 2.0**-12, 1.0]], np.float32)
    assert rotated(x, [0], cos_sin)[0, 0, 0] == 0
    x = np.array([[[1 + 2.0**-11, 1 + 2.0**-12]]], np.float32)
    cos_sin = np.array([[1 + 2.0**-12, -1.0]], np.float32)
    assert rotated(x, [0], cos_sin)[0, 0, 1] == 0


@pytest.mark.parametrize("rope", ["neox", "gptj"])
def test_sections_take_angles_of_three_rows_of_positions(rope):
    x = random_normal(np.random.default_rng(6), (4, 2, 20), "float32")
    positions = np.array([[0, 3, 5, 7], [1, 10, 2, 2], [4, 6, 8, 9]])
    got = rotated(x, positions, table(16), rotary_dim=16, mrope_section=(2, 5, 1), rope=rope)
    for row, pairs in zip(positions, ([0, 1], [2, 3, 4, 5, 6], [7]), strict=True):
        want = rotated(x, row, table(16), rotary_dim=16, rope=rope)
        elements = [e for i in pairs for e in ((i, i + 8) if rope == "neox" else (2 * i, 2 * i + 1))]
        same(got[..., elements], want[..., elements])
    same(got[..., 16:], x[..., 16:])
    one_row = rotated(x, np.stack([positions[0]] * 3), table(16), rotary_dim=16, mrope_section=(2, 5, 1), rope=rope)
    same(one_row, rotated(x, positions[0], table(16), rotary_dim=16, rope=rope))


def test_a_table_of_the_querys_dtype_is_read_as_float32():
    x = random_normal(np.random.default_rng(7), (3, 2, 8), "bfloat16")
    coarse = table(8).astype(DTYPES["bfloat16"])
    same(rotated(x, [1, 2, 3], coarse), rotated(x, [1, 2, 3], coarse.astype(np.float32)))


# ---- norms


def test_squares_are_added_in_pairs():
    x = np.array([2.0**24, 1, 1, 1, -3, 0.5], np.float32)  # one by one, every 1 would be lost
    assert oracle.sum_in_pairs(x[:4]) == 2.0**24 + 2
    assert oracle.sum_in_pairs(x) == np.float32(2.0**24 + 2) + np.float32(-2.5)
    assert oracle.sum_in_pairs(x[:1]) == 2.0**24


def test_a_norm_multiplies_by_the_reciprocal_of_a_root_each_step_rounded():
    x = random_normal(np.random.default_rng(8), (3, 2, 24), "float32")
    weights = random_normal(np.random.default_rng(9), (24,), "float32")
    got = oracle.normed(x, weights, 0.01)
    for token, head in np.ndindex(3, 2):
        row = x[token, head]
        total = [np.float32(e) * np.float32(e) for e in row] + [np.float32(0)] * 8
        while len(total) > 1:
            total = [a + b for a, b in zip(total[::2], total[1::2], strict=True)]
        root = np.sqrt(total[0] / np.float32(24) + np.float32(0.01))
        inverse = np.float32(1) / root
        same(got[token, head], np.array([e * inverse * w for e, w in zip(row, weights, strict=True)]))


def test_query_and_key_have_norms_of_their_own():
    case = RopeCase("norms of their own", num_q_heads=2)
    call = replace(case.make(), query=case.make().key)
    ones, twos = np.ones(16, np.float32), np.full(16, 2, np.float32)
    call.options |= {"q_norm": twos, "k_norm": ones, "eps": 0.0}
    query, key_cache, _ = run_oracle(call)
    for token, slot in enumerate(call.slot_mapping):
        same(query[token], (2 * key_cache.reshape(-1, 2, 16)[slot].astype(np.float32)).astype(query.dtype))
    norms = np.sqrt((query.astype(np.float32) ** 2).mean(-1))
    np.testing.assert_allclose(norms, 2, rtol=1e-2)


# ---- what is outside


@ids([case for case in CASES if case.positions in (OUTSIDE, (11, 3, 0), (0, 1, 10, 4, 11, 6, 7))])
def test_heads_at_positions_outside_are_zeros(case):
    call = case.make()
    rows = np.broadcast_to(call.positions, (3, case.num_tokens))
    outside = ~((rows >= 0) & (rows < MAX_POSITION)).all(0)
    assert 0 < outside.sum() < case.num_tokens
    call.query[outside] = np.nan
    query = run_oracle(call)[0]
    assert not bits(query[outside]).any()  # +0.0
    assert all(bits(token).any() for token in query[~outside])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_key_outside_is_written_as_zeros_and_its_value_as_it_is(kv_cache_dtype):
    case = RopeCase("outside", kv_cache_dtype=kv_cache_dtype, positions=OUTSIDE, k_weights="float32")
    call = case.make()
    call.key[1] = np.nan
    _, key_cache, value_cache = run_oracle(call)
    inside = replace(call, positions=np.zeros_like(call.positions))
    same(value_cache, run_oracle(inside)[2])
    for token in (1, 2, 4, 5):
        place = divmod(call.slot_mapping[token], 8)
        assert not bits(key_cache[place]).any()
        assert bits(value_cache[place]).any()


def test_of_mla_the_latent_part_outside_is_written_as_it_is():
    case = next(case for case in CASES if case.name == "MLA without a layout, neox, normed")
    call = case.make()
    _, got = run_oracle(call)
    _, want = run_oracle(replace(call, positions=np.zeros_like(call.positions)))
    same(got[..., :48], want[..., :48])
    for token in (1, 2, 4, 5):
        assert not bits(got[(*divmod(call.slot_mapping[token], 8), slice(48, None))]).any()


# ---- slots


@ids(CASES)
def test_only_slots_that_exist_are_touched(case):
    """Each token's slot is written with other poison, too, so that a byte that stays is one that is not written."""
    call, again = case.make(), case.make()
    again.caches = [(bits(c) ^ 0xFF).view(c.dtype).reshape(c.shape) for c in call.caches]
    first, second = run_oracle(call), run_oracle(again)
    same(first[0], second[0])
    valid = len({slot for slot in call.slot_mapping.tolist() if 0 <= slot < 40})
    assert valid == sum(0 <= slot < 40 for slot in call.slot_mapping)
    for poison, one, other in zip(call.caches, first[1:], second[1:], strict=True):
        differ = bits(one) != bits(other)  # where poison is left
        np.testing.assert_array_equal(bits(one)[differ], bits(poison)[differ])
        assert (~differ).sum() == bits(one).size // (40 * (case.num_layers or 1)) * valid


def test_every_query_is_rotated_also_beyond_the_slots():
    case = RopeCase("beyond")
    call = case.make()
    few = replace(call, slot_mapping=call.slot_mapping[:2])
    same(run_oracle(few)[0], run_oracle(call)[0])
    none = replace(call, slot_mapping=call.slot_mapping[:0])
    query, *caches = run_oracle(none)
    same(query, run_oracle(call)[0])
    for got, poison in zip(caches, call.caches, strict=True):
        same(got, poison)


def test_a_layer_is_its_own():
    whole = next(case for case in CASES if case.name == "NHD of all layers").make()
    _, *caches = run_oracle(whole)
    for got, poison in zip(caches, whole.caches, strict=True):
        same(got[[0, 2]], poison[[0, 2]])
        assert (bits(got[1]) != bits(poison[1])).any()


# ---- NaN


@pytest.mark.parametrize("dtype", NAN_BITS)
def test_what_is_computed_has_canonical_nan_and_what_is_copied_its_own(dtype):
    case = RopeCase("payloads", dtype=dtype, num_q_heads=2, slots=range(7))
    call = case.make()
    payload = {"float32": 0xFF812345, "float16": 0xFD23, "bfloat16": 0xFFA3}[dtype]
    unsigned = f"uint{8 * call.key.itemsize}"
    for array in (call.query, call.key, call.value):
        array.view(unsigned)[..., 3] = payload
    query, key_cache, value_cache = run_oracle(call)
    for computed in (query, key_cache.reshape(-1, 2, 16)[:7]):
        found = computed.view(unsigned)[np.isnan(computed.astype(np.float32))]
        assert (found == NAN_BITS[dtype]).all()
        assert len(found) == 7 * 2 * 2  # both elements of the pair
    same(value_cache.reshape(-1, 2, 16)[:7], call.value)

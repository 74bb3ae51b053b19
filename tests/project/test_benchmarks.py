"""The benchmarks run, on sizes that a CPU can do; what they measure there means nothing."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

from benchmarks import attention, batching, blocks, decode, gather, loop, loop_forms, pool, relayout, slots, swap, write


@pytest.mark.parametrize(
    "options",
    [
        ["decode NHD 256x1024"],
        ["prefill", "mixed"],
        ["MLA", "window", "soft cap", "PACKED_NHD 64x8192", "BLOCK_KV_HND 64x8192", "--no-peers"],
        ["decode NHD 64x8192", "quantised NHD 64x8192", "--no-peers"],
    ],
)
def test_attention(options, tmp_path, capsys):
    path = tmp_path / "attention.json"
    attention.main(["--divide", "1024", "--json", str(path), "--cases", *options])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "attention"
    assert found["copy_tb_s"] > 0
    assert found["rows"]
    for row in found["rows"]:
        assert {"case", "layout", "batch", "context", "queries", "bytes", "limit_us", "flops", "heads"} <= row.keys()
        for name in ("torchkv", "jaxkv"):
            assert name not in row["failed"]
            assert row[f"{name}_us"] > 0
            assert row[f"{name}_ratio"] > 0
            assert row[f"{name}_error"] <= attention.TOLERANCE
            assert (f"{name}_vs_bf16" in row) == (row["cache_dtype"] != "bfloat16")
        if row["case"] in ("prefill", "decode") and row["layout_name"] == "NHD" and "--no-peers" not in options:
            assert row["gather_sdpa_error"] <= attention.TOLERANCE
            assert row["failed"]["flashinfer"]  # it needs a GPU; the others went on
    assert "torchkv_" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_quantised_caches_are_compared_with_bf16():
    def row(case, layout, cache_dtype, us, size="8x32"):
        return {"case": case, "size": size, "layout_name": layout, "cache_dtype": cache_dtype, "torchkv_us": us}

    others = [
        row("decode", "NHD", "bfloat16", 2.0),
        row("window", "NHD", "bfloat16", 3.0),
        row("decode", "NHD", "bfloat16", 4.0, "1x32"),
        row("decode", "HND", "bfloat16", 5.0),
        row("MLA", "MLA", "bfloat16", 6.0),
    ]
    rows = [row("int4 token-head", "NHD", "int4", 1.0), row("MLA fp8_ds_mla", "MLA", "fp8_ds_mla", 1.0)]
    for each in (*rows, *others):
        attention.compare_with_bf16(each, others)
    assert [each["torchkv_vs_bf16"] for each in rows] == [2, 6]
    assert not any("torchkv_vs_bf16" in each for each in others)


def test_write(tmp_path, capsys):
    path = tmp_path / "write.json"
    options = ["quantised", "MLA", "layer", "head-major", "192/128"]
    write.main(["--tokens", "16", "--json", str(path), "--cases", *options])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "write"
    assert {row["kv_cache_dtype"] for row in found["rows"]} > {"auto", "int8", "int4", "nvfp4", "fp8_ds_mla"}
    for row in found["rows"]:
        assert {"case", "layout", "dtype", "cache_dtype", "heads", "scales"} <= row.keys()
        assert all(row[key] > 0 for key in ("bytes", "copy_us", "torch_ratio", "jax_ratio"))
    assert "torch_ratio" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_gather(tmp_path, capsys):
    path = tmp_path / "gather.json"
    gather.main(["--divide", "1024", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "gather"
    assert len(found["rows"]) == len(gather.CASES)
    for row in found["rows"]:
        assert row["failed"] == {}
        assert all(row[key] > 0 for key in ("bytes", "copy_us", "torch_ratio", "jax_ratio"))
    assert "torch_ratio" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_slots(tmp_path, capsys):
    path = tmp_path / "slots.json"
    slots.main(["--divide", "64", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "slots"
    assert len(found["rows"]) == len(slots.CASES)
    for row in found["rows"]:
        assert all(row[f"{name}_us"] > 0 for name in ("empty", "torch", "torch_ops", "jax", "jax_xla"))
    assert "jax_xla_us" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_other_slots_are_no_result(monkeypatch):
    monkeypatch.setattr(slots, "in_torch", lambda arrays, count: arrays[2])
    with pytest.raises(ValueError, match="the slots are others than the oracle's"):
        slots.main(["--divide", "64", "--cases", "no starts"])


def test_blocks(tmp_path, capsys):
    path = tmp_path / "blocks.json"
    blocks.main(["--divide", "512", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "blocks"
    assert len(found["rows"]) == len(blocks.CASES)
    for row in found["rows"]:
        assert row["failed"] == {}
        assert all(row[key] > 0 for key in ("bytes", "copy_us", "torch_ratio", "jax_ratio"))
    assert "torch_ratio" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_swap(tmp_path, capsys):
    path = tmp_path / "swap.json"
    swap.main(["--divide", "64", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "swap"
    assert len(found["rows"]) == len(swap.CASES)
    for row in found["rows"]:
        assert row["failed"] == {}
        assert all(row[key] > 0 for key in ("bytes", "copy_gb_s", "torch_gb_s", "jax_gb_s", "torch_ratio", "jax_ratio"))
    assert "torch_ratio" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_swapping_something_else_is_no_result(monkeypatch, tmp_path):
    path, pairs, asked = tmp_path / "swap.json", swap.Case.pairs, []

    def other(case, turn):
        asked.append(turn)
        return pairs(case, turn + (len(asked) > swap.SETS))  # the check asks last

    monkeypatch.setattr(swap.Case, "pairs", other)
    swap.main(["--divide", "64", "--json", str(path), "--cases", "1 layer, to", "--no-jax"])
    (row,) = json.loads(path.read_text())["rows"]
    assert "something else was copied" in row["failed"]["torch"]


def test_copying_something_else_is_no_result(monkeypatch, tmp_path):
    path, indices, asked = tmp_path / "blocks.json", blocks.Case.indices, []

    def other(case, turn):
        asked.append(turn)
        return indices(case, turn + (len(asked) > blocks.SETS))  # the check asks last

    monkeypatch.setattr(blocks.Case, "indices", other)
    blocks.main(["--divide", "512", "--json", str(path), "--cases", "few", "--no-jax"])
    (row,) = json.loads(path.read_text())["rows"]
    assert "something else was copied" in row["failed"]["torch"]


def test_relayout(tmp_path, capsys):
    path = tmp_path / "relayout.json"
    relayout.main(["--divide", "256", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "relayout"
    assert len(found["rows"]) == len(relayout.CASES)
    for row in found["rows"]:
        assert row["failed"] == {}
        assert all(row[key] > 0 for key in ("bytes", "copy_us", "torch_ratio", "jax_ratio"))
    assert "torch_ratio" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]
    rows = {row["case"]: row for row in found["rows"]}
    assert rows["NHD to HND"]["bytes"] == 64 * 8 * 128 * 2 * 2
    assert rows["bf16 to fp8"]["bytes"] == 64 * 8 * 128 * 3
    assert rows["int8, token head, NHD to HND"]["bytes"] == 128 * 8 * (128 + 4) * 2


def test_moving_something_else_is_no_result(monkeypatch, tmp_path):
    """Both frameworks' calls leave out a slot."""
    import torch

    import jaxkv
    import torchkv

    path = tmp_path / "relayout.json"

    def fewer(relayout_of, convert):
        def move(old, new, pairs=None):
            count = old.spec.num_blocks * old.spec.block_size
            pairs = np.stack([np.arange(count)] * 2, axis=1).astype(np.int32)[:-1]
            return relayout_of(old, new, convert(pairs))

        return move

    for cls, convert in ((torchkv.PagedKVCache, torch.from_numpy), (jaxkv.PagedKVCache, np.asarray)):
        monkeypatch.setattr(cls, "relayout", fewer(cls.relayout, convert))
    relayout.main(["--divide", "256", "--json", str(path), "--cases", "NHD to HND", "32 layers, bf16"])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row.keys().isdisjoint({"torch_us", "jax_us"})
        assert all("something else was moved" in row["failed"][name] for name in ("torch", "jax"))


def test_blocks_that_are_copied():
    cases = {case.name: case for case in blocks.CASES}
    assert blocks.moved(cases["1 layer"]) == 1024 * 16 * 8 * 128 * 2 * 2 == 2**26
    assert blocks.moved(cases["32 layers"]) == 64 * 32 * 16 * 8 * 128 * 2 * 2
    assert blocks.moved(cases["32 layers, int8, token head"]) == 64 * 32 * 16 * 8 * (128 + 4) * 2
    for case in cases.values():
        case = case._replace(n=8)
        found = [case.indices(turn) for turn in range(blocks.SETS)]
        assert len({*np.concatenate(found).ravel().tolist()}) == sum(len({*each.ravel().tolist()}) for each in found)
        if case.how != "zero":
            written, read = ({*each.tolist()} for each in found[0].T[::-1])
            assert len(written) == len(read) == 8
            assert len(written & read) == {"apart": 0, "chain": 7, "swap": 8}[case.how]


def test_gathering_something_else_is_no_result(monkeypatch, tmp_path):
    path = tmp_path / "gather.json"
    gathered = gather.Inputs.gathered
    monkeypatch.setattr(gather.Inputs, "gathered", lambda self, _, dtype: gathered(self, 1, dtype))
    gather.main(["--divide", "1024", "--json", str(path), "--cases", "bf16", "int4"])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3  # int4 has two
    for row in rows:
        assert row.keys().isdisjoint({"torch_us", "jax_us"})
        assert all("gathers something else" in row["failed"][name] for name in ("torch", "jax"))


def test_the_limit_counts_what_is_read():
    cases = {(case.name, case.size): case for case in attention.cases()}
    assert cases["decode", "64x8192"].read == 64 * 8192 * 8 * 128 * 2 * 2
    assert cases["fp8", "64x8192"].read * 2 == cases["decode", "64x8192"].read
    assert cases["window", "64x8192"].read * 8 == cases["decode", "64x8192"].read
    assert cases["MLA", "64x8192"].read == 64 * 8192 * 576 * 2
    positions, bf16 = 64 * 8192 * 8, cases["decode", "64x8192"].read
    assert cases["int8", "64x8192"].read * 2 == cases["int4", "64x8192"].read * 4 == bf16
    for name, size in (("fp8", 128), ("int8", 128), ("int4", 64)):
        assert cases[f"{name} token-head", "64x8192"].read == positions * 2 * (size + 4)
    assert cases["nvfp4", "64x8192"].read == positions * 2 * (64 + 8)
    assert cases["MLA fp8_ds_mla", "64x8192"].read == 64 * 8192 * 656
    assert cases["prefill", "1x8192"].flops == 4 * 32 * 128 * (4096 * 4096 + 4096 * 4097 // 2)


def test_the_copies_move_what_writes_and_gathers_move():
    cases = {case.name: case for case in write.CASES}
    heads = 100 * 8 * 2  # of keys and values
    written = {"NHD": 256, "NHD, layer": 256, "NHD e4m3": 128, "NHD e4m3, head": 128, "NHD int8": 128, "NHD int4": 64}
    written |= {"NHD e4m3, token head": 132, "NHD int8, token head": 132, "NHD int4, token head": 68, "NHD nvfp4": 72}
    for name, size in written.items():
        assert cases[name].moved(100) == heads * (256 + size), name
    assert cases["NHD float32 to bf16"].moved(100) == heads * (512 + 256)
    assert cases["k+v NHD 192/128"].moved(100) == 100 * 8 * (192 + 128) * 4
    assert cases["MLA"].moved(100) == 100 * 576 * 4
    assert cases["MLA fp8_ds_mla"].moved(100) == 100 * (576 * 2 + 656)
    moved = {case.name: gather.moved(case) for case in gather.CASES}
    heads = 65536 * 8 * 2
    read = {"bf16": 256, "fp8": 128, "int8": 128, "int4": 64, "nvfp4": 72}
    read |= {"fp8, token head": 132, "int8, token head": 132, "int4, token head": 68}
    assert moved == {name: heads * (size + 256) for name, size in read.items()}


@pytest.mark.covering(1)
@pytest.mark.parametrize(("devices", "more"), [("1", ["--divide", "16"]), ("2", ["--divide", "4", "--no-parts"])])
@pytest.mark.parametrize("weights", ["out-in", "in-out"])
def test_decode(devices, more, weights, tmp_path):
    path = tmp_path / "decode.json"
    options = ["--layers", "1", "--batches", "2", "--context", "48", "--json", str(path), "--weights", weights]
    decode.main([*options, "--devices", devices, *more])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "decode"
    (row,) = found["rows"]
    assert row["failed"] == {}
    assert row["finite"]
    assert row["devices"] == int(devices)
    parts = () if "--no-parts" in more else ("no_attention_ms", "no_rope_and_cache_ms", "no_head_ms")
    for key in ("step_ms", "limit_ms", "ratio", "tokens_s", *parts):
        assert row[key] > 0


def test_llama_3_8b_has_its_size():
    shape = decode.Shape(32)
    assert shape.weight_bytes(0) // 2 + shape.vocabulary * shape.hidden == 8_030_261_248  # with the embedding
    assert shape.kv_bytes(1, 1) == 131072


def test_loop(tmp_path, capsys):
    path = tmp_path / "loop.json"
    loop.main(["--small", "--tokens", "1", "--caches", "fp8", "--layers", "loop", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "loop"
    tables = {name: [row for row in found["rows"] if row["table"] == name] for name in loop.TABLES}
    for name, forms in (("write", loop_forms.WRITES), ("front", loop_forms.FRONTS)):
        (row,) = tables[name]
        assert row["failed"] == {}
        assert row["best_xla"].startswith("xla_")
        assert {"none_us", "xla_us", "xla_over_none_us", "vs_xla"} <= row.keys()
        for form in forms:
            assert row[f"{form.name}_us"] > 0
            assert row["kernels"][form.name]
    assert {row["kv_cache_dtype"] for row in tables["torch"]} == {"auto", "fp8"}
    for row in tables["torch"]:
        assert row["failed"].keys() == {
            "flashinfer_fused",
            "flashinfer_separate",
        }  # they need a GPU; the others went on
        assert all(row[key] > 0 for key in ("bytes", "copy_us", "fused_ratio", "separate_ratio"))
    assert capsys.readouterr().out.count("vs_xla") == 2


def test_pool(tmp_path, capsys):
    path = tmp_path / "pool.json"
    pool.main(["--operations", "4000", "--num-blocks", "2048", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "pool"
    rows = {row["case"]: row for row in found["rows"]}
    assert list(rows) == list(pool.CASES)
    for row in rows.values():
        assert row["operations"] >= 4000
        assert row["ns/operation"] == pytest.approx(row["seconds"] / row["operations"] * 1e9)
    assert rows["prompts"]["hit_rate"] > 0
    assert rows["prompts"]["evicted"] > 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


def test_batching(tmp_path, capsys):
    path = tmp_path / "batching.json"
    sizes = ["--num-seqs", "2", "--num-tokens", "2", "--requests", "3", "--new-tokens", "3", "--rounds", "1"]
    batching.main([*sizes, "--steps", "200", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "batching"
    assert found["simulation"]["steps"] >= 200
    ample, scarce = found["rows"]
    assert (ample["preemptions"], ample["blocks"], scarce["blocks"]) == (0, 24, 6)
    for row in found["rows"]:
        assert row["equal"] + row["near_ties"] == 3
        assert row["hit_rate"] > 0
        assert row["batch/alone"] == pytest.approx(row["batch"] / row["alone"])
        assert 0 < row["host"] < 1
    assert "num_seqs" in capsys.readouterr().out


def test_other_answers_are_no_result(monkeypatch):
    monkeypatch.setattr(batching, "compare", lambda *_: batching.Comparison(1, 1.0, different=(0,)))
    llama = batching.JaxLlama(batching.random_model())
    with pytest.raises(ValueError, match=r"requests \(0,\) have other answers than alone"):
        batching.measure(llama, batching.some_requests(1, 1, 50), 1, False, 1, 1)


def test_writing_something_else_is_no_result(monkeypatch):
    def other(shape, inputs, step, qkv, caches, layer):
        query, (key_cache, value_cache) = loop_forms.front_steps(shape, inputs, step, qkv, caches, layer)
        return query, (key_cache, value_cache.at[0].add(1))

    forms = [form for form in loop_forms.FRONTS if form.name in ("none", "jaxkv_steps")]
    shape = loop_forms.Shape(2, 2, "auto", True, layers=1, heads=1, head_size=16)
    row = loop.measure([*forms, forms[1]._replace(name="other", front=other)], shape, unrolled=True)
    assert list(row["failed"]) == ["other"]
    assert "gives another cache" in row["failed"]["other"]
    assert row.keys() >= {"none_us", "jaxkv_steps_us"}
    assert "other_us" not in row


def test_fronts_are_compared_over_none():
    row = {"none_us": 10.0, "jaxkv_fused_us": 13.0, "xla_flat_us": 15.0, "xla_packed_us": 14.0}
    loop.compare(row)
    assert (row["best_xla"], row["xla_over_none_us"], row["vs_xla"]) == ("xla_packed", 4, 0.75)

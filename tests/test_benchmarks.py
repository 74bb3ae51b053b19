"""The benchmarks of reading run, on sizes that a CPU can do; what they measure there means nothing."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from benchmarks import attention, decode


@pytest.mark.parametrize("names", [["1x131072"], ["prefill"], ["fp8", "MLA", "window", "mixed"]])
def test_attention(names, tmp_path, capsys):
    path = tmp_path / "attention.json"
    attention.main(["--divide", "128", "--cases", *names, "--json", str(path)])
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
        if row["case"] in ("prefill", "decode") and row["layout_name"] == "NHD":
            assert row["gather_sdpa_error"] <= attention.TOLERANCE
        assert "flash_attn" in row["failed"] or row["case"] != "decode" or row["layout_name"] != "NHD"
    assert "torchkv_ratio" in capsys.readouterr().out


def test_fp8_is_compared_with_bf16():
    bf16 = {"case": "decode", "size": "8x32", "layout_name": "NHD", "torchkv_us": 2.0}
    fp8 = {"case": "fp8", "size": "8x32", "layout_name": "NHD", "torchkv_us": 1.0}
    attention.compare_with_bf16(fp8, [bf16])
    assert fp8["torchkv_vs_bf16"] == 2


def test_the_limit_counts_what_is_read():
    cases = {(case.name, case.size): case for case in attention.cases()}
    assert cases["decode", "64x8192"].read == 64 * 8192 * 8 * 128 * 2 * 2
    assert cases["fp8", "64x8192"].read * 2 == cases["decode", "64x8192"].read
    assert cases["window", "64x8192"].read * 8 == cases["decode", "64x8192"].read
    assert cases["MLA", "64x8192"].read == 64 * 8192 * 576 * 2
    assert cases["prefill", "1x8192"].flops == 4 * 32 * 128 * (4096 * 4096 + 4096 * 4097 // 2)


def test_decode(tmp_path):
    path = tmp_path / "decode.json"
    options = ["--divide", "16", "--layers", "2", "--batches", "2", "--context", "48", "--json", str(path)]
    decode.main(options)
    found = json.loads(path.read_text())
    assert found["benchmark"] == "decode"
    (row,) = found["rows"]
    assert row["failed"] == {}
    assert row["finite"]
    for key in ("step_ms", "limit_ms", "ratio", "tokens_s", "no_attention_ms", "no_write_ms", "no_head_ms"):
        assert row[key] > 0


def test_llama_3_8b_has_its_size():
    shape = decode.Shape(32)
    assert shape.weight_bytes(0) // 2 + shape.vocabulary * shape.hidden == 8_030_261_248  # with the embedding
    assert shape.kv_bytes(1, 1) == 131072

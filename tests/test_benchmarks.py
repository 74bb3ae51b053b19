"""The benchmarks of reading run, on sizes that a CPU can do; what they measure there means nothing."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from benchmarks import attention, decode


@pytest.fixture(autouse=True)
def one_thread():
    """Where tests share cores, torch's threads wait for each other far longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options", [["decode NHD 256x1024"], ["prefill", "mixed"], ["MLA", "window", "soft cap", "--no-peers"]]
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
        if row["case"] in ("prefill", "decode") and row["layout_name"] == "NHD":
            assert row["gather_sdpa_error"] <= attention.TOLERANCE
            assert row["failed"]["flashinfer"]  # it needs a GPU; the others went on
    assert "torchkv_" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


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
    options = ["--divide", "16", "--layers", "1", "--batches", "2", "--context", "48", "--json", str(path)]
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

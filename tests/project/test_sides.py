"""The benchmarks that time implementations in turns run, and their rows say what was compared."""

import json
import sys
import types
from statistics import median

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import torchkv
from benchmarks import attention_torch, mla, prefill, sides
from benchmarks.attention_inputs import TOLERANCE, Case, Inputs
from benchmarks.timing import Timer, in_turns
from kvcore.plan.kernel import Target
from kvcore.run.compiler import has_gluon

H100 = Target("cuda", 90)


def tables_of(starts, indices):
    """Block tables of FlashInfer's offsets and indices, for sequences of as many blocks."""
    return indices.view(len(starts) - 1, -1)


class Prefill:
    """A FlashInfer that computes with torchkv what its plan says."""

    backends = ()

    def __init__(self, workspace, kv_layout="NHD", backend="auto"):
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, *, causal=False, window_left=-1, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert q_data_type == kv_data_type == torch.bfloat16
        self.sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo
        self.options = {"query_start_loc": qo_indptr, "causal": causal, "soft_cap": logits_soft_cap}
        self.options["sliding_window"] = None if window_left < 0 else window_left + 1
        pages = paged_kv_indptr.diff()
        self.seq_lens = ((pages - 1) * page_size + paged_kv_last_page_len).int()
        self.tables = tables_of(paged_kv_indptr, paged_kv_indices)

    def run(self, query, caches):
        key, value = caches
        assert self.sizes == (query.shape[1], key.shape[2], query.shape[2], key.shape[1], value.shape[3])
        return torchkv.paged_attention(query, caches, self.tables, self.seq_lens, **self.options)


class Mla:
    def __init__(self, workspace, backend="auto"):
        pass

    def plan(
        self, *, metadata, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type,
        kv_data_type,
    ):  # fmt: skip
        assert q_data_type == kv_data_type == torch.bfloat16
        query_starts, starts, indices, self.seq_lens = metadata
        assert torch.equal(starts.diff() * page_size, self.seq_lens)
        self.sizes = num_heads, head_dim_ckv, head_dim_ckv + head_dim_kpe, page_size
        self.tables = tables_of(starts, indices)
        self.options = {"query_start_loc": query_starts, "causal": causal, "scale": sm_scale}

    def run(self, *, query, kv_cache):
        heads, latent, row, page = self.sizes
        assert query.shape[1:] == (heads, row)
        assert kv_cache.shape[1:] == (page, row)
        return torchkv.paged_attention(
            query, kv_cache, self.tables, self.seq_lens, layout="MLA", head_size_v=latent, **self.options
        )


@pytest.fixture
def flashinfer(monkeypatch):
    package = types.ModuleType("flashinfer")
    package.BatchPrefillWithPagedKVCacheWrapper = Prefill
    package.mla = types.SimpleNamespace(
        BatchMLAPagedAttentionWrapper=Mla, MLAPlanMetadata=types.SimpleNamespace(csr=lambda *arrays: arrays)
    )
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    return package


def assert_row(row, also):
    """All but the kernel of a GPU ran, and those of `also`; ours are compared with each."""
    assert "needs a GPU" in row["failed"].pop("other")
    ran = {"torchkv", "jaxkv", *also}
    assert {key[:-3] for key in row if key.endswith("_us")} >= ran
    for name in ran:
        assert all(row[f"{name}_{key}"] > 0 for key in ("us", "tflops"))
        assert row[f"{name}_spread"] >= 0
        assert row[f"{name}_error"] <= TOLERANCE
        assert name == "torchkv" or row[f"{name}_apart"] < 0.01
    for ours in ("torchkv", "jaxkv"):
        assert {key for key in row if key.startswith(f"{ours}_vs_")} == {f"{ours}_vs_{n}" for n in ran - {ours}}
    assert row["torchkv_kernel"] == "torch"
    assert row["jaxkv_kernels"]
    assert not row["jaxkv_kernels"].startswith("unknown")


def test_prefill(flashinfer, tmp_path, capsys):
    path = tmp_path / "prefill.json"
    names = ["no mask, pages of 64", "from nothing", "mixed", "window"]
    prefill.main(["--divide", "1024", "--turns", "2", "--json", str(path), "--cases", *names])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "prefill"
    assert [row["case"] for row in found["rows"]] == [*names[:3], "window of 1,024"]
    for row in found["rows"]:
        reason = row["failed"].pop("sdpa", None)
        assert (reason is not None) == (row["case"] in ("mixed", "window of 1,024"))
        assert_row(row, {"flashinfer"} if reason else {"flashinfer", "sdpa"})
        assert row["failed"] == {}
        assert ("target_us" in row) == (row["case"] != "window of 1,024")
    assert "torchkv_vs_flashinfer" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_mla(flashinfer, tmp_path, capsys):
    path = tmp_path / "mla.json"
    names = ["16 heads, 64 × 8,192, pages of 16", "128 heads, 64 × 8,192, 2 tokens, pages of 16"]
    mla.main(["--divide", "2048", "--turns", "2", "--json", str(path), "--cases", *names])
    found = json.loads(path.read_text())
    assert found["benchmark"] == "mla"
    assert found["product_tflops"] > 0
    assert [row["case"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert_row(row, {"flashinfer"})
        assert row["failed"] == {}
        for name in ("torchkv", "jaxkv"):
            for what in ("bytes", "flops"):
                assert row[f"{name}_of_{what}"] == pytest.approx(row[f"{what}_limit_us"] / row[f"{name}_us"])
    assert [row["target_us"] for row in found["rows"]] == [218, None]
    assert "flops_limit_us" in capsys.readouterr().out.splitlines()[-len(found["rows"]) - 1]


def test_a_side_that_computes_something_else_is_no_result(flashinfer, monkeypatch):
    plan = Prefill.plan
    monkeypatch.setattr(Prefill, "plan", lambda *args, causal, **more: plan(*args, causal=not causal, **more))
    case = next(case for case in prefill.CASES if case.name == "causal").divided(1024)
    row = sides.measure(case, ["torchkv", "flashinfer"], turns=1)
    assert "of the largest element" in row["failed"]["flashinfer"]
    assert row["flashinfer_error"] > TOLERANCE
    assert row["flashinfer_apart"] > 0.01


def test_without_turns_sides_are_made_and_not_timed():
    row = sides.measure(prefill.CASES[0].divided(1024), ["torchkv"], turns=0)
    assert row["torchkv_error"] <= TOLERANCE
    assert not [key for key in row if key.endswith(("_us", "_tflops"))]


def test_sides_take_turns():
    order = []

    def timer(name, seconds):
        return Timer(lambda: order.append(name) or seconds * len(order), seconds)

    times = in_turns({"a": timer("a", 1.0), "b": timer("b", 2.0), "c": timer("c", 3.0)}, 4)
    assert "".join(order) == "abcbcacababc"
    assert times == {"a": [1.0, 6.0, 8.0, 10.0], "b": [4.0, 8.0, 18.0, 22.0], "c": [9.0, 15.0, 21.0, 36.0]}


def test_ratios_are_of_the_same_turn():
    times = {"torchkv": [1.0, 2.0, 4.0], "flashinfer": [2.0, 4.0, 20.0]}
    row = sides._figures(Case("", 1, 16), times)
    assert row["torchkv_vs_flashinfer"] == 2  # that of the medians, too; here it is not that of the means
    assert row["torchkv_us"] == 2e6
    assert row["torchkv_spread"] == 1.5
    times = {"torchkv": [1.0, 3.0, 2.0], "flashinfer": [3.0, 3.0, 2.0]}
    assert sides._figures(Case("", 1, 16), times)["torchkv_vs_flashinfer"] == 1
    assert median(times["flashinfer"]) / median(times["torchkv"]) == 1.5


def test_parts_of_names_choose_and_names_choose_one():
    def chosen(*parts):
        return [case.name for case in sides.chosen(prefill.CASES, parts or None)]

    assert len(chosen()) == len(prefill.CASES)
    assert chosen("no mask") == ["no mask"]
    assert chosen("pages of 64", "soft") == ["no mask, pages of 64", "causal, pages of 64", "soft cap"]
    assert chosen("nothing like it") == []


def test_every_case_is_built_once(monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(command)
        return types.SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(sides.subprocess, "run", run)
    mla.main(["--build", "--no-jax"])
    assert all(command[1:6] == ["-m", "benchmarks", "mla", "--turns", "0"] for command in commands)
    assert all("--no-jax" in command and "--no-peers" not in command for command in commands)
    built = [name for command in commands for name in command[command.index("--cases") + 1 :]]
    assert sorted(built) == sorted(case.name for case in mla.CASES)


def test_pairs_that_masks_leave():
    flops = {case.name: case.flops for case in prefill.CASES}
    head = 4 * 32 * 128
    assert flops["no mask"] == flops["no mask, pages of 128"] == head * 4096 * 8192
    assert flops["causal"] == flops["soft cap"] == head * (4096 * 4096 + 4096 * 4097 // 2)
    assert flops["from nothing"] == head * 16384 * 16385 // 2
    assert flops["192/128, 128 heads"] * 2 == flops["causal"] * 4 * (192 + 128) // 128
    assert flops["head size 64"] * 4 == flops["head size 256"] == flops["causal"] * 2
    assert flops["eight sequences"] == head * 8 * (512 * 8192 + 512 * 513 // 2)
    assert flops["mixed"] == head * (2048 * 2048 + 2048 * 2049 // 2 + 63 * 4096)
    assert flops["window of 1,024"] == head * 4096 * 1024
    assert {*prefill.TARGETS, *prefill.TARGETS_US} < flops.keys()
    rows = {case.name: (case.read, case.flops) for case in mla.CASES}
    assert rows["128 heads, 64 × 8,192, pages of 64"] == (64 * 8192 * 576 * 2, 2 * 128 * (576 + 512) * 64 * 8192)
    assert rows["16 heads, 1 × 131,072, pages of 16"] == (131072 * 576 * 2, 2 * 16 * (576 + 512) * 131072)
    two = 64 * (8191 + 8192)
    assert rows["128 heads, 64 × 8,192, 2 tokens, pages of 16"] == (64 * 8192 * 1152, 2 * 128 * 1088 * two)
    assert len(rows) == 14


def test_right_answers_of_several_long_sequences():
    """The first and last token of each kind of sequence, beside the op itself."""
    for options in ({"long": 2}, {"long": 3}, {"long": 3, "causal": False}, {"long": 2, "sliding_window": 5}):
        inputs = Inputs(Case("", 3, 32, queries=4, q_heads=4, kv_heads=2, head_size=16, head_size_v=16, **options))
        tokens = list(range(inputs.case.tokens))
        assert inputs.query_starts.tolist()[-1] == len(tokens)
        out = attention_torch.ours(inputs)[0]()
        for token in tokens:
            expected = inputs._attend(token)
            assert (out[token].float() - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("case", [prefill.CASES[0], prefill.CASES[-1]], ids=lambda case: case.name)
def test_the_plan_says_which_kernel_runs(case):
    inputs = Inputs(case.divided(4))
    names = [attention_torch.plan_of(inputs, H100, gluon=gluon).attend.name for gluon in (True, False)]
    assert names == ["hopper_attention_kernel" if has_gluon() else "paged_attention_kernel", "paged_attention_kernel"]


def test_the_kernel_for_every_gpu_is_what_is_launched_elsewhere():
    inputs = Inputs(mla.CASES[0].divided(4096))
    assert attention_torch.plan_of(inputs, H100, gluon=False).attend.name == "paged_attention_kernel"

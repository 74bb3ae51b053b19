"""Runs FlashInfer's own tests on a CPU, with `torchkv.integrations.flashinfer` for a package `flashinfer`.

    python -m tests.integrations.run_flashinfer_tests PATH... [kv_len=100 …] [--each N] [pytest's options]

PATH is a file of FlashInfer's repository, such as `tests/attention/test_batch_decode_kernels.py`. `kv_len=100` leaves
out cases whose parameter of this name is larger, `--each` draws as many cases of each test, the same in each run.

What tests compare with, single_prefill_with_kv_cache and single_decode_with_kv_cache, is plain torch. Tests of what
torchkv has no counterpart for are skipped, with its name. Latent caches in two tensors are joined for each call. CUDA
devices are the CPU, and a graph that is replayed runs what it captured again, on the tensors that it captured.
"""

import math
import random
import sys
import types
from collections import Counter, defaultdict
from importlib import import_module
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch.overrides import TorchFunctionMode

from torchkv.integrations import flashinfer as ours
from torchkv.integrations.flashinfer.planned import Planned

# ---- what tests compare with


def single_prefill_with_kv_cache(
    q, k, v, *unused, kv_layout="NHD", causal=False, pos_encoding_mode="NONE", sm_scale=None, window_left=-1,
    logits_soft_cap=None, return_lse=False, custom_mask=None, k_scale=None, v_scale=None, backend=None,
    use_fp16_qk_reduction=False, use_tensor_cores=None,
):  # fmt: skip
    """Attention of one sequence, in float32."""
    if pos_encoding_mode != "NONE" or custom_mask is not None:
        pytest.skip("a reference with a rotation, or a mask of its own")
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    group = q.shape[1] // k.shape[1]
    key, value = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scale = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale) * (k_scale or 1)
    logits = torch.einsum("qhd,khd->hqk", q.float(), key) * scale
    if logits_soft_cap:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    apart = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    hidden = (apart < 0) & causal | (apart > window_left) & (window_left >= 0)
    logits = logits.masked_fill(hidden, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0)
    out = (torch.einsum("hqk,khd->qhd", weights, value) * (v_scale or 1)).to(q.dtype)
    return (out, lse.T / math.log(2)) if return_lse else out


def single_decode_with_kv_cache(q, k, v, kv_layout="NHD", *unused, **options):
    result = single_prefill_with_kv_cache(q[None], k, v, kv_layout=kv_layout, **options)
    return tuple(x[0] for x in result) if isinstance(result, tuple) else result[0]


class JoinedMla(ours.BatchMLAPagedAttentionWrapper):
    """Tests keep the two parts of latent rows in tensors of their own, which torchkv's wrapper refuses: joins them."""

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, *args, **options):
        rows = torch.cat([ckv_cache, kpe_cache], -1)
        parts = rows[..., : ckv_cache.shape[-1]], rows[..., ckv_cache.shape[-1] :]
        return super().run(q_nope, q_pe, *parts, *args, **options)


# ---- a package flashinfer


class Stub(types.ModuleType):
    """A module in which everything is found, and what is not torchkv's skips the test that calls it."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **options):
            pytest.skip(f"{self.__name__}.{name} is not torchkv's")

        return missing


class Finder:
    """Finds a stub for each module of the packages."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flashinfer" or name.startswith("tests.test_helpers"):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = Stub(spec.name)
        if spec.name.startswith("flashinfer"):
            for name in ours.__all__:
                setattr(module, name, getattr(ours, name))
            module.BatchMLAPagedAttentionWrapper = JoinedMla
            module.single_prefill_with_kv_cache = single_prefill_with_kv_cache
            module.single_decode_with_kv_cache = single_decode_with_kv_cache
            module.get_compute_capability = lambda device: (9, 0)
            module.build_jit_specs = lambda *args, **options: None
            for name in ("has_flashinfer_jit_cache", "is_sm90a_supported"):
                setattr(module, name, lambda *args: True)
        else:
            module.clear_cuda_cache = lambda *args: None
        return module

    def exec_module(self, module):
        if module.__name__ == "flashinfer":
            for name in ("cascade", "decode", "jit", "mla", "page", "prefill", "utils"):
                setattr(module, name, import_module(f"flashinfer.{name}"))


# ---- CUDA on a CPU


def on_cpu(device):
    """The device to use in a device's place; what is none stays."""
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(device, str) and device.startswith("cuda") else device


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = on_cpu("cuda" if isinstance(kwargs["device"], int) else kwargs["device"])
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to:
            args = (args[0], *("cpu" if type(x) is int else on_cpu(x) for x in args[1:]))
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)


class Graph:
    """Attention that was captured: once more, on the tensors that it had then."""

    capturing = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for planned, kept, args, options, result in self.calls:
            now = planned.tables, planned.seq_lens, planned.starts
            planned.tables, planned.seq_lens, planned.starts = kept
            again = attend(planned, *args, **options)
            planned.tables, planned.seq_lens, planned.starts = now
            pairs = zip(result, again, strict=True) if isinstance(result, tuple) else [(result, again)]
            for old, new in pairs:
                old.copy_(new)


class Capture:
    def __init__(self, graph, **options):
        self.graph = graph

    def __enter__(self):
        Graph.capturing = self.graph

    def __exit__(self, *error):
        Graph.capturing = None


class Generator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


class Stream:
    def wait_stream(self, other): ...
    def synchronize(self): ...
    def __enter__(self): ...
    def __exit__(self, *error): ...


attend = Planned.attend


def recorded(planned, *args, **options):
    result = attend(planned, *args, **options)
    CALLS["attend"] += 1
    if Graph.capturing is not None:
        kept = planned.tables, planned.seq_lens, planned.starts
        Graph.capturing.calls.append((planned, kept, args, options, result))
    return result


CALLS: Counter = Counter()


def replace_cuda():
    Planned.attend = recorded
    torch.cuda.CUDAGraph, torch.cuda.graph, torch.cuda.Stream = Graph, Capture, Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args: Stream()
    torch.cuda.stream = lambda stream: stream
    for name in ("synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda, name, lambda *args: None)
    torch.Generator = Generator
    torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(multi_processor_count=132)


# ---- which tests, and why they fail


class Plugin:
    def __init__(self, limits, each):
        self.limits, self.each, self.reasons = limits, each, Counter()

    def pytest_collection_modifyitems(self, config, items):
        small, by_test = [], defaultdict(list)
        for item in items:
            params = (getattr(item, "callspec", None) and item.callspec.params) or {}
            if all(not isinstance(params.get(n), int) or params[n] <= most for n, most in self.limits.items()):
                by_test[item.originalname].append(item)
        for cases in by_test.values():
            few = self.each is not None and len(cases) > self.each
            small += random.Random(0).sample(cases, self.each) if few else cases
        print(f"{len(small)} of {len(items)} cases")
        items[:] = small

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with OnCpu():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call":
            reason = ""
            if call.excinfo is not None:
                reason = f"{call.excinfo.typename}: {str(call.excinfo.value).strip().splitlines()[:1]}"
            self.reasons[item.originalname, report.outcome, reason] += 1
        return report


def main() -> int:
    limits, options, each = {}, [], None
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        name, equals, number = argument.partition("=")
        if argument == "--each":
            each = int(next(arguments))
        elif equals and number.isdigit() and name.isidentifier():
            limits[name] = int(number)
        else:
            options.append(argument)
    sys.meta_path.insert(0, Finder())
    replace_cuda()
    plugin = Plugin(limits, each)
    status = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=no", "-r", "N", *options], [plugin])
    for (test, outcome, reason), count in sorted(plugin.reasons.items()):
        print(f"{count:5} {outcome:8}{test} {reason}")
    print("calls of attention:", CALLS["attend"])
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

"""Kernels, launches on the host and threads for tests of launches."""

import threading
from contextlib import nullcontext

import torch
import triton
from triton.backends.compiler import GPUTarget

from kvcore.plan.kernel import INTERPRETER, Target
from kvcore.plan.write import plan_write, pointers
from kvcore.run import interpreter
from kvcore.run.compiler import kernel_function
from tests.cases.writes import describe
from torchkv._triton import launch as _launch
from torchkv._triton import launches as _launches

H100 = Target("cuda", 90)


def write_kernel(head_size=128):
    """A kernel of writing and what its pointers point to."""
    write = describe("NHD", head_size=head_size)
    pointees = dict.fromkeys(pointers(write), "bfloat16") | {"slot_mapping_ptr": "int32"}
    pointees |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "layer"))
    return plan_write(write, H100).kernel, pointees, frozenset()


def replace(monkeypatch, **replaced):
    """Replaces what launches are made with, and needs no GPU for these."""
    for name, value in replaced.items():
        monkeypatch.setattr(_launches, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


def launch(launches, call):
    """Launches a call, which the op's launches do not remember by arguments. Gives the results."""
    return launches.launch(call, launches.tensors(call))[1]


class OnHost:
    """Launches as on a GPU, but of CPU tensors: what would be compiled is interpreted.

    Attributes:
        compiled: What was, in order: the plan's kernel, and which of its pointers are aligned.
        started: What was: the kernel, the grid and the arguments.
    """

    def __init__(self, monkeypatch):
        self.compiled, self.started = [], []
        runner = _launch.INTERPRETED._replace(start=self.start, address=torch.Tensor.data_ptr)
        replace(monkeypatch, load=self.load, ON_GPU=runner, target=lambda: INTERPRETER)

    def load(self, kernel, pointees, aligned):
        self.compiled.append((kernel, aligned))
        return kernel, pointees

    def start(self, loaded, grid, arguments):
        kernel, pointees = loaded
        self.started.append((kernel, grid, arguments))
        names = kernel_function(kernel).arg_names
        pointers = []
        for name, argument in zip(names, arguments, strict=False):
            dtype = pointees.get(name)
            pointers.append(argument if dtype in (None, "scalar") else interpreter.Pointer(argument, dtype))
        interpreter.run(kernel, grid, pointers)


class Driver:
    """Triton's driver of a GPU that is not here: it loads what was compiled, and remembers what."""

    def __init__(self):
        self.utils, self.loaded = self, []
        self.launcher_cls = lambda *_: lambda *_: None

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        self.loaded.append(binary)
        return None, len(self.loaded), 32, 0, 1024


def use_driver(monkeypatch, folder):
    """Triton's driver for a GPU that is not here; no kernels were loaded, and Triton's cache is an empty folder."""
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(_launch, "_kernels", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return driver


def in_threads(count, function):
    """Calls a function with 0, 1, … in as many threads at once; gives the results."""
    results, barrier = [None] * count, threading.Barrier(count)

    def call(i):
        barrier.wait()
        try:
            results[i] = function(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

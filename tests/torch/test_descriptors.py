"""Pointers that a kernel gets as TMA descriptors: what torch's launches hand to Triton's launcher."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.8")

from kvcore.plan.kernel import Descriptor
from torchkv._triton import launch as _launch

KEY = Descriptor((5, 3, 16, 128), (6144, 128, 384, 1), (1, 1, 16, 128))
VALUE = Descriptor((5, 3, 16, 64), (3072, 64, 192, 1), (1, 1, 16, 64))


def test_addresses_become_descriptors(monkeypatch):
    """Triton's own function takes them apart, as it does torch's TensorDescriptor."""
    from triton.backends import nvidia  # noqa: F401
    from triton.backends.driver import wrap_handle_tensordesc_impl

    signature = {
        "query_ptr": "*bf16", "key": "tensordesc<bf16[1, 1, 16, 128],layout>", "n": "i32",
        "value": "tensordesc<bf16[1, 1, 16, 64],layout>", "P": "constexpr",
    }  # fmt: skip
    started = []

    def make(argument, meta, _):
        assert argument.padding == "zero"
        assert not argument.round_f32_to_tf32
        return [(meta, argument.base.data_ptr()), *argument.shape, *argument.strides]

    def start(*arguments):
        started.append(arguments)

    kernel = _launch.Kernel(
        compiled=None,
        run=None,
        hooks=SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None),
        device=0,
        constexprs=(None,),
        launch=wrap_handle_tensordesc_impl(start, signature, ["meta of K", "meta of V"], make),
        settings=("settings",),
        packed=True,
        descriptors=((1, KEY), (3, VALUE)),
    )
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    _launch.start(kernel, (1, 2, 3), (100, 200, 4, 300))
    ((*front, arguments),) = started
    assert front == [1, 2, 3, 7, "settings"]
    assert tuple(arguments) == (
        100, ("meta of K", 200), *KEY.shape, *KEY.strides, 4, ("meta of V", 300), *VALUE.shape, *VALUE.strides, None,
    )  # fmt: skip

"""``python -m tests.helpers.card_hooks PATH ARCH``: kernels of a path of this project for a card, without a card.

A torch without CUDA has no guard and no hooks for the device, which its C++ code asks for even where tensors are fake.
This module adds some that do nothing, before torch looks for them, and needs a C++ compiler. Then it prints what
`tests.helpers.card_kernels` finds, as JSON.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
static c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard);
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks) }
"""


def load() -> None:
    """Compile the hooks, and load them after torch's libraries and before torch."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "hooks.cpp"), Path(folder, "hooks.so")
        source.write_text(_SOURCE)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        command = [os.environ.get("CXX", "g++"), *options, str(source), "-o", str(library), "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        for path in (*root.glob("lib/libgomp*"), root / "lib/libc10.so", root / "lib/libtorch_cpu.so", library):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load()
    from tests.helpers.card_kernels import kernels

    print(json.dumps(kernels(sys.argv[1], int(sys.argv[2]))))

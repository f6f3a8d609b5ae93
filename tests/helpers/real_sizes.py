"""Models of real size without memory and without arithmetic: fake tensors of the CPU.

Shapes, data types and operations are those of the models; values are not computed. A torch without CUDA cannot make
fake tensors of CUDA beyond a few operations ("not linked with support for cuda devices"), so autocast and the choice of
attention kernels are those of the CPU.
"""

from __future__ import annotations

from typing import Any
from weakref import finalize

import open_clip
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reinforce.student.model import StudentModel
from teachers.open_clip.teacher import image_spec

# torch.use_deterministic_algorithms in torch 2.13 lists what raises on CUDA; these are ATen's names.
RAISING = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
    "avg_pool3d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d",
    "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward",
    "nll_loss2d_backward", "_ctc_loss", "_ctc_loss_backward", "_embedding_bag_backward", "put", "put_", "histc",
    "median", "nanmedian", "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "cummax", "cummin",
    "logcumsumexp",
}  # fmt: skip
#: These raise for floating-point numbers only; bincount with weights.
_RAISING_FOR_FLOATS = {"cumsum", "cumsum_", "cumprod", "bincount"}


class Operations(TorchDispatchMode):
    """Records the operations of ATen, and those that raise on CUDA where deterministic algorithms are required."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.raising: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # the same in half the time: more than half of all calls are these
        name = func._schema.name.removeprefix("aten::")
        self.names.add(name)
        floats = any(isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args)
        if name in RAISING or (name in _RAISING_FOR_FLOATS and floats):
            self.raising.add(name)
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def build_without_memory(mode: FakeTensorMode, name: str) -> Any:
    """An open_clip model in eval mode, whose parameters and buffers are fake."""
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for key, value in values.items():
                if value is None:
                    continue
                with mode:
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                is_parameter = isinstance(value, torch.nn.Parameter)
                values[key] = torch.nn.Parameter(fake, value.requires_grad) if is_parameter else fake
    return model.eval()


def fake_student(mode: FakeTensorMode, name: str, checkpointing: bool = False) -> StudentModel:
    """A student in training, whose parameters and buffers are fake."""
    clip, config = build_without_memory(mode, name), open_clip.get_model_config(name)
    if checkpointing:
        clip.set_grad_checkpointing()
    return StudentModel(name, clip, config, image_spec(open_clip.get_model_preprocess_cfg(clip)), ()).train()


class PeakMemory(Operations):
    """Records the most bytes, too, of the tensors made inside that exist at a time, after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._alive: set[int] = set()

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = {storage._cdata for storage in _storages((args, [*kwargs.values()]))}
        made = func(*args, **kwargs)
        for storage in _storages(made):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                finalize(storage, self._forget, storage._cdata, storage.nbytes()).atexit = False
        self.bytes = max(self.bytes, self._now)
        return made

    def _forget(self, storage: int, size: int) -> None:
        self._alive.discard(storage)
        self._now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    if isinstance(values, torch.Tensor):
        return [values.untyped_storage()]
    return [found for value in values for found in _storages(value)] if isinstance(values, tuple | list) else []

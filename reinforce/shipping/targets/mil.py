"""Execution of a saved Core ML package in torch, operation by operation, where there is no Core ML.

Only the operations that conversions of CLIP models contain. Results are rounded to the package's data types after each
operation, sums inside an operation are in float32. Exports use it because coremltools runs packages on macOS alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_Values = dict[str, Any]
_HALF = 10  # MIL_pb2.FLOAT16
#: numpy's type and the blob reader's method of each data type of MIL_pb2.DataType.
_TYPES: dict[int, tuple[str, str]] = {
    _HALF: ("float16", "fp16"), 11: ("float32", "float"), 21: ("int8", "int8"), 22: ("int16", "int16"),
    23: ("int32", "int32"), 31: ("uint8", "uint8"), 32: ("uint16", "uint16"), 33: ("uint32", "uint32"),
}  # fmt: skip


class Interpreter:
    """A package with one input and one output. Raises ValueError with the name of an unknown operation."""

    def __init__(self, package: Path) -> None:
        import coremltools as ct

        (function,) = ct.utils.load_spec(str(package)).mlProgram.functions.values()
        block = function.block_specializations[function.opset]
        self.input, (self.output,) = function.inputs[0].name, block.outputs
        self._weights = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
        self._constants: _Values = {}
        self._steps: list[tuple[Callable[[_Values], Any], dict[str, Any], list[Any]]] = []
        for operation in block.operations:
            attributes = {key: self._value(value) for key, value in operation.attributes.items()}
            names = [(one.name, one.type.tensorType.dataType) for one in operation.outputs]
            if operation.type == "const":
                self._constants[names[0][0]] = attributes["val"]
                continue
            run = _OPERATIONS.get(operation.type)
            if run is None:
                raise ValueError(f"the package has an operation that cannot be checked here: {operation.type}")
            if operation.type.startswith("constexpr"):
                self._constants[names[0][0]] = _stored(run(attributes), names[0][1])
                continue
            inputs = {key: [one.name for one in value.arguments] for key, value in operation.inputs.items()}
            self._steps.append((run, inputs, names))

    def __call__(self, rows: Tensor) -> Tensor:
        """Run the package on its input; returns its output."""
        known = {**self._constants, self.input: rows}
        for run, inputs, names in self._steps:
            values = {key: [known[name] for name in given] for key, given in inputs.items()}
            found = run({key: given if key == "values" else given[0] for key, given in values.items()})
            for (name, kind), value in zip(names, found if isinstance(found, tuple) else (found,), strict=True):
                known[name] = _stored(value, kind)
        return known[self.output]

    def _value(self, value: Any) -> Any:
        """A constant: text, or a tensor; floats as float32, integers as int64."""
        kind = value.type.tensorType.dataType
        shape = [one.constant.size for one in value.type.tensorType.dimensions]
        if value.HasField("blobFileValue"):
            from coremltools.libmilstoragepython import _BlobStorageReader

            numpy_type, reader = _TYPES[kind]
            read = getattr(_BlobStorageReader(str(self._weights)), f"read_{reader}_data")
            return _tensor(read(value.blobFileValue.offset), numpy_type, shape)
        tensor = value.immediateValue.tensor
        form = tensor.WhichOneof("value")
        if form == "strings":
            return tensor.strings.values[0]
        if form == "bytes":
            return _tensor(np.frombuffer(tensor.bytes.values, np.uint8), _TYPES[kind][0], shape)
        return torch.tensor(list(getattr(tensor, form).values)).reshape(shape)


def _tensor(data: Any, numpy_type: str, shape: list[int]) -> Tensor:
    array = np.frombuffer(np.ascontiguousarray(data).tobytes(), numpy_type)
    wide = array.astype(np.float32 if numpy_type.startswith("float") else np.int64)
    return torch.from_numpy(wide).reshape(shape if shape else ([] if wide.size == 1 else [-1]))


def _stored(value: Tensor, kind: int) -> Tensor:
    """Round to the data type that the package has; integers stay int64, and float16 is held in float32."""
    return value.half().float() if kind == _HALF else value


def _conv(v: _Values) -> Tensor:
    x, pads = v["x"], v["pad"].tolist() if v["pad_type"] == "custom" else [0] * 4
    if v["pad_type"] not in {"custom", "valid"}:
        raise ValueError(f"the package has an operation that cannot be checked here: conv with pad {v['pad_type']}")
    x = functional.pad(x, [pads[2], pads[3], pads[0], pads[1]])
    lists = (v[key].tolist() for key in ("strides", "dilations"))
    strides, dilations = lists
    return functional.conv2d(x, v["weight"], v.get("bias"), strides, 0, dilations, int(v["groups"]))


def _pool(v: _Values, how: Callable[..., Tensor], **options: Any) -> Tensor:
    pads = v["pad"].tolist() if v["pad_type"] == "custom" else [0] * 4
    if pads[0] != pads[1] or pads[2] != pads[3] or bool(v.get("ceil_mode", False)):
        raise ValueError("the package has an operation that cannot be checked here: pool with uneven borders")
    return how(v["x"], v["kernel_sizes"].tolist(), v["strides"].tolist(), [pads[0], pads[2]], **options)


def _slice(v: _Values) -> Tensor:
    x: Tensor = v["x"]
    masks = {
        key: v[key].tolist() if key in v else [False] * x.ndim for key in ("begin_mask", "end_mask", "squeeze_mask")
    }
    strides = v["stride"].tolist() if "stride" in v else [1] * x.ndim
    index: list[Any] = []
    for axis in range(x.ndim):
        begin, end = int(v["begin"][axis]), int(v["end"][axis])
        if masks["squeeze_mask"][axis]:
            index.append(begin)
        else:
            index.append(
                slice(
                    None if masks["begin_mask"][axis] else begin,
                    None if masks["end_mask"][axis] else end,
                    strides[axis],
                )
            )
    return x[tuple(index)]


def _axes(v: _Values) -> list[int]:
    return [int(axis) for axis in v["axes"].reshape(-1)]


def _expand(v: _Values) -> Tensor:
    x: Tensor = v["x"]
    for axis in sorted(_axes(v)):
        x = x.unsqueeze(axis)
    return x


def _normalized(v: _Values) -> Tensor:
    shape = (1, -1, *[1] * (v["x"].ndim - 2))
    scale = v["gamma"] / torch.sqrt(v["variance"] + v["epsilon"])
    return v["x"] * scale.view(shape) + (v["beta"] - v["mean"] * scale).view(shape)


def _gather(v: _Values) -> Tensor:
    axis, indices = int(v["axis"]), v["indices"].long()
    picked = v["x"].index_select(axis, indices.reshape(-1))
    return picked.reshape([*v["x"].shape[:axis], *indices.shape, *v["x"].shape[axis + 1 :]])


def _dequantize(v: _Values) -> Tensor:
    data, axis = v["quantized_data"].float(), int(v["axis"])
    shape = [-1 if one == axis else 1 for one in range(data.ndim)]
    scale, zero = (v[key].float().reshape(shape if v[key].numel() > 1 else []) for key in ("scale", "zero_point"))
    return scale * (data - zero)


def _palette(v: _Values) -> Tensor:
    lut, shape = v["lut"].reshape(-1), v["shape"].tolist()
    bits = len(lut).bit_length() - 1
    packed = np.unpackbits(v["indices"].reshape(-1).numpy().astype(np.uint8), bitorder="little")
    count = int(np.prod(shape))
    indices = packed[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))
    return lut[torch.from_numpy(indices)].reshape(shape)


def _cast(v: _Values) -> Tensor:
    if v["dtype"] == "fp16":
        return v["x"].float().half().float()
    if v["dtype"] == "bool":
        return v["x"].bool()
    return v["x"].float() if v["dtype"] == "fp32" else v["x"].long()


_OPERATIONS: dict[str, Callable[[_Values], Any]] = {
    "add": lambda v: v["x"] + v["y"],
    "avg_pool": lambda v: _pool(v, functional.avg_pool2d, count_include_pad=not v["exclude_padding_from_average"]),
    "batch_norm": _normalized,
    "cast": _cast,
    "concat": lambda v: torch.cat([one.expand_as(one) for one in v["values"]], int(v["axis"])),
    "constexpr_affine_dequantize": _dequantize,
    "constexpr_lut_to_dense": _palette,
    "conv": _conv,
    "equal": lambda v: v["x"] == v["y"],
    "expand_dims": _expand,
    "gather": _gather,
    "gather_nd": lambda v: v["x"][tuple(v["indices"].long().unbind(-1))],
    "gelu": lambda v: functional.gelu(v["x"], approximate="none" if v["mode"] == "EXACT" else "tanh"),
    "greater_equal": lambda v: v["x"] >= v["y"],
    "layer_norm": lambda v: functional.layer_norm(
        v["x"], [v["x"].shape[axis] for axis in _axes(v)], v.get("gamma"), v.get("beta"), float(v["epsilon"])
    ),
    "linear": lambda v: functional.linear(v["x"], v["weight"], v.get("bias")),
    "logical_and": lambda v: v["x"] & v["y"],
    "logical_not": lambda v: ~v["x"],
    "matmul": lambda v: torch.matmul(*(v[key].mT if v.get(f"transpose_{key}") else v[key] for key in "xy")),
    "max_pool": lambda v: _pool(v, functional.max_pool2d),
    "maximum": lambda v: torch.maximum(v["x"], v["y"]),
    "mul": lambda v: v["x"] * v["y"],
    "not_equal": lambda v: v["x"] != v["y"],
    "real_div": lambda v: v["x"] / v["y"],
    "reduce_argmax": lambda v: v["x"].argmax(int(v["axis"]), keepdim=bool(v["keep_dims"])),
    "reduce_l2_norm": lambda v: v["x"].norm(dim=_axes(v), keepdim=bool(v["keep_dims"])),
    "reduce_mean": lambda v: v["x"].mean(_axes(v), keepdim=bool(v["keep_dims"])),
    "reduce_sum": lambda v: v["x"].sum(_axes(v), keepdim=bool(v["keep_dims"])),
    "relu": lambda v: v["x"].relu(),
    "reshape": lambda v: v["x"].reshape([size or v["x"].shape[axis] for axis, size in enumerate(v["shape"].tolist())]),
    "select": lambda v: torch.where(v["cond"].bool(), v["a"], v["b"]),
    "sigmoid": lambda v: v["x"].sigmoid(),
    "silu": lambda v: functional.silu(v["x"]),
    "slice_by_index": _slice,
    "softmax": lambda v: v["x"].softmax(int(v["axis"])),
    "split": lambda v: tuple(v["x"].split(v["split_sizes"].tolist(), int(v["axis"]))),
    "squeeze": lambda v: v["x"].squeeze(_axes(v)),
    "stack": lambda v: torch.stack(list(v["values"]), int(v["axis"])),
    "sub": lambda v: v["x"] - v["y"],
    "tanh": lambda v: v["x"].tanh(),
    "tile": lambda v: v["x"].repeat(v["reps"].tolist()),
    "transpose": lambda v: v["x"].permute(v["perm"].tolist()),
}  # fmt: skip

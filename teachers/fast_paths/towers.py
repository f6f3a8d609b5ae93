"""Towers made fast on CUDA: weights held in the precision, attention without copies, blocks compiled for few shapes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from teachers.fast_paths.frozen import Float8Layers, FrozenAttention, check_device
from teachers.fast_paths.recompilation import Compiler, many_shapes
from teachers.fast_paths.usage import Usage, fast_path
from teachers.runtime.accelerator import Accelerator, widest_float
from teachers.spec import TeacherSpec
from teachers.tokens import PROBE_TEXTS

_LOG = logging.getLogger(__name__)
#: Modules that do nothing with their weights but what autocast computes in its precision.
_PRODUCTS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.MultiheadAttention)
#: Least rows in a batch of a compiled tower. On CUDA more, since each size is compiled.
_SMALLEST, _SMALLEST_ON_CUDA = 8, 32
_MIN_BLOCKS = 2
#: Least cosine between the embeddings of a fast path and those of the plain one, in fp32, in other precisions, and in
#: fp8, where the rounding of one layer changes that of the next.
_COSINE_FP32, _COSINE, _COSINE_FP8 = 0.99999, 0.999, 0.99

Outputs = Callable[[], Sequence[torch.Tensor]]
Encode = Callable[[torch.Tensor], torch.Tensor]


def freeze(teacher: Any, model: torch.nn.Module, accelerator: Accelerator, spec: TeacherSpec) -> None:
    """Hold the weights of a teacher's model in its precision and fuse its attention, as the keys of ``spec`` say.

    By default both are done on CUDA, where that works. ``model`` is changed in place. The embeddings of ``teacher``
    differ in rounding at most. What a key asks for and does not work raises.
    """
    on_cuda = accelerator.device.type == "cuda"
    outputs = partial(probe_outputs, teacher, accelerator)
    if on_cuda if spec.held_weights is None else spec.held_weights:
        hold_in_precision(model, accelerator, outputs, asked=bool(spec.held_weights))
    fuses = on_cuda if spec.fused_attention is None else spec.fused_attention
    if fuses or spec.precision == "fp8":  # whose products are those of fused attention
        fuse_attention(model, accelerator, outputs, asked=bool(spec.fused_attention))


def hold_in_precision(model: torch.nn.Module, accelerator: Accelerator, outputs: Outputs, asked: bool = False) -> bool:
    """Cast the weights of products to the precision once, where autocast would do it in each pass -> whether it did.

    Norms, embeddings and the residual stream stay in float32. ``outputs`` computes a few, which must stay equal bit for
    bit; otherwise (a library may derive other data types from a weight's) the weights stay in float32.
    """
    if accelerator.dtype == torch.float32:
        if asked:
            fast_path("held_weights", asked).fall_back(f"weights need no cast in {accelerator.precision}")
        return False
    path = fast_path("held_weights", asked)
    before = outputs()
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, _PRODUCTS)
        for parameter in module.parameters(recurse=False)
    }
    weights = {
        parameter: parameter.data
        for module in model.modules()
        if isinstance(module, _PRODUCTS)
        for parameter in module.parameters(recurse=False)
        if id(parameter) not in others and parameter.dtype == torch.float32
    }
    for parameter in weights:
        parameter.data = parameter.data.to(accelerator.dtype)
    try:
        if not all(map(torch.equal, before, outputs())):
            raise ValueError("outputs would change")
        return True
    except Exception as error:  # of any library that expects float32
        for parameter, data in weights.items():
            parameter.data = data
        _fall_back(path, model, error, asked)
        return False


def fuse_attention(model: torch.nn.Module, accelerator: Accelerator, outputs: Outputs, asked: bool = False) -> bool:
    """Replace torch's attention modules by those that copy nothing between their products -> whether it did.

    They are put back if ``outputs`` changes by more than rounding: a library may read the weights of the module.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.MultiheadAttention and child.batch_first
    ]
    if not found:
        if asked:
            fast_path("fused_attention", asked).fall_back(f"{type(model).__name__} has no attention module of torch")
        return False
    path = fast_path("fused_attention", asked)
    before = outputs()
    try:
        for parent, name, child in found:
            setattr(parent, name, FrozenAttention(child, accelerator, packed=False))
        check_equal(before, outputs(), least_cosine(accelerator.precision))
        return True
    except Exception as error:  # of any library that expects another module
        for parent, name, child in found:
            setattr(parent, name, child)
        _fall_back(path, model, error, asked)
        return False


def _fall_back(path: Usage, model: torch.nn.Module, error: Exception, asked: bool) -> None:
    """Record that a path does not work, or raise if the user asked for it."""
    if asked:
        raise ValueError(f"`{path.path}: true` does not work with {type(model).__name__}: {error}") from error
    path.fall_back(f"{type(model).__name__}: {type(error).__name__}: {error}")


def least_cosine(precision: str) -> float:
    """Least cosine between the results of a fast path and those of the plain one."""
    return _COSINE_FP32 if precision == "fp32" else _COSINE


def check_equal(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], least: float) -> None:
    """Raise ValueError if the cosine between rows is below ``least``."""
    for pair in zip(before, after, strict=True):
        one, other = (values.to(widest_float(values.device)) for values in pair)
        cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=-1).min())
        if not cosine >= least:  # nor if it is NaN
            raise ValueError(f"results change (cosine {cosine:.5f}, at least {least} is required)")


def probe_outputs(teacher: Any, accelerator: Accelerator) -> list[torch.Tensor]:
    """Embeddings of two random images and of ``PROBE_TEXTS``, of the sides that a teacher has."""
    outputs = []
    if (spec := getattr(teacher, "image", None)) is not None:
        pixels = torch.randn(2, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
        outputs.append(teacher.encode_images(accelerator.put(pixels)))
    if hasattr(teacher, "encode_texts"):
        outputs.append(teacher.encode_texts(PROBE_TEXTS))
    return outputs


def use_fp8(teacher: Any, tower: torch.nn.Module, accelerator: Accelerator) -> None:
    """Compute the linear layers in the blocks of an image tower in fp8.

    ``teacher`` gets a method ``encode_images_in_bf16``, for comparison; its weights are released with it. Raises
    ValueError for a device without fp8 and a tower without such layers.
    """
    check_device(accelerator.device)
    layers = Float8Layers(_alike(tower))

    def encode_images_in_bf16(pixels: torch.Tensor) -> torch.Tensor:
        with layers.plain():
            encoded: torch.Tensor = teacher.encode_images(pixels)
            return encoded

    teacher.encode_images_in_bf16 = encode_images_in_bf16


def compile_images(
    model: Any, tower: torch.nn.Module, encode: Encode, wanted: bool | None, accelerator: Accelerator
) -> Encode:
    """``encode`` of a model, which computes ``tower`` and more of it, with the blocks of the tower compiled.

    By default (``wanted`` None) they are compiled on CUDA, if that works with the outputs of before up to rounding:
    it needs a C compiler, for example. With True, what goes wrong raises. A tower may have no such blocks.
    """
    if wanted is False or (wanted is None and accelerator.device.type != "cuda"):
        return encode
    compiler, spec = Compiler("the image tower", asked=wanted is True), model.image
    pixels = torch.randn(2, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    pixels = accelerator.layout(accelerator.put(pixels))
    fast = padded(encode, _SMALLEST_ON_CUDA if accelerator.device.type == "cuda" else _SMALLEST)
    least = _COSINE_FP8 if hasattr(model, "encode_images_in_bf16") else least_cosine(accelerator.precision)
    with accelerator.forward():
        before = encode(pixels)
        try:
            if not compile_blocks(tower, compiler):
                compiler.give_up("it has no blocks that are alike")
                return encode
            check_equal([before], [fast(pixels)], least)
            compiler.accept()
        except Exception as error:
            if wanted:
                raise
            compiler.give_up(error)
            return encode
    return fast


def compile_blocks(tower: torch.nn.Module, compiler: Compiler) -> int:
    """Compile the blocks of a tower that follow each other and are alike, such as a transformer's -> their number.

    Alike blocks share what is compiled. It fuses activations, norms and casts, to reduce memory traffic; products and
    attention stay torch's. Call the tower by ``padded``.

    Raises ValueError if this torch would compile each block on its own.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5):
        raise ValueError(f"`compile` of a teacher needs torch 2.5, and this is {torch.__version__}")
    blocks = list(_alike(tower))
    for block in blocks:
        block._compiled_call_impl = compiler.compile(block._call_impl, dynamic=False)
    return len(blocks)


def _alike(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Children of lists whose class and shapes of parameters are those of another child, outermost lists first."""
    groups: dict[Any, list[torch.nn.Module]] = defaultdict(list)
    for child in module.children():
        shapes = tuple(parameter.shape for parameter in child.parameters())
        groups[type(child), shapes].append(child)
    for (_, shapes), children in groups.items():
        if shapes and len(children) >= _MIN_BLOCKS and isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            yield from children
        else:
            for child in children:
                yield from _alike(child)


def padded(encode: Encode, smallest: int = _SMALLEST) -> Encode:
    """``encode`` of a compiled tower, for few batch sizes: powers of two from ``smallest``, a power of two.

    A batch is padded by zeros; [B, ...] -> [B, ...]. If less than ``smallest`` does not fit in the memory of the
    device, smaller sizes are used from then on.
    """
    least = smallest

    def run(batch: torch.Tensor) -> torch.Tensor:
        nonlocal least
        rows = len(batch)
        size = max(least, 1 << (rows - 1).bit_length())
        with many_shapes():
            if size == rows:
                return encode(batch)
            try:
                whole = batch.new_zeros((size, *batch.shape[1:]))
                whole[:rows] = batch
                return encode(whole)[:rows]
            except torch.OutOfMemoryError:
                least = 1 if rows < least else least
                raise

    return run

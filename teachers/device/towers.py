"""Towers made fast on CUDA: weights held in the precision, and blocks compiled for a few static shapes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from teachers.device.accelerator import Accelerator
from teachers.device.recompilation import many_shapes
from teachers.tokens.trimming import PROBE_TEXTS

_LOG = logging.getLogger(__name__)
#: Modules that do nothing with their weights but what autocast computes in its precision.
_PRODUCTS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.MultiheadAttention)
_SMALLEST = 8  # rows in a batch of a compiled tower
_MIN_BLOCKS = 2

Outputs = Callable[[], Sequence[torch.Tensor]]


def hold_in_precision(model: torch.nn.Module, accelerator: Accelerator, outputs: Outputs) -> bool:
    """Cast the weights of products to the precision once, where autocast would do it in each pass -> whether it did.

    Norms, embeddings and the residual stream stay in float32. ``outputs`` computes a few, which must stay equal bit for
    bit; otherwise (a library may derive other data types from a weight's) the weights stay in float32.
    """
    if accelerator.dtype == torch.float32:
        return False
    before = outputs()
    weights = {parameter: parameter.data for parameter in _weights_of_products(model)}
    for parameter in weights:
        parameter.data = parameter.data.to(accelerator.dtype)
    try:
        if all(map(torch.equal, before, outputs())):
            return True
        reason = "its outputs would change"
    except Exception as error:  # of any library that expects float32
        reason = f"{type(error).__name__}: {error}"
    for parameter, data in weights.items():
        parameter.data = data
    _LOG.info("weights of %s stay in float32: %s", type(model).__name__, reason)
    return False


def probe_outputs(teacher: Any, accelerator: Accelerator) -> list[torch.Tensor]:
    """Embeddings of two random images and of ``PROBE_TEXTS``, of the sides that a teacher has."""
    outputs = []
    if (spec := getattr(teacher, "image", None)) is not None:
        pixels = torch.randn(2, 3, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
        outputs.append(teacher.encode_images(accelerator.put(pixels)))
    if hasattr(teacher, "encode_texts"):
        outputs.append(teacher.encode_texts(PROBE_TEXTS))
    return outputs


def _weights_of_products(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Parameters of products that no other module shares."""
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, _PRODUCTS)
        for parameter in module.parameters(recurse=False)
    }
    found = (
        parameter
        for module in model.modules()
        if isinstance(module, _PRODUCTS)
        for parameter in module.parameters(recurse=False)
    )
    return (parameter for parameter in found if id(parameter) not in others and parameter.dtype == torch.float32)


def compile_blocks(tower: torch.nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the blocks of a tower that follow each other and are alike, such as a transformer's -> their number.

    Alike blocks share what is compiled, so it takes seconds and not minutes. It fuses activations, norms and casts,
    which bound a tower by its memory traffic; products and attention stay torch's. Call the tower by ``padded``.

    Raises ValueError if this torch would compile each block on its own.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5):
        raise ValueError(f"`compile` of a teacher needs torch 2.5, and this is {torch.__version__}")
    blocks = list(_alike(tower))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
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


def padded(encode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``encode`` of a compiled tower, for few batch sizes: powers of two from 8.

    A batch is padded by zeros; [B, ...] -> [B, ...].
    """

    def run(batch: torch.Tensor) -> torch.Tensor:
        rows = len(batch)
        size = max(_SMALLEST, 1 << (rows - 1).bit_length())
        with many_shapes():
            if size == rows:
                return encode(batch)
            whole = batch.new_zeros((size, *batch.shape[1:]))
            whole[:rows] = batch
            return encode(whole)[:rows]

    return run

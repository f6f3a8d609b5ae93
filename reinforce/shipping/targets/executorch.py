"""ExecuTorch with the XNNPACK delegate, for CPUs of Android, iOS and Linux."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from reinforce.shipping.targets.base import ExportOptions, Run, Target, Tower, row_by_row, silenced


class ExecuTorch(Target):
    title = "ExecuTorch"
    weights = ("fp32", "dynamic-int8")
    template = "export/executorch.md"

    def __init__(self) -> None:
        self._delegated: dict[Path, tuple[int, int]] = {}

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        """Write ``NAME.pte``: uint8 [1, H, W, 3] or int64 [1, context] -> float32 [1, dim]."""
        path = folder / f"{tower.name}.pte"
        with silenced(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackDynamicallyQuantizedPartitioner,
                XnnpackPartitioner,
            )
            from executorch.devtools.backend_debug import get_delegation_info
            from executorch.exir import to_edge_transform_and_lower

            example = (tower.example(1),)
            module, partitioners = tower.module, [XnnpackPartitioner()]
            if options.weights == "dynamic-int8":
                module = _quantize_products(module, example)
                partitioners = [XnnpackDynamicallyQuantizedPartitioner(), *partitioners]
            program = torch.export.export(module, example, strict=False)
            lowered = to_edge_transform_and_lower(program, partitioner=partitioners)
            info = get_delegation_info(lowered.exported_program().graph_module)
            with open(path, "wb") as file:
                lowered.to_executorch().write_to_file(file)
        self._delegated[path] = info.num_delegated_nodes, info.num_non_delegated_nodes
        return path

    def load(self, path: Path, threads: int | None = None) -> Run:
        with silenced():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            if threads is not None:
                portable_lib._unsafe_reset_threadpool(threads)  # one pool for all programs of a process
            program = Runtime.get().load_program(path)
            method = program.load_method("forward")

        def run(row: torch.Tensor) -> torch.Tensor:
            embeddings: torch.Tensor = method.execute([row.contiguous()])[0]
            return embeddings.clone()  # the runtime reuses its memory

        return row_by_row(run)

    def about(self, path: Path) -> dict[str, Any]:
        """Return how many operations XNNPACK computes; the portable kernels compute the others."""
        delegated, others = self._delegated[path]
        share = delegated / (delegated + others)
        return {"delegate": {"name": "XNNPACK", "operations": delegated, "of": delegated + others, "share": share}}


class _Pointwise(torch.nn.Module):
    """A convolution of single pixels as a matrix product."""

    def __init__(self, convolution: torch.nn.Conv2d) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(convolution.weight[:, :, 0, 0], requires_grad=False)
        self.bias = convolution.bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(pixels.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def _quantize_products(module: torch.nn.Module, example: tuple[torch.Tensor]) -> torch.nn.Module:
    """Return a graph whose matrix products have int8 weights by output, and int8 inputs with a scale computed per call.

    Convolutions of several pixels stay in fp32, as do products whose weights or bias are computed, such as those of
    attention pooling, which XNNPACK would leave to kernels that the runtime lacks.
    """
    from executorch.backends.transforms.duplicate_dynamic_quant_chain import DuplicateDynamicQuantChainPass
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Conv2d) and child.kernel_size == child.stride == (1, 1) and child.groups == 1:
                setattr(parent, name, _Pointwise(child))
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    quantizer.set_filter_function(lambda node: all(one is None or one.op == "get_attr" for one in node.args[1:]))
    graph = prepare_pt2e(torch.export.export(module, example, strict=False).module(), quantizer)
    graph(*example)
    graph = convert_pt2e(graph)
    DuplicateDynamicQuantChainPass()(graph)  # XNNPACK takes a product with the chain of its input alone
    return graph


TARGET = ExecuTorch()

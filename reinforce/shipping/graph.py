"""A tower as an ONNX file, and what onnxruntime makes of it beside torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OUTPUT = "embeddings"
#: Bytes of weights from which on they lie beside the graph: protobuf ends at 2 GB.
BESIDE = 19 * 10**8


@dataclass(frozen=True)
class Side:
    """``name`` of a tower and of its file, ``input`` of the graph, and ``rows(n)`` of real inputs for it."""

    name: str
    input: str
    tower: torch.nn.Module
    rows: Callable[[int], torch.Tensor]


def write_onnx(side: Side, path: Path, about: Mapping[str, str]) -> None:
    """Write a graph ``input`` [batch, ...] -> ``embeddings`` [batch, dim] for any batch, with ``about`` as metadata.

    Weights of 1.9 GB or more lie beside it, in ``NAME.onnx.data``. Raises ValueError.
    """
    weights = sum(value.nbytes for value in side.tower.state_dict().values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's, about torch
        try:
            program = torch.onnx.export(
                side.tower,
                (side.rows(2),),  # torch takes 0 and 1 rows for constants
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[side.input],
                output_names=[OUTPUT],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
            raise ValueError(f"torch cannot write its {side.name} tower as ONNX: {reason}") from error
    assert program is not None
    _forget_sources(program.model)
    program.model.producer_name = "reinforce"
    program.model.metadata_props.update(about)
    program.save(str(path), external_data=weights >= BESIDE)


def session(path: Path, threads: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(opened.run([OUTPUT], {name: inputs.numpy()})[0])


def largest_difference(
    path: Path, reference: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]
) -> float:
    """Between any number of an embedding in onnxruntime and in torch; infinite where one is no number."""
    run = session(path)
    largest = 0.0
    for inputs in batches:
        with torch.inference_mode():
            expected = reference(inputs)
        found = run(inputs)
        if found.shape != expected.shape or not bool(found.isfinite().all() and expected.isfinite().all()):
            return float("inf")
        largest = max(largest, float((found - expected).abs().max()))
    return largest


def _forget_sources(model: Any) -> None:
    """Drop what torch notes at every node for debugging: lines of source with the folders of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()

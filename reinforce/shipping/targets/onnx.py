"""ONNX, run by onnxruntime: graphs that take any batch size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from reinforce.shipping.targets.base import ExportOptions, Run, Target, Tower

OUTPUT = "embeddings"
#: Size in bytes from which weights are stored in a separate file: a protobuf message is limited to 2 GB.
EXTERNAL_DATA_BYTES = 19 * 10**8


class Onnx(Target):
    title = "ONNX"
    weights = ("fp32",)
    template = "export/onnx.md"

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        """Write a graph ``input`` [batch, ...] -> ``embeddings`` [batch, dim] with a dynamic batch size.

        Weights of 1.9 GB or more are written to ``NAME.onnx.data``.
        """
        path = folder / f"{tower.name}.onnx"
        weights = sum(value.nbytes for value in tower.module.state_dict().values())
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations inside torch
            try:
                program = torch.onnx.export(
                    tower.module,
                    (tower.example(2),),  # torch.export specializes on sizes 0 and 1
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    input_names=[tower.input],
                    output_names=[OUTPUT],
                    verbose=False,
                )
            except torch.onnx.OnnxExporterError as error:
                reason = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
                raise ValueError(f"torch cannot export its {tower.name} tower to ONNX: {reason}") from error
        assert program is not None
        # torch's debugging notes at each node are source lines with the paths of this machine
        model = program.model
        nodes = [*model.graph.all_nodes()]
        values = [
            *model.graph.inputs,
            *model.graph.initializers.values(),
            *(one for node in nodes for one in node.outputs),
        ]
        noted: Any
        for noted in (model, model.graph, *values, *nodes):
            noted.metadata_props.clear()
        model.producer_name = "reinforce"
        model.metadata_props["model"] = options.model
        program.save(str(path), external_data=weights >= EXTERNAL_DATA_BYTES)
        return path

    def load(self, path: Path, threads: int | None = None) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda inputs: torch.from_numpy(session.run([OUTPUT], {name: inputs.numpy()})[0])


TARGET = Onnx()

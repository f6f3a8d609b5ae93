"""OpenVINO, which runs the files of ONNX; `reinforce export latency` measures it."""

from __future__ import annotations

from pathlib import Path

import torch

from reinforce.shipping.targets.base import Run
from reinforce.shipping.targets.onnx import OUTPUT, Onnx


class OpenVino(Onnx):
    title = "OpenVINO"

    def load(self, path: Path, threads: int | None = None) -> Run:
        import openvino

        # Otherwise it computes in bf16 on processors that can.
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        return lambda inputs: torch.from_numpy(compiled({0: inputs.numpy()})[OUTPUT].copy())


TARGET = OpenVino()

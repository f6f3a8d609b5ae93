"""LiteRT (TensorFlow Lite): a flatbuffer of each tower, run by its interpreter."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from reinforce.shipping.targets.base import ExportOptions, Run, Target, Tower, row_by_row, silenced

#: `--weights` -> recipe of ai-edge-quantizer.
_RECIPES = {"int8": "weight_only_wi8_afp32", "dynamic-int8": "dynamic_wi8_afp32"}


class LiteRt(Target):
    title = "LiteRT"
    weights = ("fp32", *_RECIPES)
    template = "export/litert.md"

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        """Write ``NAME.tflite``: uint8 [1, H, W, 3] or int32 [1, context] -> float32 [1, dim]."""
        path = folder / f"{tower.name}.tflite"
        with silenced(), tempfile.TemporaryDirectory(prefix="reinforce-litert-") as temporary:
            if options.weights == "fp32":
                _write(tower, path)
                return path
            from ai_edge_quantizer import quantizer, recipe

            whole = options.whole or Path(temporary, path.name)
            if not options.whole:
                _write(tower, whole)
            quantized = quantizer.Quantizer(str(whole), getattr(recipe, _RECIPES[options.weights])()).quantize()
            quantized.export_model(str(path))
        return path

    def load(self, path: Path, threads: int | None = None) -> Run:
        with silenced():
            from ai_edge_litert.interpreter import Interpreter

            interpreter = Interpreter(str(path), num_threads=threads)
            interpreter.allocate_tensors()
        given, made = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

        def run(row: torch.Tensor) -> torch.Tensor:
            interpreter.set_tensor(given, _narrow(row).numpy())
            interpreter.invoke()
            return torch.from_numpy(interpreter.get_tensor(made))

        return row_by_row(run)


def _write(tower: Tower, path: Path) -> None:
    import litert_torch

    litert_torch.convert(tower.module, sample_kwargs={tower.input: _narrow(tower.example(1))}).export(str(path))


def _narrow(inputs: torch.Tensor) -> torch.Tensor:
    """Tokens as int32: LiteRT has no operator that finds the end of text among int64."""
    return inputs.int() if inputs.dtype == torch.int64 else inputs


TARGET = LiteRt()

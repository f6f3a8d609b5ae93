"""Core ML: two packages with the interface of the app of MobileCLIP's authors.

Elsewhere than on macOS, saved packages are executed by the interpreter of ``targets/mil.py``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from reinforce.shipping.targets.base import BOTH, ExportOptions, Run, Target, Tower, row_by_row
from reinforce.shipping.targets.mil import Interpreter

OUTPUT = "final_emb_1"
#: The app's models by the side of their square pictures; their packages are called mobileclip_MODEL_image and _text.
_APP_MODELS = {256: "s0", 224: "blt"}
_APP_CONTEXT = 77
_A_PHOTO_OF_A_CAT = [49406, 320, 1125, 539, 320, 2368, 49407]
#: Operations in float32: 1e-12, the smallest norm, is zero in float16, and the sum of squares may exceed its range.
_FLOAT32 = {"reduce_l2_norm", "maximum", "tile", "real_div", "sub"}
_PALETTE, _PALETTE_STEPS = 2**6, 100
_HAS_CORE_ML = platform.system() == "Darwin"


class CoreMl(Target):
    title = "Core ML"
    weights = ("fp16", "int8", "palettised")
    template = "export/coreml.md"
    executor = None if _HAS_CORE_ML else "an interpreter of the package's operations (Core ML needs macOS)"

    def __init__(self) -> None:
        self._programs: dict[str, Any] = {}  # torch.export is slow: what `refuse` looked at is what `convert` takes
        self._name = "model"

    def refuse(self, towers: Sequence[Tower], options: ExportOptions) -> None:
        if options.app_names and options.tower != BOTH:
            raise ValueError("the authors' app needs both towers: leave out --tower image, or --names app")
        self._name = f"mobileclip_{_app_model(towers)}" if options.app_names else options.model
        self._programs = {tower.name: _export(tower) for tower in towers}
        for name, program in self._programs.items():
            missing = _unsupported(program)
            if missing:
                raise ValueError(
                    f"its {name} tower has operations that coremltools lacks: {', '.join(missing)}"
                    + "; --tower image exports the image tower alone" * (name == "text")
                )

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        program = self._programs.pop(tower.name, None) or _export(tower)
        name = re.sub(r"[^A-Za-z0-9]", "_", self._name)  # Xcode makes a class of it
        path = folder / f"{name}_{tower.name}.mlpackage"
        with _quiet():
            model = _compress(_convert(tower, program), options.weights)
            model.author = "reinforce"
            model.short_description = f"{tower.name} tower of {options.model}, {options.weights} weights"
            model.save(str(path))
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
        return path

    def load(self, path: Path, threads: int | None = None) -> Run:
        with _quiet():
            if _HAS_CORE_ML:
                return row_by_row(_load_core_ml(path))
            run = Interpreter(path)
            of_image = run.input == "image"
            return row_by_row(lambda row: run(row.permute(0, 3, 1, 2).float() if of_image else row))


class _Pixels(torch.nn.Module):
    """Pixels between 0 and 1, [1, 3, height, width], as a package has them after its scale -> embeddings."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.tower.encode(image)


def _app_model(towers: Sequence[Tower]) -> str:
    """Return the app's model that the towers can replace. Raises ValueError if there is none."""
    images, tokens = (tower.example(1) for tower in towers)
    height, width = images.shape[1:3]
    if height != width or width not in _APP_MODELS:
        raise ValueError(f"the authors' app has pictures of 256 x 256 or 224 x 224, not {height} x {width}")
    if tokens.shape[1] != _APP_CONTEXT:
        raise ValueError(f"the authors' app has texts of {_APP_CONTEXT} tokens, not {tokens.shape[1]}")
    if tokens[0, : len(_A_PHOTO_OF_A_CAT)].tolist() != _A_PHOTO_OF_A_CAT:
        raise ValueError("the authors' app has CLIP's tokenizer, and the model has another")
    return _APP_MODELS[width]


def _export(tower: Tower) -> Any:
    example = tower.example(1)
    module: torch.nn.Module
    if tower.name == "image":
        module, inputs = _Pixels(tower.module).eval(), example.permute(0, 3, 1, 2).contiguous() / 255
    else:
        module, inputs = tower.module, example.to(torch.int32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside torch
        try:
            program = torch.export.export(module, (inputs,), strict=False).run_decompositions({})
        except Exception as error:  # torch raises dozens of kinds
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(f"torch cannot export its {tower.name} tower: {reason}") from error
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # which coremltools lacks
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def _unsupported(program: Any) -> list[str]:
    """Return the operations of a program that coremltools cannot convert."""
    with _quiet():
        from coremltools.converters.mil.frontend.torch.torch_op_registry import is_torch_fx_node_supported

        missing = set()
        for node in program.graph.nodes:
            if node.op == "call_function":
                try:
                    lacks = not is_torch_fx_node_supported(node)
                except AssertionError:  # an operation in place
                    lacks = True
                if lacks:
                    missing.add(str(node.target))
        return sorted(missing)


def _convert(tower: Tower, program: Any) -> Any:
    import coremltools as ct

    if tower.name == "image":
        _, height, width, _ = tower.example(1).shape
        given = ct.ImageType("image", shape=(1, 3, height, width), scale=1 / 255, color_layout=ct.colorlayout.RGB)
    else:
        given = ct.TensorType("text", shape=tuple(tower.example(1).shape), dtype=np.int32)
    return ct.convert(
        program,
        inputs=[given],
        outputs=[ct.TensorType(OUTPUT, dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.transform.FP16ComputePrecision(op_selector=lambda one: one.op_type not in _FLOAT32),
        skip_model_load=True,
    )


def _compress(model: Any, weights: str) -> Any:
    if weights == "fp16":
        return model
    from coremltools.optimize import coreml as optimize

    if weights == "int8":
        config = optimize.OptimizationConfig(optimize.OpLinearQuantizerConfig(mode="linear_symmetric"))
        return optimize.linear_quantize_weights(model, config)
    config = optimize.OptimizationConfig(optimize.OpPalettizerConfig(mode="custom", lut_function=_palette))
    return optimize.palettize_weights(model, config)


def _palette(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 64 values by k-means, and for each weight its index. coremltools' own k-means needs scikit-learn."""
    values = np.sort(weights, axis=None).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    share = (np.arange(_PALETTE) + 0.5) / _PALETTE
    palette = (np.quantile(values, share) + values[0] + share * (values[-1] - values[0])) / 2
    for _ in range(_PALETTE_STEPS):
        edges = np.concatenate([[0], np.searchsorted(values, (palette[1:] + palette[:-1]) / 2), [len(values)]])
        counts = np.diff(edges)
        palette = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), palette)
    indices = np.searchsorted((palette[1:] + palette[:-1]) / 2, weights)
    return palette.astype(weights.dtype), indices.astype(np.uint8)


def _load_core_ml(path: Path) -> Run:
    import coremltools as ct

    model = ct.models.MLModel(str(path))
    (name,) = (one.name for one in model.get_spec().description.input)

    def run(row: torch.Tensor) -> torch.Tensor:
        given = Image.fromarray(row[0].numpy()) if name == "image" else row.numpy().astype(np.int32)
        return torch.from_numpy(np.asarray(model.predict({name: given})[OUTPUT], np.float32))

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and warnings of coremltools away from the terminal."""
    level, logging.root.manager.disable = logging.root.manager.disable, logging.ERROR
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.manager.disable = level


TARGET = CoreMl()

"""``reinforce export onnx``, ``coreml`` and others: a model for a runtime, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reinforce.cli.common import examples
from reinforce.errors import UserError

if TYPE_CHECKING:
    from reinforce.evaluation.config import Evaluation

export = typer.Typer(
    no_args_is_help=True,
    **examples("reinforce export onnx demo/students/distilled"),
    help="Export a model to run without torch and open_clip, or a dataset for other programs.",
)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder or URL that a training wrote, local-dir:PATH, NAME,TAG of open_clip, or hf-hub:ORG/REPO.",
    ),
]
Output = Annotated[
    str | None,
    typer.Argument(metavar="[OUTPUT]", help="New folder or fsspec URL. Default: the name of MODEL with the command's."),
]
Pretrained = Annotated[
    str | None, typer.Option(metavar="TAG", help="Tag or checkpoint of a model given by NAME alone.")
]
MinCosine = Annotated[
    float,
    typer.Option(min=-1, max=1, help="Smallest cosine to the trained model's embeddings; worse exports are refused."),
]
Config = Annotated[
    Path | None, typer.Option(help="YAML config whose `evaluate` section defines sets that both models are tested on.")
]
ZeroShot = Annotated[
    list[str] | None, typer.Option(metavar="NAME=URL", help="Images with classes, to test both models on; repeatable.")
]
Retrieval = Annotated[
    list[str] | None, typer.Option(metavar="NAME=URL", help="Images with captions, to test both models on; repeatable.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Number of images of each set of the command line.")]
Check = Annotated[
    bool, typer.Option("--check", help="MODEL is a folder that this command wrote: run its golden.json in the runtime.")
]


@export.command("onnx", **examples("reinforce export onnx demo/students/distilled --output demo/onnx"))
def export_onnx(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    folder: Annotated[str | None, typer.Option("--output", metavar="FOLDER", help="The same as OUTPUT.")] = None,
    min_cosine: MinCosine = 0.99, config: Config = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, check: Check = False,
) -> None:  # fmt: skip
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json, golden.json, and a README.md with an example.

    The towers take any batch size, and are reparameterised where the model supports it.

    Their outputs are compared with torch's before the folder is published.

    Requires: pip install -e '.\\[export]', in the checkout
    """
    if output and folder:
        raise UserError("OUTPUT and --output are the same: give one of them.")
    sets = config, zero_shot, retrieval, limit
    _export("onnx", model, output or folder, pretrained, "fp32", min_cosine, sets, check)


@export.command("coreml", **examples("reinforce export coreml demo/students/distilled demo/coreml"))
def export_coreml(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    weights: Annotated[
        Literal["fp16", "int8", "palettised"], typer.Option(help="How weights are stored; palettised: 6 bits.")
    ] = "fp16",
    names: Annotated[
        Literal["model", "app"], typer.Option(help="app: packages get the names of the app of MobileCLIP's authors.")
    ] = "model",
    min_cosine: MinCosine = 0.99, config: Config = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, check: Check = False,
) -> None:  # fmt: skip
    """Write two Core ML packages for iOS 17, with tokenizer.json, preprocess.json, golden.json and a README.md.

    On macOS, packages are compared with torch in Core ML; elsewhere by an interpreter of their operations.

    Requires: pip install -e '.\\[coreml]', in the checkout
    """
    sets = config, zero_shot, retrieval, limit
    _export("coreml", model, output, pretrained, weights, min_cosine, sets, check, names == "app")


@export.command("litert", **examples("reinforce export litert demo/students/distilled demo/litert"))
def export_litert(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    weights: Annotated[
        Literal["fp32", "int8", "dynamic-int8"],
        typer.Option(help="How weights are stored; dynamic-int8 also computes in int8, with scales found at run time."),
    ] = "fp32",
    min_cosine: MinCosine = 0.99, config: Config = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, check: Check = False,
) -> None:  # fmt: skip
    """Write image.tflite and text.tflite, with tokenizer.json, preprocess.json, golden.json and a README.md.

    LiteRT's interpreter runs them, and its embeddings are compared with torch's.

    Requires: pip install -e '.\\[litert]', in an environment of its own: its packages need older ones of others
    """
    sets = config, zero_shot, retrieval, limit
    _export("litert", model, output, pretrained, weights, min_cosine, sets, check)


@export.command("executorch", **examples("reinforce export executorch demo/students/distilled demo/executorch"))
def export_executorch(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    weights: Annotated[
        Literal["fp32", "dynamic-int8"],
        typer.Option(help="dynamic-int8: matrix products in int8, with scales of their inputs found at run time."),
    ] = "fp32",
    min_cosine: MinCosine = 0.99, config: Config = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, check: Check = False,
) -> None:  # fmt: skip
    """Write image.pte and text.pte for XNNPACK, with tokenizer.json, preprocess.json, golden.json and a README.md.

    ExecuTorch's runtime runs them, and its embeddings are compared with torch's.

    Requires: pip install -e '.\\[executorch]', in the checkout
    """
    sets = config, zero_shot, retrieval, limit
    _export("executorch", model, output, pretrained, weights, min_cosine, sets, check)


def _export(
    target: str,
    model: str,
    output: str | None,
    pretrained: str | None,
    weights: str,
    min_cosine: float,
    sets: tuple[Path | None, list[str] | None, list[str] | None, int | None],
    check: bool,
    app_names: bool = False,
) -> None:
    """Export a model, or check an exported folder."""
    from reinforce.model_names import resolve_models, short_name
    from reinforce.shipping.packages import require_packages

    require_packages(target)
    from reinforce.shipping.export import check_export, export_model
    from reinforce.shipping.targets.base import ExportOptions

    if check:
        for line in check_export(target, model, min_cosine):
            typer.echo(line)
        return
    name = short_name(model)
    options = ExportOptions(name, weights, app_names)
    evaluation = _evaluation(*sets)
    with resolve_models([model], pretrained) as specs:
        output = output or f"{name}-{target}"
        result = export_model(target, model, specs[model], output, options, min_cosine, evaluation)
    for line in result.lines():
        typer.echo(line)


def _evaluation(
    config: Path | None, zero_shot: list[str] | None, retrieval: list[str] | None, limit: int | None
) -> Evaluation | None:
    if not (config or zero_shot or retrieval):
        return None
    from reinforce.evaluation.command import build_evaluation

    return build_evaluation(config, zero_shot or [], retrieval or [], {}, limit, None)

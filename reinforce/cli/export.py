"""``reinforce export`` and ``publish``: models for runtimes, datasets for other programs, and both for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from reinforce.cli.common import (
    STDOUT,
    Address,
    DatasetUrl,
    ImagesFrom,
    JsonFile,
    Limit,
    NoRay,
    Pretrained,
    Retrieval,
    SetsConfig,
    ViewName,
    ZeroShot,
    examples,
    only_json,
    print_lines,
    show_report,
    split_names,
)
from reinforce.errors import UserError
from reinforce.processes.imports import require
from reinforce.terminal import escape

export = typer.Typer(
    no_args_is_help=True,
    **examples("reinforce export onnx demo/students/distilled"),
    help="Export a model to run without torch and open_clip, with its latency, or a dataset for other programs.",
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
    typer.Argument(metavar="[OUTPUT]", help="New folder or fsspec URI. Default: the name of MODEL with the command's."),
]
MinCosine = Annotated[
    float,
    typer.Option(min=-1, max=1, help="Smallest cosine to the trained model's embeddings; worse exports are refused."),
]
Check = Annotated[
    bool, typer.Option("--check", help="MODEL is a folder that this command wrote: run its golden.json in the runtime.")
]
TowerName = Annotated[
    Literal["both", "image"], typer.Option("--tower", help="image: the image tower alone, without tokenizer.")
]
Licence = Annotated[
    str, typer.Option("--license", metavar="ID", help="Hugging Face's name of the licence, such as cc-by-4.0.")
]
OutputUrl = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or fsspec URI to write to.")]


@export.command("onnx", **examples("reinforce export onnx demo/students/distilled --output demo/onnx"))
def export_onnx(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    folder: Annotated[str | None, typer.Option("--output", metavar="FOLDER", help="The same as OUTPUT.")] = None,
    min_cosine: MinCosine = 0.99, config: SetsConfig = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, tower: TowerName = "both", check: Check = False,
) -> None:  # fmt: skip
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json, golden.json, and a README.md with an example.

    The towers take any batch size, and are reparameterised where the model supports it.

    Their outputs are compared with torch's before the folder is published.

    Requires: pip install -e '.\\[export]', in the checkout
    """
    if output and folder:
        raise UserError("OUTPUT and --output are the same: give one of them.")
    sets = config, zero_shot, retrieval, limit
    _export("onnx", model, output or folder, pretrained, "fp32", min_cosine, sets, check, tower)


@export.command("coreml", **examples("reinforce export coreml demo/students/distilled demo/coreml"))
def export_coreml(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    weights: Annotated[
        Literal["fp16", "int8", "palettised"], typer.Option(help="How weights are stored; palettised: 6 bits.")
    ] = "fp16",
    names: Annotated[
        Literal["model", "app"], typer.Option(help="app: packages get the names of the app of MobileCLIP's authors.")
    ] = "model",
    min_cosine: MinCosine = 0.99, config: SetsConfig = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, tower: TowerName = "both", check: Check = False,
) -> None:  # fmt: skip
    """Write two Core ML packages for iOS 17, with tokenizer.json, preprocess.json, golden.json and a README.md.

    On macOS, packages are compared with torch in Core ML; elsewhere by an interpreter of their operations.

    Requires: pip install -e '.\\[coreml]', in the checkout
    """
    sets = config, zero_shot, retrieval, limit
    _export("coreml", model, output, pretrained, weights, min_cosine, sets, check, tower, names == "app")


@export.command("litert", **examples("reinforce export litert demo/students/distilled demo/litert"))
def export_litert(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    weights: Annotated[
        Literal["fp32", "int8", "dynamic-int8"],
        typer.Option(help="How weights are stored; dynamic-int8 also computes in int8, with scales found at run time."),
    ] = "fp32",
    min_cosine: MinCosine = 0.99, config: SetsConfig = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, tower: TowerName = "both", check: Check = False,
) -> None:  # fmt: skip
    """Write image.tflite and text.tflite, with tokenizer.json, preprocess.json, golden.json and a README.md.

    LiteRT's interpreter runs them, and its embeddings are compared with torch's.

    Requires: pip install -e '.\\[litert]', in an environment of its own: its packages need older ones of others
    """
    sets = config, zero_shot, retrieval, limit
    _export("litert", model, output, pretrained, weights, min_cosine, sets, check, tower)


@export.command("executorch", **examples("reinforce export executorch demo/students/distilled demo/executorch"))
def export_executorch(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    weights: Annotated[
        Literal["fp32", "dynamic-int8"],
        typer.Option(help="dynamic-int8: matrix products in int8, with scales of their inputs found at run time."),
    ] = "fp32",
    min_cosine: MinCosine = 0.99, config: SetsConfig = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, tower: TowerName = "both", check: Check = False,
) -> None:  # fmt: skip
    """Write image.pte and text.pte for XNNPACK, with tokenizer.json, preprocess.json, golden.json and a README.md.

    ExecuTorch's runtime runs them, and its embeddings are compared with torch's.

    Requires: pip install -e '.\\[executorch]', in the checkout
    """
    sets = config, zero_shot, retrieval, limit
    _export("executorch", model, output, pretrained, weights, min_cosine, sets, check, tower)


@export.command("transformers", **examples("reinforce export transformers demo/students/distilled demo/transformers"))
def export_transformers(
    model: Model, output: Output = None, pretrained: Pretrained = None,
    min_cosine: MinCosine = 0.99, config: SetsConfig = None, zero_shot: ZeroShot = None, retrieval: Retrieval = None,
    limit: Limit = None, tower: TowerName = "both", check: Check = False,
) -> None:  # fmt: skip
    """Write a folder that transformers loads: model.safetensors, config.json, an image processor and a tokenizer.

    A ViT with a text tower of CLIP becomes a CLIPModel, other towers a VisionTextDualEncoderModel where it can.

    What transformers cannot compute is refused with the reason.
    """
    sets = config, zero_shot, retrieval, limit
    _export("transformers", model, output, pretrained, "fp32", min_cosine, sets, check, tower)


def _export(
    target: str,
    model: str,
    output: str | None,
    pretrained: str | None,
    weights: str,
    min_cosine: float,
    sets: tuple[Path | None, list[str] | None, list[str] | None, int | None],
    check: bool,
    tower: str,
    app_names: bool = False,
) -> None:
    """Export a model, or check an exported folder."""
    from reinforce.evaluation.model_names import resolve_models, short_name
    from reinforce.shipping.packages import require_packages

    require_packages(target)
    from reinforce.shipping.export import check_export, export_model
    from reinforce.shipping.targets.base import ExportOptions

    if check:
        for line in check_export(target, model, min_cosine):
            typer.echo(line)
        return
    name = short_name(model)
    options = ExportOptions(name, weights, app_names, tower)
    config, zero_shot, retrieval, limit = sets
    evaluation = None
    if config or zero_shot or retrieval:
        from reinforce.evaluation.command import build_evaluation

        evaluation = build_evaluation(config, zero_shot or [], retrieval or [], limit)
    with resolve_models([model], pretrained, images_alone=True) as specs:
        output = output or f"{name}-{target}"
        result = export_model(target, model, specs[model], output, options, min_cosine, evaluation)
    for line in result.lines():
        typer.echo(line)


@export.command("datacompdr", **examples("reinforce export datacompdr demo/dataset demo/datacompdr --precision bf16"))
def export_datacompdr(
    dataset: DatasetUrl,
    output: OutputUrl,
    teachers: Annotated[
        str | None, typer.Option(metavar="A,B", help="Teachers, whose dimensions follow each other. Default: all.")
    ] = None,
    captioners: Annotated[str | None, typer.Option(metavar="A,B", help="Captioners. Default: all.")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="fp32 vectors in .npz, or bf16 vectors in .pth.gz.")
    ] = "fp32",
    images: Annotated[bool, typer.Option(help="Write the images, too.")] = True,
    images_from: ImagesFrom = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Also export records of the augmentation backend fixed-point-1.")
    ] = False,
    layout: Annotated[
        Literal["datacompdr", "dfndr"],
        typer.Option(help="dfndr: without images, true captions and JSON, joined by URL alone, as DFNDR is published."),
    ] = "datacompdr",
    view: ViewName = None,
    address: Address = None,
    no_ray: NoRay = False,
) -> None:
    """Write a dataset as tars in the format of DataCompDR, one for each shard, and a config.json.

    The trainer of ml-mobileclip reads them, and so does `reinforcements` of `reinforce run`.

    Finished tars are kept: the same command resumes an export.
    """
    from reinforce.publishing.datacompdr import export_datacompdr as write

    result = write(
        dataset, output, teachers=split_names(teachers), captioners=split_names(captioners), precision=precision,
        images=images, images_from=images_from or (), approximate=approximate, layout=layout, view=view,
        use_ray=not no_ray, address=address,
    )  # fmt: skip
    print_lines(result.lines())


@export.command(
    "embeddings",
    **examples(
        "reinforce export embeddings demo/dataset demo/vectors --teacher conv-64",
        "reinforce export embeddings demo/dataset demo/vectors --teacher conv-64 --texts coca",
    ),
)
def export_embeddings(
    dataset: DatasetUrl,
    output: OutputUrl,
    teacher: Annotated[str | None, typer.Option(help="Whose vectors. Default: the only teacher.")] = None,
    texts: Annotated[
        str, typer.Option(metavar="NAME", help="`caption` (the true one), a captioner, or `none`.")
    ] = "caption",
    image: Annotated[
        str, typer.Option(metavar="N", help="Number of the augmentation, or `average` of all.")
    ] = "average",
    text: Annotated[str, typer.Option(metavar="N", help="Number of the caption, or `average` of all.")] = "0",
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Of the stored vectors.")] = "float16",
    view: ViewName = None,
    address: Address = None,
    no_ray: NoRay = False,
) -> None:
    """Write the vectors of a teacher as clip-retrieval and autofaiss read them: img_emb, text_emb and metadata.

    Finished parts are kept: the same command resumes an export.
    """
    from reinforce.publishing.embeddings import export_embeddings as write

    result = write(
        dataset, output, teacher=teacher, texts=texts, image=_number("--image", image), text=_number("--text", text),
        dtype=dtype, view=view, use_ray=not no_ray, address=address,
    )  # fmt: skip
    print_lines(result.lines())


@export.command(
    "labels",
    **examples(
        "reinforce export labels demo/dataset demo/labels",
        "reinforce export labels demo/dataset demo/captions --layers captions --no-urls",
    ),
)
def export_labels(
    dataset: DatasetUrl,
    output: OutputUrl,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Layers, or folders of these such as embeddings/dfn2b, with `*`. Default: all."
        ),
    ] = None,
    identities: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="What is published of each image: uid, sha256, digest, url. Default: all."),
    ] = None,
    urls: Annotated[bool, typer.Option("--urls/--no-urls", help="Publish URLs.")] = True,
    license_: Licence = "unknown",
    view: ViewName = None,
    address: Address = None,
    no_ray: NoRay = False,
) -> None:
    """Write layers without images, so that others join them with their own copy of the images, by identity.

    The labels are a dataset: all commands read them, and `labels` of `reinforce run` uses them.

    Finished files are kept: the same command continues an export, and adds what is new in the dataset.
    """
    from reinforce.publishing.labels import export_labels as write

    result = write(
        dataset, output, layers=split_names(layers), identities=split_names(identities), urls=urls, licence=license_,
        view=view, use_ray=not no_ray, address=address,
    )  # fmt: skip
    print_lines(result.lines())


def _number(option: str, value: str) -> int | Literal["average"]:
    if value == "average":
        return "average"
    if not value.isdecimal():
        raise typer.BadParameter(f"{option}: {value!r} is neither a number nor `average`")
    return int(value)


@export.command("latency", **examples("reinforce export latency MobileCLIP2-S0 ViT-B-32 --threads 1"))
def latency(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Names of open_clip, local-dir:PATH, or folders that trainings wrote."),
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Measurements per tower; the towers take turns.")] = 20,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads, pinned to as many cores. Default: torch's, one per core, not pinned."),
    ] = None,
    clock: Annotated[
        Literal["wall", "process"],
        typer.Option(help="wall: elapsed time; process: CPU time of all threads, for a machine that is not idle."),
    ] = "wall",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Measured next to torch in eager mode: onnxruntime, openvino, litert, litert-int8, "
            "litert-dynamic-int8, executorch, executorch-dynamic-int8, or all that are installed; repeatable.",
        ),
    ] = None,
    onnx_: Annotated[bool, typer.Option("--onnx", help="The same as --runtime onnxruntime.")] = False,
    image_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Measure every model at this image size; repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images or texts of a forward pass; the table is for one.")] = 1,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw ImageNet-1k zero-shot accuracy over latency, as PNG.")
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Of `evaluate --suite --out`: accuracies of models that are not published."
        ),
    ] = None,
    json_: JsonFile = None,
) -> None:
    """Compare sizes, operations and latency of models in runtimes, one image or text at a time, on this machine's CPU.

    The architectures are measured with random weights, reparameterised as for export; nothing is downloaded.

    The towers of all models and runtimes take turns. No latency of a phone is measured or estimated.
    """
    from reinforce.evaluation.model_names import resolve_models
    from reinforce.shipping.packages import choose_runtimes

    if picture is not None:
        require("report", "--picture", "matplotlib")
    elif results is not None:
        raise UserError("--results belongs to --picture, which is not given.")
    names = [name for given in runtime or () for name in given.split(",")]
    runtimes, missing = choose_runtimes([*names, *(["onnxruntime"] if onnx_ else [])])
    from reinforce.shipping.latency import find_accuracies, measure_latency, sized_names

    sizes = image_size or []
    accuracies = {} if picture is None else find_accuracies([*sized_names(models, sizes)], results)
    with only_json(json_ == STDOUT) as print_json:
        for line in missing:
            typer.echo(line, err=True)
        with resolve_models(models, weights=False) as specs:
            report = measure_latency(
                specs, rounds=rounds, threads=threads, runtimes=runtimes, clock=clock, image_sizes=sizes, batch=batch
            )  # fmt: skip
        show_report(report, json_, print_json)
    if picture is not None:
        report.draw(accuracies, picture)


publish = typer.Typer(
    no_args_is_help=True,
    **examples(
        "reinforce publish model demo/students/distilled demo/published",
        "reinforce publish card demo/dataset --license cc-by-4.0",
    ),
    help="Publish a model on the Hub of Hugging Face, with a card that says what it was trained from, or write "
    "the card of a dataset.",
)


@publish.command("card", **examples("reinforce publish card demo/dataset --license cc-by-4.0"))
def card(
    dataset: DatasetUrl,
    output: Annotated[
        str | None, typer.Argument(metavar="[OUTPUT]", help="Folder or fsspec URI. Default: that of the dataset.")
    ] = None,
    license_: Licence = "unknown",
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that somebody else has written.")] = False,
) -> None:
    """Write README.md, by which Hugging Face's `datasets` and its viewer read every layer of a dataset.

    Write it again after a run has added shards or layers: it has their numbers.
    """
    from reinforce.publishing.card import write_card

    typer.echo(escape(f"written: {write_card(dataset, output, license_, force)}"))


@publish.command(
    "model",
    **examples(
        "reinforce publish model demo/students/distilled demo/published",
        "reinforce publish model runs/s0 hf://ORG/NAME --license mit",
    ),
)
def publish_model(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output of a training, or the folder of a model.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="hf://ORG/NAME, or a new folder or fsspec URI.")],
    license_: Licence = "unknown",
    licenses: Annotated[
        list[str] | None,
        typer.Option("--license-of", metavar="NAME=ID", help="Licence of a teacher, captioner or dataset; repeatable."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that somebody else has written.")] = False,
) -> None:
    """Write a model for reinforce.Student.load and open_clip, and its card: sources, licences, evaluation, loading.

    Paths of this machine are left out. A repository gets all files in one commit, or none.
    """
    from reinforce.publishing.model import publish_model as write

    given = dict(one.partition("=")[::2] for one in licenses or ())
    if not all(given.values()):
        raise UserError(f"--license-of takes NAME=ID, such as dfn2b=apple-amlr; got {' '.join(licenses or ())}.")
    print_lines(write(run, output, license_, given, private, force).lines())

"""``reinforce export datacompdr`` and ``embeddings``: datasets in the formats of other programs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from reinforce.cli.common import Address, DatasetUrl, ImagesFrom, NoRay, ViewName, examples, print_lines, split_names
from reinforce.cli.export_models import export
from reinforce.terminal import escape

Licence = Annotated[
    str, typer.Option("--license", metavar="ID", help="Hugging Face's name of the licence, such as cc-by-4.0.")
]
OutputUrl = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or fsspec URL to write to.")]


@export.command(
    "datacompdr",
    **examples("reinforce export datacompdr demo/dataset demo/datacompdr --precision bf16"),
)
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
    images_from: ImagesFrom = None,
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
        images_from=images_from or (), view=view, use_ray=not no_ray, address=address,
    )  # fmt: skip
    print_lines(result.lines())


def _number(option: str, value: str) -> int | Literal["average"]:
    if value == "average":
        return "average"
    if not value.isdecimal():
        raise typer.BadParameter(f"{option}: {value!r} is neither a number nor `average`")
    return int(value)


def card(
    dataset: DatasetUrl,
    output: Annotated[
        str | None, typer.Argument(metavar="[OUTPUT]", help="Folder or fsspec URL. Default: that of the dataset.")
    ] = None,
    license_: Licence = "unknown",
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that somebody else has written.")] = False,
) -> None:
    """Write README.md, by which Hugging Face's `datasets` and its viewer read every layer of a dataset.

    Write it again after a run has added shards or layers: it has their numbers.
    """
    from reinforce.publishing.card import write_card

    typer.echo(escape(f"written: {write_card(dataset, output, license_, force)}"))

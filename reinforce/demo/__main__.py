"""python -m reinforce.demo data | models | show: the steps of `make demo` around `reinforce run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reinforce.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def data(out: Annotated[Path, typer.Option(help="folder for the shards")] = Path("demo/shards")) -> None:
    """Write the demo's shards: emoji with captions."""
    from reinforce.demo.data import write_shards

    paths = write_shards(out)
    print(f"data: {len(paths)} shards in {out} (Twemoji, CC-BY 4.0, see {out / 'CREDITS.txt'})")


@app.command()
def concepts(
    style: Annotated[str, typer.Option(help="who drew them: twemoji or openmoji")] = "openmoji",
    out: Annotated[Path, typer.Option(help="folder for the shards")] = Path("demo/openmoji"),
) -> None:
    """Write the emoji that students are asked to name, in one style, with class and group beside the caption."""
    from reinforce.demo.data import write_concepts
    from reinforce.demo.styles import STYLES

    if style not in STYLES:
        raise UserError(f"--style {style}: want one of {', '.join(STYLES)}")
    paths = write_concepts(out, style)
    print(f"concepts: {len(paths)} shards of {style} in {out} (authors and licence: {out / 'CREDITS.txt'})")


@app.command()
def models(
    out: Annotated[Path, typer.Option(help="folder for the models")] = Path("demo/models"),
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Write the demo's teachers and captioner."""
    from reinforce.demo.models import write_models

    folders = write_models(out, seed)
    print(f"models: {', '.join(folder.name for folder in folders)} in {out}")
    print("models: weights are random until trained ones exist, so embeddings and captions mean nothing yet")


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="the reinforced dataset")] = "demo/dataset",
    picture: Annotated[Path, typer.Option(help="where the contact sheet goes")] = Path("demo/sample.png"),
) -> None:
    """Show what a run wrote, and draw some of it."""
    from reinforce.demo.show import show_dataset

    show_dataset(dataset, picture)


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None

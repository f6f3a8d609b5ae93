"""python -m reinforce.demo COMMAND: the steps of `make demo` and `make demo-teachers` beside the program's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reinforce.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="folder for the student's shards")] = Path("demo/shards"),
    tests: Annotated[Path, typer.Option(help="folder for what students are judged by")] = Path("demo/tests"),
) -> None:
    """Write the demo's shards: emoji with captions to learn from, and others to be judged by."""
    from reinforce.demo.data import write_shards, write_tests

    paths = write_shards(out)
    print(f"data: {len(paths)} shards in {out} (Twemoji, CC-BY 4.0, see {out / 'CREDITS.txt'})")
    paths = write_tests(tests)
    print(f"data: {len(paths)} shards in {tests} (OpenMoji, CC BY-SA 4.0), which no student learns from")


@app.command()
def lessons(
    out: Annotated[Path, typer.Option(help="folder for the shards")] = Path("demo/lessons"),
    fetched: Annotated[Path, typer.Option(help="folder for what npm brings")] = Path("demo/npm"),
) -> None:
    """Write what the demo's teachers learn from: eight styles, six of which npm fetches."""
    from reinforce.demo.lessons import write_lessons

    paths = write_lessons(out, fetched)
    print(f"lessons: {len(paths)} shards in {out} (authors and licences: CREDITS.txt in each folder)")


@app.command()
def blanks(
    lessons: Annotated[Path, typer.Option(help="folder of the shards whose captions make the vocabulary")] = Path(
        "demo/lessons"
    ),
    out: Annotated[Path, typer.Option(help="folder for the models")] = Path("demo/blanks"),
) -> None:
    """Write the demo's teachers and captioner as their trainings start."""
    from reinforce.demo.models import write_blanks

    folders = write_blanks(out, lessons)
    print(f"blanks: {', '.join(folder.name for folder in folders)} in {out}, which know nothing yet")


@app.command()
def keep(
    trained: Annotated[Path, typer.Argument(help="an exported model, such as demo/teachers/conv-64/student")],
    folder: Annotated[Path, typer.Argument(help="where it goes, such as configs/demo-models/conv-64")],
) -> None:
    """Copy a trained model in float16, to be committed."""
    from reinforce.demo.models import keep

    print(f"keep: {folder}, {keep(trained, folder) / 1e6:.1f} MB of weights")


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="the reinforced dataset")] = "demo/dataset",
    picture: Annotated[Path, typer.Option(help="where the contact sheet goes")] = Path("demo/sample.png"),
) -> None:
    """Show what a run wrote, and draw some of it."""
    from reinforce.demo.show import show_dataset

    show_dataset(dataset, picture)


@app.command()
def students(
    out: Annotated[Path, typer.Option(help="folder for the students")] = Path("demo/students"),
    seed: Annotated[int, typer.Option(help="of both trainings")] = 0,
) -> None:
    """Train a plain and a distilled student, at equal steps from equal starts, side by side."""
    from reinforce.demo.compare import ARMS, changes
    from reinforce.demo.students import train_side_by_side

    train_side_by_side({arm: changes(arm, out / arm, seed) for arm in ARMS})


@app.command()
def compare(
    students: Annotated[Path, typer.Argument(help="folder of the students")] = Path("demo/students"),
    out: Annotated[Path, typer.Option(help="folder for results.json and curves.png")] = Path("demo"),
) -> None:
    """What the two students can do, as a table."""
    from reinforce.demo.compare import compare

    compare(students, out)


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None

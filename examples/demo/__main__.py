"""python -m examples.demo COMMAND: the steps of `make demo` and `make demo-teachers` other than the main commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reinforce.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="folder for the student's shards")] = Path("demo/shards"),
    noisy: Annotated[Path, typer.Option(help="folder for the same shards with wrong captions")] = Path(
        "demo/noisy-shards"
    ),
    tests: Annotated[Path, typer.Option(help="folder for the students' test sets")] = Path("demo/tests"),
) -> None:
    """Write the demo's shards: emoji with captions for training, and others as test sets."""
    from examples.demo.data import write_noisy_shards, write_shards, write_tests

    paths = write_shards(out)
    print(f"data: {len(paths)} shards in {out} (Twemoji, CC-BY 4.0, see {out / 'CREDITS.txt'})")
    paths = write_noisy_shards(noisy, paths)
    print(f"data: {len(paths)} shards in {noisy}, the same with 40 % of the captions exchanged")
    paths = write_tests(tests)
    print(f"data: {len(paths)} shards in {tests} (OpenMoji, CC BY-SA 4.0, and icons of fonts), for evaluation only")


@app.command()
def teacher_data(
    out: Annotated[Path, typer.Option(help="folder for the shards")] = Path("demo/teacher-data"),
    fetched: Annotated[Path, typer.Option(help="cache folder of the npm packages")] = Path("demo/npm"),
) -> None:
    """Write the training data of the demo's teachers: ten styles, eight of which are npm packages."""
    from examples.demo.teacher_data import write_teacher_data

    paths = write_teacher_data(out, fetched)
    print(f"teacher-data: {len(paths)} shards in {out} (authors and licences: CREDITS.txt in each folder)")


@app.command()
def initial_models(
    data: Annotated[Path, typer.Option(help="folder of the shards whose captions make the vocabulary")] = Path(
        "demo/teacher-data"
    ),
    out: Annotated[Path, typer.Option(help="folder for the models")] = Path("demo/initial-models"),
) -> None:
    """Write the demo's teachers and captioner before training: configs, a tokenizer, and random weights."""
    from examples.demo.models import write_initial_models

    folders = write_initial_models(out, data)
    print(f"initial-models: {', '.join(folder.name for folder in folders)} in {out}, untrained")


@app.command()
def keep(
    trained: Annotated[Path, typer.Argument(help="an exported model, such as demo/teachers/conv-64/student")],
    folder: Annotated[Path, typer.Argument(help="target folder, such as configs/demo-models/conv-64")],
) -> None:
    """Copy a trained model in float16, to commit it to the repository."""
    from examples.demo.models import keep_model

    print(f"keep: {folder}, {keep_model(trained, folder) / 1e6:.1f} MB of weights")


@app.command()
def students(
    out: Annotated[Path, typer.Option(help="folder for the students")] = Path("demo/students"),
    seed: Annotated[int, typer.Option(help="seed of the trainings")] = 0,
) -> None:
    """Train a plain and a distilled student, with right captions and with wrong ones, two at a time."""
    from examples.demo.compare import ARMS, arm_overrides
    from examples.demo.students import train_side_by_side

    train_side_by_side({arm: arm_overrides(arm, out / arm, seed) for arm in ARMS}, out)


@app.command()
def compare(
    students: Annotated[Path, typer.Argument(help="folder of the students")] = Path("demo/students"),
    out: Annotated[Path, typer.Option(help="folder for results.json and summary.png")] = Path("demo"),
) -> None:
    """Compare the students in a table and a picture."""
    from examples.demo.compare import compare_students

    compare_students(students, out)


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None

"""``reinforce publish``: models to the Hub of Hugging Face, or to a folder in its layout."""

from __future__ import annotations

from typing import Annotated

import typer

from reinforce.cli.common import examples, print_lines
from reinforce.cli.export import Licence
from reinforce.errors import UserError

publish = typer.Typer(
    no_args_is_help=True,
    **examples("reinforce publish model demo/students/distilled demo/published"),
    help="Publish a model with a card that says what it was trained from.",
)


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

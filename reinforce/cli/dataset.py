"""Commands about a dataset that exists: ``reinforce validate``, ``drop``, ``inspect``, ``select`` and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reinforce.cli.common import (
    Address,
    AsJson,
    DatasetUrl,
    ImagesFrom,
    NoRay,
    ViewName,
    only_json,
    print_lines,
    split_names,
)
from reinforce.errors import UserError
from reinforce.terminal import escape, print_table
from teachers.redact import redact

if TYPE_CHECKING:
    from reinforce.dataset.files.store import Store

Names = Annotated[str | None, typer.Option(metavar="NAMES", help="Names, separated by commas. Default: all.")]


def validate(
    dataset: DatasetUrl,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder or URL of source files, repeatable: have they changed since their samples were written?",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read only the keys: damage elsewhere is not found.")] = False,
    count: Annotated[
        bool,
        typer.Option("--count", help="Count the samples in the files of --sources: all of a tar or jsonl is read."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all problems.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move files that are at fault to set-aside/: the next run computes them.")
    ] = False,
    recompute: Annotated[
        int | None, typer.Option(metavar="ROWS", min=1, help="Compute random rows again with the models of --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML config of the dataset, for --recompute.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="SHARDS", min=1, help="Read only so many random shards; all are listed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which shards --sample and which rows --recompute take.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read. Default: by the cores and the dataset's size.")
    ] = None,
) -> None:
    """Read all of a dataset: damaged, misplaced and missing files, wrong rows, repeated keys, changed sources.

    --sample reads random shards; missing and stray files, files of another size and dataset.json are checked of all.

    --repair moves samples only if their source file is in a folder of --sources and has not changed.

    Exits with status 0 if the dataset is valid, 1 if something was found, 2 if it cannot be read.
    """
    from reinforce.dataset.validate.repair import repair as repair_dataset
    from reinforce.dataset.validate.validate import validate as validate_dataset

    if recompute and config is None:
        raise UserError("--recompute needs --config: the config of the dataset names the models.")
    if count and not sources:
        raise UserError("--count needs --sources: the folders of the source files.")
    found = validate_dataset(dataset, sources or (), quick, count, sample, seed, workers)
    again = None
    if recompute and config:
        from reinforce.config import load_config
        from reinforce.engine.recompute import recompute as compute

        again = compute(load_config(config), dataset, recompute, seed)
    found.findings += again.findings() if again else ()
    repaired = repair_dataset(dataset, found.findings, sources or ()) if repair else None
    if as_json:
        parts = {"recomputed": again, "repair": repaired}
        report = {**found.as_json(), **{name: part.as_json() for name, part in parts.items() if part is not None}}
        typer.echo(json.dumps(report, indent=2))
    else:
        for line in [*(again.lines() if again else ()), *found.lines(), *(repaired.lines() if repaired else ())]:
            typer.echo(escape(redact(line)))
    raise typer.Exit(0 if found.valid else 1)


def drop(
    dataset: DatasetUrl,
    layers: Annotated[
        list[str],
        typer.Argument(metavar="LAYER...", help="Names as in `reinforce status`, or patterns: 'embeddings/dfn2b/*'."),
    ],
    shard: Annotated[
        str | None, typer.Option(metavar="NAME", help="Move only the files of this shard to set-aside/.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only show what would be deleted.")] = False,
) -> None:
    """Delete layers: their files, their quarantine and their entries in dataset.json. And views: 'views/best'.

    With --shard, set aside one file of each layer, for example a damaged one, so that a run computes it again.

    Layers that depend on a deleted one must be named, too. All depend on `samples`: '*' deletes everything. Views that
    were made from a deleted layer stay, and are refused until a run computes the same again.

    Do not use it while a run writes to the dataset; only a local dataset is locked.
    """
    from reinforce.dataset import drop as dropping
    from reinforce.dataset.files.store import Store

    store = Store(dataset)
    if shard is not None:
        _drop_shard(store, layers, shard, yes)
        return
    plan = dropping.plan_drop(store, layers)
    print_lines(plan.lines())
    plan.check()
    if not yes:
        typer.echo(escape(f"nothing was deleted; to delete: {plan.command()} --yes"))
        return
    try:
        dropping.drop(store, plan)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to delete the rest", err=True)
        raise typer.Exit(130) from None
    typer.echo("deleted")


def _drop_shard(store: Store, patterns: list[str], shard: str, yes: bool) -> None:
    """Set aside the files of a shard, or show which they are."""
    from reinforce.dataset import drop as dropping
    from reinforce.dataset.files.damage import drop_shard_command

    layers = dropping.layers_with_shard(store, patterns, shard)
    if yes:
        for path in dropping.drop_shard(store, layers, shard):
            typer.echo(escape(f"moved to {path}"))
        typer.echo("`reinforce run` with the dataset's config computes what is missing")
        return
    for layer in layers:
        typer.echo(escape(f"{store.layer_path(layer, shard)}"))
    command = drop_shard_command(store.url, layers, shard)
    typer.echo(escape(f"nothing was moved; to move to set-aside/: {command} --yes"))


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Folder or fsspec URI of a dataset or of labels.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    layers: Annotated[
        str | None, typer.Option(metavar="A,B", help="Layers, or folders of these, with `*`. Default: all.")
    ] = None,
    min_cosine: Annotated[
        float, typer.Option(min=-1, max=1, help="Vectors count as equal from this cosine on; 1: if all numbers are.")
    ] = 1.0,
    as_json: AsJson = False,
    address: Address = None,
    no_ray: NoRay = False,
) -> None:
    """Compare two datasets or labels: layers, samples, captions, cosines of vectors, scores.

    Rows are matched by key in shards of one name, others by what their images are: uid, SHA-256, digest or URL. Images
    are read only for digests, of rows that no uid or SHA-256 joins.

    Exits with status 0 if they are equal, 1 if they differ, 2 if one cannot be read.
    """
    from reinforce.labels.difference import diff as compare
    from reinforce.labels.difference import diff_table

    with only_json(as_json) as write:
        found = compare(first, second, split_names(layers), min_cosine, use_ray=not no_ray, address=address)
        if as_json:
            write(found.as_json())
        else:
            *lines, verdict = found.lines()
            for line in lines:
                typer.echo(escape(redact(line)))
            if found.layers:
                print_table(diff_table(found))
            typer.echo(verdict)
    raise typer.Exit(0 if found.equal else 1)


def convert(
    dataset: DatasetUrl,
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Whose vectors, stored in float16 or float32.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the teacher that gets the converted vectors.")],
    codec: Annotated[str, typer.Option(help="float16-int8, first256, pca128, pq96, rq32 and others.")],
    sample: Annotated[int, typer.Option(min=1, help="Vectors to which codebooks are fitted.")] = 32_768,
    address: Address = None,
    no_ray: NoRay = False,
) -> None:
    """Store the vectors of a teacher again in another codec, from those that are stored: no model is loaded.

    They are those of a teacher of another name in the same dataset, as a run with that codec would write them. Delete
    the others with `reinforce drop` when you do not need them.

    The same command continues one that was stopped. Do not use it while a run writes to the dataset.
    """
    from reinforce.dataset.convert import convert as convert_vectors

    found = convert_vectors(dataset, teacher, name, codec, sample, use_ray=not no_ray, address=address)
    print_lines(found.lines())


def inspect(
    dataset: DatasetUrl,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or fsspec URI to write the report to.")],
    teachers: Names = None,
    captioners: Names = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of samples that are looked at.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Which row groups and samples are looked at.")] = 0,
    images_from: ImagesFrom = None,
    view: ViewName = None,
) -> None:
    """Write a report on a dataset: an HTML folder with a summary, a gallery of samples, figures of captions, and plots.

    It opens in a browser from disk, from a web server or from an object store, and sends no request elsewhere. An
    earlier report in OUTPUT is replaced. The same command gives equal files.

    With --view, it also shows samples on both sides of each rule of the view.
    """
    from reinforce.api.commands import inspect as inspect_dataset

    found = inspect_dataset(
        dataset, output, split_names(teachers), split_names(captioners), limit=limit, seed=seed,
        images_from=images_from, view=view,
    )  # fmt: skip
    print_lines(found.lines())


def select(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config: the dataset, a name, and rules.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key of the config, repeatable: --set dataset=demo/dataset"
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Choose samples of a dataset by rules from what is stored of them, and write a view.

    A view names the samples that are kept, and why each of the others is left out. It copies nothing: reinforce.open
    reads the dataset through it.

    Works on a Ray cluster, or in a process for each core. The same command continues one that was stopped.
    """
    from reinforce.api.commands import select_config
    from reinforce.selection.config import load_config

    selected = select_config(load_config(config, overrides), lambda line: typer.echo(escape(line), err=True), address)
    for line in selected.text:
        typer.echo(escape(redact(line)))

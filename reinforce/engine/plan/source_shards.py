"""The shards of a source: its format, its files and the names of its shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from reinforce.config import Config
from reinforce.dataset.files.store import Store
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.view import View, open_view
from reinforce.engine.plan.shard_lists import SourceShards, folder_shards, table_shards
from reinforce.errors import UserError
from reinforce.source.formats.base import SourceFormat
from reinforce.source.formats.recognise import expand_folders, find_format, source_format
from reinforce.source.identity import former_urls
from reinforce.source.urls import Info, canonical, expand, find_compressed, find_private, shard_names
from reinforce.source.views import split_view, with_fingerprint
from reinforce.storage import is_job_folder, is_ray_job


def source_shards(config: Config, listed: dict[str, Info] | None = None) -> SourceShards:
    """Names and URLs of the source's shards; ``listed`` as in ``expand``.

    Raises UserError if the source is empty, two shards have the same name, or Ray deletes a shard after the job.
    """
    source, notes = expand_folders(config.source, config.input.format)
    urls = expand(source, listed, find_format("csv").recognises)
    _check_outlives_job(urls)
    format_ = source_format(urls, config.input.format)
    if not config.embeds_images:
        _check_references(urls, format_)
    urls = format_.shard_urls(urls, config.input, lambda url: _manifest_of_source(url, config), listed)
    if config.input.view is not None:
        urls, newer = _shards_of_view(urls, config)
        notes = [*notes, *newer]
    if config.input.rows_per_shard is not None and format_.is_table:
        found = table_shards(urls, config, format_, listed or {})
    else:
        found = folder_shards(urls, config, format_) if format_.is_listed else SourceShards(format_, urls)
    found.names = pa.array(shard_names(former_urls(found.urls, config.moved)), pa.string())
    found.notes = [*notes, *found.notes]
    return found


def with_view(config: Config) -> Config:
    """The config with the fingerprint of ``input.view``, on which the samples depend.

    Raises UserError if ``source`` is no dataset with this view, or the view is not what it was made as.
    """
    if config.input.view is None:
        return config
    view = _view_of_source(config)
    found = config.input.model_copy(update={"view": with_fingerprint(view.name, view.fingerprint)})
    return config.model_copy(update={"input": found})


def _view_of_source(config: Config) -> View:
    urls = expand(config.source)
    if urls[1:] or not source_format(urls, config.input.format).has_views:
        raise UserError(
            f"input.view: a view is of one reinforced dataset, and source has {canonical(urls[0])}"
            f"{f' and {len(urls) - 1:,} more' if urls[1:] else ''}. Set source to a dataset, or remove input.view."
        )
    name, fingerprint = split_view(str(config.input.view))
    view = open_view(Store(urls[0]), _manifest_of_source(urls[0], config), name)
    if fingerprint not in ("", view.fingerprint):
        raise UserError(
            f"input.view: view {name} of {canonical(urls[0])} was made again: it has fingerprint {view.fingerprint} "
            f"now. Set input.view to {name}, and another output."
        )
    return view


def _shards_of_view(urls: list[str], config: Config) -> tuple[list[str], list[str]]:
    """The samples files of which a view keeps rows, and a note if some are newer than the view."""
    kept = _view_of_source(config).kept
    names = [url.rpartition("/")[2].removesuffix(".parquet") for url in urls]
    newer = sum(name not in kept for name in names)
    note = f"source: {newer:,} of {len(urls):,} shards are newer than view {config.input.view} and are not read"
    return [url for url, name in zip(urls, names, strict=True) if any(kept.get(name, ()))], [note] if newer else []


def _check_references(urls: Sequence[str], format_: SourceFormat) -> None:
    """Raise UserError if images cannot be read from the files of a source again by reference."""
    if not format_.referable:
        raise UserError(
            f"source: images: reference needs files that hold the images as they are: uncompressed tars, or images; "
            f"{canonical(urls[0])} is a {format_.noun}; set images: embed"
        )
    if format_.has_offsets and (packed := find_compressed(urls)):
        raise UserError(
            f"source: images: reference needs uncompressed .tar shards, and {canonical(packed)} is compressed; set "
            "images: embed"
        )
    if private := find_private(urls):
        raise UserError(
            f"source: images: reference stores URLs without user, password and query, and {canonical(private)} cannot "
            "be read without them; give credentials by the environment (AWS_ACCESS_KEY_ID, or fsspec's "
            "configuration), or set images: embed"
        )


def _manifest_of_source(url: str, config: Config) -> Mapping[str, Any]:
    """The manifest of a reinforced dataset that is a source. Raises UserError."""
    if canonical(url) == canonical(config.output):
        raise UserError(f"source: {canonical(url)} is the output of this run, too. Set another `output`.")
    return read_manifest(Store(url))


def _check_outlives_job(urls: Iterable[str]) -> None:
    """Raise UserError if Ray deletes a local shard after this job; in the next job it would have another name."""
    for url in urls if is_ray_job() else ():
        path = canonical(url)
        if path.startswith(os.sep) and (is_job_folder(url) or is_job_folder(path)):
            raise UserError(
                f"source {path} is in the temporary folder of a Ray job. Shards are named after their paths, "
                "so every job would compute them again. Set `source` to an absolute path that every node reaches, or "
                "to a URL such as s3://BUCKET/FOLDER."
            )

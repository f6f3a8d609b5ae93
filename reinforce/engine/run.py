"""``reinforce.run``: check the config and the source, plan, and compute what is missing.

The codebooks of a run are fitted before anything else, to vectors of the first shards that a separate run computes.
That run stores these vectors in float16, in ``fitting/`` of the dataset, and continues after an interruption as every
run does. Its files are deleted once the codebooks are stored.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce.config import Config
from reinforce.dataset import convert
from reinforce.dataset.claims import Claims
from reinforce.dataset.codecs import codebooks
from reinforce.dataset.codecs.base import Floats
from reinforce.dataset.index import prune_index
from reinforce.dataset.layers import SAMPLES, Layer, compute_fingerprint, mapping_at
from reinforce.dataset.manifest import (
    check_classes,
    check_loaded,
    entry_keys,
    find_manifest,
    forget_code,
    same_content,
    scale_notes,
    update_manifest,
    write_manifest,
)
from reinforce.dataset.runs import SourceRecord, read_records
from reinforce.dataset.store import MANIFEST, DamagedFile, Store
from reinforce.engine.plan.plan import Plan, make_plan, version_notes
from reinforce.engine.plan.source_changes import changes_note, check_copies, finished_note
from reinforce.engine.plan.source_shards import check_output, write_lists
from reinforce.engine.preflight.check_source import check_source
from reinforce.engine.preflight.estimate import expected_samples
from reinforce.engine.record import ProgressScreen, RunSummary, add_summaries, nothing_to_do
from reinforce.errors import RayEnded, StorageError, TooManyQuarantined, UserError
from reinforce.processes.cores import Node
from reinforce.processes.parallel import cluster_of_run, nodes_of_run
from reinforce.processes.signals import terminated_by_exception
from reinforce.settings import as_config, with_accelerator
from reinforce.terminal import plural
from teachers.redact import Redactor

FOLDER = "fitting"
#: Extra passes over shards whose files were set aside: first stored captions that do not match new samples, then the
#: other layers of the shard. More would hide a failing disk.
_MAX_CONTINUATIONS = 2
_LOG = logging.getLogger(__name__)


def run(
    config: Config | str | Path | dict[str, Any],
    *,
    address: str | None = None,
    retry_quarantined: bool = False,
    accept_changed_classes: bool = False,
) -> RunSummary:
    """Compute every missing layer of ``config`` and nothing else.

    Uses the initialised Ray if there is one, else the cluster at ``address`` (or RAY_ADDRESS), else this machine.
    ``retry_quarantined`` removes shards that are quarantined as a whole from the quarantine and tries them again, and
    those whose labels could not all be read.
    ``accept_changed_classes`` extends layers of custom classes whose files have changed under one ``version``.
    Raises UserError for errors that the user must fix. SIGTERM raises SystemExit with status 143, unless the program
    handles it while the run plans.
    """
    config = as_config(Config, config)
    redact = Redactor(config.model_dump(mode="json"))  # errors of storages and models may quote the config
    try:
        with terminated_by_exception():
            return _run(config, address, retry_quarantined, accept_changed_classes, None)
    except StorageError as error:
        raise StorageError(redact(f"{error} Finished shards are kept. Run the same command again to resume.")) from None
    except UserError as error:
        kind = next((kind for kind in (TooManyQuarantined, RayEnded) if isinstance(error, kind)), UserError)
        raise kind(redact(str(error))) from None


def _run(
    config: Config, address: str | None, retry_quarantined: bool, accept_changed_classes: bool, first: int | None
) -> RunSummary:
    """``reinforce.run`` of all shards, or of the ``first`` ones."""
    config = with_accelerator(config)
    check_output(config)
    store = Store(config.output)
    store.check_writable()
    with store.lock(), contextlib.ExitStack() as connection:

        def nodes() -> Sequence[Node]:
            connection.enter_context(cluster_of_run(address))  # stays connected for the run
            return nodes_of_run()

        plan = make_plan(config, retry_quarantined, nodes)
        if plan.unfitted:
            given = address, retry_quarantined, accept_changed_classes
            fit_codebooks(plan, lambda finer, shards: _run(finer, *given, shards))
            plan = make_plan(config, retry_quarantined, nodes)
        plan = plan if first is None else plan.first(first)
        config = plan.config
        check_codebooks(plan)
        manifest = find_manifest(store)
        pending = [shard.name for shard in plan.pending]
        gone: list[str] = []
        with contextlib.suppress(StorageError):  # a cache, which readers and runs can do without
            gone = prune_index(store, SAMPLES, plan.layers[SAMPLES].fingerprint, plan.committed, pending)
        if gone:
            _LOG.warning(
                "%s: the samples of %s, such as %s, were deleted, and `source` does not name these. Readers do "
                "not report them any more.",
                store.url, plural(len(gone), "shard"), gone[0],
            )  # fmt: skip
        for note in scale_notes(manifest, config):
            _LOG.warning(note)
        recorded = read_records(store).sources if plan.listed or plan.finished else {}
        if changed := finished_note(plan, recorded):
            _LOG.warning(changed)
        if not plan.pending:
            manifest = _complete_manifest(plan, store, manifest)
            updated = update_manifest(manifest, config, plan.layers, {})
            if not same_content(updated, manifest):  # a logit scale may have changed
                write_manifest(store, updated)
            return nothing_to_do(plan)
        for note in check_classes(plan.codes, accept_changed_classes):
            _LOG.warning(note)
        with Claims(store, config, plan.layers) as claims:
            _complete_manifest(plan, store, manifest)
            return _compute(plan, store, claims, recorded, address, retry_quarantined)


def fit_codebooks(plan: Plan, compute: Callable[[Config, int], object]) -> None:
    """Fit the codebooks that a plan lacks. ``compute`` computes the first shards of a config. Raises UserError."""
    layers, seed, output = plan.unfitted, plan.config.seed, plan.config.output.rstrip("/")
    name = compute_fingerprint({"codebooks": [layer.fingerprint for layer in layers]})
    # The run that computes vectors to fit codebooks to has the models alone that need them.
    owners = {layer.owner for layer in layers}
    models = {
        section: {model: spec.finer() for model, spec in of.items() if (section, model) in owners}
        for section, of in plan.config.models.items()
    }
    config = plan.config.with_models({**models, "captioners": plan.config.captioners})
    config = config.model_copy(update={"output": f"{output}/{FOLDER}/{name}"})
    _LOG.info("fitting the codebooks of %s to vectors of the first shards", plural(len(layers), "layer"))
    store, finer, shards = Store(output), Store(config.output), convert.SHARES

    def sample(layer: Layer) -> Floats:
        return convert.sample_vectors(layer, finer, None, sorted(finer.shards(layer.name)), seed)

    compute(config, shards)
    while shards < plan.shards and any(
        len(finer.shards(layer.name)) < convert.SHARES or len(sample(layer)) < layer.sample for layer in layers
    ):
        shards *= 2
        compute(config, shards)
    try:
        for layer in layers:
            convert.fit_codebook(layer, sample(layer), store, seed)
    finally:
        with store.storage_errors("removed", FOLDER):
            store.fs.rm(store.path(FOLDER), recursive=True)


def check_codebooks(plan: Plan) -> None:
    """Raise UserError if the codebook of a layer that a plan computes was lost or has changed; copy those of labels."""
    needed = {name for shard in plan.pending for name in shard.layers}
    for name, layer in plan.layers.items():
        place = layer.codebook_at(plan.config.output)
        if place is None or name not in needed:
            continue
        labels = plan.config.labels.get(layer.labels or "")
        if labels is not None and codebooks.stored(Store(place.url), name) is None:
            codebooks.copy(Store(labels.url), Store(place.url), name, place.digest)
        codebooks.load(place).codec.require_encoder()


def _complete_manifest(plan: Plan, store: Store, manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """Load the models of stored layers whose dimension dataset.json does not have, since it was lost, and write it.

    Raises UserError if one cannot be loaded here.
    """
    stored = [layer for name, layer in plan.layers.items() if plan.states[name].done and layer.loads_model]
    described = {
        layer.name: mapping_at(manifest or {}, *entry_keys(str(layer.kind.section), str(layer.model)))
        for layer in stored
    }
    lost = [layer for layer in stored if "dim" in layer.kind.required and not described[layer.name].get("dim")]
    if not lost:
        return manifest
    from reinforce.engine.worker.models import describe_loaded, load_models, on_this_machine

    names = ", ".join(dict.fromkeys(str(layer.model) for layer in lost))
    path = store.path(MANIFEST)
    _LOG.warning(
        "%s does not state what %s have, so they are loaded to write it again. If it was lost, restore a copy instead: "
        "tuned logit scales, and layers of other configs, are in no other file.",
        path, names,
    )  # fmt: skip
    try:
        loaded = describe_loaded(load_models(on_this_machine(plan.config), lost), plan.config)
    except UserError as error:
        raise UserError(
            f"{path} was lost or is incomplete: restore a copy. A model cannot be loaded: {error}"
        ) from None
    check_loaded(store, manifest, plan.layers, loaded)
    manifest = update_manifest(manifest, plan.config, plan.layers, loaded)
    write_manifest(store, manifest)
    return manifest


def _compute(
    plan: Plan,
    store: Store,
    claims: Claims,
    recorded: Mapping[str, SourceRecord],
    address: str | None,
    retry_quarantined: bool,
) -> RunSummary:
    needed = {name for shard in plan.pending for name in shard.layers}
    layers = [layer for name, layer in plan.layers.items() if name in needed]
    for note in version_notes(layer.identity for layer in layers):
        _LOG.warning(note)
    redact = Redactor(plan.config.model_dump(mode="json"))
    for note in check_source(plan)[1]:
        _LOG.warning(redact(note))
    check_copies(plan, store)
    forget_code(store, plan.codes)
    write_lists(store, plan.lists)
    if plan.listed and (changed := changes_note(plan, recorded)):
        _LOG.warning(redact(changed))
    if retry_quarantined:
        pending = {shard.name for shard in plan.pending}
        damaged: list[DamagedFile] = []  # the driver sets them aside
        for layer, shards in store.lone_quarantine(store.listings(plan.layers), damaged).items():
            for shard in (shard for shard, whole in shards.items() if whole and shard in pending):
                store.forget_quarantine(layer, shard)
    progress = ProgressScreen(expected_samples(plan))
    progress.log(f"{plural(len(plan.pending), 'shard')} to compute; waiting for Ray")
    from reinforce.processes.cluster import ray_cluster  # imports Ray, which planning does not need

    with ray_cluster(address), progress:
        from reinforce.engine.driver.driver import Driver

        summary = Driver(plan, store, progress, claims).run()
        for _ in range(_MAX_CONTINUATIONS if summary.postponed else 0):
            plan = make_plan(plan.config)
            check_classes(plan.codes)
            write_lists(store, plan.lists)
            rest = Driver(plan, store, progress, claims).run() if plan.pending else nothing_to_do(plan)
            summary = add_summaries(summary, rest)
            if not summary.postponed:
                break
        return summary

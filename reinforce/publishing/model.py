"""``reinforce publish model``: a trained student as a repository that open_clip loads, with a model card.

The card states what it was trained from, how good it is, and how it is loaded. Paths of this machine are left out or
replaced, and the result is searched for them before it is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from reinforce.dataset.kinds.registry import kind_of
from reinforce.dataset.layers import LABELS, SAMPLES, mapping_at, model_of
from reinforce.dataset.manifest import entry_keys, read_manifest, select_names
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.evaluation.model_names import HUB_URL, loading_call, model_errors, resolve_models
from reinforce.publishing.card import MODEL_MARK, NAME, UNKNOWN, markdown, model_identity, one_line
from reinforce.publishing.shards import is_local_path, without_paths
from reinforce.reports import render_markdown
from reinforce.storage import Storage
from reinforce.student.config import OTHER_MODELS
from reinforce.terminal import format_bytes, plural
from reinforce.training.checkpoints import read_config
from reinforce.training.log import name_part
from reinforce.training.results import read_results
from teachers import weights
from teachers.open_clip import catalog
from teachers.open_clip.released import MIXER
from teachers.open_clip.teacher import load_model
from teachers.redact import redact
from teachers.spec import ModelSpec, TeacherSpec

#: Keys of the training's config that the card shows.
_SETTINGS = (
    "student.model", "loss.form", "loss.lambda", "train.steps", "train.epochs", "train.batch",
    "train.optimizer.learning_rate", "train.optimizer.weight_decay", "seed",
)  # fmt: skip
#: Sections of dataset.json, with the keys of the config of which one uses what their models have computed.
_SECTIONS = {
    "teachers": ("loss.lambda", "loss.anchor", "loss.features", "loss.interactive"),
    "captioners": ("data.",),
    **{section: (f"loss.{key}",) for key, section in OTHER_MODELS.items()},
}
_HUB_DATASETS = "hf://datasets/"


@dataclass(frozen=True)
class _Source:
    """A teacher, captioner or dataset: its name, what it is, its licence, and fingerprints of its layers."""

    name: str
    what: str
    licence: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)


def build_model_card(
    run: str, url: str, config: Mapping[str, Any], licence: str, licences: Mapping[str, str]
) -> tuple[str, tuple[str, ...]]:
    """The README.md of a model published at ``url``, and lines on what it lacks.

    ``run`` is the training's output, ``config`` the model's ``model_cfg``. Raises UserError for a licence of something
    that the model was not trained from.
    """
    training = Storage(run)
    results = read_results(training)
    metrics = {name_part(name, results.parts): one for name, one in results.metrics.items()} if results else {}
    settings = read_config(training) or {}
    notes = [] if settings else [f"{run} has no checkpoint, so the card does not state what the model was trained from"]
    datasets: list[_Source] = []
    models: dict[str, dict[str, _Source]] = {section: {} for section in _SECTIONS}
    hub = []
    for one in settings.get("data.datasets") or []:
        address = one["url"] if isinstance(one, Mapping) else str(one)
        local = is_local_path(address) or "://" not in address
        shown = one_line(redact(address.rstrip("/").rpartition("/")[2] if local else address))
        try:
            manifest = read_manifest(Store(address))
        except (UserError, OSError) as error:
            notes.append(f"the card has no teachers and captioners of {shown}: {redact(str(error))}")
            datasets.append(_Source(shown, "", licences.get(shown, UNKNOWN)))
            continue
        if address.startswith(_HUB_DATASETS):
            hub.append("/".join(address.removeprefix(_HUB_DATASETS).split("/")[:2]))
        stated = str(mapping_at(manifest, LABELS).get("licence", UNKNOWN))
        prints = {SAMPLES: str(manifest["layers"][SAMPLES]["fingerprint"])}
        datasets.append(_Source(shown, "", licences.get(shown, stated), prints))
        for section, found in models.items():
            for source in _models(section, settings, address, manifest, licences):
                before = found.get(source.name)
                prints = {**(before.fingerprints if before else {}), **source.fingerprints}
                found[source.name] = _Source(source.name, source.what, source.licence, prints)
    known = [one.name for one in (*datasets, *(one for found in models.values() for one in found.values()))]
    if wrong := sorted({*licences} - {*known}):
        origin = ", ".join(known) or "nothing that is known"
        raise UserError(f"--license-of {wrong[0]}: the model was not trained from it, but from {origin}.")
    front = {
        "license": one_line(licence),
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "reinforced-dataset", "distillation"],
        **({"datasets": sorted({*hub})} if hub else {}),
    }
    on_hub = url.startswith(HUB_URL)
    page = render_markdown(
        "export/model_card.md",
        mark=MODEL_MARK,
        name=url.rpartition("/")[2],
        address=f"hf-hub:{url.removeprefix(HUB_URL)}" if on_hub else url.rpartition("/")[2],
        place="" if on_hub else "  # or another path of this folder",
        licence=licence,
        config=json.dumps(without_paths(dict(config)), indent=2),
        sources={"datasets": datasets, **{section: list(found.values()) for section, found in models.items()}},
        settings={key: without_paths(settings[key]) for key in _SETTINGS if settings.get(key) is not None},
        metrics={name: value for name, value in metrics.items() if value is not None},
        step=results.exported if results else None,
        text=markdown,
        own_text=config["text_cfg"].get("hf_model_name") == ".",
    )  # fmt: skip
    return redact(f"---\n{yaml.safe_dump(front, sort_keys=False, width=2**16)}---\n\n{page}"), tuple(notes)


def _models(
    section: str, settings: Mapping[str, Any], url: str, manifest: Mapping[str, Any], licences: Mapping[str, str]
) -> Iterator[_Source]:
    """The models of a section of the manifest whose outputs a training read."""
    if not any(value for key, value in settings.items() if key.startswith(_SECTIONS[section])):
        return
    if section == "captioners" and settings.get("data.captions") == "none":
        return
    # The names under ``data`` of the config, a list or the keys of a mapping; None for all.
    prefix = f"data.{section}."
    named: Any = [key.removeprefix(prefix) for key in settings if key.startswith(prefix)]
    named = named or settings.get(prefix.rstrip("."))
    for name in select_names(url, section, None if named is None else list(named), manifest):
        entry = without_paths(mapping_at(manifest, *entry_keys(section, name)))
        prints = {
            layer: str(stored["fingerprint"])
            for layer, stored in manifest["layers"].items()
            if kind_of(layer).section == section and model_of(layer) == name
        }
        yield _Source(name, model_identity(entry), licences.get(name, UNKNOWN), prints)


_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: Files of tokenizers and of the config of a text tower; others stay behind.
_COPIED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass(frozen=True)
class PublishedModel:
    """Where a model was published, its files with their bytes, and ``notes`` on what its card lacks."""

    url: str
    files: Mapping[str, int]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        return [
            *self.notes,
            f"written: {self.url}: {plural(len(self.files), 'file')}, {format_bytes(sum(self.files.values()))}",
            f"load it: {loading_call(self.url)}",
        ]


def publish_model(
    run: str,
    output: str,
    licence: str = UNKNOWN,
    licences: Mapping[str, str] | None = None,
    private: bool = False,
    force: bool = False,
) -> PublishedModel:
    """Publish the model that a training wrote to ``output``, ``hf://ORG/NAME`` or a new folder or fsspec URI.

    ``run`` is the output of the training or the folder of a model. ``licences`` are those of teachers and captioners by
    name; ``force`` replaces a README.md of somebody else. Raises UserError, and then nothing is written.
    """
    repository = ModelRepository(output) if output.startswith(HUB_URL) else None
    store = None if repository else Storage(output)
    if store is not None and store.fs.exists(store.root) and (not store.fs.isdir(store.root) or store.names()):
        raise UserError(f"{store.url} already exists: remove it, or give another output.")
    url = repository.url if repository else store.url if store else output
    if repository is not None and not force and MODEL_MARK not in (repository.read(NAME) or MODEL_MARK):
        raise UserError(f"{url}/{NAME} was not written by this command. --force replaces it.")
    with resolve_models([run]) as specs, tempfile.TemporaryDirectory(prefix="reinforce-publish-") as folder:
        with model_errors(run):
            if isinstance(specs[run], TeacherSpec):
                raise ValueError("it has no text tower, and open_clip loads none: export it with --tower image")
            if not str(specs[run].model).startswith(catalog.FOLDER_PREFIX):
                raise ValueError("it is published already: give the output of a training, or the folder of a model")
            config = _copy(str(specs[run].model), Path(folder), repository.id if repository else catalog.OWN_FOLDER)
        card, notes = build_model_card(run, url, config, licence, licences or {})
        Path(folder, NAME).write_text(card, encoding="utf-8")
        _check_private(Path(folder), run)
        files = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
        if repository is not None:
            repository.write(folder, f"Publish {url.rpartition('/')[2]}", private)
        elif store is not None:
            store.put_folder(folder)
    return PublishedModel(url, files, notes)


def _copy(model: str, folder: Path, name: str) -> dict[str, Any]:
    """Copy a model of open_clip without local paths -> its ``model_cfg``. ``name`` is where its text tower will be.

    Raises ValueError if open_clip could not load it.
    """
    own = catalog.local_folder(model)
    found = catalog.folder_config(model)
    assert found is not None
    config = catalog.model_config(model)
    assert config is not None
    text = dict(config["text_cfg"])
    if MIXER in text:
        raise ValueError(f"open_clip has no text tower with {MIXER}, and could not load it")
    load_model(ModelSpec(model=model))  # refuses weights that do not fit
    state = load_file(str(weights.as_safetensors(catalog.folder_weights(model))))
    save_file(state, folder / HF_SAFE_WEIGHTS_NAME)
    copied = {one: own / one for one in _COPIED if (own / one).is_file()}
    if (tower := catalog.text_folder(config)) is not None:
        copied[catalog.TEXT_CONFIG] = tower / catalog.TEXT_CONFIG
        text |= {**catalog.OWN_TEXT, "hf_model_name": name}
    if text.get("hf_tokenizer_name") and any(one.startswith(("tokenizer", "vocab", "spiece")) for one in copied):
        text["hf_tokenizer_name"] = name
    for one, path in copied.items():
        written = path.read_bytes()
        if one.endswith("config.json"):  # without the paths from which its content was loaded
            content = json.loads(written)
            kept = {
                key: value
                for key, value in content.items()
                if key.endswith("_token") or not (isinstance(value, str) and is_local_path(value))
            }
            written = (json.dumps(kept, indent=2) + "\n").encode()
        (folder / one).write_bytes(written)
    config = {**config, "text_cfg": text}
    for section in ("text_cfg", "vision_cfg"):
        for key, value in config[section].items():
            if isinstance(value, str) and value != name and is_local_path(value):
                raise ValueError(f"{section}.{key} of its {HF_CONFIG_NAME} is a path of this machine: {value}")
    saved = {**found, "model_cfg": config}
    (folder / HF_CONFIG_NAME).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    return config


def _check_private(folder: Path, run: str) -> None:
    """Raise UserError if a file names the home, the working folder or the training's folder of this machine."""
    known = {str(Path.home()), os.getcwd(), os.path.abspath(run)} if "://" not in run else {str(Path.home())}
    private = [one.encode() for one in known if len(Path(one).parts) > 2]
    for path in folder.iterdir():
        if path.name != HF_SAFE_WEIGHTS_NAME and any(one in path.read_bytes() for one in private):
            raise UserError(f"{run}: {path.name} would name a folder of this machine. Remove the path from it.")


class ModelRepository:
    """A repository by its URL ``hf://ORG/NAME``. Raises UserError for another URL, and without a token."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi, get_token

        self.id = url.removeprefix(HUB_URL).removeprefix("models/").rstrip("/")
        if not _ID.fullmatch(self.id):
            raise UserError(f"{url} is not a repository of models: write {HUB_URL}ORG/NAME.")
        if get_token() is None:
            raise UserError(f"{url} cannot be written without a token: run `hf auth login`, or set HF_TOKEN.")
        self.url, self._api = f"{HUB_URL}{self.id}", HfApi()

    def read(self, name: str) -> str | None:
        """The text of a file; None if there is no such file or repository."""
        with self._errors("read"), tempfile.TemporaryDirectory(prefix="reinforce-hub-") as cache:
            if not self._api.file_exists(self.id, name):
                return None
            return Path(self._api.hf_hub_download(self.id, name, cache_dir=cache)).read_text(encoding="utf-8")

    def write(self, folder: str, message: str, private: bool) -> None:
        """Create the repository if it does not exist, and write the files of a folder in one commit."""
        from huggingface_hub import CommitOperationAdd

        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        changes: list[Any] = [
            CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path) for path in files
        ]
        with self._errors("written"):
            self._api.create_repo(self.id, private=private or None, exist_ok=True)
            self._api.create_commit(self.id, changes, commit_message=message)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of huggingface_hub, its HTTP client, and the network
            reason = " ".join(redact(str(error)).split())[:200] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
            fix = (
                "check that the token of HF_TOKEN or `hf auth login` may write to it"
                if status in (401, 403)
                else "check the network and the address"
            )
            raise UserError(f"{self.url} cannot be {what}: {type(error).__name__}: {reason}; {fix}.") from error

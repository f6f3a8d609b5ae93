"""Models of Hugging Face transformers by hub name or local folder, as teachers and captioners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachers import weights
from teachers.decoding.postprocess import cleaning_identity
from teachers.protocols import Captioner, Teacher
from teachers.spec import CHAT_FIELDS, ModelInfo, ModelSpec
from teachers.tokens import check_tokenizer_files
from teachers.transformers import catalog
from teachers.transformers.options import LANGUAGES, TransformersCaptionerOptions, TransformersOptions


class _Transformers(ModelSpec):
    def hosts(self) -> Iterator[str]:
        if not catalog.is_local_folder(self.name):
            yield f"{weights.HUB} ({self.name})"

    def read_config(self) -> dict[str, Any] | None:
        if self.pretrained is not None:
            raise ValueError(
                "`pretrained` is not used with family transformers, whose models include their weights; remove it"
            )
        return catalog.read_config(self.name)

    def check_tokenizer(self) -> None:
        if catalog.is_local_folder(self.name):
            check_tokenizer_files(Path(self.name).expanduser())

    def identity(self, extra: tuple[str, ...] = ()) -> dict[str, Any]:
        """``extra`` are names of further files that determine the outputs of a local model."""
        identity: dict[str, Any] = {"family": "transformers", "precision": self.resolved_precision}
        if catalog.is_local_folder(self.name):
            files = catalog.content_files(Path(self.name).expanduser(), extra)
            identity["files"] = {path.name: weights.identity(path) for path in files}
        else:
            identity["model"] = self.model
        return identity


class TransformersTeacherSpec(_Transformers, TransformersOptions):
    @property
    def imports(self) -> str | None:
        return self.model if self.trust_remote_code else None

    def describe(self) -> ModelInfo:
        config = self.read_config()
        images, texts = catalog.modalities(config)
        dim = catalog.embedding_dim(config, self.pooling)
        if texts:
            self.check_tokenizer()
        # Absent where they are not set, so that older fingerprints stay valid. ``lowercase: false`` is the default.
        keys = ("image_size", "pooling", "lowercase", "trust_remote_code")
        given = {key: value for key in keys if (value := getattr(self, key))}
        code = sorted(Path(self.name).expanduser().glob("*.py")) if self.trust_remote_code else ()
        identity = {**self.identity(tuple(path.name for path in code)), **given}
        return ModelInfo(dim=dim, images=images, texts=texts, identity=identity)

    def load(self, name: str, device: str) -> Teacher:
        from teachers.runtime.accelerator import Accelerator
        from teachers.transformers.teacher import load

        return load(self, Accelerator(device, self.autocast_precision))


class TransformersCaptionerSpec(_Transformers, TransformersCaptionerOptions):
    def describe(self) -> ModelInfo:
        if fast := [key for key in self.fast_paths if getattr(self, key) is True]:
            raise ValueError(f"`{fast[0]}` works only with CoCa; remove it")
        catalog.check_captioner(self.read_config(), self)
        self.check_tokenizer()
        # Absent where they are not set, so that older fingerprints stay valid.
        keys = (*CHAT_FIELDS, "sees", *LANGUAGES)
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        translates = self.sees is not None
        model = self.identity(catalog.TRANSLATOR_FILES if translates else catalog.CAPTIONER_FILES)
        identity = {**model, **self.decoding(), **given, **cleaning_identity(self.clean)}
        return ModelInfo(dim=None, images=not translates, texts=translates, identity=identity)

    def load(self, name: str, device: str) -> Captioner:
        from teachers.runtime.accelerator import Accelerator
        from teachers.transformers import captioner, translator

        load = captioner.load if self.sees is None else translator.load
        return load(self, Accelerator(device, self.precision))

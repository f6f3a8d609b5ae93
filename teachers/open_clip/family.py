"""Models of open_clip by name and weights, as teachers."""

from __future__ import annotations

from typing import Any

from teachers import weights
from teachers.open_clip import catalog
from teachers.open_clip.options import OpenClipOptions, stated_preprocess
from teachers.protocols import Teacher
from teachers.spec import ModelInfo, ModelSpec, TeacherSpec
from teachers.tokens import check_tokenizer_files

#: Tokenizer files of a local folder.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


class OpenClipTeacherSpec(OpenClipOptions, TeacherSpec):
    def describe(self) -> ModelInfo:
        identity = model_identity(self)
        config = catalog.model_config(self.name)
        return ModelInfo(config["embed_dim"] if config else None, images=True, texts=True, identity=identity)

    def load(self, name: str, device: str) -> Teacher:
        from teachers.open_clip.teacher import OpenClipTeacher
        from teachers.runtime.accelerator import Accelerator

        return OpenClipTeacher(self, Accelerator(device, self.autocast_precision))


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """What determines the outputs of a model. Raises ValueError or FileNotFoundError for one that cannot be loaded."""
    model = spec.name
    pretrained = catalog.weights_name(model, spec.pretrained)
    catalog.check_model(model, pretrained)
    identity: dict[str, Any] = {"family": "open_clip", "precision": spec.resolved_precision}
    if model.startswith(catalog.FOLDER_PREFIX):
        # Identified by its files: a folder that was moved is the same model.
        folder = catalog.local_folder(model)
        config = catalog.model_config(model)
        if config is not None and config["text_cfg"].get("hf_tokenizer_name"):
            check_tokenizer_files(folder)
        checkpoint = catalog.folder_weights(model)
        known = [*_TOKENIZER_FILES]
        if config is not None and catalog.text_folder(config) == folder.absolute():
            known.append(catalog.TEXT_CONFIG)
        others = [path for path in folder.glob("*.json") if path.name in known or "open_clip" in path.name]
        identity["files"] = {path.name: weights.identity(path) for path in (checkpoint, *sorted(others))}
    elif model.startswith(catalog.HUB_PREFIX):
        identity["model"] = model
    else:
        identity["model"] = catalog.builtin_name(model)
        assert pretrained is not None
        if catalog.is_checkpoint_file(pretrained):
            identity["weights"] = weights.identity(pretrained)
        else:
            identity["pretrained"] = catalog.canonical_tag(pretrained)
    if changed := catalog.changed_preprocess(model, pretrained, stated_preprocess(spec)):
        identity["preprocess"] = changed  # absent without changes, so that older fingerprints stay valid
    return identity

"""What a config states of a network of images, and the config in the folder of one, read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachers.open_clip import catalog
from teachers.open_clip.family import Preprocess
from teachers.weights import CHECKPOINTS


@dataclass(frozen=True)
class BackboneSpec:
    """What a config states of a network: a ``model`` of timm, or ``class_``; ``image_size`` is a side in pixels."""

    model: str | None
    class_: str | None
    options: Mapping[str, Any]
    without: str | None
    pretrained: str | None
    image_size: int | None
    preprocess: Preprocess | None

    @property
    def from_weights(self) -> bool:
        """Whether the network starts from weights. Raises FileNotFoundError for a folder that does not exist."""
        if self.model is None or self.pretrained is not None:
            return self.pretrained is not None
        if self.model.startswith(catalog.FOLDER_PREFIX):
            return any(path.suffix in CHECKPOINTS for path in catalog.local_folder(self.model).iterdir())
        return self.model.startswith(catalog.HUB_PREFIX) or "." in self.model

    def stated(self) -> dict[str, Any]:
        """What is stated of the preprocessing, by the fields of an ImageSpec."""
        stated = {} if self.preprocess is None else self.preprocess.model_dump(exclude_none=True)
        found: dict[str, Any] = {key: tuple(stated[key]) for key in ("mean", "std") if key in stated}
        if "interpolation" in stated:
            found["interpolation"] = stated["interpolation"]
        if "resize_mode" in stated:
            found["resize"] = "crop" if stated["resize_mode"] == "shortest" else "squash"
        return found if self.image_size is None else {**found, "size": self.image_size}


#: Name of the file, in timm's folders too.
CONFIG = "config.json"
#: Key of a network that a class or function builds.
CLASS = "class"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a folder; empty if it has none that is a JSON object."""
    try:
        found = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""The towers of a student: the image tower of one model and the text tower of another, in one space; their blocks."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from timm.models import group_parameters

from reinforce.student.config import Student as StudentSpec
from teachers.image_encoder import encoder_of_model
from teachers.open_clip import catalog
from teachers.open_clip.teacher import image_spec, model_name, random_model
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import ModelSpec

Tower = Literal["image", "text"]
_LOGITS = "logit_"
#: Blocks of open_clip, transformers, and residual stages of open_clip's ResNet; and what comes before the first one.
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks?|layers?|layer(\d+)|h)\.(\d+)\.")
_STEM = re.compile(
    r"(?:transformer\.)?(?:encoder\.)?(?:embed\w*|\w+_embed\w*|cls_emb|shared|conv\d|bn\d|ln_pre)(?:\.|$)"
)


@dataclass(frozen=True)
class TowerSource:
    """The model of open_clip that gives a tower: its name, its ``model_cfg``, and whether it has weights.

    With ``language_model``, the text tower has those of its language model alone.
    """

    name: str
    config: Mapping[str, Any]
    pretrained: bool
    language_model: bool = False


@dataclass(frozen=True)
class TowerPlan:
    """Which model gives each tower; ``config`` is the ``model_cfg`` of both.

    ``space`` is the tower whose model gives the logit scale and, unless they are stated, the dimensions. ``changed``
    are the towers whose models have other dimensions.
    """

    image: TowerSource
    text: TowerSource
    space: Tower
    config: Mapping[str, Any] = field(repr=False)
    changed: Sequence[Tower]

    @property
    def weights(self) -> dict[Tower, bool]:
        """Whether the model of each tower has weights."""
        return {"image": self.image.pretrained, "text": self.text.pretrained}


def plan_student(spec: StudentSpec, image: TowerSource, only: Tower | None) -> TowerPlan:
    """Plan the student of a config by the configs of its models alone; its own model is that of ``image``.

    ``only`` one tower may be trained. Raises ValueError if its towers do not fit together.
    """
    text = image
    if spec.text is not None:
        try:
            model = ModelSpec(model=spec.text.model, pretrained=spec.text.pretrained)
            language_model, config = spec.text.pretrained == "transformers", model_config(model_name(model))
            if language_model and not config["text_cfg"].get("hf_model_name"):
                raise ValueError(f"{model.name} has no language model of transformers: set another `pretrained`")
            text = TowerSource(model_name(model), config, not language_model and has_weights(model), language_model)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"text: {error}. A text tower is that of a model of open_clip; for a teacher without one remove `text`"
            ) from error
    keeps_text = text.pretrained and (only == "image" or "text" in (spec.freeze or ()))
    space: Tower = "text" if keeps_text else "image"
    base = text if keeps_text else image
    width = spec.dim or base.config["embed_dim"]
    both = {"vision_cfg": image.config["vision_cfg"], "text_cfg": text.config["text_cfg"]}
    config = {**base.config, **both, "embed_dim": width}
    for key, source in {"custom_text": text, "quick_gelu": _of_quick_gelu(image, text, base)}.items():
        config.pop(key, None)
        if source.config.get(key):
            config[key] = True
    sources: dict[Tower, TowerSource] = {"image": image, "text": text}
    changed = [tower for tower, source in sources.items() if source.config["embed_dim"] != width]
    for tower in changed:
        if sources[tower].pretrained and spec.dim is None:
            raise ValueError(
                f"the {tower} tower of {sources[tower].name} has {sources[tower].config['embed_dim']} dimensions and "
                f"the other tower {width}. Set student.dim to {width}: the tower then gets a new last layer, which is "
                "trained and exported"
            )
    return TowerPlan(image, text, space, config, changed)


def join_towers(plan: TowerPlan, image: Any, text: Any) -> tuple[Any, list[str]]:
    """Build the student of a plan, with random weights where a model has none, and return the names of new layers.

    ``image`` and ``text`` are the models of the plan; that of a text tower without weights is not used. Raises
    ValueError if a tower cannot have the dimensions of the plan.
    """
    with tempfile.TemporaryDirectory(prefix="reinforce-student-") as folder:
        configs = {"model_cfg": dict(plan.config), "preprocess_cfg": open_clip.get_model_preprocess_cfg(image)}
        Path(folder, catalog.CONFIG_FILE).write_text(json.dumps(configs), encoding="utf-8")
        clip = random_model(f"{catalog.FOLDER_PREFIX}{folder}", language_model=plan.text.language_model)
    state = clip.state_dict()
    given: dict[str, torch.Tensor] = {}
    models: dict[Tower, Any] = {"image": image, "text": text}
    for tower, model in models.items():
        if plan.weights[tower]:
            given |= {name: value for name, value in _weights_of(model, tower, plan.space) if name in state}
    new = [name for name, value in given.items() if state[name].shape != value.shape]
    missing = [
        name for tower, has in plan.weights.items() if has for name, _ in _weights_of(clip, tower) if name not in given
    ]
    if missing:
        raise ValueError(f"the weights lack {missing[0]}: their towers have another architecture than their configs")
    clip.load_state_dict({**state, **{name: value for name, value in given.items() if name not in new}})
    if plan.changed:
        _check_dimensions(clip, plan)
    return clip, new


def has_weights(model: ModelSpec) -> bool:
    """Whether the model starts from weights. Raises FileNotFoundError if its folder does not exist."""
    name = model_name(model)
    if name.startswith(catalog.FOLDER_PREFIX) and model.pretrained is None:
        catalog.local_folder(name)
        try:
            catalog.folder_weights(name)
        except FileNotFoundError:
            return False
        return True
    return name.startswith(catalog.HUB_PREFIX) or model.pretrained is not None


def model_config(name: str) -> dict[str, Any]:
    """The ``model_cfg`` of a model that can be a student. Raises ValueError for a captioner or an unknown name."""
    config = catalog.model_config(name) or open_clip.get_model_config(name)
    if "multimodal_cfg" in config:
        raise ValueError(f"{name} is a captioner, and this loss does not train its decoder: choose a CLIP model")
    return dict(config)


def tower_of(name: str) -> Tower | None:
    """The tower that a weight of an open_clip model belongs to; None for the logit scale and bias."""
    if name.startswith(_LOGITS):
        return None
    return "image" if name.startswith("visual") else "text"


def _weights_of(model: Any, tower: Tower, space: Tower | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a tower, with the logit scale and bias if it is that of the ``space``."""
    for name, value in model.state_dict().items():
        if tower_of(name) == tower or (tower_of(name) is None and tower == space):
            yield name, value


def _of_quick_gelu(image: TowerSource, text: TowerSource, base: TowerSource) -> TowerSource:
    """The model whose activation both towers have. Raises ValueError if two towers with weights need different ones."""
    vision, layers = image.config["vision_cfg"], image.config["vision_cfg"].get("layers")
    uses = [image] * (not vision.get("timm_model_name") and not isinstance(layers, (list, tuple)))
    uses += [text] * (not text.config["text_cfg"].get("hf_model_name"))
    trained = [source for source in uses if source.pretrained]
    if len({bool(source.config.get("quick_gelu")) for source in trained}) > 1:
        raise ValueError(
            f"{image.name} and {text.name} have different activations (QuickGELU and GELU), which a model of open_clip "
            "has for both towers: choose another image tower"
        )
    return (trained or uses or [base])[0]


@torch.no_grad()
def _check_dimensions(clip: Any, plan: TowerPlan) -> None:
    """Raise ValueError if a tower has no last layer that gives the dimensions of the plan."""
    clip.eval()
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    inputs: dict[Tower, Callable[[], torch.Tensor]] = {
        "image": lambda: clip.encode_image(torch.zeros(1, 3, image.height, image.width)),
        "text": lambda: clip.encode_text(torch.zeros(1, clip.context_length, dtype=torch.int64)),
    }
    for tower in plan.changed:
        found = inputs[tower]().shape[-1]
        if found != plan.config["embed_dim"]:
            raise ValueError(
                f"the {tower} tower of {getattr(plan, tower).name} has no last layer, so it keeps its {found} "
                f"dimensions and cannot have {plan.config['embed_dim']}: choose another one"
            )


def map_width(clip: Any, image: ImageSpec, stage: int) -> int:
    """Channels of the map after a stage of the image tower. Raises ValueError if there is none."""
    training = clip.visual.training
    clip.visual.eval()  # batch statistics stay
    try:
        return encoder_of_model(clip, image, Accelerator(str(next(clip.parameters()).device)), stage).dim
    finally:
        clip.visual.train(training)


def image_depths(visual: Any) -> dict[str, int]:
    """Depths by the names of the parameters of an image tower: the number of blocks between them and its head.

    Towers of timm are divided by timm's ``group_matcher``; those of open_clip and transformers into what comes before
    the blocks, each block, and what follows them, the head with depth 0.
    """
    names = [name for name, _ in visual.named_parameters()]
    trunk: Any = getattr(visual, "trunk", None)
    if not hasattr(trunk, "group_matcher"):
        return block_depths(names)
    layers = group_parameters(trunk, trunk.group_matcher(), reverse=True)
    head = [name for name in names if not name.startswith("trunk.")]
    last = max(layers.values()) + bool(head)
    return dict.fromkeys(head, 0) | {f"trunk.{name}": last - layer for name, layer in layers.items()}


def block_depths(names: Iterable[str]) -> dict[str, int]:
    """Depths by the names of the parameters of a text tower, or of an image tower that is not timm's."""
    groups: dict[str, tuple[int, ...]] = {}  # what orders parameters from the stem over the blocks to the head
    for name in names:
        if block := _BLOCK.search(name):
            groups[name] = (1, *(int(number) for number in block.groups() if number is not None))
        else:
            groups[name] = (0,) if _STEM.match(name) else (2,)
    layers = sorted({*groups.values()}, reverse=True)
    return {name: layers.index(group) for name, group in groups.items()}

"""The student: an open_clip model, with what its loss terms learn beside it during training."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch

from reinforce.errors import UserError
from reinforce.student.config import BatchNorm, Quantize
from reinforce.student.config import Student as StudentSpec
from reinforce.student.layers import (
    avoid_faulty_convolutions,
    batch_norms,
    can_quantize,
    merge,
    quantize,
    round_in_eval,
)
from reinforce.student.teachers import CAPTION, IMAGE, SYNTHETIC
from reinforce.student.terms.base import unit
from reinforce.student.terms.pairs import Form
from reinforce.student.terms.registry import Terms
from reinforce.student.towers import (
    Tower,
    TowerPlan,
    TowerSource,
    block_depths,
    has_weights,
    image_depths,
    join_towers,
    map_width,
    model_config,
    plan_student,
    tower_of,
)
from reinforce.training.task import Batch, Encoded
from teachers.backbones import Backbone, build_backbone
from teachers.open_clip import catalog
from teachers.open_clip.building import write_open_clip
from teachers.open_clip.family import OpenClipOptions, stated_preprocess
from teachers.open_clip.released import MIXER
from teachers.open_clip.teacher import FUSED, image_spec, load_model, model_name, random_model
from teachers.open_clip.text import tokenizer_of
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.runtime.determinism import seeded
from teachers.spec import ModelSpec

_LOG = logging.getLogger(__name__)


class StudentModel(torch.nn.Module):
    """An open_clip model, or a network of images alone, in training.

    ``clip`` is the model itself, ``config`` its ``model_cfg``, ``name`` its name in open_clip and ``text_name`` that of
    the model whose tokenizer it has. ``towers`` are those that started from weights, ``image`` and ``text``.
    ``backbone`` describes a network of images alone, whose ``config`` has its dimensions. The loss ``terms`` learn
    ``heads`` and ``scales``, teachers' logit scales, beside it.
    """

    def __init__(
        self,
        name: str,
        clip: Any,
        config: Mapping[str, Any],
        image: ImageSpec,
        towers: Collection[str],
        terms: Terms | None = None,
        text_name: str | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.text_name = text_name or name
        self.clip = clip
        self.config = config
        self.image = image
        self.towers = frozenset(towers)
        self.frozen: Sequence[str] = ()
        self.quantized: Quantize | None = None
        self.batch_norm: BatchNorm = "train"
        self.start = _Start()
        self.terms = terms or Terms()
        self.backbone = backbone
        self.heads = torch.nn.ModuleDict(self.terms.merged(lambda term: term.heads(config["embed_dim"])))
        self.heads.update(self.terms.map_heads(partial(map_width, clip, image)))
        self.scales = self.terms.scales()

    @property
    def pretrained(self) -> bool:
        """Whether its image tower started from weights."""
        return IMAGE in self.towers

    def forward(self, batch: Batch) -> Encoded:
        """Unit-norm float32 features [p, D] of ``image``, if there are images, and of each kind of text, with losses.

        Raises UserError if the images [p, h, w, 3] do not have the student's size.
        """
        features: dict[str, torch.Tensor] = {}
        of_images: dict[str, torch.Tensor] = {}
        if IMAGE in batch:
            size = tuple(batch[IMAGE].shape[1:3])
            if size != (self.image.height, self.image.width):
                raise UserError(f"the batch has images of {size[0]} x {size[1]}; the student takes {self.image.size}.")
            # trains a third faster with convolutions on CPUs
            pixels = to_pixels(batch[IMAGE], self.image).contiguous(memory_format=torch.channels_last)
            of_images = self.terms.encode_images(self.clip, pixels)
            of_images[IMAGE] = features[IMAGE] = unit(of_images[IMAGE])
        kinds = [kind for kind in (CAPTION, SYNTHETIC) if kind in batch]
        if kinds:
            texts = unit(self.clip.encode_text(torch.cat([batch[kind] for kind in kinds])))  # all kinds in one pass
            features |= zip(kinds, texts.chunk(len(kinds)), strict=True)
        scalars = {} if self.backbone else {"logit_scale": self.clip.logit_scale.exp().reshape(())}
        if not self.backbone and self.clip.logit_bias is not None:
            scalars["logit_bias"] = self.clip.logit_bias.reshape(())
        scalars |= self.terms.scalars(self.scales)
        losses = self.terms.losses_of_rows({**features, **of_images}, batch.get("targets", {}), self.heads)
        if self.start:
            weights = dict(self.named_parameters())
            losses |= self.terms.merged(lambda term: term.losses_of_weights(weights, self.start))
        projections = self.terms.merged(lambda term: term.projections(features, self.heads))
        contrasted = features
        if not (IMAGE in batch and kinds):  # nothing is contrasted: DistributedDataParallel waits for what has a graph
            contrasted = {name: rows.detach() for name, rows in features.items()}
        return Encoded({**contrasted, **projections}, losses, scalars)

    def quantize(self, kind: Quantize) -> None:
        """Train with rounded values from now on; see ``reinforce.student.layers``."""
        quantize(self.clip, kind)
        self.quantized = kind
        self.train(self.training)

    def set_batch_norm(self, how: BatchNorm) -> None:
        """Set what batch normalisations do in training.

        Raises UserError if statistics of random weights would stay, and for `merge` if no block has branches.
        """
        if how != "train" and not self.pretrained:
            raise UserError(f"student.batch_norm: {self.name} starts from random weights; set student.pretrained")
        if how == "merge" and not merge(self.clip):
            raise UserError(f"student.batch_norm: {self.name} has no branches that `merge` could merge; set it to keep")
        self.batch_norm = how
        self.train(self.training)

    def freeze(self, towers: Sequence[str], only: Tower | None = None) -> None:
        """Let towers keep their weights and batch statistics. Raises UserError if they are random, or if none is left.

        With ``only`` one tower to train, the other and the logit scale are not trained either, random or not.
        """
        for kept in towers:
            if kept not in self.towers:
                own = kept == IMAGE or self.text_name == self.name
                name, key = (self.name, "pretrained") if own else (self.text_name, "text.pretrained")
                raise UserError(f"student.freeze: {name} starts from random weights; set student.{key}")
        if only in towers:
            raise UserError(
                f"student.freeze: with data.{'captions' if only == IMAGE else 'images'}: none only the {only} tower is "
                "trained, so it cannot be frozen. Remove `freeze`, or read both."
            )
        self.frozen = tuple(towers)
        for name, parameter in self.named_parameters():
            tower = self.tower_of(name)
            if tower in towers or (only and tower != only and name.startswith("clip.")):
                parameter.requires_grad_(False)
        self.train(self.training)

    @staticmethod
    def tower_of(name: str) -> str | None:
        """The tower that a parameter or module of this name belongs to, ``image`` or ``text``; None if to neither."""
        return tower_of(name.removeprefix("clip.")) if name.startswith("clip.") else None

    def keep_start(self) -> None:
        """Keep the weights of the model that are trained, if a term needs them. Raises UserError if they are random."""
        if self.terms.start_key is None:
            return
        if self.towers != ({"image"} if self.backbone else {"image", "text"}):
            raise UserError(
                f"loss.{self.terms.start_key}: {self.name} starts from random weights; set student.pretrained"
            )
        trained = {name: p for name, p in self.named_parameters() if name.startswith("clip.") and p.requires_grad}
        self.start = _Start({name: parameter.detach().clone() for name, parameter in trained.items()})

    def _apply(self, fn: Any, recurse: bool = True) -> StudentModel:
        super()._apply(fn, recurse)
        self.start = _Start({name: fn(value) for name, value in self.start.items()})  # to the device of the weights
        return self

    def depths(self) -> dict[str, int]:
        """The number of blocks between each weight of a tower and the tower's head, by the weight's name."""
        image, texts = "clip.visual.", "clip.text." if hasattr(self.clip, "text") else "clip."
        names = [name.removeprefix(texts) for name, _ in self.named_parameters() if self.tower_of(name) == "text"]
        found = {image + name: depth for name, depth in image_depths(self.clip.visual).items()}
        return found | {texts + name: depth for name, depth in block_depths(names).items()}

    def train(self, mode: bool = True) -> StudentModel:
        """Set the mode; frozen towers stay as in eval, and so do batch statistics, if kept or if values are rounded.

        Frozen towers of a quantized student round in training, as the others do.
        """
        super().train(mode)
        for name, child in self.clip.named_children():
            if self.tower_of(f"clip.{name}") in self.frozen:
                child.eval()
                round_in_eval(child, mode)
        if self.quantized is not None or self.batch_norm != "train":
            for module in batch_norms(self.clip):  # they use their running statistics
                module.training = False  # not eval(), which would also turn off a dropout inside
        return self


class _Start(dict[str, torch.Tensor]):
    """First weights by name. They are no buffers, which checkpoints store and ranks exchange; copies share them."""

    def __deepcopy__(self, _: Any) -> _Start:
        return self


class _Network(NamedTuple):
    """The module of a student, ready to be trained; ``parts`` are further arguments of ``StudentModel``."""

    name: str
    clip: Any
    config: Mapping[str, Any]
    image: ImageSpec
    towers: Collection[str]
    parts: Mapping[str, Any]


def build_student(
    spec: StudentSpec,
    *,
    seed: int,
    form: Form = "softmax",
    terms: Terms | None = None,
    only: Tower | None = None,
    checkpointing: bool = False,
) -> StudentModel:
    """Build the model of a config, float32 on the CPU, with pretrained weights or random ones seeded by ``seed``.

    With ``only`` one tower to train, the other and the logit scale keep their values.

    A ``local-dir:`` model starts from the weights in its folder, if there are any. The logit bias of some models does
    not change a softmax and is frozen with it; with ``sigmoid``, a random model without a bias gets one. Raises
    UserError if the model is unknown, cannot be loaded, or cannot be trained with this loss; what the configs show is
    reported before anything is loaded.
    """
    try:
        if spec.images_alone:
            with seeded(seed):
                clip, backbone = build_backbone(spec.backbone)
            towers, parts = ["image"] * backbone.pretrained, {"backbone": backbone}
            made = _Network(backbone.name, clip, {"embed_dim": backbone.dim}, backbone.image, towers, parts)
        else:
            made = _two_towers(spec, seed, form, terms, only)
        if spec.quantize is not None and not can_quantize(made.clip):
            raise ValueError(f"{made.name} has no layer whose weights `quantize` could round: remove the key")
        if checkpointing:
            made.clip.set_grad_checkpointing()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"student: {error}") from error
    avoid_faulty_convolutions(made.clip)
    with seeded(seed):
        student = StudentModel(made.name, made.clip.train(), made.config, made.image, made.towers, terms, **made.parts)
    student.freeze(spec.freeze or (), only)
    student.keep_start()
    student.set_batch_norm(spec.batch_norm or ("keep" if student.pretrained else "train"))
    return student


def _two_towers(spec: StudentSpec, seed: int, form: Form, terms: Terms | None, only: Tower | None) -> _Network:
    """A model of open_clip, or of the towers of two. Raises ValueError as ``build_student`` raises UserError."""
    plan: TowerPlan | None = None
    model = OpenClipOptions(model=spec.model, pretrained=spec.pretrained, preprocess=spec.preprocess)
    name, pretrained = model_name(model), has_weights(model)
    config = model_config(name)
    if spec.image_size is not None:
        config["vision_cfg"] = {**config["vision_cfg"], "image_size": spec.image_size}
    if spec.text is not None or spec.dim is not None:
        plan = plan_student(spec, TowerSource(name, config, pretrained), only)
        config = dict(plan.config)
    if terms is not None:
        with torch.device("meta"):
            terms.merged(lambda term: term.heads(config["embed_dim"]))  # reports teachers of other dimensions
    clip = _load(model, spec.image_size, seed)
    if plan is not None:
        text = clip
        if spec.text is not None and plan.text.pretrained:
            text = load_model(ModelSpec(model=spec.text.model, pretrained=spec.text.pretrained))
        with seeded(seed):
            clip, new = join_towers(plan, clip, text)
        if new:
            _LOG.info("student: new last layers for %d dimensions: %s", plan.config["embed_dim"], ", ".join(new))
    if any(FUSED in key for key in clip.state_dict()):
        raise ValueError(
            f"the weights of {name} are reparameterised for inference and lack the branches that are trained: start "
            "from the weights before that"
        )
    if spec.image_size is not None and hasattr(getattr(clip.visual, "trunk", None), "set_input_size"):
        raise ValueError(
            f"open_clip cannot load a {name} of another image size, since its image tower is a transformer of timm: "
            "choose a model with this `image_size`, and remove the key"
        )
    image = image_spec(open_clip.get_model_preprocess_cfg(clip))
    if image.height != image.width:
        raise ValueError(
            f"{name} takes images of {image.height} x {image.width}, and augmented crops are square: choose a model "
            "with a square `image_size`"
        )
    if form == "sigmoid" and clip.logit_bias is None:
        config |= _init_as_siglip(clip, name, pretrained)
    if form == "softmax" and clip.logit_bias is not None:
        clip.logit_bias.requires_grad_(False)
    weights = {"image": pretrained, "text": pretrained} if plan is None else plan.weights
    towers = [tower for tower, has in weights.items() if has]
    return _Network(name, clip, config, image, towers, {"text_name": plan.text.name} if plan else {})


def _load(model: OpenClipOptions, image_size: int | None, seed: int) -> Any:
    if has_weights(model):
        return load_model(model, image_size)
    with seeded(seed):
        return random_model(model_name(model), stated_preprocess(model), image_size)


def load_tokenizer(student: StudentModel) -> Any:
    """open_clip's tokenizer of a model with texts, else None. Raises UserError if it cannot be used."""
    if student.backbone is not None:
        return None
    try:
        tokenizer = tokenizer_of(student.text_name)
        length = tokenizer(["a photo"]).shape[1]
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"student: the tokenizer of {student.text_name} cannot be loaded: {error}") from error
    context = student.clip.context_length
    fits = length <= context if "hf_model_name" in student.config["text_cfg"] else length == context
    if not fits:
        raise UserError(
            f"student: the tokenizer of {student.text_name} gives {length} tokens and its text tower takes {context}. "
            f"Set text_cfg.context_length to {context}."
        )
    return tokenizer


def export(student: StudentModel, folder: str) -> None:
    """Write a folder that plain open_clip loads as ``local-dir:FOLDER``: the model, its config and its tokenizer.

    A network of images alone is written for timm, or for its class. The student's heads and learnt scales are left
    out. The folder also gets the config of a text tower that is in another one, so that it can be moved.
    """
    if student.backbone is not None:
        student.backbone.export(student.clip, folder)
        return
    config, tower = student.config, catalog.text_folder(student.config)
    if tower is not None:
        config = {**config, "text_cfg": {**config["text_cfg"], **catalog.OWN_TEXT}}
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tower / catalog.TEXT_CONFIG, Path(folder, catalog.TEXT_CONFIG))
        _LOG.warning(
            "the text tower of the exported model is in its folder, where open_clip's create_model does not look: load "
            "it with reinforce.Student.load"
        )
    if MIXER in student.config["text_cfg"]:
        _LOG.warning("plain open_clip cannot load the exported model: it has no such text tower; reinforce can")
    write_open_clip(student.clip, config, load_tokenizer(student), folder)


def _init_as_siglip(clip: Any, name: str, pretrained: bool) -> dict[str, float]:
    """Set logit scale 10 and bias -10 (arXiv 2303.15343); returns the entries of ``model_cfg`` that describe them.

    Raises ValueError for a pretrained model.
    """
    if pretrained:
        raise ValueError(
            f"the weights of {name} were trained with a softmax and have no logit bias, which `loss.form: sigmoid` "
            "needs: start from random weights or from those of a SigLIP model, or use `form: softmax`"
        )
    start = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    torch.nn.init.constant_(clip.logit_scale, start["init_logit_scale"])
    clip.logit_bias = torch.nn.Parameter(torch.full_like(clip.logit_scale, start["init_logit_bias"]))
    return start

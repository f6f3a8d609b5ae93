"""Config of a captioner's training, typed and validated before anything starts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reinforce.evaluation.reading import CaptionFields
from reinforce.evaluation.report import RECALLS
from reinforce.settings import Accelerated, ImagesFrom, LayerName, Section
from reinforce.source.config import LIMITS, Format, NamedLimits
from reinforce.training.config import TrackersOfRun, Training
from teachers.spec import CaptionerSpec, check_lengths

Tower = Literal["image", "text", "decoder"]

TOWERS: tuple[Tower, ...] = ("image", "text", "decoder")


class Captioner(Section):
    """The CoCa to train, by open_clip's names."""

    model: str = Field(min_length=1, description="coca_ViT-L-14, coca_ViT-B-32, hf-hub:ORG/REPO or local-dir:PATH")
    pretrained: str | None = Field(
        None,
        description="pretrained tag, or a checkpoint by path or fsspec URI; `random`: start from random weights, as a "
        "pre-training does; default: the model must have weights",
    )
    freeze: list[Tower] = Field(
        default_factory=list, description="towers that are not trained: image, text, decoder; default: none"
    )
    context: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="positions of the text tower, that of its class token included: open_clip's CoCas have 77; "
        "default: the model's",
    )

    @property
    def random(self) -> bool:
        """Whether it starts from random weights."""
        return self.pretrained == "random"

    @property
    def weights(self) -> str | None:
        """The tag or checkpoint, if there is one."""
        return None if self.random else self.pretrained

    @model_validator(mode="after")
    def _check_start(self) -> Captioner:
        if self.random and self.freeze:
            raise ValueError("freeze: random weights would stay as they are; remove the towers, or name weights")
        return self


class Data(Section):
    """Images with captions, and how examples are made from them."""

    source: str | list[str] = Field(
        description="what `source` of a run may be, by fsspec URI (braces, globs, a .txt file of URLs, or a list): "
        "tars, Parquet, jsonl or csv files, a folder of images, or a reinforced dataset"
    )
    format: Format | None = Field(
        None, description="what the files are; default: recognised by their names, else by the first file"
    )
    image: str | None = Field(
        None, description="column of a table with the images, or with their paths; default: as in a run"
    )
    view: LayerName | None = Field(
        None, description="of a reinforced dataset: view of `reinforce select` whose samples are read; default: all"
    )
    images_from: ImagesFrom = None
    captions: CaptionFields = Field(["json:captions", "txt", "json:caption"])
    use: Literal["one", "all"] = Field(
        "one", description="per epoch, `one` randomly drawn caption of each image, or `all` of them"
    )
    crop: tuple[float, float] = Field(
        (0.9, 1.0), strict=False, description="RandomResizedCrop: area of the crop / area of the image"
    )
    limits: NamedLimits = LIMITS["standard"]
    window: int | None = Field(None, ge=1, description="samples of a stream that are shuffled together; default: 4,096")
    streams: int | None = Field(
        None, ge=1, description="number of streams, a multiple of ranks x workers, the default; see a student's"
    )
    workers: int | None = Field(None, ge=0, description="loader processes per rank; default: as a student has")
    prefetch: int | None = Field(None, ge=1, description="batches to prefetch; default: 4")

    @model_validator(mode="after")
    def _check_crop(self) -> Data:
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop: want 0 < low <= high <= 1, got {list(self.crop)}")
        return self


class HeldOut(Section):
    """Images for evaluation that are never trained on."""

    source: str | list[str] | None = Field(None, description="separate shards or dataset, read like `data`")
    view: LayerName | None = Field(None, description="view of a dataset in `source`, like that of `data`")
    share: float | None = Field(
        None, gt=0, lt=1, description="share of the images of `data`, selected by a seeded hash of the key"
    )

    @model_validator(mode="after")
    def _check_one_given(self) -> HeldOut:
        if (self.source is None) == (self.share is None):
            raise ValueError("give either `source` or `share`")
        if self.view is not None and self.source is None:
            raise ValueError("view: it is of the dataset in `source`; a share is of what `data` reads")
        return self


class Loss(Section):
    """Loss weights: contrastive x CLIP's loss + caption x next-token cross-entropy."""

    contrastive: float = Field(1.0, ge=0, description="default: as in pre-training; open_clip fine-tunes with 0")
    caption: float = Field(2.0, ge=0, description="default: as in pre-training; open_clip fine-tunes with 1")

    @model_validator(mode="after")
    def _check_any_weight(self) -> Loss:
        if not self.contrastive and not self.caption:
            raise ValueError("both weights are 0: there is nothing to train; set at least one above 0")
        return self


class Generation(Section):
    """How captions of held-out images are generated, as in ``captioners:`` of a run, without sampling."""

    strategy: Literal["greedy", "beams"] = Field(
        "greedy", description="the likeliest next token each time, or a beam search"
    )
    beams: int = Field(6, ge=2, le=64, description="number of beams, for strategy `beams`")
    min_length: int = Field(5, ge=0, description="smallest number of tokens before the end token")
    max_length: int = Field(30, ge=2, description="maximum caption length in tokens, including start and end")

    def captioner(self, model: str, pretrained: str | None = None) -> CaptionerSpec:
        """Return the spec of a run's captioner that generates one such caption per image."""
        values = self.model_dump(exclude=set() if self.strategy == "beams" else {"beams"})
        return CaptionerSpec(model=model, pretrained=pretrained, captions=1, **values)

    _check_lengths = model_validator(mode="after")(check_lengths)


class Evaluation(Section):
    """Metrics on held-out images, computed before the fine-tuning, at intervals, and at its end."""

    every: int | None = Field(None, ge=1, description="steps between evaluations; default: at the start and the end")
    images: int | None = Field(None, ge=2, description="held-out images to evaluate, a seeded sample; default: all")
    captioned: int | None = Field(
        None, ge=0, description="of these, images to caption for CIDEr-D and BLEU; default: all; 0: none"
    )
    generate: Generation = Generation()
    best: str | None = Field(
        None,
        description="metric that selects the best checkpoint, higher is better; default: cider, or token_accuracy "
        "where nothing is captioned",
    )
    export: Literal["last", "best"] = Field(
        "last", description="weights that a training exports: of its last step, or of its best evaluated one by `best`"
    )
    batch: int = Field(128, ge=2, description="images in one forward pass, and the batch size of contrastive_loss")

    @property
    def selectable_metrics(self) -> list[str]:
        """Names of the metrics that can select the best checkpoint: those for which higher is better."""
        recalls = [f"retrieval/{way}/r{k}" for way in ("text_to_image", "image_to_text") for k in RECALLS]
        return [*(("cider", "bleu") if self.captioned != 0 else ()), "token_accuracy", *recalls]

    @property
    def best_metric(self) -> str:
        return self.best or self.selectable_metrics[0]

    @model_validator(mode="after")
    def _check_best(self) -> Evaluation:
        if self.best is not None and self.best not in self.selectable_metrics:
            raise ValueError(f"best: want one of {', '.join(self.selectable_metrics)}, got {self.best!r}")
        return self


class CaptionerConfig(Section):
    """Config of a captioner's fine-tuning on images with captions."""

    output: str = Field(min_length=1, description="folder or fsspec URI of checkpoints, logs and the final weights")
    seed: int = Field(0, ge=0, description="seed of the order of samples, of held-out images and of every step")
    captioner: Captioner
    data: Data
    held_out: HeldOut = HeldOut(share=0.02)
    loss: Loss = Loss()
    accelerator: Accelerated = "fast"
    train: Training
    evaluate: Evaluation = Evaluation()
    log: TrackersOfRun = None

    @model_validator(mode="after")
    def _check_trainable(self) -> CaptionerConfig:
        reached = [tower for tower in TOWERS if tower != "decoder" or self.loss.caption]
        if not set(reached) - set(self.captioner.freeze):
            raise ValueError(
                f"captioner.freeze: with {', '.join(self.captioner.freeze)} frozen nothing is left to train, since "
                f"`loss` trains {', '.join(reached)}: remove a tower from `freeze`"
            )
        return self

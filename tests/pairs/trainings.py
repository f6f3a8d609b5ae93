"""Small trainings: the config of a case of the covering array, and how it is trained, stopped and trained again."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import reinforce
from reinforce import settings
from reinforce.dataset.codecs.codebooks import CODECS, find_codec
from reinforce.dataset.codecs.plain import Plain
from reinforce.processes.signals import StopSignal
from reinforce.student.config import StudentConfig
from reinforce.student.train import StudentTask, build, student_job
from reinforce.training import log
from reinforce.training.loop import run_rank
from reinforce.training.ranks import Ranks
from reinforce.training.task import Batch, Feed, Task
from teachers.runtime.accelerator import Accelerator
from teachers.runtime.determinism import strict_flags
from tests.helpers.arrays import Exclusion
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.images import encode
from tests.helpers.models.faint import VOID
from tests.helpers.models.tiny_models import TOKENS, TOWER, open_clip_config, save_open_clip, seeded, tokenizer
from tests.helpers.models.tiny_models import timm_vit as save_timm_vit
from tests.helpers.reinforced import reinforce_here
from tests.helpers.shipping import FASTVIT
from tests.helpers.students import built
from tests.helpers.trainings import before_batches

STEPS, BATCH = 3, 8
_CONTEXT = 32  # tokens of a text
_MODELS = "tests.helpers.models"

#: A codec of each sort for vectors of 8 numbers, and int8.
CODECS_OF_VECTORS = [
    *("float16", "int8"),
    *(f"{codec.example.partition(',')[0].rstrip('0123456789')}4" for codec in CODECS if codec is not Plain),
]

DIMENSIONS: dict[str, list[str]] = {
    "lambda": ["0", "0.6", "1"],
    "form": ["softmax", "sigmoid"],
    "scales": ["given", "least", "learnt"],
    "features": ["none", "one-sided", "all"],
    "distance": ["cosine", "l2", "similarities"],
    "balance": ["none", "standardise", "phi-s", "dispersion"],
    "weights": ["equal", "named", "confidence"],
    "interactive": ["no", "yes"],
    "probabilities": ["no", "yes"],
    "dense": ["no", "0", "-1", "phi-s"],
    "anchor": ["none", "similarities", "features", "weights"],
    "targets": ["stored", "online", "bf16"],
    "tower": ["open_clip", "timm", "hugging_face", "alone"],
    "start": ["random", "weights"],
    "captions": ["none", "true", "both", "mixed", "parallel"],
    "texts": ["one", "partial", "several"],
    "codec": CODECS_OF_VECTORS,
    "nulls": ["none", "some"],
    "data": ["one", "two"],
    "ranks": ["1", "2"],
    "accumulate": ["1", "2"],
    "precision": ["fp32", "bf16"],
    "resume": ["no", "yes"],
}
_OTHERS = [name for name in DIMENSIONS["captions"] if name != "none"]
_NOTHING = {"captions": ["none"], "probabilities": ["no"], "dense": ["no"], "anchor": ["none", "weights"]}
#: Values that the program refuses together, with words of its message.
REFUSED: list[tuple[Exclusion, str]] = [
    ({"scales": ["learnt"], "lambda": ["0"]}, "a lambda above 0: otherwise no scale is learnt"),
    ({"scales": ["learnt"], "form": ["sigmoid"]}, "`learn_scales` needs `form: softmax`"),
    ({"scales": ["learnt"], "captions": ["none"]}, "remove logit_scales, learn_scales and form"),
    ({"form": ["sigmoid"], "captions": ["none"]}, "remove logit_scales, learn_scales and form"),
    (
        {"form": ["sigmoid"], "start": ["weights"], "scales": ["given", "learnt"]},
        "have no logit bias, which `loss.form: sigmoid` needs",
    ),
    ({"interactive": ["yes"], "lambda": ["0"]}, "loss.interactive needs .* and a loss.lambda above 0"),
    (
        {"interactive": ["yes"], "captions": ["none"]},
        r"loss\.interactive.* (data\.captions that are read|no text tower)",
    ),
    ({"balance": ["dispersion"], "distance": ["similarities"]}, "`balance: dispersion` is for the distances"),
    ({"weights": ["confidence"], "lambda": ["0"]}, "and there is none. Remove it"),
    ({"weights": ["confidence"], "captions": ["none"]}, "and there is none. Remove it"),
    (
        {"weights": ["confidence"], "anchor": ["similarities", "features"], "dense": ["no"]},
        "and there is only red",
    ),
    ({"tower": ["alone"], "captions": _OTHERS}, "has no text tower; set it to none"),
    ({"anchor": ["weights"], "start": ["random"]}, "starts from random weights; set student.pretrained"),
    ({"anchor": ["similarities"], "captions": ["none"]}, r"loss\.anchor\.similarities"),
    ({"anchor": ["features"], "tower": ["alone"]}, "It must be the student before its fine-tuning"),
    (
        {"captions": ["parallel"], "targets": ["online", "bf16"]},
        "a teacher in the loop would encode the texts themselves",
    ),
    ({**_NOTHING, "lambda": ["0"]}, "no loss has targets of them"),
    ({**_NOTHING, "features": ["none"]}, "no loss has targets of them"),
]
EXCLUDED: list[Exclusion] = [exclusion for exclusion, _ in REFUSED]
#: Which values of a dimension cost more than others.
COSTS: dict[str, dict[str, float]] = {
    "ranks": {"1": 0.0, "2": 1.0},
    "resume": {"no": 0.0, "yes": 1.0},
    "accumulate": {"1": 0.0, "2": 1.0},
    "targets": {"stored": 0.0, "online": 0.0, "bf16": 1.0},
}
#: The dimension of each term of the registry that it is in, and values with which it is computed.
TERMS: dict[str, tuple[str, list[str]]] = {
    "pairs": ("captions", _OTHERS),
    "scales": ("scales", ["learnt"]),
    "features": ("features", ["one-sided", "all"]),
    "interactive": ("interactive", ["yes"]),
    "probabilities": ("probabilities", ["yes"]),
    "dense": ("dense", ["0", "-1", "phi-s"]),
    "anchor_similarities": ("anchor", ["similarities"]),
    "anchor_features": ("anchor", ["features"]),
    "anchor_weights": ("anchor", ["weights"]),
}

Case = Mapping[str, str]


class Place:
    """A folder with the datasets and the students that cases share, each of which is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._samples: dict[str, dict[str, Any]] = {}

    def datasets(self, case: Case) -> list[str]:
        """One or two datasets with all that the terms of a loss read, of equal models, inputs and codebooks."""
        texts, nulls = case["texts"], case["nulls"]
        inputs = "several" if texts == "several" else "one"
        other, own = self.folder / f"other-{inputs}-{nulls}/out", self.folder / f"{texts}-{nulls}/out"
        if not other.exists():
            _make_dataset(other, self.teacher(), inputs, nulls, first=100)
        if not own.exists():
            shutil.copytree(other / "codebooks", own / "codebooks")
            _make_dataset(own, self.teacher(), texts, nulls)
        return [str(own), *([str(other)] if case["data"] == "two" else [])]

    def samples(self, urls: Sequence[str]) -> dict[str, Any]:
        """The samples of datasets by their keys."""
        for url in urls:
            if url not in self._samples:
                self._samples[url] = {sample.key: sample for sample in reinforce.open(url)}
        return {key: sample for url in urls for key, sample in self._samples[url].items()}

    def teacher(self) -> str:
        folder = self.folder / "vit"
        if not folder.exists():
            _write_tower(folder, "vit", weights=True, least=False)
        return f"local-dir:{folder}"

    def student(self, case: Case) -> dict[str, Any]:
        """The section of the config."""
        tower, weights = case["tower"], case["start"] == "weights"
        if tower == "alone":
            folder = self.folder / "alone"
            if weights and not folder.exists():
                save_timm_vit(folder)
            keys = {"model": f"local-dir:{folder}"} if weights else {"model": "test_efficientnet", "image_size": 32}
            return {"family": "timm", **keys}
        least = case["scales"] == "least"
        folder = self.folder / f"{tower}-{weights}-{least}"
        if not folder.exists():
            _write_tower(folder, tower, weights, least)
        return {"model": f"local-dir:{folder}"}


def _write_tower(folder: Path, tower: str, weights: bool, least: bool) -> None:
    """A model of open_clip; the one named ``open_clip`` has its tokenizer. ``least`` ones start at logit scale 1."""
    config = open_clip_config(context_length=_CONTEXT)
    config |= {"init_logit_scale": 0.0, "init_logit_bias": -1.0} if least else {"init_logit_scale": 2.0}
    if tower == "timm":
        config["vision_cfg"] = {**FASTVIT, "timm_drop": 0.0, "timm_drop_path": 0.0, "image_size": 64}
    if tower == "hugging_face":
        from transformers import RobertaConfig

        text = folder / "text"
        dropout = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)
        RobertaConfig(vocab_size=300, max_position_embeddings=40, pad_token_id=0, **TOWER, **dropout).save_pretrained(
            text
        )
        config["text_cfg"] = {"hf_model_name": str(text), "hf_pooler_type": "mean_pooler", "context_length": _CONTEXT}
    elif tower != "open_clip":
        config["text_cfg"] |= {"vocab_size": 300, "pool_type": "eos", "eos_id": 2}
        config["custom_text"] = True
    if tower != "open_clip":
        config["text_cfg"]["hf_tokenizer_name"] = "of this folder"
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer(folder, **{**TOKENS, "length": _CONTEXT})
    name = save_open_clip(folder, config, {})
    if weights:
        model = seeded(lambda: built(name).clip, 3) if tower == "vit" else built(name, 3).clip
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def _make_dataset(out: Path, vit: str, texts: str, nulls: str, first: int = 0) -> None:
    """Two shards. Of ``nulls``, some images are dark, some texts have no vector, and some rows no synthetic caption."""
    some = nulls == "some"
    for shard in range(2):
        members = []
        for n in range(14):
            number = first + 14 * shard + n
            words = [f"{VOID if some and n == 5 else 'thing'} {number}", f"other {number}", f"further {number}"]
            own = {"several": words[: 1 + n % 3], "partial": words[: n % 4 != 3]}.get(texts, words[:1])
            about = {"uid": f"{number:04}", **({} if texts == "partial" and n % 5 == 4 else {"de": f"Ding {number}"})}
            members += [(f"{number:04}.png", _picture(number, dark=some and n in (3, 9)))]
            if texts == "several":
                about["text"] = own
            elif own:
                members.append((f"{number:04}.txt", own[0].encode()))
            members.append((f"{number:04}.json", json.dumps(about).encode()))
        write_tar(out.parent / "source" / f"{shard}.tar", members)
    captioner = ".faint:Silent" if some else ":SeedCaptioner"
    config = config_of(
        f"{out.parent}/source/*.tar",
        out,
        input={"captions": ["json:text"], "captions_per_sample": 3} if texts == "several" else {},
        teachers={
            **{f"red.{codec}": {**teachers(nulls)["red"], "codec": codec} for codec in CODECS_OF_VECTORS},
            **{name: spec for name, spec in teachers(nulls).items() if name != "red"},
            "vit": {"model": vit, "logit_scale": SIDES["vit"], "codec": "float32"},
            "dino": {**teachers(nulls)["dino"], "patches": {"grid": 4, "codec": "float16", "sample": 400}},
        },
        captioners={"namer": {"class": f"{_MODELS}{captioner}", "captions": 2}},
        classifiers={
            "colors": {
                "class": f"{_MODELS}.classifiers:Colors", "k": 3, "temperature": 2.0,
                "options": {"nan_below": 0.2 if some else 0.0},
            }
        },
    )  # fmt: skip
    with small_samples():
        reinforce_here(config)


def _picture(seed: int, dark: bool) -> bytes:
    data = picture(seed, 24, 20)
    return encode(Image.open(io.BytesIO(data)).point(lambda value: value // 16)) if dark else data


#: Logit scales of the teachers of both sides.
SIDES = {"red": 50.0, "vit": 20.0, "dino": 30.0}


def teachers(nulls: str, half: bool = False) -> dict[str, dict[str, Any]]:
    """The custom classes, as a run and ``loss.teachers`` name them."""
    some = nulls == "some"
    return {
        "red": {
            "class": f"{_MODELS}.faint:Faint",
            "options": {"size": 16, "nulls": some, "half": half},
            "logit_scale": SIDES["red"],
        },
        "eyes": {"class": f"{_MODELS}:ImageOnly"},
        "ears": {"class": f"{_MODELS}:TextOnly"},
        "dino": {
            "class": f"{_MODELS}.patches:PatchTeacher",
            "options": {"size": 16, "broken": some},
            "logit_scale": SIDES["dino"],
        },
    }


@contextmanager
def small_samples() -> Iterator[None]:
    """Codebooks are fitted to fewer vectors than they have entries: each is repeated."""
    from reinforce.dataset.codecs import quantisers

    fit = quantisers._Quantiser.fit
    find_codec.cache_clear()  # a codec keeps its least number of vectors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantisers, "_LEAST_FOR_EACH", 0)
        patch.setattr(
            quantisers._Quantiser,
            "fit",
            lambda self, sample, seed: fit(self, sample.repeat(-(-256 // len(sample)), axis=0), seed),
        )
        yield
    find_codec.cache_clear()


def ensemble(case: Case) -> list[str]:
    """The teachers under ``data.teachers``; that of the anchor is none of them."""
    anchored = case["anchor"] in ("similarities", "features")
    dino = ["dino"] if case["dense"] != "no" else []
    return [f"red.{case['codec']}", *([] if anchored else ["vit"]), *dino, "eyes", "ears"]


def weights_of(case: Case) -> dict[str, float]:
    """The weights of teachers that are named: some that the case learns from."""
    if case["weights"] != "named" or case["lambda"] == "0":
        return {}
    eyes = {"eyes": 3.0} if case["features"] != "none" else {}
    return eyes | ({f"red.{case['codec']}": 2.0} if case["captions"] != "none" else {})


def sections(case: Case, place: Place, stored: bool = False) -> dict[str, Any]:
    """The config of a case on one rank, in one part and from its start; with its targets, or the ``stored`` ones."""
    names = ensemble(case)
    anchored = case["anchor"] in ("similarities", "features")
    loss: dict[str, Any] = {"lambda": float(case["lambda"]), "form": case["form"], "features_weight": 0.5}
    features = {"teachers": case["features"], "distance": case["distance"], "balance": case["balance"]}
    loss["weights"] = "confidence" if case["weights"] == "confidence" else weights_of(case)
    if case["distance"] == "similarities":
        features |= {"queue": 20, "temperature": 0.2}
    loss["features"] = features
    if case["scales"] == "learnt":
        loss["learn_scales"] = True
    if case["scales"] == "least" and case["captions"] != "none":
        loss["logit_scales"] = dict.fromkeys([name for name in names if name.partition(".")[0] in SIDES], 1.0)
    loss |= {"interactive": 0.5} if case["interactive"] == "yes" else {}
    loss |= {"probabilities": 0.3} if case["probabilities"] == "yes" else {}
    if case["dense"] != "no":
        turned = case["dense"] == "phi-s"
        stage = {"balance": "phi-s"} if turned else {"stage": int(case["dense"])}
        loss["dense"] = {"weight": 0.7, "teachers": ["dino"], **stage}
    if case["anchor"] == "weights":
        loss["anchor"] = {"weights": 0.4}
    elif anchored:
        loss["anchor"] = {"teacher": "vit", case["anchor"]: 0.3}
    data: dict[str, Any] = {"captions": case["captions"], "captioners": []}
    if case["captions"] in ("both", "mixed"):
        del data["captioners"]
        data["synthetic"] = 0.4
    elif case["captions"] in ("true", "parallel"):
        data["captions"] = "both"
        data |= {"parallel": ["json:de"]} if case["captions"] == "parallel" else {}
    if case["targets"] == "stored" or stored:
        data["teachers"] = names
    else:
        known = teachers(case["nulls"], half=case["targets"] == "bf16")
        precision = {"precision": "bf16"} if case["targets"] == "bf16" else {}
        vit = {"model": place.teacher(), "logit_scale": SIDES["vit"], **precision}
        used = {
            name: {"vit": vit, **known}[name.partition(".")[0]] for name in [*names, *(["vit"] if anchored else [])]
        }
        loss |= {"teachers": used}
    return {
        "student": place.student(case),
        "data": {"datasets": place.datasets(case), "workers": 0, "window": 64, "streams": 2, **data},
        "loss": loss,
        "train": {
            "steps": STEPS, "batch": BATCH, "log_every": 1, "optimizer": {"lr": 0.005, "warmup": 0},
            "checkpoints": {"every": 1}, "compute": {"cpus": 1, "precision": case["precision"]},
        },
    }  # fmt: skip


def config(case: Case, place: Place, output: Path | str, divided: bool = False, stored: bool = False) -> StudentConfig:
    """The config of a case; ``divided`` over its ranks and microbatches."""
    made = {"output": str(output), **sections(case, place, stored)}
    if divided:
        made["train"]["compute"] |= {
            "ranks": int(case["ranks"]), "accumulate": int(case["accumulate"]),
            "sync_batch_norm": case["ranks"] == "2",
        }  # fmt: skip
    return settings.parse(StudentConfig, made)


class Killed(BaseException):
    """The end of a process, which nothing handles."""


def train(config: StudentConfig, ranks: Ranks | None = None, killed: bool = False, watch: Any = None) -> StudentTask:
    """Train in this process; ``killed`` when the last batch is read, after a checkpoint, and trained again.

    ``watch`` gets the task and its feed before the first step. Returns the task.
    """
    tasks: list[StudentTask] = []
    accelerator = Accelerator("cpu", config.train.compute.precision)

    def made(accelerator: Accelerator) -> tuple[Task, Feed]:
        task, feed = build(config, accelerator)
        if watch is not None and not tasks:
            watch(task, feed)
        if killed and not tasks:
            before_batches(feed, die)
        tasks.append(task)
        return task, feed

    def die(rank: int, step: int, batch: Batch) -> None:
        if step == STEPS - 1:
            raise Killed

    where = Ranks(0, 1, accelerator) if ranks is None else replace(ranks, accelerator=accelerator)
    with pytest.MonkeyPatch.context() as patch, strict_flags("cpu", True):
        patch.setattr(log, "draw_curves", lambda *_: None)
        if killed:
            with pytest.raises(Killed):
                run_rank(made, student_job(config), where, StopSignal())
        run_rank(made, student_job(config), where, StopSignal())
    return tasks[-1]


def rows_of(output: Path | str) -> list[dict[str, Any]]:
    """The rows of a log, without what depends on the clock."""
    lines = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "losses", "lr", "scalars", "grad_norm", "skipped")
    return [{name: row[name] for name in kept} for row in lines if "loss" in row]


def last_state(output: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint."""
    return load_file(Path(output, f"checkpoints/step-{STEPS:09}.safetensors"))

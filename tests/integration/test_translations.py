"""Translations of true captions by a model of transformers, in the code that workers run, and a student of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.config import parse_config
from reinforce.engine.check_models import check_config
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.recompute import recompute
from reinforce.engine.worker.actor import find_batch
from reinforce.engine.worker.models import LoadedModels, load_models
from reinforce.errors import UserError
from reinforce.student.data.feed import StudentFeed
from teachers.registry import load_model
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.in_loaders import letters
from tests.helpers.models.tiny_captioners import nllb
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import reinforce_here, shard_process
from tests.helpers.students import student_config, student_folder
from tests.helpers.trainings import curve

LAYER = "captions/de"
TEXTS = ["a red cat", "the dog", "two birds", "green grass", "a photo of a hat", "sun", "three old trees"]
TEXTS += ["a boat at sea", "rain", "my house", "an open door", "seven stars"]
KEYS = [f"{n:08}" for n in range(len(TEXTS))]
WITHOUT = f"{len(TEXTS):08}"  # a caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose last row has no caption, a translator and a teacher."""
    folder = tmp_path_factory.mktemp("translated")
    images = [one for one in members_of(0, len(TEXTS) + 1) if not one[0].endswith(".txt")]
    texts = [(f"{key}.txt", text.encode()) for key, text in zip(KEYS, TEXTS, strict=True)]
    write_tar(folder / "source" / "0.tar", sorted(images + texts))
    nllb(folder / "nllb")
    open_clip_model(folder / "clip", embed_dim=24, context_length=16)
    return folder


def config(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    german = {"family": "transformers", "model": str(folder / "nllb"), "sees": "caption", "max_length": 20}
    german |= {"source_language": "eng_Latn", "target_language": "deu_Latn", "min_length": 2}
    teachers = {"vit": {"model": f"local-dir:{folder / 'clip'}", "codec": "float32"}}
    return config_of(
        f"{folder}/source/*.tar", output, **{"captioners": {"de": german}, "teachers": teachers, **changes}
    )


@pytest.fixture(scope="module")
def dataset(folder: Path) -> str:
    """The translator is added later: no image is decoded for it."""
    given = config(folder, folder / "out")
    reinforce_here({**given, "captioners": {}})
    plan = make_plan(parse_config(given))
    assert [layer.sees for layer in plan.layers.values() if layer.name == LAYER] == [None]
    return reinforce_here(given)


def captions(dataset: str | Path) -> dict[str, list[str] | None]:
    table = pq.read_table(next(Path(dataset, LAYER).glob("*.parquet")))
    return dict(zip(table["key"].to_pylist(), table["captions"].to_pylist(), strict=True))


def test_each_row_has_the_translation_of_its_caption_or_a_reason_also_in_a_fresh_run(
    dataset: str, folder: Path, tmp_path: Path
) -> None:
    given = parse_config(config(folder, tmp_path))
    translator = load_model("de", given.captioners["de"], "cpu")
    found = captions(dataset)
    assert found.pop(WITHOUT) is None
    alone = [translator.to_texts(translator.generate(None, torch.zeros(1, 1), [text]))[0] for text in TEXTS]
    assert found == dict(zip(KEYS, alone, strict=True))
    assert len({*map(str, alone)}) > 6
    [row] = pq.read_table(next(Path(dataset, "quarantine", LAYER).glob("*.parquet"))).to_pylist()
    assert (row["reason"], row["detail"]) == ("no_text", "de: the sample has no true caption")
    fresh = reinforce_here(config(folder, tmp_path / "fresh"))
    assert {**tree(Path(fresh)), "dataset.json": b""} == {**tree(Path(dataset)), "dataset.json": b""}
    again = recompute(given, dataset, 8)
    assert again.left_out == []
    assert {LAYER, "embeddings/vit/de"} <= {name for name, one in again.layers.items() if one.fits}


def limit_memory(models: LoadedModels) -> list[int]:
    """Let the translator run out of memory above three captions -> the sizes of its batches."""
    translator: Any = models.loaded["captioners"]["de"]
    generate, sizes = translator.generate, list[int]()

    def limited(pixels: None, seeds: Any, texts: list[str | None]) -> Any:
        sizes.append(len(texts))
        if len(texts) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(pixels, seeds, texts)

    translator.generate = limited
    return sizes


def test_a_device_without_memory_for_a_batch_gets_half_of_it(dataset: str, folder: Path, tmp_path: Path) -> None:
    shard = shard_process(config(folder, tmp_path / "out"))
    sizes = limit_memory(shard.models)
    result = shard.run()
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 1]
    assert captions(tmp_path / "out") == captions(dataset)
    assert [note for note in result.notes if note.startswith(f"{LAYER}: 8 images at once do not fit")]
    given = parse_config(config(folder, tmp_path / "auto", workers={"batch": "auto"}, teachers={}))
    layers = [*make_plan(given).layers.values()]
    models = load_models(given, layers)
    sizes = limit_memory(models)
    assert find_batch(models, given, layers, largest=16).workers.images == 4, "before a run"
    assert sizes[0] == 8


def test_check_tests_and_measures_a_translator(folder: Path, tmp_path: Path) -> None:
    report = check_config(parse_config(config(folder, tmp_path, teachers={})))
    assert (report.errors, [(row.model, row.side) for row in report.rows]) == ([], [("de", "captions")])


def test_a_source_of_images_alone_has_nothing_to_translate(folder: Path, tmp_path: Path) -> None:
    alone = config(folder, tmp_path, input={"captions": "none"}, teachers={})
    with pytest.raises(UserError, match=r"captioners\.de: it needs captions of the source, and input\.captions is non"):
        make_plan(parse_config(alone))


def test_a_text_tower_learns_the_vectors_of_true_captions_for_their_translations(
    dataset: str, folder: Path, tmp_path: Path
) -> None:
    student = student_config(
        tmp_path,
        dataset,
        student={"model": f"local-dir:{folder / 'clip'}", "text": {"model": student_folder(tmp_path / "small", "hf")}},
        data={"teachers": ["vit"], "captioners": [], "parallel": ["de"], "images": "none"},
        loss={"features": {"teachers": "all", "head": "none"}},
        train={"steps": 6, "batch": 6, "optimizer": {"lr": 0.01, "warmup": 0}},
    )
    batch = next(iter(StudentFeed(student.data, 0, 8, letters).batches(0, 1, 12, 0)))
    german = captions(dataset)
    assert torch.equal(batch["synthetic"], letters([german[key][0] for key in batch["key"]]))  # type: ignore[index]
    assert torch.equal(batch["targets"]["vit"]["synthetic"], batch["targets"]["vit"]["caption"])
    assert reinforce.train(student).steps == 6
    losses = curve(tmp_path / "out")
    assert losses[-1] < losses[0]

"""Images divided into trained and held-out ones: copies on one side, and counted; captions on both sides, counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.dataset.reading import Dataset
from reinforce.errors import UserError
from reinforce.tuning import adapt_config as steps
from reinforce.tuning.adapt_config import AdaptConfig
from reinforce.tuning.division import Division, divide
from tests.helpers.data import config_of, write_tar
from tests.helpers.reinforced import reinforce_here

TEACHER = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}


def photo(number: int, quality: int = 95) -> bytes:
    """A JPEG that differs from those of other numbers; of another quality, it has other bytes."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def dataset(folder: Path, *shards: list[tuple[bytes, str]]) -> None:
    """A dataset of an adaptation, of images with captions by shard; keys repeat in each."""
    for number, rows in enumerate(shards):
        members = []
        for row, (image, text) in enumerate(rows):
            members += [(f"{row:04}.jpg", image), (f"{row:04}.txt", text.encode())]
        write_tar(folder / f"source/{number}.tar", members)
    keys = {"augmentations": {"count": 1, "size": 24}, "captioners": {}, "teachers": {"red": TEACHER}}
    reinforce_here(config_of(f"{folder}/source/*.tar", f"{folder}/out/dataset", **keys))


def divided(folder: Path, begun: bool = False, **keys: Any) -> Division:
    config = AdaptConfig.model_validate(
        {"source": "photos", "output": f"{folder}/out", "released": {"model": "ViT-B-32"}, **keys}
    )
    data = Dataset(f"{folder}/out/dataset", {})

    def encode() -> np.ndarray:  # a model that compares pixels
        images = [Image.open(io.BytesIO(sample.image)).resize((4, 4), Image.Resampling.BOX) for sample in data]
        return np.stack([np.asarray(image, np.float32).ravel() - 128 for image in images])

    return divide(config, steps.Domain("photos", "", {}, (), True, ()), data, begun, encode)


def sides(folder: Path) -> dict[str, list[str]]:
    """The captions of both sides; each names its photo."""
    read = {view: reinforce.open(f"{folder}/out/dataset", view=view) for view in ("train", "held-out")}
    return {view: [str(sample.caption).split()[0] for sample in data] for view, data in read.items()}


def test_equal_and_near_copies_fall_on_one_side_over_shards_with_equal_keys_and_are_counted(tmp_path: Path) -> None:
    first = [(photo(n), f"{n} first") for n in range(40)]
    equal = [(photo(n), f"{n} equal") for n in range(10)]
    near = [(photo(n, quality=80), f"{n} near") for n in range(8, 16)]
    dataset(tmp_path, first, [*equal, *near])
    for seed in range(3):
        made = divided(tmp_path, seed=seed)
        of = sides(tmp_path)
        assert not {*of["train"]} & {*of["held-out"]}, seed
        assert len(of["train"]) + len(of["held-out"]) == 58
        assert 12 <= len(of["held-out"]) <= 14, "a fifth, and the rest of a group"
        assert len(set(made.units)) == len({*of["held-out"]})
        for text, unit in zip(of["held-out"], made.units, strict=True):
            assert unit == made.units[of["held-out"].index(text)]
        assert made.lines[0] == (
            "copies: 20 of 58 images have the bytes of another, and 14 more have a near copy (cosine of 0.95); copies "
            f"of an image are on one side, and the {len(made.units)} held-out images are {len({*made.units})} "
            "different ones"
        )
        again = divided(tmp_path, begun=True, seed=seed)
        assert (again.units, again.lines) == (made.units, made.lines), "a training that has begun keeps its division"


def test_with_a_cosine_of_1_only_equal_images_are_copies(tmp_path: Path) -> None:
    dataset(tmp_path, [(photo(n), f"{n}") for n in range(25)] + [(photo(n, 80), f"{n}") for n in range(5)])
    assert "0 of 30 images have the bytes of another, and 0 more" in divided(tmp_path, copies=1.0).lines[0]
    assert "0 of 30 images have the bytes of another, and 10 more" in divided(tmp_path).lines[0]


def test_a_large_group_of_copies_is_trained_on_and_too_few_different_images_are_an_error(tmp_path: Path) -> None:
    dataset(tmp_path, [(photo(0 if n < 20 else n), f"{min(n, 1)}") for n in range(40)])
    for seed in range(3):
        divided(tmp_path, seed=seed)
        assert sides(tmp_path)["held-out"] == ["1"] * 8
    few = tmp_path / "few"
    dataset(few, [(photo(n // 10), f"{n}") for n in range(30)])
    with pytest.raises(UserError, match="its 30 images are copies of 3 different ones, too few to hold out 6"):
        divided(few)


def test_a_model_with_nearly_equal_vectors_is_said_and_equal_images_stay_together(tmp_path: Path) -> None:
    dataset(tmp_path, [(photo(n % 27), f"{n % 27}") for n in range(30)])
    made = divided(tmp_path, copies=0.01)
    assert made.lines[0].startswith("warning: near copies are not looked for, since most vectors of the released model")
    assert "6 of 30 images have the bytes of another; copies of an image are on one side" in made.lines[1]
    of = sides(tmp_path)
    assert not {*of["train"]} & {*of["held-out"]}


def test_captions_that_stand_on_both_sides_are_counted(tmp_path: Path) -> None:
    dataset(tmp_path, [(photo(n), "same" if n % 2 else f"own {n}") for n in range(30)])
    made = divided(tmp_path)
    held_out = [sample.caption for sample in reinforce.open(f"{tmp_path}/out/dataset", view="held-out")]
    count = held_out.count("same")
    assert 0 < count < 6
    assert made.lines[1] == (
        f"captions: {count} of 6 held-out images have a caption that an image of the training has, too"
    )


def test_images_that_come_later_change_no_division_that_is_trained_on(tmp_path: Path) -> None:
    dataset(tmp_path, [(photo(n), f"{n}") for n in range(30)])
    first = divided(tmp_path)
    dataset(tmp_path, [(photo(n), f"{n}") for n in range(30)], [(photo(n), f"{n}") for n in range(3)])
    again = divided(tmp_path, begun=True)
    assert (again.units, again.lines) == (first.units, first.lines)
    assert "6 of 33 images have the bytes of another" in divided(tmp_path).lines[0]

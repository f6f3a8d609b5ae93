"""Training examples for loops of torch: random access, workers, streams, transforms, columns and bad input."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import reinforce
from reinforce.errors import UserError
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.models.tiny_models import tokenizer as save_tokenizer
from tests.helpers.reinforced import reinforce_here, rewrite

TRANSFORM = v2.Compose([v2.Resize(20), v2.CenterCrop(20), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
TOKENIZER = open_clip.get_tokenizer("ViT-B-32")


def examples(made: Path, **keys: Any) -> reinforce.Examples:
    return reinforce.Examples(made, **{"image": TRANSFORM, "tokenizer": TOKENIZER, **keys})


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.fixture(scope="module")
def stored(made: Path) -> dict[str, reinforce.Sample]:
    return {sample.key: sample for sample in reinforce.open(made)}


def test_each_example_is_a_stored_augmentation_with_its_texts_and_the_vectors_of_both(
    made: Path, stored: dict[str, reinforce.Sample]
) -> None:
    data = examples(made)
    assert len(data) == len(stored) == 12
    assert [data[i]["key"] for i in range(len(data))] == [*stored]
    for i in (0, 7, 8, 11, -1):
        item = data[i]
        sample = stored[item["key"]]
        vectors = item["targets"]["red"]
        [k] = [k for k in range(2) if np.allclose(sample.images["red"][k], vectors["image"], atol=1e-3)]
        assert torch.equal(item["image"], TRANSFORM(sample.augmented(k, size=20)))
        assert torch.equal(item["caption"], TOKENIZER([sample.caption or ""])[0])
        [n] = [n for n in range(2) if np.allclose(sample.texts["red"]["namer"][n], vectors["synthetic"], atol=1e-3)]
        assert torch.equal(item["synthetic"], TOKENIZER([(sample.captions["namer"] or [])[n]])[0])
        np.testing.assert_allclose(vectors["caption"], sample.texts["red"]["caption"][0], atol=1e-3)
        assert item["targets"]["blue"]["image"].shape == (12,)
    with pytest.raises(IndexError, match="sample 12 is out of range"):
        data[12]


def test_picks_follow_torchs_random_numbers_or_the_epoch_that_is_set(made: Path) -> None:
    data = examples(made, tokenizer=None, columns=["red/image", "synthetic"])

    def epoch() -> list[Any]:
        return [(tuple(data[i]["red/image"].tolist()), data[i]["synthetic"]) for i in range(len(data))]

    torch.manual_seed(1)
    first, second = epoch(), epoch()
    torch.manual_seed(1)
    assert epoch() == first != second
    data.set_epoch(3)
    assert epoch() == epoch() == [*epoch()]


def test_workers_of_a_loader_read_every_sample_once_and_are_started_with_pickled_examples(made: Path) -> None:
    data = examples(made)
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    assert sorted(keys_of(batches)) == sorted(data[i]["key"] for i in range(12))
    assert batches[0]["image"].shape == (4, 3, 20, 20)
    assert batches[0]["targets"]["blue"]["synthetic"].shape == (4, 12)
    again = pickle.loads(pickle.dumps(data))
    again.set_epoch(0)
    data.set_epoch(0)
    assert torch.equal(again[5]["image"], data[5]["image"])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 0), (3, 2)])
def test_a_stream_gives_each_sample_once_an_epoch_to_one_rank_and_worker(made: Path, ranks: int, workers: int) -> None:
    data = examples(made, columns=["key"], pick="epoch")
    orders = []
    for epoch in range(3):
        found: list[list[str]] = []
        for rank in range(ranks):
            stream = data.stream(rank=rank, ranks=ranks)
            stream.set_epoch(epoch)
            loader = DataLoader(
                stream, batch_size=2, num_workers=workers, multiprocessing_context="fork" if workers else None
            )
            found.append(keys_of(loader))
        together = [key for of_rank in found for key in of_rank]
        assert max(Counter(together).values()) == 1
        assert len({len(of_rank) for of_rank in found}) == 1, "ranks have as many steps"
        assert len(together) > len(data) - max(1, ranks * max(1, workers)), "fewer than the streams are left out"
        orders.append(together)
    assert orders[0] != orders[1] != orders[2]


def test_a_stream_goes_on_with_another_order_at_each_iteration(made: Path) -> None:
    stream = examples(made, columns=["key"]).stream()
    assert len(stream) == 12
    here = [[item["key"] for item in stream] for _ in range(3)]
    assert all(len({*order}) == 12 for order in here)
    assert here[0] != here[1] != here[2]
    loader = DataLoader(stream, batch_size=4, num_workers=2, multiprocessing_context="fork")
    torch.manual_seed(5)
    workers = [keys_of(loader) for _ in range(2)]
    assert all(len({*order}) == 12 for order in workers)
    assert workers[0] != workers[1]
    torch.manual_seed(5)
    assert keys_of(loader) == workers[0]


def test_processors_and_tokenizers_of_transformers_and_names_of_your_own(made: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor

    save_tokenizer(tmp_path, start="<s>", end="</s>", pad="<pad>", length=16)
    processor = CLIPImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 18, "width": 18})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    data = examples(made, image=processor, tokenizer=tokenizer, captioners=[])
    item = data[2]
    assert item["image"].shape == (3, 18, 18)
    assert item["caption"].keys() == tokenizer(["a"]).keys()
    assert {tuple(values.shape) for values in item["caption"].values()} == {(16,)}
    assert "synthetic" not in item
    names = {"pixel_values": "image", "labels": "red/image"}
    batch = next(iter(DataLoader(examples(made, image=processor, columns=names), batch_size=3)))
    shapes = {name: [*values.shape] for name, values in batch.items()}
    assert shapes == {"pixel_values": [3, 3, 18, 18], "labels": [3, 8]}
    plain = reinforce.Examples(made)[0]
    assert (plain["image"].dtype, [*plain["image"].shape]) == (torch.uint8, [3, 24, 24])
    assert plain["caption"].startswith("thing")


def test_an_opened_dataset_decides_teachers_captioners_and_shards(made: Path) -> None:
    data = reinforce.open(made, teachers=["red"], captioners=[])
    whole, second = (reinforce.Examples(one, columns=["key", "red/image"]) for one in (data, data[1]))
    assert (len(whole), len(second)) == (12, 3)
    assert [item["key"] for item in second] == [sample.key for sample in data[1]]
    assert whole.names == ["key", "image", "caption", "red/image", "red/caption"]
    named = reinforce.Examples(made, teachers="red", captioners="namer")
    assert [(name, named.names) for name in ("red", "namer")] == [
        (name, reinforce.Examples(reinforce.open(made, teachers="red", captioners="namer")).names)
        for name in ("red", "namer")
    ]
    both = reinforce.Examples([made, made], teachers=["red"], captioners=[])
    assert (len(both), both[12]["key"]) == (24, whole[0]["key"])


@pytest.fixture(scope="module")
def partly_captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 30 and 10 samples: in the first one, those from number 8 to 27 have no caption."""
    folder = tmp_path_factory.mktemp("partly")
    first = [(name, data) for name, data in members_of(0, 30) if name[-3:] != "txt" or not 8 <= int(name[3:8]) < 28]
    write_tar(folder / "source" / "0.tar", first)
    write_tar(folder / "source" / "1.tar", members_of(1, 10))
    made = reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out"))
    reinforce.select(dataset=made, name="some", rules=[{"sample": 30}])
    return Path(made)


def test_samples_without_a_caption_are_left_out_of_access_by_number_and_no_batch_has_one_twice(
    partly_captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = reinforce.Examples(partly_captioned, columns=["key", "caption"])
    assert "20 of 40 samples cannot be used and are left out: no caption: 20" in caplog.text
    kept = [sample.key for sample in reinforce.open(partly_captioned) if sample.caption]
    assert [data[i]["key"] for i in range(len(data))] == kept
    assert len(kept) == 20
    assert sorted(keys_of(DataLoader(data, batch_size=4, shuffle=True))) == sorted(kept)
    assert [item["key"] for item in data[-3:]] == kept[-3:]
    assert sorted(item["key"] for item in data.stream()) == sorted(kept)


def test_which_samples_without_a_caption_are_left_out_depends_on_texts_views_and_shards(partly_captioned: Path) -> None:
    made = partly_captioned
    without = {sample.key for sample in reinforce.open(made) if not sample.caption}
    assert len(reinforce.Examples(made, captions="none")) == 40
    assert len(reinforce.Examples(made, captions="mixed")) == 40, "the others have synthetic ones"
    assert len(reinforce.Examples([made, made], captioners=[])) == 40
    assert len(reinforce.Examples(reinforce.open(made)[1])) == 10
    of_view = reinforce.open(made, view="some")
    keys = [sample.key for sample in of_view if sample.key not in without]
    data = reinforce.Examples(of_view, columns=["key"])
    assert [data[i]["key"] for i in range(len(data))] == keys
    assert 0 < len(keys) < 30


def with_vectors(dataset: Path, of_row: Callable[[int, Any], Any]) -> None:
    def change(table: pa.Table) -> pa.Table:
        column = table.schema.get_field_index("embeddings")
        values = [of_row(row, one) for row, one in enumerate(table["embeddings"].to_pylist())]
        return table.set_column(column, table.schema.field(column), pa.array(values, table["embeddings"].type))

    rewrite(next((dataset / "embeddings/red/images").glob("00000*.parquet")), change)


def test_null_rows_of_a_layer_are_left_out(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_vectors(dataset, lambda row, one: None if row in (0, 8) else one)
    data = reinforce.Examples(dataset, columns=["key"])
    keys = [sample.key for sample in reinforce.open(dataset)]
    assert "2 of 12 samples cannot be used and are left out: embeddings/red/images is null: 2" in caplog.text
    assert [data[i]["key"] for i in range(len(data))] == [*keys[1:8], *keys[9:]]
    assert len({item["key"] for item in data.stream()}) == 10


def test_rows_of_zero_vectors_are_replaced_by_rows_that_differ(dataset: Path) -> None:
    with_vectors(dataset, lambda row, one: [0.0] * len(one) if row in (2, 3, 4) else one)
    data = reinforce.Examples(dataset, columns=["key"])
    keys = [sample.key for sample in reinforce.open(dataset)]
    found = [data[i]["key"] for i in range(len(data))]
    assert [*found[:2], *found[5:]] == [*keys[:2], *keys[5:]]
    assert len({*found[2:5]}) == 3
    assert not {*found[2:5]} & {*keys[2:5]}


def test_a_dataset_without_a_usable_sample_is_refused_with_the_reason(dataset: Path) -> None:
    with_vectors(dataset, lambda row, one: None)
    made = reinforce.open(dataset)[0]
    with pytest.raises(UserError, match=r"none of 9 samples can be used \(embeddings/red/images is null: 9\)"):
        reinforce.Examples(made)


@pytest.mark.parametrize("number", ["a", 1.5, None])
def test_what_is_no_number_of_a_sample_is_refused(made: Path, number: Any) -> None:
    for samples in (reinforce.Examples(made, columns=["key"]), reinforce.open(made).samples):
        with pytest.raises(UserError, match=r"a sample has a whole number, from 0 to 11; got"):
            samples[number]
        assert samples[np.int64(3)]
        assert samples[torch.tensor(3)]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda made: reinforce.Examples(3), "datasets"),
        (lambda made: reinforce.Examples(made / "missing"), "has no dataset.json"),
        (lambda made: reinforce.Examples(made, teachers=["green"]), r"has no teacher 'green'; it has: red, blue"),
        (lambda made: reinforce.Examples(made, patches=["red"]), "patches: teacher red has none"),
        (lambda made: reinforce.Examples(made, patches=3), "patches: want names of teachers, got 3"),
        (lambda made: reinforce.Examples(made, classifiers=["a"]), "no classifier 'a'"),
        (lambda made: reinforce.Examples(made, teacher=["red"]), "teacher of lightly-train is `teachers` here"),
        (lambda made: reinforce.Examples(made, columns=["caption", "red"]), "there is no 'red'; there are: key"),
        (lambda made: reinforce.Examples(made, image="ViT-B-32"), "image: want a function of a Pillow image"),
        (lambda made: reinforce.Examples(made, tokenizer=7), "tokenizer: want one of open_clip"),
        (lambda made: reinforce.Examples(made, size=0), "size: want the side"),
        (lambda made: reinforce.Examples(made, backend="device-1"), "device-1 is for `reinforce train`"),
        (lambda made: reinforce.Examples(made).stream(rank=2, ranks=2), "rank below ranks"),
        (lambda made: reinforce.Examples(made).stream(rank="0", ranks=1), "rank and ranks: want a whole number .* '0'"),
        (lambda made: reinforce.Examples(made).stream(window=0), "window: want a whole number of at least 1, got 0"),
        (lambda made: reinforce.Examples(made).set_epoch("1"), "epoch: want a whole number of at least 0, got '1'"),
        (lambda made: reinforce.Examples(made, seed=1.5), "seed: want a whole number of at least 0, got 1.5"),
        (lambda made: reinforce.Examples(made, columns=3), "columns: want a list of names"),
        (lambda made: reinforce.Examples([reinforce.open(made)]), "give the URLs of these"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_error_that_names_the_fix(
    made: Path, act: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        act(made)


def test_samples_are_a_sequence_also_through_a_view_of_shards(made: Path, stored: dict[str, reinforce.Sample]) -> None:
    data = reinforce.open(str(made))
    keys = [*stored]
    assert [sample.key for sample in data.samples] == keys
    assert [sample.key for sample in data.samples[2:11:3]] == keys[2:11:3]
    assert (data.samples[-1].key, data[1].samples[0].key) == (keys[-1], keys[9])
    assert len(data[1].samples) == 3
    np.testing.assert_array_equal(data.samples[4].images["red"], stored[keys[4]].images["red"])
    with pytest.raises(IndexError, match="sample 12 is out of range"):
        data.samples[12]
    with pytest.raises(IndexError, match=r"A sample by its number is data\.samples"):
        data[7]
    loader = DataLoader(
        data.samples, batch_size=3, shuffle=True, num_workers=2, multiprocessing_context="fork", collate_fn=list
    )
    assert sorted(sample.key for batch in loader for sample in batch) == sorted(keys)

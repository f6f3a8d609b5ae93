"""Loading models, their two halves, and the tokens that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from reinforce.config import parse_config
from reinforce.engine.worker import models as engine_models
from reinforce.engine.worker.models import TokenCache, load_models
from reinforce.errors import UserError
from reinforce.images import backends as fixed_point
from reinforce.images.backends import load_backend
from teachers.open_clip import text as open_clip_text
from tests.helpers.batches import CONFIG, CPU, LAYERS, Changed, models_of
from tests.helpers.data import config_of
from tests.helpers.models import ColorTeacher, SeedCaptioner


class Tokenizing(ColorTeacher):
    """Splits ``encode_texts`` into its two parts."""

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        return [text.upper() for text in texts]

    def encode_tokens(self, tokens: list[str]) -> torch.Tensor:
        return self.encode_texts(tokens)


class Overriding(Tokenizing):
    """Overrides the whole below the parts."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return -super().encode_texts(texts)


class Splitting(SeedCaptioner):
    """Splits ``caption`` into its two parts."""

    def generate(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[int]]:
        return [[int(seed) for seed in row] for row in seeds]

    def to_texts(self, tokens: list[list[int]]) -> list[list[str]]:
        return [[f"seed {token}" for token in row] for row in tokens]


class OverridingCaptioner(Splitting):
    """Overrides the whole below the parts."""

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        return [["mine"] * len(row) for row in seeds]


def test_only_the_models_of_missing_layers_are_loaded() -> None:
    loaded = load_models(CONFIG, [LAYERS["samples"], LAYERS["embeddings/red/caption"]])
    assert {section: {*of} for section, of in loaded.loaded.items() if of} == {"teachers": {"red"}}
    loaded = load_models(CONFIG, [LAYERS["captions/namer"]])
    assert {section: {*of} for section, of in loaded.loaded.items() if of} == {"captioners": {"namer"}}


def test_what_cannot_be_loaded_is_a_user_error_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        config = parse_config(config_of("x.tar", "out", workers={"gpus": 1}))
        with pytest.raises(UserError, match=r"torch does not see it.*set workers.gpus to 0"):
            load_models(config, LAYERS.values())

    def load(*_: object) -> ColorTeacher:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine_models, "load_model", load)
    with pytest.raises(UserError, match=r"CUDA out of memory\..* do not fit in the memory of the device together"):
        load_models(CONFIG, LAYERS.values())
    monkeypatch.setattr(fixed_point, "RESIZERS", {})
    load_backend.cache_clear()
    config = parse_config(config_of("x.tar", "out", augmentations={"backend": "fixed-point-1"}))
    with pytest.raises(UserError, match="fixed-point-1: no installed package"):
        load_models(config, [LAYERS["samples"]])


def test_texts_are_tokenized_before_the_accelerator_is_used_where_the_teacher_supports_it() -> None:
    encode = models_of().text_encoder(Tokenizing(CPU), ["one", "two"])
    with models_of().use_accelerator():
        assert encode().is_inference()
        torch.testing.assert_close(encode(), ColorTeacher(CPU).encode_texts(["ONE", "TWO"]))
    encode = models_of().text_encoder(ColorTeacher(CPU), ["one"])
    torch.testing.assert_close(encode(), ColorTeacher(CPU).encode_texts(["one"]))


def test_a_class_that_overrides_a_method_below_its_parts_is_called_by_the_method() -> None:
    teacher = Overriding(CPU)
    torch.testing.assert_close(models_of().text_encoder(teacher, ["one"])(), teacher.encode_texts(["one"]))
    pixels, seeds = torch.zeros(1, 3, 8, 8), np.array([[1, 2]], np.uint64)
    texts, _ = models_of().captions(Splitting(CPU), pixels, seeds)
    assert texts() == [["seed 1", "seed 2"]]
    texts, tokens = models_of().captions(OverridingCaptioner(CPU), pixels, seeds)
    assert (texts(), tokens) == ([["mine", "mine"]], 0)


def test_tokens_of_captions_are_counted_where_a_captioner_returns_lists_of_them() -> None:
    class Generating(Splitting):
        def generate(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[Any]:
            return [[[1, 2, 3], [4]], None]

    pixels, seeds = torch.zeros(2, 3, 8, 8), np.zeros((2, 2), np.uint64)
    assert models_of().captions(Generating(CPU), pixels, seeds)[1] == 4
    assert models_of().captions(Splitting(CPU), pixels, seeds)[1] == 0, "in another form"


def test_teachers_of_open_clip_with_one_tokenizer_share_the_tokens_of_a_batch() -> None:
    tokenizers = [open_clip.get_tokenizer(name) for name in ("ViT-B-32", "ViT-L-14")]
    keys = [open_clip_text._tokenizer_key(tokenizer) for tokenizer in tokenizers]
    assert keys[0] == keys[1] is not None
    assert open_clip_text._tokenizer_key(open_clip.SimpleTokenizer(context_length=64)) != keys[0]
    assert open_clip_text._tokenizer_key(open_clip.SimpleTokenizer(clean="whitespace")) != keys[0]
    assert open_clip_text._tokenizer_key(open_clip.SimpleTokenizer(reduction_mask="shuffle")) is None


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.calls += 1
        return [len(text) for text in texts]


def test_equal_tokenizers_tokenize_a_batch_once_and_only_recent_batches_are_kept() -> None:
    cache, first, second, other = TokenCache(), Counting(), Counting(), Counting()
    assert cache.get("a", ["one", "three"], first) == [3, 5]
    assert cache.get("a", ["one", "three"], second) == [3, 5]
    assert cache.get("b", ["one", "three"], other) == [3, 5]
    assert cache.get("a", ["one"], first) == [3]
    assert (first.calls, second.calls, other.calls) == (2, 0, 1)
    for calls in (2, 3):
        cache.get(None, ["one"], other)
        assert other.calls == calls, "a tokenizer without a key shares nothing"
    cache, tokenize = TokenCache(), Counting()
    for number in range(engine_models._MAX_BATCHES + 1):
        cache.get("a", [str(number)], tokenize)
        cache.get("a", ["0"], tokenize)
    assert tokenize.calls == engine_models._MAX_BATCHES + 1, "the one that is used again stays"
    cache.get("a", ["1"], tokenize)
    assert tokenize.calls == engine_models._MAX_BATCHES + 2
    assert len(cache._tokens) == engine_models._MAX_BATCHES


def test_a_teacher_that_changes_the_tokens_of_a_batch_changes_no_others() -> None:
    class Shared(ColorTeacher):
        """Tokens are the letters of each text, in an array that is used again for texts of other shards."""

        tokenizer_key = "letters"

        def tokenize(self, texts: Sequence[str]) -> dict[str, Any]:
            tokens = np.array([[ord(text[0]), ord(text[1])] for text in texts])
            return {"ids": tokens, "lists": [torch.from_numpy(tokens)]}

        def encode_tokens(self, tokens: dict[str, Any]) -> torch.Tensor:
            [letters] = tokens["lists"]
            out = self.encode_texts(["".join(map(chr, row)) for row in letters.tolist()])
            tokens["ids"][:] = 0
            letters.zero_()
            del tokens["ids"]
            return out

    loaded = models_of()
    first, second = (loaded.text_encoder(Shared(CPU, seed=seed), ["ab", "cd"]) for seed in (0, 1))
    torch.testing.assert_close(first(), ColorTeacher(CPU).encode_texts(["ab", "cd"]))
    torch.testing.assert_close(second(), ColorTeacher(CPU, seed=1).encode_texts(["ab", "cd"]))


def test_tokens_do_not_change_when_a_model_reuses_their_memory() -> None:
    class Buffered(ColorTeacher):
        buffer = torch.zeros(2, 2, dtype=torch.int64)

        def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
            return self.buffer.copy_(torch.tensor([[ord(letter) for letter in text] for text in texts]))

        def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.encode_texts(["".join(map(chr, row)) for row in tokens.tolist()])

    class BufferedCaptioner(Splitting):
        buffer = np.zeros((1, 2), np.int64)

        def generate(self, pixels: torch.Tensor, seeds: np.ndarray) -> Any:
            self.buffer[:] = seeds
            return self.buffer

    loaded, teacher = models_of(), Buffered(CPU)
    encode, _ = (loaded.text_encoder(teacher, texts) for texts in (["ab", "cd"], ["xx", "yy"]))
    torch.testing.assert_close(encode(), ColorTeacher(CPU).encode_texts(["ab", "cd"]))
    captioner, pixels = BufferedCaptioner(CPU), torch.zeros(1, 3, 8, 8)
    texts, _ = loaded.captions(captioner, pixels, np.array([[1, 2]], np.uint64))
    loaded.captions(captioner, pixels, np.array([[3, 4]], np.uint64))
    assert texts() == [["seed 1", "seed 2"]]


@pytest.mark.parametrize("out", [torch.zeros(1, 8), torch.zeros(2, 8, 1), np.zeros((2, 8)), None], ids=str)
def test_the_class_of_embeddings_that_do_not_fit_their_batch_is_named(out: Any) -> None:
    found = r"\(\d, 8(, 1)?\)" if isinstance(out, torch.Tensor) else f"type {type(out).__name__}"
    fix = {torch.Tensor: "; correct it or `dim`", np.ndarray: "; return torch.from_numpy of it"}.get(type(out), "")
    with pytest.raises(ValueError, match=rf"shape \(2, 8\), got {found} from Changed.encode_images\(\){fix}$"):
        models_of().encode_images(Changed(lambda *_: out), torch.zeros(2, 3, 16, 16))

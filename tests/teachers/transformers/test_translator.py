"""Translators of transformers compared with plain ``generate``, for every supported model type."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from reinforce.processes.imports import installed
from teachers.protocols import NoCaptions
from teachers.registry import describe_model, load_model
from teachers.runtime.accelerator import Accelerator
from teachers.spec import CaptionerSpec
from teachers.transformers import family, translator
from tests.helpers.models import tiny_captioners
from tests.helpers.models.tiny_captioners import TRANSLATORS
from tests.helpers.specs import captioner_spec
from tests.helpers.stand_in_cuda import stand_in_cuda

Folder = Callable[[str], Path]
LANGUAGES = {"m2m_100": {"source_language": "eng_Latn", "target_language": "deu_Latn"}}
CAPTIONS = ["a photo of a cat", "dog", None, "two green dogs on the grass and a bird", " \n", "a cat in a red hat"]
LENGTH = 20


def spec_of(folder: Path, kind: str, **options: Any) -> CaptionerSpec:
    given = {"sees": "caption", "max_length": LENGTH, **LANGUAGES.get(kind, {}), **options}
    return captioner_spec(family="transformers", model=str(folder), **given)


def load(folder: Path, kind: str, **options: Any) -> Any:
    return load_model("de", spec_of(folder, kind, **options), "cpu")


def translations(model: Any, captions: list[str | None]) -> list[Any]:
    seeds = np.zeros((len(captions), model.captions), np.uint64)
    return list(model.to_texts(model.generate(None, seeds, captions)))


def generated(folder: Path, texts: list[str], languages: dict[str, str], **options: Any) -> list[str]:
    """Translations by the library alone."""
    model, tokenizer = hf.AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    if languages:
        tokenizer.src_lang = languages["source_language"]
        options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(languages["target_language"])
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    tokens = model.generate(**inputs, max_length=LENGTH, **options)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def changed(folder: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(folder, path)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("kind", TRANSLATORS)
def test_translations_are_those_of_generate_and_others_have_a_reason(captioner_folder: Folder, kind: str) -> None:
    folder, texts = captioner_folder(kind), [text for text in CAPTIONS if text and text.strip()]
    beams: dict[str, Any] = {"captions": 2, "strategy": "beams", "beams": 3, "length_penalty": 0.5}
    as_generate: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
    for options, arguments in (({}, {}), ({"min_length": 7}, {"min_new_tokens": 7}), (beams, as_generate)):
        model = load(folder, kind, **options)
        found = translations(model, CAPTIONS)
        assert [found.pop(place) for place in (4, 2)] == [NoCaptions("the sample has no true caption")] * 2
        expected = np.reshape(generated(folder, texts, LANGUAGES.get(kind, {}), **arguments), (len(texts), -1)).tolist()
        wanted = [[one for one in row if one] for row in expected]
        assert found == [(row * 2)[: model.captions] or NoCaptions("the translation is empty") for row in wanted]
        assert len({json.dumps(row) for row in expected}) > 1
        alone = [translations(model, [text])[0] for text in texts]
        assert alone == found, "a batch pads"
    assert [*map(len, model.caption(None, np.zeros((3, 2))))] == [2, 2, 2], "without captions, a test"


def test_translations_on_cuda_are_those_of_the_cpu(captioner_folder: Folder) -> None:
    folder, options = captioner_folder("m2m_100"), {"strategy": "beams", "beams": 3}
    on_cpu = translations(load(folder, "m2m_100", **options), CAPTIONS)
    with stand_in_cuda():
        on_device = translator.load(spec_of(folder, "m2m_100", **options), Accelerator("cuda"))  # type: ignore[arg-type]
        assert translations(on_device, CAPTIONS) == on_cpu


def test_all_supported_model_types_are_tested() -> None:
    assert set(TRANSLATORS) == {*family.TRANSLATORS}


def test_languages_and_prompts_choose_the_translation(captioner_folder: Folder, tmp_path: Path) -> None:
    folder, text = captioner_folder("m2m_100"), "a cat"
    german = translations(load(folder, "m2m_100"), [text])
    french = {"source_language": "deu_Latn", "target_language": "fra_Latn"}
    assert german != translations(load(folder, "m2m_100", **french), [text]) == [generated(folder, [text], french)]
    several = Path(tiny_captioners.marian(tmp_path, "fra", "deu"))
    photo = "a photo of a dog"
    found = translations(load(several, "marian", target_language="deu"), [photo])
    assert found == [generated(several, [f">>deu<< {photo}"], {})] != [generated(several, [f">>fra<< {photo}"], {})]
    t5 = captioner_folder("t5")
    prompted = load(t5, "t5", prompt="to German: {caption}.")
    assert translations(prompted, [text]) == [generated(t5, [f"to German: {text}."], {})]
    assert translations(prompted, ["a</s>b"]) == [generated(t5, ["to German: a< /s>b."], {})], "no token ends a caption"


def test_captions_above_the_models_limit_are_cut_and_no_translation_is_longer(captioner_folder: Folder) -> None:
    for kind in ("m2m_100", "marian"):
        folder, long = captioner_folder(kind), "the cats and dogs " * 40
        model = load(folder, kind, max_length=40)
        assert len(model._tokenize(long)) == tiny_captioners.POSITIONS
        tokens = model.generate(None, np.zeros((2, 1)), [long, "dog"])
        assert all(len(row[0]) <= 40 for row in tokens)
    [only] = translations(load(captioner_folder("m2m_100"), "m2m_100", max_length=2), ["dog"])
    assert only == NoCaptions("the translation is empty"), "of the language alone"


def test_batches_are_cut_where_caches_take_too_much(captioner_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options = captioner_folder("marian"), {"strategy": "beams", "beams": 2}
    whole = translations(load(folder, "marian", **options), CAPTIONS)
    vocabulary = hf.AutoConfig.from_pretrained(folder).vocab_size
    longest = len(hf.AutoTokenizer.from_pretrained(folder)(CAPTIONS[3])["input_ids"])
    row = 4 * 4 * vocabulary + 2 * 2 * 16 * 4 * (longest + LENGTH)  # keys and values of two layers, in float32
    monkeypatch.setattr(translator, "_MAX_CACHE_BYTES", 3 * 2 * row)
    model = load(folder, "marian", **options)
    sizes: list[int] = []
    generate = model._model.generate

    def counted(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        return generate(**given)

    model._model.generate = counted
    assert translations(model, CAPTIONS) == whole
    assert sizes == [3, 1]


def test_a_caption_whose_logits_are_not_finite_gets_none(captioner_folder: Folder, tmp_path: Path) -> None:
    whole = captioner_folder("marian")
    tokenizer = hf.AutoTokenizer.from_pretrained(whole)
    [token] = tokenizer.encode("Z", add_special_tokens=False)

    def break_token(state: dict[str, torch.Tensor]) -> None:
        state["model.encoder.embed_tokens.weight"][token] = math.nan

    folder = changed(whole, tmp_path / "broken", break_token)
    for options in ({}, {"strategy": "beams", "beams": 3}):
        found = translations(load(folder, "marian", **options), ["a cat", "a Z cat", "dog"])
        assert found[1] is None
        assert found[::2] == translations(load(whole, "marian", **options), ["a cat", None, "dog"])[::2]
    with pytest.raises(ValueError, match="logits are not finite: check the weights"):
        translations(load(folder, "marian"), ["Z", "Z Z"])


def test_the_identity_covers_languages_and_files_of_tokenizers(captioner_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "marian"
    shutil.copytree(captioner_folder("marian"), folder)
    (folder / "source.spm").write_bytes(b"pieces")
    spec = captioner_spec(family="transformers", model=str(folder), sees="caption", max_length=40)
    info = describe_model("de", spec)
    assert (info.images, info.texts, info.identity["sees"]) == (False, True, "caption")
    assert (spec.strategy, spec.captions, spec.min_length) == ("greedy", 1, 0)
    assert "source.spm" in info.identity["files"]
    assert "target_language" not in info.identity
    nllb = describe_model("de", spec_of(captioner_folder("m2m_100"), "m2m_100")).identity
    assert (nllb["source_language"], nllb["target_language"]) == ("eng_Latn", "deu_Latn")
    hub = captioner_spec(family="transformers", model="org/not-here", sees="caption", target_language="deu_Latn")
    assert hub.max_length == 128
    assert describe_model("de", hub).identity["model"] == "org/not-here"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("blip", {}, r"`sees: caption` needs a sequence-to-sequence model of type m2m_100, marian, t5; .* type 'blip'"),
        ("marian", {"sees": None}, "a model of type 'marian' sees no images: add `sees: caption`, to translate true"),
        ("marian", {"sees": "both"}, "`sees: both` is used only with family openai: translators see `caption` alone"),
        ("marian", {"sees": None, "target_language": "de"}, "`target_language` is used only with `sees: caption`"),
        ("marian", {"strategy": "nucleus"}, "strategy nucleus is not used with `sees: caption`: use greedy or beams"),
        ("marian", {"image_size": 64}, "`image_size` is not used with `sees: caption`, by which no image is seen"),
        ("marian", {"prompt": "Translate."}, r"`sees: caption` needs \{caption\} in the prompt"),
        ("marian", {"max_length": 41}, "max_length 41 exceeds the model's context of 40 tokens"),
        ("marian", {"target_language": "de"}, "`target_language` is not used: the tokenizer has no tokens of such"),
        ("t5", {"source_language": "en"}, "`source_language` is not used: the tokenizer has no tokens of such"),
        (
            "m2m_100",
            {"target_language": "deu_Latin"},
            "target_language 'deu_Latin' is none of the model's 3 languages; near ones: deu_Latn",
        ),
        ("m2m_100", {"target_language": None}, "`target_language` is missing: name one of the model's 3 languages, "),
        ("m2m_100", {"source_language": "xx"}, "'xx' is none of the model's 3 languages; .* deu_Latn, eng_Latn, fra"),
    ],
)
def test_wrong_keys_are_one_line(captioner_folder: Folder, kind: str, options: dict[str, Any], message: str) -> None:
    folder = captioner_folder(kind)

    def use() -> None:
        spec = spec_of(folder, kind, **options)
        describe_model("de", spec)
        load_model("de", spec, "cpu")

    with pytest.raises(ValueError, match=message) as error:
        use()
    assert "Traceback" not in str(error.value)


def test_other_weights_or_a_target_that_is_missing_are_refused(captioner_folder: Folder, tmp_path: Path) -> None:
    config = hf.T5Config.from_pretrained(captioner_folder("t5"))
    shutil.copytree(captioner_folder("t5"), tmp_path / "encoder")
    hf.T5EncoderModel(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="T5EncoderModel does not write captions: use the weights of a T5ForCond"):
        describe_model("de", spec_of(tmp_path / "encoder", "t5"))
    several = Path(tiny_captioners.marian(tmp_path / "several", "fra", "deu"))
    for options, message in (({}, "is missing: .* such as deu, fra$"), ({"target_language": "ger"}, "near ones: deu")):
        with pytest.raises(ValueError, match=message):
            load(several, "marian", **options)

    def remove(state: dict[str, torch.Tensor]) -> None:
        del state["shared.weight"]

    with pytest.raises(ValueError, match="do not fit T5ForConditionalGeneration: "):
        load(changed(captioner_folder("t5"), tmp_path / "t5", remove), "t5")


@pytest.mark.skipif(installed("sentencepiece"), reason="the package is here")
def test_a_tokenizer_that_needs_a_package_names_it(captioner_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(captioner_folder("marian"), tmp_path / "marian")
    (tmp_path / "marian/tokenizer.json").unlink()
    for name in ("source.spm", "target.spm", "vocab.json"):
        (tmp_path / "marian" / name).write_bytes(b"{}")
    (tmp_path / "marian/tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    with pytest.raises(ValueError, match=r"captioner de: the tokenizer of .* pip install sentencepiece sacremoses"):
        load(tmp_path / "marian", "marian")

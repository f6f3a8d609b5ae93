"""Mixed weights: every tensor by name, integers and statistics included; what is evaluated, chosen and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.storage import Storage
from reinforce.student.model import export
from reinforce.terminal import print_table
from reinforce.tuning import mixtures
from reinforce.tuning.adapt_config import Point, Rule
from reinforce.tuning.mixtures import Sweep, load_mixer, mix
from teachers.spec import ModelSpec
from tests.helpers.commands import Command, Printed
from tests.helpers.evaluation import write_colour_folder
from tests.helpers.students import KINDS, built, student_folder, train_briefly

WEIGHTS = "open_clip_model.safetensors"


def two_students(folder: Path, kind: str = "mobileclip", **changes: Any) -> dict[str, ModelSpec]:
    """A student and the one that it becomes by some steps -> specs by name."""
    specs = {}
    for name in ("released", "tuned"):
        student = built(student_folder(folder / f"architecture-{name}", kind, **(changes if name == "tuned" else {})))
        if name == "tuned":
            train_briefly(student)
        export(student, str(folder / name))
        specs[name] = ModelSpec(model=f"local-dir:{folder / name}")
    return specs


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    """Two students, as a command line names them."""
    return [str(tmp_path / name) for name in two_students(tmp_path, "vit")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_weighted_mean_and_the_ends_are_equal_bit_for_bit(tmp_path: Path, kind: str) -> None:
    specs = two_students(tmp_path, kind)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in specs)
    mixer = load_mixer(specs)
    for share in (0.0, 0.25, 1.0):
        mixer.use({"released": 1 - share, "tuned": share})
        mixer.write(Storage(str(tmp_path / f"mixed-{share}")))
        mixed = load_file(tmp_path / f"mixed-{share}" / WEIGHTS)
        assert mixed.keys() == first.keys()
        for name, tensor in mixed.items():
            if share in (0, 1):
                assert torch.equal(tensor, (first, second)[int(share)][name]), name
            elif tensor.is_floating_point():
                torch.testing.assert_close(tensor, torch.lerp(first[name], second[name], share))
            else:
                assert torch.equal(tensor, torch.maximum(first[name], second[name])), name
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert any("running_var" in name for name in moved) == (kind == "mobileclip")


def test_a_mean_of_equal_weights_is_the_same_weights() -> None:
    state = {"weight": torch.randn(5, generator=torch.Generator().manual_seed(0)), "count": torch.tensor(3)}
    mixed = mix([state] * 3, [1 / 3] * 3)
    torch.testing.assert_close(mixed["weight"], state["weight"])
    assert mixed["count"] == 3


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"embed_dim": 24}, "is \\(.*\\) in one and \\(.*\\) in the other"),
        ({"quick_gelu": True}, "quick_gelu is absent in one and True in the other"),
        ({"text_cfg": {"layers": 1}}, "absent in the other"),
    ],
)
def test_models_of_other_architectures_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=f"released and tuned cannot be mixed: .*{fault}"):
        load_mixer(two_students(tmp_path, "vit", **changes))


def test_starting_values_and_rates_of_dropout_may_differ(tmp_path: Path) -> None:
    assert load_mixer(two_students(tmp_path, "vit", init_logit_scale=2.0, vision_cfg={"patch_dropout": 0.5}))


def test_other_preprocessing_and_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    specs = two_students(tmp_path, "vit")
    config = tmp_path / "tuned" / "open_clip_config.json"
    changed = json.loads(config.read_text())
    changed["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    config.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="their images differ"):
        load_mixer(specs)
    state = load_file(tmp_path / "released" / WEIGHTS)
    state["logit_scale"].fill_(float("nan"))
    save_file(state, tmp_path / "released" / WEIGHTS)
    with pytest.raises(UserError, match="logit_scale is not finite"):
        load_mixer({"released": specs["released"]})


# --- what is chosen

RULE = Rule(("domain",), ("general",), allow=0.01)


def points(*rows: tuple[float, float, float]) -> list[Point]:
    return [Point(alpha, {"domain": domain, "general": general}) for alpha, domain, general in rows]


def test_the_best_of_the_domain_is_chosen_among_those_that_lose_little() -> None:
    found = points((0, 0.5, 0.8), (0.5, 0.7, 0.791), (0.8, 0.75, 0.789), (1, 0.9, 0.6))
    assert RULE.choose(found).alpha == 0.5
    assert Rule(("domain",)).choose(found).alpha == 1
    assert Rule(("domain",), ("general",), allow=0).choose(found).alpha == 0


def test_equal_points_go_to_the_better_general_mean_and_then_to_the_smaller_share() -> None:
    assert RULE.choose(points((0, 0.5, 0.8), (0.4, 0.7, 0.80), (0.5, 0.7, 0.81), (0.6, 0.7, 0.81))).alpha == 0.5


def test_a_share_without_a_value_is_not_chosen_and_none_at_the_start_is_an_error() -> None:
    found = points((0, 0.5, 0.8), (1, float("nan"), 0.9))
    assert RULE.choose(found).alpha == 0
    assert RULE.choose([*found, Point(0.5, {"domain": 0.9})]).alpha == 0
    with pytest.raises(UserError, match="general has no value for the first model"):
        RULE.choose([Point(0, {"domain": 0.5})])
    with pytest.raises(UserError, match="Name it once"):
        Rule(("one",), ("one",))


@pytest.mark.parametrize("columns", ["80", None])
def test_the_table_of_a_sweep_fits_80_columns_also_in_a_pipe(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    name = f"retrieval/{'long-name-' * 6}/text_to_image/r1"
    found = [Point(alpha / 20, {"domain": 0.5, "general": 0.25, name: 1 - alpha / 100}) for alpha in range(21)]
    print_table(Sweep(("a", "b"), found, RULE, found[7]).table())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[:3]] == [
        ["%,", "by", "alpha", "0", "0.35*", "1"],
        ["domain", *["50.00"] * 3],
        ["general", *["25.00"] * 3],
    ]
    assert "".join(line[:50].strip() for line in lines[3:]) == name
    assert " ".join(lines[3:]).split()[1:4] == ["100.00", "93.00", "80.00"]
    assert RULE.means(found[7].metrics) == "domain 50.00 %, general 25.00 %"


def test_a_sweep_evaluates_each_share_once_and_writes_the_chosen_model(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, refused: Printed
) -> None:
    colours, out = write_colour_folder(tmp_path / "colours"), tmp_path / "mixed"
    words = ["interpolate", *names, str(out), "--sweep", "--zero-shot", f"colours={colours}", "--json", "-"]
    shares = [word for share in (0.5, 1.0) for word in ("--alpha", str(share))]
    status, out_text, error = command(*words, *shares)
    assert status == 0, error
    report = json.loads(out_text)
    assert [line for line in error.splitlines() if "alpha" in line] == [
        f"alpha {point['alpha']:g}: domain {100 * point['metrics']['zero_shot/colours/top1']:.2f} %"
        for point in report["points"]
    ]
    assert [point["alpha"] for point in report["points"]] == [0, 0.5, 1]
    chosen = max(report["points"], key=lambda point: (point["metrics"]["zero_shot/colours/top1"], -point["alpha"]))
    assert report["alpha"] == chosen["alpha"]
    weights = load_file(out / WEIGHTS)
    ends = [load_file(f"{name}/{WEIGHTS}") for name in names]
    expected = torch.lerp(ends[0]["positional_embedding"], ends[1]["positional_embedding"], report["alpha"])
    torch.testing.assert_close(weights["positional_embedding"], expected)
    assert (out / "sweep.png").stat().st_size > 1000

    def fail(*_: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(mixtures.Evaluator, "evaluate_module", fail)
    assert json.loads(command(*words, *shares)[1]) == report
    assert "has results of other models or sets" in refused(*words, *shares, "--limit", "3")
    assert "has a model, of sweep.json" in refused(*words[:4], "--soup", "--zero-shot", f"colours={colours}")
    kept = json.loads((out / "mixtures.json").read_text())
    for damaged in ({}, {"of": kept["of"]}, {**kept, "mixtures": [{"weights": {}}]}):
        (out / "mixtures.json").write_text(json.dumps(damaged))
        assert "has results of other models or sets" in refused(*words, *shares), damaged


def test_kept_results_have_no_secrets_of_the_sets(tmp_path: Path) -> None:
    specs = two_students(tmp_path, "vit")
    colours = write_colour_folder(tmp_path / "colours")
    images = {"images": colours, "classes": ["http://me:PASSWORD@host/a", *(f"{n}" for n in range(5))]}
    sets = Evaluation.model_validate({"zero_shot": {"colours": images}})
    mixtures.Mixtures(specs, str(tmp_path / "out"), sets).metrics({"tuned": 1.0})
    assert "PASSWORD" not in (tmp_path / "out/mixtures.json").read_text()


def test_one_share_is_written_without_sets(
    names: list[str], tmp_path: Path, printed: Printed, refused: Printed
) -> None:
    words = ["interpolate", *names, str(tmp_path / "half")]
    printed(*words)
    assert (tmp_path / "half" / WEIGHTS).is_file()
    assert "has a model. Name another folder" in refused(*words, "--alpha", "0.5")


def test_a_soup_keeps_the_models_that_make_it_better(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed
) -> None:
    colours, out = write_colour_folder(tmp_path / "colours"), tmp_path / "soup"
    scores = {1: [0.2, 0.6], 2: [0.7]}

    def metrics(self: object, weights: dict[str, float]) -> dict[str, float]:
        return {"zero_shot/colours/top1": scores[len(weights)].pop(0)}

    monkeypatch.setattr(mixtures.Mixtures, "metrics", metrics)
    words = ["interpolate", "--soup", *names, str(out), "--zero-shot", f"colours={colours}", "--json", "-"]
    assert json.loads(printed(*words))["models"] == [names[1], names[0]]
    ends = [load_file(f"{name}/{WEIGHTS}")["positional_embedding"] for name in names]
    torch.testing.assert_close(load_file(out / WEIGHTS)["positional_embedding"], (ends[0] + ends[1]) / 2)
    scores |= {1: [0.2, 0.6], 2: [0.6]}  # no better, so it is left out
    assert json.loads(printed(*words[:-5], str(tmp_path / "alone"), *words[-4:]))["models"] == [names[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--soup", "--sweep"], "for two models, and --soup for the mean of several"),
        (["--soup"], "nothing to evaluate on"),
        (["--alpha", "0.5", "--alpha", "0.6"], "add --sweep, which evaluates each"),
        (["--alpha", "0.5", "--limit", "3"], "belong to --sweep"),
        (["--sweep"], "nothing to evaluate on"),
        (["--sweep", "--zero-shot", "a=b", "--metric", "top1"], "no set gives top1; the metrics are: zero_shot/a/top1"),
    ],
)
def test_a_wrong_use_gets_one_line(tmp_path: Path, refused: Printed, options: list[str], message: str) -> None:
    assert message in refused("interpolate", "one", "two", str(tmp_path / "out"), *options)


def test_three_models_are_for_a_soup(tmp_path: Path, refused: Printed) -> None:
    assert "--soup takes more models" in refused("interpolate", "one", "two", "three", str(tmp_path / "out"))

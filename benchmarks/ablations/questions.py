"""The questions: what the papers found, the arms that are compared, and the claims that are checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.ablations.arms import CODECS, WRONG, Arm, Study, model_mapping, override
from benchmarks.ablations.claims import Claim, Compare, Pick, Sooner, Within
from benchmarks.ablations.encoders import Encoder
from benchmarks.ablations.measures import BYTES, MILLISECONDS, MILLISECONDS_ALONE, REACHED_AT, RETAINED
from examples.demo.compare import SECONDS
from examples.demo.data import SHARE
from teachers.open_clip.catalog import FOLDER_PREFIX
from teachers.spec import DECODING_FIELDS, CaptionerSpec

#: Columns of a question's table, and panels of its figure.
OWN, UNSEEN, PICTURES, RETRIEVAL = "own_style", "unseen_style", "unseen_pictures", "retrieval"
ACCURACY = (OWN, UNSEEN, PICTURES, RETRIEVAL)

SCALES = (5, 20, 80)
#: Of the demo's teachers, in order: the most likely ones by `reinforce tune configs/tune-demo.yaml --screen-only`.
SCREENED_SCALES = (8.4, 8.2, 7.7)
#: The best ones, by `reinforce tune configs/tune-demo.yaml --set mode=joint --set 'lambda=[]'` with 2.5, 5, 10 and 20
#: of each in `scales`: for a student of one alone (`trial.data.teachers` is that one), and of all (`sample=16`).
BEST_ALONE, BEST_TOGETHER = (10, 5, 5), (10, 5, 5)
LAMBDAS = (0, 0.7, 0.85, 1)
AUGMENTATIONS = (1, 2, 5, 10)
CAPTIONS = (1, 2, 5)
#: Label -> `min_length` and `max_length` of the captioner; only the latter counts the tokens of start and end.
LENGTHS: Mapping[str, tuple[int, int]] = {"at most 3 tokens": (1, 5), "at least 12 tokens": (12, 16)}
#: Decoding of the second captioner: a lower temperature than that of the first.
CAREFUL: Mapping[str, object] = {"strategy": "nucleus", "temperature": 0.6, "top_p": 1.0}
#: Encoders of five and of four stages, in pairs that take about equally long, and their best scales, by one search.
STAGES: Mapping[Encoder, tuple[float, ...]] = {
    Encoder((1, 1, 1, 1, 1), 16, 64): (20, 5, 5),
    Encoder((1, 1, 2, 1), 24, 64): (10, 5, 5),
    Encoder((1, 1, 1, 1, 1), 16, 128): (10, 5, 5),
    Encoder((1, 1, 6, 2), 16, 128): (10, 5, 5),
}
#: Written by `make demo-teachers`, and two teachers of half the concepts by `make demo-specialists`.
PRETRAINED_CAPTIONER = Path("demo/teachers/coca-pretrain/captioner")
SPECIALISTS = Path("demo/specialists")
#: Their names and most likely scales by `reinforce tune --screen-only`.
SPECIALIST_SCALES: Mapping[str, float] = {"living": 5, "things": 5}
#: Their students, and those of both, are trained so many times as long as others.
SPECIALIST_LENGTH = 4
#: Name and override of an arm.
WITHOUT_CAPTIONS = ("captions-none", "data.captioners=[]")
_SAMPLING = frozenset(DECODING_FIELDS) - {"repetition_penalty", "min_length", "max_length", *CaptionerSpec.fast_paths}


@dataclass(frozen=True)
class Question:
    """A comparison of arms.

    ``axis`` is the label of the axis of arms with an ``x``, with a logarithmic scale if ``log``. ``target`` is the arm
    whose final accuracy defines the measures with REACHED_AT. ``clean`` maps an arm to the arm with true captions to
    which RETAINED relates it. ``needs`` is a folder without which its datasets cannot be made, and the target of make
    that writes it.
    """

    name: str
    title: str
    paper: str
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    note: str = ""
    columns: Sequence[str] = ACCURACY
    panels: Sequence[str] = ACCURACY
    axis: str | None = None
    log: bool = False
    target: str | None = None
    clean: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Path, str] | None = None


def make_questions(study: Study) -> dict[str, Question]:
    """Return all questions by name, in the order of the page."""
    makers = (
        *(_ways, _teachers, _scales, _finding_scales, _lambda, _features, _balance, _specialists, _augmentations),
        *(_captions, _lengths, _finetuning, _storage, _noise, _steps, _stages),
    )
    return {question.name: question for question in (make(study) for make in makers)}


def _ways(study: Study) -> Question:
    teachers = {name: model_mapping(study.demo.teachers[name]) for name in study.teachers}
    online = study.add_arm("online", "online", override("loss.teachers", teachers))
    stored = study.add_arm("stored", "distilled")
    return Question(
        "ways",
        "Plain, online distillation, stored distillation",
        "MobileCLIP: distillation from teachers improves a student considerably. With the teachers' embeddings stored "
        "in the dataset it is as accurate as with teachers that run in every step, and takes a fraction of the time.",
        (study.plain, online, stored),
        (
            Compare(UNSEEN, "stored", "above", "plain"),
            Compare(UNSEEN, "stored", "level with", "online"),
            Compare(SECONDS, "stored", "below", "online"),
        ),
        "Online, the same teachers encode the same crops in every step. Seconds per step are for one core and include "
        "data loading; other work on the machine makes them longer, which their deviation shows. The demo's teachers "
        "are hardly larger than its student; in the papers they are many times as large, so that online distillation "
        "is slower still.",
        columns=(*ACCURACY, SECONDS),
        panels=(OWN, UNSEEN, PICTURES, SECONDS),
    )


def _teachers(study: Study) -> Question:
    def trained(label: str, scales: Mapping[str, float]) -> Arm:
        only = override("data.teachers", [*scales])
        return study.add_arm(label, f"{label}-at-best", only, override("loss.logit_scales", dict(scales)))

    alone = [trained(name, {name: scale}) for name, scale in zip(study.teachers, BEST_ALONE, strict=True)]
    together = trained("ensemble", dict(zip(study.teachers, BEST_TOGETHER, strict=True)))
    return Question(
        "teachers",
        "Single teachers and their ensemble",
        "MobileCLIP: a student of an ensemble of teachers is better than a student of any one of them.",
        (*alone, together),
        tuple(Compare(UNSEEN, "ensemble", "above", arm.label) for arm in alone),
        "Each has its best logit scales by the same search: `reinforce tune` with 2.5, 5, 10 and 20 for each teacher "
        "(16 of the 64 combinations for the ensemble), two seeds of 160 steps, and pictures that no trial was trained "
        "on. There the ensemble was the best: it put 19.2 % into the right subgroup, conv-64 18.5 %, conv-48 17.7 %, "
        "styles-64 17.3 %. Its teachers know different things: the mean of their probabilities names 82.2 % of the "
        "unseen style and 87.0 % of the training pictures, the best of them alone, conv-48, 68.6 % and 73.8 % "
        "(`python -m benchmarks.ablations.ensembles`). So students do not take up all that the ensemble knows. Longer "
        "trainings do not change that: after 1,280 steps, mean of two seeds, students of the ensemble and of conv-48 "
        "name 68.2 % and 67.3 % of the training pictures, 24.0 % and 27.0 % of the unseen style, 12.7 % and 11.9 % of "
        "the unseen pictures, and retrieve 42.9 % and 40.4 %. All are far below their teachers on pictures that "
        "students have not seen: there the student limits the accuracy, not what its teachers know.",
    )


def _scales(study: Study) -> Question:
    def with_scale(scale: float) -> Arm:
        scales = override("loss.logit_scales", dict.fromkeys(study.teachers, scale))
        return study.add_arm(f"scale {scale:g}", f"scale-{scale:g}", scales, x=scale)

    arms = [with_scale(scale) for scale in SCALES]
    labels = [arm.label for arm in arms]
    return Question(
        "scales",
        "Logit scales",
        "MobileCLIP2: distillation quality depends strongly on the logit scales of the teachers, and the best scale "
        "differs between teachers.",
        (*arms, study.add_arm("as in the demo", "distilled")),
        (Compare(UNSEEN, Pick(labels), "above", Pick(labels, "the worst", lowest=True)),),
        "All teachers have the same scale here; `reinforce tune` finds the best scale of each.",
        axis="logit scale of all teachers",
        log=True,
    )


def _finding_scales(study: Study) -> Question:
    own = study.add_arm("the teachers' own", "own-scales", override("loss.logit_scales", study.own_scales()))
    scales = dict(zip(study.teachers, SCREENED_SCALES, strict=True))
    screened = study.add_arm("screened", "screened-scales", override("loss.logit_scales", scales))
    learnt = study.add_arm("learnt", "learnt-scales", "loss.learn_scales=true")
    return Question(
        "finding-scales",
        "Ways to find logit scales",
        "MobileCLIP2: a teacher's best logit scale for distillation is not the one that it was trained to, and is "
        "found by trainings with several values. The papers do not compare cheaper ways to find it.",
        (own, screened, learnt, study.add_arm("tuned", "distilled")),
        (
            Compare(UNSEEN, "tuned", "above", own.label),
            Compare(UNSEEN, "screened", "not below", "tuned"),
            Compare(UNSEEN, "learnt", "not below", "tuned"),
        ),
        "*Tuned* are the demo's scales, found by trainings. *Screened* are those with which the true pairs of stored "
        "embeddings are most likely, which `reinforce tune --screen-only` finds in seconds. *Learnt* scales follow the "
        "same measure during the training, from the tuned ones (`loss.learn_scales`).",
    )


def _lambda(study: Study) -> Question:
    arms = [study.add_arm(f"lambda {v:g}", f"lambda-{v:g}", override("loss.lambda", v), x=v) for v in LAMBDAS]
    labels = [arm.label for arm in arms]

    def best_other(label: str) -> Pick:
        return Pick([other for other in labels if other != label], "the best other")

    return Question(
        "lambda",
        "Lambda",
        "MobileCLIP: lambda 1 (distillation only) is best for zero-shot classification, 0.7 for retrieval.",
        arms,
        (
            Compare(UNSEEN, "lambda 1", "above", "lambda 0"),
            Compare(UNSEEN, "lambda 1", "not below", best_other("lambda 1")),
            Compare(RETRIEVAL, "lambda 0.7", "not below", best_other("lambda 0.7")),
        ),
        "With lambda 0 the student still uses synthetic captions, unlike the plain student.",
        axis="lambda",
    )


def _features(study: Study) -> Question:
    both = study.add_arm("similarities and features", "features", "loss.features=all")
    return Question(
        "features",
        "Feature distillation beside similarities",
        "MobileCLIP distils similarities only. CLIP-KD ([2307.12732](https://arxiv.org/abs/2307.12732)) finds that "
        "imitating the teacher's features helps, too, and adds to similarities.",
        (study.add_arm("similarities", "distilled"), both),
        (
            Compare(UNSEEN, both.label, "above", "similarities"),
            Compare(RETRIEVAL, both.label, "above", "similarities"),
        ),
        "`loss.features: all`: for each teacher, a linear map of the student's features approaches the teacher's "
        "embedding (1 - cosine), with the weight of the distillation.",
    )


def _balance(study: Study) -> Question:
    def trained(label: str, scales: Mapping[str, float], balance: str = "none", *overrides: str) -> Arm:
        features = override("loss.features", {"teachers": "all", "balance": balance})
        only = (override("data.teachers", [*scales]), override("loss.logit_scales", dict(scales)))
        return study.add_arm(label, f"balance-{label.replace(' ', '-')}", features, *only, *overrides)

    together = dict(zip(study.teachers, BEST_TOGETHER, strict=True))
    none = trained("ensemble", together)
    balanced = [trained(balance, together, balance) for balance in ("standardise", "phi-s", "dispersion")]
    sure = trained("confidence", together, "none", "loss.weights=confidence")
    alone = [trained(name, {name: scale}) for name, scale in zip(study.teachers, BEST_ALONE, strict=True)]
    best = Pick([arm.label for arm in alone], "the best teacher alone")
    return Question(
        "balance",
        "Balanced teachers",
        "PHI-S ([2410.01680](https://arxiv.org/abs/2410.01680)) finds that a student of several teachers is better "
        "where their features are balanced, and that one scale for all dimensions after a rotation is better than "
        "one for each dimension. C-RADIOv4 ([2601.17237](https://arxiv.org/abs/2601.17237)) divides losses by the "
        "dispersion of the teacher's vectors. Weights of rows by confidence are from "
        "[2606.23897](https://arxiv.org/abs/2606.23897).",
        (none, *balanced, sure, *alone),
        (
            *(Compare(UNSEEN, arm.label, "above", none.label) for arm in (*balanced, sure)),
            Compare(UNSEEN, "phi-s", "not below", "standardise"),
            Compare(UNSEEN, none.label, "above", best),
        ),
        "All distil similarities and features (`loss.features: all`), with the logit scales of the single teachers and "
        "of the ensemble [above](#single-teachers-and-their-ensemble). *Ensemble* is the plain mean of the three "
        "teachers, *standardise*, *phi-s* and *dispersion* are `loss.features.balance`, *confidence* is "
        "`loss.weights`, and the last three are students of one teacher. Features help the student of conv-48 most: "
        "without them it names 7.0 % of the unseen style, and that of the ensemble 5.9 %. Further ways to learn the "
        "ensemble were tried and not kept, three seeds each. The mean of logits in place of the mean of probabilities: "
        "38.2 % of the training pictures and 10.3 ± 0.4 % of the unseen style, level with the ensemble. One teacher a "
        "step, by turns: 29.6 % and 7.8 ± 0.5 %. One head for the PCA of all teachers' vectors, balanced by PHI-S and "
        "side by side, to the 96 dimensions of the student: 36.2 % and 8.6 ± 1.2 %. Students of conv-64 and conv-48 "
        "name 10.0 % of the unseen style, of conv-64 and styles-64 8.9 %, of conv-48 and styles-64 11.2 %. The "
        "student has the image encoder of conv-48, so it can become that teacher, but none of the others. What helps "
        "is a proxy: a model of the architecture of conv-64 learnt all three teachers in 1,280 steps (77.1 % and "
        "36.9 %), a second run stored its vectors, and students of it alone, at logit scale 5, name 47.4 ± 1.3 % of "
        "the training pictures and 10.9 ± 0.5 % of the unseen style, and retrieve 33.6 ± 0.9 %: the most of all here, "
        "but on the unseen style. The proxy costs nine minutes of one core, once.",
    )


def _specialists(study: Study) -> Question:
    experts = {name: {"model": f"{FOLDER_PREFIX}{SPECIALISTS / name / 'student'}"} for name in SPECIALIST_SCALES}
    dataset = study.add_dataset("specialists", override("teachers", experts))

    def trained(label: str, names: Sequence[str], *overrides: str) -> Arm:
        scales = override("loss.logit_scales", {name: SPECIALIST_SCALES[name] for name in names})
        only = (override("data.teachers", [*names]), scales, "loss.features=all", "loss.lambda=1")
        length = override("train.steps", SPECIALIST_LENGTH * study.steps)
        return study.add_arm(label, f"specialists-{label}", *only, length, *overrides, dataset=dataset)

    alone = [trained(name, [name]) for name in experts]
    both = trained("ensemble", [*experts])
    sure = trained("confidence", [*experts], "loss.weights=confidence")
    best = Pick([arm.label for arm in alone], "the best teacher alone")
    return Question(
        "specialists",
        "Teachers that know different things",
        "MobileCLIP: a student of an ensemble of teachers is better than a student of any one of them. "
        "[2606.23897](https://arxiv.org/abs/2606.23897): the more so where each row follows the teacher that is sure.",
        (*alone, both, sure),
        (
            *(Compare(measure, both.label, "above", best) for measure in (OWN, UNSEEN, RETRIEVAL)),
            *(Compare(measure, sure.label, "above", best) for measure in (OWN, UNSEEN, RETRIEVAL)),
        ),
        "Two teachers of the student's architecture each learnt half the concepts, of Twemoji and OpenMoji pictures: "
        "*living* names 36.8 % of all training pictures and 36.9 % of the unseen style, *things* 44.0 % and 41.6 %. "
        "All students distil similarities and features without the true pairs (`loss.lambda: 1`, `loss.features: "
        "all`), four times as long as others, at equal cost. *Ensemble* is the plain mean of the teachers, of whom one "
        "is ignorant in each row; *confidence* is `loss.weights`, by which each row follows the teacher that knows it. "
        "On the unseen style the student is the limit: that of one teacher can become its teacher, that of both "
        "cannot. Wider students (24 channels, 192 dimensions and texts of width 96 instead of 16, 96 and 64; one seed) "
        "of both by confidence name 48.1 % of the training pictures and 19.2 % of the unseen style, and retrieve 27.6 "
        "%; those of *things* 33.7 %, 21.0 % and 16.1 %. Twice as long, 2,560 steps, they are at 53.2 %, 20.7 % and "
        "28.6 %, for 32.2 %, 22.4 % and 15.7 %: longer training does not close the gap on the unseen style.",
        needs=(SPECIALISTS / "things" / "student", "demo-specialists"),
    )


def _augmentations(study: Study) -> Question:
    def stored(count: int) -> Arm:
        dataset = study.add_dataset(f"augmentations-{count}", override("augmentations.count", count))
        return study.add_arm(f"{count} stored", f"augmentations-{count}", dataset=dataset, x=count)

    return Question(
        "augmentations",
        "Stored augmentations",
        "MobileCLIP: accuracy rises with the number of augmentations stored per image, and 5 to 10 are enough.",
        [stored(count) for count in AUGMENTATIONS],
        (Compare(UNSEEN, "10 stored", "above", "1 stored"), Compare(UNSEEN, "10 stored", "not above", "5 stored")),
        axis="stored augmentations per image",
        log=True,
    )


def _captions(study: Study) -> Question:
    first = study.captioners[0]
    one = model_mapping(study.demo.captioners[first])
    careful = {**{key: value for key, value in one.items() if key not in _SAMPLING}, **CAREFUL, "captions": 1}

    def of_one(count: int) -> Arm:
        dataset = study.add_dataset(f"captions-{count}", override("captioners", {first: {**one, "captions": count}}))
        label = f"{count} of one captioner"
        return study.add_arm(label, f"captions-{count}", override("data.captioners", [first]), dataset=dataset)

    second = f"{first}-careful"
    both = study.add_dataset("two-captioners", override("captioners", {first: {**one, "captions": 1}, second: careful}))
    none = study.add_arm("none", *WITHOUT_CAPTIONS)
    two = study.add_arm(
        "1 of each of two", "two-captioners", override("data.captioners", [first, second]), dataset=both
    )
    return Question(
        "captions",
        "Synthetic captions",
        "MobileCLIP: synthetic captions improve the student, and more than one or two per captioner add little. "
        "MobileCLIP2: captions of several captioners improve it further.",
        (none, *map(of_one, CAPTIONS), two),
        (
            Compare(UNSEEN, "1 of one captioner", "above", "none"),
            Compare(RETRIEVAL, "1 of one captioner", "above", "none"),
            Compare(UNSEEN, "5 of one captioner", "not above", "2 of one captioner"),
            Compare(UNSEEN, "1 of each of two", "above", "2 of one captioner"),
        ),
        f"The second captioner is the same model, {first}, sampled at temperature {CAREFUL['temperature']} without "
        "top-p. Two independently trained captioners would differ more.",
    )


def _lengths(study: Study) -> Question:
    first = study.captioners[0]
    captioner = model_mapping(study.demo.captioners[first])

    def limited(number: int, label: str) -> Arm:
        shortest, longest = LENGTHS[label]
        limits = {"min_length": shortest, "max_length": longest}
        dataset = study.add_dataset(f"lengths-{number}", override("captioners", {first: {**captioner, **limits}}))
        return study.add_arm(label, f"lengths-{number}", dataset=dataset)

    short, long = (limited(number, label) for number, label in enumerate(LENGTHS))
    return Question(
        "lengths",
        "Length of synthetic captions",
        "MobileCLIP2: captions of at most 255 tokens are not better than captions of at most 77.",
        (short, study.add_arm("free", "distilled"), long),
        (
            Compare(UNSEEN, long.label, "not above", "free"),
            Compare(RETRIEVAL, long.label, "not above", "free"),
            Compare(UNSEEN, short.label, "not above", "free"),
        ),
        "The captioner was trained on noun phrases of a few words. *Free* captions end where it ends them.",
    )


def _finetuning(study: Study) -> Question:
    first = study.captioners[0]
    before = {**model_mapping(study.demo.captioners[first]), "model": f"{FOLDER_PREFIX}{PRETRAINED_CAPTIONER}"}
    dataset = study.add_dataset("pretrained-captioner", override("captioners", {first: before}))
    pretrained = study.add_arm("pre-trained", "pretrained-captioner", dataset=dataset)
    finetuned = study.add_arm("fine-tuned", "distilled")
    return Question(
        "finetuning",
        "A fine-tuned captioner and its pre-trained state",
        "MobileCLIP2: a captioner that is fine-tuned on few but high-quality captions gives a better dataset than one "
        "that is pre-trained on captions from the web only.",
        (study.add_arm("none", *WITHOUT_CAPTIONS), pretrained, finetuned),
        (
            Compare(UNSEEN, finetuned.label, "above", pretrained.label),
            Compare(RETRIEVAL, finetuned.label, "above", pretrained.label),
        ),
        "The captioner is pre-trained on captions of which half add keywords to a phrase, and fine-tuned on the "
        "phrases alone, for 1,000 further steps: see [its training](../configs/demo-models/README.md). *None*: without "
        "synthetic captions.",
        needs=(PRETRAINED_CAPTIONER, "demo-teachers"),
    )


def _storage(study: Study) -> Question:
    return Question(
        "storage",
        "Precision and codec of stored embeddings",
        "The papers' DataCompDR-12M is also published with embeddings in bfloat16, so 16 bits should be enough. They "
        "do not compare smaller codes.",
        [study.add_codec_arm(label) for label in CODECS],
        tuple(Compare(measure, label, "not below", "float32") for label in [*CODECS][1:] for measure in (OWN, UNSEEN)),
        "The axis shows bits for each number of a vector: 8 are int8; 4 are half as many principal components in int8, "
        "2 and 1 product codes, half a bit residual codes. Bytes are the size of all embedding files, including keys, "
        "without the codebooks, of which a dataset has one for each teacher.",
        columns=(*ACCURACY, BYTES),
        panels=(OWN, UNSEEN, PICTURES, RETRIEVAL),
        axis="bits per number",
        log=True,
    )


def _noise(study: Study) -> Question:
    share = f"{SHARE:.0%}"
    dataset = study.add_dataset(WRONG, override("source", f"{study.wrong_shards}/*.tar"))
    plain, distilled = (
        study.add_arm(f"{base} with {share} wrong", f"{base}-{WRONG}", base=base, dataset=dataset)
        for base in ("plain", "distilled")
    )
    return Question(
        "noise",
        "Wrong captions",
        "MobileCLIP: captions from the web are noisy, and teachers and synthetic captions compensate for that. Here "
        "some captions are made wrong on purpose.",
        (study.plain, study.distilled, plain, distilled),
        (
            Compare(UNSEEN, distilled.label, "above", plain.label),
            Compare(RETAINED, distilled.label, "above", plain.label),
        ),
        f"{share} of the student's samples have the caption of another sample, the same samples with every seed. The "
        "dataset is made from these shards, so the teachers embed the wrong captions; the captioner only uses the "
        "pictures. *Retained* is the accuracy on the training pictures divided by that of the same seed with true "
        "captions.",
        columns=(*ACCURACY, RETAINED),
        panels=(OWN, UNSEEN, PICTURES, RETRIEVAL),
        clean={plain.label: "plain", distilled.label: "distilled"},
    )


def _steps(study: Study) -> Question:
    return Question(
        "steps",
        "Steps to the plain student's accuracy",
        "MobileCLIP: training on the reinforced dataset is 10 to 1000 times as efficient as on the original one.",
        (study.plain, study.distilled),
        (Sooner(OWN, "distilled", "plain"), Sooner(UNSEEN, "distilled", "plain")),
        "The step at which each student first reaches the final accuracy of the plain student with the same seed, "
        "interpolated linearly between evaluations. Both students decay the learning rate to zero at the end; "
        "a shorter training with its own decay would be more efficient.",
        columns=(OWN, OWN + REACHED_AT, UNSEEN, UNSEEN + REACHED_AT),
        panels=(OWN, UNSEEN),
        target="plain",
    )


def _stages(study: Study) -> Question:
    def trained(encoder: Encoder, best: Sequence[float]) -> Arm:
        scales = override("loss.logit_scales", dict(zip(study.teachers, best, strict=True)))
        label = f"{'five' if len(encoder.blocks) == 5 else 'four'} stages, {encoder.size} pixels"
        return study.add_arm(label, f"stages-{encoder.name}-at-best", scales, encoder=encoder)

    arms, claims = [trained(*pair) for pair in STAGES.items()], list[Claim]()
    for five, four in zip(arms[::2], arms[1::2], strict=True):
        claims += [Within(measure, five.label, four.label, 0.1) for measure in (MILLISECONDS, MILLISECONDS_ALONE)]
        claims += [Compare(measure, five.label, "above", four.label) for measure in (UNSEEN, RETRIEVAL)]
    return Question(
        "stages",
        "Image encoders of five and of four stages",
        "MobileCLIP2: a fifth stage, at half the resolution, makes an image encoder of given size faster, the more so "
        "the larger the images. So it should be more accurate than one of four stages that takes equally long.",
        arms,
        claims,
        "Both are small versions of MobileCLIP2-S3's image encoder; that of four stages lacks the last and has the "
        "widths and blocks with which it takes about as long, by `reinforce export latency`, in CPU milliseconds of "
        "one core for an image alone and of 64 together. At this size an image alone mostly takes the time to start "
        "operations. The same search gave each its scale of conv-64: `reinforce tune` with 5, 10 and 20, 5 for the "
        "other teachers, two seeds, and held-out pictures, of which 12.7 % (five stages, at 20) and 15.4 % (four, at "
        "10) get the right subgroup with 64 pixels, 16.0 % and 16.3 % (both at 10) with 128. The fifth stage has one "
        "position with images of 64 pixels, four with 128, and 16 in MobileCLIP2-S3, with 256; the pictures have 72.",
        columns=(*ACCURACY, MILLISECONDS, MILLISECONDS_ALONE),
        panels=(OWN, UNSEEN, PICTURES, MILLISECONDS),
    )

"""The questions, what the papers found, and what follows for the numbers if it holds here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.ablations.arms import WRONG, Arm, Study, assigned, spec
from benchmarks.ablations.claims import Claim, Compare, Pick, Sooner
from benchmarks.ablations.measures import BYTES, KEPT, REACH
from reinforce.demo.compare import SECONDS
from teachers.spec import DECODING_FIELDS

#: Columns of a question's table, and the panels of its picture.
OWN, UNSEEN, PICTURES, RETRIEVAL = "own_style", "unseen_style", "unseen_pictures", "retrieval"
ACCURACY = (OWN, UNSEEN, PICTURES, RETRIEVAL)

SCALES = (5, 10, 20, 40, 80)
LAMBDAS = (0, 0.3, 0.7, 1)
AUGMENTATIONS = (1, 2, 5, 10, 30)
CAPTIONS = (1, 2, 5)
WRONG_SHARE = 0.4
#: Of the second captioner: the likelier words still likelier, where the first samples.
CAREFUL: Mapping[str, object] = {"strategy": "nucleus", "temperature": 0.6, "top_p": 1.0}
_SAMPLING = frozenset(DECODING_FIELDS) - {"repetition_penalty", "min_length", "max_length", "compile"}


@dataclass(frozen=True)
class Question:
    """Arms that are compared.

    ``axis`` names the axis of arms with an ``x``, ``log`` its scale. Where there is a ``target``, KEY + REACH is
    measured against that arm; ``clean`` names the arm that KEPT relates an arm to.
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


def questions(study: Study) -> dict[str, Question]:
    """All of them by name, in the order of the page."""
    made = (_ways, _teachers, _scales, _lambda, _augmentations, _captions, _storage, _noise, _steps)
    return {question.name: question for question in (make(study) for make in made)}


def _ways(study: Study) -> Question:
    teachers = {name: spec(study.demo.teachers[name]) for name in study.teachers}
    online = study.arm("online", "online", "loss.targets=online", assigned("loss.teachers", teachers))
    stored = study.arm("stored", "distilled")
    return Question(
        "ways",
        "Plain, online distillation, stored distillation",
        "MobileCLIP: a student that distils from teachers is far better than a plain one, and with the teachers' "
        "embeddings stored in the dataset it is as good as with teachers in the loop, at a fraction of the time.",
        (study.plain, online, stored),
        (
            Compare(UNSEEN, "stored", "above", "plain"),
            Compare(UNSEEN, "stored", "level with", "online"),
            Compare(SECONDS, "stored", "below", "online"),
        ),
        "Online, the same teachers see the same crops in every step. A step's seconds are those of one core, reading "
        "included. The demo's teachers are hardly larger than its student; those of the papers are many times as "
        "large, and cost as much more.",
        columns=(*ACCURACY, SECONDS),
        panels=(OWN, UNSEEN, PICTURES, SECONDS),
    )


def _teachers(study: Study) -> Question:
    alone = [study.arm(name, f"teacher-{name}", assigned("data.teachers", [name])) for name in study.teachers]
    together = study.arm("ensemble", "distilled")
    return Question(
        "teachers",
        "One teacher, another, the ensemble",
        "MobileCLIP: a student of an ensemble is better than one of either of its members.",
        (*alone, together),
        tuple(Compare(UNSEEN, "ensemble", "above", arm.label) for arm in alone),
        f"The ensemble: {' and '.join(study.teachers)}.",
    )


def _scales(study: Study) -> Question:
    def alike(scale: float) -> Arm:
        change = assigned("loss.logit_scales", dict.fromkeys(study.teachers, scale))
        return study.arm(f"scale {scale:g}", f"scale-{scale:g}", change, x=scale)

    arms = [alike(scale) for scale in SCALES]
    labels = [arm.label for arm in arms]
    return Question(
        "scales",
        "Logit scales",
        "MobileCLIP2: distillation hangs much on the logit scales of the teachers' softmax, and each teacher has a "
        "best one of its own.",
        (*arms, study.arm("as in the demo", "distilled")),
        (Compare(UNSEEN, Pick(labels), "above", Pick(labels, "the worst", lowest=True)),),
        "All teachers have the same scale here; `reinforce tune` finds each one's own.",
        axis="logit scale of all teachers",
        log=True,
    )


def _lambda(study: Study) -> Question:
    arms = [study.arm(f"lambda {v:g}", f"lambda-{v:g}", assigned("loss.lambda", v), x=v) for v in LAMBDAS]
    labels = [arm.label for arm in arms]

    def others(label: str) -> Pick:
        return Pick([other for other in labels if other != label], "the best other")

    return Question(
        "lambda",
        "Lambda",
        "MobileCLIP: lambda 1, distillation alone, is best for zero-shot classification, 0.7 for retrieval.",
        arms,
        (
            Compare(UNSEEN, "lambda 1", "above", "lambda 0"),
            Compare(UNSEEN, "lambda 1", "not below", others("lambda 1")),
            Compare(RETRIEVAL, "lambda 0.7", "not below", others("lambda 0.7")),
        ),
        "With lambda 0 the student still has synthetic captions, which the plain one has not.",
        axis="lambda",
    )


def _augmentations(study: Study) -> Question:
    def stored(count: int) -> Arm:
        dataset = study.dataset(f"augmentations-{count}", assigned("augmentations.count", count))
        return study.arm(f"{count} stored", f"augmentations-{count}", dataset=dataset, x=count)

    return Question(
        "augmentations",
        "Stored augmentations",
        "MobileCLIP: accuracy rises with the number of augmentations that are stored of an image, and 5 to 10 suffice.",
        [stored(count) for count in AUGMENTATIONS],
        (Compare(UNSEEN, "10 stored", "above", "1 stored"), Compare(UNSEEN, "30 stored", "not above", "10 stored")),
        axis="stored augmentations of an image",
        log=True,
    )


def _captions(study: Study) -> Question:
    first = study.captioners[0]
    one = spec(study.demo.captioners[first])
    careful = {**{key: value for key, value in one.items() if key not in _SAMPLING}, **CAREFUL, "captions": 1}

    def of_one(count: int) -> Arm:
        dataset = study.dataset(f"captions-{count}", assigned("captioners", {first: {**one, "captions": count}}))
        label = f"{count} of one captioner"
        return study.arm(label, f"captions-{count}", assigned("data.captioners", [first]), dataset=dataset)

    second = f"{first}-careful"
    both = study.dataset("two-captioners", assigned("captioners", {first: {**one, "captions": 1}, second: careful}))
    none = study.arm("none", "captions-none", "data.captioners=[]")
    two = study.arm("1 of each of two", "two-captioners", assigned("data.captioners", [first, second]), dataset=both)
    return Question(
        "captions",
        "Synthetic captions",
        "MobileCLIP: synthetic captions help, and more than one or two of a captioner add little; MobileCLIP2: those "
        "of several captioners add to each other.",
        (none, *map(of_one, CAPTIONS), two),
        (
            Compare(UNSEEN, "1 of one captioner", "above", "none"),
            Compare(RETRIEVAL, "1 of one captioner", "above", "none"),
            Compare(UNSEEN, "5 of one captioner", "not above", "2 of one captioner"),
            Compare(UNSEEN, "1 of each of two", "above", "2 of one captioner"),
        ),
        f"The second captioner is the demo's own one, {first}, once more: it samples at temperature "
        f"{CAREFUL['temperature']}, from all words. Two models that learnt apart would differ by more.",
    )


def _storage(study: Study) -> Question:
    def stored(dtype: str) -> Arm:
        teachers = {name: {**spec(teacher), "dtype": dtype} for name, teacher in study.demo.teachers.items()}
        return study.arm(dtype, dtype, dataset=study.dataset(dtype, assigned("teachers", teachers)))

    return Question(
        "storage",
        "Bits of an embedding",
        "The papers' DataCompDR-12M is published with embeddings in bfloat16 as well: 16 bits are held to suffice.",
        [stored(dtype) for dtype in ("float32", "float16", "int8")],
        tuple(
            Compare(measure, dtype, "not below", "float32")
            for dtype in ("float16", "int8")
            for measure in (OWN, UNSEEN)
        ),
        "Bytes are those of the files of all embeddings, keys included.",
        columns=(*ACCURACY, BYTES),
        panels=(OWN, UNSEEN, PICTURES, BYTES),
    )


def _noise(study: Study) -> Question:
    share = f"{WRONG_SHARE:.0%}"
    dataset = study.dataset(WRONG, assigned("source", f"{study.wrong_shards}/*.tar"))
    plain, distilled = (
        study.arm(f"{base} with {share} wrong", f"{base}-{WRONG}", base=base, dataset=dataset)
        for base in ("plain", "distilled")
    )
    return Question(
        "noise",
        "Wrong captions",
        "MobileCLIP: captions from the web are noisy, and teachers and synthetic captions make up for it; tried here "
        "with captions that are wrong on purpose.",
        (study.plain, study.distilled, plain, distilled),
        (
            Compare(UNSEEN, distilled.label, "above", plain.label),
            Compare(KEPT, distilled.label, "above", plain.label),
        ),
        f"Of the student's samples, {share} have the caption of another sample, the same ones with every seed. The "
        "dataset is made from such shards: the teachers embed the wrong captions as they stand, and the captioner sees "
        "pictures alone. `Kept` is the accuracy on the own style beside that of the same seed with true captions.",
        columns=(*ACCURACY, KEPT),
        panels=(OWN, UNSEEN, PICTURES, RETRIEVAL),
        clean={plain.label: "plain", distilled.label: "distilled"},
    )


def _steps(study: Study) -> Question:
    return Question(
        "steps",
        "Steps to the plain student's accuracy",
        "MobileCLIP: training on the reinforced dataset is 10 to 1000 times as efficient as on the plain one.",
        (study.plain, study.distilled),
        (Sooner(OWN, "distilled", "plain"), Sooner(UNSEEN, "distilled", "plain")),
        "The step at which each student first has the final accuracy of the plain student of its seed, in straight "
        "lines between evaluations. The rate of learning falls to nothing at the end for both, which a shorter "
        "training would make the most of.",
        columns=(OWN, OWN + REACH, UNSEEN, UNSEEN + REACH),
        panels=(OWN, UNSEEN),
        target="plain",
    )

"""The sections of the benchmark, by their value: what comes first is measured first."""

from benchmarks.gpu.process import Section
from benchmarks.gpu.sections import captions, card, loader, losses, right, shards, students, teachers

SECTIONS: dict[str, Section] = {
    "card": Section(card.measure_card, 2),
    "right": Section(right.measure_right, 8, checks=True),
    "shards": Section(shards.measure_shards, 7),
    "captions": Section(captions.measure_captions, 6),
    "students": Section(students.measure_students, 12),
    "ranks": Section(students.measure_ranks, 6, checks=True, ranks=True),
    "bytes": Section(shards.check_shards, 7, checks=True),
    "run": Section(shards.measure_run, 6, checks=True),
    "loader": Section(loader.measure_loader, 3, checks=True),
    "loss": Section(losses.measure_loss, 2, checks=True),
    "resumed": Section(students.compare_resumed, 3, checks=True),
    "teachers": Section(teachers.measure_teachers, 9),
    "augmentations": Section(shards.measure_many_augmentations, 5),
    "teacher-switches": Section(teachers.measure_switches, 8),
    "caption-switches": Section(captions.measure_switches, 8),
    "teacher-batches": Section(teachers.measure_batches, 5),
    "caption-batches": Section(captions.measure_batches, 5),
}

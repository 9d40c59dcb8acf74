"""What a summary compares: pixels, an untrained student, teachers, trained students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError
from hdscale.runs.trained import TrainedRun
from hdscale.student.build import Student, build_student
from hdscale.student.load import load_student
from hdscale.teachers.build import FrozenTeacher, build_teacher
from hdscale.teachers.files import load_teacher_file

Role = Literal["baseline", "teacher", "student"]

_METHODS = {"mae": "MAE", "supervised": "supervised"}
"""How the summary calls a teacher file's `kind`."""
_SHARED_FIELDS = (
    ("data", "shards"),
    ("data", "split"),
    ("data", "img_size"),
    ("evaluation", "split"),
    ("evaluation", "neighbors"),
    ("evaluation", "attention_images"),
)
"""What must be equal for two runs to stand in one table."""


class Candidate(NamedTuple):
    """One row of the summary, before it is measured."""

    name: str
    role: Role
    model: Student | FrozenTeacher | None  # None: raw pixels
    images_per_second: float | None = None  # of its training


def student_name(run: TrainedRun) -> str:
    """Name a run's student after its folder."""
    return f"student {run.folder.name}"


def student_candidate(run: TrainedRun) -> Candidate:
    """Rebuild a run's student."""
    student = load_student(run.recipe.student, run.recipe.data.img_size, run.weights)
    return Candidate(student_name(run), "student", student, run.images_per_second)


def teacher_candidate(config: TeacherConfig, grid_size: int, field: str) -> Candidate:
    """Build a teacher whole, on the student's grid, named after how it was trained."""
    if config.source == "file":
        kind = load_teacher_file(config.weights, f"{field}.weights").kind
        name = f"{_METHODS.get(kind, kind)} teacher"
    else:
        name = f"teacher {config.name} ({config.weights})"
    return Candidate(name, "teacher", build_teacher(config, grid_size=grid_size, field=field))


def summary_candidates(runs: Sequence[TrainedRun]) -> list[Candidate]:
    """List pixels, the first run's untrained student, every teacher once, and all students.

    Raises:
        UserError: the runs cannot be compared, or a teacher cannot be built.
    """
    _check_comparable(runs)
    first = runs[0].recipe
    untrained = build_student(first.student, first.data.img_size, seed=first.run.seed)
    students = [student_candidate(run) for run in runs]
    teachers: dict[tuple[TeacherConfig, int], Candidate] = {}
    for run, student in zip(runs, students, strict=True):
        assert student.model is not None
        grid_size = student.model.grid_size
        for field in ("relation_teacher", "feature_teacher"):
            config: TeacherConfig | None = getattr(run.recipe, field)
            if config is None:
                continue
            config = config.model_copy(update={"sharding": "replicate"})  # says how it runs, not what it is
            if (config, grid_size) not in teachers:
                teachers[config, grid_size] = teacher_candidate(config, grid_size, field)
    return [
        Candidate("raw pixels", "baseline", None),
        Candidate("random student", "baseline", untrained.eval()),
        *_with_distinct_names(teachers),
        *students,
    ]


def _with_distinct_names(teachers: Mapping[tuple[TeacherConfig, int], Candidate]) -> list[Candidate]:
    """Append to names that teachers share what tells them apart: the file's folder, its path, or else a number."""
    names = [candidate.name for candidate in teachers.values()]
    candidates = []
    for candidate in teachers.values():
        alike = [other.weights for (other, _), name in zip(teachers, names, strict=True) if name == candidate.name]
        place = names[: len(candidates)].count(candidate.name)  # among those alike
        folders = [Path(weights).parent.name for weights in alike]
        numbers = [str(number) for number in range(1, len(alike) + 1)]
        details = next(each for each in (folders, alike, numbers) if len(set(each) - {""}) == len(each))
        candidates.append(
            candidate if len(alike) == 1 else candidate._replace(name=f"{candidate.name} ({details[place]})")
        )
    return candidates


def _check_comparable(runs: Sequence[TrainedRun]) -> None:
    first = runs[0]
    names = [run.folder.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--run: {name} is there {names.count(name)} times, students are told apart by folder name")
    for run in runs[1:]:
        for section, name in _SHARED_FIELDS:
            here, there = (getattr(getattr(r.recipe, section), name) for r in (first, run))
            if here != there:
                raise UserError(
                    f"--run {run.folder}: {section}.{name} is {there}, but {here} in {first.folder}: one table needs "
                    "equal data and evaluation; run the summary for each alone"
                )

from pathlib import Path

import pytest

from hdscale.config.recipe import Recipe, TeacherConfig
from hdscale.config.sections import DataConfig, StudentConfig
from hdscale.distiller import build_distiller
from hdscale.evaluation.candidates import summary_candidates
from hdscale.runs.trained import TrainedRun
from hdscale.student.build import build_student
from hdscale.teachers.files import save_teacher_file
from hdscale.types import TeacherShapes

STUDENT = StudentConfig(model="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=3, num_heads=4, drop_path=0.0)
ARCH = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 0,
}


@pytest.fixture
def teacher_names(tmp_path):
    """Write one MAE file for each path; return the names that the summary of one run for each gives its teachers."""

    def names(*paths):
        runs = []
        for number, path in enumerate(paths):
            file = tmp_path / path
            if not file.exists():
                state = build_student(STUDENT, 32, seed=number).encoder.model.state_dict()
                save_teacher_file(file, state, ARCH, (0.5,) * 3, (0.5,) * 3, kind="mae")
            recipe = Recipe(
                data=DataConfig(img_size=32),
                student=STUDENT,
                feature_teacher=None,
                relation_teacher=TeacherConfig(source="file", weights=str(file)),
            )
            distiller = build_distiller(
                STUDENT,
                recipe.relation,
                recipe.loss,
                img_size=32,
                seed=0,
                teachers=TeacherShapes(relation_heads=4, relation_has_cls=True),
            )
            runs.append(TrainedRun(Path(f"run-{number}"), recipe, distiller.state_dict(), 1, None))
        return [candidate.name for candidate in summary_candidates(runs) if candidate.role == "teacher"]

    return names


def test_one_teacher_of_a_kind_needs_no_more_than_its_kind(teacher_names):
    assert teacher_names("a/mae.safetensors", "a/mae.safetensors") == ["MAE teacher"]


def test_teachers_of_one_kind_are_told_apart_by_folder(teacher_names):
    assert teacher_names("a/mae.safetensors", "b/mae.safetensors") == ["MAE teacher (a)", "MAE teacher (b)"]


def test_teachers_in_one_folder_are_told_apart_by_path(teacher_names, tmp_path):
    assert teacher_names("a/1.safetensors", "a/2.safetensors", "b/3.safetensors") == [
        f"MAE teacher ({tmp_path / name}.safetensors)" for name in ("a/1", "a/2", "b/3")
    ]

from pathlib import Path

import pytest
import timm
import torch

from hdscale.config.recipe import TeacherConfig
from hdscale.teachers.files import save_teacher_file

ARCH = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 0,
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.fixture(scope="session")
def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(**ARCH).eval()


@pytest.fixture
def tiny_file(tmp_path: Path, tiny_model: torch.nn.Module) -> Path:
    path = tmp_path / "teacher.safetensors"
    save_teacher_file(path, tiny_model.state_dict(), ARCH, MEAN, STD, kind="mae")
    return path


@pytest.fixture
def tiny_config(tiny_file: Path) -> TeacherConfig:
    return TeacherConfig(source="file", weights=str(tiny_file))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

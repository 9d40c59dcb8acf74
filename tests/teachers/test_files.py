import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError
from hdscale.teachers.build import build_teacher
from hdscale.teachers.files import load_teacher_file, save_teacher_file


def test_a_file_says_how_to_build_its_model(tiny_file, tiny_model):
    file = load_teacher_file(tiny_file, "feature_teacher.weights")
    assert (file.mean, file.std, file.kind) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "mae")
    timm.create_model(**file.arch).load_state_dict(file.state, strict=True)
    assert all(torch.equal(tensor, file.state[name]) for name, tensor in tiny_model.state_dict().items())
    with safe_open(tiny_file, framework="pt") as raw:
        assert json.loads(raw.metadata()["hdscale"])["timm"]["model_name"] == "vit_tiny_patch16_224"


def test_shared_and_sliced_tensors_are_written(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    path = tmp_path / "new folder" / "a.safetensors"
    save_teacher_file(path, {"a": base.T, "b": base[1]}, {"model_name": "x"}, (0, 0, 0), (1, 1, 1), kind="mae")
    state = load_teacher_file(path, "weights").state
    assert torch.equal(state["a"], base.T)
    assert torch.equal(state["b"], base[1])


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tiny_file, monkeypatch):
    before = tiny_file.read_bytes()

    def full_disk(_tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("hdscale.teachers.files.save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_teacher_file(tiny_file, {}, {"model_name": "x"}, (0, 0, 0), (1, 1, 1), kind="mae")
    assert tiny_file.read_bytes() == before
    assert [path.name for path in tiny_file.parent.iterdir()] == [tiny_file.name]


def test_other_files_are_refused(tmp_path, tiny_file):
    with pytest.raises(UserError, match=r"model\.pt must end in \.safetensors"):
        save_teacher_file(tmp_path / "model.pt", {}, {"model_name": "x"}, (0, 0, 0), (1, 1, 1), kind="mae")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("other", "text"):
        with pytest.raises(UserError, match=rf"weights: .*{name}\.safetensors is not a file of hdscale's; for other"):
            load_teacher_file(tmp_path / f"{name}.safetensors", "weights")
    with pytest.raises(UserError, match=r"relation_teacher\.weights: there is no file"):
        build_teacher(TeacherConfig(source="file", weights=str(tmp_path / "no")), field="relation_teacher")
    with pytest.raises(UserError, match=r"feature_teacher\.target projected needs a CLIP model, got a file"):
        build_teacher(TeacherConfig(source="file", weights=str(tiny_file), target="projected"))


def test_a_file_whose_weights_do_not_fit_its_own_model_is_refused(tmp_path, tiny_model):
    arch = {"model_name": "vit_tiny_patch16_224"}
    save_teacher_file(tmp_path / "a.safetensors", tiny_model.state_dict(), arch, (0, 0, 0), (1, 1, 1), kind="mae")
    with pytest.raises(UserError, match=r"feature_teacher\.weights: .*a\.safetensors does not fit the model: missing"):
        build_teacher(TeacherConfig(source="file", weights=str(tmp_path / "a.safetensors")))

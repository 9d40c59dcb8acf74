import pytest
import timm
import torch
from safetensors.torch import load_file

from hdscale.config.recipe import TeacherConfig
from hdscale.config.sections import LossConfig, PretrainConfig, RelationConfig, StudentConfig
from hdscale.distiller import build_distiller
from hdscale.errors import UserError
from hdscale.export import export_student, loading_code
from hdscale.pretraining import MaskedAutoencoder
from hdscale.student.build import build_student
from hdscale.teachers.build import build_teacher
from hdscale.teachers.files import load_teacher_file
from hdscale.types import TeacherShapes

MARK = "not trained to be read: in no loss of this run"
SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
STUDENTS = {
    "plain": StudentConfig(model="vit_tiny_patch16_224", mlp_ratio=2.0, drop_path=0.3, **SIZES),
    "registers": StudentConfig(model="vit_small_patch14_reg4_dinov2", drop_path=0.0, **SIZES),
}


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def trained(config, images):
    """A distiller whose weights are no longer the initial ones."""
    distiller = build_distiller(
        config,
        RelationConfig(),
        LossConfig(),
        img_size=32,
        seed=0,
        teachers=TeacherShapes(feature_dim=24, relation_heads=4, relation_has_cls=True),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return distiller.eval()


def normalized(images, config):
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    return (images / 255 - mean) / std


def printed_features(arch, path, config, images, **said):
    """Run the printed lines; return their readings and their text."""
    text, names = loading_code(arch, path, config, **said), {}
    exec(text, names)
    with torch.no_grad():
        return names["features"](normalized(images, config)), text


@pytest.mark.parametrize("name", STUDENTS)
def test_timm_takes_an_exported_student_strictly_and_gives_the_same_features(name, images, tmp_path):
    config = STUDENTS[name]
    distiller = trained(config, images)
    arch = export_student(distiller.state_dict(), config, 32, tmp_path / "student.safetensors")
    model = timm.create_model(**arch).eval()
    model.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    with torch.no_grad():
        theirs = model.forward_features(normalized(images, config))[:, model.num_prefix_tokens :]
        ours = distiller.student(images).patch_tokens
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_an_exported_student_is_a_teacher(images, tmp_path):
    config = STUDENTS["plain"]
    distiller = trained(config, images)
    path = tmp_path / "new" / "student.safetensors"
    export_student(distiller.state_dict(), config, 32, path)
    teacher = build_teacher(TeacherConfig(source="file", weights=str(path)))
    with torch.no_grad():
        ours = distiller.student(images).patch_tokens
    torch.testing.assert_close(teacher(images).patch_tokens, ours, rtol=1e-5, atol=1e-5)


def test_a_pretrained_encoder_is_exported_without_its_decoder(tmp_path):
    config = STUDENTS["plain"]
    pretrain = PretrainConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2)
    module = MaskedAutoencoder(build_student(config, 32, seed=0), pretrain, seed=0)
    arch = export_student(module.state_dict(), config, 32, tmp_path / "mae.safetensors", kind="mae")
    assert load_file(tmp_path / "mae.safetensors").keys() == timm.create_model(**arch).state_dict().keys()


@pytest.mark.parametrize("kind", ["student", "mae", "supervised"])
def test_an_exported_file_says_how_its_model_was_trained(kind, images, tmp_path):
    config, path = STUDENTS["plain"], tmp_path / "encoder.safetensors"
    export_student(trained(config, images).state_dict(), config, 32, path, kind=kind)
    assert load_teacher_file(path, "feature_teacher.weights").kind == kind


def test_half_precision_weights_are_written_in_float32(images, tmp_path):
    config = STUDENTS["plain"]
    weights = {name: tensor.half() for name, tensor in trained(config, images).state_dict().items()}
    export_student(weights, config, 32, tmp_path / "student.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "student.safetensors").values()} == {torch.float32}


def test_the_printed_code_loads_the_file(images, tmp_path):
    config = STUDENTS["plain"]
    distiller = trained(config, images)
    path = tmp_path / "student.safetensors"
    arch = export_student(distiller.state_dict(), config, 32, path)
    names = {}
    exec(loading_code(arch, path, config), names)
    ours = distiller.student.encoder.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in names["model"].state_dict().items())


@pytest.mark.parametrize("name", ["plain", "registers", "position bias"])
def test_the_printed_code_reads_class_token_and_mean_of_patches(name, images, tmp_path):
    config = STUDENTS["plain"].model_copy(update={"rel_pos_bias": True}) if "bias" in name else STUDENTS[name]
    distiller, path = trained(config, images), tmp_path / "student.safetensors"
    arch = export_student(distiller.state_dict(), config, 32, path)
    (class_token, patch_mean), _ = printed_features(arch, path, config, images)
    with torch.no_grad():
        ours = distiller.student(images)
    torch.testing.assert_close(class_token, ours.prefix_tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patch_mean, ours.patch_tokens.mean(dim=1), rtol=1e-5, atol=1e-5)


def test_a_student_without_a_class_token_has_one_reading_and_nothing_to_mark(images, tmp_path):
    config = STUDENTS["plain"].model_copy(update={"model": "vit_medium_patch16_reg4_gap_256"})
    distiller, path = trained(config, images), tmp_path / "student.safetensors"
    arch = export_student(distiller.state_dict(), config, 32, path)
    patch_mean, text = printed_features(arch, path, config, images)
    with torch.no_grad():
        wanted = distiller.student(images).patch_tokens.mean(dim=1)
    torch.testing.assert_close(patch_mean, wanted, rtol=1e-5, atol=1e-5)
    assert "class_token" not in text
    assert MARK not in text
    assert load_teacher_file(path, "feature_teacher.weights").cls_in_loss is None


@pytest.mark.parametrize("cls_in_loss", [True, False])
def test_a_class_token_that_no_loss_has_seen_is_marked_in_print_and_in_the_file(cls_in_loss, images, tmp_path):
    config, path = STUDENTS["plain"], tmp_path / "student.safetensors"
    arch = export_student(trained(config, images).state_dict(), config, 32, path, cls_in_loss=cls_in_loss)
    assert load_teacher_file(path, "feature_teacher.weights").cls_in_loss is cls_in_loss
    lines = [line for line in loading_code(arch, path, config, cls_in_loss=cls_in_loss).splitlines() if MARK in line]
    assert [line.split()[0] for line in lines] == ([] if cls_in_loss else ["class_token"])


def test_an_output_that_cannot_be_written_is_refused(images, tmp_path):
    config = STUDENTS["plain"]
    (tmp_path / "file").write_text("")
    weights = trained(config, images).state_dict()
    with pytest.raises(UserError, match=r"student\.safetensors cannot be written .*--output"):
        export_student(weights, config, 32, tmp_path / "file" / "student.safetensors")

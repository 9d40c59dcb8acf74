"""The class token in the feature term: both sides of `loss.cls` against float64, gradients, costs, and who has none."""

import contextlib
import copy
import io

import numpy as np
import pytest
import timm
import torch

import hdscale.training.distill as distillation
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.config.recipe import Recipe
from hdscale.distiller import build_distiller
from hdscale.engine.ranks import Ranks
from hdscale.flops import count_flops, step_flops_per_image
from hdscale.student.build import student_grid_size
from hdscale.teachers.build import build_teachers
from hdscale.teachers.files import load_teacher_file, save_teacher_file
from hdscale.teachers.targets import TeacherPair
from hdscale.types import Batch, ComparedTokens, TeacherShapes
from hdscale.vit.position import sincos_position_embedding
from tests.conftest import ROOT, write_teacher

KEEP = torch.tensor([[0, 3, 4, 9, 12], [1, 2, 5, 6, 10]])  # of 4 x 4 patches
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3, "num_classes": 20}
DECODER = {"decoder": "transformer", "decoder_depth": 2, "decoder_dim": 24}
WAYS = {
    "kept": ({}, "kept"),
    "kept, decoder": (DECODER, "kept"),
    "kept, mask tokens": ({"mask_tokens": "encoder"}, "kept"),
    "hidden, mask tokens": ({"mask_tokens": "encoder"}, "hidden"),
    "all, mask tokens": ({"mask_tokens": "encoder"}, "all"),
    "hidden, mask tokens and decoder": ({"mask_tokens": "encoder", **DECODER}, "hidden"),
    "kept, filling decoder": ({"mask_tokens": "decoder", **DECODER}, "kept"),
    "hidden, filling decoder": ({"mask_tokens": "decoder", **DECODER}, "hidden"),
    "all, filling decoder": ({"mask_tokens": "decoder", **DECODER}, "all"),
}
PLAIN, REGISTERS = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
DISTILLED, CLIP = "deit_tiny_distilled_patch16_224", "vit_base_patch16_clip_224.laion2b"
GAP = "vit_medium_patch16_reg4_gap_256"  # registers, no class token, and the final norm behind the pooling
create_model = timm.create_model


def spread(module, seed):
    """Give weights that hide nothing: timm's own class tokens and layer scales are next to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def small_model(**arguments):
    return spread(create_model(**{**SMALL, **arguments}), 1)


class Setup:
    """Student and feature teacher of a recipe, as a run builds them, and a batch."""

    def __init__(self, monkeypatch, cls, way="kept", *, student=PLAIN, teacher=PLAIN, target="norm", masked=True):
        changes, features_on = WAYS[way]
        sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "drop_path": 0.0}
        self.recipe = Recipe.model_validate(
            {
                "student": {"model": student, **sizes, **changes},
                "data": {"img_size": 32},
                "feature_teacher": {"name": f"timm:{teacher}/random", "target": target},
                "relation_teacher": None,
                "mask": {"strategy": "direct", "keep_ratio": 5 / 16} if masked else {"strategy": "none"},
                "loss": {"cls": cls, "features_on": features_on, "beta": 0.7},
            }
        )
        assert student_grid_size(self.recipe.student, 32) == 4
        with monkeypatch.context() as patched:
            patched.setattr(timm, "create_model", small_model)
            self.teachers = build_teachers(self.recipe, 4)
            self.whole_teacher = small_model(model_name=teacher, num_classes=20 if target == "projected" else 0)
        sections = self.recipe.student, self.recipe.relation, self.recipe.loss
        self.distiller = build_distiller(*sections, img_size=32, seed=0, teachers=self.teachers.shapes())
        spread(self.distiller, 2)
        self.pair = TeacherPair(
            self.teachers.feature,
            None,
            relation_config=self.recipe.relation,
            mask_config=self.recipe.mask,
            seed=0,
            num_patches=16,
            compared=ComparedTokens(self.distiller.cls_in_relation, self.distiller.cls_in_features, features_on),
        )
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
        ids = torch.arange(2)
        self.batch = Batch(images, ids, ids, ids * 0, ids * 0, KEEP if masked else None)

    def terms(self):
        return self.distiller(self.batch.images, self.pair(self.batch))


def normalised(images, preprocess):
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (preprocess.mean, preprocess.std))
    return (images.double() / 255 - mean) / std


def compared(tokens, num_prefix, features_on, *, cls, masked):
    """Pick rows of (B, P + N, T) token by token: the first prefix token, if any, and the patches of `features_on`."""
    picked = []
    for image, kept in zip(tokens, KEEP.tolist(), strict=True):
        patches = {"kept": kept, "hidden": [n for n in range(16) if n not in kept], "all": range(16)}[features_on]
        rows = [num_prefix + patch for patch in (patches if masked else range(16))]
        picked.append(image[[0, *rows] if cls else rows])
    return torch.stack(picked)


def teacher_tokens(setup, target):
    """Final tokens (B, P + N, T) of timm's own model in float64, nothing pruned."""
    model = copy.deepcopy(setup.whole_teacher).double().eval()
    x = model.patch_embed(normalised(setup.batch.images, setup.teachers.feature.preprocess))
    x = model.norm_pre(model._pos_embed(x))
    for block in model.blocks:
        x = block(x)
    if target == "pre_norm":
        return x
    x = model.fc_norm(model.norm(x))
    return model.head(x) if target == "projected" else x


def placed(background, rows, tokens):
    """Put each image's tokens at its rows of the background (P + N, D)."""
    return torch.stack([background.index_copy(0, torch.tensor(row), x) for row, x in zip(rows, tokens, strict=True)])


def student_tokens(setup, *, masked):
    """What the head gets, put back to its places among (B, P + N, D), in float64; unseen places are not numbers."""
    distiller = copy.deepcopy(setup.distiller).double()
    student, decoder = distiller.student, distiller.decoder
    model, mask_tokens, num_prefix = student.encoder.model, setup.recipe.student.mask_tokens, student.num_prefix_tokens
    x = model.patch_embed(normalised(setup.batch.images, student.preprocess)).clone()
    seen = KEEP.tolist() if masked else [list(range(16))] * 2
    if mask_tokens == "encoder":
        for image in range(2):
            for patch in set(range(16)) - set(seen[image]):
                x[image, patch] = student.encoder.mask_token[0, 0]
        seen = [list(range(16))] * 2
    x = model._pos_embed(x)
    rows = [[*range(num_prefix), *(num_prefix + patch for patch in patches)] for patches in seen]
    x = model.norm_pre(torch.stack([image[row] for image, row in zip(x, rows, strict=True)]))
    for block in model.blocks:
        x = block(x)
    x = model.fc_norm(model.norm(x))
    if decoder is not None:
        x = decoder.embed(x)
        if mask_tokens == "decoder":
            x = placed(decoder.mask_token[0].repeat(num_prefix + 16, 1), rows, x)
            rows = [list(range(num_prefix + 16))] * 2
        positions = sincos_position_embedding(24, 4, num_prefix)[0].double()
        x = x + torch.stack([positions[row] for row in rows])
        for block in decoder.blocks:
            x = block(x)
        x = decoder.norm(x)
    return placed(torch.full((num_prefix + 16, x.shape[-1]), torch.nan, dtype=torch.float64), rows, x)


def reference(setup, *, cls, target="norm", masked=True):
    """The feature term in float64."""
    features_on = setup.recipe.loss.features_on
    with torch.no_grad():
        ours, theirs = student_tokens(setup, masked=masked), teacher_tokens(setup, target)
        prefixes = setup.distiller.student.num_prefix_tokens, setup.whole_teacher.num_prefix_tokens
        ours, theirs = (
            compared(tokens, prefix, features_on, cls=cls, masked=masked)
            for tokens, prefix in zip((ours, theirs), prefixes, strict=True)
        )
        ours = copy.deepcopy(setup.distiller.head).double()(ours)
    theirs = (theirs - theirs.mean(-1, keepdim=True)) / (theirs.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    size = (ours - theirs).abs().numpy()
    return np.where(size < 0.7, 0.5 * size**2 / 0.7, size - 0.35).mean()


@pytest.mark.parametrize("cls", ["include", "exclude"])
@pytest.mark.parametrize("way", WAYS)
def test_the_term_equals_float64_with_and_without_the_class_token(way, cls, monkeypatch):
    setup = Setup(monkeypatch, cls, way)
    wanted, other = (reference(setup, cls=with_cls) for with_cls in (cls == "include", cls == "exclude"))
    assert setup.terms().feature.item() == pytest.approx(wanted, rel=1e-5)
    assert other != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("cls", ["include", "exclude"])
@pytest.mark.parametrize(("teacher", "target"), [(PLAIN, "pre_norm"), (CLIP, "norm"), (CLIP, "projected")])
def test_the_class_token_s_target_stands_where_those_of_patches_do(teacher, target, cls, monkeypatch):
    setup = Setup(monkeypatch, cls, teacher=teacher, target=target)
    wanted, other = (reference(setup, cls=c, target=target) for c in (cls == "include", cls == "exclude"))
    assert setup.terms().feature.item() == pytest.approx(wanted, rel=1e-5)
    assert other != pytest.approx(wanted, rel=1e-3)


def test_without_masks_the_class_token_is_one_of_seventeen(monkeypatch):
    setup = Setup(monkeypatch, "include", masked=False)
    assert setup.pair(setup.batch).features.shape == (2, 17, 36)
    assert setup.terms().feature.item() == pytest.approx(reference(setup, cls=True, masked=False), rel=1e-5)


@pytest.mark.parametrize("way", ["kept", "hidden, filling decoder"])
@pytest.mark.parametrize(
    ("student", "teacher"), [(REGISTERS, PLAIN), (PLAIN, REGISTERS), (REGISTERS, REGISTERS), (PLAIN, DISTILLED)]
)
def test_registers_and_distillation_tokens_never_enter(student, teacher, way, monkeypatch):
    setup = Setup(monkeypatch, "include", way, student=student, teacher=teacher)
    count = 5 if way == "kept" else 11
    assert setup.pair(setup.batch).features.shape == (2, 1 + count, 36)
    assert setup.terms().feature.item() == pytest.approx(reference(setup, cls=True), rel=1e-5)


def final_prefix(setup):
    """Run a step backward; return the gradient of the student's final prefix tokens."""
    outputs = []

    def keep(_module, _args, output):
        output.prefix_tokens.retain_grad()
        outputs.append(output)

    setup.distiller.student.register_forward_hook(keep)
    setup.terms().total.backward()
    return outputs[0].prefix_tokens.grad


@pytest.mark.parametrize("student", [PLAIN, REGISTERS])
def test_the_final_class_token_gets_a_gradient_where_it_is_compared_and_registers_get_none(student, monkeypatch):
    setup = Setup(monkeypatch, "include", student=student)
    gradient = final_prefix(setup)
    assert gradient is not None
    assert gradient[:, 0].abs().min() > 0
    assert not gradient[:, 1:].any()
    assert setup.distiller.student.encoder.model.cls_token.grad.abs().min() > 0
    assert [name for name, p in setup.distiller.named_parameters() if p.grad is None] == []
    assert final_prefix(Setup(monkeypatch, "exclude", student=student)) is None


@pytest.mark.parametrize("cls", ["include", "exclude"])
@pytest.mark.parametrize(("teacher", "target"), [(PLAIN, "norm"), (CLIP, "projected"), (GAP, "norm")])
@pytest.mark.parametrize("way", WAYS)
def test_the_cost_that_the_log_shows_is_the_counted_one(way, teacher, target, cls, monkeypatch):
    setup = Setup(monkeypatch, cls, way, teacher=teacher, target=target)
    logged = step_flops_per_image(setup.recipe, setup.distiller, setup.teachers)
    assert 2 * logged == count_flops(lambda: setup.terms().total.backward())


def test_one_class_token_costs_one_row_of_the_head_and_of_the_projection(monkeypatch):
    costs = []
    for cls in ("include", "exclude"):
        setup = Setup(monkeypatch, cls, teacher=CLIP, target="projected")
        costs.append(step_flops_per_image(setup.recipe, setup.distiller, setup.teachers))
    assert costs[0] - costs[1] == 3 * 2 * 32 * 20 + 2 * 36 * 20


@pytest.mark.parametrize(("student", "teacher"), [(PLAIN, GAP), (GAP, PLAIN), (GAP, GAP), (GAP, CLIP)])
def test_a_student_or_teacher_without_a_class_token_leaves_it_out(student, teacher, monkeypatch):
    target = "projected" if teacher == CLIP else "norm"
    setup = Setup(monkeypatch, "include", student=student, teacher=teacher, target=target)
    assert not setup.distiller.cls_in_features
    assert setup.terms().feature.item() == pytest.approx(reference(setup, cls=False, target=target), rel=1e-5)
    assert 2 * step_flops_per_image(setup.recipe, setup.distiller, setup.teachers) == count_flops(
        lambda: setup.terms().total.backward()
    )


@pytest.fixture
def said_at_start(world, tmp_path, monkeypatch):
    """Start a run whose ranks, engines and loop are left out, and return what it says."""

    def start(*overrides, rank=0):
        recipe = load_recipe(world.recipe, [f"run.root={tmp_path}", "mask.source=online", *overrides])
        ranks = Ranks(rank, 2, 0, torch.device("cpu"))
        monkeypatch.setattr(distillation, "distributed", lambda: contextlib.nullcontext(ranks))
        monkeypatch.setattr(distillation, "start", lambda *_: distillation.Session(None, ranks, None, None))
        monkeypatch.setattr(distillation, "train_run", lambda *_: 75)
        stream = io.StringIO()
        assert distillation.distill(recipe, load_ds_config(ROOT / "ds_configs/zero2.json"), {}, stream=stream) == 75
        return stream.getvalue()

    return start


def test_the_first_rank_says_once_who_has_no_class_token(said_at_start, tmp_path):
    file = tmp_path / "gap.safetensors"
    write_teacher(file, 3, class_token=False, global_pool="avg")
    teacher = f"feature_teacher.weights={file}"
    student = f"student.model={GAP}"
    line = "loss.cls include: {} has no class token, features are compared at patches only\n"
    assert said_at_start(teacher) == line.format("the feature teacher")
    assert said_at_start(student, "relation.heads=merged") == line.format("the student")
    assert said_at_start(teacher, rank=1) == ""
    assert said_at_start(teacher, "loss.cls=exclude") == ""
    assert said_at_start("feature_teacher=null") == ""


def test_the_first_rank_says_that_no_loss_has_looked_at_a_teacher_s_class_token(said_at_start, world, tmp_path):
    file = load_recipe(world.recipe).feature_teacher.weights
    line = (
        f"loss.cls include: no loss has looked at the class token of {file}; loss.cls=exclude compares patches only\n"
    )
    assert said_at_start() == line
    assert said_at_start(rank=1) == ""
    assert said_at_start("loss.cls=exclude") == ""
    for looked, said in ((False, 1), (True, 0)):
        teacher, copy = load_teacher_file(file, ""), tmp_path / f"{looked}.safetensors"
        arch, mean, std, kind, state, _ = teacher
        save_teacher_file(copy, state, arch, mean, std, kind=kind, cls_in_loss=looked)
        assert said_at_start(f"feature_teacher.weights={copy}").count("no loss has looked") == said


def test_a_last_block_whose_tokens_are_compared_trains_the_class_token(world):
    for layers, target, cls, trained in (
        ("[-1]", "features", "include", True),
        ("[-1]", "features", "exclude", False),
        ("[-2]", "features", "include", False),
        ("[-1]", "relation", "include", False),
    ):
        words = ["loss.cls=exclude", f"relation.layers={layers}", f"relation.target={target}", f"relation.cls={cls}"]
        recipe = load_recipe(world.recipe, words)
        teachers = TeacherShapes(feature_dim=48, relation_heads=3, relation_dim=48, relation_has_cls=True)
        distiller = build_distiller(
            recipe.student, recipe.relation, recipe.loss, img_size=32, seed=0, teachers=teachers
        )
        assert distiller.cls_in_loss == trained

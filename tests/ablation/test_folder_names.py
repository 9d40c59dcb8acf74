"""Which fields of a recipe decide the name of a run's folder, and of the masks' that it reads."""

import pytest

from hdscale.ablation.jobs import JobBuilder, Settings
from hdscale.ablation.scales import SCALES
from hdscale.ablation.table import Row, Table
from hdscale.config.loading import flat_fields
from hdscale.config.recipe import Recipe

REAL = SCALES["b-in1k"]
TABLE = Table("x", "one row", "row", (Row("row", "Row"),), ("data.views=4", "mask.source=store"))
# One other value per field.
NEW_MASKS = {
    "data.shards": "elsewhere",
    "data.split": "other",
    "data.order": "global",
    "data.window_shards": "8",
    "data.img_size": "192",
    "data.views": "2",
    "data.crop_scale": "[0.3,1.0]",
    "data.crop_ratio": "[0.8,1.25]",
    "data.hflip": "0.25",
    "data.workers": "2",
    "data.max_bad_fraction": "0.01",
    "relation_teacher": "{source: timm, name: vit_base_patch16_224.dino}",
    "relation_teacher.source": "open_clip",
    "relation_teacher.name": "vit_base_patch16_224.dino",
    "relation_teacher.weights": "random",
    "relation_teacher.img_size": "192",
    "relation_teacher.target": "pre_norm",
    "relation_teacher.sharding": "node",
    "mask.strategy": "direct",
    "mask.stage_keep_ratio": "0.8",
    "mask.keep_ratio": "0.5",
    "mask.layers": "[0,2,4]",
    "mask.at": "input",
    "mask.images_per_forward": "8",
}
OLD_MASKS = {
    "student.model": "vit_small_patch16_224",
    "student.patch_size": "8",
    "student.embed_dim": "384",
    "student.depth": "6",
    "student.num_heads": "6",
    "student.mlp_ratio": "2",
    "student.init": "timm",
    "student.drop_path": "0.1",
    "student.drop_path_per": "rank",
    "student.decoder": "transformer",
    "student.rel_pos_bias": "true",
    "student.layer_scale": "0.1",
    "student.mean": "[0.5,0.5,0.5]",
    "student.std": "[0.5,0.5,0.5]",
    "student.checkpoint_every": "1",
    "feature_teacher": "{source: timm, name: vit_base_patch16_224.dino}",
    "feature_teacher.source": "timm",
    "feature_teacher.name": "ViT-B-32",
    "feature_teacher.weights": "random",
    "feature_teacher.img_size": "192",
    "feature_teacher.target": "projected",
    "feature_teacher.sharding": "node",
    "relation.target": "attention",
    "relation.layers": "[-2]",
    "relation.scale": "softmax",
    "relation.heads": "merged",
    "relation.cls": "exclude",
    "loss.alpha": "0.5",
    "loss.beta": "1.0",
    "loss.target_norm": "none",
    "loss.cls": "exclude",
    "optim.global_batch_size": "512",
    "optim.micro_batch_size": "64",
    "optim.lr": "1e-3",
    "optim.betas": "[0.9,0.99]",
    "optim.eps": "1e-6",
    "optim.weight_decay": "0.1",
    "optim.clip": "1.0",
    "schedule.epochs": "50",
    "schedule.warmup_epochs": "5",
    "schedule.min_lr": "1e-5",
    "schedule.stop_after": "10",
    "checkpoint.every_steps": "100",
    "checkpoint.keep": "1",
    "log.every_steps": "10",
    "log.gradient_norms_every": "5",
    "evaluation.split": "test",
    "evaluation.neighbors": "20",
    "evaluation.attention_images": "32",
    "pretrain.mask_ratio": "0.5",
    "pretrain.decoder_dim": "256",
    "pretrain.decoder_depth": "4",
    "pretrain.decoder_heads": "8",
    "pretrain.label_smoothing": "0.0",
}
# Fields that stand alone only with others beside them: `field=value` arguments, as above.
TOGETHER = {
    "student.decoder_depth": ("student.decoder=transformer", "student.decoder_depth=4"),
    "student.decoder_dim": ("student.decoder=transformer", "student.decoder_dim=512"),
    "student.decoder_heads": ("student.decoder=transformer", "student.decoder_heads=16"),
    "student.mask_tokens": ("student.decoder=transformer", "student.mask_tokens=decoder"),
    "student.pos_embed": ("student.rel_pos_bias=true", "student.pos_embed=none"),
    "relation.token_head": ("relation.target=features", "relation.token_head=width"),
    "relation.loss": ("relation.scale=softmax", "relation.loss=kl"),
    "loss.features_on": ("student.mask_tokens=encoder", "loss.features_on=hidden"),
}
NOT_IN_NAMES = (
    "run.name",  # they say where folders lie, or are in the name by themselves
    "run.root",
    "run.seed",
    "mask.store",
    "run.rendezvous_seconds",
)
# Below, or there is one value.
ELSEWHERE = ("run.precision", "mask.source", "mask.in_teacher", "mask.random_per", "targets.source")


def names(output, *overrides, table=TABLE, scale=REAL):
    """Return the names of the run's folder and of its mask store."""
    plan = JobBuilder(Settings(table, scale, output, overrides)).build_row(table.rows[0], 0)
    return plan.folder.name, plan.recipe.mask.store.rpartition("/")[2]


def test_every_field_of_the_recipe_is_looked_at():
    fields = flat_fields(Recipe().model_dump())
    looked_at = {*NEW_MASKS, *OLD_MASKS, *TOGETHER, *NOT_IN_NAMES, *ELSEWHERE}
    assert looked_at - {"feature_teacher", "relation_teacher"} == set(fields)


@pytest.mark.parametrize("field", NEW_MASKS)
def test_what_may_change_masks_gives_them_and_the_run_new_folders(field, tmp_path):
    run, masks = names(tmp_path, f"{field}={NEW_MASKS[field]}")
    assert run != names(tmp_path)[0]
    assert masks != names(tmp_path)[1]


@pytest.mark.parametrize("field", OLD_MASKS)
def test_what_the_relation_teacher_does_not_see_gives_the_run_a_new_folder_and_leaves_the_masks(field, tmp_path):
    run, masks = names(tmp_path, f"{field}={OLD_MASKS[field]}")
    assert run != names(tmp_path)[0]
    assert masks == names(tmp_path)[1]


@pytest.mark.parametrize("field", TOGETHER)
def test_a_field_that_needs_another_gives_the_run_a_new_folder_beside_the_other_s(field, tmp_path):
    needed, own = TOGETHER[field]
    run, masks = names(tmp_path, needed, own)
    assert run not in (names(tmp_path)[0], names(tmp_path, needed)[0])
    assert masks == names(tmp_path)[1]


def test_precision_gives_masks_and_run_new_folders(tmp_path):
    run, masks = names(tmp_path, "run.precision=fp32")
    assert run != names(tmp_path)[0]
    assert masks != names(tmp_path)[1]
    # Which is no other name where it says what it would be anyway: folders of earlier versions are found again.
    assert names(tmp_path, "run.precision=auto", "run.rendezvous_seconds=60") == names(tmp_path)


def test_how_often_random_masks_are_drawn_is_in_the_names_of_runs_that_draw_them(tmp_path):
    assert names(tmp_path, "mask.random_per=view") == names(tmp_path)
    drawn = names(tmp_path, "mask.strategy=random")[0]
    assert names(tmp_path, "mask.strategy=random", "mask.random_per=view")[0] != drawn


def test_masks_that_are_made_in_the_step_are_not_stored(tmp_path):
    for overrides in (("mask.source=online",), ("mask.source=online", "mask.in_teacher=drop")):
        plan = JobBuilder(Settings(TABLE, REAL, tmp_path, overrides)).build_row(TABLE.rows[0], 0)
        assert [job.script for job in plan.jobs] == ["launch/train.py"]
        assert plan.folder.name != names(tmp_path)[0]
    assert names(tmp_path, *overrides)[0] != names(tmp_path, "mask.source=online")[0]


def test_a_teacher_that_hdscale_trains_is_the_same_file_wherever_the_output_lies(tmp_path):
    weak = Table("x", "one row", "row", (Row("row", "Row", ("relation_teacher=@mae_weak",)),))
    here, there = names(tmp_path / "here", table=weak), names(tmp_path / "there", table=weak)
    assert here == there
    assert here != names(tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_is_in_both_names(seed, tmp_path):
    plan = JobBuilder(Settings(TABLE, REAL, tmp_path)).build_row(TABLE.rows[0], seed)
    assert plan.folder.name.endswith(f"-seed{seed}")
    assert plan.recipe.mask.store.endswith(f"-seed{seed}")

"""The rules of the recipe, each on both sides of its boundary."""

import re
import types
import typing

import pytest
from pydantic import BaseModel

from hdscale.config.loading import load_recipe
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError

# No other rule stands between these and the values below.
CONTEXT = [
    "student.decoder=transformer",
    "mask.source=online",
    "schedule.warmup_epochs=0",
    "schedule.epochs=40",
    "feature_teacher=timm:vit",
    "relation_teacher=timm:vit",
]

# By field: values at the edge that are taken, and the next ones, that are not.
BOUNDS = {
    "run.seed": (["0", "9223372036854775807"], ["-1", "9223372036854775808"]),
    "run.rendezvous_seconds": (["0.001"], ["0", "-1"]),
    "data.window_shards": (["1"], ["0"]),
    "data.img_size": (["1"], ["0"]),
    "data.views": (["1", "fresh"], ["0", "stale"]),
    "data.crop_scale": (["[1, 1]", "[0.01, 0.01]"], ["[0, 1]", "[0.5, 1.01]", "[0.6, 0.5]"]),
    "data.crop_ratio": (["[2, 2]", "[0.01, 9]"], ["[0, 1]", "[-1, 1]", "[2, 1.9]"]),
    "data.hflip": (["0", "1"], ["-0.01", "1.01"]),
    "data.workers": (["0"], ["-1"]),
    "data.max_bad_fraction": (["0", "1"], ["-0.01", "1.01"]),
    "student.patch_size": (["null", "1"], ["0"]),
    "student.embed_dim": (["null", "1"], ["0"]),
    "student.depth": (["null", "1"], ["0"]),
    "student.num_heads": (["null", "1"], ["0"]),
    "student.mlp_ratio": (["null", "0.01"], ["0"]),
    "student.drop_path": (["0", "0.99"], ["-0.01", "1"]),
    "student.decoder_depth": (["1"], ["0"]),
    "student.decoder_dim": (["null", "1"], ["0"]),
    "student.decoder_heads": (["null", "1"], ["0"]),
    "student.layer_scale": (["null", "0.00001"], ["0"]),
    "student.checkpoint_every": (["0"], ["-1"]),
    "feature_teacher.img_size": (["null", "1"], ["0"]),
    "relation_teacher.img_size": (["null", "1"], ["0"]),
    "mask.stage_keep_ratio": (["0.01", "1"], ["0", "1.01"]),
    "mask.keep_ratio": (["0.01", "1"], ["0", "1.01"]),
    "mask.images_per_forward": (["1"], ["0"]),
    "loss.alpha": (["0"], ["-0.01"]),
    "loss.beta": (["0.01"], ["0"]),
    "optim.global_batch_size": (["1"], ["0"]),
    "optim.micro_batch_size": (["1"], ["0"]),
    "optim.lr": (["0.00001"], ["0"]),
    "optim.betas": (["[0, 0]", "[0.999, 0.999]"], ["[1, 0.9]", "[0.9, 1]", "[-0.01, 0.9]", "[0.9, -0.01]"]),
    "optim.eps": (["0.00001"], ["0"]),
    "optim.weight_decay": (["0"], ["-0.01"]),
    "optim.clip": (["0"], ["-0.01"]),
    "schedule.epochs": (["0.01"], ["0"]),
    "schedule.warmup_epochs": (["0", "39.99"], ["-0.01", "40"]),
    "schedule.min_lr": (["0"], ["-0.01"]),
    "schedule.stop_after": (["null", "1"], ["0"]),
    "checkpoint.every_steps": (["1"], ["0"]),
    "checkpoint.keep": (["1"], ["0"]),
    "log.every_steps": (["1"], ["0"]),
    "log.gradient_norms_every": (["0"], ["-1"]),
    "evaluation.neighbors": (["1"], ["0"]),
    "evaluation.attention_images": (["1"], ["0"]),
    "pretrain.mask_ratio": (["0.01", "0.99"], ["0", "1"]),
    "pretrain.decoder_dim": (["1"], ["0"]),
    "pretrain.decoder_depth": (["1"], ["0"]),
    "pretrain.decoder_heads": (["1"], ["0"]),
    "pretrain.label_smoothing": (["0", "0.99"], ["-0.01", "1"]),
}
WITHOUT_A_BOUND_OF_ITS_TYPE = {"data.crop_ratio"}  # a validator sees to it


def fields_with_bounds(model=Recipe, prefix=""):
    for name, info in model.model_fields.items():
        options = typing.get_args(info.annotation) if isinstance(info.annotation, types.UnionType) else ()
        sections = [o for o in (info.annotation, *options) if isinstance(o, type) and issubclass(o, BaseModel)]
        if sections:
            yield from fields_with_bounds(sections[0], f"{prefix}{name}.")
        elif re.search(r"\b(ge|gt|le|lt)=", f"{info.metadata} {info.annotation}"):
            yield prefix + name


def test_every_field_with_a_bound_is_in_the_table():
    assert set(fields_with_bounds()) | WITHOUT_A_BOUND_OF_ITS_TYPE == set(BOUNDS)


@pytest.mark.parametrize("field", BOUNDS)
def test_a_field_takes_the_values_up_to_its_bounds_and_none_beyond(field):
    taken, refused = BOUNDS[field]
    for value in taken:
        load_recipe(None, [*CONTEXT, f"{field}={value}"])
    for value in refused:
        with pytest.raises(UserError, match=re.escape(field)):
            load_recipe(None, [*CONTEXT, f"{field}={value}"])


# What is taken, and the one change that is not, with a part of its message.
CROSS_FIELD_RULES = [
    ("schedule.epochs=3 schedule.warmup_epochs=2.9", "schedule.warmup_epochs=3", "must be below schedule.epochs 3"),
    ("relation.layers=[-1]", "relation.layers=[]", "layers must name different blocks, got []"),
    ("relation.layers=[-1,1]", "relation.layers=[1,1]", "layers must name different blocks, got [1, 1]"),
    ("relation.scale=softmax relation.loss=kl", "relation.scale=scaled", "loss kl needs scale softmax, got scaled"),
    ("relation.scale=softmax relation.loss=kl", "relation.scale=raw", "loss kl needs scale softmax, got raw"),
    ("relation.scale=softmax relation.loss=kl", "relation.target=attention", "kl compares relations, got target att"),
    ("relation.scale=softmax relation.loss=kl", "relation.target=features", "kl compares relations, got target feat"),
    ("mask.in_teacher=drop mask.source=online", "mask.source=store", "got progressive and store"),
    ("mask.in_teacher=drop mask.source=online", "mask.strategy=direct", "got direct and online"),
    ("mask.in_teacher=drop mask.source=online", "mask.strategy=random", "got random and online"),
    ("relation_teacher=null", "mask.source=online", "mask.source online needs a relation_teacher"),
    ("relation_teacher=null mask.strategy=direct", "mask.source=online", "mask.source online needs a relation_teacher"),
    ("mask.source=online", "relation_teacher=null", "mask.source online needs a relation_teacher"),
    ("mask.source=online data.views=fresh", "mask.source=store", "needs a number of data.views"),
    ("mask.strategy=random data.views=fresh", "mask.strategy=direct", "needs a number of data.views"),
    ("mask.strategy=none data.views=fresh", "mask.strategy=progressive", "needs a number of data.views"),
    ("student.decoder=transformer student.decoder_dim=4", "student.decoder=linear", "decoder_dim is of decoder transf"),
    ("student.decoder=transformer student.decoder_heads=4", "student.decoder=identity", "decoder_heads is of decoder"),
    ("student.decoder=transformer student.mask_tokens=decoder", "student.decoder=linear", "mask_tokens decoder needs"),
    (
        "student.decoder=transformer student.mask_tokens=decoder",
        "student.decoder=identity",
        "mask_tokens decoder needs",
    ),
    ("student.pos_embed=none student.rel_pos_bias=true", "student.rel_pos_bias=false", "pos_embed none needs"),
    ("feature_teacher={source: file, weights: a}", "feature_teacher.weights=random", "must be a file's path"),
    ("feature_teacher={source: file, weights: a}", "feature_teacher.weights=pretrained", "must be a file's path"),
    ("feature_teacher={source: file, weights: a}", "feature_teacher.weights=''", "must be a file's path"),
    ("feature_teacher={source: file, weights: a}", "feature_teacher.source=timm", "name must say which timm model"),
    (
        "feature_teacher={source: file, weights: a}",
        "feature_teacher.source=open_clip",
        "must say which open_clip model",
    ),
    ("student.mask_tokens=encoder", "mask.strategy=none", "student.mask_tokens encoder needs dropped patches"),
    (
        "student.decoder=transformer student.mask_tokens=decoder",
        "mask.strategy=none",
        "student.mask_tokens decoder needs dropped patches",
    ),
    ("loss.features_on=all mask.strategy=none", "mask.strategy=random", "features_on all needs predictions"),
    ("loss.features_on=all mask.strategy=none", "loss.features_on=hidden", "features_on hidden needs dropped patches"),
    ("loss.features_on=all student.mask_tokens=encoder", "student.mask_tokens=none", "all needs predictions"),
    ("loss.features_on=hidden student.mask_tokens=encoder", "student.mask_tokens=none", "hidden needs predictions"),
    (
        "loss.features_on=hidden student.mask_tokens=encoder mask.keep_ratio=1 mask.stage_keep_ratio=0.99",
        "mask.stage_keep_ratio=1",
        "features_on hidden needs dropped patches",
    ),
    (
        "loss.features_on=hidden student.mask_tokens=encoder mask.strategy=random mask.stage_keep_ratio=1",
        "mask.keep_ratio=1",
        "features_on hidden needs dropped patches",
    ),
    (
        "loss.features_on=hidden student.mask_tokens=encoder mask.strategy=direct mask.stage_keep_ratio=1",
        "mask.keep_ratio=1",
        "features_on hidden needs dropped patches",
    ),
    ("loss.features_on=all mask.strategy=none", "feature_teacher=null", "features_on all needs a feature_teacher"),
    (
        "loss.features_on=hidden student.mask_tokens=encoder",
        "feature_teacher=null",
        "features_on hidden needs a feature_teacher",
    ),
    ("student.mask_tokens=encoder feature_teacher=null", "loss.features_on=all", "features_on all needs a feature_te"),
    (
        "student.decoder=transformer student.mask_tokens=decoder",
        "feature_teacher=null",
        "student.mask_tokens decoder needs a feature_teacher",
    ),
]


@pytest.mark.parametrize(("taken", "change", "message"), CROSS_FIELD_RULES)
def test_a_rule_between_fields_refuses_the_one_change_that_breaks_it(taken, change, message):
    # Split before "section.field=": values hold spaces.
    overrides = re.split(r" (?=\w+(?:\.\w+)?=)", taken)
    load_recipe(None, overrides)
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(None, [*overrides, change])


@pytest.mark.parametrize(
    ("strategy", "stage_keep_ratio", "keep_ratio", "keeps_all"),
    [
        ("progressive", 1, 0.5, True),
        ("progressive", 0.5, 1, False),
        ("random", 1, 0.5, False),
        ("random", 0.5, 1, True),
        ("direct", 1, 0.5, False),
        ("direct", 0.5, 1, True),
    ],
)
def test_a_mask_keeps_all_by_the_ratio_of_its_own_strategy(strategy, stage_keep_ratio, keep_ratio, keeps_all):
    ratios = [f"mask.stage_keep_ratio={stage_keep_ratio}", f"mask.keep_ratio={keep_ratio}"]
    assert load_recipe(None, [f"mask.strategy={strategy}", *ratios]).mask.keeps_all is keeps_all

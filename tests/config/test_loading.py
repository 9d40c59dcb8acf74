import re
from pathlib import Path

import pytest

from hdscale.config.loading import (
    changed_fields,
    check_allowed,
    dump_recipe,
    is_known_field,
    load_recipe,
    load_run_recipe,
)
from hdscale.config.recipe import TeacherConfig
from hdscale.errors import UserError

RECIPES = sorted(Path("launch/recipes").glob("*.yaml"))


def test_every_recipe_loads_and_survives_a_round_trip(tmp_path):
    assert RECIPES
    for path in RECIPES:
        recipe = load_recipe(path)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        assert load_run_recipe(tmp_path) == recipe
        assert recipe.run.name


def test_the_default_recipe_file_states_the_defaults_of_the_code():
    from_file = load_recipe(Path("launch/recipes/vit_l_in21k.yaml")).model_dump()
    from_code = load_recipe(None).model_dump()
    for values in (from_file, from_code):  # where things lie is the file's business
        del values["run"], values["checkpoint"], values["data"]["shards"], values["mask"]["store"]
    assert from_file == from_code


def test_kl_compares_relations_only():
    with pytest.raises(UserError, match="relation: loss kl compares relations, got target features"):
        load_recipe(None, ["relation.loss=kl", "relation.scale=softmax", "relation.target=features"])


def test_an_override_replaces_one_field_and_makes_missing_sections():
    recipe = load_recipe(None, ["optim.lr=3e-4", "feature_teacher=null", "relation.layers=[0, 1]"])
    assert recipe.optim.lr == 3e-4
    assert recipe.feature_teacher is None
    assert recipe.relation.layers == (0, 1)
    assert recipe.optim.weight_decay == 0.05


@pytest.mark.parametrize(
    ("short", "source", "name", "weights"),
    [
        ("timm:vit_base_patch16_224.mae", "timm", "vit_base_patch16_224.mae", "pretrained"),
        ("timm:vit_base_patch16_224/random", "timm", "vit_base_patch16_224", "random"),
        ("timm:vit_base_patch16_224//data/mae.pth", "timm", "vit_base_patch16_224", "/data/mae.pth"),
        ("open_clip:ViT-B-16/openai", "open_clip", "ViT-B-16", "openai"),
        ("file:teachers/mae.safetensors", "file", "", "teachers/mae.safetensors"),
    ],
)
def test_a_teacher_s_name_may_stand_for_source_name_and_weights(short, source, name, weights, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"feature_teacher: {short}\nrelation_teacher: {{name: '{short}', sharding: replicate}}")
    recipe = load_recipe(path, ["feature_teacher.img_size=64"])
    assert recipe.feature_teacher == TeacherConfig(source=source, name=name, weights=weights, img_size=64)
    assert recipe.relation_teacher == TeacherConfig(source=source, name=name, weights=weights, sharding="replicate")
    assert load_recipe(None, [f"feature_teacher={short}"]).feature_teacher == TeacherConfig(
        source=source, name=name, weights=weights
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_run_recipe(tmp_path) == recipe


def test_fields_that_say_what_the_name_says_are_no_contradiction():
    given = {"source": "open_clip", "name": "open_clip:ViT-B-16/openai", "weights": "openai"}
    assert TeacherConfig(**given) == TeacherConfig(source="open_clip", name="ViT-B-16", weights="openai")
    assert TeacherConfig(name="timm:vit_tiny_patch16_224", weights="a.pth").weights == "a.pth"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "feature_teacher=vit_base_patch16_224",
            ["feature_teacher: must be SOURCE:NAME, such as", "got vit_base_patch16_224"],
        ),
        ("feature_teacher=hub:x", ["name must start with timm:, open_clip: or file:, got hub:x"]),
        (
            "relation_teacher={source: timm, name: open_clip:ViT-B-16/openai}",
            ["relation_teacher: name open_clip:ViT-B-16/openai says that source is open_clip, got source timm: leave"],
        ),
        (
            "feature_teacher={weights: openai, name: open_clip:ViT-L-14/laion2b_s32b_b82k}",
            ["says that weights is laion2b_s32b_b82k, got weights openai: leave one of them out"],
        ),
        ("feature_teacher=timm:/random", ["feature_teacher: name must say which timm model"]),
        ("feature_teacher=file:random", ["feature_teacher: weights must be a file's path"]),
        ("mask.keep_ratoi=1", ["unknown key mask.keep_ratoi", "did you mean mask.keep_ratio?"]),
        ("keep_ratio=0.3", ["unknown key keep_ratio", "did you mean mask.keep_ratio?"]),
        ("mask.keep_ratio=1.4", ["mask.keep_ratio must be less than or equal to 1", "got 1.4"]),
        ("student.depth=many", ["student.depth must be a valid integer", "'many'"]),
        ("relation.loss=kl", ["relation: loss kl needs scale softmax, got scaled"]),
        ("mask.in_teacher=drop", ["mask: in_teacher drop needs strategy progressive and source online", "store"]),
        ("relation.layers=[1, 1]", ["relation: layers must name different blocks, got [1, 1]"]),
        ("schedule.warmup_epochs=50", ["schedule.warmup_epochs must be below schedule.epochs 40, got 50"]),
        ("data.views=0", ["'data.views=0': data.views must be greater than or equal to 1 or 'fresh', got 0"]),
        ("data.views=abc", ["'data.views=abc': data.views must be a valid integer or 'fresh', got 'abc'"]),
        ("data.views=fresh", ["mask.source store needs a number of data.views"]),
        ("data.crop_scale=[0.9, 0.2]", ["]': data.crop_scale must be two rising positive numbers, got [0.9, 0.2]"]),
        ("data.crop_ratio=[0, 1]", ["]': data.crop_ratio must be two rising positive numbers, got [0, 1]"]),
        ("optim.betas=[0.9]", ["'optim.betas=[0.9]': optim.betas must have more elements, got [0.9]"]),
        ("optim.betas=[0, 0, 0]", ["optim.betas must have fewer elements, got [0, 0, 0]"]),
        ("optim.betas=[0.9, 2]", ["'optim.betas=[0.9, 2]': optim.betas must be less than 1, got 2"]),
        ("optim={lrr: 1}", ["argument 'optim={lrr: 1}': unknown key optim.lrr", "did you mean optim.lr?"]),
        ("feature_teacher.source=file", ["feature_teacher: weights must be a file's path"]),
        ("feature_teacher.name=''", ["feature_teacher: name must say which timm model"]),
        ("optim.lr", ["must be key=value"]),
        ("optim.lr=[1", ["'optim.lr=[1' has a value that is not YAML: line 1, column 3: expected ',' or ']'"]),
        ("optim={lr: 1, lr: 2}", ["is not YAML: line 1, column 9: lr is there twice"]),
        ("optim.lr=.inf", ["optim.lr must be a finite number, got inf"]),
        ("optim=3", ["'optim=3': optim must be a section of key: value, got 3"]),
        ("optm.lr=3", ["argument 'optm.lr=3': unknown key optm; did you mean optim?"]),
        ("run.seed=1.5", ["run.seed must be a valid integer, got 1.5"]),
        ("run.name=../a", ["run.name must be a folder below run.root: neither absolute, nor . or .., got '../a'"]),
        ("run.name=/a", ["run.name must be a folder below run.root", "got '/a'"]),
        ("feature_teacher=open_clip:", ["feature_teacher: must be SOURCE:NAME without a space, such as", "open_clip:"]),
        ("feature_teacher={file: a.pth}", ["must be SOURCE:NAME without a space", "got file: a.pth"]),
        ("run.name.x=1", ["run.name is a value, not a section"]),
    ],
)
def test_each_mistake_in_an_override_gives_one_line_with_the_way_out(override, parts):
    overrides = ["run.name=a", override] if override.startswith("run.name.") else [override]
    with pytest.raises(UserError) as error:
        load_recipe(None, overrides)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_recipe_with_a_section_twice_is_refused_naming_the_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 1}\ndata: {views: 1}\noptim: {clip: 1}\n")
    with pytest.raises(UserError, match=r"mine\.yaml is not YAML: line 3, column 1: optim is there twice"):
        load_recipe(path)


def test_of_several_arguments_the_one_that_decided_is_blamed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {eps: -1}")
    for overrides, blamed in (
        (["optim.lr=1", "optim.eps=1", "optim={lr: -1}"], "argument 'optim={lr: -1}': optim.lr"),
        (["optim={lr: 1}", "optim.lr=-1"], "argument 'optim.lr=-1': optim.lr"),
        (["optim.lr=1"], f"{path}: optim.eps"),
    ):
        with pytest.raises(UserError) as error:
            load_recipe(path, overrides)
        assert str(error.value).startswith(blamed)


def test_sections_and_their_fields_are_known_and_nothing_else():
    assert all(map(is_known_field, ("relation_teacher", "relation_teacher.name", "optim.lr", "data.views")))
    assert not any(map(is_known_field, ("", "lr", "optim.lrr", "optim.", "optim.lr.x", "data.views.int")))


@pytest.mark.parametrize(
    ("strategy", "chosen_by_teacher"), [("none", 0), ("random", 0), ("direct", 1), ("progressive", 1)]
)
def test_two_mask_strategies_ask_the_relation_teacher(strategy, chosen_by_teacher):
    assert load_recipe(None, [f"mask.strategy={strategy}"]).mask.chosen_by_teacher == bool(chosen_by_teacher)


@pytest.mark.parametrize(
    ("strategy", "source", "is_online"),
    [("direct", "online", True), ("progressive", "store", False), ("random", "online", False)],
)
def test_masks_are_online_where_the_teacher_chooses_them_in_the_step(strategy, source, is_online):
    overrides = [f"mask.strategy={strategy}", f"mask.source={source}"]
    assert load_recipe(None, overrides).mask.is_online == is_online


def test_online_masks_need_the_relation_teacher():
    with pytest.raises(UserError, match="needs a relation_teacher"):
        load_recipe(None, ["relation_teacher=null", "mask.source=online"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "must be sections"), ("optim: {lrr: 1}", "did you mean")]
)
def test_a_broken_recipe_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert "mine.yaml" in str(error.value)


def test_a_missing_recipe_and_a_folder_that_is_no_run_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="is not a run folder"):
        load_run_recipe(tmp_path)


def test_changed_fields_lists_what_changes_the_result_and_nothing_else():
    old = load_recipe(None)
    free = ["data.workers=3", "log.every_steps=1", "mask.source=store", "optim.micro_batch_size=64", "run.name=other"]
    assert changed_fields(old, load_recipe(None, free)) == []
    new = load_recipe(None, ["optim.lr=1e-3", "relation_teacher=null", "mask.strategy=none"])
    fields = [field for field, *_ in changed_fields(old, new)]
    assert "optim.lr" in fields
    assert "mask.strategy" in fields
    assert "relation_teacher.name" in fields


def test_a_misspelt_name_for_allow_change_is_refused_and_known_names_pass():
    check_allowed(["optim.lr", "relation_teacher", "data", "precision", "view decoder"])
    with pytest.raises(UserError, match=r"--allow-change optim\.lrr is no field"):
        check_allowed(["optim.lrr"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.mask_tokens=decoder"], "student: mask_tokens decoder needs decoder transformer, got linear"),
        (["student.decoder_dim=512"], "student: decoder_dim is of decoder transformer, got decoder linear"),
        (["student.pos_embed=none"], "student: pos_embed none needs rel_pos_bias true"),
        (["student.mask_tokens=encoder", "mask.strategy=none"], "student.mask_tokens encoder needs dropped patches"),
        (["loss.features_on=hidden", "mask.strategy=none"], "loss.features_on hidden needs dropped patches"),
        (
            ["loss.features_on=hidden", "student.mask_tokens=encoder", "mask.strategy=random", "mask.keep_ratio=1"],
            "loss.features_on hidden needs dropped patches",
        ),
        (["loss.features_on=hidden"], "loss.features_on hidden needs predictions at dropped patches"),
        (["loss.features_on=all"], "loss.features_on all needs predictions at dropped patches"),
        (
            ["loss.features_on=all", "student.mask_tokens=encoder", "feature_teacher=null"],
            "loss.features_on all needs a feature_teacher",
        ),
        (
            ["student.decoder=transformer", "student.mask_tokens=decoder", "feature_teacher=null"],
            "student.mask_tokens decoder needs a feature_teacher",
        ),
    ],
)
def test_reconstruction_settings_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe(None, overrides)


def test_features_of_all_patches_need_no_mask():
    assert load_recipe(None, ["loss.features_on=all", "mask.strategy=none"]).loss.features_on == "all"

"""What a person may get wrong: one line that names the file or field and the way out, exit code 2, nothing written."""

import hashlib
import json
import os
import runpy
import shutil

import deepspeed.comm.comm as deepspeed_comm
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hdscale.cli import exit_code
from hdscale.config.loading import RECIPE_FILE, dump_recipe, load_recipe
from hdscale.data.fingerprint import view_fingerprint
from hdscale.data.index import open_shards
from hdscale.errors import UserError
from hdscale.masking.fingerprint import mask_fingerprint
from hdscale.masking.store import MaskStore
from hdscale.runs.folder import mark_done
from hdscale.teachers.build import build_teacher
from hdscale.teachers.files import load_teacher_file, save_teacher_file
from tests.helpers.launcher import ROOT, deepspeed, run

ONLINE = "mask.source=online"
SCRIPTS = {
    name: runpy.run_path(str(ROOT / f"launch/{name}.py"))["main"]
    for name in ("train", "precompute_masks", "pretrain_teacher")
}


@pytest.fixture(autouse=True)
def no_group_is_left():
    """A command among ranks ends its process with its group; here, other tests come after it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        deepspeed_comm.cdb = None


@pytest.fixture
def spoiled(own_world, monkeypatch):
    """Return what a person sees of a command that fails in a world that the test has spoiled."""

    def fail(capsys, *overrides, script="train", options=(), among_ranks=False):
        before = listing(own_world.folder)
        command = ["--recipe", str(own_world.recipe), *options, *overrides]
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", os.environ.copy())
            assert exit_code(SCRIPTS[script], command) == 2
        assert torch.distributed.is_initialized() == among_ranks
        assert listing(own_world.folder) == before
        lines = capsys.readouterr().err.splitlines()
        messages = [line for line in lines if line.startswith("error: ")]
        assert len(messages) == 1, lines
        assert lines[-1] == messages[0]
        return messages[0]

    return fail


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def has(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, message
    return True


@pytest.mark.parametrize("script", ["train", "precompute_masks"])
def test_no_shards(script, own_world, spoiled, capsys):
    message = spoiled(capsys, ONLINE, f"data.shards={own_world.folder}/nowhere", script=script)
    assert has(message, "nowhere", "train.manifest.json", "make_shards.py")


def test_shards_that_changed_since_the_index_was_made(own_world, spoiled, capsys):
    shard = own_world.folder / "shards/train-000001.tar"
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    assert has(spoiled(capsys, ONLINE), "train-000001.tar changed since the index was made", "make_shards.py")


def test_an_index_of_other_shards(own_world, spoiled, capsys):
    index = own_world.folder / "shards/train.index.npy"
    index.write_bytes(index.read_bytes()[:-32] + b"\0" * 32)
    assert has(spoiled(capsys, ONLINE), "train.index.npy changed since the manifest was made", "make_shards.py")


def write_masks(world, **changed):
    """Write a complete store, as it would be for the world's recipe but for `changed` parts of its fingerprint."""
    recipe = load_recipe(world.recipe)
    shards = open_shards(world.folder / "shards", "train")
    teacher = build_teacher(recipe.relation_teacher, role="relation", grid_size=8, mask=recipe.mask)
    # Written out, not `store_fingerprint`: both sides of the comparison would otherwise be wrong alike.
    fingerprint = mask_fingerprint(
        recipe.mask,
        teacher_digest=teacher.digest,
        teacher_normalisation=(teacher.preprocess.mean, teacher.preprocess.std),
        view_fingerprint=view_fingerprint(recipe.data, recipe.run.seed),
        index_digest=shards.digest,
        seed=recipe.run.seed,
        precision="fp32",
        depth=teacher.depth,
    )
    store = MaskStore.create(world.folder / "masks", fingerprint | changed, 60, 64, 21, 2)
    packed = torch.zeros(60, 64, dtype=torch.uint8)
    packed[:, :21] = 1
    for view, part in store.missing_parts():
        store.write_part(view, part, np.packbits(packed.numpy(), axis=1, bitorder="little"))


def test_a_classifier_for_shards_without_labels(own_world, spoiled, capsys):
    shards = own_world.folder / "shards"
    for name in ("train.manifest.json", "train.index.npy"):
        (shards / name).unlink()
    assert (
        runpy.run_path(str(ROOT / "data_tools/index_shards.py"))["main"](
            ["--input", str(shards), "--labels", "none", "--workers", "1"]
        )
        == 0
    )
    capsys.readouterr()
    message = spoiled(capsys, script="pretrain_teacher", options=["--method", "supervised"])
    assert has(message, "--method supervised needs labels, but 60 of 60 samples", "index_shards.py --labels cls")


def test_masks_that_were_not_made_yet(spoiled, capsys):
    assert has(spoiled(capsys), "masks/manifest.json: no mask store there", "precompute_masks.py", "mask.source=online")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("relation_teacher.weights={folder}/feature.safetensors", "another relation teacher's weights"),
        ("run.seed=5", "another run.seed (0, the recipe has 5)"),
        ("data.crop_scale=[0.5, 1.0]", "another view crop_scale ([0.2, 1.0], the recipe has [0.5, 1.0])"),
        ("data.hflip=0", "another view hflip (0.5, the recipe has 0.0)"),
        ("mask.stage_keep_ratio=0.6", "another mask.stage_keep_ratio (0.7, the recipe has 0.6)"),
        ("data.views=3", "has masks of 2 views, data.views is 3"),
    ],
)
def test_masks_of_something_else(override, part, own_world, spoiled, capsys):
    write_masks(own_world)
    message = spoiled(capsys, override.format(folder=own_world.folder))
    assert has(message, "masks/manifest.json", part, "precompute_masks.py")


def test_masks_of_the_same_weights_fed_otherwise(own_world, spoiled, capsys):
    write_masks(own_world)
    path = own_world.folder / "relation.safetensors"
    file = load_teacher_file(path, "")
    save_teacher_file(path, file.state, file.arch, (0.4, 0.4, 0.4), file.std, kind=file.kind)
    message = spoiled(capsys)
    assert has(message, "another relation teacher's mean and deviation ([[0.5, 0.5, 0.5],", "mask.store=OTHER_FOLDER")


@pytest.mark.parametrize("name", ["index of the shards", "relation teacher's precision"])
def test_masks_of_other_data_or_precision(name, own_world, spoiled, capsys):
    write_masks(own_world, **{name: "another"})
    assert has(spoiled(capsys), f'another {name} ("another", the recipe has', "mask.store=OTHER_FOLDER")


def test_precomputing_into_masks_of_another_teacher(own_world, spoiled, capsys):
    write_masks(own_world)
    other = f"relation_teacher.weights={own_world.folder}/feature.safetensors"
    message = spoiled(capsys, other, script="precompute_masks", among_ranks=True)
    assert has(message, "masks/manifest.json", "another relation teacher's weights", "mask.store=OTHER_FOLDER")


def test_a_teacher_file_that_is_not_there(own_world, spoiled, capsys):
    message = spoiled(capsys, ONLINE, f"relation_teacher.weights={own_world.folder}/no.safetensors")
    assert has(message, "relation_teacher.weights: there is no file", "no.safetensors", "pretrain_teacher.py")


def test_a_teacher_file_with_tensors_of_another_model(own_world, spoiled, capsys):
    path = own_world.folder / "feature.safetensors"
    file = load_teacher_file(path, "")
    save_teacher_file(path, file.state, file.arch | {"depth": 5}, file.mean, file.std, kind=file.kind)
    assert has(spoiled(capsys, ONLINE), "feature_teacher.weights", "feature.safetensors", "missing: blocks.4.")


def test_somebody_else_s_file_as_an_hdscale_file(own_world, spoiled, capsys):
    save_file({"weight": torch.zeros(2)}, own_world.folder / "other.safetensors")
    message = spoiled(capsys, ONLINE, f"feature_teacher.weights={own_world.folder}/other.safetensors")
    assert has(message, "feature_teacher.weights", "is not a file of hdscale's", "source to timm or open_clip")


def test_a_relation_teacher_with_another_number_of_heads(own_world, spoiled, capsys):
    message = spoiled(capsys, ONLINE, "student.num_heads=4")
    assert has(message, "the student has 4 and the relation teacher 3", "relation.heads=merged")


@pytest.mark.parametrize("script", ["train", "precompute_masks", "pretrain_teacher"])
def test_a_misspelt_recipe_key(script, spoiled, capsys):
    options = ["--method", "mae"] if script == "pretrain_teacher" else []
    message = spoiled(capsys, "mask.keep_ration=0.5", script=script, options=options)
    assert has(message, "unknown key mask.keep_ration", "did you mean mask.keep_ratio?")


def test_a_value_that_breaks_a_rule(own_world, spoiled, capsys):
    values = yaml.safe_load(own_world.recipe.read_text())
    values["mask"]["keep_ratio"] = 1.4
    own_world.recipe.write_text(yaml.safe_dump(values))
    assert has(spoiled(capsys), "recipe.yaml: mask.keep_ratio must be less than or equal to 1, got 1.4")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda config: config.update(gradient_cliping=1.0), ["unknown key gradient_cliping", "optim.clip"]),
        (
            lambda config: config["zero_optimization"].update(reduce_buckt_size=5),
            ["zero_optimization.reduce_buckt_size"],
        ),
        (
            lambda config: config["zero_optimization"].update(reduce_bucket_size="big"),
            ["zero_optimization.reduce_bucket_size", "'big'"],
        ),
    ],
    ids=["top level", "zero_optimization", "value"],
)
def test_a_deepspeed_config_that_deepspeed_would_misread(change, parts, own_world, spoiled, capsys):
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    change(config)
    path = own_world.folder / "mine.json"
    path.write_text(json.dumps(config))
    assert has(spoiled(capsys, ONLINE, options=["--ds_config", str(path)]), str(path), *parts)


def test_batch_sizes_that_do_not_divide(spoiled, capsys):
    message = spoiled(capsys, ONLINE, "optim.micro_batch_size=6")
    assert has(message, "optim.global_batch_size", "optim.micro_batch_size x ranks = 6 x 1 = 6, got 16")


def test_fp16_without_a_gpu(spoiled, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert has(spoiled(capsys, ONLINE, "run.precision=fp16"), "run.precision fp16 needs a GPU", "run.precision=fp32")


def write_run(world, *, steps=(4,), **fingerprints):
    """Write the folder of an earlier start, with checkpoints that are whole."""
    recipe = load_recipe(world.recipe, [ONLINE])
    folder = world.folder / "runs/run"
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe))
    views = view_fingerprint(recipe.data, recipe.run.seed)
    now = {
        "data": open_shards(world.folder / "shards", "train").digest,
        **{f"view {name}": value for name, value in views.items()},
        "precision": "fp32",
        "feature_teacher": build_teacher(recipe.feature_teacher, grid_size=8).digest,
        "relation_teacher": build_teacher(recipe.relation_teacher, grid_size=8).digest,
    }
    for step in steps:
        checkpoint = folder / f"checkpoints/step-{step:09d}"
        checkpoint.mkdir(parents=True)
        save_file({"weight/nothing": torch.zeros(3)}, checkpoint / "student-00000-of-00001.safetensors")
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "fingerprints": now | fingerprints}))
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
        (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def checked(world, *overrides, allow_change=()):
    """Check the run as launch/train.py does, and start nothing."""
    from hdscale.teachers.build import build_teachers
    from hdscale.training.run import check_run, with_fingerprints

    recipe = load_recipe(world.recipe, [ONLINE, *overrides])
    digests = {name: teacher.digest for name, teacher in build_teachers(recipe, 8).named().items()}
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    return with_fingerprints(check_run(recipe, config, allow_change), digests)


def test_a_recipe_that_changed_since_the_checkpoint(own_world, spoiled, capsys):
    folder = write_run(own_world)
    message = spoiled(capsys, ONLINE, "optim.lr=5e-4")
    assert has(message, str(folder / RECIPE_FILE), "started with optim.lr=0.001 (now 0.0005)")
    assert has(message, "--allow-change optim.lr", "run.name")
    # Naming another field does not help, naming this one does.
    assert has(spoiled(capsys, ONLINE, "optim.lr=5e-4", options=["--allow-change", "optim.clip"]), "optim.lr")
    assert checked(own_world, "optim.lr=5e-4", allow_change=["optim.lr"]).checkpoint.step == 4


def test_a_teacher_file_that_changed_since_the_checkpoint(own_world, spoiled, capsys):
    write_run(own_world)
    shutil.copy(own_world.folder / "relation.safetensors", own_world.folder / "feature.safetensors")
    message = spoiled(capsys, ONLINE)
    assert has(message, "checkpoints/step-000000004", "was made with another feature_teacher")
    assert has(message, "--allow-change 'feature_teacher'", "run.name")
    assert checked(own_world, allow_change=["feature_teacher"]).checkpoint.step == 4


def test_shards_that_changed_since_the_checkpoint(own_world, spoiled, capsys):
    write_run(own_world, data="0" * 64)
    assert has(
        spoiled(capsys, ONLINE), "was made with another data (sha256 000000000000..., now ", "--allow-change 'data'"
    )


def damage(folder, step, how):
    path = folder / f"checkpoints/step-{step:09d}/student-00000-of-00001.safetensors"
    data = path.read_bytes()
    if how == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "cut":
        path.write_bytes(data[:-4])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_corrupt_newest_checkpoint_gives_way_to_the_one_before(how, own_world):
    folder = write_run(own_world, steps=(4, 8))
    assert checked(own_world).checkpoint.step == 8
    damage(folder, 8, how)
    assert checked(own_world).checkpoint.step == 4


def test_a_run_without_a_whole_checkpoint_does_not_start_over_in_silence(own_world, spoiled, capsys):
    folder = write_run(own_world, steps=(4, 8))
    damage(folder, 4, "cut")
    damage(folder, 8, "gone")
    message = spoiled(capsys, ONLINE)
    assert has(message, "no checkpoint of", "step-000000004/student-00000-of-00001.safetensors differs", "run.name")
    assert has(message, "step-000000008", "is incomplete")


def test_the_launcher_ends_with_our_exit_code_when_the_hostfile_is_not_there(own_world):
    words = ["--hostfile", "nowhere", "launch/train.py", "--recipe", own_world.recipe, ONLINE]
    done = run(deepspeed(*words, ranks=1))
    assert done.returncode == 2, done.stderr[-3000:]
    messages = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(messages) == 1
    assert has(messages[0], "--hostfile nowhere does not exist", "HOST slots=GPUS")
    assert not (own_world.folder / "runs").exists()


def test_a_pretrained_teacher_has_masks_of_its_own(spoiled, capsys):
    overrides = ["student.mask_tokens=encoder", ONLINE]
    message = spoiled(capsys, *overrides, script="pretrain_teacher", options=["--method", "mae"])
    assert "student.mask_tokens must be none for method mae, got encoder" in message


def test_a_run_root_that_is_a_file_is_named_before_anything_is_removed_from_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\); set run.root and run.name"):
        mark_done(tmp_path / "file/run", done=False)


def test_activations_cannot_go_to_the_cpu_without_a_gpu(own_world, spoiled, capsys):
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    path = own_world.folder / "mine.json"
    path.write_text(json.dumps(config | {"activation_checkpointing": {"cpu_checkpointing": True}}))
    message = spoiled(capsys, ONLINE, options=["--ds_config", str(path)])
    assert has(message, "activation_checkpointing.cpu_checkpointing", "no GPU is visible", "leave it out")

"""What a resumed run compares with its checkpoint, and the ranks with each other, before anything is trained."""

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import hdscale.training.run as module
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import RECIPE_FILE, dump_recipe, load_recipe
from hdscale.data.decode import INTERPOLATION, decoder_version
from hdscale.data.index import open_shards
from hdscale.data.views import VIEW_ALGORITHM
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.masking.bits import pack_indices
from hdscale.masking.store import MaskStore
from hdscale.runs.checkpoint import Checkpoint
from hdscale.teachers.build import build_teacher
from hdscale.training import loop as loop_module
from hdscale.training.distill import build_models
from hdscale.training.loop import train_run
from hdscale.training.masks import open_mask_store, store_fingerprint
from hdscale.training.run import Session, check_run, start_engine, with_fingerprints
from hdscale.training.schedule import Schedule

ROOT = Path(__file__).resolve().parents[2]
VIEW = ("crop_ratio", "crop_scale", "decoder", "hflip", "img_size", "interpolation", "seed", "view_algorithm")
FOUND_BEFORE_TEACHERS = ["data", "precision", *(f"view {name}" for name in VIEW)]
TEACHERS = ["feature_teacher", "relation_teacher"]
DIGESTS = {"feature_teacher": "f" * 64, "relation_teacher": "none"}
DS_CONFIG = load_ds_config(ROOT / "ds_configs/zero2.json")


@pytest.fixture
def recipe(world, tmp_path):
    return load_recipe(
        world.recipe,
        [
            f"run.root={tmp_path}",
            "run.seed=5",
            "data.hflip=false",
            "data.crop_scale=[0.5,1.0]",
            "data.crop_ratio=[0.75,1.25]",
            "mask.source=online",
        ],
    )


@pytest.fixture
def earlier(recipe):
    """Write the folder of an earlier start, as it would be now but for `changed` fingerprints."""

    def write(fingerprints, **changed):
        folder = module.run_folder_of(recipe)
        checkpoint = folder / "checkpoints/step-000000004"
        checkpoint.mkdir(parents=True)
        (folder / RECIPE_FILE).write_text(dump_recipe(recipe))
        save_file({"weight/nothing": torch.zeros(3)}, checkpoint / "student-00000-of-00001.safetensors")
        state = {"step": 4, "fingerprints": {**fingerprints, **changed}}
        (checkpoint / "state.json").write_text(json.dumps(state))
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
        (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))

    return write


def checked(recipe, *allowed):
    return check_run(recipe, DS_CONFIG, allowed)


def test_a_run_is_known_by_its_data_its_precision_and_everything_that_decides_a_view(recipe):
    assert checked(recipe).fingerprints == {
        "data": open_shards(Path(recipe.data.shards), "train").digest,
        "precision": "fp32",
        "view crop_ratio": [0.75, 1.25],
        "view crop_scale": [0.5, 1.0],
        "view decoder": decoder_version(),
        "view hflip": False,
        "view img_size": 32,
        "view interpolation": INTERPOLATION,
        "view seed": 5,
        "view view_algorithm": VIEW_ALGORITHM,
    }


@pytest.mark.parametrize("name", FOUND_BEFORE_TEACHERS)
def test_a_checkpoint_made_with_another_one_of_them_is_refused_by_its_name(name, recipe, earlier):
    now = checked(recipe).fingerprints
    earlier(now, **{name: "another"})
    with pytest.raises(UserError) as error:
        checked(recipe)
    assert f"checkpoints/step-000000004: was made with another {name} (another, now " in str(error.value)
    assert str(error.value).endswith(f"pass --allow-change {name!r}")
    others = [other for other in now if other != name]
    with pytest.raises(UserError, match=f"another {name} "):
        checked(recipe, *others)
    assert checked(recipe, name).checkpoint.step == 4


@pytest.mark.parametrize("name", TEACHERS)
def test_a_checkpoint_of_another_teacher_is_refused_by_its_name(name, recipe, earlier):
    earlier(checked(recipe).fingerprints | DIGESTS, **{name: "a" * 64})
    run = checked(recipe)
    with pytest.raises(UserError, match=rf"another {name} \(sha256 aaaaaaaaaaaa\.\.\., now "):
        with_fingerprints(run, DIGESTS)
    assert with_fingerprints(checked(recipe, name), DIGESTS).fingerprints == run.fingerprints | DIGESTS


def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_refused(recipe, earlier):
    now = checked(recipe).fingerprints
    earlier({name: value for name, value in now.items() if name != "precision"})
    with pytest.raises(UserError, match=r"another precision \(None, now fp32\)"):
        checked(recipe)


def test_a_run_under_auto_is_not_continued_in_another_precision(recipe, earlier, monkeypatch):
    earlier(checked(recipe).fingerprints)
    assert checked(recipe).checkpoint.step == 4
    monkeypatch.setattr(module, "planned_precision", lambda _: "bf16")
    with pytest.raises(UserError, match=r"another precision \(fp32, now bf16\)"):
        checked(recipe)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_session_compares_the_weights_of_both_teachers(name, recipe, earlier):
    digests = {
        role: build_teacher(getattr(recipe, role), role=role.removesuffix("_teacher"), grid_size=8).digest
        for role in TEACHERS
    }
    earlier(checked(recipe).fingerprints | digests, **{name: "a" * 64})
    run = checked(recipe)
    with pytest.raises(UserError, match=rf"{name} \(sha256 a{{12}}\.\.\., now sha256 {digests[name][:12]}\.\.\.\)"):
        build_models(run)  # before any engine, and before masks are opened


@pytest.mark.parametrize("name", [*FOUND_BEFORE_TEACHERS, *TEACHERS, "checkpoint step", "gradient accumulation"])
def test_ranks_that_have_found_different_things_are_named_before_any_engine_is_built(name, recipe, monkeypatch):
    run = with_fingerprints(checked(recipe), DIGESTS)

    def gather(values, mine):
        assert name in mine
        values[:] = [mine, mine | {name: "another"}]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(module, "build_student_engine", lambda *_: pytest.fail("the ranks do not agree"))
    ranks = Ranks(0, 2, 0, torch.device("cpu"), ("alpha", "beta"))
    with pytest.raises(UserError, match=f"(?s){name}.*another"):
        start_engine(run, torch.nn.Linear(1, 1), ranks)


def test_stored_masks_of_another_number_of_patches_are_refused(recipe, tmp_path):
    folder = tmp_path / "masks"
    mask = recipe.mask.model_copy(update={"store": str(folder), "source": "store"})
    recipe = recipe.model_copy(update={"mask": mask})
    run = SimpleNamespace(recipe=recipe, shards=open_shards(Path(recipe.data.shards), "train"), precision="fp32")
    teacher = build_teacher(recipe.relation_teacher, role="relation", grid_size=8, mask=recipe.mask)
    store = MaskStore.create(folder, store_fingerprint(recipe, run.shards, "fp32", teacher), 60, 64, 21, 2)
    for view, part in store.missing_parts():
        store.write_part(view, part, pack_indices(np.tile(np.arange(21), (60, 1)), 64))
    assert open_mask_store(run, teacher, 64).manifest.num_patches == 64
    with pytest.raises(UserError, match=r"masks/manifest\.json: masks of 64 patches, the student has 16: run launch/"):
        open_mask_store(run, teacher, 16)


@pytest.fixture
def loop_calls(monkeypatch):
    """Stand where the training loop does: keep what it is given, and reach the end."""
    given = []

    def train(session, batches, metrics, progress, stop):
        given.append((session, metrics, stop))
        return session.run.end_step

    monkeypatch.setattr(loop_module, "train", train)
    monkeypatch.setattr(loop_module, "StopFlag", lambda: "the flag")
    return given


FIRST, SECOND = (Ranks(rank, 2, rank, torch.device("cpu"), ("alpha", "alpha")) for rank in range(2))


def with_settings(recipe, **sections):
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changed)


@pytest.mark.parametrize(("stop_after", "end", "code"), [(None, 20, 0), (7, 7, 75), (20, 20, 0), (30, 20, 0)])
def test_the_loop_gets_the_recipe_s_settings_and_the_checkpoint_s_place(
    stop_after, end, code, recipe, loop_calls, tmp_path
):
    recipe = with_settings(
        recipe,
        schedule={"stop_after": stop_after},
        checkpoint={"every_steps": 6, "keep": 2},
        log={"every_steps": 5},
    )
    state = {"step": 4, "quarantine": [3, 1]}
    run = checked(recipe)._replace(accumulation=1, checkpoint=Checkpoint(tmp_path, state))
    run.folder.mkdir()
    first, second = (Session(run, ranks, "engine", "ask_teachers") for ranks in (FIRST, SECOND))
    for session in (first, second):
        assert train_run(session) == code
    (trained, metrics, stop), (other, no_metrics, _) = loop_calls
    assert (trained, other, stop) == (first, second, "the flag")
    assert run.schedule == Schedule(total_steps=20, warmup_steps=3, peak_lr=1e-3, min_lr=1e-5)
    assert (run.start_step, run.end_step, run.shards.num_samples) == (4, end, 60)
    assert loop_module._quarantine(first).sample_ids == loop_module._quarantine(second).sample_ids == [1, 3]
    assert metrics is not None
    assert no_metrics is None


@pytest.mark.parametrize(("step", "stop_after", "code"), [(20, None, 0), (8, 8, 75), (9, 8, 75)])
def test_a_run_that_has_come_to_its_end_says_so_and_trains_nothing(
    step, stop_after, code, recipe, loop_calls, tmp_path
):
    recipe = with_settings(recipe, schedule={"stop_after": stop_after})
    run = checked(recipe)._replace(checkpoint=Checkpoint(tmp_path, {"step": step, "quarantine": []}))
    said, nothing = io.StringIO(), io.StringIO()
    assert train_run(Session(run, FIRST, "engine", "ask_teachers"), said) == code
    assert train_run(Session(run, SECOND, "engine", "ask_teachers"), nothing) == code
    assert said.getvalue() == f"{run.folder}: step {step} of 20 is done already\n"
    assert nothing.getvalue() == ""
    assert loop_calls == []


def test_weights_that_a_permitted_change_does_not_fit_are_refused_in_one_line(recipe, earlier, process_group):
    earlier(checked(recipe).fingerprints)
    ranks = Ranks(0, 1, 0, torch.device("cpu"), ("alpha",))
    with pytest.raises(UserError) as error:
        start_engine(checked(recipe), torch.nn.Linear(1, 1), ranks)
    message = str(error.value)
    assert "checkpoints/step-000000004: its weights do not fit what has changed in the recipe" in message
    assert "nothing" in message
    assert message.endswith("set it back, or choose another run.name")
    assert "\n" not in message

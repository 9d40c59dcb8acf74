import json
from pathlib import Path

import pytest
import torch

from hdscale.errors import UserError
from hdscale.runs.checkpoint import (
    CorruptCheckpointError,
    newest_checkpoint,
    open_checkpoint,
    require_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path, process_group):
    for step in (5, 10, 15):
        save(tmp_path, step)
    return tmp_path


def save(folder, step, keep=3):
    shard = {
        "weight/a": torch.full((2, 3), float(step)),
        "exp_avg/a": torch.full((2, 3), 0.5),
        "exp_avg_sq/a": torch.full((2, 3), 0.25),
        "buffer/b": torch.arange(4.0),
    }
    return save_checkpoint(folder, shard, {"step": step}, rank=0, world_size=1, keep=keep)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_was_saved_is_read_back_by_kind_and_name(run):
    checkpoint = require_checkpoint(run)
    assert checkpoint.step == 15
    assert torch.equal(checkpoint.tensors("weight")["a"], torch.full((2, 3), 15.0))
    assert checkpoint.tensors("exp_avg").keys() == checkpoint.tensors("exp_avg_sq").keys() == {"a"}
    assert torch.equal(checkpoint.tensors("exp_avg_sq")["a"], torch.full((2, 3), 0.25))
    assert checkpoint.module_state().keys() == {"a", "b"}


def test_only_the_newest_are_kept_and_latest_names_the_last(run):
    save(run, 20, keep=2)
    assert names(run) == ["latest", "step-000000015", "step-000000020"]
    assert (run / "checkpoints/latest").read_text() == "step-000000020\n"


def test_saving_a_step_again_replaces_it(run):
    path = save(run, 15)
    assert path.name == "step-000000015"
    assert names(run) == ["latest", "step-000000005", "step-000000010", "step-000000015"]
    assert open_checkpoint(path).step == 15


def test_a_run_that_comes_by_an_earlier_step_again_takes_back_the_later_ones(run):
    # It started before them; kept, they would be the newest, and this one the first to go.
    save(run, 8, keep=2)
    assert names(run) == ["latest", "step-000000005", "step-000000008"]
    assert (run / "checkpoints/latest").read_text() == "step-000000008\n"
    assert newest_checkpoint(run).step == 8


def test_all_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, process_group, monkeypatch):
    events = []

    def rename(path, target):
        events.append(("rename", path.name, target.name))
        return original(path, target)

    original = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr("hdscale.runs.checkpoint.flush", lambda path: events.append(("flush", path.name)))
    save(tmp_path, 5)
    staging, final = ".staging-step-000000005", "step-000000005"
    place = events.index(("rename", staging, final))
    assert events[place - 1] == ("flush", staging)  # the folder after the files it lists
    assert {*events[: place - 1]} == {
        ("flush", name) for name in ("manifest.json", "state.json", "student-00000-of-00001.safetensors")
    }
    assert events[place + 1] == ("flush", "checkpoints")


def test_what_a_killed_save_left_behind_is_ignored_and_made_again(run):
    staging = run / "checkpoints/.staging-step-000000020"
    staging.mkdir()
    (staging / "student-00000-of-00002.safetensors").write_bytes(b"half")
    assert newest_checkpoint(run).step == 15
    path = save(run, 20)
    assert not staging.exists()
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "state.json",
        "student-00000-of-00001.safetensors",
    ]


def test_a_save_that_fails_leaves_the_previous_one_whole(run, monkeypatch):
    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hdscale.runs.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(run, 20)
    assert newest_checkpoint(run).step == 15


@pytest.mark.parametrize("name", ["student-00000-of-00001.safetensors", "state.json"])
def test_one_flipped_bit_is_found_before_anything_is_loaded(run, name):
    file = run / "checkpoints/step-000000015" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=f"{name} differs from its digest"):
        open_checkpoint(file.parent)
    assert newest_checkpoint(run).step == 10


@pytest.mark.parametrize("name", ["student-00000-of-00001.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_makes_the_one_before_the_newest(run, name):
    (run / "checkpoints/step-000000015" / name).unlink()
    assert newest_checkpoint(run).step == 10


def test_a_run_without_checkpoints_is_new_and_has_nothing_to_show(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        require_checkpoint(tmp_path)


def test_only_damaged_checkpoints_are_refused_with_every_reason(run):
    for path in (run / "checkpoints").glob("step-*"):
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError) as error:
        newest_checkpoint(run)
    assert all(f"step-{step:09d}" in str(error.value) for step in (5, 10, 15))


def test_another_format_is_named_and_not_taken_for_damage(run):
    manifest = run / "checkpoints/step-000000015/manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(UserError, match="checkpoint format 2, this hdscale reads 1"):
        newest_checkpoint(run)

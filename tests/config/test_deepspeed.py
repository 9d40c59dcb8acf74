import json
from pathlib import Path

import pytest

from hdscale.config.deepspeed import load_ds_config
from hdscale.errors import UserError


def write(path: Path, **values: object) -> Path:
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    return path


@pytest.mark.parametrize("path", sorted(Path("ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_passes_our_check_and_deepspeed_s_own(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = load_ds_config(path)
    # Any ZeRO-3 engine would otherwise patch F.linear for the whole process and change the student's last digits.
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert DeepSpeedZeroConfig(**config["zero_optimization"]).stage in (2, 3)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"zero_optimisation": {}}, ["unknown key zero_optimisation", "did you mean zero_optimization?"]),
        ({"gradient_cliping": 1.0}, ["unknown key gradient_cliping", "optim.clip"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping belongs in the recipe", "optim.clip"]),
        ({"elasticity": {}}, ["unknown key elasticity", "known here: zero_optimization"]),
        ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage must be 2 or 3, got 1"]),
        ({"zero_optimization": 3}, ["zero_optimization.stage must be 2 or 3, got None"]),
        ({"activation_checkpointing": True}, ["activation_checkpointing must be an object, got True"]),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},  # as DeepSpeed's own help spells it
            ["activation_checkpointing: unknown key partitioned_activations", "did you mean partition_activations?"],
        ),
        (
            {"activation_checkpointing": {"cpu_checkpointing": "yes"}},
            ["activation_checkpointing.cpu_checkpointing must be bool, got 'yes'"],
        ),
        (
            {"activation_checkpointing": {"contiguous_memory_optimization": True, "partition_activations": True}},
            ["contiguous_memory_optimization needs number_checkpoints, got None"],
        ),
    ],
)
def test_each_mistake_names_file_key_and_way_out(tmp_path, values, parts):
    path = write(tmp_path / "mine.json", **values)
    with pytest.raises(UserError) as error:
        load_ds_config(path)
    assert all(part in str(error.value) for part in ["mine.json", *parts]), str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must be a JSON object")])
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_ds_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        load_ds_config(tmp_path / "nowhere.json")

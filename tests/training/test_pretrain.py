"""What a teacher's pretraining goes on from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

import hdscale.training.pretrain as module
from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import ENVIRONMENT_FILE, RECIPE_FILE, dump_recipe, load_recipe
from hdscale.errors import UserError
from hdscale.pretraining import MaskedAutoencoder
from hdscale.student.build import build_student
from hdscale.training.run import check_run

DS_CONFIG = load_ds_config(Path(__file__).resolve().parents[2] / "ds_configs/zero2.json")
SIZES = ["pretrain.decoder_dim=16", "pretrain.decoder_depth=1", "pretrain.decoder_heads=2"]


class GoesOnError(Exception):
    """Everything was accepted, and the ranks would meet now."""


@pytest.fixture
def started(world, tmp_path, monkeypatch):
    """Start a method on a recipe; nothing is trained."""

    def meet():
        raise GoesOnError

    monkeypatch.setattr(module, "distributed", meet)
    recipe = load_recipe(world.recipe, [f"run.root={tmp_path}", *SIZES])

    def start(method, *overrides, allow_change=()):
        mine = load_recipe(world.recipe, [f"run.root={tmp_path}", *SIZES, *overrides])
        return module.pretrain(mine, method, DS_CONFIG, allow_change=allow_change)

    start.recipe = recipe
    return start


@pytest.fixture
def earlier(started):
    """Write the folder of an earlier start, with these parameters in its checkpoint."""
    recipe = started.recipe
    folder = Path(recipe.run.root) / recipe.run.name

    def write(method, state, *, missing=()):
        shutil.rmtree(folder, ignore_errors=True)
        known = check_run(recipe, DS_CONFIG).fingerprints
        checkpoint = folder / "checkpoints/step-000000004"
        checkpoint.mkdir(parents=True)
        values = yaml.safe_load(dump_recipe(recipe))
        for section, field in missing:
            del values[section][field]
        (folder / RECIPE_FILE).write_text(yaml.safe_dump(values))
        (folder / ENVIRONMENT_FILE).write_text("{}")
        weights = {f"weight/{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(weights, checkpoint / "student-00000-of-00001.safetensors")
        fingerprints = {**known, "method": method}
        (checkpoint / "state.json").write_text(json.dumps({"step": 4, "fingerprints": fingerprints}))
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
        (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))

    return write


def parameters(recipe, method):
    encoder = build_student(recipe.student, recipe.data.img_size, seed=0)
    if method == "supervised":
        return dict(module.SupervisedClassifier(encoder, 3, recipe.pretrain, seed=0).named_parameters())
    return dict(MaskedAutoencoder(encoder, recipe.pretrain, seed=0).named_parameters())


def of_an_earlier_version(parameters):
    """Name them as when the decoder, which did not get the class token, held the Linear to the pixels."""
    return {name.replace("pixels.", "decoder.pixels."): tensor for name, tensor in parameters.items()}


@pytest.mark.parametrize("allowed", [(), ("student.init", "student", "pretrain", "method")])
def test_an_autoencoder_of_an_earlier_version_is_refused_by_its_decoder_whatever_is_allowed(allowed, started, earlier):
    earlier("mae", of_an_earlier_version(parameters(started.recipe, "mae")), missing=[("student", "init")])
    with pytest.raises(UserError) as error:
        started("mae", allow_change=allowed)
    message = str(error.value)
    assert (
        "checkpoints/step-000000004: this MAE is of an earlier version, whose decoder lacks the class token" in message
    )
    assert "choose another run.name" in message
    assert "\n" not in message
    assert "--allow-change" not in message


def test_an_autoencoder_of_this_version_goes_on(started, earlier):
    earlier("mae", parameters(started.recipe, "mae"))
    with pytest.raises(GoesOnError):
        started("mae")


def test_a_classifier_of_an_earlier_version_goes_on_with_the_weights_it_was_started_from(started, earlier):
    earlier("supervised", parameters(started.recipe, "supervised"), missing=[("student", "init")])
    with pytest.raises(UserError, match=r"started with student\.init=timm \(now mae\): set it back"):
        started("supervised")
    with pytest.raises(GoesOnError):
        started("supervised", "student.init=timm")
    with pytest.raises(GoesOnError):
        started("supervised", allow_change=["student.init"])
    with pytest.raises(UserError, match=r"was made with another method \(supervised, now mae\)"):
        started("mae", "student.init=timm")

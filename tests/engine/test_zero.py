from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from hdscale.config.loading import load_recipe
from hdscale.config.sections import OptimConfig
from hdscale.distiller import build_distiller
from hdscale.engine.ranks import resolve_precision
from hdscale.engine.zero import parameter_groups, student_ds_config
from hdscale.engine.zero_state import gather_shard
from hdscale.errors import UserError
from hdscale.types import TeacherShapes

BLOCK_WITHOUT_DECAY = (
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.bias",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.bias",
    "mlp.fc2.bias",
)
BLOCK_WITH_DECAY = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@pytest.fixture(scope="module")
def distiller(world):
    recipe = load_recipe(world.recipe)
    return build_distiller(
        recipe.student,
        recipe.relation,
        recipe.loss,
        img_size=32,
        seed=0,
        teachers=TeacherShapes(feature_dim=48, relation_heads=3, relation_has_cls=True),
    )


def test_norms_biases_and_tokens_are_not_decayed_and_everything_else_is(distiller):
    model = "student.encoder.model."
    blocks = [f"{model}blocks.{index}." for index in range(4)]
    wanted_plain = {model + name for name in ("cls_token", "patch_embed.proj.bias", "norm.weight", "norm.bias")}
    wanted_plain |= {block + name for block in blocks for name in BLOCK_WITHOUT_DECAY} | {"head.proj.bias"}
    wanted_decayed = {block + name for block in blocks for name in BLOCK_WITH_DECAY}
    wanted_decayed |= {model + "patch_embed.proj.weight", "head.proj.weight"}
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    decayed, plain = parameter_groups(distiller, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert sorted(names[id(parameter)] for parameter in decayed["params"]) == sorted(wanted_decayed)
    assert sorted(names[id(parameter)] for parameter in plain["params"]) == sorted(wanted_plain)


@pytest.mark.parametrize(
    ("student", "wanted"),
    [
        ({"mask_tokens": "encoder"}, {"student.encoder.mask_token", "student.encoder.model.cls_token"}),
        (
            {"mask_tokens": "decoder", "decoder": "transformer", "decoder_depth": 1},
            {"decoder.mask_token", "student.encoder.model.cls_token"},
        ),
        (
            {"model": "vit_small_patch14_reg4_dinov2", "num_heads": 3},
            {"student.encoder.model.reg_token", "student.encoder.model.cls_token"},
        ),
    ],
)
def test_every_kind_of_token_is_free_of_decay(student, wanted, world):
    recipe = load_recipe(world.recipe)
    module = build_distiller(
        recipe.student.model_copy(update=student),
        recipe.relation,
        recipe.loss,
        img_size=32,
        seed=0,
        teachers=TeacherShapes(feature_dim=48, relation_heads=3, relation_has_cls=True),
    )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, plain = parameter_groups(module, 0.05)
    assert {names[id(parameter)] for parameter in plain["params"] if parameter.ndim > 1} == wanted
    assert all(names[id(parameter)].endswith(".weight") for parameter in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_tokens_and_positions_are_not_decayed_whatever_their_shape():
    module = torch.nn.Module()
    for name in ("cls_token", "reg_token", "mask_token", "pos_embed", "token_weight"):
        setattr(module, name, torch.nn.Parameter(torch.zeros(1, 2, 3)))
    decayed, plain = parameter_groups(torch.nn.Sequential(module), 0.05)
    assert [parameter is module.token_weight for parameter in decayed["params"]] == [True]
    assert len(plain["params"]) == 4


def test_frozen_parameters_are_in_no_group():
    module = torch.nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.05)
    assert (decayed["params"], plain["params"]) == ([], [module.bias])


@pytest.mark.parametrize(
    ("precision", "section"),
    [
        ("fp32", {}),
        ("bf16", {"bf16": {"enabled": True}}),
        ("fp16", {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}}),
    ],
)
def test_the_recipe_s_numbers_complete_a_deepspeed_config(precision, section):
    given = {"zero_optimization": {"stage": 2}, "steps_per_print": 7}
    optim = OptimConfig(micro_batch_size=8, clip=0.3)
    assert student_ds_config(given, optim, accumulation=4, precision=precision) == {
        "zero_optimization": {"stage": 2},
        "steps_per_print": 7,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.3,
        "zero_force_ds_cpu_optimizer": False,
        **section,
    }


@pytest.mark.parametrize("clip", [0.0, 0.3, 1.0])
def test_deepspeed_clips_at_the_recipe_s_norm_and_at_1_when_nobody_says(clip):
    completed = student_ds_config({}, OptimConfig(micro_batch_size=8, clip=clip), accumulation=4, precision="fp32")
    assert DeepSpeedConfig(completed).gradient_clipping == clip
    del completed["gradient_clipping"]
    assert DeepSpeedConfig(completed).gradient_clipping == 1.0


def test_a_file_s_own_settings_stay_and_the_recipe_s_numbers_replace_others():
    given = {"gradient_clipping": 7.0, "gradient_accumulation_steps": 9, "train_micro_batch_size_per_gpu": 3}
    completed = student_ds_config(given, OptimConfig(micro_batch_size=8, clip=0.3), accumulation=4, precision="fp32")
    assert completed == {
        "steps_per_print": 2**31 - 1,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.3,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_precision_follows_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(UserError, match=r"run\.precision fp16 needs a GPU"):
        resolve_precision("fp16", cpu)

    def supported(including_emulation=True):
        return including_emulation  # a V100 emulates bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", cuda) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision("auto", cuda) == "bf16"
    assert resolve_precision("fp32", cuda) == "fp32"


class Whole(nn.Parameter):
    """A parameter that DeepSpeed finds whole, with moments like its weight."""

    _hp_mapping = "there is one"

    def get_full_hp_param(self, optim_state_key=None):
        return self.detach()


def shares(sizes, world_size):
    """Return the names of the parameters that each rank saves."""
    parameters = nn.ParameterDict({name: Whole(torch.zeros(size)) for name, size in sizes.items()})
    engine = SimpleNamespace(module=parameters)
    return [{name.partition("/")[2] for name in gather_shard(engine, rank, world_size)} for rank in range(world_size)]


def test_checkpoint_shares_are_balanced_and_do_not_depend_on_the_order_of_names():
    sizes = {"a": 9, "b": 5, "c": 4, "d": 1, "e": 1}
    of_two = shares(sizes, 2)
    assert of_two == shares(dict(reversed(sizes.items())), 2)
    assert [sum(sizes[name] for name in share) for share in of_two] == [10, 10]
    assert set.union(*of_two) == sizes.keys()
    assert [len(share) for share in shares(sizes, 8)] == [1, 1, 1, 1, 1, 0, 0, 0]

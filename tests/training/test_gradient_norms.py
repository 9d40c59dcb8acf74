"""Gradient norms of both terms against plain PyTorch's, and what measuring them leaves alone."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from hdscale.config.deepspeed import load_ds_config
from hdscale.config.loading import load_recipe
from hdscale.distiller import build_distiller
from hdscale.engine.ranks import Ranks
from hdscale.errors import UserError
from hdscale.training.gradient_norms import GradientNorms, check_measurable
from hdscale.training.pretrain import pretrain
from hdscale.training.run import check_run
from hdscale.types import Targets, TeacherShapes
from tests.helpers.launcher import ROOT

B, KEPT, SIDE = 4, 21, 32
EVERY = "log.gradient_norms_every=1"
LOSS_SCALE = 2.0**16
CPU = Ranks(0, 1, 0, torch.device("cpu"))


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Setting:
    """A student between made-up teachers, and one micro-batch; an engine only lends its module and its loss scale."""

    def __init__(self, world, *overrides, feature=True, relation=True):
        self.recipe = load_recipe(world.recipe, [EVERY, *overrides])
        self.num_cls = int(self.recipe.loss.cls == "include")  # of the tokens whose features are compared
        self.distiller = build_distiller(
            self.recipe.student,
            self.recipe.relation,
            self.recipe.loss,
            img_size=SIDE,
            seed=3,
            teachers=TeacherShapes(
                feature_dim=40 if feature else None,
                feature_has_cls=True,
                relation_heads=3 if relation else None,
                relation_has_cls=True,
            ),
        ).train()
        with torch.no_grad():
            for index, parameter in enumerate(self.distiller.parameters()):
                parameter += 0.05 * draw(*parameter.shape, seed=index)  # relations of fresh weights are near zero
        self.images = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).byte()
        kept = torch.stack(
            [torch.randperm(64, generator=torch.Generator().manual_seed(row))[:KEPT] for row in range(B)]
        )
        self.targets = Targets(
            kept.sort(dim=1).values,
            draw(B, self.num_cls + KEPT, 40, seed=2) if feature else None,
            (draw(B, 3, 1 + KEPT, 1 + KEPT, seed=4), draw(B, 3, 1 + KEPT, 1 + KEPT, seed=5)) if relation else (),
        )
        self.engine = SimpleNamespace(module=self.distiller, optimizer=SimpleNamespace(loss_scale=1.0))

    def norms(self, accumulation=1):
        return GradientNorms(self.engine, self.recipe, CPU, accumulation=accumulation)

    def forward(self):
        return self.distiller(self.images, self.targets)


def plain_norms(setting, alpha=1.0):
    """Differentiate both terms in plain PyTorch: blocks are run by hand from the first relation block's tokens on."""
    model = setting.distiller.student.encoder.model
    kept, features, relations = setting.targets
    with torch.no_grad():
        pixels = (setting.images.float() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        x = F.conv2d(pixels, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=4)
        x = x.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
        x = torch.stack([row[indices] for row, indices in zip(x, kept, strict=True)])
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
        x, _, _ = plain_block(model.blocks[0], x)
    tokens = x.detach().requires_grad_()  # of 4 blocks, layers -3 and -2 are 1 and 2
    x, query, key = plain_block(model.blocks[1], tokens)
    x, query_2, key_2 = plain_block(model.blocks[2], x)
    x, _, _ = plain_block(model.blocks[3], x)
    norm, linear = plain_norm(model.norm, x)[:, 1 - setting.num_cls :], setting.distiller.head
    predicted = linear(norm)
    wanted = (features - features.mean(-1, keepdim=True)) / (features.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    feature = F.smooth_l1_loss(predicted, wanted, beta=2.0)
    relation = sum(
        F.smooth_l1_loss(q @ k.transpose(-2, -1) / 4, target, beta=2.0)  # 48 channels, 3 heads of 16
        for q, k, target in ((query, key, relations[0]), (query_2, key_2, relations[1]))
    )
    found = []
    for term in (feature, alpha * relation / 2):
        tokens.grad = None
        term.backward(retain_graph=True)
        found.append(tokens.grad.square().sum().sqrt().item())
    return found


def plain_norm(norm, x):
    return F.layer_norm(x, (48,), norm.weight, norm.bias, norm.eps)


def plain_block(block, x):
    """Return a block's tokens, Q and K."""
    query, key, value = (
        F.linear(plain_norm(block.norm1, x), block.attn.qkv.weight, block.attn.qkv.bias)
        .unflatten(-1, (3, 3, 16))
        .permute(2, 0, 3, 1, 4)
    )
    attended = (query @ key.transpose(-2, -1) / 4).softmax(-1) @ value
    attended = attended.transpose(1, 2).flatten(2)
    x = x + F.linear(attended, block.attn.proj.weight, block.attn.proj.bias)
    hidden = F.gelu(F.linear(plain_norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias), query, key


def measured(setting, accumulation=1):
    norms = setting.norms(accumulation)
    with norms.beside(1):
        setting.forward()
    return norms.read()


@pytest.mark.parametrize("cls", ["include", "exclude"])
@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("loss_scale", [1.0, LOSS_SCALE])
def test_norms_are_those_of_autograd_whatever_scales_the_loss(loss_scale, checkpoint_every, cls, world, process_group):
    setting = Setting(world, "loss.alpha=0.3", f"student.checkpoint_every={checkpoint_every}", f"loss.cls={cls}")
    setting.engine.optimizer.loss_scale = loss_scale
    found = measured(setting, accumulation=2)
    feature, relation = plain_norms(setting, alpha=0.3)
    assert min(feature, relation) > 1e-4
    assert found["gradient_norm_feature"] == pytest.approx(feature, rel=1e-4)
    assert found["gradient_norm_relation"] == pytest.approx(relation, rel=1e-4)
    assert 0 < found["gradient_norm_seconds"] < 600


def test_float16_gradients_that_vanish_unscaled_are_measured_with_the_loss_scale(world, process_group):
    setting = Setting(world, "loss.alpha=1e-4")
    _, wanted = plain_norms(setting, alpha=1e-4)
    for parameter in setting.distiller.parameters():  # DeepSpeed leaves buffers in float32
        parameter.data = parameter.data.half()
    assert measured(setting)["gradient_norm_relation"] == 0
    setting.engine.optimizer.loss_scale = LOSS_SCALE
    assert measured(setting)["gradient_norm_relation"] == pytest.approx(wanted, rel=0.02)


def test_a_term_without_teacher_has_no_norm(world, process_group):
    both = measured(Setting(world))
    no_relation, no_feature = (measured(Setting(world, **{without: False})) for without in ("relation", "feature"))
    assert math.isnan(no_relation["gradient_norm_relation"])
    assert math.isnan(no_feature["gradient_norm_feature"])
    assert no_relation["gradient_norm_feature"] == pytest.approx(both["gradient_norm_feature"], rel=1e-5)
    assert no_feature["gradient_norm_relation"] == pytest.approx(both["gradient_norm_relation"], rel=1e-5)


def test_a_student_without_relation_teacher_needs_the_block_all_the_same(world):
    setting = Setting(world, "relation.layers=[4]", relation=False)
    with pytest.raises(UserError, match=r"relation\.layers must be between -4 and 3 for a model of 4 blocks, got 4"):
        setting.norms()
    setting.recipe = load_recipe(world.recipe, ["relation.layers=[4]", "log.gradient_norms_every=0"])
    setting.norms()


def test_norms_are_means_over_ranks_and_micro_steps_and_their_seconds_a_sum(world, process_group, monkeypatch):
    setting = Setting(world)
    first = measured(setting)
    now = iter([10.0, 11.0, 20.0, 23.0, 30.0, 30.5])
    monkeypatch.setattr("hdscale.training.gradient_norms.time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(torch.tensor([1.0, 2.0, 6.0])))
    norms = GradientNorms(setting.engine, setting.recipe, CPU._replace(world_size=2), accumulation=2)
    with norms.beside(1):
        setting.forward()
    setting.images = 255 - setting.images
    with norms.beside(1):
        setting.forward()
    found = norms.read()
    assert norms.read() == {}  # since then, nothing was measured
    with norms.beside(1):
        setting.forward()
    assert norms.read()["gradient_norm_seconds"] == (0.5 + 6.0) / 2
    monkeypatch.undo()
    second = measured(setting)
    for name, other in (("gradient_norm_feature", 1.0), ("gradient_norm_relation", 2.0)):
        assert abs(first[name] / second[name] - 1) > 1e-3
        assert found[name] == pytest.approx(((first[name] + second[name]) / 2 + other) / 2, rel=1e-5)
    assert found["gradient_norm_seconds"] == (4.0 + 6.0) / 2


def test_what_was_measured_waits_for_the_next_line(world, process_group):
    setting = Setting(world)
    setting.recipe = load_recipe(world.recipe, ["log.gradient_norms_every=3"])
    norms, lines = setting.norms(), []
    for step in range(1, 9):
        with norms.beside(step):
            setting.forward()
        if step % 2 == 0:
            lines.append(len(norms.read()))
    assert lines == [0, 3, 3, 0]  # steps 3 and 6, in the lines of 4 and 6
    assert not setting.distiller._forward_hooks
    assert not any(block._forward_pre_hooks for block in setting.distiller.student.encoder.model.blocks)


@pytest.mark.parametrize("overrides", [(), ("student.checkpoint_every=1",)])
def test_measuring_leaves_losses_gradients_and_random_states_alone(overrides, world, process_group):
    found = []
    for every in (0, 1):
        setting = Setting(world, "student.drop_path=0.5", *overrides, f"log.gradient_norms_every={every}")
        norms = setting.norms()
        torch.manual_seed(0)
        with norms.beside(1):
            terms = setting.forward()
            untouched = all(parameter.grad is None for parameter in setting.distiller.parameters())
            terms.total.backward()
        assert untouched
        assert bool(norms.read()) == bool(every)
        gradients = [parameter.grad for parameter in setting.distiller.parameters()]
        found.append([*(term.detach() for term in terms), *gradients, torch.get_rng_state()])
    for plain, beside in zip(*found, strict=True):
        assert torch.equal(plain, beside)


def test_it_measures_nowhere_but_where_a_second_backward_pass_works(world, tmp_path):
    recipe = load_recipe(world.recipe, ["log.gradient_norms_every=5", "student.checkpoint_every=2"])
    zero2, zero3 = (load_ds_config(ROOT / f"ds_configs/zero{stage}.json") for stage in (2, 3))
    own = zero2 | {"activation_checkpointing": {"partition_activations": True}}
    check_measurable(recipe, zero2)
    with pytest.raises(
        UserError, match=r"^log\.gradient_norms_every does not work under ZeRO-3, .*zero2\.json, or set"
    ):
        check_run(recipe, zero3)
    with pytest.raises(UserError, match=r"^log\.gradient_norms_every .* DeepSpeed's activation .*, or set .*_every=0$"):
        check_run(recipe, own)
    check_measurable(load_recipe(world.recipe, [EVERY, "student.checkpoint_every=0"]), own)  # nothing runs again
    for config in (zero3, own):
        check_measurable(load_recipe(world.recipe, ["student.checkpoint_every=2"]), config)


def test_pretraining_has_no_two_terms(world, tmp_path):
    recipe = load_recipe(world.recipe, ["log.gradient_norms_every=5", f"run.root={tmp_path}"])
    with pytest.raises(UserError, match=r"^log\.gradient_norms_every must be 0 for method mae, got 5: it measures "):
        pretrain(recipe, "mae", load_ds_config(ROOT / "ds_configs/zero2.json"))

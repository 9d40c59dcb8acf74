"""Gradient norms of both terms against plain PyTorch's, and what measuring them leaves alone."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
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
        self.recipe = load_recipe(world.recipe, [EVERY, "loss.cls=exclude", *overrides])
        self.distiller = build_distiller(
            self.recipe.student,
            self.recipe.relation,
            self.recipe.loss,
            img_size=SIDE,
            seed=3,
            teachers=TeacherShapes(40 if feature else None, 3 if relation else None, teacher_has_cls=True),
        ).train()
        with torch.no_grad():
            for index, parameter in enumerate(self.distiller.parameters()):
                parameter += 0.05 * draw(*parameter.shape, seed=index)  # relations of fresh weights are near zero
        self.images = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).byte()
        kept = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(row))[:KEPT] for row in range(B)])
        self.targets = Targets(
            kept.sort(dim=1).values,
            draw(B, KEPT, 40, seed=2) if feature else None,
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
    norm, linear = plain_norm(model.norm, x)[:, 1:], setting.distiller.head
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


def measured(setting, accumulation=1, micro_steps=1):
    norms = setting.norms(accumulation)
    with norms.beside(1):
        for _ in range(micro_steps):
            setting.forward()
    return norms.read()


@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("loss_scale", [1.0, LOSS_SCALE])
def test_norms_are_those_of_autograd_whatever_scales_the_loss(loss_scale, checkpoint_every, world, process_group):
    setting = Setting(world, "loss.alpha=0.3", f"student.checkpoint_every={checkpoint_every}")
    setting.engine.optimizer.loss_scale = loss_scale
    found = measured(setting, accumulation=2)
    feature, relation = plain_norms(setting, alpha=0.3)
    assert min(feature, relation) > 1e-4
    assert found["gradient_norm_feature"] == pytest.approx(feature, rel=1e-4)
    assert found["gradient_norm_relation"] == pytest.approx(relation, rel=1e-4)
    assert 0 < found["gradient_norm_seconds"] < 600

"""Formulas against torch's counter on real timm models, and against published figures."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from hdscale.flops import (
    RelationUse,
    ViTSizes,
    block_flops,
    count_flops,
    feature_teacher_flops,
    hybrid_step_flops,
    peak_flops,
    relation_teacher_flops,
    student_step_flops,
    vit_forward_flops,
)

VIT_L = ViTSizes(depth=24, embed_dim=1024, num_patches=196, patch_size=16)
VIT_B = ViTSizes(depth=12, embed_dim=768, num_patches=196, patch_size=16)
CLIP_L = VIT_L._replace(patch_size=14)
SMALL = ViTSizes(depth=4, embed_dim=48, num_patches=16, patch_size=8, num_prefix_tokens=1, mlp_ratio=2.5)


class Vit(nn.Module):
    """A timm model whose blocks can be given some of the tokens, and whose parts can be counted alone."""

    def __init__(self, sizes):
        super().__init__()
        self.model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=sizes.patch_size,
            embed_dim=sizes.embed_dim,
            depth=sizes.depth,
            num_heads=3,
            mlp_ratio=sizes.mlp_ratio,
            reg_tokens=sizes.num_prefix_tokens - 1,
            num_classes=0,
        )

    def forward(self, images, num_keep=None, blocks=None):
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        prefix = self.model.num_prefix_tokens
        tokens = tokens if num_keep is None else tokens[:, : prefix + num_keep]
        for block in self.model.blocks[:blocks]:
            tokens = block(tokens)
        return tokens


def images(batch=1):
    return torch.randn(batch, 3, 32, 32)


@pytest.mark.parametrize("sizes", [SMALL, SMALL._replace(num_prefix_tokens=5), SMALL._replace(mlp_ratio=4.0)])
def test_forward_formula_equals_the_counter(sizes):
    vit = Vit(sizes).eval()
    assert vit_forward_flops(sizes) == count_flops(lambda: vit(images()))
    assert vit_forward_flops(sizes) * 3 == count_flops(lambda: vit(images(3)))
    assert vit_forward_flops(sizes, num_keep=5) == count_flops(lambda: vit(images(), 5))
    tokens = torch.randn(1, 9, 48)
    assert block_flops(9, 48, sizes.mlp_ratio) == count_flops(lambda: vit.model.blocks[0](tokens))


@pytest.mark.parametrize("recomputed_blocks", [0, 4])
def test_student_step_formula_equals_the_counter(recomputed_blocks):
    vit, head = Vit(SMALL), nn.Linear(48, 30)

    def step():
        tokens = vit(images(), 5, blocks=0)
        for block in vit.model.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False) if recomputed_blocks else block(tokens)
        relation = tokens @ tokens.transpose(1, 2)
        (head(tokens[:, 1:]).sum() + relation.sum()).backward()

    expected = student_step_flops(SMALL, 5, teacher_dim=30, relations=1, recomputed_blocks=recomputed_blocks)
    with set_checkpoint_early_stop(False):  # otherwise the last linear of a block is not run again
        assert expected == count_flops(step)


def test_pruned_relation_teacher_formula_equals_the_counter():
    vit, query_key = Vit(SMALL).eval(), nn.Linear(48, 96)

    def forward(blocks, relations=2):
        tokens = vit(images(), blocks=blocks)
        query, _ = query_key(tokens).chunk(2, dim=-1) if relations else (tokens, None)
        for _ in range(relations):
            query[:, :6] @ query[:, :6].transpose(1, 2)

    assert relation_teacher_flops(SMALL, 5) == count_flops(lambda: forward(2))
    assert relation_teacher_flops(SMALL, 5, RelationUse(mask_blocks=2)) == relation_teacher_flops(SMALL, 5)
    assert relation_teacher_flops(SMALL, use=RelationUse((), mask_blocks=3)) == count_flops(lambda: forward(3, 0))
    whole = relation_teacher_flops(SMALL, 5, RelationUse(mask_blocks=4))
    assert whole == vit_forward_flops(SMALL) + 2 * 2 * 6**2 * 48


def test_pruned_feature_teacher_formula_equals_the_counter():
    vit, query, key_value = Vit(SMALL).eval(), nn.Linear(48, 48), nn.Linear(48, 96)
    block, projection = vit.model.blocks[-1], nn.Linear(48, 20)

    def forward():
        tokens = vit(images(), blocks=3)
        kept = tokens[:, :6]
        key, value = key_value(tokens).view(1, 17, 2, 3, 16).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query(kept).view(1, 6, 3, 16).transpose(1, 2), key, value)
        kept = block.attn.proj(attended.transpose(1, 2).flatten(2))
        return projection(block.mlp(kept)[:, 1:])

    assert feature_teacher_flops(SMALL, 5, projected_dim=20) == count_flops(forward)
    assert feature_teacher_flops(SMALL) == vit_forward_flops(SMALL)


def test_the_counter_sees_attention_that_fused_kernels_hide():
    q = torch.randn(1, 2, 8, 4)
    flops = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert flops == 2 * (2 * 2 * 8 * 8 * 4)


def test_published_figures():
    assert vit_forward_flops(VIT_L) == 123_107_377_152
    assert vit_forward_flops(VIT_B) == 35_126_120_448


def test_a_hybrid_vit_l_step_stays_below_358_gflop_an_image():
    pruned = hybrid_step_flops(VIT_L, CLIP_L, VIT_L, 66)
    assert 357e9 < pruned < 358e9
    student = student_step_flops(VIT_L, 66, teacher_dim=1024, relations=2)
    assert student <= 0.35 * student_step_flops(VIT_L, None, teacher_dim=1024, relations=2)
    assert pruned == student + feature_teacher_flops(CLIP_L, 66) + relation_teacher_flops(VIT_L, 66)
    assert hybrid_step_flops(VIT_L, CLIP_L, VIT_L, 66, relation=RelationUse(mask_blocks=24)) > pruned


def test_a_teacher_that_is_left_out_costs_nothing():
    student = student_step_flops(VIT_B)
    assert hybrid_step_flops(VIT_B, None, None, None) == student
    relation_only = hybrid_step_flops(VIT_B, None, VIT_B, 66)
    assert relation_only == student_step_flops(VIT_B, 66, relations=2) + relation_teacher_flops(VIT_B, 66)


# Dense TFLOPs a second with sums in fp32, (fp16, fp32), by the names that torch gives the devices.
PEAKS = {
    "Tesla V100S-PCIE-32GB": (130, 16.4),  # NVIDIA V100 data sheet, January 2020
    "Tesla V100-PCIE-16GB": (112, 14),
    "Tesla V100-SXM2-32GB": (125, 15.7),
    "Tesla T4": (65, 8.1),  # NVIDIA T4 data sheet
    "NVIDIA A100-SXM4-80GB": (312, 19.5),  # NVIDIA A100 data sheet; the same for PCIe
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA H100 80GB HBM3": (989, 67),  # NVIDIA H100 data sheet: half of 1,979 with sparsity
    "NVIDIA H100 PCIe": (756, 51),  # half of 1,513
    "NVIDIA H100 NVL": (835, 60),  # half of 1,671
    "NVIDIA H200": (989, 67),  # NVIDIA H200 data sheet
    "NVIDIA L40S": (362, 91.6),  # NVIDIA L40S data sheet
    "NVIDIA GeForce RTX 3090": (71, 35.6),  # NVIDIA GA102 white paper: 142 is with sums in fp16
    "NVIDIA GeForce RTX 4090": (165, 82.6),  # NVIDIA Ada white paper: 330 is with sums in fp16
}
WITHOUT_BF16 = ("Tesla V100S-PCIE-32GB", "Tesla V100-PCIE-16GB", "Tesla V100-SXM2-32GB", "Tesla T4")


@pytest.mark.parametrize("device", PEAKS)
def test_a_device_s_peak_is_its_data_sheet_s(device):
    half, single = PEAKS[device]
    assert peak_flops(device, "fp16") == pytest.approx(half * 1e12, rel=1e-9)
    assert peak_flops(device, "fp32") == pytest.approx(single * 1e12, rel=1e-9)
    assert peak_flops(device, "bf16") == (None if device in WITHOUT_BF16 else peak_flops(device, "fp16"))


def test_a_device_that_nobody_has_looked_up_has_no_peak():
    assert peak_flops("NVIDIA RTX A1000", "bf16") is None
    assert peak_flops("cpu", "fp32") is None

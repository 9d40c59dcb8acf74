"""FLOPs of a step, 2 per multiply-add, equal to what torch's counter sees; and the peak of known devices.

Norms, activations, softmax and losses are left out, as in torch's counter and in published figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdscale.config.recipe import Recipe
from hdscale.config.sections import MaskConfig
from hdscale.distiller import Distiller
from hdscale.masking.progressive import expected_num_keep, patches_by_block
from hdscale.student.build import Student
from hdscale.teachers.build import FrozenTeacher, Teachers, mask_stages
from hdscale.vit.pruning import KeptQueryBlock, QueryKeyBlock, is_plain


class ViTSizes(NamedTuple):
    """The sizes of a vision transformer that decide its cost."""

    depth: int
    embed_dim: int
    num_patches: int
    patch_size: int  # pixels
    num_prefix_tokens: int = 1
    mlp_ratio: float = 4.0  # weights of an MLP over 2 d^2: gated ones (SwiGLU) have half as many again as ungated
    is_plain: bool = True  # timm's standard blocks: of others, hdscale.vit.pruning leaves none out by halves


class DecoderSizes(NamedTuple):
    """The blocks between student and head; a Linear stands before them where the width is not the student's."""

    depth: int
    embed_dim: int
    mlp_ratio: float = 4.0


class HeadSizes(NamedTuple):
    """What predicts the feature teacher's tokens, and at which patches: the recipe's settings of these names."""

    features_on: Literal["kept", "hidden", "all"] = "kept"
    mask_tokens: Literal["none", "encoder", "decoder"] = "none"
    linear: bool = True
    decoder: DecoderSizes | None = None
    cls: bool = False  # the class token is predicted, too


class RelationUse(NamedTuple):
    """What a step takes from the relation teacher."""

    layers: Sequence[int] = (-3, -2)  # blocks, negative from the end; empty when the teacher only makes masks
    target: Literal["relation", "attention", "features"] = "relation"  # for tokens, the last layer runs whole
    mask_blocks: int = 0  # blocks that masks made online need whole: the last mask layer's number plus one
    block_patches: Sequence[int] | None = None  # patches that each block runs on, where some are dropped; None: all
    token_head: Literal["norm_linear", "width"] = "norm_linear"  # `relation.token_head`


def block_flops(num_tokens: int, embed_dim: int, mlp_ratio: float = 4.0) -> int:
    """FLOPs of one block's forward: 24 n d^2 + 4 n^2 d at mlp_ratio 4."""
    linears = 2 * num_tokens * embed_dim * (4 * embed_dim + _mlp_widths(embed_dim, mlp_ratio))
    return linears + 4 * num_tokens**2 * embed_dim


def embed_flops(vit: ViTSizes) -> int:
    """FLOPs of the patch embedding's forward: all patches, whatever is kept afterwards."""
    return 2 * vit.num_patches * 3 * vit.patch_size**2 * vit.embed_dim


def vit_forward_flops(vit: ViTSizes, num_keep: int | None = None) -> int:
    """FLOPs of a forward of one image without head; blocks see `num_keep` patches, or all of them."""
    num_tokens = _num_tokens(vit, num_keep)
    return embed_flops(vit) + vit.depth * block_flops(num_tokens, vit.embed_dim, vit.mlp_ratio)


def student_step_flops(
    vit: ViTSizes,
    num_keep: int | None = None,
    teacher_dim: int = 0,
    relations: int = 0,
    recomputed_blocks: int = 0,
    layer_head_dims: Sequence[int] = (),
    head: HeadSizes = HeadSizes(),  # noqa: B008 - immutable
) -> int:
    """FLOPs of the student's forward and backward on one image: 3 forwards, but none back into the image.

    Args:
        vit: the student.
        num_keep: K, or None for all patches.
        teacher_dim: T, the feature teacher's width; 0: no feature teacher, and then no decoder either.
        relations: layers whose QK^T is computed for the relation loss.
        recomputed_blocks: blocks run again in the backward pass by activation checkpointing. Leave them out of
            utilisation figures: the work is not the model's.
        layer_head_dims: of the Linears behind relation layers, where these are compared token by token.
        head: what predicts the feature teacher's tokens.
    """
    num_tokens = _num_tokens(vit, None if head.mask_tokens == "encoder" else num_keep)
    blocks = (3 * vit.depth + recomputed_blocks) * block_flops(num_tokens, vit.embed_dim, vit.mlp_ratio)
    relation = relations * _relation_flops(vit, _num_tokens(vit, num_keep))
    layer_heads = 2 * _num_tokens(vit, num_keep) * vit.embed_dim * sum(layer_head_dims)
    predict = _head_flops(vit, num_keep, num_tokens, teacher_dim, head) if teacher_dim else 0
    return 2 * embed_flops(vit) + blocks + 3 * (predict + layer_heads + relation)


def relation_teacher_flops(
    vit: ViTSizes,
    num_keep: int | None = None,
    use: RelationUse = RelationUse(),  # noqa: B008 - immutable
) -> int:
    """FLOPs of the relation teacher's forward on one image, pruned after what the last layer used gives.

    Args:
        vit: the teacher, which sees all patches.
        num_keep: K tokens whose relations are taken, or None for all.
        use: what of the teacher the step takes.
    """
    dim, with_qk = vit.embed_dim, use.target == "relation"
    tokens = [_num_tokens(vit, patches) for patches in use.block_patches or [vit.num_patches] * vit.depth]
    whole_blocks = max((layer % vit.depth + (not with_qk) for layer in use.layers), default=0)
    query_key = relations = 0
    if use.layers and with_qk:
        if whole_blocks >= use.mask_blocks:
            count = tokens[whole_blocks]
            query_key = 2 * count * dim * 2 * dim if vit.is_plain else block_flops(count, dim, vit.mlp_ratio)
        relations = len(use.layers) * _relation_flops(vit, _num_tokens(vit, num_keep))
    blocks = sum(block_flops(count, dim, vit.mlp_ratio) for count in tokens[: max(whole_blocks, use.mask_blocks)])
    return embed_flops(vit) + blocks + query_key + relations


def feature_teacher_flops(
    vit: ViTSizes, num_keep: int | None = None, projected_dim: int = 0, *, project_prefix: bool = False
) -> int:
    """FLOPs of the feature teacher's forward on one image, whose last block finishes prefix and kept tokens only.

    Args:
        vit: the teacher, which sees all patches; the last block stays whole where it is not plain.
        num_keep: patches whose features are taken, or None for all: then nothing is pruned.
        projected_dim: width of CLIP's projection, where the target is projected.
        project_prefix: prefix tokens are projected, too.
    """
    num_tokens, dim = _num_tokens(vit), vit.embed_dim
    block = block_flops(num_tokens, dim, vit.mlp_ratio)
    projected = (vit.num_patches if num_keep is None else num_keep) + project_prefix * vit.num_prefix_tokens
    last = block
    if num_keep is not None and vit.is_plain:
        key_value = 2 * num_tokens * dim * 2 * dim
        asking = _num_tokens(vit, num_keep)
        rest = 2 * asking * dim * (2 * dim + _mlp_widths(dim, vit.mlp_ratio))  # query, projection and MLP
        last = key_value + rest + 4 * asking * num_tokens * dim
    return embed_flops(vit) + (vit.depth - 1) * block + last + 2 * projected * dim * projected_dim


def hybrid_step_flops(
    student: ViTSizes,
    feature_teacher: ViTSizes | None,
    relation_teacher: ViTSizes | None,
    num_keep: int | None,
    *,
    relation: RelationUse = RelationUse(),  # noqa: B008 - immutable
    head: HeadSizes = HeadSizes(),  # noqa: B008 - immutable
    projected_dim: int = 0,
    project_prefix: bool = False,
) -> int:
    """FLOPs of one training step per image (Eq. 1): student forward and backward, each teacher once.

    Args:
        student: sizes.
        feature_teacher: sizes, or None for the baseline without it.
        relation_teacher: sizes, or None.
        num_keep: K, or None for all patches.
        relation: what the step takes from the relation teacher.
        head: what predicts the feature teacher's tokens.
        projected_dim: width of CLIP's projection, where the feature target is projected.
        project_prefix: the teacher's prefix tokens are projected, too.
    """
    with_qk = relation.target == "relation"
    relations = len(relation.layers) if relation_teacher and with_qk else 0
    layer_head_dims = []
    if relation_teacher and not with_qk:
        is_linear = relation.token_head == "norm_linear" or relation_teacher.embed_dim != student.embed_dim
        layer_head_dims = [relation_teacher.embed_dim] * len(relation.layers) if is_linear else []
    target_dim = (projected_dim or feature_teacher.embed_dim) if feature_teacher else 0
    total = student_step_flops(student, num_keep, target_dim, relations, layer_head_dims=layer_head_dims, head=head)
    if feature_teacher:
        asked = None if num_keep is None or head.features_on == "all" else _num_compared(student, num_keep, head)
        total += feature_teacher_flops(feature_teacher, asked, projected_dim, project_prefix=project_prefix)
    if relation_teacher:
        total += relation_teacher_flops(relation_teacher, num_keep, relation)
    return total


def count_flops(function: Callable[[], object]) -> int:
    """Run `function` and return the FLOPs torch counted in it, backward passes included.

    Attention runs unfused meanwhile: torch counts the fused kernels of CPUs as nothing.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


class _Peak(NamedTuple):
    fp16: float
    fp32: float
    has_bf16: bool


_PEAKS = {  # dense, from the vendor's data sheets; the first that is a word of the device's name
    "V100S": _Peak(130e12, 16.4e12, has_bf16=False),
    "V100-PCIE": _Peak(112e12, 14e12, has_bf16=False),
    "V100": _Peak(125e12, 15.7e12, has_bf16=False),
    "T4": _Peak(65e12, 8.1e12, has_bf16=False),
    "A100": _Peak(312e12, 19.5e12, has_bf16=True),
    "H100 PCIe": _Peak(756e12, 51e12, has_bf16=True),
    "H100 NVL": _Peak(835e12, 60e12, has_bf16=True),
    "H100": _Peak(989e12, 67e12, has_bf16=True),
    "H200": _Peak(989e12, 67e12, has_bf16=True),
    "L40S": _Peak(362e12, 91.6e12, has_bf16=True),
    "RTX 3090": _Peak(71e12, 35.6e12, has_bf16=True),
    "RTX 4090": _Peak(165e12, 82.6e12, has_bf16=True),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return a device's FLOPs per second at `fp16`, `bf16` or `fp32`; None where the device or the pair is unknown.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, such as `Tesla V100-SXM2-32GB`.
        precision: of the run.
    """
    peak = next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)
    if peak is None or (precision == "bf16" and not peak.has_bf16):
        return None
    return peak.fp32 if precision == "fp32" else peak.fp16


def _num_tokens(vit: ViTSizes, num_keep: int | None = None) -> int:
    return vit.num_prefix_tokens + (vit.num_patches if num_keep is None else num_keep)


def _num_compared(vit: ViTSizes, num_keep: int | None, head: HeadSizes) -> int:
    if num_keep is None or head.features_on == "all":
        return vit.num_patches
    return num_keep if head.features_on == "kept" else vit.num_patches - num_keep


def _head_flops(vit: ViTSizes, num_keep: int | None, num_tokens: int, teacher_dim: int, head: HeadSizes) -> int:
    """FLOPs of decoder and Linear, forward; `num_tokens` come out of the student."""
    flops, dim, decoder = 0, vit.embed_dim, head.decoder
    if decoder is not None:
        if decoder.embed_dim != dim:
            flops += 2 * num_tokens * dim * decoder.embed_dim
        dim = decoder.embed_dim
        decoded = num_tokens if head.mask_tokens == "none" else _num_tokens(vit)
        flops += decoder.depth * block_flops(decoded, dim, decoder.mlp_ratio)
    return flops + head.linear * 2 * (_num_compared(vit, num_keep, head) + head.cls) * dim * teacher_dim


def _mlp_widths(embed_dim: int, mlp_ratio: float) -> int:
    """Sum the outer widths of an MLP's two Linears; timm rounds one down."""
    return int(2 * embed_dim * mlp_ratio + 1e-6)


def _relation_flops(vit: ViTSizes, num_tokens: int) -> int:
    return 2 * num_tokens**2 * vit.embed_dim


def step_flops_per_image(recipe: Recipe, distiller: Distiller, teachers: Teachers) -> int:
    """Return the FLOPs of one training step per image: student, heads and both teachers, as the recipe uses them.

    What activation checkpointing runs again is left out: the work is not the model's.

    Raises:
        UserError: `mask.layers` are not blocks of the relation teacher.
    """
    student, mask = distiller.student, recipe.mask
    patches = student.grid_size**2
    depth = teachers.relation.depth if teachers.relation is not None else 0
    is_projected = recipe.feature_teacher is not None and recipe.feature_teacher.target == "projected"
    decoder = None
    if distiller.decoder is not None:
        decoder = DecoderSizes(len(distiller.decoder.blocks), distiller.decoder.decoder_dim)
    head = HeadSizes(
        recipe.loss.features_on,
        recipe.student.mask_tokens,
        linear=recipe.student.decoder != "identity",
        decoder=decoder,
        cls=distiller.cls_in_features,
    )
    mask_blocks = 0
    if mask.is_online:
        stages = mask_stages(mask, depth)
        mask_blocks = stages.layers[-1] + (stages.at == "output")
    return hybrid_step_flops(
        _sizes(student),
        None if teachers.feature is None else _sizes(teachers.feature),
        None if teachers.relation is None else _sizes(teachers.relation),
        expected_num_keep(mask, patches, depth),
        relation=RelationUse(
            recipe.relation.layers,
            recipe.relation.target,
            mask_blocks,
            patches_by_block(mask, patches, depth),
            recipe.relation.token_head,
        ),
        head=head,
        projected_dim=teachers.feature.target_dim if teachers.feature and is_projected else 0,
        project_prefix=teachers.feature is not None and teachers.feature.encoder.outputs.project_prefix,
    )


def flops_over_one_teacher(recipe: Recipe, distiller: Distiller, teachers: Teachers) -> float | None:
    """Divide a step's FLOPs by those of the same step with the feature teacher alone, without masks (Distill-*).

    The paper's Appendix D says 1.2 for the time of a ViT-B's step. None where a teacher is missing.

    Raises:
        UserError: as `step_flops_per_image`.
    """
    if teachers.feature is None or teachers.relation is None:
        return None
    alone = recipe.model_copy(update={"relation_teacher": None, "mask": MaskConfig(strategy="none")})
    one_teacher = step_flops_per_image(alone, distiller, teachers._replace(relation=None))
    return step_flops_per_image(recipe, distiller, teachers) / one_teacher


def _sizes(model: Student | FrozenTeacher) -> ViTSizes:
    blocks = model.encoder.model.blocks
    mlp = getattr(blocks[0], "mlp", None)  # a teacher of first-block relations has none left
    weights = 0 if mlp is None else sum(layer.in_features * layer.out_features for layer in _linears(mlp))
    return ViTSizes(
        model.depth,
        model.embed_dim,
        model.grid_size**2,
        model.patch_size,
        model.num_prefix_tokens,
        weights / (2 * model.embed_dim**2),
        is_plain=is_plain(blocks[-1]) or isinstance(blocks[-1], KeptQueryBlock | QueryKeyBlock),
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]

"""Bytes that a rank holds and moves, as formulas: P parameters, R ranks, e bytes per element, A accumulation steps.

Where the textbook's formula differs from what DeepSpeed 0.19 does, this follows DeepSpeed; `docs/memory.md` has both
beside what was measured. Models come as the elements of each parameter, by optimizer group and in order: shards are
padded, and a gradient that two ranks share is held by both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Precision = Literal["fp32", "fp16", "bf16"]
Groups = Sequence[Sequence[int]]
"""Elements of each trainable parameter, by optimizer group."""

_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_FP32 = 4


class States(NamedTuple):
    """Bytes of a rank between backward pass and optimizer step."""

    parameters: int
    gradients: int
    optimizer: int  # float32 master weights and Adam's two moments


class Gathering(NamedTuple):
    """ZeRO-3's settings, in elements, by their DeepSpeed names."""

    max_live_parameters: int = 10**9
    max_reuse_distance: int = 10**9
    param_persistence_threshold: int = 10**5


class Tokens(NamedTuple):
    """What one rank's student computes on in a micro-step."""

    batch: int
    num_tokens: int  # n: prefix and kept tokens
    embedded_tokens: int  # prefix tokens and all patches
    embed_dim: int  # d
    num_heads: int
    depth: int
    mlp_ratio: float = 4.0
    image_elements: int = 3 * 224 * 224
    teacher_dim: int = 0  # T, the feature teacher's width; 0: none
    num_compared: int = 0  # patches, and a class token, whose features are compared
    relation_tokens: int = 0  # S, tokens whose relations are compared
    relation_layers: int = 0
    drop_path: bool = False  # draws are made in the forward pass


def element_bytes(precision: Precision) -> int:
    """Return e: bytes per element of parameters, gradients and activations."""
    return _ELEMENT_BYTES[precision]


def state_bytes(groups: Groups, stage: Literal[0, 2, 3], ranks: int, precision: Precision, rank: int = 0) -> States:
    """Bytes of parameters, gradients and optimizer state that a rank holds.

    - ZeRO-0: e P, e P and 12 P; in float32 8 P, since the parameters are their own master weights.
    - ZeRO-2: e P, e P/R and 12 P/R. Each group is padded to a multiple of 2 R, and a rank keeps whole gradients of the
      parameters at both ends of its part.
    - ZeRO-3: e P/R, e P/R and 12 P/R, each parameter rounded up to R equal shards.

    16 bits: 2P + 14P/R and 16P/R in sum, as published; float32: 4P + 16P/R and 20P/R, since the master weights are kept
    beside parameters of the same type. Under ZeRO-2, `rank` says whose gradients are counted.
    """
    size, total = element_bytes(precision), sum(map(sum, groups))
    if stage == 0:
        return States(size * total, size * total, (8 if precision == "fp32" else 12) * total)
    if stage == 3:
        shard = shard_elements([count for group in groups for count in group], ranks)
        return States(size * shard, size * shard, 12 * shard)
    padded = [_padded(group, ranks) for group in groups]
    gradients = sum(_touched(group, part // ranks, rank) for group, part in zip(groups, padded, strict=True))
    return States(size * sum(padded), size * gradients, 12 * sum(padded) // ranks)


def shard_elements(counts: Sequence[int], ranks: int) -> int:
    """Elements of ZeRO-3's equal shards of parameters, padding included."""
    return sum(math.ceil(count / ranks) for count in counts)


def persistent_elements(counts: Sequence[int], threshold: int) -> int:
    """Elements of the parameters so small that ZeRO-3 keeps them whole, beside their shards."""
    return sum(count for count in counts if count <= threshold)


def bucket_bytes(stage: Literal[2, 3], reduce_bucket_size: int, precision: Precision, *, overlap_comm: bool) -> int:
    """Bytes set aside for gradients on their way: one bucket; with overlap, ZeRO-2 fills one and sends another."""
    return element_bytes(precision) * reduce_bucket_size * (2 if stage == 2 and overlap_comm else 1)


def step_bytes(largest_part: int) -> int:
    """Bytes that the optimizer's step needs on top: a float32 copy of a part's gradients, and AdamW's two temporaries.

    Args:
        largest_part: elements of this rank that are updated together: a group of ZeRO-2, a sub-group of ZeRO-3.
    """
    return 3 * _FP32 * largest_part


def largest_sub_group(groups: Groups, ranks: int, sub_group_size: int) -> int:
    """Elements of a rank's largest sub-group: ZeRO-3 closes one as soon as it holds `sub_group_size` of them."""
    largest = 0
    for group in groups:
        held = 0
        for count in group:
            held += math.ceil(count / ranks)
            largest = max(largest, held)
            if held >= sub_group_size:
                held = 0
    return largest


def gathered_bytes(counts: Sequence[int], gathering: Gathering, precision: Precision) -> int:
    """Bytes of gathered parameters at most: as many as may be live, and the buffers that they came in.

    The limit may be overshot by one parameter; a buffer goes with the last parameter that is taken out of it.
    """
    return 2 * element_bytes(precision) * min(sum(counts), _kept(gathering) + max(counts))


def teacher_bytes(
    counts: Sequence[int],
    sharding: Literal["replicate", "node", "zero3"],
    ranks: int,
    precision: Precision,
    *,
    ranks_per_node: int = 1,
    persistence_threshold: int = 0,
) -> int:
    """Bytes of a frozen teacher between steps: e P_t, or e P_t over the ranks of a node or of all.

    Sharded ones keep whole what is below the threshold, beside its shards.
    """
    size = element_bytes(precision)
    if sharding == "replicate":
        return size * sum(counts)
    over = ranks if sharding == "zero3" else min(ranks, ranks_per_node)
    whole = persistent_elements(counts, persistence_threshold) if over > 1 else 0  # one rank's shard is the parameter
    return size * (shard_elements(counts, over) + whole)


def student_traffic(
    groups: Groups,
    stage: Literal[0, 2, 3],
    ranks: int,
    precision: Precision,
    *,
    accumulation: int = 1,
    multi_rank_bucket_allreduce: bool = True,
    gathering: Gathering = Gathering(),  # noqa: B008 - immutable
) -> dict[str, int]:
    """Payload bytes of an optimizer step by collective; what a rank sends is (R-1)/R of it, of all-reduces twice that.

    With Psi = e P, each way times (R-1)/R:

    - ZeRO-0: 2 Psi: gradients are all-reduced once per step.
    - ZeRO-2: A Psi and one gather, (A + 1) Psi, where each rank's part of the gradients is reduced to it;
      `use_multi_rank_bucket_allreduce`, DeepSpeed's default, all-reduces every micro-step: (2A + 1) Psi.
    - ZeRO-3: A (3 Psi - kept): gathered for the forward pass, again for the backward pass, then scattered. Kept is what
      is still there when the forward pass turns into the backward pass: up to `max_live_parameters`, or half of
      `max_reuse_distance`. Persistent parameters are gathered once per step. (A checkpointed block is gathered once
      more, to be computed again, only where less than a block may be live.)
    """
    size, counts = element_bytes(precision), [count for group in groups for count in group]
    if stage == 0:
        return {"all_reduce": size * sum(counts)}
    if stage == 2:
        padded, reduce = sum(_padded(group, ranks) for group in groups), size * accumulation * sum(counts)
        name = "all_reduce" if multi_rank_bucket_allreduce else "reduce"
        return {name: reduce, "all_gather_into_tensor": size * padded}
    whole = ranks * shard_elements(counts, ranks)
    persistent = [count for count in counts if count <= gathering.param_persistence_threshold]
    small = ranks * shard_elements(persistent, ranks)
    kept = min(whole - small, _kept(gathering))
    gathered = small + accumulation * (2 * (whole - small) - kept)
    return {"all_gather_into_tensor": size * gathered, "reduce_scatter_tensor": size * accumulation * whole}


def teacher_traffic(
    counts: Sequence[int], ranks: int, precision: Precision, *, accumulation: int = 1, persistence_threshold: int = 0
) -> int:
    """Payload bytes of gathering a sharded teacher in an optimizer step: A Psi_t, without what is always there.

    Args:
        counts: elements of each of its parameters.
        ranks: that share it: all (zero3) or a node's (node).
        precision: of the run.
        accumulation: A.
        persistence_threshold: of the teacher's DeepSpeed config.
    """
    gathered = [count for count in counts if count > persistence_threshold]
    return element_bytes(precision) * accumulation * ranks * shard_elements(gathered, ranks)


def moved_bytes(payload: dict[str, int], ranks: int) -> int:
    """Bytes that a rank sends, and as many that it receives, on a ring."""
    share = sum(2 * count if name == "all_reduce" else count for name, count in payload.items())
    return share * (ranks - 1) // ranks


def block_activation_bytes(tokens: Tokens, precision: Precision) -> int:
    """Bytes that a block keeps for its backward pass, with fused attention: 16 n d elements and a few per token.

    Both norms' outputs, Q, K and V (3), the attention's output, the tokens after it, the MLP's two inner tensors
    (2 x mlp_ratio) and the tokens at the end: (8 + 2 mlp_ratio) n d. In float32: mean and deviation of both norms and a
    sum per head.
    """
    places = tokens.batch * tokens.num_tokens
    elements = places * tokens.embed_dim * (8 + 2 * tokens.mlp_ratio)
    drops = 2 * tokens.batch * tokens.drop_path
    return int(element_bytes(precision) * (elements + drops)) + _FP32 * places * (4 + tokens.num_heads)


def activation_bytes(tokens: Tokens, precision: Precision, *, checkpoint: bool = False) -> int:
    """Bytes that a student's forward pass leaves for its backward pass.

    Args:
        tokens: of a micro-step.
        precision: of the run; losses are in float32 whatever it is.
        checkpoint: keep n d elements per block, and one block's that is computed again.
    """
    size, places = element_bytes(precision), tokens.batch * tokens.num_tokens
    width = places * tokens.embed_dim
    block = block_activation_bytes(tokens, precision)
    blocks = size * tokens.depth * width + block if checkpoint else tokens.depth * block
    rest = _embedding_bytes(tokens, size) + _head_bytes(tokens, size)
    return blocks + rest + _relation_bytes(tokens, size, checkpoint=checkpoint)


def _embedding_bytes(tokens: Tokens, size: int) -> int:
    """Normalised images, the tokens of all patches, which dropping some keeps, and those that go into block 0."""
    embedded = tokens.embedded_tokens if tokens.embedded_tokens != tokens.num_tokens else 0
    return size * tokens.batch * (tokens.image_elements + (embedded + tokens.num_tokens) * tokens.embed_dim)


def _head_bytes(tokens: Tokens, size: int) -> int:
    """The final norm's means and deviations; head's input and output, the standardised target and the difference."""
    compared = tokens.batch * tokens.num_compared if tokens.teacher_dim else 0
    head = size * compared * (tokens.embed_dim + tokens.teacher_dim) + 2 * _FP32 * compared * tokens.teacher_dim
    return head + 2 * _FP32 * tokens.batch * tokens.num_tokens


def _relation_bytes(tokens: Tokens, size: int, *, checkpoint: bool) -> int:
    """Of each layer the scaled Q, K and their product, in float32.

    A batch's K is copied. A single float32 image's is a view, which keeps Q, K and V together where its block does not.
    """
    places = tokens.batch * tokens.relation_tokens
    is_view = tokens.batch == 1 and size == _FP32
    widths = 1 + (3 * checkpoint if is_view else 1)
    layer = widths * places * tokens.embed_dim + places * tokens.relation_tokens * tokens.num_heads
    return _FP32 * tokens.relation_layers * layer


def _kept(gathering: Gathering) -> int:
    """Elements that stay gathered; a parameter of the last m elements is used again after 2 m others at most."""
    return max(gathering.max_live_parameters, gathering.max_reuse_distance // 2)


def _padded(group: Sequence[int], ranks: int) -> int:
    return math.ceil(sum(group) / (2 * ranks)) * 2 * ranks


def _touched(group: Sequence[int], part: int, rank: int) -> int:
    """Elements of the parameters that reach into a rank's part of a flat group; padding where it has none."""
    start, end = rank * part, (rank + 1) * part
    touched, place = 0, 0
    for count in group:
        if place < end and place + count > start:
            touched += count
        place += count
    return touched + max(0, end - max(start, place))

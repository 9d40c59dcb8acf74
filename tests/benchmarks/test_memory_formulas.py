import pytest
import timm
import torch

from hdscale.benchmarks.memory_formulas import (
    Gathering,
    Tokens,
    activation_bytes,
    block_activation_bytes,
    bucket_bytes,
    gathered_bytes,
    largest_sub_group,
    moved_bytes,
    persistent_elements,
    shard_elements,
    state_bytes,
    step_bytes,
    student_traffic,
    teacher_bytes,
    teacher_traffic,
)

MILLION = [[600_000] * 100, [400] * 100_000]  # 100 million elements that every world size here divides
P = 100_000_000


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("stage", "precision", "whole", "shared"),
    [
        (0, "fp16", 16, 0),
        (0, "fp32", 16, 0),
        (2, "fp16", 2, 14),
        (2, "bf16", 2, 14),
        (2, "fp32", 4, 16),
        (3, "fp16", 0, 16),
        (3, "fp32", 0, 20),
    ],
)
def test_states_are_the_published_formulas_where_shards_divide_evenly(ranks, stage, precision, whole, shared):
    states = state_bytes(MILLION, stage, ranks, precision)
    assert sum(states) == pytest.approx(whole * P + shared * P / ranks, rel=1e-2)
    assert states.parameters + states.optimizer == pytest.approx(sum(states) - states.gradients)


def test_states_of_odd_parameters_are_padded_and_gradients_on_a_boundary_are_held_twice():
    odd = [[5, 6, 2], [3]]  # 13 and 3 elements: padded to 16 and 4 for two ranks
    assert state_bytes(odd, 2, 2, "fp32", rank=0)[::2] == (4 * 20, 12 * 10)
    # Rank 0 has elements 0-7 of the first group: parameters of 5 and 6; rank 1 the rest, padded by 3 and 1.
    assert state_bytes(odd, 2, 2, "fp32", rank=0).gradients == 4 * (5 + 6 + 3)
    assert state_bytes(odd, 2, 2, "fp32", rank=1).gradients == 4 * ((6 + 2 + 3) + (3 + 1))
    assert state_bytes(odd, 3, 2, "bf16") == (2 * 9, 2 * 9, 12 * 9)


def test_shards_persistent_parameters_and_teachers():
    counts = [5, 6, 2, 3]
    assert shard_elements(counts, 4) == 2 + 2 + 1 + 1
    assert persistent_elements(counts, 3) == 5
    assert teacher_bytes(counts, "replicate", 4, "fp16") == 2 * 16
    assert teacher_bytes(counts, "zero3", 4, "fp32") == 4 * 6
    assert teacher_bytes(counts, "node", 4, "fp32", ranks_per_node=2) == 4 * (3 + 3 + 1 + 2)
    assert teacher_bytes(counts, "zero3", 4, "fp32", persistence_threshold=3) == 4 * (6 + 5)
    assert teacher_bytes(counts, "zero3", 1, "fp32", persistence_threshold=3) == 4 * 16
    assert teacher_traffic(counts, 4, "fp32", accumulation=2, persistence_threshold=3) == 2 * 4 * 16


def test_buckets_and_the_steps_temporaries():
    assert bucket_bytes(2, 100, "fp16", overlap_comm=True) == 400
    assert bucket_bytes(2, 100, "fp32", overlap_comm=False) == 400
    assert bucket_bytes(3, 100, "fp32", overlap_comm=True) == 400
    # 5, 5 | 5, 5 | 2 of two ranks, closed at ten
    assert largest_sub_group([[10] * 4 + [4]], 2, 10) == 10
    assert largest_sub_group([[10] * 4 + [4]], 2, 10**8) == 22
    assert step_bytes(22) == 12 * 22


def test_live_parameters_are_bounded_by_the_settings_and_by_the_model():
    gathering = Gathering(max_live_parameters=30, max_reuse_distance=0)
    assert gathered_bytes([10] * 10, gathering, "fp16") == 2 * 2 * (30 + 10)
    assert gathered_bytes([10, 10], gathering, "fp16") == 2 * 2 * 20
    assert gathered_bytes([10] * 10, gathering._replace(max_reuse_distance=120), "fp32") == 2 * 4 * 70


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_traffic_in_parameter_bytes(accumulation):
    def psi(stage, **settings):
        payload = student_traffic(MILLION, stage, 4, "fp16", accumulation=accumulation, **settings)
        return moved_bytes(payload, 4) / (2 * P) * 4 / 3

    reuse_nothing = Gathering(0, 0, 0)
    assert psi(0) == pytest.approx(2)
    assert psi(2) == pytest.approx(2 * accumulation + 1)
    assert psi(2, multi_rank_bucket_allreduce=False) == pytest.approx(accumulation + 1)
    assert psi(3, gathering=reuse_nothing) == pytest.approx(3 * accumulation)
    assert psi(3, gathering=Gathering(param_persistence_threshold=0)) == pytest.approx(2 * accumulation)
    # 40 of 100 million elements are in small parameters: gathered once a step, not twice a micro-step.
    small = reuse_nothing._replace(param_persistence_threshold=400)
    assert psi(3, gathering=small) == pytest.approx(0.4 + accumulation * (2 * 0.6 + 1))


def test_a_block_keeps_what_autograd_saves():
    tokens = Tokens(batch=2, num_tokens=17, embedded_tokens=17, embed_dim=48, num_heads=3, depth=1)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=3, depth=1, num_classes=0)
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(2, 17, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.blocks[0](x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
    assert block_activation_bytes(tokens, "fp32") == pytest.approx(saved, rel=0.01)  # its input instead of its output


def test_activations_of_a_vit_l_are_near_the_rule_of_thumb():
    large = Tokens(batch=1, num_tokens=67, embedded_tokens=67, embed_dim=1024, num_heads=16, depth=24, image_elements=0)
    elements = 24 * 67 * 1024
    assert activation_bytes(large, "fp32") / 4 / elements == pytest.approx(16.2, rel=0.02)
    assert activation_bytes(large, "fp32", checkpoint=True) / 4 / elements == pytest.approx(1 + 16 / 24, rel=0.1)


def test_losses_add_to_the_activations():
    plain = Tokens(batch=2, num_tokens=5, embedded_tokens=5, embed_dim=8, num_heads=2, depth=3, image_elements=12)
    with_feature = plain._replace(teacher_dim=6, num_compared=4)
    with_relation = plain._replace(relation_layers=2, relation_tokens=5)
    assert activation_bytes(with_feature, "fp32") - activation_bytes(plain, "fp32") == 4 * 2 * 4 * (8 + 6 + 6 + 6)
    assert activation_bytes(with_relation, "fp32") - activation_bytes(plain, "fp32") == 2 * 4 * (2 * 80 + 2 * 25 * 2)
    alone = with_relation._replace(batch=1)
    extra = activation_bytes(alone, "fp32") - activation_bytes(plain._replace(batch=1), "fp32")
    assert extra == 2 * 4 * (40 + 25 * 2)
    whole = activation_bytes(alone, "fp32", checkpoint=True)
    assert whole - activation_bytes(plain._replace(batch=1), "fp32", checkpoint=True) == 2 * 4 * (4 * 40 + 25 * 2)
    dropped = plain._replace(embedded_tokens=9)
    assert activation_bytes(dropped, "fp32") - activation_bytes(plain, "fp32") == 4 * 2 * 9 * 8
    assert activation_bytes(plain, "fp16") < activation_bytes(plain, "fp32")

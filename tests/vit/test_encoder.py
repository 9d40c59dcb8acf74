import gc
import weakref
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hdscale.errors import UserError
from hdscale.vit.encoder import Outputs, Recompute, ViTEncoder, resolve_layers
from hdscale.vit.pruning import KeptQueryBlock, QueryKeyBlock
from tests.helpers.tensors import close

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
KINDS = {
    "mae or deit": ("vit_small_patch16_224", {}),
    "two prefix tokens": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("vit_small_patch14_dinov2", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "norm before, quick-GELU": ("vit_base_patch16_clip_quickgelu_224", {}),
    "no class token": ("vit_medium_patch16_gap_240", {}),
    "q and k norm": ("vit_small_patch16_224", {"qk_norm": True}),
    "no biases": ("vit_small_patch16_224", {"qkv_bias": False}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
KEEP = torch.tensor([[0, 3, 5, 15], [1, 2, 9, 10], [4, 5, 6, 7]])


def model_of(kind: str, **changes):
    name, more = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SIZES, **more, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm's initial layer scales and class tokens would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def rows_of(tensor: torch.Tensor, keep: torch.Tensor, num_prefix: int, dim: int) -> torch.Tensor:
    """Pick prefix and kept tokens image by image, without gather."""
    picked = []
    for one, indices in zip(tensor, keep, strict=True):
        rows = list(range(num_prefix)) + [num_prefix + int(index) for index in indices]
        picked.append(one.index_select(dim - 1, torch.tensor(rows)))
    return torch.stack(picked)


def reference_qk(model: nn.Module, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K from what goes into a layer's fused linear, written out."""
    seen = []
    attn = model.blocks[layer].attn
    handle = attn.qkv.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    model.forward_features(x)
    handle.remove()
    (tokens,) = seen
    weight, bias = attn.qkv.weight, attn.qkv.bias
    flat = tokens @ weight.T + (0 if bias is None else bias)
    batch, length, _ = tokens.shape
    query, key, _ = (part.reshape(batch, length, 3, 16).transpose(1, 2) for part in flat.split(48, dim=-1))
    return attn.q_norm(query), attn.k_norm(key)


@every_kind
def test_final_tokens_equal_those_of_timm(kind):
    model = model_of(kind)
    with torch.no_grad():
        reference = model.forward_features(images())[:, model.num_prefix_tokens :]
        assert close(ViTEncoder(model)(images()).patch_tokens, reference)


def test_a_final_norm_that_timm_moved_behind_the_pooling_is_applied_to_every_token():
    model = model_of("mae or deit", global_pool="avg")
    with torch.no_grad():
        reference = model.fc_norm(model.forward_features(images())[:, 1:])
        assert isinstance(model.fc_norm, nn.LayerNorm)
        assert close(ViTEncoder(model)(images()).patch_tokens, reference)


def test_pre_norm_and_projected_tokens_stand_before_the_norm_and_behind_the_head():
    model = model_of("norm before, quick-GELU", num_classes=20)
    with torch.no_grad():
        x = images()
        normed = model.forward_features(x)
        before = ViTEncoder(model, Outputs(final="pre_norm"))(x).patch_tokens
        assert close(model.norm(before), normed[:, 1:])
        assert not close(before, normed[:, 1:])
        assert close(ViTEncoder(model, Outputs(final="projected"))(x).patch_tokens, model.head(normed)[:, 1:])
        assert ViTEncoder(model, Outputs(final=None))(x).patch_tokens is None


@every_kind
def test_queries_and_keys_equal_those_of_the_fused_linear(kind):
    model = model_of(kind)
    with torch.no_grad():
        output = ViTEncoder(model, Outputs(relation_layers=(-1, 1)))(images())
        for query, key, layer in zip(output.queries, output.keys, (3, 1), strict=True):
            reference = reference_qk(model, layer, images())
            assert close(query, reference[0])
            assert close(key, reference[1])


@every_kind
def test_a_student_on_kept_tokens_equals_a_full_forward_that_cannot_look_at_the_others(kind):
    model = model_of(kind)
    num_prefix = model.num_prefix_tokens
    hidden = torch.full((3, 1, num_prefix + 16, num_prefix + 16), float("-inf"))
    for image, indices in enumerate(KEEP):
        hidden[image, :, :, num_prefix + indices] = 0
        hidden[image, :, :, :num_prefix] = 0
    with torch.no_grad():
        output = ViTEncoder(model, Outputs(relation_layers=(2,)))(images(), KEEP)
        reference = model.forward_features(images(), attn_mask=hidden)
    assert close(output.patch_tokens, rows_of(reference, KEEP, num_prefix, 1)[:, num_prefix:])
    assert output.queries[0].shape == (3, 3, num_prefix + 4, 16)


def test_every_block_of_a_student_runs_on_prefix_and_kept_tokens_only():
    model = model_of("registers")
    lengths = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, args, _output: lengths.append(args[0].shape[1]))
    ViTEncoder(model)(images(), KEEP)
    assert lengths == [5 + 4] * 4


@every_kind
@pytest.mark.parametrize("prune", [False, True])
def test_a_teacher_sees_everything_and_gives_the_kept(kind, prune):
    model = model_of(kind)
    num_prefix = model.num_prefix_tokens
    with torch.no_grad():
        whole = ViTEncoder(model, Outputs(relation_layers=(-3, -1)))(images())
        teacher = ViTEncoder(model, Outputs(relation_layers=(-3, -1)), tokens="full", prune=prune)
        assert isinstance(teacher.model.blocks[-1], KeptQueryBlock) == prune
        kept, everything = teacher(images(), KEEP), teacher(images())
    assert close(kept.patch_tokens, rows_of(whole.patch_tokens, KEEP, 0, 1))
    assert close(everything.patch_tokens, whole.patch_tokens)
    for name in ("queries", "keys"):
        for ours, all_tokens, reference in zip(
            getattr(kept, name), getattr(everything, name), getattr(whole, name), strict=True
        ):
            assert close(ours, rows_of(reference, KEEP, num_prefix, 2))
            assert close(all_tokens, reference)


@every_kind
def test_a_pruned_relation_teacher_equals_the_whole_one(kind):
    model = model_of(kind)
    outputs = Outputs((-3, -2), stage_layers=(0, 1), final=None)
    with torch.no_grad():
        whole = ViTEncoder(model, outputs, tokens="full")(images(), KEEP)
        teacher = ViTEncoder(model, outputs, tokens="full", prune=True)
        pruned = teacher(images(), KEEP)
    assert isinstance(teacher.model.blocks[-1], QueryKeyBlock)
    assert pruned.patch_tokens is None
    for name in ("queries", "keys", "stage_tokens"):
        for ours, reference in zip(getattr(pruned, name), getattr(whole, name), strict=True):
            assert close(ours, reference)


def test_a_pruned_relation_teacher_holds_no_parameter_that_is_not_used():
    outputs = Outputs(relation_layers=(-3, -2), final=None)
    teacher = ViTEncoder(model_of("mae or deit", num_classes=10), outputs, tokens="full", prune=True)
    embedding = 48 + 17 * 48 + (3 * 64 * 48 + 48)
    block = 12 * 48**2 + 13 * 48
    norm_query_key = 2 * 48 + (48 * 2 * 48 + 2 * 48)
    assert sum(p.numel() for p in teacher.parameters()) == embedding + 2 * block + norm_query_key
    teacher.eval()(images(), KEEP).queries[1].sum().backward()  # keys of the last layer need the same weights
    assert [name for name, p in teacher.named_parameters() if p.grad is None] == []


def test_a_pruned_feature_teacher_holds_every_parameter_but_the_head():
    whole = sum(p.numel() for p in model_of("mae or deit").parameters())
    teacher = ViTEncoder(model_of("mae or deit", num_classes=10), tokens="full", prune=True)
    assert sum(p.numel() for p in teacher.parameters()) == whole


@pytest.mark.parametrize(("at", "last"), [("input", 2), ("output", 3)])
def test_a_teacher_of_stages_alone_ends_at_the_last_stage(at, last):
    model = model_of("mae or deit")
    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, args, output: tokens.append(args[0] if at == "input" else output))
    with torch.no_grad():
        model.forward_features(images())
        reference = [tokens[layer][:, 1:] for layer in (0, 2)]
        teacher = ViTEncoder(model, Outputs(stage_layers=(0, 2), stage_at=at, final=None), tokens="full", prune=True)
        output = teacher(images(), KEEP)
    assert len(teacher.model.blocks) == last
    for ours, theirs in zip(output.stage_tokens, reference, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_losses_and_gradients_with_drop_path_and_relation_layers(use_reentrant, every):
    def gradients(recompute):
        model = model_of("mae or deit", drop_path_rate=0.5)
        encoder = ViTEncoder(model, Outputs(relation_layers=(1, 3)), recompute=recompute).train()
        torch.manual_seed(5)
        output = encoder(images(), KEEP)
        relations = [q @ k.transpose(-1, -2) for q, k in zip(output.queries, output.keys, strict=True)]
        loss = output.patch_tokens.square().mean() + sum(relation.square().mean() for relation in relations)
        loss.backward()
        return loss.detach(), {name: parameter.grad for name, parameter in encoder.named_parameters()}

    loss, plain = gradients(Recompute())
    recompute = Recompute(every)
    if use_reentrant is not None:
        recompute = Recompute(every, partial(checkpoint, use_reentrant=use_reentrant))
    recomputed_loss, recomputed = gradients(recompute)
    assert torch.equal(loss, recomputed_loss)
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_every_second_block_is_recomputed_in_training_only():
    recomputed = []

    def recording(function, x):
        recomputed.append(function)
        return checkpoint(function, x, use_reentrant=False)

    encoder = ViTEncoder(model_of("mae or deit"), recompute=Recompute(2, recording))
    encoder.train()(images())
    assert recomputed == [encoder.model.blocks[1], encoder.model.blocks[3]]
    encoder.eval()(images())
    with torch.no_grad():
        encoder.train()(images())
    assert len(recomputed) == 2


def test_a_checkpoint_function_may_hand_back_a_bare_tensor_as_that_of_deepspeed_does():
    def unwrapping(function, x):
        outputs = function(x)
        return outputs[0] if isinstance(outputs, tuple) and len(outputs) == 1 else outputs

    model = model_of("mae or deit")
    plain = ViTEncoder(model).train()(images())
    ours = ViTEncoder(model, recompute=Recompute(1, unwrapping)).train()(images())
    assert torch.equal(ours.patch_tokens, plain.patch_tokens)


def test_nothing_keeps_queries_alive_after_the_output_is_gone():
    encoder = ViTEncoder(model_of("mae or deit"), Outputs(relation_layers=(1, 2)), recompute=Recompute(1)).train()
    output = encoder(images(), KEEP)
    output.patch_tokens.sum().backward()
    query = weakref.ref(output.queries[0])
    del output
    gc.collect()
    assert query() is None
    assert not encoder.model.blocks[1].attn.q_norm._forward_hooks


def reference_layer_tokens(model, layer, output, x):
    """What a block gives, or its attention, seen by a hook on timm's own forward."""
    seen = []
    module = model.blocks[layer] if output == "features" else model.blocks[layer].attn
    handle = module.register_forward_hook(lambda _module, _args, result: seen.append(result))
    model.forward_features(x)
    handle.remove()
    return seen[0]


@every_kind
@pytest.mark.parametrize("output", ["attention", "features"])
def test_relation_layers_give_tokens_where_these_are_asked_for(kind, output):
    model = model_of(kind)
    num_prefix = model.num_prefix_tokens
    with torch.no_grad():
        reference = [reference_layer_tokens(model, layer, output, images()) for layer in (2, 0)]
        outputs = Outputs((-2, 0), output)
        everything, kept = (ViTEncoder(model, outputs, tokens="full")(images(), keep) for keep in (None, KEEP))
        pruned = ViTEncoder(model, outputs._replace(final=None), tokens="full", prune=True)
        from_pruned = pruned(images(), KEEP)
    assert len(pruned.model.blocks) == 3
    assert everything.queries == everything.keys == ()
    for layer, wanted in enumerate(reference):
        assert close(everything.layer_tokens[layer], wanted)
        assert close(kept.layer_tokens[layer], rows_of(wanted, KEEP, num_prefix, 1))
        assert close(from_pruned.layer_tokens[layer], rows_of(wanted, KEEP, num_prefix, 1))


@pytest.mark.parametrize("output", ["attention", "features"])
def test_the_last_block_gives_tokens_of_the_kept_patches_when_it_finishes_no_others(output):
    model = model_of("mae or deit")
    with torch.no_grad():
        reference = rows_of(reference_layer_tokens(model, 3, output, images()), KEEP, 1, 1)
        teacher = ViTEncoder(model, Outputs((3,), output), tokens="full", prune=True)
        assert isinstance(teacher.model.blocks[3], KeptQueryBlock)
        assert close(teacher(images(), KEEP).layer_tokens[0], reference)


def dropping_forward(model, x, stages, at, share):
    """The same with plain loops: the patches of each image that are left, and Q of every block, before and after."""
    tokens, kept, queries = model._pos_embed(model.patch_embed(x)), [list(range(16))] * len(x), []

    def drop(tokens):
        patches = tokens[:, 1:]
        staying = (patches.norm(dim=-1).argsort(dim=1)[:, : int(share * patches.shape[1])]).sort(dim=1).values
        rows = [[0] + [1 + int(place) for place in image] for image in staying]
        return staying, torch.stack([image[row] for image, row in zip(tokens, rows, strict=True)])

    for index, block in enumerate(model.blocks):
        for when in ("input", "output"):
            if when == "output":
                normed = block.norm1(tokens)
                queries.append((kept, (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias)[..., :48]))
                tokens = block(tokens)
            if at == when and index in stages:
                staying, tokens = drop(tokens)
                kept = [[old[int(place)] for place in image] for old, image in zip(kept, staying, strict=True)]
    return torch.tensor(kept), queries


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("at", ["input", "output"])
def test_patches_that_a_stage_drops_go_no_further(at, prune):
    model, stages = model_of("mae or deit"), (0, 2)

    def drop(tokens):
        return tokens.norm(dim=-1).argsort(dim=1)[:, : int(0.7 * tokens.shape[1])].sort(dim=1).values

    with torch.no_grad():
        kept, queries = dropping_forward(model, images(), stages, at, 0.7)
        outputs = Outputs((0, 1, 3), stage_layers=stages, stage_at=at, final=None)
        output = ViTEncoder(model, outputs, tokens="full", drop=drop, prune=prune)(images())
    assert torch.equal(output.keep_indices, kept)
    assert kept.shape == (3, 7)
    for ours, layer in zip(output.queries, (0, 1, 3), strict=True):
        there, everything = queries[layer]
        rows = [[0] + [1 + old.index(int(place)) for place in new] for old, new in zip(there, kept, strict=True)]
        wanted = torch.stack([image[row] for image, row in zip(everything, rows, strict=True)])
        assert close(ours.transpose(1, 2).flatten(2), wanted)


def test_layers_a_model_does_not_have_are_refused():
    assert resolve_layers((-3, 2), 4, "relation.layers") == (1, 2)
    with pytest.raises(UserError, match=r"relation\.layers must be between -4 and 3 .* 4 blocks, got 4"):
        ViTEncoder(model_of("mae or deit"), Outputs(relation_layers=(4,)))
    with pytest.raises(UserError, match=r"relation\.layers must name different blocks, got .* \[3, 3\] of 4"):
        ViTEncoder(model_of("mae or deit"), Outputs(relation_layers=(-1, 3)))


def test_attention_without_plain_queries_is_refused_by_name():
    model = timm.create_model("vit_small_patch16_224", **SIZES, attn_layer="diff")
    with pytest.raises(UserError, match=r"relation\.layers need .* got Block with DiffAttention"):
        ViTEncoder(model, Outputs(relation_layers=(1,)))

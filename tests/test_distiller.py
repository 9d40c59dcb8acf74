import numpy as np
import pytest
import torch

from hdscale.config.sections import LossConfig, RelationConfig, StudentConfig
from hdscale.distiller import build_distiller, check_heads, compares_cls
from hdscale.errors import UserError
from hdscale.student.load import load_decoder, load_student
from hdscale.types import Targets, TeacherShapes

STUDENT = StudentConfig(
    model="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2.0, drop_path=0.0
)
KEEP = torch.tensor([[0, 3, 4, 9, 12, 15], [1, 2, 5, 6, 10, 11]])  # of 4 x 4 patches


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(
    relation=None,
    loss=None,
    *,
    student=STUDENT,
    feature_dim=24,
    relation_heads=4,
    teacher_has_cls=True,
    relation_dim=None,
):
    return build_distiller(
        student,
        relation or RelationConfig(),
        loss or LossConfig(),
        img_size=32,
        seed=1,
        teachers=TeacherShapes(
            feature_dim=feature_dim,
            relation_heads=relation_heads,
            relation_dim=relation_dim,
            relation_has_cls=teacher_has_cls,
        ),
    )


def make_targets(num_tokens, *, heads=4, keep=KEEP):
    generator = torch.Generator().manual_seed(2)
    num_patches = 16 if keep is None else keep.shape[1]
    return Targets(
        keep_indices=keep,
        features=torch.randn(2, num_patches, 24, generator=generator) * 3 + 1,
        relations=tuple(torch.randn(2, heads, num_tokens, num_tokens, generator=generator) for _ in range(2)),
    )


def smooth_l1(difference, beta):
    size = np.abs(difference)
    return np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta).mean()


def reference_relation(query, key, scale, heads):
    """Eq. 2 head by head in float64: (B, A or 1, S, S)."""
    query, key = query.double().numpy(), key.double().numpy()
    products = [query[:, head] @ key[:, head].swapaxes(-1, -2) for head in range(query.shape[1])]
    width = query.shape[-1] * (query.shape[1] if heads == "merged" else 1)
    relation = np.stack([sum(products)] if heads == "merged" else products, axis=1)
    if scale != "raw":
        relation = relation / np.sqrt(width)
    if scale == "softmax":
        relation = np.exp(relation - relation.max(-1, keepdims=True))
        relation /= relation.sum(-1, keepdims=True)
    return relation


def reference_terms(distiller, images, targets, *, first_token, relation=None, beta=2.0, target_norm="layer_norm"):
    """Eq. 1 in float64 NumPy, from the student's own tokens, queries and keys, and settings that the test has typed."""
    relation = relation or {}
    with torch.no_grad():
        output = distiller.student(images, targets.keep_indices)
    linear = distiller.head.proj
    tokens = output.patch_tokens.double().numpy() @ linear.weight.detach().double().numpy().T
    tokens = tokens + linear.bias.detach().double().numpy()
    wanted = targets.features.double().numpy()
    if target_norm == "layer_norm":
        wanted = (wanted - wanted.mean(-1, keepdims=True)) / np.sqrt(wanted.var(-1, keepdims=True) + 1e-6)
    layers = []
    for query, key, target in zip(output.queries, output.keys, targets.relations, strict=True):
        query, key = (x[:, :, first_token:] for x in (query, key))
        ours = reference_relation(query, key, relation.get("scale", "scaled"), relation.get("heads", "per_head"))
        theirs = target.double().numpy()
        if relation.get("loss") == "kl":
            layers.append((theirs * np.log(theirs / ours)).sum(-1).mean())
        else:
            layers.append(smooth_l1(ours - theirs, beta))
    return smooth_l1(tokens - wanted, beta), np.mean(layers)


def test_terms_equal_eq_1_written_out_in_numpy(images):
    distiller = make(loss=LossConfig(alpha=0.5, beta=0.7))
    targets = make_targets(7)
    feature, relation = reference_terms(distiller, images, targets, first_token=0, beta=0.7)
    terms = distiller(images, targets)
    assert terms.feature.item() == pytest.approx(feature, rel=1e-5)
    assert terms.relation.item() == pytest.approx(relation, rel=1e-5)
    assert terms.total.item() == pytest.approx(feature + 0.5 * relation, rel=1e-5)


@pytest.mark.parametrize(("relation", "teacher_has_cls"), [({"cls": "exclude"}, True), ({}, False)])
def test_relations_without_a_class_token_are_of_patches_only(images, relation, teacher_has_cls):
    distiller = make(RelationConfig(**relation), teacher_has_cls=teacher_has_cls)
    targets = make_targets(6)
    terms = distiller(images, targets)
    assert terms.relation.item() == pytest.approx(
        reference_terms(distiller, images, targets, first_token=1)[1], rel=1e-5
    )


def test_registers_never_enter_relations(images):
    student = StudentConfig(
        model="vit_small_patch14_reg4_dinov2", patch_size=8, embed_dim=32, depth=4, num_heads=4, drop_path=0.0
    )
    distiller = make(student=student)
    assert distiller.student.num_prefix_tokens == 5
    targets = make_targets(7)
    output = distiller.student(images, KEEP)
    rows = [0, 5, 6, 7, 8, 9, 10]
    layers = [
        smooth_l1(((q[:, :, rows] @ k[:, :, rows].mT) / 8**0.5 - target).detach().numpy(), 2.0)
        for q, k, target in zip(output.queries, output.keys, targets.relations, strict=True)
    ]
    assert distiller(images, targets).relation.item() == pytest.approx(np.mean(layers), rel=1e-5)


def test_a_missing_teacher_gives_a_zero_term_and_leaves_the_other_alone(images):
    targets = make_targets(7)
    both = make()(images, targets)
    feature_only = make(relation_heads=None)
    terms = feature_only(images, targets._replace(relations=()))
    assert terms.relation.item() == 0
    assert terms.total.item() == pytest.approx(both.feature.item(), rel=1e-6)
    terms.total.backward()
    relation_only = make(feature_dim=None)
    terms = relation_only(images, targets._replace(features=None))
    assert relation_only.head is None
    assert terms.feature.item() == 0
    assert terms.total.item() == pytest.approx(both.relation.item(), rel=1e-6)
    terms.total.backward()


def test_without_masks_all_patches_are_compared(images):
    distiller, targets = make(loss=LossConfig(alpha=0.25, beta=0.3)), make_targets(17, keep=None)
    # The reference asks the student for every patch by name, which must be what no mask means.
    everything = targets._replace(keep_indices=torch.arange(16).repeat(2, 1))
    feature, relation = reference_terms(distiller, images, everything, first_token=0, beta=0.3)
    terms = distiller(images, targets)
    assert terms.feature.item() == pytest.approx(feature, rel=1e-5)
    assert terms.relation.item() == pytest.approx(relation, rel=1e-5)
    assert terms.total.item() == pytest.approx(feature + 0.25 * relation, rel=1e-5)


def test_merged_relations_take_unequal_head_counts(images):
    settings = {"heads": "merged"}
    distiller = make(RelationConfig(**settings), LossConfig(beta=0.1), relation_heads=6)
    targets = make_targets(7, heads=1)
    terms = distiller(images, targets)
    _, relation = reference_terms(distiller, images, targets, first_token=0, relation=settings, beta=0.1)
    assert terms.relation.item() == pytest.approx(relation, rel=1e-5)


@pytest.mark.parametrize("heads", ["per_head", "merged"])
@pytest.mark.parametrize(
    ("scale", "loss"), [("scaled", "smooth_l1"), ("raw", "smooth_l1"), ("softmax", "smooth_l1"), ("softmax", "kl")]
)
def test_every_scale_and_loss_of_relations_reaches_the_term(scale, loss, heads, images):
    settings = {"scale": scale, "loss": loss, "heads": heads}
    distiller = make(RelationConfig(**settings), LossConfig(beta=0.05))
    with torch.no_grad():  # the rows of a new student are nearly uniform
        for block in distiller.student.encoder.model.blocks:
            block.attn.qkv.weight.mul_(3)
    targets = make_targets(7, heads=1 if heads == "merged" else 4)
    if scale == "softmax":
        targets = targets._replace(relations=tuple((x * 2).softmax(dim=-1) for x in targets.relations))
    _, relation = reference_terms(distiller, images, targets, first_token=0, relation=settings, beta=0.05)
    assert distiller(images, targets).relation.item() == pytest.approx(relation, rel=1e-4)


@pytest.mark.parametrize("target_norm", ["layer_norm", "none"])
def test_the_norm_of_feature_targets_reaches_the_term(target_norm, images):
    distiller, targets = make(loss=LossConfig(target_norm=target_norm)), make_targets(7)
    feature, _ = reference_terms(distiller, images, targets, first_token=0, target_norm=target_norm)
    assert distiller(images, targets).feature.item() == pytest.approx(feature, rel=1e-5)


@pytest.mark.parametrize("target", ["attention", "features"])
@pytest.mark.parametrize("token_head", ["norm_linear", "width"])
@pytest.mark.parametrize(("width", "target_norm"), [(32, "layer_norm"), (20, "layer_norm"), (20, "none")])
def test_targets_of_tokens_are_compared_token_by_token(target, token_head, width, target_norm, images):
    loss = LossConfig(beta=0.7, target_norm=target_norm)
    distiller = make(RelationConfig(target=target, token_head=token_head), loss, relation_dim=width, relation_heads=5)
    generator = torch.Generator().manual_seed(4)
    tokens = tuple(torch.randn(2, 7, width, generator=generator) * 2 + 1 for _ in range(2))
    targets = make_targets(7)._replace(relations=tokens)
    output = distiller.student(images, KEEP)
    terms = []
    for layer, (ours, theirs) in enumerate(zip(output.layer_tokens, tokens, strict=True)):
        ours = ours.detach().double().numpy()
        if token_head == "norm_linear":
            ours = (ours - ours.mean(-1, keepdims=True)) / np.sqrt(ours.var(-1, keepdims=True) + 1e-6)
        if token_head == "norm_linear" or width != 32:
            linear = distiller.layer_heads[layer].proj
            ours = ours @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
        theirs = theirs.double().numpy()
        if target_norm == "layer_norm":
            theirs = (theirs - theirs.mean(-1, keepdims=True)) / np.sqrt(theirs.var(-1, keepdims=True) + 1e-6)
        terms.append(smooth_l1(ours - theirs, 0.7))
    loss = distiller(images, targets)
    assert loss.relation.item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert (distiller.layer_heads is None) == (token_head == "width" and width == 32)
    loss.total.backward()
    assert [name for name, p in distiller.named_parameters() if p.grad is None] == []


def test_the_loss_falls_on_a_fixed_batch_and_every_parameter_gets_a_gradient(images):
    distiller, targets = make(), make_targets(7)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        terms = distiller(images, targets)
        terms.total.backward()
        losses.append(terms.total.item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert [name for name, p in distiller.named_parameters() if p.grad is None] == []


def test_unequal_head_counts_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"relation\.heads.*student has 4.*teacher 6.*relation\.heads=merged"):
        make(relation_heads=6)
    check_heads(RelationConfig(heads="merged"), student_heads=4, teacher_heads=6)


def test_no_teacher_at_all_is_refused():
    with pytest.raises(UserError, match="feature_teacher and relation_teacher are both null"):
        make(feature_dim=None, relation_heads=None)


@pytest.mark.parametrize("section", [RelationConfig, LossConfig])
def test_the_class_token_needs_both_sides_and_the_recipe(section):
    include, exclude = section(cls="include"), section(cls="exclude")
    assert compares_cls(include, student_has_cls=True, teacher_has_cls=True)
    assert not compares_cls(include, student_has_cls=False, teacher_has_cls=True)
    assert not compares_cls(include, student_has_cls=True, teacher_has_cls=False)
    assert not compares_cls(exclude, student_has_cls=True, teacher_has_cls=True)


def test_a_loaded_student_gives_the_trained_students_features(images):
    distiller = make().eval()
    loaded = load_student(STUDENT, 32, distiller.state_dict())
    assert torch.equal(loaded(images).patch_tokens, distiller.student(images).patch_tokens)
    assert not loaded.training


def test_a_loaded_decoder_is_the_trained_one(images):
    config = STUDENT.model_copy(update={"decoder": "transformer", "decoder_depth": 2, "decoder_dim": 16})
    distiller = make(student=config).eval()
    with torch.no_grad():
        for parameter in distiller.decoder.parameters():
            parameter.add_(1.0)
    student = load_student(config, 32, distiller.state_dict())
    decoder = load_decoder(config, student, distiller.state_dict())
    output = student(images)
    tokens = output.prefix_tokens, output.patch_tokens, None
    assert torch.equal(decoder(*tokens), distiller.decoder(*tokens))
    assert not decoder.training
    assert load_decoder(STUDENT, student, make().state_dict()) is None
    assert load_decoder(config, student, make().state_dict()) is None  # trained without a feature teacher
    other = config.model_copy(update={"decoder_depth": 3})
    with pytest.raises(UserError, match=r"does not fit student\.\*.*recipe\.yaml"):
        load_decoder(other, student, distiller.state_dict())


def test_weights_of_another_architecture_are_refused():
    deeper = STUDENT.model_copy(update={"depth": 5})
    with pytest.raises(UserError, match=r"does not fit student\.\*.*recipe\.yaml"):
        load_student(deeper, 32, make().state_dict())

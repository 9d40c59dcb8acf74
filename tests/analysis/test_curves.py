import numpy as np
import pytest
import torch

from hdscale.analysis.curves import attention_curves
from hdscale.config.recipe import TeacherConfig
from hdscale.config.sections import StudentConfig
from hdscale.evaluation.candidates import Candidate, teacher_candidate
from hdscale.evaluation.held_out import HeldOut
from hdscale.evaluation.measure import measure_attention, measure_decoder_attention
from hdscale.student.build import build_student
from hdscale.student.decoder import build_decoder
from hdscale.types import Batch, ViTOutput
from hdscale.vit.encoder import Outputs, ViTEncoder

GRID, PREFIX, HEADS, WIDTH = 3, 1, 2, 4


def make_batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        images = torch.randint(0, 256, (size, 3, 24, 24), dtype=torch.uint8, generator=generator)
        ids = torch.arange(size)
        batches.append(Batch(images, ids, ids, ids, ids, None))
    return batches


def encode(images):
    """Q and K that depend on the image."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(24, 2 * 2 * HEADS * (PREFIX + GRID**2) * WIDTH, generator=generator)
    tokens = ((images[:, 0, 0].float() / 255 - 0.5) @ mixing).view(-1, 2, 2, HEADS, PREFIX + GRID**2, WIDTH)
    return ViTOutput(None, tuple(tokens[:, 0].unbind(1)), tuple(tokens[:, 1].unbind(1)), ())


def reference(query, key, patch_size):
    """Head distance and NMI of one image and layer, averaged over heads; loops in float64."""
    distances, mutual_info = [], []
    for q, k in zip(query.double().numpy(), key.double().numpy(), strict=True):
        logits = q @ k.T / np.sqrt(q.shape[-1])
        attention = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        attention = attention[PREFIX:, PREFIX:] / attention[PREFIX:, PREFIX:].sum(axis=1, keepdims=True)
        places = np.array([(y, x) for y in range(GRID) for x in range(GRID)]) * patch_size
        between = np.sqrt(((places[:, None] - places[None]) ** 2).sum(-1))
        distances.append((attention * between).sum(axis=1).mean())
        joint = attention / len(attention)
        marginal = joint.sum(axis=0)
        information = (joint * np.log(joint / (marginal[None] / len(attention)))).sum()
        entropies = -(marginal * np.log(marginal)).sum() * np.log(len(attention))
        mutual_info.append(information / np.sqrt(entropies))
    return np.mean(distances), np.mean(mutual_info)


@pytest.mark.parametrize("num_images", [5, 100])
def test_curves_are_means_over_the_first_images_of_uneven_batches(num_images):
    batches = make_batches([4, 3])
    curves = attention_curves(
        encode, batches, num_images=num_images, num_prefix_tokens=PREFIX, grid_size=GRID, patch_size=8
    )
    output = encode(torch.cat([batch.images for batch in batches])[:num_images])
    for layer in range(2):
        wanted = [reference(q, k, 8) for q, k in zip(output.queries[layer], output.keys[layer], strict=True)]
        assert curves.head_distance[layer] == pytest.approx(np.mean([d for d, _ in wanted]), rel=1e-5)
        assert curves.nmi[layer] == pytest.approx(np.mean([i for _, i in wanted]), rel=1e-4)


def test_a_model_is_measured_at_every_layer_in_pixels_of_the_view():
    config = StudentConfig(model="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=3, num_heads=2)
    student = build_student(config, 24, seed=0).eval()
    batches = make_batches([2])
    held_out = HeldOut(train=[], val=batches, num_train=0, num_val=2, img_size=24)
    curves = measure_attention(Candidate("s", "student", student), held_out, 2, torch.device("cpu"))
    tapped = build_student(config, 24, seed=0, relation_layers=(0, 1, 2)).eval()
    with torch.no_grad():
        output = tapped(batches[0].images)
    for layer in range(3):
        wanted = [reference(q, k, 8) for q, k in zip(output.queries[layer], output.keys[layer], strict=True)]
        assert curves.head_distance[layer] == pytest.approx(np.mean([d for d, _ in wanted]), rel=1e-4)


def test_a_teacher_of_larger_patches_is_measured_in_pixels_of_the_view():
    config = TeacherConfig(source="timm", name="vit_tiny_patch16_224", weights="random")
    candidate = teacher_candidate(config, GRID, "feature_teacher")
    batches = make_batches([2])
    outputs = Outputs(relation_layers=range(candidate.model.depth), final=None)
    encoder = ViTEncoder(candidate.model.encoder.model, outputs, tokens="full").eval()
    with torch.no_grad():  # it is fed 48 pixels for its 3 x 3 patches of 16; the view has 24
        output = encoder(candidate.model.preprocess(batches[0].images, torch.float32))
    for img_size in (24, 48):
        held_out = HeldOut(train=[], val=batches, num_train=0, num_val=2, img_size=img_size)
        curves = measure_attention(candidate, held_out, 2, torch.device("cpu"))
        for layer, pair in enumerate(zip(output.queries, output.keys, strict=True)):
            wanted = [reference(q, k, img_size // GRID) for q, k in zip(*pair, strict=True)]
            assert curves.head_distance[layer] == pytest.approx(np.mean([d for d, _ in wanted]), rel=1e-3)


def test_pixels_have_no_attention():
    held_out = HeldOut(train=[], val=[], num_train=0, num_val=0, img_size=24)
    assert measure_attention(Candidate("raw", "baseline", None), held_out, 2, torch.device("cpu")) is None


def test_a_decoder_is_measured_at_every_layer_of_its_own():
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "decoder_depth": 2, "decoder_dim": 16}
    config = StudentConfig(model="vit_tiny_patch16_224", decoder="transformer", **sizes)
    student = build_student(config, 24, seed=0).eval()
    decoder = build_decoder(config, student, seed=1)
    batches = make_batches([2])
    held_out = HeldOut(train=[], val=batches, num_train=0, num_val=2, img_size=24)
    curves = measure_decoder_attention(student, decoder, held_out, 2, torch.device("cpu"))
    with torch.no_grad():
        output = student(batches[0].images)
        queries, keys = decoder.queries_and_keys(output.prefix_tokens, output.patch_tokens)
    assert len(curves.head_distance) == len(curves.nmi) == 2
    for layer in range(2):
        wanted = [reference(q, k, 8) for q, k in zip(queries[layer], keys[layer], strict=True)]
        assert curves.head_distance[layer] == pytest.approx(np.mean([d for d, _ in wanted]), rel=1e-4)

import pytest
import torch

from hdscale.config.recipe import TeacherConfig
from hdscale.config.sections import StudentConfig
from hdscale.evaluation.candidates import Candidate, teacher_candidate
from hdscale.evaluation.held_out import HeldOut
from hdscale.evaluation.measure import measure_attention, measure_decoder_attention
from hdscale.student.build import build_student
from hdscale.student.decoder import build_decoder
from hdscale.vit.encoder import Outputs, ViTEncoder
from tests.helpers.attention import GRID, make_batches, reference_means


def test_a_model_is_measured_at_every_layer_and_head_in_pixels_of_the_view():
    config = StudentConfig(model="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=3, num_heads=2)
    student = build_student(config, 24, seed=0).eval()
    batches = make_batches([2])
    held_out = HeldOut(train=[], val=batches, num_train=0, num_val=2, img_size=24)
    curves = measure_attention(Candidate("s", "student", student), held_out, 2, torch.device("cpu"))
    tapped = build_student(config, 24, seed=0, relation_layers=(0, 1, 2)).eval()
    with torch.no_grad():
        output = tapped(batches[0].images)
    assert len(curves.head_distance) == len(curves.nmi) == 3
    for layer in range(3):
        distances, mutual_info = reference_means(output.queries[layer], output.keys[layer], 8)
        assert curves.head_distance[layer] == pytest.approx(distances, rel=1e-4)
        assert curves.nmi[layer] == pytest.approx(mutual_info, rel=1e-3)


def test_pixels_have_no_attention():
    held_out = HeldOut(train=[], val=[], num_train=0, num_val=0, img_size=24)
    assert measure_attention(Candidate("raw", "baseline", None), held_out, 2, torch.device("cpu")) is None


def test_a_decoder_is_measured_at_every_layer_and_head_of_its_own():
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "decoder_depth": 2, "decoder_dim": 16}
    config = StudentConfig(model="vit_tiny_patch16_224", decoder="transformer", decoder_heads=4, **sizes)
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
        distances, mutual_info = reference_means(queries[layer], keys[layer], 8)
        assert len(distances) == 4
        assert curves.head_distance[layer] == pytest.approx(distances, rel=1e-4)
        assert curves.nmi[layer] == pytest.approx(mutual_info, rel=1e-3)


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
            distances, _ = reference_means(*pair, img_size // GRID)
            assert curves.head_distance[layer] == pytest.approx(distances, rel=1e-3)

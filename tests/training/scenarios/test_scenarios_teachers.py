"""Teachers beside a student in whole runs: sharded, the same as whole ones, unchanged."""

from hdscale.teachers.build import build_teacher
from hdscale.teachers.weights import weights_digest


def test_sharded_teachers_leave_half_of_their_weights_on_each_of_two_ranks(two_ranks):
    found = two_ranks["teachers"]
    for held in found["held"]:
        assert held.keys() == {"feature_teacher", "relation_teacher"}
        for name, counts in held.items():
            assert len(counts) == 3  # before, and after each of two steps
            assert 0.49 * found["totals"][name] < min(counts) <= max(counts) <= 0.55 * found["totals"][name]


def test_sharded_teachers_say_the_same_as_whole_ones_bit_for_bit(two_ranks):
    assert two_ranks["teachers"]["equal"] == [True, True]


def test_teacher_weights_have_the_same_hash_at_the_end_as_freshly_built_ones(recipe, two_ranks):
    feature = build_teacher(recipe.feature_teacher, role="feature", grid_size=8)
    relation = build_teacher(
        recipe.relation_teacher, role="relation", grid_size=8, relation_layers=recipe.relation.layers
    )
    wanted = {
        name: weights_digest(dict(teacher.named_parameters()) | dict(teacher.named_buffers()))
        for name, teacher in (("feature_teacher", feature), ("relation_teacher", relation))
    }
    assert two_ranks["teachers"]["digests"] == [[wanted, wanted], [wanted, wanted]]


def test_a_teacher_that_changes_fails_the_run(one_rank):
    assert "a teacher's weights have changed" in one_rank["spoiled_teacher"]["error"]

import pickle

import numpy as np
import pytest

from hdscale.shards.sources.packed_names import PackedNames

NAMES = ["a/1.jpg", "", "ä/ö.jpg", b"\xff.png".decode(errors="surrogateescape"), "z" * 1000]


def test_packed_names_are_the_names():
    names = PackedNames(NAMES)
    assert list(names) == NAMES
    assert len(names) == len(NAMES)
    assert names[-1] == NAMES[-1]
    assert not PackedNames()


def test_names_can_be_added():
    names = PackedNames(NAMES[:2])
    names.extend(NAMES[2:])
    assert list(names) == NAMES


@pytest.mark.parametrize("rows", [[3, 0, 0], [], [4, 2, 1, 3, 0]])
def test_selections_and_slices_of_them_keep_the_order(rows):
    chosen = PackedNames(NAMES).take(np.array(rows, dtype=np.int64))
    assert list(chosen) == [NAMES[row] for row in rows]
    assert list(chosen[1:3]) == [NAMES[row] for row in rows[1:3]]


def test_only_selected_names_are_pickled():
    names = PackedNames(f"name-{number}" for number in range(100_000))[500:502]
    pickled = pickle.dumps(names)
    assert list(pickle.loads(pickled)) == ["name-500", "name-501"]
    assert len(pickled) < 500

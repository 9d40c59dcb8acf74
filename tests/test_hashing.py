import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hdscale.hashing import extend_hash, hash64, hash_int, uniform, uniform_int

integers = st.integers(-(2**63), 2**64 - 1)


@given(parts=st.lists(integers, max_size=5), more=st.lists(integers, max_size=2))
def test_plain_integers_are_hashed_as_arrays_are(parts, more):
    assert hash_int(*parts) == int(hash64(*parts))
    assert extend_hash(hash_int(*parts), *more) == int(hash64(*parts, *more))


@given(bits=st.integers(0, 2**64 - 1))
def test_a_single_number_is_drawn_as_an_array_is(bits):
    assert uniform_int(bits) == uniform(np.array([bits], dtype=np.uint64))[0]

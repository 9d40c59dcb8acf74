import hashlib
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hdscale.hashing import extend_hash, file_digest, hash64, hash_int, short_value, uniform, uniform_int

integers = st.integers(-(2**63), 2**64 - 1)


@given(parts=st.lists(integers, max_size=5), more=st.lists(integers, max_size=2))
def test_plain_integers_are_hashed_as_arrays_are(parts, more):
    assert hash_int(*parts) == int(hash64(*parts))
    assert extend_hash(hash_int(*parts), *more) == int(hash64(*parts, *more))


@given(bits=st.integers(0, 2**64 - 1))
def test_a_single_number_is_drawn_as_an_array_is(bits):
    assert uniform_int(bits) == uniform(np.array([bits], dtype=np.uint64))[0]


def test_a_file_has_the_digest_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_of_a_digest_a_message_shows_the_beginning_and_other_values_whole():
    assert short_value("0123456789abcdef" * 4, json.dumps) == "sha256 0123456789ab..."
    assert short_value("0123456789abcdef", json.dumps) == '"0123456789abcdef"'
    assert [short_value(value) for value in (None, 0.5, "fp16")] == ["None", "0.5", "fp16"]

import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.blocked_sparse import BlockedCSCMatrix, BlockedCSRMatrix

both = pytest.mark.parametrize("kind", [BlockedCSCMatrix, BlockedCSRMatrix])


def as_standard(matrix):
    return matrix.to_standard_csc() if isinstance(matrix, BlockedCSCMatrix) else matrix.to_standard_csr()


@st.composite
def appends(draw):
    """A matrix's tokens, as (indices, values) each, and how they are grouped into calls."""
    size = draw(st.integers(1, 40))
    token = st.lists(st.integers(0, size - 1), unique=True, max_size=size)
    tokens = draw(st.lists(token, max_size=24))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    tokens = [(indices, rng.normal(size=len(indices)).astype(np.float16)) for indices in tokens]
    groups = []
    left = len(tokens)
    while left:
        groups.append((draw(st.sampled_from(["one", "batch", "flat"])), min(left, draw(st.integers(1, 9)))))
        left -= groups[-1][1]
    settings_ = {
        "block_size": draw(st.integers(1, 7)),
        "max_nnz_per_block": draw(st.sampled_from([None, 1, 5, 300])),
    }
    return size, tokens, groups, settings_


def append(matrix, how, tokens):
    indices, values = [t[0] for t in tokens], [torch.from_numpy(t[1]) for t in tokens]
    if how == "one":
        for index, value in zip(indices, values, strict=True):
            matrix.append_token(index, value.tolist())
    elif how == "batch":
        matrix.append_tokens_batch([torch.tensor(index, dtype=torch.int32) for index in indices], values)
    else:
        offsets = torch.tensor([0] + [len(index) for index in indices]).cumsum(0)
        matrix.append_tokens(
            torch.tensor(list(itertools.chain(*indices)), dtype=torch.int64), torch.cat(values), offsets
        )


@both
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@settings(max_examples=40, deadline=None)
@given(case=appends())
def test_append_in_any_grouping_equals_scipy_and_torch(kind, case):
    size, tokens, groups, options = case
    matrix = kind(size, **options)
    done = 0
    for how, count in groups:
        append(matrix, how, tokens[done : done + count])
        done += count

    token_ids = np.repeat(np.arange(len(tokens)), [len(t[0]) for t in tokens])
    indices = np.array(list(itertools.chain(*(t[0] for t in tokens))), dtype=np.int64)
    values = np.concatenate([np.zeros(0, np.float16), *(t[1] for t in tokens)])
    if kind is BlockedCSCMatrix:
        shape, coordinates, form, layout = (size, len(tokens)), (indices, token_ids), "csc", torch.sparse_csc
    else:
        shape, coordinates, form, layout = (len(tokens), size), (token_ids, indices), "csr", torch.sparse_csr
    expected = scipy.sparse.coo_array((values.astype(np.float32), coordinates), shape=shape).asformat(form)
    expected.sort_indices()
    offsets, positions, stored = as_standard(matrix)
    assert offsets.tolist() == expected.indptr.tolist()
    assert positions.tolist() == expected.indices.tolist()
    assert stored.dtype == torch.float16 and stored.tolist() == expected.data.tolist()
    assert matrix.shape == shape and matrix.total_nnz == len(values)
    assert np.array_equal(matrix.to_dense().float().numpy(), expected.toarray())
    sparse = matrix.to_torch()
    assert sparse.layout == layout and torch.equal(sparse.float().to_dense(), matrix.to_dense().float())
    assert matrix.num_blocks_allocated == max(1, -(-len(tokens) // options["block_size"]))

    matrix.reset()
    assert matrix.total_nnz == 0 and matrix.num_blocks_allocated == 1
    assert matrix.to_dense().numel() == 0
    assert matrix.memory_allocated_bytes() == kind(size, **options).memory_allocated_bytes()
    if tokens:
        append(matrix, "flat", tokens)
        assert [t.tolist() for t in as_standard(matrix)] == [
            offsets.tolist(),
            positions.tolist(),
            stored.tolist(),
        ]


def test_names_of_the_two_axes():
    csc, csr = BlockedCSCMatrix(6), BlockedCSRMatrix(6)
    for matrix in (csc, csr):
        matrix.append_tokens_batch([[5, 0], [], [3]], [[1.0, 2.0], [], [-1.0]])
    assert csc.total_columns == 3 and csc.shape == (6, 3)
    assert csr.total_rows == 3 and csr.shape == (3, 6)
    assert torch.equal(csc.to_dense().t(), csr.to_dense())


@both
def test_growing_moves_nothing_and_memory_is_what_is_held(kind):
    matrix = kind(1000, block_size=8, max_nnz_per_block=64)
    base_bytes = 9 * 4 + 64 * 4
    assert matrix.memory_allocated_bytes() == base_bytes
    addresses = []
    for token in range(40):
        matrix.append_token(torch.arange(8) * 7 + token, torch.ones(8))
        held = [part.data_ptr() for block in matrix._blocks for part in block.tensors()]
        assert held[: len(addresses)] == addresses
        addresses = held
    assert matrix.memory_allocated_bytes() == 5 * base_bytes  # exactly full, no overflow
    matrix.append_token([0], [1.0])
    addresses = [part.data_ptr() for block in matrix._blocks for part in block.tensors()]
    matrix.append_token(torch.arange(999), torch.ones(999))  # 936 more than a block's base: 960 chained
    assert matrix.num_blocks_allocated == 6
    assert matrix.memory_allocated_bytes() == 6 * base_bytes + 960 * 4
    assert [part.data_ptr() for block in matrix._blocks for part in block.tensors()][
        : len(addresses)
    ] == addresses


@both
def test_indices_use_all_sixteen_bits(kind):
    matrix = kind(65536)
    matrix.append_token([65535, 0, 32768, 32767], [1.0, 2.0, 3.0, 4.0])
    assert as_standard(matrix)[1].tolist() == [0, 32767, 32768, 65535]
    assert as_standard(matrix)[2].tolist() == [2.0, 4.0, 3.0, 1.0]


def test_stored_zeros_are_kept_and_bfloat16_holds_large_values():
    matrix = BlockedCSRMatrix(4, dtype=torch.bfloat16)
    matrix.append_token([1, 2], [0.0, 1e38])
    assert matrix.total_nnz == 2 and matrix.to_standard_csr()[2].isfinite().all()


@both
@pytest.mark.parametrize(
    ("indices", "values", "offsets", "message"),
    [
        ([0, 8], [1.0, 1.0], [0, 2], "from 0 to num_.* - 1 = 7, got 0 to 8"),
        ([-1], [1.0], [0, 1], "got -1 to -1"),
        ([1, 2, 2], [1.0, 1.0, 1.0], [0, 1, 3], "must not repeat within a token, got 2 twice"),
        ([2, 1, 2], [1.0, 1.0, 1.0], [0, 3], "got 2 twice"),
        ([1, 2], [1.0], [0, 2], "one for each of the 2 indices"),
        ([1, 2], [1.0, math.nan], [0, 2], "finite in torch.float16, got nan at index 2"),
        ([1, 2], [math.inf, 1.0], [0, 2], "got inf at index 1"),
        ([1, 2], [1.0, 70000.0], [0, 2], "got 70000.0 at index 2; torch.bfloat16 holds larger"),
        ([1, 2], [1.0, 1.0], [0, 1], "offsets must ascend from 0 to the number of entries, 2"),
        ([1, 2], [1.0, 1.0], [1, 2], "offsets must ascend"),
        ([1, 2], [1.0, 1.0], [0, 2, 1, 2], "offsets must ascend"),
        ([1.0], [1.0], [0, 1], "indices must be a 1-D integer tensor"),
        ([1], [1], [0, 1], "values must be floating point"),
    ],
)
def test_bad_appends_are_refused_and_change_nothing(kind, indices, values, offsets, message):
    matrix = kind(8, block_size=2)
    matrix.append_token([3], [1.0])
    before = [part.tolist() for part in as_standard(matrix)]
    with pytest.raises(ValueError, match=message):
        matrix.append_tokens(torch.tensor(indices), torch.tensor(values), torch.tensor(offsets))
    assert [part.tolist() for part in as_standard(matrix)] == before and matrix.num_blocks_allocated == 1


@both
def test_batches_that_do_not_fit_together_are_refused(kind):
    matrix = kind(8)
    with pytest.raises(ValueError, match="as many index lists as value lists, got 2 and 1"):
        matrix.append_tokens_batch([[1], [2]], [[1.0]])
    with pytest.raises(
        ValueError, match="token 1 of the batch must have as many indices as values, got 2 and 1"
    ):
        matrix.append_tokens_batch([[1], [2, 3], [4]], [[1.0], [1.0], [1.0, 2.0]])
    matrix.append_tokens_batch([], [])
    assert matrix.shape in ((8, 0), (0, 8))


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be positive, got 0"),
        ({"max_nnz_per_block": 0}, "max_nnz_per_block must be positive, got 0"),
        ({"dtype": torch.float32}, "dtype must be a 16-bit float, got torch.float32"),
    ],
)
def test_bad_settings_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(8, **options)
    with pytest.raises(ValueError, match="must be from 1 to 65536"):
        kind(65537)

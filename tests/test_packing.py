import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.packing import pack, packed_row_bytes, plane_widths, unpack


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator), bits


@settings(max_examples=150, deadline=None)
@given(codes_and_bits())
def test_unpack_inverts_pack_for_any_bits_and_tail(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (*codes.shape[:-1], packed_row_bytes(codes.shape[-1], bits))
    assert torch.equal(unpack(packed, bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_128_codes_takes_exactly_16_bytes_per_bit(bits):
    assert packed_row_bytes(128, bits) == 16 * bits
    assert sum(plane_widths(bits)) == bits


def test_planes_are_powers_of_two_lowest_bits_in_the_widest():
    widths = [plane_widths(bits) for bits in range(1, 9)]
    assert widths == [(1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,)]


@settings(max_examples=60, deadline=None)
@given(codes_and_bits())
def test_layout_is_the_documented_one(case):
    codes, bits = case
    num_codes = codes.shape[-1]
    rows = codes.reshape(-1, num_codes) if num_codes else codes.new_empty((0, 0))
    for row, packed in zip(rows.tolist(), pack(rows, bits).tolist(), strict=True):
        expected, shift = [], 0
        for width in plane_widths(bits):
            per_byte = 8 // width
            stride = -(-num_codes // per_byte)
            plane = [0] * stride
            for channel, code in enumerate(row):
                plane[channel % stride] |= (code >> shift) % 2**width << width * (channel // stride)
            expected += plane
            shift += width
        assert packed == expected


def test_rows_of_a_view_pack_alike():
    codes = torch.randint(0, 8, (6, 5, 2), dtype=torch.uint8).transpose(0, 2)
    packed = pack(codes, 3)
    assert packed.is_contiguous() and torch.equal(packed, pack(codes.contiguous(), 3))


def test_bits_above_the_width_are_cut_off():
    codes = torch.arange(256, dtype=torch.uint8)
    for bits in range(1, 8):
        assert torch.equal(unpack(pack(codes, bits), bits, 256), codes % 2**bits)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, None])
def test_bits_outside_1_to_8_are_refused(bits):
    codes = torch.zeros(4, dtype=torch.uint8)
    for call in (
        plane_widths,
        lambda b: packed_row_bytes(4, b),
        lambda b: pack(codes, b),
        lambda b: unpack(codes, b, 4),
    ):
        with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got"):
            call(bits)


def test_wrong_type_shape_or_length_is_refused():
    with pytest.raises(ValueError, match=r"codes must be a uint8 tensor.*int64"):
        pack(torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="at least one dimension"):
        pack(torch.zeros((), dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="packed must be a uint8 tensor"):
        unpack(torch.zeros(2), 4, 4)
    with pytest.raises(ValueError, match="must be 3 bytes long, got 2"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)
    with pytest.raises(ValueError, match="num_codes must not be negative"):
        packed_row_bytes(-1, 4)

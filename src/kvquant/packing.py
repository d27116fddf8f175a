"""Exact bit packing of codes: `bits` bits per code, 1 to 8, with nothing straddling a byte.

A row of D codes is stored as one to three *planes* whose widths are powers of two, so that three bits really
take three bits (a 2-bit plane, then a 1-bit plane) and every byte can be unpacked on its own. Rows are never
packed across each other: appending, cropping or copying a token touches whole bytes.
"""

import torch
from torch import Tensor

_PLANE_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths in bits of the planes that hold a code of `bits` bits.

    The first plane holds the lowest bits of a code, each next plane the next higher ones.

    Args:
        bits (int): bits per code, 1 to 8.

    Returns:
        tuple[int, ...]: powers of two that sum to `bits`, e.g. (2, 1) for 3.

    Raises:
        ValueError: `bits` is outside 1-8.
    """
    if bits not in _PLANE_WIDTHS:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}; try 4")
    return _PLANE_WIDTHS[bits]


def packed_row_bytes(num_codes: int, bits: int) -> int:
    """Bytes that one row of `num_codes` codes takes, each plane rounded up to whole bytes.

    Raises:
        ValueError: `bits` is outside 1-8 or `num_codes` is negative.
    """
    if num_codes < 0:
        raise ValueError(
            f"num_codes must not be negative, got {num_codes}; pass the number of codes in a row"
        )
    return sum(_plane_bytes(num_codes, width) for width in plane_widths(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into `packed_row_bytes(D, bits)` bytes.

    Args:
        codes (Tensor): codes below 2**bits (higher bits are cut off), [..., D], uint8.
        bits (int): bits per code, 1 to 8.

    Returns:
        Tensor: [..., row_bytes], uint8, contiguous; the fields of the tail beyond D are 0.

    Raises:
        ValueError: `bits` is outside 1-8, or codes are not uint8 or have no dimension.
    """
    widths = plane_widths(bits)
    _check_bytes("codes", codes)
    start, planes = 0, []
    for width in widths:
        plane = codes >> start if start else codes
        if bits < 8:
            plane = plane & ((1 << width) - 1)
        planes.append(_fold(plane, width))
        start += width
    return planes[0].contiguous() if len(planes) == 1 else torch.cat(planes, dim=-1)


def _fold(plane: Tensor, width: int) -> Tensor:
    """Lay the fields of a plane [..., D], each below 2**width, over each other: [..., plane_bytes].

    Byte w holds channels w, w + W, w + 2W, ..., not neighbours: RoPE's rotate-half partners (d, d + D/2) then share
    a byte, and each field of a run of bytes unpacks to one contiguous run of channels. So folding in halves, the
    upper half moved up by as many bits as the lower half will fill, is all there is to it.
    """
    fields, num_codes = 8 // width, plane.shape[-1]
    if num_codes % fields:
        plane = torch.nn.functional.pad(plane, (0, -num_codes % fields))
    while fields > 1:
        fields //= 2
        half = plane.shape[-1] // 2
        # The sum is an or: the halves share no bit.
        plane = torch.add(plane[..., :half], plane[..., half:], alpha=1 << (width * fields))
    return plane


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Invert `pack`.

    Args:
        packed (Tensor): [..., row_bytes], uint8, as returned by `pack`.
        bits (int): bits per code, 1 to 8.
        num_codes (int): D, the codes in a row.

    Returns:
        Tensor: codes, [..., D], uint8; contiguous, or with the last two dimensions swapped in memory if `packed` is.

    Raises:
        ValueError: `bits` is outside 1-8, packed is not uint8, or its rows are not `packed_row_bytes(D, bits)` long.
    """
    widths = plane_widths(bits)
    _check_bytes("packed", packed)
    row_bytes = packed_row_bytes(num_codes, bits)
    if packed.shape[-1] != row_bytes:
        raise ValueError(
            f"packed rows of {num_codes} codes at {bits} bits must be {row_bytes} bytes long, "
            f"got {packed.shape[-1]}; pass the num_codes and bits that were packed"
        )
    if packed.dim() > 1 and packed.stride(-2) == 1 < packed.stride(-1):
        # Channel-major rows stay so: runs of a row are short, runs of a channel over many rows vectorise.
        codes = packed.new_empty((*packed.shape[:-2], num_codes, packed.shape[-2]))
        _unpack_planes(*_as_words(packed.transpose(-1, -2), codes), widths)
        return codes.transpose(-1, -2)
    codes = packed.new_empty((*packed.shape[:-1], num_codes))
    _unpack_planes(packed[..., None], codes[..., None], widths)
    return codes


def _as_words(packed: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bytes to an integer along the last dimension where that is possible: shifts of bytes do not vectorise."""
    if packed.shape[-1] % 8 or not packed.is_contiguous() or packed.storage_offset() % 8:
        return packed, codes
    return packed.view(torch.int64), codes.view(torch.int64)


def _unpack_planes(packed: Tensor, codes: Tensor, widths: tuple[int, ...]) -> None:
    """Unpack rows of bytes, or of integers of several bytes each, [..., row_bytes, n] into codes [..., D, n].

    What a shift carries into the next byte of an integer, the mask takes away.
    """
    ones = 0x0101010101010101 if codes.dtype == torch.int64 else 1
    num_codes = codes.shape[-2]
    start = code_shift = 0
    for width in widths:
        plane_bytes = _plane_bytes(num_codes, width)
        plane = packed[..., start : start + plane_bytes, :]
        fields = codes if code_shift == 0 else torch.empty_like(codes)
        for field in range(8 // width):
            run = fields[..., field * plane_bytes : (field + 1) * plane_bytes, :]
            source, up = plane[..., : run.shape[-2], :], code_shift - field * width
            if up > 0:
                torch.bitwise_left_shift(source, up, out=run)
            elif up < 0:
                torch.bitwise_right_shift(source, -up, out=run)
            else:
                run.copy_(source)
        if width < 8:
            # One mask for the whole plane, not one per field.
            fields &= (((1 << width) - 1) << code_shift) * ones
        if code_shift:
            codes |= fields
        start += plane_bytes
        code_shift += width


def _plane_bytes(num_codes: int, width: int) -> int:
    per_byte = 8 // width
    return -(-num_codes // per_byte)


def _check_bytes(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() == 0:
        raise ValueError(
            f"{name} must be a uint8 tensor of at least one dimension, got {tensor.dtype} of shape "
            f"{list(tensor.shape)}; convert it with .to(torch.uint8)"
        )

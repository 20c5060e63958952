"""From weights to integer codes and back.

Rounded to nearest, with a positive scale for each block of consecutive values of a row and no zero points:
TensorRT takes no other. A scale is the smallest at which no value of its block is clipped; there is one code
more below zero than above.

Shapes: N rows (outputs), K values of a row (inputs), B blocks of a row, L = B times a block's values >= K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def quantize(
    weight_NK: NDArray[np.float32], bits: int, block: int, scale_dtype: np.dtype[Any]
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Codes 0 .. 2^bits - 1 of each value, uint8 [N, L], and scales [N, B]; code 2^(bits-1) is zero, also of
    what is missing in the last block of a row.

    Args:
        scale_dtype: scales are rounded to it before the values are divided by them.
    """
    rows, width = weight_NK.shape
    zero = 1 << (bits - 1)
    blocks = np.pad(weight_NK, ((0, 0), (0, -width % block))).reshape(rows, -1, block)
    above, below = blocks.max(axis=2, keepdims=True), blocks.min(axis=2, keepdims=True)
    scales = np.maximum(above / (zero - 1), below / -zero).astype(scale_dtype)
    divisors = scales.astype(np.float32)
    divisors[divisors == 0] = 1  # a block of zeros, or so small that its scale is none
    codes = np.clip(np.rint(blocks / divisors) + zero, 0, 2 * zero - 1)
    return codes.astype(np.uint8).reshape(rows, -1), scales[:, :, 0]


def dequantize(codes_NL: NDArray[np.uint8], scales_NB: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """The values that codes stand for, float32 [N, L]."""
    block = codes_NL.shape[1] // scales_NB.shape[1]
    scales = np.repeat(scales_NB.astype(np.float32), block, axis=1)
    return (codes_NL.astype(np.float32) - np.float32(1 << (bits - 1))) * scales


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [N, L] of the bytes that `pack` made of unsigned ones."""
    if bits == 8:
        return packed
    halves = np.stack((packed & 15, packed >> 4), axis=2)
    return halves.reshape(len(packed), -1).astype(np.uint8)


def pack(codes_NL: NDArray[np.uint8], bits: int, *, signed: bool) -> NDArray[np.uint8]:
    """Bytes as ONNX stores them, [N, L * bits / 8]: of two 4-bit codes the first in the lower half.

    Args:
        signed: two's complement around zero, instead of codes from 0.
    """
    codes = codes_NL ^ np.uint8(1 << (bits - 1)) if signed else codes_NL
    return codes if bits == 8 else (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)

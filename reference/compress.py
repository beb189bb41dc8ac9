"""Oracle of spectral_kernels/compress.py: second moments by sums, the code of one token, tokens
rebuilt from codes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .layout import U8, Bands, codes_by_position, values_of
from .rope import rotate, turn_back

F64 = NDArray[np.float64]


@dataclass
class CodecArrays:
    """The tensors of spectral_kernels.codec.Codec as NumPy arrays, the numbers of its layout, and
    radians a position."""

    k_bands: Bands
    v_bands: Bands
    head_dim: int
    frame: int
    inv_freq: NDArray[np.float32]
    k_basis: NDArray[np.int8]
    k_scale: NDArray[np.float32]
    k_encoder: NDArray[np.float32]
    k_mean: NDArray[np.float32]
    v_basis: NDArray[np.int8]
    v_scale: NDArray[np.float32]
    v_encoder: NDArray[np.float32]
    k_offset: NDArray[np.float32]

    def bands(self, side: str) -> Bands:
        return self.k_bands if side == "k" else self.v_bands

    def vectors(self, side: str) -> F64:
        """What a step of each component stands for, [M, G, R, D]."""
        basis, scale = (self.k_basis, self.k_scale) if side == "k" else (self.v_basis, self.v_scale)
        return np.asarray(scale, np.float64)[..., None] * np.asarray(basis, np.float64)


@dataclass
class PageArrays:
    """Pages of a batch: k_pages, v_pages [P, G, 64 * bytes], block_table [B, max_pages], seq_lens
    and rows [B]: the codec's row of each sequence."""

    codec: CodecArrays
    k_pages: U8
    v_pages: U8
    block_table: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    rows: NDArray[np.int32]

    def pages(self, side: str) -> U8:
        return self.k_pages if side == "k" else self.v_pages


def coefficients(
    x: ArrayLike, positions: ArrayLike, codec: CodecArrays, row: int, side: str
) -> F64:
    """Coefficients [G, T, R] in units of their steps of tokens x [G, T, D] at positions [T]; keys
    as rotated."""
    x = np.asarray(x, np.float64)
    if side == "v":
        return np.einsum("gtd,gdr->gtr", x, np.asarray(codec.v_encoder[row], np.float64))
    aligned = turn_back(x, positions, codec.inv_freq, codec.frame)
    found = np.einsum("gtd,gdr->gtr", aligned, np.asarray(codec.k_encoder[row], np.float64))
    return found - np.asarray(codec.k_offset[row], np.float64)[:, None]


def stored(pages: PageArrays, b: int, side: str) -> F64:
    """Coefficients [G, T, R] of the tokens of row b, in units of their steps."""
    bands, length = pages.codec.bands(side), int(pages.seq_lens[b])
    codes = codes_by_position(pages.pages(side), pages.block_table[b], length, bands, side)
    return values_of(codes, bands)


def rebuild(pages: PageArrays, b: int, side: str) -> F64:
    """Of row b: keys as the model rotated them, or values, [G, T, D]."""
    codec, row = pages.codec, pages.rows[b]
    values, vectors = stored(pages, b, side), pages.codec.vectors(side)[pages.rows[b]]
    out = values @ vectors
    if side == "k":
        out += np.asarray(codec.k_mean[row], np.float64)[:, None]
        starts = np.array([p // codec.frame * codec.frame for p in range(out.shape[1])], np.int64)
        out = rotate(out, starts, codec.inv_freq)
    return out

"""spectral_kernels/layout.py against reference/layout.py, and against bytes written down by
hand."""

import numpy as np
import pytest
import torch

from reference import layout as oracle
from spectral_kernels import layout
from spectral_kernels.layout import Bands, PageLayout
from tests.cases import DEVICE, random_codes

SIDES = ("k", "v")
BANDS = [
    "16x8",
    "32x4",
    "64x2",
    "16x8+16x4+96x2",
    "16x8+48x4",
    "32x4+96x2",
    "16x8+16x2",
    "256x2",
    "128x8",
]


def test_a_page_by_hand():
    """16x8+16x4+16x2: a group of 8 bits and one of 4 + 2, bytes written down by hand."""
    bands = Bands.parse("16x8+16x4+16x2")
    assert bands.groups == ((0, (8,)), (16, (4, 2))) and bands.bytes == 32 and bands.rank == 48
    codes = np.zeros((64, 48), np.int64)
    codes[:, :16] = 128
    codes[0, :4] = 0, 1, 128, 255  # token 0, the first columns: two's complement of n - 128
    codes[43, 7] = (
        200  # token 43 = 32 + 8 + 3: sub-tile 1, r = 1, g = 3; column 7 = 4 + 3: t = 1, b = 3
    )
    codes[43, 16 + 7], codes[43, 32 + 7] = 9, 2  # 4 bits, then 2 bits above them
    values = torch.from_numpy(codes - np.array([127.5] * 16 + [7.5] * 16 + [1.5] * 16)).float()
    values = values.to(DEVICE)
    k = layout.pack_pages(values, bands, side="k")
    expected = np.zeros(64 * 32, np.int64)
    expected[:4] = 0x80, 0x81, 0x00, 0x7F
    expected[512 + 64 * 3 + 16 * 1 + 4 * 1 + 3] = 200 - 128
    expected[1024 + 512 + 64 * 3 + 16 * 1 + 4 * 1 + 3] = 9 + 2 * 16
    np.testing.assert_array_equal(k.cpu().numpy(), expected)
    v = layout.pack_pages(values, bands, side="v")
    expected = np.zeros(64 * 32, np.int64)
    # token 0 is t = 0, b = 0; column c < 8 is h = 0, g = c
    expected[[0, 64, 128, 192]] = 0x80, 0x81, 0x00, 0x7F
    # token 43 = 8 * 5 + 3: b = 5, sub-tile 0, t = 3; column 7: h = 0, g = 7
    expected[64 * 7 + 16 * 3 + 5] = 200 - 128
    expected[1024 + 64 * 7 + 16 * 3 + 5] = 9 + 2 * 16
    np.testing.assert_array_equal(v.cpu().numpy(), expected)
    for side, page in (("k", k), ("v", v)):
        torch.testing.assert_close(layout.unpack_pages(page, bands, side=side), values)


def test_half_groups_by_hand():
    """48x4: the last block alone uses 4 bits; a token of sub-tile 0 and one of sub-tile 1 share its
    bytes."""
    bands = Bands.parse("48x4")
    assert bands.groups == ((0, (4, 4)), (32, (4,))) and bands.bytes == 24
    for side, first, second, byte in (
        ("k", 5, 32 + 5, 64 * 5 + 16 * 2 + 1),  # g = 5; column 9: t = 2, b = 1
        ("v", 1, 4 + 1, 64 * 1 + 16 * 1 + 8 * 1 + 0),  # t = 1, b = 0; column 9: h = 1, g = 1
    ):
        codes = np.zeros((64, 48), np.int64)
        codes[first, 32 + 9], codes[second, 32 + 9] = 11, 6
        values = torch.from_numpy(codes - 7.5).float().to(DEVICE)
        page = layout.pack_pages(values, bands, side=side).cpu().numpy()
        expected = np.zeros(64 * 24, np.int64)
        expected[:1024] = 0x80  # full bytes hold n - 128 of (0, 0)
        expected[1024 + byte] = 11 + 16 * 6
        np.testing.assert_array_equal(page, expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", BANDS)
def test_pack_and_unpack(rng, text, side):
    bands = Bands.parse(text)
    # Steps of a quarter fall on both sides of every boundary; a share lies past the ends of the
    # range.
    size = 2.0 ** rng.integers(0, 9, bands.rank) * 4
    values = np.round(rng.standard_normal((3, 64, bands.rank)) * size) / 4
    packed = layout.pack_pages(torch.from_numpy(values).to(DEVICE, torch.float32), bands, side=side)
    expected = oracle.pack_pages(values.astype(np.float32), bands.bands, side)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert expected.shape[-1] == 64 * bands.bytes == 64 * oracle.token_bytes(bands.bands)
    np.testing.assert_array_equal(packed.cpu().numpy(), expected)
    unpacked = layout.unpack_pages(packed, bands, side=side)
    wanted = oracle.unpack_pages(expected, bands.bands, side)
    np.testing.assert_array_equal(unpacked.cpu().numpy(), wanted)
    assert unpacked.dtype == torch.float32


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", BANDS)
def test_every_code_returns(rng, text, side):
    """unpack then pack is the identity on every code, in the oracle and here."""
    bands = Bands.parse(text)
    codes = random_codes(rng, (2, 3, 64), bands.bands)
    page = oracle.pack_codes(codes, bands.bands, side)
    np.testing.assert_array_equal(oracle.unpack_codes(page, bands.bands, side), codes)
    tensor = torch.from_numpy(page).to(DEVICE)
    again = layout.pack_pages(layout.unpack_pages(tensor, bands, side=side), bands, side=side)
    assert torch.equal(again, tensor)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", BANDS)
def test_no_two_components_share_a_bit(text, side):
    """The oracle's places cover a page's fields once."""
    bands = Bands.parse(text).bands
    byte, low = oracle.places(bands, side)
    taken = np.zeros((64 * oracle.token_bytes(bands), 8), int)
    for r, bits in enumerate(oracle.bits_of(bands)):
        for d in range(64):
            taken[byte[d, r], low[d, r] : low[d, r] + bits] += 1
    assert taken.max() == 1 and taken.sum() == 64 * sum(oracle.bits_of(bands))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_round_down_and_saturate(bits):
    """n = clamp(floor(c + 2**(bits - 1)), 0, 2**bits - 1): a step's interval is closed below,
    values in its middle return."""
    half = 2 ** (bits - 1)
    inside = [-half, -half + 0.99, -0.01, 0.0, 0.5, 0.99, 1.0, half - 0.01]
    c = np.array([-1e9, -half - 0.01, *inside, half, 1e9], np.float32)
    n = np.array(
        [0, 0, 0, 0, half - 1, half, half, half, half + 1, 2 * half - 1, 2 * half - 1, 2 * half - 1]
    )
    n = np.minimum(n, 2 * half - 1)
    np.testing.assert_array_equal(oracle.code_of(c, bits), n)
    bands = Bands(((16, bits),))
    padded = torch.zeros(64, 16, device=DEVICE)
    padded[0, : len(c)] = torch.from_numpy(c)
    got = layout.unpack_pages(layout.pack_pages(padded, bands, side="k"), bands, side="k")
    np.testing.assert_array_equal(got[0, : len(c)].cpu().numpy(), n - (2**bits - 1) / 2)


def test_layouts_that_are_wrong_differ(rng):
    """Comparing bytes has teeth: the other side's order, swapped nibbles, unsigned 8 bits are other
    bytes."""
    codes = random_codes(rng, (64,), ((32, 4),))
    page = oracle.pack_codes(codes, ((32, 4),), "k")
    assert (page != oracle.pack_codes(codes, ((32, 4),), "v")).any()
    assert (page != oracle.pack_codes(np.roll(codes, 16, -1), ((32, 4),), "k")).any()
    assert (page != oracle.pack_codes(np.roll(codes, 1, -2), ((32, 4),), "k")).any()
    unsigned = random_codes(rng, (64,), ((16, 8),))
    page = oracle.pack_codes(unsigned, ((16, 8),), "k")
    assert (page != oracle.pack_codes((unsigned + 128) % 256, ((16, 8),), "k")).all()


def test_bands():
    bands = Bands.parse("16x8+16x4+96x2")
    assert bands.bands == ((16, 8), (16, 4), (96, 2)) and str(bands) == "16x8+16x4+96x2"
    assert bands.rank == 128 and bands.bytes == 16 + 8 + 24
    assert bands.bits == (8,) * 16 + (4,) * 16 + (2,) * 96
    texts = ["", "16", "16x8,16x4", "0x8", "8x8", "24x4", "16x3", "16x16", "-16x8"]
    for text in [*texts, "16x4+16x8", "16x16+16x8", "16x8+16x8", "16x8+"]:
        with pytest.raises(ValueError, match="bands"):
            Bands.parse(text)
    with pytest.raises(ValueError, match="bands"):
        Bands(())


@pytest.mark.parametrize("text", BANDS)
def test_groups_are_the_oracles(text):
    bands = Bands.parse(text)
    assert [list(fields) for _, fields in bands.groups] == oracle.groups_of(bands.bands)
    assert bands.bytes == oracle.token_bytes(bands.bands)


def test_layout():
    k, v = Bands.parse("16x8"), Bands.parse("144x4")
    good = PageLayout(k, v, 80)
    assert good.frame == 512 and good.token_bytes == 16 + 72
    assert good.side("k") is k and good.side("v") is v
    with pytest.raises(ValueError, match="side"):
        good.side("q")

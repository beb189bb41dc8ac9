"""spectral_kernels/pages.py against reference/pages.py, and against bytes written down by hand."""

import numpy as np
import pytest
import torch

from reference import pages as oracle
from spectral_kernels import pages
from tests.cases import DEVICE, PageSpec, make_pages, pages_of, random_codes

BANDS = ["16x8", "32x4", "64x2", "48x16", "16x8+16x4+96x2", "16x8+48x4", "32x4+96x2", "16x8+16x2", "256x2"]


def test_a_page_by_hand():
    """16x8+16x4+16x2 of 64 tokens: a group of 8 bits and one of 4 + 2, bytes written down by hand."""
    bands = pages.Bands.parse("16x8+16x4+16x2")
    assert bands.groups == ((0, (8,)), (16, (4, 2))) and bands.bytes == 32 and bands.rank == 48
    codes = np.zeros((64, 48), np.int64)
    codes[:, :16] = 128
    codes[0, :4] = 0, 1, 128, 255  # token 0, the first columns: two's complement of n - 128
    codes[43, 7] = 200  # token 43 = 32 + 8 + 3: sub-tile 1, r = 1, g = 3; column 7 = 4 + 3: t = 1, b = 3
    codes[43, 16 + 7], codes[43, 32 + 7] = 9, 2  # 4 bits, then 2 bits above them
    values = torch.from_numpy(codes - np.array([127.5] * 16 + [7.5] * 16 + [1.5] * 16)).float().to(DEVICE)
    k = pages.pack_pages(values, bands, side="k")
    expected = np.zeros(64 * 32, np.int64)
    expected[:4] = 0x80, 0x81, 0x00, 0x7F
    expected[512 + 64 * 3 + 16 * 1 + 4 * 1 + 3] = 200 - 128
    expected[1024 + 512 + 64 * 3 + 16 * 1 + 4 * 1 + 3] = 9 + 2 * 16
    np.testing.assert_array_equal(k.cpu().numpy(), expected)
    v = pages.pack_pages(values, bands, side="v")
    expected = np.zeros(64 * 32, np.int64)
    # token 0 is t = 0, b = 0; column c < 8 is h = 0, g = c
    expected[[0, 64, 128, 192]] = 0x80, 0x81, 0x00, 0x7F
    # token 43 = 8 * 5 + 3: b = 5, sub-tile 0, t = 3; column 7: h = 0, g = 7
    expected[64 * 7 + 16 * 3 + 5] = 200 - 128
    expected[1024 + 64 * 7 + 16 * 3 + 5] = 9 + 2 * 16
    np.testing.assert_array_equal(v.cpu().numpy(), expected)
    for side, page in (("k", k), ("v", v)):
        torch.testing.assert_close(pages.unpack_pages(page, bands, side=side), values)


def test_half_groups_by_hand():
    """48x4: the last block alone uses 4 bits; a token of sub-tile 0 and one of sub-tile 1 share its bytes."""
    bands = pages.Bands.parse("48x4")
    assert bands.groups == ((0, (4, 4)), (32, (4,))) and bands.bytes == 24
    for side, first, second, byte in (
        ("k", 5, 32 + 5, 64 * 5 + 16 * 2 + 1),  # g = 5; column 9: t = 2, b = 1
        ("v", 1, 4 + 1, 64 * 1 + 16 * 1 + 8 * 1 + 0),  # t = 1, b = 0; column 9: h = 1, g = 1
    ):
        codes = torch.zeros(128, 48)
        codes[:, 16:32] = 8  # the top field of a full byte is stored as n - 8
        codes[64 + first, 32 + 9], codes[64 + second, 32 + 9] = 3, 14
        page = pages.pack_pages((codes - 7.5).to(DEVICE), bands, side=side)
        assert page.nonzero().flatten().tolist() == [128 * 16 + 512 + byte] and page[page != 0].tolist() == [3 + 14 * 16]


def test_a_float_page_by_hand():
    """16 bits: little-endian fp16, K by tokens, V by components."""
    floats = pages.Bands.parse("16x16")
    values = torch.arange(64 * 16).reshape(1, 1, 64, 16).float()  # exact in fp16
    k = pages.pack_pages(values, floats, side="k")
    assert k[0, 0, 2:6].tolist() == [0x00, 0x3C, 0x00, 0x40]  # 1.0 and 2.0
    v = pages.pack_pages(values, floats, side="v")
    torch.testing.assert_close(v.view(torch.float16).reshape(1, 1, 16, 64).float(), values.mT)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("text", BANDS)
def test_pack_and_unpack(rng, text, side):
    bands = pages.Bands.parse(text)
    # Steps of a quarter fall on both sides of every boundary; the scale sends a share past the ends of the range.
    values = np.round(rng.standard_normal((3, 64, bands.rank)) * 2.0 ** rng.integers(0, 9, bands.rank) * 4) / 4
    packed = pages.pack_pages(torch.from_numpy(values).to(DEVICE, torch.float32), bands, side=side)
    expected = oracle.pack_pages(values.astype(np.float32), bands.bands, side)
    assert packed.dtype == torch.uint8 and packed.is_contiguous() and expected.shape[-1] == 64 * bands.bytes
    np.testing.assert_array_equal(packed.cpu().numpy(), expected)
    unpacked = pages.unpack_pages(packed, bands, side=side)
    np.testing.assert_array_equal(unpacked.cpu().numpy(), oracle.unpack_pages(expected, bands.bands, side))
    assert unpacked.dtype == torch.float32


@pytest.mark.parametrize("chunk", pages.CHUNKS)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("text", BANDS)
def test_every_code_returns(rng, text, side, chunk):
    """unpack then pack is the identity on every code, at every chunk length."""
    bands = pages.Bands.parse(text)
    page = oracle.pack_codes(random_codes(rng, (2, 3, chunk), bands.bands), bands.bands, side)
    tensor = torch.from_numpy(page).to(DEVICE)
    torch.testing.assert_close(pages.pack_pages(pages.unpack_pages(tensor, bands, side=side), bands, side=side), tensor)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_round_down_and_saturate(bits):
    """n = clamp(floor(c + 2**(bits - 1)), 0, 2**bits - 1): a step's interval is closed below, values in its middle
    return."""
    half = 2 ** (bits - 1)
    c = np.array([-1e9, -half - 0.01, -half, -half + 0.99, -0.01, 0.0, 0.5, 0.99, 1.0, half - 0.01, half, 1e9], np.float32)
    n = np.array([0, 0, 0, 0, half - 1, half, half, half, half + 1, 2 * half - 1, 2 * half - 1, 2 * half - 1])
    n = np.minimum(n, 2 * half - 1)
    np.testing.assert_array_equal(oracle.code_of(c, bits), n)
    bands = pages.Bands(((16, bits),))
    padded = torch.zeros(64, 16, device=DEVICE)
    padded[0, : len(c)] = torch.from_numpy(c)
    got = pages.unpack_pages(pages.pack_pages(padded, bands, side="k"), bands, side="k")[0, : len(c)].cpu().numpy()
    np.testing.assert_array_equal(got, n - (2**bits - 1) / 2)


def test_layouts_that_are_wrong_differ(rng):
    """Comparing bytes has teeth: the other side's order, swapped nibbles, unsigned 8 bits are other bytes."""
    codes = random_codes(rng, (64,), ((32, 4),))
    page = oracle.pack_codes(codes, ((32, 4),), "k")
    assert (page != oracle.pack_codes(codes, ((32, 4),), "v")).any()
    assert (page != oracle.pack_codes(np.roll(codes, 16, -1), ((32, 4),), "k")).any()
    unsigned = random_codes(rng, (64,), ((16, 8),))
    shifted = (unsigned + 128) % 256
    assert (oracle.pack_codes(unsigned, ((16, 8),), "k") != oracle.pack_codes(shifted, ((16, 8),), "k")).all()


def test_bands():
    bands = pages.Bands.parse("16x8+16x4+96x2")
    assert bands.bands == ((16, 8), (16, 4), (96, 2)) and str(bands) == "16x8+16x4+96x2"
    assert bands.rank == 128 and bands.bytes == 16 + 8 + 24 and not bands.is_float
    assert bands.bits == (8,) * 16 + (4,) * 16 + (2,) * 96
    assert pages.Bands.parse("64x16").is_float and pages.Bands.parse("64x16").bytes == 128
    for text in ("", "16", "16x8,16x4", "0x8", "8x8", "24x4", "16x3", "16x4+16x8", "16x16+16x8", "16x8+16x8", "16x8+"):
        with pytest.raises(ValueError, match="bands"):
            pages.Bands.parse(text)


def test_layout_and_pages_name_what_is_wrong(rng):
    with pytest.raises(ValueError, match="head_dim"):
        pages.PageLayout(pages.Bands.parse("16x8"), pages.Bands.parse("16x8"), 72, 64)
    with pytest.raises(ValueError, match="chunk"):
        pages.PageLayout(pages.Bands.parse("16x8"), pages.Bands.parse("16x8"), 64, 48)
    with pytest.raises(ValueError, match="v: expected a rank"):
        pages.PageLayout(pages.Bands.parse("16x8"), pages.Bands.parse("80x4"), 64, 64)
    good = pages_of(make_pages(rng, PageSpec("16x8", "32x4", 64, 64, 2, (70,))))
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for name, wrong, error in [
        ("k_pages", good.k_pages[..., :-1], ValueError),
        ("v_pages", good.v_pages[..., :-1], ValueError),
        ("skip", good.skip.long(), TypeError),
        ("k_basis", good.k_basis.float(), TypeError),
        ("v_scale", good.v_scale[:, :1], ValueError),
        ("segment_table", good.segment_table[:, :1], ValueError),
        ("lengths", good.lengths[:0], ValueError),
        ("page_table", "a string", TypeError),
    ]:
        with pytest.raises(error, match=name):
            pages.Pages(**{**fields, name: wrong})


def test_pages_hold_tensors_without_copies(rng):
    spec = PageSpec("16x8+16x4", "32x4", 64, 64, 2, (70, 1), segments=2)
    held = pages_of(make_pages(rng, spec))
    again = pages.Pages(**{name: getattr(held, name) for name in held.__dataclass_fields__})
    for name in ("k_pages", "v_pages", "skip", "k_basis", "k_scale", "v_basis", "v_scale", "page_table", "lengths"):
        assert getattr(again, name) is getattr(held, name)
    total = sum(
        getattr(held, name).numel() * getattr(held, name).element_size()
        for name in held.__dataclass_fields__
        if name != "layout"
    )
    assert held.nbytes == total and held.kv_heads == 2 and held.max_chunks == 3
    assert held.layout.token_bytes == 24 + 16


def test_allocate_pages():
    layout = pages.PageLayout(pages.Bands.parse("16x8"), pages.Bands.parse("32x4"), 80, 128)
    empty = pages.allocate_pages(layout, pages=3, segments=2, kv_heads=2, batch=4, max_chunks=5, device=DEVICE)
    assert tuple(empty.k_pages.shape) == (3, 2, 128 * 16) and tuple(empty.v_pages.shape) == (3, 2, 128 * 16)
    assert tuple(empty.page_table.shape) == (4, 5) and tuple(empty.v_basis.shape) == (2, 2, 32, 80)
    assert empty.lengths.tolist() == [0] * 4 and not empty.skip.any()

"""spectral_kernels/pages.py against reference/pages.py, and against bytes written down by hand."""

import numpy as np
import pytest
import torch

from reference import pages as oracle
from spectral_kernels import pages
from tests.cases import DEVICE, PageSpec, make_pages, pages_of, random_codes

BANDS = ["16x8", "32x4", "64x2", "48x16", "16x8+16x4+96x2", "16x8+48x4", "32x4+96x2", "16x8+16x2", "256x2"]


def test_a_row_by_hand():
    """16x8+16x4+16x2: 16 + 8 + 4 bytes, every one written down."""
    bands = pages.Bands.parse("16x8+16x4+16x2")
    eight = [0, 1, 127, 128, 129, 254, 255, 100, 0, 0, 0, 0, 0, 0, 0, 255]  # codes n
    four = [0, 1, 2, 3, 4, 5, 6, 7, 15, 14, 13, 12, 11, 10, 9, 8]
    two = [0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 1, 1, 3, 3, 3, 3]
    row = [
        # 8 bits: n - 128 in two's complement
        0x80, 0x81, 0xFF, 0x00, 0x01, 0x7E, 0x7F, 0xE4, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x7F,
        # 4 bits: components j and j + 8
        0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87,
        # 2 bits: components j, j + 4, j + 8, j + 12
        0b11_00_11_00, 0b11_00_10_01, 0b11_01_01_10, 0b11_01_00_11,
    ]  # fmt: skip
    values = [n - 127.5 for n in eight] + [n - 7.5 for n in four] + [n - 1.5 for n in two]
    packed = pages.pack_rows(torch.tensor([values], device=DEVICE), bands)
    assert bands.bytes == len(row) and bands.rank == 48
    assert packed.dtype == torch.uint8 and packed.tolist() == [row]
    assert pages.unpack_rows(packed, bands).tolist() == [values]
    assert oracle.pack_rows([values], bands.bands).tolist() == [row]
    assert oracle.unpack_rows([row], bands.bands).tolist() == [values]


def test_a_page_by_hand():
    """Where byte j of token d lies in each pool: K by tokens, V by bytes, 16-bit V by components of fp16."""
    bands = pages.Bands.parse("32x4")
    rows = torch.arange(32 * 16, dtype=torch.int32).reshape(1, 1, 32, 16).to(torch.uint8)  # [P, G, C, bytes]
    v = pages.v_pages_from_rows(rows, bands)
    assert tuple(v.shape) == (1, 1, 16, 32)
    assert all(v[0, 0, j, d] == rows[0, 0, d, j] for j in range(16) for d in range(32))
    torch.testing.assert_close(pages.v_rows(v, bands), rows)

    floats = pages.Bands.parse("16x16")
    values = torch.arange(32 * 16).reshape(1, 1, 32, 16).float()  # exact in fp16
    rows = pages.pack_rows(values, floats)
    assert rows[0, 0, 0, 2:6].tolist() == [0x00, 0x3C, 0x00, 0x40]  # 1.0 and 2.0, little-endian
    v = pages.v_pages_from_rows(rows, floats)
    as_fp16 = v.view(torch.float16).reshape(1, 1, 16, 32)
    torch.testing.assert_close(as_fp16.float(), values.mT)
    torch.testing.assert_close(pages.v_rows(v, floats), rows)


@pytest.mark.parametrize("text", BANDS)
def test_pack_and_unpack(rng, text):
    bands = pages.Bands.parse(text)
    # Steps of a quarter fall on both sides of every boundary; the scale sends a share past the ends of the range.
    values = np.round(rng.standard_normal((3, 40, bands.rank)) * 2.0 ** rng.integers(0, 9, bands.rank) * 4) / 4
    packed = pages.pack_rows(torch.from_numpy(values).to(DEVICE, torch.float32), bands)
    expected = oracle.pack_rows(values.astype(np.float32), bands.bands)
    np.testing.assert_array_equal(packed.cpu().numpy(), expected)
    unpacked = pages.unpack_rows(packed, bands)
    np.testing.assert_array_equal(unpacked.cpu().numpy(), oracle.unpack_rows(expected, bands.bands))
    assert unpacked.dtype == torch.float32


@pytest.mark.parametrize("text", BANDS)
def test_every_code_returns(rng, text):
    """unpack then pack is the identity on every code, and v_rows undoes v_pages_from_rows."""
    bands = pages.Bands.parse(text)
    rows = oracle.pack_codes(random_codes(rng, (2, 3, 64), bands.bands), bands.bands)
    tensor = torch.from_numpy(rows).to(DEVICE)
    torch.testing.assert_close(pages.pack_rows(pages.unpack_rows(tensor, bands), bands), tensor)
    v = pages.v_pages_from_rows(tensor, bands)
    np.testing.assert_array_equal(v.cpu().numpy(), oracle.v_page(rows, bands.bands))
    assert v.is_contiguous()
    torch.testing.assert_close(pages.v_rows(v, bands), tensor)
    np.testing.assert_array_equal(oracle.v_rows(oracle.v_page(rows, bands.bands), bands.bands), rows)


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
    padded = torch.zeros(1, 16, device=DEVICE)
    padded[0, : len(c)] = torch.from_numpy(c)
    got = pages.unpack_rows(pages.pack_rows(padded, bands), bands)[0, : len(c)].cpu().numpy()
    np.testing.assert_array_equal(got, n - (2**bits - 1) / 2)


def test_layouts_that_are_wrong_differ(rng):
    """Comparing bytes has teeth: neighbouring components in one byte, or the high bits first, are other bytes."""
    bands = ((32, 4),)
    codes = random_codes(rng, (4,), bands)
    rows = oracle.pack_codes(codes, bands)
    neighbours = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    high_first = (16 * codes[:, :16] + codes[:, 16:]).astype(np.uint8)
    assert (rows != neighbours).any() and (rows != high_first).any()
    unsigned = random_codes(rng, (4,), ((16, 8),))
    assert (oracle.pack_codes(unsigned, ((16, 8),)) != unsigned.astype(np.uint8)).all()


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
        ("v_pages", good.v_pages.mT, ValueError),
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
    assert tuple(empty.k_pages.shape) == (3, 2, 128, 16) and tuple(empty.v_pages.shape) == (3, 2, 16, 128)
    assert tuple(empty.page_table.shape) == (4, 5) and tuple(empty.v_basis.shape) == (2, 2, 32, 80)
    assert empty.lengths.tolist() == [0] * 4 and not empty.skip.any()

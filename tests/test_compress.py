"""spectral_kernels/compress.py against reference/compress.py."""

from typing import Any

import numpy as np
import pytest
import torch

from reference import compress as oracle
from reference import layout as layout_oracle
from reference import rope as rope_oracle
from reference import window as window_oracle
from reference.compress import PageArrays
from spectral_kernels import compress
from tests import budgets
from tests.cases import (
    DEVICE,
    DTYPES,
    F64,
    IMPLEMENTATIONS,
    PAGE,
    PageSpec,
    PageTensors,
    freqs_of,
    int32,
    is_slow,
    make_pages,
    operation,
    pages_of,
    poisoned,
    rounded,
    strided,
    swap_nibbles,
    to_numpy,
)

SIDES = ("k", "v")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# encode and append


def make_tokens(
    rng: np.random.Generator,
    arrays: PageArrays,
    news: list[int],
    dtype: torch.dtype,
    *,
    stride: str = "plain",
    width: int | None = None,
    exactly: bool = False,
) -> tuple[F64, torch.Tensor]:
    """x [B, G, T, D], left-padded with NaN: the newest news[b] tokens of each row; about 1 a
    dimension. exactly: in eighths, so that sums have no rounding."""
    width = max(news, default=0) if width is None else width
    shape = (len(news), arrays.k_pages.shape[1], width, arrays.codec.head_dim)
    x = rng.standard_normal(shape)
    if exactly:
        x = np.round(x * 4) / 4 + 0.125
    for b, new in enumerate(news):
        x[b, :, : width - new] = np.nan
    x = rounded(x, dtype)
    return to_numpy(x), strided(x, stride)


def codes_now(arrays: PageArrays, tensors: PageTensors, side: str) -> np.ndarray:
    """Codes [P, G, 64, R] of all pages as the tensors hold them; whatever a page's spare bits
    hold."""
    return layout_oracle.unpack_codes(
        tensors.pages(side).cpu().numpy(), arrays.codec.bands(side), side
    )


def check_codes(
    arrays: PageArrays,
    tensors: PageTensors,
    x: F64,
    news: list[int],
    side: str,
    dtype: torch.dtype,
    before: np.ndarray,
) -> None:
    """New tokens' codes are those of coefficients within their budget; all other codes are as
    before."""
    codes, bands = codes_now(arrays, tensors, side), arrays.codec.bands(side)
    untouched = np.ones(codes.shape[:3], bool)
    for b, new in enumerate(news):
        length, row = int(arrays.seq_lens[b]), int(arrays.rows[b])
        at = np.arange(length - new, length)
        pages = arrays.block_table[b, at // PAGE]
        own = x[b, :, x.shape[2] - new :]
        exact = oracle.coefficients(own, at, arrays.codec, row, side)
        off = budgets.coefficients(own, exact, arrays.codec, row, side, dtype)
        got = np.swapaxes(codes[pages, :, at % PAGE], 0, 1)  # [G, new, R]
        low, high = (layout_oracle.codes_of(exact + sign * off, bands) for sign in (-1, 1))
        wrong = (got < low) | (got > high)
        assert not wrong.any(), f"{side}: codes of row {b}, first (g, t, r) {np.argwhere(wrong)[0]}"
        untouched[pages, :, at % PAGE] = False
    np.testing.assert_array_equal(
        codes[untouched], before[untouched], err_msg="codes of other tokens"
    )


def check_slots(
    exact: torch.Tensor, arrays: PageArrays, x: F64, news: list[int], ids: np.ndarray, sinks: int
) -> None:
    """Slots hold the row's sinks and the newest of its ring, as far as they are new; others are as
    they were: NaN."""
    slots = to_numpy(exact)
    wanted = np.full(slots.shape, np.nan)
    ring = slots.shape[2] - sinks
    for b, new in enumerate(news):
        length = int(arrays.seq_lens[b])
        for slot, holder in enumerate(window_oracle.holders(length, sinks, ring)):
            if holder >= length - new:
                wanted[ids[b], :, slot] = x[b, :, x.shape[2] - (length - holder)]
    np.testing.assert_array_equal(slots, wanted)


def check_encode(
    implementation: str,
    rng: np.random.Generator,
    spec: PageSpec,
    news: list[int],
    dtype: torch.dtype,
    side: str,
    *,
    stride: str = "plain",
    sinks: int = 0,
    ring: int = 0,
    shared: bool = True,
) -> None:
    """Encode the newest news[b] of spec.lengths[b] tokens; the others are there already."""
    arrays = make_pages(rng, spec)
    tensors = pages_of(arrays, shared=shared)
    x, tensor = make_tokens(rng, arrays, news, dtype, stride=stride)
    batch, groups, width, dim = x.shape
    before, pool = codes_now(arrays, tensors, side), tensors.pool.clone()
    options: dict[str, Any] = {"codec_ids": tensors.codec_ids}
    if len(set(news)) > 1:
        options["first"] = int32(width - np.array(news))
    ids = rng.permutation(batch + 1)[:batch]
    exact = strided(poisoned(batch + 1, groups, sinks + ring, dim, dtype=dtype), "padded")
    if sinks + ring:
        options |= {"exact": exact, "sinks": sinks, "seq_ids": int32(ids)}
    run = operation(compress, "encode", implementation, dtype)
    done = run(
        tensor, tensors.codec, tensors.pages(side), tensors.block_table, tensors.seq_lens,
        side=side, **options,
    )  # fmt: skip
    assert done is None
    check_codes(arrays, tensors, x, news, side, dtype, before)
    if sinks + ring:
        check_slots(exact, arrays, x, news, ids, sinks)
    if shared:  # the other side's bytes and the gaps
        tensors.pages(side).zero_()
        changed = tensors.pool.clone()
        mask = pages_of(arrays).pool
        mask.zero_()
        view = mask[..., : tensors.k_pages.shape[-1]]
        if side == "v":
            start = tensors.v_pages.storage_offset()
            view = mask[..., start : start + tensors.v_pages.shape[-1]]
        view.fill_(1)
        assert torch.equal(changed[mask == 0], pool[mask == 0])


ENCODE_CASES = [
    # K bands, V bands, D, rotary_dim, frame, G, lengths, new, rows of the codec, dtype, strides,
    # (sinks, ring)
    (
        "16x8+16x4+32x2",
        "32x4+32x2",
        64,
        64,
        64,
        2,
        (130, 64, 0),
        (130, 64, 0),
        2,
        F16,
        "swapped",
        (4, 16),
    ),
    ("48x4", "16x8+64x4", 80, 40, 512, 1, (100, 70), (40, 5), 0, F32, "odd", (0, 0)),
    ("16x8+16x2", "96x4", 96, 96, 128, 1, (129,), (2,), 1, F32, "plain", (0, 16)),
    ("16x8+16x4+96x2", "64x4+64x2", 128, 128, 64, 1, (190,), (64,), 0, BF16, "swapped", (4, 32)),
    ("16x8+48x2", "64x2", 256, 64, 64, 1, (66, 1), (3, 1), 2, F16, "padded", (2, 4)),
    ("128x8", "128x8", 64, 64, 64, 1, (65,), (65,), 0, F32, "plain", (0, 0)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", ENCODE_CASES, ids=lambda c: f"{c[0]}-{c[1]}-D{c[2]}")
def test_encode(rng, implementation, side, case):
    k, v, dim, rotary, frame, groups, lengths, news, codecs, dtype, stride, (sinks, ring) = case
    spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
    check_encode(
        implementation, rng, spec, list(news), dtype, side, stride=stride, sinks=sinks, ring=ring,
        shared=codecs != 1,
    )  # fmt: skip


def check_append(
    implementation: str,
    rng: np.random.Generator,
    spec: PageSpec,
    queries: int,
    dtype: torch.dtype,
    *,
    stride: str = "plain",
    sinks: int = 4,
    ring: int = 8,
) -> None:
    """Append the newest Q tokens of each row, both sides; a row shorter than Q takes as many as it
    has."""
    arrays = make_pages(rng, spec)
    tensors = pages_of(arrays)
    news = [min(queries, length) for length in spec.lengths]
    inputs = [make_tokens(rng, arrays, news, dtype, stride=stride, width=queries) for _ in SIDES]
    before = [codes_now(arrays, tensors, side) for side in SIDES]
    batch, groups, _, dim = inputs[0][0].shape
    ids = rng.permutation(batch + 1)[:batch]
    shape = (batch + 1, groups, sinks + ring, dim)
    exact = [strided(poisoned(*shape, dtype=dtype), pattern) for pattern in ("padded", "plain")]
    run = operation(compress, "append", implementation, dtype)
    done = run(
        inputs[0][1], inputs[1][1], tensors.codec, tensors.k_pages, tensors.v_pages, *exact,
        tensors.block_table, tensors.seq_lens,
        sinks=sinks, codec_ids=tensors.codec_ids, seq_ids=int32(ids),
    )  # fmt: skip
    assert done is None
    for i, side in enumerate(SIDES):
        check_codes(arrays, tensors, inputs[i][0], news, side, dtype, before[i])
        check_slots(exact[i], arrays, inputs[i][0], news, ids, sinks)


APPEND_CASES = [
    # K bands, V bands, D, rotary_dim, frame, G, lengths, Q, rows of the codec, dtype, strides,
    # (sinks, ring)
    (
        "16x8+16x4+32x2",
        "32x4+32x2",
        64,
        64,
        64,
        2,
        (130, 65, 64, 1, 0),
        1,
        2,
        F16,
        "swapped",
        (4, 16),
    ),
    ("48x4", "16x8+64x4", 80, 40, 512, 1, (100, 66, 2), 4, 0, F32, "odd", (0, 8)),
    ("16x8+16x2", "96x4", 96, 96, 128, 1, (129, 3), 2, 1, F32, "plain", (4, 4)),
    ("16x8+16x4+96x2", "64x4+64x2", 128, 128, 64, 1, (190,), 3, 0, BF16, "swapped", (4, 32)),
    ("16x8+240x2", "256x2", 256, 64, 64, 1, (66, 1), 1, 2, F16, "padded", (2, 4)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", APPEND_CASES, ids=lambda c: f"{c[0]}-{c[1]}-D{c[2]}-Q{c[7]}")
def test_append(rng, implementation, case):
    k, v, dim, rotary, frame, groups, lengths, queries, codecs, dtype, stride, (sinks, ring) = case
    spec = PageSpec(k, v, dim, groups, lengths, frame, rotary, codecs=codecs)
    check_append(implementation, rng, spec, queries, dtype, stride=stride, sinks=sinks, ring=ring)


def make_exact_codec(rng: np.random.Generator, arrays: PageArrays) -> None:
    """In place: encoders of powers of two, offsets in eighths, quarter turns a frame: no sum
    rounds, so that every way to add up gives the same code. Frequencies are counts of 2**-64 turns:
    2**53 m times 512 is a quarter turn times m."""
    codec = arrays.codec
    for name in ("k_encoder", "v_encoder"):
        encoder = getattr(codec, name)
        sign = rng.choice([-1.0, 0.0, 0.0, 0.0, 1.0], encoder.shape)
        encoder[:] = sign * 2.0 ** rng.integers(-2, 2, encoder.shape)
    codec.k_offset[:] = rng.integers(-8, 9, codec.k_offset.shape) / 8


def quarter_turns(
    pairs: int, rng: np.random.Generator, frame: int
) -> tuple[np.ndarray, torch.Tensor]:
    """(radians a position, freqs) of frequencies that turn by whole quarters in a frame."""
    quarters = rng.integers(0, 4, pairs)
    freqs = torch.from_numpy(quarters * (2**62 // frame)).to(DEVICE, torch.int64)
    return quarters * (np.pi / 2 / frame), freqs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", ["16x8+16x4+32x2", "48x4", "16x8+48x4", "16x2"])
def test_encode_is_append_one_by_one(rng, implementation, text):
    """Byte for byte, pages and slots, and both are the oracle's bytes: where no sum rounds there is
    one answer."""
    slow, groups = is_slow(implementation), 1 if is_slow(implementation) else 2
    frame, sinks, ring, length = 64, 3, 8, 69 if slow else 134
    first = 58 if slow else 0  # tokens that are encoded before the comparison begins
    spec = PageSpec(text, "32x4+16x2", 64, groups, (length,), frame, codecs=2)
    arrays = make_pages(rng, spec, blank=True)
    make_exact_codec(rng, arrays)
    inv_freq, freqs = quarter_turns(32, rng, frame)
    arrays.codec.inv_freq = inv_freq.astype(np.float64)
    k, v = (make_tokens(rng, arrays, [length], F16, exactly=True) for _ in SIDES)
    results = []
    for way in ("at once", "in two", "one by one", "by threes"):
        tensors = pages_of(arrays)
        codec = tensors.codec
        codec = type(codec)(**{**vars(codec), "freqs": freqs})
        exact = [poisoned(1, groups, sinks + ring, 64, dtype=F16) for _ in SIDES]

        def encode(begin: int, end: int, tensors=tensors, codec=codec, exact=exact) -> None:
            run = operation(compress, "encode", implementation)
            for i, (x, side) in enumerate(zip((k, v), SIDES, strict=True)):
                run(
                    x[1][:, :, begin:end], codec, tensors.pages(side), tensors.block_table,
                    int32(np.array([end])), side=side, exact=exact[i], sinks=sinks,
                    codec_ids=tensors.codec_ids,
                )  # fmt: skip

        if way == "at once":
            encode(0, length)
        elif way == "in two":
            encode(0, 37)
            encode(37, length)
        else:
            encode(0, first)
            step = 1 if way == "one by one" else 3
            run = operation(compress, "append", implementation)
            for end in range(first + step, length + step, step):
                end = min(end, length)
                part = slice(max(first, end - step), end)
                run(
                    k[1][:, :, part], v[1][:, :, part], codec, tensors.k_pages, tensors.v_pages,
                    *exact, tensors.block_table, int32(np.array([end])),
                    sinks=sinks, codec_ids=tensors.codec_ids,
                )  # fmt: skip
        results.append((way, tensors.pool.clone(), [x.nan_to_num(77.0) for x in exact]))
    for way, pool, exact in results[1:]:
        assert torch.equal(pool, results[0][1]), f"pages: {way}"
        assert all(torch.equal(a, b) for a, b in zip(exact, results[0][2], strict=True)), (
            f"slots: {way}"
        )
    for (x, _), side in zip((k, v), SIDES, strict=True):
        exact_c = oracle.coefficients(
            x[0], np.arange(length), arrays.codec, int(arrays.rows[0]), side
        )
        exact_c = np.round(exact_c, 9)  # quarter turns by cos(pi / 2) = 6e-17
        bands = arrays.codec.bands(side)
        wanted = layout_oracle.codes_of(exact_c, bands)
        tensors = pages_of(arrays)
        tensors.pool.copy_(results[0][1])
        got = layout_oracle.codes_by_position(
            tensors.pages(side).cpu().numpy(), arrays.block_table[0], length, bands, side
        )
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_encode_nothing(rng, implementation):
    """No tokens, or rows that have none: no byte changes."""
    for lengths, width in (((0, 0), 3), ((70, 5), 0)):
        arrays = make_pages(rng, PageSpec("16x8", "32x4", 64, 1, lengths))
        tensors = pages_of(arrays)
        before = tensors.pool.clone()
        x = poisoned(2, 1, width, 64)
        run = operation(compress, "encode", implementation)
        for side in SIDES:
            run(
                x, tensors.codec, tensors.pages(side), tensors.block_table, tensors.seq_lens,
                side=side, first=int32(np.array([width, width])),
            )  # fmt: skip
        exact = poisoned(2, 1, 8, 64)
        operation(compress, "append", implementation)(
            x, x, tensors.codec, tensors.k_pages, tensors.v_pages, exact, exact,
            tensors.block_table, int32(np.zeros(2)), sinks=4,
        )  # fmt: skip
        assert torch.equal(tensors.pool, before) and exact.isnan().all()


def test_codes_have_teeth(rng):
    """Intervals of codes turn down what an encoder is prone to get wrong."""
    spec = PageSpec("16x8+16x4+16x2", "16x8+16x4", 64, 2, (150,), 64, codecs=2)
    arrays = make_pages(rng, spec)
    codec, row, at = arrays.codec, int(arrays.rows[0]), np.arange(150)
    other = (
        ({0, 1, 2} - {row}).intersection(np.flatnonzero(np.isfinite(codec.k_scale[:, 0, 0]))).pop()
    )
    x, _ = make_tokens(rng, arrays, [150], F16)
    x = x[0]

    def outside(side: str, **changed: Any) -> float:
        """Share of components whose code is not one of the allowed ones."""
        options = {"x": x, "at": at, "row": row} | changed
        exact = oracle.coefficients(x, at, codec, row, side)
        off = budgets.coefficients(x, exact, codec, row, side, F16)
        bands = codec.bands(side)
        low, high = (layout_oracle.codes_of(exact + sign * off, bands) for sign in (-1, 1))
        if "codes" in options:
            got = options["codes"](layout_oracle.codes_of(exact, bands))
        else:
            wrong = oracle.coefficients(options["x"], options["at"], codec, options["row"], side)
            got = layout_oracle.codes_of(wrong + options.get("add", 0.0), bands)
        return float(((got < low) | (got > high)).mean())

    assert outside("k") == outside("v") == 0.0
    offset = codec.k_offset[row][:, None].astype(np.float64)
    forward = rope_oracle.rotate(
        x, 2 * (at // 64 * 64), codec.inv_freq
    )  # turned forward instead of back
    later = np.arange(150) >= 64
    cosine = (x + forward) / 2
    for mistake, changed in {
        "not turned": {"at": at % 64},
        "turned forward": {"x": forward},
        "turned back by the position": {"x": rope_oracle.rotate(x, -(at % 64), codec.inv_freq)},
        "turned twice": {"x": rope_oracle.turn_back(x, at, codec.inv_freq, 64)},
        "cosine only": {"x": np.where(later[:, None], cosine, x)},
        "the next frame": {"at": at + 64},
        "the frame begins a token early": {"at": at + 1},
        "no mean": {"add": offset},
        "the mean twice": {"add": -offset},
        "the neighbouring row of the codec": {"row": other},
        "the other head": {"codes": lambda c: c[::-1]},
        "the next token": {"codes": lambda c: np.roll(c, 1, 1)},
        "shifted components": {"codes": lambda c: np.roll(c, 1, -1)},
        "rounded to nearest": {"add": 0.5},
        "one code low": {"codes": lambda c: np.maximum(c - 1, 0)},
        "zeros": {"codes": np.zeros_like},
    }.items():
        assert outside("k", **changed) > (1e-3 if "early" in mistake else 0.05), mistake
    for mistake, changed in {
        "turned like keys": {"x": rope_oracle.turn_back(x, at, codec.inv_freq, 64)},
        "the neighbouring row of the codec": {"row": other},
        "rounded to nearest": {"add": 0.5},
        "the other head": {"codes": lambda c: c[::-1]},
    }.items():
        assert outside("v", **changed) > 0.05, mistake


# decode


def decode_oracle(arrays: PageArrays, side: str) -> tuple[F64, F64]:
    """(tokens by position [B, G, max_pages * 64, D], budget); nothing is allowed from a row's
    length on."""
    batch, width = arrays.block_table.shape
    shape = (batch, arrays.k_pages.shape[1], width * PAGE, arrays.codec.head_dim)
    expected, budget = np.zeros((2, *shape))
    for b in range(batch):
        length = int(arrays.seq_lens[b])
        expected[b, :, :length] = oracle.rebuild(arrays, b, side)
        budget[b, :, :length] = budgets.decode(arrays, b, side, expected[b, :, :length])
    return expected, budget


def check_decode(
    implementation: str, arrays: PageArrays, side: str, *, shared: bool = True
) -> None:
    tensors = pages_of(arrays, shared=shared)
    run = operation(compress, "decode", implementation)
    got = run(
        tensors.pages(side), tensors.codec, tensors.block_table, tensors.seq_lens,
        side=side, codec_ids=tensors.codec_ids,
    )  # fmt: skip
    assert got.dtype == torch.float32 and got.is_contiguous()
    budgets.check(got, *decode_oracle(arrays, side))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "spec",
    [
        PageSpec("16x8+16x4+32x2", "32x4+32x2", 64, 2, (0, 1, 130), 64, codecs=2),
        PageSpec("48x4", "16x8+64x4", 80, 1, (64, 3), 512, 40),
        PageSpec("16x8+16x4+96x2", "64x4+64x2", 128, 1, (129,), 128, codecs=1, spare_pages=0),
        PageSpec("16x8+240x2", "256x2", 256, 1, (65,), 64, 64),
        PageSpec("128x8", "128x8", 64, 1, (70,), 64),
        PageSpec("16x8", "16x8", 96, 1, (0,), spare_pages=0),
    ],
    ids=lambda s: f"{s.k_bands}-{s.v_bands}-D{s.head_dim}",
)
def test_decode(rng, implementation, side, spec):
    check_decode(implementation, make_pages(rng, spec), side, shared=spec.codecs != 1)


def test_decode_past_a_frame_of_512(rng):
    """The default frame, in the twin (in the interpreter it takes seconds): 9 pages, the last in
    the second frame."""
    implementation = "torch" if DEVICE.type == "cpu" else "triton"
    check_decode(implementation, make_pages(rng, PageSpec("16x8", "16x8", 64, 1, (513,))), "k")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", SIDES)
def test_decode_from_a_page_on(rng, implementation, side):
    """The last pages of every row alone, in other frames: the same bits as with those before."""
    spec = PageSpec("16x8+16x4", "32x4", 64, 2, (200, 150, 70), 64)
    t = pages_of(make_pages(rng, spec))
    decode, pages = operation(compress, "decode", implementation), t.pages(side)
    whole = decode(pages, t.codec, t.block_table, t.seq_lens, side=side)
    first = torch.tensor([2, 1, 0], dtype=torch.int32, device=whole.device)
    column = (first[:, None] + torch.arange(2, device=whole.device)).long()
    table = t.block_table.gather(1, column)
    got = decode(pages, t.codec, table, t.seq_lens, side=side, first_page=first)
    for row, start in enumerate((128, 64, 0)):
        assert torch.equal(got[row], whole[row, :, start : start + 128])


def test_decode_budget_has_teeth(rng):
    spec = PageSpec("16x8+32x4+16x2", "32x4+32x2", 64, 2, (150,), 64, spare_pages=0, codecs=2)
    arrays = make_pages(rng, spec)
    row = int(arrays.rows[0])
    other = np.array(
        [next(r for r in range(3) if r != row and np.isfinite(arrays.codec.k_scale[r, 0, 0]))]
    )

    def changed(side: str, codec: dict[str, Any] | None = None, **fields: Any) -> F64:
        new_codec = oracle.CodecArrays(**{**vars(arrays.codec), **(codec or {})})
        pages = PageArrays(**{**vars(arrays), **fields, "codec": new_codec})
        return decode_oracle(pages, side)[0]

    nibbles = arrays.k_pages.copy()
    swap_nibbles(nibbles, 16)
    for side in SIDES:
        expected, budget = decode_oracle(arrays, side)
        scale = getattr(arrays.codec, f"{side}_scale")
        mutants = {
            "zeros": np.zeros_like(expected),
            "shifted scales": changed(side, {f"{side}_scale": np.roll(scale, 1, -1)}),
            "the neighbouring row of the codec": changed(side, rows=other),
            "pages exchanged": changed(side, block_table=arrays.block_table[:, [1, 0, 2]]),
            "the other head": expected[:, ::-1],
            "the next token": np.roll(expected, 1, 2),
            "one token too few": changed(side, seq_lens=arrays.seq_lens - 1),
        }
        if side == "k":
            aligned = rope_oracle.turn_back(expected, np.arange(192), arrays.codec.inv_freq, 64)
            backward = rope_oracle.turn_back(aligned, np.arange(192), arrays.codec.inv_freq, 64)
            mutants |= {
                "no mean": changed(side, {"k_mean": np.zeros_like(arrays.codec.k_mean)}),
                "left turned back": aligned,
                "turned back twice": backward,
                "cosine only": (expected + backward) / 2,
                "frames of another length": changed(side, {"frame": 128}),
                "turned by the position": rope_oracle.rotate(
                    aligned, np.arange(192), arrays.codec.inv_freq
                ),
                "swapped nibbles": changed(side, k_pages=nibbles),
            }
        for mistake, mutant in mutants.items():
            got = np.zeros_like(expected)
            got[:, :, : mutant.shape[2]] = mutant
            budgets.check_rejects(got, expected, budget + 1e-30, f"{mistake}, {side}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_encode_then_decode_is_within_half_a_step(rng, implementation):
    """With an orthonormal basis of full rank what returns is off by half a step a component at
    most: keys as rotated."""
    dim, length, frame = 64, 70, 64
    spec = PageSpec("64x8", "64x8", dim, 1, (length,), frame)
    arrays = make_pages(rng, spec, blank=True)
    step = 1 / 16
    for side in SIDES:
        # A signed permutation in integers of 64: exact, and its rows are orthonormal.
        permutation = np.eye(dim)[rng.permutation(dim)] * rng.choice([-1, 1], dim)
        getattr(arrays.codec, f"{side}_basis")[0, 0] = 64 * permutation
        getattr(arrays.codec, f"{side}_scale")[0, 0] = step / 64
        getattr(arrays.codec, f"{side}_encoder")[0, 0] = permutation.T / step
    mean = arrays.codec.k_mean[0].astype(np.float64)
    arrays.codec.k_offset[0] = np.einsum("gd,gdr->gr", mean, arrays.codec.k_encoder[0])
    tensors = pages_of(arrays)
    for side in SIDES:
        x, tensor = make_tokens(rng, arrays, [length], F32)
        args = tensors.codec, tensors.pages(side), tensors.block_table, tensors.seq_lens
        operation(compress, "encode", implementation)(tensor, *args, side=side)
        codec, pages, table, lens = args
        got = to_numpy(
            operation(compress, "decode", implementation)(pages, codec, table, lens, side=side)
        )
        wide = (
            np.sqrt(2) if side == "k" else 1.0
        )  # turned, an error of half a step in each of a pair
        assert np.abs(got[:, :, :length] - x).max() <= wide * step / 2 + 1e-5


@pytest.mark.parametrize("name", ["encode", "append", "decode"])
def test_same_inputs_give_the_same_bits(rng, name):
    arrays = make_pages(rng, PageSpec("16x8+16x4", "48x4", 64, 1, (70,), 64))
    x = rounded(rng.standard_normal((1, 1, 3, 64)), F32).to(DEVICE)
    found = []
    for _ in range(2):
        tensors = pages_of(arrays)
        exact = torch.zeros(1, 1, 8, 64, device=DEVICE)
        run = operation(compress, name, "triton")
        if name == "append":
            run(
                x, x, tensors.codec, tensors.k_pages, tensors.v_pages, exact, exact,
                tensors.block_table, tensors.seq_lens, sinks=2,
            )  # fmt: skip
        else:
            args = tensors.codec, tensors.k_pages, tensors.block_table, tensors.seq_lens
            if name == "encode":
                run(x, *args, side="k")
            else:
                exact = run(args[1], args[0], *args[2:], side="k")
        found.append((tensors.pool, exact))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dispatch_on_cpu_is_the_twin(rng, dtype):
    """Without kernels() a launcher gives its twin's bits for CPU tensors."""
    if DEVICE.type != "cpu":
        pytest.skip("there is a GPU: launchers run kernels")
    arrays = make_pages(rng, PageSpec("16x8", "32x4", 64, 1, (70,), 64))
    x = rounded(rng.standard_normal((1, 1, 70, 64)), dtype)
    pools = []
    for encode, decode in (
        (compress.encode, compress.decode),
        (compress.encode_torch, compress.decode_torch),
    ):
        tensors = pages_of(arrays)
        encode(x, tensors.codec, tensors.k_pages, tensors.block_table, tensors.seq_lens, side="k")
        pools.append(tensors.pool)
        pools.append(
            decode(tensors.k_pages, tensors.codec, tensors.block_table, tensors.seq_lens, side="k")
        )
    assert torch.equal(pools[0], pools[2]) and torch.equal(pools[1], pools[3])
    assert torch.equal(freqs_of(arrays.codec.inv_freq), tensors.codec.freqs)

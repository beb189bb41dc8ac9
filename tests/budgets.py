"""How far a result may lie from the float64 oracle: derived elementwise from the arithmetic, never
found by trial.

Every budget is  u_out * |oracle|  +  depth * u_acc * magnitude,  where the magnitude is the sum of
the absolute values of what is added up and each depth says which roundings it counts. What a low
rank or a quantiser loses is no part of it: the oracle gets the same codes and bases.

    U[dtype]      unit roundoff: the largest relative error of rounding to nearest
    ANGLE         radians: how far a rotation may be off (the contract: 1e-6 at any position).
                  Derived: up to half a turn rounds to float32, its product and the constant once
                  more, 0.5e-6; cosine and sine are good to 2**-22 each
    PRODUCT       relative error of a product of float32 numbers taken as three tf32 products:
                  11 + 10 bits are kept
    EXP, LOG      error of exp relative to it, and of log absolutely: the GPU's ex2 and lg2 units
                  are good to 2**-22; the factors log2(e) and ln(2) round once more
    SPLIT         256 hi + lo = round(32512 x / max): half a unit, relative to the largest. Of the
                  query turned back (its longest pair: one unit for all frames), of the projected
                  query u (components of fields that lie 2**low above a byte's lowest bit count
                  2**-low: their stored integers are that much larger), and of the weights (those
                  of two pages)
    TILE          tokens whose products are added at once: a page
    PAIR          tokens that share one such largest weight, at most: two pages
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from reference import compress as compress_oracle
from reference import layout as layout_oracle
from reference import rope as rope_oracle
from reference.attention import State
from reference.compress import CodecArrays, PageArrays

F64 = NDArray[np.float64]

U = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SMALLEST = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
    torch.float32: 2.0**-150,
}  # half a subnormal step
ACC = U[torch.float32]
ANGLE = 1e-6
PRODUCT = 2.0**-20
EXP = 2.0**-21
LOG = 2.0**-21
SPLIT = 1 / (2 * 127 * 256)
TILE = 64
PAIR = 2 * TILE


def outside(actual: ArrayLike | torch.Tensor, expected: ArrayLike, budget: ArrayLike) -> float:
    """The largest error in units of its budget (NaN counts as infinite): at most 1 passes."""
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().double().cpu().numpy()
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    budget = np.asarray(budget, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape: expected {expected.shape}, got {actual.shape}")
    if actual.size == 0:
        return 0.0
    if not np.isfinite(np.broadcast_to(budget, expected.shape)).all():
        raise AssertionError("a budget that is not finite accepts anything")
    same = actual == expected  # infinities of one sign among them
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(same, 0.0, np.abs(actual - expected) / budget)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())


def check(
    actual: ArrayLike | torch.Tensor, expected: ArrayLike, budget: ArrayLike, what: str = "result"
) -> None:
    """Fail unless every element lies within its budget."""
    worst = outside(actual, expected, budget)
    assert worst <= 1, f"{what}: {worst:.3g} times the budget"


def check_rejects(
    mutant: ArrayLike | torch.Tensor, expected: ArrayLike, budget: ArrayLike, mistake: str
) -> None:
    """Fail unless the budget turns the mistake down, and not by a hair."""
    worst = outside(mutant, expected, budget)
    assert worst > 2, f"the budget accepts '{mistake}' ({worst:.3g} times the budget)"


def rounding(value: ArrayLike, dtype: torch.dtype) -> F64:
    """Of storing `value` in `dtype`."""
    return U[dtype] * np.abs(value) + SMALLEST[dtype]


# rope.py


def rotate(x: ArrayLike, expected: ArrayLike, inv_freq: ArrayLike, dtype: torch.dtype) -> F64:
    """x [..., D] turned: two products and a sum (3 roundings) of cosine and sine with an angle
    error, then the output's.

    Dimensions that do not turn are copied: nothing is allowed there.
    """
    n = 2 * len(np.asarray(inv_freq))
    budget = np.zeros(np.shape(x))
    size = rope_oracle.pair_magnitude(x, inv_freq)[..., :n]
    budget[..., :n] = (
        rounding(np.asarray(expected)[..., :n], dtype) + (1 + U[dtype]) * (ANGLE + 3 * ACC) * size
    )
    return budget


def projection(dim: int, turns: int = 1) -> float:
    """Relative to sum_d |basis_d| |q_d|: turning (angle, 3 roundings) as often as `turns`, D
    products added, k_scale, softmax scale and log2(e)."""
    return turns * (ANGLE + 3 * ACC) + PRODUCT + (dim + 4) * ACC


def projection_magnitude(q: ArrayLike, codec: CodecArrays, rows: ArrayLike) -> tuple[F64, F64]:
    """(|k_scale_r| sum_d |basis_rd| |q_d| [B, H, Q, R], sum_d |mean_d| |q_d| [B, H, Q]), with |q|
    the pairs' lengths."""
    size = rope_oracle.pair_magnitude(q, codec.inv_freq)  # [B, H, Q, D]
    vectors, means = np.abs(codec.vectors("k")), np.abs(np.asarray(codec.k_mean, np.float64))
    batch, heads, queries, _ = size.shape
    groups, rank = vectors.shape[1:3]
    u, bias = np.zeros((batch, heads, queries, rank)), np.zeros((batch, heads, queries))
    for b, h in np.ndindex(batch, heads):
        row, g = int(np.asarray(rows)[b]), h // (heads // groups)
        u[b, h] = size[b, h] @ vectors[row, g].T
        bias[b, h] = size[b, h] @ means[row, g]
    return u, bias


def project_queries(q: ArrayLike, codec: CodecArrays, rows: ArrayLike) -> tuple[F64, F64]:
    """Of u [B, H, Q, 1, R] and bias [B, H, Q, 1]: the same in every frame."""
    u, bias = projection_magnitude(q, codec, rows)
    return tuple(
        projection(codec.head_dim) * x[:, :, :, None] + SMALLEST[torch.float32] for x in (u, bias)
    )


# attention.py


def state(expected: State, score_error: F64, o_error: F64) -> tuple[F64, F64]:
    """(of o, of lse) when each score is off by at most score_error [B, H, Q, T], and o by o_error
    [B, H, Q, D] besides.

    With scores s_t + e_t:  o' - o = sum_t w_t (exp(e_t) - 1) (v_t - o) / sum_t w_t exp(e_t)   and
    lse' - lse = log sum_t w_t exp(e_t). The exp itself adds EXP to e_t; the difference of score and
    maximum rounds,
    and so do the changes of base (4 roundings of numbers up to |score| + |lse|).
    """
    weights, group = expected.weights, expected.scores.shape[1] // expected.values.shape[1]
    seen = np.isfinite(expected.scores)
    lse = np.where(np.isfinite(expected.lse), expected.lse, 0.0)
    size = np.where(
        seen, np.abs(np.where(seen, expected.scores, 0.0)) + np.abs(lse)[..., None], 0.0
    )
    error = np.where(seen, score_error, 0.0) + EXP + 4 * ACC * size
    # w_t (exp(e_t) - 1) from the logarithm of w_t: where scores are 1e7, w_t underflows though e_t
    # could lift it to 1.
    log_weights = np.where(seen, np.where(seen, expected.scores, 0.0) - lse[..., None], -np.inf)
    grown = np.where(
        error < 1.0,
        weights * np.expm1(np.minimum(error, 1.0)),
        np.exp(np.minimum(log_weights + error, 300.0)),
    )
    # log sum_t w_t exp(e_t), shifted by the largest e_t: scores of 1e7 may be off by more than exp
    # can hold.
    most = np.where(seen, error, 0.0).max(-1, initial=0.0)
    total = np.exp(log_weights + np.where(seen, error, 0.0) - most[..., None]).sum(-1)
    drift = most + np.log(np.where(total > 0.0, total, 1.0))
    o_budget = np.zeros(expected.o.shape)
    for b, h, m in np.ndindex(*expected.lse.shape):
        if not seen[b, h, m].any():
            continue
        own = seen[b, h, m]
        spread = np.abs(expected.values[b, h // group][own] - expected.o[b, h, m])  # [T, D]
        off = grown[b, h, m][own] @ spread * np.exp(min(drift[b, h, m], 300.0))
        o_budget[b, h, m] = np.minimum(
            off, spread.max(0)
        )  # whatever the weights, o' lies among the values
    # l is summed and divided by: as many roundings as tokens are added one by one at worst (a tree
    # needs fewer).
    adds = min(expected.scores.shape[-1], 2 * TILE) + 8
    o_budget += o_error + adds * ACC * (expected.magnitude + np.abs(expected.o))
    # Weights taken as exp(score - lse) with a rounded lse do not quite add up to 1.
    o_budget += 2 * ACC * np.abs(lse)[..., None] * expected.magnitude
    lse_budget = drift + LOG + adds * ACC + 3 * ACC * np.abs(lse)
    empty = ~np.isfinite(expected.lse)
    return np.where(empty[..., None], 0.0, o_budget), np.where(empty, 0.0, lse_budget)


def stored_offsets(bands: layout_oracle.Bands) -> F64:
    """What a kernel adds to the stored code to get the value, [R]: a byte's top field is stored in
    two's complement."""
    offsets = []
    for group in layout_oracle.groups_of(bands):
        for i, bits in enumerate(group):
            top = sum(group[: i + 1]) == 8
            offsets += 16 * [0.5 if top else 0.5 - 2.0 ** (bits - 1)]
    return np.array(offsets)


def field_weights(bands: layout_oracle.Bands) -> F64:
    """2**(lowest bit of a component's field in its byte), [R]."""
    groups = layout_oracle.groups_of(bands)
    return np.array([2.0 ** sum(g[:i]) for g in groups for i in range(len(g)) for _ in range(16)])


def attend_spectral(
    q: ArrayLike,
    expected: State,
    pages: PageArrays,
    u: tuple[F64, F64],
    *,
    scale: float | None = None,
    integer: bool = True,
) -> tuple[F64, F64]:
    """(of o, of lse). u: the oracle's projected queries and biases. integer: int8 hi + lo operands.

    Scores: the projected query's own error, through |code|, that of the bias, and the split of the
    turned query before it is projected; the split of u; float32 sums of the stored integers and of
    their offsets (hi + lo/254, the step, the bias, and a rank-long sum where operands are floats).
    Output: the split of the weights, relative to the largest of a tile; the coefficients' float32
    sums over tiles and splits, and the product with the V basis (rank-long).
    """
    codec, (u, bias) = pages.codec, u
    batch, heads, _, tokens = expected.scores.shape
    groups, dim = pages.k_pages.shape[1], codec.head_dim
    group = heads // groups
    scale = dim**-0.5 if scale is None else scale
    k_rank, v_rank = codec.k_basis.shape[2], codec.v_basis.shape[2]
    split = SPLIT if integer else 0.0
    sizes, bias_sizes = projection_magnitude(q, codec, pages.rows)
    longest = rope_oracle.pair_magnitude(q, codec.inv_freq).max(-1)  # [B, H, Q]
    k_offset, v_offset = stored_offsets(codec.k_bands), stored_offsets(codec.v_bands)
    k_low = field_weights(codec.k_bands)
    weights, frame = expected.weights, codec.frame
    score_error = np.zeros(expected.scores.shape)
    o_error = np.zeros(expected.o.shape)
    for b in range(batch):
        length, row = int(pages.seq_lens[b]), int(pages.rows[b])
        k_codes, v_codes = (compress_oracle.stored(pages, b, side) for side in ("k", "v"))
        k_terms, v_terms = (
            np.abs(x - z) + np.abs(z) for x, z in ((k_codes, k_offset), (v_codes, v_offset))
        )
        k_lengths, v_vectors = (
            np.abs(codec.vectors("k")[row]).sum(-1),
            np.abs(codec.vectors("v")[row]),
        )
        for start in range(0, length, frame):
            part, j = slice(start, min(start + frame, length)), start // frame
            for h in range(heads):
                g = h // group
                codes, terms = np.abs(k_codes[g, part]), k_terms[g, part]
                projected = np.abs(u[b, h, :, j])  # [Q, R_K]
                error = sizes[b, h] @ codes.T * projection(dim, turns=2 if split else 1)
                error += (bias_sizes[b, h] * projection(dim) + 4 * ACC * np.abs(bias[b, h, :, j]))[
                    :, None
                ]
                error += split * longest[b, h][:, None] * (codes @ k_lengths[g])[None, :]
                error += split * (projected / k_low).max(-1)[:, None] * (codes @ k_low)[None, :]
                error += (projected @ terms.T) * (
                    8 * ACC + (0.0 if split else PRODUCT + k_rank * ACC)
                )
                score_error[b, h, :, part] = scale * error
                adds = (tokens // TILE + v_rank + 12) * ACC + PRODUCT
                if not split:
                    adds += (
                        min(tokens, TILE) * ACC
                    )  # weights times coefficients are float sums over a tile
                o_error[b, h] += adds * (weights[b, h, :, part] @ (v_terms[g, part] @ v_vectors[g]))
    if split:
        size = np.abs(expected.values)
        for start in range(0, tokens, PAIR):
            part = slice(start, start + PAIR)
            top = weights[..., part].max(-1)
            for h in range(heads):
                seen = np.isfinite(expected.scores[:, h, 0, part])  # by all queries or by none
                total = np.where(seen[..., None], size[:, h // group, part], 0.0).sum(1)  # [B, D]
                o_error[:, h] += split * (1 + 1e-3) * top[:, h, :, None] * total[:, None]
    return state(expected, score_error, o_error)


# window.py


def attend_window(q: ArrayLike, expected: State, *, scale: float | None = None) -> tuple[F64, F64]:
    """(of o, of lse). D products of query and key are added in float32 (as three tf32 products at
    worst), times the scale and log2(e); weights times values likewise."""
    dim, size = np.shape(q)[-1], np.abs(np.asarray(q, np.float64))
    scale = dim**-0.5 if scale is None else scale
    keys = np.abs(expected.keys)
    group = size.shape[1] // keys.shape[1]
    score_error = np.stack(
        [size[:, h] @ keys[:, h // group].mT for h in range(size.shape[1])], axis=1
    )
    score_error *= scale * (2 * PRODUCT + (dim + 4) * ACC)
    tokens = expected.scores.shape[-1]
    o_error = (PRODUCT + (min(tokens, TILE) + tokens // 32 + 8) * ACC) * expected.magnitude
    return state(expected, score_error, o_error)


# merge.py


def merge(
    o: ArrayLike, lse: ArrayLike, expected: tuple[F64, F64], dtype: torch.dtype
) -> tuple[F64, F64]:
    """(of o, of lse). Each of the N weights exp(lse_n - max) is off by EXP and by the rounding of
    its exponent (3 of the difference, of the product with log2(e) and of the maximum); sums of N
    terms, a division, a log."""
    o, lse = np.asarray(o, np.float64), np.asarray(lse, np.float64)
    merged, total = expected
    live = np.isfinite(lse)
    finite = np.where(np.isfinite(total), total, 0.0)
    gap = np.where(live, np.abs(np.where(live, lse, 0.0) - finite[..., None]), 0.0)
    weights = np.where(live, np.exp(-gap), 0.0)
    n = lse.shape[-1]
    off = (
        np.expm1(EXP + 3 * ACC * (np.minimum(gap, 200.0) + 1)) + (n + 3) * ACC
    )  # exp(-200) is 0 in float32
    # The twin subtracts lse itself, which it rounded: one rounding of |lse| in every exponent.
    off = off + 2 * ACC * np.abs(finite)[..., None]
    spread = np.abs(np.where(live[..., None], o, 0.0) - merged[..., None, :])
    o_budget = (weights[..., None] * off[..., None] * (spread + np.abs(merged)[..., None, :])).sum(
        -2
    )
    o_budget += (
        (n + 3) * ACC * (weights[..., None] * np.abs(np.where(live[..., None], o, 0.0))).sum(-2)
    )
    o_budget += rounding(merged, dtype)
    lse_budget = (weights * off).sum(-1) + LOG + 3 * ACC * np.abs(finite)
    empty = ~np.isfinite(total)
    return np.where(empty[..., None], 0.0, o_budget), np.where(empty, 0.0, lse_budget)


def joined(
    states: list[State], allowed: list[tuple[F64, F64]]
) -> tuple[tuple[F64, F64], tuple[F64, F64]]:
    """((o, lse) of states together, their budget): each state may be off by its own budget (a
    log-sum-exp that is off by e makes its weight off by a factor of exp(e) at most), and joining
    adds what `merge` allows."""
    o, lse = np.stack([x.o for x in states], -2), np.stack([x.lse for x in states], -1)
    o_off, lse_off = np.stack([x[0] for x in allowed], -2), np.stack([x[1] for x in allowed], -1)
    total = np.logaddexp.reduce(lse, axis=-1)
    finite = np.where(np.isfinite(total), total, 0.0)
    weight = np.where(np.isfinite(lse), np.exp(lse - finite[..., None]), 0.0)
    joint = (weight[..., None] * o).sum(-2)
    # Scores of 1e7 may be off by more than exp can hold: whatever the weights, the joint output
    # lies among the states' outputs, and the joint lse is off by no more than the worst of them.
    moved = weight * np.expm1(np.minimum(lse_off + lse_off.max(-1, keepdims=True), 300.0))
    merged = merge(o, lse, (joint, total), torch.float32)
    live = np.isfinite(lse)[..., None]
    spread = np.where(live, np.abs(o - joint[..., None, :]) + o_off, 0.0)
    o_budget = (weight[..., None] * o_off + moved[..., None] * spread).sum(-2)
    o_budget = merged[0] + np.minimum(o_budget, spread.max(-2))
    lse_budget = (weight * np.expm1(np.minimum(lse_off, 300.0))).sum(-1)
    lse_budget = merged[1] + np.minimum(lse_budget, lse_off.max(-1))
    return (joint, total), (o_budget, lse_budget)


# compress.py


def coefficients(
    x: ArrayLike, expected: F64, codec: CodecArrays, row: int, side: str, dtype: torch.dtype
) -> F64:
    """Of coefficients [G, T, R] of x [G, T, D]: keys are turned (angle, 3 roundings) and rounded to
    their dtype, D products are added, K's offset is subtracted."""
    if side == "v":
        size, encoder = np.abs(np.asarray(x, np.float64)), codec.v_encoder[row]
        return (PRODUCT + (np.shape(x)[-1] + 2) * ACC) * (size @ np.abs(encoder.astype(np.float64)))
    size = rope_oracle.pair_magnitude(x, codec.inv_freq)
    encoder = np.abs(codec.k_encoder[row].astype(np.float64))
    turned = U[dtype] + (ANGLE + 3 * ACC) * bool(len(codec.inv_freq))
    budget = (turned + PRODUCT + (np.shape(x)[-1] + 2) * ACC) * (size @ encoder)
    budget += SMALLEST[dtype] * encoder.sum(-2)[:, None]
    return budget + 2 * ACC * (
        np.abs(codec.k_offset[row].astype(np.float64))[:, None] + np.abs(expected)
    )


def decode(pages: PageArrays, b: int, side: str, rebuilt: F64) -> F64:
    """Of the tokens rebuilt [G, T, D]: codes are exact, times the scale they round, R products and
    the mean are added; keys are turned forward (angle, 3 roundings, on the pairs' lengths)."""
    codec, row = pages.codec, int(pages.rows[b])
    codes = np.abs(compress_oracle.stored(pages, b, side))
    vectors = np.abs(codec.vectors(side)[row])
    size = np.stack([codes[g] @ vectors[g] for g in range(len(codes))])
    depth = PRODUCT + (codes.shape[-1] + 4) * ACC
    if side == "k":
        size = size + np.abs(codec.k_mean[row].astype(np.float64))[:, None]
        size = rope_oracle.pair_magnitude(size, codec.inv_freq)
        turned = rope_oracle.pair_magnitude(rebuilt, codec.inv_freq)
        return depth * size + (ANGLE + 3 * ACC) * turned + SMALLEST[torch.float32]
    return depth * size + SMALLEST[torch.float32]

"""`balanced` without one part of its codec at a time, for perf.quality --ablate: calibrated as the
product does it, with a constant of the module or the statistics changed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from spectral_kernels import calibrate
from spectral_kernels.calibrate import ModelStats, Side
from spectral_kernels.codec import ModelCodec
from spectral_kernels.layout import Bands, PageLayout

PRESET = "balanced"


def plain(side: Side) -> Side:
    """All directions count alike, together as much as before."""
    size = side.metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return replace(side, metric=size * torch.eye(side.metric.shape[-1], dtype=torch.float64))


def uncentred(side: Side) -> Side:
    moment = side.moment + side.mean[:, :, None] * side.mean[:, None]
    return replace(side, moment=moment, mean=torch.zeros_like(side.mean))


def one_layout(stats: ModelStats) -> list[PageLayout]:
    """The same bands in all layers: those of least loss within the preset's bytes."""
    dim, most = (x := stats.layers[0].k.mean.shape[-1]), 4 * x / calibrate.PRESETS[PRESET].ratio
    menu = calibrate.menus(dim)
    pairs = [(k, v) for k in menu["k"] for v in menu["v"] if k.bytes + v.bytes <= most]
    lost = [sum(x.k.loss(k) + x.v.loss(v) for x in stats.layers) for k, v in pairs]
    return [PageLayout(*pairs[lost.index(min(lost))], dim, calibrate.FRAME)] * len(stats.layers)


def equal_bits(dim: int) -> dict[str, tuple[Bands, ...]]:
    """`menus` in which every component of a side has as many bits."""
    ranks = range(16, dim + 1, 16)
    return dict.fromkeys("kv", tuple(Bands(((r, bits),)) for r in ranks for bits in (2, 4, 8)))


def ablations(model: Any, tokenizer: Any, **options: Any) -> Iterator[tuple[str, ModelCodec]]:
    """(name, codec): the preset's, then what is left of it; options: of `calibrate.read`."""

    def read(constants: dict[str, Any], **changed: Any) -> ModelStats:
        with patch.dict(vars(calibrate), constants):
            return calibrate.read(model, tokenizer, **{**options, **changed})

    def fit(stats: ModelStats, layouts: Any = None, **constants: Any) -> ModelCodec:
        with patch.dict(vars(calibrate), constants):
            layouts = layouts or calibrate.plan(stats, PRESET)
            return calibrate.fit_codec(stats, layouts, PRESET)

    stats = read({})
    yield PRESET, (whole := fit(stats))
    yield "errors of outputs, not of predictions", fit(read({"LEAST_DRAWN": 1 << 60}))
    for name, change in {"K: plain squared error": plain, "no mean key": uncentred}.items():
        layers = tuple(replace(x, k=change(x.k)) for x in stats.layers)
        yield name, fit(replace(stats, layers=layers))
    yield "equal bits in a side", fit(stats, menus=equal_bits)
    yield "one layout for all layers", fit(stats, one_layout(stats))
    yield "steps of least error, no wider", fit(stats, MARGIN={})
    wide = {"FRAME": 4096, "error_costs": partial(calibrate.error_costs, frame=4096)}
    yield "frames of 4,096 positions", fit(read(wide), **wide)
    yield "sequences of 4,096 tokens", fit(read({"LENGTH": 4096}))
    few = read({}, tokens=max(512, stats.tokens // 8))
    yield "an eighth of the tokens, errors of outputs", fit(few)
    yield "window 16", replace(whole, window=16)
    yield "no sinks", replace(whole, sinks=0)

"""The codec's quality, held: what it loses on real keys and values at given bytes, and that perf.quality measures it."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from perf import quality
from perf.generate import load
from perf.quality import Case, Prefix
from spectral_kernels import Bands, pack_pages, unpack_pages
from spectral_kernels.cache import PRESETS, Preset, share_bytes
from spectral_kernels.compress import Side, fit_spectra
from spectral_kernels.hf import enable

DATA = Path(__file__).parents[2] / "shared" / "data" / "qwen2.5-coder-1.5b-kv.safetensors"
CONTEXT = 1160


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def embedded():
    return load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def case(embedded) -> Case:
    return quality.embedded_case(embedded[1], context=CONTEXT, needles=6, seed=3)


@pytest.fixture(scope="module")
def prefix(embedded, case) -> Prefix:
    return quality.read_prefix(embedded[0], case)


@pytest.fixture(scope="module")
def exact(embedded, case, prefix) -> torch.Tensor:
    layers = [(prefix.rotated(k), v) for k, v in zip(prefix.k, prefix.v, strict=True)]
    return quality.predict(embedded[0], case, layers)


# ---- the measurement ------------------------------------------------------------------------------------------------


def test_the_exact_prefix_predicts_like_the_model(embedded, case, exact):
    """Against one dense forward over everything."""
    logits = embedded[0](input_ids=case.ids[:, :-1]).logits[0, case.context - 1 :]
    plain = logits.float().log_softmax(-1)
    assert quality.compare(case, plain, exact)["kl"] < 1e-6
    shifted = quality.compare(case, plain[1:], exact[:-1]) if plain.shape == exact[1:].shape else None
    assert shifted is None or shifted["kl"] > 0.1


def test_rebuilt_prefix_equals_decoding_through_the_cache(embedded, case, prefix, exact):
    """The real cache, a token at a time, agrees with what is measured a thousand times better than with the exact cache."""
    model, steps = embedded[0], 24
    preset = replace(PRESETS["small"], window=64)  # no chunk leaves it within these steps
    rebuilt = quality.predict(model, case, quality.store_spectral(prefix, preset, torch.float32).layers)[:steps]
    logits = []
    with enable(model, preset) as handle:
        cache = handle.new_cache()
        model(input_ids=case.ids[:, : case.context - 1], past_key_values=cache, logits_to_keep=1)
        cold = cache.spectral.layers[0].cold
        for token in case.ids[0, case.context - 1 : case.context - 1 + steps]:
            logits.append(model(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1])
        assert cache.spectral.layers[0].cold == cold, "a chunk left the window: the two differ by design"
    decoded = torch.stack(logits).float().log_softmax(-1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.exp() * (a - b)).sum(-1).mean())

    lost = kl(exact[:steps], rebuilt)
    assert lost > 1e-5, "the preset loses nothing: nothing is tested"
    assert kl(decoded, rebuilt) < 1e-3 * lost


def test_compare():
    """By hand: two tokens of two, one answer right and one wrong."""
    case = Case("", torch.tensor([[0, 1, 0]]), 1, [range(0, 1), range(1, 2)])
    exact = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    other = torch.tensor([[0.5, 0.5 + 1e-6], [0.25, 0.75]]).log()
    got = quality.compare(case, exact, other)
    kl = (0.25 * math.log(0.5) + 0.75 * math.log(1.5) + 0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert got["kl"] == pytest.approx(kl, rel=1e-4)
    assert got["recalled"] == 1  # token 1 comes first, as it should; then 1 again, where 0 should
    assert got["perplexity"] == pytest.approx(math.sqrt(0.75 * 0.5 / (0.5 * 0.25)) - 1, rel=1e-4)


def test_groups_of_32_by_hand():
    """32 even numbers 0 .. 62 in 5 bits are levels 2 apart, hit exactly; in 1 bit only the ends are left."""
    x = (2.0 * torch.arange(32)).expand(1, 1, 2, 32).contiguous()
    assert torch.equal(quality.in_groups(x, -1, 5), x)
    assert torch.equal(quality.in_groups(x.mT.contiguous(), -2, 5), x.mT)
    assert torch.equal(quality.in_groups(x, -1, 1)[0, 0, 0], torch.where(torch.arange(32) < 16, 0.0, 62.0))


def test_yardsticks_count_their_bytes(prefix):
    """Ratios without the exact tokens: 16 bits over bits and 32 bits of scale and zero point for 32 numbers."""
    dense = quality._token_bytes(prefix)
    long = {name: dense / store(prefix).token_bytes for name, store in quality.YARDSTICKS.items()}
    assert long["fp8"] == 2 and long["kivi-4"] == 16 / 5 and long["kivi-3"] == 4 and long["kivi-2"] == 16 / 3
    # D = 64: ranks 16 and 32 in bytes, and a 512th of bases and scales in 2 bytes
    assert long["predecessor"] == 256 / (48 + 48 * 65 * 2 / 512)


def test_needles_are_hidden_and_asked(embedded):
    class Bytes:
        """A tokenizer of bytes."""

        def __call__(self, text: str, add_special_tokens: bool = False):
            return type("Encoded", (), {"input_ids": list(text.encode())})

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    text = "\n".join(f"line {i} of the text" for i in range(400))
    case = quality.text_case("t", text, Bytes(), context=3000, needles=4, seed=0)
    context = bytes(case.ids[0, :3000].tolist()).decode()
    for question, places in zip(quality.needle_questions(4, 0), case.answers, strict=True):
        assert context.count(f"\n{question.fact}\n") == 1
        predicted = case.ids[0, 3000:]
        assert bytes(predicted[list(places)].tolist()).decode() == question.answer
        assert bytes(predicted[: places.start].tolist()).decode().endswith(question.asked)
    with pytest.raises(ValueError, match="expected at least"):
        quality.text_case("t", text[:1000], Bytes(), context=3000, needles=4, seed=0)


def test_main_writes_rows_and_a_plot(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert quality.main(["--context", "700", "--presets", "quality", "--needles", "2", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["scheme"] for row in rows] == ["quality", *quality.YARDSTICKS]
    wanted = {"model", "text", "context", "scheme", "ratio", "kl", "top1", "needles", "recalled"}
    assert all(wanted <= row.keys() and row["context"] == 700 and row["needles"] == 2 for row in rows)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "kivi-3" in capsys.readouterr().out


# ---- the codec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [False, True])
def test_distortion_is_what_the_codec_loses(rng, centre):
    """Predicted against done: float coefficients through the packer. Components add up because the basis is orthonormal in
    the metric, up to its rounding to int8 (1/254 of the largest entry), which mixes a few percent of them."""
    mixing = rng.standard_normal((64, 64)) * np.exp(-np.arange(64) / 12)
    x = torch.from_numpy(rng.standard_normal((1, 1, 1536, 64)) @ mixing.T + 3.0).float()
    metric = torch.from_numpy(mixing @ mixing.T + np.eye(64)).float()[None, None]
    [spectrum] = fit_spectra([Side(x, metric, centre=centre)])
    for text in ("16x8+16x4+32x2", "16x4+16x2", "64x2"):
        bands = Bands.parse(text)
        basis, scale, encoder = spectrum.side(bands)
        y = x if spectrum.mean is None else x - spectrum.mean
        pages = pack_pages((y @ encoder).unflatten(2, (-1, 64)), bands, side="k")
        values = unpack_pages(pages, bands, side="k").flatten(2, 3)
        if centre:
            values[..., 0] = (2 ** bands.bits[0] - 1) / 2  # what the cache sets
        lost = (values * scale[..., None, :]) @ basis.float() - x
        done = ((lost @ metric) * lost).sum(-1).mean()
        assert float(spectrum.distortions([bands])[0]) == pytest.approx(float(done), rel=0.1), text


def test_budget_is_kept_and_spent_where_it_counts():
    """No order of layers breaks the budget or wastes it; against all choices of a few layers."""
    sizes = [10, 20, 30, 40]
    for losses_of in (
        lambda layer: [8.0, 4.0, 2.0, 1.0],
        lambda layer: [x * (1, 10)[layer % 2] for x in (8.0, 4.0, 2.0, 1.0)],
        lambda layer: [2.0**layer * x for x in (8.0, 4.0, 2.0, 1.0)],
        lambda layer: [2.0**-layer * x for x in (8.0, 4.0, 5.0, 1.0)],  # the third is no better than the second
    ):
        losses = [losses_of(layer) for layer in range(12)]
        taken = [sizes[i] for i in share_bytes(12 * 25.0, sizes, losses)]
        assert 12 * 25 - 15 <= sum(taken) <= 12 * 25
    taken = [
        sizes[i] for i in share_bytes(300, sizes, [[x * (1, 10)[n % 2] for x in (8.0, 4.0, 2.0, 1.0)] for n in range(12)])
    ]
    assert sum(taken[1::2]) > 1.5 * sum(taken[::2])
    late = [[x * (100 if n == 11 else 1) for x in (8.0, 4.0, 2.0, 1.0)] for n in range(12)]
    assert sizes[share_bytes(300, sizes, late)[11]] == 40, "the last layer does not get what others left"
    losses = [[9.0, 4.0, 2.0, 1.0], [3.0, 2.5, 2.0, 1.5], [6.0, 5.0, 1.0, 0.5]]
    chosen = share_bytes(80, sizes, losses)
    best = min(
        (sum(losses[n][i] for n, i in enumerate(choice)), choice)
        for choice in product(range(4), repeat=3)
        if sum(sizes[i] for i in choice) <= 80
    )
    assert tuple(chosen) == best[1]


@pytest.mark.parametrize(
    ("bands", "ratio", "message"),
    [
        (("16x4", "32x4"), None, "ratio: expected a number"),
        (("16x4", "32x4"), -1.0, "ratio: expected a positive number"),
        (("16x4", "32x4"), 20.0, "ratio: expected at most 16.00"),
        (("16x4", "64x16"), 2.0, "expected no 16-bit bands"),
    ],
)
def test_presets_that_cannot_be(bands, ratio, message):
    with pytest.raises(ValueError, match=message):
        Preset(k={64: bands}, v={64: bands}, ratio=ratio).layouts(64)


def test_keys_with_a_large_mean_lose_nothing_by_it(rng):
    """A bias of the key projection, thirty times as large as what tokens differ by, costs no more than rounding its row."""
    x = torch.from_numpy(rng.standard_normal((1, 2, 800, 64)) * np.exp(-np.arange(64) / 10)).float()
    bias = torch.from_numpy(30 * rng.standard_normal((1, 2, 1, 64))).float()
    bands = Bands.parse("16x4+32x2")
    plain, shifted, uncentred = (
        float(fit_spectra([Side(y, centre=centre)])[0].distortions([bands]).sum())
        for y, centre in ((x, True), (x + bias, True), (x + bias, False))
    )
    assert shifted < 1.3 * plain
    assert uncentred > 3 * shifted


@pytest.mark.parametrize("preset", ["quality", "balanced", "small"])
def test_presets_keep_their_bytes(prefix, preset):
    dense = quality._token_bytes(prefix)
    stored = quality.store_spectral(prefix, preset)
    # A cold token also has skip bits and its share of the tables.
    extra = len(prefix.k) * (2 / 8 + 8 / 64)
    assert stored.token_bytes - extra <= dense / PRESETS[preset].ratio


# ---- what it loses --------------------------------------------------------------------------------------------------


def mean_errors(prefix: Prefix, preset: Preset | str) -> tuple[float, float]:
    """Of scores and of outputs, over the layers."""
    stored = quality.store_spectral(prefix, preset)
    return tuple(np.mean([quality.attention_errors(prefix, stored, n) for n in range(len(prefix.k))], axis=0))


@pytest.fixture(scope="module")
def tensors() -> Prefix:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    return quality.read_tensors(DATA)


# Five percent above what was measured when these were set, or less: a worse codec fails, rounding does not. (Weights of few
# queries say which layouts layers get, and one layer more or less moves these.)
@pytest.mark.parametrize(("ratio", "scores", "outputs"), [(5.5, 0.248, 0.173), (7, 0.328, 0.243), (10, 0.446, 0.363)])
def test_errors_on_real_tensors(tensors, ratio, scores, outputs):
    """D = 128. For comparison: outputs of the 3-bit yardstick at 4.0 are off by 0.139, of the 2-bit one at 5.3 by 0.336."""
    base = PRESETS["small"]
    got = mean_errors(tensors, Preset(k=base.k, v=base.v, ratio=ratio))
    assert got[0] <= scores and got[1] <= outputs


@pytest.mark.parametrize(
    ("preset", "scores", "outputs"), [("quality", 0.145, 0.147), ("balanced", 0.435, 0.224), ("small", 0.792, 0.310)]
)
def test_errors_on_the_embedded_model(prefix, preset, scores, outputs):
    got = mean_errors(prefix, preset)
    assert got[0] <= scores and got[1] <= outputs


def test_a_stream_keeps_its_quality(tensors):
    """Bases fitted on the first 600 tokens of 4,096: new segments make up for most of what they lose later on."""
    schemes = quality.streamed("balanced", 600)
    renewed, one = (
        np.mean([quality.attention_errors(tensors, stored, n) for n in range(len(tensors.k))], axis=0)
        for stored in (store(tensors) for store in schemes.values())
    )
    assert renewed[1] <= 0.334  # five percent above what it was when this was set
    assert renewed[1] < 0.85 * one[1] and renewed[0] < one[0]


def test_short_blocks_of_alignment(prefix):
    """The simulation of blocks that pages cannot have gives, for one that they can have, what they give."""
    preset = replace(PRESETS["balanced"], align=128)
    one, other = quality.store_spectral(prefix, preset), quality.store_aligned(prefix, preset, 128)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a[0] - b[0]).norm() < 2e-3 * a[0].norm() and torch.equal(a[1], b[1])  # fp16 keys, turned once more
    finer = quality.store_aligned(prefix, preset, 32)
    assert any((a[0] - b[0]).norm() > 0.02 * a[0].norm() for a, b in zip(one.layers, finer.layers, strict=True))


@pytest.mark.parametrize("change", ["no metric of K", "K not centred", "steps unclipped"])
def test_error_targets_have_teeth(tensors, change):
    """A codec that forgets one of its parts does not pass."""
    base = PRESETS["small"]
    stored = quality.ablations(Preset(k=base.k, v=base.v, ratio=10), 128)[change](tensors)
    scores, outputs = np.mean([quality.attention_errors(tensors, stored, n) for n in range(len(tensors.k))], axis=0)
    assert scores > 0.446 or outputs > 0.363


def test_needles_through_the_presets(embedded, case, prefix, exact):
    """`quality` finds in the context what the exact cache finds."""
    found = quality.compare(case, exact, exact)["recalled"]
    assert found == len(case.answers) > 3
    layers = quality.store_spectral(prefix, "quality").layers
    assert quality.compare(case, exact, quality.predict(embedded[0], case, layers))["recalled"] == found

"""What perf.quality measures is what it says, and what the embedded model's codec loses, held."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from perf import quality
from perf.generate import TINY_MODEL, load
from perf.quality import Case, Prefix
from spectral_kernels.codec import ModelCodec
from spectral_kernels.hf import CACHE, enable

CONTEXT = 1160
LOSSY = ("quality", "balanced", "small")
# KL of the presets, about twice what it was when the codec of the embedded model was made.
LIMITS = (3e-4, 1.5e-3, 0.19)


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
    return quality.predict(embedded[0], case, list(zip(prefix.k, prefix.v, strict=True)))


@pytest.fixture(scope="module")
def stored(embedded, prefix) -> dict[str, quality.Stored]:
    return {
        p: quality.store_spectral(prefix, embedded[0], p, TINY_MODEL) for p in ("exact", *LOSSY)
    }


@pytest.fixture(scope="module")
def rows(embedded, case) -> dict[str, quality.Row]:
    schemes = {
        p: lambda x, p=p: quality.store_spectral(x, embedded[0], p, TINY_MODEL) for p in LOSSY
    }
    found = quality.measure(
        embedded[0], case, {**schemes, **quality.YARDSTICKS}, model_name="embedded"
    )
    return {row.scheme: row for row in found}


# ---- the measurement -----------------------------------------------------------------------------


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_the_exact_prefix_predicts_like_the_model(embedded, case, exact, stored):
    """Against one dense forward over everything; preset "exact" gives back what the model had."""
    logits = embedded[0](input_ids=case.ids[:, :-1]).logits[0, case.context - 1 :]
    plain = logits.float().log_softmax(-1)
    assert kl(plain, exact) < 1e-6 and kl(plain[1:], exact[:-1]) > 0.1
    assert kl(plain, quality.predict(embedded[0], case, stored["exact"].layers)) < 1e-6


@pytest.mark.parametrize("preset", LOSSY)
def test_what_is_measured_is_what_a_step_attends_to(embedded, case, prefix, exact, stored, preset):
    """The cache's decode step, over the window that is exact then (a token longer, as its newest
    token is in it), predicts as the rebuilt prefix does, a thousand times nearer than the exact
    cache."""
    model = embedded[0]
    codec = ModelCodec.load(TINY_MODEL / f"codec-{preset}.safetensors")
    with enable(model, preset, codec=replace(codec, window=codec.window + 1)) as handle:
        cache = handle.new_cache(1, CONTEXT)
        model(input_ids=prefix.ids, logits_to_keep=1, **{CACHE: cache})
        logits = model(input_ids=case.ids[:, CONTEXT - 1 : CONTEXT], **{CACHE: cache}).logits[0]
    decoded = logits.float().log_softmax(-1)
    rebuilt = quality.predict(model, case, stored[preset].layers)[:1]
    lost = kl(exact[:1], rebuilt)
    assert lost > 1e-8, "the preset loses nothing: nothing is tested"
    assert kl(decoded, rebuilt) < 1e-3 * lost + 1e-9


def test_compare():
    """By hand: two tokens of two, one answer right and one wrong."""
    case = Case("", torch.tensor([[0, 1, 0]]), 1, [range(0, 1), range(1, 2)])
    exact = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    other = torch.tensor([[0.5, 0.5 + 1e-6], [0.25, 0.75]]).log()
    got = quality.compare(case, exact, other)
    parts = 0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert got["kl"] == pytest.approx(sum(parts) / 2, rel=1e-4)
    assert got["kl_median"] == pytest.approx(min(parts), rel=1e-4)
    assert got["kl_p99"] == pytest.approx(max(parts) - 0.01 * abs(parts[1] - parts[0]), rel=1e-4)
    assert got["recalled"] == 1  # token 1 comes first, as it should; then 1 again, where 0 should
    assert got["perplexity"] == pytest.approx(math.sqrt(0.75 * 0.5 / (0.5 * 0.25)) - 1, rel=1e-4)


def test_groups_of_32_by_hand():
    """32 even numbers 0 .. 62 in 5 bits are levels 2 apart, hit exactly; in 1 bit only the ends are
    left."""
    x = (2.0 * torch.arange(32)).expand(1, 1, 2, 32).contiguous()
    assert torch.equal(quality.in_groups(x, -1, 5), x)
    assert torch.equal(quality.in_groups(x.mT.contiguous(), -2, 5), x.mT)
    assert torch.equal(
        quality.in_groups(x, -1, 1)[0, 0, 0], torch.where(torch.arange(32) < 16, 0.0, 62.0)
    )


def test_yardsticks_count_their_bytes(prefix):
    """Ratios without the exact tokens: 16 bits over bits and 32 bits of scale and zero point for 32
    numbers."""
    long = {
        name: prefix.token_bytes / store(prefix).token_bytes
        for name, store in quality.YARDSTICKS.items()
    }
    assert long == {"fp8": 2, "kivi-4": 16 / 5, "kivi-3": 4, "kivi-2": 16 / 3}


def test_presets_count_their_bytes(prefix, stored):
    """All pages, their table, the exact tokens."""
    for preset in LOSSY:
        codec = ModelCodec.load(TINY_MODEL / f"codec-{preset}.safetensors")
        layers = [layer.layout.token_bytes * layer.kv_heads for layer in codec.layers]
        token = sum(layers) + 4 / 64
        exact = (codec.sinks + codec.window) * prefix.token_bytes
        assert stored[preset].token_bytes == token
        assert stored[preset].nbytes == pytest.approx((CONTEXT - 1) * token + exact)


def test_needles_are_hidden_and_asked():
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
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "rows.jsonl", tmp_path / "frontier.png"
    arguments = ["--context", "700", "--presets", "quality", "--needles", "2", "--device", "cpu"]
    assert quality.main([*arguments, "--json", str(out), "--png", str(png)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["scheme"] for row in rows] == ["quality", *quality.YARDSTICKS]
    wanted = {
        "model",
        "text",
        "context",
        "scheme",
        "ratio",
        "kl",
        "top1",
        "needles",
        "recalled",
        "commit",
    }
    assert all(
        wanted <= row.keys() and row["context"] == 700 and row["needles"] == 2 for row in rows
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "kivi-3" in capsys.readouterr().out


def test_texts_go_with_a_model(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--text", "a.txt"])
    assert "--text goes with" in capsys.readouterr().err


# ---- what it loses -------------------------------------------------------------------------------


def test_the_shipped_codec_loses_little(rows):
    """More bytes, less loss; `quality` loses less than 2 bits in groups of 32 and takes fewer
    bytes."""
    ours = [rows[preset] for preset in LOSSY]
    assert ours[0].kl < ours[1].kl < ours[2].kl and ours[0].ratio < ours[1].ratio < ours[2].ratio
    assert ours[0].kl < rows["kivi-2"].kl and ours[0].ratio > rows["kivi-2"].ratio
    for row, limit in zip(ours, LIMITS, strict=True):
        assert row.kl <= limit, row


def test_needles_through_the_presets(rows, case):
    """`quality` finds in the context what the exact cache finds."""
    assert rows["quality"].recalled == len(case.answers) > 3


@pytest.mark.parametrize("damage", ["k_scale", "k_mean", "v_scale"])
def test_the_limits_have_teeth(embedded, case, prefix, exact, damage, tmp_path):
    """A codec with one part half as large again does not pass."""
    codec = ModelCodec.load(TINY_MODEL / "codec-quality.safetensors")
    layers = tuple(
        replace(layer, **{damage: 1.5 * getattr(layer, damage)}) for layer in codec.layers
    )
    replace(codec, layers=layers).save(tmp_path / "codec-quality.safetensors")
    stored = quality.store_spectral(prefix, embedded[0], "quality", tmp_path)
    assert (
        quality.compare(case, exact, quality.predict(embedded[0], case, stored.layers))["kl"]
        > LIMITS[0]
    )

"""A layer's decode step on random data, built on the device, and a check of what it gives.

Weights of perf's models are random: a calibration would mean nothing. `random_codec` has random
orthogonal bases in the bands of a preset; codes are uniform, steps fall as in a spectrum. The check
is against the twin of plain PyTorch, which tests/ hold to the oracle: one row and KV head at a
time, as 128K tokens of all would not fit.
"""

import dataclasses
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from spectral_kernels import attention, compress, window
from spectral_kernels.calibrate import PRESETS, menus, quantise_basis
from spectral_kernels.codec import Codec, ModelCodec
from spectral_kernels.layout import PAGE_SIZE, Bands, PageLayout
from spectral_kernels.rope import freqs_from_inv_freq

Parts = Sequence[str]  # of the tokens: "exact", "pages"
BOTH = ("exact", "pages")
State = tuple[torch.Tensor, torch.Tensor]  # o [B, H, (Q,) D] and lse [B, H, (Q)]
SCORE_STD = 2.0  # of real models: 1 to 3
CLOSE = 2.0**-7  # relative, in norm: a unit in the last place of bf16
THETA = 5e5
LOSSY = tuple(PRESETS)
# hidden_size, intermediate_size, layers, heads, KV heads, head_dim, vocab_size
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "check": (1024, 2816, 4, 8, 2, 128, 2048),  # of tests/serving.py
    "tiny": (128, 256, 2, 4, 2, 64, 512),
}
LAYER = SHAPES["8b"][3:6]  # H, G, D where nothing else is said


def llama(shape: str, **more: Any) -> Any:
    """transformers' configuration of a model of one of SHAPES."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocabulary, max_position_embeddings=1 << 20, rope_theta=THETA,
        tie_word_embeddings=False, **more,
    )  # fmt: skip


def frequencies(dim: int, device: Any = "cpu") -> torch.Tensor:
    """Of RoPE with the base THETA, as a codec has them."""
    inv_freq = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return freqs_from_inv_freq(inv_freq, device=device)


def layouts(preset: str, dim: int) -> list[PageLayout]:
    """Up to three layouts as a plan of the preset mixes them, none above its bytes: of pairs of
    bands from calibrate's menus, those of the most bytes, with few bytes for keys and with many."""
    budget, menu = 4 * dim / PRESETS[preset].ratio, menus(dim)
    pairs = [(k, v) for k in menu["k"] for v in menu["v"] if k.bytes + v.bytes <= budget]
    least = 0.9 * max(k.bytes + v.bytes for k, v in pairs)
    pairs = [(k, v) for k, v in pairs if k.bytes + v.bytes >= least]
    pairs.sort(key=lambda p: (p[0].bytes, p[1].bytes))
    chosen = [pairs[round(i * (len(pairs) - 1) / 2)] for i in range(3)]
    return [PageLayout(k, v, dim) for k, v in dict.fromkeys(chosen)]


def codec_of(layout: PageLayout, freqs: torch.Tensor, mean: torch.Tensor, *sides: Any) -> Codec:
    """From the mean key [1, G, D] and, of K and of V, orthonormal directions [G, R, D] and the
    steps [R] of their coefficients; the encoder is the transpose in steps."""
    tensors: dict[str, torch.Tensor] = {}
    for side, (directions, step) in zip("kv", sides, strict=True):
        rows, lengths = quantise_basis(directions)
        encoder = (directions.float() / step[:, None]).mT.contiguous()
        tensors |= {f"{side}_basis": rows[None], f"{side}_scale": (lengths * step)[None]}
        tensors[f"{side}_encoder"] = encoder[None]
    offset = (mean[..., None, :] @ tensors["k_encoder"])[..., 0, :].contiguous()
    return Codec(layout, freqs, k_mean=mean, k_offset=offset, **tensors)


def random_codec(layout: PageLayout, kv_heads: int, freqs: torch.Tensor) -> Codec:
    """Random orthogonal bases. Uniform codes rebuild keys and values of standard deviations
    SCORE_STD and 1 a dimension; what is encoded comes back as far as the rank goes."""
    dim, device = layout.head_dim, freqs.device
    sides = []
    for bands, std in ((layout.k, SCORE_STD), (layout.v, 1.0)):
        x = torch.randn(kv_heads, dim, dim, dtype=torch.float64, device=device)
        # Codes are uniform: 2**bits values a step apart.
        spread = torch.tensor([((4.0**bits - 1) / 12) ** 0.5 for bits in bands.bits], device=device)
        fall = torch.exp(-3 * torch.arange(bands.rank, device=device) / bands.rank)
        step = fall * std * (dim / fall.square().sum()) ** 0.5 / spread
        sides.append((torch.linalg.qr(x)[0][:, : bands.rank].contiguous(), step))
    mean = torch.randn(1, kv_heads, dim, device=device) * SCORE_STD / 2
    return codec_of(layout, freqs, mean, *sides)


def random_model_codec(
    preset: str, *, layers: int, kv_heads: int, freqs: torch.Tensor, first: int = 0
) -> ModelCodec:
    """A codec of layers with memory of their own, whose layouts take turns from `first` on."""
    known = [random_codec(x, kv_heads, freqs) for x in layouts(preset, 2 * len(freqs))]
    codecs = tuple(deepcopy(known[(first + i) % len(known)]) for i in range(layers))
    return ModelCodec(codecs, PRESETS[preset].sinks, PRESETS[preset].window, preset, notes="random")


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens; H query heads, G KV heads, head dimension D."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int  # of the longest row
    queries: int = 1  # Q, the newest tokens, which are a step's
    capacity: int = 0  # tokens of a row that the block table has entries for, at least T
    lengths: tuple[int, ...] = ()  # of the rows, where they differ
    older_cards: bool = False  # their path

    def __str__(self) -> str:
        text = f"B={self.batch} H={self.heads}/{self.kv_heads} D={self.dim} T={self.tokens}"
        return f"{text} {self.case}".rstrip()

    @property
    def case(self) -> str:
        """Rows that differ, queries and capacity, as perf.attention's command line has them."""
        rows = "+".join(f"{len([*same])}x{tokens}" for tokens, same in groupby(self.lengths))
        queries = f"q{self.queries}" if self.queries > 1 else ""
        room = f"pool{self.capacity}" if self.capacity else ""
        return " ".join(filter(None, (rows, queries, room)))

    @property
    def rows(self) -> tuple[int, ...]:
        return self.lengths or (self.tokens,) * self.batch

    @property
    def dense_bytes(self) -> int:
        """Of K and V in 16 bits."""
        return 4 * self.kv_heads * sum(self.rows) * self.dim


@dataclass
class Step:
    """The inputs of one layer's decode step, and its state: q [B, H, (Q,) D]; k, v [B, G, Q, D] of
    the newest tokens; the rest as attend_spectral takes it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    codec: Codec
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_exact: torch.Tensor
    v_exact: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    sinks: int
    window: int
    matrix_units: bool | None = None

    @property
    def nbytes(self) -> int:
        """Of all that a step must read: pages but for tokens that are exact, their table entries,
        bases and encoders once a batch, exact and new tokens, queries."""
        exact, codec = self.k_exact[:, :, :, 0].numel(), self.codec
        pages = self.k_pages.nbytes + self.v_pages.nbytes - exact * codec.layout.token_bytes
        small = (self.q, self.k, self.v, self.k_exact, self.v_exact)
        table = self.block_table.element_size() * len(self.k_pages)
        return pages + table + codec.nbytes - codec.freqs.nbytes + sum(x.nbytes for x in small)

    def append(self, twin: bool = False) -> None:
        (compress.append_torch if twin else compress.append)(
            self.k, self.v, self.codec, self.k_pages, self.v_pages, self.k_exact, self.v_exact,
            self.block_table, self.seq_lens, sinks=self.sinks,
        )  # fmt: skip

    def attend(self, parts: Parts = BOTH, after_append: bool = False, twin: bool = False) -> State:
        """(o, lse) over the pages, the exact tokens or, as a decode step has it, both."""
        options: Any = {"sinks": self.sinks, "window": self.window}
        exact = self.k_exact, self.v_exact
        if "pages" not in parts:
            run = window.attend_window_torch if twin else window.attend_window
            return run(self.q, *exact, self.seq_lens, **options)
        options["exact"] = exact if "exact" in parts else None
        if not twin:
            options |= {"matrix_units": self.matrix_units, "after_append": after_append}
        return (attention.attend_spectral_torch if twin else attention.attend_spectral)(
            self.q, self.k_pages, self.v_pages, self.codec, self.block_table, self.seq_lens,
            **options,
        )  # fmt: skip

    def step(self) -> State:
        """What a layer runs for new tokens."""
        self.append()
        return self.attend(after_append=True)

    def part(self, b: int, g: int) -> "Step":
        """One row and one KV head."""
        row, head, group = slice(b, b + 1), slice(g, g + 1), self.q.shape[1] // self.codec.kv_heads
        own: dict[str, Any] = {x: getattr(self, x)[:, head] for x in ("k_pages", "v_pages")}
        own |= {x: getattr(self, x)[row, head] for x in ("k", "v", "k_exact", "v_exact")}
        own |= {x: getattr(self, x)[row] for x in ("block_table", "seq_lens")}
        own |= {"q": self.q[row, g * group : (g + 1) * group], "codec": self.codec.of_heads(g, 1)}
        return dataclasses.replace(self, **own)


def check_close(got: torch.Tensor, want: torch.Tensor, allowed: float, what: str) -> None:
    """Raise AssertionError unless the error, relative in norm, is at most `allowed`."""
    off = float((got.double() - want.double()).norm() / want.double().norm())
    if not off <= allowed:
        raise AssertionError(f"{what}: a relative error of {off:.3g}, above {allowed:.3g}")


def check_state(step: Step, state: State | tuple[torch.Tensor, None], parts: Parts = BOTH) -> float:
    """The largest error of a state over the heads of two rows and KV heads (the first of the first
    row, the last of the last): of o relative, in norm over D; of lse absolute. AssertionError: one
    is above CLOSE and one rounding of o, or a number of the whole state is not finite."""
    o, lse = state
    if not all(x.isfinite().all() for x in state if x is not None):
        raise AssertionError("the state holds numbers that are not finite")
    group, errors = step.q.shape[1] // step.codec.kv_heads, []
    for b, g in sorted({(0, 0), (len(o) - 1, step.codec.kv_heads - 1)}):
        heads = slice(g * group, (g + 1) * group)
        want, want_lse = step.part(b, g).attend(parts, twin=True)
        off = (o[b, heads].float() - want[0]).norm(dim=-1) / want[0].norm(dim=-1)
        errors.append(off.max())
        if lse is not None:
            errors.append((lse[b, heads] - want_lse[0]).abs().max())
    worst = float(torch.stack(errors).max())  # NaN if one is
    if not worst <= CLOSE + torch.finfo(o.dtype).eps:
        raise AssertionError(f"an error of {worst:.3g}, expected at most {CLOSE:.3g}")
    return worst


def make_steps(shape: Shape, preset: str, card: Any, copies: int | None = None) -> list[Step]:
    """Random steps of one shape and the middle layout of a preset, of no memory in common; as many
    as keep their inputs out of the L2 cache (`Card.copies`), unless told."""
    batch, groups, dim, new = shape.batch, shape.kv_heads, shape.dim, shape.queries
    sinks, recent, plan = PRESETS[preset].sinks, PRESETS[preset].window, layouts(preset, dim)
    used = [-(-n // PAGE_SIZE) for n in shape.rows]
    entries = max(*used, -(-shape.capacity // PAGE_SIZE))
    i32: Any = {"dtype": torch.int32, "device": card.device}
    codec = random_codec(plan[len(plan) // 2], groups, frequencies(dim, card.device))

    def pages(bands: Bands) -> torch.Tensor:
        size = (sum(used), groups, PAGE_SIZE * bands.bytes)
        return torch.randint(0, 256, size, dtype=torch.uint8, device=card.device)

    def step() -> Step:
        table = torch.zeros(batch, entries, **i32)
        for row, own in zip(table, torch.randperm(sum(used), **i32).split(used), strict=True):
            row[: len(own)] = own
        q = card.normal(batch, shape.heads, new, dim)
        k, v = (card.normal(batch, groups, new, dim, std=std) for std in (SCORE_STD, 1.0))
        stored = pages(codec.layout.k), pages(codec.layout.v)
        slots = (batch, groups, sinks + recent, dim)
        exact = card.normal(*slots, std=SCORE_STD), card.normal(*slots)
        return Step(
            q if new > 1 else q[:, :, 0], k, v, deepcopy(codec), *stored, *exact, table,
            torch.tensor(shape.rows, **i32), sinks, recent, False if shape.older_cards else None,
        )  # fmt: skip

    first = step()
    return [first, *(step() for _ in range(1, copies or card.copies(first.nbytes)))]

"""One line gives a Hugging Face causal language model the spectral cache, and undoes it.

    with enable(model, preset="balanced"):
        model.generate(**inputs, max_new_tokens=100)

What happens to one model, and to no other, until `disable()`:
- its configuration names an attention function of this module, registered beside transformers' own;
- `generate` fills a `ModelCache`: transformers' `Cache`, whose full-attention layers keep their
  tokens in one `SpectralCache` a device; layers with a sliding window beside them keep a ring of
  exact tokens; others (convolutions, linear attention) are transformers' own;
- a forward of its decoder is checked, and its host work done, before anything is changed;
- on CUDA its one-token forward is captured once a cache as a CUDA graph and then replayed.

A forward on an empty cache, or of more new tokens than `ModelCache.limit`, is a *prompt*: the
model's attention runs as before (on a filled cache over keys and values rebuilt from it), and the
tokens are stored. Any other forward on a filled cache is a *step*: a layer appends its tokens and
attends to the cache by one registered operator. Queries and keys come as the model rotated them:
nothing here depends on its kind of RoPE.
Test: tests/test_hf.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from . import _model
from ._checks import check_counts
from ._model import NAME, Layer, compiled_layers, decoder_of, dense_attention, own_layers
from .attention import attend_spectral
from .cache import SpectralCache, copy_tokens
from .codec import Codec, ModelCodec, cache_path, fingerprint
from .compress import append
from .window import attend_window, put

PRESETS = ("exact", "quality", "balanced", "small")
_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# What forwards call the cache. Since 5.24 they rename the old keyword themselves, but only inside.
_OLD_CACHE = "past_key_values"
CACHE = "cache" if _RELEASE >= (5, 24) else _OLD_CACHE
# What a forward may be given and still be replayed.
_TENSORS = ("input_ids", "attention_mask", "position_ids", "cache_position")
_PLAIN = (*_TENSORS, "logits_to_keep", CACHE, _OLD_CACHE)
_CROP_COUNTS = _RELEASE >= (5, 17)  # Cache.crop(0) removes no token since, before it all of them
MAX_STEP = 32  # most new tokens of a step: what the decode kernels are made for
DRAFTS = 16  # tokens that can be cropped without a loss in the window
SLACK = 64  # tokens that a ring keeps beside its window: most that can be cropped from it
ROUND = 512  # room is a multiple of this, so that calls of like lengths share a cache
_EAGER = "prompts run outside torch.compile, as in generate()"
_OUTSIDE = f"{CACHE}: works only in the model it was made for, while enabled"
POOLED = 2  # idle caches, of different numbers of rows, that generate() keeps for its next calls

# ---- one layer's step, as an operator that torch.compile and opcheck understand ------------------

_CODECS: weakref.WeakValueDictionary[int, Codec] = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("spectral_kernels", "FRAGMENT")


def _step(
    q, k, v, k_pages, v_pages, k_exact, v_exact, block_table, seq_lens,
    codec, sinks, window, scale, workspace, learned=None,
):  # fmt: skip
    """Store k, v [B, G, Q, D] as the newest Q of seq_lens tokens; attend to all: as q [B, H, Q, D].

    codec: the `id` of the layer's Codec, whose tensors are constants.
    learned: a score of each query head [H] that takes its share of the softmax and gives no value
        (gpt-oss' sinks): exp(lse) / (exp(lse) + exp(score)) is left to the keys.
    """
    out, layer = torch.empty(q.shape, dtype=q.dtype, device=q.device), _CODECS[codec]
    with torch.autocast(q.device.type, enabled=False):
        append(k, v, layer, k_pages, v_pages, k_exact, v_exact, block_table, seq_lens, sinks=sinks)
        _, lse = attend_spectral(
            q, k_pages, v_pages, layer, block_table, seq_lens, sinks=sinks, window=window,
            exact=(k_exact, v_exact), scale=scale, out=out, workspace=workspace, after_append=True,
        )  # fmt: skip
        if learned is not None:
            out *= torch.sigmoid(lse - learned.float()[:, None])[..., None]
    return out


def _window_step(q, k, v, keys, values, seq_lens, window, scale, learned=None):
    """`_step` of a layer with a sliding window, whose tokens lie in rings [B, G, slots, D].

    Each query has a window of its own, so each is a row for the kernel. The ring has at least
    window + Q slots: no token that a query sees has given its slot to a later one.
    """
    batch, heads, queries, dim = q.shape
    with torch.autocast(q.device.type, enabled=False):
        put(keys, k, seq_lens)
        put(values, v, seq_lens)
        rows, ends = None, seq_lens
        if queries > 1:
            count = torch.arange(batch * queries, dtype=torch.int32, device=q.device)
            rows = count // queries
            ends = seq_lens[rows] - (queries - 1 - count % queries)
        out, lse = attend_window(
            q.transpose(1, 2).reshape(-1, heads, dim), keys, values, ends, sinks=0, window=window,
            seq_ids=rows, scale=scale,
        )  # fmt: skip
        if learned is not None:
            out *= torch.sigmoid(lse - learned.float())[..., None]
    return out.to(q.dtype).view(batch, queries, heads, dim).transpose(1, 2).contiguous()


_SCHEMAS: dict[str, Callable[..., torch.Tensor]] = {
    "step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor(c!) k_exact, Tensor(d!) v_exact, Tensor block_table, Tensor seq_lens, int codec, int "
    "sinks, int window, float? scale, Tensor(e!)? workspace, Tensor? learned=None)": _step,
    "window_step(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor "
    "seq_lens, int window, float? scale, Tensor? learned=None)": _window_step,
}
for _schema, _function in _SCHEMAS.items():
    _LIBRARY.define(f"{_schema} -> Tensor")
    _name = _schema.split("(")[0]
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"spectral_kernels::{_name}", lambda q, *_: q.new_empty(q.shape), lib=_LIBRARY
    )


# ---- the cache -----------------------------------------------------------------------------------


class _Link:
    """Ties a layer's `update` to the attention call that must follow it; its modules have it."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.pending: SpectralLayer | None = None  # updated, and its attention has not run yet
        self.updated = False  # in this forward
        self.seen: list[torch.Tensor] | None = None  # while `enable` checks

    def missed(self) -> RuntimeError:
        took = "tokens" if self.updated else "no tokens"
        return RuntimeError(
            f"layer {self.layer.index}: its cache took {took} and the attention function {NAME!r} "
            "did not follow in this forward; something replaces this model's attention"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:  # for copy and pickle
        raise RuntimeError("model: disable() before a copy, which would run the original's weights")


class SpectralLayer(CacheLayerMixin):
    """A full-attention layer of a `ModelCache`, which keeps the tokens; index: among these."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: ModelCache, index: int, link: _Link) -> None:
        super().__init__()
        self.of, self.index, self.link = weakref.ref(cache), index, link
        # Whether its tokens come before all others' in a forward.
        self.leads = link.layer.index == min(x.layer.index for x in cache.owner().links)

    @property
    def cache(self) -> ModelCache:
        return self.of()  # type: ignore[return-value]  # weak: memory goes with the last user

    def lazy_initialization(self, key_states: torch.Tensor, value_states: Any = None) -> None:
        """Nothing: the prompt allocates for all layers at once."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens' keys and values [B, G, Q, D]; returns those that the attention call
        is to see: all columns' for a prompt, the new for a step. RuntimeError: outside a forward.
        """
        cache, link, new = self.cache, self.link, key_states.shape[2]
        # Autocast leaves keys, which are turned in float32, in another dtype than values.
        dtype = cache.dtype if cache.filled else value_states.dtype
        key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if link.pending is not None:
            raise link.missed()
        if not cache.is_step(new):
            key_states, value_states = self.prompt(key_states, value_states)
        else:
            if torch.compiler.is_compiling():
                cache.stale = True
            elif not cache.busy:
                raise RuntimeError(_OUTSIDE)
            for part in cache.parts if self.leads else ():
                part.advance(new)
        link.pending, link.updated = self, True
        return key_states, value_states

    @torch.compiler.disable(reason=_EAGER)
    def prompt(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a prompt's k, v [B, G, Q, D]; returns those of all columns."""
        cache, new = self.cache, k.shape[2]
        if not cache.busy:
            raise RuntimeError(_OUTSIDE)
        with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
            if self.leads:
                cache.advance(new, v.dtype)
            past = self.past(new) if cache.filled else None
            self.store(k.detach(), v.detach())
            if past is not None:
                k, v = (torch.cat(x, dim=2) for x in zip(past, (k, v), strict=True))
        return k, v

    def past(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the columns before the `new` ones of a prompt, for its mask."""
        part, layer = self.cache.places[self.index]
        return part.past(layer, new, self.cache.columns)

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep a prompt's keys and values [B, G, Q, D]."""
        cache, (part, layer) = self.cache, self.cache.places[self.index]
        first = None if cache.filled or cache.first is None else cache.first.to(k.device)
        part.prefill(layer, k, v, first=first)

    def attend(self, q: Any, k: Any, v: Any, scale: Any, learned: Any) -> torch.Tensor:
        """A step: q [B, H, Q, D], k and v of the new tokens [B, G, Q, D]; returns [B, H, Q, D]."""
        (x, i), codec = self.cache.places[self.index], self.cache.codecs[self.index]
        workspace = x.workspace if q.shape[2] == 1 else None
        return torch.ops.spectral_kernels.step(
            q, k, v, x.k_pages[i], x.v_pages[i], x.k_exact[i], x.v_exact[i], x.block_table,
            x.seq_lens, codec, x.codec.sinks, x.codec.window, scale, workspace, learned,
        )  # fmt: skip

    def get_seq_length(self) -> Any:
        """Columns: a number; a tensor while compiling, so that no step compiles anew."""
        cache = self.cache
        if torch.compiler.is_compiling() and cache.filled:
            lengths = cache.spectral.seq_lens
            return (lengths if cache.first is None else lengths + cache.first)[0].long()
        return cache.sync()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Before transformers 5.4 a tensor of positions comes in. A step has no mask, so no keys.
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return (0 if self.cache.is_step(new) else self.cache.columns + new), 0

    def get_max_length(self) -> int:
        return -1  # it grows

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the cache does it for all layers, and `reorder_cache` as well."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...


class WindowLayer(SpectralLayer):
    """A layer of a `ModelCache` with a sliding window: the newest tokens, at fixed addresses.

    keys, values: [B, G, slots, D]; a row's token of position p in slot p % slots. No more slots
        than the cache has room for, and as long as these are fewer none is used twice.
    """

    is_sliding = True
    keys: Any
    values: Any

    @property
    def span(self) -> int:
        """Tokens that it attends to, of those that there is room for."""
        return min(self.link.layer.window, self.cache.capacity)

    def grown(self) -> list[torch.Tensor]:
        """Rings with slots for a larger capacity, while none has been used twice."""
        more = (0, 0, 0, max(0, self.span + SLACK - self.keys.shape[2]))
        return [nn.functional.pad(x, more) for x in (self.keys, self.values)]

    def past(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        ends, found = self.cache.spectral.seq_lens - new, []
        count = min(self.cache.columns, self.link.layer.window - 1)
        at = ends[:, None] + torch.arange(-count, 0, device=ends.device)
        at = at[:, None, :, None]  # positions [B, 1, columns, 1]
        for x in (self.keys, self.values):
            slots = (at % x.shape[2]).long().expand(-1, x.shape[1], -1, x.shape[3])
            found.append(x.gather(2, slots).masked_fill(at < 0, 0.0))
        return found[0], found[1]

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        shape = (*k.shape[:2], self.span + SLACK, k.shape[3])
        if self.keys is None or (self.keys.shape, self.keys.dtype) != (shape, k.dtype):
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)
        for ring, x in ((self.keys, k), (self.values, v)):  # also those that grew or were copied
            torch._dynamo.mark_static_address(ring)
            put(ring, x, self.cache.spectral.seq_lens)

    def attend(self, q: Any, k: Any, v: Any, scale: Any, learned: Any) -> torch.Tensor:
        state = (self.keys, self.values, self.cache.spectral.seq_lens, self.span)
        return torch.ops.spectral_kernels.window_step(q, k, v, *state, scale, learned)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length, _ = super().get_mask_sizes(query_length)
        offset = max(self.cache.columns - self.link.layer.window + 1, 0) if length else 0
        return length - offset, offset

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for x in (self.keys, self.values):
            x.copy_(x[beam_idx.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """RuntimeError: the window would have lost tokens to later ones."""
        keep = self.cache.columns + tokens_to_remove
        if max(keep - self.span + 1, 0) < self.cache.highest - self.keys.shape[2]:
            raise RuntimeError(f"{CACHE}: sliding windows keep {SLACK} tokens to crop, no more")


class ModelCache(Cache):
    """The cache of an enabled model (`cache=`; before transformers 5.24 `past_key_values=`).

    Attributes:
        parts: SpectralCaches, one a device, empty until the first prompt.
        others: layers of transformers' own: convolutions, linear attention, chunks.
        batch: rows, once known.
        capacity: tokens a row that it has room for. More make it grow: a copy, and a new capture.
        columns: tokens seen, padding included (transformers' sequence length).
        padding: left padding of each row.      limit: most new tokens of a step.
    Only forwards of its model fill it; a new one comes from `Handle.new_cache()` or from the model.
    A copy.deepcopy goes on by itself: one prompt, many continuations.
    """

    def __init__(self, handle: Handle, batch: Any, capacity: Any) -> None:
        self.owner: Any = weakref.ref(handle)  # weak: a cache that a caller keeps keeps no model
        layers, self.depth = own_layers(handle.config), handle.config.num_hidden_layers
        for i, link in enumerate(handle.links):
            if link.layer.index < self.depth:  # all, but where a model drafts by its first layers
                kind = WindowLayer if link.layer.window else SpectralLayer
                layers[link.layer.index] = kind(self, i, link)
        super().__init__(layers=layers)
        self.batch, self.capacity, self.limit = batch, capacity, handle.limit
        self.compileable = not handle.graph and len(handle.members) == 1  # of one device
        self.parts: list[SpectralCache] = []
        self.places: list[tuple[SpectralCache, int]] = []  # a layer's part, and where in it
        self.codecs: list[int] = []  # ids of the layers' codecs
        self.dtype: Any = None  # of exact tokens
        self.graph: Any = None  # a _StepGraph
        self.mask: Any = None  # that the model was given
        self.weights = 0  # stands for the addresses at which the graph reads the model
        self._forget()

    def _forget(self) -> None:
        self.columns, self.filled = 0, False
        self.highest = 0  # columns that there ever were, as far as cropping has to know
        self.padding: list[int] = []
        self.first: torch.Tensor | None = None  # padding as int32 [B] on the device; None: none
        self.busy = False  # a forward is under way
        self.failed = False  # one ended half-way
        self.stale = False  # compiled steps have moved seq_lens and not the host's numbers

    def reset(self) -> None:
        """Forget everything; memory and graph stay for the next sequences of as many rows."""
        self._forget()
        for part in self.parts:
            part.reset()
        self._renew(self.static)

    def _renew(self, keep: bool) -> None:
        """Other layers: emptied where they are, or new ones."""
        fresh = None if keep else own_layers(self.owner().config)
        for layer in self.others:
            if fresh is None:
                layer.reset()
            else:
                at, self.graph = self.layers.index(layer), None
                self.layers[at] = fresh[at]

    @property
    def others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, SpectralLayer)]

    @property
    def spectral(self) -> Any:
        """The SpectralCache (of the first device), None until the first prompt."""
        return self.parts[0] if self.parts else None

    @property
    def static(self) -> bool:
        """Whether other layers keep what they hold at the same addresses."""
        return all(x.is_compileable and not getattr(x, "record_past", 0) for x in self.others)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache."""
        held = sum(part.nbytes for part in self.parts)
        return held + sum(x.nbytes for layer in self.layers for x in _model.tensors_of(layer))

    @property
    def is_compileable(self) -> bool:
        return self.compileable and self.static

    def is_step(self, new: int) -> bool:
        """Whether a forward of so many new tokens is a step, not a prompt."""
        return self.filled and new <= self.limit

    def sync(self) -> int:
        """The columns; read from the device, with the lengths, after compiled steps."""
        if self.stale:
            for part in self.parts:
                part.read_lengths()
            self.columns, self.stale = self.spectral.lengths[0] + self.padding[0], False
        return self.columns

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a forward: every layer must have taken its tokens and have attended."""
        links = [layer.link for layer in self.layers if isinstance(layer, SpectralLayer)]
        for link in links:
            link.pending, link.updated = None, False
        self.busy = self.failed = True
        try:
            yield
            for link in links:
                if link.pending is not None or not link.updated:
                    raise link.missed()
            self.failed = False
        finally:
            self.busy = False
            for link in links:
                link.pending = None

    def room(self, new: int) -> None:
        """Make room for so many more columns."""
        wanted = self.columns + new
        if self.capacity is not None and wanted <= self.capacity:
            return
        wanted = max(wanted, 2 * self.capacity if self.capacity else wanted + max(512, wanted // 2))
        before, self.capacity, self.graph = self.capacity, -(-wanted // ROUND) * ROUND, None
        if self.filled:
            try:
                with torch.no_grad():
                    parts = self._allocate()
                    for old, larger in zip(self.parts, parts, strict=True):
                        copy_tokens(old, larger)
                    windows = (x for x in self.layers if isinstance(x, WindowLayer))
                    for layer, found in [(x, x.grown()) for x in windows]:  # of all, or of none
                        layer.keys, layer.values = found
                    self._take(parts)
            except BaseException:  # out of memory: the cache is as it was
                self.capacity = before
                raise
        else:
            self.parts = []

    def start(self, padding: list[int], device: torch.device) -> None:
        """Before the first prompt of a sequence."""
        if self.batch != len(padding):
            self.parts, self.graph = [], None
            self._renew(False)
        self.batch, self.padding = len(padding), padding
        if any(padding):
            self.first = torch.tensor(padding, dtype=torch.int32, device=device)

    def advance(self, new: int, dtype: torch.dtype) -> None:
        """Memory and lengths for a prompt's `new` columns."""
        if not self.parts or self.dtype != dtype:
            self.dtype, self.parts, self.graph = dtype, [], None
            self._take(self._allocate())
        for part in self.parts:
            first = None if self.filled or self.first is None else self.first.to(part.device)
            part.reserve(new if first is None else [new - n for n in self.padding])
            part.advance(new if first is None else new - first)

    def _allocate(self) -> list[SpectralCache]:
        """The memory of so many rows and so much room: a part for each device."""
        handle, parts = self.owner(), []
        for members, codec in zip(handle.members, handle.codecs, strict=True):
            some, drafts = [handle.links[i].layer for i in members], DRAFTS
            if codec is None:
                exact = [ModelCodec.exact(1, x.kv_heads, x.head_dim, self.capacity) for x in some]
                codec = replace(exact[0], layers=tuple(x.layers[0] for x in exact))
                codec, drafts = codec.to(some[0].device), 0
            shape = {"max_seqs": self.batch, "max_tokens": self.capacity, "drafts": drafts}
            shape["query_heads"] = some[0].kv_heads * some[0].group
            parts.append(SpectralCache(codec, dtype=self.dtype, device=some[0].device, **shape))
        return parts

    def _take(self, parts: list[SpectralCache]) -> None:
        """New tensors: known to the layers, the operator and torch.compile."""
        self.parts, members = parts, zip(parts, self.owner().members, strict=True)
        places = {layer: (part, i) for part, some in members for i, layer in enumerate(some)}
        self.places = [places[layer] for layer in sorted(places)]
        for part in parts:
            pools = (part.k_pages, part.v_pages, part.k_exact, part.v_exact)
            for x in chain(*pools, (part.block_table, part.seq_lens)):
                torch._dynamo.mark_static_address(x)
        codecs = [part.codec.layers[i] for part, i in self.places]
        self.codecs = [id(codec) for codec in codecs]
        _CODECS.update(zip(self.codecs, codecs, strict=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: -n removes n tokens, a positive number is the length to keep (padding
                included), as before transformers 5.17; 0 removes nothing since, everything before.
        Raises:
            ValueError: a row would end inside its left padding.
            RuntimeError: another layer no longer has what it would need.
        """
        columns, n = self.sync(), int(tokens_to_remove)  # before 5.24 a tensor
        keep = columns + n if n < 0 or (n == 0 and _CROP_COUNTS) else min(n, columns)
        if keep <= 0:
            self.reset()
        elif keep < columns:
            if keep <= max(self.padding):
                raise ValueError(f"tokens_to_remove: expected to keep {max(self.padding) + 1}")
            self.highest = max(self.highest, columns)
            for layer in self.layers:
                layer.crop(keep - columns)
            for part in self.parts:
                part.rollback(columns - keep)
                part.hold(self.capacity)
            self.columns = keep
        else:
            for layer in (x for x in self.others if getattr(x, "record_past", False)):
                layer.crop(0)  # forgets the past that it has recorded

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes the old row beam_idx[i] (int64 [B]), else NotImplementedError."""
        if not self.filled:
            return
        if beam_idx.shape != (self.batch,):
            raise NotImplementedError(f"{CACHE}: expected {self.batch} rows, got {len(beam_idx)}")
        self.sync()
        rows = beam_idx.tolist()
        for part in self.parts:
            part.reorder(rows)
            part.hold(self.capacity)
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        if self.first is not None:
            self.padding = [self.padding[row] for row in rows]
            self.first.copy_(self.first[beam_idx.to(self.first.device)])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """NotImplementedError unless repeats is 1: a cache keeps its number of rows."""
        self.reorder_cache(torch.arange(self.batch or 0).repeat_interleave(repeats))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"{CACHE}: copy.deepcopy makes its only copies; it cannot be pickled")

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCache:
        ours = [layer for layer in self.layers if isinstance(layer, SpectralLayer)]
        memo |= {id(x): x for x in (*(y.link for y in ours), *(y.codec for y in self.parts))}
        memo[id(self.graph)] = None  # it has other addresses
        memo[id(self)] = new = type(self).__new__(type(self))
        with torch.inference_mode(False):
            new.__dict__ = copy.deepcopy(self.__dict__, memo)
        for layer in ours:
            memo[id(layer)].of = weakref.ref(new)
        return new


class _StepGraph:
    """The one-token forward of a model on one cache as a CUDA graph with static inputs.

    Capturing runs `forward(ids, positions)` twice first, each time from the same seq_lens and the
    same states of other layers: the runs write where the replay that follows writes.
    """

    def __init__(self, forward: Any, cache: ModelCache, shared: Any, watched: bool):
        seq_lens, (pool, stream, self.last) = cache.spectral.seq_lens, shared
        moved = [seq_lens, *(x for layer in cache.others for x in _model.tensors_of(layer))]
        before = [x.clone() for x in moved]
        self.ids = seq_lens.new_zeros((cache.batch, 1), dtype=torch.int64)
        self.positions = seq_lens[:, None].long()
        self.graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(seq_lens.device)
        settings = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        stream.wait_stream(main)
        try:
            # Around the capture too: one that fails does not go back to the stream before.
            with torch.cuda.stream(stream):
                for watch in (nullcontext(), _model.NoWaits() if watched else nullcontext()):
                    with watch:
                        forward(self.ids, self.positions)
                    torch._foreach_copy_(moved, before)
                with torch.cuda.graph(self.graph, **settings):
                    output = forward(self.ids, self.positions)
            self.kind, self.logits = type(output), output.logits
        finally:
            main.wait_stream(stream)
            torch._foreach_copy_(moved, before)

    def replay(self, cache: ModelCache, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        self.ids.copy_(ids, non_blocking=True)
        self.positions.copy_(positions, non_blocking=True)
        stream = torch.cuda.current_stream(self.ids.device)
        stream.wait_event(self.last)  # on another thread's stream: graphs share their memory
        self.graph.replay()
        logits = self.logits.clone()
        self.last.record(stream)
        return self.kind(logits=logits, **{CACHE: cache})


# ---- the model -----------------------------------------------------------------------------------


class _Local(threading.local):
    """What a thread is doing: captures a step, generates, with the cache that it took."""

    capturing = generating = False
    taken: ModelCache | None = None


class Handle(AbstractContextManager["Handle"]):
    """What `enable` returns: `disable()` it, or leave its `with` block. Not made by hand.

    Attributes: model, preset, codec (None: exact), graph (steps are replayed), compile, max_tokens.
    """

    def __init__(
        self, model: Any, layers: Sequence[Layer], preset: str, codec: ModelCodec | None,
        graph: bool, compiles: bool, max_tokens: int | None, stock: Sequence[Any],
    ) -> None:  # fmt: skip
        self.model, self.codec, self.max_tokens, self.compile = model, codec, max_tokens, compiles
        self.config, self.preset = decoder_of(model).config, codec.preset if codec else preset
        self.limit = MAX_STEP if codec is None else min(codec.window, MAX_STEP)
        self._implementation: str = self.config._attn_implementation
        self.links = [_Link(layer) for layer in layers]
        devices = list(dict.fromkeys(layer.device for layer in layers))
        # Indices of the `links` that attend fully, which come first, on each device.
        full = [(i, layer) for i, layer in enumerate(layers) if not layer.window]
        self.members = [[i for i, layer in full if layer.device == d] for d in devices]
        self.codecs = [
            codec and replace(codec, layers=tuple(codec.layers[i] for i in some)).to(device)
            for some, device in zip(self.members, devices, strict=True)
        ]
        self.graph = graph and model.device.type == "cuda" and _model.stays(self.config, layers)
        self._pool: dict[int, ModelCache] = {}  # idle caches by rows, the newest last
        self._shared: Any = None  # by all graphs: memory, stream of captures, last replay
        if self.graph:  # cuBLAS keeps a workspace for every stream
            stream = torch.cuda.Stream(model.device)
            self._shared = torch.cuda.graph_pool_handle(), stream, torch.cuda.Event()
        self._lock, self._local = threading.RLock(), _Local()
        self._patches: list[tuple[nn.Module, str, Any]] = []
        self._stock = stock
        for link in self.links:
            for module in link.layer.modules:
                module._spectral = link  # type: ignore[assignment]
        self._patch(decoder_of(model), "forward", self._decoder_forward)
        self._patch(model, "forward", self._model_forward)
        self._patch(model, "generate", self._generate)
        self._patch(model, "prepare_inputs_for_generation", _prepare_inputs)
        self._patch(model, "_prepare_cache_for_generation", self._prepare_cache)
        self.config._attn_implementation = _register(self._implementation)

    def _patch(self, owner: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        if name == "generate":  # what Unsloth wraps: its own forces caches of other kinds
            original = getattr(owner, "_old_generate", original)
        if self.graph:  # a capture takes no graphs that a caller's torch.compile has made
            original = getattr(original, "_torchdynamo_orig_callable", original)
        self._patches.append((owner, name, vars(owner).get(name)))

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                # States that are made now will be written in other modes too.
                with torch.inference_mode(False), torch.no_grad():
                    return patched(*args, **kwargs)
            if not self._stock:
                return wrapper(original, *args, **kwargs)
            ours = name != "forward" or any(isinstance(x, ModelCache) for x in kwargs.values())
            with _model.using(self._stock if ours else ()):
                return wrapper(original, *args, **kwargs)

        setattr(owner, name, patched)

    def disable(self) -> None:
        """Give the model its attention back and free idle caches. A second call does nothing."""
        if not self._patches:
            return
        for owner, name, before in reversed(self._patches):
            delattr(owner, name) if before is None else setattr(owner, name, before)
        for link in self.links:
            for module in link.layer.modules:
                del module._spectral
        self.config._attn_implementation = self._implementation
        self._patches, self._pool = [], {}

    def __exit__(self, *error: Any) -> None:
        self.disable()

    def new_cache(self, batch: int | None = None, max_tokens: int | None = None) -> ModelCache:
        """An empty `cache` (`past_key_values` before transformers 5.24) to keep between calls.

        Args:
            batch: rows; default those of the first prompt.
            max_tokens: of a row to have room for; default the handle's, else by the prompt.
        Raises:
            ValueError: a number is no integer of at least 1.
        """
        check_counts(batch=batch, max_tokens=max_tokens)
        return ModelCache(self, batch, max_tokens or self.max_tokens)

    def _decoder_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward of the decoder. A compiled step is left alone: nothing asks the host."""
        alone, cache = False, kwargs.get(CACHE)
        if not torch.compiler.is_compiling():
            alone = self._local.capturing
        elif isinstance(cache, ModelCache):
            ids = args[0] if args else kwargs.get("input_ids")
            alone = cache.is_step((kwargs["inputs_embeds"] if ids is None else ids).shape[1])
        elif cache is None:
            alone = kwargs.get("use_cache") is False
        forward = original if alone else functools.partial(self._eager_forward, original)
        return forward(*args, **kwargs)

    @torch.compiler.disable(reason=_EAGER)
    def _eager_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward of the decoder: checked, prepared, run, and looked at afterwards."""
        kwargs = {**inspect.signature(original).bind_partial(*args).arguments, **kwargs}
        with self._lock:
            cache = self._cache_of(kwargs)
            if cache is None:
                return original(**kwargs)
            new = self._begin(cache, kwargs)
            step = cache.is_step(new)
            for part in cache.parts if step else ():
                part.reserve(new)
            with cache.running():
                out = original(**kwargs)
            for part in () if step else cache.parts:  # pages for all: no later step asks for one
                part.hold(cache.capacity)
            cache.columns, cache.filled, cache.stale = cache.columns + new, True, False
            return out

    def _cache_of(self, kwargs: dict[str, Any]) -> ModelCache | None:
        """The cache of a forward, put into kwargs, or None. Checked; nothing is changed."""
        if _OLD_CACHE in kwargs:  # the new keyword wins, as in transformers
            kwargs.setdefault(CACHE, kwargs.pop(_OLD_CACHE))
        cache, use = kwargs.get(CACHE), kwargs.get("use_cache")
        if cache is None and not (self.config.use_cache if use is None else use):
            return None
        if cache is not None and not isinstance(cache, ModelCache):
            raise TypeError(f"{CACHE}: expected one of new_cache(), got {type(cache).__name__}")
        if self.model.training:
            raise ValueError("model: expected evaluation mode or use_cache=False, got training")
        outputs = kwargs.get("output_attentions")
        if self.config.output_attentions if outputs is None else outputs:
            raise ValueError("output_attentions: expected False, got True; no weights are formed")
        cache = kwargs[CACHE] = self.new_cache() if cache is None else cache
        if cache.owner() is not self:
            raise ValueError(f"{CACHE}: expected one of this model and this enable(), got another")
        if cache.failed:
            raise ValueError(f"{CACHE}: an earlier forward through it failed half-way; reset() it")
        if cache.filled and torch.is_grad_enabled():
            if any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ValueError(f"{CACHE}: a filled one has no gradient; use torch.no_grad()")
        return cache

    def _begin(self, cache: ModelCache, kwargs: dict[str, Any]) -> int:
        """Rows, padding, positions and room of a forward; returns its new tokens a row."""
        ids, embeds, mask = map(kwargs.get, ("input_ids", "inputs_embeds", "attention_mask"))
        inputs = embeds if ids is None else ids
        mask = cache.mask if isinstance(mask, dict) else mask  # made of it: pictures' in Gemma 3
        if inputs is None or inputs.shape[1] < 1:
            got = "neither" if inputs is None else "no new token"
            raise ValueError(f"forward: expected input_ids or inputs_embeds, got {got}")
        batch, new = inputs.shape[:2]
        past, filled, full = cache.sync(), cache.filled, not cache.others
        if filled and batch != cache.batch:
            raise ValueError(f"{CACHE}: expected {cache.batch} rows, as it holds, got {batch}")
        # A step of one token reads nothing from the device: its mask can only have grown.
        padding = _left_padding(mask, (batch, past + new), cache, not filled or new > 1)
        if not filled:
            cache.start(padding or [0] * batch, inputs.device)
        cache.room(new)
        if cache.first is not None and kwargs.get("position_ids") is None:
            at = torch.arange(past, past + new, device=inputs.device)
            kwargs["position_ids"] = (at - cache.first[:, None]).clamp(min=0).long()
        if cache.first is not None and mask is None and not (cache.is_step(new) and full):
            column = torch.arange(past + new, device=inputs.device)
            kwargs["attention_mask"] = (column >= cache.first[:, None]).long()
        if new > 1 and not (filled and self._local.generating):
            self._renew_graph(cache)  # generate() has done so for a filled one, not for each draft
        return new

    def _renew_graph(self, cache: ModelCache) -> None:
        """Drop a graph of other weights, adapters or autocast."""
        if self.graph:
            weights = _model.weights_of(self.model)
            cache.graph = cache.graph if cache.weights == weights else None
            cache.weights = weights

    def _model_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward of the model: a step of one token that asks for logits alone is replayed."""
        if torch.compiler.is_compiling() or self._local.capturing:
            return original(*args, **kwargs)
        given = {**dict(zip(["input_ids", "attention_mask"], args, strict=False)), **kwargs}
        cache: Any = given.get(CACHE, given.get(_OLD_CACHE))
        if isinstance(cache, ModelCache):
            cache.mask = given.get("attention_mask")
        ids: Any = given.get("input_ids")
        asked = {name: x for name, x in given.items() if name not in _PLAIN and x is not None}
        plain = len(args) < 2 and asked.pop("use_cache", True) and asked.pop("return_dict", True)
        plain &= getattr(given.get("position_ids"), "ndim", 2) == 2  # of M-RoPE 3
        step = self.graph and isinstance(cache, ModelCache) and cache.filled and cache.static
        step = step and ids is not None and ids.shape[1] == 1
        if not (step and plain and all(x is False for x in asked.values())):
            out = original(*args, **kwargs)
            if isinstance(cache, ModelCache) and self._local.generating:
                with self._lock:  # so that no step has to
                    self._captured(original, cache)
            return out
        with self._lock:
            self._cache_of(given)
            self._begin(cache, given)
            positions: Any = given.get("position_ids")
            positions = cache.spectral.seq_lens[:, None] if positions is None else positions
            if not self._captured(original, cache):
                return original(*args, **kwargs)
            cache.failed = True  # unless all of this is done
            cache.spectral.reserve(1)
            out = cache.graph.replay(cache, ids, positions)
            cache.columns, cache.failed = cache.columns + 1, False
            return out

    def _captured(self, original: Callable[..., Any], cache: ModelCache) -> bool:
        """Whether there is a graph of a step, captured now if one can run. What cannot is said."""
        free = cache.filled and cache.static and cache.columns < (cache.capacity or 0)
        if cache.graph is not None or not (self.graph and free):
            return cache.graph is not None

        def forward(ids: torch.Tensor, positions: torch.Tensor) -> Any:
            options = {"use_cache": True, "return_dict": True, CACHE: cache}
            with cache.running():
                return original(input_ids=ids, position_ids=positions, **options)

        self._local.capturing, device = True, torch.cuda.device(cache.spectral.seq_lens.device)
        lengths = cache.spectral.lengths
        cache.spectral.reserve(1)
        try:
            fused = self.compile and not cache.others
            layers = compiled_layers(decoder_of(self.model), cache) if fused else nullcontext()
            # As generate() decodes: experts by a product that needs no numbers on the host.
            decoding = getattr(self.model, "_optimize_model_for_decode", nullcontext)()
            on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            # A graph would go on reading weights that were cast before.
            cast = torch.autocast("cuda", dtype=dtype, enabled=on, cache_enabled=False)
            with device, torch.no_grad(), cast, decoding, layers:
                cache.graph = _StepGraph(forward, cache, self._shared, not fused)
        except RuntimeError as error:
            self.graph = cache.failed = False
            what = "this model's step cannot be captured as a CUDA graph, and runs without, slower"
            warnings.warn(f"spectral_kernels: {what}: {str(error).splitlines()[0]}", stacklevel=2)
        finally:
            self._local.capturing, cache.spectral.lengths = False, lengths
        return cache.graph is not None

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """generate(): the cache that it took from the pool goes back, unless it is returned."""
        local, out = self._local, None
        outer, local.taken, local.generating = (local.taken, local.generating), None, True
        try:
            out = original(*args, **kwargs)
            return out
        finally:
            cache, (local.taken, local.generating) = local.taken, outer
            returned = isinstance(out, dict) and out.get(CACHE) is cache
            if cache is not None and self._patches and not returned:
                with self._lock:
                    self._pool[cache.batch] = cache
                    while len(self._pool) > POOLED:
                        del self._pool[next(iter(self._pool))]

    def _prepare_cache(
        self, original: Callable[..., Any], config: Any, model_kwargs: dict[str, Any], mode: Any,
        batch_size: int, max_cache_length: int,
    ) -> Any:  # fmt: skip
        """Where generate() makes its cache: it takes one with the rows and the room."""
        asked, longest = max_cache_length + 1, getattr(self.config, "max_position_embeddings", None)
        tokens = max(min(asked, longest or asked), self.max_tokens or 0)
        chunk = config.prefill_chunk_size  # chunks are prompts
        if self.graph or tokens < asked or chunk is not None:  # compiled steps cannot make room
            config.disable_compile = True
        if getattr(config, "return_legacy_cache", False):
            raise ValueError("return_legacy_cache: expected False while enabled, got True")
        given: Any = model_kwargs.get(CACHE)
        ours = isinstance(given, ModelCache) and given.owner() is self
        if config.use_cache is not False and (ours or (given is None and chunk is not None)):
            mask = model_kwargs.get("attention_mask")  # no step of one token looks at it
            padding = _left_padding(mask, getattr(mask, "shape", ())[:2], given)
            if padding and chunk is not None:  # with a token of every row
                config.prefill_chunk_size = max(chunk, max(padding) + 1)
        if ours:
            given.room(max(0, tokens - given.sync()))
            self._renew_graph(given)
        if given is not None or config.use_cache is False:
            return original(config, model_kwargs, mode, batch_size, max_cache_length)
        kind = config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full", "hybrid"):
            raise ValueError(f"cache_implementation: expected None while enabled, got {kind!r}")
        rows = batch_size * max(config.num_beams or 1, config.num_return_sequences or 1)
        with self._lock:
            cache = self._pool.pop(rows, None)
        if cache is None or cache.capacity < tokens or cache.depth != self.config.num_hidden_layers:
            cache = None  # freed before its successor is allocated
            cache = ModelCache(self, rows, -(-tokens // ROUND) * ROUND)
        cache.reset()
        if getattr(config, "is_assistant", False) and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        self._local.taken = model_kwargs[CACHE] = cache


def enable(
    model: PreTrainedModel,
    preset: str = "balanced",
    *,
    codec: str | os.PathLike[str] | ModelCodec | None = None,
    tokenizer: Any = None,
    graph: bool = True,
    compile: bool = False,
    max_tokens: int | None = None,
    check: bool = True,
) -> Handle:
    """Let `generate` and forwards with a cache use a spectral one, until `disable()`.

    Args:
        model: a decoder-only ForCausalLM of transformers 4.57 to 5.24 in evaluation mode, fp16,
            bf16 or fp32 (no bf16 on cards before sm_80: load it with dtype=torch.float16), some of
            whose layers attend fully, by transformers' interface, with head dimension 64, 80, 96,
            128 or 256. Layers with a sliding window keep its tokens, others what transformers
            gives them. Several devices: a state on each, and windows as in transformers.
        preset: "exact" (every token stays as it is), "quality", "balanced" or "small".
        codec: file or ModelCodec of this model; its preset counts then. Without one: that of the
            user's cache folder, or one made here (minutes on a CPU) and kept.
        tokenizer: to calibrate with; default by the model's name.
        graph: on CUDA, capture the one-token forward once a cache as a CUDA graph and replay it; no
            Python runs in it, and hooks on its layers are silent. False: steps run eagerly, or
            compiled: by generate() on CUDA, by torch.compile(fullgraph=True) anywhere.
        compile: have torch.compile fuse what lies between the matrix products of a captured step:
            tokens come faster, the first one of a process and batch size up to a minute later, and
            results are rounded elsewhere ("exact" may part from the dense tokens at a tie). Not
            where other layers than ours are.
        max_tokens: the least room of a cache, tokens a row. generate() takes what its call needs,
            up to max_position_embeddings, other forwards half as much again as the prompt, at
            least 512 more. A full cache is doubled; compiled steps cannot grow theirs.
        check: run six tokens through the model and compare each layer's attention with the model's
            own (milliseconds). False, or a model in training mode: not.
    Returns:
        A Handle: a context manager with `disable()` and `new_cache()`.
    Raises:
        TypeError, ValueError, NotImplementedError: the model or an argument is not as above, and
            nothing was changed. So do forwards with a cache: training mode, output_attentions,
            foreign caches, masks other than 2-D left padding, gradients through a filled cache.
    """
    layers = _model.layers_of(model)
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {list(PRESETS)}, got {preset!r}")
    check_counts(max_tokens=max_tokens)
    stock = _model.stock_parts(model)
    with _model.using(stock):
        found = None if preset == "exact" else _codec(model, layers, preset, codec, tokenizer)
    layers += _model.windows_of(model, layers)
    handle = Handle(model, layers, preset, found, graph, compile, max_tokens, stock)
    if check and not model.training:
        _check(handle)
    return handle


def _check(handle: Handle) -> None:
    """A prompt of five tokens and a step of one (kernels for more are for drafts) through our
    attention and the model's own. NotImplementedError: they differ; the handle is disabled."""
    room, decoder = handle.new_cache(1, ROUND), decoder_of(handle.model)
    ids = torch.arange(1, 7, device=handle.model.device)[None] % handle.config.vocab_size
    try:
        with torch.inference_mode(False), torch.no_grad():
            for link in handle.links:
                link.seen = []
            for some in (ids[:, :5], ids[:, 5:]):
                decoder(input_ids=some, use_cache=True, **{CACHE: room})
    except Exception as error:
        handle.disable()
        raise NotImplementedError(
            f"model: it stays dense, as six tokens failed (check=False: not tried): {error}"
        ) from error
    finally:
        for link in handle.links:
            link.seen = None


def _codec(
    model: PreTrainedModel, layers: Sequence[Layer], preset: str, codec: Any, tokenizer: Any
) -> ModelCodec:
    """The codec given, or known, or calibrated now; checked against the model."""
    name = fingerprint(model)
    if codec is None:
        codec = cache_path(name, preset)
        if not codec.is_file():
            from . import calibrate  # not needed where a codec is known

            if any(layer.shard[1] > 1 for layer in layers):
                raise ValueError(f"codec: expected {codec}, made before the model was sharded")
            print(f"spectral_kernels: calibrating {preset!r} for this model, once", file=sys.stderr)
            path, codec = codec, calibrate.calibrate(model, tokenizer, preset)
            try:
                codec.save(path)
            except OSError as error:
                warnings.warn(f"spectral_kernels: the codec was not kept: {error}", stacklevel=3)
    if not isinstance(codec, ModelCodec):
        codec = ModelCodec.load(codec)
    if codec.fingerprint not in ("", name):
        raise ValueError(f"codec: expected this model's ({name}), got {codec.fingerprint}")
    wanted = [(x.kv_heads * x.shard[1], x.head_dim) for x in layers]
    got = [(x.kv_heads, x.layout.head_dim) for x in codec.layers]
    if wanted != got:
        found = [f"{len(x)} layers of (KV heads, D) {sorted(set(x))}" for x in (wanted, got)]
        raise ValueError(f"codec: expected {found[0]}, got {found[1]}")
    parts = zip(layers, codec.layers, strict=True)
    return replace(codec, layers=tuple(layer.codec(whole) for layer, whole in parts))


def _prepare_inputs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What generate() gives a forward: a 2-D mask, and none in a step of one token."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, ModelCache):
        return original(*args, **kwargs)
    compileable, cache.compileable = cache.compileable, False  # else a mask of 4 would be made
    try:
        inputs = original(*args, **kwargs)
    finally:
        cache.compileable = compileable
    ids, kept = inputs.get("input_ids"), inputs.get(CACHE) is cache  # Phi-3 drops it at a switch
    if kept and cache.filled and not cache.others and ids is not None and ids.shape[1] == 1:
        inputs.pop("attention_mask", None)
    return inputs


def _left_padding(mask: Any, shape: Any, cache: Any, read: bool = True) -> list[int] | None:
    """Left padding of each row of a 2-D mask (1 = a token); a filled cache's must be the same. One
    read of the device, or (not `read`) none."""
    if mask is None:
        return None
    got: Any = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if got != list(shape):
        wanted = f"a 2-D tensor of shape {list(shape)} (cached and new tokens)"
        raise ValueError(f"attention_mask: expected {wanted} or use_cache=False, got {got}")
    if not read:
        return None
    columns, seen = shape[1], mask.bool()
    padding = columns - seen.sum(dim=1)
    holes = (seen != (torch.arange(columns, device=seen.device) >= padding[:, None])).any()
    *counts, has_holes = torch.cat((padding, holes[None])).tolist()
    if has_holes or max(counts) >= columns:
        got = "holes or right padding" if has_holes else f"padding {counts}"
        wanted = "left padding, a token in every row, or use_cache=False"
        raise ValueError(f"attention_mask: expected {wanted}, got {got}")
    if cache is not None and cache.filled and counts != cache.padding:
        raise ValueError(f"attention_mask: expected padding {cache.padding}, got {counts}")
    return counts


# ---- the attention function and its mask ---------------------------------------------------------


@functools.cache
def _register(implementation: str) -> str:
    """Register our attention function over one of transformers'; returns its name."""

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """q [B, H, Q, D], k and v as `SpectralLayer.update` returned them; returns [B, Q, H, D]."""
        link: Any = getattr(module, "_spectral", None)
        layer, out = link and link.pending, None
        if layer is not None:
            link.pending = None
        if layer is not None and layer.cache.is_step(query.shape[2]):
            asked = (kwargs.get("softcap"), kwargs.get("sliding_window") or 0)
            if asked != (None, link.layer.window):
                what = f"(softcap, window) {(None, link.layer.window)}, got {asked}"
                raise NotImplementedError(f"layer {link.layer.index}: expected {what}")
            out = layer.attend(query.to(key.dtype), key, value, scaling, kwargs.get("s_aux"))
        if layer is not None and link.seen is not None:
            new = (query, key, value)
            _model.compare(link.layer, module, link.seen, *new, out, scaling=scaling, **kwargs)
        if out is not None:
            return out.transpose(1, 2).to(query.dtype), None
        # A prompt, no cache, or a model that shares its config object with an enabled one.
        dense = dense_attention(implementation, module)
        return dense(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def mask(*args: Any, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
        """transformers' mask for a prompt, none for a step (`SpectralLayer.get_mask_sizes`)."""
        make = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        return make(*args, kv_length=kv_length, **kwargs) if kv_length else None

    AttentionInterface.register(f"{NAME}_{implementation}", attention)
    AttentionMaskInterface.register(f"{NAME}_{implementation}", mask)
    return f"{NAME}_{implementation}"

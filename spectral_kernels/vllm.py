"""The spectral cache in vLLM: an attention backend that vLLM finds as a plugin.

    vllm serve MODEL --attention-backend SPECTRAL --additional-config '{"spectral": {"codec": PATH}}'

vLLM keeps its scheduler, block manager and workers; a page of its pool (64 tokens) holds the layers'
coefficients, so that it admits as many more tokens as they are smaller. The exact tokens lie beside
the pool, a slot a running request (`SpectralImpl`), as does what all layers share (`Engine`).

    build()     on the host, before a step, launches only: which slot a request has, what it lacks
    forward()   decodes: append and attend, tensors of fixed addresses alone, one full CUDA graph;
                prompts: attend to the raw keys and values and, beyond 128 tokens, to the past rebuilt
                a piece at a time, joined by their states; then encode

A request that starts on computed tokens (a prefix hit, or resumed after preemption) finds them in
pages. Its window is rebuilt from these; its sinks come exact from a pool by the number of the first
page (`SinkPool`), else from the page too.
Tested with vLLM 0.32 (CPU, model runner V1) and 0.33 (CUDA, V2). Test: tests/test_vllm.py.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm

from .attention import attend_spectral, attend_workspace
from .codec import ModelCodec
from .compress import append, decode, encode
from .layout import HEAD_DIMS, PAGE_SIZE
from .merge import merge_states
from .window import slots_torch

OLDEST, NEWEST = (0, 32), (0, 33)  # releases of vLLM that this was run with
_RELEASE = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
if not OLDEST <= _RELEASE <= NEWEST:
    raise ImportError(f"spectral_kernels.vllm: expected vLLM 0.32 or 0.33, got {vllm.__version__}")

from vllm.config import VllmConfig, get_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.models.utils import extract_layer_index  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    replace_as,
)

NAME = "SPECTRAL"
PATH = "spectral_kernels.vllm.SpectralBackend"
CHUNK = 128  # most new tokens on a past that are attended by the decode kernel
QUERIES = 16  # of them at once
PIECE = 8192  # tokens of a past that are rebuilt at once
SHARE = 0.25  # of the device's memory that the exact tokens may take
POOL = 4  # entries of the sink pool for each request that may run
log = logging.getLogger("vllm.spectral")  # vLLM shows what loggers below its own say


def register() -> None:
    """The entry point: vLLM calls it in every process, more than once."""
    if NAME in AttentionBackendEnum.__members__:
        return
    member: Any = AttentionBackendEnum.register(NAME, PATH)
    # A process that is spawned gets its configuration before it loads plugins.
    member.__reduce_ex__ = lambda protocol: (_member, ())
    if current_platform.is_cpu():
        _choose_on_cpu(type(current_platform))


def _member() -> AttentionBackendEnum:
    register()
    return AttentionBackendEnum[NAME]


def _choose_on_cpu(platform: Any) -> None:
    """vLLM's CPU platform ignores which backend is asked for: it must not ignore ours."""
    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(
        selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not AttentionBackendEnum[NAME]:
            return original(selected_backend, attn_selector_config, num_heads)
        reasons = SpectralBackend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"{NAME}: not valid for this configuration: {reasons}")
        return PATH

    platform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


# ---- on the host: who has which slot, and whose sinks are kept -----------------------------------


class SinkPool:
    """Which first pages' exact sinks are kept, and in which entry. Host only.

    An entry belongs to what a request has computed into its first page from token 0 on. Whoever
    computes these tokens anew writes the entry anew, or has it forgotten: none can be found for other
    tokens than the page holds. The entry unused for longest gives way; running requests have sinks
    of their own and need none.

    Args:
        entries: of the pool, 0 .. entries - 1.
    """

    def __init__(self, entries: int) -> None:
        self._entries: OrderedDict[int, int] = OrderedDict()  # of pages, that used last at the end
        self._free = list(range(entries - 1, -1, -1))

    def find(self, page: int) -> int | None:
        """The entry of a sequence that starts on this page."""
        if page in self._entries:
            self._entries.move_to_end(page)
        return self._entries.get(page)

    def write(self, page: int) -> int:
        """The entry for the sinks that are about to be computed into this page."""
        entry = self._entries.pop(page, None)
        if entry is None:
            entry = self._free.pop() if self._free else self._entries.popitem(last=False)[1]
        self._entries[page] = entry
        return entry

    def forget(self, page: int) -> None:
        """This page gets other tokens, and no entry."""
        if page in self._entries:
            self._free.append(self._entries.pop(page))


@dataclass
class Rows:
    """The requests of a step, on the host: numpy arrays [n].

    Attributes:
        past, length: tokens computed before, and with the new ones.
        filling: whether the prompt is not computed yet.
        pages: the numbers of the pages of row i, for those rows that are known.
    """

    past: np.ndarray
    length: np.ndarray
    filling: np.ndarray
    pages: dict[int, np.ndarray]


class IndexedSlots:
    """Slots where vLLM numbers its requests (model runner V2): the number is the slot.

    A number goes from one request to another unseen. A request that starts is always filling its
    prompt, so only such rows are in doubt: one goes on where it was in the step just before, filling
    too, to where it starts now and in the same pages; else it counts as new.
    """

    def __init__(self, slots: int, window: int) -> None:
        self.window, self.scratch, self.step = window, slots, 0
        self._end = np.zeros(slots + 1, np.int64)
        self._seen = np.full(slots + 1, -2, np.int64)  # the last step in which a slot was filling
        self._tail: dict[int, tuple[int, ...]] = {}

    def place(self, rows: Rows, index: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Slots int64 [n] and the rows that start now. vLLM's dummy rows get the scratch slot."""
        slots = np.where((rows.past > 0) | rows.filling, index, self.scratch)
        self.step += 1
        started = []
        for i in np.flatnonzero(rows.filling):
            slot, past, length = int(slots[i]), int(rows.past[i]), int(rows.length[i])
            same = self._seen[slot] == self.step - 1 and self._end[slot] == past > 0
            if not same or self._tail[slot] != self._tail_of(rows.pages[i], past):
                started.append(int(i))
            self._seen[slot], self._end[slot] = self.step, length
            self._tail[slot] = self._tail_of(rows.pages[i], length)
        return slots, started

    def _tail_of(self, pages: np.ndarray, length: int) -> tuple[int, ...]:
        return tuple(pages[max(length - self.window, 0) // PAGE_SIZE : -(-length // PAGE_SIZE)])


class PagedSlots:
    """Slots where vLLM does not number its requests (model runner V1): known by all their pages."""

    def __init__(self, slots: int) -> None:
        self.scratch, self.step = slots, 0
        self._owner: dict[tuple[int, ...], int] = {}  # (length, *pages) -> slot
        self._used = np.full(slots, -1, np.int64)

    def place(self, rows: Rows, index: None = None) -> tuple[np.ndarray, list[int]]:
        """As `IndexedSlots.place`."""
        self.step += 1
        slots, started, known = np.full(len(rows.past), self.scratch), [], []
        for i, (past, length) in enumerate(zip(rows.past, rows.length, strict=True)):
            slot = self._owner.pop(self._key(rows, i, past), None) if past else None
            if slot is None or self._used[slot] == self.step:
                started.append(i)
            else:
                slots[i], self._used[slot] = slot, self.step
            first = -(-past // PAGE_SIZE)  # page that this row begins: no longer another's
            known += rows.pages[i][first : -(-length // PAGE_SIZE)].tolist()
        begun = set(known)
        self._owner = {k: s for k, s in self._owner.items() if begun.isdisjoint(k[1:])}
        held = set(self._owner.values())
        for i in started:
            order = ((s in held, self._used[s], s) for s in range(self.scratch))
            slots[i] = min(x for x in order if x[1] != self.step)[2]
            self._used[slots[i]] = self.step
        self._owner = {k: s for k, s in self._owner.items() if self._used[s] != self.step}
        for i, length in enumerate(rows.length):
            self._owner[self._key(rows, i, length)] = int(slots[i])
        return slots, started

    @staticmethod
    def _key(rows: Rows, i: int, length: int) -> tuple[int, ...]:
        return (int(length), *rows.pages[i][: -(-length // PAGE_SIZE)].tolist())


# ---- what all layers of a worker share -----------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of one engine: --additional-config '{"spectral": {...}}', else the environment.

    Args:
        codec: file that calibrate wrote (SPECTRAL_CODEC).      preset: its name, or "exact", which
            needs no file (SPECTRAL_PRESET).
    """

    codec: str | None = None
    preset: str | None = None

    @classmethod
    def of(cls, config: VllmConfig) -> Settings:
        given = {"codec": os.environ.get("SPECTRAL_CODEC")}
        given["preset"] = os.environ.get("SPECTRAL_PRESET")
        more = config.additional_config
        more = more.get("spectral", {}) if isinstance(more, dict) else {}
        if not set(more) <= set(given):
            raise ValueError(f"spectral: expected {sorted(given)}, got {sorted(more)}")
        return cls(**{**given, **more})

    def load(self, config: VllmConfig, layers: int) -> ModelCodec:
        """The whole model's codec, on the CPU.

        Raises:
            ValueError: there is none, or it is not this model's.
        """
        model = config.model_config
        heads, dim = model.get_total_num_kv_heads(), model.get_head_size()
        if self.preset == "exact":
            return ModelCodec.exact(layers, heads, dim, model.max_model_len)
        if self.codec is None or not Path(self.codec).is_file():
            raise ValueError(
                f"spectral: expected a codec file, got {self.codec}. Make one with: python -m "
                f"spectral_kernels.calibrate --model {model.model} --preset "
                f"{self.preset or 'balanced'} --out codec.safetensors; then --additional-config "
                '\'{"spectral": {"codec": "codec.safetensors"}}\' or SPECTRAL_CODEC.'
            )
        codec = ModelCodec.load(self.codec)
        if self.preset not in (None, codec.preset):
            raise ValueError(f"preset: expected the codec's, {codec.preset}, got {self.preset}")
        got = {(x.kv_heads, x.layout.head_dim) for x in codec.layers}
        if got != {(heads, dim)} or any(x.k_basis.shape[0] != 1 for x in codec.layers):
            raise ValueError(f"codec: expected {heads} KV heads of {dim}, got {sorted(got)}")
        return codec


def _check_config(config: VllmConfig) -> None:
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "decode context parallel": parallel.decode_context_parallel_size > 1,
        "prefill context parallel": parallel.prefill_context_parallel_size > 1,
        "microbatches (DBO)": parallel.enable_dbo,
        "a quantised kv_cache_dtype": config.cache_config.cache_dtype not in (
            "auto", "bfloat16", "float16"
        ),
        "model runner V1 on a GPU (set VLLM_USE_V2_MODEL_RUNNER=1)": (
            not current_platform.is_cpu() and not config.use_v2_model_runner
        ),
    }  # fmt: skip
    for what, given in refused.items():
        if given:
            raise NotImplementedError(f"{NAME}: {what} is not supported")


class Engine:
    """The codec, the slots and the buffers of a worker: one for all its layers.

    Attributes:
        layers: the spectral layers (`SpectralImpl`), in the model's order.
        sinks, window: tokens that are exact.      slots: requests that may run; one more is scratch.
        seq_ids: int32 [n], slots of the rows of the step that runs.
    """

    def __init__(self, config: VllmConfig) -> None:
        _check_config(config)
        self.config, self.context = config, config.compilation_config.static_forward_context
        model = config.model_config
        total = model.get_num_layers(config.parallel_config)
        self.codec = Settings.of(config).load(config, total)
        self.sinks, self.window = self.codec.sinks, self.codec.window
        self.slots = config.scheduler_config.max_num_seqs
        self.layers: list[SpectralImpl] = []
        self.device = torch.device(current_platform.device_type)
        self.width = -(-(model.max_model_len + 2 * PAGE_SIZE) // (2 * PAGE_SIZE)) * 2
        slots = IndexedSlots(self.slots, self.window), PagedSlots(self.slots)
        self.placing: Any = slots[0] if config.use_v2_model_runner else slots[1]
        kept = 0 if self.sinks == 0 else POOL * self.slots
        self.pool = SinkPool(kept)
        self.entries = kept
        self.lost = 0  # starts on computed tokens whose sinks the pool had not
        self.seen: tuple[CommonAttentionMetadata, SpectralMetadata] | None = None
        self.seq_ids = torch.full((self.slots + 8,), self.slots, dtype=torch.int32)
        self.seq_ids = self.seq_ids.to(self.device)
        self.sent: np.ndarray = np.zeros(0, np.int32)
        self._check_memory(total)

    def _check_memory(self, layers: int) -> None:
        config, model = self.config, self.config.model_config
        size = 2 * model.get_num_kv_heads(config.parallel_config) * model.get_head_size()
        size *= layers * model.dtype.itemsize
        request = size * (self.sinks + self.window + (POOL if self.entries else 0) * self.sinks)
        room = int(SHARE * current_platform.get_device_total_memory())
        text = f"{request / 1e6:.2f} MB a request for exact tokens and kept sinks"
        if request * (self.slots + 1) > room:
            raise ValueError(
                f"max_num_seqs: expected at most {room // request - 1}, got {self.slots}: "
                f"{self.codec.preset} takes {text}, and they may take {SHARE:.0%} of the memory"
            )
        log.info("%s: preset %s, %s, %d requests", NAME, self.codec.preset, text, self.slots)

    def bind(self) -> None:
        """All layers exist: each gets its codec, and a backend of its page's bytes."""
        if self.layers[0].codec is not None:
            return
        found = {n: x for n, x in self.context.items() if isinstance(x.impl, SpectralImpl)}
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        # One codec a spectral layer; of a pipeline's stage, by the number in the layer's name.
        whole = len(found) == len(self.codec.layers)
        size, known = 0, {}
        for at, (name, layer) in enumerate(found.items()):
            index, impl = at if whole else extract_layer_index(name), layer.impl
            if index >= len(self.codec.layers):
                raise ValueError(f"codec: expected {len(found)} layers, got {index}")
            codec = self.codec.layers[index]
            if id(codec) not in known:
                first = rank * codec.kv_heads // ranks
                part = codec.of_heads(first, impl.num_kv_heads).to(self.device)
                known[id(codec)] = part
            impl.layer, impl.codec = layer, known[id(codec)]
            layer.attn_backend = _backend(codec.layout.token_bytes, self.codec.preset == "exact")
        for codec in {str(x.layout): x for x in known.values()}.values():
            for batch in range(1, self.slots + 1):
                needed = attend_workspace(
                    codec, batch=batch, query_heads=impl.num_heads, queries=1,
                    max_pages=self.width, slots=self.sinks + self.window, device=self.device,
                )  # fmt: skip
                size = max(size, needed)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.lse = torch.empty(
            self.slots + 8, impl.num_heads, dtype=torch.float32, device=self.device
        )

    def reserve(self, impl: SpectralImpl) -> None:
        """While vLLM measures memory: what a prompt on a past takes for the time being."""
        if self.device.type == "cuda":
            tokens = min(PIECE, self.config.model_config.max_model_len)
            size = tokens * impl.num_kv_heads * impl.head_size * 20
            torch.empty(size, dtype=torch.uint8, device=self.device)

    def start(self, rows: Rows, started: list[int], slots: np.ndarray) -> tuple[dict, list]:
        """Sinks of the rows that start: (entries to write by row, (row, slot, past, entry) of those
        on computed tokens). Entries are found before any is given away."""
        hits = [i for i in started if rows.past[i]]
        found = [(i, int(slots[i]), int(rows.past[i]), self.find(rows.pages[i])) for i in hits]
        entries = {}
        for i in started:
            if self.entries and not rows.past[i]:
                page = int(rows.pages[i][0])
                if rows.length[i] >= max(self.sinks, 2):
                    entries[i] = self.pool.write(page)
                else:  # in several steps: not followed
                    self.pool.forget(page)
        return entries, found

    def find(self, pages: np.ndarray) -> int:
        entry = self.pool.find(int(pages[0])) if self.entries else None
        if entry is None and self.entries:
            self.lost += 1
            if self.lost == 1:
                log.warning("%s: a prefix's exact sinks were not kept; rebuilt from its page", NAME)
        return -1 if entry is None else entry

    def refill(self, table: torch.Tensor, found: list[tuple[int, int, int, int]]) -> None:
        """Window and sinks of requests that start on computed tokens, in all layers: launches only.

        table: int32 [B, max_pages].      found: of `start`.
        """
        numbers = torch.tensor(found, dtype=torch.int64).to(self.device, non_blocking=True)
        row, slot, past, entry = numbers.unbind(1)
        lens, table = past.int(), table[row]
        first = (lens - self.window).clamp_min(0) // PAGE_SIZE
        columns = torch.arange((self.window - 1) // PAGE_SIZE + 2, device=self.device)
        columns = (first[:, None] + columns).clamp_max(table.shape[1] - 1)
        tail = table.gather(1, columns.long())
        at = past[:, None] - self.window + torch.arange(self.window, device=self.device)
        ring = slots_torch(at.clamp_min(self.sinks), self.sinks, self.window)
        target = torch.where(at >= self.sinks, slot[:, None], self.slots)
        local = (at - PAGE_SIZE * first[:, None]).clamp_min(0)
        each = torch.arange(len(found), device=self.device)[:, None]
        few, kept = lens.clamp_max(self.sinks), entry >= 0
        rebuilt = any(x[3] < 0 for x in found)
        for impl in self.layers:
            for side, pages, exact, pool in impl.sides():
                x = decode(pages, impl.codec, tail, lens, side=side, first_page=first)
                exact[target, :, ring] = x[each, :, local].to(exact.dtype)
                if self.entries:
                    sinks = pool[entry.clamp_min(0)]
                    if rebuilt:
                        x = decode(pages, impl.codec, table[:, :1], few, side=side)
                        x = x[:, :, : self.sinks].to(exact.dtype)
                        sinks = torch.where(kept[:, None, None, None], sinks, x)
                    exact[slot, :, : self.sinks] = sinks


_ENGINES: list[Engine] = []  # of this process: the last one


def _engine(config: VllmConfig) -> Engine:
    context = config.compilation_config.static_forward_context
    if not _ENGINES or _ENGINES[0].context is not context:
        _ENGINES[:] = []  # its memory is free before the next one's is taken
        _ENGINES.append(Engine(config))
    return _ENGINES[0]


# ---- what vLLM calls -----------------------------------------------------------------------------


class ExactSpec(FullAttentionSpec):
    """Pages of preset exact hold nothing that another request could use."""

    @property
    def prefix_cacheable(self) -> bool:
        return False


class SpectralBackend(AttentionBackend):
    """Full attention of decoders over spectral pages; vLLM asks the class, never an instance."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012
    forward_includes_kv_cache_update = True
    token_bytes = 0  # of a token and KV head; of `_backend`'s subclasses
    exact = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[SpectralImpl]:
        return SpectralImpl

    @staticmethod
    def get_builder_cls() -> type[SpectralBuilder]:
        return SpectralBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [PAGE_SIZE]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # a page that comes from elsewhere comes without its sinks

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a page's bytes of one head lie together

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if cls.token_bytes == 0 or spec.state_content_bytes is not None:
            return spec
        kind = ExactSpec if cls.exact else FullAttentionSpec
        return replace_as(spec, kind, dtype=torch.uint8, state_content_bytes=cls.token_bytes)


@functools.cache
def _backend(token_bytes: int, exact: bool) -> type[SpectralBackend]:
    """vLLM asks a layer's backend for the bytes of its pages: one class for each number."""
    name = f"{SpectralBackend.__name__}{token_bytes}"
    return type(name, (SpectralBackend,), {"token_bytes": token_bytes, "exact": exact})


@dataclass
class Chunk:
    """New tokens of one request that are not one decode: tokens start .. stop - 1 of the batch.

    row: of the block table.      past: tokens before.      slot: of exact tokens.      entry: of the
    pool that its sinks are to be kept in, -1: none.
    """

    row: int
    start: int
    stop: int
    past: int
    slot: int
    entry: int


@dataclass
class SpectralMetadata(AttentionMetadata):
    """A step: `decodes` rows of one token, then chunks.

    table: int32 [B, max_pages].      seq_lens, seq_ids: int32 [B].      bounds: int32 [chunks + 1],
    where chunks begin, counted from the first.      longest: new tokens of a chunk.
    """

    decodes: int
    table: torch.Tensor
    seq_lens: torch.Tensor
    seq_ids: torch.Tensor
    chunks: list[Chunk]
    bounds: torch.Tensor | None = None
    longest: int = 0


class SpectralBuilder(AttentionMetadataBuilder[SpectralMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.engine = vllm_config.compilation_config.static_forward_context[
            layer_names[0]
        ].impl.engine

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpectralMetadata:
        """One for all layers of a step, whose builders differ by their pages' bytes alone."""
        engine, given = self.engine, common_attn_metadata
        if engine.seen is None or engine.seen[0] is not given:
            engine.seen = given, self._build(given)
        return engine.seen[1]

    def _build(self, given: CommonAttentionMetadata) -> SpectralMetadata:
        engine, count = self.engine, given.num_reqs
        table = given.block_table_tensor[:count, : engine.width]
        live = count if given.req_idx is None else min(count, len(given.req_idx))
        bounds = given.query_start_loc_cpu.numpy()
        new = np.diff(bounds[: live + 1])
        length = given.seq_lens_cpu_upper_bound.numpy()[:live].astype(np.int64)
        filling = given.is_prefilling.numpy()[:live]
        rows = Rows(length - new, length, filling, {})
        known = np.arange(live) if given.req_idx is None else np.flatnonzero(filling)
        if len(known):  # waits for the device: in steps with prompts only
            pages = table[torch.from_numpy(known).to(table.device)].cpu().numpy()
            rows.pages = dict(zip(known.tolist(), pages, strict=True))
        slots, started = engine.placing.place(rows, given.req_idx)
        entries, found = engine.start(rows, started, slots)
        if found:
            engine.refill(table, found)
        ids = np.full(count, engine.slots, np.int32)
        ids[:live] = slots
        if not np.array_equal(engine.sent, ids):
            engine.sent = ids
            engine.seq_ids[:count].copy_(torch.from_numpy(ids), non_blocking=True)
        meta = SpectralMetadata(count, table, given.seq_lens[:count], engine.seq_ids[:count], [])
        many = np.flatnonzero(new > 1)
        if len(many):
            meta.decodes = first = int(many[0])
            meta.chunks = [
                Chunk(i, int(bounds[i]), int(bounds[i + 1]), int(rows.past[i]), int(slots[i]),
                      entries.get(i, -1))
                for i in range(first, live)
            ]  # fmt: skip
            starts = given.query_start_loc[first : live + 1]
            meta.bounds, meta.longest = starts - int(bounds[first]), int(new.max())
        return meta


class SpectralImpl(AttentionImpl[SpectralMetadata]):
    """One layer: its codec, and the exact tokens of the requests that run.

    Attributes:
        k_exact, v_exact: [slots + 1, G, sinks + window, D].
        k_pool, v_pool: [entries, G, sinks, D], the sinks that `SinkPool` keeps.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: Any = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None, **others: Any,
    ) -> None:  # fmt: skip
        odd = dict(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap or None,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name, **others,
        )  # fmt: skip
        for name, value in odd.items():
            if value is not None:
                raise NotImplementedError(f"{NAME}: {name} is not supported, got {value}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        config = get_current_vllm_config()
        self.engine = engine = _engine(config)
        self.layer: Any = None
        self.codec: Any = None  # a Codec, from `Engine.bind`
        options: Any = {"dtype": config.model_config.dtype, "device": engine.device}
        exact = engine.slots + 1, self.num_kv_heads, engine.sinks + engine.window, head_size
        kept = engine.entries, self.num_kv_heads, engine.sinks, head_size
        self.k_exact, self.v_exact = (torch.zeros(exact, **options) for _ in "kv")
        self.k_pool, self.v_pool = (torch.zeros(kept, **options) for _ in "kv")
        engine.layers.append(self)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.engine.bind()

    def pages(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages uint8 [num_pages, G, 64 * bytes] of the layer's cache [B, G, 64, bytes]."""
        at = PAGE_SIZE * self.codec.layout.k.bytes
        cache = cache.flatten(2)
        return cache[..., :at], cache[..., at:]

    def sides(self) -> Sequence[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(side, pages, exact tokens, kept sinks) of K and of V."""
        k_pages, v_pages = self.pages(self.layer.kv_cache)
        k = "k", k_pages, self.k_exact, self.k_pool
        return k, ("v", v_pages, self.v_exact, self.v_pool)

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, attn_metadata: SpectralMetadata, output: torch.Tensor,
        output_scale: Any = None, output_block_scale: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """query, output [N, H, D], key, value [N, G, D]; N as the step's tokens, or padded."""
        if attn_metadata is None:
            self.engine.reserve(self)
            return output.fill_(0)
        pages = self.pages(kv_cache)
        if attn_metadata.decodes:
            n = attn_metadata.decodes
            self._step(
                attn_metadata, slice(n), query[:n], key[:n, :, None], value[:n, :, None], pages,
                output[:n],
            )  # fmt: skip
        for chunk in attn_metadata.chunks:
            if chunk.past and chunk.stop - chunk.start <= CHUNK:
                self._short(attn_metadata, chunk, query, key, value, pages, output)
        if any(not x.past or x.stop - x.start > CHUNK for x in attn_metadata.chunks):
            self._prompts(attn_metadata, query, key, value, pages, output)
        return output

    def _step(self, meta: Any, rows: Any, q: Any, k: Any, v: Any, pages: Any, out: Any) -> None:
        """Store k, v [B, G, Q, D], attend by q [B, H, (Q,) D]; nothing is allocated for Q = 1."""
        engine, exact = self.engine, (self.k_exact, self.v_exact)
        k_pages, v_pages = pages
        table, lens, ids = meta.table[rows], meta.seq_lens[rows], meta.seq_ids[rows]
        append(
            k, v, self.codec, k_pages, v_pages, *exact, table, lens, sinks=engine.sinks, seq_ids=ids
        )
        single = k.shape[2] == 1 and len(k) <= len(engine.lse)
        attend_spectral(
            q, k_pages, v_pages, self.codec, table, lens, sinks=engine.sinks, window=engine.window,
            exact=exact, seq_ids=ids, scale=self.scale, out=out,
            lse=engine.lse[: len(k)] if single else None,
            workspace=engine.workspace if single else None, after_append=True,
        )  # fmt: skip

    def _short(self, meta, chunk, query, key, value, pages, output) -> None:
        """A few tokens on a past: as steps of several queries."""
        step, row = min(QUERIES, self.engine.window), slice(chunk.row, chunk.row + 1)
        for start in range(chunk.start, chunk.stop, step):
            stop = min(start + step, chunk.stop)
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            lens = meta.seq_lens - (chunk.stop - stop)
            part = SpectralMetadata(0, meta.table, lens, meta.seq_ids, [])
            self._step(part, row, q, k, v, pages, out.view_as(q) if stop - start > 1 else out)
            output[start:stop] = out[0].transpose(0, 1)

    def _prompts(self, meta, query, key, value, pages, output) -> None:
        """Chunks that are attended as they are, on the past rebuilt where there is one."""
        begin, end = meta.chunks[0].start, meta.chunks[-1].stop
        new = query[begin:end], key[begin:end], value[begin:end]
        o, lse = dense(*new, meta.bounds, meta.longest, meta.bounds, meta.longest, self.scale, True)
        for chunk in meta.chunks:
            count = chunk.stop - chunk.start
            if chunk.past and count <= CHUNK:
                continue
            at = slice(chunk.start - begin, chunk.stop - begin)
            part = o[at], lse[at]
            for start in range(0, chunk.past, PIECE):
                stop = min(start + PIECE, chunk.past)
                k, v = self._rebuilt(meta, chunk, start, stop, pages)
                q_bounds, k_bounds = (
                    torch.arange(0, n + 1, n, dtype=torch.int32, device=query.device)
                    for n in (count, stop - start)
                )
                q = query[chunk.start : chunk.stop]
                old = dense(q, k, v, q_bounds, count, k_bounds, stop - start, self.scale, False)
                part = merge_states(*part, *old)
            output[chunk.start : chunk.stop] = part[0]
            self._store(meta, chunk, key, value)

    def _rebuilt(self, meta, chunk, start, stop, pages) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [T, G, D] of past positions start .. stop - 1; exact ones are exact."""
        engine, device = self.engine, meta.table.device
        columns = slice(start // PAGE_SIZE, -(-stop // PAGE_SIZE))
        table = meta.table[chunk.row : chunk.row + 1, columns]
        lens, first = (
            torch.full((1,), n, dtype=torch.int32, device=device)
            for n in (stop, start // PAGE_SIZE)
        )
        recent = max(chunk.past - engine.window, engine.sinks, start)
        found = []
        for side, data, exact, _ in self.sides():
            x = decode(data, self.codec, table, lens, side=side, first_page=first)[0]
            x = x[:, : stop - start].to(exact.dtype)
            if start < engine.sinks:
                few = min(engine.sinks, stop)
                x[:, :few] = exact[chunk.slot, :, :few]
            if recent < stop:
                at = torch.arange(recent, stop, device=device)
                ring = slots_torch(at, engine.sinks, engine.window)
                x[:, recent - start :] = exact[chunk.slot][:, ring]
            found.append(x.transpose(0, 1).contiguous())
        return found[0], found[1]

    def _store(self, meta, chunk, key, value) -> None:
        row = slice(chunk.row, chunk.row + 1)
        ids = meta.seq_ids[row]
        for new, (side, data, exact, pool) in zip((key, value), self.sides(), strict=True):
            x = new[chunk.start : chunk.stop].transpose(0, 1)[None]
            encode(
                x, self.codec, data, meta.table[row], meta.seq_lens[row], side=side, exact=exact,
                sinks=self.engine.sinks, seq_ids=ids,
            )  # fmt: skip
            if chunk.entry >= 0:
                pool[chunk.entry] = exact[chunk.slot, :, : self.engine.sinks]


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: torch.Tensor, q_longest: int,
    k_bounds: torch.Tensor, k_longest: int, scale: float, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of q [N, H, D] over k, v [T, G, D], sequence by sequence.

    Args:
        q_bounds, k_bounds: int32 [sequences + 1], where they begin.      q_longest, k_longest: tokens.
        causal: a sequence's last query is at its last key.
    Returns:
        (o [N, H, D] in the dtype of q, lse float32 [N, H], natural log), contiguous.
    """
    if q.is_cuda:
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        o, lse = flash_attn_varlen_func(
            q, k, v, max_seqlen_q=q_longest, cu_seqlens_q=q_bounds, max_seqlen_k=k_longest,
            cu_seqlens_k=k_bounds, softmax_scale=scale, causal=causal, return_softmax_lse=True,
            fa_version=get_flash_attn_version(head_size=q.shape[-1]),
        )  # fmt: skip
        return o.contiguous(), lse.transpose(0, 1).contiguous()
    group, parts = q.shape[1] // k.shape[1], []
    ends = zip(q_bounds.tolist(), k_bounds.tolist(), strict=True)
    start, k_start = next(ends)
    for stop, k_stop in ends:
        x = q[start:stop].float().unflatten(1, (-1, group))  # [Q, G, H/G, D]
        s = torch.einsum("qghd,tgd->qght", x, k[k_start:k_stop].float()) * scale
        if causal:
            mask = torch.ones(stop - start, k_stop - k_start, dtype=torch.bool)
            mask = mask.tril(k_stop - k_start - stop + start)
            s = s.masked_fill(~mask[:, None, None], float("-inf"))
        lse = s.logsumexp(-1)
        out = torch.einsum("qght,tgd->qghd", (s - lse[..., None]).exp(), v[k_start:k_stop].float())
        parts.append((out.flatten(1, 2), lse.flatten(1, 2)))
        start, k_start = stop, k_stop
    o, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return o.to(q.dtype), lse

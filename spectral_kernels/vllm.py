"""The spectral cache in vLLM: an attention backend that vLLM finds as a plugin.

    vllm serve MODEL --attention-backend SPECTRAL \\
        --additional-config '{"spectral": {"codec": "codec.safetensors"}}'

vLLM keeps its scheduler, block manager and workers. A block of its pool is a page of every layer,
64 tokens' coefficients: it admits as many more tokens as these are smaller. The exact tokens lie
beside it, a slot a running request in each layer (`SpectralImpl`).

    build()     on the host before a step: the requests' slots, and what they lack; it reads the
                device in steps with prompts only, and launches
    forward()   decodes: append and attend, at fixed addresses: one full CUDA graph
                prompts: attention to the raw keys and values and, if there are more than CHUNK, to
                the past, rebuilt a piece at a time and joined by states; then encode

A request that starts on computed tokens (a prefix hit; resumed after preemption) attends to a
window that is rebuilt from pages, and ends on an exact one: so many tokens are computed anew
(`SpectralManager`). Its sinks are copied exactly from a pool by the number of its first page
(`SinkPool`), or if they are gone rebuilt too.
Layers with a window or a state (Mamba, convolutions) may stand beside ours, in vLLM's own groups.
For vLLM 0.32 and 0.33: model runner V2 on GPUs, V1 on CPUs.
Test: tests/test_vllm.py; on a GPU also python -m tests.serving.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm

from ._requests import IndexedSlots, PagedSlots, Rows, SinkPool
from .attention import attend_spectral, attend_workspace
from .codec import TENSORS, Codec, ModelCodec
from .compress import append, decode, encode
from .layout import HEAD_DIMS, PAGE_SIZE
from .merge import merge_states
from .window import slots_torch

if not (0, 32) <= tuple(map(int, re.findall(r"\d+", vllm.__version__)[:2])) <= (0, 33):
    raise ImportError(f"spectral_kernels.vllm: expected vLLM 0.32 or 0.33, got {vllm.__version__}")

from vllm import distributed
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention import backend as base
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

NAME, PATH = "SPECTRAL", "spectral_kernels.vllm.SpectralBackend"
CHUNK = 128  # most new tokens on a past that are attended by the decode kernel
QUERIES = 16  # of them at once
PIECE = 8192  # tokens of a past that are rebuilt at once
SHARE = 0.2  # of the memory that weights leave: what exact tokens and kept sinks may take
LEAST = 16  # newest tokens that stay exact where the codec's window is larger than that
KEPT = 4  # sinks that are kept for each request that may run
Fill = Callable[["SpectralImpl"], None]
log = init_logger("vllm.spectral")  # vLLM shows what loggers below its own say


def register() -> None:
    """The entry point: vLLM calls it in every process, more than once."""
    if NAME in AttentionBackendEnum.__members__:
        return
    member: Any = AttentionBackendEnum.register(NAME, PATH)
    # A process that is spawned unpickles its configuration before it loads plugins.
    member.__reduce_ex__ = lambda protocol: (_member, ())
    if current_platform.is_cpu():
        _choose_on_cpu(type(current_platform))


def _member() -> AttentionBackendEnum:
    register()
    return AttentionBackendEnum[NAME]


def _choose_on_cpu(platform: Any) -> None:
    """vLLM's CPU platform ignores which backend is asked for: it must not ignore ours."""
    original = platform.get_attn_backend_cls

    def choose(backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if backend is not AttentionBackendEnum[NAME]:
            return original(backend, attn_selector_config, num_heads)
        given = {"device_capability": None, **attn_selector_config._asdict()}
        if reasons := SpectralBackend.validate_configuration(**given):
            raise ValueError(f"{NAME} is not valid for this configuration: {reasons}")
        return PATH

    platform.get_attn_backend_cls = staticmethod(choose)


# ---- what the layers of a worker share -----------------------------------------------------------


def _load_codec(config: VllmConfig) -> ModelCodec:
    """The whole model's codec, on the CPU: --additional-config '{"spectral": {...}}', with "codec",
    a file, and "preset"; else the environment, SPECTRAL_CODEC and SPECTRAL_PRESET. ValueError:
    there is none, or it has other heads than the model."""
    model, more = config.model_config, config.additional_config
    more = more.get("spectral", {}) if isinstance(more, dict) else {}
    if not set(more) <= {"codec", "preset"}:
        raise ValueError(f"spectral: expected codec and preset, got {sorted(more)}")
    path = more.get("codec", os.environ.get("SPECTRAL_CODEC"))
    preset = more.get("preset", os.environ.get("SPECTRAL_PRESET"))
    heads, dim = model.get_total_num_kv_heads(), model.get_head_size()
    if preset == "exact":  # whose pages hold nothing that another request could use
        if config.cache_config.enable_prefix_caching:
            raise ValueError("preset exact: expected --no-enable-prefix-caching")
        layers = model.get_total_num_hidden_layers()
        return ModelCodec.exact(layers, heads, dim, model.max_model_len)
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"spectral: expected a codec file, got {path}. Make it with: python -m spectral_kernels"
            f".calibrate --model {model.model} --preset {preset or 'balanced'} --out "
            'codec.safetensors; then --additional-config \'{"spectral": {"codec": PATH}}\' or '
            "SPECTRAL_CODEC=PATH"
        )
    codec = ModelCodec.load(path)
    if preset not in (None, codec.preset):
        raise ValueError(f"preset: expected the codec's, {codec.preset}, got {preset}")
    got = {(x.kv_heads, x.layout.head_dim) for x in codec.layers}
    if got != {(heads, dim)}:
        raise ValueError(f"codec: expected {heads} KV heads of {dim}, got {sorted(got)}")
    return codec


def _check_config(config: VllmConfig) -> None:
    parallel, kind = config.parallel_config, config.cache_config.cache_dtype
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "context parallel": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "microbatches": parallel.use_ubatching,
        "prefix_match_unit": config.cache_config.prefix_match_unit is not None,  # copies of pages
        f"kv_cache_dtype {kind}": kind not in ("auto", "bfloat16", "float16"),
        "model runner V1 on a GPU": not (current_platform.is_cpu() or config.use_v2_model_runner),
    }
    for what, given in refused.items():
        if given:
            raise NotImplementedError(f"{NAME}: {what} is not supported")


class Engine:
    """The codec, the slots and the buffers of a worker, for all its layers.

    Attributes:
        layers: the spectral layers, in the model's order.      sinks, window: exact tokens.
        slots: requests that may run; slot number `slots` is scratch.      lost: starts on computed
            tokens whose sinks were not kept.
        seq_ids: int32 [n], slots of the step's rows.      workspace, lse: of its decodes.
    """

    def __init__(self, config: VllmConfig) -> None:
        _check_config(config)
        self.config, model = config, config.model_config
        self.context = config.compilation_config.static_forward_context
        self.device = torch.device(current_platform.device_type)
        self.codec = _load_codec(config)
        (_watch_runner if config.use_v2_model_runner else _zero_whole_blocks)()
        self.sinks, self.window = self.codec.sinks, self.codec.window  # or fewer: `_fit`
        self.slots = config.scheduler_config.max_num_seqs
        self.entries = KEPT * self.slots if self.sinks else 0
        self.max_pages = max(-(-model.max_model_len // PAGE_SIZE) + 1, 4)  # 4: for `_compile`
        self.layers: list[SpectralImpl] = []
        self.pool, self.lost = SinkPool(self.entries), 0
        exact = self.codec.preset == "exact"
        numbered = IndexedSlots(self.slots, self.window, exact), PagedSlots(self.slots)
        self.placing: Any = numbered[not config.use_v2_model_runner]
        self.batch: Any = None  # of runner V2's step: `_watch_runner`
        self.seen: Any = None  # vLLM's metadata of this step, and ours
        self.sent = np.zeros(0, np.int32)  # what seq_ids holds
        self.seq_ids = torch.zeros(self.slots + 8, dtype=torch.int32, device=self.device)

    def _fit(self) -> None:
        """The window: the codec's, or as much of it, at least LEAST, as fits beside the pages."""
        cache, dtype = self.config.cache_config, self.config.model_config.dtype
        memory = current_platform.get_device_total_memory() * cache.gpu_memory_utilization
        memory = max(memory - torch.cuda.memory_allocated(), cache.kv_cache_memory_bytes or 0)
        token = 2 * dtype.itemsize * sum(x.num_kv_heads * x.head_size for x in self.layers)
        tokens = torch.tensor(int(SHARE * memory) // token, device="cpu")
        group = distributed.get_tp_group()  # its ranks agree; stages of a pipeline need not
        torch.distributed.all_reduce(tokens, torch.distributed.ReduceOp.MIN, group.cpu_group)
        most, kept = int(tokens), (1 + KEPT) * self.sinks
        room = min(most // (self.slots + 1) - kept, self.window)
        least = self.window if self.codec.preset == "exact" else min(self.window, LEAST)
        if room < least:
            slots, size = max(most // (least + kept) - 1, 0), token * (least + kept) / 1e6
            raise ValueError(
                f"max_num_seqs: expected at most {slots}, got {self.slots}: {size:.2f} MB each, in "
                f"{SHARE:.0%} of what gpu_memory_utilization leaves beside weights (preset exact: "
                "of max_model_len tokens)"
            )
        self.window = room if room == self.window else room // LEAST * LEAST
        each = f"{token * (self.window + kept) / 1e6:.2f} MB for each of {self.slots} requests"
        log.info("%s: %s, newest %d exact, %s", NAME, self.codec.preset, self.window, each)

    def bind(self) -> None:
        """All layers have their weights: each gets its codec, its exact tokens, and a backend of
        its pages' bytes."""
        if self.layers[0].codec is not None:
            return
        self._fit()
        model = self.config.model_config
        hybrid = model.is_hybrid  # beside layers with a state, as vLLM calls it
        alone = self.config.parallel_config.pipeline_parallel_size == 1
        window = self.window if alone else self.codec.window  # `_fit`: stages' may differ
        attending = {n: x for n, x in self.context.items() if hasattr(x, "impl")}
        found = {n: x for n, x in attending.items() if isinstance(x.impl, SpectralImpl)}
        ranks = distributed.get_tp_group()
        whole, known = len(found) == len(self.codec.layers), len(self.codec.layers)
        if not whole and known != model.get_total_num_hidden_layers():
            raise ValueError(f"codec: expected {len(found)} layers, got {known}")
        parts: dict[int, Any] = {}
        widest = max(x.layout.token_bytes for x in self.codec.layers)
        for at, (name, layer) in enumerate(found.items()):
            index, impl = at if whole else extract_layer_index(name), layer.impl
            if layer.attn_backend is not SpectralBackend or layer.head_size_v != impl.head_size:
                raise NotImplementedError(f"{NAME}: {name} is not full causal attention")
            codec = self.codec.layers[index]
            if id(codec) not in parts:
                first = ranks.rank_in_group * codec.kv_heads // ranks.world_size
                parts[id(codec)] = codec.of_heads(first, impl.num_kv_heads).to(self.device)
            impl.bind(layer, parts[id(codec)])
            kept = {n: getattr(impl.codec, n) for n in TENSORS} | {"seq_ids": self.seq_ids}
            for tensor in kept:  # buffers are what vLLM keeps when it sleeps
                layer.register_buffer(f"spectral_{tensor}", kept[tensor], persistent=False)
            # vLLM makes states as large as a page, of which it knows one size then; pages of
            # windows and ours, if packed, lie side by side in a block, each of its own size.
            width = widest if hybrid else codec.layout.token_bytes
            packed = len(attending) > len(found) and not hybrid
            layer.attn_backend = _backend(width, packed, window)
        sized = functools.partial(
            attend_workspace, query_heads=impl.num_heads, queries=1, max_pages=self.max_pages,
            slots=self.sinks + self.window, device=self.device,
        )  # fmt: skip
        layouts = {x.layout: x for x in parts.values()}.values()
        size = max(sized(x, batch=n) for x in layouts for n in range(1, self.slots + 1))
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.lse = torch.empty((self.slots, impl.num_heads), dtype=torch.float32).to(self.device)
        for impl in {x.codec.layout: x for x in self.layers}.values():
            self._compile(impl)

    def _compile(self, impl: SpectralImpl) -> None:
        """Launch on scratch what prompts take, so that no request waits for a compiler. (What
        decodes take is compiled when vLLM captures their graphs.)"""
        before, past, new = impl.layer.kv_cache, PAGE_SIZE, CHUNK + 1
        shape = 1, impl.num_kv_heads, PAGE_SIZE, impl.codec.layout.token_bytes
        impl.layer.kv_cache = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        table = torch.zeros((1, self.max_pages), dtype=torch.int32, device=self.device)
        row = Span(table, *(torch.full_like(table[:, 0], n) for n in (past + new, self.slots)))
        options: Any = {"dtype": impl.k_exact.dtype, "device": self.device}
        heads = impl.num_heads, impl.num_kv_heads, impl.num_kv_heads
        q, k, v = (torch.zeros((new, n, impl.head_size), **options) for n in heads)
        for stop in QUERIES, new:
            chunk = Chunk(row, 0, stop, past, self.slots, -1)
            impl._chunks([chunk], impl._ends(stop), q, k, v, q.clone())
        impl.layer.kv_cache = before

    def start(self, rows: Rows, started: list[int], slots: Any, table: Any) -> tuple[dict, dict]:
        """Rows that start: fill the slots of those on computed tokens. Returns the entries that the
        sinks of others are to be kept in, and by late row (`Rows.late`) what fills its slot in a
        layer. table: int32 [B, max_pages]."""

        def found(i: int) -> tuple[int, int, int, int]:
            entry = self.pool.find(int(rows.pages[i][0]))
            if entry < 0 < self.entries:
                log.warning_once("%s: sinks of a prefix are no longer kept, but rebuilt", NAME)
                self.lost += 1
            return i, int(slots[i]), int(rows.past[i]), entry

        known = [found(i) for i in started if rows.past[i] and i not in rows.late]
        if known:  # before entries are given away
            fill = self._refill(table, known)
            for impl in self.layers:
                fill(impl)
        entries = {}
        for i in started:
            if self.entries and not rows.past[i]:
                page, tokens = int(rows.pages[i][0]), int(rows.length[i])
                if tokens >= max(self.sinks, 2):
                    entries[i] = self.pool.write(page)
                else:  # sinks that take several steps are not kept
                    self.pool.forget(page)
        return entries, {i: self._refill(table, [found(i)]) for i in rows.late}

    def _refill(self, table: torch.Tensor, found: list[tuple[int, int, int, int]]) -> Fill:
        """What fills window and sinks of (row, slot, past, entry) in a layer: launches only."""
        numbers = torch.tensor(found).to(self.device, non_blocking=True)
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
        few, kept = lens.clamp_max(self.sinks), (entry >= 0)[:, None, None, None]

        def fill(impl: SpectralImpl) -> None:
            for side, pages, exact, pool in impl.sides():
                x = decode(pages, impl.codec, tail, lens, side=side, first_page=first)
                exact[target, :, ring] = x[each, :, local].to(exact.dtype)
                if self.entries:
                    x = decode(pages, impl.codec, table[:, :1], few, side=side)
                    x = x[:, :, : self.sinks].to(exact.dtype)
                    exact[slot, :, : self.sinks] = torch.where(kept, pool[entry], x)

        return fill


_ENGINES: list[Engine] = []  # of this process: the last one


def _engine(config: VllmConfig) -> Engine:
    context = config.compilation_config.static_forward_context
    if not _ENGINES or _ENGINES[0].context is not context:
        _ENGINES.clear()  # its memory is free before the next one's is taken
        _ENGINES.append(Engine(config))
    return _ENGINES[0]


@functools.cache
def _watch_runner() -> None:
    """Have model runner V2 tell a step's requests (beside state layers it does not), and replay no
    graph of decodes for a row that is the last token of a prompt: it may start on a token of this
    very step (`Rows.late`), and a graph knows no order of rows."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner

    gather = Runner.gather_batch_req_state

    def watched(self: Any, scheduler_output: Any, dummy_run: bool) -> tuple[Any, int | None]:
        batch, uniform = gather(self, scheduler_output, dummy_run)
        if _ENGINES:
            _ENGINES[0].batch = batch
            uniform = None if batch is not None and batch.has_prefill else uniform
        return batch, uniform

    Runner.gather_batch_req_state = watched


@functools.cache
def _zero_whole_blocks() -> None:
    """Beside windows and states vLLM zeroes new blocks (one's codes may be another's NaN); on CPUs
    it takes their numbers for those of pages, of which a block may hold several."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner

    def zero(self: Any, block_ids: list[int]) -> None:
        for layer in self.compilation_config.static_forward_context.values():
            cache = getattr(layer, "kv_cache", None)
            if isinstance(cache, torch.Tensor) and cache.numel():
                cache.unflatten(0, (self.kv_cache_config.num_blocks, -1))[block_ids] = 0

    Runner._zero_block_ids = zero


# ---- what vLLM calls -----------------------------------------------------------------------------


class SpectralManager(FullAttentionManager):
    """No hit reaches into a request's newest `window` tokens: computed anew, they are exact."""

    @classmethod
    def find_longest_cache_hit(cls, *, max_length: int, kv_cache_spec: Any, **others: Any) -> Any:
        others["max_length"] = max(max_length + 1 - kv_cache_spec.window, 0)  # one is left out
        return super().find_longest_cache_hit(kv_cache_spec=kv_cache_spec, **others)


KVCacheSpecRegistry._ensure_registered()  # vLLM's own come first, or never


@register_kv_cache_spec(SpectralManager, FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class SpectralSpec(FullAttentionSpec):
    window: int = 1  # newest tokens that are exact

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return replace(super().merge(specs), window=specs[0].window)


class SpectralBackend(base.AttentionBackend):
    """Full attention of decoders over spectral pages."""

    supported_dtypes = [torch.float16, torch.bfloat16]  # noqa: RUF012
    supported_dtypes += [torch.float32] * current_platform.is_cpu()  # not of FlashAttention
    token_bytes, packed, window = 0, False, 1  # of `_backend`'s subclasses

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
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8  # FlashAttention's, for prompts

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # pages that come from elsewhere come without their sinks

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page's bytes of one head lie together; packed: a block's pages of all layers, too.
        return (KVCacheLayout.BLHNC,) * cls.packed + (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if cls.token_bytes == 0:
            return spec
        ours = {"dtype": torch.uint8, "state_content_bytes": cls.token_bytes, "window": cls.window}
        return SpectralSpec(**{**vars(spec), **ours})


@functools.cache
def _backend(token_bytes: int, packed: bool, window: int = 1) -> type[SpectralBackend]:
    """vLLM asks a layer's backend for its pages' bytes, of a token and KV head, and for where they
    lie: a class for each answer."""
    fields = {"token_bytes": token_bytes, "packed": packed, "window": window}
    return type(f"SpectralBackend{token_bytes}", (SpectralBackend,), fields)


@dataclass
class Span:
    """Rows on the device: block table int32 [B, max_pages], lengths and slots int32 [B]."""

    table: torch.Tensor
    lens: torch.Tensor
    ids: torch.Tensor


@dataclass
class Chunk:
    """New tokens start .. stop - 1 of the step, all of one request, `past` tokens before them; its
    row, its slot, the entry that its sinks are to be kept in, -1: none; late: comes later."""

    row: Span
    start: int
    stop: int
    past: int
    slot: int
    entry: int
    late: bool = False

    @property
    def new(self) -> int:
        return self.stop - self.start

    @property
    def short(self) -> bool:
        return self.past > 0 and self.new <= CHUNK


@dataclass
class SpectralMetadata(base.AttentionMetadata):
    """A step: rows of one token, then chunks, which begin at bounds, int32, from the first on; last
    late rows, one after another, with what fills their slots."""

    decodes: Span
    chunks: list[Chunk]
    bounds: torch.Tensor | None
    late: list[tuple[Chunk, Fill]]


class SpectralBuilder(base.AttentionMetadataBuilder[SpectralMetadata]):
    _cudagraph_support = base.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, spec: Any, layer_names: list[str], config: Any, device: Any) -> None:
        super().__init__(spec, layer_names, config, device)
        self._init_reorder_batch_threshold(1)
        context = config.compilation_config.static_forward_context
        self.engine: Engine = context[layer_names[0]].impl.engine

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False):
        """One for all layers of a step: their builders differ by bytes alone."""
        seen = self.engine.seen
        if seen is None or seen[0] is not common_attn_metadata:
            # Another group of layers, or blocks that vLLM splits for each kind of our pages.
            step = common_attn_metadata.query_start_loc_cpu
            if seen is not None and seen[0].query_start_loc_cpu is step:
                raise NotImplementedError(f"{NAME}: expected layers in one group, and blocks of 64")
            seen = common_attn_metadata, self._build(common_attn_metadata)
            self.engine.seen = seen
        return seen[1]

    def _build(self, given: base.CommonAttentionMetadata) -> SpectralMetadata:
        engine, count = self.engine, given.num_reqs
        table = given.block_table_tensor[:count, : engine.max_pages]
        batch, engine.batch = engine.batch, None
        index, filling = None, given.is_prefilling.numpy()  # of runner V1; of V2's dummy rows
        if batch is not None:
            index, filling = batch.idx_mapping_np, batch.is_prefilling_np
        live = min(count, len(filling))
        bounds = given.query_start_loc_cpu.numpy()
        new = np.diff(bounds[: live + 1])
        length = given.seq_lens_cpu_upper_bound.numpy()[:live].astype(np.int64)
        rows = Rows(length - new, length, filling[:live], {})
        known = engine.placing.needed(rows.length, rows.filling)
        if len(known):  # waits for the device, in steps with prompts only
            pages = table[torch.from_numpy(known).to(table.device)].cpu().numpy()
            rows.pages = dict(zip(known.tolist(), pages, strict=True))
        slots, started = engine.placing.place(rows, index)
        entries, late = engine.start(rows, started, slots, table)
        ids = np.full(count, engine.slots, np.int32)  # padded rows, of no tokens: scratch
        ids[:live] = slots
        if not np.array_equal(engine.sent, ids):
            engine.sent = ids
            engine.seq_ids[:count].copy_(torch.from_numpy(ids), non_blocking=True)
        first = int(np.argmax(new > 1)) if (new > 1).any() else count
        rows_of = table, given.seq_lens[:count], engine.seq_ids[:count]

        def chunk(i: int) -> Chunk:
            # Copies: kernels are compiled for the alignment of what they are given.
            row = Span(*(x[i : i + 1].clone() for x in rows_of))
            span, entry = (int(bounds[i]), int(bounds[i + 1])), entries.get(i, -1)
            return Chunk(row, *span, int(rows.past[i]), int(slots[i]), entry)

        chunks = [replace(chunk(i), late=i in late) for i in range(first, live)]
        begin = given.query_start_loc[first : live + 1] - int(bounds[first]) if chunks else None
        last = [(chunk(i), fill) for i, fill in late.items()]
        return SpectralMetadata(Span(*(x[:first] for x in rows_of)), chunks, begin, last)


class SpectralImpl(base.AttentionImpl[SpectralMetadata]):
    """A layer: its codec, and the exact tokens of the requests that run.

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
        odd = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, **others}
        odd |= {"logits_soft_cap": logits_soft_cap, "kv_sharing": kv_sharing_target_layer_name}
        for name, value in odd.items():
            if value:
                raise NotImplementedError(f"{NAME}: {name} is not supported, got {value}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.engine = _engine(get_current_vllm_config())
        self.layer: Any = None  # this and the codec: from `Engine.bind`
        self.codec: Any = None
        self.engine.layers.append(self)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.engine.bind()

    def bind(self, layer: Any, codec: Codec) -> None:
        engine, self.layer, self.codec = self.engine, layer, codec
        options: Any = {"dtype": engine.config.model_config.dtype, "device": engine.device}
        exact = engine.slots + 1, self.num_kv_heads, engine.sinks + engine.window, self.head_size
        kept = engine.entries, self.num_kv_heads, engine.sinks, self.head_size
        self.k_exact, self.v_exact = (torch.zeros(exact, **options) for _ in "kv")
        self.k_pool, self.v_pool = (torch.zeros(kept, **options) for _ in "kv")

    def sides(self) -> tuple[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        """(side, pages uint8 [B, G, 64 * bytes], exact tokens, kept sinks) of K and of V."""
        cache = self.layer.kv_cache  # [B, G, 64, bytes of K and V]
        cache = cache.view(*cache.shape[:2], -1)  # in another layout an error, not a copy
        layout = self.codec.layout
        at, end = (PAGE_SIZE * n for n in (layout.k.bytes, layout.token_bytes))
        k = "k", cache[..., :at], self.k_exact, self.k_pool
        return k, ("v", cache[..., at:end], self.v_exact, self.v_pool)

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        kv_cache: torch.Tensor, attn_metadata: SpectralMetadata, output: torch.Tensor,
        output_scale: Any = None, output_block_scale: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """query, output [N, H, D], key, value [N, G, D], N at least the step's tokens."""
        meta = attn_metadata
        if meta is None:  # vLLM measures memory: what `_rebuilt` takes for the time being
            size = PIECE * self.num_kv_heads * self.head_size * 20 * query.is_cuda
            torch.empty(size, dtype=torch.uint8, device=query.device)
            return output.fill_(0)
        count = len(meta.decodes.lens)
        if count:
            q, k, v, out = (x[:count] for x in (query, key, value, output))
            self._step(meta.decodes, q, k[:, :, None], v[:, :, None], out)
        self._chunks(meta.chunks, meta.bounds, query, key, value, output)
        for chunk, fill in meta.late:
            fill(self)
            self._chunks([chunk], self._ends(chunk.new), query, key, value, output)
        return output

    def _chunks(self, chunks: list[Chunk], bounds: Any, *tensors: torch.Tensor) -> None:
        for chunk in chunks:
            if chunk.short and not chunk.late:
                self._short(chunk, *tensors)
        if not all(chunk.short or chunk.late for chunk in chunks):
            self._prompts(chunks, bounds, *tensors)

    def _step(
        self, rows: Span, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Store k, v [B, G, Q, D], then attend with q [B, H, (Q,) D]."""
        engine = self.engine
        (_, k_pages, k_exact, _), (_, v_pages, v_exact, _) = self.sides()
        append(
            k, v, self.codec, k_pages, v_pages, k_exact, v_exact, rows.table, rows.lens,
            sinks=engine.sinks, seq_ids=rows.ids,
        )  # fmt: skip
        fixed = q.dim() == 3 and len(q) <= engine.slots
        attend_spectral(
            q, k_pages, v_pages, self.codec, rows.table, rows.lens, sinks=engine.sinks,
            window=engine.window, exact=(k_exact, v_exact), seq_ids=rows.ids, scale=self.scale,
            out=out, lse=engine.lse[: len(q)] if fixed else None,
            workspace=engine.workspace if fixed else None, after_append=True,
        )  # fmt: skip

    def _short(self, chunk: Chunk, query, key, value, output) -> None:
        """A few tokens on a past, QUERIES at a time; the last so many, with some before them again;
        fewer one by one. (Kernels are compiled for each number of queries.)"""
        size = min(QUERIES, self.engine.window)
        size = size if chunk.new >= size else 1
        for first in range(chunk.start, chunk.stop, size):
            start = min(first, chunk.stop - size)
            stop = start + size
            row = replace(chunk.row, lens=chunk.row.lens - (chunk.stop - stop))
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            self._step(row, q, k, v, out)
            output[first:stop] = out[0, :, first - start :].transpose(0, 1)

    def _prompts(self, chunks: list[Chunk], bounds: Any, query, key, value, output) -> None:
        """Chunks whose tokens attend to one another as they are."""
        begin, end = chunks[0].start, chunks[-1].stop
        q, k, v = (x[begin:end] for x in (query, key, value))
        bounds = bounds, max(chunk.new for chunk in chunks)
        o, lse = dense(q, k, v, bounds, bounds, self.scale)
        for chunk in chunks:
            if chunk.short or chunk.late:
                continue
            tokens = slice(chunk.start, chunk.stop)
            at = slice(chunk.start - begin, chunk.stop - begin)
            out, out_lse = o[at], lse[at]
            for start in range(0, chunk.past, PIECE):
                stop = min(start + PIECE, chunk.past)
                k, v = self._rebuilt(chunk, start, stop)
                one, past = ((self._ends(n), n) for n in (chunk.new, stop - start))
                old = dense(query[tokens], k, v, one, past, self.scale, causal=False)
                out, out_lse = merge_states(out, out_lse, *old)
            output[tokens] = out
            self._store(chunk, (key[tokens], value[tokens]))

    def _ends(self, count: int) -> torch.Tensor:
        return torch.arange(0, count + 1, count, dtype=torch.int32, device=self.engine.device)

    def _rebuilt(self, chunk: Chunk, start: int, stop: int) -> list:
        """[K, V] [T, G, D] of past positions start .. stop - 1; exact ones are exact."""
        engine, device = self.engine, self.engine.device
        pages = slice(start // PAGE_SIZE, -(-stop // PAGE_SIZE))
        table = chunk.row.table[:, pages].clone()
        ends = stop, start // PAGE_SIZE
        lens, first = (torch.full((1,), n, dtype=torch.int32, device=device) for n in ends)
        recent = min(max(chunk.past - engine.window, engine.sinks, start), stop)
        at = torch.arange(recent, stop, device=device)
        ring, few = slots_torch(at, engine.sinks, engine.window), max(engine.sinks - start, 0)
        found = []
        for side, data, exact, _ in self.sides():
            x = decode(data, self.codec, table, lens, side=side, first_page=first)[0]
            x = x[:, : stop - start].to(exact.dtype)
            x[:, :few] = exact[chunk.slot, :, : min(few, stop - start)]
            x[:, recent - start :] = exact[chunk.slot][:, ring]
            found.append(x.transpose(0, 1).contiguous())
        return found

    def _store(self, chunk: Chunk, new: tuple) -> None:
        """Encode a chunk's keys and values [T, G, D], keep its sinks."""
        row, sinks = chunk.row, self.engine.sinks
        for x, (side, pages, exact, pool) in zip(new, self.sides(), strict=True):
            encode(
                x.transpose(0, 1)[None], self.codec, pages, row.table, row.lens, side=side,
                exact=exact, sinks=sinks, seq_ids=row.ids,
            )  # fmt: skip
            if chunk.entry >= 0:
                pool[chunk.entry] = exact[chunk.slot, :, :sinks]


@functools.cache
def _flash(dim: int) -> tuple[Any, int]:
    """vLLM's FlashAttention and its version here."""
    from vllm.v1.attention.backends import fa_utils

    return fa_utils.flash_attn_varlen_func, fa_utils.get_flash_attn_version(head_size=dim)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_bounds: tuple[Any, int],
    k_bounds: tuple[Any, int], scale: float, causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of q [N, H, D] over k, v [T, G, D], sequence by sequence: (o [N, H, D] in the dtype
    of q, lse float32 [N, H], natural log), contiguous.

    Args:
        q_bounds, k_bounds: int32 [sequences + 1], where they begin; tokens of the longest.
        causal: a sequence's last query is at its last key.
    """
    if q.is_cuda:
        flash, version = _flash(q.shape[-1])
        o, lse = flash(
            q, k, v, cu_seqlens_q=q_bounds[0], max_seqlen_q=q_bounds[1], cu_seqlens_k=k_bounds[0],
            max_seqlen_k=k_bounds[1], softmax_scale=scale, causal=causal, return_softmax_lse=True,
            fa_version=version,
        )  # fmt: skip
        return o.contiguous(), lse.transpose(0, 1).contiguous()
    parts, of = [], ((q, q_bounds), (k, k_bounds), (v, k_bounds))
    split = (x.float().split(bounds[0].diff().tolist()) for x, bounds in of)
    for q1, k1, v1 in zip(*split, strict=True):
        grouped = q1.unflatten(1, (k.shape[1], -1))  # [Q, G, H/G, D]
        s = torch.einsum("qghd,tgd->ghqt", grouped, k1) * scale
        if causal:
            s += torch.full(s.shape[2:], float("-inf")).triu(s.shape[3] - s.shape[2] + 1)
        out = torch.einsum("ghqt,tgd->qghd", s.softmax(-1), v1)
        parts.append((out.flatten(1, 2), s.logsumexp(-1).flatten(0, 1).T))
    o, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return o.to(q.dtype), lse.contiguous()

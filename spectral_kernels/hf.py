"""One line gives a Hugging Face causal language model the spectral cache, and undoes it.

    with enable(model, preset="quality"):
        model.generate(**inputs, max_new_tokens=100)

What happens to one model, and to no other:
- its configuration names the attention function "spectral", registered here beside transformers' own;
- a hook on its rotary embedding hands the layers cosine 1 and sine 0, so that queries and keys arrive before RoPE
  (and after the norms of Qwen3), whatever release of transformers wrote the layer;
- a hook before its decoder reads left padding and positions, puts a `ModelCache` in place of a new, empty cache, and
  sends both to the attention function as one more keyword.
The first forward of a sequence is exact: dense causal attention by PyTorch's SDPA over rotated queries and keys, while the
cache compresses K and V. Later forwards append to the cache and attend to it, one token or several.
Positions are token indices after left padding: RoPE depends on differences only.

Works with transformers 4.57 to 5.24. This is the only module that imports it.   Test: tests/test_hf.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import _launch
from ._checks import FLOATS
from .cache import PRESETS, Preset, SpectralCache
from .rope import Rope, rotate, rotate_torch

NAME = "spectral"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Frequencies that do not depend on the length: dynamic and longrope leave old keys turned by old frequencies.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# What forwards call the cache. Since 5.24 they rename the old keyword themselves, but only after hooks have run.
_OLD_CACHE = "past_key_values"
CACHE = "cache" if _RELEASE >= (5, 24) else _OLD_CACHE
# The positional parameters of every decoder's forward, in all supported releases.
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds")
# Cache.crop(0) empties the cache before this release and removes no token since.
_CROP_COUNTS = _RELEASE >= (5, 17)


class ModelCache(Cache):
    """The cache of an enabled model (`cache=`; before transformers 5.24 `past_key_values=`): a `SpectralCache` and what
    generate asks of a cache.

    Attributes:
        spectral: the SpectralCache, None while empty.
        padding: left padding of each row, in tokens.
        columns: tokens seen, padding included (what transformers calls the sequence length).
    Only forwards of the model it was made for fill it; a new one comes from `Handle.new_cache()` or from the model.
    """

    def __init__(self, handle: Handle) -> None:
        super().__init__(layers=[])
        # Weak, so that copy.deepcopy of a cache (to reuse a prompt) does not copy the model.
        self._owner = weakref.ref(handle)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next forward starts a new sequence, of any batch size."""
        self.spectral: SpectralCache | None = None
        self.padding: list[int] = []
        self.columns = 0
        self._offsets: list[int] | None = None  # position id minus column of each row, once positions have been given
        self._busy = False  # a forward is under way, or failed half-way

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache."""
        return 0 if self.spectral is None else self.spectral.nbytes

    def __len__(self) -> int:
        handle = self._owner()
        return 0 if handle is None else handle.layers

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand the new keys and values on as they are: the attention function stores them, with the queries.

        Raises:
            RuntimeError: the caller is not an enabled model, which would take the new tokens for all tokens.
        """
        handle = self._owner()
        if not self._busy or handle is None or not handle.enabled:
            raise RuntimeError(f"{CACHE}: a spectral cache works only in the model that it was made for, while enabled")
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int | torch.Tensor, layer_idx: int = 0) -> tuple[int, int]:
        # What update returns: the new tokens alone. (Before transformers 5.4 a tensor of their positions came in.)
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return new, self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no maximum

    get_max_cache_shape = get_max_length  # its name before transformers 5.14

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)  # generate (since 5.24) takes "all layers" of none for a cache that counts no tokens

    @property
    def is_initialized(self) -> bool:
        return self.spectral is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: a negative number -n removes n tokens, a positive one is the length to keep (padding
                included), as it was before transformers 5.17. Zero removes nothing since 5.17 and everything before.
        Raises:
            ValueError: a row would end inside its left padding.
        """
        count = tokens_to_remove
        keep = self.columns + count if count < 0 or (count == 0 and _CROP_COUNTS) else min(count, self.columns)
        if keep <= 0:
            self.reset()
        elif keep < self.columns:
            if keep < max(self.padding):
                raise ValueError(f"tokens_to_remove: expected {max(self.padding)} tokens or more to stay, got {keep}")
            assert self.spectral is not None
            self.spectral.crop([keep - padding for padding in self.padding])
            self.columns = keep

    def _select(self, index: torch.Tensor) -> None:
        if self.spectral is None:
            return
        self.spectral.reorder(index)
        rows = index.tolist()
        self.padding = [self.padding[row] for row in rows]
        self._offsets = [self._offsets[row] for row in rows] if self._offsets is not None else None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes the old row beam_idx[i] (int64 [B])."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.padding))[indices.cpu()])


@dataclass(frozen=True)
class _Step:
    """One forward pass: what its attention calls need to know."""

    handle: Handle
    cache: ModelCache | None
    past: int  # columns before this forward; 0 = the first forward of a sequence, which is dense
    queries: int
    padding: list[int]
    offsets: list[int] | None
    positions: torch.Tensor | None  # int64 [B, Q] of a dense forward; 0 in the padding


class Handle:
    """What `enable` returns: `disable()` it, or leave its `with` block. Not made by hand."""

    def __init__(self, model: PreTrainedModel, preset: str | Preset, landmarks: Sequence[Any]) -> None:
        decoder = model.get_decoder()
        self.model = model
        self.preset = preset
        self.landmarks = landmarks
        self.layers: int = len(decoder.layers)
        self.rope = Rope.from_inv_freq(decoder.rotary_emb.inv_freq.float(), float(decoder.rotary_emb.attention_scaling))
        self._v_metrics: list[torch.Tensor | None] | None = None
        # Refuses a preset, landmarks, head dimension or dtype that no cache can have, before anything is changed.
        per_row = len(landmarks) > 0 and not isinstance(landmarks[0], int)
        self._spectral_cache(len(landmarks) if per_row else 1, model.dtype, model.device, None)

        self._implementation = model.config._attn_implementation
        model.config._attn_implementation = NAME
        self._hooks = [
            decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            decoder.register_forward_hook(self._after_forward, with_kwargs=True),
            decoder.rotary_emb.register_forward_hook(_no_rotation),
        ]

    @property
    def enabled(self) -> bool:
        return bool(self._hooks)

    def disable(self) -> None:
        """Give the model its own attention back and remove the hooks. A second call does nothing."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self.model.config._attn_implementation = self._implementation

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def new_cache(self) -> ModelCache:
        """An empty cache, to pass as `cache` (before transformers 5.24 `past_key_values`) and keep between calls (chat).
        Without one each call has its own."""
        return ModelCache(self)

    def _spectral_cache(
        self, batch: int, dtype: torch.dtype, device: torch.device, metrics: list[torch.Tensor | None] | None
    ) -> SpectralCache:
        return SpectralCache(
            layers=self.layers,
            batch=batch,
            query_heads=self.model.config.num_attention_heads,
            kv_heads=self.model.config.num_key_value_heads,
            head_dim=self.model.get_decoder().layers[0].self_attn.head_dim,
            rope=self.rope.to(device),
            preset=self.preset,
            dtype=dtype,
            device=device,
            landmarks=self.landmarks,
            v_metrics=metrics,
        )

    def _start(self, key: torch.Tensor) -> SpectralCache:
        """An empty cache for a sequence whose first keys are `key` [B, G, T, D]."""
        if self._v_metrics is None:
            self._v_metrics = v_metrics(self.model)
        metrics = [metric if metric is None else metric.to(key.device) for metric in self._v_metrics]
        return self._spectral_cache(key.shape[0], key.dtype, key.device, metrics)

    def _before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Check a forward of the decoder, choose its cache and describe it; nothing is changed before all checks."""
        if len(args) > len(_POSITIONAL):
            raise TypeError(f"forward: expected at most {len(_POSITIONAL)} positional arguments, got {len(args)}")
        kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        if _OLD_CACHE in kwargs:  # the new keyword wins, as in transformers
            kwargs.setdefault(CACHE, kwargs.pop(_OLD_CACHE))
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            return (), kwargs  # transformers' own error follows
        implementation = self.model.config._attn_implementation
        if implementation != NAME:  # another function would take unrotated queries and keys for rotated ones
            raise ValueError(
                f"model: expected attn_implementation {NAME!r} while enabled, got {implementation!r}; disable() first"
            )
        if decoder.training:
            raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")
        outputs = kwargs.get("output_attentions")
        if outputs if outputs is not None else self.model.config.output_attentions:
            raise ValueError("output_attentions: expected False, got True; the attention weights are never formed")

        batch, queries = inputs.shape[:2]
        cache = self._choose_cache(kwargs)
        past = 0 if cache is None else cache.columns
        if cache is not None and past:
            if batch != len(cache.padding):
                raise ValueError(f"{CACHE}: expected a cache of {batch} rows, got {len(cache.padding)}")
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in decoder.parameters()):
                raise ValueError(f"{CACHE}: attention to a spectral cache has no gradient; use torch.no_grad()")
        padding = _left_padding(kwargs.get("attention_mask"), batch, past + queries)
        if padding is None:
            padding = cache.padding if cache is not None and past else [0] * batch
        elif cache is not None and past and padding != cache.padding:
            raise ValueError(f"attention_mask: expected left padding {cache.padding} as before, got {padding}")
        if not past and max(padding) >= queries:
            raise ValueError(f"attention_mask: expected a token in every row, got left padding {padding} of {queries}")
        offsets = _position_offsets(kwargs.get("position_ids"), padding, past, queries)
        if cache is not None and past and cache._offsets is not None:
            if offsets is not None and offsets != cache._offsets:
                raise ValueError(
                    f"position_ids: expected positions that go on from the cached tokens' (column plus {cache._offsets}), "
                    f"got column plus {offsets}"
                )
            offsets = cache._offsets

        positions = None
        if not past:
            start = torch.tensor(padding, device=inputs.device)[:, None]
            positions = (torch.arange(queries, device=inputs.device) - start).clamp(min=0)
        if cache is not None:
            cache._busy = True
        # Padding and positions travel in the step: masks of [T, T] and transformers' search for packed rows are not needed.
        kwargs.update(attention_mask=None, position_ids=None)
        kwargs[CACHE] = cache
        kwargs[NAME] = _Step(self, cache, past, queries, padding, offsets, positions)
        return (), kwargs

    def _choose_cache(self, kwargs: dict[str, Any]) -> ModelCache | None:
        given = kwargs.get(CACHE)
        if given is None:
            use_cache = kwargs.get("use_cache")
            use_cache = self.model.config.use_cache if use_cache is None else use_cache
            return ModelCache(self) if use_cache else None
        if isinstance(given, ModelCache):
            if given._owner() is not self:
                raise ValueError(f"{CACHE}: expected a cache of this model and this enable(), got another's")
            if given._busy:
                raise ValueError(f"{CACHE}: an earlier forward through this cache failed half-way; reset() it")
            return given
        if type(given) is not DynamicCache or getattr(given, "offloading", False):
            raise TypeError(
                f"{CACHE}: expected None, a new DynamicCache (cache_implementation None or 'dynamic') or a cache of "
                f"this handle, got {type(given).__name__}{' with offloading' if type(given) is DynamicCache else ''}"
            )
        if given.get_seq_length() > 0:
            raise ValueError(
                f"{CACHE}: expected an empty cache, got a DynamicCache of {given.get_seq_length()} tokens: keys "
                "that the model stored before enable() are already rotated; pass the whole prompt again"
            )
        return ModelCache(self)

    def _after_forward(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        step: _Step | None = kwargs.get(NAME)
        if step is not None and step.cache is not None:
            if step.cache.spectral is not None:
                with torch.no_grad():
                    step.cache.spectral.finish()
            step.cache.padding, step.cache._offsets = step.padding, step.offsets
            step.cache.columns = step.past + step.queries
            step.cache._busy = False


def enable(model: PreTrainedModel, preset: str | Preset = "balanced", *, landmarks: Sequence[Any] = ()) -> Handle:
    """Let a model's `generate` and forwards with a cache store and attend to a spectral cache, until `disable()`.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 ForCausalLM of transformers 4.57 to 5.24 on one device, fp16, bf16 or fp32
            (no bf16 on cards before sm_80, which cannot compute with it: `model.to(torch.float16)` first), attention
            implementation "sdpa" or "eager", RoPE of type default, linear, llama3 or yarn, no active sliding window, head
            dimension 64, 80, 96, 128 or 256.
        preset: "exact", "quality", "balanced", "small", or a Preset.
        landmarks: token positions (left padding not counted) that stay exact: the same for all rows, or a sequence a row.
    Returns:
        A Handle: a context manager with `disable()` and `new_cache()`.
        The model's cache is a `ModelCache`; every generate() without one starts a new one. The first forward
        of a sequence attends densely by SDPA, with the left padding of a 2-D attention mask; so does one without a cache.
    Raises:
        TypeError, ValueError, NotImplementedError: the model or an argument is not as above; nothing was changed.
        ValueError and TypeError also come from forwards, before they change anything: training mode, output_attentions,
        static, quantised, offloaded or filled foreign caches, masks that are not 2-D left padding, positions that do
        not count up by one, gradients through a filled cache.
    """
    _check_model(model)
    if not isinstance(preset, Preset) and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {list(PRESETS)} or a Preset, got {preset!r}")
    return Handle(model, preset, landmarks)


def v_metrics(model: PreTrainedModel) -> list[torch.Tensor | None]:
    """What errors of V cost after the output projection: for each layer W_o^T W_o of each query head.

    Returns:
        One float32 [H, D, D] a layer, on its weight's device; None where the weight is not a plain floating-point matrix.
    """
    metrics: list[torch.Tensor | None] = []
    for layer in model.get_decoder().layers:
        dim = layer.self_attn.head_dim
        weight = getattr(layer.self_attn.o_proj, "weight", None)
        width = model.config.num_attention_heads * dim
        if weight is None or weight.dtype not in FLOATS or weight.shape[1:] != (width,):
            metrics.append(None)  # quantised: the metric is an aid, not worth unpacking weights for
            continue
        by_head = weight.detach().float().view(weight.shape[0], -1, dim)  # [hidden, H, D]
        metrics.append(torch.einsum("ohd,ohe->hde", by_head, by_head))
    return metrics


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    config = model.config
    if config.model_type not in MODEL_TYPES or "ForCausalLM" not in type(model).__name__:
        raise NotImplementedError(
            f"model: expected a ForCausalLM of type {', '.join(MODEL_TYPES)}, "
            f"got {type(model).__name__} ({config.model_type})"
        )
    if config._attn_implementation == NAME:
        raise ValueError("model: already enabled (or it shares its config with an enabled model); disable() that first")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"model: expected attn_implementation 'sdpa' or 'eager', got {config._attn_implementation!r}")
    if config.output_attentions:
        raise ValueError("model.config.output_attentions: expected False, got True")
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if any(kind != "full_attention" for kind in layer_types) if layer_types else window is not None:
        raise NotImplementedError(f"model: expected full attention in every layer, got a sliding window of {window} tokens")
    decoder = model.get_decoder()
    if decoder.rotary_emb.rope_type not in ROPE_TYPES:
        raise NotImplementedError(
            f"model: expected RoPE of type {', '.join(ROPE_TYPES)} (constant frequencies), "
            f"got {decoder.rotary_emb.rope_type}"
        )
    dim = decoder.layers[0].self_attn.head_dim
    if 2 * decoder.rotary_emb.inv_freq.shape[0] != dim:
        raise NotImplementedError(f"model: expected RoPE on all {dim} dimensions of a head, got a partial one")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise NotImplementedError(f"model: expected all weights on one device, got {sorted(map(str, devices))}")
    for parameter in model.parameters():
        _launch.check_bf16("model", parameter)


def _left_padding(attention_mask: Any, batch: int, columns: int) -> list[int] | None:
    """Left padding of each row of a 2-D mask (1 = a token), None without a mask."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        shape = list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask: expected a 2-D tensor [batch, tokens] or None, got {shape}")
    if attention_mask.shape != (batch, columns):
        raise ValueError(
            f"attention_mask: expected shape [{batch}, {columns}] (cached and new tokens), got {list(attention_mask.shape)}"
        )
    seen = attention_mask.bool()
    padding = columns - seen.sum(dim=1)
    holes = (seen != (torch.arange(columns, device=seen.device) >= padding[:, None])).any()
    *counts, has_holes = torch.cat((padding, holes[None])).tolist()  # one read of the device a forward
    if has_holes:
        raise ValueError(
            "attention_mask: expected left padding only (zeros, then ones, in each row), got holes or right padding"
        )
    return counts


def _position_offsets(position_ids: Any, padding: Sequence[int], past: int, queries: int) -> list[int] | None:
    """Position id minus column of each row's new tokens; None without positions: they go on by one, as the cache counts."""
    if position_ids is None:
        return None
    batch = len(padding)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != queries:
        raise ValueError(f"position_ids: expected shape [{batch}, {queries}], got {list(position_ids.shape)}")
    column = torch.arange(past, past + queries, device=position_ids.device)
    offset = (position_ids - column).expand(batch, -1)
    # Padding counts as the row's last token, so that it decides nothing.
    offset = torch.where(column >= torch.tensor(padding, device=column.device)[:, None], offset, offset[:, -1:])
    low, high = torch.stack((offset.amin(dim=1), offset.amax(dim=1))).tolist()
    if low != high:
        raise ValueError("position_ids: expected positions that count up by one in each row (no packed sequences)")
    return low


def _no_rotation(
    module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(output[0]), torch.zeros_like(output[1])


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function "spectral": q [B, H, Q, D], k and v of the new tokens [B, G, Q, D], before RoPE.

    Returns [B, Q, H, D] in the dtype of q, and no attention weights.
    """
    step: _Step | None = kwargs.pop(NAME, None)
    if step is None:  # a model that shares its config object with an enabled one: plain SDPA
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer: Any = module.layer_idx
    if step.past:
        out = _cached_attention(step, layer, query, key, value, scaling)
    else:
        if step.cache is not None:
            with torch.no_grad():
                if step.cache.spectral is None:
                    step.cache.spectral = step.handle._start(key)
                step.cache.spectral.append(layer, key, value, queries=query, padding=step.padding, defer=True)
        out = _dense_attention(step, query, key, value, scaling)
        # Compressed beside this attention, the rest of the layer and the next one, which have the device busy meanwhile.
        if step.cache is not None and step.cache.spectral is not None:
            with torch.no_grad():
                step.cache.spectral.start(layer)
    return out.transpose(1, 2), None


def _cached_attention(
    step: _Step, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Append the new tokens and attend to the cache, causally; in pieces whose tokens are all exact when they attend."""
    assert step.cache is not None and step.cache.spectral is not None
    cache = step.cache.spectral
    outs: list[torch.Tensor] = []
    start = 0
    while start < step.queries:
        end = step.queries if cache.preset.k is None else start + cache.layers[layer].most_queries()
        tokens = slice(start, end)
        cache.append(layer, key[:, :, tokens], value[:, :, tokens], queries=query[:, :, tokens])
        outs.append(cache.attend(layer, query[:, :, tokens], scale=scaling))
        start = end
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _dense_attention(
    step: _Step, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Causal attention among the tokens of one forward, exact up to rounding; zeros in the padding."""
    rope = step.handle.rope.to(query.device)
    assert step.positions is not None
    turn = rotate_torch if query.requires_grad else rotate  # the kernel has no backward
    query, key = turn(query, step.positions, rope), turn(key, step.positions, rope)
    # cos and sin of both sides carry the attention scaling, and every dimension turns.
    scale = (query.shape[-1] ** -0.5 if scaling is None else scaling) * rope.scaling**2
    # Repeated, as SDPA's enable_gqa falls back to materialised scores wherever flash attention is missing.
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    attend = nn.functional.scaled_dot_product_attention
    if not any(step.padding):
        return attend(query, key, value, is_causal=True, scale=scale)
    # Row by row needs no [T, T] mask, and no query is without a key.
    rows = [
        attend(query[b : b + 1, :, p:], key[b : b + 1, :, p:], value[b : b + 1, :, p:], is_causal=True, scale=scale)
        for b, p in enumerate(step.padding)
    ]
    return torch.cat([nn.functional.pad(row, (0, 0, p, 0)) for row, p in zip(rows, step.padding, strict=True)])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

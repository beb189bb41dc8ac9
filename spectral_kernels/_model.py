"""What the adapter reads of a transformers model: which layers attend fully, and with what shapes.

No list of model names decides. transformers' own `DynamicCache` says which layers keep all keys and
values; these are ours, and so are sliding windows beside them. All others (convolutions, linear
attention, chunks) keep the layers that it made for them. What metadata cannot say, `enable`'s
self-check of a few tokens finds out.
Test: tests/test_model.py, tests/test_families.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from . import _launch
from ._checks import FLOATS
from .codec import Codec
from .layout import HEAD_DIMS

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")  # what modules call them
NAME = "spectral"  # our attention functions' names begin with it


@dataclass(frozen=True)
class Layer:
    """A layer that attends fully, or to a window.

    Args:
        index: in the model's cache.      modules: that have it as their `layer_idx`.
        kv_heads, group, head_dim: KV heads of this process, query heads a KV head, D.
        device: where it computes.
        shard: (rank, ranks) of tensor parallelism: which of the model's heads these are.
        window: newest tokens that it attends to; 0: all.
    """

    index: int
    modules: tuple[nn.Module, ...]
    kv_heads: int
    group: int
    head_dim: int
    device: torch.device
    shard: tuple[int, int]
    window: int = 0

    def codec(self, whole: Codec) -> Codec:
        """The heads of this process out of the codec of all."""
        rank, ranks = self.shard
        return whole if ranks == 1 else whole.of_heads(rank * self.kv_heads, self.kv_heads)


def own_layers(config: Any) -> list[Any]:
    """The empty layers of transformers' cache for a model of this text config."""
    try:
        return DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        what = f"transformers has no DynamicCache for its layers ({error})"
        raise NotImplementedError(f"model: {what}; it stays dense") from error


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """What a layer of transformers' cache holds."""
    found: list[Any] = []
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        found += states.values() if isinstance(states, dict) else [states]
    return [x for x in found if isinstance(x, torch.Tensor)]


def stays(config: Any, ours: Sequence[Layer]) -> bool:
    """Whether a step's state stays where it is, as a CUDA graph needs it; if not, it is said."""
    indices, devices = {layer.index for layer in ours}, {layer.device for layer in ours}
    others = [layer for i, layer in enumerate(own_layers(config)) if i not in indices]
    moving = sorted({type(layer).__name__ for layer in others if not layer.is_compileable})
    why = " and ".join(moving) or f"{len(devices)} devices"
    if moving or len(devices) > 1:
        warnings.warn(f"spectral_kernels: no CUDA graph with {why}: eager steps", stacklevel=4)
    return not moving and len(devices) == 1


def weights_of(model: nn.Module) -> int:
    """Stands for what a captured step has fixed: autocast, where weights lie, PEFT's adapters."""
    state: list[Any] = [torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    for x in map(vars, model.modules()):
        state += [p.data_ptr() for p in x["_parameters"].values() if p is not None]
        if "merged_adapters" in x:
            state += [str(x.get(name)) for name in names]
    return hash(tuple(state))


class NoWaits(TorchDispatchMode):
    """Raises RuntimeError where this thread would wait for a GPU. A wait inside a capture ends it,
    and leaves PyTorch's generator and allocator capturing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        if func is torch.ops.aten.index.Tensor:  # by masks, not by numbers
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            waits = waits if masks else set()
        if waits and isinstance(args[0], torch.Tensor) and args[0].device.type != "cpu":
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def full_layers(config: Any) -> list[int]:
    """Indices of the layers that keep all their keys and values, by the config alone.
    NotImplementedError: there are none, or they are of a kind that no page holds."""
    shared = getattr(config, "kv_sharing_modes", None) or ()
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in shared:
        raise NotImplementedError("model: expected keys of its own in every layer; it stays dense")
    plain = "plain softmax attention (without the cap it computes something else)"
    refused = {
        "is_encoder_decoder": "a decoder-only one", "kv_lora_rank": "K and V of one size (no MLA)",
        "attn_logit_softcapping": plain, "attn_logit_softcap": plain,
    }  # fmt: skip
    for name, wanted in refused.items():
        if getattr(config, name, None):
            raise NotImplementedError(f"model: expected {wanted}, got {name}; it stays dense")
    kinds, layers = getattr(config, "layer_types", None), own_layers(config)
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    odd = {kinds[i] for i in full if kinds} - {"full_attention"}
    if odd:
        what = f"this release of transformers keeps the state of {sorted(odd)} outside its Cache"
        raise NotImplementedError(f"model: {what}; a newer one (5.17 or later) may do")
    if not full:
        found = sorted({type(layer).__name__ for layer in layers})
        what = f"layers with full attention and no more, got {found}"
        raise NotImplementedError(f"model: expected {what}; it stays dense")
    return full


def windows_of(model: Any, full: Sequence[Layer]) -> list[Layer]:
    """Layers with a sliding window that can be ours too: beside those on one device."""
    decoder, devices = decoder_of(model), {layer.device for layer in full}
    config, found = decoder.config, []
    for index, own in enumerate(own_layers(config)):
        kinds = getattr(config, "layer_types", None)
        if type(own) is DynamicSlidingWindowLayer and kinds and kinds[index] == "sliding_attention":
            with suppress(NotImplementedError, ValueError):  # it keeps transformers' own
                layer = _layer(decoder, index, config._attn_implementation)
                found.append(replace(layer, window=own.sliding_window))
    return found if len(devices | {layer.device for layer in found}) == 1 else []


def kv_shape(config: Any) -> tuple[int, int]:
    """(KV heads, head dimension) of a text config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def decoder_of(model: Any) -> Any:
    """What holds its layers; the model itself if nothing does."""
    decoder = model.get_decoder()
    decoder = model.base_model if decoder is model else decoder
    return getattr(model, "model", model) if decoder is model else decoder


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """The layers that attend fully, after checks of the whole model. TypeError, ValueError,
    NotImplementedError: it cannot be enabled; what to do."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; pass its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {kind}{hint}")
    decoder = None if model.config.is_encoder_decoder else decoder_of(model)
    if decoder in (None, model) or not model.can_generate():
        raise NotImplementedError(f"model: expected a decoder-only ForCausalLM, got {kind}")
    config, name = decoder.config, decoder.config._attn_implementation
    if name.startswith(NAME):
        raise ValueError("model: already enabled, or shares the config of an enabled model")
    if name not in ALL_MASK_ATTENTION_FUNCTIONS or name == "flex_attention":
        raise ValueError(f"model: expected attn_implementation 'sdpa' or 'eager', got {name!r}")
    if config.output_attentions:
        raise ValueError("model.config.output_attentions: expected False, got True")
    if not model._supports_default_dynamic_cache():
        what = f"this release of transformers gives {kind} a cache of its own kind"
        raise NotImplementedError(f"model: {what}; a newer one (5.17 or later) may do")
    if model.dtype not in FLOATS:
        raise ValueError(f"model: expected dtype {', '.join(map(str, FLOATS))}, got {model.dtype}")
    for parameter in model.parameters():
        _launch.check_bf16("model", parameter)
    return [_layer(decoder, index, name) for index in full_layers(config)]


def _layer(decoder: Any, index: int, implementation: str) -> Layer:
    named = [m for m in decoder.modules() if getattr(m, "layer_idx", None) == index]
    modules: list[Any] = [m for m in named if hasattr(m, "head_dim") or hasattr(m, "head_size")]
    if not modules:
        raise NotImplementedError(f"model: layer {index} has no attention module; it stays dense")
    heads = decoder.config.num_attention_heads
    for module in modules:
        if getattr(module, "is_causal", True) is False:
            raise NotImplementedError(f"model: layer {index} is not causal; it stays dense")
        dim = getattr(module, "head_dim", None) or module.head_size
        if dim not in HEAD_DIMS:
            raise ValueError(f"head_dim: expected one of {list(HEAD_DIMS)}, got {dim}")
        dense_attention(implementation, module)
    told: Any = (getattr(modules[0], name, None) for name in KV_HEADS)
    kv_heads = next(filter(None, told), kv_shape(decoder.config)[0])
    group, shard = heads // kv_heads, _shard_of(modules[0])
    if kv_heads % shard[1]:
        raise ValueError(f"model: expected a multiple of {shard[1]} KV heads, got {kv_heads}")
    device, local = _device_of(modules[0]), kv_heads // shard[1]
    return Layer(index, tuple(named), local, group, dim, device, shard)


def _shard_of(module: nn.Module) -> tuple[int, int]:
    """(rank, ranks) over which tensor parallelism has split a module's weights; (0, 1): none."""
    for parameter in module.parameters():
        if any(place.is_shard() for place in getattr(parameter, "placements", ())):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            return mesh.get_local_rank(), mesh.size()
    return 0, 1


def _device_of(module: Any) -> torch.device:
    """Where a module computes: what accelerate's hook says, or where its weights are."""
    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    device = next(module.parameters()).device if hooked is None else hooked
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta":
        raise NotImplementedError("model: expected weights on a device, got device meta")
    return device


def stock_parts(model: Any) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value): what makes a model that Unsloth loaded run transformers' own code.

    Its classes ask each module whether it is to be fast, and its modeling file keeps what it took
    the place of. Empty for other models.
    """
    fast = [module for module in model.modules() if vars(module).get("_unsloth_fast_path")]
    decoder: Any = decoder_of(model)
    if not fast:
        if type(decoder).forward.__module__.startswith("unsloth."):
            raise NotImplementedError("model: expected one of Unsloth 2026.10.9 or newer")
        return []
    name = type(decoder).__name__.removesuffix("Model") + "RotaryEmbedding"
    before, _ = sys.modules[type(decoder).__module__]._unsloth_pre_patch_originals
    parts: list[tuple[Any, str, Any]] = [(module, "_unsloth_fast_path", False) for module in fast]
    if name in before:  # theirs reads the device in every step
        rotary = before[name](config=decoder.config).to(model.device)
        parts.append((decoder, "rotary_emb", rotary))
    return parts


@contextmanager
def using(parts: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """`stock_parts` in place, and back afterwards."""
    before = [getattr(owner, name) for owner, name, _ in parts]
    try:
        for owner, name, value in parts:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(parts, before, strict=True):
            setattr(owner, name, value)


def dense_attention(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of this name, as the module would call it. NotImplementedError: the
    module's file has none, so the module asks for none."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        what = f"{type(module).__name__} does not call transformers' attention interface"
        raise NotImplementedError(f"model: {what}; it stays dense")
    return eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]


def compare(
    layer: Layer, module: nn.Module, seen: list[torch.Tensor], q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor | None, **kwargs: Any,
) -> None:  # fmt: skip
    """While `enable` checks: a prompt (out is None) leaves its k, v in `seen`; a step is compared.

    The module's own attention runs in float64 on the same q, k, v. Ours rounds weights and output
    to its dtype; scores and exponentials are float32, within 8 of their last places.
    Raises:
        ValueError: shapes are not what the module says, or results differ.
    """
    name, wanted = f"model: layer {layer.index}", [layer.kv_heads, layer.head_dim]
    heads, got = q.shape[1], [[x.shape[1], x.shape[3]] for x in (k, v)]
    if got != [wanted, wanted] or heads != layer.kv_heads * layer.group:
        raise ValueError(f"{name}: expected [KV heads, D] {wanted}, got {got} and {heads} heads")
    if out is None:
        seen[:] = k, v
        return
    k, v = (torch.cat((old, x), dim=2).double() for old, x in zip(seen, (k, v), strict=True))
    new, tokens = q.shape[2], k.shape[2]
    near = torch.ones(new, tokens, dtype=torch.bool, device=q.device).tril(tokens - new)
    near = near.triu(tokens - new + 1 - layer.window) if layer.window else near
    mask = torch.zeros_like(near, dtype=k.dtype).masked_fill(~near, float("-inf"))[None, None]
    own = dense_attention("eager", module)
    with torch.autocast(q.device.type, enabled=False):
        expected = own(module, q.double(), k, v, mask, **kwargs)[0].transpose(1, 2)
    scale = kwargs.get("scaling") or layer.head_dim**-0.5
    score = scale * float(q.double().norm(dim=-1).max() * k.norm(dim=-1).max())  # at most
    error, largest = float((expected - out).abs().max()), float(v.abs().max())
    if not error <= largest * (4 * torch.finfo(out.dtype).eps + 2**-20 * (1 + score)):
        what = f"{error:.3g} (values up to {largest:.3g}): it does more than softmax"
        raise ValueError(f"{name}: its attention and the cache's differ by {what}; it stays dense")


@contextmanager
def wrapped_layers(decoder: Any, wrap: Callable[..., Any]) -> Iterator[None]:
    """Inside, the `forward` of the decoder's layers is what `wrap` makes of it."""
    lists = (list(x) for x in decoder.children() if isinstance(x, nn.ModuleList))
    layers: Sequence[Any] = next(lists, [])
    before = [vars(x).get("forward") for x in layers]
    try:
        for layer in layers:
            layer.forward = wrap(layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


@contextmanager
def compiled_layers(decoder: Any, cache: Cache) -> Iterator[None]:
    """Let forwards run the decoder's layers compiled by `torch.compile`, norms and RoPE fused.

    A layer's graph breaks at its cache and its attention, and the pieces between are the same for
    all layers: what is compiled for the first serves the others.
    """
    config, opaque = decoder.config, torch.compiler.disable
    name = config._attn_implementation
    AttentionInterface.register(f"{name}_opaque", opaque(ALL_ATTENTION_FUNCTIONS[name]))
    AttentionMaskInterface.register(f"{name}_opaque", ALL_MASK_ATTENTION_FUNCTIONS[name])
    try:
        config._attn_implementation = f"{name}_opaque"
        for kept in cache.layers:
            kept.update = opaque(kept.update)
        # A layer's number is a constant of its piece: as many cheap recompilations as layers.
        with (
            wrapped_layers(decoder, partial(torch.compile, dynamic=False)),
            torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=8192),
        ):
            yield
    finally:
        config._attn_implementation = name
        for kept in cache.layers:
            vars(kept).pop("update", None)

"""Spectral KV cache: Triton kernels that attend to low-rank, quantised keys and values without
rebuilding them.

Letters: B batch, H query heads, G key/value heads, Q queries a row, T tokens, D head dimension, R
rank, F positions of a frame, M rows of a codec.
State: attention returns (o, lse), float32: the normalised output and the natural-log log-sum-exp of
the scaled scores, [B, H, (Q,) D] and [B, H, (Q,)]; a set without keys is (0, -inf). `merge_states`
joins states.

A function f here launches its Triton kernel on CUDA tensors and runs its plain-PyTorch twin f_torch
on CPU tensors; what is on no token's path (project_queries, pack_pages, unpack_pages) is PyTorch on
any device. Importing this package touches no device and needs neither a GPU nor
transformers; `spectral_kernels.hf` needs the latter."""

from .attention import attend_spectral, attend_workspace
from .cache import SpectralCache
from .codec import Codec, ModelCodec
from .compress import append, decode, encode
from .layout import PAGE_SIZE, Bands, PageLayout, pack_pages, unpack_pages
from .merge import merge_many_states, merge_states
from .rope import freqs_from_inv_freq, project_queries, rotate, turn_back
from .window import attend_window

__version__ = "0.1.0"
__all__ = [
    "PAGE_SIZE",
    "Bands",
    "Codec",
    "ModelCodec",
    "PageLayout",
    "SpectralCache",
    "append",
    "attend_spectral",
    "attend_window",
    "attend_workspace",
    "decode",
    "encode",
    "freqs_from_inv_freq",
    "merge_many_states",
    "merge_states",
    "pack_pages",
    "project_queries",
    "rotate",
    "turn_back",
    "unpack_pages",
]

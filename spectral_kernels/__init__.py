"""Spectral KV cache: Triton kernels that attend to low-rank, quantised keys and values without rebuilding them.

Letters: B batch, H query heads, G key/value heads, Q queries a row, T tokens, D head dimension, R rank, C chunk length.
State: attention returns (o, lse), float32: the normalised output and the natural-log log-sum-exp of the scaled scores,
[B, H, (Q,) D] and [B, H, (Q,)]; a set without keys is (0, -inf). `merge_states` joins states.

Every function f here is a launcher of a Triton kernel on CUDA tensors and its plain-PyTorch twin f_torch on CPU tensors.
Importing this package touches no device and needs neither a GPU nor transformers; `spectral_kernels.hf` needs the latter.
"""

from .attention import attend_exact, attend_spectral
from .cache import PRESETS, Preset, SpectralCache
from .compress import decode, encode, fit_basis, fit_encoder, fit_side, fit_steps, gram, quantise_basis, query_metric
from .merge import lse_from_log2, lse_to_log2, merge_many_states, merge_states
from .pages import Bands, PageLayout, Pages, allocate_pages, pack_pages, unpack_pages
from .rope import Rope, phase_align, project_queries, rotate

__all__ = [
    "PRESETS",
    "Bands",
    "PageLayout",
    "Pages",
    "Preset",
    "Rope",
    "SpectralCache",
    "allocate_pages",
    "attend_exact",
    "attend_spectral",
    "decode",
    "encode",
    "fit_basis",
    "fit_encoder",
    "fit_side",
    "fit_steps",
    "gram",
    "lse_from_log2",
    "lse_to_log2",
    "merge_many_states",
    "merge_states",
    "pack_pages",
    "phase_align",
    "project_queries",
    "quantise_basis",
    "query_metric",
    "rotate",
    "unpack_pages",
]

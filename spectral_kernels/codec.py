"""The codec: what a stored token means. Calibrated once a model, the same for every sequence.

With kappa = R(-t0) k the key as the model rotated it, turned back by the start t0 of its frame (of
F positions), and v as it is:

    c = kappa @ k_encoder - k_offset    kappa ~ k_mean + sum_r (n_r + z_r) k_scale_r k_basis_r
    e = v @ v_encoder                   v     ~          sum_r (n_r + z_r) v_scale_r v_basis_r

with n_r the stored code of component r and z_r = -(2**bits - 1)/2 (layout.py). Encoders give
coefficients in units of the quantiser's steps, which the scales hold; k_offset = k_mean @
k_encoder.

Every tensor has a leading row dimension M: the codecs a sequence may name (`codec_ids`); row 0 is
the model's. Oracle: reference/calibrate.py.   Test: tests/test_codec.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ._checks import check_least, check_tensor
from .layout import Bands, PageLayout

FORMAT = "spectral-codec-1"


def _tensors_of(layout: PageLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape after [M, G] and dtype of a codec's tensors but freqs."""
    k, v, dim = layout.k.rank, layout.v.rank, layout.head_dim
    shapes = {"k_basis": (k, dim), "k_scale": (k,), "k_encoder": (dim, k), "k_mean": (dim,)}
    shapes |= {"k_offset": (k,), "v_basis": (v, dim), "v_scale": (v,), "v_encoder": (dim, v)}
    kinds = {"k_basis": torch.int8, "v_basis": torch.int8}
    return {name: (shape, kinds.get(name, torch.float32)) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Codec:
    """The codec of one layer: contiguous tensors on one device.

    Args:
        layout: bands of both sides, head dimension, frame.
        freqs: int64 [pairs], what a position turns each pair of dimensions (i, i + pairs) by, in
            2**-64 turns (`rope.freqs_from_inv_freq`). Any values are exact; the model's own make
            keys compressible.
        k_basis: int8 [M, G, R_K, D].      k_scale: float32 [M, G, R_K].      k_encoder: float32 [M,
            G, D, R_K].
        k_mean: float32 [M, G, D].      k_offset: float32 [M, G, R_K].
        v_basis, v_scale, v_encoder: likewise.
    Raises:
        TypeError, ValueError: a tensor's dtype, shape, device or strides are not as above.
    """

    layout: PageLayout
    freqs: torch.Tensor
    k_basis: torch.Tensor
    k_scale: torch.Tensor
    k_encoder: torch.Tensor
    k_mean: torch.Tensor
    k_offset: torch.Tensor
    v_basis: torch.Tensor
    v_scale: torch.Tensor
    v_encoder: torch.Tensor

    def __post_init__(self) -> None:
        check_tensor("freqs", self.freqs, shape=(None,), dtype=torch.int64, contiguous=True)
        dim, device = self.layout.head_dim, self.freqs.device
        if 2 * self.freqs.shape[0] > dim:
            raise ValueError(
                f"freqs: expected at most D / 2 = {dim // 2} pairs, got {self.freqs.shape[0]}"
            )
        check_tensor("k_basis", self.k_basis, shape=(None, None, self.layout.k.rank, dim))
        rows, heads = self.k_basis.shape[:2]
        for name, (shape, dtype) in _tensors_of(self.layout).items():
            check_tensor(
                name, getattr(self, name), shape=(rows, heads, *shape), dtype=dtype,
                device=device, contiguous=True,
            )  # fmt: skip

    @property
    def kv_heads(self) -> int:
        return self.k_basis.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def of_heads(self, first: int, count: int) -> Codec:
        """The codec of the KV heads first .. first + count - 1, in memory of its own."""
        heads = slice(first, first + count)
        return replace(self, **{n: getattr(self, n)[:, heads].contiguous() for n in TENSORS[1:]})

    def to(self, device: torch.device | str) -> Codec:
        """The same on another device."""
        return replace(self, **{n: getattr(self, n).to(device) for n in TENSORS})


TENSORS = tuple(field.name for field in fields(Codec))[1:]  # freqs first


@dataclass(frozen=True)
class ModelCodec:
    """The codecs of a model's layers, and what stays exact.

    Args:
        layers: one Codec a layer that a spectral cache serves, in order.
        sinks: first tokens of a sequence that stay exact.      window: newest tokens that are
            exact, at least 1.
        preset: its name.
        fingerprint: of the model it was calibrated on (`fingerprint`); "" if of no
            particular one.
        notes: what it was calibrated on, in words and numbers; printed, not read by programs.
    """

    layers: tuple[Codec, ...]
    sinks: int
    window: int
    preset: str = "custom"
    fingerprint: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        check_least(sinks=(self.sinks, 0), window=(self.window, 1))

    @classmethod
    def exact(cls, layers: int, heads: int, dim: int, tokens: int) -> ModelCodec:
        """A codec that nothing is read from: all of so many tokens are in the window."""
        layout = PageLayout(Bands.parse("16x2"), Bands.parse("16x2"), dim)
        freqs = torch.zeros(dim // 2, dtype=torch.int64)
        tensors = {
            name: torch.zeros((1, heads, *shape), dtype=dtype)
            for name, (shape, dtype) in _tensors_of(layout).items()
        }
        codec = Codec(layout, freqs, **tensors)
        return cls((codec,) * layers, sinks=0, window=tokens, preset="exact")

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' codecs."""
        return sum(codec.nbytes for codec in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of coefficients a token, all layers and KV heads together."""
        return sum(codec.kv_heads * codec.layout.token_bytes for codec in self.layers)

    def to(self, device: torch.device | str) -> ModelCodec:
        """The same on another device."""
        return replace(self, layers=tuple(codec.to(device) for codec in self.layers))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all, and its folder: tensors by layer, the
        rest in its metadata."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        tensors: dict[str, torch.Tensor] = {}
        for i, codec in enumerate(self.layers):
            tensors |= {f"{i}.{name}": getattr(codec, name).cpu() for name in TENSORS}
        layouts = [
            (str(c.layout.k), str(c.layout.v), c.layout.head_dim, c.layout.frame)
            for c in self.layers
        ]
        names = ("sinks", "window", "preset", "fingerprint", "notes")
        head = {name: getattr(self, name) for name in names}
        metadata = {"format": FORMAT, "codec": json.dumps({**head, "layouts": layouts})}
        try:
            save_file(tensors, str(part), metadata=metadata)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ModelCodec:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        Path(path).open("rb").close()  # a missing file, a folder: as Python says it
        try:
            opened = safe_open(str(path), framework="pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"codec: expected a safetensors file, got {path}: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                got = metadata.get("format")
                raise ValueError(f"codec: expected a file of format {FORMAT}, got {got}: {path}")
            try:
                head, layers = json.loads(metadata["codec"]), []
                for i, (k, v, dim, frame) in enumerate(head.pop("layouts")):
                    layout = PageLayout(Bands.parse(k), Bands.parse(v), dim, frame)
                    tensors = (file.get_tensor(f"{i}.{name}") for name in TENSORS)
                    layers.append(Codec(layout, *tensors))
                return cls(tuple(layers), **head)
            except (KeyError, TypeError, SafetensorError, json.JSONDecodeError) as error:
                what = f"codec: expected what save() wrote, got {path}: {error!r}"
                raise ValueError(what) from error


def check_codec(codec: Codec) -> torch.device:
    """Where the codec is."""
    if not isinstance(codec, Codec):
        raise TypeError(f"codec: expected a Codec, got {type(codec).__name__}")
    return codec.freqs.device


def fingerprint(model: Any) -> str:
    """32 hexadecimal digits that say which model it is: its shape, its rotation, and 16 weights of
    every matrix.

    Weights count as bfloat16 holds them: the same for a model loaded in float32 or bfloat16, and in
    float16 unless that rounded its weights. Cheap: it reads 32 bytes of each.
    """
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    shape = {name: getattr(config, name, None) for name in (*names.split(), "vocab_size")}
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= getattr(config, name, None) or {}
    rope = rope.get("full_attention", rope)  # where layers differ
    kind = rope.get("rope_type", rope.get("type", "default"))  # as releases of transformers say it
    shape["rope"] = {"rope_type": kind} | {k: x for k, x in rope.items() if k == "factor"}
    shape["theta"] = rope.get("rope_theta", getattr(config, "rope_theta", None))
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    samples = []
    for _, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        if weight.dim() < 2 or weight.is_meta:
            continue
        at = torch.linspace(0, weight.numel() - 1, 16, dtype=torch.float64).long().to(weight.device)
        index = torch.unravel_index(at, weight.shape)
        weight = weight.detach()
        if hasattr(weight, "full_tensor"):  # sharded: of all processes
            weight = weight.full_tensor()
        some = weight[index]
        if some.is_floating_point():
            some = some.float().masked_fill(some.abs() < 2**-16, 0.0)  # what float16 would round
        samples.append(some.to(torch.bfloat16))
    for some in samples:  # by name, wherever they lie
        digest.update(some.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def cache_path(fingerprint: str, preset: str) -> Path:
    """Where a model's codec is kept: in XDG_CACHE_HOME, or ~/.cache, under spectral_kernels/."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "spectral_kernels" / f"{fingerprint}-{preset}.safetensors"

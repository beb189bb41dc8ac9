"""spectral_kernels/codec.py: what a codec refuses, and its file."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_kernels.codec import Codec, ModelCodec
from spectral_kernels.layout import Bands, PageLayout

NAMES = (
    "freqs",
    "k_basis",
    "k_scale",
    "k_encoder",
    "k_mean",
    "k_offset",
    "v_basis",
    "v_scale",
    "v_encoder",
)


def random_codec(seed=0, rows=1, heads=2, dim=64, k="16x8+16x4", v="32x4+16x2", frame=512):
    rng = np.random.default_rng(seed)
    layout = PageLayout(Bands.parse(k), Bands.parse(v), dim, frame)

    def floats(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    def side(bands):
        basis = torch.from_numpy(
            rng.integers(-127, 128, (rows, heads, bands.rank, dim)).astype(np.int8)
        )
        return basis, floats(rows, heads, bands.rank).abs(), floats(rows, heads, dim, bands.rank)

    freqs = torch.from_numpy(rng.integers(0, 2**60, dim // 2))
    mean, offset = floats(rows, heads, dim), floats(rows, heads, layout.k.rank)
    return Codec(layout, freqs, *side(layout.k), mean, offset, *side(layout.v))


def random_model(**options):
    codecs = (
        random_codec(1),
        random_codec(2, heads=4, dim=128, k="32x4+64x2", v="128x4", frame=128),
        random_codec(3),
    )
    settings = {
        "sinks": 4,
        "window": 16,
        "preset": "balanced",
        "fingerprint": "0123",
        "notes": "a note: é",
    }
    return ModelCodec(codecs, **(settings | options))


def test_sizes_and_devices():
    codec = random_codec()
    assert codec.kv_heads == 2
    assert codec.nbytes == sum(getattr(codec, name).nbytes for name in NAMES)
    model = random_model()
    assert model.nbytes == sum(layer.nbytes for layer in model.layers)
    assert model.token_bytes == sum(
        layer.kv_heads * layer.layout.token_bytes for layer in model.layers
    )
    moved = model.to("meta")
    assert all(getattr(layer, name).is_meta for layer in moved.layers for name in NAMES)
    assert (moved.sinks, moved.window, moved.preset, moved.notes) == (
        4,
        16,
        "balanced",
        "a note: é",
    )


def test_a_file_gives_back_every_bit(tmp_path):
    model = random_model()
    model.save(tmp_path / "codec.safetensors")
    again = ModelCodec.load(tmp_path / "codec.safetensors")
    assert len(again.layers) == 3
    for a, b in zip(model.layers, again.layers, strict=True):
        assert a.layout == b.layout
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)
    for field in dataclasses.fields(ModelCodec)[1:]:
        assert getattr(again, field.name) == getattr(model, field.name)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(
        ValueError, match="codec: expected a file of format spectral-codec-1, got None"
    ):
        ModelCodec.load(path)
    save_file(
        {"weight": torch.zeros(2)},
        str(path),
        metadata={"format": "spectral-codec-9", "codec": "{}"},
    )
    with pytest.raises(ValueError, match="got spectral-codec-9"):
        ModelCodec.load(path)
    with pytest.raises(FileNotFoundError):
        ModelCodec.load(tmp_path / "missing.safetensors")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        ModelCodec.load(tmp_path)


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "codec.safetensors"
    random_model().save(path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        Path(name).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        random_model().save(path)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_a_damaged_file_is_refused(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "codec.safetensors"
    random_model().save(path)
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors["1.k_scale"] = tensors["1.k_scale"][..., :-16].contiguous()
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(ValueError, match="k_scale: expected shape"):
        ModelCodec.load(path)
    del tensors["1.k_scale"]
    head = json.loads(metadata["codec"])
    for wrong in (
        {}, {"codec": "{"}, {"codec": "[]"}, {"codec": json.dumps({**head, "later": 1})},
        {"codec": json.dumps({"layouts": head["layouts"]})}, metadata,
    ):  # fmt: skip
        save_file(tensors, str(path), metadata={"format": metadata["format"], **wrong})
        with pytest.raises(
            ValueError, match=f"codec: expected what save\\(\\) wrote, got {path}: "
        ):
            ModelCodec.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"codec: expected a safetensors file, got {path}: "):
        ModelCodec.load(path)

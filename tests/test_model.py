"""What spectral_kernels/_model.py reads of a model, piece by piece; whole models are those of
tests/test_hf.py and tests/test_families.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from spectral_kernels import _model  # noqa: E402
from spectral_kernels.codec import fingerprint  # noqa: E402
from tests import cases  # noqa: E402
from tests.families import build, rope  # noqa: E402

pytestmark = pytest.mark.skipif(cases.DEVICE.type == "cuda", reason="CPU models")


def test_a_layer_whose_keys_are_another_layers_is_refused() -> None:
    """By whichever of its names a release of transformers says it."""
    for name, value in (("num_kv_shared_layers", 1), ("kv_sharing_modes", ["store", "reuse"])):
        config = transformers.LlamaConfig(num_hidden_layers=2)
        setattr(config, name, value)
        with pytest.raises(NotImplementedError, match="keys of its own in every layer"):
            _model.full_layers(config)
    assert _model.full_layers(transformers.LlamaConfig(num_hidden_layers=2)) == [0, 1]


def test_shapes_of_a_config() -> None:
    settings: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4}
    for changes, shape in (
        ({}, (4, 64)), ({"num_key_value_heads": 2}, (2, 64)), ({"head_dim": 128}, (4, 128)),
    ):  # fmt: skip
        assert _model.kv_shape(transformers.LlamaConfig(**settings, **changes)) == shape


KINDS = {"full_attention": 1e6, "sliding_attention": 1e4}
ROTATIONS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    # family, changes to it, what configurations of transformers 4 and 5 have of RoPE
    ("llama", {}, [
        {"rope_theta": 1e4, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ]),
    ("llama", rope(rope_type="linear", factor=4.0), [
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ]),
    ("gemma3", {}, [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in KINDS.items()
        }},
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "saved"), ROTATIONS)
def test_a_model_has_one_fingerprint_in_all_releases(
    family: str, changes: dict[str, Any], saved: list[dict[str, Any]]
) -> None:
    """Else a codec that was made under one is refused under another."""
    model = build(family, **changes)
    names = "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    shape = {name: getattr(model.config, name) for name in (*names.split(), "vocab_size")}
    for rotation in saved:
        config = SimpleNamespace(**shape, **rotation)
        other = SimpleNamespace(config=config, named_parameters=model.named_parameters)
        assert fingerprint(other) == fingerprint(model)


def test_no_graph_over_two_devices() -> None:
    model = build("llama")
    first, second = _model.layers_of(model)
    assert _model.stays(model.config, [first, second])
    with pytest.warns(UserWarning, match="no CUDA graph with 2 devices"):
        other = replace(second, device=torch.device("cuda"))
        assert not _model.stays(model.config, [first, other])


def test_waits_are_seen_before_a_capture() -> None:
    """Where the host would read a tensor of a device; meta stands in for one."""
    waits: list[Callable[[torch.Tensor], Any]] = [
        lambda x: bool(x.max() > 3), lambda x: x[1].item(), lambda x: x.nonzero(),
        lambda x: x[x > 2], lambda x: torch.equal(x, x), lambda x: x.repeat_interleave(x),
    ]  # fmt: skip
    for wait in waits:
        with pytest.raises(RuntimeError, match="waits for the device"), _model.NoWaits():
            wait(torch.arange(6, device="meta"))
        with _model.NoWaits():  # of the host itself
            wait(torch.arange(6))
    x, at = torch.arange(6, device="meta"), torch.tensor([4, 2], device="meta")
    with _model.NoWaits():
        x[at] = x[at] + x.gather(0, at)
        torch.where(x > 2, x, 0).sort()


def test_the_check_compares_every_new_token() -> None:
    """Against softmax attention in float64: what a query must not see, a value that is off, NaN."""
    layer = _model.layers_of(build("llama"))[0]
    (module,) = layer.modules
    heads, dim, old, new = layer.kv_heads, layer.head_dim, 6, 3
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, heads, old + new, dim)
    q = torch.randn(1, heads * layer.group, new, dim)
    position = torch.arange(old + new)

    def attention(later: int) -> torch.Tensor:
        scores = q.double() @ k.double().repeat_interleave(layer.group, 1).mT * module.scaling
        hidden = position > position[old:, None] + later
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights @ v.double().repeat_interleave(layer.group, 1)).float()

    def compare(out: torch.Tensor) -> None:
        seen: list[torch.Tensor] = []
        before, after = ([x[:, :, part] for x in (k, v)] for part in (slice(old), slice(old, None)))
        _model.compare(layer, module, seen, q, *before, None, scaling=module.scaling)
        _model.compare(layer, module, seen, q, *after, out, scaling=module.scaling)

    right = attention(0)
    compare(right)
    for at in ((0, 0, 0, 0), (0, 1, new - 1, dim - 1)):
        for value in (right[at] + 1e-3, torch.nan):
            wrong = right.clone()
            wrong[at] = value
            with pytest.raises(ValueError, match="layer 0: its attention and the cache's differ"):
                compare(wrong)
    with pytest.raises(ValueError, match="differ"):
        compare(attention(1))

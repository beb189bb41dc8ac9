"""What of the measurements can be tested without a card: inputs, references, budgets, percentiles, tables, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perf import _cases, _timing
from perf._cases import Shape, check_state, expected, make_decodes
from reference import attention as attention_oracle
from reference import rope as rope_oracle
from reference.pages import PageArrays
from tests import budgets
from tests.cases import DEVICE, kernels, to_numpy

CPU = torch.device("cpu")


def small_decode(layout: str, dim: int = 64, batch: int = 2) -> _cases.Decode:
    torch.manual_seed(3)
    shape = Shape(batch, 4, 2, dim, 128 + 3 * 64)
    return make_decodes(shape, _cases.preset_layout(layout, dim), copies=2, dtype=torch.float32, device=CPU)[1]


def arrays_of(decode: _cases.Decode) -> PageArrays:
    pages = decode.pages
    names = "k_pages v_pages skip k_basis k_scale v_basis v_scale page_table segment_table lengths".split()
    bands = (pages.layout.k.bands, pages.layout.v.bands)
    return PageArrays(*bands, pages.layout.head_dim, pages.layout.chunk, *(getattr(pages, n).numpy() for n in names))


@pytest.mark.parametrize("layout", _cases.LAYOUTS)
def test_reference_and_budget_are_those_of_the_oracle(layout):
    """The float64 reference on the device equals the oracle; its budget is the oracle's."""
    decode = small_decode(layout)
    arrays, inv_freq = arrays_of(decode), decode.inv_freq.numpy()
    q, positions = to_numpy(decode.q)[:, :, None], decode.positions.numpy()[:, None]
    oracle = attention_oracle.spectral(q, positions, arrays, inv_freq)
    names = (arrays.k_basis, arrays.k_scale, arrays.segment_table, arrays.lengths)
    u = rope_oracle.project_queries(q, positions, *names, inv_freq, 1.0, arrays.chunk)
    o_budget, lse_budget = budgets.attend_spectral(q, oracle, arrays, u, inv_freq)
    exact = attention_oracle.exact(
        q, positions, to_numpy(decode.k), to_numpy(decode.v), decode.key_positions.numpy(), inv_freq, chunk=arrays.chunk
    )
    for b, g in ((0, 0), (1, 1)):
        own = slice(2 * g, 2 * g + 2)
        got = expected(decode, b, g, ("cold",))
        np.testing.assert_allclose(got.o.numpy(), oracle.o[b, own, 0], rtol=0, atol=1e-11)
        np.testing.assert_allclose(got.lse.numpy(), oracle.lse[b, own, 0], rtol=1e-12)
        np.testing.assert_allclose(got.o_budget.numpy(), o_budget[b, own, 0], rtol=1e-6)
        np.testing.assert_allclose(got.lse_budget.numpy(), lse_budget[b, own, 0], rtol=1e-6)
        both = expected(decode, b, g)
        lse = np.logaddexp(oracle.lse, exact.lse)
        share = np.exp(oracle.lse - lse)[..., None]
        o = share * oracle.o + (1 - share) * exact.o
        np.testing.assert_allclose(both.lse.numpy(), lse[b, own, 0], rtol=1e-12)
        np.testing.assert_allclose(both.o.numpy(), o[b, own, 0], rtol=0, atol=1e-11)


def test_exact_reference_and_budget_are_those_of_the_oracle():
    decode = small_decode("32x8")
    inv_freq, chunk = decode.inv_freq.numpy(), decode.pages.layout.chunk
    q, k, at = to_numpy(decode.q)[:, :, None], to_numpy(decode.k), decode.key_positions.numpy()
    oracle = attention_oracle.exact(q, decode.positions.numpy()[:, None], k, to_numpy(decode.v), at, inv_freq, chunk=chunk)
    o_budget, lse_budget = budgets.attend_exact(q, oracle, k, np.ones(k.shape[:3], bool), inv_freq)
    got = expected(decode, 1, 0, ("exact",))
    np.testing.assert_allclose(got.o.numpy(), oracle.o[1, :2, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.o_budget.numpy(), o_budget[1, :2, 0], rtol=1e-6)
    np.testing.assert_allclose(got.lse_budget.numpy(), lse_budget[1, :2, 0], rtol=1e-6)


def test_a_step_passes_and_wrong_ones_do_not():
    """The twins' step lies within the budget; a step without the sinks' skip bits, without the exact tokens, or with the
    wrong base of logarithms does not."""
    decode = small_decode("balanced", dim=128)
    assert 0 < check_state(decode, decode.step()) <= 1
    assert 0 < check_state(decode, decode.attend_cold(), ("cold",)) <= 1
    o, lse = decode.step()
    with pytest.raises(AssertionError, match="times the budget"):
        check_state(decode, decode.attend_cold())
    with pytest.raises(AssertionError, match="times the budget"):
        check_state(decode, (o, lse * 1.4427))
    with pytest.raises(AssertionError, match="not finite"):
        check_state(decode, (o, lse * torch.inf))
    decode.pages.skip.zero_()
    sinks_twice = decode.step()
    decode.pages.skip[decode.pages.page_table[:, 0].long(), :, 0] = 15
    with pytest.raises(AssertionError, match="times the budget"):
        check_state(decode, sinks_twice)


def test_scores_have_the_stated_spread():
    decode = small_decode("quality", dim=128)
    reference = attention_oracle.spectral(
        to_numpy(decode.q)[:, :, None], decode.positions.numpy()[:, None], arrays_of(decode), decode.inv_freq.numpy()
    )
    scores = reference.scores[np.isfinite(reference.scores)]
    assert 0.7 * _cases.SCORE_STD < scores.std() < 1.4 * _cases.SCORE_STD
    assert np.isfinite(reference.scores[:, :, :, :4]).sum() == 0  # the sinks are exact, not cold


def test_bytes_are_those_of_the_tensors():
    """What a step must read, against the tensors that hold it (the page pool has a page for every chunk, no more)."""
    shape, layout = Shape(3, 4, 2, 64, 128 + 2 * 64), _cases.preset_layout("balanced", 64)
    decode = make_decodes(shape, layout, copies=1, dtype=torch.float16, device=CPU)[0]
    pages = decode.pages
    read = (pages.k_pages, pages.v_pages, pages.skip, pages.page_table, pages.segment_table)
    assert shape.page_bytes(layout) == sum(x.nbytes for x in read)
    bases = (pages.k_basis, pages.k_scale, pages.v_basis, pages.v_scale)
    exact = (decode.k, decode.v, decode.key_positions, decode.q)
    assert shape.step_bytes(layout) == sum(x.nbytes for x in read + bases + exact)


def test_copies_of_a_case_share_nothing_that_is_read():
    shape = Shape(1, 2, 1, 64, 128 + 64)
    first, second = make_decodes(shape, _cases.preset_layout("small", 64), copies=2, dtype=torch.float16, device=CPU)
    for name in ("k_pages", "v_pages", "skip", "page_table"):
        a, b = getattr(first.pages, name), getattr(second.pages, name)
        assert a.shape == b.shape and a.data_ptr() + a.nbytes <= b.data_ptr() or name == "page_table"
    assert not torch.equal(first.pages.k_pages, second.pages.k_pages)
    assert check_state(second, second.step()) <= 1


def test_percentiles():
    assert _timing.Times.of(range(101)) == _timing.Times(20.0, 50.0, 80.0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel itself, in the interpreter")
def test_the_read_only_pass_reads_everything():
    x = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32)
    with kernels():
        got = _timing.read_sum(x, 1024)
    wanted = x.view(4, -1).sum(1, dtype=torch.int64)
    assert torch.equal(got, ((wanted + 2**31) % 2**32 - 2**31).int())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
def test_without_a_card_nothing_is_measured():
    with pytest.raises(_timing.NoCard, match="nothing was measured"):
        _timing.Card.current()

"""Put a realistic defect into the package, one at a time, and run the test that should catch it.

    nice python -m tests.mutants --jobs 2      all of them: a table; writes tests/mutants.json
    python -m tests.mutants --list      names, files, tests; says which anchors are gone
    python -m tests.mutants --only NAME [NAME ...]      some: names, beginnings, files
    python -m tests.mutants --table     the table of tests/README.md, from tests/mutants.json

A mutant is a file, a text that occurs in it once (its anchor), what stands there instead, and the
smallest selection of tests that catches it without a GPU: kernels in Triton's interpreter, twins,
codec, cache and adapter as they are. Each runs in a process of its own on a copy of the tree, the
working tree is never touched. The selections must pass on the unchanged copy first. A mutant is
killed if a test fails on what it asserts, by a crash, or if its tests do not end within LIMIT; one
whose code does not even run counts as wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "mutants.json"
COPIED = ("spectral_kernels", "tests", "reference", "perf", "pyproject.toml")
LIMIT = 300  # seconds that a selection of tests may take
# What a mutant that never ran its defect raises.
BROKEN = re.compile(r"NameError|SyntaxError|AttributeError|CompilationError|ImportError|KeyError")


@dataclass(frozen=True)
class Mutant:
    """One defect."""

    name: str
    file: str  # in spectral_kernels/
    anchor: str
    replacement: str
    tests: str  # arguments of pytest

    @property
    def path(self) -> str:
        return f"spectral_kernels/{self.file}"

    @property
    def needs_vllm(self) -> bool:
        return self.tests.startswith("tests/test_vllm.py")


def of(file: str, tests: str, *mutants: tuple[str, str, str] | tuple[str, str, str, str]):
    """Mutants of one file and, where they name none of their own, one selection of tests."""
    return [
        Mutant(name, file, anchor, new, *(own or (tests,))) for name, anchor, new, *own in mutants
    ]


ATTENTION = "tests/test_attention.py::"
BORDERS = f"{ATTENTION}test_every_border"
STEP = f"{ATTENTION}test_whole_step"
PAGES = f"{ATTENTION}test_attend_spectral"
FAR = "tests/test_extremes.py::test_offsets_past_two_to_the_31"
MIXED = "16x8+16x4+32x2"

# fmt: off
MUTANTS: list[Mutant] = [
    # ---- attention over pages, with matrix units
    *of(
        "attention.py", f"{PAGES} -k '{MIXED} and triton'",
        ("minus the distance", "turned = q * cos + other * sin  # [F",
         "turned = q * cos - other * sin  # [F"),
        ("cosine only", "+ other * sin  # [FRAMES", "+ 0.0 * sin  # [FRAMES"),
        ("frame after a page's own", "(u_row + tl.minimum(j, end - 1) // PAGES) * UNIT",
         "(u_row + tl.minimum(j // PAGES + 1, (end - 1) // PAGES)) * UNIT"),
        ("frames one late", "phase = ((freqs * FRAME * start) >> 32)",
         "phase = ((freqs * FRAME * (start + 1)) >> 32)"),
        ("frames at once not ahead of each other", "phase[None, None, :] + ahead[:, None, :]",
         "phase[None, None, :] + 0 * ahead[:, None, :]", f"{PAGES} -k '{MIXED} and triton'"),
        ("no mean", "* unit[:, None, :] + bias[:, None, :]", "* unit[:, None, :]"),
        ("mean without the softmax scale", "    mean *= softmax_scale\n", "    mean *= 1.0\n"),
        ("fields of a byte not weighed", "scale * softmax_scale * weight", "scale * softmax_scale"),
        ("components in another order",
         "u = _by_thread(u * tl.where(top > TINY, FULL / top, 0.0)[:, None], M, BLOCK_R)",
         "u = u * tl.where(top > TINY, FULL / top, 0.0)[:, None]"),
        ("zeros of V left out", "return (acc[i] + _bits.field_zero(GROUPS, i) * acc[R // 16])",
         "return (acc[i])"),
        ("low part of integers not flipped", "lo = (bits ^ 128).to(tl.int8)",
         "lo = bits.to(tl.int8)"),
        ("tokens of V in another order", "[W, T // 64, 8, 8, H]), [0, 1, 3, 2, 4])",
         "[W, T // 64, 8, 8, H]), [0, 1, 2, 3, 4])"),
        ("heads of a group exchanged", "at = q_ptr + (row % HG).to(tl.int64) * stride_q_h",
         "at = q_ptr + ((row + 1) % HG).to(tl.int64) * stride_q_h"),
        ("all warps work on the first page", "tl.minimum(start + nth, end - 1)",
         "tl.minimum(start + 0 * nth, end - 1)"),
        ("a warp's pages another's", "% W * P + tl.arange(0, W * P) // W  # pages",
         "+ 0 * tl.arange(0, W * P) // W  # pages", f"{ATTENTION}test_splits[triton-1]"),
        ("K of a warp's pages exchanged", "blocks[2 * step + 1]), [T // 64, W, 64, 32])",
         "blocks[2 * step + 1]), [W, T // 64, 64, 32])", f"{ATTENTION}test_splits[triton-1]"),
        ("V's pages in the table's order", "tl.reshape(y, [T // 64, W, 16, 64]), [1, 2, 0, 3])",
         "tl.reshape(y, [W, T // 64, 16, 64]), [0, 2, 1, 3])", f"{ATTENTION}test_splits[triton-1]"),
        ("one half of 1024 bytes twice", "tl.load(at + ONCE)), [0, 2, 1])",
         "tl.load(at)), [0, 2, 1])"),
        ("K's blocks of the first group alone", "columns[_bits.place_of(GROUPS, i)[0]]",
         "columns[0]"),
        ("V's blocks of the first group alone", "v[_bits.place_of(V_GROUPS, i)[0]]", "v[0]"),
        ("projected queries in another order", "tl.permute(u, [0, 3, 5, 1, 4, 2])",
         "tl.permute(u, [0, 3, 5, 1, 2, 4])", f"{PAGES} -k '48x4-16x8 and triton'"),
        ("codec's row without its head", "_math.row_of(codec_ids_ptr, b, 0) * G + g,\n",
         "_math.row_of(codec_ids_ptr, b, 0) * G + 0 * g,\n"),
        ("scores in the wrong log base", "states, kept, scale * LOG2_E, plan)",
         "states, kept, scale, plan)"),
        ("weights in the wrong base", "share = tl.exp2(unit_warp", "share = tl.exp(unit_warp"),
        ("the first warp's part joined twice", "for n in tl.static_range(1, W):",
         "for n in tl.static_range(0, W):"),
        ("warps joined whatever their units", "l * tl.exp2(unit - low) + other_l * tl.exp2(",
         "l + other_l * tl.exp2(", f"{ATTENTION}test_splits[triton-1]"),
        ("sum of weights not rescaled", "l_lane = l_lane * old[:, None, :] + tl.sum(",
         "l_lane = l_lane + tl.sum(", f"{ATTENTION}test_splits[triton-1]"),
        ("output not rescaled", "return acc * old[:, None, :] + (hi", "return acc + (hi",
         f"{ATTENTION}test_splits[triton-1]"),
        ("rounded weights not rescaled", "acc[len(rescaled)], old, ones, w_both",
         "acc[len(rescaled)], 0.0 * old + 1.0, ones, w_both", f"{ATTENTION}test_splits[triton-1]"),
        ("units of a page far below the largest", "unit = tl.maximum(m_page, m_warp - 32.0)",
         "unit = m_page", f"{ATTENTION}test_pages_far_below_one_another[triton]"),
        ("the last page counted by idle warps", "j = start + tl.arange(0, W) * P  # [W], the first",
         "j = tl.minimum(start + tl.arange(0, W) * P, end - 1)  # [W], the first"),
        ("wrong nibble plane of K", "tl.permute(y, [0, 3, 1, 2])",
         "tl.permute(y, [0, 1, 3, 2])", f"{PAGES} -k '48x4 and triton'"),
        ("wrong nibble plane of V", "i), 4, NATIVE))\n",
         "i), 0, NATIVE))\n", f"{STEP} -k '32x8 and triton'"),
        ("sinks attended in pages too",
         "seen = position.to(tl.uint32) < (stop - EXACT[0]).to(tl.uint32)",
         "seen = position < stop - EXACT[0]", f"{BORDERS}[triton]"),
        ("a split of sinks alone sees them", "< (stop - EXACT[0]).to(tl.uint32)",
         "< (tl.minimum(stop, end * 64) - EXACT[0]).to(tl.uint32)",
         f"{ATTENTION}test_more_sinks_than_a_turn_has_pages_for[triton-4]"),
        ("a long row's later programs idle", "tl.maximum(tl.sum(splits_of, 0), few)", "few",
         f"{ATTENTION}test_a_single_row_that_all_programs_share[48]"),
        ("exact tokens instead of a short row's pages", "tl.sum(splits_of, 0), few) * blocks)",
         "tl.sum(splits_of, 0), few))", f"{ATTENTION}test_a_short_row_alone_in_a_large_table"),
        ("sinks seen in all turns but the first", "if (start * 64 < EXACT[0]) |",
         "if (start == 0) |", f"{ATTENTION}test_more_sinks_than_a_turn_has_pages_for[triton-1]"),
        ("all of the last turn seen", "| (start + W * P >= end)", "| (start + W * P > end)",
         f"{ATTENTION}test_more_sinks_than_a_turn_has_pages_for[triton-1]"),
        ("first token after the sinks never", "(j * 64 - EXACT[0])[:, None] +",
         "(j * 64 - EXACT[0] - 1)[:, None] +", f"{BORDERS}[triton]"),
        ("pages' offsets of 32 bits", "start + nth, end - 1)).to(tl.int64)",
         "start + nth, end - 1)).to(tl.int32)", f"{FAR}[triton]"),
        ("denormal tops divided by", "top > TINY, FULL / top, 0.0)[:, None], M",
         "top > 0.0, FULL / top, 0.0)[:, None], M",
         "tests/test_extremes.py::test_denormals[1e-38-triton]"),
        ("exact tokens of the first row", "exact_row = _math.row_of(seq_ids_ptr, b, b)",
         "exact_row = _math.row_of(seq_ids_ptr, 0 * b, b)", f"{STEP} -k '{MIXED} and triton'"),
        ("blocks of queries share a workspace", "nth = (program.to(tl.int64) * blocks + block) * G",
         "nth = program.to(tl.int64) * G",
         f"{ATTENTION}test_programs_have_memory_of_their_own"),
        ("pages alone overlap with an append", "        after_append = False  # programs of pages",
         "        after_append = after_append  # programs of pages",
         f"{ATTENTION}test_pages_alone_do_not_overlap_with_an_append"),
        ("a split has no frame more than it fills", "share * PAGE_SIZE, layout.frame) + 1",
         "share * PAGE_SIZE, layout.frame)", f"{ATTENTION}test_programs_share_all_pages -k 4-576"),
        ("two of three programs run where pages are few", "else 4 if large or resident == 4 else 6",
         "else 4", f"{ATTENTION}test_programs_of_few_pages"),
        ("16 queries of a row as few programs as one", "batch == 1 and rows <= 8", "batch == 1",
         f"{ATTENTION}test_programs_of_few_pages"),
        ("one page a warp of 16 queries", "rows * layout.v.rank <= 1536",
         "rows * layout.v.rank < 1536", f"{ATTENTION}test_pages_at_once"),
        ("two pages a warp whatever its sums take", "rows * layout.v.rank <= 1536",
         "rows * layout.v.rank <= 2048", f"{ATTENTION}test_pages_at_once"),
        ("more pages asked of L2 than it holds", "PATH[0] and (W > 4 or ROWS > 4)", "PATH[0]",
         "tests/test_compile.py::test_pages_are_asked_of_l2"),
        ("large bases joined as small ones", "min(16 * most_h // many, group",
         "min(128 // many, group", f"{ATTENTION}test_registers_hold_what_is_joined_at_once"),
        ("warps that wait for one another join few numbers", "max(1 + (held > 2048), ", "max(2, ",
         f"{ATTENTION}test_registers_hold_what_is_joined_at_once"),
        ("a plan of no queries", "    if not batch * query_heads * queries:\n",
         "    if not query_heads + queries:\n", f"{ATTENTION}test_the_workspace_of_no_queries"),
    ),
    *of(
        "attention.py", f"{STEP} -k '{MIXED} and triton'",
        ("exact tokens' weight left out of the total",
         "m, total = top, total * old + tl.sum(w, 0)\n",
         "m, total = top, total * old + 0.0 * tl.sum(w, 0)\n"),
        ("lse without the largest", "+ tl.log(total))  # log(0)",
         "* 0.0 + tl.log(total))  # log(0)"),
        ("V scales without their head", "scale_ptr + codec_row * RV + r,",
         "scale_ptr + codec_row // G * G * RV + r,"),
        ("V basis of the first row's codec", "row_of(codec_ids_ptr, b, 0) * G + g.to(",
         "row_of(codec_ids_ptr, 0 * b, 0) * G + g.to("),
        ("what an empty split never wrote is added", "share * x, 0.0), 0)",
         "share * x, 0.0 * x), 0)", f"{ATTENTION}test_a_split_without_pages[triton-8]"),
        ("empty rows keep their NaN", "o = tl.where(total == 0.0, 0.0, o / total)", "o = o / total",
         f"{ATTENTION}test_sets_without_tokens[triton]"),
        ("output of the wrong query", "row = b * (G * HG * Q) + query  # [BLOCK_H]",
         "row = b * (G * HG * Q) + (g * HG + h % HG) * Q + (Q - 1 - h // HG)",
         f"{STEP} -k 'Q4 and triton'"),
        ("a row of few splits joined twice", "        first = stop\n", "",
         f"{ATTENTION}test_join[1-at_once1]"),
        ("rounds of a join not rescaled", "c = c * tl.expand_dims(old, -1) + tl.sum",
         "c = c + tl.sum", f"{ATTENTION}test_join[1-at_once0]"),
    ),
    # ---- its twin
    *of(
        "attention.py", f"{BORDERS}[torch]",
        ("twin: a token counted twice at the window's edge", "(position < stop[:, None])  # [B, T]",
         "(position <= stop[:, None])  # [B, T]"),
        ("twin: sinks attended in pages too", "seen = (position >= sinks) &",
         "seen = (position >= 0) &"),
        ("twin: frames twice as long", "* PAGE_SIZE // layout.frame\n    u, bias",
         "* PAGE_SIZE // (2 * layout.frame)\n    u, bias"),
        ("twin: scores without their scale", "scores = (scores * scale).flatten(-2)",
         "scores = scores.flatten(-2)"),
        ("twin: V of the codec's row 0", "basis = codec.v_basis[rows].float() *",
         "basis = codec.v_basis[0 * rows].float() *", f"{PAGES} -k '{MIXED} and torch'"),
    ),
    # ---- without matrix units
    *of(
        "attention_sm75.py", f"{PAGES} -k '{MIXED} and scalar'",
        ("old cards: minus the distance", "x = x * cos + tl.where(d < PAIRS, y, -y) * sin",
         "x = x * cos - tl.where(d < PAIRS, y, -y) * sin"),
        ("old cards: frame before a page's own", "u_ptr + (record * 32 + lane)",
         "u_ptr + (tl.maximum(record - blocks, 0) * 32 + lane)"),
        ("old cards: high parts worth 255", "return (hi * 256 + lo).to(tl.float32) * unit[None",
         "return (hi * 255 + lo).to(tl.float32) * unit[None"),
        ("old cards: mean without the softmax scale", "* unit + score * softmax_scale",
         "* unit + score"),
        ("old cards: sum of weights not rescaled", "l = l * old + tl.sum(tl.sum(p, 0), 0)",
         "l = l + tl.sum(tl.sum(p, 0), 0)", f"{ATTENTION}test_splits[scalar-1]"),
        ("old cards: output not rescaled", "acc[len(rescaled)] * old[None, :] + dots",
         "acc[len(rescaled)] + dots", f"{ATTENTION}test_splits[scalar-1]"),
        ("old cards: wrong nibble plane", "tl.join(y, (x >> 4) & MASK)", "tl.join(y, x & MASK)",
         f"{PAGES} -k '16x8+48x4 and scalar'"),
        ("old cards: a token counted twice at the window's edge", "& (position < stop), s,",
         "& (position <= stop), s,", f"{BORDERS}[scalar]"),
        ("old cards: last frame not projected", "tl.load(seq_lens_ptr + b) - WINDOW:",
         "tl.load(seq_lens_ptr + b) - WINDOW - 1:", f"{BORDERS}[scalar]"),
        ("old cards: pages' offsets of 32 bits",
         "number = tl.load(block_table_ptr + page).to(tl.int64)",
         "number = tl.load(block_table_ptr + page).to(tl.int32)", f"{FAR}[scalar]"),
        ("old cards: weights' words in another order", "tl.permute(both, [3, 4, 2, 1, 0])",
         "tl.permute(both, [3, 4, 2, 0, 1])"),
        ("old cards: rounded weights' sum not rescaled", "w_sum = w_sum * old[None, :] + ",
         "w_sum = w_sum + ", f"{ATTENTION}test_splits[scalar-1]"),
        ("old cards: a frame's last page left out", "tl.minimum(end, frame * PAGES + PAGES)",
         "tl.minimum(end, frame * PAGES + PAGES - 1)", f"{ATTENTION}test_splits[scalar-1]"),
        ("old cards: the page ahead is the page itself", "tl.minimum(j + 1, end - 1)", "j",
         f"{ATTENTION}test_splits[scalar-1]"),
    ),
    # ---- what kernels share
    *of(
        "_math.py", f"{BORDERS}[triton]",
        ("window's edge counted twice", "stop = tl.maximum(seq_len - WINDOW, 0)",
         "stop = tl.maximum(seq_len - WINDOW + 1, 0)"),
        ("window's edge never counted", "stop = tl.maximum(seq_len - WINDOW, 0)",
         "stop = tl.maximum(seq_len - WINDOW - 1, 0)"),
        ("pages at the end of the splits lost",
         "share = tl.cdiv(tl.cdiv(pages, TURN), splits) * TURN",
         "share = tl.cdiv(pages, TURN) // splits * TURN",
         f"{ATTENTION}test_a_split_without_pages[triton-8]"),
        ("lse in log2", "(m - LOG2_FULL) * LN_2 + tl.log(l)",
         "(m - LOG2_FULL) + tl.log(l)"),
        ("lse counts weights in units", "(m - LOG2_FULL) * LN_2", "m * LN_2"),
        ("NaN taken for an empty set", "tl.where(l == 0.0, float(", "tl.where(~(l > 0.0), float(",
         "tests/test_extremes.py::test_infinities_stay_in_their_row[query-nan-triton]"),
        ("quarter turns not rounded", "quarter = ((phase >> 29) + 1) >> 1", "quarter = phase >> 30",
         "tests/test_rope.py::test_rotate_and_turn_back -k 'float32 and triton'"),
        ("half turns without their sign", "c = tl.where(half, -c, c)", "c = tl.where(half, c, c)",
         "tests/test_rope.py::test_rotate_and_turn_back -k 'float32 and triton'"),
        ("angles of 32 bits", "(distance * freqs) >> 32)", "distance * (freqs >> 32))",
         "tests/test_rope.py::test_angles_at_large_positions[triton]"),
        ("low part of a product dropped", "out = tl.dot(a - top, b,", "out = tl.dot(0.0 * a, b,",
         "tests/test_window.py::test_attend_window -k 'D64 and triton'"),
    ),
    *of(
        "_checks.py", "tests/test_refusals.py -k num_splits",
        ("numbers that are no integers", 'if not hasattr(value, "__index__"):',
         "if value is None:"),
    ),
    *of(
        "_bits.py", f"{PAGES} -k '{MIXED} and triton'",
        ("top field taken as a code", "return (0.5 if place[4] else 0.5 - 2.0 ** (place[3] - 1))",
         "return (0.5 - 2.0 ** (place[3] - 1))"),
        ("fields not counted in codes", "return 0.0 if place is None else 2.0 ** -place[2]",
         "return 0.0 if place is None else 1.0"),
        ("groups of half the bytes", "return 1024 * n", "return 512 * n"),
        ("mask one field low", "- 1) << place[2]) * 0x01010101",
         "- 1) << (place[2] // 2)) * 0x01010101"),
    ),
    # ---- exact tokens
    *of(
        "window.py", "tests/test_window.py::test_every_length[triton]",
        ("oldest of the window never seen", "(newest >= SINKS) & (newest >= seq_len - EXACT[1])",
         "(newest >= SINKS) & (newest > seq_len - EXACT[1])"),
        ("a draft's slot seen", "(newest >= SINKS) & (newest >= seq_len - EXACT[1])",
         "(newest >= SINKS) & (newest >= seq_len - EXACT[1] - 1)"),
        ("no causal mask", "used[None, :] & (position[None, :] <= at[:, None])",
         "used[None, :] & (position[None, :] <= seq_len)"),
        ("a query does not see itself", "(position[None, :] <= at[:, None])",
         "(position[None, :] < at[:, None])"),
        ("stale slots: tokens of the last round", "last = seq_len - SINKS - 1  # counted",
         "last = seq_len - SINKS - 2  # counted"),
        ("window: sum not rescaled", "l = l * old + tl.sum(p, 1)\n", "l = l + tl.sum(p, 1)\n",
         "tests/test_window.py::test_attend_window -k 'S128 and scalar'"),
        ("window: lse in log2", "m * LN_2 + tl.log(l)", "m + tl.log(l)"),
        ("heads dealt out in turn", "head = g * HG + m_row % HG", "head = g + G * (m_row % HG)",
         "tests/test_window.py::test_attend_window -k 'D64-S20 and triton'"),
        ("window of the first row", "row = row_of(seq_ids_ptr, b, b)\n    window_split",
         "row = row_of(seq_ids_ptr, 0, 0)\n    window_split"),
        ("twin: oldest of the window never seen",
         "(slot < sinks) | (position >= seq_lens[:, None] - window)",
         "(slot < sinks) | (position > seq_lens[:, None] - window)",
         "tests/test_window.py::test_every_length[torch]"),
        ("twin: a query sees a later token", "at = seq_lens[:, None] - queries + torch",
         "at = seq_lens[:, None] - queries + 1 + torch",
         "tests/test_window.py::test_every_length[torch]"),
        ("slots count from the row's start", "sinks + (positions - sinks) % max(ring, 1)",
         "sinks + positions % max(ring, 1)", "tests/test_window.py::test_slots_and_positions"),
        ("kernel's slots count from the row's start",
         "SINKS + (position - SINKS) % tl.maximum(RING, 1)",
         "SINKS + position % tl.maximum(RING, 1)",
         f"tests/test_compress.py::test_append -k '{MIXED} and triton'"),
        ("positions one round early",
         "newest = sinks + last - (last - (slot - sinks)) % max(ring, 1)",
         "newest = sinks + last - (last + 1 - (slot - sinks)) % max(ring, 1)",
         "tests/test_window.py::test_slots_and_positions"),
    ),
    # ---- encode, append, decode
    *of(
        "compress.py", f"tests/test_compress.py::test_encode -k '{MIXED} and triton'",
        ("padding's tokens stored", "row_ptr = x_ptr + (position - past + skipped)",
         "row_ptr = x_ptr + (position - past)"),
        ("a token before the new ones overwritten",
         "new = (position >= past) & (position < seq_len)",
         "new = (position >= past - 1) & (position < seq_len)",
         "tests/test_compress.py::test_encode -k '16x8+16x2 and triton'"),
        ("oldest of the ring not kept",
         "kept = new & ((position < SINKS) | (position >= seq_len - RING))",
         "kept = new & ((position < SINKS) | (position > seq_len - RING))"),
        ("sinks not kept", "kept = new & ((position < SINKS) |", "kept = new & ((position < 0) |"),
        ("keys turned back by their page", "start = (page_index // (FRAME // 64) * FRAME)",
         "start = (page_index * 64 + 0 * FRAME)",
         "tests/test_compress.py::test_encode -k '16x8+16x2 and triton'"),
        ("keys turned forward", "* cos + other.to(tl.float32) * (sign * sin)).to(x.dtype)",
         "* cos - other.to(tl.float32) * (sign * sin)).to(x.dtype)"),
        ("mean not taken off", "c -= tl.load(offset_ptr + codec_row * R + r)[:, None]",
         "c -= 0.0 * tl.load(offset_ptr + codec_row * R + r)[:, None]"),
        ("codes rounded to nearest", "code = tl.floor(c + zero)",
         "code = tl.floor(c + zero + 0.5)"),
        ("codes run into the next field", "tl.maximum(code, 0.0), 2 * zero - 1)",
         "tl.maximum(code, 0.0), 2 * zero)"),
        ("sign bit not flipped", "byte ^= 128\n            group_ptr",
         "byte ^= 0\n            group_ptr"),
        ("half a byte of another token lost", "both = tl.where(new_low != 0, byte_low, old & 15)",
         "both = byte_low", "tests/test_compress.py::test_encode -k '48x4-16x8 and triton and k-'"),
        ("encoder of the codec's first head",
         "codec_row = row_of(codec_ids_ptr, b, 0) * G + g\n        encoder_ptr",
         "codec_row = row_of(codec_ids_ptr, b, 0) * G\n        encoder_ptr"),
        ("page of the neighbouring positions",
         "page = tl.load(block_table_ptr + b * stride_table_b + page_index).to(tl.int64)\n       "
         " pages_ptr += page * strides_pages[0] + g * strides_pages[1]\n        column = "
         "tl.arange(0, 16)\n        if",
         "page = tl.load(block_table_ptr + b * stride_table_b + page_index // 2).to(tl.int64)\n  "
         "      pages_ptr += page * strides_pages[0] + g * strides_pages[1]\n        column = "
         "tl.arange(0, 16)\n        if"),
    ),
    *of(
        "compress.py", f"tests/test_compress.py::test_append -k '{MIXED} and triton'",
        ("append: slot of the next token",
         "slot = slot_of(position, SINKS, RING).to(tl.int64) * strides",
         "slot = slot_of(position + 1, SINKS, RING).to(tl.int64) * strides"),
        ("append: stale page at a border", "stride_table_b + position // 64\n",
         "stride_table_b + tl.maximum(position - 1, 0) // 64\n"),
        ("append: the frame after", "start = (position // FRAME * FRAME).to(tl.int64)",
         "start = (position // FRAME * FRAME + FRAME).to(tl.int64)"),
        ("append: sign bit not flipped", "byte ^= 128\n    at", "byte ^= 0\n    at"),
        ("append: pages' offsets of 32 bits", "mask=live, other=0).to(tl.int64)",
         "mask=live, other=0).to(tl.int32)", f"{FAR}[triton]"),
        ("append: tokens' offsets of 32 bits", "(Q - ahead).to(tl.int64)",
         "(Q - ahead).to(tl.int32)", f"{FAR}[triton]"),
        ("append: wrong half of a byte", "tl.atomic_or(word_ptr, byte << low,",
         "tl.atomic_or(word_ptr, byte << (low ^ 4),",
         "tests/test_compress.py::test_append -k '48x4 and triton'"),
        ("append: half a byte of another token lost", "~(15 << low)", "~(255 << (low & 24))",
         "tests/test_compress.py::test_append -k '48x4 and triton'"),
        ("append: a row shorter than Q wraps around",
         "live = (position >= 0) & (position // 64 < max_pages)",
         "live = position // 64 < max_pages",
         "tests/test_compress.py::test_encode_nothing[triton]"),
        ("append: mean not taken off", "c -= offset[:, None]", "c -= 0.0 * offset[:, None]"),
        ("append: a word's columns backwards", "(tl.arange(0, 4) * 8)[None, :, None]",
         "(24 - tl.arange(0, 4) * 8)[None, :, None]"),
        ("append: encoder of the codec's first head", "encoder_ptr + codec_row * (D * R) + d",
         "encoder_ptr + codec_row // G * G * (D * R) + d"),
        ("append: a program's tokens are one row's", "b, ahead = (token // Q).to(tl.int64)",
         "b, ahead = (0 * token + tl.program_id(0) * TOKENS // Q).to(tl.int64)",
         "tests/test_extremes.py::test_codes_at_a_boundary_are_the_same_in_any_batch"),
        ("append: rows of several codecs share an encoder",
         "2 if many and codec_ids is None else 1", "2 if many else 1"),
        ("twin of append: a row shorter than Q wraps around",
         "first = (k.shape[2] - seq_lens).clamp_min(0)", "first = (0 * seq_lens)",
         "tests/test_compress.py::test_append -k '48x4 and torch'"),
        ("twin of encode: oldest of the ring not kept",
         "keep = (at < sinks) | (at >= seq_lens[row] - ring)",
         "keep = (at < sinks) | (at > seq_lens[row] - ring)",
         f"tests/test_compress.py::test_encode -k '{MIXED} and torch'"),
        ("twin of encode: the mean added", "values -= codec.k_offset[rows]",
         "values += codec.k_offset[rows]",
         f"tests/test_compress.py::test_append -k '{MIXED} and torch'"),
        ("decode: a token past the row's end", "live = page_index * 64 + token < seq_len",
         "live = page_index * 64 + token <= seq_len",
         "tests/test_compress.py::test_decode -k 'D128 and triton'"),
        ("decode: wrong half of a byte", ">> (at // 512 * 4).to(tl.uint8)", ">> 0",
         "tests/test_compress.py::test_decode -k '48x4 and triton'"),
        ("decode: codec without its head",
         "    row = row_of(codec_ids_ptr, b, 0) * G + g\n        page",
         "    row = row_of(codec_ids_ptr, b, 0) * G\n        page",
         f"tests/test_compress.py::test_decode -k '{MIXED} and triton'"),
        ("decode: keys left turned back", "inverse=True, out=out)", "inverse=False, out=out)",
         f"tests/test_compress.py::test_decode -k '{MIXED} and triton'"),
    ),
    # ---- bytes of a page
    *of(
        "layout.py", "tests/test_layout.py::test_pack_and_unpack",
        ("layout: sign bit not flipped", "columns ^= 0x80", "columns ^= 0"),
        ("layout: halves of a byte exchanged", "torch.cat((tiles & 0x0F, tiles >> 4), dim=-2)",
         "torch.cat((tiles >> 4, tiles & 0x0F), dim=-2)"),
        ("layout: full bytes take no last field", "sum(groups[-1][1]) + bits <= 8",
         "sum(groups[-1][1]) + bits < 8"),
        ("layout: codes saturate one early", "+ top / 2).clamp_min(0), top - 1)",
         "+ top / 2).clamp_min(0), top - 2)"),
        ("layout: tokens of V in another order", "x.movedim(-5, -1).movedim(-2, -4).flatten(-4)",
         "x.movedim(-5, -1).flatten(-4)"),
    ),
    # ---- states
    *of(
        "merge.py", "tests/test_merge.py::test_merge_states -k 'float32 and triton'",
        ("weights in base 2", "w_a = tl.exp(lse_a - top)", "w_a = tl.exp2(lse_a - top)"),
        ("not normalised", "(w_a * o_a + w_b * o_b) / total", "(w_a * o_a + w_b * o_b)"),
        ("outputs exchanged", "(w_a * o_a + w_b * o_b) / total", "(w_b * o_a + w_a * o_b) / total"),
        ("merged lse without the largest", "top + tl.log(total))  # log(0)",
         "tl.log(total))  # log(0)"),
        ("two empty sets are NaN", 'NaN.\n    top = tl.where(top == float("-inf"), 0.0, top)',
         'NaN.\n    top = tl.where(top > float("inf"), 0.0, top)',
         "tests/test_merge.py::test_empty_states[triton]"),
        ("empty splits are read", "mask = (w > 0.0)[:, None] & (d < D)[None, :]",
         "mask = (n < N)[:, None] & (d < D)[None, :]",
         "tests/test_merge.py::test_merge_many_states -k 'float32 and triton'"),
        ("twin: empty sets are read", "values = torch.where(weights > 0, o.float(), 0.0)",
         "values = o.float()",
         "tests/test_merge.py::test_merge_many_states -k 'float32 and torch'"),
        ("merged NaN taken for an empty set", "tl.where(total == 0.0, 0.0, o / total)",
         "tl.where(~(total > 0.0), 0.0, o / total)",
         "tests/test_extremes.py::test_merged_states_keep_nan[triton]"),
    ),
    # ---- rotations
    *of(
        "rope.py", "tests/test_rope.py::test_rotate_and_turn_back -k 'float32 and triton'",
        ("rotate: wrong sign", "tl.store(out_ptr + i[None, :], x1 * cos - x2 * sin, mask=mask)",
         "tl.store(out_ptr + i[None, :], x1 * cos + x2 * sin, mask=mask)"),
        ("turned back by the offset", "return rotate(x, positions - positions % frame",
         "return rotate(x, positions % frame"),
        ("inverse not inverse", "            sin = -sin\n", "            sin = sin\n"),
        ("frequencies cut off", "(den * two_pi)) + 1) >> 1", "(den * two_pi))) >> 1",
         "tests/test_rope.py::test_freqs_are_exact"),
        ("projected for the next frame", "starts = torch.arange(max_frames,",
         "starts = 1 + torch.arange(max_frames,",
         "tests/test_rope.py::test_project_queries -k 'float32 and D64'"),
        ("projected by another head's basis", '"bghqcd,bgrd->bghqcr", turned, basis)',
         '"bghqcd,bgrd->bghqcr", turned, basis.flip(1))',
         "tests/test_rope.py::test_project_queries -k 'float32 and D64'"),
        ("twin: wrong sign", "x1 * sin + x2 * cos, rest", "x2 * cos - x1 * sin, rest",
         "tests/test_rope.py::test_rotate_and_turn_back -k 'float32 and torch'"),
        ("twin: turned back by the position", "rotate_torch(x, positions - positions % frame,",
         "rotate_torch(x, positions,",
         "tests/test_rope.py::test_rotate_and_turn_back -k 'float32 and torch'"),
    ),
    # ---- the cache
    *of(
        "cache.py", "tests/test_fuzz.py::test_histories",
        ("reset forgets the lengths", "        self.seq_lens.zero_()\n", ""),
        ("reset keeps the pages", "[0] * self.max_seqs\n        self.pages.shrink(self.lengths)\n",
         "[0] * self.max_seqs\n", "tests/test_cache.py::test_reset_frees_every_page"),
        ("free forgotten", "            self.release(row[keep:])\n            del",
         "            del"),
        ("a fork's last page shared", "self.references[pages[-1]] > 1",
         "self.references[pages[-1]] > 2"),
        ("a fork's page not copied", "pool[target] = pool[source]", "pool[source] = pool[source]"),
        ("a fork's exact tokens not copied", "exact.copy_(exact[rows])", "exact.copy_(exact)"),
        ("a fork's lengths not copied", "self.seq_lens.copy_(self.seq_lens[rows])",
         "self.seq_lens.copy_(self.seq_lens)"),
        ("a fork's codec not copied", "self.codec_ids.copy_(self.codec_ids[rows])",
         "self.codec_ids.copy_(self.codec_ids)"),
        ("pages held ahead shared", "shared.append(old[i][: -(-length // PAGE_SIZE)])",
         "shared.append(list(old[i]))",
         "tests/test_cache.py::test_pages_held_ahead_are_not_shared"),
        ("rollback beyond the ring leaves stale slots", "        self._refill_window()\n\n", "\n"),
        ("ring believed one token longer", "max(at, end - ring) for", "max(at, end - ring - 1) for",
         "tests/test_cache.py::test_rollback_of_drafts_keeps_the_window_exact"),
        ("refilled slots believed stale for ever",
         "            self._oldest[row] = min(self._oldest[row], start)\n", ""),
        ("a fork's ring believed another row's", "lengths, [self._oldest[i] for i in index]",
         "lengths, list(self._oldest)"),
        ("partial pages not allocated", "-(-length // PAGE_SIZE) - len(row)",
         "length // PAGE_SIZE - len(row)"),
        ("the device's table not updated",
         "        if self.pages.grow(ends):\n            self._send_table()",
         "        self.pages.grow(ends)"),
        ("a grown cache forgets its tokens", "target[to] = source[at]", "target[to] = source[to]",
         "tests/test_hf.py::test_a_copy_with_more_room_is_the_cache"),
        ("graph replay with an old pointer",
         "self.block_table.copy_(self.pages.table, non_blocking=True)",
         "self.block_table = self.pages.table.to(self.device, copy=True)",
         "tests/test_cache.py::test_addresses_stay"),
        ("attend by the codec's row 0",
         "exact=(self.k_exact[layer], self.v_exact[layer]), codec_ids=self._ids(),",
         "exact=(self.k_exact[layer], self.v_exact[layer]), codec_ids=None,"),
        ("past takes the new tokens for old", "self.codec.layers[layer], self.seq_lens - new",
         "self.codec.layers[layer], self.seq_lens",
         "tests/test_cache.py::test_past_is_what_attention_sees"),
        ("past: oldest of the window from its page",
         "newest = positions >= seq_lens[:, None] - self.codec.window",
         "newest = positions > seq_lens[:, None] - self.codec.window"),
        ("prompts without their sinks",
         "side=side, first=first, exact=exact, sinks=self.codec.sinks, codec_ids=self._ids(),",
         "side=side, first=first, exact=exact, sinks=0, codec_ids=self._ids(),"),
        ("K of a prompt stored before V is looked at", 'for name, x in (("k", k), ("v", v)):',
         'for name, x in (("k", k),):', "tests/test_refusals.py -k 'refuses and prefill'"),
        ("a page given back twice", "self._check(pages, 1)", "self._check(pages, 0)",
         "tests/test_refusals.py -k 'allocator and release'"),
        ("too many tokens are let in", "if max(ends) > self.max_tokens:",
         "if max(ends) > 2 * self.max_tokens:", "tests/test_refusals.py -k 'refuses and reserve'"),
    ),
    *of(
        "codec.py", "tests/test_codec.py::test_a_file_gives_back_every_bit",
        ("a file forgets the frame", "c.layout.head_dim, c.layout.frame)",
         "c.layout.head_dim, 512)"),
        ("a file forgets the window", 'names = ("sinks", "window", "preset",',
         'names = ("sinks", "sinks", "preset",'),
        ("one fingerprint a release", 'rope.get("type", "default")', 'rope.get("type")',
         "tests/test_model.py::test_a_model_has_one_fingerprint_in_all_releases"),
        ("a file that failed stays in part", "part.unlink(missing_ok=True)", "pass",
         "tests/test_codec.py::test_a_file_is_whole_or_as_before"),
        ("a file written in place", "save_file(tensors, str(part)", "save_file(tensors, str(path)",
         "tests/test_codec.py::test_a_file_is_whole_or_as_before"),
    ),
    # ---- the adapter
    *of(
        "hf.py",
        "tests/test_hf.py::test_prefill_and_decode_logits_equal_the_dense_model -k "
        "'llama-default'",
        ("lengths count the padding", "part.advance(new if first is None else new - first)",
         "part.advance(new)"),
        ("a prompt's padding stored", "part.prefill(layer, k, v, first=first)",
         "part.prefill(layer, k, v)",
         "tests/test_hf.py::test_a_row_of_a_padded_batch_is_the_row_alone"),
        ("a second prompt does not see the first",
         "past = self.past(new) if cache.filled else None", "past = None",
         "tests/test_hf.py::test_several_tokens_on_a_filled_cache"),
        ("a second prompt is padded again",
         "first = None if self.filled or self.first is None else",
         "first = None if self.first is None else",
         "tests/test_hf.py::test_old_tokens_come_from_pages_in_steps_and_prompts -k 440"),
        ("crop forgets a token too few", "part.rollback(columns - keep)",
         "part.rollback(columns - keep - 1)", "tests/test_hf.py::test_crop_by_count_and_by_length"),
        ("beams keep their old padding", "self.padding = [self.padding[row] for row in rows]",
         "self.padding = list(self.padding)",
         "tests/test_hf.py::test_reordered_rows_go_on_as_themselves"),
        ("a pooled cache is not reset", "        cache.reset()\n        if getattr(config",
         "        if getattr(config",
         "tests/test_hf.py::test_a_generation_does_not_leak_into_the_next"),
        ("a chunk of padding alone", "max(chunk, max(padding) + 1)", "chunk",
         "tests/test_hf.py::test_chunks_that_are_shorter_than_the_padding"),
        ("a filled cache takes any mask", "cache.filled and counts != cache.padding", "False",
         "tests/test_hf.py::test_generate_refuses_another_mask_of_what_a_cache_holds"),
        ("positions count the padding", "(at - cache.first[:, None]).clamp(min=0)",
         "(at + 0 * cache.first[:, None]).clamp(min=0)",
         "tests/test_hf.py::test_positions_given_to_the_prompt_alone"),
        ("the model's own softmax scale is dropped", "x.codec.window, scale, workspace, learned,",
         "x.codec.window, None, workspace, learned,",
         "tests/test_hf.py::test_a_softmax_scale_of_the_models_own"),
        ("a copied cache shares its memory", "new.__dict__ = copy.deepcopy(self.__dict__, memo)",
         "memo |= {id(x): x for x in self.parts}\n            "
         "new.__dict__ = copy.deepcopy(self.__dict__, memo)",
         "tests/test_hf.py::test_a_copied_cache_shares_its_prompt_and_nothing_else"),
        ("a failed forward is built upon", "        self.busy = self.failed = True\n",
         "        self.busy = True\n",
         "tests/test_hf.py::test_a_forward_that_fails_half_way_is_not_built_upon"),
        ("disable leaves its attention",
         "        self.config._attn_implementation = self._implementation\n        self._patches",
         "        self._patches", "tests/test_hf.py::test_disable_restores_the_model"),
        ("layers keep their cache alive", "self.of, self.index, self.link = weakref.ref(cache),",
         "self.of, self.index, self.link = (lambda: cache),",
         "tests/test_hf.py::test_memory_goes_with_its_last_user"),
        ("a pooled cache of another dtype", "if not self.parts or self.dtype != dtype:",
         "if not self.parts:", "tests/test_hf.py::test_a_cache_takes_the_dtype_of_its_tokens"),
        ("states of inference mode", "and torch.is_inference_mode_enabled():", "and False:",
         "tests/test_families.py::test_states_made_in_inference_mode_are_written_outside_it"),
        ("a caller's graph takes a prompt's bookkeeping",
         "    @torch.compiler.disable(reason=_EAGER)\n    def prompt(", "    def prompt(",
         "tests/test_generation.py::test_what_a_caller_has_compiled[layers]"),
        ("every compiled forward is a step", "alone = cache.is_step((",
         "alone = cache.filled or bool((",
         "tests/test_generation.py::test_what_a_caller_has_compiled[model]"),
        ("a capture is every thread's", "class _Local(threading.local):", "class _Local:",
         "tests/test_hf.py::test_a_capture_is_no_other_threads"),
        ("a cache of drafts for the whole model",
         " or cache.depth != self.config.num_hidden_layers:", ":",
         "tests/test_generation.py::test_a_model_that_drafts_with_its_first_layers[exact]"),
        ("a model's own masks hide the padding",
         "mask = cache.mask if isinstance(mask, dict) else mask",
         "mask = None if isinstance(mask, dict) else mask",
         "tests/test_families.py::test_a_model_of_pictures_and_text"),
        ("room for whatever is asked", "min(asked, longest or asked)", "asked",
         "tests/test_generation.py::test_room_for_no_more_than_a_model_reads"),
        ("a copy of an enabled model", 'raise RuntimeError("model: disable() before a copy',
         'return self; str("model: disable() before a copy',
         "tests/test_hf.py::test_enable_twice_is_refused"),
    ),
    *of(
        "hf.py", "tests/test_families.py::test_tokens_over_the_borders_of_a_window[65-gemma3]",
        ("ring: one grows, and the next has no memory", "[(x, x.grown()) for x in windows]",
         "((x, x.grown()) for x in windows)",
         "tests/test_families.py::test_rings_that_do_not_grow_for_want_of_memory"),
        ("ring: drafts see one another", "(queries - 1 - count % queries)",
         "0 * (queries - 1 - count % queries)",
         "tests/test_families.py::test_a_ring_that_grows_and_is_cropped"),
        ("ring: a second prompt sees a window too long",
         "count = min(self.cache.columns, self.link.layer.window - 1)",
         "count = min(self.cache.columns, self.link.layer.window)",
         "tests/test_families.py::test_tokens_over_the_borders_of_a_window[129-gemma3]"),
        ("ring: not moved with the beams", "            x.copy_(x[beam_idx.to(x.device)])",
         "            x.copy_(x)",
         "tests/test_families.py::test_a_ring_moves_with_its_rows"),
        ("ring: cropped beyond what it keeps", "< self.cache.highest - self.keys.shape[2]:",
         "< self.cache.highest - self.keys.shape[2] - 2:",
         "tests/test_families.py::test_a_ring_that_grows_and_is_cropped"),
    ),
    *of(
        "window.py", "tests/test_families.py::test_tokens_over_the_borders_of_a_window[65-gemma3]",
        ("ring: a token in the next one's slot", "torch.arange(-x.shape[2], 0, device=x.device)) %",
         "torch.arange(1 - x.shape[2], 1, device=x.device)) %"),
    ),
    # ---- what it reads of a model
    *of(
        "_model.py", "tests/test_model.py::test_the_check_compares_every_new_token",
        ("sliding layers taken for full ones", "if type(layer) is DynamicLayer]",
         "if isinstance(layer, DynamicLayer)]", "tests/test_families.py::test_a_family_works"),
        ("shared keys not refused", 'if getattr(config, "num_kv_shared_layers", 0) or',
         'if getattr(config, "num_kv_shared", 0) or',
         "tests/test_model.py::test_a_layer_whose_keys_are_another_layers_is_refused"),
        ("MLA not refused", '"kv_lora_rank": "K and V', '"kv_lora": "K and V',
         "tests/test_families.py::test_a_refusal_says_what_to_do"),
        ("capped scores not refused", '"attn_logit_softcapping": plain, ', "",
         "tests/test_families.py::test_a_refusal_says_what_to_do"),
        ("recurrent states not counted", '"values", "conv_states", "recurrent_states")',
         '"values", "conv_states")',
         "tests/test_families.py::test_states_at_fixed_addresses_are_replayed[qwen3_next]"),
        ("states that move in a CUDA graph", "if not layer.is_compileable})",
         "if layer.is_compileable and False})",
         "tests/test_families.py::test_a_cuda_graph_wants_state_that_stays"),
        ("devices not counted", "return not moving and len(devices) == 1", "return not moving",
         "tests/test_model.py::test_no_graph_over_two_devices"),
        ("heads of the first rank", "whole.of_heads(rank * self.kv_heads, self.kv_heads)",
         "whole.of_heads(0 * rank, self.kv_heads)",
         "tests/test_parallel.py::test_each_rank_has_its_own_heads"),
        ("head size by the hidden size", 'getattr(config, "head_dim", None) or config.hidden_size',
         'getattr(config, "size", None) or config.hidden_size',
         "tests/test_model.py::test_shapes_of_a_config"),
        ("the check lets NaN pass", "if not error <= largest *", "if error > largest *"),
        ("the check sees later tokens", ".tril(tokens - new)", ".tril(tokens - new + 1)"),
        ("the check forgets the prompt", "seen[:] = k, v\n",
         "seen[:] = k[:, :, 1:], v[:, :, 1:]\n"),
        ("a choice by a mask taken for one by numbers", "waits = waits if masks else set()",
         "waits = set()", "tests/test_model.py::test_waits_are_seen_before_a_capture"),
        ("layers stay compiled", 'vars(layer).pop("forward", None)', 'vars(layer).get("forward")',
         "tests/test_hf.py::test_layers_compile_for_a_step[exact]"),
        ("attention stays opaque", "    finally:\n        config._attn_implementation = name\n",
         "    finally:\n", "tests/test_hf.py::test_layers_compile_for_a_step[exact]"),
    ),
    # ---- calibration
    *of(
        "calibrate.py", "tests/test_calibrate.py::test_error_costs",
        ("each frame at the cost of all", "(-1, frame)).sum(-1, keepdim=True)",
         "(-1, frame)).sum((1, 2), keepdim=True)"),
        ("queries turned forward", "starts = -frame * torch", "starts = frame * torch"),
        ("as few queries of long sequences", "max(queries, tokens // 16)", "queries"),
        ("a metric of half turns", ".double() * (2 * math.pi / 2**64)",
         ".double() * (math.pi / 2**64)"),
        ("costs count a token of the window", "(age < window)", "(age < window - 1)"),
        ("weights not squared", "(age < window), 0.0).square()", "(age < window), 0.0)"),
        ("scale not squared", "scale**2 * p * off", "scale * p * off"),
        ("values as if they were their own distances", " - 2 * (o @ values.mT) + square",
         " + square"),
        ("values along the gradient for their distances",
         "grad @ values.mT - (grad * o).sum(-1, keepdim=True)", "grad @ values.mT"),
        ("a value's error costs all queries alike", "(weight * grad).mT @ grad", "grad.mT @ grad"),
        ("directions that are not alike", ".diagonal().add_(weight.sum())", ".add_(weight.sum())"),
        ("gradients of the query before", "gradient[h, part].float()",
         "gradient[h, part - 1].float()"),
        ("outputs of older tokens alone", "p = scores.masked_fill(age < 0, float(\"-inf\"))",
         "p = scores.masked_fill((age < window) | (positions < sinks), float(\"-inf\"))"),
        ("later tokens weighed", "masked_fill(age < 0,", "masked_fill(age < -1,"),
        ("keys of another head", "g = h * len(k) // heads", "g = h % len(k)"),
        ("a gradient of more likely tokens", "-torch.ones_like(p[:, :1])",
         "torch.ones_like(p[:, :1])",
         "tests/test_calibrate.py::test_gradients_are_those_of_tokens_drawn_from_the_predictions"),
        ("the likeliest token for a drawn one", "torch.multinomial(p, 1, generator=generator)",
         "p.argmax(-1, keepdim=True)",
         "tests/test_calibrate.py::test_gradients_are_those_of_tokens_drawn_from_the_predictions"),
    ),
    *of(
        "calibrate.py",
        "tests/test_calibrate.py::test_moments_are_those_of_the_tokens_as_the_model_rotated_them",
        ("keys turned back by their position", "turned(k, positions % FRAME - positions,",
         "turned(k, -positions,"),
        ("moments not centred", "k_moment - mean[:, :, None] * mean[:, None]",
         "k_moment - 0 * mean[:, :, None] * mean[:, None]"),
        ("sinks in the moments", "self.freqs)[:, sinks:]", "self.freqs)[:, 0 * sinks :]"),
        ("gradients' costs in units of outputs", "power if gradient is None else 1.0", "power"),
        ("outputs' costs in no unit", "power if gradient is None else 1.0", "1.0"),
        ("directions no query told cost nothing", "metrics += floor * torch.eye",
         "metrics += 0 * floor * torch.eye"),
        ("layers that run again are read again", "known, reads = reads, None", "known = reads"),
        ("gradients of another layer", "gradients[i] if drawn",
         "gradients[max(1, i) - 1] if drawn"),
    ),
    *of(
        "calibrate.py", "tests/test_calibrate.py::test_collecting_changes_nothing",
        ("weights with gradients for ever", ", inputs=embedded)", ")"),
        ("embeddings with gradients for ever", "with hook, torch", "with torch"),
        ("gradients of few tokens", "total >= LEAST_DRAWN and", "total > 0 and",
         "tests/test_calibrate.py::test_without_gradients_all_directions_count_alike"),
        ("sequences are kept", "known.pop(0)(", "known[i](",
         "tests/test_calibrate.py::test_a_sequence_is_freed_before_the_next_is_read"),
        ("layers that run again stop early", "set_checkpoint_early_stop(False)",
         "set_checkpoint_early_stop(True)",
         "tests/test_calibrate.py::test_weights_that_accelerate_moves_are_as_before"),
        ("gradients given up for memory", "if n or (x.shape[1] > SHORT and", "if n or (False and",
         "tests/test_calibrate.py::test_too_little_memory_takes_shorter_sequences"),
        ("no codec without gradients", "if n or (x.shape[1] > SHORT and", "if n or (True and",
         "tests/test_calibrate.py::test_too_little_memory_takes_shorter_sequences"),
        ("sequences halved for ever", "for x in source)) <= SHORT:", "for x in source)) <= 0:",
         "tests/test_calibrate.py::test_too_little_memory_takes_shorter_sequences"),
        ("short sequences halved too", "x.chunk(1 + (x.shape[-1] > SHORT), -1)", "x.chunk(2, -1)",
         "tests/test_calibrate.py::test_too_little_memory_takes_shorter_sequences"),
        ("longer than the model reads", "min(longest, LENGTH if", "min(LENGTH, LENGTH if",
         "tests/test_calibrate.py::test_sequences_are_as_long_as_the_model_takes"),
        ("few tokens of one long sequence", "LENGTH if tokens >= LEAST_DRAWN else SHORT", "LENGTH",
         "tests/test_calibrate.py::test_sequences_are_as_long_as_the_model_takes"),
        ("gradients that nobody looks at", "drawn = drawn and len(gradients) == len(known)",
         "drawn = False",
         "tests/test_calibrate.py::test_without_gradients_all_directions_count_alike"),
    ),
    *of(
        "calibrate.py", "tests/test_calibrate.py",
        ("errors of exact tokens count", "    window: int = WINDOW,", "    window: int = 16,",
         "tests/test_calibrate.py::test_errors_count_from_where_the_presets_code_tokens"),
        ("errors count by another preset's window", "sinks=preset.sinks, window=preset.window, **",
         "**",
         "tests/test_calibrate.py::test_errors_count_from_where_a_custom_preset_codes_tokens"),
        ("worst component first", "eigenvectors.mT.flip(-2)\n    basis = torch.linalg.solve",
         "eigenvectors.mT\n    basis = torch.linalg.solve",
         "tests/test_calibrate.py::test_basis_loses_least_at_every_rank"),
        ("basis of the metric's other root", "eigh(root.mT @ moment @ root)",
         "eigh(root @ moment @ root.mT)",
         "tests/test_calibrate.py::test_basis_loses_least_at_every_rank"),
        ("encoder blind to the metric", "weighted = basis @ _unit(metric)", "weighted = basis",
         "tests/test_calibrate.py::test_encoder_of_the_int8_basis"),
        ("codes of the middle rounded up", "code.floor_().add_(0.5)", "code.round_()",
         "tests/test_calibrate.py::test_steps_lose_little_more_than_the_best"),
        ("8-bit components clipped", "torch.where(top < 256, factor, HEADROOM)",
         "torch.where(top < 256, factor, 1 / HEADROOM)",
         "tests/test_calibrate.py::test_8_bit_components_have_room_for_what_the_sample_lacks"),
        ("steps of zero", "widest = torch.maximum(largest, least) * 2 / top",
         "widest = largest * 2 / top",
         "tests/test_calibrate.py::test_a_component_without_variance_gets_a_step"),
        ("a plan of twice the bytes", "room = int(total // unit)", "room = int(2 * total // unit)",
         "tests/test_calibrate.py::test_share_bytes_is_the_best_of_all_combinations"),
        ("choices by themselves", "room + 1 - size // unit)] + loss",
         "room + 1 - size // unit)] * 0 + loss",
         "tests/test_calibrate.py::test_share_bytes_is_the_best_of_all_combinations"),
        ("any number of layouts", ")) > MAX_LAYOUTS:", ")) > 64 * MAX_LAYOUTS:",
         "tests/test_calibrate.py::test_a_plan_has_few_layouts"),
        ("bytes of one side", "full = sum(4 * layer.k.mean.numel()",
         "full = sum(2 * layer.k.mean.numel()",
         "tests/test_calibrate.py::test_a_plan_meets_its_bytes_and_beats_an_even_split"),
        ("a codec without the mean's part", "offset = (mean[:, None] @ k[2])[:, 0]",
         "offset = (0 * mean[:, None] @ k[2])[:, 0]",
         "tests/test_calibrate.py::test_a_codec_of_full_rank_and_8_bits_reconstructs"),
        ("steps not in the encoder", "(encoder / steps.double()[:, None])",
         "(encoder * steps.double()[:, None])",
         "tests/test_calibrate.py::test_a_codec_of_full_rank_and_8_bits_reconstructs"),
        ("frequencies of another layer type", "for x in named + plain:", "for x in plain + named:",
         "tests/test_calibrate.py::test_frequencies_are_the_models_or_a_default"),
        ("a model left in eval mode", "module.training = True", "module.training = False",
         "tests/test_calibrate.py::test_collecting_changes_nothing"),
        ("a model left tapped", "            config._attn_implementation = original\n        for",
         "            pass\n        for",
         "tests/test_calibrate.py::test_the_model_is_as_before_after_an_exception"),
        ("sliding layers read", '"layer_idx", None) not in full:', '"layer_idx", None) is None:',
         "tests/test_calibrate.py::test_layers_with_a_sliding_window_are_left_out"),
        ("sequences without their first token", "torch.tensor(first + part)", "torch.tensor(part)",
         "tests/test_calibrate.py::test_token_sequences"),
    ),
    # ---- requests of an engine
    *of(
        "_requests.py", "tests/test_requests.py::test_no_order_of_events_finds_wrong_sinks",
        ("kept sinks: found is not used", "self._entries.move_to_end(page)",
         "self._entries.move_to_end(page, last=False)"),
        ("kept sinks: the newest give way", "popitem(last=False)", "popitem()"),
        ("kept sinks: forgotten ones are found", "self._entries.pop(page))",
         "self._entries[page])"),
        ("kept sinks: entries leak", "        self.forget(page)\n", ""),
    ),
    *of(
        "_requests.py", "tests/test_requests.py::test_who_goes_on_finds_its_own_tokens[paged-16]",
        ("pages but the last, unfinished one", ": -(-stop // PAGE_SIZE)]", ": stop // PAGE_SIZE]"),
        ("a number's steps in between", "self._seen.get(slot) == expected",
         "self._seen.get(slot, ())[1:] == expected[1:]",
         "tests/test_requests.py::test_a_number_that_goes_to_another_request"),
        ("a number's other pages", "self._seen.get(slot) == expected",
         "self._seen.get(slot, ())[:2] == expected[:2]",
         "tests/test_requests.py::test_a_number_that_goes_to_another_request"),
        ("dummy rows get a request's slot", "np.full(len(rows.past), self.scratch)",
         "np.full(len(rows.past), 0)",
         "tests/test_requests.py::test_dummy_rows_get_the_scratch_slot"),
        ("who ends a page of this step", "(filling | (length % PAGE_SIZE == 0))", "filling",
         "tests/test_requests.py::test_who_goes_on_finds_its_own_tokens[indexed-16]"),
        ("exact prompts start at every chunk", "(self.exact or known)", "known",
         "tests/test_requests.py::test_an_exact_prompt_goes_on"),
        ("two requests go on in a slot", "self._owner.pop((past,", "self._owner.get((past,"),
        ("pages written anew keep their owner", "if begun.isdisjoint(k[1])}", "if begun is not k}",
         "tests/test_requests.py::test_a_page_that_another_wrote_past_its_end"),
        ("a new page's old owner", "past + PAGE_SIZE - 1, length)", "past + PAGE_SIZE, length)",
         "tests/test_requests.py::test_a_page_that_another_wrote_past_its_end"),
        ("two requests start in a slot", "            self._used[slots[i]] = self.step\n", ""),
        ("an owner whose slot is another's", "items() if s != slots[i]}", "items() if s >= 0}"),
    ),
    # ---- in vLLM
    *of(
        "vllm.py", "tests/test_vllm.py::test_a_prefix_hit[kept]",
        ("a hit's window a token early", "at = past[:, None] - self.window + torch",
         "at = past[:, None] - self.window - 1 + torch"),
        ("a hit's window from the last page alone",
         "first = (lens - self.window).clamp_min(0) // PAGE_SIZE",
         "first = (lens - 1) // PAGE_SIZE", "tests/test_vllm.py::test_a_prefix_hit[wide]"),
        ("a hit's kept sinks not taken", "torch.where(kept, pool[entry], x)", "x"),
        ("a hit's lost sinks taken from the pool", "(entry >= 0)[:, None", "(entry >= -1)[:, None",
         "tests/test_vllm.py::test_a_prefix_hit[lost]"),
        ("sinks kept in another entry", "pool[chunk.entry] = exact",
         "pool[chunk.entry - 1] = exact"),
        ("a hit a token into the window", "max_length + 1 - kv_cache_spec.window",
         "max_length + 2 - kv_cache_spec.window",
         "tests/test_vllm.py::test_how_far_a_hit_goes"),
        ("the window lost where layers share a spec", "replace(super().merge(specs), window="
         "specs[0].window)", "super().merge(specs)", "tests/test_vllm.py::test_how_far_a_hit_goes"),
        ("sinks of a short first chunk kept", "if tokens >= max(self.sinks, 2):",
         "if tokens >= 2:", "tests/test_vllm.py::test_sinks_of_two_steps_are_not_kept"),
        ("a page's old sinks not forgotten", "self.pool.forget(page)", "self.pool.find(page)",
         "tests/test_vllm.py::test_sinks_of_two_steps_are_not_kept"),
    ),
    *of(
        "vllm.py", "tests/test_vllm.py::test_exact_is_vllms_own_backend",
        ("metadata of the step before", "seen is None or seen[0] is not common_attn_metadata",
         "seen is None"),
        ("slots of the step before", "if not np.array_equal(engine.sent, ids):",
         "if len(engine.sent) != len(ids):"),
        ("chunks' bounds count the decodes", "live + 1] - int(bounds[first])", "live + 1]"),
        ("few tokens attended as of the chunk's end", "lens=chunk.row.lens - (chunk.stop - stop)",
         "lens=chunk.row.lens"),
        ("a prompt sees a later token", "triu(s.shape[3] - s.shape[2] + 1)",
         "triu(s.shape[3] - s.shape[2] + 2)"),
        ("a past seen from the prompt's triangle", "one, past, self.scale, causal=False)",
         "one, past, self.scale)", "tests/test_vllm.py::test_long_chunks_on_a_past"),
        ("exact pages found again", "if config.cache_config.enable_prefix_caching:", "if False:",
         "tests/test_vllm.py::test_refuses"),
        ("pages padded to a window's", "(KVCacheLayout.BLHNC,) * cls.packed", "()",
         "tests/test_vllm.py::test_windows_beside_leave_pages_small"),
        ("a prompt's last token in a graph", "batch.has_prefill else uniform", "False else uniform",
         "tests/test_vllm.py::test_model_runner_v2"),
        ("blocks zeroed by pages' numbers", ".unflatten(0, (self.kv_cache_config.num_blocks, -1))",
         "", "tests/test_vllm.py::test_new_blocks_are_zeroed_whole"),
        ("beside states pages of any width", "width = widest if hybrid else ", "width = ",
         "tests/test_vllm.py::test_state_layers_beside"),
    ),
    *of(
        "vllm.py", "tests/test_vllm.py::test_long_chunks_on_a_past",
        ("a rebuilt past without its window",
         "max(chunk.past - engine.window, engine.sinks, start)",
         "max(chunk.past, engine.sinks, start)"),
        ("a rebuilt past without its sinks", "max(engine.sinks - start, 0)",
         "max(0 * engine.sinks - start, 0)"),
        ("all layers by the first's codec", "codec = self.codec.layers[index]",
         "codec = self.codec.layers[0]", "tests/test_vllm.py::test_admits_by_page_bytes"),
        ("the model's own scale not used", "seq_ids=rows.ids, scale=self.scale,",
         "seq_ids=rows.ids,", "tests/test_vllm.py::test_sliding_layers_beside"),
        ("heads of the first rank in vLLM", "first = ranks.rank_in_group * codec.kv_heads",
         "first = 0 * codec.kv_heads", "tests/test_vllm.py::test_two_ranks"),
        ("a codec of other heads taken", "if got != {(heads, dim)}:", "if not got:",
         "tests/test_vllm.py::test_refuses"),
        ("memory for any number of requests", "if room < least:", "if False:",
         "tests/test_vllm.py::test_newest_tokens_fit_beside_pages"),
        ("a window of this rank alone", ", group.cpu_group)", ", group.cpu_group) if 0 else None",
         "tests/test_vllm.py::test_newest_tokens_fit_beside_pages"),
        ("parts of pages found again", "config.cache_config.prefix_match_unit is not None", "False",
         "tests/test_vllm.py::test_refuses"),
        ("weights' memory given to exact tokens", "memory - torch.cuda.memory_allocated()",
         "memory", "tests/test_vllm.py::test_newest_tokens_fit_beside_pages"),
        ("a window as if sinks were not kept", "(self.slots + 1) - kept, self.window)",
         "(self.slots + 1), self.window)",
         "tests/test_vllm.py::test_newest_tokens_fit_beside_pages"),
        ("a window in part where all is exact",
         'if self.codec.preset == "exact" else', "if False else",
         "tests/test_vllm.py::test_a_window_that_does_not_fit"),
        ("hits as if the whole window fitted", "window = self.window if alone else",
         "window = self.codec.window if alone else",
         "tests/test_vllm.py::test_a_window_that_does_not_fit"),
        ("layers that attend otherwise taken", "layer.attn_backend is not SpectralBackend or", "",
         "tests/test_vllm.py::test_layers_that_attend_otherwise"),
        ("registered twice", "    if NAME in AttentionBackendEnum.__members__:\n        return\n",
         "", "tests/test_vllm.py::test_registers_once_and_travels"),
    ),
]
# fmt: on


def wrong_anchors(mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> list[str]:
    """Mutants whose anchor does not occur exactly once, and how often it does."""
    texts = {path: (root / path).read_text() for path in {m.path for m in mutants}}
    counts = [(m, texts[m.path].count(m.anchor)) for m in mutants]
    return [f"{m.path}: {m.name}: {n} times: {m.anchor!r}" for m, n in counts if n != 1]


def mutated(mutant: Mutant, text: str) -> str:
    return text.replace(mutant.anchor, mutant.replacement)


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, ignore=skipped, symlinks=True)
        else:
            shutil.copy(source, target / name)


OPTIONS = (
    "-x", "-q", "--no-header", "-W", "ignore", "-rf", "--tb=short", "--assert=plain",
    "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception",
)  # fmt: skip
# What tests import besides the package, which each process imports anew.
IMPORTED = ("torch._dynamo.testing", "transformers.models.llama.modeling_llama", "triton", "vllm")


def run_forked(tree: str, tests: Sequence[str], limit: float = LIMIT) -> tuple[int, str]:
    """(exit code, output) of pytest on a tree in a child of this process, for selections one after
    another, to the first failure; -SIGALRM if that takes more than `limit` seconds a selection."""
    import pytest

    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, limit * len(tests))
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(tree)
            sys.path.insert(0, tree)
            for selection in tests:
                code = pytest.main([*OPTIONS, *shlex.split(selection)])
                if code:
                    print(selection)
                    break
            sys.stdout.flush()
            os._exit(int(code))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()[-20000:]


def serve() -> None:
    """Run pytest on trees, in forked children that share what this process imports: a JSON line
    {tree, tests} in, a JSON line {code, output} out."""
    sys.path.pop(0)  # of this file
    import torch

    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        code, output = run_forked(job["tree"], job["tests"])
        print(json.dumps({"code": code, "output": output}), flush=True)


class Tree:
    """A copy of the tree, and a process of this Python that runs tests on it."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder, self.count = folder, 0
        copy_tree(folder)
        environment = {
            **os.environ, "TRITON_INTERPRET": "1", "PYTHONPYCACHEPREFIX": f"{folder}/pyc",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        self.server = subprocess.Popen(
            [python, __file__, "--serve"], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *tests: str) -> tuple[int, str]:
        """(exit code, output) of pytest for selections one after another, to the first failure."""
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps({"tree": str(self.folder), "tests": tests}), file=self.server.stdin)
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return answer["code"], answer["output"]

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()

    def try_one(self, mutant: Mutant) -> dict[str, object]:
        """Run the mutant's tests with the mutant in the tree, which is put back afterwards."""
        path, begin = self.folder / mutant.path, time.time()
        text, written = path.read_text(), path.stat().st_mtime
        try:
            path.write_text(mutated(mutant, text))
            self.count += 1  # Python knows compiled files by the second
            os.utime(path, (written + self.count, written + self.count))
            verdict, by = judge(*self.run(mutant.tests))
        finally:
            path.write_text(text)
            os.utime(path, (written, written))
        seconds = round(time.time() - begin)
        return {"file": mutant.file, "verdict": verdict, "by": by, "seconds": seconds}


def judge(code: int, output: str) -> tuple[str, str]:
    """(killed, survived or wrong; what killed it or why it is wrong)."""
    if code == 0:
        return "survived", ""
    if code == -signal.SIGALRM:
        return "killed", f"no end within {LIMIT} s"
    if code < 0:
        return "killed", f"the process crashes (signal {-code})"
    failed = re.findall(r"^FAILED (\S+?::\S.*?)(?: - (.*))?$", output, re.M)
    if code != 1 or not failed:
        return "wrong", f"exit code {code}: {output[-400:]}"
    test, error = failed[0]
    if BROKEN.search(error):
        return "wrong", f"{test}: {error}"
    return "killed", test


def run_all(
    mutants: Sequence[Mutant], jobs: int, python: str = sys.executable
) -> dict[str, dict[str, object]]:
    """Verdicts by name."""
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        every = [Tree(Path(folder) / str(i), python) for i in range(jobs)]
        trees: Queue[Tree] = Queue()
        for tree in every:
            trees.put(tree)

        def on_a_tree(work):
            tree = trees.get()
            try:
                return work(tree)
            finally:
                trees.put(tree)

        selections = sorted({m.tests for m in mutants})
        parts = filter(None, [selections[i::jobs] for i in range(jobs)])
        for code, output in pool.map(lambda x: on_a_tree(lambda tree: tree.run(*x)), parts):
            if code != 0:
                raise SystemExit(f"without a mutant: exit code {code}\n{output[-3000:]}")
        work = [(m, pool.submit(on_a_tree, lambda tree, m=m: tree.try_one(m))) for m in mutants]
        for mutant, future in work:
            results[mutant.name] = found = future.result()
            print(f"{found['verdict']:8} {mutant.name}: {found['by']}", flush=True)
        for tree in every:
            tree.close()
    return results


def table(results: dict[str, dict[str, object]]) -> str:
    """Markdown: mutants by file, and how many tests it took to kill them."""
    lines = ["| file | mutants | killed | by tests |", "| --- | --- | --- | --- |"]
    for file in dict.fromkeys(str(x["file"]) for x in results.values()):
        found = [x for x in results.values() if x["file"] == file]
        killed = [x for x in found if x["verdict"] == "killed"]
        tests = {str(x["by"]).split("[")[0] for x in killed}
        lines.append(f"| {file} | {len(found)} | {len(killed)} | {len(tests)} |")
    killed = [x for x in results.values() if x["verdict"] == "killed"]
    lines.append(f"| all | {len(results)} | {len(killed)} | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=1, help="at a time (default 1)")
    beside = ROOT / ".ci" / "venv-vllm" / "bin" / "python"
    parser.add_argument(
        "--vllm", metavar="PYTHON", default=str(beside) if beside.exists() else "",
        help="one that has vLLM, for the mutants of vllm.py (default: what .ci/run vllm made)",
    )  # fmt: skip
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    gone = wrong_anchors()
    if options.table:
        print(table(json.loads(RESULTS.read_text())))
        return 0
    if options.list:
        for mutant in MUTANTS:
            print(f"{mutant.path}: {mutant.name}: {mutant.tests}")
        print(
            f"{len(MUTANTS)} mutants", *(f"anchor gone or not alone: {x}" for x in gone), sep="\n"
        )
        return 1 if gone else 0
    chosen = [
        m for m in MUTANTS
        if not options.only or any(m.name.startswith(x) or m.file == x for x in options.only)
    ]  # fmt: skip
    if gone or not chosen:
        print("\n".join(gone) or "no such mutant")
        return 1
    begin = time.time()
    here = [m for m in chosen if not m.needs_vllm]
    results = run_all(here, options.jobs) if here else {}
    if there := [m for m in chosen if m.needs_vllm]:
        if options.vllm:
            results |= run_all(there, options.jobs, options.vllm)
        else:
            print(f"skipped, as they need vLLM (--vllm PYTHON): {len(there)} of vllm.py")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = {m.name: {**known, **results}[m.name] for m in MUTANTS if m.name in {**known, **results}}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    bad = {name: x for name, x in results.items() if x["verdict"] != "killed"}
    for name, found in bad.items():
        print(f"{found['verdict'].upper()}: {name}: {found['by']}")
    print(f"{len(results) - len(bad)} of {len(results)} killed in {time.time() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

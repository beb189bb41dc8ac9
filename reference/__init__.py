"""Oracles: slow, float64 NumPy, from the definition of each operation; loops are welcome.

They share no formula with the kernels: where a kernel turns a query by its distance to a chunk, the oracle turns query
and key to their absolute positions; where a kernel splits integers into planes, the oracle looks every component's bits
up. Never installed with the package, and it imports nothing of the package: only tests (and people who doubt a kernel)
use it.

    reference/rope.py       rotations, projected queries
    reference/pages.py      bytes of a page
    reference/compress.py   Gram matrix, basis, codes
    reference/attention.py  attention over pages and over exact keys
    reference/merge.py      states over disjoint sets of keys
"""

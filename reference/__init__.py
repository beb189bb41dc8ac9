"""Oracles: slow, float64 NumPy, from the definition of each operation; loops are welcome.

They share no formula with the kernels: where a kernel turns a query back by the start of a frame,
the oracle turns the stored key forward to where the model had it; where a kernel splits integers
into planes, the oracle looks every component's bits up. Never installed with the package, and it
imports nothing of the package: only tests (and people who doubt a kernel) use it.

    reference/rope.py       rotations, projected queries
    reference/layout.py     bytes of a page
    reference/compress.py   Gram matrix, codes of a token, tokens rebuilt from pages
    reference/window.py     which tokens are exact, and in which slot
    reference/attention.py  attention over pages and over exact tokens
    reference/merge.py      states over disjoint sets of keys
"""

"""Oracles: slow, float64 NumPy, from the definition of each operation; loops are welcome.

They share no formula with the kernels: where a kernel turns a query back by the start of a frame,
the oracle turns the stored key forward to where the model had it; where a kernel splits integers
into planes, the oracle looks every component's bits up. Never installed with the package, and it
imports nothing of the package. README.md: the mathematics, the bytes, the modules.
"""

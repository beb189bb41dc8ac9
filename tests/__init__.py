"""Tests of spectral_kernels. Each operation is compared with its float64 oracle (reference/) within
a derived budget."""

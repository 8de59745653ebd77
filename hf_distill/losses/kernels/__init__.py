"""Elementwise work between the matrix products of the fused head, one module a backend."""

"""Benchmarks: a case is inputs, the bytes it must move, a float64 reference and a reset; peers run the same case."""

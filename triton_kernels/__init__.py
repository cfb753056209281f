"""Triton kernels, launched by `pyunlearn.ops.backends.triton`. Importing them imports triton."""

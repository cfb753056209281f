"""The portable GPU path: Triton kernels under the names of csrc/cuda. Installed as `pyunlearn.triton_kernels`."""

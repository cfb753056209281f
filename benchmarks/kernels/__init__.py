"""Kernels: cases, who computes them, plans of what is measured, targets, and what is known without a GPU."""

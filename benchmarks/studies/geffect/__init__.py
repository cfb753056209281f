"""The figures of the G-effect paper (Wang et al., ICLR 2025; Section 4, Appendices C, D and F) on a small model."""

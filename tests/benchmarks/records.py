"""What tests of several parts know of a record."""

KEYS = {
    "op", "case", "impl", "device", "dtype", "N", "V", "H", "time_ms", "bytes", "copy_gbps",
    "percent_of_copy", "peak_bytes", "error_vs_fp64", "commit", "versions",
}  # fmt: skip

#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: benchmarks/kernels/gpu.sh first|second|STEP ... [--out DIR] [--commit SHA]
# [--wheels DIR] [--small]; --help says what there is. PYTHON names the interpreter. calls.py has the steps.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.kernels.calls "$@"

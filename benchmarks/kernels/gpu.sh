#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: benchmarks/kernels/gpu.sh [part ...] [out-dir]
#   parts: build correct bench-logits bench-linear bench-weights bench-step bench-mrd bench-geffect sanitize profile;
#   without any: all, in this order
#   out-dir: has a slash in it; default benchmarks/results/<device>
# Needs torch, triton, nvcc, cmake, ninja and pybind11; correct also pytest, bench-step transformers. Peers are measured
# where they can be imported. Each part ends within 8 minutes; a bench part that had to leave something goes on where it
# ended when it is run again. PYTHON names the interpreter, COMMIT the commit where there is no git, BENCH more options
# for `python -m benchmarks`, such as BENCH="--impl cuda,triton", TOFU a folder with forget10.jsonl for bench-mrd.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
LIMIT=470 # seconds a part
PARTS=(build correct bench-logits bench-linear bench-weights bench-step bench-mrd bench-geffect sanitize profile)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

usage() {
  echo "gpu.sh: $1; parts: ${PARTS[*]}; an out-dir has a slash in it, such as ./results" >&2
  exit 2
}

limited() {
  local left=$((end - SECONDS))
  timeout -k 10 $((left > 1 ? left : 1)) "$@"
}

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  [[ $arch == 90 ]] && arch=90a
  PYUNLEARN_CUDA=on PYUNLEARN_CUDA_ARCHS=$arch limited "$PYTHON" setup.py -q build_ext --inplace >"$logs/build" 2>&1
  local status=$?
  tail -n 20 "$logs/build"
  return $status
}

correct() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  limited "$PYTHON" -m pytest tests/ops -p no:cacheprovider "${workers[@]}" >"$logs/correct" 2>&1
  local status=$?
  { grep -E '"(device|commit)"' "$out/environment.json"; tail -n 40 "$logs/correct"; } | cut -c -300 >"$out/correct.txt"
  tail -n 15 "$out/correct.txt"
  return $status
}

bench() { # status 75: a kernel broke the CUDA context, the rest is for a new process
  local status=75
  while ((status == 75 && end - SECONDS > 90)); do
    limited "$PYTHON" -m benchmarks "$1" --device cuda --seconds $((end - SECONDS - 60)) --out "$out" ${BENCH:-}
    status=$?
  done
  return $status
}

bench-mrd() { # a Llama-2-7B of random weights on forget10, or on the embedded world
  local shape=(--shape 7B --device cuda --naive-seconds 0 --check-draws 2 --batch-size 16 --out "$out")
  [[ -f ${TOFU:-}/forget10.jsonl ]] && shape+=(--data "$TOFU/forget10.jsonl")
  limited "$PYTHON" -m benchmarks.scale.mrd "${shape[@]}" --num-draws 6 --estimators gradient,algorithm1 --name mrd-7B &&
    limited "$PYTHON" -m benchmarks.scale.mrd "${shape[@]}" --num-draws 4 --estimators algorithm1 --mode streamed \
      --name mrd-7B-streamed
}

bench-geffect() { # a Llama-2-7B of random weights
  limited "$PYTHON" -m benchmarks.scale.geffect --shape 7B --device cuda --out "$out" --name geffect-7B
}

sanitize() {
  local tool status=0
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here" | tee "$out/sanitize.txt"; return; }
  : >"$out/sanitize.txt"
  for tool in memcheck racecheck; do
    end=$((SECONDS + LIMIT / 2))
    # without torch's cache every tensor has bounds of its own
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited compute-sanitizer --tool $tool --error-exitcode 9 \
      "$PYTHON" -m benchmarks.kernels.gpu check --ops "$([[ $tool == memcheck ]] && echo all || echo logits)" >"$logs/$tool" 2>&1
    local code=$?
    ((code)) && status=$code
    { echo "== $tool: exit status $code"; grep -a '^=========' "$logs/$tool" | head -n 60; grep -a -c '^ok' "$logs/$tool"
      grep -a '^WRONG' "$logs/$tool"; } | cut -c -300 >>"$out/sanitize.txt"
  done
  cat "$out/sanitize.txt"
  return $status
}

profile() {
  command -v ncu >/dev/null || { echo "ncu is not here" | tee "$out/profile.txt"; return; }
  limited ncu --clock-control none --profile-from-start off --metrics "$("$PYTHON" -m benchmarks.kernels.gpu counters)" \
    --csv --page raw --log-file "$logs/ncu" "$PYTHON" -m benchmarks.kernels.gpu profile
  local status=$?
  "$PYTHON" -m benchmarks.kernels.gpu ncu "$logs/ncu" | tee "$out/profile.json"
  return $status
}

parts=() out=
for argument in "$@"; do
  if [[ " ${PARTS[*]} " == *" $argument "* ]]; then
    parts+=("$argument")
  elif [[ $argument == */* && -z $out ]]; then
    out=$argument
  else
    usage "unknown part '$argument'"
  fi
done
((${#parts[@]})) || parts=("${PARTS[@]}")
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: torch sees no GPU" >&2; exit 1; }
[[ -n $out ]] || out=benchmarks/results/$("$PYTHON" -c 'import benchmarks.measure as m; print(m.machine("cuda")["folder"])')
mkdir -p "$out"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
"$PYTHON" -m benchmarks.kernels.gpu environment >"$out/environment.json" || exit

summary=() failed=0
for part in "${parts[@]}"; do
  echo "== $part"
  begin=$SECONDS end=$((SECONDS + LIMIT))
  case $part in bench-mrd | bench-geffect) "$part" ;; bench-*) bench "${part#bench-}" ;; *) "$part" ;; esac
  status=$?
  ((status)) && failed=1
  summary+=("$part: $( ((status)) && echo "exit status $status" || echo ok), $((SECONDS - begin)) s")
done
echo "== results in $out"
printf '%s\n' "${summary[@]}"
exit $failed

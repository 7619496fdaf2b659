#!/usr/bin/env bash
# Runs all checks that need a GPU in at most 10 minutes: tests, speed, memory, utilization, a real run, the loaders.
#
#   DINO_ORIGINAL=DIR benchmarks/gpu_suite.sh            DIR: a checkout of facebookresearch/dino; default: only ours
#   OUT=results ONLY="step_bf16 complete_run" benchmarks/gpu_suite.sh
#   DEVICE=cpu QUICK=1 benchmarks/gpu_suite.sh           the same commands with the smallest sizes, to try the script
#
# PYTHON is the interpreter. Each command has a time limit; the sum of all limits is 10 minutes, of which starting the
# processes is a large part. If a command fails or times out, the others still run. $OUT gets NAME.log and NAME.json of
# each command and summary.txt; the exit status is 1 if a command failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
QUICK=${QUICK:-}
ONLY=${ONLY:-}
OUT=${OUT:-outputs/gpu_suite-$(date +%Y%m%d-%H%M%S)}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

original=()
[ -n "${DINO_ORIGINAL:-}" ] && original=(--original "$DINO_ORIGINAL")
failed=()
printf '%-14s %7s %9s  %s\n' command status seconds result >"$OUT/summary.txt"

# measure NAME LIMIT_S COMMAND...: runs the command; if its last line is a JSON object, it becomes NAME.json.
measure() {
  local name=$1 limit=$2 start=$SECONDS status=0 result=""
  shift 2
  [ -n "$ONLY" ] && [[ " $ONLY " != *" $name "* ]] && return
  [ -n "$QUICK" ] && limit=120
  echo "== $name: $*"
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  if [ "$status" -eq 0 ]; then
    tail -n 1 "$OUT/$name.log" | grep '^{' >"$OUT/$name.json" || rm -f "$OUT/$name.json"
    result=$(tail -n 1 "$OUT/$name.log" | cut -c1-100)
    [ -f "$OUT/$name.json" ] && result=$("$PYTHON" benchmarks/gpu_tools.py figures "$OUT/$name.json")
  else
    failed+=("$name")
    result=$([ "$status" -eq 124 ] && echo "timed out after $limit s" || tail -n 1 "$OUT/$name.log" | cut -c1-200)
  fi
  printf '%-14s %7s %9s  %s\n' "$name" "$status" "$((SECONDS - start))" "$result" | tee -a "$OUT/summary.txt"
}

step() { # NAME LIMIT_S OPTIONS...
  local name=$1 limit=$2
  shift 2
  measure "$name" "$limit" "$PYTHON" benchmarks/step.py --device "$DEVICE" --json "${small[@]}" "$@"
}

small=()
images=64
sweep=short
run=(backbone=vit_small data.batch_size_per_device=64 data.train_images=1920 data.num_workers=8
  trainer.precision=bf16-mixed trainer.accelerator=gpu crops.backend=device)
if [ -n "$QUICK" ]; then
  small=(--batch 1 --prototypes 64 --locals 1 --warmup 1 --threads 1 --backbone vit_tiny)
  images=4
  sweep=quick
  run=(backbone=vit_tiny data.batch_size_per_device=2 data.train_images=8 data.num_workers=0
    trainer.precision=32 "trainer.accelerator=$([ "$DEVICE" = cpu ] && echo cpu || echo gpu)" crops.backend=device
    backbone.depth=1 method.out_dim=64 cpu_threads=1)
fi
turns() { [ -n "$QUICK" ] && echo "--steps 1 --pairs 1" || echo "--steps $1 --pairs $2"; }
mapfile -t tests < <(grep -lE 'cuda.is_available' tests/*.py tests/*/test_*.py)
varlen=(--set compute.attention=varlen)
[ "$DEVICE" = cpu ] && varlen=(--set compute.attention=split) # varlen attention needs a GPU
compiled=(--set compute.compile=true)
[ -n "$QUICK" ] && compiled+=(--set backbone.depth=2)

# shellcheck disable=SC2046
{
  step step_bf16 50 "${original[@]}" --precision bf16 $(turns 10 5)
  step vit_base 45 "${original[@]}" --precision bf16 $(turns 10 3) --backbone "$([ -n "$QUICK" ] && echo vit_tiny || echo vit_base)"
  step step_fp32 50 "${original[@]}" --precision 32 $(turns 5 3)
  step step_tf32 40 "${original[@]}" --precision tf32 $(turns 5 3)
  measure tests 45 "$PYTHON" -m pytest -q -o addopts= -m 'not slow' -p no:cacheprovider -p gpu_tools "${tests[@]}"
  step compile 60 --precision bf16 "${compiled[@]}" $(turns 20 5)
  step varlen 30 --precision bf16 "${varlen[@]}" $(turns 10 5)
  step checkpointing 30 --precision bf16 --set compute.gradient_checkpointing=true $(turns 10 5)
  measure breakdown 30 "$PYTHON" benchmarks/breakdown.py --device "$DEVICE" --json "${small[@]}" --precision bf16 \
    $([ -n "$QUICK" ] && echo --steps 1)
  measure jpegs 25 "$PYTHON" benchmarks/gpu_tools.py jpegs "$WORK/images/all" --count "$images"
  step complete_run 50 "${original[@]}" --precision bf16 --data "$WORK/images" --set crops.backend=device $(turns 10 2)
  measure train 45 "$PYTHON" train.py experiment=vits16_100ep data=builtin trainer.devices=1 trainer.max_epochs=1 \
    trainer.enable_progress_bar=false trainer.enable_checkpointing=false callbacks.knn.enabled=false optim.lr_warmup=4it \
    method.freeze_last_layer=0ep "${run[@]}" output_dir="$WORK/train"
  measure data_gpu 30 "$PYTHON" benchmarks/gpu_tools.py augmentation "$WORK/images/all"
  step sweep 70 --precision bf16 --sweep "$sweep" $(turns 10 1)
}
cp "$WORK"/train/{summary.json,metrics.csv} "$OUT" 2>/dev/null

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" | tee -a "$OUT/summary.txt"
  exit 1
fi
echo "all passed: $OUT/summary.txt"

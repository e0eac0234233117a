#!/usr/bin/env bash
# Measure the kernels and pruning on one GPU, within five minutes.
#
#     bash integration/gpu/measure_kernels.sh OUT [--cpu]
#
# This appends figures to OUT/results.jsonl; see steps.sh. Pruning needs llm-compressor,
# from the bundle if there is one (bundle.sh), otherwise installed for PYTHON.
set -euo pipefail
cd "$(dirname "$0")/../.."
. integration/gpu/steps.sh
begin "$(realpath -m "${1:-out/gpu}")" "${TOTAL_SECONDS:-290}" "${2:-}"

SMALL=()
if [ ${#TRIAL[@]} -gt 0 ]; then SMALL=(--width 256 --samples 4 --length 64); fi

#    name        at most  needs
step machine          25      8 machine
step compile          35     10 compile
step correct          40     10 correct
step cusparselt       15      6 cusparselt
step decode           40     10 decode
step prefill          40     10 prefill
step blocks           25     10 blocks
step attention        25      8 attention
if bundled; then
    step unpack       20     10 run \
        "$PYTHON" integration/gpu/bundle/unpack.py "$SITES" --only kernels
fi
step prune            90     75 site="$SITES/site-kernels" \
    prune --layers 1 "${SMALL[@]}"
step profile          30     12 profile
finish

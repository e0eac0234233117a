#!/usr/bin/env bash
# Measure vLLM on one GPU, a 2:4 model against the same weights dense, within six minutes.
#
#     bash integration/gpu/measure_serving.sh OUT [--cpu | --as-installed]
#
# This appends figures to OUT/results.jsonl; see steps.sh. vLLM comes from the bundle if
# there is one (bundle.sh), otherwise it is the one installed for PYTHON. --as-installed
# lets the installed one choose its attention kernels, compilation and CUDA graphs.
# LAYERS (32, all of Llama-3.1-8B) is the depth of the model. With few layers, vLLM's own
# work on the CPU takes as long as the GPU's, and hides the effect of the kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
. integration/gpu/steps.sh
LAYERS=${LAYERS:-32}
begin "$(realpath -m "${1:-out/gpu}")" "${TOTAL_SECONDS:-320}" "${2:-}"

HOW=()
if [ "${2:-}" = --as-installed ]; then HOW=(--as-installed); fi
SITE="$SITES/site-serving"
BUNDLED=no
if [ ${#HOW[@]} -eq 0 ] && bundled; then
    BUNDLED=yes
    set -a
    . integration/gpu/bundle/vllm.env
    set +a
fi
# 8-bit layers stay dense unless sparse kernels are requested
BF16=(--dtype bf16 --layers "$LAYERS")
FP8=(--dtype fp8 --layers "$LAYERS")

#    name        at most  needs
step machine          20      8 machine
if [ $BUNDLED = yes ]; then
    step unpack       25     10 run \
        "$PYTHON" integration/gpu/bundle/unpack.py "$SITES" --only serving
fi
step vllm             40     15 site="$SITE" vllm
# a library that the driver refuses must not cost the kernels' figures
if [ $STATUS -ne 0 ]; then AGAIN=""; else AGAIN=$SITE; fi
step decode-again     30     10 site="$AGAIN" \
    decode --shapes gate_up_proj down_proj --tokens 1 8 16 --dtypes bf16 fp8
step checkpoint       60     10 checkpoint "${BF16[@]}"
step engine-dense     90     35 site="$SITE" \
    engine "${BF16[@]}" --plugin off "${HOW[@]}"
step engine-sparse   120     35 site="$SITE" \
    engine "${BF16[@]}" --plugin on "${HOW[@]}"
step checkpoint-fp8   40     70 checkpoint "${FP8[@]}"
step engine-dense-8   90     30 site="$SITE" \
    engine "${FP8[@]}" --plugin off "${HOW[@]}"
step engine-sparse-8  90     30 site="$SITE" \
    engine "${FP8[@]}" --plugin on --kernel sparse "${HOW[@]}"
if running; then rm -rf /{dev/shm,tmp}/llmc-attnmask-{bf16,fp8}-"$LAYERS"; fi
finish

# Sourced by measure_kernels.sh and measure_serving.sh: steps, each with a time limit.
#
#     begin OUT SECONDS [--cpu]
#     step NAME LIMIT LEAST [site=FOLDER] STEP [OPTIONS...]     of step.py
#     step NAME LIMIT LEAST run COMMAND...                      any command
#     finish
#
# LIMIT is the step's time limit in seconds; LEAST is how many of the SECONDS must be left
# for it to start. Output goes to OUT/log.txt, failures to OUT/results.jsonl, where the
# steps' own figures are. Without a GPU the steps are only listed; with --cpu they are
# tried with small shapes. STATUS is the exit code of the preceding step.

PYTHON=${PYTHON:-python3}
SITES=${SITES:-${TMPDIR:-/tmp}/llmc-attnmask-sites} # where the bundle is unpacked
STEP=${STEP:-integration/gpu/step.py}
export PYTHONUNBUFFERED=1

# a missing nvidia-smi does not mean that there is no GPU
gpu_name() {
    nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null ||
        "$PYTHON" -c 'import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())' 2>/dev/null || true
}

begin() {
    OUT=$1 TOTAL=$2 TRIAL=()
    SECONDS=0
    if [ "${3:-}" = --cpu ]; then
        GPU=""
        TRIAL=(--cpu)
        SITES="" # the bundle is for another machine, so the installed packages are tried
        export TRITON_INTERPRET=1
    else
        GPU=$(gpu_name)
    fi
    if ! running; then
        echo "No CUDA GPU on this machine. With one, these steps would run within $TOTAL s:"
        return
    fi
    mkdir -p "$OUT"
    echo "$OUT: ${GPU:-a trial on the CPU}, $TOTAL s"
}

running() {
    [ -n "$GPU" ] || [ ${#TRIAL[@]} -gt 0 ]
}

failed() { # NAME WHY SECONDS
    echo "   $2"
    "$PYTHON" integration/gpu/record.py "$OUT" --step "$1" --failed "$2" \
        --seconds "$3" --gpu "$GPU" "${TRIAL[@]/--cpu/--trial}"
}

step() {
    local name=$1 limit=$2 least=$3
    shift 3
    STATUS=0
    if ! running; then
        printf '%-16s at most %3d s: %s\n' "$name" "$limit" "$*"
        return
    fi
    local left=$((TOTAL - SECONDS)) site="" begun=$SECONDS size command status=0
    if [ "$left" -lt "$least" ]; then
        STATUS=1
        echo "== $name"
        failed "$name" "not started: $left s left, it needs $least s" 0
        return
    fi
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [[ $1 == site=* ]]; then
        site=${1#site=}
        shift
    fi
    if [ "$1" = run ]; then
        shift
        command=("$@")
    else
        command=("$PYTHON" "$STEP" "$@" --out "$OUT" --seconds "$limit" "${TRIAL[@]}")
    fi
    echo "== $name, at most $limit s"
    echo "== $name: ${command[*]}" >>"$OUT/log.txt"
    size=$(wc -c <"$OUT/log.txt")
    PYTHONPATH=$site${PYTHONPATH:+${site:+:}$PYTHONPATH} \
        timeout --kill-after=3 "$limit" "${command[@]}" \
        </dev/null >>"$OUT/log.txt" 2>&1 || status=$?
    STATUS=$status
    local seconds=$((SECONDS - begun))
    case $status in
    0) echo "   $seconds s" ;;
    124) failed "$name" "timed out after $seconds s" $seconds ;;
    137) failed "$name" "killed after $seconds s" $seconds ;;
    *)
        failed "$name" "exit code $status: $(tail -c +$((size + 1)) "$OUT/log.txt" |
            tr '\r' '\n' | grep -v '^[[:space:]]*$' | tail -n 1)" $seconds
        ;;
    esac
}

bundled() {
    compgen -G "build/gpu/*.tar.xz" >/dev/null && [ ${#TRIAL[@]} -eq 0 ]
}

finish() {
    if ! running; then return; fi
    echo "== $SECONDS s in total"
    "$PYTHON" integration/gpu/summary.py --print "${TRIAL[@]/--cpu/--trials}" \
        "$OUT/results.jsonl" |
        tee "$OUT/summary.md"
}

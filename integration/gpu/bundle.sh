#!/usr/bin/env bash
# Collect what a GPU machine without network access lacks in one ignored folder, build/gpu.
#
#     bash integration/gpu/bundle.sh
#
# That machine has Python 3.12, torch 2.11 (CUDA 13), Triton 3.6 and transformers. Downloads
# stay in build/wheels; PIP_FIND_LINKS may name a folder of wheels. There:
#
#     python3 integration/gpu/bundle/unpack.py DEST
#     PYTHONPATH=DEST/site-kernels python3 ...      # llm-compressor
#     PYTHONPATH=DEST/site-serving python3 ...      # vLLM, with bundle/vllm.env
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
LIMIT=$((60 << 20)) # bytes
WHEELS=build/wheels
OUT=build/gpu
HERE=integration/gpu/bundle

PLATFORMS=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64
    --platform manylinux1_x86_64)
for minor in {5..39}; do # pip accepts only the platforms that are named
    PLATFORMS+=(--platform "manylinux_2_${minor}_x86_64")
done

# packing takes minutes, so a part is packed again only if its inputs changed
for part in common kernels serving; do
    made_by=$(cat "$HERE/$part.txt" "$HERE"/{trim,pack,fatbin}.py | cksum)
    if [ "$(cat "$WHEELS/$part.made_by" 2>/dev/null)" = "$made_by" ] &&
        compgen -G "$OUT/$part-*.tar.xz" >/dev/null; then
        echo "$part: unchanged"
        continue
    fi
    rm -f "$WHEELS/$part.made_by"
    mkdir -p "$WHEELS/$part"
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${PLATFORMS[@]}" \
        --dest "$WHEELS/$part" --requirement "$HERE/$part.txt"
    "$PYTHON" -m integration.gpu.bundle.pack "$WHEELS/$part" "$OUT"
    echo "$made_by" >"$WHEELS/$part.made_by"
done
rm -rf "$WHEELS/package"
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WHEELS/package" .
"$PYTHON" -m integration.gpu.bundle.pack "$WHEELS/package" "$OUT"

size=$(cat "$OUT"/*.tar.xz | wc -c)
echo "$OUT: $((size >> 20)) MiB of $((LIMIT >> 20))"
if ((size > LIMIT)); then
    echo "too large by $(((size - LIMIT) >> 10)) KiB: exclude more in $HERE/trim.py" >&2
    exit 1
fi

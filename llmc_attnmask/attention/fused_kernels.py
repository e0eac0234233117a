"""The kernels of ``fused.py``, which describes what each computes.

In all of them, q and k are dense, and p and j are their pruned counterparts; b is a
sample, h a query head, g its key head. Pointers to [B, H or G, tokens, width] are
contiguous. So are the rows of the mask, which can be read to the end of the last
COLUMNS keys.

A thread has registers for little more than one tile of A and the operands of one small
product, so nothing as wide as a head is held in registers: products over the width
proceed in steps of CHUNK, and sums as wide as a head stay in global memory, which here
means the L2 cache. An address is one base and 32-bit offsets, because addresses occupy
registers, too; ``disable_licm`` makes the compiler recompute them for every tile.
"""

import triton
import triton.language as tl


@triton.jit
def _load(base, tokens, count, start, width: tl.constexpr, CHUNK: tl.constexpr):
    """Load [tokens, CHUNK] of a matrix [count, width], zero outside."""
    within = start + tl.arange(0, CHUNK)
    inside = tokens[:, None] < count
    if width % CHUNK:
        inside = inside & (within[None, :] < width)
    at = base + (tokens[:, None] * width + within[None, :])
    return tl.load(at, inside, 0.0).to(tl.float32)


@triton.jit
def _high(number):
    """Round to the 11 bits of TF32."""
    bits = number.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b):
    """Multiply a b with float32's precision, in three products of TF32.

    Like Triton's own "tf32x3", but without its handling of infinite operands, which
    takes as many instructions as the rest.
    """
    a_high, b_high = _high(a), _high(b)
    total = tl.dot(a - a_high, b_high, input_precision="tf32")
    total = tl.dot(a_high, b - b_high, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def _product(
    left, right, rows, columns, length, keys, width: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Multiply rows of a [length, width] by columns of a [keys, width], in float32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, CHUNK):
        a = _load(left, rows, length, start, width, CHUNK)
        b = _load(right, columns, keys, start, width, CHUNK)
        total += _dot(a, tl.trans(b))
    return total


@triton.jit
def _add_product(
    found, at, count, kept, factor, right, tokens, others,
    width: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Set found = kept * found + factor @ right in rows ``at`` of found [count, width].

    ``kept`` is [at] or a number, ``factor`` [at, tokens], ``right`` [others, width].
    Only this program writes these rows.
    """
    # the compiler must not know the end, or it unrolls a few steps and spills
    for start in range(0, width + tl.minimum(count, 0), CHUNK):
        within = start + tl.arange(0, CHUNK)
        inside = at[:, None] < count
        if width % CHUNK:
            inside = inside & (within[None, :] < width)
        address = found + (at[:, None] * width + within[None, :])
        before = kept * tl.load(address, inside, 0.0)
        matrix = _load(right, tokens, others, start, width, CHUNK)
        tl.store(address, before + _dot(factor, matrix), inside)
    tl.debug_barrier()  # other threads may read these rows for the next tile


@triton.jit
def _logits(
    query, key, mask, mask_row, row, rows, columns,
    scaling, softcap, length, keys, dh: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return S and the soft cap's derivative, float32 [rows, columns].

    ``row`` is rows[0].
    """
    logits = scaling * _product(
        query, key, rows, columns, length, keys, dh, ROWS, COLUMNS, CHUNK
    )
    slope = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    if CAPPED:
        capped = 2 * tl.sigmoid(2 * logits / softcap) - 1  # tanh
        logits = capped * softcap
        slope = 1 - capped * capped
    if MASKED:
        mask += tl.cast(row, tl.int64) * mask_row
        at = (rows - row)[:, None] * mask_row + columns[None, :]
        logits += tl.load(mask + at, rows[:, None] < length, 0.0).to(tl.float32)
    return tl.where(columns[None, :] < keys, logits, float("-inf")), slope


@triton.jit
def statistics(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    sinks, context,
    HAS_SINKS: tl.constexpr, OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)  # dense or pruned
    b, h = bh // heads, bh % heads
    bg = b * groups + h // (heads // groups)
    query = tl.where(which == 0, q, p) + bh * length * dh
    key = tl.where(which == 0, k, j) + bg * keys * dh
    rows = block * ROWS + tl.arange(0, ROWS)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # a column of its own, dropped after the softmax
        highest = tl.zeros((ROWS,), tl.float32) + tl.load(sinks + h).to(tl.float32)
        total += 1.0
    mask += b * mask_b + h * mask_h
    first, end = tl.load(ranges + 2 * block), tl.load(ranges + 2 * block + 1)
    for start in tl.range(first // COLUMNS * COLUMNS, end, COLUMNS, disable_licm=True):
        columns = start + tl.arange(0, COLUMNS)
        logits, _ = _logits(
            query, key, mask, mask_row, block * ROWS, rows, columns,
            scaling, softcap, length, keys, dh, ROWS, COLUMNS, CHUNK, MASKED, CAPPED,
        )  # fmt: skip
        now = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(now == float("-inf"), 0.0, now)
        kept = tl.exp(highest - finite)
        exponentials = tl.exp(logits - finite[:, None])
        total = kept * total + tl.sum(exponentials, 1)
        highest = now
        if OUTPUT and which == 1:
            _add_product(
                context + bh * length * dv, rows, length, kept[:, None],
                exponentials, v + bg * keys * dv, columns, keys, dv, CHUNK,
            )  # fmt: skip
    # a row of nothing but -inf sees no key: 0 and 1 / inf make its A zero
    blind = highest == float("-inf")
    total = tl.where(blind, float("inf"), total)
    at = statistics + (bh * length * 4 + which * 2) + rows * 4
    tl.store(at, tl.where(blind, 0.0, highest), rows < length)
    tl.store(at + 1, 1 / total, rows < length)


@triton.jit
def _tile(
    query, pruned_query, key, pruned_key, statistics,
    mask, mask_row, row, rows, columns, scaling, softcap, length, keys,
    dh: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return A~ - A, A~ and the pruned logits' slope, [rows, columns]."""
    inside = rows < length  # other rows get A = 0
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    slope = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    for which in range(2):  # a loop, so that registers hold the operands of only one
        logits, slope = _logits(
            tl.where(which == 0, query, pruned_query),
            tl.where(which == 0, key, pruned_key),
            mask, mask_row, row, rows, columns,
            scaling, softcap, length, keys, dh, ROWS, COLUMNS, CHUNK, MASKED, CAPPED,
        )  # fmt: skip
        at = statistics + (rows * 4 + which * 2)
        highest = tl.load(at, inside, 0.0)
        share = tl.load(at + 1, inside, 0.0)
        found = tl.exp(logits - highest[:, None]) * share[:, None]
        change = found - change
    return change, found, slope


@triton.jit
def change(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    squares, inner, reached,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    bg = b * groups + h // (heads // groups)
    rows = block * ROWS + tl.arange(0, ROWS)
    sum_of_squares = tl.zeros((ROWS,), tl.float32)
    sum_of_products = tl.zeros((ROWS,), tl.float32)
    mask += b * mask_b + h * mask_h
    first, end = tl.load(ranges + 2 * block), tl.load(ranges + 2 * block + 1)
    for start in tl.range(first // COLUMNS * COLUMNS, end, COLUMNS, disable_licm=True):
        columns = start + tl.arange(0, COLUMNS)
        change, pruned, _ = _tile(
            q + bh * length * dh, p + bh * length * dh,
            k + bg * keys * dh, j + bg * keys * dh, statistics + bh * length * 4,
            mask, mask_row, block * ROWS, rows, columns,
            scaling, softcap, length, keys, dh, ROWS, COLUMNS, CHUNK, MASKED, CAPPED,
        )  # fmt: skip
        sum_of_squares += tl.sum(change * change, 1)
        sum_of_products += tl.sum(pruned * change, 1)
        if OUTPUT:
            _add_product(
                reached + bh * length * dv, rows, length, 1.0,
                change, v + bg * keys * dv, columns, keys, dv, CHUNK,
            )  # fmt: skip
    tl.store(squares + bh * length + rows, sum_of_squares, rows < length)
    tl.store(inner + bh * length + rows, sum_of_products, rows < length)


@triton.jit
def _through_softmax(
    query, pruned_query, key, pruned_key, value, statistics, upstream, delta,
    mask, mask_row, row, rows, columns,
    scaling, softcap, matrix_weight, length, keys,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return scaling * P: the gradient at the logits, [rows, columns]."""
    change, pruned, slope = _tile(
        query, pruned_query, key, pruned_key, statistics,
        mask, mask_row, row, rows, columns,
        scaling, softcap, length, keys, dh, ROWS, COLUMNS, CHUNK, MASKED, CAPPED,
    )  # fmt: skip
    gradient = (2 * matrix_weight) * change
    pruned = pruned * slope * scaling
    if OUTPUT:
        gradient += _product(
            upstream, value, rows, columns, length, keys, dv, ROWS, COLUMNS, CHUNK
        )
    return pruned * (gradient - tl.load(delta + rows, rows < length, 0.0)[:, None])


@triton.jit
def query_gradient(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    upstream, delta, found,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    bg = b * groups + h // (heads // groups)
    rows = block * ROWS + tl.arange(0, ROWS)
    pruned_key = j + bg * keys * dh
    mask += b * mask_b + h * mask_h
    first, end = tl.load(ranges + 2 * block), tl.load(ranges + 2 * block + 1)
    for start in tl.range(first // COLUMNS * COLUMNS, end, COLUMNS, disable_licm=True):
        columns = start + tl.arange(0, COLUMNS)
        through = _through_softmax(
            q + bh * length * dh, p + bh * length * dh,
            k + bg * keys * dh, pruned_key, v + bg * keys * dv,
            statistics + bh * length * 4,
            upstream + bh * length * dv, delta + bh * length,
            mask, mask_row, block * ROWS, rows, columns,
            scaling, softcap, matrix_weight, length, keys,
            OUTPUT, dh, dv, ROWS, COLUMNS, CHUNK, MASKED, CAPPED,
        )  # fmt: skip
        _add_product(
            found + bh * length * dh, rows, length, 1.0,
            through, pruned_key, columns, keys, dh, CHUNK,
        )  # fmt: skip


@triton.jit
def key_gradient(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    upstream, delta, found,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // groups, bg % groups
    shared = heads // groups
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    for member in range(shared):
        h = g * shared + member
        bh = b * heads + h
        pruned_query = p + bh * length * dh
        for row_block in tl.range(0, tl.cdiv(length, ROWS), disable_licm=True):
            first = tl.load(ranges + 2 * row_block)
            end = tl.load(ranges + 2 * row_block + 1)
            if (block * COLUMNS < end) & ((block + 1) * COLUMNS > first):
                rows = row_block * ROWS + tl.arange(0, ROWS)
                through = _through_softmax(
                    q + bh * length * dh, pruned_query,
                    k + bg * keys * dh, j + bg * keys * dh, v + bg * keys * dv,
                    statistics + bh * length * 4,
                    upstream + bh * length * dv, delta + bh * length,
                    mask + b * mask_b + h * mask_h, mask_row,
                    row_block * ROWS, rows, columns,
                    scaling, softcap, matrix_weight, length, keys,
                    OUTPUT, dh, dv, ROWS, COLUMNS, CHUNK, MASKED, CAPPED,
                )  # fmt: skip
                _add_product(
                    found + bg * keys * dh, columns, keys, 1.0,
                    tl.trans(through), pruned_query, rows, length, dh, CHUNK,
                )  # fmt: skip

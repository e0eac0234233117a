"""The kernels of ``fused.py``, which says what each computes.

In all of them q, k are dense, p, j their pruned twins; b is a sample, h a query head, g
its key head. Pointers to [B, H or G, tokens, width] are contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def _load(base, tokens, count, width, WIDTH: tl.constexpr):
    """Rows [tokens, WIDTH] of a matrix [count, width], zero outside of it."""
    within = tl.arange(0, WIDTH)
    inside = (tokens[:, None] < count) & (within[None, :] < width)
    return tl.load(base + tokens[:, None] * width + within[None, :], inside, 0.0)


@triton.jit
def _logits(
    query,
    key,
    mask,
    mask_row,
    mask_column,
    rows,
    columns,
    scaling,
    softcap,
    length,
    keys,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """S and the soft cap's derivative, float32 [rows, columns]."""
    logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scaling
    slope = tl.full(logits.shape, 1.0, tl.float32)
    if CAPPED:
        capped = 2 * tl.sigmoid(2 * logits / softcap) - 1  # tanh
        logits = capped * softcap
        slope = 1 - capped * capped
    if MASKED:
        inside = (rows[:, None] < length) & (columns[None, :] < keys)
        at = rows[:, None].to(tl.int64) * mask_row + columns[None, :] * mask_column
        logits += tl.load(mask + at, inside, 0.0).to(tl.float32)
    return tl.where(columns[None, :] < keys, logits, float("-inf")), slope


@triton.jit
def _online(logits, highest, total):
    """Take a tile of logits into the running maximum and sum of exponentials."""
    now = tl.maximum(highest, tl.max(logits, 1))
    finite = tl.where(now == float("-inf"), 0.0, now)
    total = total * tl.exp(highest - finite)
    return now, total + tl.sum(tl.exp(logits - finite[:, None]), 1)


@triton.jit
def statistics(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row, mask_column,
    scaling, softcap, matrix_weight, heads, groups, length, keys, sinks,
    HAS_SINKS: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    bg = b * groups + h // (heads // groups)
    rows = block * ROWS + tl.arange(0, ROWS)
    query = _load(q + bh * length * dh, rows, length, dh, WIDTH)
    pruned_query = _load(p + bh * length * dh, rows, length, dh, WIDTH)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # a column of its own, dropped after the softmax
        highest = tl.zeros((ROWS,), tl.float32) + tl.load(sinks + h).to(tl.float32)
        total += 1.0
    pruned_highest, pruned_total = highest, total
    mask += b * mask_b + h * mask_h
    first, end = tl.load(ranges + 2 * block), tl.load(ranges + 2 * block + 1)
    for start in range(first // COLUMNS * COLUMNS, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = _load(k + bg * keys * dh, columns, keys, dh, WIDTH)
        logits, _ = _logits(
            query, key, mask, mask_row, mask_column, rows, columns,
            scaling, softcap, length, keys, MASKED, CAPPED,
        )  # fmt: skip
        highest, total = _online(logits, highest, total)
        key = _load(j + bg * keys * dh, columns, keys, dh, WIDTH)
        logits, _ = _logits(
            pruned_query, key, mask, mask_row, mask_column, rows, columns,
            scaling, softcap, length, keys, MASKED, CAPPED,
        )  # fmt: skip
        pruned_highest, pruned_total = _online(logits, pruned_highest, pruned_total)
    plane = tl.num_programs(1).to(tl.int64) * length
    at = statistics + bh * length + rows
    inside = rows < length
    tl.store(at, highest, inside)
    tl.store(at + plane, 1 / total, inside)
    tl.store(at + 2 * plane, pruned_highest, inside)
    tl.store(at + 3 * plane, 1 / pruned_total, inside)


@triton.jit
def _tile(
    query, pruned_query, key, pruned_key, statistics, plane,
    mask, mask_row, mask_column, rows, columns, scaling, softcap, length, keys,
    MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A~ - A, A~ and the pruned logits' slope, [rows, columns]."""
    logits, _ = _logits(
        query, key, mask, mask_row, mask_column, rows, columns,
        scaling, softcap, length, keys, MASKED, CAPPED,
    )  # fmt: skip
    pruned_logits, slope = _logits(
        pruned_query, pruned_key, mask, mask_row, mask_column, rows, columns,
        scaling, softcap, length, keys, MASKED, CAPPED,
    )  # fmt: skip
    at = statistics + rows
    inside = rows < length  # others get A = 0
    highest = tl.load(at, inside, 0.0)
    share = tl.load(at + plane, inside, 0.0)
    pruned_highest = tl.load(at + 2 * plane, inside, 0.0)
    pruned_share = tl.load(at + 3 * plane, inside, 0.0)
    dense = tl.exp(logits - highest[:, None]) * share[:, None]
    pruned = tl.exp(pruned_logits - pruned_highest[:, None]) * pruned_share[:, None]
    return pruned - dense, pruned, slope


@triton.jit
def change(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row, mask_column,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    per_row, contexts,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    bg = b * groups + h // (heads // groups)
    plane = tl.num_programs(1).to(tl.int64) * length
    rows = block * ROWS + tl.arange(0, ROWS)
    query = _load(q + bh * length * dh, rows, length, dh, WIDTH)
    pruned_query = _load(p + bh * length * dh, rows, length, dh, WIDTH)
    squares = tl.zeros((ROWS,), tl.float32)
    inner = tl.zeros((ROWS,), tl.float32)
    reached = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    context = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    mask += b * mask_b + h * mask_h
    first, end = tl.load(ranges + 2 * block), tl.load(ranges + 2 * block + 1)
    for start in range(first // COLUMNS * COLUMNS, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = _load(k + bg * keys * dh, columns, keys, dh, WIDTH)
        pruned_key = _load(j + bg * keys * dh, columns, keys, dh, WIDTH)
        change, pruned, _ = _tile(
            query, pruned_query, key, pruned_key, statistics + bh * length, plane,
            mask, mask_row, mask_column, rows, columns, scaling, softcap, length, keys,
            MASKED, CAPPED,
        )  # fmt: skip
        squares += tl.sum(change * change, 1)
        inner += tl.sum(pruned * change, 1)
        if OUTPUT:
            value = _load(v + bg * keys * dv, columns, keys, dv, VALUE_WIDTH)
            value = value.to(tl.float32)
            reached += tl.dot(change, value, input_precision="tf32x3")
            context += tl.dot(pruned, value, input_precision="tf32x3")
    inside = rows < length
    tl.store(per_row + bh * length + rows, squares, inside)
    tl.store(per_row + plane + bh * length + rows, inner, inside)
    if OUTPUT:
        within = tl.arange(0, VALUE_WIDTH)
        at = contexts + (bh * length + rows[:, None]) * dv + within[None, :]
        inside = inside[:, None] & (within[None, :] < dv)
        tl.store(at, reached, inside)
        tl.store(at + plane * dv, context, inside)


@triton.jit
def _through_softmax(
    change, pruned, slope, value, upstream, delta, scaling, matrix_weight,
    OUTPUT: tl.constexpr,
):  # fmt: skip
    """scaling * P: the gradient at the logits."""
    gradient = (2 * matrix_weight) * change
    if OUTPUT:
        gradient += tl.dot(upstream, tl.trans(value), input_precision="tf32x3")
    return pruned * (gradient - delta[:, None]) * slope * scaling


@triton.jit
def query_gradient(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row, mask_column,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    upstream, delta, found,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    bg = b * groups + h // (heads // groups)
    plane = tl.num_programs(1).to(tl.int64) * length
    rows = block * ROWS + tl.arange(0, ROWS)
    query = _load(q + bh * length * dh, rows, length, dh, WIDTH)
    pruned_query = _load(p + bh * length * dh, rows, length, dh, WIDTH)
    to_delta = tl.load(delta + bh * length + rows, rows < length, 0.0)
    back = to_delta
    if OUTPUT:
        back = _load(upstream + bh * length * dv, rows, length, dv, VALUE_WIDTH)
    gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    mask += b * mask_b + h * mask_h
    first, end = tl.load(ranges + 2 * block), tl.load(ranges + 2 * block + 1)
    for start in range(first // COLUMNS * COLUMNS, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = _load(k + bg * keys * dh, columns, keys, dh, WIDTH)
        pruned_key = _load(j + bg * keys * dh, columns, keys, dh, WIDTH)
        change, pruned, slope = _tile(
            query, pruned_query, key, pruned_key, statistics + bh * length, plane,
            mask, mask_row, mask_column, rows, columns, scaling, softcap, length, keys,
            MASKED, CAPPED,
        )  # fmt: skip
        value = pruned_key
        if OUTPUT:
            value = _load(v + bg * keys * dv, columns, keys, dv, VALUE_WIDTH)
            value = value.to(tl.float32)
        through = _through_softmax(
            change, pruned, slope, value, back, to_delta, scaling, matrix_weight, OUTPUT
        )
        gradient += tl.dot(through, pruned_key.to(tl.float32), input_precision="tf32x3")
    within = tl.arange(0, WIDTH)
    at = found + (bh * length + rows[:, None]) * dh + within[None, :]
    tl.store(at, gradient, (rows[:, None] < length) & (within[None, :] < dh))


@triton.jit
def key_gradient(
    q, p, k, j, v, statistics, ranges,
    mask, mask_b, mask_h, mask_row, mask_column,
    scaling, softcap, matrix_weight, heads, groups, length, keys,
    upstream, delta, found,
    OUTPUT: tl.constexpr, dh: tl.constexpr, dv: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    block, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // groups, bg % groups
    shared = heads // groups
    plane = tl.num_programs(1).to(tl.int64) * shared * length
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    key = _load(k + bg * keys * dh, columns, keys, dh, WIDTH)
    pruned_key = _load(j + bg * keys * dh, columns, keys, dh, WIDTH)
    value = pruned_key
    if OUTPUT:
        value = _load(v + bg * keys * dv, columns, keys, dv, VALUE_WIDTH)
        value = value.to(tl.float32)
    gradient = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for member in range(shared):
        h = g * shared + member
        bh = b * heads + h
        for row_block in range(0, tl.cdiv(length, ROWS)):
            first = tl.load(ranges + 2 * row_block)
            end = tl.load(ranges + 2 * row_block + 1)
            if (block * COLUMNS < end) & ((block + 1) * COLUMNS > first):
                rows = row_block * ROWS + tl.arange(0, ROWS)
                query = _load(q + bh * length * dh, rows, length, dh, WIDTH)
                pruned_query = _load(p + bh * length * dh, rows, length, dh, WIDTH)
                to_delta = tl.load(delta + bh * length + rows, rows < length, 0.0)
                back = to_delta
                if OUTPUT:
                    at = upstream + bh * length * dv
                    back = _load(at, rows, length, dv, VALUE_WIDTH)
                change, pruned, slope = _tile(
                    query, pruned_query, key, pruned_key, statistics + bh * length,
                    plane, mask + b * mask_b + h * mask_h, mask_row, mask_column,
                    rows, columns, scaling, softcap, length, keys, MASKED, CAPPED,
                )  # fmt: skip
                through = _through_softmax(
                    change, pruned, slope, value, back, to_delta, scaling,
                    matrix_weight, OUTPUT,
                )  # fmt: skip
                gradient += tl.dot(
                    tl.trans(through),
                    pruned_query.to(tl.float32),
                    input_precision="tf32x3",
                )
    within = tl.arange(0, WIDTH)
    at = found + (bg * keys + columns[:, None]) * dh + within[None, :]
    tl.store(at, gradient, (columns[:, None] < keys) & (within[None, :] < dh))

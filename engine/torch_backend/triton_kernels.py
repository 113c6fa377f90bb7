"""What an NVIDIA card does to int8 tokens and low-bit weights, in Triton; triton_passes.py calls it.

Compiled for each card once, on its first picture, and kept by Triton on disk. So that there are few of them: sizes that
change with the picture are not specialised, layers of all shapes share the same kernels, nothing is tuned by trying.
Strides are: a load of 16 bytes is made only where Triton knows that 16 divides them.
With TRITON_INTERPRET=1 they run in NumPy. Importing this needs triton.
"""

import triton
import triton.language as tl

PLAIN, GATED, ADDED = (tl.constexpr(number) for number in range(3))  # how a product ends
STORED, IN_TURNS, BY_THREAD, PAIRS_BY_THREAD = (tl.constexpr(number) for number in range(4))  # orders of rows
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 that is added and taken away again leaves a whole number
NEAREST_BITS = tl.constexpr(0x4B400000)
TINY = tl.constexpr(1.1754943508222875e-38)  # int8.TINY: a token of zeros has a step all the same


@triton.jit
def four_codes(codes, units, mask, BITS: tl.constexpr):
    """The codes of four neighbouring weights, unit after unit, as the low bits of an int32."""
    if BITS == 1:
        return tl.load(codes + units // 2, mask=mask, other=0).to(tl.int32) >> (units % 2 * 4).to(tl.int32)
    if BITS == 2:
        return tl.load(codes + units, mask=mask, other=0).to(tl.int32)
    return tl.load(codes.to(tl.pointer_type(tl.uint16)) + units, mask=mask, other=0).to(tl.int32)


@triton.jit
def output_at(place, ORDER: tl.constexpr, TILE: tl.constexpr):
    """Which output's weights lie at a place among a product's weights, and whether those of its second half.

    Of a gated product a tile must have both halves, and of Hopper's (gluon_kernels.py) a thread neighbours: its sums of
    32 places are the pairs 2 q, 2 q + 1 of every eight, for one q.
    """
    second = tl.zeros_like(place)
    if ORDER == IN_TURNS:  # TILE rows of the first half, their partners in the second half, the next TILE rows
        second = place // TILE % 2
        output = place // (2 * TILE) * TILE + place % TILE
    elif ORDER == BY_THREAD:
        output = place // 32 * 32 + place % 8 // 2 * 8 + place % 32 // 8 * 2 + place % 2
    elif ORDER == PAIRS_BY_THREAD:
        second = place % 2
        output = place // 64 * 32 + place % 8 // 2 * 8 + place % 64 // 8
    else:
        output = place
    return output, second


@triton.jit(do_not_specialize=["groups"])
def int8_weights(
    codes, factors, out, places, outputs, groups, ORDER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes [N, K] times their group's factor int8 [N, groups] -> int8 [places, K], four in a word; a program GROUPS
    groups of ROWS rows. Places of none of the `outputs` (of each half) are not written."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None]
    output, second = output_at(place, ORDER, TILE)
    mask = (place < places) & (output < outputs) & (group < groups)
    source = (second * outputs + output) * groups + group
    factor = tl.load(factors + source, mask=mask, other=0).to(tl.int32)[:, :, None]
    word = tl.arange(0, GROUP // 4)[None, None]
    four = four_codes(codes, source[:, :, None] * (GROUP // 4) + word, mask[:, :, None], BITS)
    negative = factor < 0
    factor = tl.abs(factor)
    # all four codes of a word at once, as its bytes: none of these sums and products reaches the next byte
    if BITS == 2:
        each = (four | four << 6 | four << 12 | four << 18) & 0x03030303
        each = tl.where(negative, 0x02020202 - each, each)
    else:
        each = (four | four << 7 | four << 14 | four << 21) & 0x01010101
        each = tl.where(negative, 0x02020202 - 2 * each, 2 * each)
    # each * factor - factor, of which a byte's highest bit is made apart, because a difference would borrow
    high = 0x7F7F7F7F
    product, factor = each * factor, factor * 0x01010101
    weights = ((product | ~high) - factor) ^ (~product & ~high)
    tl.store(out + (place * groups + group)[:, :, None] * (GROUP // 4) + word, weights, mask=mask[:, :, None])


@triton.jit(do_not_specialize=["total"])
def half_weights(
    codes, scales, biases, out, total, centre, CENTRED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes [N, K], scales and biases [N, K / GROUP] -> bfloat16 [N, K], four in a word of 64 bits; `total` groups."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    mask = group < total
    units = group.to(tl.int64) * (GROUP // 4) + tl.arange(0, GROUP // 4)[None]
    four = four_codes(codes, units, mask, BITS)
    scale = tl.load(scales + group, mask=mask, other=0).to(tl.float32)
    bias = scale * centre
    if not CENTRED:
        bias = tl.load(biases + group, mask=mask, other=0).to(tl.float32)
    word = tl.zeros(units.shape, tl.int64)
    for place in tl.static_range(4):
        code = (four >> (place * BITS)) & ((1 << BITS) - 1)
        value = (code.to(tl.float32) * scale + bias).to(tl.bfloat16).to(tl.int16, bitcast=True)
        word |= (value.to(tl.int64) & 0xFFFF) << (16 * place)
    tl.store(out + units, word, mask=mask)


@triton.jit
def store_tokens(row, x, mask, columns, chunks, values, steps, count, width):
    """A token's values x [C, n], each of its C chunks rounded to 127 steps of the chunk's largest one."""
    step = tl.maximum(tl.max(tl.abs(x), 1), TINY * 127.0) / 127.0
    whole = x * (1.0 / step)[:, None] + NEAREST - NEAREST
    tl.store(values + row.to(tl.int64) * width + columns, whole.to(tl.int8), mask=mask)
    tl.store(steps + chunks * count + row, step, mask=chunks * x.shape[1] < width)


@triton.jit(do_not_specialize=["count"])
def tokens(
    x, first, values, steps, stride, first_stride, split, count, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Rows of `first` [count, split], x [count, width - split] beside them -> int8 values [count, width] and steps
    [chunks, count]; a program BLOCK columns of a row."""
    row = tl.program_id(0)
    chunks = tl.program_id(1) * (BLOCK // CHUNK) + tl.arange(0, BLOCK // CHUNK)
    columns = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None]
    mask = columns < width
    place = x + row.to(tl.int64) * stride + (columns - split)
    given = tl.load(place, mask=mask & (columns >= split), other=0).to(tl.float32)
    place = first + row.to(tl.int64) * first_stride + columns
    given += tl.load(place, mask=columns < split, other=0).to(tl.float32)
    store_tokens(row, given, mask, columns, chunks, values, steps, count, width)


@triton.jit(do_not_specialize=["count"])
def modulated(x, scale, shift, values, steps, stride, count, width, eps, BLOCK: tl.constexpr):
    """The same of (1 + scale) * norm(x) + shift, in one chunk."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None]
    mask = columns < width
    given = tl.load(x + row.to(tl.int64) * stride + columns, mask=mask, other=0).to(tl.float32)
    centred = tl.where(mask, given - (tl.sum(given, 1) / width)[:, None], 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
    more = tl.load(scale + columns, mask=mask, other=0).to(tl.float32)
    added = tl.load(shift + columns, mask=mask, other=0).to(tl.float32)
    modulated = tl.where(mask, normed * (1.0 + more) + added, 0.0)
    store_tokens(row, modulated, mask, columns, tl.arange(0, 1), values, steps, count, width)


@triton.jit
def pairs(source, place, mask, SIZE: tl.constexpr, APART: tl.constexpr):
    """Features as float32, the first and the second of every pair: one half and the other, or neighbours in a word."""
    if APART:
        first = tl.load(source + place, mask=mask, other=0).to(tl.float32)
        second = tl.load(source + place + SIZE // 2, mask=mask, other=0).to(tl.float32)
    else:
        word = tl.load(source + place, mask=mask, other=0)
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -65536).to(tl.float32, bitcast=True)
    return first, second


@triton.jit(do_not_specialize=["heads"])
def turned(
    x, weight, cos, sin, out, stride, out_row, out_head, heads, eps, SIZE: tl.constexpr, HEADS: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """RMS norm of every head of x [count, heads, SIZE], its pairs turned by their token's angle; a program a row. A
    pair are a feature and the one half a head further (APART) or neighbours, of which x, weight and out are words."""
    row = tl.program_id(0)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, SIZE // 2)[None]
    mask = head < heads
    unit = SIZE if APART else SIZE // 2
    real, imag = pairs(x, row.to(tl.int64) * stride + head * unit + pair, mask, SIZE, APART)
    scale = tl.rsqrt(tl.sum(real * real + imag * imag, 1) / SIZE + eps)[:, None]
    more, also = pairs(weight, pair, pair < SIZE, SIZE, APART)
    real, imag = real * scale * more, imag * scale * also
    c = tl.load(cos + row * (SIZE // 2) + pair)
    s = tl.load(sin + row * (SIZE // 2) + pair)
    first, second = (real * c - imag * s).to(tl.bfloat16), (imag * c + real * s).to(tl.bfloat16)
    place = out + row.to(tl.int64) * out_row + head * out_head + pair
    if APART:
        tl.store(place, first, mask=mask)
        tl.store(place + SIZE // 2, second, mask=mask)
    else:
        low = first.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        tl.store(place, low | second.to(tl.int16, bitcast=True).to(tl.int32) << 16, mask=mask)


@triton.jit
def finish(product, rows, columns, limit, w_steps, gates, out, stride, mask, END: tl.constexpr):
    """Products in steps of their weights -> what they are worth, stored, or added to what is there."""
    inside = mask[:, None] & (columns < limit)[None]
    product *= tl.load(w_steps + columns, mask=columns < limit, other=0)[None]
    place = out + rows.to(tl.int64)[:, None] * stride + columns[None]
    if END == ADDED:
        gate = tl.load(gates + columns, mask=columns < limit, other=0).to(tl.float32)
        product = tl.load(place, mask=inside, other=0).to(tl.float32) + gate[None] * product
    tl.store(place, product, mask=inside)


@triton.jit
def corner(tile, down, across, M: tl.constexpr, N: tl.constexpr, BAND: tl.constexpr):
    """A tile's first row and column: bands of BAND tiles down share their weights in the L2 cache."""
    band = tile // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inner = tile % (BAND * across)
    return (band * BAND + inner % height) * M, inner // height * N


@triton.jit
def operand(source, first, rows, k, inputs, TMA: tl.constexpr, K: tl.constexpr):
    """The k-th K inputs of the rows from `first` on, or of `rows`, from a descriptor (TMA) or an address."""
    if TMA:
        part = source.load([first, k * K])
    else:  # inputs are a multiple of K
        part = tl.load(source + rows[:, None] * inputs + k * K + tl.arange(0, K)[None])
    return part


@triton.jit(do_not_specialize=["tokens"])
def product(
    x, w, steps, w_steps, gates, out, tokens, outputs, inputs, stride, END: tl.constexpr, TMA: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """int8 tokens [tokens, inputs] times int8 weights [outputs, inputs] -> out [tokens, outputs], a tile a program.

    x and w are descriptors (TMA) or addresses. `outputs` counts what is written: for GATED, half of what `w` has, whose
    rows take turns (see `output_at`).
    """
    down = tl.cdiv(tokens, M)
    across = tl.cdiv(outputs, N // 2 if END == GATED else N)
    top, left = corner(tl.program_id(0), down, across, M, N, BAND)
    rows = top + tl.arange(0, M)
    mask = rows < tokens
    here = tl.where(mask, rows, 0)  # beyond is nothing to read
    most = across * N if END == GATED else outputs
    there = left + tl.arange(0, N)
    there = tl.where(there < most, there, 0)
    sums = tl.zeros((M, N), tl.int32)
    for k in range(tl.cdiv(inputs, K)):
        a = operand(x, top, here, k, inputs, TMA, K)
        b = operand(w, left, there, k, inputs, TMA, K)
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    step = tl.load(steps + rows, mask=mask, other=0)[:, None]
    # in halves, because all of a tile's results at once don't fit into the registers
    first, second = tl.split(tl.permute(tl.reshape(sums, (M, 2, N // 2)), (0, 2, 1)))
    if END == GATED:
        columns = left // 2 + tl.arange(0, N // 2)
        within = columns < outputs
        gate = first.to(tl.float32) * step * tl.load(w_steps + columns, mask=within, other=0)[None]
        value = second.to(tl.float32) * step * tl.load(w_steps + outputs + columns, mask=within, other=0)[None]
        place = out + rows.to(tl.int64)[:, None] * stride + columns[None]
        tl.store(place, gate * tl.sigmoid(gate) * value, mask=mask[:, None] & within[None])
    else:
        columns = left + tl.arange(0, N // 2)
        finish(first.to(tl.float32) * step, rows, columns, outputs, w_steps, gates, out, stride, mask, END)
        columns += N // 2
        finish(second.to(tl.float32) * step, rows, columns, outputs, w_steps, gates, out, stride, mask, END)


@triton.jit(do_not_specialize=["tokens"])
def chunked_product(
    x, w, steps, w_steps, gates, out, tokens, outputs, inputs, stride, END: tl.constexpr, TMA: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """The same where tokens have a step for every K of their inputs (at most 512), steps [chunks, tokens]. Not GATED.

    A chunk's sums stay under 2^23, so they are counted from a float32's NEAREST: their bits are that float32 already,
    and no conversion is needed, of which a card does a quarter as many as of additions.
    """
    down = tl.cdiv(tokens, M)
    top, left = corner(tl.program_id(0), down, tl.cdiv(outputs, N), M, N, BAND)
    rows = top + tl.arange(0, M)
    columns = left + tl.arange(0, N)
    mask = rows < tokens
    here = tl.where(mask, rows, 0)
    there = tl.where(columns < outputs, columns, 0)
    product = tl.zeros((M, N), tl.float32)
    for k in range(inputs // K):
        step = tl.load(steps + k * tokens + rows, mask=mask, other=0)[:, None]
        a = operand(x, top, here, k, inputs, TMA, K)
        b = operand(w, left, there, k, inputs, TMA, K)
        sums = tl.dot(a, b.T, tl.full((M, N), NEAREST_BITS, tl.int32), out_dtype=tl.int32)
        product += (sums.to(tl.float32, bitcast=True) - NEAREST) * step
    finish(product, rows, columns, outputs, w_steps, gates, out, stride, mask, END)

"""int8 products on Hopper cards (H100, H200) in Gluon, Triton's language a level below; triton_passes.py calls them.

A program stays and makes one tile of the results after the other. One of its warps does nothing but fetch tokens and
weights into a ring of STAGES; two groups of four warps each multiply their half of a tile's tokens as soon as a stage
is there, hand it back, and write their results from the registers that the products were summed in, while the next
tile's first stages already arrive. Triton's own kernels fetch, multiply and write by turns.

wgmma leaves a thread pairs of neighbouring sums, eight places apart. So the rows of the weights come in an order in
which eight of a thread's sums are neighbours (`output_at` in triton_kernels.py): 16 bytes that are stored at once.

Importing this needs triton, 3.6 or newer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from engine.torch_backend import triton_kernels
from engine.torch_backend.triton_kernels import ADDED, GATED

EIGHT = gl.constexpr(8)  # results that a thread writes at once

corner = gluon.jit(triton_kernels.corner.fn)


@gluon.constexpr_function
def sums_layout():
    """Of sums [64, N] in the registers of four warps, as wgmma leaves them."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])


@gluon.constexpr_function
def results_layout(columns):
    """Of results [64, columns] in the same registers, where they are: eight neighbours a thread."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    registers += [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def fetch(x, w, ring, sizes, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, BAND: gl.constexpr):
    """One warp: both halves' tokens and the weights of every K inputs of every tile, as stages become free."""
    values, weights, ready, free = ring
    down, across, _, fetched = sizes
    STAGES: gl.constexpr = weights.shape[0]
    turn = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        top, left = corner(tile, down, across, M, N, BAND)
        for k in range(0, fetched, K):  # beyond the last token, output or input come zeros
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), (turn // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (M + N) * K)
            tma.async_copy_global_to_shared(x, [top, k], ready.index(stage), values.index(2 * stage))
            tma.async_copy_global_to_shared(x, [top + M // 2, k], ready.index(stage), values.index(2 * stage + 1))
            tma.async_copy_global_to_shared(w, [left, k], ready.index(stage), weights.index(stage))
            turn += 1


@gluon.jit
def multiply(
    ring, sizes, steps, ends, tokens, HALF: gl.constexpr, END: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, CHUNK: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """Four warps: HALF 0 or 1 of the tokens of every tile."""
    down, across, inputs, fetched = sizes
    turn = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        top, left = corner(tile, down, across, M, N, BAND)
        rows = top + HALF * (M // 2) + gl.arange(0, M // 2, gl.SliceLayout(1, sums_layout()))
        if CHUNK:
            product = summed_by_chunk(ring, steps + rows, rows < tokens, tokens, inputs, turn, HALF, K, CHUNK)
        else:
            sums = summed(ring, inputs, turn, HALF, K)
            product = sums.to(gl.float32) * gl.load(steps + rows, mask=rows < tokens, other=0)[:, None]
        turn += fetched // K
        finish(product, ends, top + HALF * (M // 2), left, tokens, END)


@gluon.jit
def summed(ring, inputs, turn, HALF: gl.constexpr, K: gl.constexpr):
    """int32 [M / 2, N] over all inputs. While a stage is multiplied the next one is already queued behind it."""
    values, weights, ready, free = ring
    STAGES: gl.constexpr = weights.shape[0]
    sums = gl.full([values.shape[1], weights.shape[1]], 0, gl.int32, sums_layout())
    for k in range(0, inputs, K):
        stage = turn % STAGES
        mbarrier.wait(ready.index(stage), turn // STAGES & 1)
        tile = values.index(2 * stage + HALF)
        flying = warpgroup_mma(tile, weights.index(stage).permute((1, 0)), sums, use_acc=k > 0, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(flying,))
        if k > 0:
            mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES))
        turn += 1
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES))
    return sums


@gluon.jit
def summed_by_chunk(
    ring, steps, mask, tokens, inputs, turn, HALF: gl.constexpr, K: gl.constexpr, CHUNK: gl.constexpr
):
    """float32 [M / 2, N], in the tokens' steps: one for every CHUNK inputs, `tokens` further each. Two chunks at a
    time: while the first one's integers become floats, the second is multiplied. Both end before the next two begin,
    because ptxas makes warps wait for every single product where sums are on their way at the loop's end."""
    values, weights, _, free = ring
    STAGES: gl.constexpr = weights.shape[0]
    PARTS: gl.constexpr = CHUNK // K
    first = gl.full([values.shape[1], weights.shape[1]], 0, gl.int32, sums_layout())
    second = gl.full([values.shape[1], weights.shape[1]], 0, gl.int32, sums_layout())
    product = gl.full([values.shape[1], weights.shape[1]], 0, gl.float32, sums_layout())
    for k in range(0, inputs, 2 * CHUNK):
        step = gl.load(steps, mask=mask, other=0)
        next_step = gl.load(steps + tokens, mask=mask & (k + CHUNK < inputs), other=0)
        flying = chunk(ring, first, turn, HALF, PARTS)
        also = chunk(ring, second, turn + PARTS, HALF, PARTS)
        first = warpgroup_mma_wait(PARTS, deps=(flying,))
        for part in gl.static_range(PARTS):
            mbarrier.arrive(free.index((turn + part) % STAGES))
        product += first.to(gl.float32) * step[:, None]
        second = warpgroup_mma_wait(0, deps=(also,))
        for part in gl.static_range(PARTS):
            mbarrier.arrive(free.index((turn + PARTS + part) % STAGES))
        product += second.to(gl.float32) * next_step[:, None]
        turn += 2 * PARTS
        steps += 2 * tokens
    return product


@gluon.jit
def chunk(ring, sums, turn, HALF: gl.constexpr, PARTS: gl.constexpr):
    """Queue the product of the next PARTS stages, over what was in `sums`."""
    values, weights, ready, _ = ring
    STAGES: gl.constexpr = weights.shape[0]
    for part in gl.static_range(PARTS):
        stage = (turn + part) % STAGES
        mbarrier.wait(ready.index(stage), (turn + part) // STAGES & 1)
        tile = values.index(2 * stage + HALF)
        sums = warpgroup_mma(tile, weights.index(stage).permute((1, 0)), sums, use_acc=part > 0, is_async=True)
    return sums


@gluon.jit
def finish(product, ends, top, left, tokens, END: gl.constexpr):
    """Products [M / 2, N] in steps of their weights -> what they are worth, stored, gated or added to what is there."""
    w_steps, gates, out, outputs, stride = ends
    M: gl.constexpr = product.shape[0]
    N: gl.constexpr = product.shape[1] // (2 if END == GATED else 1)
    layout: gl.constexpr = results_layout(N)
    rows = top + gl.arange(0, M, gl.SliceLayout(1, layout))
    columns = left // (2 if END == GATED else 1) + gl.arange(0, N, gl.SliceLayout(0, layout))
    within = columns < outputs
    mask = (rows < tokens)[:, None] & within[None, :]
    place = out + rows.to(gl.int64)[:, None] * stride + columns[None, :]
    step = gl.load(w_steps + columns, mask=within, other=0)[None, :]
    if END == GATED:
        turned = product.reshape([M, N // 32, EIGHT, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([M, N, 2])
        gate, value = turned.split()
        gate = gl.convert_layout(gate, layout, assert_trivial=True) * step
        step = gl.load(w_steps + outputs + columns, mask=within, other=0)[None, :]
        value = gl.convert_layout(value, layout, assert_trivial=True) * step
        result = gate / (1.0 + gl.exp(-gate)) * value
    else:
        turned = product.reshape([M, N // 32, EIGHT // 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([M, N])
        result = gl.convert_layout(turned, layout, assert_trivial=True) * step
        if END == ADDED:
            gate = gl.load(gates + columns, mask=within, other=0).to(gl.float32)
            result = gl.load(place, mask=mask, other=0).to(gl.float32) + gate[None, :] * result
    gl.store(place, result.to(gl.bfloat16), mask=mask)


@gluon.jit(do_not_specialize=["tokens"])
def product(
    x, w, steps, w_steps, gates, out, tokens, outputs, inputs, stride, END: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """int8 tokens [tokens, inputs] times int8 weights [outputs, inputs] -> bfloat16 out [tokens, outputs].

    x and w are descriptors of [M / 2, K] and [N, K]; `outputs` counts what is written. Tokens have a step each or, with
    CHUNK, one for so many inputs, steps [inputs / CHUNK, tokens].
    """
    values = gl.allocate_shared_memory(gl.int8, [2 * STAGES, M // 2, K], x.layout)
    weights = gl.allocate_shared_memory(gl.int8, [STAGES, N, K], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    ring = values, weights, ready, free
    UNIT: gl.constexpr = 2 * CHUNK if CHUNK else K
    fetched = gl.cdiv(inputs, UNIT) * UNIT
    sizes = gl.cdiv(tokens, M), gl.cdiv(outputs, N // 2 if END == GATED else N), inputs, fetched
    ends = w_steps, gates, out, outputs, stride
    gl.warp_specialize(
        [
            (multiply, (ring, sizes, steps, ends, tokens, 0, END, M, N, K, CHUNK, BAND)),
            (multiply, (ring, sizes, steps, ends, tokens, 1, END, M, N, K, CHUNK, BAND)),
            (fetch, (x, w, ring, sizes, M, N, K, BAND)),
        ],
        [4, 1],  # warps beside the first group's four, and the registers of their threads
        [240, 24],
    )

"""Programmatic dependent launch: a kernel starts while the one before it still runs, and has its weights on their way.

From sm_90 on, NVIDIA's GPUs can start a grid before the grid ahead of it in the stream has finished. What the launch
costs and the first trip to memory then pass beside work. It changes no value, by these rules:

1. Every program of every kernel that ``launch`` runs calls ``wait_for_previous`` before it reads or writes memory.
   Until then it may only ask for lines to be brought into the L2 cache: of weights, which no kernel writes, and, in
   attention, of keys and values. No value of theirs reaches a register, and all writes go through that cache, so what
   is read later is current even if it has just changed. Where keys lie attention reads from what was written two
   launches ago or earlier, past the L1 cache; by rules 2 and 3 that has finished.
2. The wait ends when the kernel before has finished altogether and what it wrote can be seen. That one has waited in
   its turn, so whatever came earlier has finished too: a buffer may be reused two kernels later. A kernel that would
   not wait would break this for those behind it, which is why all do, torch's by an ordinary launch.
3. A program lets the next kernel start after its own wait, never before. So at most two kernels are under way, and
   the next one starts when all programs of this one are resident or gone, tensor memory included: it takes no room
   from a program that is yet to start. ``kernels.gpu.arrival`` counts programs and never waits for one, so none can
   starve another.

Where the launch is an ordinary one, on other GPUs and in Triton's interpreter, all this compiles to nothing.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = tl.constexpr(128)  # bytes that one request brings into the L2 cache
# Bytes that one program asks for: 132 of them are what memory delivers in two microseconds, and the wait is no longer.
MOST_BYTES = tl.constexpr(64 * 1024)


def starts_early(_semantic=None) -> bool:
    """In a kernel: whether this launch may start before the one ahead of it has finished, known when compiled."""
    return tl.constexpr(_semantic is not None and getattr(_semantic.builder.options, "launch_pdl", False))


starts_early.__triton_builtin__ = True  # unlike tl.core.builtin this lets the interpreter call it as it is


@triton.jit
def wait_for_previous():
    """The first thing that a program does to memory comes after this; see the rules above."""
    if starts_early():
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(base_ptr, row, start, ROWS: tl.constexpr, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Ask for ``base[row, start : start + COUNT]``, or its first part, in the L2 cache; row int64 [any], below ROWS."""
    LENGTH: tl.constexpr = LINE // (base_ptr.dtype.element_ty.primitive_bitwidth // 8)
    # Not ``tl.cdiv``: in Triton 3.6 its result is no constant to calculate with.
    ALL: tl.constexpr = (COUNT + LENGTH - 1) // LENGTH
    MOST: tl.constexpr = MOST_BYTES // LINE // row.shape[0]
    LINES: tl.constexpr = MOST if MOST < ALL else ALL
    line = tl.arange(0, triton.next_power_of_2(LINES))[None, :]
    column = start + line * LENGTH
    mask = (row < ROWS)[:, None] & (line < LINES) & (column < STRIDE)
    address = (base_ptr + row[:, None] * STRIDE + column).to(tl.int64)
    _prefetch(address, mask)


@triton.jit
def prefetch_keys(
    k_head_ptr,
    v_head_ptr,
    page_table_ptr,
    sequences_ptr,
    positions_ptr,
    tail_slots_ptr,
    first,  # row of the block, or of the tails
    num_slots,
    stride_table,
    part,
    C: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Ask for the keys and values of a part's first window, or of a row's tail, in the L2 cache, before the wait.

    Where they lie was written at least two launches ago in a pass, and so has been by rules 2 and 3; slots of a
    ``route`` that comes right before may still be anything. What the launch before is about to write, the newest rows,
    is asked for in vain.
    """
    sequence = tl.load(sequences_ptr + first, cache_modifier=".cg")
    position = tl.load(positions_ptr + first, cache_modifier=".cg")
    end = tl.maximum(position - DEPTH, 0) // ALIGNMENT * ALIGNMENT
    lane = tl.arange(0, WINDOW)
    place, of_tail = part * WINDOW + lane, part >= PARTS
    page_ptr = page_table_ptr + sequence * stride_table + place // PAGE_SIZE
    found_ptr = tl.where(of_tail, tail_slots_ptr + first * LANES + lane, page_ptr)
    exists = tl.where(of_tail, lane < LANES, place < end)
    found = tl.load(found_ptr, mask=exists, other=0, cache_modifier=".cg")
    slot = tl.where(of_tail, found, found * PAGE_SIZE + place % PAGE_SIZE)
    live = exists & (slot >= PAGE_SIZE) & (slot < num_slots)
    _prefetch_lines(k_head_ptr, slot.to(tl.int64) * C, live, D)
    _prefetch_lines(v_head_ptr, slot.to(tl.int64) * C, live, D)


@triton.jit
def _prefetch_lines(base_ptr, offs, mask, COUNT: tl.constexpr):
    """Ask for ``base[offs : offs + COUNT]`` in the L2 cache, each of ``offs`` int64 [any] where ``mask`` says so."""
    LENGTH: tl.constexpr = LINE // (base_ptr.dtype.element_ty.primitive_bitwidth // 8)
    for start in tl.static_range(0, COUNT, LENGTH):
        _prefetch((base_ptr + offs + start).to(tl.int64), mask)


@triton.jit
def _prefetch(address, mask):
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )

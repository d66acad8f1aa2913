"""How the programs of a launch learn which of them comes last, and then sees what all of them have stored."""

import triton
import triton.language as tl


@triton.jit
def arrive(arrival_ptr, AMD: tl.constexpr):
    """Count this program in, once all it has stored is on its way to memory; returns how many came before it.

    On NVIDIA the barrier and the atomic's release together publish the stores of all warps. On AMD a release covers the
    stores of its own wave alone, so each wave waits for its own before the barrier.
    """
    if AMD:
        lane = tl.arange(0, 64)
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [lane], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    return tl.atomic_add(arrival_ptr, 1, sem="acq_rel")

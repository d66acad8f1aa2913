"""What a phase of a persistent kernel costs beside a launch of its own: the experiment behind phases-dfab1a0.txt.

A phase is a product of 16 rows with weights [4224, 1024] in bfloat16, 32 outputs a program, 132 programs, each phase
with weights of its own and the rows that the one before has written. "launches" is a kernel a phase in a CUDA graph,
with programmatic dependent launch ("pdl": weights are asked for before the wait) or without. "persistent" is one
cooperative kernel with a barrier of atomics between phases: 0 plain, 1 asks for the next weights before the barrier,
"registers" loads them into registers before it, "barriers only" has no product. Tidied since it ran, and not run again.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PROGRAMS, OUT, K, PHASES = 132, 32, 1024, 64
M = PROGRAMS * OUT


@triton.jit
def barrier(counter_ptr, goal):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < goal:
        pass
    tl.debug_barrier()


@triton.jit
def prefetch(ptr, OUT: tl.constexpr, K: tl.constexpr):
    address = (ptr + tl.arange(0, OUT * K // 64) * 64).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def phase(x_ptr, w_ptr, y_ptr, pid, OUT: tl.constexpr, K: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr):
    r, n = tl.arange(0, 16), pid * OUT + tl.arange(0, OUT)
    acc = tl.zeros((16, OUT), tl.float32)
    for k0 in range(0, K, STEP):
        k = k0 + tl.arange(0, STEP)
        w = tl.load(w_ptr + n[None, :] * K + k[:, None], eviction_policy="evict_first")
        x = tl.load(x_ptr + r[:, None] * M + k[None, :], cache_modifier=".cg")
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + r[:, None] * M + n[None, :], (acc * 0.05).to(tl.bfloat16))


@triton.jit
def single(
    x_ptr, w_ptr, y_ptr, OUT: tl.constexpr, K: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        prefetch(w_ptr + tl.program_id(0) * OUT * K, OUT, K)
        gdc_wait()
        gdc_launch_dependents()
    phase(x_ptr, w_ptr, y_ptr, tl.program_id(0), OUT, K, M, STEP)


@triton.jit
def persistent(
    x_ptr,
    w_ptr,
    counter_ptr,
    phases,
    OUT: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    STEP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MODE: tl.constexpr,  # 0 plain, 1 prefetch, 2 registers, 3 barriers only
):
    pid = tl.program_id(0)
    r, n = tl.arange(0, 16), pid * OUT + tl.arange(0, OUT)
    if MODE == 2:
        k = tl.arange(0, K)
        offs = n[None, :] * K + k[:, None]
        w = tl.load(w_ptr + offs, eviction_policy="evict_first")
    for p in range(phases):
        src, dst = x_ptr + (p % 2) * 16 * M, x_ptr + ((p + 1) % 2) * 16 * M
        base = w_ptr + p.to(tl.int64) * M * K
        if MODE == 2:
            x = tl.load(src + r[:, None] * M + k[None, :], cache_modifier=".cg")
            acc = tl.dot(x, w)
            w = tl.load(base + M * K + offs, eviction_policy="evict_first")
            tl.store(dst + r[:, None] * M + n[None, :], (acc * 0.05).to(tl.bfloat16))
        elif MODE < 2:
            phase(src, base, dst, pid, OUT, K, M, STEP)
            if MODE == 1:
                prefetch(base + M * K + pid * OUT * K, OUT, K)
        barrier(counter_ptr, (p + 1) * PROGRAMS)


def main() -> None:
    w = torch.randn(PHASES + 1, M, K, device="cuda").to(torch.bfloat16)
    start = torch.randn(2, 16, M, device="cuda").to(torch.bfloat16)
    wanted = start.clone()
    for p in range(PHASES):
        wanted[(p + 1) % 2] = ((wanted[p % 2][:, :K] @ w[p].T).float() * 0.05).to(torch.bfloat16)
    x, counter = start.clone(), torch.zeros(1, dtype=torch.int32, device="cuda")

    def report(name: str, run) -> None:
        def fresh():
            x.copy_(start)
            counter.zero_()
            run()

        fresh()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            fresh()
        times = []
        for _ in range(12):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) * 1e3 / PHASES)
        mine, theirs = x[PHASES % 2].float(), wanted[PHASES % 2].float()
        error = ((mine - theirs).norm() / theirs.norm()).item()
        floor = M * K * 2 / 4.25e6
        print(f"{name:40s} {sorted(times)[6]:.2f} us a phase (floor {floor:.2f}), error {error:.3g}", flush=True)

    def launches(step: int, pdl: bool, **options) -> None:
        options |= {"launch_pdl": True} if pdl else {}
        for p in range(PHASES):
            single[(PROGRAMS,)](x[p % 2], w[p], x[(p + 1) % 2], OUT, K, M, step, pdl, **options)

    def together(step: int, mode: int, **options) -> None:
        options["launch_cooperative_grid"] = True
        persistent[(PROGRAMS,)](x, w, counter, PHASES, OUT, K, M, step, PROGRAMS, mode, **options)

    for step, stages, warps in ((128, 4, 4), (256, 3, 4), (256, 3, 8), (128, 6, 8)):
        options, name = {"num_warps": warps, "num_stages": stages}, f"step {step} s{stages} w{warps}"
        for pdl in (False, True):
            report(f"launches {name} pdl {pdl}", lambda s=step, p=pdl, o=options: launches(s, p, **o))
        for mode in (0, 1):
            report(f"persistent {mode} {name}", lambda s=step, m=mode, o=options: together(s, m, **o))
    for warps in (4, 8, 16):
        for mode, what in ((2, ""), (3, "barriers only")):
            run = lambda m=mode, o={"num_warps": warps, "num_stages": 1}: together(128, m, **o)  # noqa: E731
            report(f"persistent registers {what} w{warps}", run)


if __name__ == "__main__":
    main()

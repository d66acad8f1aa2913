"""The state of a generation before its first iteration, and where it lives."""

import torch

from kernels.layout import EOS_CAPACITY, RECORD, RUNNING, Chain, Progress


def new_progress(
    prompt: list[int],
    end: int,  # length at which the generation ends
    max_depth: int,
    contexts: list[int],  # positions that each stage can be fed, the oracle last
    eos_token_ids: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Progress:
    """The state before the first iteration. The last token is drawn and never fed, so ``end`` may be one more than the
    oracle's positions; up to there neither it nor the prompt changes a shape."""

    def column(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    text = prompt + [0] * (max(contexts[-1] + 1, end) - len(prompt))
    deepest = min(max_depth, end - len(prompt) - 1)
    reach = [min(deepest - 1, context - len(prompt)) for context in contexts[:-1]] + [deepest]
    return Progress(
        text=column(text),
        length=column([len(prompt)]),
        end=column([end]),
        reach=column([[value, 0, 0, 0] for value in reach]),
        contexts=column(contexts),
        max_depth=column([max_depth]),
        eos=column([*eos_token_ids] + [-1] * (EOS_CAPACITY - len(eos_token_ids))),
        state=column([RUNNING]),
        record=column([0] * RECORD),
    )


def new_seed(seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The words of a 64-bit ``seed`` as the draws read them: int32 [2], low one first."""
    words = [seed & 0xFFFFFFFF, seed >> 32]
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32, device=device)


def new_chain(
    tables: list[torch.Tensor], node_slots: list[torch.Tensor], cached_lens: list[int], device="cpu"
) -> Chain:
    """The caches of a generation from the slots that each stage leased: int32 [positions] and [M] per stage."""
    width = -(-max(len(table) for table in tables) // 16) * 16  # rows start at multiples of 16 bytes
    padded = torch.zeros(len(tables), width, dtype=torch.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    slots = torch.stack(node_slots)
    lens = torch.tensor(cached_lens, dtype=torch.int32)
    return Chain(*(column.to(device) for column in (padded, slots, torch.zeros_like(slots), lens)))


def state_device(device: torch.device) -> torch.device:
    """Where trees, progress and chains live for a model on ``device``: the twins keep them on the host."""
    return torch.device("cpu")


def capturable(device: torch.device) -> bool:
    """Whether an iteration on ``device`` can be captured in a CUDA graph; the twins work on the host."""
    return False

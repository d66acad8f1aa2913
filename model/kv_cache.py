"""Paged KV cache: who owns which page, and where every committed position and every tree node keeps its K/V.

Bookkeeping lives on the host. Positions of a sequence are contiguous from 0 and found through its page table. Tree
nodes get slots of their own (``reserve``) that are either turned into the next positions (``commit``) or given back
(``release``). With one token per page a commit relinks the page and moves nothing; with larger pages it moves rows.
"""

import torch

from kernels.layout import NULL_PAGE


class PagesExhausted(RuntimeError):
    """More pages were needed than are free."""


class PagedKVCache:
    """K and V of all layers, ``[L, pages * S, H, D]`` each, for ``num_sequences`` sequences.

    Page 0 is the null page: always zero, never handed out. Slot = page * S + offset. Free + used = total holds after
    every call; ``check`` asserts it.
    """

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        head_dim: int,
        n_positions: int,
        num_pages: int,
        page_size: int = 1,
        num_sequences: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        shape = (n_layer, (num_pages + 1) * page_size, n_head, head_dim)
        with torch.inference_mode(False):  # a cache made inside inference mode is also written to outside of it
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
            self.layers = list(zip(self.k, self.v, strict=True))  # views, one pair a layer
            pages_per_sequence = -(-n_positions // page_size)
            self._table = torch.full((num_sequences, pages_per_sequence), NULL_PAGE, dtype=torch.int32)
            self.page_table = self._table if str(device) == "cpu" else self._table.to(device)
        self.page_size, self.num_pages, self.n_positions = page_size, num_pages, n_positions
        self.cached_len = [0] * num_sequences
        self._free = list(range(num_pages, 0, -1))
        self._reserved: dict[int, set[int]] = {}  # page -> slots of it that tree nodes hold

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_free_slots(self) -> int:
        """How many tree nodes ``reserve`` can still place."""
        return len(self._free) * self.page_size

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise PagesExhausted(f"needed {count} KV pages of {self.page_size} tokens, {len(self._free)} are free")
        pages = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return pages

    def append(self, count: int, sequence: int = 0) -> torch.Tensor:
        """Extend ``sequence`` by ``count`` positions whose K/V the next pass writes: their slots, int32 [count]."""
        start, size = self.cached_len[sequence], self.page_size
        if start + count > self.n_positions:
            raise ValueError(f"{start} + {count} positions exceed the context of {self.n_positions}")
        first, last = -(-start // size), -(-(start + count) // size)
        if last > first:
            pages = torch.tensor(self._take(last - first), dtype=torch.int32)
            self._table[sequence, first:last] = pages
            self._upload(sequence, first, last)
        self.cached_len[sequence] = start + count
        return self.slots(start, start + count, sequence)

    def slots(self, start: int, end: int, sequence: int = 0) -> torch.Tensor:
        """Slots of the committed positions [start, end): int32, on the host."""
        positions = torch.arange(start, end, dtype=torch.int32)
        return self._table[sequence, positions // self.page_size] * self.page_size + positions % self.page_size

    def reserve(self, count: int) -> torch.Tensor:
        """Slots for ``count`` tree nodes: int32 [count], on the host. Raises PagesExhausted."""
        size = self.page_size
        pages = self._take(-(-count // size))
        slots = [page * size + offset for page in pages for offset in range(size)][:count]
        for slot in slots:
            self._reserved.setdefault(slot // size, set()).add(slot)
        return torch.tensor(slots, dtype=torch.int32)

    def release(self, slots: list[int]) -> None:
        """Give back slots of tree nodes; a page is free again when all its slots are."""
        for slot in slots:
            page = slot // self.page_size
            held = self._reserved.get(page, set())
            assert slot in held, f"slot {slot} is not reserved"
            held.remove(slot)
            if not held:
                del self._reserved[page]
                self._free.append(page)

    def commit(self, slots: list[int], sequence: int = 0) -> None:
        """Make tree nodes' rows the next positions of ``sequence``, in order; their reservations end."""
        start = self.cached_len[sequence]
        if start + len(slots) > self.n_positions:
            raise ValueError(f"{start} + {len(slots)} positions exceed the context of {self.n_positions}")
        if self.page_size == 1:
            for slot in slots:
                del self._reserved[slot]
            end = start + len(slots)
            self._table[sequence, start:end] = torch.tensor(slots, dtype=torch.int32)
            self._upload(sequence, start, end)
            self.cached_len[sequence] = end
        elif slots:
            target = self.append(len(slots), sequence).to(self.k.device)
            source = torch.tensor(slots, device=self.k.device)
            self.k[:, target] = self.k[:, source]
            self.v[:, target] = self.v[:, source]
            self.release(slots)

    def _upload(self, sequence: int, first: int, last: int) -> None:
        if self.page_table is not self._table:
            self.page_table[sequence, first:last] = self._table[sequence, first:last].to(self.page_table.device)

    def reset(self) -> None:
        """Give every page back."""
        self._free = list(range(self.num_pages, 0, -1))
        self._reserved.clear()
        self._table.fill_(NULL_PAGE)
        if self.page_table is not self._table:
            self.page_table.fill_(NULL_PAGE)
        self.cached_len = [0] * len(self.cached_len)

    def check(self) -> None:
        """Assert the invariants: every page free, reserved or linked exactly once; tables filled up to their length."""
        linked = []
        for sequence, length in enumerate(self.cached_len):
            used = -(-length // self.page_size)
            pages = self._table[sequence].tolist()
            assert NULL_PAGE not in pages[:used], f"sequence {sequence}: hole below position {length}"
            assert set(pages[used:]) <= {NULL_PAGE}, f"sequence {sequence}: pages linked beyond position {length}"
            linked += pages[:used]
        owned = sorted([*self._free, *self._reserved, *linked])
        assert owned == list(range(1, self.num_pages + 1)), f"free + used != total: {len(owned)} of {self.num_pages}"
        null = slice(0, self.page_size)
        assert not self.k[:, null].any() and not self.v[:, null].any(), "the null page was written"

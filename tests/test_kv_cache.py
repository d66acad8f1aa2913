"""The paged cache loses no page, hands none out twice, and keeps every row where its owner will look for it."""

import copy
import random

import pytest
import torch

from kernels.layout import NULL_PAGE
from model.kv_cache import PagedKVCache, PagesExhausted

PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 4, 16])


def new_cache(page_size: int, num_pages: int = 12, num_sequences: int = 1, n_positions: int = 64) -> PagedKVCache:
    return PagedKVCache(2, 1, 4, n_positions, num_pages, page_size, num_sequences)


def write(cache: PagedKVCache, slots: torch.Tensor, values: list[float]) -> None:
    """Mark the rows at ``slots`` as a pass would: K holds the value, V its negative, in every layer."""
    marks = torch.tensor(values)[:, None, None].expand(-1, *cache.k.shape[2:])
    cache.k[:, slots] = marks
    cache.v[:, slots] = -marks


def marks(cache: PagedKVCache, slots: torch.Tensor) -> list[float]:
    """The values at ``slots``, after a look at both layers, K and V."""
    rows = torch.cat([cache.k[:, slots], -cache.v[:, slots]])  # [2 L, n, H, D]
    assert (rows == rows[:1, :, :1, :1]).all(), "K and V, layers or lanes of a row disagree"
    return rows[0, :, 0, 0].tolist()


def text_of(cache: PagedKVCache, sequence: int = 0) -> list[float]:
    return marks(cache, cache.slots(0, cache.cached_len[sequence], sequence))


def snapshot(cache: PagedKVCache) -> dict:
    """All of the cache's state, K and V included."""
    return copy.deepcopy({name: value for name, value in vars(cache).items() if name != "layers"})  # views of K and V


def assert_unchanged(cache: PagedKVCache, before: dict) -> None:
    for name, value in before.items():
        now = getattr(cache, name)
        assert torch.equal(value, now) if isinstance(value, torch.Tensor) else value == now, f"{name} changed"


@PAGE_SIZES
def test_append_continues_the_last_page(page_size):
    """Positions are contiguous and keep their rows; a page is taken only when the last one is full."""
    cache = new_cache(page_size)
    for count, end in ((3, 3), (1, 4), (1, 5), (6, 11)):
        write(cache, cache.append(count), [float(i) for i in range(end - count, end)])
        assert cache.cached_len == [end]
        assert cache.num_free_pages == 12 - -(-end // page_size)
        cache.check()
    assert text_of(cache) == list(range(11))


@PAGE_SIZES
def test_slots_follow_the_page_table(page_size):
    """A position's slot is its page times the page size plus its offset: what the kernels compute from the table."""
    cache = new_cache(page_size)
    slots = cache.append(11)
    positions = torch.arange(11)
    assert torch.equal(slots, cache.page_table[0, positions // page_size] * page_size + positions % page_size)
    assert torch.equal(cache.slots(4, 9), slots[4:9])
    assert len(slots.unique()) == 11 and int(slots.min()) >= page_size, "slots overlap or lie in the null page"


@PAGE_SIZES
def test_append_beyond_the_context(page_size):
    """The context's end is a ValueError with the numbers, and nothing has happened."""
    cache = new_cache(page_size, num_pages=100, n_positions=10)
    cache.append(9)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"9 \+ 2 positions exceed the context of 10"):
        cache.append(2)
    assert_unchanged(cache, before)
    cache.append(1)
    cache.check()


@PAGE_SIZES
def test_reserved_slots_are_disjoint_and_come_back(page_size):
    """Slots of nodes overlap neither each other nor the text; released in any order, all pages are free again."""
    cache = new_cache(page_size)
    text, first, second = cache.append(3), cache.reserve(3), cache.reserve(2)
    everything = torch.cat([text, first, second])
    assert len(everything.unique()) == 8
    cache.check()
    cache.release(first.tolist()[::-1])
    cache.check()
    cache.release(second.tolist())
    cache.check()
    assert cache.num_free_pages == 12 - -(-3 // page_size)


@pytest.mark.parametrize("page_size", [4, 16])
def test_page_is_free_when_its_last_slot_is(page_size):
    """A page of several nodes is kept until all of them are dropped."""
    cache = new_cache(page_size)
    slots = cache.reserve(3).tolist()
    for slot in slots:
        assert cache.num_free_pages == 11
        cache.release([slot])
        cache.check()
    assert cache.num_free_pages == 12


@PAGE_SIZES
def test_commit_makes_a_path_the_next_positions(page_size):
    """Accepted nodes, in path order and not in slot order, follow the text; the others can be released."""
    cache = new_cache(page_size)
    write(cache, cache.append(3), [0.0, 1.0, 2.0])
    nodes = cache.reserve(6)
    write(cache, nodes, [10.0, 11.0, 12.0, 13.0, 14.0, 15.0])
    cache.commit(nodes[[4, 0, 3]].tolist())
    assert text_of(cache) == [0.0, 1.0, 2.0, 14.0, 10.0, 13.0]
    assert marks(cache, nodes[[1, 2, 5]]) == [11.0, 12.0, 15.0]
    cache.check()
    cache.release(nodes[[1, 2, 5]].tolist())
    cache.check()
    assert cache.num_free_pages == 12 - -(-6 // page_size)


def test_commit_of_single_token_pages_moves_nothing():
    """With one token per page the row stays where the pass wrote it: its slot becomes the position's."""
    cache = new_cache(1)
    cache.append(2)
    nodes = cache.reserve(4)
    before = cache.k.clone()
    cache.commit(nodes[[2, 1]].tolist())
    assert torch.equal(cache.slots(2, 4), nodes[[2, 1]])
    assert torch.equal(cache.k, before)


@PAGE_SIZES
def test_commit_of_nothing(page_size):
    """An iteration that accepts no node changes nothing."""
    cache = new_cache(page_size)
    cache.append(3)
    before = snapshot(cache)
    cache.commit([])
    assert_unchanged(cache, before)


@PAGE_SIZES
def test_sequences_do_not_share_pages(page_size):
    """Two sequences grow in turns, one of them by a commit, and each finds its own rows."""
    cache = new_cache(page_size, num_sequences=2)
    for i in range(3):
        write(cache, cache.append(1, 0), [float(i)])
        write(cache, cache.append(1, 1), [100.0 + i])
    nodes = cache.reserve(2)
    write(cache, nodes, [50.0, 51.0])
    cache.commit(nodes.tolist(), 1)
    assert text_of(cache, 0) == [0.0, 1.0, 2.0]
    assert text_of(cache, 1) == [100.0, 101.0, 102.0, 50.0, 51.0]
    cache.check()


@PAGE_SIZES
@pytest.mark.parametrize("operation", ["append", "reserve"])
def test_exhaustion_names_needed_and_free(operation, page_size):
    """With too few pages the error says how many were needed and are free, and nothing has happened."""
    cache = new_cache(page_size, num_pages=3, n_positions=1024)
    cache.append(page_size)
    before = snapshot(cache)
    with pytest.raises(PagesExhausted, match=rf"needed 3 KV pages of {page_size} tokens, 2 are free"):
        getattr(cache, operation)(3 * page_size)
    assert_unchanged(cache, before)
    assert cache.num_free_slots == 2 * page_size
    cache.reserve(cache.num_free_slots)
    cache.check()
    assert cache.num_free_slots == 0


@pytest.mark.parametrize("page_size", [4, 16])
def test_commit_without_room_changes_nothing(page_size):
    """Larger pages are committed by copying to fresh ones: without those, an error, and the nodes stay as they were."""
    cache = new_cache(page_size, num_pages=3)
    cache.append(page_size)
    nodes = cache.reserve(2 * page_size).tolist()
    before = snapshot(cache)
    with pytest.raises(PagesExhausted, match="needed 1 KV pages .* 0 are free"):
        cache.commit(nodes[:2])
    assert_unchanged(cache, before)


@PAGE_SIZES
def test_reset_gives_everything_back(page_size):
    """After a reset every page is free, whoever held it."""
    cache = new_cache(page_size, num_sequences=2)
    cache.append(5, 1)
    cache.reserve(3)
    cache.reset()
    cache.check()
    assert (cache.num_free_pages, cache.cached_len) == (12, [0, 0])
    assert (cache.page_table == NULL_PAGE).all()


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 1), (4, 0)])
def test_impossible_sizes(num_pages, page_size):
    """A cache without pages or with empty pages is refused, with both numbers."""
    with pytest.raises(ValueError, match=f"got {num_pages} and {page_size}"):
        new_cache(page_size, num_pages)


@pytest.mark.parametrize("damage", ["leaked page", "page twice", "hole in a table", "null page written"])
def test_check_sees_damage(damage):
    """``check`` itself notices what it is there for, or all the tests that call it would prove nothing."""
    cache = new_cache(4)
    cache.append(6)
    cache.reserve(2)
    cache.check()
    if damage == "leaked page":
        cache._free.pop()
    elif damage == "page twice":
        cache._free.append(int(cache.page_table[0, 0]))
    elif damage == "hole in a table":
        cache._table[0, 0] = NULL_PAGE
    else:
        cache.v[1, 2] = 1.0
    with pytest.raises(AssertionError):
        cache.check()


class Shadow:
    """What a cache should hold, kept in plain lists: the texts and the live nodes, as (slot, mark)."""

    def __init__(self, cache: PagedKVCache, seed: int):
        self.cache, self.rng, self.next_mark = cache, random.Random(seed), 1.0
        self.texts: list[list[float]] = [[] for _ in cache.cached_len]
        self.nodes: list[tuple[int, float]] = []

    def fresh(self, count: int) -> list[float]:
        self.next_mark += count
        return [self.next_mark - i for i in range(count)]

    def some_nodes(self) -> list[tuple[int, float]]:
        """Takes up to six of the nodes out of the list, in random order."""
        chosen = self.rng.sample(self.nodes, min(len(self.nodes), self.rng.randint(0, 6)))
        self.nodes = [node for node in self.nodes if node not in chosen]
        return chosen

    def step(self) -> None:
        """One random operation, on the cache and on the lists."""
        operation = self.rng.choice(["append", "reserve", "reserve", "release", "commit"])
        sequence, count = self.rng.randrange(len(self.texts)), self.rng.randint(0, 6)
        if operation == "append":
            new = self.fresh(count)
            write(self.cache, self.cache.append(count, sequence), new)
            self.texts[sequence] += new
        elif operation == "reserve":
            slots, new = self.cache.reserve(count), self.fresh(count)
            write(self.cache, slots, new)
            self.nodes += zip(slots.tolist(), new, strict=True)
        elif operation == "release":
            self.cache.release([slot for slot, _ in self.some_nodes()])
        elif self.cache.num_free_slots >= 6:  # a commit of larger pages copies to fresh ones
            accepted = self.some_nodes()
            self.cache.commit([slot for slot, _ in accepted], sequence)
            self.texts[sequence] += [mark for _, mark in accepted]

    def compare(self) -> None:
        self.cache.check()
        for sequence, text in enumerate(self.texts):
            assert text_of(self.cache, sequence) == text, f"sequence {sequence}"
        if self.nodes:
            slots, expected = zip(*self.nodes, strict=True)
            assert marks(self.cache, torch.tensor(slots)) == list(expected), "nodes"


@PAGE_SIZES
@pytest.mark.parametrize("seed", range(4))
def test_random_operations(page_size, seed):
    """150 random operations on two sequences, some of them beyond what is free: after each, every row is in place."""
    cache = new_cache(page_size, num_pages=80 // page_size + 8, num_sequences=2, n_positions=512)
    shadow, num_refused = Shadow(cache, seed), 0
    for _ in range(150):
        before = snapshot(cache)
        try:
            shadow.step()
        except PagesExhausted:
            num_refused += 1
            assert_unchanged(cache, before)
        shadow.compare()
    assert num_refused > 0, "no operation met a full cache: give it fewer pages"


@PAGE_SIZES
def test_slots_are_released_once(page_size):
    """A second release of one slot is caught, and so the page stays with the slot that still holds it."""
    cache = new_cache(page_size)
    first, second = cache.reserve(2).tolist()
    cache.release([first])
    with pytest.raises(AssertionError, match=f"slot {first} is not reserved"):
        cache.release([first])
    cache.release([second])
    cache.check()


@PAGE_SIZES
def test_commit_beyond_the_context_changes_nothing(page_size):
    cache = new_cache(page_size, num_pages=20, n_positions=8)
    cache.append(7)
    slots = cache.reserve(2).tolist()
    with pytest.raises(ValueError, match="exceed the context"):
        cache.commit(slots)
    cache.release(slots)
    cache.check()

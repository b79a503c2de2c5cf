from __future__ import annotations

import random

import torch

from service.engines.local.memory import Memory, Page, Shelf
from service.engines.local.ops import PAGE

SIZE = 10


def memory(chunks: int = 2, pages: int = 4) -> Memory:
    return Memory(chunks, pages * SIZE, torch.float32, torch.device("cpu"))


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


def written(shelf: Shelf, tokens: list[int]) -> list[Page]:
    """The pages of a text that was computed in full."""
    pages = shelf.begin(tokens)
    while len(pages) * PAGE < len(tokens):
        page = shelf.take()
        assert page is not None
        pages.append(page)
    learn(shelf, pages, range(len(tokens) // PAGE), tokens)
    return pages


def learn(shelf: Shelf, pages: list[Page], places: range, tokens: list[int]) -> None:
    for place in places:
        parent = pages[place - 1] if place else None
        pages[place] = shelf.learn(pages[place], parent, tokens[place * PAGE : (place + 1) * PAGE])


def test_pages_lie_apart_and_inside_of_the_memory() -> None:
    whole = memory()
    small, large = whole.shelf(SIZE), whole.shelf(2 * SIZE)
    taken = [(small.take(), SIZE) for _ in range(4)] + [(large.take(), 2 * SIZE) for _ in range(2)]
    places = [place for page, size in taken if page for place in range(page.offset, page.offset + size)]
    assert len(places) == len(set(places)) == 8 * SIZE
    assert set(places) == set(range(len(whole.data) - whole.chunk))
    assert small.take() is None


def test_a_page_that_was_given_back_is_lent_to_whoever_needs_it() -> None:
    whole = memory(chunks=1)
    first, second = whole.shelf(SIZE), whole.shelf(2 * SIZE)
    pages = [first.take() for _ in range(4)]
    assert second.take() is None
    first.release([page for page in pages if page])
    assert second.take() is not None


def test_a_prompt_takes_over_the_full_pages_that_it_begins_with() -> None:
    shelf = memory(chunks=8).shelf(SIZE)
    tokens = text(0, 40)
    own = written(shelf, tokens)
    assert shelf.begin(tokens) == own[:2]
    assert shelf.begin([*tokens[:32], *text(1, 8)]) == own[:2]
    assert shelf.begin([*tokens[:20], *text(1, 20)]) == own[:1]
    assert shelf.begin([*text(1, 16), *tokens[16:]]) == []


def test_a_prompt_of_nothing_but_known_pages_has_a_token_left_to_compute() -> None:
    shelf = memory(chunks=8).shelf(SIZE)
    tokens = text(0, 32)
    own = written(shelf, tokens)
    assert shelf.begin(tokens) == own[:1]


def test_pages_are_known_until_their_room_is_needed_the_longest_unused_first() -> None:
    shelf = memory(chunks=1).shelf(SIZE)
    old, new = text(0, 20), text(1, 20)
    for tokens in (old, new):
        shelf.release(written(shelf, tokens))
    assert shelf.in_use == 0
    for _ in range(3):
        assert shelf.take() is not None
    assert shelf.begin(old) == []
    assert len(shelf.begin(new)) == 1


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    shelf = memory(chunks=1).shelf(SIZE)
    tokens = text(0, 4 * PAGE)
    shelf.release(written(shelf, tokens))
    assert shelf.take() is not None
    assert len(shelf.begin([*tokens, 0])) == 3


def test_of_two_pages_with_the_same_tokens_the_first_serves_both_and_what_comes_after_is_found() -> None:
    shelf = memory(chunks=8).shelf(SIZE)
    tokens = text(0, 5 * PAGE)
    first = written(shelf, tokens[: 2 * PAGE])
    second = [page for page in (shelf.take() for _ in range(5)) if page]
    learn(shelf, second, range(5), tokens)
    assert second[:2] == first
    assert shelf.in_use == 5
    shelf.release(first)
    assert shelf.in_use == 5
    assert shelf.begin([*tokens, 0]) == second


def test_pages_are_found_from_any_place_on() -> None:
    shelf = memory(chunks=8).shelf(SIZE)
    tokens = text(0, 3 * PAGE)
    own = written(shelf, tokens)
    assert shelf.begin(tokens[PAGE:], own[0]) == own[1:2]
    assert shelf.begin(tokens[PAGE:]) == []


def test_a_page_in_use_is_never_lent_again() -> None:
    """Against a plain count, over many random texts of two experts."""
    rng = random.Random(0)
    whole = memory(chunks=6)
    shelves = [whole.shelf(SIZE), whole.shelf(2 * SIZE)]
    held: list[tuple[Shelf, list[Page]]] = []
    users: dict[int, int] = {}
    for _ in range(2000):
        shelf = rng.choice(shelves)
        if held and rng.random() < 0.5:
            shelf, pages = held.pop(rng.randrange(len(held)))
            for page in pages:
                users[id(page)] -= 1
            shelf.release(pages)
            continue
        tokens = text(rng.randrange(5), rng.randrange(1, 70))
        pages = shelf.begin(tokens)
        known = len(pages)
        while len(pages) * PAGE < len(tokens) and (page := shelf.take()):
            assert not users.get(id(page))
            pages.append(page)
        learn(shelf, pages, range(known, min(len(pages), len(tokens) // PAGE)), tokens)
        for page in pages:
            users[id(page)] = users.get(id(page), 0) + 1
        held.append((shelf, pages))
        places = {place for own, kept in held for page in kept for place in range(page.offset, page.offset + own.page)}
        assert len(places) == sum(own.page * len({id(page) for page in kept}) for own, kept in _distinct(held))
    for shelf, pages in held:
        shelf.release(pages)
    assert [shelf.in_use for shelf in shelves] == [0, 0]


def _distinct(held: list[tuple[Shelf, list[Page]]]) -> list[tuple[Shelf, list[Page]]]:
    """Every page once."""
    seen: dict[int, tuple[Shelf, Page]] = {id(page): (shelf, page) for shelf, pages in held for page in pages}
    return [(shelf, [page]) for shelf, page in seen.values()]

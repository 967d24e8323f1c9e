"""Work on many tensors in threads, of which each is one core's."""

from __future__ import annotations

import threading

import pytest
import torch

from library.models.threads import in_threads


def test_results_come_in_order_and_torch_starts_no_threads_of_its_own_meanwhile() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(in_threads(lambda item: (item, torch.get_num_threads(), threading.get_ident()), range(50)))
        assert [item for item, _, _ in found] == list(range(50))
        assert {count for _, count, _ in found} == {1} and threading.get_ident() not in {
            thread for _, _, thread in found
        }
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_goes_wrong_is_raised_and_what_has_not_begun_is_left() -> None:
    before, done = torch.get_num_threads(), []

    def work(item: int) -> None:
        done.append(item)
        if item == 3:
            raise ValueError("at 3")
        threading.Event().wait(0.001)

    with pytest.raises(ValueError, match="at 3"):
        list(in_threads(work, range(2000)))
    assert len(done) < 1000 and torch.get_num_threads() == before

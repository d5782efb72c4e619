"""The number of threads follows the size of the work, and is put back."""

from __future__ import annotations

import pytest
import torch

from detent import threads


def test_small_work_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    worth = threads.PER_THREAD
    assert [threads.threads_for(n) for n in (0, worth - 1, worth, 3 * worth, 100 * worth)] == [1, 1, 1, 3, 4]


def test_the_number_is_put_back() -> None:
    before = torch.get_num_threads()
    with threads.threads_by_size(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

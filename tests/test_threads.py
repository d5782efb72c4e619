"""The number of threads follows the size of the work, and is put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import detent
from detent import threads
from detent.evaluation import perplexity
from tiny_language_model import make_model


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_small_work_takes_one_thread() -> None:
    worth, found = threads.PER_THREAD, []
    for work in (0, worth - 1, worth, 3 * worth, 100 * worth):
        with threads.threads_by_size(work):
            found.append(torch.get_num_threads())
    assert found == [1, 1, 1, 3, 4]


def test_larger_work_gets_more_and_the_number_is_put_back() -> None:
    with threads.threads_by_size(1) as meet:
        found = [torch.get_num_threads()]
        for size in (2, 1, 9):
            meet(size * threads.PER_THREAD)
            found.append(torch.get_num_threads())
    assert found == [1, 2, 2, 4]
    assert torch.get_num_threads() == 4


class _Counting(nn.Module):
    """Notes the number of threads that it runs with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(width, width), set[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.get_num_threads())
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [(4, 1), (threads.PER_THREAD // 64**2 * 2, 2), (threads.PER_THREAD // 64**2 * 9, 4)],
    ids=["small", "middle", "large"],
)
def test_calibration_takes_as_many_as_a_batch_is_worth(rows: int, wanted: int) -> None:
    model = _Counting(64)
    data = torch.ones(1, 1).expand(rows, 64)
    detent.quantize(model, {"quant_cfg": {"*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}, lambda m: m(data))
    assert model.seen == {wanted, 4}  # 4: the look at whether quantizers are used, afterwards
    assert torch.get_num_threads() == 4


def test_autoround_of_a_small_model_has_the_same_bits_under_any_number_of_threads() -> None:
    """Sums that are cut for two threads differ in their last bits, and signs of gradients with them."""
    found = []
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        model, seen = make_model(), set[int]()
        model.model.layers[0].register_forward_pre_hook(lambda *_, seen=seen: seen.add(torch.get_num_threads()))
        ids = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(0))
        cfg = {
            "quant_cfg": {
                "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 16}},
                "*lm_head*": {"enable": False},
            },
            "algorithm": {"method": "autoround", "iterations": 4},
        }
        detent.quantize(model, cfg, lambda m, ids=ids: m(ids))
        detent.fold_weight(model)
        found.append(model.state_dict())
        assert seen - {number} <= {1}
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_measuring_takes_one_for_a_small_model() -> None:
    model, seen = make_model(), set[int]()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    perplexity(model, torch.arange(60), window=20)
    assert seen == {1}

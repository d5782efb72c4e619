"""Attributes remember the format that they describe, and never an old one."""

from __future__ import annotations

import copy

import pytest

from detent.config import QuantizerAttributeConfig
from detent.errors import DetentError
from detent.nn import TensorQuantizer


def test_a_change_is_seen() -> None:
    attributes = QuantizerAttributeConfig(num_bits=8, axis=0)
    assert attributes.to_format().element.bits == 8
    attributes.num_bits = 4
    assert attributes.to_format().element.bits == 4
    assert attributes.model_copy(update={"num_bits": 6}).to_format().element.bits == 6
    off = attributes.model_copy(update={"enable": False})
    assert not off.enable
    assert off.to_format() == attributes.to_format()
    with pytest.raises(DetentError):
        attributes.num_bits = 400
    assert attributes.to_format().element.bits == 4


def test_what_is_remembered_is_no_attribute() -> None:
    asked, fresh = QuantizerAttributeConfig(num_bits=4), QuantizerAttributeConfig(num_bits=4)
    asked.to_format()
    for one in (asked, copy.deepcopy(asked), asked.model_copy()):
        assert one == fresh
        assert one.to_dict() == fresh.to_dict()
        assert one.model_dump() == fresh.model_dump()
        assert dict(one) == dict(fresh)


def test_quantizers_share_no_attributes() -> None:
    """The first settings of all are copies of the same ones."""
    one, other = TensorQuantizer(), TensorQuantizer()
    one.attributes.num_bits = 4
    assert other.attributes.num_bits == TensorQuantizer().attributes.num_bits == 8

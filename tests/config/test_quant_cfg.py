"""`quant_cfg`: both spellings, precedence, and what is said about entries that match nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from detent.config import (
    QuantCfg,
    QuantizeConfig,
    QuantizerAttributeConfig,
    SequentialConfig,
    check_matches,
    class_name,
    match,
    matches,
    normalize,
    presets,
)
from detent.config.presets import _default_disabled_quantizer_cfg
from detent.errors import DetentError

LINEAR, CONV = {"nn.Linear"}, {"nn.Conv2d"}
NAMES = {
    "layer0.weight_quantizer": LINEAR,
    "layer0.input_quantizer": LINEAR,
    "layer1.0.weight_quantizer": LINEAR,
    "layer1.0.input_quantizer": LINEAR,
    "conv.weight_quantizer": CONV,
}
INT4 = {"num_bits": 4}
INT8 = {"num_bits": 8}


def bits(quant_cfg: Any) -> dict[str, Any]:
    """{name: bits} of the quantizers that end up enabled."""
    rules = normalize(quant_cfg)
    found = {name: match(rules, name, classes) for name, classes in NAMES.items()}
    return {name: a.num_bits for name, a in found.items() if isinstance(a, QuantizerAttributeConfig) and a.enable}


def test_snippets_of_the_guide() -> None:
    config = presets.INT8_DEFAULT_CFG.copy()
    config["quant_cfg"]["*input_quantizer"]["enable"] = False
    config["quant_cfg"]["*layer1.*"] = {"enable": False}
    assert bits(config["quant_cfg"]) == {"layer0.weight_quantizer": 8, "conv.weight_quantizer": 8}
    assert "*layer1.*" not in presets.INT8_DEFAULT_CFG["quant_cfg"]
    assert len(bits(presets.INT8_DEFAULT_CFG["quant_cfg"])) == 5

    custom = {
        "quant_cfg": {
            "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 128}, "enable": True},
            "*input_quantizer": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}},
            **_default_disabled_quantizer_cfg,
        },
        "algorithm": "max",
    }
    rules = QuantizeConfig(**custom).rules
    assert check_matches(rules, NAMES) == []
    assert match(rules, "layer0.weight_quantizer") == QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 128})
    assert match(rules, "layer0.input_quantizer") == QuantizerAttributeConfig(type="dynamic", block_sizes={-1: None})
    assert match(rules, "lm_head.weight_quantizer").enable is False  # type: ignore[union-attr]


def test_list_era() -> None:
    config = copy.deepcopy(presets.INT8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": "*layer1.*", "enable": False})
    config["quant_cfg"].append({"quantizer_name": "*", "parent_class": "nn.Conv2d", "cfg": INT4})
    assert bits(config["quant_cfg"]) == {
        "layer0.weight_quantizer": 8,
        "layer0.input_quantizer": 8,
        "conv.weight_quantizer": 4,
    }
    spread = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": INT4, "enable": True},
        *_default_disabled_quantizer_cfg,
    ]
    assert set(bits(spread).values()) == {4}


def test_precedence() -> None:
    # "default" is first wherever it stands, then the last match wins and replaces all attributes.
    assert bits({"*": INT4, "default": {"enable": False}}) == dict.fromkeys(NAMES, 4)
    assert bits({"*weight_quantizer": INT4, "default": INT8})["layer0.input_quantizer"] == 8
    rules = normalize({"*": {"num_bits": 4, "axis": 0}, "layer0.*": {"narrow_range": True}})
    assert match(rules, "layer0.weight_quantizer") == QuantizerAttributeConfig(narrow_range=True)
    # An entry that only switches keeps the attributes.
    switched = [
        {"quantizer_name": "*", "cfg": INT4},
        {"quantizer_name": "layer*", "enable": False},
        {"quantizer_name": "layer1*", "enable": True},
    ]
    assert bits(switched) == {
        "layer1.0.weight_quantizer": 4,
        "layer1.0.input_quantizer": 4,
        "conv.weight_quantizer": 4,
    }
    # cfg together with enable=False sets the attributes but leaves the quantizer off.
    off = match(normalize([{"quantizer_name": "*", "cfg": INT4, "enable": False}]), "layer0.weight_quantizer")
    assert off == QuantizerAttributeConfig(num_bits=4, enable=False)


def test_what_no_rule_mentions_stays_as_it_is() -> None:
    rules = normalize({"*weight_quantizer": INT4})
    now = QuantizerAttributeConfig(num_bits=6)
    assert match(rules, "a.input_quantizer") is None
    assert match(rules, "a.input_quantizer", current=now) is now
    turned_off = match(normalize({"*": {"enable": False}}), "a.input_quantizer", current=now)
    assert turned_off == QuantizerAttributeConfig(num_bits=6, enable=False)
    assert now.enable is True


@pytest.mark.parametrize("key", ["nn.Conv2d", torch.nn.Conv2d])
def test_parent_classes(key: Any) -> None:
    assert bits({"default": {"enable": False}, key: {"*": INT4}}) == {"conv.weight_quantizer": 4}
    assert class_name(torch.nn.Conv2d) == "nn.Conv2d"
    assert class_name(QuantCfg) == "QuantCfg"


def test_callables_and_lists_of_attributes() -> None:
    cfg = {"default": {"enable": False}, (lambda name: name.startswith("layer0")): [INT4, {"num_bits": (4, 3)}]}
    rules = normalize(cfg)
    assert check_matches(rules, NAMES) == []
    attributes = match(rules, "layer0.weight_quantizer")
    assert isinstance(attributes, SequentialConfig)
    assert [a.num_bits for a in attributes] == [4, (4, 3)]


def test_wildcards() -> None:
    def hits(pattern: str, name: str) -> bool:
        return matches(normalize({pattern: INT8})[0], name)

    assert hits("*weight_quantizer", "experts.weight_quantizers.3")  # the quantizer of one expert
    assert hits("*weight_quantizers.3", "experts.weight_quantizers.3")
    assert not hits("*weight_quantizers.4", "experts.weight_quantizers.3")
    assert hits("*[kv]_bmm_quantizer", "attn.k_bmm_quantizer")
    assert not hits("*[kv]_bmm_quantizer", "attn.q_bmm_quantizer")
    assert not hits("*LM_HEAD*", "lm_head.weight_quantizer")
    assert not hits("lm_head", "lm_head.weight_quantizer")  # the whole name must match


def test_container_is_list_and_dictionary() -> None:
    cfg = QuantCfg({"*weight_quantizer": {"num_bits": 4}, "nn.Conv2d": {"*": {"enable": False}}})
    assert cfg[0] == {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4}}
    assert cfg["nn.Conv2d"] == {"*": {"enable": False}}
    assert list(cfg.keys()) == ["*weight_quantizer", "nn.Conv2d"]
    assert dict(cfg) == {**cfg} == dict(cfg.items())
    assert "*weight_quantizer" in cfg
    assert "*nothing*" not in cfg
    with pytest.raises(KeyError, match="did you mean '\\*weight_quantizer'"):
        cfg["*wieght_quantizer"]
    cfg["*weight_quantizer"] = {"num_bits": 3}  # keeps its place
    cfg["*x*"] = {"enable": False}
    assert [entry["quantizer_name"] for entry in cfg] == ["*weight_quantizer", "*", "*x*"]
    assert cfg.pop("*x*") == {"enable": False}
    assert cfg.pop("*x*", None) is None
    assert cfg.get("*x*") is None
    del cfg["nn.Conv2d"]
    assert cfg.setdefault("*y*", {"num_bits": 2}) == {"num_bits": 2}
    cfg.update({"*y*": {"num_bits": 5}})
    assert [*cfg] == [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 3}},
        {"quantizer_name": "*y*", "cfg": {"num_bits": 5}},
    ]
    for duplicate in (cfg.copy(), copy.deepcopy(cfg)):
        duplicate["*y*"]["num_bits"] = 7
        assert isinstance(duplicate, QuantCfg)
    assert cfg["*y*"]["num_bits"] == 5


def test_attributes_of_an_entry_that_only_switches_are_live() -> None:
    cfg = QuantCfg([{"quantizer_name": "a*", "enable": False}])
    assert cfg["a*"] == {"enable": False}
    cfg["a*"]["enable"] = True
    assert cfg[0] == {"quantizer_name": "a*", "enable": True}
    cfg["a*"]["num_bits"] = 4
    assert normalize(cfg)[0].attributes == QuantizerAttributeConfig(num_bits=4)
    cfg = QuantCfg([{"quantizer_name": "a*", "cfg": {"num_bits": 4}, "enable": False}])
    cfg["a*"]["enable"] = True
    assert normalize(cfg)[0].enables


@pytest.mark.parametrize(
    ("quant_cfg", "message"),
    [
        (5, "a dictionary of patterns or a list of entries, not 5"),
        ({"*": 4}, r"quant_cfg\['\*'\]: attributes are a dictionary"),
        ({"*": {"enable": True}}, r"'\*': \{'enable': True\} alone doesn't say how"),
        ({"*": {}}, "cfg is empty"),
        ({"*q": {"num_bit": 4}}, r"entry '\*q': QuantizerAttributeConfig: unknown field 'num_bit'"),
        ({"*q": {"block_size": {-1: 4}}}, "did you mean 'block_sizes'"),
        ({"nn.Linear": {"*": {"num_bits": 99}}}, r"'\*' of nn.Linear: .*num_bits"),
        ([{"quantizer_name": "*"}], "sets nothing"),
        ([{"cfg": INT4}], "quantizer_name is a wildcard or a callable, not None"),
        ([{"quantizer_name": "*", "cfg": {}, "enable": True}], "cfg is empty"),
        ([{"quantizer_name": "*", "cgf": INT4}], "unknown field 'cgf'"),
        ([{"quantizer_name": "*", "enable": 1}], "enable is True or False, not 1"),
        ([{"quantizer_name": "*", "parent_class": 3, "cfg": INT4}], "parent_class is a class or its name"),
        (["*"], "an entry is a dictionary"),
        ({0: INT4}, "a pattern is a wildcard or a callable, not 0"),
        ({"*": INT8, -1: INT4}, "a pattern is a wildcard or a callable, not -1"),
    ],
)
def test_refusals(quant_cfg: Any, message: str) -> None:
    with pytest.raises(DetentError, match=message):
        normalize(quant_cfg)


@pytest.mark.parametrize(
    ("quant_cfg", "message"),
    [
        (
            {"*": INT8, "*wieght_quantizer": INT4},
            r"'\*wieght_quantizer' sets a format .* did you mean '\*weight_quantizer'",
        ),
        ({"*": INT8, "*laier1*": INT4}, r"did you mean '\*layer1\*'"),
        ({"*": INT8, "layer0.weight_quantiser": INT4}, "did you mean 'layer0.weight_quantizer'"),
        ({"*": INT8, "nn.Conv9d": {"*": INT4}}, "class 'nn.Conv9d'; the model has nn.Conv2d, nn.Linear"),
        ({"*": INT8, (lambda name: False): INT4}, "matches no quantizer; the model has quantizers such as"),
        (
            [{"quantizer_name": "*", "cfg": INT8}, {"quantizer_name": "x*", "enable": True}],
            "'x\\*' enables quantizers but",
        ),
        ({"*weight_quantizer": INT4, "*": {"enable": False}}, r"quantizes nothing: a later entry .* '\*'$"),
        ({"default": {"enable": False}}, "quantizes nothing: no entry sets a format"),
        ({}, "quantizes nothing: no entry sets a format"),
    ],
)
def test_entries_that_do_nothing_are_errors_or_with_strict_off_warnings(quant_cfg: Any, message: str) -> None:
    rules = normalize(quant_cfg)
    with pytest.raises(DetentError, match=message):
        check_matches(rules, NAMES)
    (warning,) = check_matches(rules, NAMES, strict=False)
    with pytest.raises(DetentError, match=message):
        raise DetentError(warning)


def test_a_model_without_quantizers() -> None:
    with pytest.raises(DetentError, match="the model has no quantizers"):
        check_matches(normalize(presets.INT8_WEIGHT_ONLY_CFG["quant_cfg"]), {})


def test_exclusions_that_match_nothing_are_warnings_but_not_those_of_presets() -> None:
    config = presets.INT8_DEFAULT_CFG.copy()
    assert check_matches(normalize(config["quant_cfg"]), NAMES) == []
    config["quant_cfg"]["*layr1*"] = {"enable": False}
    (warning,) = check_matches(normalize(config["quant_cfg"]), NAMES)
    assert "'*layr1*' excludes nothing" in warning
    assert "did you mean '*layer1*'?" in warning
    assert check_matches(normalize(config["quant_cfg"]), list(NAMES)) == [warning]

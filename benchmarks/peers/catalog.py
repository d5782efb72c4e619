"""Who is run, on what, and by which of their methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scheme:
    """Number formats of weights and activations; lm_head and the embedding are kept by everybody.

    Attributes:
        words: for the table.
        bits: of a weight.
        weight: ``"int"`` (symmetric) or ``"nvfp4"``.
        activation: see :class:`benchmarks.peers.harness.Job`.
        by_group: weights have a scale per group of the input's size, else per row.
    """

    words: str
    bits: int
    weight: str = "int"
    activation: str | None = None
    by_group: bool = True


SCHEMES = {
    "W4": Scheme("INT4 weights per group", 4),
    "W3": Scheme("INT3 weights per group", 3),
    "W2": Scheme("INT2 weights per group", 2),
    "W4A8": Scheme("INT4 weights per group, INT8 activations per token", 4, activation="int8_token"),
    "W8A8": Scheme("INT8 weights per row, static INT8 activations", 8, activation="int8_tensor", by_group=False),
    "NVFP4": Scheme("NVFP4 weights and activations", 4, weight="nvfp4", activation="nvfp4"),
    "W4A4": Scheme("INT4 weights per group, INT4 activations per token", 4, activation="int4_token"),
}
#: The tables of an accuracy input: schemes side by side.
TABLES = (("W4", "W3", "W2"), ("W4A8", "W8A8", "NVFP4", "W4A4"))


@dataclass(frozen=True)
class Peer:
    """A tool, what pip installs for it, and the methods its runner knows, by scheme.

    Attributes:
        title: its name.
        packages: pinned, beside torch.
        methods: scheme to methods, in the order of the table.
        options: for its runner.
    """

    title: str
    packages: tuple[str, ...]
    methods: dict[str, tuple[str, ...]]
    options: dict[str, Any] = field(default_factory=dict)


def _weights(*methods: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(("W4", "W3", "W2"), methods)


#: The key is the name of the runner.
PEERS = {
    "modelopt": Peer(
        "ModelOpt",
        # It imports requests without asking for it.
        ("nvidia-modelopt==0.47.0", "transformers==5.23.0", "requests==2.34.2"),
        {
            **_weights("max", "gptq"),
            "W4": ("max", "awq_lite", "awq_clip", "gptq"),
            "W3": ("max", "awq_lite", "awq_clip", "gptq"),
            "W4A8": ("gptq",),
            "W8A8": ("smoothquant",),
            "NVFP4": ("max",),
        },
    ),
    "llmcompressor": Peer(
        "llm-compressor",
        ("llmcompressor==0.14.0.1",),
        {
            **_weights("rtn", "gptq"),
            "W4": ("rtn", "gptq", "awq"),
            "W4A8": ("gptq",),
            "W8A8": ("smoothquant",),
            "NVFP4": ("rtn", "gptq"),
            "W4A4": ("rtn", "gptq", "spinquant", "spinquant, gptq"),
        },
    ),
    "autoround": Peer(
        "AutoRound",
        ("auto-round==0.16.1",),
        {
            **_weights("0 iterations", "200 iterations"),
            "W4A8": ("200 iterations",),
            "NVFP4": ("200 iterations",),
        },
        # Its default is to compile, which takes minutes that models of this size don't repay.
        options={"enable_torch_compile": False},
    ),
    "gptqmodel": Peer("GPTQModel", ("gptqmodel==7.7.0",), {"W4": ("gptq",), "W3": ("gptq",)}),
    "quark": Peer(
        "Quark",
        ("amd-quark==0.13",),
        {"W4": ("gptq", "awq"), "W3": ("gptq", "awq"), "W2": ("gptq",), "W8A8": ("smoothquant",), "NVFP4": ("rtn",)},
    ),
    "torchao": Peer(
        "torchao",
        ("torchao==0.18.0", "transformers==5.23.0"),
        {**_weights("hqq"), "W4A8": ("rtn",), "NVFP4": ("rtn",)},
    ),
    "hqq": Peer("hqq", ("hqq==0.2.8.post1", "transformers==5.23.0"), _weights("hqq (asymmetric)")),
}

#: Detent's methods: what `algorithm` becomes.
DETENT: dict[str, Any] = {
    "max": "max",
    "mse": "mse",
    "hqq": "hqq",
    "awq_lite": "awq_lite",
    "awq_clip": "awq_clip",
    "awq_full": "awq_full",
    "gptq": "gptq",
    "gptq, retargeted": {"method": "gptq", "retarget": True},
    "autoround": "autoround",
    "best": "best",
    "smoothquant": "smoothquant",
    "smoothquant, gptq": ["smoothquant", "gptq"],
    "rotation": ["rotation", "max"],
    "rotation, gptq": ["rotation", "gptq"],
}
PEERS["detent"] = Peer(
    "Detent",
    (),
    {
        **_weights(
            "max", "mse", "hqq", "awq_lite", "awq_clip", "awq_full", "gptq", "gptq, retargeted", "autoround", "best"
        ),
        "W4A8": ("max", "awq_lite", "gptq", "best"),
        "W8A8": ("max", "smoothquant", "smoothquant, gptq"),
        "NVFP4": ("max", "mse", "awq_lite", "gptq", "best"),
        "W4A4": ("max", "gptq", "rotation", "rotation, gptq"),
    },
)

#: The speed input: (who, method, scheme).
SPEED = (
    ("modelopt", "awq_lite", "W4"),
    ("detent", "awq_lite", "W4"),
    ("detent", "awq_full", "W4"),
    ("llmcompressor", "gptq", "W4"),
    ("detent", "gptq", "W4"),
    ("llmcompressor", "smoothquant", "W8A8"),
    ("modelopt", "smoothquant", "W8A8"),
    ("detent", "smoothquant", "W8A8"),
)
#: Sequences of the speed input, and of Detent's second, longer run.
FEW, MANY = 16, 128

#: `--quick`: one method of each, one scheme.
QUICK = {name: (peer.methods["W4"][0],) for name, peer in PEERS.items()}

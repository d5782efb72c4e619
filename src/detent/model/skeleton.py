"""A model whose parameters have no memory, and reading those that are needed at the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detent.checkpoints import Source
from detent.errors import DetentError
from detent.formats.checks import all_finite
from detent.model import edit
from detent.nn.experts_layout import take_experts_apart
from detent.pretrained.loading import auto_class, check_floating, quiet_transformers, read_tensor, too_large_for_float16
from detent.pretrained.names import CheckpointNames
from detent.progress import track


def model_without_weights(
    source: Source, config: Any, *, dtype: torch.dtype, attention: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a checkpoint in eval mode: parameters on the meta device, buffers with the values of its class,
    experts one by one.

    Args:
        source, config, dtype, attention, trust_remote_code: as for `load_model`.

    Raises:
        DetentError: the architecture is unknown.
    """
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    with quiet_transformers(str(source.path), trust_remote_code), _parameters_on_meta():
        model: Any = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, dtype=dtype, **options)
        model.tie_weights()
    take_experts_apart(model)
    _set_dtypes(model, dtype)
    net: nn.Module = model.requires_grad_(False).eval()
    return net


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as soon as a module gets them; buffers, which no file may hold, keep it."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    with torch.no_grad(), _no_initial_values():
        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def _no_initial_values() -> Iterator[None]:
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # pragma: no cover - other versions of transformers
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        yield


def _set_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Parameters that transformers keeps in float32 while others are in 16 bits."""
    get: Any = getattr(model, "_get_dtype_plan", None)
    plan = get(dtype) if get is not None else {}
    if not plan:
        return
    from transformers.core_model_loading import build_glob_alternation

    pattern, by_group, _ = build_glob_alternation(list(plan))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = pattern.search(name)
        if found is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(plan[by_group[found.lastgroup]])


class StreamedWeights:
    """The weights of a checkpoint, on their way into a model of `model_without_weights` and out of it.

    A weight that is tied is one: wherever it is put, all modules that share it have it. Where the file has several
    tensors for it that differ, it isn't tied.

    Args:
        source: the checkpoint. names: of it, for this model.
        model: whose parameters are on the meta device.
        device: where weights go.
        read: gives a tensor by its name in the file, in place of `source`.

    Attributes:
        parameters: of the model, each once, by the names that the file has something for.

    Raises:
        DetentError: the model has a parameter that the checkpoint has nothing for.
    """

    def __init__(
        self,
        source: Source,
        names: CheckpointNames,
        model: nn.Module,
        device: str = "cpu",
        *,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        self._source, self._names, self._device = source, names, device
        self._read = read or partial(read_tensor, source)
        tied: dict[int, list[str]] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        #: {parameter: that of its names which the file has something for}
        self._stored: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        for together in tied.values():
            stored = [name for name in together if names.of_parameter(name) is not None]
            if not stored:
                raise DetentError(
                    f"{source.path}: the checkpoint lacks weights that its config.json calls for, for instance"
                    f" {together[0]}"
                )
            own = [name for name in stored[1:] if not torch.equal(self._value(name), self._value(stored[0]))]
            self._stored |= dict.fromkeys(together, stored[0]) | {name: name for name in own}
            for name in together:
                place = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                self._places.setdefault(self._stored[name], []).append(place)
            for name in own:  # tied by the configuration alone: transformers goes by the file, too
                self._set(name, model.get_parameter(name).data)
        self.parameters = list(self._places)
        buffers = dict(model.named_buffers())
        self._buffers = {name for name in buffers if names.of_parameter(name) is not None}
        self._model = model

    def stored(self, parameters: Iterable[str]) -> list[str]:
        """The names that the file has something for, each once, of parameters."""
        return list(dict.fromkeys(self._stored[name] for name in parameters))

    def put(self, parameters: Iterable[str], task: str = "") -> None:
        """Read parameters and put them in; `task`: what progress calls it.

        Raises:
            DetentError: one can't be read, is of another shape than the model's, or holds NaN or infinity.
        """
        wanted = self.stored(parameters)
        left = set(wanted)
        for name in track(wanted, task, len(wanted)) if task else wanted:
            if name not in left:
                continue
            made = self._names.to_model(name, self._read)
            if name not in made:  # pragma: no cover - a rule of transformers that makes something else
                raise DetentError(f"{self._source.path}: {name} can't be made from its tensors")
            for one in left & made.keys():
                module, attribute = self._places[one][0]
                self._set(one, self._fitting(one, made[one], module._parameters[attribute]))
            left -= made.keys()

    def put_buffers(self) -> None:
        """Read the buffers that the checkpoint holds and put them in: they are small, and stay."""
        for name in self._buffers:
            owner, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(owner)
            made = self._names.to_model(name, self._read)
            module._buffers[attribute] = self._fitting(name, made[name], module._buffers[attribute])

    def free(self, parameters: Iterable[str]) -> None:
        """Take parameters out again, and let go of the files that they were read from."""
        self._source.close()
        for name in self.stored(parameters):
            module, attribute = self._places[name][0]
            parameter = module._parameters[attribute]
            assert parameter is not None
            self._set(name, parameter.data.to("meta"))

    def _value(self, parameter: str) -> Tensor:
        return self._names.to_model(parameter, self._read)[parameter]

    def _set(self, name: str, value: Tensor) -> None:
        parameter = nn.Parameter(value, requires_grad=False)
        for module, attribute in self._places[name]:
            module._parameters[attribute] = parameter
            edit.refresh(module)

    def _fitting(self, name: str, value: Tensor, place: Tensor | None) -> Tensor:
        assert place is not None
        if value.shape != place.shape:
            raise DetentError(
                f"{self._source.path}: {name} has shape {tuple(value.shape)}, but config.json calls for"
                f" {tuple(place.shape)}; one of the two belongs to another model"
            )
        check_floating(self._source.path, name, value, place)
        new = value.to(self._device, place.dtype if place.is_floating_point() else None)
        if new.dtype == torch.float16 and not all_finite(new):
            raise too_large_for_float16(self._source, name)
        return new

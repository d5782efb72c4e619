"""Custom calibration algorithms that are handed the model as a whole, as NVIDIA ModelOpt's are.

A *mode* is an algorithm that is handed the model. A custom one is a configuration class and a descriptor::

    class MyConfig(detent.QuantizeAlgorithmConfig):
        method: Literal["my_calib"] = "my_calib"

    @detent.CalibrateModeRegistry.register_mode
    class MyDescriptor(detent.BaseCalibrateModeDescriptor):
        config_class = MyConfig

        def convert(self, model, config, forward_loop=None):
            ...

after which ``"algorithm": {"method": "my_calib"}`` selects it, alone or in a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from detent.algorithms.registry import Handler, ModelWork, forget, register
from detent.config.algorithm import ALGORITHMS, QuantizeAlgorithmConfig
from detent.errors import DetentError

#: ``convert(model, config, **kwargs)``: returns the model, or (model, metadata), or nothing if it changed it in place.
ConvertEntrypoint = Callable[..., Any]
#: ``restore(model, config, metadata)``.
RestoreEntrypoint = Callable[..., Any]
#: ``update(model, config, metadata)``.
UpdateEntrypoint = Callable[..., Any]

D = TypeVar("D", bound="type[BaseCalibrateModeDescriptor]")


class BaseCalibrateModeDescriptor:
    """Base of descriptors of calibration algorithms.

    A subclass defines `config_class`, and either `convert` (a method, or a property that returns a function) or
    `_calib_func`, a function that is called with the model, ``forward_loop`` and the fields of the configuration.

    Example:
        >>> import detent
        >>> class ThirdConfig(detent.QuantizeAlgorithmConfig):
        ...     method: str = "third"
        >>> @detent.CalibrateModeRegistry.register_mode
        ... class Third(detent.BaseCalibrateModeDescriptor):
        ...     config_class = ThirdConfig
        ...     def convert(self, model, config, forward_loop=None):
        ...         for weight in model.parameters():
        ...             weight.data /= 3
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> cfg = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}, "algorithm": "third"}
        >>> model = detent.quantize(model, cfg)
        >>> model.weight.item()
        1.0
        >>> detent.CalibrateModeRegistry.remove_mode("third")
    """

    #: Called with (model, forward_loop=..., **fields), where `convert` isn't overridden.
    _calib_func: Callable[..., Any] | None = None

    @property
    def config_class(self) -> type[QuantizeAlgorithmConfig]:
        """The configuration class; its ``method`` names the algorithm."""
        raise DetentError(f"{type(self).__name__} defines no config_class")

    @property
    def name(self) -> str:
        """The name of the mode: the method's, with ``_calibrate`` behind."""
        return f"{self.method}_calibrate"

    @property
    def method(self) -> str:
        """The algorithm's name, as users write it.

        Raises:
            DetentError: the configuration class gives ``method`` no default.
        """
        method = self.config_class.model_fields["method"].default
        if not isinstance(method, str) or not method:
            raise DetentError(f"{self.config_class.__name__}: give the field 'method' its name as default value")
        return method

    @property
    def convert(self) -> ConvertEntrypoint:
        """What is called with (model, config, forward_loop=...)."""
        function = type(self)._calib_func
        if function is None:
            raise DetentError(f"{type(self).__name__} defines neither convert nor _calib_func")

        def call(model: nn.Module, config: QuantizeAlgorithmConfig, forward_loop: ForwardLoop | None = None) -> Any:
            fields = {key: value for key, value in dict(config).items() if key != "method"}
            return function(model, forward_loop=forward_loop, **fields)

        return call

    @property
    def restore(self) -> RestoreEntrypoint:
        """What is called to redo what `convert` did. Ranges and weights are restored without it."""
        return lambda model, config, metadata: model

    @property
    def update_for_save(self) -> UpdateEntrypoint:
        """What is called before a model is saved."""
        return lambda model, config, metadata: None

    @property
    def update_for_new_mode(self) -> UpdateEntrypoint:
        """What is called before another mode is applied."""
        return lambda model, config, metadata: None

    def apply(self, model: nn.Module, config: QuantizeAlgorithmConfig, forward_loop: ForwardLoop | None) -> None:
        """Run the algorithm on `model`, in place.

        Raises:
            DetentError: `convert` answers with another model.
        """
        result = self.convert(model, config, forward_loop=forward_loop)
        given = result[0] if isinstance(result, tuple) else result
        if given is not None and given is not model:
            raise DetentError(f"algorithm {self.method!r}: convert returned another model; change the one it is given")


class CalibrateModeRegistry:
    """The custom calibration algorithms, by method.

    Example:
        >>> import detent
        >>> class HalveConfig(detent.QuantizeAlgorithmConfig):
        ...     method: str = "halve"
        >>> @detent.CalibrateModeRegistry.register_mode
        ... class Halve(detent.BaseCalibrateModeDescriptor):
        ...     config_class = HalveConfig
        ...     def convert(self, model, config, forward_loop=None):
        ...         for weight in model.parameters():
        ...             weight.data /= 2
        >>> detent.CalibrateModeRegistry.get("halve").name
        'halve_calibrate'
        >>> detent.CalibrateModeRegistry.remove_mode("halve")
    """

    _modes: dict[str, BaseCalibrateModeDescriptor] = {}

    @classmethod
    def register_mode(cls, descriptor: D) -> D:
        """Register a descriptor class; for use as a decorator.

        Raises:
            DetentError: it is not such a class, its configuration has no method, or the method is a built-in one.
        """
        if not (isinstance(descriptor, type) and issubclass(descriptor, BaseCalibrateModeDescriptor)):
            raise DetentError("register_mode takes a class derived from BaseCalibrateModeDescriptor")
        mode = descriptor()
        config = mode.config_class
        if not (isinstance(config, type) and issubclass(config, QuantizeAlgorithmConfig)):
            raise DetentError(f"{descriptor.__name__}: config_class is a class derived from QuantizeAlgorithmConfig")
        if mode.method in ALGORITHMS and mode.method not in cls._modes:
            raise DetentError(
                f"{descriptor.__name__}: {mode.method!r} is one of Detent's own algorithms; choose another name"
            )
        if mode.method in cls._modes:
            cls.remove_mode(mode.method)
        cls._modes[mode.method] = mode
        register(config)(ModeHandler)
        return descriptor

    @classmethod
    def remove_mode(cls, name: str) -> None:
        """Forget a custom algorithm, by its method or its mode's name.

        Raises:
            DetentError: there is none of that name.
        """
        method = name if name in cls._modes else name.removesuffix("_calibrate")
        if method not in cls._modes:
            raise DetentError(f"no custom algorithm is called {name!r}; there are: {', '.join(cls._modes) or 'none'}")
        forget(cls._modes.pop(method).config_class)

    @classmethod
    def get(cls, name: str) -> BaseCalibrateModeDescriptor | None:
        """The descriptor of a method or mode of this name, or None."""
        return cls._modes.get(name) or cls._modes.get(name.removesuffix("_calibrate"))


class ModeHandler(Handler[QuantizeAlgorithmConfig]):
    """Hands the model to the mode of a custom algorithm."""

    scope = "model"

    def change(self, step: QuantizeAlgorithmConfig, work: ModelWork) -> None:
        mode = CalibrateModeRegistry.get(str(step.method))
        assert mode is not None
        work.run_mode(mode, step)


ForwardLoop = Callable[[nn.Module], Any]

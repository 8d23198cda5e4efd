"""Let PEFT put its layers into a model, and take them out again.

The model is given back with its own modules, attributes and flags; the layers come by path, and what they share (the
projections of VeRA, the bank of VB-LoRA) comes once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pegbox.core import storage
from pegbox.core.errors import SettingsError, TargetError
from pegbox.core.site import Site
from pegbox.peft_bridge.kinds import Facts, facts
from pegbox.peft_bridge.stand_in import UNPADDED, Decoded

REFUSALS = (ValueError, TypeError, NotImplementedError, AttributeError, LookupError, RuntimeError, AssertionError)
ADJUSTED = "Invalid `"  # how PEFT's warnings begin that a setting is another from now on
ADAPTER = "default"  # PEFT's name of the one adapter that a harvested layer holds


class Bank(nn.Module):
    """What the layers of one adapter share, and PEFT's tuner that made them.

    Attributes:
        config: PEFT's configuration, as the tuner has completed it.
        layers: those not yet taken, by path; not registered here.
        holds: the attribute in which a layer keeps the module that it wraps.
    """

    def __init__(self, tuner: nn.Module, config: Any, layers: dict[str, nn.Module], holds: str) -> None:
        super().__init__()
        self.config, self.layers, self.holds = config, (layers,), holds
        self.tuner = (tuner,)  # its children are registered here instead
        for name, child in tuner._modules.items():
            self.add_module(name, child)

    def take(self, path: str) -> nn.Module | None:
        """The layer at a path, without the module that it wrapped; None if PEFT put none there."""
        layer = self.layers[0].pop(path, None)
        if layer is not None:
            layer._modules.pop(self.holds)
        return layer


def harvest(model: nn.Module, config: Any, what: str) -> Bank:
    """Make the layers that PEFT makes for a model with a configuration.

    Raises:
        SettingsError, TargetError: PEFT refuses the configuration or a target; the model is as it was.
    """
    with borrowed(model), quiet():
        _without_sites(model)
        _decode(model, facts(config.peft_type.value.lower()))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ADJUSTED)
                tuner = _tuner_class(config)(model, {ADAPTER: config}, ADAPTER)
        except (*REFUSALS, UserWarning) as error:
            raise refusal(error, what) from error
        holds, layers = _found(tuner, model)
    tuner._modules.pop("model")
    tuner.__dict__.pop("forward", None)  # adaption prompt keeps the model's own
    for layer in layers.values():
        _widen(layer, layer._modules[holds])
        _freeze_counts(layer)
        _complete(layer, layer._modules[holds])
    for child in tuner.children():
        _widen(child, None)
    return Bank(tuner, config, layers, holds)


def _without_sites(model: nn.Module) -> None:
    """The modules' own forwards: PEFT may copy a module."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Site):
            del module.__dict__["forward"]


def _decode(model: nn.Module, known: Facts) -> None:
    """Plain linears in the place of quantised ones, of which PEFT knows some with some tuners."""
    for holder in list(model.modules()) if known.how == "layers" else ():
        for name, module in holder._modules.items():
            if not isinstance(module, nn.Linear) or not storage.name(module, "weight"):
                continue
            holder._modules[name] = _plain(module) if known.of_class else Decoded(module)


def _plain(module: nn.Module) -> nn.Module:
    value = storage.decoded(module, "weight")
    return storage.linear(module, value.to(storage.dtype(module, "weight")))


def refusal(error: Exception, what: str) -> SettingsError | TargetError:
    """PEFT's refusal as ours."""
    told = f"{what}: HF PEFT refuses: {' '.join(str(error).split())}"
    about_target = isinstance(error, (TypeError, NotImplementedError)) or "arget" in str(error)
    refused = TargetError(told) if about_target else SettingsError(told)
    refused.peer = "HF PEFT"
    return refused


def _tuner_class(config: Any) -> Any:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def _found(tuner: Any, model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The attribute that holds what a layer wraps, and the outermost layers by path."""
    from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
    from peft.tuners.tuners_utils import BaseTunerLayer

    attention = (AdaptedAttention, AdaptedAttentionGPT)
    kinds: tuple[type[Any], ...] = (BaseTunerLayer, *attention)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, kinds) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    holds = "model" if any(isinstance(m, attention) for m in found.values()) else "base_layer"
    return holds, found


def _widen(module: nn.Module, without: nn.Module | None) -> None:
    """Masters in float32."""
    skip = set() if without is None else {id(m) for m in without.modules()}
    for sub in module.modules():
        if id(sub) in skip:
            continue
        for parameter in sub._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for name, value in sub._buffers.items():
            if value is not None and value.is_floating_point():
                sub._buffers[name] = value.float()


def _freeze_counts(layer: nn.Module) -> None:
    """What is no weight, AdaLoRA's count of ranks, does not train; PEFT lets it on a half-precision base."""
    own = getattr(layer, "adapter_layer_names", ())
    for name in getattr(layer, "other_param_names", ()):
        kept = layer._modules.get(name)
        if name not in own and isinstance(kept, nn.ParameterDict):
            kept.requires_grad_(False)


def _complete(layer: nn.Module, base: nn.Module | None) -> None:
    """What PEFT leaves out of a convolution that it runs beside the base's, as LoRA does: the dilation.

    Where the base pads with other than zeros, a layer is given its input padded already.
    """
    if not isinstance(base, _ConvNd):
        return
    beside = [m for m in layer.modules() if isinstance(m, _ConvNd) and m is not base]
    for conv in beside:
        if (conv.in_channels, conv.kernel_size, conv.padding) == (base.in_channels, base.kernel_size, base.padding):
            conv.dilation = base.dilation
            conv.padding = conv.padding if base.padding_mode == "zeros" else UNPADDED[: len(base.kernel_size)]


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to a model's modules and attributes inside, they are back after it; tensors are not copied."""
    parts = ("_modules", "_parameters", "_buffers")
    kept = [(m, dict(m.__dict__), {part: dict(m.__dict__[part]) for part in parts}) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, attributes, registered in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for part, values in registered.items():
                module.__dict__[part].clear()
                module.__dict__[part].update(values)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def mounted(model: nn.Module, bank: Bank, layers: Mapping[str, nn.Module]) -> Iterator[Any]:
    """Inside, the layers sit in the model as PEFT had put them; gives what PEFT's functions take for its model."""
    tuner, holds = bank.tuner[0], bank.holds
    with borrowed(model), quiet():
        standing = {path: layer.__dict__.pop(holds) for path, layer in layers.items()}
        tuner.__dict__["_modules"] = {"model": model, **tuner._modules}
        try:
            for path, layer in layers.items():
                parent, _, leaf = path.rpartition(".")
                owner = model.get_submodule(parent)
                layer.__dict__["_modules"] = {holds: owner._modules[leaf], **layer._modules}
                owner._modules[leaf] = layer
            yield _Wrapper(tuner)
        finally:
            tuner._modules.pop("model")
            for path, layer in layers.items():
                layer._modules.pop(holds, None)
                layer.__dict__[holds] = standing[path]


class _Wrapper(nn.Module):
    """Around a tuner, with the keys of PEFT's model class."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__()
        self.base_model = tuner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def file_names(
    model: nn.Module, bank: Bank, layers: Mapping[str, nn.Module], own: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Key in PEFT's file -> our state key, for every tensor of the adapter's that PEFT saves; and what else it saves.

    Args:
        own: the adapter's tensors by state key, the very ones.
    """
    from peft import get_peft_model_state_dict

    ours = {id(value): key for key, value in own.items()}
    with mounted(model, bank, layers) as wrapper:
        state = wrapper.state_dict(keep_vars=True)
        theirs = get_peft_model_state_dict(wrapper, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False)
    more = {key: value.detach().clone() for key, value in theirs.items() if id(value) not in ours}
    return {key: ours[id(value)] for key, value in theirs.items() if key not in more}, more


def put(model: nn.Module, bank: Bank, layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Let PEFT put the tensors of a file, which fit, where they go."""
    from peft import set_peft_model_state_dict

    with mounted(model, bank, layers) as wrapper:
        set_peft_model_state_dict(wrapper, dict(tensors), adapter_name=ADAPTER)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT's advice is for those who call PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

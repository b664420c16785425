"""LoRA on parameters, PEFT's ``target_parameters``: which parameter a pair of factors belongs to, and its experts.

PEFT wraps the module that holds a targeted parameter, once for every such parameter, in the order in which the model
registers them. So the factors of the last one are saved as the module's own, and those of every earlier one are a
``.base_layer`` deeper. A parameter of E experts, [E, …, …], has one pair of factors for all: A [E·r, d_in] holds those
of the experts one after another, and B [d_out, r·E] interleaves them, the expert being the index that runs fastest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ...base.errors import AdapterError
from ...maths.factored import Factors
from ..layout import Cut, TensorInfo
from ..module import Module, Parameter, Part
from .format import LoraConfig
from .names import CONFIG_NAME
from .target_modules import matches

_BASE_LAYER = ".base_layer"
_ONE_OF_EXPERTS = re.compile(r"(.+)\.\d+\.[^.]+")

# How the models of Transformers register the parameters of their experts: every class has some of these, in this order.
_REGISTERED = (
    "w1",
    "v1",
    "w2",
    "gate_proj",
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "down_proj",
    "down_proj_bias",
)


class Target(NamedTuple):
    """A parameter with factors of its own, by its name in the model: [experts, …, …], or a matrix for 1 expert.

    ``rank`` is that of the update of one expert, [d_out, d_in].
    """

    name: str
    experts: int
    rank: int
    d_out: int
    d_in: int


class Whole(NamedTuple):
    """A pair of factors in a file: what they are named after, with its ``.base_layer``, and the rows of A."""

    module: Module
    rows: int
    key_b: str
    key_a: str


def find_targets(adapter: str, config: LoraConfig, wrapped: Mapping[str, Whole]) -> dict[str, Target]:
    """Which of what is ``wrapped``, by name, stands for which parameter; the others are modules.

    Raises AdapterError where configuration and shapes do not decide it, and for what PEFT refuses.
    """
    if not config.target_parameters:
        return {}
    depths: defaultdict[str, list[int]] = defaultdict(list)
    for name in wrapped:
        holder, depth = _unwrapped(name)
        depths[holder].append(depth)
    targets: dict[str, Target] = {}
    for holder, own in depths.items():
        parameters = _parameters(config, holder, len(own))
        if own == [0] and _is_module(config, wrapped[holder], parameters):
            continue
        order = nested(parameters)
        if sorted(own) != list(range(len(own))) or len(order) != len(own):
            raise AdapterError(
                adapter,
                f"module {holder} has {_pairs(len(own))} of LoRA factors, and target_parameters in {CONFIG_NAME} does "
                f"not tell which parameters they belong to (perhaps {', '.join(parameters) or 'none'})",
                "name each one there as module.parameter",
            )
        wholes = [wrapped[holder + _BASE_LAYER * depth] for depth in range(len(own) - 1, -1, -1)]
        found = [_target(adapter, config, f"{holder}.{name}", whole) for name, whole in zip(order, wholes, strict=True)]
        _check_together(adapter, holder, found)
        targets |= {whole.module.name: target for whole, target in zip(wholes, found, strict=True)}
    if targets and config.raw.get("use_dora"):
        raise AdapterError(adapter, "DoRA on target_parameters is not supported, nor does PEFT have it")
    return targets


def nested(parameters: Iterable[str]) -> list[str]:
    """The parameters of one module from the innermost wrapper to the outermost: as the model registers them.

    One whose place among several is not known is left out.
    """
    parameters = list(parameters)
    if len(parameters) == 1:
        return parameters
    return sorted((name for name in parameters if name in _REGISTERED), key=_REGISTERED.index)


def cut_experts(
    target: Target, scale: float, whole: Whole, tensors: Mapping[str, TensorInfo]
) -> tuple[list[Part], dict[str, TensorInfo], dict[str, Cut]]:
    """The experts of a parameter, or all of a matrix, and for each factor of an expert where it is and its source."""
    _, _, key_b, key_a = whole
    name, _, rank, d_out, d_in = target
    parameter = name.rpartition(".")[2]
    if target.experts == 1:
        module = Module(name, "linear", d_out, d_in, parameter=Parameter(parameter))
        return [Part(module, rank, scale, key_b, key_a)], {}, {}
    experts: list[Part] = []
    infos: dict[str, TensorInfo] = {}
    cuts: dict[str, Cut] = {}
    for number in range(target.experts):
        for key, shape in ((key_b, (d_out, rank)), (key_a, (rank, d_in))):
            own = tensors[key]._replace(shape=shape)
            infos[f"{key}[{number}]"] = own._replace(begin=own.begin + number * own.size_bytes)
            cuts[f"{key}[{number}]"] = Cut(key, number, target.experts, interleaved=key == key_b)
        of = Parameter(parameter, number, target.experts)
        module = Module(f"{name}.{number}", "linear", d_out, d_in, parameter=of)
        experts.append(Part(module, rank, scale, f"{key_b}[{number}]", f"{key_a}[{number}]"))
    return experts, infos, cuts


def fuse(factors: Mapping[Module, Factors]) -> dict[Module, Factors]:
    """Factors as PEFT saves them: those of all experts of a parameter together, under the name of its wrapper.

    Experts of a lower rank are padded with zeros to the largest. Other modules stay as they are.
    """
    fused = {module: own for module, own in factors.items() if module.parameter is None}
    holders: defaultdict[str, defaultdict[str, list[Module]]] = defaultdict(lambda: defaultdict(list))
    for module in factors:
        if module.parameter is not None:
            holders[module.target.rpartition(".")[0]][module.parameter.name].append(module)
    for holder, parameters in holders.items():
        for depth, name in enumerate(reversed(nested(parameters))):
            experts = sorted(parameters[name], key=_number)
            rank = max(factors[expert][1].shape[0] for expert in experts)
            b, a = (torch.stack(side) for side in zip(*(_padded(factors[each], rank) for each in experts), strict=True))
            whole = experts[0]._replace(name=holder + _BASE_LAYER * depth, parameter=None)
            fused[whole] = b.permute(1, 2, 0).flatten(1), a.flatten(0, 1)
    return fused


def apart(modules: Sequence[Module]) -> Iterator[str]:
    """A note on experts that some adapters have as parameters and others as modules of their own, if there are any."""
    holders = {module.target.rpartition(".")[0]: module for module in modules if module.parameter is not None}
    for module in modules:
        match = _ONE_OF_EXPERTS.fullmatch(module.name)
        if match and module.parameter is None and match[1] in holders:
            yield (
                f"some adapters have a LoRA for each expert ({module.name}), others have target_parameters "
                f"({holders[match[1]].target}): these share no modules"
            )
            return


def _unwrapped(name: str) -> tuple[str, int]:
    """The module that holds the parameter, and how deep in its wrappers this one is."""
    holder = name
    while holder.endswith(_BASE_LAYER):
        holder = holder.removesuffix(_BASE_LAYER)
    return holder, (len(name) - len(holder)) // len(_BASE_LAYER)


def _parameters(config: LoraConfig, holder: str, count: int) -> list[str]:
    """The parameters of a module that ``target_parameters`` may mean, if possible as many as ``count``.

    A name without a module, like ``down_proj``, may mean a parameter of any module.
    """
    named: dict[str, None] = {}
    bare: dict[str, None] = {}
    for target in config.target_parameters:
        module, _, parameter = target.rpartition(".")
        if not module:
            bare[parameter] = None
        elif f".{holder}".endswith(f".{module}"):
            named[parameter] = None
    return list(named if len(named) == count else named | bare)


def _is_module(config: LoraConfig, whole: Whole, parameters: list[str]) -> bool:
    """Whether factors are those of a target module, as far as the configuration tells.

    What ``target_modules`` does not select, and what can be no single parameter either, is one if its rank is right.
    """
    targets = config.raw.get("target_modules")
    name = whole.module.name
    try:
        selected = targets == "all-linear" or matches(targets or (), name)
    except re.error:
        selected = False
    uncertain = len(parameters) != 1 and whole.rows == config.rank(name)
    return selected or uncertain or not parameters or whole.module.kind != "linear"


def _target(adapter: str, config: LoraConfig, name: str, whole: Whole) -> Target:
    rank = config.rank(name)
    if whole.module.kind != "linear" or whole.rows % rank:
        raise AdapterError(
            adapter,
            f"parameter {name}: lora_A has {whole.rows} rows, no multiple of the rank in {CONFIG_NAME}, {rank}",
        )
    return Target(name, whole.rows // rank, rank, whole.module.d_out, whole.module.d_in)


def _check_together(adapter: str, holder: str, targets: Sequence[Target]) -> None:
    """Parameters of one module have as many experts, and shapes that do not say that their order is another one."""
    counts = {target.experts for target in targets} - {1}
    if len(counts) > 1:
        experts = ", ".join(f"{target.experts} of {target.name}" for target in targets)
        raise AdapterError(
            adapter, f"module {holder}: the ranks in {CONFIG_NAME} mean different numbers of experts: {experts}"
        )
    by_name = {target.name.rpartition(".")[2]: target for target in targets if target.experts > 1}
    down = by_name.get("down_proj")
    for up in (by_name.get("gate_up_proj"), by_name.get("up_proj")):
        if up and down and not _fit(up, down) and _fit(down, up):
            raise AdapterError(
                adapter,
                f"module {holder}: its factors are nested in another order than {up.name} and {down.name}, from the "
                "inside out: which are those of which?",
            )


def _fit(up: Target, down: Target) -> bool:
    """Whether experts can compute down(f(up(x))), the output of ``up`` perhaps halved by a gate.

    Updates are transposed, all of them, where PEFT took a model for one that stores its weights so.
    """
    as_they_are = up.d_in == down.d_out and up.d_out in (down.d_in, 2 * down.d_in)
    return as_they_are or (up.d_out == down.d_in and up.d_in in (down.d_out, 2 * down.d_out))


def _padded(factors: Factors, rank: int) -> Factors:
    """B [d_out, k] and A [k, d_in] with zeros added up to ``rank``."""
    b, a = factors
    missing = rank - a.shape[0]
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


def _number(module: Module) -> int:
    return module.parameter.expert if module.parameter else 0


def _pairs(count: int) -> str:
    return "one pair" if count == 1 else f"{count} pairs"

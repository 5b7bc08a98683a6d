"""Choices of one's own: functions outside the package, found by name, called with a slot's batch, and held to its promises.

What a function is given comes first, by position; the ``settings`` of its section follow as keyword arguments.

    reward, filter, advantage, weight, regulariser    (batch: TokenBatch, **settings)
    aggregation                                       (weight, trainable, trajectory, **settings) of a minibatch
    surrogate                                         (tokens: UpdateTokens, **settings) of a piece of a minibatch

What it returns has the batch's dtype and one number per token, 0 where the policy did not choose it. A filter returns a
truth value per trajectory, a surrogate the loss alone or a ``SurrogateLoss``, a regulariser the bonus alone or
``EntropyTerms``.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.objective.batch import SlotMemory, TokenBatch
from pipeline.objective.estimates import AdvantageEstimate, Estimates
from pipeline.objective.regularisers import EntropyTerms, without_band
from pipeline.objective.surrogates import MinibatchPlan, SurrogateLoss, UpdateTokens
from pipeline.objective.weights import shuffled
from pipeline.settings.custom import Custom, custom_sections
from pipeline.settings.params import Config
from pipeline.settings.weight import CustomWeight
from pipeline.trajectories.trajectory import RESPONSE_ROLES
from pipeline.workspace.errors import UserError, raised


def check_functions(config: Config, source: str) -> None:
    """Find every function that a params file names; ``source`` is what errors call the file.

    Raises:
        UserError: a line per one that cannot be used, with its key, its value and what is allowed.
    """
    named = {f"method_defaults.{slot}": section for slot, section in custom_sections(config.method_defaults).items()}
    for name, method in config.methods.items():
        own = custom_sections(method).items()
        named |= {f"methods.{name}.{slot}": s for slot, s in own if s != getattr(config.method_defaults, slot)}
    lines = []
    for key, section in named.items():
        try:
            find(section)
        except UserError as error:
            lines.append(f"{source}: {key.rpartition('.')[0]}.{error}")
    if lines:
        raise UserError("\n".join(lines))


def find(section: Custom) -> Callable[..., Any]:
    """The function of a section, which takes what the slot gives and the section's settings.

    Raises:
        UserError: the module cannot be imported, has no such function, or the function does not take these arguments.
    """
    module, _, name = section.function.partition(":")
    refused = f"{section.slot}.function: {section.function!r} cannot be used"
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{refused}: {error}; allowed: a module of the project's root or on PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"{refused}: importing {module} raised {raised(error)}") from error
    if not inspect.isfunction(function):
        raise UserError(f"{refused}: {module} has no function {name}")
    parameters, given = list(inspect.signature(function).parameters.values()), section.given
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(given)]
    if len(positional) < len(given):
        taken = inspect.signature(function)
        raise UserError(f"{refused}: it takes {taken}; allowed: ({', '.join(given)}, *, settings)")
    own = {p.name: p for p in parameters if p not in positional and p.kind is not p.VAR_POSITIONAL}
    if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        for key in sorted(section.settings.keys() - own.keys()):
            allowed = ", ".join(own) or "nothing"
            raise UserError(f"{section.slot}.settings.{key}: no setting of {section.function}; allowed: {allowed}")
    for key, parameter in own.items():
        needed = parameter.kind is not parameter.VAR_KEYWORD and parameter.default is parameter.empty
        if needed and key not in section.settings:
            raise UserError(f"{section.slot}.settings.{key}: missing, and {section.function} has no default for it")
    return function


def reward(batch: TokenBatch, section: Custom) -> Float[Tensor, " n"]:
    """The new reward of each token."""
    return _of_tokens(section, _called(section, batch), batch)


def keep(batch: TokenBatch, section: Custom) -> Bool[Tensor, " e"]:
    """Which trajectories are trained on; a branch only with the one that it branches from."""
    kept = _shaped(section, _called(section, batch), batch.success)
    if bool(((batch.parent >= 0) & kept & ~kept[batch.parent.clamp_min(0)]).any()):
        _refuse(section, "a branch without its parent", "both or neither")
    return kept


def advantage(batch: TokenBatch, estimates: Estimates, state: SlotMemory, section: Custom) -> AdvantageEstimate:
    """A_t of each token."""
    return AdvantageEstimate(_of_tokens(section, _called(section, batch), batch), {}, {})


def weight(batch: TokenBatch, section: CustomWeight) -> Float[Tensor, " n"]:
    """W_t of each token; as a control, those of each role's tokens in a random order."""
    given = _of_tokens(section, _called(section, batch), batch)
    if bool((given < 0).any()):
        _refuse(section, f"the weight {float(given.min()):g}", "at least 0")
    for role in RESPONSE_ROLES if section.shuffle else ():
        given = shuffled(given, batch.of(role), batch.noise)
    return given


def aggregation(
    weight: Float[Tensor, " n"], trainable: Bool[Tensor, " n"], trajectory: Int[Tensor, " n"], section: Custom
) -> Float[Tensor, " n"]:
    """C_t of each token of a minibatch, 0 where its weight is."""
    given = _shaped(section, _called(section, weight, trainable, trajectory), weight)
    if bool((given[weight == 0] != 0).any()):
        _refuse(section, "a factor of a token that has no weight", "0 there")
    return given


def surrogate(tokens: UpdateTokens, plan: MinibatchPlan | None, section: Custom) -> SurrogateLoss:
    """The loss of each token. A loss that is not finite is the training's to count: weights may have led there."""
    given = _called(section, tokens)
    nowhere = torch.zeros_like(tokens.advantage, dtype=torch.bool)
    loss, clipped = given if isinstance(given, tuple) and len(given) == 2 else (given, nowhere)
    loss = _shaped(section, loss, tokens.logprob, finite=False)
    if tokens.logprob.requires_grad and not loss.requires_grad:
        _refuse(section, "a loss without a gradient", "a function of tokens.logprob")
    return SurrogateLoss(loss, _shaped(section, clipped, nowhere))


def regulariser(batch: TokenBatch, state: SlotMemory, section: Custom) -> tuple[EntropyTerms, dict[str, float]]:
    """The entropy terms of each token; it remembers nothing."""
    given = _called(section, batch)
    if not isinstance(given, EntropyTerms):
        return without_band(_shaped(section, given, batch.entropy, place=batch.place)), {}
    for name, values in given._asdict().items():
        _shaped(section, values, batch.entropy, finite=name in ("bonus", "penalty"), place=batch.place)
        if bool(values.isnan().any()):
            _refuse(section, f"{name} nan", "a number, or infinity")
    return given, {}


def _called(section: Custom, *given: Any) -> Any:
    function = find(section)
    try:
        return function(*given, **section.settings)
    except Exception as error:
        raise UserError(f"{section.slot}.function: {section.function!r} raised {raised(error)}") from error


def _of_tokens(section: Custom, given: Any, batch: TokenBatch) -> Float[Tensor, " n"]:
    values = _shaped(section, given, batch.reward, place=batch.place)
    if bool((values[~batch.trainable] != 0).any()):
        _refuse(section, "another number than 0 for a token that the policy did not choose", "0 there")
    return values


def _shaped(
    section: Custom, given: Any, like: Tensor, finite: bool = True, place: Callable[[int], str] = "token {}".format
) -> Tensor:
    """What has the shape, the dtype and the device of another tensor, and only finite numbers.

    ``place`` says in words where a number is.
    """
    if not isinstance(given, Tensor):
        _refuse(section, f"a {type(given).__name__}", _said(like))
    if (given.shape, given.dtype, given.device) != (like.shape, like.dtype, like.device):
        _refuse(section, _said(given), _said(like))
    if finite and not bool(given.isfinite().all()):
        first = int((~given.isfinite()).nonzero()[0])
        _refuse(section, f"{float(given[first])} for {place(first)}", "finite numbers")
    return given


def _said(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


def _refuse(section: Custom, returned: str, allowed: str) -> NoReturn:
    raise UserError(f"{section.slot}.function: {section.function!r} returned {returned}; allowed: {allowed}")

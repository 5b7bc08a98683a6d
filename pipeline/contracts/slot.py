"""The contracts that a slot's function keeps, and a suite that looks for broken ones in a function of one's own.

    actfocus contracts --slot weight --function mine:late --settings '{"strength": 1.0}'

``CONTRACTS`` says what is checked, in order, on made-up batches. What a function may return is in pipeline/objective/custom.py.
"""

import dataclasses
import inspect
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from pipeline.objective import custom
from pipeline.objective.batch import TokenBatch
from pipeline.objective.surrogates import UpdateTokens
from pipeline.settings.advantage import CustomAdvantage
from pipeline.settings.aggregation import CustomAggregation
from pipeline.settings.custom import Custom
from pipeline.settings.filter import CustomFilter
from pipeline.settings.regulariser import CustomRegulariser
from pipeline.settings.reward import CustomReward
from pipeline.settings.surrogate import CustomSurrogate
from pipeline.settings.weight import CustomWeight
from pipeline.trajectories.trajectory import Role
from pipeline.workspace.errors import UserError

BATCHES = 6
"""Made-up batches that each contract is checked on; in the last one nobody has acted."""
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""How far float32 and another order of sums may be off."""


def check_slot(slot: str, function: str, settings: Mapping[str, Any] | None = None) -> list[str]:
    """A line per broken contract: its name, and what was seen. A contract that needs a broken one is left out.

    The function is ``module:name``, its ``settings`` are keyword arguments, as in params.yaml.

    Raises:
        UserError: no such slot, or no such function with such arguments.
    """
    if slot not in SECTIONS:
        raise UserError(f"slot: {slot!r} takes no function; allowed: {', '.join(SECTIONS)}")
    try:
        section = SECTIONS[slot](kind="custom", function=function, settings=dict(settings or {}))
    except ValidationError:
        raise UserError(f"function: {function!r} is not allowed; allowed: module:name of a function") from None
    custom.find(section)
    lines, failed = list[str](), set[str]()
    for name, (contract, needs) in CONTRACTS.items():
        if failed.intersection(needs):
            failed.add(name)
            continue
        try:
            seen = next(contract(section), None)
        except UserError as error:
            seen = str(error)
        if seen is not None:
            failed.add(name)
            lines.append(f"{name}: {seen}")
    return lines


def made_up(seed: int, dtype: torch.dtype = torch.float32) -> TokenBatch:
    """Twelve trajectories of three groups, with prompts, observations, a prefilled tag, and responses that are malformed.

    Numbers are float32's in any dtype. With the last seed of ``BATCHES`` all responses are malformed.
    """
    draws = np.random.default_rng(seed)
    acted = [Role.THINK_TAG, Role.REASONING, Role.REASONING, Role.THINK_TAG, Role.ANSWER_TAG, Role.ACTION, Role.ACTION]
    rows: list[tuple[int, bool, int, int]] = []  # role, trainable, trajectory, turn
    owners, rewarded = list[int](), dict[int, float]()
    for trajectory in range(12):
        rows += [(Role.PROMPT, False, trajectory, -1)] * int(draws.integers(1, 4))
        for number in range(int(draws.integers(1, 4))):
            rows += [(Role.OBSERVATION, False, trajectory, -1)] * (2 if number else 0)
            malformed = seed == BATCHES - 1 or draws.random() < 0.2
            response = [Role.THINK_TAG, *[Role.OTHER] * int(draws.integers(1, 5))] if malformed else acted
            turn = len(owners)
            rows += [(role, place > 0, trajectory, turn) for place, role in enumerate(response)]
            rewarded[len(rows) - 1] = float(draws.choice([0.0, 1.0, -0.1]))
            owners.append(trajectory)
    role, trainable, trajectory_of, turn_of = (torch.tensor(column) for column in zip(*rows, strict=True))

    def values(scale: float, shift: float = 0.0) -> Tensor:
        drawn = torch.from_numpy(shift + scale * draws.standard_normal(len(rows))).float()
        return torch.where(trainable, drawn, 0.0).to(dtype)

    reward = torch.zeros(len(rows), dtype=dtype)
    reward[list(rewarded)] = torch.tensor(list(rewarded.values())).to(dtype)
    returns = torch.zeros(12, dtype=dtype).index_add_(0, trajectory_of, reward)
    return TokenBatch(
        role=role,
        trainable=trainable,
        trajectory=trajectory_of,
        turn=turn_of,
        turn_trajectory=torch.tensor(owners),
        turn_state=torch.from_numpy(3 * draws.integers(0, 3, len(owners))) + torch.tensor(owners) // 4,
        group=torch.arange(12) // 4,
        success=returns > 0.5,
        returns=returns,
        reward=reward,
        logprob=-values(1.0).abs(),
        entropy=values(1.0).abs(),
        energy=values(3.0, shift=-10.0),
        ref_logprob=-values(1.0).abs(),
        ref_entropy=values(1.0).abs(),
        noise=torch.from_numpy(draws.random(len(rows))).float().to(dtype),
        iteration=seed,
        parent=torch.full((12,), -1),
        split=torch.zeros(12, dtype=torch.long),
        regular=torch.ones(12, dtype=torch.bool),
        advantage=values(1.0),
    )


def taken(batch: TokenBatch, order: Tensor) -> tuple[TokenBatch, Tensor]:
    """Some trajectories of a batch, in an order; and the indices of their tokens in the whole."""
    tokens = torch.cat([torch.nonzero(batch.trajectory == e).squeeze(-1) for e in order])
    turns = torch.cat([torch.nonzero(batch.turn_trajectory == e).squeeze(-1) for e in order])
    place, number = torch.full((batch.trajectories,), -1), torch.full((len(batch.turn_trajectory) + 1,), -1)
    place[order], number[turns] = torch.arange(len(order)), torch.arange(len(turns))  # the last number is turn -1's
    per = dict.fromkeys(("turn_trajectory", "turn_state"), turns)
    per |= dict.fromkeys(("group", "success", "returns", "parent", "split", "regular"), order)
    columns = {name: column for name, column in vars(batch).items() if isinstance(column, Tensor)}
    chosen: dict[str, Any] = {name: column[per.get(name, tokens)] for name, column in columns.items()}
    chosen["trajectory"], chosen["turn"] = place[chosen["trajectory"]], number[chosen["turn"]]
    chosen["turn_trajectory"] = place[chosen["turn_trajectory"]]
    return dataclasses.replace(batch, **chosen), tokens


def _update(batch: TokenBatch) -> UpdateTokens:
    """The batch's trainable tokens after updates that have moved their ratios by up to half a nat."""
    own = batch.trainable
    return UpdateTokens(
        logprob=(batch.logprob[own] + batch.noise[own] - 0.5).requires_grad_(),
        entropy=batch.entropy[own],
        logprob_old=batch.logprob[own],
        ref_logprob=batch.ref_logprob[own],
        advantage=batch.advantage[own],
        coefficient=torch.full_like(batch.logprob[own], 0.01),
        entropy_terms=torch.zeros(int(own.sum()), 4, dtype=batch.entropy.dtype),
        noise=batch.noise[own],
        trajectory=torch.unique(batch.trajectory[own], return_inverse=True)[1],
    )


def _given(section: Custom, batch: TokenBatch) -> tuple[Any, ...]:
    """What the slot gives its function of a batch."""
    if section.slot == "surrogate":
        return (_update(batch),)
    if section.slot == "aggregation":
        return batch.entropy.clone(), batch.trainable, batch.trajectory
    return (batch,)


def _column(section: Custom, batch: TokenBatch) -> Float[Tensor, "n k"]:
    """What the function makes of each token."""
    return _CALLS[type(section)](section, batch, *_given(section, batch))


def _of_surrogate(section: Custom, batch: TokenBatch, tokens: UpdateTokens) -> Float[Tensor, "n 3"]:
    with torch.enable_grad():
        loss, clipped = custom.surrogate(tokens, None, section)
        (gradient,) = torch.autograd.grad(loss.sum(), tokens.logprob)
    column = torch.zeros(len(batch.role), 3, dtype=loss.dtype)
    column[batch.trainable] = torch.stack([loss.detach(), gradient, clipped.to(loss.dtype)], dim=-1)
    return column


_CALLS: dict[type[Custom], Callable[..., Tensor]] = {
    CustomReward: lambda section, batch, given: custom.reward(given, section)[:, None],
    CustomFilter: lambda section, batch, given: custom.keep(given, section)[batch.trajectory, None].to(batch.reward),
    CustomAdvantage: lambda section, batch, given: custom.advantage(given, {}, {}, section).advantage[:, None],
    CustomWeight: lambda section, batch, given: custom.weight(given, section)[:, None],
    CustomAggregation: lambda section, batch, weight, trainable, trajectory: custom.aggregation(
        weight, trainable, trajectory, section
    )[:, None],
    CustomSurrogate: _of_surrogate,
    CustomRegulariser: lambda section, batch, given: torch.stack(custom.regulariser(given, {}, section)[0], dim=-1),
}
SECTIONS = {section.slot: section for section in _CALLS}
"""The slots that take a function of one's own."""


def form(section: Custom) -> Iterator[str]:
    """What is returned has the shape and dtype that the slot asks for, is finite, and 0 where it must be."""
    for seed in range(BATCHES):
        if not bool(_column(section, made_up(seed)).isnan().logical_not().all()):
            yield "what it returns, or its gradient, is not a number"


def memory(section: Custom) -> Iterator[str]:
    """Two calls are equal, whatever came between them."""
    for seed in range(BATCHES):
        first = _column(section, made_up(seed))
        _column(section, made_up(seed + BATCHES))
        if not torch.equal(first, _column(section, made_up(seed))):
            yield "two calls on the same batch differ; what is random shall come from its noise"


def inputs(section: Custom) -> Iterator[str]:
    """What it is given is left as it was."""
    for seed in range(BATCHES):
        batch = made_up(seed)
        given = _given(section, batch)
        before = {name: tensor.detach().clone() for name, tensor in _tensors(section, given)}
        _CALLS[type(section)](section, batch, *given)
        for name, tensor in _tensors(section, given):
            if not torch.equal(before[name], tensor):
                yield f"it changes {name}, which it is given"


def generators(section: Custom) -> Iterator[str]:
    """The global generators of Python, NumPy and torch are left as they were."""
    states: dict[str, Callable[[], Any]] = {
        "random": random.getstate,
        "numpy.random": lambda: pickle.dumps(np.random.get_state()),
        "torch": lambda: torch.get_rng_state().tolist(),
    }
    for seed in range(BATCHES):
        before = {name: state() for name, state in states.items()}
        _column(section, made_up(seed))
        for name, state in states.items():
            if state() != before[name]:
                yield f"it draws from the global generator of {name}; what is random shall come from the batch's noise"


def order(section: Custom) -> Iterator[str]:
    """Trajectories in another order have what they had."""
    for seed in range(BATCHES):
        batch = made_up(seed)
        other, tokens = taken(batch, torch.from_numpy(np.random.default_rng(seed).permutation(batch.trajectories)))
        if not _close(_column(section, batch)[tokens], _column(section, other)):
            yield "what a token is given depends on the order of the trajectories"


def pieces(section: Custom) -> Iterator[str]:
    """A surrogate's loss on a piece of a minibatch is what it is on the whole; the other slots see all at once."""
    for seed in range(BATCHES if section.slot == "surrogate" else 0):
        batch = made_up(seed)
        piece, tokens = taken(batch, torch.arange(0, batch.trajectories, 3))
        if not _close(_column(section, batch)[tokens], _column(section, piece)):
            yield "a token's loss depends on how the minibatch is cut into pieces"


def precision(section: Custom) -> Iterator[str]:
    """In float64 the same comes out."""
    for seed in range(BATCHES):
        single, double = _column(section, made_up(seed)), _column(section, made_up(seed, torch.float64))
        if not _close(single.double(), double.double()):
            yield f"float32 and float64 differ by up to {float((single - double).abs().nan_to_num(0).max()):.2g}"


def settings(section: Custom) -> Iterator[str]:
    """Every setting that is a number or a truth value changes something, or is refused, if it is changed."""
    declared = list(inspect.signature(custom.find(section)).parameters.values())[len(section.given) :]
    defaults = {p.name: p.default for p in declared if p.default is not p.empty}
    for name, value in (defaults | section.settings).items():
        others = _others(value)
        if others and not any(_matters(section, name, other) for other in others):
            yield f"{name} has no effect: {', '.join(f'{other:g}' for other in others)} give what {value} gives"


def _others(value: Any) -> list[Any]:
    """Values to try in place of one; none if it is no number."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(0, value - 1), 2 * value + 1]
    return [0.0, value / 2, value + 0.1, 2 * value + 0.5, value + 10.0] if isinstance(value, float) else []


def _matters(section: Custom, name: str, value: Any) -> bool:
    changed = section.model_copy(update={"settings": section.settings | {name: value}})
    try:
        return any(
            not torch.equal(_column(section, made_up(seed)), _column(changed, made_up(seed))) for seed in range(BATCHES)
        )
    except UserError:
        return True


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=RELATIVE, atol=ABSOLUTE)


def _tensors(section: Custom, given: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(section.given, given, strict=True):
        named = vars(value).items() if dataclasses.is_dataclass(value) else [("", value)]
        yield from ((f"{name}.{field}".rstrip("."), part) for field, part in named if isinstance(part, Tensor))


CONTRACTS: dict[str, tuple[Callable[[Custom], Iterator[str]], tuple[str, ...]]] = {
    "form": (form, ()),
    "memory": (memory, ("form",)),
    "inputs": (inputs, ("form",)),
    "generators": (generators, ("form",)),
    "order": (order, ("memory",)),
    "pieces": (pieces, ("memory",)),
    "precision": (precision, ("memory",)),
    "settings": (settings, ("memory",)),
}
"""Each contract with those without which its verdict means nothing."""

"""What every objective is: a section of keys, a loss on log-probabilities, and what the rest of a run must know of it.

A new objective is a subclass of :class:`Objective` under the decorator :func:`objective`, which names it. It adds its
keys, each with a default and a docstring, sets what it declares, and has a :meth:`Objective.loss`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_cca.effects import Affects, key
from megatron_cca.errors import UserError
from megatron_cca.sections import strict

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_cca.objectives.rows import PairLogps, SequenceLogps


@strict
class Objective:
    """Section ``objective``: what is trained for. Each objective has keys of its own beside these two, and a key of
    another one is refused. Where ``--set objective.name`` chooses another one than the file does, the keys of the file
    that it does not have are left behind.
    """

    _: KW_ONLY
    name: str
    """Which one."""
    normalization: Literal["vocabulary", "image"] = key("vocabulary", Affects.NUMBERS, reference=True)
    """What log p(x | c) is normalised over at each visual token: all words that the head predicts, as the authors do,
    or the visual words alone, as drawing does. The latter computes less of the head."""

    contrasts: ClassVar[Literal["conditions"] | None] = None
    """What the two rows of a sample differ in; policy and reference pass over both, and :meth:`loss` takes
    :class:`PairLogps`. None is one row a sample and no reference; it takes :class:`SequenceLogps`."""
    is_plain_likelihood: ClassVar[bool] = False
    """Whether it only raises the likelihood of the data, so that a study can have it for its control."""
    reward_scale: ClassVar[str | None] = None
    """The key that log-ratios are multiplied with before they enter the loss, such as ``beta``: the gate of step 0
    judges their product. None where the gradient does not depend on the reference."""
    against_collapse: ClassVar[str] = ""
    """What to do, beside a lower learning rate, where the policy forgets the images: ``raise objective.beta
    ({beta:g})``, keys in braces. It ends where "or lower optimizer.lr" can follow."""
    without_contrast: ClassVar[str] = "only raises the likelihood of the images"
    """What it does, in words that follow its name, in rows whose two conditions are one."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a frozen model."""
        return self.contrasts is not None

    @property
    def rows_per_sample(self) -> int:
        """Two for a sample that is contrasted with itself, one otherwise."""
        return 1 if self.contrasts is None else 2

    @property
    def collapse_advice(self) -> str:
        """Return :attr:`against_collapse` with the values of the keys."""
        return self.against_collapse.format(**asdict(self))

    def loss(self, rows: PairLogps | SequenceLogps) -> Tensor:
        """Return the loss over B rows, a differentiable scalar."""
        raise NotImplementedError

    def __call__(self, rows: PairLogps | SequenceLogps) -> ObjectiveResult:
        """Return the loss over B rows, and their metrics."""
        return ObjectiveResult(self.loss(rows), rows)


@dataclass(frozen=True)
class ObjectiveResult:
    """What an objective makes of rows.

    Attributes:
        loss: a differentiable scalar.
        rows: what it was called with.
    """

    loss: Tensor
    rows: PairLogps | SequenceLogps

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached scalars. Computed when asked for, since that may wait for the device."""
        return self.rows.metrics(self.loss)


DEFAULT = "cca"
# By the name that ``objective.name`` has; filled by :func:`register`.
OBJECTIVES: dict[str, type[Objective]] = {}


def objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Make a subclass of :class:`Objective` the one of this name: a strict dataclass; a bad value is a UserError.

    Its own keys may be given by their places, in the order of the class; the common ones may not.
    """

    def make(cls: type[Objective]) -> type[Objective]:
        cls.__annotations__ = {"name": Literal[name], **cls.__annotations__}
        cls.name = field(default=name, kw_only=True)
        made = strict(cls)
        made.__init__ = _with_user_errors(made.__init__)
        return made

    return make


def _with_user_errors(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Objective, *values: Any, **keys: Any) -> None:
        try:
            init(self, *values, **keys)
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].replace("Input should be", "must be")
            raise UserError(f"objective.{first['loc'][0]}: {message}, found {first['input']}") from None

    return checked


def is_objective(value: Any) -> bool:
    """Whether a value is a class that :func:`objective` made."""
    return isinstance(value, type) and issubclass(value, Objective) and "name" in vars(value)


def register(cls: type[Objective]) -> None:
    """Let ``objective.name`` choose an objective that :func:`objective` made."""
    usual = cls()
    # Now, rather than when a run first asks.
    assert usual.reward_scale is None or usual.reward_scale in asdict(usual), f"{cls.name} has no {usual.reward_scale}"
    assert isinstance(usual.collapse_advice, str)
    OBJECTIVES[cls.name] = cls


def known_names() -> list[str]:
    """Return what ``objective.name`` may be; objectives without a reference come first."""
    return sorted(OBJECTIVES, key=lambda name: OBJECTIVES[name].contrasts is not None)


def keys_of(name: Any) -> list[str] | None:
    """Return the keys that the objective of this name has, its name aside; None where there is no such objective."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        return None
    common = [field.name for field in fields(Objective)]
    own = [field.name for field in fields(OBJECTIVES[name]) if field.name not in common]
    return [*own, *(key for key in common if key != "name")]


def inherited(section: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Return what is left of a section ``objective`` when another objective is chosen: the keys that it has, too."""
    known = keys_of(name)
    return dict(section) if known is None else {key: value for key, value in section.items() if key in known}


def objective_of(section: Any, info: ValidationInfo) -> Objective:
    """Validate a section ``objective`` into the class that its ``name`` chooses; a validator of pydantic.

    Raises:
        ValidationError: an unknown name, a key that this objective does not have, a value out of range.
    """
    if isinstance(section, Objective):
        return section
    name = section.get("name", DEFAULT) if isinstance(section, dict) else DEFAULT
    known = keys_of(name)
    if known is None:
        *others, last = (f"'{one}'" for one in known_names())
        expected = {"expected": f"{', '.join(others)} or {last}"}
        raise _refusal(InitErrorDetails(type="literal_error", loc=("name",), input=name, ctx=expected))
    for given in section if isinstance(section, dict) else ():
        if given not in ("name", *known):
            reason = PydanticCustomError("no_such_key", f"{name} has no such key", {"known": known})
            raise _refusal(InitErrorDetails(type=reason, loc=(given,), input=section[given]))
    # Strict mode takes a dataclass for a dataclass only; its JSON form takes a plain object.
    return TypeAdapter(OBJECTIVES[name]).validate_json(json.dumps(section), context=info.context)


def _refusal(details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("Objective", [details])

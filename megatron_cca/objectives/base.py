"""The base of all objectives: a section of keys, a loss on log-probabilities, and facts that the rest of a run needs.

Inputs of objectives are rows: summed log-probabilities of sequences.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_cca.errors import UserError
from megatron_cca.keys import Affects, NonNegativeFloat, key, strict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probabilities of the image tokens of B samples, in nats; float ``[B]`` each.

    Attributes:
        policy_positive: log p_theta(x | c), the sample's own condition.
        policy_negative: log p_theta(x | c'), a condition that does not belong to the sample. In pairs of images it is
            log p_theta(x' | c), of the sample's partner.
        reference_positive: log p_phi(x | c) of the frozen reference.
        reference_negative: log p_phi(x | c'), or log p_phi(x' | c).
        negative_is_positive: bool ``[B]``. True for rows whose "negative" counts as a positive, because the condition
            was dropped or no different condition was found.
        mean_num_tokens: image tokens per row, averaged over the *global* batch. Only a likelihood term needs it.
    """

    policy_positive: Tensor
    policy_negative: Tensor
    reference_positive: Tensor
    reference_negative: Tensor
    negative_is_positive: Tensor
    mean_num_tokens: float = math.nan

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Return log(p_theta / p_phi) of positives and negatives, float ``[B]`` each."""
        return self.policy_positive - self.reference_positive, self.policy_negative - self.reference_negative

    def negative_signs_and_weights(self, negative_weight: float) -> tuple[Tensor, Tensor]:
        """Return sign and weight of each row's negative term by the authors' rules, float ``[B]`` each.

        A true negative has -1 and ``negative_weight``. A "negative" that counts as a positive has +1 and 1, which keeps
        the unconditional model intact.
        """
        import torch  # here, since reading keys needs no torch

        flagged, dtype = self.negative_is_positive, self.policy_negative.dtype
        return torch.where(flagged, 1.0, -1.0).to(dtype), torch.where(flagged, 1.0, negative_weight).to(dtype)

    def mean_of_contrasts(self, rows: Tensor) -> Tensor:
        """Return the mean of float ``[B]``, in which rows without a true negative count as 0 and have no gradient."""
        return rows.masked_fill(self.negative_is_positive, 0).mean()

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the metrics of every objective on pairs, scalars, in nats.

        ``positive_log_ratio`` is the mean over all rows. ``negative_log_ratio``, ``margin`` (mean positive minus
        negative log-ratio) and ``accuracy`` (share with positive > negative) are over the rows with a true negative.
        ``positive_as_negative`` is the share of the other rows. If no row has a true negative, the three metrics over
        these rows are undefined and left out.
        """
        import torch  # here, since reading keys needs no torch

        with torch.no_grad():
            positive, negative = self.log_ratios()
            true_negative = ~self.negative_is_positive
            found = {"loss": loss.detach(), "positive_log_ratio": positive.mean()}
            if true_negative.any():
                found["negative_log_ratio"] = _masked_mean(negative, true_negative)
                found["margin"] = _masked_mean(positive - negative, true_negative)
                found["accuracy"] = _masked_mean((positive > negative).to(positive.dtype), true_negative)
            return found | {"positive_as_negative": self.negative_is_positive.to(positive.dtype).mean()}


@dataclass(frozen=True)
class SequenceLogps:
    """Summed log-probabilities of the image tokens of B samples.

    Attributes:
        policy: log p_theta(x | c), float ``[B]``, nats.
        mean_num_tokens: image tokens per sample, averaged over the *global* batch, so that the loss does not depend on
            the number of microbatches.
    """

    policy: Tensor
    mean_num_tokens: float

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the loss, the only metric."""
        return {"loss": loss.detach()}


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``mask`` holds, a scalar. Both are ``[B]``. The mask must hold somewhere."""
    return values.masked_fill(~mask, 0).sum() / mask.to(values.dtype).sum()


@strict
class Objective:
    """Section ``objective``: the training objective. Each objective has its own keys beside these two. A key of another
    objective is refused. If ``--set objective.name`` replaces the objective of the file, the keys of the file that the
    new one does not have are dropped.
    """

    _: KW_ONLY
    name: str
    """Name of the objective."""
    normalization: Literal["vocabulary", "image"] = key("vocabulary", Affects.NUMBERS, reference=True)
    """The ids that log p(x | c) is normalised over at each visual token: all that the head predicts, as in the authors'
    code, or only those of visual tokens, as in sampling. The latter computes less of the head."""

    contrasts: ClassVar[tuple[Literal["conditions", "images"], ...]] = ()
    """What the two rows of a sample may differ in; ``data.pairs`` chooses. Policy and reference compute both rows, and
    :meth:`loss` takes :class:`PairLogps`. Nothing means no reference: :meth:`loss` takes :class:`SequenceLogps`, with
    one log-probability per sample."""
    reference_draws_partners: ClassVar[bool] = False
    """Whether the second images of pairs must be the reference's own. A run then refuses those of other weights."""
    is_plain_likelihood: ClassVar[bool] = False
    """Whether the objective only raises the likelihood of the data, so that a study can use it as its control."""
    reward_scale: ClassVar[str | None] = None
    """The key that multiplies log-ratios in the loss, such as ``beta``. The gate on step 0 checks the product. None if
    the gradient does not depend on the reference."""
    against_collapse: ClassVar[str] = ""
    """Advice if the policy forgets the images, such as ``raise objective.beta ({beta:g})``, with keys in braces. The
    message goes on with "or lower optimizer.lr"."""
    without_contrast: ClassVar[str] = "only raises the likelihood of the images"
    """What the objective does in rows whose two conditions are the same. In messages it follows the name."""

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares the policy with a frozen model."""
        return bool(self.contrasts)

    @property
    def conditional_share(self) -> float | None:
        """The share of the conditional logits in a mixture with the unconditional ones, whose rows come second.

        None if the objective mixes nothing.
        """
        return None

    @property
    def rows_per_sample(self) -> int:
        """The number of rows of a sample: 2 if the objective contrasts or mixes, 1 otherwise."""
        return 2 if self.conditional_share is not None else self.logps_per_sample

    @property
    def logps_per_sample(self) -> int:
        """The number of log-probabilities of a sample: one for each row, but one for the two rows of a mixture."""
        return 2 if self.contrasts else 1

    @property
    def collapse_advice(self) -> str:
        """The advice of :attr:`against_collapse` with the values of the keys."""
        return self.against_collapse.format(**asdict(self))

    def loss(self, rows: PairLogps | SequenceLogps) -> Tensor:
        """Return the loss over B rows, a differentiable scalar."""
        raise NotImplementedError

    def __call__(self, rows: PairLogps | SequenceLogps) -> ObjectiveResult:
        """Return the loss over B rows, and their metrics."""
        return ObjectiveResult(self.loss(rows), rows)


@strict
class PairObjective(Objective):
    """An objective on pairs, with a likelihood term that any of them can have."""

    _: KW_ONLY
    sft_weight: NonNegativeFloat = 0.0
    """Weight of a likelihood term that is added to the loss: -log p(x | c) of the first rows, over the mean number
    of image tokens, as in ``next_token``. It keeps the likelihood of the images up. 0 leaves it out."""

    def __call__(self, pairs: PairLogps) -> ObjectiveResult:
        """Return the loss over B rows with the likelihood term, and their metrics."""
        loss = self.loss(pairs)
        if self.sft_weight:
            loss = loss - self.sft_weight * pairs.policy_positive.mean() / pairs.mean_num_tokens
        return ObjectiveResult(loss, pairs)


@dataclass(frozen=True)
class ObjectiveResult:
    """The result of an objective.

    Attributes:
        loss: a differentiable scalar.
        rows: the log-probabilities that the objective was called with.
    """

    loss: Tensor
    rows: PairLogps | SequenceLogps

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached scalars. They are computed on access, since that may wait for the device."""
        return self.rows.metrics(self.loss)


class _Objectives(dict[str, type[Objective]]):
    """Objectives by name. A file of this folder that is called after its objective is imported when that is asked for.

    All files are imported when all objectives are asked for, or one that no file is called after.
    """

    def __missing__(self, name: str) -> type[Objective]:
        if name not in self:
            raise KeyError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        for file in (name, *_FILES) if name in _FILES else _FILES:
            if super().__contains__(name):
                break
            _load(file)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        for file in _FILES:
            _load(file)
        return iter(sorted(self.keys()))

    def items(self) -> list[tuple[str, type[Objective]]]:
        """Return names and classes of all objectives."""
        return [(name, self[name]) for name in self]


def _load(file: str) -> None:
    module = importlib.import_module(f"{__package__}.{file}")
    for value in vars(module).values():
        if is_objective(value) and value.__module__ == module.__name__:
            register(value)


DEFAULT = "cca"
# Objectives by the values of ``objective.name``. :func:`register` fills it.
OBJECTIVES = _Objectives()
_FILES = [one.name for one in pkgutil.iter_modules([str(Path(__file__).parent)]) if one.name != Path(__file__).stem]


def objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Return a decorator that makes a subclass of :class:`Objective` a strict dataclass of this name.

    A bad value raises :class:`UserError`. The subclass's own keys may be positional arguments, the common ones not.
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
    """Return whether a value is a class that :func:`objective` made."""
    return isinstance(value, type) and issubclass(value, Objective) and "name" in vars(value)


def register(cls: type[Objective]) -> None:
    """Let ``objective.name`` choose an objective that :func:`objective` made."""
    usual = cls()
    # Check at import, not when a run first needs it.
    assert usual.reward_scale is None or usual.reward_scale in asdict(usual), f"{cls.name} has no {usual.reward_scale}"
    assert isinstance(usual.collapse_advice, str)
    OBJECTIVES[cls.name] = cls


def known_names() -> list[str]:
    """Return the possible values of ``objective.name``. Objectives without a reference come first."""
    return sorted(OBJECTIVES, key=lambda name: bool(OBJECTIVES[name].contrasts))


def keys_of(name: Any) -> list[str] | None:
    """Return the keys of the objective of this name, except ``name``. Its own come first, those of its bases last.

    Return None if there is no such objective.
    """
    if not isinstance(name, str) or name not in OBJECTIVES:
        return None
    ordered = sorted(fields(OBJECTIVES[name]), key=lambda field: field.kw_only)
    return [field.name for field in ordered if field.name != "name"]


def inherited(section: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Return the keys of a section ``objective`` that another objective has, too. An unknown name keeps all keys."""
    known = keys_of(name)
    return dict(section) if known is None else {key: value for key, value in section.items() if key in known}


def objective_of(section: Any, info: ValidationInfo) -> Objective:
    """Validate a section ``objective`` as the class that its ``name`` chooses. This is a pydantic validator.

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
    # Strict mode accepts plain data for a dataclass only as JSON.
    return TypeAdapter(OBJECTIVES[name]).validate_json(json.dumps(section), context=info.context)


def _refusal(details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("Objective", [details])

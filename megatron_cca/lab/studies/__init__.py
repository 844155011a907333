"""Studies: methods compared at equal budget. Here: dataclasses of a study's YAML file. No torch, no Megatron."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_cca.config import Config
from megatron_cca.config.load import NULL, KeysOf, as_json, read_yaml
from megatron_cca.config.schema import TYPED, PathText
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.options import wanted
from megatron_cca.keys import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, strict

OPTION = "--study"
SAMPLING, DRAWING = "sampling.", "drawing."

Metric = Literal["fid", "inception_score", "precision", "recall", "sfid", "kid"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Keys = Annotated[dict[str, Any], KeysOf(Config)]
Grid = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], KeysOf(Config)]


@strict
class _Drawn:
    """How images are drawn. :class:`SamplingSettings` says the same of a program's options."""

    guidance_scale: NonNegativeFloat = 0.0
    """s in (1 + s) cond - s uncond; 0 is guidance-free."""
    contrastive_top_k: NonNegativeInt = 0
    contrastive_alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: PositiveInt = 500
    """Images drawn at a time."""

    @property
    def forwards_per_token(self) -> int:
        """Number of forward passes for one token."""
        return 2 if self.guidance_scale > 0 or self.contrastive_top_k > 0 else 1


@strict
class SamplingConfig(_Drawn):
    """Section ``sampling``: how every model draws, unless a method says otherwise."""

    height: PositiveInt | None = None
    """Rows of the grid of visual tokens; left out: those of the model's only grid, or of the digits' 4 x 4."""
    width: PositiveInt | None = None
    """Its columns."""


@strict
class DrawingConfig(_Drawn):
    """Section ``drawing`` of a method that draws images to train on: one for each sample of its ``data.path``, with the
    sample's condition and grid. The newest model draws them: in the first round the base."""

    role: Literal["partners", "data"] = "partners"
    """What they are in training: the second images of pairs (``data.partner_path``), or the data (``data.path``)."""
    rounds: PositiveInt = 1
    """How often to draw and then train, for ``training.train_iters`` each time. Each round's result is the reference
    of the next."""


@strict
class BaseSettings:
    """Section ``base``: the model that every method starts from."""

    config: PathText | None = None
    """A training configuration that pretrains it, once for every seed; beside the study's file."""
    checkpoint: PathText | None = None
    """Or a checkpoint that is there, the same for all seeds."""
    set: Keys = dataclasses.field(default_factory=dict)
    """Keys of ``config`` to change."""


@strict
class MethodSettings:
    """One entry of ``methods``."""

    config: PathText | None = None
    """Its training configuration, beside the study's file; null draws with the base itself."""
    label: str | None = None
    """What tables and plots call it; null means its name."""
    set: Keys = dataclasses.field(default_factory=dict)
    """Keys to change, of the configuration, ``sampling.…`` or ``drawing.…``."""
    drawing: DrawingConfig | None = None
    """Images to draw before training; null means none. ``{}`` draws partners."""
    tune: Grid = dataclasses.field(default_factory=dict)
    """Values of keys, all combinations of which are tried on the tuning seed; the best is what the study reports."""
    sweep: Grid = dataclasses.field(default_factory=dict)
    """Values of keys, all combinations of which are reported on all seeds, beside what was chosen for the others."""


@strict
class PlotSettings:
    """One entry of ``plots``."""

    kind: Literal["frontier", "against", "heatmap", "comparison"]
    """``frontier``: FID against IS. ``against``: FID and IS against the key ``x``. ``heatmap``: FID over ``x`` and
    ``y`` of one method. ``comparison``: what was chosen for every method."""
    file: Name | None = None
    """Its name without ``.png``; null means its kind."""
    title: str | None = None
    methods: list[Name] | None = None
    """Which methods; null means all that have what the kind wants."""
    x: str | None = None
    y: str | None = None


@strict
class StudySettings:
    """A whole study."""

    name: Name
    """Of the folder that its results go to."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=2)]
    """Of training and sampling; the results are means over them."""
    tuning_seed: NonNegativeInt
    """Where settings are chosen, and nothing else; none of ``seeds``."""
    trials: PositiveInt
    """Settings that are tried for every method, no more and no fewer."""
    base: BaseSettings
    methods: dict[Name, MethodSettings]
    plots: list[PlotSettings]
    title: str | None = None
    tune_by: Literal["fid", "inception_score", "accuracy"] = "fid"
    samples: PositiveInt = 2000
    """Images drawn for each setting and seed."""
    tuning_samples: PositiveInt | None = None
    """Images drawn for each trial; null means as many as ``samples``."""
    prompts: PathText = "digits"
    """A text or JSON-lines file of prompts, in the working folder or beside the study's file; or ``digits``,
    ``geneval`` or ``parti``."""
    reference: PathText = "digits"
    """The real images: a folder, an .npz, or the word ``digits``."""
    extractor: PathText = "digits"
    """Whose features are compared: ``digits``, ``inception``, FILE.judge, ``dinov2:FOLDER``, ``clip:FOLDER`` or
    FILE.py:FUNCTION."""
    inception_weights: PathText | None = None
    """The file of Inception's weights."""
    classifier: PathText | None = "digits"
    """Whose answers make the accuracy: ``digits``, FILE.judge, FILE.py:FUNCTION, or null for none."""
    scorer: PathText | None = None
    """Whose mean score of images and prompts is the column reward, beside FID: ``clip:FOLDER``, ``pickscore:FOLDER``,
    ``hpsv2:FILE``, ``imagereward:FILE`` or FILE.py:FUNCTION; null for none."""
    metrics: list[Metric] = dataclasses.field(default_factory=lambda: ["fid", "inception_score", "precision", "recall"])
    inception_score_splits: PositiveInt = 1
    keep_images: bool = True
    """Leave what was drawn as images.npz beside its numbers."""
    compare: Name | None = None
    """The method whose chosen settings ``table.md`` compares with those of every other; null leaves that out."""
    collapse: PositiveFloat = 3.0
    """A run has collapsed if its FID is more than this many times its base's, guidance-free, on the same seed."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    set: Keys = dataclasses.field(default_factory=dict)
    """Keys to change in every training configuration, such as ``parallel.…``."""


_SECTIONS = {"base": BaseSettings, "methods": MethodSettings, "plots": PlotSettings, "sampling": SamplingConfig}
_IN_A_METHOD = {"drawing": DrawingConfig}


def read_study(path: Path) -> StudySettings:
    """Read a study's file.

    It checks only the file's own keys.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or a value out of range, in one line.
    """
    tree = read_yaml(path, OPTION, f"keys {', '.join(_known(StudySettings)[:6])}, ...", StudySettings)
    with error_context(path):
        return from_plain(StudySettings, tree)


def from_plain(kind: type, tree: object, prefix: str = "", sections: Mapping[str, type] = _SECTIONS) -> Any:
    """Validate plain data into one of the dataclasses above.

    Args:
        kind: the dataclass.
        tree: plain data from the user's file.
        prefix: text before a key in messages.
        sections: the dataclasses of its keys; a message may suggest their keys.

    Raises:
        UserError: names the first bad key.
    """
    try:
        # Strict mode accepts only instances for nested dataclasses. Its JSON form accepts plain objects, as YAML gives
        # them.
        return TypeAdapter(kind).validate_json(as_json(tree), context=TYPED)
    except ValidationError as error:
        raise UserError(f"{prefix}{_one_line(_farthest(error), kind, sections)}") from None


def _farthest(error: ValidationError) -> dict[str, Any]:
    """Return the error to report.

    For a union, each branch has its own error. The branch with the longest path is most likely the one that the user
    meant.
    """
    errors = error.errors()
    return max((one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]), key=lambda one: len(one["loc"]))


def _one_line(error: dict[str, Any], kind: type, sections: Mapping[str, type]) -> str:
    # Leave out "[key]" and the branches of unions. Users do not know them.
    location = [str(part) for part in error["loc"] if "[" not in str(part)]
    key = ".".join(location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key; {_suggestion(location, _holder(location, kind, sections))}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing"
    if error["type"] in ("dataclass_type", "dataclass_exact_type", "dict_type"):
        return f"{key}: expected keys below it, found {error['input']!r}"
    if error["type"] == "string_pattern_mismatch":
        return f"{key}: must be of a-z, 0-9, _ and -, found {error['input']!r}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    if error["type"] == "string_type" and error["input"] is None:
        return f"{key}: {NULL}"
    return f"{key}: {wanted(error)}, found {error['input']!r}"


def _holder(location: list[str], kind: type, sections: Mapping[str, type]) -> type:
    """Return the dataclass that does not know the key at a location."""
    if len(location) == 1:
        return kind
    return _IN_A_METHOD[location[2]] if len(location) > 3 else sections[location[0]]


def _suggestion(location: list[str], kind: type) -> str:
    known = _known(kind)
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f"did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"known here: {', '.join(known)}"


def _known(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]

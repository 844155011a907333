"""GenEval's checks of what an image shows: count, colour and position of the objects that a detector found.

The rules are those of the authors' ``evaluate_images.py`` with its defaults (arXiv 2310.11513). The numbers are not
comparable with theirs, whose detector is mmdet's Mask2Former.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from megatron_cca.errors import UserError
from megatron_cca.generation.prompt_sets import GenevalPrompt, Objects, geneval_prompts

DETECTOR = "--detector"
TAGS = {
    "single_object": "single object ↑",
    "two_object": "two objects ↑",
    "counting": "counting ↑",
    "colors": "colors ↑",
    "position": "position ↑",
    "color_attr": "color attribution ↑",
}
# Key, heading, and that more is better, for the report's table.
COLUMNS = (("geneval", "GenEval ↑", True), *((f"geneval_{tag}", heading, True) for tag, heading in TAGS.items()))
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# A score must be above it. Counting wants more certainty, so that no object is counted twice.
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
_MOST_OBJECTS = 16  # of a class, the most certain ones
# Share of both objects' sides by which their centres must be apart before anything is said of their position.
_SLACK = 0.1
# An object that fills a quarter of a smaller image has less than 32 x 32 pixels, which COCO calls small.
LEAST_SIDE = 64


class Found(NamedTuple):
    """The objects in an image, as a detector found them.

    ``names`` are GenEval's words for their classes. ``scores`` float ``[K]`` lie between 0 and 1. ``boxes`` float
    ``[K, 4]`` are left, top, right and bottom in pixels. ``masks`` bool ``[K, H, W]`` are None where the detector gives
    none.
    """

    names: Sequence[str]
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None


# The colours of some objects of an image, by their places in Found, which are all of one class.
NamesColors = Callable[[Sequence[int], str], list[str]]


class Verdict(NamedTuple):
    """A verdict on an image: whether it shows what its prompt asks for, and if not, what is wrong."""

    prompt: str
    tag: str
    correct: bool
    reason: str


@cache
def by_text() -> Mapping[str, GenevalPrompt]:
    """Return GenEval's prompts by their texts."""
    return {prompt.text: prompt for prompt in geneval_prompts()}


def class_names() -> tuple[str, ...]:
    """Return GenEval's words for COCO's 80 classes."""
    return tuple(prompt.include[0].name for prompt in geneval_prompts() if prompt.tag == "single_object")


def check_prompts(name: str, prompts: Sequence[str], size: tuple[int, int], *, has_colors: bool) -> None:
    """Refuse a set of samples that GenEval cannot judge.

    Args:
        name: of the set.
        prompts: of its images.
        size: height and width of its images.
        has_colors: whether there is a CLIP that names colours.

    Raises:
        UserError: prompts that are not GenEval's, prompts with colours and no CLIP, images that are too small.
    """
    others = [prompt for prompt in prompts if prompt not in by_text()]
    if others:
        raise UserError(
            f"{DETECTOR}: {len(others)} of {len(prompts)} prompts of {name} are not GenEval's, such as "
            f"{others[0][:60]!r}; draw the samples with --prompts geneval"
        )
    colored = sum(any(one.color for one in by_text()[prompt].include) for prompt in prompts)
    if colored and not has_colors:
        raise UserError(
            f"{DETECTOR}: {colored} prompts of {name} ask for colors, which a CLIP names; give --clip FOLDER"
        )
    if min(size) < LEAST_SIDE:
        raise UserError(
            f"{DETECTOR}: the images of {name} have {size[0]} x {size[1]} pixels, too few for a detector of COCO's "
            f"classes; it wants {LEAST_SIDE} x {LEAST_SIDE} or more"
        )


def kept(found: Found, threshold: float) -> dict[str, list[int]]:
    """Return the places of the objects that count, by class, the most certain first.

    Overlapping boxes stay, as in the authors' defaults.
    """
    places: dict[str, list[int]] = {}
    for place in np.argsort(-found.scores, kind="stable").tolist():
        mine = places.setdefault(found.names[place], [])
        if found.scores[place] > threshold and len(mine) < _MOST_OBJECTS:
            mine.append(place)
    return places


def relations(box: np.ndarray, other: np.ndarray) -> frozenset[str]:
    """Return where a box is seen from another: none, one or two of left of, right of, above and below.

    Their centres must be apart by more than a tenth of their sides together. What is beyond that must be more than half
    of the centres' distance.
    """
    first, second = np.reshape(box, (2, 2)).astype(float), np.reshape(other, (2, 2)).astype(float)
    apart = first.mean(0) - second.mean(0)
    sides = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    beyond = np.sign(apart) * np.maximum(np.abs(apart) - _SLACK * sides, 0)
    if np.abs(beyond).max() < 1e-3:
        return frozenset()
    x, y = beyond / np.hypot(*apart)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return frozenset(name for name, holds in held.items() if holds)


def judged(prompt: GenevalPrompt, found: Found, names_colors: NamesColors) -> Verdict:
    """Say whether an image shows what a prompt of GenEval asks for.

    Only the most certain objects of a class are looked at for colour and position, as many as are asked for. A position
    is not looked at where the objects that it refers to are wrong.
    """
    places = kept(found, COUNTING_THRESHOLD if prompt.tag == "counting" else THRESHOLD)
    wrong: list[str] = []
    matched: list[list[int] | None] = []
    for wanted in prompt.include:
        mine = places.get(wanted.name, [])[: wanted.count]
        problem = _problem(wanted, mine, matched, prompt, found, names_colors)
        matched.append(mine if problem is None else None)
        wrong += [] if problem is None else [problem]
    for unwanted in prompt.exclude:
        count = len(places.get(unwanted.name, []))
        if count >= unwanted.count:
            wrong.append(f"{count} x {unwanted.name}, where fewer than {unwanted.count} are right")
    return Verdict(prompt.text, prompt.tag, not wrong, "; ".join(wrong))


def _problem(
    wanted: Objects,
    mine: list[int],
    matched: list[list[int] | None],
    prompt: GenevalPrompt,
    found: Found,
    names_colors: NamesColors,
) -> str | None:
    if len(mine) < wanted.count:
        return f"{len(mine)} x {wanted.name}, where {wanted.count} or more are right"
    if wanted.color is not None:
        colors = names_colors(mine, wanted.name)
        if colors.count(wanted.color) < wanted.count:
            return f"{wanted.name} is {' and '.join(colors)}, not {wanted.color}"
    if wanted.position is None:
        return None
    relation, group = wanted.position
    target, targets = prompt.include[group].name, matched[group]
    if targets is None:
        return f"no right {target} for the {wanted.name} to be {relation}"
    for one in mine:
        for other in targets:
            seen = relations(found.boxes[one], found.boxes[other])
            if relation not in seen:
                return f"{wanted.name} is {' and '.join(sorted(seen)) or 'neither side of'} {target}, not {relation}"
    return None


@dataclass(frozen=True)
class GenevalResult:
    """The verdicts on a set of samples, in the order of its images."""

    verdicts: tuple[Verdict, ...]

    @cached_property
    def tags(self) -> dict[str, list[bool]]:
        """The verdicts of each task, whether an image is right, by the tasks that the samples have."""
        found = {tag: [one.correct for one in self.verdicts if one.tag == tag] for tag in TAGS}
        return {tag: right for tag, right in found.items() if right}

    @property
    def missing(self) -> int:
        """Number of GenEval's prompts that no image is for."""
        return len(geneval_prompts()) - len({one.prompt for one in self.verdicts})

    def values(self) -> dict[str, float]:
        """Return the share of right images of each task, and as ``geneval`` the mean over tasks."""
        shares = {f"geneval_{tag}": float(np.mean(right)) for tag, right in self.tags.items()}
        return {"geneval": float(np.mean(list(shares.values()))), **shares}

    def as_json(self) -> dict:
        """Return counts and verdicts as plain data."""
        return {
            "tasks": {tag: {"right": sum(right), "images": len(right)} for tag, right in self.tags.items()},
            "prompts_missing": self.missing,
            "verdicts": [one._asdict() for one in self.verdicts],
        }

    def line(self, name: str) -> str | None:
        """Return a line about what is missing; None if nothing is."""
        if not self.missing:
            return None
        return (
            f"GenEval of {name}: {self.missing} of {len(geneval_prompts())} prompts have no image; the mean is over "
            f"{len(self.tags)} of {len(TAGS)} tasks."
        )


def marking(detector: object) -> str:
    """Return the line below the table that says whose numbers these are not."""
    return (
        f"GenEval by the detector {detector}: not comparable with numbers by mmdet's Mask2Former, as its authors give."
    )

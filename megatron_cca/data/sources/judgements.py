"""Tell from the names of a row's values which of its images is better, and make comparisons of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cca.data.sources.source_protocol import Comparison, NoPair, Record, Unreadable

# Our own names, and those of ImageRewardDB's pairs.
BETTER_AND_WORSE = (("winner", "loser"), ("img_better", "img_worse"))
# Pick-a-Pic. Both labels are 0.5 for a tie.
_PICKED = ("jpg_0", "jpg_1"), ("label_0", "label_1")
# Our own name first, then those of HPDv2 and ImageRewardDB.
_IMAGES = ("images", "image", "image_path", "file_path")
_SCORES = ("scores", "human_preference", "rank", "overall_rating")
# Of these the smaller one is better.
_RANKS = ("rank",)
# Rows of one image that have this in common are one comparison.
_GROUP = "prompt_id"
# False in rows of Pick-a-Pic that nobody judged.
IS_JUDGED = "has_label"
WANTED = '"winner" and "loser", or "images" and "scores"'


@dataclass(frozen=True)
class Judgement:
    """The names of the values that say which image is better.

    Attributes:
        images: of the images; a value may be a list.
        scores: of their scores. Empty where the first image is better than the second.
        group: of what the rows of one comparison have in common. None where each row is one.
    """

    images: tuple[str, ...]
    scores: tuple[str, ...] = ()
    group: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names but those of the images."""
        return (*self.scores, *([self.group] if self.group else []))

    def of(self, rows: Iterable[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        """Return the images of a comparison's rows, and a score for each, the more the better."""
        rows = list(rows)
        columns = [[one for row in rows for one in _as_list(row.get(name))] for name in self.images]
        images = [one for column in columns for one in column]
        if not self.scores:
            return images, [-place for place, column in enumerate(columns) for _ in column]
        scores = [one for name in self.scores for row in rows for one in _as_list(row.get(name))]
        return images, [-one if self.scores[0] in _RANKS and _is_number(one) else one for one in scores]


def judgement_of(names: Collection[str], lists: Collection[str]) -> Judgement | None:
    """Return which values say which image is better. None where they do not.

    Args:
        names: of a row's values.
        lists: the names of those that are lists.
    """
    for pair in BETTER_AND_WORSE:
        if set(pair) <= set(names):
            return Judgement(pair)
    if set(_PICKED[0] + _PICKED[1]) <= set(names):
        return Judgement(*_PICKED)
    image, score = (next((name for name in known if name in names), None) for known in (_IMAGES, _SCORES))
    if image is None or score is None or (image in lists) != (score in lists):
        return None
    if image in lists:
        return Judgement((image,), (score,))
    return Judgement((image,), (score,), _GROUP) if _GROUP in names else None


def is_unjudged(row: dict[str, Any]) -> bool:
    """Return whether a row says that nobody judged it."""
    return row.get(IS_JUDGED) is False


def compared(
    name: str,
    caption: str | None,
    label: int | None,
    judged: tuple[Sequence, Sequence],
    read: Callable[[Any, str], bytes],
) -> Comparison:
    """Return the comparison of some images. Equal images are one.

    Args:
        name, caption, label: of the comparison.
        judged: the images as the source keeps them, and their scores: see :meth:`Judgement.of`.
        read: returns the contents of an image, called with it and with a name for messages.

    Raises:
        NoPair: there are not two images, or none is better than another.
        Unreadable: scores that are none.
    """
    images, scores = judged
    if len(images) != len(scores):
        raise Unreadable(name, f"has {len(images)} images and {len(scores)} scores")
    for score in scores:
        if score is not None and not _is_number(score):
            raise Unreadable(name, "a score must be a number")
    there = [place for place, image in enumerate(images) if _is_there(image)]
    known = [place for place in there if scores[place] is not None]
    if len(known) < 2:
        what = "no scores" if len(there) > 1 else "one image" if there else "no image"
        raise NoPair(name, f"it has {what}; a pair takes two images, of which one is better")
    if len({scores[place] for place in known}) == 1:
        raise NoPair(name, "a tie: none of its images is better than another")
    contents = [_content(read, images[place], _image(name, place)) for place in known]
    return _comparison((name, caption, label), known, contents, [scores[place] for place in known])


def _comparison(
    identity: tuple, places: list[int], contents: list[bytes | Unreadable], scores: list[float]
) -> Comparison:
    """Return the comparison of images by their places among those of the source."""
    name, caption, label = identity
    # An image that cannot be read equals no other one, since exceptions are compared by identity.
    kept = {content: contents.index(content) for content in contents}
    order = {first: number for number, first in enumerate(kept.values())}
    numbers = [order[kept[content]] for content in contents]
    every = range(len(contents))
    found = ((numbers[one], numbers[other]) for one in every for other in every if scores[one] > scores[other])
    pairs = tuple(dict.fromkeys(pair for pair in found if pair[0] != pair[1]))
    if not pairs:
        raise NoPair(name, "a tie: its images are the same")
    images = [
        content
        if isinstance(content, Unreadable)
        else Record(_image(name, places[first]), caption, None, (content,), label=label)
        for content, first in kept.items()
    ]
    return Comparison(name, caption, label, tuple(images), pairs)


def _image(name: str, place: int) -> str:
    return f"{name}, image {place + 1}"


def _content(read: Callable[[Any, str], bytes], image: Any, name: str) -> bytes | Unreadable:
    try:
        return read(image, name)
    except Unreadable as error:
        return error


def _is_there(image: Any) -> bool:
    return any(image.values()) if isinstance(image, dict) else bool(image)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

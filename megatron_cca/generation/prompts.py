"""Prompts with seeds, from a file, from classes, or of the demo's digits, and the conditions that a model gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cca.data.digits import DIGIT_NAMES, PHRASINGS, captions_of
from megatron_cca.data.tokenizers import TextTokenizer
from megatron_cca.errors import UserError, error_context
from megatron_cca.io.file_contents import KIND_BYTES, kind_of
from megatron_cca.models.image_vocabulary import ImageVocabulary

_WANTED = 'write a prompt a line (.txt), or JSON lines such as {"prompt": "a red fox"} (.jsonl)'
# The seeds of images of one run differ from those of the next.
_SEEDS_PER_RUN = 1_000_000
# More than the seed of a run has, times the number above.
_SEED_BITS = 96


@dataclass(frozen=True)
class Prompt:
    """One image to draw.

    Attributes:
        text: its caption. None where only its class is known.
        seed: of its random stream. None until :func:`seeded`.
        label: the class that it should show, for classifiers and for models of classes. None where there is none.
        ids: its caption as the model gets it. None means that it follows from text or label.
        condition: the hash of its condition's name in shards. None means that the caption is the condition.
        grid: height and width of its codes. None means the job's.
    """

    text: str | None
    seed: int | None = None
    label: int | None = None
    ids: tuple[int, ...] | None = None
    condition: int | None = None
    grid: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """The text that people see."""
        return f"class {self.label}" if self.text is None else self.text


def prompts_named(name: str) -> list[Prompt]:
    """Return the prompts of a published set by its name, ``geneval`` or ``parti``, or those in a file.

    Raises:
        UserError: as :func:`read_prompts`.
    """
    # Imported late: a training job needs no published set.
    from megatron_cca.generation.prompt_sets import PROMPT_SETS, texts_of

    return [Prompt(text) for text in texts_of(name)] if name in PROMPT_SETS else read_prompts(Path(name))


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts in a file.

    The file has one text per line, or JSON lines with ``prompt``, ``label`` or both, and optionally ``seed``.

    Raises:
        UserError: an unreadable or empty file, or a wrong line. The message names file and line.
    """
    with error_context(path):
        text, is_json = _text_of(path), path.suffix.lower() in (".jsonl", ".json")
        _refuse_other_forms(path, text, is_json=is_json)
        read = _json_prompt if is_json else _text_prompt
        lines = text.split("\n")
        prompts = [read(line, number) for number, line in _numbered(lines)]
        if not prompts:
            raise UserError("holds no prompt; give one a line")
        return prompts


def read_class_captions(path: Path, num_classes: int | None = None) -> list[str]:
    """Return the names of classes in the order of their labels, read from a file with one name per line.

    From a line of ImageNet's ``LOC_synset_mapping.txt`` ("n01440764 tench, Tinca tinca") the first name is taken.

    Args:
        path: of the file.
        num_classes: how many there must be. None means any number.

    Raises:
        UserError: unreadable, empty, of another number of classes, with labels in another order, or partly in
            ImageNet's form.
    """
    prompts = read_prompts(path)
    for place, prompt in enumerate(prompts):
        if prompt.label not in (None, place):
            raise UserError(f"{path}: name {place} has the label {prompt.label}; put the names in the labels' order")
    captions = [prompt.title for prompt in prompts]
    if num_classes is not None and len(captions) != num_classes:
        raise UserError(f"{path} names {len(captions)} classes, the model has {num_classes}")
    synsets = [re.fullmatch(r"n[0-9]{8} ([^,]+)(,.*)?", caption) for caption in captions]
    if any(synsets) and not all(synsets):
        other = captions[synsets.index(None)]
        raise UserError(f"{path}: {other[:60]!r} is not like the other lines, such as 'n01440764 tench, Tinca tinca'")
    return [found[1].strip() for found in synsets] if all(synsets) else captions


def class_prompts(captions: Sequence[str | None], wanted: Sequence[str]) -> list[Prompt]:
    """Return one prompt per wanted class.

    Args:
        captions: of all classes, or None where a class has no name. The label of a class is its place.
        wanted: captions, labels, or the one word ``all``.

    Raises:
        UserError: an unknown class. The message says which there are.
    """
    is_all = list(wanted) == ["all"]
    labels = range(len(captions)) if is_all else [_label(captions, name) for name in wanted]
    return [Prompt(captions[label], label=label) for label in labels]


def digit_prompts(count: int, seed: int) -> list[Prompt]:
    """Return ``count`` prompts of the digits in turn, with seeds.

    Each has one of the phrasings of the demo's captions.
    """
    phrasings = np.random.default_rng(seed).integers(len(PHRASINGS), size=count)
    labels = np.arange(count) % 10
    prompts = [
        Prompt(captions_of(int(label))[phrasing], label=int(label))
        for label, phrasing in zip(labels, phrasings, strict=True)
    ]
    return seeded(prompts, seed)


def digit_classes() -> list[Prompt]:
    """Return one prompt per digit, in the first of its phrasings."""
    return [Prompt(captions_of(label)[0], label=label) for label in range(len(DIGIT_NAMES))]


def seeded(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Return the prompts with seeds. A missing seed is made of ``seed`` and the prompt's place in the list."""
    return list(RepeatedPrompts(prompts, 1, seed))


class RepeatedPrompts(Sequence[Prompt]):
    """Prompts with seeds, each several times in a row. A prompt is made when it is asked for.

    The copies of a prompt with a seed have consecutive seeds. A missing seed is made of ``seed`` and the place in this
    list.

    Args:
        distinct: the prompts.
        times: how often each is there.
        seed: of the job.
    """

    def __init__(self, distinct: Sequence[Prompt], times: int, seed: int) -> None:
        self.distinct, self.times, self._seed = distinct, times, seed

    def __len__(self) -> int:
        return len(self.distinct) * self.times

    def __getitem__(self, place: int) -> Prompt:
        index, turn = divmod(range(len(self))[place], self.times)
        prompt = self.distinct[index]
        own = _seed_at(self._seed, index * self.times + turn) if prompt.seed is None else prompt.seed + turn
        return replace(prompt, seed=own)


def _seed_at(seed: int, place: int) -> int:
    run, within = divmod(place, _SEEDS_PER_RUN)
    # Beyond a million images the seeds go on far above those of any other run.
    return seed * _SEEDS_PER_RUN + within + (run << _SEED_BITS)


def check_conditions(vocabulary: ImageVocabulary, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts as :func:`check_condition` refuses one."""
    for prompt in prompts:
        check_condition(vocabulary, prompt)


def check_condition(vocabulary: ImageVocabulary, prompt: Prompt) -> None:
    """Refuse a prompt that is no condition for a model.

    Raises:
        UserError: a text alone for a model of classes, a class alone for a model of texts, a class beyond the model's.
    """
    classes, shown = vocabulary.num_classes, f"prompt {prompt.title[:40]!r}"
    if classes is None:
        if prompt.text is None:
            raise UserError(f"{shown}: this model takes texts, and this is a class alone; give a text with it")
    elif prompt.label is None:
        raise UserError(f"{shown}: this model takes classes, not texts; give the label of one, 0 to {classes - 1}")
    elif prompt.label >= classes:
        raise UserError(f"{shown}: label {prompt.label} is beyond the model's classes, 0 to {classes - 1}")


def caption_ids(vocabulary: ImageVocabulary, text: TextTokenizer | None, prompt: Prompt) -> np.ndarray:
    """Return the caption of a prompt, int64 ``[C]``, as :meth:`ImageVocabulary.prompt` takes it.

    A prompt's own ids are taken as they are.

    Args:
        vocabulary: the model's.
        text: its text tokenizer. None where captions are classes.
        prompt: what to draw.

    Raises:
        UserError: what :func:`check_condition` refuses, or a text that cannot be encoded.
    """
    if prompt.ids is not None:
        return np.array(prompt.ids, dtype=np.int64)
    check_condition(vocabulary, prompt)
    if vocabulary.num_classes is not None:
        return np.array([prompt.label], dtype=np.int64)
    with error_context(f"prompt {prompt.text[:40]!r}"):
        return np.array(text.encode_caption(prompt.text, vocabulary.template), dtype=np.int64)


def negative_ids(
    vocabulary: ImageVocabulary, text: TextTokenizer | None, negative: str, caption_length: int
) -> np.ndarray:
    """Return the caption of the second stream, int64 ``[C]``. An empty text is the dropped condition.

    Args:
        vocabulary, text: as for :func:`caption_ids`.
        negative: the text.
        caption_length: number of ids of the first stream's caption.

    Raises:
        UserError: a text for a model of classes.
    """
    if negative and vocabulary.num_classes is not None:
        raise UserError(
            f"negative prompt {negative[:40]!r}: this model takes classes, and its second stream has none; leave it out"
        )
    if negative:
        return caption_ids(vocabulary, text, Prompt(negative))
    words = vocabulary.unconditional_text()
    unconditional = np.array(text.encode(words) if words else [], dtype=np.int64)
    return vocabulary.dropped_caption(caption_length, unconditional)


def _text_of(path: Path) -> str:
    """Return the contents of a text file. Every line ends in a single newline character, whichever the file has.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{getattr(error, 'strerror', None) or error}; give a text file or JSON lines") from None
    kind = kind_of(content[:KIND_BYTES])
    if kind is None and b"\0" in content:
        kind = "no text, it has zero bytes"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    if kind is not None or text is None:
        raise UserError(f"is not text in UTF-8{f': it is {kind}' if kind else ''}")
    # Not str.splitlines(): JSON may hold other characters that Unicode takes for the end of a line.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_other_forms(path: Path, text: str, *, is_json: bool) -> None:
    """Refuse a file in another format that would otherwise be read line by line."""
    if path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(f"is a table; {_WANTED}")
    whole = _parsed(text)
    if isinstance(whole, list):
        raise UserError(f"is one JSON array; {_WANTED}")
    if isinstance(whole, dict) and "\n" in text.strip():
        raise UserError(f"is one JSON object over several lines; {_WANTED}")
    filled = [line for line in text.split("\n") if line.strip()]
    if not is_json and filled and all(isinstance(_parsed(line), dict) for line in filled):
        raise UserError("holds JSON lines; name it .jsonl, so that it is read as such")


def _parsed(text: str) -> Any:
    """Return the JSON object or array in a text. None means that it holds neither."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _numbered(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _text_prompt(line: str, number: int) -> Prompt:
    return Prompt(line.strip())


def _json_prompt(line: str, number: int) -> Prompt:
    with error_context(f"line {number}"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError("is not a JSON object") from None
        text = found.get("prompt") if isinstance(found, dict) else None
        is_class = isinstance(found, dict) and "prompt" not in found and found.get("label") is not None
        if not isinstance(text, str) and not is_class:
            raise UserError(
                'needs a "prompt" that is a text, such as {"prompt": "a red fox"}, or the "label" of a class, found '
                f"{line[:60]!r}"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text or ""):
            raise UserError("prompt: is not valid Unicode")
        return Prompt(text, _whole_number(found, "seed"), _whole_number(found, "label"))


def _whole_number(found: dict[str, Any], key: str) -> int | None:
    value = found.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63):
        raise UserError(f"{key}: must be a whole number of 0 or more, found {value!r}")
    return value


def _label(captions: Sequence[str | None], name: str) -> int:
    if name in captions:
        return list(captions).index(name)
    if re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(captions):
        return int(name)
    there = f"{name!r} is no class; there are {len(captions)}: 0 to {len(captions) - 1}"
    names = [caption for caption in captions if caption is not None]
    if not names:
        raise UserError(f"{there}; --class-captions gives them names")
    raise UserError(f"{there}, or by name {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")

"""What a model family declares of itself to be tested, and what its oracle says: logits, greedy codes, a CCA step.

Nothing here knows a family. Rows are written in ids by the family's vocabulary, and only an oracle computes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_cca.config.load import load_config
from megatron_cca.data.shard_writing import Sample, write_shards
from megatron_cca.models import family_of, resolve_architecture
from megatron_cca.models.architecture import Architecture, only_grid, padded_output_size, padded_vocab_size
from megatron_cca.models.naming import recognise_naming
from megatron_cca.objectives.base import keys_of
from megatron_cca.training import rows_per_sample
from megatron_cca.training.batches import open_data, training_batches
from tests.references import class_losses
from tests.references.token_shards import encode_text

SAMPLES = 64
# For a family whose images may have any grid.
GRID = (4, 4)
# Long enough that an error in the cache would show.
DRAWN_GRID = (8, 8)
STEP = [
    *("objective.beta=0.1", "objective.negative_weight=30", "data.condition_dropout=0.4"),
    *("training.global_batch_size=8", "training.micro_batch_size=2"),
]


@dataclass(frozen=True)
class Oracle:
    """A model that is not ours, in float64.

    Attributes:
        logits: returns those of the next id, ``[B, S, W]``, of ids int64 ``[B, S]``, which are ids of the family's
            vocabulary: what a row is fed, and that without padding. W is the number of ids that can be predicted. In
            next-scale prediction they are those of the code at this place.
        weights: what is trained, under its public names. A step's gradients are theirs.
    """

    logits: Callable[[Tensor], Tensor]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """All that the tests of families need to know of one.

    Attributes:
        preset: its tiny model.
        forms: by name, writers of a random model's public files. They are called with the name of a folder, a seed and
            the dtype of the weights, and return what an import takes: the folder or a file in it. The oracle's weights
            have the names of the first form, which are those of the weight map.
        oracle: opens what a form has written, in float32.
        overrides: of the tiny model's sizes.
        import_options: of ``import_checkpoint``, for sizes that public files do not tell.
        cannot: layouts that the family has not.
        not_exported: tensors of public files that an export leaves out.
    """

    preset: str
    forms: Mapping[str, Callable[[Path, int, torch.dtype], Path]]
    oracle: Callable[[Path], Oracle]
    overrides: Sequence[str] = ()
    import_options: Mapping[str, object] = field(default_factory=dict)
    cannot: frozenset[str] = frozenset()
    not_exported: frozenset[str] = frozenset()

    @property
    def first_form(self) -> str:
        """The form whose names the oracle's weights have."""
        return next(iter(self.forms))

    @property
    def model_keys(self) -> list[str]:
        """The keys of a run with the tiny model.

        The codes' rows lie on both of two tensor-parallel ranks, and rows of no word behind the vocabulary.
        """
        named = [f"model.name={self.preset}", *self.overrides]
        architecture = resolve_architecture(load_config(None, named).model)
        vocabulary, words = architecture.vocabulary, architecture.num_words
        if architecture.image_embedding_channels:
            # The head's rows are the codes alone.
            rank_rows = vocabulary.codebook_size * 3 // 4
            return [*named, f"model.padded_vocab_size={2 * words}", f"model.make_vocab_size_divisible_by={rank_rows}"]
        border = max(vocabulary.visual_start + vocabulary.codebook_size // 2, math.ceil(words / 2) + 4)
        return [*named, f"model.padded_vocab_size={2 * border}"]

    @property
    def architecture(self) -> Architecture:
        """That of the tiny model."""
        return resolve_architecture(load_config(None, self.model_keys).model)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width, in codes, of the images that are tried."""
        return only_grid(self.architecture) or GRID

    @property
    def drawn_grid(self) -> tuple[int, int]:
        """Height and width, in codes, of the images that are drawn."""
        return only_grid(self.architecture) or DRAWN_GRID


def tensors_in(path: Path, skipped: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors, or of the first set of tensors in a file of ``torch.save``."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for file in sorted(path.glob("*.bin")):
            found |= torch.load(file, weights_only=True)
        return found
    found = _first_set(torch.load(path, weights_only=False))
    return {name: tensor for name, tensor in found.items() if name not in skipped}


def _first_set(content: object) -> dict[str, Tensor] | None:
    if not isinstance(content, dict):
        return None
    if content and all(torch.is_tensor(value) for value in content.values()):
        return content
    return next((found for value in content.values() if (found := _first_set(value)) is not None), None)


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an oracle: in float64, with gradients."""
    return {name: value.double().requires_grad_() for name, value in tensors.items()}


def prompts(family: Family, *, dropped: bool = False) -> list[np.ndarray]:
    """Ids before an image, with captions of several lengths, or with classes; the second one's is dropped in any case.

    Args:
        family: whose prompts.
        dropped: whether to drop all of them, for a second stream.
    """
    random, vocabulary = np.random.default_rng(1), family.architecture.vocabulary
    lengths = [3, 2, 1] if vocabulary.num_classes is None else [1, 1, 1]
    meta, unconditional = (
        np.array(encode_text(text), dtype=np.int64)
        for text in (vocabulary.meta_text(1, *family.drawn_grid), vocabulary.unconditional_text())
    )
    captions = [random.integers(vocabulary.caption_size, size=length) for length in lengths]
    for place in range(len(captions)) if dropped else [1]:
        captions[place] = vocabulary.dropped_caption(len(captions[place]), unconditional)
    return [vocabulary.prompt(caption, meta) for caption in captions]


def shards(family: Family, folder: Path) -> Path:
    """Write random images of several conditions, of which some are alike, and beside them the same as ``partners``."""
    random, vocabulary = np.random.default_rng(0), family.architecture.vocabulary
    is_text = vocabulary.num_classes is None
    captions = [random.integers(vocabulary.caption_size, size=1 + is_text * index % 4) for index in range(10)]
    samples = [
        Sample(random.integers(vocabulary.codebook_size, size=family.grid), captions[random.integers(10)])
        for _ in range(SAMPLES)
    ]
    write_shards(folder, samples, vocabulary, encode_text if is_text else None)
    shutil.copytree(folder, folder.parent / "partners")
    return folder


def step_of(family: Family, data: Path, objective: str) -> list[str]:
    """The keys of a step of an objective on data of :func:`shards`, also as each other's partners."""
    given = {"gft": ["objective.beta=0.4"], "ddo": ["objective.beta=0.3", "objective.alpha=3.0"]}
    keys = {f"objective.{key}" for key in keys_of(objective)}
    own = [key for key in STEP if not key.startswith("objective.") or key.partition("=")[0] in keys]
    partners = [f"data.partner_path={data.parent / 'partners'}"] if objective == "ddo" else []
    named = [f"objective.name={objective}", f"data.path={data}"]
    return [*family.model_keys, *own, *named, *given.get(objective, []), *partners]


def rows_of_a_step(keys: Sequence[str]):
    """The microbatch of a whole step of :func:`step_of`, without padding; first rows of pairs before second ones."""
    config = load_config(None, [*keys, "training.micro_batch_size=8"])
    batches = training_batches(config, open_data(config), with_pairs=rows_per_sample(config) == 2)
    (rows,) = batches.build(0, 0, 1).microbatches
    return rows


def step_loss(objective, policy: Oracle, reference: Oracle, rows) -> Tensor:
    """The loss of a step of the section ``objective``, by oracles."""
    places = torch.arange(len(rows.tokens))
    if objective.name == "gft":
        return class_losses.gft(policy.logits, rows, objective.beta)
    models = partial(_image_logps, policy, rows), partial(_image_logps, reference, rows)
    if objective.name == "next_token":
        return class_losses.loss(objective.name, *models, (places, None, None), tokens=rows.mask.sum(1)[0])
    pairs = (*places.chunk(2), rows.negative_is_positive)
    if objective.name == "ddo":
        return class_losses.ddo(*models, pairs, objective.beta, objective.alpha)
    assert 0 < rows.negative_is_positive.sum() < len(rows.negative_is_positive)
    given = {"beta": getattr(objective, "beta", None), "weight": getattr(objective, "negative_weight", None)}
    return class_losses.loss(objective.name, *models, pairs, **given)


def _image_logps(oracle: Oracle, rows, places: Tensor) -> Tensor:
    scores = oracle.logits(rows.tokens[places]).log_softmax(-1)
    mask, targets = rows.mask[places], rows.targets[places]
    # Outside of the mask a target may be no id that can be predicted.
    chosen = scores.gather(-1, torch.where(mask, targets, 0)[..., None]).squeeze(-1)
    return (chosen * mask).sum(1)


def in_megatron(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors under Megatron's names, layers apart, from those under public names. Rows of no word are zeros.

    There are as many of these as two tensor-parallel ranks have, which is the most.
    """
    model = load_config(None, family.model_keys).model
    family_files = family_of(model)
    files = family_files.huggingface or family_files.weights_file
    must_be_zero = getattr(files, "must_be_zero", lambda name: False)
    if family_files.huggingface:
        naming = recognise_naming(files.namings, tensors)
        tensors = {own: value for name, value in tensors.items() if (own := naming.mapped(name))}
    shapes, whole = files.weights.row_shapes(family.architecture), {}
    for tensor in files.weights.tensors(family.architecture):
        parts = []
        for part in tensor.parts:
            shape = shapes[part.name]
            rows = torch.zeros(shape) if must_be_zero(part.name) else tensors[part.name].view(shape)
            parts.append(rows[part.start : part.start + part.count].double())
        rows = torch.cat(parts)
        if tensor.padded:
            padded = (padded_output_size if "output_layer" in tensor.key else padded_vocab_size)(
                family.architecture, model, 2
            )
            missing = torch.zeros(padded - len(rows), *rows.shape[1:], dtype=rows.dtype)
            rows = torch.cat([rows, missing])
        layer = "" if tensor.layer is None else f"{tensor.layer}."
        whole[tensor.key.replace("decoder.layers.", f"decoder.layers.{layer}")] = rows
    return whole


@torch.no_grad()
def greedy_codes(oracle: Oracle, family: Family, guidance_scale: float) -> list[list[int]]:
    """The likeliest codes of an image for each of :func:`prompts`, by whole rows and without a cache.

    Codes are drawn in groups: one by one, or scale by scale. Guidance grows with the scale.
    """
    vocabulary, (height, width) = family.architecture.vocabulary, family.drawn_grid
    own, null = prompts(family), prompts(family, dropped=True)
    # Where, behind a prompt, the codes stand.
    places = np.flatnonzero(vocabulary.forced_tokens(height, width) < 0)
    sizes = [side**2 for side in vocabulary.scales] or [1] * len(places)
    drawn = [np.zeros(len(places), dtype=np.int64) for _ in own]
    start = 0
    for number, size in enumerate(sizes):
        group = slice(start, start + size)
        strength = guidance_scale * (number / (len(sizes) - 1) if vocabulary.scales else 1)
        for prompt, second, codes in zip(own, null, drawn, strict=True):
            image = vocabulary.image(codes.reshape(1, height, width))
            scores = _visual_logits(oracle, vocabulary, prompt, image, places[group])
            if strength:
                others = _visual_logits(oracle, vocabulary, second, image, places[group])
                scores = (1 + strength) * scores - strength * others
            codes[group] = scores.argmax(-1)
        start += size
    return [codes.tolist() for codes in drawn]


def _visual_logits(oracle, vocabulary, prompt, image, places) -> Tensor:
    row = torch.from_numpy(np.concatenate([prompt, image])[:-1])
    # Also in next-scale prediction the place of the prompt is that of the first code.
    logits = oracle.logits(row[None])[0, len(prompt) - 1 + places]
    return logits[:, vocabulary.visual_start : vocabulary.visual_start + vocabulary.codebook_size]


def answers(family: Family, policy: Path, data: Path) -> dict:
    """What the oracle says of a model in public files: logits of a step's rows, and greedy codes."""
    rows, oracle = rows_of_a_step(step_of(family, data, "cca")), family.oracle(policy)
    with torch.no_grad():
        logits = oracle.logits(rows.tokens)
    return {
        "tokens": rows.tokens,
        "targets": rows.targets,
        "mask": rows.mask,
        "logits": logits,
        "prompts": prompts(family),
        "dropped": prompts(family, dropped=True),
        "grid": family.drawn_grid,
        "small_grid": family.grid,
        "greedy": {scale: greedy_codes(oracle, family, scale) for scale in (0.0, 1.5)},
    }


def answers_to_a_step(family: Family, keys: Sequence[str], policy: Path, reference: Path) -> dict:
    """What the oracle says of a step from a model in public files, with another one as the reference."""
    models = [family.oracle(path) for path in (policy, reference)]
    loss = step_loss(load_config(None, keys).objective, *models, rows_of_a_step(keys))
    loss.backward()
    gradients = {name: value.grad for name, value in models[0].weights.items()}
    return {
        "loss": loss.item(),
        "grad_norm": torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item(),
        "gradients": in_megatron(family, gradients),
    }

"""Difference of the log-probabilities of a policy and a reference with the same weights in different precisions.

The errors of all tokens of an image add up. The objective takes their sum, times beta, for something that the policy
learnt. :mod:`megatron_cca.training.log_ratio_gate` stops a run if the sum is too large. This module measures it before
a run. Its results are a table, sentences, JSON and a plot.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.checkpoint import layout
from megatron_cca.checkpoint.summary import saved_config
from megatron_cca.config import Config, ReferenceConfig
from megatron_cca.data import DIGITS, digits
from megatron_cca.data.microbatches import Microbatch
from megatron_cca.data.shards import TokenData, TokenShards
from megatron_cca.errors import UserError
from megatron_cca.io.outputs import write_json
from megatron_cca.lab import markdown_table
from megatron_cca.lab.reference_bias import IN_FP8, PRECISIONS, BiasSettings, ModelPrecision
from megatron_cca.models import resolve_architecture
from megatron_cca.models.fp8_devices import check_fp8_device
from megatron_cca.models.gpt import image_logps
from megatron_cca.objectives import PairLogps
from megatron_cca.parallel import token_logps
from megatron_cca.parallel.ranks import initialize_distributed
from megatron_cca.training.batches import RunData, training_batches
from megatron_cca.training.kernel_checks import check_fp8_sizes
from megatron_cca.training.log_ratio_gate import DEFAULT_ALLOWED, LogRatioSpread, log_ratio_spread
from megatron_cca.training.reference import head_options
from megatron_cca.training.setup import build_chunks, frozen_chunks

DEFAULT_LENGTHS = tuple(2**power for power in range(8, 14))

CHECKPOINT, DATA = "--checkpoint", "--data"
# The CCA paper (arXiv 2410.09347) uses beta 0.02 for images of 576 tokens.
_PAPER_BETA_TIMES_TOKENS = 0.02 * 576


@dataclass(frozen=True)
class PairBias:
    """The log-ratio of a policy and a reference over the first ``tokens`` image tokens of each row."""

    policy: ModelPrecision
    reference: ModelPrecision
    tokens: int
    spread: LogRatioSpread

    @property
    def safe_beta(self) -> float:
        """The largest beta that a training run accepts without ``reference.allow_bias``.

        It is infinite if all log-ratios are 0.
        """
        error = self.spread.root_mean_square
        return DEFAULT_ALLOWED / error if error else math.inf


def measure(settings: BiasSettings) -> list[PairBias]:
    """Run all models over the same rows, one after the other in one process, and compare them.

    Each precision runs as the policy and as the reference. Both are built as in a training run. A precision that this
    machine cannot compute is left out, with a line on standard error, unless its name was asked for.

    Returns:
        One value for each policy, reference and length, in this order.

    Raises:
        UserError: no such checkpoint, data of another vocabulary, lengths that the rows do not have, or a requested
            precision that cannot be computed here.
    """
    config = _config(settings)
    data = _open(config, settings.data)
    precisions = _precisions(config, settings.precisions)
    multiple = max(PRECISIONS[name] for name in precisions)
    config = replace(config, data=replace(config.data, pad_to_multiple_of=multiple))
    rows = training_rows(config, data)
    lengths = _lengths(settings.lengths, min(int(row.mask.sum()) for row in rows))
    initialize_distributed(config)
    policies = [ModelPrecision(name) for name in precisions]
    references = [ModelPrecision(name, fp8_param) for fp8_param in (False, True) for name in precisions]
    runs = [(precision, _policy) for precision in policies] + [(precision, _reference) for precision in references]
    found, head = [], head_options(config, resolve_architecture(config.model).vocabulary)
    with tqdm(total=len(runs) * len(rows), unit="row", file=sys.stderr) as bar:
        for precision, build in runs:
            bar.set_description(f"{build.__name__[1:]} {precision}")
            found.append(prefix_logps(build(config, precision), rows, lengths, head, bar))
            # Modules may hold each other in cycles. The next model needs their memory.
            gc.collect()
    ours, theirs = found[: len(policies)], found[len(policies) :]
    return _pairs(dict(zip(policies, ours, strict=True)), dict(zip(references, theirs, strict=True)), lengths)


def _config(settings: BiasSettings) -> Config:
    folder = layout.resolve(settings.checkpoint, CHECKPOINT)
    model, config = saved_config(folder, CHECKPOINT).model, Config()
    # The layers of a checkpoint from a GPU may not exist here.
    layers = "local" if model.transformer_impl == "local" else "auto"
    return replace(
        config,
        model=replace(model, hidden_dropout=0.0, attention_dropout=0.0, transformer_impl=layers),
        data=replace(config.data, condition_dropout=0.0),
        training=replace(
            config.training,
            micro_batch_size=1,
            global_batch_size=settings.rows // 2,
            seed=settings.seed,
            pretrained_checkpoint=str(folder),
        ),
    )


def _open(config: Config, path: str) -> RunData:
    folder = digits.digit_shards(config.model) if path == DIGITS else Path(path)
    shards = TokenShards(folder, resolve_architecture(config.model).vocabulary, DATA)
    images = config.training.global_batch_size
    if len(shards) < images:
        raise UserError(f"--rows: {2 * images} rows need {images} images, {folder} has {len(shards)}")
    return RunData(TokenData([shards]), None)


def _precisions(config: Config, asked: Sequence[str] | None) -> list[str]:
    found = []
    for name in PRECISIONS if asked is None else dict.fromkeys(asked):
        try:
            _check_precision(config, name)
            found.append(name)
        except UserError as error:
            if asked is not None:
                raise UserError(f"--precisions: {name}: {error}") from None
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def _check_precision(config: Config, name: str) -> None:
    if name not in PRECISIONS:
        raise UserError(f"unknown; known: {', '.join(PRECISIONS)}")
    if not name.startswith("fp8"):
        return
    keys = ModelPrecision(name).keys()
    check_fp8_device(keys["fp8_recipe"])
    data = replace(config.data, pad_to_multiple_of=PRECISIONS[name])
    check_fp8_sizes(replace(config, data=data), replace(config.training, **keys), "training.precision")


def training_rows(config: Config, data: RunData) -> list[Microbatch]:
    """Return the rows of a run's first step, one row in each microbatch, on the CPU.

    Each row ends at its last image token, padded to ``data.pad_to_multiple_of``.

    Args:
        config: configuration of the run; the global batch size is the number of positives.
        data: data of the run.

    Returns:
        Positives and negatives in alternation; tensors ``[1, S]`` with S a multiple of ``data.pad_to_multiple_of``.
    """
    batches = training_batches(config, data, with_pairs=True)
    multiple = config.data.pad_to_multiple_of
    return [
        _row(microbatch, index, multiple)
        for microbatch in batches.build(0, 0, 1).microbatches
        for index in range(batches.rows_per_microbatch)
    ]


def _row(rows: Microbatch, index: int, multiple: int) -> Microbatch:
    last = int(rows.mask[index].nonzero().max())
    end = -(-(last + 1) // multiple) * multiple
    parts = (tensor[index : index + 1, :end] for tensor in (rows.tokens, rows.targets, rows.mask))
    return Microbatch(*parts, rows.negative_is_positive)


def _lengths(asked: Sequence[int] | None, shortest: int) -> list[int]:
    if asked is None:
        return sorted({*(length for length in DEFAULT_LENGTHS if length <= shortest), shortest})
    if min(asked) < 1 or max(asked) > shortest:
        wrong = min(asked) if min(asked) < 1 else max(asked)
        raise UserError(
            f"--lengths: {wrong} is not between 1 and {shortest}, the image tokens of the shortest row here"
        )
    return sorted(set(asked))


def _policy(config: Config, precision: ModelPrecision) -> list[torch.nn.Module]:
    training = replace(config.training, **precision.keys())
    architecture = resolve_architecture(config.model)
    return build_chunks(config, architecture, training, training.pretrained_checkpoint, CHECKPOINT)


def _reference(config: Config, precision: ModelPrecision) -> list[torch.nn.Module]:
    own = ReferenceConfig(fp8_param=precision.fp8_param, **precision.keys())
    return frozen_chunks(replace(config, reference=own), resolve_architecture(config.model))


@torch.no_grad()
def prefix_logps(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[Microbatch],
    lengths: Sequence[int],
    head: dict[str, Any],
    bar: tqdm | None = None,
) -> Tensor:
    """Return the log-probability of the first image tokens of each row, in nats.

    The result is float64 ``[rows, lengths]`` on the CPU.

    Args:
        chunks: a model without pipeline stages, from ``build_gpt``.
        rows: rows from :func:`training_rows`; one at a time passes through the model.
        lengths: numbers of image tokens; at most as many as every row has.
        head: options of the head from ``head_options``.
        bar: a progress bar, which each row advances.
    """
    (model,), device, last = chunks, platform.device(), torch.tensor(lengths) - 1
    found = []
    for row in rows:
        batch = (tensor.to(device) for tensor in (row.tokens, row.targets, row.mask))
        by_token = image_logps(model, *batch, logps_of=token_logps, **head).cpu()[row.mask]
        found.append(by_token.double().cumsum(0)[last])
        if bar is not None:
            bar.update()
    return torch.stack(found)


def _pairs(
    policies: dict[ModelPrecision, Tensor], references: dict[ModelPrecision, Tensor], lengths: list[int]
) -> list[PairBias]:
    return [
        PairBias(policy, reference, tokens, _spread(ours[:, column], theirs[:, column]))
        for policy, ours in policies.items()
        for reference, theirs in references.items()
        for column, tokens in enumerate(lengths)
    ]


def _spread(policy: Tensor, reference: Tensor) -> LogRatioSpread:
    rows = (policy[::2], policy[1::2], reference[::2], reference[1::2])
    return log_ratio_spread(PairLogps(*rows, torch.zeros(len(rows[0]), dtype=torch.bool)))


def table(pairs: Sequence[PairBias]) -> str:
    """Return all numbers as a Markdown table.

    A pair that is 0 at all lengths has one line.
    """
    header = ("policy", "reference", "tokens", "mean", "sd", "rms", "worst", "safe beta")
    lines = []
    for group in _by_pair(pairs):
        names = (str(group[0].policy), str(group[0].reference))
        if not any(pair.spread.worst for pair in group):
            lines.append((*names, "all", *("exactly 0",) * 4, "any"))
            continue
        lines += [(*names, f"{pair.tokens:,}", *_numbers(pair.spread), _beta(pair.safe_beta)) for pair in group]
    return markdown_table(header, lines)


def _numbers(spread: LogRatioSpread) -> tuple[str, ...]:
    return tuple(f"{value:.3g}" for value in (spread.mean, spread.std, spread.root_mean_square, spread.worst))


def _by_pair(pairs: Sequence[PairBias]) -> list[list[PairBias]]:
    groups: dict[tuple[ModelPrecision, ModelPrecision], list[PairBias]] = {}
    for pair in pairs:
        groups.setdefault((pair.policy, pair.reference), []).append(pair)
    return list(groups.values())


def _beta(value: float) -> str:
    """Format beta with two digits, rounded down.

    It is an upper limit.
    """
    if math.isinf(value):
        return "any"
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return f"{math.floor(value * scale) / scale:.2g}"


def conclusions(pairs: Sequence[PairBias], beta: float | None) -> list[str]:
    """Return a sentence for each policy and reference, about the longest measured images.

    Args:
        pairs: the result of :func:`measure`.
        beta: beta of the objective; None takes the paper's beta, scaled with 1 / tokens.
    """
    return [_conclusion(group[-1], beta, all(not pair.spread.worst for pair in group)) for group in _by_pair(pairs)]


def _conclusion(pair: PairBias, beta: float | None, is_zero: bool) -> str:
    reference = f"{ModelPrecision(pair.reference.precision)} reference" + (IN_FP8 if pair.reference.fp8_param else "")
    who = f"{pair.policy} policy, {reference}"
    if is_zero:
        return f"{who}: exactly 0, safe at any beta"
    mine = _PAPER_BETA_TIMES_TOKENS / pair.tokens if beta is None else beta
    name = f"the paper's, scaled to that: {mine:.2g}," if beta is None else f"{mine:g}"
    verdict = f"{name} is {'safe' if mine <= pair.safe_beta else 'not safe'}"
    line = f"{who}: safe up to beta {_beta(pair.safe_beta)} at {pair.tokens:,} tokens ({verdict})"
    if pair.policy == pair.reference:
        line += "; not 0 although both are the same: the layers are not deterministic here"
    return line


def write(path: Path, settings: BiasSettings, pairs: Sequence[PairBias]) -> None:
    """Write all numbers as JSON, and a plot of them.

    The plot lies beside the JSON file. It has the same name with ``.png``.
    """
    found = [
        {
            "policy": str(pair.policy),
            "reference": str(pair.reference),
            "tokens": pair.tokens,
            **asdict(pair.spread),
            "root_mean_square": pair.spread.root_mean_square,
            "safe_beta": None if math.isinf(pair.safe_beta) else pair.safe_beta,
        }
        for pair in pairs
    ]
    facts = {**asdict(settings), "device": platform.device_name(), "torch": torch.__version__}
    write_json(path, {**facts, "allowed": DEFAULT_ALLOWED, "pairs": found})
    _draw(path.with_suffix(".png"), _lines(pairs))


def _lines(pairs: Sequence[PairBias]) -> list[list[PairBias]]:
    """Return the pairs to draw, the largest first.

    Zeros are left out, because a logarithmic axis has none. Of two pairs with exchanged precisions, one is left out.
    """
    found: dict[frozenset[ModelPrecision], list[PairBias]] = {}
    for group in _by_pair(pairs):
        if all(pair.spread.worst for pair in group):
            found.setdefault(frozenset((group[0].policy, group[0].reference)), group)
    return sorted(found.values(), key=lambda group: -group[-1].spread.root_mean_square)


def _draw(path: Path, groups: Sequence[Sequence[PairBias]]) -> None:
    # Imported late: the measurement needs no matplotlib.
    from matplotlib.figure import Figure

    from megatron_cca.io.figures import COLOURS, LEGEND, TITLE, save, style_axes

    figure = Figure(figsize=(9, 4.6), dpi=150)
    axis = figure.subplots()
    axis.set_prop_cycle(color=COLOURS)
    for group in groups:
        errors = [pair.spread.root_mean_square for pair in group]
        line = "--" if group[0].reference.fp8_param else "-"
        label = f"{group[0].policy} / {group[0].reference}"
        axis.plot([pair.tokens for pair in group], errors, line, marker="o", markersize=3.5, linewidth=1.5, label=label)
    if groups:
        _guides(axis, groups)
        axis.legend(title="policy / reference", loc="center left", bbox_to_anchor=(1, 0.5), **LEGEND)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    tokens = [pair.tokens for pair in groups[0]] if groups else []
    axis.set_xticks(tokens, [f"{number:,}" for number in tokens])
    axis.minorticks_off()
    axis.set_title("log-ratio of models with the same weights", **TITLE)
    style_axes(axis, across="image tokens", up="root mean square, nats per image")
    save(figure, path)


def _guides(axis, groups: Sequence[Sequence[PairBias]]) -> None:
    """Draw the growth of independent errors, and of errors that all have the same sign."""
    from megatron_cca.io.figures import GREY

    first, last = groups[0][0].tokens, groups[0][-1].tokens
    if first == last:
        return
    logs = [math.log(group[0].spread.root_mean_square) for group in groups]
    start = math.exp(sum(logs) / len(logs))
    for power, name in ((0.5, "√n"), (1.0, "n")):
        end = start * (last / first) ** power
        axis.plot([first, last], [start, end], color=GREY, linewidth=0.7, zorder=0)
        axis.annotate(name, (last, end), xytext=(3, 0), textcoords="offset points", fontsize=8, color=GREY)

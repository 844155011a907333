"""Speed of token batches: the loader by DALI and by torch, a torch DataLoader on the same shards, Emu3's .pth files.

.venv/bin/python benchmarks/data.py

data.md has the results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measuring import in_fresh_process, machine, parse_or_measure
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.data import dali
from megatron_cca.data.loader import DALI, TORCH
from megatron_cca.lab import markdown_table

GRID, CAPTION = (90, 90), (20, 120)  # a 720 x 720 image; tokens of a caption, from and to
_PTH_FILES = 2000


def main() -> None:
    """Measure all ways.

    A measuring process measures one of them.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_data"), help="holds the data; kept")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="that each way is measured for")
    parser.add_argument("--memory-samples", type=int, default=100_000, help="that the loader passes over")
    compare(parse_or_measure(parser, lambda settings: PARTS[settings.pop("part")](**settings)))


def compare(arguments: argparse.Namespace) -> None:
    """Measure all ways and print the tables."""
    folder = str(arguments.folder)
    in_fresh_process(__file__, {"part": "prepare", "folder": folder, "samples": arguments.samples})
    common = {"folder": folder, "size": arguments.global_batch_size}
    cases = [("loader", {"loader": name}) for name in (DALI, TORCH) if name != DALI or dali.is_installed()]
    cases += [("DataLoader", {"workers": n}) for n in (0, 1, 2)]
    cases += [("Emu3's .pth", {"workers": n}) for n in (0, 1, 2)]
    found = []
    for part, options in tqdm(cases, desc="measuring", unit="case"):
        found.append(in_fresh_process(__file__, {"part": part, "seconds": arguments.seconds, **common, **options}))
    size = arguments.global_batch_size
    print(f"{machine('cpu')}; {arguments.samples} samples of {GRID[0]} x {GRID[1]}, batches of {size}")
    speeds = [one["tokens"] / one["seconds"] for one in found]
    rows = [
        [
            _name(part, options),
            str(options.get("workers", "a thread")),
            f"{speed / 1e6:.1f}",
            f"{speeds[0] / speed:.2f}",
        ]
        for (part, options), speed in zip(cases, speeds, strict=True)
    ]
    print(markdown_table(["way", "workers", "million tokens/s", f"{rows[0][0]} / this"], rows))
    far = in_fresh_process(__file__, {"part": "far", **common})
    print(f"\nopening the shards and the first batch of step 1,000,000: {far['seconds']:.2f} s")
    memory = {"part": "memory", "folder": folder, "size": 256, "samples": arguments.memory_samples}
    marks = in_fresh_process(__file__, memory)["marks"]
    cells = [[f"{samples:,}", f"{mib:.0f}"] for samples, mib in marks]
    print("\n" + markdown_table(["samples read", "memory of the process, MiB"], cells))


def _name(part: str, options: dict) -> str:
    return f"{part}, {options['loader']}" if "loader" in options else part


def prepare(folder: str, samples: int) -> dict:
    """Write random shards, and samples in the format of Emu3's ``prepare_data.py``.

    Existing files stay.
    """
    _install()
    from megatron_cca.data.shard_writing import Sample, write_shards
    from megatron_cca.models.emu3 import EMU3_VOCABULARY

    random = np.random.default_rng(0)
    shards = Path(folder) / f"shards{samples}"
    if not shards.exists():
        drawn = (
            Sample(random.integers(32_768, size=GRID), random.integers(256, size=random.integers(*CAPTION)))
            for _ in tqdm(range(samples), desc="writing shards", unit="sample")
        )
        write_shards(shards, drawn, EMU3_VOCABULARY, lambda text: list(text.encode()))
    (Path(folder) / "current").write_text(shards.name)
    feature = Path(folder) / "feature"
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not feature.exists():
        feature.mkdir()
        for index in tqdm(range(_PTH_FILES), desc="writing .pth files", unit="file"):
            codes, length = random.integers(32_768, size=GRID), int(random.integers(*CAPTION))
            torch.save({"name": str(index), "images": codes, "texts": "x " * length}, feature / f"{index}.pth")
    return {}


def _install() -> None:
    torch.set_num_threads(1)
    platform.install("cpu")


def _batches(folder: str, size: int):
    """Return the builder of pairs, as in a CCA run."""
    from megatron_cca.data.microbatches import BatchBuilder
    from megatron_cca.data.pairing import Pairing, training_order
    from megatron_cca.data.shards import TokenData, TokenShards
    from megatron_cca.models.emu3 import EMU3_VOCABULARY

    shards = Path(folder) / (Path(folder) / "current").read_text()
    data = TokenData([TokenShards(shards, EMU3_VOCABULARY)])
    pairing = Pairing(training_order(data, 0, 0.0, 0), data.rows, size, condition_dropout=0.1, seed=0)
    return BatchBuilder(data, pairing, True, size, sequence_multiple=1, max_sequence_length=9216)


def _loader(folder: str, size: int, loader: str | None = None):
    from megatron_cca.data.loader import BatchLoader, RankShare

    return BatchLoader(_batches(folder, size), RankShare(), torch.device("cpu"), prefetch=2, loader=loader)


def _tokens_per_second(batches: Iterator[torch.Tensor], seconds: float, padding: int) -> dict:
    next(batches)
    tokens, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        # Count every sixteenth position. The count then costs almost nothing.
        tokens += 16 * int((next(batches)[:, ::16] != padding).sum())
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


def loader(folder: str, size: int, seconds: float, loader: str) -> dict:
    """Measure our loader, by DALI or by torch alone."""
    _install()
    with _loader(folder, size, loader) as batches:
        return _tokens_per_second(_counted(batches.get), seconds, padding=151_643)


def _counted(get: Callable) -> Iterator[torch.Tensor]:
    step = 0
    while True:
        (microbatch,) = get(step).microbatches
        yield microbatch.targets
        step += 1


class _Rows(Dataset):
    """The usual dataset for a DataLoader.

    It returns one row at a time from the same memory-mapped shards.
    """

    def __init__(self, batches) -> None:
        self._batches = batches

    def __getitem__(self, row: tuple[int, int, bool]) -> torch.Tensor:
        sample, caption_of, dropped = row
        data = self._batches.data
        codes = data.codes(sample)
        caption = np.empty(0, np.int32) if dropped else data.caption(caption_of)
        prompt = data.vocabulary.prompt(caption, data.meta_ids(sample, codes.shape))
        return torch.from_numpy(np.concatenate([prompt, data.vocabulary.image(codes)]))


class _PairSampler:
    """A sampler of the same rows in the same order."""

    def __init__(self, pairing) -> None:
        self._pairing = pairing

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        step = 0
        while True:
            batch = self._pairing.at(step)
            yield [
                (int(sample), int(caption), bool(dropped))
                for captions in (batch.sample_ids, batch.negative_ids)
                for sample, caption, dropped in zip(batch.sample_ids, captions, batch.condition_dropped, strict=True)
            ]
            step += 1


def _padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=151_643)
    return ids[:, :-1], ids[:, 1:]


def data_loader(folder: str, size: int, seconds: float, workers: int) -> dict:
    """Measure a torch DataLoader on the same shards."""
    _install()
    batches = _batches(folder, size)
    loading = DataLoader(
        _Rows(batches), batch_sampler=_PairSampler(batches.pairing), collate_fn=_padded, num_workers=workers
    )
    return _tokens_per_second((targets for _, targets in loading), seconds, padding=151_643)


class _PthFiles(Dataset):
    """The samples of ``emu3/train/datasets.py``.

    It loads a sample, writes each visual token as text, tokenises and pads.
    """

    def __init__(self, folder: Path) -> None:
        import tiktoken

        visual = {f"<|visual token {code:06d}|>": 151_854 + code for code in range(32_768)}
        control = {f"<|extra_{index}|>": 151_646 + index for index in range(205)}
        marks = {"<|image token|>": 151_851, "<|image start|>": 151_852, "<|image end|>": 151_853}
        ranks = {bytes([byte]): byte for byte in range(256)}
        self._folder = folder
        self._tokenizer = tiktoken.Encoding(
            "emu3", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=visual | control | marks
        )

    def __len__(self) -> int:
        return _PTH_FILES

    def __getitem__(self, index: int) -> torch.Tensor:
        kinds = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Int64DType]
        with torch.serialization.safe_globals(kinds):
            data = torch.load(self._folder / f"{index}.pth", weights_only=True)
        codes = data["images"]
        rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes]
        grid = f"{codes.shape[0]}*{codes.shape[1]}"
        text = (
            f"<|extra_203|>{data['texts']}<|image start|>{grid}<|image token|>"
            f"{'<|extra_200|>'.join(rows)}<|extra_200|><|extra_201|><|image end|>"
        )
        ids = torch.tensor(self._tokenizer.encode(text, allowed_special="all"))
        return torch.nn.functional.pad(ids, (0, 9216 - len(ids)), value=151_643)


def pth_files(folder: str, size: int, seconds: float, workers: int) -> dict:
    """Measure Emu3's own way.

    A sample is one row, because Emu3 has no pairs.
    """
    _install()
    loading = DataLoader(_PthFiles(Path(folder) / "feature"), batch_size=size, shuffle=True, num_workers=workers)

    def endlessly() -> Iterator[torch.Tensor]:
        while True:
            yield from loading

    return _tokens_per_second(endlessly(), seconds, padding=151_643)


def far(folder: str, size: int) -> dict:
    """Measure the time from the end of the imports to the first batch of a late step."""
    _install()
    import megatron_cca.data.loader  # noqa: F401 - not what is measured

    began = time.perf_counter()
    with _loader(folder, size) as batches:
        batches.get(1_000_000)
        return {"seconds": time.perf_counter() - began}


def memory(folder: str, size: int, samples: int) -> dict:
    """Measure the process's own memory while it reads samples.

    Mapped files are in the file cache and do not count.
    """
    _install()
    steps, marks = samples // size, []
    with _loader(folder, size) as batches:
        for step in tqdm(range(steps), desc="passing over", unit="step"):
            batches.get(step)
            if step + 1 in {steps // 100, steps // 10, steps // 4, steps // 2, steps}:
                marks.append([(step + 1) * size, _own_mib()])
    return {"marks": marks}


def _own_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


PARTS: dict[str, Callable[..., dict]] = {
    "prepare": prepare,
    "loader": loader,
    "DataLoader": data_loader,
    "Emu3's .pth": pth_files,
    "far": far,
    "memory": memory,
}

if __name__ == "__main__":
    main()

"""Time to draw images: with and without guidance, this project and transformers, and the cost of one token.

.venv/bin/python benchmarks/sampling.py

One process measures all ways with the same weights and prompts, in alternating rounds. sampling.md has the results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from measuring import machine
from tqdm import tqdm

from megatron_cca import platform
from megatron_cca.lab import markdown_table
from megatron_cca.lab.planner.measuring import memory_bandwidth

# Emu3's proportions: four query heads for each key head, and a feed-forward layer 3.5 times as wide as the model.
FFN_RATIO, HEAD = 3.5, 64
TOP_K = 2048  # Emu3's own
CAPTION_TOKENS = 24


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--grid", type=int, default=16, help="visual tokens on a side")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if find_spec("transformers") is None:
        sys.exit("benchmarks/sampling.py: transformers is not installed; pip install -e '.[hf]'")
    platform.install(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        _save_random_model(arguments, folder)
        _measure(arguments, folder)


def _save_random_model(arguments: argparse.Namespace, folder: str) -> None:
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    from megatron_cca.models.emu3 import EMU3_VOCABULARY

    width = arguments.hidden_size
    torch.manual_seed(0)
    model = Emu3ForCausalLM(
        Emu3TextConfig(
            vocab_size=EMU3_VOCABULARY.size,
            hidden_size=width,
            intermediate_size=int(FFN_RATIO * width),
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=width // HEAD,
            num_key_value_heads=max(1, width // HEAD // 4),
            max_position_embeddings=9216,
            pad_token_id=EMU3_VOCABULARY.pad,
            bos_token_id=EMU3_VOCABULARY.bos,
            eos_token_id=EMU3_VOCABULARY.eos,
        )
    )
    model.save_pretrained(folder)


def _measure(arguments: argparse.Namespace, folder: str) -> None:
    from megatron_cca.config.load import load_config
    from megatron_cca.generation.model_loading import load_for_sampling
    from megatron_cca.parallel.ranks import initialize_distributed

    initialize_distributed(load_config())
    model = load_for_sampling(folder)
    size = sum(parameter.numel() for parameter in model.chunks[0].parameters())
    print(
        f"{machine(arguments.device)}; {size / 1e6:.0f} M parameters, Emu3's vocabulary, fp32, batch "
        f"{arguments.batch_size}, {arguments.grid} x {arguments.grid} visual tokens, top-k {TOP_K}"
    )
    print(_speeds(arguments, folder, model))
    print()
    print(_costs(arguments, model))


def _speeds(arguments: argparse.Namespace, folder: str, model) -> str:
    """Measure the ways and return a table of tokens per second, medians of alternating rounds."""
    ways = _ways(arguments, folder, model)
    tokens = arguments.batch_size * arguments.grid**2
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=arguments.rounds * len(ways), unit="run") as bar:
        for _ in range(arguments.rounds):
            for name, draw in ways.items():
                seconds[name].append(_timed(draw))
                bar.update()
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    base = speeds["transformers generate"]
    rows = [
        [name, f"{speed:.0f}", f"{speed / arguments.grid**2:.3f}", f"{speed / base:.2f}"]
        for name, speed in speeds.items()
    ]
    free, guided = speeds["megatron_cca, guidance-free"], speeds["megatron_cca, CFG"]
    table = markdown_table(["way", "visual tokens/s", "images/s", "beside transformers"], rows)
    return f"{table}\n\nguidance-free / CFG: {free / guided:.2f} x the images/s"


def _ways(arguments: argparse.Namespace, folder: str, model) -> dict[str, Callable[[], object]]:
    from transformers import Emu3ForCausalLM

    from megatron_cca.generation.decode_loop import ImageRequest, SamplingSettings, sample_codes

    vocabulary, side, batch = model.architecture.vocabulary, arguments.grid, arguments.batch_size
    random = np.random.default_rng(0)
    captions = random.integers(vocabulary.text_size, size=(batch, CAPTION_TOKENS))
    meta_ids = np.arange(5)
    prompts = [vocabulary.prompt(caption, meta_ids) for caption in captions]
    empty = vocabulary.prompt(captions[0][:0], meta_ids)
    requests = [ImageRequest(prompt, seed, empty) for seed, prompt in enumerate(prompts)]

    def ours(scale: float) -> np.ndarray:
        settings = SamplingSettings(side, side, guidance_scale=scale, top_k=TOP_K, batch_size=batch)
        return sample_codes(model.chunks, vocabulary, requests, settings)

    plain = Emu3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(arguments.device)
    # Otherwise a row that draws this token would end early.
    plain.generation_config.eos_token_id = None
    ids = torch.from_numpy(np.stack(prompts)).to(arguments.device)
    visual = list(range(vocabulary.visual_start, vocabulary.size))

    def grammar(_row: int, tokens: torch.Tensor) -> list[int]:
        return [vocabulary.eol] if (len(tokens) - ids.size(1)) % (side + 1) == side else visual

    def theirs(**options) -> torch.Tensor:
        new = side * (side + 1) - 1
        return plain.generate(ids, max_new_tokens=new, do_sample=True, top_k=TOP_K, **options)

    return {
        "transformers generate": theirs,
        "transformers generate, static cache": lambda: theirs(cache_implementation="static"),
        "transformers generate with Emu3's prefix_allowed_tokens_fn": lambda: theirs(prefix_allowed_tokens_fn=grammar),
        "megatron_cca, guidance-free": lambda: ours(0.0),
        "megatron_cca, CFG": lambda: ours(2.0),
    }


def _timed(run: Callable[[], object]) -> float:
    platform.synchronize()
    started = time.perf_counter()
    run()
    platform.synchronize()
    return time.perf_counter() - started


def _costs(arguments: argparse.Namespace, model) -> str:
    """Measure the milliseconds of one token after so many others, and return a table.

    It has the whole time, the least that this machine could take, the time of the attention, and the whole time with
    Megatron's static context.
    """
    machine_can = memory_bandwidth(2**28), _flops_per_second()
    rows = []
    for length in tqdm(arguments.lengths, unit="length"):
        whole, attention, static = (cost(arguments, model, length) for cost in (_token, _attention, _static_token))
        floor = _floor(arguments, model, length, *machine_can)
        cells = [whole, floor, attention, whole - attention, static]
        rows.append([str(length), *(f"{1000 * seconds:.1f}" for seconds in cells), f"{floor / whole:.0%}"])
    header = ["tokens before it", "ms", "floor", "its attention", "the rest", "with Megatron's StaticInferenceContext"]
    copies, products = (rate / 1e9 for rate in machine_can)
    return f"{markdown_table([*header, 'floor / ms'], rows)}\n\n{copies:.1f} GB/s of copies, {products:.0f} GFLOP/s"


def _floor(
    arguments: argparse.Namespace, model, length: int, bytes_per_second: float, flops_per_second: float
) -> float:
    """Return the seconds of reading weights and cache once, or of the arithmetic, whichever is more."""
    sizes, batch = model.architecture, arguments.batch_size
    layers = sum(parameter.nbytes for parameter in model.chunks[0].decoder.parameters())
    weights = layers + 4 * sizes.hidden_size * sizes.vocabulary.codebook_size
    places = batch * length * sizes.num_layers * sizes.kv_channels
    cache, attention = 4 * 2 * places * sizes.num_query_groups, 4 * places * sizes.num_attention_heads
    return max((weights + cache) / bytes_per_second, (2 * batch * weights / 4 + attention) / flops_per_second)


def _flops_per_second() -> float:
    side = 2048
    one, other = (torch.ones(side, side, device=platform.device()) for _ in range(2))
    return 2 * side**3 / min(_timed(lambda: one @ other) for _ in range(10))


def _token(arguments: argparse.Namespace, model, length: int) -> float:
    from megatron_cca.generation.decoder import decoding

    tokens = torch.zeros((arguments.batch_size, 1), dtype=torch.int64, device=platform.device())
    with decoding(model.chunks, model.architecture.vocabulary) as decoder:
        cache = decoder.new_cache(length + 8)
        decoder.feed(cache, tokens.expand(-1, 8))
        # Pretend that so many tokens were fed. The contents of the cache do not change the time.
        cache.lengths += length - 8
        cache.longest = length
        return statistics.median(_timed(lambda: decoder.feed(cache, tokens)) for _ in range(5))


def _attention(arguments: argparse.Namespace, model, length: int) -> float:
    from torch.nn.functional import scaled_dot_product_attention

    sizes = model.architecture
    groups, width = sizes.num_query_groups, sizes.hidden_size // sizes.num_attention_heads
    shape = (arguments.batch_size, groups, length, width)
    keys, values = (torch.randn(shape, device=platform.device()) for _ in range(2))
    query = torch.randn((*shape[:2], sizes.num_attention_heads // groups, width), device=platform.device())

    def all_layers() -> None:
        for _ in range(sizes.num_layers):
            scaled_dot_product_attention(query, keys, values)

    return statistics.median(_timed(all_layers) for _ in range(5))


def _static_token(arguments: argparse.Namespace, model, length: int) -> float:
    from megatron.core.inference.contexts import StaticInferenceContext

    (chunk,) = model.chunks
    tokens = torch.zeros((arguments.batch_size, 8), dtype=torch.int64, device=platform.device())
    context = StaticInferenceContext(arguments.batch_size, length + 8)

    def feed(tokens: torch.Tensor) -> None:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        # The head computes only the last position. Its cost is the same in both ways.
        chunk(tokens, positions, None, inference_context=context, output_processor=_visual_head(model))

    with torch.no_grad():
        feed(tokens)
        context.sequence_len_offset = length
        return statistics.median(_timed(lambda: feed(tokens[:, :1])) for _ in range(5))


def _visual_head(model) -> Callable[..., torch.Tensor]:
    vocabulary = model.architecture.vocabulary
    rows = slice(vocabulary.visual_start, vocabulary.visual_start + vocabulary.codebook_size)
    return lambda *, hidden_states, output_layer, **_unused: hidden_states[-1] @ output_layer.weight[rows].T


if __name__ == "__main__":
    main()

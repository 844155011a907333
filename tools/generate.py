"""Draw pictures from a checkpoint, guidance-free or with classifier-free guidance."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_cca import platform
from megatron_cca.errors import UserError
from megatron_cca.reporting import reported_errors


def main() -> None:
    """Parse the command line and write one PNG."""
    arguments = _parse()
    with reported_errors():
        if arguments.images < 1:
            raise UserError(f"--images: must be 1 or more, found {arguments.images}")
        if min(arguments.grid) < 1:
            raise UserError(f"--grid: height and width must be 1 or more, found {' '.join(map(str, arguments.grid))}")
        if not arguments.output.parent.is_dir():
            raise UserError(f"--output: the folder {arguments.output.parent} does not exist")
        platform.install(arguments.device)
        _generate(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python tools/generate.py --checkpoint runs/quickstart/cca --caption 'a handwritten seven' "
        "--output seven.png",
    )
    parser.add_argument("--checkpoint", required=True, help="a run folder or an iter_ folder")
    parser.add_argument("--caption", required=True, action="append", help="what to draw; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write: a row of pictures a caption")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="pictures per caption (default 8)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=0.0,
        help="s in logits = (1 + s) cond - s uncond, as in the CCA paper; 0 (default) is guidance-free, one forward "
        "pass a token; Emu3's and LlamaGen's own programs call 1 + s the scale",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=int, nargs=2, default=(4, 4), metavar=("H", "W"), help="in visual tokens")
    parser.add_argument("--shards", type=Path, help="shard folder with tokenizer and codebook (default: the digits')")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def _generate(arguments: argparse.Namespace) -> None:
    # Imported late: Megatron-Core must not be imported before the platform is installed.
    import torch.distributed as dist

    from megatron_cca.config import load_config
    from megatron_cca.data.digits import ensure_digit_shards
    from megatron_cca.evaluation.plots import SampleColumn, sample_sheet
    from megatron_cca.generation.captions import CaptionPainter
    from megatron_cca.generation.loading import load_for_sampling
    from megatron_cca.parallel.process_groups import initialize_distributed

    initialize_distributed(load_config())
    model, architecture = load_for_sampling(arguments.checkpoint)
    painter = CaptionPainter(arguments.shards or ensure_digit_shards(), *arguments.grid)
    captions = [caption for caption in arguments.caption for _ in range(arguments.images)]
    scale = arguments.guidance_scale
    images = painter.paint(model, architecture, captions, seed=arguments.seed, guidance_scale=scale)
    rows = images.reshape(len(arguments.caption), arguments.images, *images.shape[1:])
    how = "guidance-free, 1 forward a token" if scale == 0 else f"CFG {scale:g}, 2 forwards a token"
    sample_sheet(arguments.output, [SampleColumn(arguments.checkpoint, how, rows)], arguments.caption)
    print(f"wrote {arguments.output}: {len(captions)} pictures")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Draw pictures with the policy during training, each time from the same prompts and random numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from megatron_cca import platform
from megatron_cca.errors import UserError, error_context
from megatron_cca.generation.decode_loop import SamplingSettings
from megatron_cca.generation.image_generator import GeneratedImages, ImageGenerator
from megatron_cca.generation.model_loading import default_grid, open_tokenizers
from megatron_cca.generation.prompts import Prompt, digit_classes, read_prompts, seeded
from megatron_cca.training.run_log import MetricsLog
from megatron_cca.training.setup import Run

FOLDER = "samples"
_BATCH = 16


class SamplePictures:
    """The pictures that a run's policy draws. Drawing changes nothing of the run.

    Args:
        generator: has the policy's own chunks.
        prompts: prompts with seeds.
        settings: guidance-free settings.
        folder: the folder of the PNG files.
        beat: called at every token, to tell the watchdog that this rank makes progress.
        gather: called before the policy's weights are read.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        prompts: list[Prompt],
        settings: SamplingSettings,
        folder: Path,
        beat: Callable[[], None],
        gather: Callable[[], None],
    ) -> None:
        self._generator, self._prompts, self._settings, self._folder = generator, prompts, settings, folder
        self._beat, self._gather = beat, gather
        # Refuse prompts that do not fit before the first step, not at the first picture.
        generator.requests(prompts, settings)

    def generate(self) -> GeneratedImages:
        """Return the pictures of all prompts, on every rank. Collective over all ranks of the job."""
        self._gather()
        return self._generator.generate(self._prompts, self._settings, on_tokens=lambda tokens: self._beat())

    def draw(self, step: int, log: MetricsLog | None) -> None:
        """Draw all pictures into one PNG file. Collective over all ranks of the job.

        Args:
            step: the number of completed steps.
            log: on rank 0, the log that shows the picture.
        """
        pictures = self.generate()
        if log is None:
            return
        path = self._folder / f"step_{step:07d}.png"
        with log.tolerating_a_full_disk():
            # A run without pictures needs no matplotlib.
            from megatron_cca.io.figures import contact_sheet

            self._folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(path, list(pictures.images), [prompt.title for prompt in self._prompts])
            log.show(FOLDER, path, step)


def open_pictures(run: Run) -> SamplePictures | None:
    """Return the :class:`SamplePictures` of a run, None if ``logging.sample_interval`` is 0. Collective over all ranks.

    Raises:
        UserError: prompts that cannot be read or do not fit, no tokenizers, or images of several sizes and no grid.
    """
    config = run.config
    if not config.logging.sample_interval:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "logging.sample_interval: pictures need matplotlib; pip install 'megatron-cca[eval]', or set it to 0"
        )
    with error_context("logging.sample_grid"):
        height, width = config.logging.sample_grid or default_grid(config)
    tokenizers = open_tokenizers(
        run.start or Path(config.training.output_dir),
        config,
        run.architecture.vocabulary,
        text=_path(config.logging.text_tokenizer),
        images=_path(config.logging.image_tokenizer),
        device=platform.device(),
        options=("logging.text_tokenizer", "logging.image_tokenizer"),
    )
    generator = ImageGenerator(run.policy_chunks, run.architecture, tokenizers)
    settings = SamplingSettings(height, width, batch_size=_BATCH)
    with error_context("logging.sample_prompts"):
        folder = Path(config.training.output_dir) / FOLDER
        return SamplePictures(generator, _prompts(run), settings, folder, run.progress.beat, run.gather_parameters)


def _prompts(run: Run) -> list[Prompt]:
    file = run.config.logging.sample_prompts
    prompts = digit_classes() if file is None else read_prompts(Path(file))
    return seeded(prompts, run.config.training.seed)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)

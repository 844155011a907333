"""The cost of a layout before a run: memory, step time, the search, and a dry run of any rank. Here: the options."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, ClassVar

from pydantic import Field

from megatron_cca.config import ConfigFile
from megatron_cca.io.options import Count, DeviceChoice, File, Folder, Option, Overrides, options

# From there on Megatron's groups alone take minutes.
MAX_GPUS = 16_384


@options
class RunOptions:
    """The run, and the length of its rows."""

    _: KW_ONLY
    config: ConfigFile
    """the run's YAML file, or the name of an example"""
    overrides: Overrides = ()
    """override a key of the configuration; may be repeated"""
    image_grid: Annotated[str, Option(metavar="HxW")] | None = None
    """grid of visual tokens of an image (default: the one that the model has; for Emu3, which has many, 90x90, which is
    720 x 720 pixels)"""
    caption_tokens: Annotated[int, Field(ge=0)] = 128
    """tokens of the longest caption"""


@options
class PlanSettings(RunOptions):
    """Rank all layouts of a configuration on a cluster."""

    epilog: ClassVar[str] = (
        "Written to the output folder: plan.yaml, the best run's configuration, which training takes as it is; "
        "table.md; plan.png, the memory and the seconds of the layouts by what they go to; plan.json, every number.\n\n"
        "Predictions come from a model of the GPU. Their error is printed beside them (±, two standard deviations). It "
        "was found on published runs, none of them of this program: measure your device with megatron-cca plan "
        "calibrate."
    )
    _: KW_ONLY
    gpus: Count
    """GPUs of the whole job"""
    gpu: Annotated[str, Option(metavar="NAME")]
    """kind of these GPUs, such as h100-80gb"""
    gpus_per_node: Annotated[Count, Option(name="--nodes-of")] | None = None
    """GPUs of a node, which NVLink connects (default: as many as is usual for the kind, which is 8)"""
    vary: Annotated[str, Option(metavar="NAME,...")] | None = None
    """what may be changed beside the layout: micro_batch, recompute, optimizer, reference, precision, cached (default:
    the first four)"""
    calibration: File | None = None
    """the file that megatron-cca plan calibrate wrote (default: shares of the data sheets that published runs reach)"""
    top: Count = 10
    """number of layouts to show, the fastest first"""
    output: Folder | None = None
    """an empty or new folder (default: print only)"""
    overwrite: bool = False
    """replace a former plan in --output, nothing else"""


@options
class DryRunSettings(RunOptions):
    """Build the real model of any rank of any cluster and count a step of it, on this CPU."""

    epilog: ClassVar[str] = (
        "Process groups are fake and tensors have no memory; everything else is training's own code. What training "
        "would refuse on that cluster is refused here, in the same words; so is a rank that does not fit."
    )
    _: KW_ONLY
    gpus: Annotated[int, Field(ge=1, le=MAX_GPUS)]
    """GPUs of the whole job, up to 16,384"""
    gpu: Annotated[str, Option(metavar="NAME")] | None = None
    """kind of these GPUs, such as h100-80gb (default: count as on CPUs)"""
    rank: Annotated[int, Option(metavar="R")] | None = None
    """the rank to build, from 0 on (default: the one that should hold most)"""
    output: File | None = None
    """a JSON file to write all numbers to (default: print only)"""
    overwrite: bool = False
    """replace the file"""


@options
class CalibrateSettings(RunOptions):
    """Measure the device at hand, so that predictions are of it."""

    epilog: ClassVar[str] = (
        "Takes one device, runs a few steps of the configuration's model with two and four layers on random tokens, "
        "and writes what predictions need and how far they are off. Links between GPUs are not measured."
    )
    _: KW_ONLY
    gpu: Annotated[str, Option(metavar="NAME")] | None = None
    """the known GPU that the device is nearest to, such as h100-80gb (default: told from the driver's name for it)"""
    steps: Count = 5
    """steps to measure in each short run"""
    device: DeviceChoice = "auto"
    """the device to measure; auto takes a GPU where there is one"""
    output: File
    """the JSON file to write, which --calibration reads"""
    overwrite: bool = False
    """replace the file"""

"""Whether a study's plots can be drawn from what it reports."""

from __future__ import annotations

from megatron_cca.errors import UserError, said_of
from megatron_cca.lab.studies.settings import PlotSettings
from megatron_cca.lab.studies.study import BASE, Method, Study


def file_name(plot: PlotSettings) -> str:
    """Of the PNG."""
    return f"{plot.file or plot.kind}.png"


def plotted_methods(study: Study, plot: PlotSettings) -> list[Method]:
    """The methods of a plot, those that it names or all that have what its kind wants; the base only where it fits."""
    if plot.methods is not None:
        return [study.methods[name] for name in plot.methods]
    methods = list(study.methods.values())
    return methods if plot.kind in ("comparison", "frontier") else [one for one in methods if _has_axes(one, plot)]


def swept_keys(method: Method) -> list[str]:
    """The keys of a method's sweep, in the file's order."""
    return list(method.sweep[0]) if method.sweep else []


def check_plots(study: Study) -> None:
    """Refuse a plot of what there will not be.

    Raises:
        UserError: names the plot and the key.
    """
    plots = study.settings.plots
    if not plots:
        raise UserError(f"plots: is empty; give at least one, such as {{kind: {'frontier'}}}")
    for index, plot in enumerate(plots):
        with said_of(f"plots.{index}"):
            _check_plot(study, plot)
    names = [file_name(plot) for plot in plots]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"plots.{index}.file: {name} is another plot's already; give it a name of its own")


def _check_plot(study: Study, plot: PlotSettings) -> None:
    for name in plot.methods or ():
        if name not in study.methods:
            raise UserError(f"methods: {name} is none; there are {', '.join(study.methods)}")
    wanted = {"against": ("x",), "heatmap": ("x", "y")}.get(plot.kind, ())
    for axis in ("x", "y"):
        if (getattr(plot, axis) is not None) != (axis in wanted):
            is_missing = "is missing; give a key of a sweep" if axis in wanted else "is of no use; leave it out"
            raise UserError(f"{axis}: {is_missing} (kind {plot.kind})")
    if plot.kind in ("frontier", "against") and "inception_score" not in study.settings.metrics:
        raise UserError(f"kind: {plot.kind} draws inception_score; add it to metrics")
    methods = plotted_methods(study, plot)
    for method in methods:
        if wanted and not _has_axes(method, plot):
            keys = " and ".join(getattr(plot, axis) for axis in wanted)
            raise UserError(f"methods: {method.name} does not sweep {keys}")
    if plot.kind == "frontier" and not any(swept_keys(method) for method in methods):
        raise UserError("methods: none of them has a sweep; a frontier needs one")
    if wanted and not methods:
        raise UserError(f"x: no method sweeps {plot.x}")
    if plot.kind == "heatmap":
        _check_heatmap(plot, methods)


def _check_heatmap(plot: PlotSettings, methods: list[Method]) -> None:
    if len(methods) != 1:
        raise UserError(f"methods: a heatmap is of one method, found {', '.join(one.name for one in methods)}")
    if plot.x == plot.y or set(swept_keys(methods[0])) != {plot.x, plot.y}:
        raise UserError(f"methods: {methods[0].name} must sweep the two keys x and y and no others")


def _has_axes(method: Method, plot: PlotSettings) -> bool:
    keys = swept_keys(method)
    return method.name != BASE and all(key in keys for key in (plot.x, plot.y) if key is not None)

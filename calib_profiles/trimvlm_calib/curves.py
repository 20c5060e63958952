"""Draws what a calibration measured: one panel per curve, with the layers that were chosen marked in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
COLUMNS = 4
STYLE = {"inject": ("tab:green", "-"), "select": ("tab:orange", "--"), "skip": ("tab:purple", "-."),
         "exit": ("tab:red", "-")}  # fmt: skip


def curve_figure(profile: Profile) -> Figure | None:
    """The curves of a Profile, or None if none were measured. Needs matplotlib.

    Full dots are layers with a rule of their own (skipped, frozen, ...); vertical lines are where visual
    tokens enter, are selected, enter skip mode and leave.
    """
    from matplotlib.figure import Figure

    curves = profile.calibration.curves if profile.calibration else {}
    if not curves:
        return None
    columns = min(COLUMNS, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.2, 2.3 * lines + 0.3), layout="constrained")
    axes: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    ruled, marks = chosen_layers(profile.decisions)
    for axis, (name, values) in zip(axes, curves.items(), strict=False):
        known = {layer: value for layer, value in enumerate(values) if value is not None}
        axis.plot(list(known), list(known.values()), "o-", markersize=4, markerfacecolor="white", lw=1)
        dots = [layer for layer in known if layer in ruled]
        axis.plot(dots, [known[layer] for layer in dots], "o", markersize=5, color="tab:blue", label="chosen")
        for kind, layers in marks.items():
            colour, dashes = STYLE[kind]
            for layer in layers:
                axis.axvline(layer, color=colour, ls=dashes, lw=1, alpha=0.8, label=kind)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("layer", fontsize=8)
        axis.set_xlim(-0.5, len(values) - 0.5)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    handles = {
        label: handle
        for handle, label in zip(*axes[0].get_legend_handles_labels(), strict=True)
        if label != "chosen" or ruled
    }
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5, fontsize=7)
    return figure


def chosen_layers(decisions: Decisions) -> tuple[set[int], dict[str, list[int]]]:
    """Layers with a rule, and layers where something happens to the visual tokens, by what it is."""
    ruled = {layer for rule in decisions.layers for layer in rule.layers}
    marks = {
        "inject": [decisions.inject] if decisions.inject else [],
        "select": [select.layer for select in decisions.select],
        "skip": [stage.layer for stage in decisions.skip.stages] if decisions.skip else [],
        "exit": [decisions.exit] if decisions.exit is not None else [],
    }
    return ruled, {kind: layers for kind, layers in marks.items() if layers}


def check_drawing(path: Path) -> None:
    """Refuses a file that cannot be drawn to.

    Raises:
        UserError: neither `.svg` nor `.png`, or a directory that is not there.
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib  # noqa: F401 - asked for before the work, not after it

    if path.suffix not in FORMATS:
        raise UserError(f"{path}: curves are drawn to {' or '.join(FORMATS)} files")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")


def draw_curves(profile: Profile, path: Path) -> bool:
    """Writes the picture; False if nothing was measured. The same Profile gives the same bytes."""
    import matplotlib

    figure = curve_figure(profile)
    if figure is None:
        return False
    with matplotlib.rc_context({"svg.hashsalt": profile.name}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True

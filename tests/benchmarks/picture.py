"""The README's picture: how a run went, and its score beside what other systems make of that text.
With several runs: what each minute of training buys, and where each run's bytes go.

    python tests/benchmarks/picture.py logs/RUN
    python tests/benchmarks/picture.py logs/TWO_MINUTES logs/TEN logs/THIRTY

It reads the runs' metrics.jsonl and writes score.svg or minutes.svg beside itself, or where --out
says. The page's colours are chosen by the reader's browser, light or dark; the picture brings its
own ground.
"""

import argparse
import io
import json
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Bits per byte of the same text, compressors primed with training text: see README.md.
OTHERS = (
    ("public baseline's net", 2.095),
    ("PPMd, order 12", 1.907),
    ("original stack", 1.892),
    ("zpaq -m5", 1.799),
    ("paq8px -8 (last 10 MB)", 1.688),
)
# Each role's colours, light and dark. While it is drawn, a role is a colour that nothing else has.
COLOURS = {
    "paper": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#e6edf3"), "faint": ("#d1d9e0", "#3d444d"),
    "other": ("#8c959f", "#6e7681"), "net": ("#bc4c00", "#f0883e"), "ours": ("#0969da", "#58a6ff"),
}  # fmt: skip
ROLE = {name: f"#0{i}0{i}0{i}" for i, name in enumerate(COLOURS, 1)}


def records(run: Path) -> dict[str, list[dict]]:
    """A run's records by their event."""
    found: dict[str, list[dict]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["event"], []).append(record)
    return found


def bare(axes: plt.Axes, title: str) -> None:
    """Give a plot its title, and take the frame away."""
    axes.set_title(title, loc="left", fontsize=10, pad=12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def draw_curve(axes: plt.Axes, found: dict[str, list[dict]]) -> None:
    """The loss of the net by the second, and where the run ended up."""
    final, val = found["final"][-1], found["val"][-1]
    per_nat = final["val_tokens"] / final["val_bytes"] / math.log(2)
    points = [(r["train_time_ms"] / 1000, r["train_loss"] * per_nat) for r in found["train"]]
    end = max(points[-1][0], val.get("train_time_ms", 0) / 1000, final["train_seconds"])
    axes.plot(*zip(*points, strict=True), color=ROLE["net"], lw=1.4)
    axes.plot(end, final["val_bpb_net"], "o", color=ROLE["net"], ms=5)
    axes.axhline(final["val_bpb"], color=ROLE["ours"], lw=1.8)
    free = max(y for x, y in points if x > 0.5 * end) + 0.15  # above the curve
    axes.text(end, free, f"on the validation text {final['val_bpb_net']:.3f}",
              color=ROLE["net"], ha="right", va="bottom", fontsize=9)  # fmt: skip
    axes.text(end, final["val_bpb"] - 0.06, f"the score: net and contexts {final['val_bpb']:.3f}",
              color=ROLE["ours"], ha="right", va="top", fontsize=9)  # fmt: skip
    axes.set(xlabel="seconds of training", xlim=(0, end * 1.02))
    axes.set_ylim(final["val_bpb"] - 0.4, min(max(y for _, y in points), 4.5))
    axes.grid(axis="y", color=ROLE["faint"], lw=0.6)
    bare(axes, "One run: the net's loss in bits per byte")


def draw_bars(axes: plt.Axes, found: dict[str, list[dict]]) -> None:
    """The systems, the best last."""
    final = found["final"][-1]
    bars = [(*row, "other") for row in OTHERS]
    bars += [("our contexts alone", final["val_bpb_context"], "ours"),
             ("our contexts and net", final["val_bpb"], "ours")]  # fmt: skip
    names, values, roles = zip(*bars, strict=True)
    axes.barh(names, values, color=[ROLE[role] for role in roles], height=0.66)
    for place, value in enumerate(values):
        axes.text(value + 0.02, place, f"{value:.3f}", va="center", fontsize=9, color=ROLE["ink"])
    axes.invert_yaxis()
    axes.set(xlim=(0, max(values) * 1.12), xticks=[])
    axes.spines["bottom"].set_visible(False)
    bare(axes, "The same text: bits per byte, lower is better")


def draw_minutes(axes: plt.Axes, finals: list[dict]) -> None:
    """Bits per byte by minutes of training, on one text."""
    assert len({f["val_sha256"] for f in finals}) == 1, "the runs scored unlike texts"
    minutes = [f["train_seconds"] / 60 for f in finals]
    lines = (("net alone", "val_bpb_net", "net"), ("contexts alone", "val_bpb_context", "other"),
             ("together", "val_bpb", "ours"))  # fmt: skip
    for name, key, role in lines:
        values = [f[key] for f in finals]
        axes.plot(minutes, values, "o-", color=ROLE[role], lw=1.6, ms=4, label=name)
        for x, y in zip(minutes, values, strict=True):
            below = role == "ours"
            axes.annotate(f"{y:.3f}", (x, y), (0, -6 if below else 6), textcoords="offset points",
                          ha="center", va="top" if below else "bottom", fontsize=8,
                          color=ROLE[role])  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(minutes, [f"{x:.0f}" for x in minutes])
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.16)
    axes.set(xlabel="minutes of training")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", color=ROLE["faint"], lw=0.6)
    bare(axes, "The same text: bits per byte")


def draw_bytes(axes: plt.Axes, finals: list[dict]) -> None:
    """What the artifact's bytes are, run by run."""
    names, starts = [f"{f['train_seconds'] / 60:.0f} min" for f in finals], [0.0] * len(finals)
    parts = {("script", "other"): [f["code_bytes"] for f in finals],
             ("net", "net"): [f["model_bytes"] - f["packed_bytes"] for f in finals],
             ("text", "ours"): [f["packed_bytes"] for f in finals]}  # fmt: skip
    for (name, role), sizes in parts.items():
        sizes = [size / 1e6 for size in sizes]
        axes.barh(range(len(finals)), sizes, left=starts, color=ROLE[role], height=0.6, label=name)
        starts = [a + b for a, b in zip(starts, sizes, strict=True)]
    axes.set_yticks(range(len(finals)), names)
    for place, total in enumerate(starts):
        axes.text(total + 0.2, place, f"{total:.2f} MB", va="center", fontsize=9)
    axes.axvline(16, color=ROLE["ink"], lw=1, ls=":")
    axes.text(15.8, -0.62, "limit", ha="right", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 16.5), xlabel="MB")
    axes.legend(frameon=False, fontsize=8, loc=(0.76, 0.4))
    bare(axes, "Where the bytes go")


def picture(runs: list[dict[str, list[dict]]]) -> str:
    """The SVG of one run, or of several."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "score", "font.size": 9,
                         "font.family": "sans-serif", "savefig.facecolor": ROLE["paper"],
                         **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color",
                                          "ytick.color", "axes.edgecolor"), ROLE["ink"]),
                         "axes.facecolor": ROLE["paper"]})  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained",
                                         gridspec_kw={"width_ratios": (5, 5)})  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    if len(runs) == 1:
        draw_curve(left, runs[0])
        draw_bars(right, runs[0])
    else:
        finals = [found["final"][-1] for found in runs]
        draw_minutes(left, finals)
        draw_bytes(right, finals)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return themed(out.getvalue())


def themed(svg: str) -> str:
    """Put the two sets of colours in the place of the roles."""

    def rules(which: int) -> str:
        return ";".join(f"--{name}:{both[which]}" for name, both in COLOURS.items())

    for name, colour in ROLE.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub('font-family: [^;"]*', "font-family: sans-serif", svg)
    style = f"<style>:root{{{rules(0)}}}@media(prefers-color-scheme:dark){{:root{{{rules(1)}}}}}"
    return re.sub(r"(<svg[^>]*>)", rf"\1{style}</style>", svg, count=1)


def main() -> None:
    """Draw one run's picture, or that of several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="where the picture goes")
    args = parser.parse_args()
    name = "score.svg" if len(args.runs) == 1 else "minutes.svg"
    out = args.out or Path(__file__).with_name(name)
    out.write_text(picture([records(run) for run in args.runs]))
    print(json.dumps({"picture": str(out), "bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()

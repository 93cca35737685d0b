#!/usr/bin/env python3
"""A table of runs on the terminal, and logs/report.html: one page with their pictures.

    python tools/report.py [logs/RUN ...]       these runs, or all below these folders

It reads what a run leaves in its folder: metrics.jsonl; costs.npz (what each token cost) and
model.safetensors (how large the net's parts are) where they exist. It needs numpy and matplotlib.
"""

import html
import importlib.util
import io
import json
import math
import re
import shutil
import signal
import sys
import textwrap
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# ---- RUNS: what is recorded of each, as it is on disk, whole or not
FACTS = (  # of a config record, what is no knob or differs in every run
    "event run_id out_dir resume machine mlx_version dtype_used blas_used workers_used ranks gflops"
)
SAME = {  # what runs must share if their scores are to be compared
    "val_sha256": "were scored on different texts: their BPB cannot be compared",
    "mode": "were scored in different modes: BPB depends on that",
    "train_steps": "took different numbers of steps: BPB depends on that",
    "packed_tokens": "packed different amounts of text: all but val_bpb_net depend on that",
}
COLUMNS = {  # of the table, name: (what records call it, how it is written, what it is)
    "net": ("val_bpb_net", ".4f", "bits per byte of the net alone; unfinished: last validation"),
    "contexts": ("val_bpb_context", ".4f", "bits per byte of the context models alone"),
    "mixed": ("val_bpb", ".4f", "bits per byte of net and context models together: the score"),
    "bytes": ("total_bytes", ",.0f", "script and artifact"),
    "tokens": ("train_tokens", ",.0f", "training tokens seen"),
    "seconds": ("train_seconds", ",.0f", "training and packing"),
}


@dataclass(frozen=True, eq=False)
class Run:
    """A run's folder and the records in it (lines of metrics.jsonl), oldest first."""

    folder: Path
    name: str
    records: list[dict]
    damaged: int  # lines that are no record

    def last(self, *kinds: str) -> dict:
        """The newest record of these kinds; {} if there is none."""
        return next((r for r in reversed(self.records) if r["event"] in kinds), {})

    @property
    def final(self) -> dict:
        """The final record; {} while the run, or what makes it longer, is unfinished."""
        end = self.last("config", "train", "export", "final")
        return end if end.get("event") == "final" else {}

    def curve(self, kind: str, name: str) -> np.ndarray:
        """Steps and a value that records of this kind have, (2, n); the newest if one is twice."""
        points = [(r.get("step"), r.get(name)) for r in self.records if r["event"] == kind]
        known = dict(point for point in points if all(map(is_number, point)))
        return np.array(sorted(known.items())).reshape(-1, 2).T

    def score(self, metric: str = "val_bpb") -> float:
        """Bits per byte; infinite where there are none or the audit failed."""
        bpb = self.final.get(metric)
        return bpb if is_number(bpb) and self.status() != "fail" else math.inf

    def status(self) -> str:
        """The audit's word, or how far an unfinished run has got."""
        if self.final:
            return str(self.final.get("audit", "?"))
        steps = [r["step"] for r in self.records if is_number(r.get("step"))]
        return f"unfinished, step {steps[-1]}" if steps else "unfinished, no step"

    def settings(self) -> dict[str, str]:
        """Knobs by name, as an environment would have them."""
        known = {k.upper(): v for k, v in self.last("config").items() if k not in FACTS.split()}
        return {k: f"{v:.15g}" if isinstance(v, bool | float) else str(v) for k, v in known.items()}

    def row(self) -> dict[str, str]:
        """What the table says of it, by column."""
        unscored = {"val_bpb_net": self.last("val").get("val_bpb")}
        facts = {**self.last("export"), **(self.final or unscored)}
        values = {name: (facts.get(key), how) for name, (key, how, _) in COLUMNS.items()}
        text = {name: format(v, how) if is_number(v) else "-" for name, (v, how) in values.items()}
        text |= {"contexts": "-"} if facts.get("mixer") == "off" else {}  # they are the net's
        return {**text, "audit": self.status(), "run": self.name}


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path, name: str = "") -> Run:
    """Read a run, whatever state it is in."""
    path, records, damaged = folder / "metrics.jsonl", [], 0
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            records += [record] if record["event"] + "" else []
        except (ValueError, TypeError, KeyError):
            damaged += 1
    return Run(folder, name or folder.name, records, damaged)


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs in or below these folders, the best first; a folder without any is an empty run."""
    runs = {}
    for path in filter(Path.is_dir, paths):
        for folder in sorted(p.parent for p in path.rglob("metrics.jsonl")) or [path]:
            name = "" if folder == path else str(folder.relative_to(path))
            runs.setdefault(folder.resolve(), read_run(folder, name))
    return sorted(runs.values(), key=Run.score)


def differing(runs: list[Run]) -> list[str]:
    """The knobs in which the runs that have a config record differ."""
    known = [run.settings() for run in runs if run.last("config")]
    names = dict.fromkeys(name for settings in known for name in settings)
    return [n for n in names if len({settings.get(n, "?") for settings in known}) > 1]


def notes(runs: list[Run], ignore: str = "") -> list[str]:
    """Sentences on what keeps the finished runs' scores from being comparable."""
    finals = [run.final for run in runs if run.final]
    unlike = [n for n in SAME if n != ignore and len({str(f.get(n)) for f in finals}) > 1]
    parts = sum(final.get("val_whole") is False for final in finals)
    text = [f"{parts} of {len(finals)} scored only a part of the validation text."] * bool(parts)
    text += [f"{run.name}: {run.damaged} damaged line(s) left out." for run in runs if run.damaged]
    return [f"These runs {SAME[name]}." for name in unlike] + text


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of a table as lines: all columns but the last to the right."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    form = "".join(f"{{:>{width}}}  " for width in widths) + "{}"
    return [form.format(*row) for row in rows]


def terminal_table(runs: list[Run], width: int) -> str:
    """A line for each run: figures, then the knobs in which the runs differ, wrapped."""
    knobs, rows = differing(runs), [[*COLUMNS, "audit", "run"]]
    for run in runs:
        settings = "".join(f"  {name}={run.settings().get(name, '?')}" for name in knobs)
        rows.append([*run.row().values()])
        rows[-1][-1] += settings
    wrapper = textwrap.TextWrapper(max(width, 40), subsequent_indent=4 * " ")
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return "\n".join(map(wrapper.fill, aligned(rows)))


# ---- COSTS: what each token of the validation text cost (costs.npz)
PASSAGE_TOKENS, PASSAGES, DOCUMENTS = 80, 6, 1500  # length; how many are shown of each kind
WAYS = ("net", "contexts", "mixed")  # the columns of `nats`


class Costs:
    """What each of N scored tokens cost: bits (N, 3) by WAYS, UTF-8 bytes (N,), text, documents."""

    def __init__(self, path: Path) -> None:
        """Raises one error or another if the file is damaged or its arrays do not fit together."""
        with np.load(path) as file:
            self.tokens, self.sizes, nats = file["tokens"], file["bytes"], file["nats"]
            starts, self.pieces = file["starts"], file["pieces"]
        n = len(self.tokens)
        fits = nats.shape == (n, 3) and self.sizes.shape == (n,) and self.sizes.any()
        if not fits or self.tokens.max() >= len(self.pieces) or (starts % n != starts).any():
            raise ValueError("its arrays do not fit together")
        self.bits = nats / np.float32(math.log(2))
        self.starts = np.unique(np.append(starts, 0))  # what comes before the first is one too

    def stretches(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """UTF-8 bytes (n,) and bits per byte (n, 3) of what begins at these tokens."""
        sizes = np.add.reduceat(self.sizes, first, dtype=np.int64)
        bits = np.add.reduceat(self.bits, first, axis=0, dtype=float)
        return sizes, bits / np.maximum(sizes, 1)[:, None]

    def by_position(self, least_bytes: int = 500) -> tuple[np.ndarray, np.ndarray]:
        """Tokens since the document's start, in half octaves (P,), and bits per byte (P, 3)."""
        lengths = np.diff(np.append(self.starts, len(self.tokens)))
        position = np.arange(len(self.tokens)) - np.repeat(self.starts, lengths)
        octave = (2 * np.log2(position + 1)).astype(np.int64)
        sizes = np.bincount(octave, self.sizes)
        bits = np.stack([np.bincount(octave, column) for column in self.bits.T], axis=1)
        enough = sizes >= min(least_bytes, sizes.max())
        return 2 ** ((np.flatnonzero(enough) + 0.5) / 2), bits[enough] / sizes[enough, None]

    def passages(self) -> tuple[np.ndarray, np.ndarray]:
        """First tokens of the passages with the most and with the fewest bits per byte."""
        count = max(len(self.tokens) // PASSAGE_TOKENS, 1)
        _, bpb = self.stretches(PASSAGE_TOKENS * np.arange(count))
        order = PASSAGE_TOKENS * np.argsort(bpb[:, 2])
        return order[::-1][:PASSAGES], order[:PASSAGES]


def read_costs(run: Run) -> tuple[Costs | None, str]:
    """A run's costs, or None; and a sentence where they are not as they should be."""
    try:
        costs = Costs(run.folder / "costs.npz")
    except FileNotFoundError:
        return None, "No costs.npz: nothing is recorded of single tokens."
    except Exception as error:  # whatever NumPy makes of a damaged file
        return None, f"costs.npz is damaged: {error}."
    total, score = costs.stretches([0])[1][0, 2], run.score()
    same = score == math.inf or math.isclose(total, score, rel_tol=1e-3)
    return costs, "" if same else f"costs.npz adds up to {total:.4f} BPB, the score is {score:.4f}."


# ---- PICTURES: SVG whose colours are the page's, so that one picture suits light and dark
INK, GRID, MUTED, FAINT = (f"#01010{i}" for i in range(4))  # each is a colour of the page
SERIES = [f"#01020{i}" for i in range(8)]
PAGE_COLOUR = {INK: "currentColor", GRID: "var(--grid)", MUTED: "var(--muted)"}
PAGE_COLOUR |= {FAINT: "var(--faint)"} | {c: f"var(--s{i})" for i, c in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False, "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.prop_cycle": f"cycler(color={SERIES})",
}  # fmt: skip


def draw(plot: Callable[[Any], Any], caption: str, **axis: Any) -> str:
    """An HTML figure of what `plot` draws; a gid "runN" is a class there; no ylabel: bars."""
    if not importlib.util.find_spec("matplotlib"):
        raise SystemExit("error: the pictures need matplotlib: pip install matplotlib")
    import matplotlib  # here, as the tables need none
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context(STYLE), io.StringIO() as text:
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set(**axis)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 400k, 2M
        if "ylabel" not in axis:
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            figure.set_figheight(1.2 + 0.24 * len(axes.get_yticks()))
        figure.savefig(text, format="svg", transparent=True)
        svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.S)
    svg = re.sub(r'<g id="(?!run\d)[^"]*"', "<g", svg)  # the same in every picture
    svg = re.sub(r'<g id="(run\d+)"', r'<g class="\1"', svg)
    svg = re.sub(r"#010[12]0\d", lambda colour: PAGE_COLOUR[colour[0]], svg)
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def curves(runs: list[Run], name: str, by_tokens: bool) -> str:
    """What train records call `name` against tokens or seconds; with the loss, val_loss."""
    thin, dots = {"linewidth": 0.7}, {"marker": "o", "markersize": 3.5}
    kinds = [("train", name, thin)] + [("val", "val_loss", dots)] * (name == "train_loss")

    def plot(axes: Any) -> None:
        highest = [-math.inf]
        for i, run in reversed(list(enumerate(runs))):
            for kind, what, look in kinds:
                step, y = run.curve(kind, what)
                x = step * run.last("config").get("train_batch_tokens", 0)
                if not by_tokens and len(step):
                    clock = run.curve(kind, "train_time_ms")
                    x = np.interp(step, *clock) / 1000 if clock.size else step * math.nan
                axes.plot(x, y, color=(SERIES + [FAINT] * i)[i], gid=f"run{i}", **look)
                highest += list(y[step >= max(step, default=0) / 10])
        if max(highest) > -math.inf and kinds[1:]:
            axes.set_ylim(top=1.01 * max(highest))

    xlabel = "training tokens" if by_tokens else "seconds of training"
    what = "Line: training loss of logged steps. Dots: averaged weights on the validation text."
    what, y = (what, "loss, nats per token") if kinds[1:] else ("", "learning rate / its peak")
    return draw(plot, what, xlabel=xlabel, ylabel=y)


def bytes_picture(runs: list[Run]) -> str:
    """Where the bytes of each artifact go."""
    parts: list[dict[str, float]] = []
    for run in runs:
        made = run.last("export", "final")
        net = made["model_bytes"] - made["packed_bytes"]
        groups = made.get("group_bytes", {"net": net})
        parts.append({"code": made["code_bytes"], **groups, "packed text": made["packed_bytes"],
                      "left": made["limit_bytes"] - made["total_bytes"]})  # fmt: skip
    names = dict.fromkeys(name for part in parts for name in part if name != "left")
    colour = dict(zip(names, SERIES + [MUTED] * len(names), strict=False)) | {"left": GRID}

    def bars(axes: Any) -> None:
        before = np.zeros(len(runs))
        for name, c in colour.items():
            width = np.array([part.get(name, 0) for part in parts])
            axes.barh([run.name for run in runs], width, left=before, color=c, label=name)
            before += width
        axes.margins(x=0, y=0.01)
        axes.figure.legend(loc="outside upper left", ncols=6)
        axes.figure.set_figwidth(11.4)

    return draw(bars, "The net's bytes: split as zlib compresses each part.", xlabel="bytes")


def cost_pictures(costs: Costs) -> str:
    """Bits per byte by position in the document and by document."""
    sizes, bpb = costs.stretches(costs.starts)
    shown = np.flatnonzero(sizes)[:: -(-len(sizes) // DOCUMENTS)]

    def positions(axes: Any) -> None:
        axes.plot(*costs.by_position(), "o-", markersize=3, label=WAYS)
        axes.legend()

    def documents(axes: Any) -> None:
        axes.scatter(sizes[shown], bpb[shown, 2], s=18, alpha=0.6, color=SERIES[2])

    axis = {"xscale": "log", "ylabel": "bits per byte"}
    label, dots = "tokens since the document's start", f"{len(shown):,} of {len(sizes):,} documents"
    text = draw(positions, "BPB by position in the document.", xlabel=label, **axis)
    return text + draw(documents, f"{dots}, mixed.", xlabel="bytes of the document", **axis)


# ---- PAGE
HOTTEST_BITS = 12  # from here on a token's colour is the strongest
CSS = """
:root { color-scheme: light dark; --back: #fff; --card: #f5f6f8; --ink: #1d2430; --muted: #66707e;
  --grid: #dfe3e8; --hot: 226 88 34; --s0: #2563c9; --s1: #d9731a; --s2: #1a8f5a; --s3: #b8358f;
  --s4: #7a5bd0; --s5: #a8841b; --s6: #1592a8; --s7: #c2413b; --faint: #66707e50; }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --card: #1a1f27; --ink: #e3e7ed;
  --muted: #97a1ae; --grid: #2d343f; --hot: 255 122 60; --s0: #6ea2f7; --s1: #f2a04e; --s2: #4cc38a;
  --s3: #e77fc8; --s4: #a892f0; --s5: #d6b54a; --s6: #4cc4da; --s7: #f0807a; --faint: #97a1ae50; } }
body { margin: auto; padding: 0 20px; max-width: 1180px; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { padding: 4px 8px; border-bottom: 1px solid var(--grid); text-align: left; }
th { vertical-align: bottom; } td { white-space: nowrap; }
:is(td, th):nth-child(n + 2):nth-child(-n + 7) { text-align: right; }
td:first-child::before { content: "■ "; color: var(--own); } tr:hover { background: var(--card); }
button { all: unset; cursor: pointer; } button:focus-visible { outline: auto; }
[aria-sort=ascending]::after { content: " ▲"; } [aria-sort=descending]::after { content: " ▼"; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
figure { margin: 0; } figcaption, .small { color: var(--muted); font-size: 13px; }
svg { width: 100%; height: auto; } svg text { font-family: inherit !important; }
.hot path { stroke-width: 4 !important; stroke-opacity: 1 !important; }
summary { cursor: pointer; font-weight: 600; } .note { color: var(--s7); }
.text { background: var(--card); border-radius: 6px; padding: 8px 12px; margin: 4px 0 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; }
i { font-style: normal; white-space: pre-wrap; background: rgb(var(--hot) / var(--heat)); }
"""
SCRIPT = """
const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.firstChild.onclick = () => {
  const up = head.ariaSort !== "ascending", body = table.tBodies[0];
  const text = row => row.cells[column].textContent, value = row => text(row).replaceAll(",", "");
  const order = (a, b) => value(a) - value(b) || (text(a) < text(b) ? -1 : text(a) > text(b));
  const none = row => text(row) === "-";
  const rows = [...body.rows].sort((a, b) => none(a) - none(b) || (up ? order(a, b) : order(b, a)));
  heads.forEach(each => each.ariaSort = each !== head ? null : up ? "ascending" : "descending");
  body.append(...rows);
});
for (const row of table.tBodies[0].rows)
  row.onmouseenter = row.onmouseleave = event => document.querySelectorAll("." + row.id)
    .forEach(line => line.classList.toggle("hot", event.type === "mouseenter"));
"""


def html_table(runs: list[Run]) -> str:
    """The table of runs; a click on a header sorts it by that column."""
    names, head, body = ["run", *COLUMNS, "audit", *differing(runs)], "", ""
    for name in names:
        _, _, what = COLUMNS.get(name, ("", "", name))
        head += f'<th title="{what}"><button>{name.replace("_", "_<wbr>")}</button></th>'
    for i, run in enumerate(runs):
        body += f'\n<tr id="run{i}" style="--own: {PAGE_COLOUR[(SERIES + [FAINT] * i)[i]]}">'
        row = run.settings() | run.row()
        body += "".join(f"<td>{html.escape(row.get(name, '?'))}</td>" for name in names)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def coloured(bits: float, text: str, title: str = "") -> str:
    """A piece of text, as a reader can see it, in the colour of its bits."""
    text = text.replace("\u2581", " ").replace("\n", "↵\n") or "·"
    text = html.escape("".join(c if c.isprintable() or c == "\n" else "·" for c in text))
    heat = 0.9 * min(max(bits, 0) / HOTTEST_BITS, 1)
    return f'<i style="--heat: {heat:.2f}" title="{title}">{text}</i>'


def passage(costs: Costs, first: int) -> str:
    """A passage, each token coloured by its bits (net, contexts and mixed in its tooltip)."""
    part, text = slice(first, first + PASSAGE_TOKENS), ""
    for token, (net, contexts, mixed) in zip(costs.tokens[part], costs.bits[part], strict=True):
        title = f"{mixed:.2f} bits (net {net:.2f}, contexts {contexts:.2f})"
        text += coloured(float(mixed), str(costs.pieces[token]), title)
    bpb = costs.bits[part].sum(axis=0) / costs.sizes[part].sum(dtype=np.int64)
    facts = ", ".join(f"{name} {value:.3f}" for name, value in zip(WAYS, bpb, strict=True))
    head = f"from token {first:,} of {len(costs.tokens):,}; BPB {facts}"
    return f'<div class="small">{head}</div><div class="text">{text}</div>'


def run_section(run: Run, opened: bool) -> str:
    """What is known of one run's tokens and experts."""
    costs, sentence = read_costs(run)
    experts = run.last("final").get("experts")
    pictures = cost_pictures(costs) if costs else ""
    if experts:
        names, unit = sorted(experts, key=experts.get)[::-1], "thousandths of a bit per byte"
        lost = [1000 * experts[name] for name in names]
        pictures += draw(
            lambda axes: axes.barh(names, lost),
            "Cost of a byte without the net or one expert.",
            xlabel=unit,
        )
    text = f'<p class="small">{html.escape(sentence)}</p><div class="grid">{pictures}</div>'
    if costs:
        scale = " ".join(coloured(bits, f" {bits} ") for bits in range(0, HOTTEST_BITS + 1, 3))
        text += f"<p>Bits of a token: {scale} and more; point at one to see them.</p>"
        for kind, chosen in zip(("most expensive", "cheapest"), costs.passages(), strict=True):
            passages = (passage(costs, first) for first in chosen)
            text += f"<h3>The {kind} passages</h3>{''.join(passages)}"
    name = html.escape(run.name)
    return f"<details{' open' * opened}><summary>{name}</summary>{text}</details>"


def page(runs: list[Run]) -> str:
    """The whole page, which needs nothing else."""
    exported = [run for run in runs if "packed_bytes" in run.last("export", "final")]
    title = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    title += f", the best {runs[0].score():.4f} BPB" if runs[0].score() < math.inf else ""
    warned = "".join(f'<p class="note">{html.escape(text)}</p>' for text in notes(runs))
    kinds = [("train_loss", True), ("train_loss", False)]
    kinds += [("lr_factor", True)] * any(run.curve("train", "lr_factor").size for run in runs)
    pictures = "".join(curves(runs, *kind) for kind in kinds)
    sections = "".join(run_section(run, i == 0) for i, run in enumerate(runs))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="icon" href="data:,"><style>{CSS}</style></head><body>
<h1>{title}</h1>
<p>Bits per byte (BPB), lower is better: of the net alone, of the context models alone, and of both
mixed, which is the score. Click on a header to sort; point at a row to find its lines.</p>
{warned}{html_table(runs)}
<h2>Training</h2><div class="grid">{pictures}</div>
<h2>The file</h2>{bytes_picture(exported[:20]) if exported else "<p>No artifact yet.</p>"}
<h2>The validation text</h2>{sections}
<script>{SCRIPT}</script></body></html>
"""


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs (default: logs)")
    parser.add_argument("--out", type=Path, default=Path("logs/report.html"), help="the page")
    args = parser.parse_args(argv)
    runs = find_runs(args.runs or [Path("logs")])
    if not any(run.records or args.runs for run in runs):
        print(f"error: no runs in {', '.join(map(str, args.runs)) or 'logs'}", file=sys.stderr)
        return 2
    print(terminal_table(runs, shutil.get_terminal_size().columns))
    for text in notes(runs):
        print(textwrap.fill(f"note: {text}", 80))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(runs), encoding="utf-8", errors="replace")
    print(f"pictures: {args.out}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `report.py | head` ends without a traceback
    sys.exit(main())

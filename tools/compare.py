#!/usr/bin/env python3
"""Run every combination of settings, and say which differences are shown and which may be noise.

    python tools/compare.py ENGRAM_LITE_ENABLED=0,1 SEED=1,2,3 --steps 300
    python tools/compare.py NUM_LAYERS=3,4,6 SEED=1,2,3 --seconds 110 --metric val_bpb_net

Other settings come from the environment, as for a single run. The runs take place one after the
other. The same command goes on where it was interrupted; finished runs are kept.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import fmean, stdev

from report import Run, aligned, differing, is_number, notes, read_run

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt_mlx_kl.py"
OWN = ("RUN_ID", "OUT_DIR", "RESUME", "EVAL_ONLY")  # what this program sets itself
# Student's t: 97.5 % quantiles for 1 to 30 degrees of freedom. More have smaller ones.
T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
     2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687,
     2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)  # fmt: skip
Settings = dict[str, str]
Scores = dict[str, dict[str, float]]  # {combination: {seed: BPB}}


class Stop(Exception):
    """An end that lines explain: (lines, exit status)."""


def combinations(words: list[str]) -> list[Settings]:
    """["SEED=1,2", "A=0,1"] -> every combination, seeds changing fastest. Raises Stop."""
    choices: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        values = text.split(",")
        if not re.fullmatch("[A-Z][A-Z0-9_]*", name) or not all(values) or name in OWN:
            raise Stop(f"{word}: give settings as NAME=VALUE,VALUE; not {', '.join(OWN)}", 2)
        if name in choices or len(set(values)) < len(values):
            raise Stop(f"{word}: something is there twice", 2)
        choices[name] = values
    names = sorted(choices, key="SEED".__eq__)
    return [dict(zip(names, v, strict=True)) for v in itertools.product(*map(choices.get, names))]


def label(settings: Settings, without: str = "") -> str:
    """Settings as a run's folder and the table name them."""
    text = ",".join(f"{name}={value}" for name, value in settings.items() if name != without)
    return re.sub(r"[^\w.,=+-]", "_", text) or "as it is"


def unlike(config: dict, env: Settings) -> list[str]:
    """What a run's config record says, where the environment says something else."""

    def plain(value: object) -> object:
        return float(value) if re.fullmatch(r"True|False|[\d.e+-]+", str(value)) else value

    known = {name.upper(): value for name, value in config.items()}
    # A record says NGRAM_MIXER_ENABLED=0 as MIXER=off, and instead of auto what it came to.
    names = known.keys() & {n for n in env if env[n] not in ("", "auto")}
    names -= {*OWN, "NGRAM_MIXER_ENABLED"}
    return [f"{n} was {known[n]}" for n in sorted(names) if plain(known[n]) != plain(env[n])]


class Runner:
    """Makes runs. A signal is passed on to the run in progress, which then ends in order."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.asked = 0  # the signal's number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.ask)

    def ask(self, number: int, _: object = None) -> None:
        """The signals' handler."""
        self.asked = number
        if self.process:
            self.process.send_signal(number)

    def run(self, script: Path, folder: Path, names: Settings, env: Settings) -> str:
        """Make a run, or go on with it; returns why it failed, or "". Raises Stop at bad input."""
        where = {"RUN_ID": folder.name, "OUT_DIR": str(folder.parent)}
        env = env | where | {"RESUME": str(int(folder.is_dir())), "EVAL_ONLY": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], env=env, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # or a terminal's Ctrl-C would reach it twice, which kills
        )  # fmt: skip
        lines, config, unknown = [""], {}, []
        for line in filter(None, map(str.strip, self.process.stdout)):
            lines = [*lines[-20:], line]
            if sys.stdout.isatty():
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\033[K{line[:width]}", end="", flush=True)
            if not config and (config := read_run(folder).last("config")):
                unknown = [name for name in names if name.lower() not in config]
                if unknown:
                    self.process.terminate()
        status = self.process.wait()
        print("\r\033[K" * sys.stdout.isatty(), end="")
        errors = [text for text in lines if text.startswith("error: ")] or lines[-1:]
        if unknown:
            raise Stop(f"{', '.join(unknown)}: no setting of {script.name}", 2)
        if status == 2:
            raise Stop("\n".join(errors).replace("error: ", ""), 2)
        return errors[-1] if status else ""


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more differences, by Student's t."""
    n = len(differences)
    half = T[min(n - 1, len(T)) - 1] * stdev(differences) / math.sqrt(n)
    return fmean(differences) - half, fmean(differences) + half


def sentence(name: str, first: str, differences: list[float]) -> str:
    """What the differences of `name` to `first`, one for each seed, show."""
    n = len(differences)
    if not any(differences):
        return f"{name}: no difference to {first} (n = {n})."
    mean = fmean(differences)
    text = f"{name} is {'worse' if mean > 0 else 'better'} than {first} by {abs(mean):.4f} BPB"
    if n == 1:
        return f"{text} (n = 1), but one seed shows nothing about noise: give SEED=1,2,3."
    low, high = interval(differences)
    known = f"n = {n} seeds, 95 % interval {low:+.4f} to {high:+.4f}"
    shown = not low <= 0 <= high
    return f"{text}: shown ({known})." if shown else f"{text}: it may be noise ({known})."


def summary(scores: Scores, metric: str) -> str:
    """Table and sentences; the first combination is what the others are compared with."""
    first, said = next(iter(scores)), []
    rows = [["n", "mean", "spread", "difference", "95 % interval", metric]]
    for name, by_seed in scores.items():
        values = list(by_seed.values())
        both = [by_seed[s] - scores[first][s] for s in by_seed if s in scores[first]]
        both = both if name != first else []
        said += [sentence(name, first, both)] if both else []
        rows.append([
            str(len(values)), f"{fmean(values):.4f}" if values else "-",
            f"{stdev(values):.4f}" if len(values) > 1 else "-",
            f"{fmean(both):+.4f}" if both else "-",
            "{:+.4f} to {:+.4f}".format(*interval(both)) if len(both) > 1 else "-", name,
        ])  # fmt: skip
    if len(said) > 3:
        said.append("One in 20 such intervals misses 0 by chance: repeat what you will build on.")
    return "\n".join([*aligned(rows), "", *(textwrap.fill(text, 80) for text in said)])


def remarks(runs: list[Run], args: argparse.Namespace) -> list[str]:
    """Sentences on what else the runs differ in."""
    text = notes(runs, "packed_tokens" if args.metric == "val_bpb_net" else "")
    varied = " ".join(args.settings)
    more = [name for name in differing(runs) if f"{name}=" not in varied]
    if more and "PRESET=" not in varied:
        text.append(f"These runs differ in {', '.join(more)} too.")
    copies = {(run.folder / args.script.name).read_bytes() for run in runs}
    if len(copies | {args.script.read_bytes()}) > 1:
        text.append("Not all of these runs are of the script as it is now: choose another --out.")
    return text


def compare(args: argparse.Namespace, runner: Runner) -> int:
    """Make the runs, then the table; returns the exit status. Raises Stop."""
    wanted, limits, budget = combinations(args.settings), {}, ""
    if args.steps:
        limits = {"ITERATIONS": str(args.steps), "MAX_WALLCLOCK_SECONDS": "0"}
        budget = f"-{args.steps}steps"
    elif args.seconds:
        limits, budget = {"MAX_WALLCLOCK_SECONDS": f"{args.seconds:g}"}, f"-{args.seconds:g}s"
    out = args.out or Path("logs/compare", "-".join(wanted[0]) + budget)
    envs = {label(settings): {**os.environ, **settings, **limits} for settings in wanted}
    if len(envs) < len(wanted) or limits.keys() & wanted[0].keys():
        raise Stop(f"settings that clash: {', '.join([*wanted[0], *limits])}", 2)
    for name, env in envs.items():
        for difference in unlike(read_run(out / name).last("config"), env):
            raise Stop(f"{out / name}: {difference}; choose another --out", 2)
    scores: Scores = {label(settings, "SEED"): {} for settings in wanted}
    runs: list[Run] = []
    for number, (settings, (name, env)) in enumerate(zip(wanted, envs.items(), strict=True), 1):
        run, why, head = read_run(out / name), "kept", f"[{number}/{len(wanted)}] {name}"
        if not run.final:
            print(f"{head} ...", flush=True)
            why = runner.run(args.script, run.folder, settings, env)
            run = read_run(run.folder)
        if runner.asked:
            again = shlex.join(["python", *sys.argv])
            raise Stop(f"{head}: {why}\nto go on: {again}", 128 + runner.asked)
        score = run.final.get(args.metric)
        if is_number(score) and run.status() != "fail":
            print(f"{head}: {args.metric} {score:.4f} {why}", flush=True)
            scores[label(settings, "SEED")][settings.get("SEED", "")] = score
            runs.append(run)
        else:
            print(f"{head} failed: {why}, audit {run.status()}", flush=True)
    print(f"\n{summary(scores, args.metric)}" * bool(runs))
    for text in remarks(runs, args):
        print(textwrap.fill(f"note: {text}", 80))
    print(f"pictures: python {shlex.quote(str(Path(__file__).with_name('report.py')))} {out}")
    return int(len(runs) < len(wanted))


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("settings", nargs="+", metavar="NAME=VALUE,VALUE", help="what to vary")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--steps", type=int, help="steps of each run: repeatable, without a clock")
    limit.add_argument("--seconds", type=float, help="seconds of training of each run")
    metrics = ("val_bpb", "val_bpb_net", "val_bpb_context")
    parser.add_argument("--metric", choices=metrics, default=metrics[0], help="what to compare")
    parser.add_argument("--out", type=Path, help="the runs' folder (default: in logs/compare)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="what trains")
    try:
        return compare(parser.parse_args(argv), Runner())
    except Stop as stop:
        text, status = stop.args
        print(textwrap.indent(text, "error: " * (status == 2)), file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())

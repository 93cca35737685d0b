#!/usr/bin/env python3
"""Run every combination of settings, and say which differences are shown and which may be noise.

    python tools/compare.py ENGRAM_LITE_ENABLED=0,1 SEED=1,2,3 --steps 300
    python tools/compare.py NUM_LAYERS=3,4,6 SEED=1,2,3 --seconds 110 --metric val_bpb_net

Other settings come from the environment, as for a single run. The runs take place one after the
other. The same command goes on where it was interrupted; finished runs are kept.
"""

import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path
from statistics import fmean, stdev

from report import Run, aligned, differing, notes, read_run

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt_mlx_kl.py"
OWN = ("RUN_ID", "OUT_DIR", "RESUME", "EVAL_ONLY", "ARTIFACT", "MODE")  # set by this program
# Student's t: 97.5 % quantiles for 1 to 22 degrees of freedom. Those of more are smaller.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
     2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074)  # fmt: skip
Settings = dict[str, str]


class Stop(Exception):
    """An end that lines explain: (lines, exit status)."""


def combinations(words: list[str]) -> list[Settings]:
    """["SEED=1,2", "A=0,1"] -> every combination, seeds changing fastest. Raises Stop."""
    choices: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        values = text.split(",")
        twice = name in choices or len(set(values)) < len(values)
        if not re.fullmatch("[A-Z][A-Z0-9_]*", name) or not all(values) or name in OWN or twice:
            raise Stop(f"{word}: not NAME=VALUE,VALUE, or twice there, or set by this program", 2)
        choices[name] = values
    names = sorted(choices, key="SEED".__eq__)
    return [dict(zip(names, v, strict=True)) for v in itertools.product(*map(choices.get, names))]


def label(settings: Settings, without: str = "") -> str:
    """Settings as a run's folder and the table name them."""
    text = "+".join(f"{name}={value}" for name, value in settings.items() if name != without)
    return re.sub("[^A-Za-z0-9._+=-]", "_", text) or "default"


def unlike(run: Run, env: Settings) -> list[str]:
    """The settings that a run was made with where the environment says something else."""

    def plain(text: str) -> float | str:
        return float(text) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text) else text

    # A record says NGRAM_MIXER_ENABLED=0 as MIXER=off, and instead of auto what it came to.
    was, ours = run.settings(), (*OWN, "NGRAM_MIXER_ENABLED")
    given = {n: v for n, v in env.items() if n in was and n not in ours and v not in ("", "auto")}
    return [f"{n} was {was[n]}, not {v}" for n, v in given.items() if plain(was[n]) != plain(v)]


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
        env = env | where | dict.fromkeys(OWN[3:], "") | {"RESUME": str(int(folder.is_dir()))}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], env=env, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # or a terminal's Ctrl-C would reach it twice, which kills
        )  # fmt: skip
        lines, config, unknown = [""], {}, []
        for line in filter(None, map(str.strip, self.process.stdout)):
            lines = [*lines[-20:], line]
            if sys.stdout.isatty():
                print(f"\r\033[K{line[:79]}", end="", flush=True)
            if not config and (config := read_run(folder).last("config")):
                unknown = [name for name in names if name.lower() not in config]
                if unknown:
                    self.process.terminate()
        status = self.process.wait()
        print("\r\033[K" * sys.stdout.isatty(), end="")
        errors = [text[7:] for text in lines if text.startswith("error: ")] or lines[-1:]
        if unknown:
            raise Stop(f"{', '.join(unknown)}: no setting of {script.name}", 2)
        if status == 2:
            raise Stop("\n".join(errors), 2)
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
    return f"{text}: {'it may be noise' if low <= 0 <= high else 'shown'} ({known})."


def summary(scores: dict[str, dict[str, float]], metric: str) -> str:
    """Table and sentences of {combination: {seed: BPB}}; all are compared with the first."""
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


def compare(args: Namespace, runner: Runner) -> int:
    """Make the runs, then the table; returns the exit status. Raises Stop."""
    wanted = combinations(args.settings)
    limits = {"ITERATIONS": str(args.steps), "MAX_WALLCLOCK_SECONDS": "0"} if args.steps else {}
    limits |= {"MAX_WALLCLOCK_SECONDS": f"{args.seconds:g}"} if args.seconds else {}
    out = args.out or Path("logs/compare", "+".join([*wanted[0], label(limits)]))
    envs = {label(settings): {**os.environ, **settings, **limits} for settings in wanted}
    if len(envs) < len(wanted) or limits.keys() & wanted[0].keys():
        raise Stop(f"settings that clash: {', '.join([*wanted[0], *limits])}", 2)
    for name, env in envs.items():
        for difference in unlike(read_run(out / name), env):
            raise Stop(f"{out / name}: {difference}; choose another --out", 2)
    runs, scores = [], {label(settings, "SEED"): {} for settings in wanted}
    for number, (settings, (name, env)) in enumerate(zip(wanted, envs.items(), strict=True), 1):
        run, why, head = read_run(out / name), "kept", f"[{number}/{len(wanted)}] {name}"
        if not run.final:
            print(f"{head} ...", flush=True)
            why = runner.run(args.script, run.folder, settings, env)
            run = read_run(run.folder)
        if runner.asked:
            again = f"to go on: {shlex.join(['python', *sys.argv])}"
            raise Stop(f"{head}: {why.partition('; to go on')[0]}\n{again}", 128 + runner.asked)
        score = run.score(args.metric)
        if score < math.inf:
            print(f"{head}: {args.metric} {score:.4f} {why}".rstrip(), flush=True)
            scores[label(settings, "SEED")][settings.get("SEED", "")] = score
            runs.append(run)
        else:
            print(f"{head} failed: {why} ({run.status()})", flush=True)
    print(f"\n{summary(scores, args.metric)}" * bool(runs))
    remarks = notes(runs, "packed_tokens" if args.metric == "val_bpb_net" else "")
    more = [name for name in differing(runs) if name not in wanted[0]]
    if more and "PRESET" not in wanted[0]:
        remarks.append(f"These runs differ in {', '.join(more)} too.")
    copies = (run.folder / args.script.name for run in runs)
    if {path.read_bytes() for path in copies if path.is_file()} - {args.script.read_bytes()}:
        remarks.append("Not all runs are of the script as it is now: choose another --out.")
    for text in remarks:
        print(textwrap.fill(f"note: {text}", 80))
    print(f"pictures: python {shlex.quote(str(Path(__file__).with_name('report.py')))} {out}")
    return int(len(runs) < len(wanted))


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
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
        print(textwrap.indent(stop.args[0], "error: " * (stop.args[1] == 2)), file=sys.stderr)
        return stop.args[1]


if __name__ == "__main__":
    sys.exit(main())

"""What scoring costs: sliding windows against a plain pass, and net and contexts at once.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/evaluation.py [--tokens 40000]

A net of the `cpu` preset with its first weights scores the validation text's first tokens: the net
alone, in windows side by side (a plain pass) and in sliding windows; the logistic mixer alone on
the rows of the sliding pass; and both together, as a run scores. All four take turns. The last line
is JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t


class Sides:
    """The passes to be timed, over one text and one net."""

    def __init__(self, cfg: t.Knobs, workers: t.Workers, count: int, runs: int) -> None:
        self.cfg, self.workers = cfg, workers
        folder, tokenizer_path, _ = t.locate_data(cfg)
        tokenizer = t.load_tokenizer(tokenizer_path)
        self.text = t.load_validation(folder, tokenizer, count).tokens
        self.model = t.GPT(cfg, tokenizer.vocab, tokenizer.bos)
        t.mx.eval(self.model.parameters())  # here, as another thread takes the net's rows
        leaf = t.token_tree(self.text, tokenizer.vocab)
        capacity = 2 * runs * len(self.text)
        self.mixer = t.LogisticMixer(tokenizer, leaf, capacity, cfg.mixer_memory_mb, cfg.mixer_size)
        self.sliding_rows = list(self.rows("sliding"))

    def rows(self, mode: str) -> t.Parts:
        """The net's rows in an EVAL_MODE."""
        shape = (*t.eval_shape(self.cfg, mode), self.cfg.eval_batch_seqs)
        return t.net_rows(self.model, self.text, shape, self.workers)

    def seconds(self, rows: Iterable, context_model: t.ContextModel) -> float:
        """What scoring the net's rows takes."""
        begin = time.perf_counter()
        context_model.begin(int(self.text[0]))
        for _ in t.cost_tokens(iter(rows), self.text, context_model):
            pass
        return time.perf_counter() - begin

    def turn(self) -> dict[str, float]:
        """Each pass once, in seconds."""
        return {
            "plain": self.seconds(self.rows("standard"), t.ContextModel()),
            "sliding": self.seconds(self.rows("sliding"), t.ContextModel()),
            "mixer": self.seconds(self.sliding_rows, self.mixer),
            "together": self.seconds(t.ahead(self.rows("sliding")), self.mixer),
        }


def main() -> None:
    """Print minimum, median and maximum of each ratio of a turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    cfg, _ = t.knobs_from_env({**os.environ, "PRESET": "cpu"})
    with t.make_workers(cfg) as workers:
        sides = Sides(cfg, workers, args.tokens, args.turns + 1)
        sides.turn()  # compiles and touches memory
        turns = [sides.turn() for _ in range(args.turns)]
    targets, (length, stride) = len(sides.text) - 1, t.eval_shape(cfg, "sliding")
    shares = {
        "sliding / plain": [s["sliding"] / s["plain"] for s in turns],
        "together / (sliding + mixer)": [
            s["together"] / (s["sliding"] + s["mixer"]) for s in turns
        ],
        "together / the longer": [s["together"] / max(s["sliding"], s["mixer"]) for s in turns],
        **{f"{name}, tokens/s": [targets / s[name] for s in turns] for name in turns[0]},
    }
    print(f"{targets:,} tokens, windows of {length}, stride {stride}: at most {length / stride:g} "
          "times a plain pass")  # fmt: skip
    table = {}
    for name, values in shares.items():
        table[name] = [min(values), float(np.median(values)), max(values)]
        print(f"{name:<30} " + " ".join(f"{v:10,.2f}" for v in table[name]))
    print(json.dumps({"benchmark": "evaluation", "tokens": targets, "length": length,
                      "stride": stride, **table}))  # fmt: skip


if __name__ == "__main__":
    main()

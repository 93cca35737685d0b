"""The context models at the official validation split's length, on synthetic text.

    python tests/benchmarks/scale.py [backoff] [logistic] [--tokens 62021632]

The text is Markovian over 1,024 tokens: 85 % of the tokens are one of 64 likely successors of the
one before, the others are drawn for themselves, both by Zipf's law, a document every 700 tokens or
so; it has more distinct contexts of four tokens than real text of its length. No net takes part;
the logistic mixer reads 16 M tokens at most. A row at each doubling: rates are of the tokens since
the row before. The last line is JSON.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from numba import njit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

VOCAB, BOS, BATCH = 1024, 1, 1 << 14


@njit(cache=True)
def follow(alone, rank, successors, coin):
    """Replace the tokens whose coin is set by a successor of the token before."""
    for i in range(1, len(alone)):
        if coin[i] and alone[i] != BOS:
            alone[i] = successors[alone[i - 1], rank[i]]


def markov_text(count: int) -> np.ndarray:
    """(count,) int32."""
    rng = np.random.default_rng(0)

    def zipf(kinds: int) -> np.ndarray:
        share = np.cumsum(1 / np.arange(1, kinds + 1))
        return np.searchsorted(share / share[-1], rng.random(count, np.float32)).astype(np.int32)

    text = zipf(VOCAB - 3) + 3
    text[rng.random(count, np.float32) < 1 / 700] = BOS
    text[0] = BOS
    successors = rng.integers(3, VOCAB, (VOCAB, 64)).astype(np.int32)
    follow(text, zipf(64), successors, rng.random(count, np.float32) < 0.85)
    return text


def distinct_contexts(text: np.ndarray) -> int:
    """How many different runs of four tokens the text has."""
    key = np.zeros(len(text) - 3, np.int64)
    for k in range(4):
        key = key * VOCAB + text[k : len(text) - 3 + k]
    key.sort()
    return 1 + int(np.count_nonzero(np.diff(key)))


def peak_bytes() -> int:
    """The process's peak memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def growth(name: str, text: np.ndarray, work, first: int) -> list[dict]:
    """Rows: tokens, seconds in all, tokens/s of the last part, peak memory."""
    rows, done, spent, mark = [], 1, 0.0, first
    while done < len(text):
        end, begin, start = min(mark, len(text)), time.perf_counter(), done
        for at in range(done, end, BATCH):
            work(text[at : min(at + BATCH, end)])
        seconds, done, mark = time.perf_counter() - begin, end, mark * 2
        spent += seconds
        rows.append({"model": name, "tokens": done, "seconds": spent,
                     "tok_s": (end - start) / seconds, "peak_bytes": peak_bytes()})  # fmt: skip
        print(f"{name:<10} {done:>11,} tokens {spent:7.1f} s {rows[-1]['tok_s']:>10,.0f} tokens/s "
              f"{peak_bytes() / 1e9:6.2f} GB", flush=True)  # fmt: skip
    return rows


def backoff(text: np.ndarray) -> list[dict]:
    """BackoffMixer, order 4, against a uniform net; compiled before the clock starts."""
    uniform = np.full((1, VOCAB), -np.log(VOCAB), np.float32)

    def scored_by(count: int):
        mixer = t.BackoffMixer(VOCAB, BOS, 4, "kneser-ney", None, count)
        mixer.begin(BOS)
        return lambda part: mixer.cost(part, np.broadcast_to(uniform, (len(part), VOCAB)))

    scored_by(100)(text[1:100])
    return growth("backoff", text, scored_by(len(text)), 1 << 20)


def logistic(text: np.ndarray) -> list[dict]:
    """LogisticMixer with tables of 4,000 MiB."""
    tokens = t.Tokenizer(np.ones(VOCAB, np.uint16), np.arange(VOCAB) % 3 == 0,
                      np.arange(VOCAB) < 3, BOS, False, "")  # fmt: skip
    leaf = t.token_tree(text[:2_000_000], VOCAB)
    t.LogisticMixer(tokens, leaf, 8, 1).begin(BOS)
    mixer = t.LogisticMixer(tokens, leaf, len(text), 4000)
    mixer.begin(BOS)
    return growth("logistic", text, lambda part: mixer.code(part.astype(np.int64)), 1 << 20)


def main() -> None:
    """The models asked for, or both; the logistic mixer reads 16 M tokens at most."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--tokens", type=int, default=62_021_632)
    args = parser.parse_args()
    text = markov_text(args.tokens)
    contexts = distinct_contexts(text)
    print(f"{len(text):,} tokens, {contexts:,} distinct contexts of four", flush=True)
    rows = []
    for model, most in ((logistic, 1 << 24), (backoff, args.tokens)):
        if model.__name__ in (args.models or ("backoff", "logistic")):
            rows += model(text[:most])
    print(json.dumps({"benchmark": "scale", "contexts": contexts, "rows": rows}))


if __name__ == "__main__":
    main()

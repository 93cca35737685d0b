"""Variants of the logistic mixer on two texts, one line of JSON each.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/mixer_variants.py OUT.jsonl \
        [--tokens 2e6,4e6,all] [--val 200000] [NAME ...]

A variant is a size and replacements in the script's text; NAME chooses among `variants`. A mixer
reads so many training tokens (0: none), then is charged for the last HELD_OUT ones, which it has
not seen, and then for the validation text: by then it has learned from those, too. A difference
below 0.005 BPB should be seen on both texts.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt_mlx_kl.py"
HELD_OUT = 400_000


def without(text: str, name: str) -> dict[str, str]:
    """The replacement that leaves an expert's row out of the script's text."""
    (row,) = [line for line in text.splitlines() if line.startswith(f'    Context("{name}"')]
    return {row + "\n": ""}


def variants(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Name -> size, replacements."""
    table = {size: (size, {}) for size in ("small", "medium", "large")}
    rates = "FIRST_RATE, LAST_RATE, FADE = np.float32(0.12), np.float32(0.003)"
    for name, change in {
        "counts to 60": {"22, 60, 120, 255]": "22, 30, 40, 60]"},
        "maps slow down at 255": {"MAP_LIMIT = 1023": "MAP_LIMIT = 255"},
        "rates halved": {rates: rates.replace("0.12", "0.06").replace("0.003", "0.0015", 1)},
        "rates doubled": {rates: rates.replace("0.12", "0.24").replace("0.003", "0.006", 1)},
        "no corrections": {"2 / (COUNTS + 1.5) + 0.1": "0 * COUNTS"},
        "nothing is sparse": {"fresh[a] and rows[a, 7] and not first_ones": "False"},
        "a balanced tree": {"(key < 0).sum()": "(len(node) + 1) // 2"},
    }.items():
        table[name] = ("medium", change)
    rows = [line.split('"')[1] for line in text.splitlines() if line.startswith("    Context(")]
    for name in rows[4:]:  # the first four help to choose weights, by their place
        table[f"without {name}"] = ("medium", without(text, name))
    return table


def load(text: str, changes: dict[str, str]) -> ModuleType:
    """The script as a module, with the changes made."""
    for old, new in changes.items():
        if text.count(old) != 1:
            raise SystemExit(f"not once in the script: {old}")
        text = text.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variant.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("variant", path)
        module = sys.modules["variant"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        no = np.zeros(8, bool)
        least = module.Tokenizer(np.ones(8, np.uint16), no, no, 0, False, "")
        module.LogisticMixer(least, np.arange(8), 1, 1).begin(0)  # compiles
    return module


def bpb(module: ModuleType, mixer, tokenizer, text: np.ndarray) -> float:
    """Bits per byte of a text (n,), whose first token is not scored."""
    mixer.begin(int(text[0]))
    nats = mixer.code(text[1:].astype(np.int64))[:, 0].sum()
    return module.bits_per_byte(nats, int(tokenizer.bytes_of(text[:-1], text[1:]).sum()))


def measured(module: ModuleType, size: str, tokens: str, val_tokens: int) -> dict:
    """What a variant makes of the texts."""
    cfg, _ = module.knobs_from_env({**os.environ, "PRESET": "cpu"})
    folder, path, _ = module.locate_data(cfg)
    tokenizer = module.load_tokenizer(path)
    train = np.concatenate([module.Shard(p)[:] for p in module.find_shards(folder, "train")])
    val = module.load_validation(folder, tokenizer, val_tokens).tokens
    leaves = module.token_trees(train[: module.TREE_TOKENS], tokenizer.vocab, size)
    train, held_out = train[:-HELD_OUT].astype(np.int64), train[-HELD_OUT:]
    train = train[len(train) if tokens == "0" else 0 if tokens == "all" else -int(float(tokens)) :]
    room = len(train) + HELD_OUT + len(val)
    cfg = module.dataclasses.replace(cfg, mixer_size=size)
    mixer = module.new_context_model(cfg, tokenizer, leaves, room)
    begin = time.perf_counter()
    for at in range(0, len(train), module.PACK_CHUNK):
        mixer.code(train[at : at + module.PACK_CHUNK])
    seconds = time.perf_counter() - begin
    row = {"primed": len(train), "tok_s": len(train) / max(seconds, 1e-9)}
    if len(train):
        row["held_out"] = bpb(module, mixer, tokenizer, held_out)
    return row | {"validation": bpb(module, mixer, tokenizer, val)}


def main() -> None:
    """Append a line for each variant and number of tokens, and print it."""
    text = SCRIPT.read_text()
    table, parser = variants(text), argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(table)}")
    parser.add_argument("--tokens", default="2e6")
    parser.add_argument("--val", type=int, default=200_000, help="of the validation text; 0: all")
    args = parser.parse_intermixed_args()
    for name in args.names or table:
        size, changes = table[name]
        module = load(text, changes)
        for tokens in args.tokens.split(","):
            row = {"variant": name, "size": size, **measured(module, size, tokens, args.val)}
            row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(row), flush=True)
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

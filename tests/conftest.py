"""Shared by the tests: the script as a module, and a model small enough for a test."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt_mlx_kl as t  # noqa: E402

# Everything is checked on the CPU, where results repeat bit for bit; the other path's formulas
# are reached by replacing `on_cpu`.
t.mx.set_default_device(t.mx.cpu)

# nohup, and a script that starts the tests in its background, have some signals ignored, also by
# all that the tests start.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

TINY = {
    "PRESET": "cpu",
    "DEVICE": "cpu",
    "WORKERS": "1",
    "ITERATIONS": "4",
    "MAX_WALLCLOCK_SECONDS": "0",
    "TRAIN_BATCH_TOKENS": "64",
    "TRAIN_SEQ_LEN": "16",
    "WARMUP_STEPS": "0",
    "WARMDOWN_ITERS": "0",
    "TRAIN_LOG_EVERY": "0",
    "NUM_LAYERS": "3",
    "MODEL_DIM": "16",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "2",
    "XSA_LAST_N": "1",
    "ENGRAM_HASH_SIZE": "37",
    "ENGRAM_EMBED_DIM": "8",
    "BIGRAM_HASH_SIZE": "37",
    "SKIPGRAM_HASH_SIZE": "41",
    "MIXER_MEMORY_MB": "4",
    "PACK_TEXT_BYTES": "3000",
    "EVAL_STRIDE": "8",
    "EVAL_BATCH_SEQS": "3",
}


def tiny_knobs(**env: object) -> t.Knobs:
    """Knobs of a run that takes milliseconds; `env` as a user would set them: `SEED=7`."""
    return t.knobs_from_env({**TINY, **{name: str(value) for name, value in env.items()}})[0]


def write_shard(path: Path, tokens) -> Path:
    """Write tokens in the public shard format."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers for every test."""
    return np.random.default_rng(0)


def random_model(vocab: int = 50, bos: int = 1, **env: object) -> t.GPT:
    """A model none of whose parameters is at its starting value, where several are 0."""
    model, rng = t.GPT(tiny_knobs(**env), vocab, bos), np.random.default_rng(7)
    params = {}
    for name, p in t.tree_flatten(model.parameters()):
        noise = rng.standard_normal(p.shape) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
        params[name] = p + t.mx.array(noise.astype(np.float32))
    model.update(t.tree_unflatten(list(params.items())))
    t.mx.eval(model.parameters())  # another thread could not
    return model


def made_up_tokenizer(vocab: int = 50) -> t.Tokenizer:
    """Facts of a tokenizer with every kind of piece: BOS is 1, and some pieces start words."""
    ids = np.arange(vocab)
    control = ids < 4
    size = np.where(control, 0, 1 + ids % 5).astype(np.uint16)
    return t.Tokenizer(size, (ids % 3 == 0) & ~control, control, 1, True, "ab" * 32)


def made_up_text(size: int = 300, seed: int = 0) -> t.ValidationText:
    """Documents of that tokenizer's 50 tokens; few are common, so that contexts come back."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.geometric(0.25, size) + 3, 49).astype(np.int32)
    tokens[rng.random(size) < 0.04] = 1
    tokens[0] = 1
    return t.ValidationText(tokens, whole=True, shards=1)


def log_probs(model: t.GPT, x: t.Array, last: int) -> t.Array:
    """Inputs (B, T) -> the distributions that scores are made of, (B, last, V)."""
    return t.mx.array(t.log_softmax(np.array(model.logits(x, last))))


@pytest.fixture
def make_trainer(tmp_path, rng):
    """make_trainer(**env): a trainer on 3 shards of documents of 50 ids; its workers end later."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for i, size in enumerate((333, 700, 111)):
        tokens = np.minimum(rng.geometric(0.1, size) + 1, 49)  # some pairs are far from rare
        tokens[rng.random(size) < 0.05] = 1
        write_shard(shards / f"text_train_{i:06d}.bin", tokens)
    opened = []

    def make(**env: object) -> t.Trainer:
        cfg = tiny_knobs(**env)
        data = t.TrainWindows(t.find_shards(shards, "train"), cfg.train_seq_len, cfg.seed, 50)
        opened.append(t.make_workers(cfg))
        return t.Trainer(t.GPT(cfg, 50, 1), cfg, data, opened[-1], t.Ranks())

    yield make
    for workers in opened:
        workers.__exit__()

#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "mlx>=0.32.1; sys_platform == 'darwin' and platform_machine == 'arm64'",
#   "mlx[cpu]>=0.32.1; sys_platform == 'linux'",
#   "scipy-openblas32>=0.3.29; sys_platform == 'linux'",
#   "numpy>=1.26", "numba>=0.60", "sentencepiece>=0.2", "brotli>=1.1",
#   "tqdm>=4.66",
# ]
# ///
"""Train a small GPT with MLX, squeeze it into 16,000,000 bytes, score that file.

    python train_gpt_mlx_kl.py                all of it, on text that Python has
    DATA_PATH=.. TOKENIZER_PATH=.. python train_gpt_mlx_kl.py     public layouts
    MODE=score ARTIFACT=logs/RUN DATA_PATH=.. python train_gpt_mlx_kl.py
    MODE=doctor python train_gpt_mlx_kl.py              what this machine can do
    MODE=sample ARTIFACT=logs/RUN PROMPT=".." python train_gpt_mlx_kl.py
    MODE=compress ARTIFACT=logs/RUN FILE=notes.txt python train_gpt_mlx_kl.py

Everything is set by environment variables; `--help` lists them. The file reads top to bottom in
the order in which data flows:

    KNOBS             every setting, what it is for, its default, bounds and help, in one table
    MACHINE           the allocator; a fast BLAS, loaded before MLX; the device and its memory
    DATA              tokenizer facts, shards, shuffled training windows, the validation text
    REPORT            a run's folder: train.log, metrics.jsonl, the lines that parsers look for
    CONTEXT FEATURES  the tokens before a position, cut at the document's start, and their hashes
    CPU KERNELS       attention and cross-entropy for a machine whose exp() is slow
    MODEL             GPT; EngramLite, or LogitHash (BigramHash, SkipGram), added to its logits
    OPTIMIZERS        a table of parameter groups; Muon and Adam
    ARTIFACT          quantiser, file format, size rules
    CHECKPOINTS       a run's state on disk, from which it can go on
    TRAINING          workers and ranks; schedules; the trainer, whose take_step is one step
    CONTEXT MODELS    what scores a text and learns from it; the net alone is the first
    BACKOFF           exact counts of the text so far, mixed linearly with the net
    LOGISTIC          a token as binary decisions; experts mixed as logits; the arithmetic coder
    PACKING           training text inside the artifact, whose decoding primes the mixer
    EVALUATION        load, prime, rehearse, decode the message, score each position once, total
    AUDIT             causality, normalisation, bytes: checked through the code that scores
    USE               a file token by token: samples of text; files compressed and restored
    MODES             two programs that meet in files, train and score; a doctor for machines
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import ctypes
import dataclasses
import decimal
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import lzma
import math
import mmap
import operator
import os
import platform
import queue
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# ==================================================================================================
# KNOBS: every setting is an environment variable with the upper-case name of its field
# ==================================================================================================

ARTIFACT_LIMIT_BYTES = 16_000_000
REHEARSAL_MOST = 1 << 20  # tokens
SCORE_LIMIT = 80.0  # |score| <= |gain| * sqrt(head_dim): keeps exponentials in float32's range
Event = dict[str, Any]  # what happened: a line of metrics.jsonl


class Stop(Exception):
    """An end that lines explain, without a traceback; `status` is the exit status."""

    status = 1


class UserError(Stop):
    """A mistake in the user's input."""

    status = 2


class AuditFailed(Stop):
    """A condition of a valid score that does not hold: which one, and where."""

    status = 3

    def __str__(self) -> str:
        return "audit failed: " + ": ".join(self.args)


class RunFailed(Stop):
    """A run that cannot go on."""


class Diverged(RunFailed):
    """A training whose state is not worth keeping."""


class Interrupted(BaseException):  # no library's `except Exception` is meant
    """A signal that asked the program to end; the status is what a shell makes of it."""

    together = False  # whether all ranks end at the same step

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Interrupts:
    """SIGINT, SIGTERM, SIGHUP or an output that is gone: the first ends the program in order.

    It raises Interrupted at once, or at the end of what `held` protects. A second one kills.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked, self.holding = 0, False  # the signal's number; whether it has to wait

    def listen(self) -> None:
        """Take the signals that are not ignored, as nohup ignores SIGHUP."""
        for number in self.signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number: int, _: object = None) -> None:
        """The signals' handler."""
        self.asked = number
        for each in self.signals:
            if signal.getsignal(each) == self.ask:
                signal.signal(each, signal.SIG_DFL)
        if not self.holding:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let what is inside be finished first."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.asked:
            raise Interrupted(self.asked)

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Inside `held`: let what is inside be cut short."""
        self.holding = False
        try:
            if self.asked:
                raise Interrupted(self.asked)
            yield
        finally:
            self.holding = True


interrupts = Interrupts()


LIVE: list[Any] = []  # the terminal's live line (tqdm), while there is one


def say(text: str, end: str = "\n") -> None:
    """Print a line, wrapped on a terminal. Where nobody reads it, the program is asked to end."""
    try:
        if end and sys.stdout.isatty() and " python " not in text:  # to be copied whole
            width = shutil.get_terminal_size().columns
            text = textwrap.fill(text, max(width, 40), subsequent_indent="    ",
                                 break_long_words=False, break_on_hyphens=False)  # fmt: skip
        for bar in LIVE:
            bar.clear()
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the lines that are still to come
        if not interrupts.asked:
            interrupts.ask(signal.SIGPIPE)


SCOPES = {  # what a knob is for
    "run": "where, how long and how chattily a run takes place; RESUME may change it",
    "data": "which text; its content counts, not its path",
    "train": "which net a run ends with; an artifact keeps it, RESUME refuses a change",
    "rate": "how fast it learns; an artifact keeps it, RESUME may change it after a divergence",
    "model": "what an artifact's numbers mean; RESUME and EVAL_ONLY refuse a change",
    "eval": "how a text is scored; an artifact keeps it, RESUME and EVAL_ONLY may change it",
    "use": "what MODE=sample, compress and restore do with an ARTIFACT",
}
KEPT_SCOPES = ("train", "rate", "model", "eval")  # those of the settings in an artifact's header


def knob(default: Any, help: str, scope: str, lo=0, hi=1e18, choices="", alias="", needs="") -> Any:
    """One row of the table. alias: an older public name; needs: the setting that it has to do with.

    Where the knob that `needs` names has another value, this one has no effect.
    """
    assert scope in SCOPES, f"{help}: no scope {scope}"
    meta = {"help": help, "scope": scope, "lo": lo, "hi": hi, "choices": choices.split()}
    return dataclasses.field(default=default, metadata={**meta, "alias": alias, "needs": needs})


@dataclass(frozen=True)
class Knobs:
    """The settings of a run. Defaults are the public stack's; PRESET changes some (see PRESETS)."""

    mode: str = knob("train", "what to do; score, sample, compress, restore: with ARTIFACT; "
                     "doctor: look at this machine", "run",
                     choices="train score sample compress restore doctor")  # fmt: skip
    preset: str = knob("auto", "values of what is left unset; auto: cpu on a CPU, else mac", "run",
                       choices="auto cpu mac h100 baseline")  # fmt: skip
    run_id: str = knob("", "name of the run's folder; empty: date, time and seed", "run")
    out_dir: str = knob("logs", "folder that holds the runs' folders", "run")
    eval_only: str = knob("", "path of an artifact or its folder: score it, train nothing", "run",
                          alias="ARTIFACT")  # fmt: skip
    resume: bool = knob(False, "go on from OUT_DIR/RUN_ID/checkpoint", "run")
    checkpoint_seconds: float = knob(60.0, "seconds between checkpoints; 0: none by time", "run")
    checkpoint_every: int = knob(0, "steps between checkpoints; 0: none by steps", "run")
    export_on_interrupt: bool = knob(False, "interrupted training: export and score it", "run")
    device: str = knob("auto", "where MLX computes", "run", choices="auto cpu gpu")
    compute_dtype: str = knob("auto", "the forward pass's; auto: float32 on CPUs, bfloat16 on GPUs",
                              "run", choices="auto float32 bfloat16")  # fmt: skip
    blas: str = knob("auto", "Linux CPUs: path of an OpenBLAS, auto, or none for MLX's own", "run")
    workers: int = knob(0, "CPU streams that share a step; 0: one per core", "run", hi=256)
    iterations: int = knob(20_000, "steps at most; 0: no limit", "run")
    max_wallclock_seconds: float = knob(600.0, "seconds of training at most; 0: no limit", "run")
    warmup_steps: int = knob(20, "steps thrown away before the clock starts", "run", hi=10_000)
    warmdown_iters: int = knob(3500, "last steps, over which the learning rate falls to 0", "run")
    warmdown_frac: float = knob(0.0, "share of the run that they are at most; 0: any", "run", hi=1)
    train_log_every: int = knob(200, "steps between train lines; 0: none", "run")
    sample_every: int = knob(0, "steps between lines of text by the net; 0: none", "run")
    report_to: str = knob("none", "which library gets the numbers of metrics.jsonl too", "run",
                          choices="none trackio wandb")  # fmt: skip
    grad_accum_steps: int = knob(8, "microbatches per step and worker, at least", "run", lo=1)
    mlx_max_microbatch_tokens: int = knob(8192, "tokens per microbatch, at most", "run", lo=1)
    mlx_eager_eval: bool = knob(True, "one worker: compute each microbatch before the next", "run")
    logit_chunk_tokens: int = knob(0, "tokens per pass of the head; 0: all", "run", hi=1 << 30)

    data_path: str = knob("", "folder of *_{train,val}_*.bin; empty: FineWeb or stdlib", "data")
    tokenizer_path: str = knob("", "SentencePiece .model; empty: what fits DATA_PATH", "data")
    allow_overlap: bool = knob(False, "train on validation documents; the score says so", "data")
    vocab_size: int = knob(0, "pieces; 0: what the tokenizer has", "data", hi=65536)

    seed: int = knob(1337, "seed of weights and data order", "train", hi=2**31 - 1)
    train_batch_tokens: int = knob(524_288, "tokens per step", "train", lo=1, hi=1 << 26)
    train_seq_len: int = knob(1024, "tokens per window", "train", lo=2, hi=1 << 16,
                              alias="TRAIN_MAX_SEQ_LEN")  # fmt: skip
    complement_alpha: float = knob(0.5, "a: loss weights 1 - a * P(target | token)", "train", hi=1)
    tied_embed_init_std: float = knob(0.005, "std of the token embedding at start", "train")
    qk_gain_init: float = knob(1.5, "factor on the normalised queries at start", "train", hi=10)
    use_ortho_init: bool = knob(True, "orthogonal block matrices at start", "train")
    tied_embed_lr: float = knob(0.05, "Adam: token embedding", "rate", hi=1e30)
    matrix_lr: float = knob(0.04, "Muon: block matrices", "rate", hi=1e30)
    scalar_lr: float = knob(0.04, "Adam: gains, gates, scales", "rate", hi=1e30)
    hash_lr: float = knob(0.05, "Adam: hash tables", "rate", hi=1e30)
    hash_proj_lr: float = knob(0.01, "Adam: EngramLite's map to the vocabulary", "rate", hi=100)
    beta1: float = knob(0.9, "Adam: decay of the first moment", "train", hi=0.9999)
    beta2: float = knob(0.95, "Adam: decay of the second moment", "train", hi=0.99999)
    adam_eps: float = knob(1e-8, "Adam: epsilon", "train", lo=1e-20, hi=1)
    adam_weight_decay: float = knob(0.0, "Adam: decoupled, times the learning rate", "rate")
    muon_momentum: float = knob(0.95, "Muon: momentum", "train", hi=0.9999)
    muon_backend_steps: int = knob(5, "Muon: Newton-Schulz steps", "train", lo=1, hi=20)
    muon_momentum_warmup_start: float = knob(0.85, "Muon: momentum at step 0", "train", hi=0.9999)
    muon_momentum_warmup_steps: int = knob(500, "Muon: steps until the full momentum", "train")
    muon_weight_decay: float = knob(0.0, "Muon: decoupled, times the learning rate", "rate")
    grad_clip_norm: float = knob(0.0, "largest norm of a step's gradient; 0: any", "rate")
    skip_bad_steps: int = knob(
        0, "bad steps, not finite or blind again, that may be left out", "rate"
    )
    ema_decay: float = knob(0.997, "EMA of the weights, per step; 0: none", "train", hi=0.99999)
    ema_start_frac: float = knob(0.5, "progress at which averaging starts", "train", hi=1)
    use_swa: bool = knob(False, "the plain mean from EMA_START_FRAC on, in EMA's place", "train")
    weight_bits: int = knob(6, "bits of block matrices and hash tables", "train", lo=4, hi=8)
    embed_bits: int = knob(8, "bits of token embedding and engram.proj", "train", lo=4, hi=8)
    use_gptq_lite: bool = knob(True, "search each row's clip for the least squared error", "train")
    late_qat_threshold: float = knob(0.0, "train quantised below this LR factor", "train", hi=1)
    pack_text_bytes: int = knob(-1, "bytes of packed text; -1: all that is left", "train", lo=-1,
                                needs="MIXER=logistic")  # fmt: skip
    rehearsal_tokens: int = knob(500_000, "training tokens at most that the net does not see, "
                                 "whatever the MIXER: by them it learns how far to trust the net",
                                 "train", hi=REHEARSAL_MOST)  # fmt: skip

    num_layers: int = knob(11, "transformer blocks", "model", lo=1, hi=96)
    model_dim: int = knob(512, "width D", "model", lo=8, hi=8192)
    num_heads: int = knob(8, "query heads H", "model", lo=1)
    num_kv_heads: int = knob(4, "key/value heads Hkv", "model", lo=1)
    mlp_mult: int = knob(3, "hidden width of the MLP / D", "model", lo=1, hi=16)
    mlp_leak: float = knob(0.5, "slope below 0 before squaring; 0: relu squared", "model", hi=1)
    logit_softcap: float = knob(30.0, "logits are cap * tanh(logits / cap)", "model", lo=1, hi=40)
    rope_base: float = knob(10_000.0, "RoPE base", "model", lo=1)
    rope_dims: int = knob(16, "head dimensions that rotate; 0: all", "model")
    xsa_last_n: int = knob(4, "last blocks whose attention drops its value's direction", "model")
    ln_scale_enabled: bool = knob(True, "block i's norms times 1/sqrt(i + 1)", "model",
                                  alias="USE_LN_SCALE")  # fmt: skip
    use_smeargate: bool = knob(True, "blend with the token before", "model", alias="SMEAR_ENABLED")
    engram_lite_enabled: bool = knob(True, "EngramLite; 0: BigramHash instead", "model")
    engram_hash_size: int = knob(8192, "rows per table; 0: off", "model", hi=65536)
    engram_embed_dim: int = knob(256, "columns per table", "model", lo=1, hi=4096)
    engram_n_heads: int = knob(2, "tables per order", "model", lo=1, hi=16)
    bigram_hash_size: int = knob(4096, "rows of BigramHash's table; 0: off", "model", hi=65536)
    skipgram_hash_size: int = knob(0, "rows of SkipGram's table; 0: off", "model", hi=65536)
    mixer_memory_mb: int = knob(8000, "MiB of the context models' tables; unset: by the text",
                                "model", lo=1, hi=1 << 15, needs="MIXER=logistic")  # fmt: skip
    mixer_size: str = knob("medium", "how many contexts; large: medium's by three trees", "model",
                           choices="small medium large", needs="MIXER=logistic")  # fmt: skip

    mixer: str = knob("logistic", "context models", "eval", choices="logistic backoff off")
    ngram_mixer_enabled: bool = knob(True, "0 is the same as MIXER=off", "eval")
    ngram_max_order: int = knob(4, "tokens per context", "eval", lo=1, hi=8, needs="MIXER=backoff")
    ngram_alpha: str = knob("0.25", "n-grams' weight; auto: learned", "eval", needs="MIXER=backoff")
    ngram_smoothing: str = knob("kneser-ney", "smoothing of counts", "eval",
                                choices="kneser-ney laplace", needs="MIXER=backoff")  # fmt: skip
    audit: bool = knob(True, "prove the score: causal, normalised, decodable", "eval")
    val_loss_every: int = knob(0, "steps between validations while training; 0: none", "eval")
    val_batch_size: int = knob(16_384, "tokens per batch of those", "eval", lo=1, hi=1 << 26)
    val_max_tokens: int = knob(0, "score to the last document's end in so many; 0: all", "eval")
    eval_mode: str = knob("sliding", "the final score", "eval", choices="standard sliding both")
    eval_seq_len: int = knob(0, "tokens per window; 0: TRAIN_SEQ_LEN", "eval", hi=1 << 16)
    eval_stride: int = knob(64, "tokens that a window advances", "eval", lo=1, hi=1 << 16)
    eval_batch_seqs: int = knob(16, "windows per batch", "eval", lo=1, hi=4096)

    prompt: str = knob("", "sample: text that the sample goes on from", "use")
    sample_tokens: int = knob(200, "sample: tokens at most", "use")
    sample_with: str = knob("all", "sample: who says what comes next", "use",
                            choices="all net contexts")  # fmt: skip
    temperature: float = knob(1.0, "sample: log-probabilities are divided by it", "use", hi=100)
    top_p: float = knob(0.95, "sample: share of the likeliest tokens, others not", "use", hi=1)
    file: str = knob("", "compress, restore: path of the file", "use")
    output: str = knob("", "their result; empty: FILE.tgk, or FILE without .tgk", "use")
    with_net: bool = knob(False, "compress: with the net too, for this machine alone", "use")


PRESETS = {
    "cpu": """ITERATIONS=1000000 MAX_WALLCLOCK_SECONDS=110 TRAIN_BATCH_TOKENS=4096
        GRAD_ACCUM_STEPS=1 TRAIN_SEQ_LEN=256 WARMUP_STEPS=1 WARMDOWN_FRAC=0.5
        TRAIN_LOG_EVERY=50 NUM_LAYERS=1 MODEL_DIM=192 NUM_HEADS=3 NUM_KV_HEADS=1 MLP_MULT=2
        ROPE_DIMS=0 XSA_LAST_N=0 ENGRAM_EMBED_DIM=64 MATRIX_LR=0.02 HASH_LR=0.15 EMA_DECAY=0
        MUON_MOMENTUM_WARMUP_STEPS=200 WEIGHT_BITS=8 EVAL_STRIDE=128 NGRAM_ALPHA=auto
        PACK_TEXT_BYTES=2500000 REHEARSAL_TOKENS=100000 VAL_MAX_TOKENS=1048576""",
    "mac": """MIXER_SIZE=large TRAIN_BATCH_TOKENS=16384 GRAD_ACCUM_STEPS=1 NUM_LAYERS=6
        MODEL_DIM=384 NUM_HEADS=6 NUM_KV_HEADS=3 MLP_MULT=2 ENGRAM_HASH_SIZE=4096
        ENGRAM_EMBED_DIM=128 MATRIX_LR=0.03 WARMUP_STEPS=2 WARMDOWN_ITERS=300 WARMDOWN_FRAC=0.5
        MUON_MOMENTUM_WARMUP_STEPS=200 EMA_DECAY=0.98 TRAIN_LOG_EVERY=20 EVAL_STRIDE=512
        NGRAM_ALPHA=auto VAL_MAX_TOKENS=4194304""",
    "h100": """MIXER_SIZE=large NUM_LAYERS=10 MLP_MULT=2 ENGRAM_EMBED_DIM=64 NGRAM_ALPHA=auto
        GRAD_ACCUM_STEPS=1 WARMDOWN_FRAC=0.5 MLX_MAX_MICROBATCH_TOKENS=65536""",
    "baseline": """NUM_LAYERS=9 MLP_MULT=2 MLP_LEAK=0 ROPE_DIMS=0 XSA_LAST_N=0 LN_SCALE_ENABLED=0
        USE_ORTHO_INIT=0 USE_SMEARGATE=0 ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=0
        COMPLEMENT_ALPHA=0 WARMDOWN_ITERS=1200 EMA_DECAY=0 WEIGHT_BITS=7 MIXER=off
        REHEARSAL_TOKENS=0 EVAL_MODE=standard""",
}

NOT_KEPT = (  # public names, and why
    ("TTT_ENABLED TTT_LR TTT_EPOCHS TTT_MOMENTUM TTT_CHUNK_TOKENS TTT_CHUNK_SIZE TTT_BATCH_SEQS "
     "TTT_BATCH_SIZE TTT_EVAL_SEQ_LEN TTT_FREEZE_BLOCKS TTT_FREEZE_LAYERS TTT_GRAD_CLIP "
     "TTT_LORA_RANK TTT_LORA_LR TTT_TARGET_LAST_N",
     "test-time training is not part of this script"),
    ("SWA_ENABLED SWA_EVERY SWA_START_FRAC SWA_DECAY",
     "SWA is the plain mean from EMA_START_FRAC on: use USE_SWA=1 and EMA_START_FRAC"),
    ("TIE_EMBEDDINGS", "embeddings are always tied"),
    ("CONTROL_TENSOR_NAME_PATTERNS", "the GROUPS table in the script says what is quantised"),
    ("INT8_KEEP_FLOAT_MAX_NUMEL INT8_KEEP_FLOAT_FP32_NAME_PATTERNS",
     "WEIGHT_BITS and EMBED_BITS set the precision"),
    ("COMPLEMENT_BY", "weights come from pairs of tokens; the mixer's contexts gained 0.0005 BPB"),
)  # fmt: skip
ELSEWHERE = {  # what other trainers call a knob
    "LR": "MATRIX_LR", "LEARNING_RATE": "MATRIX_LR", "BATCH_SIZE": "TRAIN_BATCH_TOKENS",
    "MAX_WALLCLOCK": "MAX_WALLCLOCK_SECONDS", "SEQ_LEN": "TRAIN_SEQ_LEN", "STEPS": "ITERATIONS",
    "MAX_STEPS": "ITERATIONS", "WEIGHT_DECAY": "MUON_WEIGHT_DECAY",
}  # fmt: skip


def as_text(value: Any) -> str:
    """A knob's value as an environment variable says it."""
    return str(int(value) if isinstance(value, bool) else value)


def settings_of(cfg: Knobs, *scopes: str) -> dict[str, str]:
    """The settings of these scopes, as an environment would have them."""
    fields = (f for f in dataclasses.fields(Knobs) if f.metadata["scope"] in scopes)
    return {f.name.upper(): as_text(getattr(cfg, f.name)) for f in fields}


def parse_value(field: dataclasses.Field, text: str) -> Any:
    """Text of an environment variable -> value; ValueError says what would be right."""
    kind, meta = type(field.default), field.metadata
    choices = ["0", "1"] if kind is bool else meta["choices"]
    if choices and text not in choices:
        raise ValueError("must be one of " + ", ".join(choices))
    if kind in (bool, str):
        return text == "1" if kind is bool else text
    try:
        if not re.fullmatch(r"[-+.\w]+", text, re.ASCII) or "_" in text:
            raise ValueError  # Python's own numbers may have spaces, _ and digits of any script
        value = kind(text)
    except ValueError:
        raise ValueError("must be a whole number" if kind is int else "must be a number") from None
    if not meta["lo"] <= value <= meta["hi"]:  # also false for nan
        raise ValueError(f"must be from {meta['lo']} to {meta['hi']}")
    return value


def parse_env(env: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Variables that name a knob or its alias -> (values by field name, problems)."""
    values, problems = {}, []
    for field in dataclasses.fields(Knobs):
        for name in (field.metadata["alias"], field.name.upper()):  # the later one is stronger
            if env.get(name):
                try:
                    values[field.name] = parse_value(field, env[name])
                except ValueError as error:
                    text = env[name] if env[name].isprintable() else ascii(env[name])
                    problems.append(f"{name}={text}: {error}")
    return values, problems


def preset_values(preset: str) -> dict[str, Any]:
    """Field values that a preset sets; its text is written as a user would set them."""
    return parse_env(dict(pair.split("=") for pair in PRESETS[preset].split()))[0]


def guess_device(choice: str) -> str:
    """'cpu' or 'gpu', without loading MLX: Metal on Apple Silicon, CUDA where its wheel is."""
    if choice != "auto":
        return choice
    if sys.platform == "darwin":
        return "gpu" if platform.machine() == "arm64" else "cpu"
    names = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    return "gpu" if any(name.lower().startswith("mlx-cuda") for name in names) else "cpu"


def one_edit(a: str, b: str) -> bool:
    """Whether one letter more, less or other makes a name another."""
    i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a != b and (a[i + 1 :] in (b[i:], b[i + 1 :]) or a[i:] == b[i + 1 :])


def check_names(env: dict[str, str]) -> tuple[list[str], list[str]]:
    """Variables that name no knob -> (problems: public names not kept, warnings: mistakes)."""
    fields = dataclasses.fields(Knobs)
    names = [name for f in fields for name in (f.name.upper(), f.metadata["alias"]) if name]
    problems, warnings = [], []
    for name in sorted(set(env) - set(names)):
        reasons = [why for public, why in NOT_KEPT if name in public.split()]
        problems += [f"{name}: not a setting here: {why}; unset it" for why in reasons]
        near = [ELSEWHERE[name]] if name in ELSEWHERE else [k for k in names if one_edit(name, k)]
        warnings += [f"{name} is not a setting; did you mean {known}?" for known in near[:1]]
    return problems, warnings


def knobs_from_env(
    env: dict[str, str], kept: dict[str, str] | None = None
) -> tuple[Knobs, list[str]]:
    """Environment -> (knobs, warnings). Raises UserError with every problem, a line each.

    `kept`, the settings of an artifact as an environment would have them, takes the preset's place.
    """
    (given, problems), (unknown, misspelt) = parse_env(env), check_names(env)
    warnings = [*misspelt]
    preset = given.pop("preset", "auto")
    if preset == "auto":
        preset = "cpu" if guess_device(given.get("device", "auto")) == "cpu" else "mac"
    usual = preset_values(preset) if kept is None else parse_env(kept)[0]
    cfg = Knobs(**{"preset": preset, **usual, **given})
    if not cfg.ngram_mixer_enabled:
        if given.get("mixer", "off") != "off":
            warnings.append(f"MIXER={cfg.mixer} has no effect with NGRAM_MIXER_ENABLED=0")
        cfg = dataclasses.replace(cfg, mixer="off", ngram_mixer_enabled=True)
    for field in dataclasses.fields(Knobs):
        need, _, value = field.metadata["needs"].partition("=")
        if need and env.get(field.name.upper()) and getattr(cfg, need.lower()) != value:
            has = getattr(cfg, need.lower())
            warnings.append(f"{field.name.upper()} has no effect with {need}={has}")
    problems += unknown + check_together(cfg)
    if problems:  # a misspelling may be their cause
        raise UserError("\n".join(problems + misspelt))
    return cfg, warnings


def check_kept(kept: dict[str, str], path: Path) -> None:
    """Raises UserError unless the settings in an artifact's header are those this script keeps."""
    names = settings_of(Knobs(), *KEPT_SCOPES)
    strange = [n for n, v in kept.items() if n not in names or v == "" or not isinstance(v, str)]
    values, problems = parse_env({n: v for n, v in kept.items() if n not in strange})
    use = "use the one that made the file"
    problems += [f"{name}: this script keeps none: {use}" for name in strange]
    problems += [f"{n} is missing, which this script keeps: {use}" for n in names if n not in kept]
    problems = problems or check_together(Knobs(**values))
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))


def check_together(cfg: Knobs) -> list[str]:
    """Problems that only several knobs together have."""
    head = cfg.model_dim // cfg.num_heads
    gain = SCORE_LIMIT / max(head, 1) ** 0.5
    rules = {
        "MODEL_DIM={model_dim} must be an even multiple of NUM_HEADS={num_heads}":
            cfg.model_dim % (2 * cfg.num_heads) == 0,
        "NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}":
            cfg.num_heads % cfg.num_kv_heads == 0,
        f"ROPE_DIMS={{rope_dims}} must be even, at most MODEL_DIM / NUM_HEADS = {head}":
            cfg.rope_dims % 2 == 0 and cfg.rope_dims <= head,
        f"QK_GAIN_INIT={{qk_gain_init}} must be at most {gain:.2f} for heads of {head}":
            cfg.qk_gain_init <= gain,
        "TRAIN_BATCH_TOKENS={train_batch_tokens} holds no window of TRAIN_SEQ_LEN={train_seq_len}":
            cfg.train_batch_tokens >= cfg.train_seq_len,
        "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0 together never stop: set one":
            cfg.iterations > 0 or cfg.max_wallclock_seconds > 0,
        "ENGRAM_N_HEADS={engram_n_heads} tables of ENGRAM_HASH_SIZE={engram_hash_size} rows and "
        "ENGRAM_EMBED_DIM={engram_embed_dim} columns fit into no artifact":
            2 * cfg.engram_n_heads * cfg.engram_hash_size * cfg.engram_embed_dim <= 1 << 28,
        "RUN_ID={run_id}: use letters, digits and . _ + = -, the first no sign":
            re.fullmatch(r"(\w[\w.+=-]*)?", cfg.run_id),
        "MODE={mode} needs ARTIFACT: which file?": cfg.eval_only or cfg.mode in ("train", "doctor"),
        "MODE={mode} needs FILE: which one?": cfg.file or cfg.mode not in ("compress", "restore"),
        "RESUME=1 needs RUN_ID: which run should go on?": cfg.run_id or not cfg.resume,
        "NGRAM_ALPHA={ngram_alpha}: must be from 0 to 1, or auto":
            re.fullmatch(r"auto|0|1|0?\.\d+|[01]\.0*", cfg.ngram_alpha),
    }  # fmt: skip
    values = {n: v if str(v).isprintable() else ascii(v) for n, v in vars(cfg).items()}
    return [rule.format(**values) for rule, holds in rules.items() if not holds]


def eval_shape(cfg: Knobs, mode: str = "standard") -> tuple[int, int]:
    """(tokens per window, tokens from one window to the next) of an EVAL_MODE."""
    length = cfg.eval_seq_len or cfg.train_seq_len
    return length, length if mode == "standard" else min(cfg.eval_stride, length)


def knob_rows(scope: str) -> Iterator[tuple[str, str, str]]:
    """(name, default and presets that differ, help) of each knob of a scope."""
    presets = {name: preset_values(name) for name in PRESETS}
    for field in (f for f in dataclasses.fields(Knobs) if f.metadata["scope"] == scope):
        name, meta = field.name, field.metadata
        differ = [f"{p} {as_text(values[name])}" for p, values in presets.items() if name in values]
        help = meta["help"] + (f" ({', '.join(meta['choices'])})" if meta["choices"] else "")
        help += f" [alias {meta['alias']}]" if meta["alias"] else ""
        help += f" [needs {meta['needs']}]" if meta["needs"] else ""
        yield name.upper(), "; ".join([as_text(field.default) or "empty", *differ]), help


USUAL = """MODE PRESET DATA_PATH MAX_WALLCLOCK_SECONDS ITERATIONS NUM_LAYERS MODEL_DIM
    PACK_TEXT_BYTES VAL_MAX_TOKENS SEED RUN_ID"""  # the knobs that most people turn


def help_text(everything: bool) -> str:
    """What --help prints, 80 columns wide: the usual knobs, or all."""
    head = (__doc__ or "").partition("Everything is set")[0].rstrip()
    lines = [head, "", "usage: [NAME=value ...] python train_gpt_mlx_kl.py [--help [all]]", ""]
    for scope, what in SCOPES.items():
        lines += ["", textwrap.fill(f"{scope.title()}: {what}", 80)] if everything else []
        for name, default, help in knob_rows(scope):
            if everything or name in USUAL.split():
                start, rest = f"  {name:<28}", " " * 30
                lines += textwrap.wrap(f"{help} [{default}]", 80, initial_indent=start,
                                       subsequent_indent=rest, break_on_hyphens=False)  # fmt: skip
    end = "--help all lists every setting; README.md explains them."
    return "\n".join(lines if everything else [*lines, "", end])


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print a user's mistake or interrupt, a line each, and end with its status."""
    try:
        yield
    except (Stop, Interrupted) as error:
        end_with(str(error), error.status)
    except OSError as error:  # of a path whose name is too long, or that is somebody else's
        name = f"{error.filename!a}: " if error.filename else ""
        mistakes = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)
        end_with(f"{name}{error.strerror or error}", 2 if error.errno in mistakes else 1)


def end_with(lines: str, status: int) -> None:
    """End the program, at once where threads are left.

    At Python's end a thread that computes may crash, and one that waits for another rank would keep
    it from ending.
    """
    with contextlib.suppress(OSError):  # nobody reads it
        for line in lines.splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
    if threading.active_count() > 1:
        os._exit(status)
    raise SystemExit(status)


if __name__ == "__main__":  # help and bad settings come before anything heavy is loaded
    interrupts.listen()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  it may have been closed
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    if {"-h", "--help"} & set(sys.argv):
        print(help_text(everything="all" in sys.argv))
        raise SystemExit(0)
    with errors_as_lines():
        if sys.argv[1:]:
            raise UserError(f"{sys.argv[1]}: settings are environment variables; see --help")
        CFG, CFG_WARNINGS = knobs_from_env(dict(os.environ))


# ==================================================================================================
# MACHINE: the allocator, a fast BLAS loaded before MLX on Linux CPUs, the device, its memory
# ==================================================================================================


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks: returning each to the system costs a page fault a 4 KB.

    Measured on two x86-64 cores: element-wise chains run 3 times faster, two streams of them 6.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: threads share one heap, which never shrinks


def open_blas(choice: str) -> dict[str, Any]:
    """Open the first usable OpenBLAS; {} if there is none. Runs before MLX is imported.

    Tried: the knob's path, else the pip package's library and the system's.
    """
    paths: list[Any] = [choice]
    if choice == "auto":
        spec = importlib.util.find_spec("scipy_openblas32")
        folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path("absent")
        paths = [*sorted(folder.glob("lib*openblas*.so*")), "libopenblas.so.0", "libopenblas.so"]
    for path, prefix in itertools.product(paths, ("scipy_", "")) if sys.platform == "linux" else ():
        try:
            library = ctypes.CDLL(str(path))
            functions = {n: getattr(library, prefix + n) for n in ("cblas_sgemm", "cblas_dgemm")}
            set_threads = getattr(library, prefix + "openblas_set_num_threads")
        except (OSError, AttributeError, UnicodeError):
            continue
        addresses = {n: ctypes.cast(f, ctypes.c_void_p).value for n, f in functions.items()}
        return {"path": str(path), "addresses": addresses, "set_threads": set_threads}
    return {}


def patch_imports(module: Path, addresses: dict[str, int]) -> int:
    """Point a loaded ELF64 library's imported functions elsewhere; returns how many were found.

    An imported function is called through a slot that the dynamic linker fills; the library's
    relocation records (`Elf64_Rela`) say which slot belongs to which name. Writing the slots needs
    no compiler and works whatever prefix the other library puts before its names.
    """
    raw = module.read_bytes()
    table, size, count = *struct.unpack_from("<Q", raw, 40), *struct.unpack_from("<HH", raw, 58)
    # A section header's words: 1 type, 4 offset, 5 size, 6 the section it refers to.
    sections = [struct.unpack_from("<IIQQQQIIQQ", raw, table + i * size) for i in range(count)]
    with open("/proc/self/maps") as maps:
        base = next((int(line.split("-")[0], 16) for line in maps if str(module) in line), 0)
    page, libc, done = os.sysconf("SC_PAGESIZE"), ctypes.CDLL(None), 0
    for section in (s for s in sections if s[1] == 4):  # SHT_RELA
        symbols, strings = sections[section[6]], sections[sections[section[6]][6]]
        records = np.frombuffer(raw, "<u8", section[5] // 8, section[4]).reshape(-1, 3)
        for slot, info, _ in records[records[:, 1] >> 32 > 0].tolist():
            (name_at,) = struct.unpack_from("<I", raw, symbols[4] + 24 * (info >> 32))
            start = strings[4] + name_at
            address = addresses.get(raw[start : raw.index(b"\0", start)].decode())
            at = ctypes.c_void_p((base + slot) & -page)
            if address and base and libc.mprotect(at, page, 3) == 0:  # read, write
                ctypes.c_uint64.from_address(base + slot).value = address
                done += 1
    return done


def use_blas(blas: dict[str, Any]) -> str:
    """Make MLX call the opened BLAS; returns its name, or what its lack costs."""
    if sys.platform == "darwin":
        return "Accelerate"
    module = Path(mx.__file__).resolve().parent / "lib" / "libmlx.so"
    wanted = blas.get("addresses", {})
    if wanted and module.is_file() and patch_imports(module, wanted) >= len(wanted):
        return blas["path"]
    return "MLX's own (20 to 70 times slower in matrix products: pip install scipy-openblas32)"


def cpu_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    quota = cgroup_file("cpu.max", "cpu/cpu.cfs_quota_us").split()
    period = quota[1:] or cgroup_file("cpu/cpu.cfs_period_us").split()
    shares = [int(word) for word in quota[:1] + period[:1] if word.isdigit()]
    most = math.ceil(shares[0] / shares[1]) if len(shares) == 2 else len(affinity(0))
    return max(min(len(affinity(0)), most), 1)


if sys.platform == "linux":
    keep_freed_memory()
BLAS = open_blas(os.environ.get("BLAS") or "auto")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's own: its products here are small

with errors_as_lines():
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx.utils import tree_flatten, tree_map, tree_unflatten

FOR_CPU = os.environ.get("DEVICE") == "cpu" or mx.default_device().type == mx.DeviceType.cpu
BLAS_NAME = use_blas(BLAS) if FOR_CPU else "not used"
Array, Arrays = mx.array, dict[str, mx.array]


SCRIPT = Path(__file__).resolve()
HERE = SCRIPT.parent


@functools.cache
def source() -> bytes:
    """The script's bytes as they are when a run begins: people edit the file while it trains."""
    return SCRIPT.read_bytes()


def script_unchanged() -> bool:
    """Whether the script is still what `source` says."""
    return SCRIPT.is_file() and SCRIPT.read_bytes() == source()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when it is whole and on disk. Raises RunFailed."""
    part = path.with_name(f"part-{path.name}")
    try:
        yield part
        wait_for_disk(part)
        part.replace(path)
        wait_for_disk(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: MLX's
        raise RunFailed(f"{path}: {getattr(error, 'strerror', '') or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def wait_for_disk(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, would outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, whose fsync waits for no disk
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
        else:
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do this
            raise
    finally:
        os.close(handle)


def own_thread() -> queue.SimpleQueue:
    """Where a thread with MLX streams of its own takes (future, function) from, to the end."""
    work = queue.SimpleQueue()

    def serve() -> None:
        for done, function in iter(work.get, None):
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)
            del done, function  # they would live until the next call
        mx.clear_streams()  # a stream ends in the thread that made it

    def end() -> None:
        work.put(None)
        thread.join()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    atexit.register(end)
    return work


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return not on_cpu() and mx.metal.is_available()


def peak_memory() -> int:
    """Bytes at most: MLX's on a GPU, the process's on a CPU."""
    if not on_cpu():
        return mx.get_peak_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


CACHE_LIMIT = 2 << 30  # bytes that MLX may keep of freed buffers on Metal, else nearly all


def cgroup_file(*names: str) -> str:
    """What a container's control group says in the first of these files that there is; '' else."""
    own = Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.is_file() else []
    paths = [line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2]
    for name, path in itertools.product(names, [*paths, ""]):
        kind, _, file = name.rpartition("/")
        with contextlib.suppress(OSError):
            return (Path("/sys/fs/cgroup") / kind / path / file).read_text().strip()
    return ""


def memory_limit() -> int:
    """Bytes that this process may use: by the GPU, the container, the machine."""
    gpu = {} if on_cpu() else mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if gpu.get(key):
            return int(gpu[key])
    group = cgroup_file("memory.max", "memory/memory.limit_in_bytes")
    limits = [int(group)] if group.isdigit() else []
    with contextlib.suppress(ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=8 << 30)


def use_device(cfg: Knobs) -> None:
    """Make DEVICE the default device."""
    if cfg.device != "auto":
        device = mx.cpu if cfg.device == "cpu" else mx.gpu
        if not mx.is_available(device):
            raise UserError("DEVICE=gpu: this MLX has none; on Linux: pip install 'mlx[cuda13]'")
        mx.set_default_device(device)
    if on_metal():
        mx.set_cache_limit(CACHE_LIMIT)
    if not on_cpu():
        atexit.register(mx.clear_streams)  # before the driver unloads


def machine_kind() -> str:
    """The system, its architecture, and where MLX computes."""
    return f"{platform.system()} {platform.machine()} {'cpu' if on_cpu() else 'gpu'}"


def processor_name() -> str:
    """The processor that MLX computes on, as far as it can be told; '' else."""
    if not on_cpu():
        return str(mx.device_info().get("device_name", ""))
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def compute_dtype(cfg: Knobs) -> str:
    """Name of the forward pass's dtype. On a CPU only float32 reaches the BLAS and the kernels."""
    if on_cpu() and cfg.compute_dtype == "bfloat16":
        raise UserError("COMPUTE_DTYPE=bfloat16: a CPU computes in float32; unset it")
    if cfg.compute_dtype != "auto":
        return cfg.compute_dtype
    return "float32" if on_cpu() else "bfloat16"


def numbers_made_by(cfg: Knobs) -> tuple[str, ...]:
    """Where the net's last bits come from: with other facts they may be others."""
    blas, cores = Path(BLAS_NAME).name, str(cpu_cores())
    return machine_kind(), processor_name(), mx.__version__, compute_dtype(cfg), blas, cores


# ==================================================================================================
# DATA: tokenizer facts, shards, shuffled training windows, bigram counts
# ==================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


@dataclass(frozen=True)
class Tokenizer:
    """What scoring needs to know of a tokenizer: it is all that an artifact keeps of it.

    piece_bytes (V,) uint16: UTF-8 bytes of each piece, every U+2581 counted as one space byte
    leading (V,) bool: the piece starts with U+2581
    control (V,) bool: control, unknown or unused: no bytes, and no space after it is decoded
    """

    piece_bytes: np.ndarray
    leading: np.ndarray
    control: np.ndarray
    bos: int
    dummy_prefix: bool
    sha256: str
    text: bytes = b""  # of all pieces, one after the other; b"": unknown

    @property
    def vocab(self) -> int:
        return len(self.piece_bytes)

    def bytes_of(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each token adds to the decoded text. (n,), (n,) ids -> (n,) int64.

        A dummy prefix is a leading space that encoding puts before a document and decoding
        takes away: it is no byte of the text where the piece follows a control token.
        """
        count = self.piece_bytes[current].astype(np.int64)
        if self.dummy_prefix:
            count -= self.leading[current] & self.control[previous]
        return count


def word_letters(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each piece, in lower case (V, longest) uint8, and how many they are (V,) int64.

    Letters, digits, the apostrophe, and whatever is not ASCII are of words; other bytes are 0.
    """
    low = bytes(range(256)).lower()
    of_words = bytes(b if b > 127 or b == ord("'") or chr(b).isalnum() else 0 for b in low)
    sizes = tokenizer.piece_bytes.astype(np.int64) * bool(tokenizer.text)
    letters = np.zeros((tokenizer.vocab, int(sizes.max(initial=1))), np.uint8)
    inside = np.arange(letters.shape[1]) < sizes[:, None]
    letters[inside] = np.frombuffer(tokenizer.text.translate(of_words), np.uint8)
    return letters, sizes


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a SentencePiece .model file. Raises UserError if it is none."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"TOKENIZER_PATH={path}: no SentencePiece model ({error})") from None
    ids = list(range(model.vocab_size()))
    if len(ids) > 1 << 16:
        raise UserError(f"TOKENIZER_PATH={path}: {len(ids)} pieces, more than 16-bit tokens hold")
    pieces = model.id_to_piece(ids)
    control = np.any([model.is_control(ids), model.is_unknown(ids), model.is_unused(ids)], axis=0)
    texts = [
        b"" if control[i] else bytes([int(p[3:5], 16)]) if model.is_byte(i)
        else p.replace("\u2581", " ").encode() for i, p in enumerate(pieces)
    ]  # fmt: skip
    size = np.array([len(text) for text in texts], np.uint16)
    leading = np.array([p.startswith("\u2581") for p in pieces]) & ~control
    if "\u2581" in model.decode(model.encode(" a  b")):
        raise UserError(f"TOKENIZER_PATH={path}: without a U+2581 piece a space becomes three "
                        "bytes: train one that has it")  # fmt: skip
    dummy = "".join(model.encode("a", out_type=str)).startswith("\u2581")  # in any script
    digest = file_sha256(path)
    facts = model.bos_id(), dummy, digest, b"".join(texts)
    return Tokenizer(size, leading, control, *facts)


def bytes_of_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """What each piece adds to a text."""
    ends = np.cumsum(tokenizer.piece_bytes.astype(np.int64) * bool(tokenizer.text)).tolist()
    return [tokenizer.text[start:end] for start, end in itertools.pairwise([0, *ends])]


def piece_texts(tokenizer: Tokenizer) -> list[str]:
    """What each piece adds to a text; a byte that is no character alone as <0xNN>."""
    return [part.decode(errors="replace") if len(part) != 1 or part < b"\x80"
            else f"<0x{part[0]:02X}>" for part in bytes_of_pieces(tokenizer)]  # fmt: skip


def check_vocab(cfg: Knobs, tokenizer: Tokenizer) -> None:
    """VOCAB_SIZE, where it is set, must be the tokenizer's."""
    if cfg.vocab_size not in (0, tokenizer.vocab):
        raise UserError(f"VOCAB_SIZE={cfg.vocab_size}, but the tokenizer has {tokenizer.vocab} "
                        "pieces: unset it or choose the other tokenizer")  # fmt: skip


class Shard:
    """A shard's tokens, uint16, read from its file when they are sliced.

    Not memory-mapped: there a file that shrinks while a run goes on would kill it without a word.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError unless the file is a shard as long as its header says."""
        if not path.is_file():
            raise UserError(f"{path}: not a file")
        try:
            header, have = np.fromfile(path, "<i4", SHARD_HEADER_INTS), path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if len(header) < SHARD_HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
            raise UserError(
                f"{path}: not a token shard (wrong header): make it with data/prepare.py"
            )
        need = 4 * SHARD_HEADER_INTS + 2 * int(header[2])
        if need != have:
            raise UserError(f"{path}: {have} bytes, not {need} as its header says: make it anew")
        self.path, self.size = path, int(header[2])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        """The tokens of a slice without a step: (n,) uint16. Raises RunFailed if they are gone."""
        start, stop, _ = part.indices(self.size)
        count, offset = max(stop - start, 0), 4 * SHARD_HEADER_INTS + 2 * start
        try:
            tokens = np.fromfile(self.path, "<u2", count, offset=offset)
        except OSError as error:
            raise RunFailed(f"{self.path}: {error.strerror}: put it back") from None
        if len(tokens) < count:
            raise RunFailed(f"{self.path}: it was shortened meanwhile: put the whole one back")
        return tokens


def check_ids(tokens: np.ndarray, vocab: int, name: object) -> np.ndarray:
    """Tokens as int32, after checking that each is below the vocabulary's size."""
    top = int(tokens.max(initial=0))
    if top >= vocab:
        raise UserError(f"{name}: token {top}, but the vocabulary has {vocab}: another tokenizer's")
    return tokens.astype(np.int32)


def find_shards(folder: Path, split: str) -> list[Path]:
    """Sorted shards of a split. Raises UserError if there are none."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: holds no *_{split}_*.bin: make such shards of a text "
                        "by python data/prepare.py text PATH, or get FineWeb's by python "
                        "data/prepare.py fineweb")  # fmt: skip
    for path in paths:
        if "_train_" in path.name and "_val_" in path.name:
            raise UserError(f"{path}: a shard of training or of validation text? rename it")
        if "bytes" in path.name[path.name.index(f"_{split}_") :]:
            raise UserError(f"{path}: by its name byte counts, not tokens. Here the tokenizer "
                            "counts the bytes: move such files away")  # fmt: skip
    return paths


def locate_data(cfg: Knobs) -> tuple[Path, Path | None, str]:
    """(folder of shards, tokenizer, a line that says what was chosen).

    EVAL_ONLY needs no tokenizer: it may be None there.
    """
    root = HERE / "data" / "datasets"
    fineweb, stdlib = root / "fineweb10B_sp1024", root / "stdlib_sp1024"
    if cfg.data_path:
        folder, line = Path(cfg.data_path), "data"
    elif fineweb.is_dir():
        folder, line = fineweb, "data: FineWeb"
    else:
        folder, line = stdlib, "data: text that Python carries (set DATA_PATH for another)"
        if not stdlib.is_dir():
            make_stdlib()
    if not folder.is_dir():
        name = folder.name.rpartition("_sp")[0]  # with as many pieces as the text supports
        like = ", ".join(str(path) for path in sorted(folder.parent.glob(f"{name}_sp*")) if name)
        raise UserError(f"DATA_PATH={folder}: no such folder{f': is it {like}?' if like else ''}")
    find_shards(folder, "val")  # a folder of text has no tokenizer either
    line += f", {folder}"
    try:
        tokenizer = Path(cfg.tokenizer_path) if cfg.tokenizer_path else tokenizer_beside(folder)
    except UserError:
        if not cfg.eval_only:
            raise
        return folder, None, line
    if not tokenizer.is_file():
        raise UserError(f"TOKENIZER_PATH={tokenizer}: no such file")
    return folder, tokenizer, f"{line}; tokenizer {tokenizer}"


def make_stdlib() -> None:
    """Run data/prepare.py on the text that every Python installation carries."""
    script = HERE / "data" / "prepare.py"
    say("no FineWeb shards found: making a corpus from the text that Python carries")
    if subprocess.run([sys.executable, str(script), "stdlib"]).returncode:
        raise UserError("data/prepare.py stdlib failed (see above): set DATA_PATH to other shards")


def read_manifest(path: Path) -> dict[str, Any]:
    """What data/prepare.py wrote beside its shards; {} where there is none."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a manifest: make the shards again or remove it") from None


def tokenizer_beside(folder: Path) -> Path:
    """The tokenizer of a dataset in the public layout: ../../tokenizers/NAME_VOCAB_bpe.model."""
    folder = folder.resolve()
    home = folder.parent.parent / "tokenizers"
    name, _, vocab = folder.name.replace("fineweb10B", "fineweb").rpartition("_sp")
    usual = f"{name}_{vocab}_bpe.model"
    path = home / str(read_manifest(folder / "manifest.json").get("tokenizer", usual))
    if not path.is_file():
        raise UserError(f"TOKENIZER_PATH is unset, and {path}, made for {folder}, is missing")
    return path


class TrainWindows:
    """Windows of seq_len + 1 tokens over the training shards, in an order shuffled by seed.

    Window i of epoch e is a pure function of (seed, e, i): a run can go on from a step number,
    and several processes can each read their part of a step.
    """

    def __init__(
        self, paths: list[Path], seq_len: int, seed: int, vocab: int, held: int = 0
    ) -> None:
        """held: tokens at the first shard's start to leave out, a twentieth of it at most."""
        self.paths, self.seq_len, self.seed, self.vocab = paths, seq_len, seed, vocab
        self.shards = [Shard(path) for path in paths]
        self.counts = np.array([max(len(s) - 1, 0) // seq_len for s in self.shards])
        left_out = min(held // seq_len, self.counts[0] // 20)  # windows
        self.held = int(left_out) * seq_len
        self.counts[0] -= left_out
        self.windows = int(self.counts.sum())
        self.tokens = sum(len(s) for s in self.shards)
        if self.windows == 0:
            raise UserError(f"{paths[0].parent}: {self.tokens} training tokens hold no window of "
                            f"TRAIN_SEQ_LEN={seq_len}: add text or lower it")  # fmt: skip
        self.ends = np.cumsum(self.counts)
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def place(self, index: int) -> tuple[int, int]:
        """(shard, its first token) of window number `index` of the run."""
        epoch, at = divmod(index, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(self.windows)
        flat = int(self.order[at])
        shard = int(np.searchsorted(self.ends, flat, side="right"))
        first = flat - int(self.ends[shard] - self.counts[shard])
        slack = (len(self.shards[shard]) - 1) % self.seq_len
        start = first * self.seq_len + (epoch * 7919) % (slack + 1)
        return shard, start + (0 if shard else self.held)

    def step(self, number: int, windows: int) -> np.ndarray:
        """The tokens of step `number`: (windows, seq_len + 1) int32."""
        rows = []
        for index in range(number * windows, (number + 1) * windows):
            shard, start = self.place(index)
            tokens = self.shards[shard][start : start + self.seq_len + 1]
            rows.append(check_ids(tokens, self.vocab, self.paths[shard]))
        return np.stack(rows)

    def fingerprint(self) -> str:
        """SHA-256 of the shards' tokens, with where each ends."""
        digest = hashlib.sha256()
        for shard in self.shards:
            for at in range(0, len(shard), 1 << 24):
                digest.update(shard[at : at + (1 << 24)].tobytes())
            digest.update(str(len(shard)).encode())
        return digest.hexdigest()


SHARED_ENDS = 32  # tokens at both ends of a document, by which it is known again


def document_keys(tokens: np.ndarray, bos: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(length, first tokens, last tokens) of each document of at least 2 * SHARED_ENDS tokens."""
    starts = np.flatnonzero(tokens == bos).tolist()
    for start, end in itertools.pairwise([*starts, len(tokens)]):
        if end - start >= 2 * SHARED_ENDS:
            head, tail = tokens[start : start + SHARED_ENDS], tokens[end - SHARED_ENDS : end]
            yield end - start, head.tobytes(), tail.tobytes()


def shared_documents(data: TrainWindows, val: np.ndarray, bos: int) -> tuple[int, int]:
    """(validation documents that are training documents too, their tokens)."""
    if bos < 0:
        return 0, 0
    keys = list(document_keys(val.astype("<u2"), bos))
    known, trained = set(keys), set()
    for shard in data.shards:
        trained |= known.intersection(document_keys(shard[:], bos))
    lengths = [key[0] for key in keys if key in trained]
    return len(lengths), sum(lengths)


COUNTED_TOKENS = 100_000_000  # enough for bigrams, and two seconds of counting
COUNTED_VOCAB = 16_384  # the table of a larger vocabulary would not fit in memory


def bigram_probability(data: TrainWindows) -> np.ndarray:
    """P(x_t | x_{t-1}) as counted over the training shards: (V, V) float32, row = x_{t-1}."""
    v, left, chunk = data.vocab, COUNTED_TOKENS, 1 << 24
    if v > COUNTED_VOCAB:
        raise UserError(f"COMPLEMENT_ALPHA needs a table of VOCAB_SIZE={v} squared numbers; set it "
                        f"to 0 above {COUNTED_VOCAB}")  # fmt: skip
    table = np.zeros(v * v, np.float32)
    for path, shard in zip(data.paths, data.shards, strict=True):
        for start in range(0, min(len(shard), left), chunk):
            tokens = check_ids(shard[start : start + chunk + 1], v, path).astype(np.int64)
            table += np.bincount(tokens[:-1] * v + tokens[1:], minlength=v * v)
        left = max(left - len(shard), 0)
    table = table.reshape(v, v)
    table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
    return table


def complementary_weights(probability: np.ndarray, alpha: float) -> np.ndarray:
    """Loss weights of a step, mean 1: clip(1 - alpha * P(target), 0.1, 1) / mean.

    probability (n, T) float32: of each target, by pair counts -> (n, T) float32. Dividing by the
    mean over the whole step keeps the effective learning rate.
    """
    weights = np.clip(1 - alpha * probability, 0.1, 1)
    return (weights / weights.mean()).astype(np.float32)


def decoded_bytes(path: Path, tokenizer: Tokenizer, text: np.ndarray) -> tuple[int, int]:
    """UTF-8 bytes of a text (n,): (as the byte table counts them, as the decoded text has them)."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    while len(text) > 1 and model.is_byte(int(text[-1])):  # a cut may have split a character
        text = text[:-1]
    parts = np.split(text, np.flatnonzero(tokenizer.control[text]))
    true = sum(len(model.decode(part.tolist()).encode()) for part in parts if len(part))
    prefix = tokenizer.dummy_prefix and tokenizer.leading[text[0]]
    start = int(tokenizer.piece_bytes[text[0]]) - int(prefix)
    return start + int(tokenizer.bytes_of(text[:-1], text[1:]).sum()), true


@dataclass(frozen=True)
class ValidationText:
    """The text that is scored."""

    tokens: np.ndarray  # (n,) int32
    whole: bool  # all of the split's shards
    shards: int
    stated_bytes: int | None = None  # of the decoded whole, by its manifest
    source_bytes: int | None = None  # before the tokenizer altered it, by its manifest
    overlap: tuple[int, int] = (0, 0)  # documents and tokens of it that are training text

    @functools.cached_property
    def sha256(self) -> str:
        """Of its tokens, as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4")).hexdigest()

    @property
    def part(self) -> str:
        """A label for whatever is scored on less than the whole split."""
        return "" if self.whole else f" (PART of the text: {len(self.tokens) - 1} tokens)"


def load_validation(folder: Path, tokenizer: Tokenizer, limit: int) -> ValidationText:
    """Read the validation shards of a folder, `limit` tokens of them at most if it is not 0.

    A limit cuts at the end of the last document that fits, so that no document is half scored,
    unless the first one does not fit. Raises UserError for another tokenizer's shards.
    """
    manifest = folder / "manifest.json"
    facts = read_manifest(manifest)
    if facts.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{manifest}: these shards were made by another tokenizer: choose the "
                        "DATA_PATH and TOKENIZER_PATH that belong together")  # fmt: skip
    paths = find_shards(folder, "val")
    total = sum(len(Shard(path)) for path in paths)
    stated = facts.get("val") if isinstance(facts.get("val"), dict) else {}
    if stated.get("tokens", total) != total:
        raise UserError(f"{folder}: its validation shards hold {total} tokens, by manifest.json "
                        f"{stated['tokens']}: make the shards again")  # fmt: skip
    parts, left = [], limit or total
    for path in paths:
        shard = Shard(path)[: left + 1]
        parts.append(check_ids(shard, tokenizer.vocab, path))
        left -= len(shard)
    text = np.concatenate(parts)
    if limit and len(text) > limit:
        starts = np.flatnonzero(text[1 : limit + 1] == tokenizer.bos) + 1
        text = text[: int(starts[-1]) if len(starts) else limit]
    if len(text) < 2:
        raise UserError(f"{folder}: the validation text has fewer than 2 tokens")
    sizes = stated.get("bytes"), stated.get("source_bytes")
    facts = (size if type(size) is int else None for size in sizes)
    return ValidationText(text, len(text) == total, len(paths), *facts)


# ==================================================================================================
# REPORT: an event is a dict; metrics.jsonl and the text lines are both made from it
# ==================================================================================================

Progress = Callable[[int, int, str], None]  # tokens done, tokens in all, what to say of them

# What people's parsers look for: "int6_zstd" is a label, whatever the bits and the compressor.
TRAIN_LINE = (
    "step:{step}/{n} train_loss:{train_loss:.4f} train_time:{train_time_ms:.0f}ms "
    "step_avg:{step_avg_ms:.2f}ms tok_s:{tok_s:.0f}"
)
VAL_LINE = "step:{step}/{n} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}{part}"
EXPORT_LINE = (
    "serialized_int6_zstd:{model_bytes} bytes ({compressor}; text:{packed_bytes} code:{code_bytes} "
    "total:{total_bytes} limit:{limit_bytes})"
)
ROUNDTRIP_LINES = (
    "final_int6_zstd_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
    "eval_time:{eval_time_ms:.0f}ms val_bpb_net:{val_bpb_net:.4f} "
    "val_bpb_context:{val_bpb_context:.4f}{part} [{mode}, {mixer}]",
    "final_int6_zstd_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}{part} [{mode}]",
)
CONFIG_LINES = (
    "machine: {machine}, MLX {mlx_version}, {dtype_used}, {ranks} x {workers_used} worker(s), "
    "{gflops:.0f} GFLOP/s; BLAS: {blas_used}",
    "preset {preset}: {num_layers} layer(s) x {model_dim}, {num_heads} heads, {num_kv_heads} KV "
    "heads, MLP {mlp_mult}x, seq {train_seq_len}, {train_batch_tokens} tokens a step",
)
FINAL_LINE = (
    "val_bpb {val_bpb:.4f} (net {val_bpb_net:.4f}, contexts {val_bpb_context:.4f}; "
    "audit: {audit}){part}"
)
FINAL_LINE_OF_NET = "val_bpb {val_bpb:.4f} (net alone; audit: {audit}){part}"  # MIXER=off
SUMMARY_OF_BOTH = """
  bits per byte      {val_bpb:.4f}  the score: net and context models together
    net alone        {val_bpb_net:.4f}
    contexts alone   {val_bpb_context:.4f}"""
SUMMARY_OF_NET = """
  bits per byte      {val_bpb:.4f}  the score: the net, without context models"""
SUMMARY = """
  text               {val_tokens:,} tokens, {val_bytes:,} bytes{part}
  size               {total_bytes:,} of {limit_bytes:,} bytes
    script           {code_bytes:,}
    net              {net_bytes:,}
    training text    {packed_bytes:,}
  training           {train_steps:,} steps, {train_tokens:,} tokens, {train_seconds:.0f} s
  scoring            {eval_seconds:.0f} s
  audit              {audit}
  everything is in   {folder}"""


class Report(contextlib.AbstractContextManager):
    """The run's folder: train.log (the script's source, then the lines) and metrics.jsonl.

    What is reported before `begin` is written then: a mistake that ends the program until then
    leaves no folder and changes none. Ranks other than 0 have a folder of None, and leave reporting
    to rank 0. The folder is locked until `close` or the end of the process, however it ends.
    """

    files = ("train.log", "metrics.jsonl")

    def __init__(self, folder: Path | None, iterations: int) -> None:
        """folder: is locked if it exists."""
        self.folder, self.iterations = folder, iterations
        self.early: list[tuple[str, str]] | None = []  # (file, text) until it begins
        self.lock: int | None = None
        if folder and folder.is_dir():
            self.take_lock()

    def take_lock(self) -> None:
        """Lock the folder. Raises UserError if another process has."""
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.folder}: another process is at work on this run") from None
        except OSError:  # a file system without locks
            return

    def close(self) -> None:
        """Unlock the folder."""
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, sizes: dict[str, int] | None = None) -> None:
        """Write from here on: in a new folder; or where a run has got to, if its files had `sizes`.

        What it had more is forgotten: it will be said again. A folder that begins gets the script,
        which will score what it trains. Raises UserError if the folder cannot be made.
        """
        if not self.folder:
            return
        try:
            str(self.folder).encode()
            if self.lock is None:  # the folder was not there
                self.folder.mkdir(parents=True)
                self.take_lock()
            for name in self.files if sizes is not None else ():
                if (self.folder / name).is_file():
                    os.truncate(self.folder / name, min(sizes.get(name, 0), self.sizes()[name]))
            with whole_file(self.folder / SCRIPT.name) as part:
                part.write_bytes(source())
        except FileExistsError:
            raise UserError(f"{self.folder}: another run has made it meanwhile: choose another "
                            "RUN_ID") from None  # fmt: skip
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", "") or "its name is not UTF-8"
            raise UserError(f"OUT_DIR={str(self.folder.parent)!a}: {reason}") from None
        self.start_writing(f"{source().decode()}\n{'=' * 100}\n")

    def start_writing(self, log_head: str = "") -> None:
        """Write what was reported so far, behind `log_head` where the log is new."""
        early, self.early = self.early, None
        if log_head and not self.sizes()["train.log"]:
            self.append("train.log", log_head)
        for name, text in early:
            self.append(name, text)

    def line(self, *texts: str) -> None:
        """Lines on the screen and in train.log."""
        for text in texts if self.folder else ():
            say(text)
            self.append("train.log", text + "\n")

    def event(self, event: Event, *lines: str) -> None:
        """A JSON object in metrics.jsonl, and its lines with the event's values filled in."""
        if not self.folder:
            return
        numbers = {k: v for k, v in event.items() if isinstance(v, float)}
        null = {k: None for k, v in numbers.items() if not math.isfinite(v)}  # JSON has no NaN
        self.append("metrics.jsonl", json.dumps({**event, **null}) + "\n")
        for text in lines:
            self.line(text.format(**event, n=self.iterations, part=part_of_text(event)))

    def append(self, name: str, text: str) -> None:
        """Add to a file, or leave it as it was. Raises RunFailed."""
        if self.early is not None:
            self.early.append((name, text))
            return
        path, before = self.folder / name, self.sizes()[name]
        try:
            with open(path, "ab", buffering=0) as log:
                content = text.encode(errors="backslashreplace")
                if log.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise RunFailed(f"{path}: {error.strerror}") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of its files."""
        paths = {name: self.folder / name for name in self.files}
        return {name: path.stat().st_size if path.is_file() else 0 for name, path in paths.items()}


def part_of_text(event: Event) -> str:
    """A label for scores of less than the whole validation split."""
    whole = event.get("val_whole", True)
    return "" if whole else f" (PART of the text: {event['val_tokens']} tokens)"


def open_report(cfg: Knobs) -> Report:
    """The report of a run that has yet to begin: in a new folder, or with RESUME in its own.

    Raises UserError if the folder exists, or with RESUME does not.
    """
    name = cfg.run_id or time.strftime("%Y%m%d-%H%M%S") + f"-{cfg.seed}-{os.getpid()}"
    folder = Path(cfg.out_dir) / name
    if cfg.resume and not folder.is_dir():
        raise UserError(f"RESUME=1: there is no {folder}: unset RESUME")
    if os.path.lexists(folder) and not cfg.resume:
        raise UserError(f"RUN_ID={name}: {folder} exists and is never overwritten: choose another "
                        "RUN_ID, or go on with RESUME=1")  # fmt: skip
    return Report(folder, cfg.iterations)


def last_record(folder: Path | None, *kinds: str) -> Event:
    """The newest record of these kinds in a run's metrics.jsonl; {} if there is none."""
    found, log = {}, folder and folder / "metrics.jsonl"
    for text in log.read_text().splitlines() if log and log.is_file() else ():
        with contextlib.suppress(ValueError):  # a line that was cut short
            record = json.loads(text)
            found = record if record["event"] in kinds else found
    return found


# What REPORT_TO runs beside a run: it sends what metrics.jsonl gets, until the run ends. So
# the run waits for no network, and whatever the library does cannot end it.
SENDER = """
import importlib, json, math, os, sys, threading, time
library, log, name, at, parent = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
def warn(reason):
    print(f"warning: REPORT_TO={library}: {reason}; sent no more", file=sys.stderr, flush=True)
def end():  # whatever hangs: who reads the run's output waits for it
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(30)
    warn("not done 30 seconds after the run")
    os._exit(1)
threading.Thread(target=end, daemon=True).start()
try:
    os.nice(10)
    config = [r for r in map(json.loads, open(log)) if r["event"] == "config"][-1:]
    more = {"id": name} if library == "wandb" else {}
    run = importlib.import_module(library).init(
        project="train_gpt_mlx_kl", name=name, config=(config or [{}])[0], resume="allow", **more)
    if library == "wandb":
        run.define_metric("*", step_metric="step")  # its own steps may not go back, as in RESUME
    status, step, alive = 1, 0, True
    while alive:
        alive = os.getppid() == parent  # before the last look
        with open(log, "rb") as file:
            file.seek(at)
            whole = file.read().rpartition(b"\\n")[0]
        for event in map(json.loads, whole.splitlines()):
            kind, step = event["event"], event.get("step", event.get("train_steps", step))
            values = {f"{kind}/{k}": v for k, v in event.items()
                      if type(v) in (int, float) and math.isfinite(v)}
            status = int(kind != "final" or event["audit"] == "fail")
            if kind in ("train", "val", "export", "eval", "final"):
                run.log({**values, "step": step}) if more else run.log(values, step=step)
        at += len(whole) + bool(whole)
        time.sleep(0.5 * alive)
    run.finish(**({"exit_code": status} if more else {}))
except BaseException as error:
    warn(" ".join(f"{type(error).__name__}: {error}".split())[:300])
"""


def check_report_to(library: str) -> None:
    """Raises UserError if it is not installed; a folder of its name, as wandb makes, is not it."""
    found = library == "none" or importlib.util.find_spec(library)
    if not getattr(found, "origin", found):
        raise UserError(f"REPORT_TO={library}: pip install {library}")


def follow(library: str, folder: Path | None) -> None:
    """Start what sends the run's numbers to a library, once for the process and what it becomes."""
    me, log = str(os.getpid()), folder and folder / "metrics.jsonl"
    if library == "none" or not log or os.environ.get("REPORT_SENDER") == me:
        return
    os.environ["REPORT_SENDER"] = me
    first = log.read_bytes().partition(b"\n")[0]  # like no other run's
    name = f"{folder.name}-{hashlib.sha256(first).hexdigest()[:8]}"
    command = [sys.executable, "-c", SENDER, library, str(log), name, str(log.stat().st_size), me]
    env = {"WANDB_SILENT": "true", "WANDB_DIR": str(folder), **os.environ}
    with contextlib.suppress(OSError):  # no room for another process
        subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=2,
                         start_new_session=True)  # fmt: skip


def show_progress(label: str, every_s: float = 10.0, unit: str = "tokens") -> Progress:
    """Shows how far a work is: on a terminal in one live line, else by a line now and then.

    The time that is left is told by the pace since the first call, which comes after what is
    compiled or allocated at the start.
    """
    begin: list[float] = []  # when the first part was done, and how much that was
    due = time.perf_counter() + every_s / 2

    def show(done: int, total: int, note: str) -> None:
        nonlocal due
        now = time.perf_counter()
        if not begin:
            begin.extend((now, done))
        elif sys.stdout.isatty() and importlib.util.find_spec("tqdm"):
            show_live(label, done, total, note)
        elif now > due and done > begin[1]:
            due, left = now + every_s, (now - begin[0]) * (total - done) / (done - begin[1])
            say(f"{label}: {done}/{total} {unit}, {note}{left:.0f} s left")

    return show


def show_live(label: str, done: int, total: int, note: str) -> None:
    """Move the terminal's live line, which ends when all is done."""
    from tqdm import tqdm

    if LIVE and LIVE[0].desc != label:
        LIVE.pop().close()
    if not LIVE:
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        LIVE.append(tqdm(total=total, desc=label, leave=False, dynamic_ncols=True, bar_format=form,
                         initial=done, file=sys.stdout))  # fmt: skip
    LIVE[0].set_postfix_str(note.rstrip(", "), refresh=False)
    LIVE[0].update(done - LIVE[0].n)
    if done >= total:
        end_live()


def end_live() -> None:
    """Take the live line away."""
    while LIVE:
        LIVE.pop().close()


# ==================================================================================================
# CONTEXT FEATURES: the tokens before a position, cut at the document's start, and their hashes
# ==================================================================================================


def document_context(x: Array, bos: int, depth: int) -> list[Array]:
    """The inputs at distance 0 .. depth-1 before each position: depth arrays (B, T) int32.

    What lies before the document's BOS, or before the window, reads as BOS.
    """
    fill, length = max(bos, 0), x.shape[1]
    document, context = mx.cumsum(x == bos, axis=1), [x]
    for k in range(1, depth):
        before = mx.pad(x, [(0, 0), (k, 0)])[:, :length]
        of = mx.pad(document, [(0, 0), (k, 0)], constant_values=-1)[:, :length]
        context.append(mx.where(of == document, before, fill))
    return context


def hash_context(tokens: list[Array], size: int, order: int, head: int) -> Array:
    """Row of a hash table for each context. len(tokens) arrays (B, T) -> (B, T) uint32 < size.

    uint32 multiply-xor-shift; each (order, head) has its own odd multiplier, so that heads collide
    independently. The reduction takes any size up to 65,536.
    """
    multiplier = mx.array((0x9E3779B1 * (32 * order + 2 * head + 1)) & 0xFFFFFFFF, mx.uint32)
    h = mx.zeros(tokens[0].shape, mx.uint32) + multiplier
    for token in tokens:
        h = (h ^ token.astype(mx.uint32)) * multiplier
        h = h ^ (h >> 15)
    return ((h >> 16) * mx.array(size, mx.uint32)) >> 16


# ==================================================================================================
# CPU KERNELS: MLX's CPU exp() and tanh() cost 10 to 15 ns an element in one thread; sums and
# products, compiled together over contiguous arrays, cost 0.2. GPUs take MLX's own kernels.
# ==================================================================================================

MASKED = -1e6  # a score whose exponential is exactly 0


def whole_library(path: Path) -> bool:
    """Whether an ELF64 file is as long as it says: its table of sections comes last."""
    raw = path.read_bytes()
    if raw[:4] != b"\x7fELF" or len(raw) < 64:
        return False
    (table,), (size, count) = struct.unpack_from("<Q", raw, 40), struct.unpack_from("<HH", raw, 58)
    return table + size * count <= len(raw)


def compiler_fault() -> str:
    """Why MLX cannot compile kernels for a CPU here; '' if it can.

    A library that was cut short when it was written would fail for ever: it is removed.
    """
    if sys.platform == "darwin" or not FOR_CPU:
        return ""
    if os.system("g++ --version > /dev/null 2>&1"):  # as MLX asks
        return "no g++ that works: install it"
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    folder = next((os.environ[name] for name in names if os.environ.get(name)), "/tmp")
    with contextlib.suppress(OSError):
        for path in (Path(folder) / "mlx" / mx.__version__ / "cpu").glob("*.so"):
            if not whole_library(path) and time.time() - path.stat().st_mtime > 60:  # nobody writes
                path.unlink()
                say(f"{path} was cut short: it is compiled anew")
    try:
        with mx.stream(mx.cpu):
            mx.eval(mx.compile(lambda x: 3 * x + 1)(mx.ones(3)))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return f"{reason}: set TMPDIR to a folder of your own that may hold programs"
    return ""


if COMPILER_FAULT := compiler_fault():
    mx.disable_compile()
compiled = mx.compile


untraced_work = functools.cache(own_thread)  # a thread that never traces a gradient


def untraced(build: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run where no gradient is traced: there MLX does not fuse compiled kernels.

    For the halves of functions with a gradient of their own, which nobody differentiates again.
    """

    @functools.wraps(build)
    def call(*args: Any) -> Any:
        done, stream = Future(), mx.default_stream(mx.default_device())

        def work() -> Any:
            with mx.stream(stream):
                return build(*args)

        untraced_work().put((done, work))
        return done.result()

    return call


def with_gradient(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the gradient `backward(inputs, output cotangents, outputs)`."""
    function = mx.custom_function(untraced(forward))
    function.vjp(untraced(backward))
    return function


# Two stages each: MLX fuses at most 11 operations in a row, and a cut elsewhere costs a copy.
@compiled
def half_exp_root(x: Array) -> Array:
    """exp(x / 256) / 2, by its Taylor series."""
    y = x * (1 / 256)
    return 0.5 + y * (0.5 + y * (1 / 4 + y * (1 / 12 + y * (1 / 48 + y * (1 / 240)))))


@compiled
def power_256(half: Array) -> Array:
    """(2 * max(half, 0)) ** 256."""
    p = half + mx.abs(half)
    for _ in range(8):
        p = p * p
    return p


def fast_exp(x: Array) -> Array:
    """exp(x): relative error 5e-5 for |x| < 50, 1e-3 for |x| < 80; 0 far below."""
    return power_256(half_exp_root(x))


@compiled
def clamp_5(x: Array) -> Array:
    """x between -4.9 and 4.9, without a comparison."""
    return 0.5 * (mx.abs(x + 4.9) - mx.abs(x - 4.9))


@compiled
def lambert(x: Array) -> Array:
    """Lambert's continued fraction of tanh(x), for |x| < 5."""
    u = x * x
    top = x * (135135 + u * (17325 + u * (378 + u)))
    return top / (135135 + u * (62370 + u * (3150 + u * 28)))


def fast_tanh(x: Array) -> Array:
    """tanh(x): absolute error 1e-6 for |x| < 1.5, 2e-4 anywhere; bounded by 1."""
    return lambert(clamp_5(x))


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Four blocks of queries: block [a, b) needs the keys before b only, 5/8 of the whole."""
    size = max(math.ceil(length / 4), 32)
    return [(a, min(a + size, length)) for a in range(0, length, size)]


@functools.cache
def future_mask(a: int, b: int, group: int) -> Array:
    """What to add to the scores of queries a..b, for each of a group of heads: (G*(b-a), b)."""
    future = np.arange(b)[None, :] > np.arange(a, b)[:, None]
    return mx.array(np.tile(future * np.float32(MASKED), (group, 1)))


def fold(x: Array, a: int, b: int) -> Array:
    """Queries a..b of each group of heads as rows: (B, Hkv, G, T, d) -> (B, Hkv, G*(b-a), d)."""
    return x[..., a:b, :].reshape(*x.shape[:2], -1, x.shape[-1])


def attention_forward(q: Array, k: Array, v: Array) -> list[Array]:
    """Causal attention. q (B, Hkv, G, T, d), scaled; k, v (B, Hkv, T, d).

    Returns [out (B, Hkv, G, T, d), then for each query block its exponentials and their sums].
    Scores need no maximum taken off: normalised queries and keys bound them (see SCORE_LIMIT).
    """
    group, length = q.shape[2], q.shape[3]
    outs, saved = [], []
    for a, b in query_blocks(length):
        mask = future_mask(a, b, group)
        e = fast_exp(mx.addmm(mask, fold(q, a, b), k[:, :, :b].swapaxes(-1, -2)))
        z = mx.sum(e, axis=-1, keepdims=True)
        outs.append(((e @ v[:, :, :b]) / z).reshape(*q.shape[:3], b - a, -1))
        saved += [e, z]
    return [mx.concatenate(outs, axis=3), *saved]


def attention_backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[Array, ...]:
    """Gradients by q, k, v: with p = e / z, d_score = p * (d_p - sum(d_out * out))."""
    (q, k, v), d_out, out = primals, cotangents[0], outputs[0]
    blocks, d_q, d_k, d_v = query_blocks(q.shape[3]), [], [], []
    for i, (a, b) in enumerate(blocks):
        e, z = outputs[1 + 2 * i], outputs[2 + 2 * i]
        d_o = fold(d_out, a, b) / z
        delta = mx.sum(d_o * fold(out, a, b), axis=-1, keepdims=True)
        d_s = e * mx.addmm(-delta, d_o, v[:, :, :b].swapaxes(-1, -2))
        d_q.append((d_s @ k[:, :, :b]).reshape(*q.shape[:3], b - a, -1))
        d_k.append(d_s.swapaxes(-1, -2) @ fold(q, a, b))
        d_v.append(e.swapaxes(-1, -2) @ d_o)

    def add_up(parts: list[Array]) -> Array:  # part i is of the keys before the end of block i
        rows = [sum(part[:, :, a:b] for part in parts[i:]) for i, (a, b) in enumerate(blocks)]
        return mx.concatenate(rows, axis=2)

    return mx.concatenate(d_q, axis=3), add_up(d_k), add_up(d_v)


cpu_attention = with_gradient(attention_forward, attention_backward)


@compiled
def complex_product(x: Array, y: Array) -> Array:
    """x * y; compiled, because MLX's own is eight times slower."""
    return x * y


def rotate_forward(x: Array, turns: Array) -> Array:
    """x (B, T, H, d), whose neighbours are complex numbers, times turns (T, 1, d/2)."""
    return complex_product(x.view(mx.complex64), turns).view(mx.float32)


def rotate_backward(primals: Any, d_out: Array, _: Array) -> tuple[Array, Array]:
    """The gradient by x turns back."""
    turns = primals[1]
    return rotate_forward(d_out, mx.conjugate(turns)), mx.zeros_like(turns)


cpu_rotate = with_gradient(rotate_forward, rotate_backward)


@functools.cache
def rope_turns(length: int, width: int, dims: int, base: float) -> Array:
    """exp(i t / base^(2j / dims)) of pair j at position t, 1 beyond dims / 2: (T, 1, width / 2)."""
    angle, pairs = np.zeros((length, 1, width // 2)), np.arange(dims // 2)
    angle[:, 0, : dims // 2] = np.arange(length)[:, None] / base ** (2 * pairs / dims)
    return mx.array(np.exp(1j * angle).astype(np.complex64))


@compiled
def through_cap(gradient: Array, t: Array) -> Array:
    """Chain rule of the soft cap: gradient * (1 - t^2)."""
    return gradient - gradient * t * t


@functools.cache
def cpu_cross_entropy(cap: float) -> Callable[..., list[Array]]:
    """Cross-entropy head with a soft cap and its own gradient.

    The function takes f (n, K), weight (V, K), bias (n, V) or (1, 1) zero, y (n,) int32; returns
    [nll (n,) in nats, t (n, V), e (n, V), z (n, 1)]: softmax is e / z, with no maximum taken off,
    because the cap bounds the logits.
    """

    def forward(f: Array, weight: Array, bias: Array, y: Array) -> list[Array]:
        f, bias = f * (1 / cap), bias * (1 / cap)
        t = fast_tanh(f @ weight.T if bias.size == 1 else mx.addmm(bias, f, weight.T))
        e = fast_exp(t * cap)
        z = mx.sum(e, axis=-1, keepdims=True)
        picked = mx.take_along_axis(t, y[:, None], axis=-1) * cap
        return [(mx.log(z) - picked)[:, 0], t, e, z]

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[Array, ...]:
        (f, weight, bias, y), (_, t, e, z) = primals, outputs
        row, at = cotangents[0][:, None] / z, y[:, None]  # a row's factor, cheaper on (n, K)
        d = mx.put_along_axis(e, at, mx.take_along_axis(e, at, axis=-1) - z, axis=-1)
        d = through_cap(d, t)
        d_bias = d * row if bias.shape == d.shape else mx.zeros_like(bias)
        return (d @ weight) * row, d.T @ (f * row), d_bias, mx.zeros_like(y)

    return with_gradient(forward, backward)


# ==================================================================================================
# MODEL: the public baseline's GPT, with hashed contexts added to its logits
# ==================================================================================================

RMS_EPS = 1e-6
CONTEXT_TOKENS = 5  # at a position, itself among them, that embeddings and hashes look at
Caches = list[list[Array]]


def rms_norm(x: Array) -> Array:
    """x / sqrt(mean(x^2)) over the last axis, without a weight."""
    return mx.fast.rms_norm(x, None, RMS_EPS)


def init_matrix(rows: int, columns: int, rng: Any, orthogonal: bool) -> Array:
    """(rows, columns) float32: orthogonal, or uniform with the same spread as nn.Linear's."""
    if orthogonal:
        q = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
        return mx.array((q if rows >= columns else q.T).astype(np.float32))
    bound = 1 / math.sqrt(columns)
    return mx.array(rng.uniform(-bound, bound, (rows, columns)).astype(np.float32))


def row_sum(x: Array) -> Array:
    """Sum over the last axis in float32, (..., d) -> (..., 1): Metal adds bfloat16 in bfloat16."""
    return mx.sum(x.astype(mx.float32), axis=-1, keepdims=True)


@mx.custom_function
def narrow_scaled(x: Array, gain: Array) -> Array:
    """See `scaled`."""
    return x * gain.astype(x.dtype)


@narrow_scaled.vjp
def narrow_scaled_vjp(primals: Any, d: Array, _: Array) -> tuple[Array, Array]:
    """The gradient by x in its own precision; the one by a gain, a long sum, in float32."""
    x, gain = primals
    wide = (d * x).astype(mx.float32)
    first = wide.ndim - gain.ndim
    axes = [i for i in range(wide.ndim) if i < first or gain.shape[i - first] == 1]
    return d * gain.astype(x.dtype), mx.sum(wide, axis=axes).reshape(gain.shape)


def scaled(x: Array, gain: Array) -> Array:
    """x (..., D) times gain, float32, which broadcasts; in x's precision."""
    return x * gain if x.dtype == mx.float32 else narrow_scaled(x, gain)


class Linear(nn.Module):
    """x (..., columns) -> (..., rows), times `gain` (rows,); weights are cast to x's dtype."""

    def __init__(self, weight: Array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, x: Array, gain: Array | None = None) -> Array:
        # On the weight a gain costs less than on the output.
        weight = self.weight if gain is None else self.weight * gain[:, None]
        return x @ weight.astype(x.dtype).T


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys and partial RoPE.

    With `xsa` the output drops its projection on the position's own value vector
    (exclusive self-attention, openai/parameter-golf PR 287).
    """

    def __init__(self, cfg: Knobs, rng: Any, xsa: bool) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads
        self.head_dim, self.xsa = d // cfg.num_heads, xsa
        self.rope_dims, self.rope_base = cfg.rope_dims or self.head_dim, cfg.rope_base
        kv = self.head_dim * self.kv_heads
        self.c_q = Linear(init_matrix(d, d, rng, cfg.use_ortho_init))
        self.c_k = Linear(init_matrix(kv, d, rng, cfg.use_ortho_init))
        self.c_v = Linear(init_matrix(kv, d, rng, cfg.use_ortho_init))
        self.proj = Linear(mx.zeros((d, d)))
        self.q_gain = mx.full((self.heads,), cfg.qk_gain_init)

    def __call__(self, x: Array, gain: Array, training: bool, cache: list[Array] | None) -> Array:
        """(B, T, D) -> (B, T, D), times gain (D,); cache: see `GPT.logits`."""
        batch, length, _ = x.shape

        def split(y: Array, heads: int) -> Array:
            return y.reshape(batch, length, heads, self.head_dim)

        most = SCORE_LIMIT / self.head_dim**0.5
        q_gain = mx.clip(self.q_gain, -most, most)
        rope = self.rope_dims, self.rope_base, cache[0].shape[2] if cache else 0
        q = scaled(rotary(rms_norm(split(self.c_q(x), self.heads)), *rope), q_gain[:, None, None])
        k = rotary(rms_norm(split(self.c_k(x), self.kv_heads)), *rope)
        v = split(self.c_v(x), self.kv_heads).transpose(0, 2, 1, 3)
        if cache is None:
            y = causal_attention(q, k, v, self.head_dim**-0.5, training)
        else:
            more = zip(cache, (k, v), strict=False)
            cache[:] = [mx.concatenate(pair, axis=2) for pair in more] or [k, v]
            y = mx.fast.scaled_dot_product_attention(
                q, *cache, scale=self.head_dim**-0.5, mask="causal"
            )
        if self.xsa:
            own = mx.repeat(v, self.heads // self.kv_heads, axis=1)
            own = own * mx.rsqrt(row_sum(own * own) + 1e-6).astype(x.dtype)
            y = y - row_sum(y * own).astype(x.dtype) * own
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, length, -1), gain)


def rotary(x: Array, dims: int, base: float, first: int = 0) -> Array:
    """RoPE on the first `dims` of d, neighbours in pairs: (B, T, H, d) -> (B, H, T, d).

    first: position of the first one. MLX's kernel, or on a CPU a complex product from 0 on.
    """
    if on_cpu() and not first:
        return cpu_rotate(x, rope_turns(x.shape[1], x.shape[3], dims, base)).transpose(0, 2, 1, 3)
    x = x.transpose(0, 2, 1, 3)
    return mx.fast.rope(x, dims, traditional=True, base=base, scale=1.0, offset=first)


def causal_attention(q: Array, k: Array, v: Array, scale: float, training: bool) -> Array:
    """q (B, H, T, d); k, v (B, Hkv, T, d) -> (B, H, T, d): MLX's kernel, or the CPU's.

    Where a gradient is wanted Metal has no kernel, and keeps all T x T scores: less in blocks.
    """
    if not on_cpu():
        whole = [(0, q.shape[2])]
        parts = [
            mx.fast.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, :b], v[:, :, :b], scale=scale, mask="causal"
            )
            for a, b in (query_blocks(q.shape[2]) if training and on_metal() else whole)
        ]
        return mx.concatenate(parts, axis=2)
    grouped = (q * scale).reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    k, v = mx.contiguous(k), mx.contiguous(v)
    return cpu_attention(grouped, k, v)[0].reshape(q.shape)


class MLP(nn.Module):
    """Two matrices around a squared (leaky) ReLU (openai/parameter-golf PR 535 for the leak)."""

    def __init__(self, cfg: Knobs, rng: Any) -> None:
        super().__init__()
        hidden = cfg.model_dim * cfg.mlp_mult
        self.fc = Linear(init_matrix(hidden, cfg.model_dim, rng, cfg.use_ortho_init))
        self.proj = Linear(mx.zeros((cfg.model_dim, hidden)))
        self.leak = cfg.mlp_leak

    def __call__(self, x: Array, gain: Array) -> Array:
        """(B, T, D) -> (B, T, D), times gain (D,)."""
        h = self.fc(x)
        h = mx.maximum(h, self.leak * h)
        return self.proj(h * h, gain)


class Block(nn.Module):
    """Mix in the embedding, then attention and MLP, each on an RMS norm of the stream.

    LN scale: block i's norms are multiplied by 1/sqrt(i + 1). Attention without its normalised
    queries and keys is linear in that factor and the MLP quadratic, so it is applied to their
    outputs, where it costs nothing.
    """

    def __init__(self, cfg: Knobs, rng: Any, index: int) -> None:
        super().__init__()
        self.attn = Attention(cfg, rng, xsa=index >= cfg.num_layers - cfg.xsa_last_n)
        self.mlp = MLP(cfg, rng)
        self.attn_scale = mx.ones((cfg.model_dim,))
        self.mlp_scale = mx.ones((cfg.model_dim,))
        self.resid_mix = mx.stack([mx.ones((cfg.model_dim,)), mx.zeros((cfg.model_dim,))])
        self.depth_scale = 1 / math.sqrt(index + 1) if cfg.ln_scale_enabled else 1.0

    def __call__(self, x: Array, x0: Array, training: bool, cache: list[Array] | None) -> Array:
        """x, x0 (B, T, D) -> (B, T, D); x0 is the embedding."""
        x = scaled(x, self.resid_mix[0]) + scaled(x0, self.resid_mix[1])
        x = x + self.attn(rms_norm(x), self.attn_scale * self.depth_scale, training, cache)
        return x + self.mlp(rms_norm(x), self.mlp_scale * self.depth_scale**2)


class EngramLite(nn.Module):
    """Gated multi-head hashed bigram and trigram embedding (after openai/parameter-golf PR 1089).

    Keys (t-2, t-1) and (t-3, t-2, t-1); the heads of an order are averaged, the orders summed with
    one learned gate each. The gates start nearly shut, so that rows enter once they mean something.
    The narrow embedding is projected to the vocabulary by `proj` inside the head's matrix product.
    """

    def __init__(self, cfg: Knobs, vocab: int, rng: Any) -> None:
        super().__init__()
        self.size, self.heads = cfg.engram_hash_size, cfg.engram_n_heads
        rows, columns = 2 * self.heads * self.size, cfg.engram_embed_dim
        self.tables = mx.array(rng.standard_normal((rows, columns)).astype(np.float32))
        self.proj = mx.zeros((vocab, columns))
        self.gates = mx.array([-2.0, -3.0])

    def __call__(self, context: list[Array]) -> Array:
        """[t-1, t-2, t-3], each (B, T) -> (B, T, E)."""
        rows = []
        for i, (order, head) in enumerate(itertools.product((2, 3), range(self.heads))):
            row = hash_context(context[order - 1 :: -1], self.size, order, head)
            rows.append(row + i * self.size)
        e = self.tables[mx.stack(rows, axis=-1)]
        gates = mx.repeat(mx.sigmoid(self.gates) / self.heads, self.heads)
        return gates @ e if on_cpu() else mx.sum(gates[:, None] * e, axis=-2)


class LogitHash(nn.Module):
    """Hash tables straight to the vocabulary: BigramHash (one key) and SkipGram (two, gated)."""

    def __init__(self, size: int, vocab: int, keys: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.size, self.distances = size, keys
        self.table = mx.zeros((size, vocab))
        self.gates = mx.zeros((len(keys),))

    def __call__(self, context: list[Array]) -> Array:
        """Context by distance from the predicted token less 1 -> (B, T, V)."""
        out = 0
        for i, key in enumerate(self.distances):
            row = hash_context([context[k - 1] for k in key], self.size, 4 + len(self.distances), i)
            out = out + 2 * mx.sigmoid(self.gates[i]) * self.table[row]
        return out


class GPT(nn.Module):
    """The public baseline's GPT: U-net skips, tied embedding, soft-capped logits, plus hashes."""

    def __init__(self, cfg: Knobs, vocab: int, bos: int) -> None:
        super().__init__()
        rng = np.random.default_rng(cfg.seed)
        d, self.bos = cfg.model_dim, bos
        self.cap, self.chunk = cfg.logit_softcap, cfg.logit_chunk_tokens
        self.dtype = getattr(mx, compute_dtype(cfg))
        std = cfg.tied_embed_init_std
        self.tok_emb = mx.array((rng.standard_normal((vocab, d)) * std).astype(np.float32))
        self.blocks = [Block(cfg, rng, i) for i in range(cfg.num_layers)]
        self.skips = mx.ones((cfg.num_layers // 2, d))
        if cfg.use_smeargate:
            self.smear_gate = mx.full((d,), -2.0)
        if cfg.engram_lite_enabled and cfg.engram_hash_size:
            self.engram = EngramLite(cfg, vocab, rng)
        if not cfg.engram_lite_enabled and cfg.bigram_hash_size:
            self.bigram = LogitHash(cfg.bigram_hash_size, vocab, ((2, 1),))
        if cfg.skipgram_hash_size:
            self.skipgram = LogitHash(cfg.skipgram_hash_size, vocab, ((3, 1), (5, 1)))

    def embed(self, context: list[Array]) -> Array:
        """Normalised embedding, each blended with the one before in its document: (B, T, D)."""
        x = self.tok_emb[context[0]].astype(self.dtype)
        if "smear_gate" in self:
            inside = (context[0] != self.bos)[..., None].astype(x.dtype)
            before = mx.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1] * inside
            x = x + scaled(before, mx.sigmoid(self.smear_gate))
        return rms_norm(x)

    def trunk(self, x: Array, training: bool, caches: Caches | None = None) -> Array:
        """Embedding (B, T, D) -> features for the head (B, T, D)."""
        x0, half, kept = x, len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half and kept:
                x = x + scaled(kept.pop(), self.skips[i - half])
            x = block(x, x0, training, None if caches is None else caches[i])
            if i < half:
                kept.append(x)
        return rms_norm(x)

    def head_inputs(
        self, x: Array, last: int, training: bool = False, caches: Caches | None = None,
        seen: int = 0,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Inputs (B, T) -> (f (B*last, K), weight (V, K), bias (B*last, V) or (1, 1)).

        The uncapped logits of the last positions are f @ weight.T + bias.
        """
        context = document_context(x, self.bos, CONTEXT_TOKENS)
        h = self.trunk(self.embed(context)[:, seen:], training, caches)[:, -last:]
        recent = [c[:, -last:] for c in context]
        f, weight, bias = [h], [self.tok_emb], mx.zeros((1, 1))
        if "engram" in self:
            f.append(self.engram(recent).astype(h.dtype))
            weight.append(self.engram.proj)
        for name in ("bigram", "skipgram"):
            if name in self:
                bias = bias + self[name](recent).reshape(-1, self.tok_emb.shape[0])
        f = mx.concatenate(f, axis=-1)
        w = mx.concatenate(weight, axis=-1).astype(h.dtype)
        return f.reshape(-1, f.shape[-1]), w, bias.astype(h.dtype)

    def nll(self, x: Array, y: Array) -> Array:
        """Inputs and targets (B, T) -> cross-entropy of each target, (B, T) float32 nats."""
        f, weight, bias = self.head_inputs(x, x.shape[1], training=True)
        flat, parts = y.reshape(-1), []
        size = self.chunk or f.shape[0]
        for a in range(0, f.shape[0], size):
            part = bias if bias.shape[0] == 1 else bias[a : a + size]
            parts.append(self.chunk_nll(f[a : a + size], weight, part, flat[a : a + size]))
        return mx.concatenate(parts).reshape(y.shape)

    def chunk_nll(self, f: Array, weight: Array, bias: Array, y: Array) -> Array:
        """Cross-entropy of a piece of the head: (n,) float32 nats."""
        if on_cpu():
            return cpu_cross_entropy(self.cap)(f, weight, bias, y)[0]
        logits = (f @ weight.T + bias).astype(mx.float32)
        return nn.losses.cross_entropy(self.cap * mx.tanh(logits / self.cap), y)

    def logits(self, x: Array, last: int, caches: Caches | None = None, seen: int = 0) -> Array:
        """Inputs (B, T) -> soft-capped logits after the last positions: (B, last, V) float32.

        Scores are made of these: the head takes MLX's exact functions in float32 on every device.
        caches: a list per block, at first empty, of its keys and values (B, Hkv, n, d) of the
        window so far, which grow; x then starts with the last `seen` inputs that they know.
        """
        f, weight, bias = self.head_inputs(x, last, False, caches, seen)
        f, weight, bias = (a.astype(mx.float32) for a in (f, weight, bias))
        logits = self.cap * mx.tanh((f @ weight.T + bias) / self.cap)
        return logits.reshape(x.shape[0], last, -1)


def least_parameters(cfg: Knobs, vocab: int) -> int:
    """Numbers in the large tensors of a GPT with these settings."""
    width, rows = cfg.model_dim, cfg.engram_hash_size
    blocks = cfg.num_layers * width**2 * (2 + 2 * cfg.mlp_mult)
    tables = 2 * cfg.engram_n_heads * rows * cfg.engram_embed_dim
    if not cfg.engram_lite_enabled:
        tables = cfg.bigram_hash_size * vocab
    return vocab * (width + cfg.skipgram_hash_size) + blocks + tables


# ==================================================================================================
# OPTIMIZERS: one table says, for every parameter, who updates it, how fast, and how it is stored
# ==================================================================================================


@dataclass(frozen=True)
class Group:
    """A row of the table: parameters by full-match pattern; knobs by field name; '' is none."""

    name: str
    pattern: str
    optimizer: str
    lr: str
    decay: str
    bits: str


GROUPS = (
    Group("matrices", r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(fc|proj))\.weight",
          "muon", "matrix_lr", "muon_weight_decay", "weight_bits"),
    Group("embedding", r"tok_emb", "adam", "tied_embed_lr", "adam_weight_decay", "embed_bits"),
    Group("tables", r"engram\.tables|(bigram|skipgram)\.table",
          "adam", "hash_lr", "adam_weight_decay", "weight_bits"),
    Group("hash_proj", r"engram\.proj", "adam", "hash_proj_lr", "", "embed_bits"),
    Group("scalars", r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)|skips|smear_gate"
          r"|\w+\.gates", "adam", "scalar_lr", "", ""),
)  # fmt: skip


def group_parameters(names: list[str]) -> dict[str, Group]:
    """Find the group of each parameter; an error unless each name is in exactly one."""
    found = {n: [g for g in GROUPS if re.fullmatch(g.pattern, n)] for n in names}
    wrong = {n: [g.name for g in groups] for n, groups in found.items() if len(groups) != 1}
    if wrong:
        raise AssertionError(f"parameters that are not in exactly one optimizer group: {wrong}")
    return {n: groups[0] for n, groups in found.items()}


def orthogonalise(g: Array, steps: int) -> Array:
    """Bring all singular values near 1 by Newton-Schulz: (n, rows, columns) -> the same shape.

    Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/), in float32: bfloat16
    gives NaNs on some backends.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.astype(mx.float32)
    x = x.swapaxes(-1, -2) if tall else x
    x = x / (mx.sqrt(mx.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(steps):
        s = x @ x.swapaxes(-1, -2)
        x = mx.addmm(x, mx.addmm(s, s, s, alpha=c, beta=b), x, beta=a)
    return x.swapaxes(-1, -2) if tall else x


def muon(g: Array, buffer: Array, lr: Array, momentum: Array, steps: int) -> tuple[Array, Array]:
    """Muon on stacked gradients (n, rows, columns): (what to take off the matrices, new buffer).

    Nesterov momentum, then orthogonalisation, scaled by sqrt(max(1, rows / columns)).
    """
    buffer = momentum * buffer + g
    update = orthogonalise(g + momentum * buffer, steps)
    return (lr * math.sqrt(max(1.0, g.shape[-2] / g.shape[-1]))) * update, buffer


@compiled
def adam_moments(g: Array, m: Array, v: Array, b1: Array, b2: Array) -> list:
    """Decay the two moments and add the part of the gradient; g, m and v have one shape."""
    return [m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)]


@compiled
def adam_move(p: Array, m: Array, s: Array, rate: Array, shrink: Array, eps: Array) -> Array:
    """Move the parameters p: m and s = sqrt(v) are not bias-corrected, rate and eps are."""
    return p * shrink - rate * m / (s + eps)


def adam(
    p: Array, g: Array, m: Array, v: Array, lr: Array, step: Array, cfg: Knobs, decay: float
) -> tuple[Array, Array, Array]:
    """One Adam update with bias correction and decoupled decay: (new p, new m, new v)."""
    b1 = mx.array(cfg.beta1)
    b2 = mx.array(cfg.beta2)
    m, v = adam_moments(g, m, v, b1, b2)
    c1 = 1 - b1**step
    c2 = mx.sqrt(1 - b2**step)
    return adam_move(p, m, mx.sqrt(v), lr * c2 / c1, 1 - lr * decay, cfg.adam_eps * c2), m, v


def new_optimizer_state(params: Arrays, groups: dict[str, Group]) -> Arrays:
    """Make zeroed moments, under the names KIND/PARAMETER."""
    kinds = {"muon": ("buffer",), "adam": ("m", "v")}
    return {
        f"{kind}/{name}": mx.zeros_like(p)
        for name, p in params.items()
        for kind in kinds[groups[name].optimizer]
    }


def apply_gradients(
    params: Arrays, grads: Arrays, opt: Arrays, hyper: Arrays, groups: dict[str, Group], cfg: Knobs
) -> tuple[Arrays, Arrays]:
    """Move the parameters that have gradients: (their new values, their new optimizer state).

    hyper: scalar arrays `lr_factor` (on every learning rate), `momentum` (Muon's) and `step`
    (counted from 1). Muon matrices of one group and shape are stacked.
    """
    new, state, stacks = {}, {}, {}
    for name in grads:
        group = groups[name]
        stack = params[name].shape if group.optimizer == "muon" else name
        stacks.setdefault((group, stack), []).append(name)
    for (group, name), same in stacks.items():
        lr = hyper["lr_factor"] * getattr(cfg, group.lr)
        decay = getattr(cfg, group.decay) if group.decay else 0.0
        if group.optimizer == "adam":
            m, v = opt[f"m/{name}"], opt[f"v/{name}"]
            p, m, v = adam(params[name], grads[name], m, v, lr, hyper["step"], cfg, decay)
            new[name], state[f"m/{name}"], state[f"v/{name}"] = p, m, v
            continue
        g = mx.stack([grads[n] for n in same])
        b = mx.stack([opt[f"buffer/{n}"] for n in same])
        u, b = muon(g, b, lr, hyper["momentum"], cfg.muon_backend_steps)
        new |= {n: params[n] * (1 - lr * decay) - u[i] for i, n in enumerate(same)}
        state |= {f"buffer/{n}": b[i] for i, n in enumerate(same)}
    return new, state


# ==================================================================================================
# ARTIFACT: magic, version, checksum; then, compressed by brotli: JSON header, raw tensors
# ==================================================================================================

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MAGIC, FORMAT_VERSION = b"MLXGOLF1", 14
# Magic, version, SHA-256 of the version and the rest, bytes of the compressed model.
PREFIX = struct.Struct("<8sH32sQ")
LZMA_MAGIC = b"\xfd7zXZ\0"  # no brotli stream of ours begins so
# Bytes a value after compression, for rows of Gaussian noise (measured, brotli 11).
NOISE_BYTES = {4: 0.445, 5: 0.56, 6: 0.68, 7: 0.80, 8: 0.925}


def quantise_rows(w: Array, bits: int, search: bool) -> tuple[Array, Array]:
    """Symmetric codes with one scale a row: (rows, columns) -> (codes, scale (rows, 1)), float32.

    The clip is the candidate fraction of the row's largest magnitude with the least squared error.
    Scales are rounded to bfloat16 (they are stored so) before the codes are computed: it has
    float32's range, so no row is too small.
    """
    limit = 2 ** (bits - 1) - 1
    top = mx.max(mx.abs(w), axis=1, keepdims=True) / limit

    def codes_at(ratio: Array) -> tuple[Array, Array]:
        scale = (top * ratio).astype(mx.bfloat16).astype(mx.float32)
        return mx.clip(mx.round(w / mx.where(scale > 0, scale, 1.0)), -limit, limit), scale

    best, least = mx.ones(top.shape), mx.full(top.shape, math.inf)
    for ratio in CLIP_RATIOS if search else ():
        codes, scale = codes_at(mx.array(ratio))
        error = mx.sum((codes * scale - w) ** 2, axis=1, keepdims=True)
        best, least = mx.where(error < least, ratio, best), mx.minimum(error, least)
    return codes_at(best)


def fake_quantise(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> Arrays:
    """The parameters as the artifact will hold them; gradients pass straight through."""
    out = dict(params)
    for name, p in params.items():
        if bits := groups[name].bits:
            frozen = mx.stop_gradient(p)
            codes, scale = quantise_rows(frozen, getattr(cfg, bits), cfg.use_gptq_lite)
            out[name] = p + (codes * scale - frozen)
    return out


def compress(raw: bytes) -> tuple[bytes, str]:
    """(the bytes compressed, by what): brotli, or the larger lzma where brotli is not installed.

    On int8 rows brotli takes 0.9 % fewer bytes than zstd 22, and 1.1 % fewer than xz -9e.
    """
    try:
        import brotli
    except ImportError:
        return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME), "lzma: pip install brotli"
    return brotli.compress(raw, quality=11, lgwin=24), "brotli"


MODEL_MOST = 1 << 29  # bytes that the compressed model may become


def decompress(path: Path, model: bytes) -> bytes:
    """The inverse of `compress`. Raises UserError where the file needs a missing package."""
    if model.startswith(LZMA_MAGIC):
        return lzma.LZMADecompressor(memlimit=1 << 30).decompress(model, MODEL_MOST)
    try:
        import brotli
    except ImportError:
        raise UserError(f"{path}: compressed by brotli: pip install brotli") from None
    decompressor, out = brotli.Decompressor(), bytearray()
    for at in range(0, len(model), 64):  # in pieces: few bytes may become gigabytes
        try:
            out += decompressor.process(model[at : at + 64])
        except brotli.error as error:
            raise ValueError(str(error)) from None
        if len(out) > MODEL_MOST:
            raise ValueError(f"it becomes more than {MODEL_MOST:,} bytes")
    return bytes(out)


def pack_tensors(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> tuple[list, list[bytes]]:
    """Parameters -> (a JSON row per tensor: name, shape, bits; the bytes of each)."""
    rows, blobs = [], []
    for name, p in params.items():
        bits = getattr(cfg, groups[name].bits) if groups[name].bits else 0
        rows.append([name, list(p.shape), bits])
        if bits:
            codes, scale = quantise_rows(p, bits, cfg.use_gptq_lite)
            stored = codes.astype(mx.int8), scale.astype(mx.bfloat16).view(mx.uint16)
        else:
            stored = (p.astype(mx.float32),)
        blobs.append(b"".join(np.array(a).tobytes() for a in stored))
    return rows, blobs


def unpack_tensors(rows: list, raw: bytes) -> Arrays:
    """The inverse of `pack_tensors`, up to quantisation. Raises ValueError, TypeError."""
    out, at = {}, 0
    for name, shape, bits in rows:
        numbers = all(type(n) is int and n >= 0 for n in shape)
        if name in out or not numbers or (bits and len(shape) != 2):
            raise ValueError(f"tensor {name} of shape {shape}")
        size = math.prod(shape)
        if bits:
            codes = np.frombuffer(raw, np.int8, size, at).reshape(shape).astype(np.float32)
            scales = np.frombuffer(raw, "<u2", shape[0], at + size).astype(np.uint32) << 16
            with np.errstate(all="ignore"):  # what becomes of it is looked at below
                values = codes * scales.view(np.float32)[:, None]
            at += size + 2 * shape[0]
        else:
            values = np.frombuffer(raw, "<f4", size, at).reshape(shape)
            at += 4 * size
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
        out[name] = mx.array(values)
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes behind the tensors")
    return out


def checksum(version: int, model_size: int, body: bytes) -> bytes:
    """SHA-256 of all that an artifact holds after its magic number."""
    return hashlib.sha256(struct.pack("<HQ", version, model_size) + body).digest()


PACKED_TOKENS_MOST = 40_000_000  # about 25 M fill an artifact
LEVELS_MOST = 16  # of the mixer's tree


def tree_levels(vocab: int) -> int:
    """Levels of the mixer's tree: two more than a balanced one has, if there is room."""
    return min(max(vocab - 1, 1).bit_length() + 2, LEVELS_MOST)


def tree_count(size: str) -> int:
    """Trees of a mixer of MIXER_SIZE: see `MixerGroup`."""
    return 3 if size == "large" else 1


@dataclass(frozen=True)
class PackedText:
    """Training text inside an artifact, as a logistic mixer's code; decoding it is priming."""

    leaves: np.ndarray  # (1 or 3, V) int64: the mixer's trees, see `token_trees`
    token_count: int
    sha256: str  # of the text's tokens, little-endian int32
    code: bytes
    rehearsal: PackedText | None = None  # see `rehearse`; by `small_mixer` with the first tree

    def parts(self) -> list[PackedText]:
        """The texts that an artifact holds: the rehearsal, if there is one, and this."""
        return [self.rehearsal, self] if self.rehearsal else [self]

    def total(self) -> tuple[int, int]:
        """(tokens, bytes of code) of all parts."""
        return sum(x.token_count for x in self.parts()), sum(len(x.code) for x in self.parts())


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds."""

    header: dict[str, Any]
    tokenizer: Tokenizer
    params: Arrays
    packed: PackedText | None


def head_bytes(
    tokenizer: Tokenizer, packed: PackedText | None, overlap: tuple[int, int], rows: list,
    cfg: Knobs,
) -> bytes:  # fmt: skip
    """What stands before the tensors: JSON header, byte table, the mixer's trees."""
    header = {"knobs": settings_of(cfg, *KEPT_SCOPES), "tensors": rows}
    header |= {"overlap": overlap} if overlap[0] else {}
    if packed:
        header["packed"] = [[part.token_count, part.sha256, len(part.code), len(part.leaves)]
                            for part in packed.parts()]  # fmt: skip
    facts = ("sha256", "bos", "vocab", "dummy_prefix")
    header["tokenizer"] = {name: getattr(tokenizer, name) for name in facts}
    header["tokenizer"]["text"] = len(tokenizer.text)
    text = json.dumps(header).encode()
    flags = (tokenizer.leading + 2 * tokenizer.control).astype(np.uint8)
    head = [struct.pack("<I", len(text)), text]
    head += [tokenizer.piece_bytes.astype("<u2").tobytes(), flags.tobytes(), tokenizer.text]
    return b"".join([*head, packed.leaves.astype("<u2").tobytes() if packed else b""])


def group_bytes(
    head: bytes, rows: list, blobs: list[bytes], groups: dict[str, Group], net: int
) -> dict[str, int]:
    """The bytes of a compressed net by group, split as zlib (brotli is slow) compresses each."""
    parts = {"header, tokenizer, tree": bytearray(head)}
    for (name, *_), blob in zip(rows, blobs, strict=True):
        parts.setdefault(groups[name].name, bytearray()).extend(blob)
    alone = {name: len(zlib.compress(raw)) for name, raw in parts.items()}
    ends = [round(net * n / sum(alone.values())) for n in itertools.accumulate(alone.values())]
    return dict(zip(alone, np.diff([0, *ends]).tolist(), strict=True))


def write_artifact(
    path: Path, params: Arrays, groups: dict[str, Group], cfg: Knobs, tokenizer: Tokenizer,
    packed: PackedText | None = None, overlap: tuple[int, int] = (0, 0),
) -> Event:  # fmt: skip
    """Write the compressed model, the rehearsal's code and the text's; returns the export event.

    overlap: see `shared_documents`.
    """
    rows, blobs = pack_tensors(params, groups, cfg)
    head = head_bytes(tokenizer, packed, overlap, rows, cfg)
    model, compressor = compress(b"".join([head, *blobs]))
    texts = packed.parts() if packed else []
    body = b"".join([model, *(text.code for text in texts)])
    check_size(len(source()) + PREFIX.size + len(body), params, "the artifact")
    digest = checksum(FORMAT_VERSION, len(model), body)
    with whole_file(path) as part:
        part.write_bytes(PREFIX.pack(MAGIC, FORMAT_VERSION, digest, len(model)) + body)
    event = export_event(path, params, packed)
    net = event["model_bytes"] - event["packed_bytes"]
    sizes = group_bytes(head, rows, blobs, groups, net)
    return {**event, "compressor": compressor, "group_bytes": sizes}


def export_event(path: Path, params: Arrays, packed: PackedText | None) -> Event:
    """Sizes on disk, in bytes. Raises RunFailed over the limit."""
    code, model = len(source()), path.stat().st_size
    packed_tokens, packed_bytes = packed.total() if packed else (0, 0)
    check_size(code + model, params, "the artifact")
    return {
        "event": "export", "code_bytes": code, "model_bytes": model, "total_bytes": code + model,
        "limit_bytes": ARTIFACT_LIMIT_BYTES,
        "packed_bytes": packed_bytes, "packed_tokens": packed_tokens,
    }  # fmt: skip


def check_size(total: int, params: Arrays, what: str) -> None:
    """Raises RunFailed, naming the largest tensors, if `total` bytes are over the limit."""
    if total > ARTIFACT_LIMIT_BYTES:
        largest = sorted(params, key=lambda n: -params[n].size)[:4]
        raise RunFailed(
            f"{what} has {total:,} bytes, {total - ARTIFACT_LIMIT_BYTES:,} over the limit of "
            f"{ARTIFACT_LIMIT_BYTES:,}; most parameters: "
            + ", ".join(f"{n} {params[n].size:,}" for n in largest)
            + ". Lower NUM_LAYERS, MODEL_DIM, MLP_MULT, ENGRAM_HASH_SIZE or WEIGHT_BITS"
        )


def check_least_parameters(cfg: Knobs, vocab: int) -> None:
    """Raises UserError for a net that is too large by far, before it takes memory to make it."""
    least = least_parameters(cfg, vocab)
    if least * min(cfg.weight_bits, cfg.embed_bits) // 16 > ARTIFACT_LIMIT_BYTES:
        raise UserError(f"MODEL_DIM, NUM_LAYERS, ENGRAM_HASH_SIZE ..: {least:,} parameters at "
                        "least fit into no artifact: lower them")  # fmt: skip


def estimate_bytes(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> int:
    """Bytes of script + artifact if every tensor were Gaussian noise; RunFailed over the limit."""
    size = len(source())
    for name, p in params.items():
        bits = groups[name].bits
        size += p.size * NOISE_BYTES[getattr(cfg, bits)] + 2 * p.shape[0] if bits else 4 * p.size
    check_size(int(size), params, "by estimate, the artifact")
    return int(size)


def read_artifact(path: Path) -> Artifact:
    """Read an artifact. Raises UserError naming what is wrong."""
    if not path.is_file():
        raise UserError(f"ARTIFACT={path}: no such file")
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise UserError(f"ARTIFACT={path}: {error.strerror}") from None
    if len(blob) < PREFIX.size or blob[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not an artifact of this script")
    _, version, digest, model_size = PREFIX.unpack_from(blob)
    body = blob[PREFIX.size :]
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this script reads {FORMAT_VERSION}")
    if checksum(version, model_size, body) != digest:
        raise UserError(f"{path}: cut short or altered (its checksum does not fit): copy it again")
    try:
        return parse_artifact(path, decompress(path, body[:model_size]), body[model_size:])
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
            MemoryError, struct.error, lzma.LZMAError) as error:  # fmt: skip
        raise UserError(f"{path}: made by hand? {type(error).__name__}: {error}") from None


def parse_packed(facts: list, raw: bytes, vocab: int, code: bytes) -> PackedText:
    """The packed text of an artifact. Raises ValueError.

    facts: a row of the rehearsal, if there is one, and one of the text; raw: the trees, and more.
    """
    trees = facts[-1][3]
    if trees not in (1, 3) or len(facts) > 2 or facts[0][3] != (trees if len(facts) == 1 else 1):
        raise ValueError(f"{trees} trees, {len(facts)} texts")
    leaves = np.frombuffer(raw, "<u2", trees * vocab).astype(np.int64).reshape(trees, vocab)
    if leaves.max() >> tree_levels(vocab) or any(len(np.unique(x)) < vocab for x in leaves):
        raise ValueError("two tokens at one leaf of a mixer's tree")
    for leaf, level in itertools.product(leaves, range(tree_levels(vocab))):
        nodes = np.unique(leaf >> level)
        if not np.isin(nodes & ~1, nodes).all():
            raise ValueError("a node of a mixer's tree has a right side alone")
    texts, bounds = [], ((1, REHEARSAL_MOST), (0, PACKED_TOKENS_MOST))
    for (count, digest, size, own), (least, most) in zip(facts, bounds[-len(facts) :], strict=True):
        if not (type(count) is type(size) is int and least <= count <= most
                and 0 <= size <= len(code)):  # fmt: skip
            raise ValueError(f"{count} packed tokens of {size} bytes, with {len(code)} there")
        texts.append(PackedText(leaves[:own], count, str(digest), code[:size]))
        code = code[size:]
    if code:
        raise ValueError(f"{len(code)} bytes behind the packed text")
    return dataclasses.replace(texts[-1], rehearsal=texts[0] if len(texts) == 2 else None)


def parse_artifact(path: Path, raw: bytes, code: bytes) -> Artifact:
    """Make sense of the model, decompressed, and the packed text's code.

    Nobody vouches for what is in them: nothing is allocated or used that the bytes and the bounds
    of knobs do not allow. Raises UserError, or what Python raises for things of a wrong kind.
    """
    (length,) = struct.unpack_from("<I", raw)
    header = json.loads(raw[4 : 4 + length])
    check_kept(header["knobs"], path)
    facts = dict(header["tokenizer"])
    vocab, at = facts.pop("vocab"), 4 + length
    if not (type(vocab) is int and 0 < vocab <= 1 << 16 and type(facts["bos"]) is int):
        raise ValueError(f"a vocabulary of {vocab}, BOS {facts['bos']}")
    if not (-1 <= facts["bos"] < vocab and type(facts["dummy_prefix"]) is bool):
        raise ValueError(f"BOS {facts['bos']}, dummy prefix {facts['dummy_prefix']}")
    if type(facts["sha256"]) is not str:
        raise ValueError(f"SHA-256 {facts['sha256']} of a tokenizer")
    documents, tokens = header.get("overlap", (0, 0))
    if not (type(documents) is type(tokens) is int and 0 <= documents <= tokens):
        raise ValueError(f"an overlap of {documents} documents")
    sizes = np.frombuffer(raw, "<u2", vocab, at)
    flags = np.frombuffer(raw, np.uint8, vocab, at + 2 * vocab)
    at += 3 * vocab
    if vocab * int(sizes.max(initial=0)) > 1 << 26:
        raise ValueError(f"a piece of {sizes.max()} bytes")
    length = facts.pop("text")
    if length not in (0, int(sizes.sum())) or length > len(raw) - at:
        raise ValueError(f"{length} bytes of pieces, by the byte table {sizes.sum()}")
    tokenizer = Tokenizer(
        sizes, (flags & 1) > 0, (flags & 2) > 0, **facts, text=raw[at : at + length]
    )
    packed, at = None, at + length
    if "packed" in header:
        packed = parse_packed(header["packed"], raw[at:], vocab, code)
        at += 2 * packed.leaves.size
    return Artifact(header, tokenizer, unpack_tensors(header["tensors"], raw[at:]), packed)


# ==================================================================================================
# CHECKPOINTS: the state of a run on disk, from which it can go on
# ==================================================================================================

State = tuple[dict[str, Arrays], dict[str, float]]  # arrays by kind and name, counters by name
CHECKPOINTS_KEPT = 2


def checkpoint_files(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    return sorted((folder / "checkpoint").glob("state-*.safetensors"), reverse=True)


def named_arrays(arrays: dict[str, Arrays]) -> Arrays:
    """A state's arrays under the names KIND:NAME."""
    return {f"{kind}:{name}": a for kind, tree in arrays.items() for name, a in tree.items()}


def checked(arrays: Arrays, facts: str) -> str:
    """A checksum of arrays, names and facts. Raises Diverged naming what is not finite."""
    total = zlib.crc32(facts.encode())
    for name in sorted(arrays):
        array = np.array(arrays[name])
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise Diverged(f"{name} is not finite")
        what = f"{name} {array.dtype} {array.shape}"
        total = zlib.crc32(array.tobytes(), zlib.crc32(what.encode(), total))
    return str(total)


def write_checkpoint(folder: Path, state: State, facts: dict[str, Any]) -> Path:
    """Write a run's state beside the one before, and remove older ones; returns its path.

    facts: what else `read_checkpoint` shall return. Raises Diverged, or RunFailed where the disk
    does not take it; the checkpoints before are then as they were.
    """
    arrays = named_arrays(state[0])
    text = json.dumps({**facts, "counters": state[1]})
    meta = {"facts": text, "checksum": checked(arrays, text)}
    before = checkpoint_files(folder)
    number = int(before[0].stem.partition("-")[2]) + 1 if before else 1
    path = folder / "checkpoint" / f"state-{number:06}.safetensors"
    with whole_file(path) as part:
        part.parent.mkdir(exist_ok=True)
        mx.save_safetensors(str(part), arrays, meta)
    for old in before[CHECKPOINTS_KEPT - 1 :]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(folder: Path) -> tuple[State, dict[str, Any]] | None:
    """The newest state that reads whole, and its facts; None if there was none yet.

    Raises UserError if all are damaged.
    """
    damaged = []
    for path in checkpoint_files(folder):
        try:
            arrays, meta = mx.load(str(path), return_metadata=True)
            if checked(arrays, meta["facts"]) != meta["checksum"]:
                raise ValueError("its checksum does not fit")
            facts = json.loads(meta["facts"])
            kinds: dict[str, Arrays] = {}
            for name, array in arrays.items():
                kind, _, name = name.partition(":")
                kinds.setdefault(kind, {})[name] = array
            return (kinds, facts.pop("counters")), facts
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, RunFailed) as error:
            damaged.append(f"{path} is damaged: {error}")
    if damaged:
        raise UserError("\n".join(f"RESUME=1: {line}" for line in damaged))
    return None


def check_same_run(facts: dict[str, Any], state: State, like: State, cfg: Knobs, text: str) -> None:
    """Raises UserError unless a checkpoint is of this net, these settings and this text.

    like: a state of this run; text: the fingerprint of its training text.
    """
    if facts.get("format") != FORMAT_VERSION:  # it goes on with its code of the training text
        raise UserError("RESUME=1: the checkpoint is of another script, which packs text another "
                        "way: go on with the script that is in its folder")  # fmt: skip
    if facts["text"] != text:
        raise UserError("RESUME=1: another training text or tokenizer than before: see DATA_PATH")
    for name, value in settings_of(cfg, "train", "model").items():
        was = facts["knobs"].get(name)
        if was != value:
            raise UserError(f"RESUME=1: {name} was {was}, not {value}")
    arrays = named_arrays(state[0])
    for name, array in named_arrays(like[0]).items():
        if name not in arrays or arrays[name].shape != array.shape:
            raise UserError(f"RESUME=1: the checkpoint holds no {name} {array.shape}: it is of "
                            "another script")  # fmt: skip


# ==================================================================================================
# TRAINING: workers and ranks share a step; schedules; the trainer, whose `take_step` is one step
# ==================================================================================================


class Workers(contextlib.AbstractContextManager):
    """Threads that share a step's work: one per core on CPUs, each with its own MLX stream.

    MLX's CPU backend runs a stream in one thread. Graphs are built one at a time (building swaps
    the model's parameters) and evaluated side by side. A GPU has one worker and needs no thread.
    """

    def __init__(self, count: int) -> None:
        self.count, self.lock = count, threading.Lock()
        self.reserved = 0  # cores that something else uses: so many threads rest, the bits stay
        self.pools = [ThreadPoolExecutor(1) for _ in range(count)] if count > 1 else []
        self.streams = [pool.submit(mx.new_stream, mx.cpu).result() for pool in self.pools]

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.submit(mx.clear_streams)  # a stream ends in the thread that made it
            pool.shutdown()

    def map(self, build: Callable[..., Any], jobs: list[tuple], eager: bool = True) -> list[Any]:
        """Call build(*job) for each job, by worker after worker in turn: the results, in order.

        The results are evaluated, unless one worker is not to be `eager`.
        """
        if not self.pools:
            results = [build(*job) for job in jobs]
            if eager:
                mx.eval(results)
            return results
        mx.eval(jobs)  # a thread cannot evaluate what another thread's stream has yet to do
        threads = max(self.count - self.reserved, 1)
        pending = [
            self.pools[i % threads].submit(self.evaluate, self.streams[i % threads], build, job)
            for i, job in enumerate(jobs)
        ]
        return [result.result() for result in pending]

    def evaluate(self, stream: mx.Stream, build: Callable[..., Any], job: tuple) -> Any:
        """Build and evaluate one graph, in the thread that made the stream."""
        with mx.stream(stream):
            with self.lock:
                result = build(*job)
            mx.eval(result)
        return result


def make_workers(cfg: Knobs, neighbours: int = 1, ranks: int = 1) -> Workers:
    """Start WORKERS workers, or one per core, with a BLAS thread each. A GPU has one.

    neighbours: ranks that share this machine's cores; ranks: those that share a step.
    """
    if cfg.blas not in ("auto", "none") and not BLAS:
        raise UserError(f"BLAS={cfg.blas}: not an OpenBLAS that can be loaded; try BLAS=auto")
    if BLAS:
        BLAS["set_threads"](1)  # more would wait for each other where the machine is busy
    return Workers(worker_count(cfg, neighbours, ranks))


def worker_count(cfg: Knobs, neighbours: int = 1, ranks: int = 1) -> int:
    """How many workers `make_workers` starts."""
    windows = cfg.train_batch_tokens // cfg.train_seq_len // ranks  # more workers would idle
    cores = max(cpu_cores() // neighbours, 1)
    return (cfg.workers or max(min(cores, windows), 1)) if on_cpu() else 1


LAUNCH_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
JOIN_SECONDS = 25.0  # for all ranks to join
SILENCE_SECONDS = 20.0  # after which a rank counts as stopped


def launched_rank() -> int:
    """This process's number among those that a launcher started together; 0 without one."""
    return next((int(os.environ[name]) for name in LAUNCH_RANKS if name in os.environ), 0)


def meeting_place() -> tuple[str, int, int] | None:
    """(host, port, ranks) of rank 0's listener, as mlx.launch tells all; None where it does not."""
    file = os.environ.get("MLX_HOSTFILE") or os.environ.get("MLX_IBV_DEVICES")
    rows = json.loads(Path(file).read_text()) if file else []
    nccl = f"{os.environ.get('NCCL_HOST_IP', '')}:{os.environ.get('NCCL_PORT', '')}"
    ring = rows[0][0] if "MLX_HOSTFILE" in os.environ and rows else ""
    host, _, port = (ring or os.environ.get("MLX_JACCL_COORDINATOR", nccl)).rpartition(":")
    count = len(rows) or int(os.environ.get("MLX_WORLD_SIZE", 1))
    return (host, int(port), count) if host and count > 1 else None


class Heartbeat:
    """Tells a rank that is busy from one that is stopped: that one is not heard of any more.

    Every second each rank sends rank 0 a datagram, and is told how many ranks have been heard of.
    """

    WORD = struct.Struct("!II")  # who speaks, and how many ranks have joined as far as it knows

    def __init__(self, rank: int, host: str, port: int, count: int) -> None:
        """Waits until all ranks have joined. Raises RunFailed."""
        self.rank, self.joined = rank, 1
        self.heard: dict[int, float] = {}  # when a rank was last heard of
        self.ready = {rank}  # ranks that know that all have joined
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(1)
        try:
            (self.socket.connect if rank else self.socket.bind)((host, port))
        except OSError as error:
            raise RunFailed(f"rank {rank} cannot use {host}:{port}: {error.strerror}") from None
        threading.Thread(target=self.beat, args=(count,), daemon=True).start()
        begin = time.monotonic()
        while self.joined < count or (rank == 0 and len(self.ready) < count):
            if time.monotonic() - begin > JOIN_SECONDS:
                raise RunFailed(
                    f"only {self.joined} of {count} ranks have joined rank 0 ({host}:{port}, UDP) "
                    f"within {JOIN_SECONDS:.0f} s: each says itself what stops it"
                )
            time.sleep(0.02)
        for _ in range(5 if rank else 0):  # MLX lets no thread run until all are connected
            self.socket.send(self.WORD.pack(rank, count))

    def beat(self, count: int) -> None:
        """The thread's work."""
        while True:
            with contextlib.suppress(OSError):  # nobody is there, or nothing came in time
                if self.rank:
                    self.socket.send(self.WORD.pack(self.rank, self.joined))
                word, sender = self.socket.recvfrom(self.WORD.size)
                other, joined = self.WORD.unpack(word.ljust(self.WORD.size, b"\xff"))
                if other >= count:  # somebody else's
                    continue
                self.heard[other] = time.monotonic()
                if self.rank:
                    self.joined = joined
                else:
                    self.joined = len(self.heard) + 1
                    self.ready |= {other} if joined == count else set()
                    self.socket.sendto(self.WORD.pack(0, self.joined), sender)
            if self.rank:
                time.sleep(1 if self.joined == count else 0.1)

    def missing(self) -> str:
        """Says which rank is not heard of any more; '' if none is missing."""
        now = time.monotonic()
        silent = [rank for rank, at in self.heard.items() if now - at > SILENCE_SECONDS]
        return (f"rank {silent[0]} has not been heard of for {SILENCE_SECONDS:.0f} s: was it "
                "stopped, or does its machine sleep?") if silent else ""  # fmt: skip


class Ranks:
    """The processes that `mlx.launch` started together, each with a part of every step.

    Without a launcher there is one, which waits for nothing. All ranks call the same methods in
    the same order, and a method raises RunFailed where one of them is gone. What waits for others
    does so in a thread, as MLX could wait for ever.
    """

    def __init__(self) -> None:
        place = meeting_place()
        self.missing = Heartbeat(launched_rank(), *place).missing if place else lambda: ""
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise RunFailed(f"the ranks could not be connected: {error}") from None
        self.rank, self.count = group.rank(), group.size()
        self.work = own_thread() if self.count > 1 else None

    def exchange(self, operation: Callable[[Any], Any], mine: Any) -> Any:
        """What the operation makes of all ranks' arrays; a rank alone keeps its own."""
        if self.count == 1:
            return mine
        mx.eval(mine)  # all ranks then have the same operations left, in the same order
        done: Future = Future()

        def work() -> Any:
            mx.eval(out := operation(mine))
            return out

        self.work.put((done, work))
        while not wait([done], timeout=0.5).done:
            if reason := self.missing():
                raise RunFailed(reason)
        try:
            return done.result()
        except RuntimeError as error:
            raise RunFailed(f"another rank is gone ({error})") from None

    def mean(self, tree: Any) -> Any:
        """The mean of all ranks' trees of float32 arrays."""
        means = iter(self.exchange(nn.average_gradients, [a for _, a in tree_flatten(tree)]))
        return tree_map(lambda _: next(means), tree)

    def of_first(self, tree: Any) -> Any:
        """Rank 0's tree of arrays."""
        mine = tree_map(mx.zeros_like, tree) if self.rank else tree
        return self.exchange(functools.partial(tree_map, mx.distributed.all_sum), mine)

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank."""
        counts = mx.array([int(flag) for flag in flags])
        return [count > 0 for count in self.exchange(mx.distributed.all_max, counts).tolist()]

    def same(self, text: str) -> Array:
        """Which of the ranks bring the same text: (ranks,) bool."""
        mine = mx.array([zlib.crc32(text.encode())], mx.uint32)
        return self.exchange(mx.distributed.all_gather, mine) == mine

    def check_same(self, text: str) -> None:
        """Raises UserError, on all ranks, unless all bring the same text."""
        if not self.same(text).all():
            raise UserError("the ranks have other settings, tokenizers or training text: mlx.launch"
                            " passes settings on with --env NAME=value")  # fmt: skip

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, which the ranks do one after another; where one stops, all do."""
        for rank in range(self.count):
            stop = None
            if rank == self.rank:
                try:
                    result = work()
                except Stop as error:
                    stop = error
            (stopped,) = self.any(stop is not None)  # waits for the one whose turn it is
            if stopped:
                raise stop or RunFailed(f"rank {rank} has stopped: it says why")
        return result


def remaining_steps(step: int, elapsed_s: float, cfg: Knobs) -> float:
    """Steps left, by the count or by the clock at the mean step time so far."""
    left = (cfg.iterations or math.inf) - step
    if cfg.max_wallclock_seconds and step:
        left = min(left, (cfg.max_wallclock_seconds - elapsed_s) * step / elapsed_s)
    return max(left, 0.0)


def progress(step: int, elapsed_s: float, cfg: Knobs) -> float:
    """How much of the run is done, 0 .. 1: of the steps or of the clock, whichever ends first."""
    by_step = step / (cfg.iterations or math.inf)
    by_clock = elapsed_s / (cfg.max_wallclock_seconds or math.inf)
    return min(max(by_step, by_clock), 1.0)


def lr_factor(step: int, elapsed_s: float, cfg: Knobs) -> float:
    """Factor on every learning rate: 1, then linear to 0 over the last steps.

    These are WARMDOWN_ITERS, or WARMDOWN_FRAC of the run if that is less.
    """
    left = remaining_steps(step, elapsed_s, cfg)
    most = cfg.warmdown_frac * (step + left) if cfg.warmdown_frac else math.inf
    steps = min(cfg.warmdown_iters, most)
    return min(left / steps, 1.0) if steps else 1.0


def momentum_at(step: int, cfg: Knobs) -> float:
    """Muon's momentum, warmed up linearly."""
    t = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start * (1 - t) + cfg.muon_momentum * t


def averaging_weight(averaged: int, cfg: Knobs) -> float:
    """Weight of the newest parameters in the average when `averaged` steps are in it already."""
    mean = 1 / (averaged + 1)  # an EMA younger than its memory is the plain mean
    return mean if cfg.use_swa else max(1 - cfg.ema_decay, mean)


def split_windows(first: int, last: int, cfg: Knobs, workers: int) -> list[slice]:
    """Cut windows first .. last-1 of a step into microbatches, each under the memory bound.

    Each worker gets as many as the others, and at least GRAD_ACCUM_STEPS, while windows suffice.
    """
    windows = last - first
    most = max(cfg.mlx_max_microbatch_tokens // cfg.train_seq_len, 1)
    per_worker = max(math.ceil(windows / (most * workers)), cfg.grad_accum_steps)
    count = min(per_worker * workers, windows)
    ends = [first + windows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def largest_parts(parts: list[slice], workers: int) -> list[int]:
    """Windows of the largest microbatch, once for each worker that gets any."""
    return [max(rows.stop - rows.start for rows in parts)] * min(workers, len(parts))


LOWER = (
    "RESUME=1 may lower MATRIX_LR, TIED_EMBED_LR, HASH_LR, SCALAR_LR or MUON_WEIGHT_DECAY, set "
    "GRAD_CLIP_NORM=1, or allow some bad steps by SKIP_BAD_STEPS"
)


class Trainer:
    """The training state and the one function that moves it, `take_step`.

    All that changes is in three dicts of arrays, `params`, `opt` and `average`, and in five
    counters. A step makes new dicts and takes them only if its loss and its gradients are finite
    and the net has not come apart, so that the last good state is always at hand.
    """

    def __init__(
        self, model: GPT, cfg: Knobs, data: TrainWindows, workers: Workers, ranks: Ranks
    ) -> None:
        self.model, self.cfg, self.data = model, cfg, data
        self.workers, self.ranks = workers, ranks
        self.params: Arrays = dict(tree_flatten(model.parameters()))
        self.groups = group_parameters(list(self.params))
        self.opt = new_optimizer_state(self.params, self.groups)
        self.average = self.params
        self.step, self.elapsed_s, self.averaged, self.skipped = 0, 0.0, 0, 0
        self.best_loss = self.blind = math.log(data.vocab)  # a net that knows nothing
        self.windows = cfg.train_batch_tokens // cfg.train_seq_len
        self.tokens_per_step = self.windows * cfg.train_seq_len  # of all ranks
        if self.windows < ranks.count:
            raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: {self.windows} windows "
                            f"a step, fewer than the {ranks.count} ranks: raise it")  # fmt: skip
        first, last = (self.windows * i // ranks.count for i in (ranks.rank, ranks.rank + 1))
        # Worker i of n takes microbatches i, i + n, .. and moves the parameters that it owns.
        self.microbatches = split_windows(first, last, cfg, workers.count)
        self.largest_microbatches = largest_parts(self.microbatches, workers.count)
        by_size = sorted(self.params, key=lambda n: (self.params[n].size, n), reverse=True)
        self.owned = [by_size[i :: workers.count] for i in range(workers.count)]
        self.bigrams = bigram_probability(data) if cfg.complement_alpha else None
        # A GPU compiles whole steps; on a CPU that gains nothing, so there only kernels are.
        whole = (lambda function: function) if on_cpu() else mx.compile
        add = self._add_microbatch
        self.add_microbatch = {q: whole(functools.partial(add, q)) for q in (False, True)}
        self.add_workers, self.move = whole(self._add_workers), whole(self._move)

    def take_step(self) -> Event:
        """Take one step; returns its train event. Raises Diverged where it is a bad one."""
        cfg, begin = self.cfg, time.perf_counter()
        factor = lr_factor(self.step, self.elapsed_s, cfg)
        averaging = progress(self.step, self.elapsed_s, cfg) >= cfg.ema_start_frac
        averaged = self.averaged if averaging else 0
        loss, norm, grads = self.gradients(quantised=factor < cfg.late_qat_threshold)
        good = math.isfinite(loss + norm) and not self.exploded(loss)
        self.skipped += not good
        if self.skipped > cfg.skip_bad_steps:
            raise Diverged(self.why_bad(loss, grads))
        self.best_loss = min(self.best_loss, loss) if good else self.best_loss
        hyper = {
            "lr_factor": factor, "momentum": momentum_at(self.step, cfg), "step": self.step + 1.0,
            "clip": min(cfg.grad_clip_norm / (norm + 1e-12), 1.0),
            "average_rate": averaging_weight(averaged, cfg),
        }  # fmt: skip
        if good:
            self.params, self.opt, self.average = self.updates(grads, hyper)
            self.averaged = averaged + 1 if averaging else 0
        self.step += 1
        seconds = self.ranks.of_first(mx.array(time.perf_counter() - begin)).item()
        self.elapsed_s += seconds
        return {
            "event": "train", "step": self.step, "train_loss": loss, "grad_norm": norm,
            "lr_factor": factor, "train_time_ms": 1000 * self.elapsed_s,
            "step_avg_ms": 1000 * self.elapsed_s / self.step,
            "tok_s": self.tokens_per_step / seconds, "skipped": not good,
        }  # fmt: skip

    def exploded(self, loss: float) -> bool:
        """Whether a net that had learned something is worse than one that knows nothing."""
        return self.best_loss < self.blind - 1 and loss > self.blind

    def why_bad(self, loss: float, grads: list[Arrays]) -> str:
        """What to say of a step that is not to be taken."""
        if self.exploded(loss):
            return (f"step {self.step + 1}: loss {loss:.4f}, worse than a net that knows nothing; "
                    f"it was {self.best_loss:.4f} once. {LOWER}")  # fmt: skip
        names = [n for part in grads for n, g in part.items() if not mx.isfinite(g).all().item()]
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (f"step {self.step + 1}: loss {loss}, gradients that are not finite: "
                f"{', '.join(names[:3]) or 'none'}{rest}. {LOWER}")  # fmt: skip

    def gradients(self, quantised: bool) -> tuple[float, float, list[Arrays]]:
        """(mean loss, gradient norm, gradients) of this step, over all workers and ranks.

        The loss is plain; the gradients are those of the weighted loss, a dict per worker, of the
        parameters that it owns.
        """
        tokens = self.data.step(self.step, self.windows)
        x, y = tokens[:, :-1], tokens[:, 1:]
        weights = np.ones(y.shape, np.float32)
        if self.bigrams is not None:
            weights = complementary_weights(self.bigrams[x, y], self.cfg.complement_alpha)
        workers = min(self.workers.count, len(self.microbatches))
        sums: list[tuple] = [()] * workers  # (loss, gradients) of each worker's microbatches so far
        show = self.show(f"step {self.step + 1}", "microbatches")
        for at in range(0, len(self.microbatches), workers):
            rows = self.microbatches[at : at + workers]
            batches = [tuple(mx.array(array[r]) for array in (x, y, weights)) for r in rows]
            jobs = [(self.params, *job) for job in zip(sums, batches, strict=False)]
            add = self.add_microbatch[quantised]
            sums[: len(jobs)] = self.workers.map(add, jobs, self.cfg.mlx_eager_eval)
            show(at + len(rows), len(self.microbatches), "")
        if self.ranks.count > 1:
            sums = [self.ranks.mean(tree_map(lambda *parts: sum(parts), *sums))]
        loss = sum(loss.item() for loss, _ in sums)
        jobs = [([{n: g[n] for n in names} for _, g in sums],) for names in self.owned]
        grads, squares = zip(*self.workers.map(self.add_workers, jobs), strict=True)
        return loss, math.sqrt(sum(square.item() for square in squares)), list(grads)

    def updates(self, grads: list[Arrays], hyper: dict[str, float]) -> tuple[Arrays, ...]:
        """(params, opt, average) after the step; each worker moves the parameters that it owns."""
        scalars = {n: mx.array(value) for n, value in hyper.items()}
        old = self.params, self.opt, self.average
        moved = zip(*self.workers.map(self.move, [(g, *old, scalars) for g in grads]), strict=True)
        new = [functools.reduce(operator.or_, parts) for parts in moved]
        return tuple({n: b[n] for n in a} for a, b in zip(old, new, strict=True))

    # These build the graphs that workers evaluate. A GPU compiles them: what changes between
    # steps comes as an array, a Python number would be a constant.

    def _add_microbatch(
        self, quantised: bool, params: Arrays, before: tuple[Any, ...], batch: tuple[Array, ...]
    ) -> tuple[Array, Arrays]:
        """(loss, gradients) of a microbatch, added to those of the ones before it.

        batch: inputs, targets and weights, each (B, T). A rank's sums are multiplied by ranks /
        tokens per step, so that their mean over the ranks is the mean over the step's tokens.
        """
        x, y, w = batch
        scale = self.ranks.count / self.tokens_per_step

        def loss(p: Arrays) -> tuple[Array, Array]:
            p = fake_quantise(p, self.groups, self.cfg) if quantised else p
            self.model.update(tree_unflatten(list(p.items())))
            nll = self.model.nll(x, y)
            return mx.sum(nll * w) * scale, mx.sum(nll) * scale

        (_, plain), grads = mx.value_and_grad(loss)(params)
        if before:
            plain, grads = plain + before[0], {n: g + before[1][n] for n, g in grads.items()}
        return plain, grads

    def _add_workers(self, parts: list[Arrays]) -> tuple[Arrays, Array]:
        """(the sum of several workers' gradients of the same parameters, its squared norm)."""
        sums = {n: sum((p[n] for p in parts[1:]), parts[0][n]) for n in parts[0]}
        return sums, sum((mx.sum(g * g) for g in sums.values()), mx.array(0.0))

    def _move(
        self, grads: Arrays, params: Arrays, opt: Arrays, average: Arrays, hyper: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        """Clip, update, average: new (params, opt, average) of the parameters with gradients."""
        if self.cfg.grad_clip_norm:
            grads = {n: g * hyper["clip"] for n, g in grads.items()}
        new, opt = apply_gradients(params, grads, opt, hyper, self.groups, self.cfg)
        if not (self.cfg.ema_decay or self.cfg.use_swa):
            return new, opt, new
        rate = hyper["average_rate"]
        return new, opt, {n: average[n] + rate * (new[n] - average[n]) for n in new}

    def warm_up(self) -> None:
        """Compile and allocate by taking steps and going back to the state before them."""
        before, show = self.state(), self.show("warm-up", "steps")
        for i in range(self.cfg.warmup_steps):
            self.take_step()
            self.set_state(*before)
            show(i + 1, self.cfg.warmup_steps, "")
        if self.cfg.late_qat_threshold and self.cfg.warmup_steps:
            self.gradients(quantised=True)

    def show(self, label: str, unit: str) -> Progress:
        """Shows the progress of what takes long, on rank 0, beside no other live line."""
        return (lambda *_: None) if self.ranks.rank or LIVE else show_progress(label, unit=unit)

    def finished(self) -> bool:
        """Whether the steps or the clock are used up."""
        return progress(self.step, self.elapsed_s, self.cfg) >= 1

    def state(self) -> State:
        """All that steps change."""
        arrays = {"params": self.params, "opt": self.opt, "average": self.average}
        counters = ("step", "elapsed_s", "averaged", "skipped", "best_loss")
        return arrays, {name: getattr(self, name) for name in counters}

    def set_state(self, arrays: dict[str, Arrays], counters: dict[str, float]) -> None:
        """Go on from a state."""
        vars(self).update(arrays, **counters)

    def follow_rank_0(self) -> None:
        """Go on from rank 0's state: unlike machines drift apart in the last bits."""
        if self.ranks.count > 1:
            arrays, counters = self.ranks.of_first(tree_map(mx.array, self.state()))
            self.set_state(arrays, {n: value.item() for n, value in counters.items()})


def gigaflops(workers: Workers) -> float:
    """GFLOP/s of a 768-cube float32 matrix product in each worker at once."""
    a = mx.random.normal((768, 768))
    mx.eval(a)
    for _ in range(2):  # the first touches memory
        begin = time.perf_counter()
        workers.map(mx.matmul, [(a, a)] * workers.count)
    return workers.count * 2 * 768**3 / (time.perf_counter() - begin) / 1e9


class Keeper:
    """Keeps a run's checkpoints: the trainer's state, and what `more` returns, by kind and name."""

    def __init__(
        self, trainer: Trainer, report: Report, text: str, more: Callable[[], dict[str, Arrays]]
    ) -> None:
        """text: the fingerprint of the training text and its tokenizer."""
        self.trainer, self.report, self.text, self.more = trainer, report, text, more
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        """Whether CHECKPOINT_SECONDS are over."""
        every = self.trainer.cfg.checkpoint_seconds
        return bool(every) and time.monotonic() - self.saved_at >= every

    def save(self, together: bool = True) -> None:
        """Write a checkpoint, on rank 0; from there all ranks go on, if they do this together."""
        trainer = self.trainer
        if together:
            trainer.follow_rank_0()
        if trainer.ranks.rank == 0:
            arrays, counters = trainer.state()
            knobs, sizes = settings_of(trainer.cfg, *KEPT_SCOPES), self.report.sizes()
            facts = {"format": FORMAT_VERSION, "knobs": knobs, "text": self.text, "sizes": sizes}
            for name in (name for name, size in sizes.items() if size):
                wait_for_disk(self.report.folder / name)
            try:
                state = {**arrays, **self.more()}, counters
                write_checkpoint(self.report.folder, state, facts)
            except Diverged as error:
                raise Diverged(f"step {trainer.step}: {error}. {LOWER}") from None
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def last_words(self) -> Iterator[None]:
        """Where what is inside ends early, save what there is, and say how to go on."""
        try:
            yield
        except (RunFailed, Interrupted) as error:
            if self.trainer.ranks.rank:
                raise
            reason = ""
            try:
                if not isinstance(error, Diverged):
                    self.save(together=False)
            except RunFailed as unsaved:
                reason = f"; no new checkpoint: {unsaved}"
            folder = self.report.folder
            go_on = f"OUT_DIR={shlex.quote(str(folder.parent))} RUN_ID={folder.name} RESUME=1"
            error.args = (f"{error}{reason}; to go on, the same command with {go_on}",)
            raise


def train(
    trainer: Trainer, report: Report, validate: Callable[[Trainer], None],
    sample: Callable[[Trainer], None], keeper: Keeper,
) -> None:  # fmt: skip
    """Take steps until the steps or the clock are used up; log, validate and save on the way."""
    cfg, ranks = trainer.cfg, trainer.ranks

    def due(every: int) -> bool:
        return bool(every) and trainer.step % every == 0

    validated = last_record(report.folder, "val").get("step")
    smoothed, show = None, show_progress("training", every_s=math.inf)  # files have train lines
    with interrupts.held():
        while not trainer.finished():
            if due(cfg.val_loss_every) and trainer.step not in (0, validated) and report.folder:
                with interrupts.free():
                    validate(trainer)
            report_step(trainer, report, event := trainer.take_step())
            if not event["skipped"]:
                before = event["train_loss"] if smoothed is None else smoothed
                smoothed = before + 0.05 * (event["train_loss"] - before)
            if report.folder and smoothed is not None:
                watch(trainer, smoothed, show)
            if due(cfg.sample_every) and report.folder:
                sample(trainer)
            # Each rank has a clock of its own.
            save = due(cfg.checkpoint_every) or keeper.due()
            asked, save = ranks.any(bool(interrupts.asked), save)
            if asked:
                stop = Interrupted(interrupts.asked or signal.SIGTERM)
                stop.together = True
                raise stop
            if save:
                keeper.save()


def watch(trainer: Trainer, smoothed: float, show: Progress) -> None:
    """Move the live line of a training."""
    cfg, memory = trainer.cfg, peak_memory() / 1e9
    done = progress(trainer.step, trainer.elapsed_s, cfg)
    speed = trainer.step * trainer.tokens_per_step / max(trainer.elapsed_s, 1e-9)
    show(int(1000 * done), 1000, f"loss {smoothed:.3f}, {speed:,.0f} tok/s, {memory:.1f} GB")


def report_step(trainer: Trainer, report: Report, event: Event) -> None:
    """Log a step, if TRAIN_LOG_EVERY says so or if it was left out."""
    cfg, step = trainer.cfg, trainer.step
    if event["skipped"] or (cfg.train_log_every and (step % cfg.train_log_every == 0 or step <= 5)):
        report.event(event, TRAIN_LINE)
    if event["skipped"]:
        report.line(f"step {step} is left out: bad step {trainer.skipped} of {cfg.skip_bad_steps}")


# ==================================================================================================
# CONTEXT MODELS: what a scorer is; then two that learn from the text, backoff and logistic
# ==================================================================================================


def load_numba() -> Any:
    """The module that compiles what context models do."""
    try:
        import numba
    except ImportError:
        raise UserError("context models need numba: pip install numba, or MIXER=off") from None
    return numba


@functools.cache
def no_kernel_cache() -> None:
    """Say once what the lack of a cache costs."""
    say("warning: numba finds no folder for its cache: every start compiles context models anew, "
        "20 s: set NUMBA_CACHE_DIR")  # fmt: skip


def mend_cache(cache: Any) -> None:
    """Let a cache of numba's that cannot be read or written be as good as an empty one."""
    load, save = cache.load_overload, cache.save_overload

    def load_or_forget(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception as error:  # whatever a damaged pickle raises
            say(f"numba's cache is damaged ({error!r}): it is made anew")
            with contextlib.suppress(OSError):
                cache.flush()
            return None

    def save_or_not(*args: Any) -> None:
        try:
            save(*args)
        except OSError:
            no_kernel_cache()

    cache.load_overload, cache.save_overload = load_or_forget, save_or_not


class kernel:
    """A function that numba compiles when it is first called: importing it needs no numba."""

    def __init__(self, function: Callable[..., Any], makes_arrays: bool = True) -> None:
        self.function, self.makes_arrays = function, makes_arrays
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Any:
        """The function as Python calls it; machine code is kept on disk for the next run."""
        if not script_unchanged():  # it would be kept as the new file's code
            return self.compile(nogil=True)
        try:
            function = self.compile(nogil=True, cache=True)
        except RuntimeError:
            no_kernel_cache()
            return self.compile(nogil=True)
        mend_cache(function._cache)
        return function

    @functools.cached_property
    def part(self) -> Any:
        """The function as other kernels call it: it becomes a part of their machine code.

        Python must not call it: without what that would need, all is compiled in half the time.
        For a number written in a call numba compiles it once more: pass a variable.
        """
        return self.compile(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)

    def compile(self, **options: bool) -> Any:
        """Let numba compile the function."""
        return load_numba().njit(_nrt=self.makes_arrays, **options)(self.function)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    def __getattr__(self, name: str) -> Any:  # what numba asks of a function that another one calls
        return getattr(self.part, name)


# A kernel that makes no array need not count the users of arrays, which takes time.
bare_kernel = functools.partial(kernel, makes_arrays=False)


class Prefetch(kernel):
    """A kernel that is one instruction, which numba has no name for: LLVM's `llvm.prefetch`."""

    @functools.cached_property
    def part(self) -> Any:
        numba = load_numba()
        from llvmlite import ir
        from numba.core import cgutils
        from numba.extending import intrinsic

        def instruction(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind, (array, *place) = signature.args[0], arguments
            array = context.make_array(kind)(context, builder, array)
            address = cgutils.get_item_pointer(context, builder, kind, array, place)
            address = builder.bitcast(address, cgutils.voidptr_t)
            number = ir.IntType(32)
            takes = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
            llvm = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], takes)
            read, keep, data = (number(n) for n in (0, 3, 1))
            builder.call(llvm, [address, read, keep, data])
            return context.get_dummy_value()

        @intrinsic
        def hint(_: Any, array: Any, i: Any, j: Any) -> Any:
            return numba.types.void(array, i, j), instruction

        return numba.njit(_nrt=False, forceinline=True)(lambda array, i, j: hint(array, i, j))


@Prefetch
def prefetch(array, i, j):
    """Have the cache line of array[i, j] loaded, and do not wait for it."""


def net_nats(tokens: Any, logs: Any) -> Any:
    """Cost -ln p of tokens (m,) by the net's log-probabilities (m, V): (m,) float64 nats."""
    return -logs[np.arange(len(tokens)), tokens].astype(np.float64)


def huge_zeros(n: int, dtype: Any) -> Any:
    """Zeros (n,) that take memory when they are touched, in huge pages where there are such."""
    size = max(n * np.dtype(dtype).itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        raise UserError(f"no {size:,} bytes for a context model's tables ({error.strerror}): lower "
                        "MIXER_MEMORY_MB, NGRAM_MAX_ORDER or VAL_MAX_TOKENS") from None  # fmt: skip
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, n)


@kernel
def mix_hash(h, value):
    """One round of a 64-bit multiply-xor-shift."""
    h = (h ^ np.uint64(value)) * np.uint64(0x9E3779B97F4A7C15)
    return h ^ (h >> np.uint64(29))


class ContextModel:
    """What scores the text, each token before it learns from it; this one is the net alone.

    `state` is all that scoring changes, as arrays: a copy of it is a copy of the model's past.
    """

    state: tuple[np.ndarray, ...] = ()
    learned: int = 0  # tokens that it has learned from

    def begin(self, first: int) -> None:
        """Read the text's first token, which is not scored."""

    def cost(self, tokens: np.ndarray, logs: np.ndarray, coder: Any = None) -> np.ndarray:
        """Cost of the text's next tokens; each is learned from after its cost is known.

        tokens (m,) int, logs (m, V) float32: the net's log-probabilities -> (m, 3) float64: nats
        per token by the net alone, by the contexts alone, and mixed.
        """
        return np.repeat(net_nats(tokens, logs)[:, None], 3, axis=1)

    def worth(self) -> dict[str, float]:
        """Nats that the net and each expert have saved, by name, of the tokens that were scored
        with the net since the rehearsal: see `weigh_experts`."""
        return {}

    def save(self) -> tuple[np.ndarray, ...]:
        """A copy of the state."""
        return tuple(array.copy() for array in self.state)

    def restore(self, saved: tuple[np.ndarray, ...]) -> None:
        """Go back to what `save` returned, which stays good for another time."""
        self.state = tuple(array.copy() for array in saved)


# ==================================================================================================
# BACKOFF: exact counts of the text already scored, mixed into the net's distribution
# ==================================================================================================

# Both smoothings are one recursion over the orders k = 0, 1, .. of the context (order k: k tokens),
#     p_k(v) = (max(c(v) - D, 0) + r q(v)) / (n - D m + r),    r = D m + A V,    p_{-1}(v) = 1 / V,
# with c(v) the count of v in the context; n the sum of its counts; m how many of them are above 0;
# r what is taken off them and given out in proportion to q: to p_{k-1} if interpolated, else 1 / V.
# Counts are whole and D <= 1, so the sum of max(c(v) - D, 0) over all v is n - D m: p_k sums to 1,
# whatever was counted. The recursion ends where a context has no counts: the longest context that
# has some decides.
SMOOTHINGS = {  # D, A, and whether it is interpolated
    # Kneser & Ney 1995, interpolated as by Chen & Goodman 1998, with one discount: c(v) is the
    # number of distinct tokens seen left of (context, v), unless the context is the longest. Alone,
    # D = 0.85 is best; beside a net, which knows better what else may come, it should be less.
    "kneser-ney": {"discount": 0.65, "added": 0.0, "interpolated": True},
    # Additive, the longest context alone. Laplace's A = 1 drowns the counts of rare contexts.
    "laplace": {"discount": 0.0, "added": 0.01, "interpolated": False},
}
FIRST_ALPHA, FIRST_TOKENS = 0.25, 8.0  # a learned alpha at start, and how many tokens it is worth

# A node is a string of tokens; its parent lacks the leftmost one, and node 0 is the empty string.
# Node 'a b c' is the pair of the context 'a b' and the token 'c', with the count c; and it is the
# context of what comes after, with n and m.
# The kernels' arguments:
#     state: the tuple of
#         table    (slots,) int32         hash table with open addressing: a node per slot, or 0
#         nodes    (nodes at most,) NODE  key: parent * V + leftmost token, compared in full, which
#                                         makes counts exact; count: c, of the node as a pair; total
#                                         and kinds: n and m, of the node as a context
#         counters (1,) COUNTERS          nodes in use, tokens of the context, tokens learned
#         contexts (order + 1,) int64     the node of the present context of each order
#         weights  (10, 3 order + 3, 2)   float64, by the net's confidence and the trust in counts:
#                                         sum of the n-gram model's shares, number of tokens
#     rule      (1,) RULE     V, BOS, D, A and what else no token changes
#     token     int64         the one that is scored or counted; tokens: (m,)
#     net, top  (m,) float64  the net's log-probability of each token, and of the likeliest, <= 0
NODE = np.dtype([("key", np.int64), *((name, np.int32) for name in ("count", "total", "kinds"))])
COUNTERS = np.dtype([(name, np.int64) for name in ("nodes", "depth", "learned")])
RULE = np.dtype([("vocab", np.int64), ("bos", np.int64), ("discount", np.float64),
                 ("added", np.float64), ("interpolated", bool), ("adapts", bool)])  # fmt: skip


@kernel
def find_slot(table, nodes, key):
    """Where the node with this key stands in the table, or the empty slot where it would."""
    mask = len(table) - 1
    at = np.int64(mix_hash(np.uint64(0), key) >> np.uint64(32)) & mask
    while table[at] and nodes[table[at]].key != key:
        at = (at + 1) & mask
    return at


@kernel
def enter_nodes(table, nodes, used):
    """Enter nodes 1 .. used - 1 into an empty table."""
    for i in range(1, used):
        table[find_slot(table, nodes, nodes[i].key)] = i


@kernel
def ngram_probability(state, token, rule):
    """(p of `token`, trust in it: a number from the longest context with counts); changes nothing.

    trust = 3 * that context's order + 0, 1, 2 for continuations seen once, twice, more on average.
    """
    table, nodes, counters, contexts, _ = state
    r, vocab = rule[0], rule[0].vocab
    p, trust, pair = 1.0 / vocab, 0, 0
    for k in range(counters[0].depth + 1):
        context = nodes[contexts[k]]
        if context.total == 0:  # then longer ones have none either
            break
        if k == 0 or pair:
            left = context.key % vocab if k else token
            pair = table[find_slot(table, nodes, pair * vocab + left)]
        count = nodes[pair].count if pair else 0
        rest = r.added * vocab + r.discount * context.kinds
        mass = max(count - r.discount, 0.0) + rest * (p if r.interpolated else 1.0 / vocab)
        p = mass / (context.total - r.discount * context.kinds + rest)
        trust = 3 * k + min(context.total // context.kinds, 3) - 1
    return p, trust


@kernel
def count_token(state, token, rule):
    """Count `token` once in each of its contexts, then make it the context's newest token."""
    table, nodes, counters, contexts, _ = state
    vocab, depth = rule[0].vocab, counters[0].depth
    pairs, pair = np.empty(depth + 1, np.int64), 0
    for k in range(depth + 1):
        left = nodes[contexts[k]].key % vocab if k else token
        slot = find_slot(table, nodes, pair * vocab + left)
        if table[slot] == 0:
            table[slot] = counters[0].nodes
            nodes[table[slot]].key = pair * vocab + left
            counters[0].nodes += 1
        pair = pairs[k] = table[slot]
    fresh = True
    for k in range(depth, -1, -1):
        counts = fresh or not rule[0].interpolated  # Kneser-Ney: if the next longer pair is new
        fresh = nodes[pairs[k]].count == 0
        if counts:
            nodes[pairs[k]].count += 1
            nodes[contexts[k]].total += 1
            nodes[contexts[k]].kinds += fresh
    counters[0].depth = 1 if token == rule[0].bos else min(depth + 1, len(contexts) - 1)
    contexts[1 : counters[0].depth + 1] = pairs[: counters[0].depth]
    counters[0].learned += 1


@kernel
def cost_ngrams(state, tokens, net, top, rule):
    """(m, 3) nats of tokens by net, n-grams and mixed; each is counted after its cost is known."""
    weights, out = state[4], np.empty((len(tokens), 3))
    for i in range(len(tokens)):
        p, trust = ngram_probability(state, tokens[i], rule)
        odds, confidence = top[i] - math.log(max(1.0 - math.exp(top[i]), 1e-9)), 0
        for edge in range(-3, 6):
            confidence += odds >= edge
        weight = weights[confidence, trust]
        alpha = weight[0] / weight[1]
        mixed = (1.0 - alpha) * math.exp(net[i]) + alpha * p
        out[i] = -net[i], -math.log(p), -math.log(mixed)
        count_token(state, tokens[i], rule)
        if rule[0].adapts:
            weight[0] += alpha * p / mixed
            weight[1] += 1.0
    return out


class BackoffMixer(ContextModel):
    """p_mix = (1 - a) p_net + a p_ngram; the counts and a come from the text before the token.

    A context reaches back to the last BOS and no further: all that lies before it, or before the
    text, would read as more BOS. The context that begins with BOS is the longest one there.
    `alpha` None learns a: for each bin of the net's confidence (log-odds of its likeliest token, in
    whole nats) and of the trust in the counts, a is the mean share a p_ngram / p_mix that the
    n-gram model had in the bin's tokens so far: online EM for a mixture's weight.
    """

    def __init__(
        self, vocab: int, bos: int, order: int, smoothing: str, alpha: float | None, capacity: int
    ) -> None:
        """vocab V; bos: its id; order: longest context, 1 to 8 tokens; capacity: tokens of text."""
        most = 2 + capacity * (order + 1)  # nodes
        if not (1 <= order <= 8 and 0 <= bos < vocab and 0 <= (alpha or 0) <= 1):
            raise ValueError(f"order {order}, BOS {bos} of {vocab}, alpha {alpha}: out of range")
        if most >= 2**31 or most * vocab >= 2**63:
            raise ValueError(f"{capacity} tokens of {vocab} at order {order}: too many to number")
        self.vocab, self.bos, self.capacity = vocab, bos, capacity
        facts = {"vocab": vocab, "bos": bos, "adapts": alpha is None, **SMOOTHINGS[smoothing]}
        self.rule = np.array([tuple(facts[name] for name in RULE.names)], RULE)
        nodes, contexts = huge_zeros(most, NODE), np.zeros(order + 1, np.int64)
        nodes["key"][1], contexts[1] = bos, 1
        prior = (FIRST_ALPHA * FIRST_TOKENS, FIRST_TOKENS) if alpha is None else (alpha, 1.0)
        weights = np.full((10, 3 * order + 3, 2), prior)
        counters = np.array([(2, 1, 0)], COUNTERS)
        self.state = np.zeros(0, np.int32), nodes, counters, contexts, weights
        self.reserve(0)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens; at least half of the table stays empty."""
        table, nodes, counters, contexts, weights = self.state
        if self.learned + tokens > self.capacity:
            raise ValueError(f"{tokens} more tokens are more than the {self.capacity} announced")
        need = 2 * (int(counters["nodes"][0]) + tokens * len(contexts))
        if need > len(table):
            table = huge_zeros(1 << (need - 1).bit_length(), np.int32)
            enter_nodes(table, nodes, counters["nodes"][0])
            self.state = table, nodes, counters, contexts, weights

    def begin(self, first: int) -> None:
        """Read the text's first token, which is not scored. BOS says nothing: it is assumed."""
        if first != self.bos:
            self.reserve(1)
            count_token(self.state, first, self.rule)

    def cost(self, tokens: np.ndarray, logs: np.ndarray, coder: None = None) -> np.ndarray:
        """As the base says; the net's log-probabilities are taken as they are."""
        if logs.shape != (len(tokens), self.vocab):
            raise ValueError(f"{logs.shape} log-probabilities for {len(tokens)} tokens")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab:
            raise ValueError(f"a token outside the vocabulary of {self.vocab}")
        self.reserve(len(tokens))
        net, top = -net_nats(tokens, logs), logs.max(axis=1).astype(np.float64)
        return cost_ngrams(self.state, tokens.astype(np.int64), net, top, self.rule)

    @property
    def learned(self) -> int:
        """How many tokens it has learned from."""
        return int(self.state[2]["learned"][0])


# ==================================================================================================
# LOGISTIC: a token is a path of binary decisions; experts are mixed at each, as logits
# ==================================================================================================

# After Mahoney's PAQ and lpaq (whose "context model" is an expert here, whose "mixer" is a judge;
# here a mixer is the whole). A token whose probability is p costs -log2 p bits; it is predicted bit
# by bit. THE PATH. The tokens are the leaves of a binary tree. Its nodes are numbered like those of
# a heap: the root is 1, node n has the children 2n and 2n + 1. A token of 1,024 is a path of about
# nine decisions, 0 for left and 1 for right. The mixer gives each a probability that is made of
# the past and of the path so far; the token's probability is their product. So the probabilities of
# all tokens sum to 1, whatever the experts say.
# THE EXPERTS. A slot expert has a context, e.g. the last two tokens. A hash of the context and of
# the path's node at level 0, 3, 6 .. finds a SLOT in a table: 32 bytes, which are a tag and 7
# cells, one for each node of three levels. A CELL is what was seen at the node: 12 bits of logit,
# 4 of count, 7 that are the last bits themselves, and 9 of CORRECTION, which is what the mix had
# to be told here so far. A candidate expert lists the last seven tokens that followed its context.
# The match expert finds where the last tokens occurred before, and expects what followed there.
# THE MAPS. What an expert says need not be true. A MAP has a cell for everything that an expert can
# say (22 bits of probability, 10 of count), which learns how often a 1 followed when it was said.
# THE MIX. The inputs are logits, ln(p / (1 - p)). Their weights are the sum of ten rows, one of
# each WEIGHT SET; a set chooses its row by what is known, e.g. by the node, or by the last token.
# The mixed logit is refined by two APMs, maps of it. Two JUDGES do this side by side, each with
# weights and maps of its own. Judge 0 hears the contexts alone; judge 1 hears the net as well, and
# what judge 0 made of the contexts. What is coded is the mean of their probabilities, weighted by
# Bayes' rule: who was right counts for more.
# THREE TREES. MIXER_SIZE=large is three such mixers side by side, whose trees differ. A token's
# probability is the mean of theirs: see `MixerGroup`.
#
# ONE DECISION. The path so far is left, then right: bits 0 1. The node is 5 and the level 2. The
# slot of "order 2" was found at level 0; its cell 5 holds logit 2.0 (2,560: 256ths from -8), count
# 3, the bits 1 1 1 and the correction 0.5 (288: 64ths from -4).
#  1. The expert's inputs are 2.0, from the map's cell for the bits 1 1 1, say, 1.6, and 0.5.
#     The net's input is the logit of its mass below node 11 over its mass below node 5, times 4;
#     the other that only judge 1 hears is the mixed logit of judge 0, times 3.
#  2. Ten rows of weights, added and multiplied by the inputs, give the mixed logit 1.2: p = 0.77.
#     The two refining maps say 0.80 for such a logit, so p = 0.34 x 0.77 + 0.66 x 0.80 = 0.79.
#  3. The bit is 1. The coder keeps the lower 0.79 of its interval; that costs 0.34 bits.
#  4. Learning: the ten rows move along the inputs by a rate times the error 1 - 0.77. The cells of
#     all maps that were asked move towards 1 by 1 / (count + 1.5) of the way. So does the slot's
#     cell, from p = 0.88 to 0.91: its logit is then 2.28, its count 4, its bits 1 1 1 1, and its
#     correction 0.63: 0.5 and (2 / (3 + 1.5) + 0.1) of the error. The node is now 11.
#
# Encoder and decoder must agree to the bit on every machine. So all that priming learns from is
# integers, or single float32 operations in a fixed order; logarithms of tables are `decimal`'s,
# which rounds correctly everywhere. No compiler may fuse or reorder them: no `fastmath` here.
#
# The kernels share three bundles: `fixed`, which no text changes, `past`, which learns from the
# text, and `now` (WORK), which is about one token and one decision.


class Fixed(NamedTuple):
    """What no text changes: tables and the tree. L: levels of the tree, V: tokens."""

    stretch: np.ndarray  # (4096,) float32: logit of a probability in 4096ths
    squash: np.ndarray  # (6145,) int32: probability in 65,536ths of a logit in 256ths, from -12
    after_one: np.ndarray  # (65536,) uint16: a slot's cell -> its logit after a 1, count bits 0
    rate: np.ndarray  # (1024,) int64: 1 / (count + 1.5) in 65,536ths
    advance: np.ndarray  # (16,) int64: chance in 65,536ths that a slot's count goes on
    agility: np.ndarray  # (16,) float32: by a slot's count, steps of a correction per unit of error
    evidence: np.ndarray  # (2048,) int64: candidates' counts -> 0 .. 9
    leaf: np.ndarray  # (V,) int64: a token's path, its first decision the highest bit
    token: np.ndarray  # (2^L,) int64: the token at a leaf, or -1
    inside: np.ndarray  # (2^(L+1),) int64: tokens below each node
    decision: np.ndarray  # (2^L,) int64: number of the node among those with tokens on both sides
    starts: np.ndarray  # (V,) bool: the piece starts a word
    letters: np.ndarray  # (V, longest) uint8: its bytes, see `word_letters`
    sizes: np.ndarray  # (V,) int64: how many
    slot_rows: np.ndarray  # (slot experts, 8) int64: see `context_rows`
    candidate_rows: np.ndarray  # (CANDIDATES, 8) int64
    first_row: np.ndarray  # (SETS,) int64: where each weight set's rows begin
    levels: int  # L
    below_class: int  # decisions of a path that its class, which chooses weights, leaves out
    bos: int  # token that starts a document


class Past(NamedTuple):
    """What the text has taught; a copy of it is a copy of the mixer."""

    slots: np.ndarray  # (n, 8) uint32: a tag, then a cell for each of 7 nodes
    candidates: np.ndarray  # (n, 8) uint32: a tag, then 7 leaves << 16 | count, most recent first
    maps: np.ndarray  # (L, cells of all experts) uint32: 22 bits of probability, 10 of count
    weights: np.ndarray  # (2, rows of all sets, inputs, padded) float32, per judge
    visits: np.ndarray  # (2, rows of all sets) float32: how often each row has learned
    apm: np.ndarray  # (2, V + hashed, 33) uint32: cells by mixed logit; rows by node, by hash
    repeats: np.ndarray  # (2^n,) int32: the position after the last text of SHORTEST_MATCH tokens
    history: np.ndarray  # (capacity,) int32: the tokens so far
    marks: np.ndarray  # (1,) MARKS


MARKS = np.dtype([
    ("tokens", np.int64),  # how many were learned
    ("document", np.int64),  # position of its BOS
    ("match_at", np.int64),  # position of the token that the match expects
    ("match_length", np.int64),  # tokens, 0 if there is no match
    ("joined", np.int64),  # 1 once the net takes part
    ("trust", np.float32, 17),  # in judge 1 by level, once there are two: 0 .. 1
    ("pieces", np.uint64, 2),  # hashes of the current word's pieces, and of the one's before
    ("words", np.uint64, 4),  # hashes of lower-case words: see Context
    ("letters", np.int64),  # of the word so far
])  # fmt: skip

# --------------------------------------------------------------------------------------------------
# The experts. A new slot or candidate context is one more row at its table's end. A new kind is a
# row of KINDS and three names below it, and a box further down with its maps at first, inputs and
# learning; these are called in `new_past` (in the order of KINDS), `predict_bit`, and `learn_bit`
# or, once per token, `code_tokens`. Its tables are fields of Past, what it knows of one token
# fields of WORK; `prepare` has rows of large tables loaded in time. Either way older artifacts
# decode to something else: FORMAT_VERSION goes up.


class Context(NamedTuple):
    """What a slot or candidate expert knows of the past.

    tokens: bit k, 0 to 7, is set if token t-1-k counts; classes: if it counts by its class, the
    first CLASS_LEVELS decisions of its path. pieces: 1 the word so far, from the last piece that
    starts one; 2 that and the word before. words: in lower case, without punctuation; bit 0 is set
    for the word so far, 1 for the one before, 2 for the one before that, 3 for the last of more
    than three letters. document: what was seen counts in it alone.
    Rows of a table must differ in these five: experts with one key would share their cells.
    sparse: most of what is seen once does not come back, so of a new key only the first slot stays.
    size: the smallest MIXER_SIZE that the expert is part of; the rows are in the sizes' order.
    Large has medium's experts by three trees, see `MixerGroup`.
    chooses: the slot's count helps to choose a row of the sixth weight set, which it makes 8 times
    larger; such a context is small. Size and chooses are of no effect in candidates.
    """

    name: str
    tokens: int = 0
    classes: int = 0
    pieces: int = 0
    words: int = 0
    document: bool = False
    sparse: bool = False
    size: str = "small"
    chooses: bool = False


SIZES = ("small", "medium", "large")
SLOT_CONTEXTS = (
    Context("order 1", tokens=0b1),
    Context("order 2", tokens=0b11, chooses=True),
    Context("order 3", tokens=0b111, sparse=True, chooses=True),
    Context("pieces of the word", pieces=1, chooses=True),
    Context("pieces of two words", pieces=2, sparse=True),
    Context("document", document=True),
    Context("document, order 1", tokens=0b1, document=True),
    Context("document, order 2", tokens=0b11, document=True),
    Context("word", words=0b1),
    Context("document, word", words=0b1, document=True),
    Context("order 0", size="medium"),
    Context("t-2", tokens=0b10, size="medium"),
    Context("t-3", tokens=0b100, size="medium"),
    Context("classes of three tokens", classes=0b111, size="medium"),
    Context("classes of four tokens", classes=0b1111, sparse=True, size="medium"),
    Context("last word", words=0b10, size="medium"),
    Context("last two words", words=0b110, sparse=True, size="medium"),
    Context("word, the one before the last", words=0b101, sparse=True, size="medium"),
    Context("word, last long one", words=0b1001, sparse=True, size="medium"),
    Context("document, word pair", words=0b11, document=True, size="medium"),
)
CANDIDATE_CONTEXTS = (Context("candidates, order 4", tokens=0b1111),)
CLASS_LEVELS = 6
SLOTS, CANDIDATES = len(SLOT_CONTEXTS), len(CANDIDATE_CONTEXTS)  # slots: of the largest size
SLOT_MAP_CELLS, CANDIDATE_MAP_CELLS, MATCH_MAP_CELLS = 2048, 200, 128  # per expert and level
NET, MIX = 0, 1  # the first inputs, which only judge 1 hears: the net, and judge 0's mix
KINDS = (  # experts; inputs of a decision; cells of their maps per level
    (1, 1, MATCH_MAP_CELLS),
    (CANDIDATES, CANDIDATES, CANDIDATES * CANDIDATE_MAP_CELLS),
    (SLOTS, 3 * SLOTS, SLOTS * SLOT_MAP_CELLS),  # last: there are fewer in a smaller size
)
# Where each kind begins, and where the last one ends.
MATCH, FIRST_CANDIDATE, FIRST_SLOT, EXPERTS = itertools.accumulate(
    (kind[0] for kind in KINDS), initial=0
)
MATCH_INPUT, CANDIDATE_INPUT, SLOT_INPUT, INPUTS = itertools.accumulate(
    (kind[1] for kind in KINDS), initial=2
)
MATCH_MAP, CANDIDATE_MAP, SLOT_MAP, MAP_CELLS = itertools.accumulate(
    (kind[2] for kind in KINDS), initial=0
)
# The first input of the net, the mix and each expert, and where the last one's inputs end.
FIRST_INPUT = np.cumsum([0, 1, 1] + [kind[1] // kind[0] for kind in KINDS for _ in range(kind[0])])
LANES = 16  # inputs are padded to so many, for vector instructions
LINE = 16  # numbers of 4 bytes in a cache line
WIDTH = -(-INPUTS // LANES) * LANES
SETS = 10  # weight sets, see `choose_rows`
WORK = np.dtype([  # `now`: first what is known of a token, then of one of its decisions
    ("last", np.int64),  # token t-1
    ("second_last", np.int64),  # token t-2
    ("age", np.int64),  # logarithm, to the base 4, of the document's length so far: 0 .. 7
    ("expected", np.int64),  # node of the leaf that the match expects, or -1
    ("judges", np.int64),  # 1, or 2 with the net
    ("cost", np.float64, 3),  # nats of the path so far, per judge and by what is coded
    ("slot_keys", np.uint64, SLOTS),  # hash of each expert's context
    ("slot_hashes", np.uint64, SLOTS),  # hash of that and of the node where the slot begins
    ("slot", np.int64, (LEVELS_MOST, SLOTS)),  # row of `slots`, by the level where it begins
    ("fresh", np.int64, SLOTS),  # whether it is new
    ("candidate_hashes", np.uint64, CANDIDATES),
    ("found", np.int64, CANDIDATES),  # row of `candidates`
    ("unknown", np.int64, CANDIDATES),  # whether it is new
    ("node", np.int64),
    ("level", np.int64),  # of the node, 0 at the root
    ("cell_at", np.int64),  # of the node in its slot, 1 .. 7
    ("top", np.int64),  # level where the slot begins
    ("seen", np.int64),  # small slot experts whose cell has a count
    ("inputs", np.float32, (2, WIDTH)),  # logits, some times a gain, per judge
    # By level: the next decision's are chosen before this one is learned from, and the last token
    # can be undone, see `restore`.
    ("map_at", np.int64, (LEVELS_MOST, EXPERTS)),  # the expert's cell in the maps, -1 if silent
    ("set_rows", np.int64, (LEVELS_MOST, SETS)),  # the row of `weights` of each weight set
    ("apm_rows", np.int64, (LEVELS_MOST, 2)),  # the rows of `apm` that refine the mixed logit
    ("apm_column", np.int64, (LEVELS_MOST, 2)),  # the column that learns, per judge
    ("products", np.float32, WIDTH),  # of the last judge's inputs and weights
    ("mixed", np.float32, 2),  # mixed logit per judge, within 11.9 of 0
    ("p", np.int64, 3),  # probability of a 1 in 65,536ths, per judge; the last is coded
    # By level: p of what was coded, negative if that was a 0, and 0 where nothing was decided.
    ("path", np.int64, LEVELS_MOST),
    ("worth", np.float64, 2 + EXPERTS),  # of the net, the mix and each expert: `weigh_experts`
])  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Tables and the cells of maps

COUNTS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 17, 22, 60, 120, 255])  # a slot's 16 counts
MAP_LIMIT = 1023  # count up to which a map's cell slows down


def logit_tables() -> tuple[np.ndarray, np.ndarray]:
    """Correctly rounded, so the same on every machine: (stretch (4096,) float32, ln(p / (1-p)) of
    p = (i + 1/2) / 4096; logistic (6145,) int64, its inverse in 2^-32, of -12 .. 12 in 256ths)."""
    with decimal.localcontext() as context:
        context.prec = 24
        number = decimal.Decimal
        stretch = [(number(2 * i + 1) / number(8191 - 2 * i)).ln() for i in range(4096)]
        upper = [int(2**32 / (1 + (number(-i) / 256).exp())) for i in range(3073)]
    logistic = [2**32 - p for p in upper[:0:-1]] + upper
    return np.array(stretch, np.float32), np.array(logistic, np.int64)


@functools.cache
def mixer_tables() -> dict[str, np.ndarray]:
    """The first fields of `Fixed`."""
    stretch, logistic = logit_tables()
    p, after_one = logistic[1024 : 1024 + 4096], np.zeros((4096, 16), np.uint16)
    for bits, n in enumerate(COUNTS.tolist()):
        to = p + (2**32 - p) * 2 // (2 * n + 3)  # by 1 / (n + 1.5) of the way
        at = np.clip(np.searchsorted(p, to), 1, 4095)
        after_one[:, bits] = (at - (p[at] - to > to - p[at - 1])) << 4
    return {
        "stretch": stretch,
        "squash": np.clip(logistic >> 16, 1, 65535).astype(np.int32),
        "after_one": after_one.reshape(-1),
        "rate": 65536 * 2 // (2 * np.arange(1024) + 3),
        "advance": np.append(65536 // np.diff(COUNTS), 0),
        "agility": ((2 / (COUNTS + 1.5) + 0.1) * CORRECTION_STEPS).astype(np.float32),
        "evidence": np.searchsorted([1, 2, 3, 4, 5, 7, 10, 16, 32], np.arange(2048), "right"),
    }


def map_cells(probability: np.ndarray | list, count: int = 0) -> np.ndarray:
    """Probabilities in 65,536ths -> uint32 cells of 22 bits of probability and 10 of count."""
    return (np.asarray(probability, np.int64) << 16 | count).astype(np.uint32)


@bare_kernel
def map_logit(fixed, cell):
    """The logit of a map's cell."""
    return fixed.stretch[cell >> np.uint32(20)]


@bare_kernel
def squashed(fixed, x):
    """Logit, float32, within 12 of 0 -> probability in 65,536ths, 1 .. 65,535."""
    return fixed.squash[np.int64((x + np.float32(12)) * np.float32(256) + np.float32(0.5))]


@bare_kernel
def learn_cell(fixed, cells, at, bit, limit):
    """Move the probability of a map's cell towards the bit by 1 / (count + 1.5) of the way."""
    n, p = np.int64(cells[at] & np.uint32(1023)), np.int64(cells[at] >> np.uint32(10))
    p += ((bit * 4194303 - p) * fixed.rate[n]) >> 16
    cells[at] = np.uint32((p << 10) | min(n + 1, limit))


@bare_kernel
def learn_maps(fixed, past, now, bit):
    """Let the maps learn what followed when the experts said what they said."""
    maps, map_at = past.maps[now.level], now.map_at[now.level]
    for e in range(FIRST_SLOT + len(fixed.slot_rows)):
        if map_at[e] >= 0:
            learn_cell(fixed, maps, map_at[e], bit, MAP_LIMIT)


# --------------------------------------------------------------------------------------------------
# The tree


class Likeness(NamedTuple):
    """What makes two tokens alike: the tokens before them, which count 1, and those after them."""

    after: float = 0.4  # how much these count
    components: int = 60  # principal ones, of both


TREES = Likeness(), Likeness(after=1.0), Likeness(components=8)


def token_trees(text: np.ndarray, vocab: int, size: str) -> np.ndarray:
    """The trees of a mixer of MIXER_SIZE: (1 or 3, V) int64, see `token_tree`."""
    return np.stack([token_tree(text, vocab, like) for like in TREES[: tree_count(size)]])


def token_tree(text: np.ndarray, vocab: int, like: Likeness = TREES[0]) -> np.ndarray:
    """Leaf of each token in a binary tree: alike tokens lie close. (V,) int64.

    Tokens are alike if the same tokens come before and after them, as counted in `text`. A node's
    tokens are split by their first principal component, then by 2-means.
    """
    frequency = np.bincount(text, minlength=vocab).astype(np.float64)
    column, common = np.full(vocab, min(vocab, 1024) - 1), np.argsort(-frequency, kind="stable")
    column[common[:1024]] = np.arange(min(vocab, 1024))
    width, text = min(vocab, 1024), text.astype(np.int64)

    def root_shares(here: np.ndarray, there: np.ndarray) -> np.ndarray:
        pairs = np.bincount(here * width + column[there], minlength=vocab * width)
        pairs = pairs.reshape(vocab, width).astype(np.float32)
        return np.sqrt(pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1))

    x = root_shares(text[1:], text[:-1]), root_shares(text[:-1], text[1:])
    x = np.hstack([x[0], np.float32(like.after) * x[1]])
    share = (frequency / max(frequency.sum(), 1))[:, None]
    x -= (x * share).sum(axis=0)
    _, vectors = np.linalg.eigh((x * share).T @ x)
    x, weight = x @ vectors[:, -like.components :], np.sqrt(frequency + 1)[:, None]
    nodes, leaf = [np.arange(vocab)], np.zeros(vocab, np.int64)
    for below in range(tree_levels(vocab) - 1, -1, -1):
        nodes = [side for node in nodes for side in parted(node, x[node], weight[node], 1 << below)]
    for i, node in enumerate(nodes):
        leaf[node] = i
    return leaf


def parted(
    node: np.ndarray, x: np.ndarray, weight: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) with features x (n, K) -> two sets of like ones, of `room` tokens at most each.

    The left one is never empty, the right one is if there is one token.
    """
    if len(node) < 2:
        return node, node[:0]
    centred = x - (x * weight).sum(axis=0) / weight.sum()
    key = centred @ np.linalg.eigh((centred * weight).T @ centred)[1][:, -1]
    least, most = max(len(node) - room, 1), min(room, len(node) - 1)
    for _ in range(20):
        order, cut = np.argsort(key, kind="stable"), np.clip((key < 0).sum(), least, most)
        a, b = order[:cut], order[cut:]
        near, far = ((x[i] * weight[i]).sum(axis=0) / weight[i].sum() for i in (a, b))
        key = ((x - near) ** 2).sum(axis=1) - ((x - far) ** 2).sum(axis=1)
        if (np.argsort(key, kind="stable") == order).all():
            break
    return node[a], node[b]


@bare_kernel
def net_masses(fixed, mass, row):
    """Sum the net's row (V,), in 2^-30, below every node of the tree."""
    leaves = len(fixed.token)
    mass[leaves:] = 0
    for v in range(len(row)):
        mass[leaves + fixed.leaf[v]] = np.int64(row[v]) + 1  # no side has all of the mass
    for node in range(leaves - 1, 0, -1):
        mass[node] = mass[2 * node] + mass[2 * node + 1]


# --------------------------------------------------------------------------------------------------
# Contexts: the text so far, and the rows of a table that belong to a context

WAYS = 4  # rows of a table in which a key may be: 4 slots are two cache lines


def context_rows(contexts: tuple[Context, ...], regions: tuple[tuple, tuple]) -> np.ndarray:
    """Contexts -> (n, 8) int64 for kernels: tokens, classes, pieces, words, document, first row
    and rows of the table's region, sparse; regions: (first row, rows) for others, for documents."""
    rows = [(*c[1:6], *regions[c.document], c.sparse) for c in contexts]
    return np.array(rows, np.int64)


@bare_kernel
def recent_token(fixed, past, back):
    """Token t - back, or BOS where that lies before the document."""
    marks = past.marks[0]
    at = marks.tokens - back
    return np.int64(past.history[at]) if at >= marks.document and at >= 0 else fixed.bos


@bare_kernel
def context_keys(fixed, past, rows, keys):
    """Write the 64-bit key (n,) of each context's row (n, 8): it is of the past alone."""
    marks, above = past.marks[0], max(fixed.levels - CLASS_LEVELS, 0)
    for a in range(len(rows)):
        row = rows[a]
        h = mix_hash(np.uint64(1 << 40), row[0] | row[1] << 8 | row[2] << 16 | row[3] << 20)
        h = mix_hash(h, row[4])
        for back in range(8):
            if row[0] >> back & 1:
                h = mix_hash(h, recent_token(fixed, past, back + 1))
            if row[1] >> back & 1:
                h = mix_hash(h, fixed.leaf[recent_token(fixed, past, back + 1)] >> above)
        for k in range(row[2]):
            h = mix_hash(h, marks.pieces[k])
        for k in range(4):
            if row[3] >> k & 1:
                h = mix_hash(h, marks.words[k])
        keys[a] = mix_hash(h, marks.document) if row[4] else h


@bare_kernel
def touch_rows(table, rows, keys, node, hashes, at):
    """Write the hash (n,) of each key (n,) and a node, and the first place (n,) in the table where
    it may be; have the rows there loaded. hashes may be keys: they are then replaced."""
    for a in range(len(rows)):
        h = hashes[a] = mix_hash(keys[a], node)
        place = rows[a, 5] + ((np.int64(h & np.uint64(0xFFFFFFFF)) * rows[a, 6]) >> 32)
        at[a] = place & ~(WAYS - 1)
        prefetch(table, at[a], 0)
        prefetch(table, at[a] + WAYS // 2, 0)


@bare_kernel
def tag_of(h):
    """What tells a key from the others that may be in the same rows: 16 bits, never 0."""
    return np.int64(h >> np.uint64(48)) | 1


@bare_kernel
def place_of(table, h, first):
    """Where a hash is, from its first place on; -1 if nowhere."""
    tag = tag_of(h)
    for place in range(first, first + WAYS):
        if np.int64(table[place, 0]) == tag:
            return place
    return -1


@bare_kernel
def find_rows(table, rows, hashes, at, fresh, first_ones, used, blank, turn):
    """Go from each hash's first place to where it is; a new key gets the least used row, cleared.

    fresh (n,): written, whether the key is new. first_ones: these are the first rows that the keys
    have in this token; else a sparse context that was new there gets a row that nobody finds again.
    used: mask of the bits of a row's cell 1 that say how much it is used; blank: a cleared cell;
    turn: which of the least used rows goes.
    """
    for a in range(len(rows)):
        new = fresh[a] and rows[a, 7] and not first_ones
        place = len(table) - 1 - a if new else place_of(table, hashes[a], at[a])
        if place < 0:
            place = at[a] + ((turn + a) & (WAYS - 1))
            for way in range(at[a], at[a] + WAYS):
                if np.int64(table[way, 1]) & used < np.int64(table[place, 1]) & used:
                    place = way
            new = True
        fresh[a] = new
        if new:
            row = table[place]
            row[0] = tag_of(hashes[a])
            for k in range(1, 8):
                row[k] = blank
        at[a] = place


@bare_kernel
def learn_text(fixed, past, token):
    """Append a token to the history, the document and the words."""
    marks = past.marks[0]
    pieces = marks.pieces
    past.history[marks.tokens] = token
    if token == fixed.bos:
        marks.document, pieces[0], pieces[1] = marks.tokens, 1 << 50, 1 << 50
        marks.words[:] = 0
        marks.letters = 0
    elif fixed.starts[token]:
        pieces[1], pieces[0] = pieces[0], mix_hash(np.uint64(5 << 40), token)
    else:
        pieces[0] = mix_hash(pieces[0], token)
    marks.tokens += 1
    for k in range(fixed.sizes[token]):
        learn_letter(marks, fixed.letters[token, k])


@bare_kernel
def learn_letter(marks, letter):
    """Go on with the word in lower case, or end it: where `letter` is 0."""
    words = marks.words
    if letter:
        words[0] = mix_hash(words[0] + np.uint64(1), letter)
        marks.letters += 1
    elif words[0]:
        if marks.letters > 3:
            words[3] = words[0]
        words[2], words[1], words[0] = words[1], words[0], np.uint64(0)
        marks.letters = 0


# --------------------------------------------------------------------------------------------------
# Slot experts: how often a 1 came at this node after this context

SLOT_LEVELS = 3  # decisions that share a slot: a tag and 7 nodes are 32 bytes
CORRECTION_STEPS = 64  # per unit of logit
# A slot's cell, from the highest bit: 12 bits of logit, in 256ths from -8; 4 of count, see COUNTS;
# 7 of the last 6 bits, below a 1 that says how many they are; 9 of correction, in 64ths from -4.
UNSEEN = 2048 << 20 | 0 << 16 | 1 << 9 | 256


def first_slot_maps(slots: int) -> np.ndarray:
    """The slots' maps at first, which trust the cell's logit: by expert, last bits, 4 of logit."""
    logits = 3072 + (np.arange(16) * 2 - 15) * 128
    return np.tile(map_cells(mixer_tables()["squash"][logits], 10), slots * 128)


@bare_kernel
def slot_inputs(fixed, past, now):
    """Write three inputs per expert: the cell's logit, that of the map for cells with such a logit
    and these last bits, and the cell's correction.

    Cells and maps have a loop each: in a short one, more loads are under way at once.
    """
    x, slot = now.inputs[0], now.slot[now.top]
    maps, map_at = past.maps[now.level], now.map_at[now.level]
    now.seen = 0
    for a in range(len(fixed.slot_rows)):
        cell = np.int64(past.slots[slot[a], now.cell_at])
        e, j = FIRST_SLOT + a, SLOT_INPUT + 3 * a
        x[j] = np.float32((cell >> 20) - 2048) * np.float32(1 / 256)
        x[j + 2] = np.float32((cell & 511) - 256) * np.float32(1 / CORRECTION_STEPS)
        map_at[e] = SLOT_MAP + a * SLOT_MAP_CELLS + (cell >> 9 & 127) * 16 + (cell >> 28)
        if not cell >> 16 & 15:
            map_at[e] = -1
    for a in range(len(fixed.slot_rows)):
        e, j = FIRST_SLOT + a, SLOT_INPUT + 3 * a
        x[j + 1] = np.float32(0)
        if map_at[e] >= 0:
            x[j + 1] = map_logit(fixed, maps[map_at[e]])
            now.seen += a < SMALL_SLOTS


@bare_kernel
def learn_slots(fixed, past, now, bit):
    """Move each expert's cell towards the bit, and its correction against the error of the mix.

    The count goes on by chance, see COUNTS, and the correction is rounded by chance.
    """
    error = np.float32(bit * 65536 - squashed(fixed, now.mixed[0])) * np.float32(1 / 65536)
    slot = now.slot[now.top]
    dice = ((past.marks[0].tokens * 16 + now.level) * 0x9E3779B1 >> 12) & 0xFFFF
    for a in range(len(fixed.slot_rows)):
        cell = np.int64(past.slots[slot[a], now.cell_at])
        logit, count, last = cell >> 16, cell >> 16 & 15, cell >> 9 & 127
        if bit:
            after = np.int64(fixed.after_one[logit])
        else:  # mirror the logit, learn a 1, mirror back; 0, which has no mirror, never occurs
            after = 65536 - np.int64(fixed.after_one[65536 - logit + 2 * count])
        after |= count + (dice < fixed.advance[count])
        last = last << 1 & 63 | 64 if last & 64 else last << 1
        chance = np.float32(dice + a * 0x9E37 & 0xFFFF) * np.float32(1 / 65536)
        moved = np.float32(cell & 511) + error * fixed.agility[count]
        correction = min(max(np.int64(moved + chance), 1), 511)
        past.slots[slot[a], now.cell_at] = after << 16 | (last | bit) << 9 | correction


# --------------------------------------------------------------------------------------------------
# Candidate experts: which tokens followed this context, the most recent first


def first_candidate_maps() -> np.ndarray:
    """The candidates' maps at first: by expert, evidence for 0 and for 1, and the newest's bit."""
    evidence = np.array([0, 10, 20, 30, 40, 55, 80, 130, 220, 400])
    odds = (evidence + 4) * 65536 // (evidence[:, None] + evidence + 8)
    return np.tile(np.repeat(map_cells(odds).reshape(-1), 2), CANDIDATES)


@bare_kernel
def candidate_inputs(fixed, past, now):
    """Write one input per expert, from the counts of the candidates below each side of the node."""
    x, levels, map_at = now.inputs[0], fixed.levels, now.map_at[now.level]
    for c in range(CANDIDATES):
        n0, n1, newest = 0, 0, -1
        for m in range(1, 8):
            entry = past.candidates[now.found[c], m]
            if entry == 0:
                break
            leaf = np.int64(entry >> np.uint32(16)) | 1 << levels
            if leaf >> (levels - now.level) == now.node:
                bit = leaf >> (levels - now.level - 1) & 1
                newest = bit if newest < 0 else newest
                n0 += np.int64(entry & np.uint32(0xFFFF)) * (1 - bit)
                n1 += np.int64(entry & np.uint32(0xFFFF)) * bit
        e, j = FIRST_CANDIDATE + c, CANDIDATE_INPUT + c
        x[j], map_at[e] = np.float32(0), -1
        if newest >= 0:
            pair = fixed.evidence[n0] * 10 + fixed.evidence[n1]
            map_at[e] = CANDIDATE_MAP + c * CANDIDATE_MAP_CELLS + pair * 2 + newest
            x[j] = map_logit(fixed, past.maps[now.level, map_at[e]])


@bare_kernel
def learn_candidates(past, now, leaf):
    """Put the token's leaf first in each expert's row; new evidence fades the rest."""
    for c in range(CANDIDATES):
        row, m = past.candidates[now.found[c]], 1
        while m < 7 and row[m] and np.int64(row[m] >> np.uint32(16)) != leaf:
            m += 1
        known = row[m] != 0 and np.int64(row[m] >> np.uint32(16)) == leaf
        count = np.int64(row[m] & np.uint32(0xFFFF)) if known else 0
        for k in range(m, 1, -1):
            row[k] = row[k - 1]
        for k in range(2, 8):
            old = np.int64(row[k] & np.uint32(0xFFFF))
            if old > 2:
                row[k] -= np.uint32((old + 1) >> 2)
        row[1] = np.uint32((leaf << 16) | min(count + 1, 255))


# --------------------------------------------------------------------------------------------------
# The match expert: what followed when the last tokens occurred before

COMPARED_TOKENS, SHORTEST_MATCH = 32, 7  # when a match is found; it grows from there


def first_match_maps() -> np.ndarray:
    """The match's maps at first: by length, up to 63, and the bit that it expects."""
    return np.tile(map_cells([16384, 49152]), 64)


@bare_kernel
def match_input(fixed, past, now):
    """Write one input, if the leaf that the match expects is below the node."""
    x, map_at = now.inputs[0], now.map_at[now.level]
    x[MATCH_INPUT], map_at[MATCH] = np.float32(0), -1
    if now.expected >> (fixed.levels - now.level) == now.node:
        bit = now.expected >> (fixed.levels - now.level - 1) & 1
        map_at[MATCH] = MATCH_MAP + min(past.marks[0].match_length, 63) * 2 + bit
        x[MATCH_INPUT] = map_logit(fixed, past.maps[now.level, map_at[MATCH]])


@bare_kernel
def learn_match(past, token):
    """Keep the match if it expected the token, else look for the last place of this text; then
    enter this place."""
    marks, history = past.marks[0], past.history
    n = marks.tokens
    if marks.match_length and history[marks.match_at] == token:
        marks.match_at += 1
        marks.match_length += 1
    else:
        marks.match_length = 0
    if n < SHORTEST_MATCH:
        return
    h = np.uint64(9)
    for k in range(1, SHORTEST_MATCH + 1):
        h = mix_hash(h, history[n - k])
    at, length = np.int64(h >> np.uint64(20)) & (len(past.repeats) - 1), 0
    before = np.int64(past.repeats[at])
    if marks.match_length == 0 and before:
        while length < min(COMPARED_TOKENS, before) and (
            history[before - 1 - length] == history[n - 1 - length]
        ):
            length += 1
        marks.match_at, marks.match_length = before, length if length >= SHORTEST_MATCH else 0
    past.repeats[at] = n


# --------------------------------------------------------------------------------------------------
# Weight sets and the mix

CHOOSERS = tuple(a for a, context in enumerate(SLOT_CONTEXTS) if context.chooses)
SMALL_SLOTS = sum(context.size == "small" for context in SLOT_CONTEXTS)
# The rate is FIRST_RATE / (1 + FADE * visits of the row), at least LAST_RATE, over the inputs.
FIRST_RATE, LAST_RATE, FADE = np.float32(0.12), np.float32(0.003), np.float32(0.003)
FIRST_WEIGHTS = 3.0  # summed over sets and inputs
LEAST_TRUST = np.float32(0.001)
# The net joins late, when the rates are low. Its logit is multiplied by NET_GAIN and its weight
# divided by that: it says the same at first, and learns faster, by the gain's square. The contexts
# keep OTHERS of their weights. Whether that is enough, the weight of judge 0's mix learns as fast.
NET_GAIN, MIX_GAIN = np.float32(4), np.float32(3)
NET_WEIGHT, OTHERS = np.float32(0.25), np.float32(0.8)  # NET_WEIGHT: of its logit, over all sets


def chooser_levels(vocab: int, memory_mb: int) -> int:
    """Decisions of t-1's path that choose a row of the class set, which has at most 2^16 rows."""
    most = min(1 << 16, memory_mb << 10)
    return min(max(most // vocab, 1).bit_length() - 1, tree_levels(vocab))


def set_sizes(vocab: int, memory_mb: int) -> list[int]:
    """Rows of each weight set, in the order of `choose_rows`; of words some share a row."""
    levels, classes = tree_levels(vocab), vocab << chooser_levels(vocab, memory_mb)
    seen, counts, words = levels * (SMALL_SLOTS + 1), 8 ** len(CHOOSERS), min(64, memory_mb) << 11
    return [vocab, vocab, 8 * vocab, 8 * vocab, seen, counts, 16 * levels, classes, 1, words]


@bare_kernel
def choose_rows(fixed, past, now, level, node):
    """Choose a row of each weight set for a decision, before its slots are known."""
    rows, decision = now.set_rows[level], fixed.decision[node]
    marks, words = past.marks[0], past.weights.shape[1] - fixed.first_row[SETS - 1]
    rows[0] = decision
    rows[1] = now.second_last
    rows[2] = now.last * 8 + min(level, 7)
    rows[3] = now.age * len(fixed.leaf) + decision
    rows[4] = level * (SMALL_SLOTS + 1)  # and, like the next, some more: see `choose_by_counts`
    rows[5] = 0
    rows[6] = min(marks.letters, 15) * fixed.levels + level
    rows[7] = (fixed.leaf[now.last] >> fixed.below_class) * len(fixed.leaf) + decision
    rows[8] = 0  # one for all decisions: what they share is learned once, and soon
    rows[9] = np.int64(mix_hash(marks.words[0], level) >> np.uint64(24)) % words
    for k in range(SETS):
        rows[k] += fixed.first_row[k]


@bare_kernel
def choose_by_counts(past, now):
    """Go on, once, to the rows of the two sets that the counts of the slots' cells choose."""
    rows, slot, counts = now.set_rows[now.level], now.slot[now.top], 0
    for a in CHOOSERS:
        counts = counts * 8 + (np.int64(past.slots[slot[a], now.cell_at]) >> 17 & 7)
    rows[4] += now.seen
    rows[5] += counts


@bare_kernel
def mixed_logit(past, now, judge):
    """The inputs times the sum of the sets' rows. Every loop but the last becomes vectors."""
    products, x, weights = now.products, now.inputs[judge], past.weights[judge]
    rows = now.set_rows[now.level]
    row = weights[rows[0]]
    for j in range(len(row)):
        products[j] = row[j]
    for k in range(1, SETS):
        row = weights[rows[k]]
        for j in range(len(row)):
            products[j] += row[j]
    for j in range(len(row)):
        products[j] *= x[j]
    a = b = c = d = np.float32(0)
    for j in range(0, len(row), 4):  # one order on every machine
        a += products[j]
        b += products[j + 1]
        c += products[j + 2]
        d += products[j + 3]
    return min(max((a + b) + (c + d), np.float32(-11.9)), np.float32(11.9))  # see `squashed`


@bare_kernel
def learn_weights(fixed, past, now, judge, bit):
    """Take a gradient step with each of the sets' rows, smaller the more it has taken."""
    weights, visits, x = past.weights[judge], past.visits[judge], now.inputs[judge]
    error = np.float32(bit * 65536 - squashed(fixed, now.mixed[judge])) * np.float32(1 / 65536)
    error /= np.float32(weights.shape[1])
    rows = now.set_rows[now.level]
    for k in range(SETS):
        row, n = weights[rows[k]], visits[rows[k]]
        visits[rows[k]] = n + np.float32(1)
        step = error * max(LAST_RATE, FIRST_RATE / (np.float32(1) + n * FADE))
        for j in range(len(row)):  # a length unknown to the compiler: it makes vectors of the loop
            row[j] += step * x[j]


def join_net(past: Past) -> None:
    """Let the net in: judge 1, which hears it, starts from judge 0's weights and maps."""
    for table in (past.weights, past.visits, past.apm):
        table[1] = table[0]
    past.weights[1] *= OTHERS
    past.weights[1, :, NET], past.weights[1, :, MIX] = NET_WEIGHT / NET_GAIN / SETS, 0
    past.marks["joined"], past.marks["trust"] = 1, 0.5


# --------------------------------------------------------------------------------------------------
# Refinement: two adaptive probability maps (APM) of the mixed logit, per judge

APM_LIMIT = 1000  # count up to which an APM's cell slows down


def first_apm_row() -> np.ndarray:
    """An APM's row of 33 cells at first, which trusts the mixed logits -8, -7.5 .. 8."""
    return map_cells(mixer_tables()["squash"][3072 + (np.arange(33) - 16) * 128], 15)


@bare_kernel
def choose_apm_rows(fixed, past, now, level, node):
    """Choose the APMs' rows for a decision: the node's, and its hash with token t-1."""
    rows, vocab = now.apm_rows[level], len(fixed.leaf)
    h = mix_hash(np.uint64(now.last) << np.uint64(20), node) >> np.uint64(40)
    rows[0] = fixed.decision[node]
    rows[1] = vocab + np.int64(h) % (past.apm.shape[1] - vocab)


@bare_kernel
def refined(fixed, past, now, judge):
    """Probability in 65,536ths: a third each of the mixed logit's own and the APMs'."""
    mixed, rows = now.mixed[judge], now.apm_rows[now.level]
    place = min(max((mixed + np.float32(8)) * np.float32(2), np.float32(0)), np.float32(31.99))
    low, total = np.int64(place), np.float32(0)
    high = place - np.float32(low)
    for k in range(2):
        row = past.apm[judge, rows[k]]
        a = np.float32(row[low] >> np.uint32(10)) * (np.float32(1) - high)
        total += a + np.float32(row[low + 1] >> np.uint32(10)) * high
    now.apm_column[now.level, judge] = low + (high >= np.float32(0.5))
    p = np.float32(squashed(fixed, mixed)) * np.float32(0.34) + total * np.float32(0.33 / 64)
    return min(max(np.int64(p), 1), 65535)


@bare_kernel
def learn_apm(fixed, past, now, judge, bit):
    """Move the cell nearest to the mixed logit, in each APM, towards the bit."""
    rows = now.apm_rows[now.level]
    for k in range(2):
        row = past.apm[judge, rows[k]]
        learn_cell(fixed, row, now.apm_column[now.level, judge], bit, APM_LIMIT)


# --------------------------------------------------------------------------------------------------
# The arithmetic coder, carry-less and binary, as in lpaq

SCORE, ENCODE, DECODE, POP = 0, 1, 2, 3


@bare_kernel
def pop_bit(state, buffer, p):
    """Take a bit, whose probability of a 1 is p in 65,536ths, from a stack: see `Stack`."""
    x, left = state[0], state[1]
    low = x & np.uint64(0xFFFF)
    bit = np.int64(low < np.uint64(p))
    share, below = (p, 0) if bit else (65536 - p, p)
    x = np.uint64(share) * (x >> np.uint64(16)) + low - np.uint64(below)
    while x < 1 << 24 and left > 0:
        left -= np.uint64(1)
        x = x << np.uint64(8) | np.uint64(buffer[left])
    state[0], state[1] = x, left
    return bit


@bare_kernel
def push_bit(state, buffer, p, bit):
    """Put a bit on a stack, from which `pop_bit` takes it."""
    x, left = state[0], state[1]
    share, below = np.uint64(p if bit else 65536 - p), np.uint64(0 if bit else p)
    while x >= share << np.uint64(16):
        buffer[left] = x & np.uint64(255)
        left += np.uint64(1)
        x >>= np.uint64(8)
    state[0] = ((x // share) << np.uint64(16)) + x % share + below
    state[1] = left


@bare_kernel
def code_bit(coder, p, bit):
    """Encode the bit, or decode one, whose probability of a 1 is p in 65,536ths; returns the bit.

    coder: (4,) uint64, which are low, high, the decoder's window and the position in the buffer;
    the buffer (n,) uint8; and the mode. To POP, the first two are a stack's: see `pop_bit`.
    """
    state, buffer, mode = coder
    if mode == SCORE:
        return bit
    if mode == POP:
        return pop_bit(state, buffer, p)
    middle = state[0] + (((state[1] - state[0]) * np.uint64(p)) >> np.uint64(16))
    if mode == DECODE:
        bit = np.int64(state[2] <= middle)
    if bit:
        state[1] = middle
    else:
        state[0] = middle + np.uint64(1)
    while (state[0] ^ state[1]) & np.uint64(0xFF000000) == 0:
        at = np.int64(state[3])
        if mode == ENCODE:
            buffer[at] = state[1] >> np.uint64(24)
        else:
            byte = np.uint64(buffer[at]) if at < len(buffer) else np.uint64(0)
            state[2] = (state[2] << np.uint64(8)) & np.uint64(0xFFFFFFFF) | byte
        state[3] += np.uint64(1)
        state[0] = (state[0] << np.uint64(8)) & np.uint64(0xFFFFFFFF)
        state[1] = (state[1] << np.uint64(8)) & np.uint64(0xFFFFFFFF) | np.uint64(255)
    return bit


class Coder:
    """An arithmetic code that is being written, or with `data` being read."""

    head_bytes = 0  # of the code, which say nothing

    def __init__(self, data: bytes | None = None) -> None:
        self.mode, self.out = ENCODE if data is None else DECODE, bytearray()
        self.buffer = np.frombuffer(bytearray(data or b""), np.uint8)
        window = int.from_bytes((data or b"")[:4].ljust(4, b"\0"), "big")
        self.state = np.array([0, 0xFFFFFFFF, window, 4 if data is not None else 0], np.uint64)

    def room(self, decisions: int) -> tuple[np.ndarray, np.ndarray, int]:
        """What `code_bit` takes, for so many more decisions, of at most 2 bytes each."""
        if self.mode == ENCODE:
            self.buffer, self.state[3] = np.zeros(2 * decisions + 8, np.uint8), 0
        return self.state, self.buffer, self.mode

    def flush(self) -> None:
        """Take what has been written since `room`."""
        if self.mode == ENCODE:
            self.out += self.buffer[: int(self.state[3])].tobytes()

    def finish(self) -> bytes:
        """The whole code. Its last byte, with zeros behind it, lies inside the final interval."""
        return bytes(self.out) + bytes([int(self.state[1]) >> 24])

    def surplus(self) -> int:
        """Bytes that were read beyond the code's end; negative if there are more to read.

        The decoder's window of 4 bytes ends 3 bytes behind the code's last one.
        """
        return int(self.state[3]) - len(self.buffer) - 3


class Stack:
    """A code of tokens by several mixers at once, that is being written, or with `data` being read.

    A token has a path by each tree, so no bit can be coded by the mean of all. But one mixer may
    code it, if the choice, which costs bits, carries something: "bits back" (Frey, Hinton,
    doi:10.1093/comjnl/40.2_and_3.157). The writer takes bits off the code that is there already
    and reads them as the choice, each mixer as likely as its share of the token's probability. Then
    it writes the token's path by that mixer, and the choice, all as likely. The reader, who gets
    both, knows the shares as well and puts the bits back. In all that costs what the mean does.
    So a code has to give back first what was written last: asymmetric numeral systems (Duda,
    arXiv:1311.2540), a number whose last digits are the newest. A text is written from its end.
    """

    FIRST, head_bytes = 1 << 16, 2  # the number before anything is written

    def __init__(self, data: bytes | None = None) -> None:
        self.notes: list[tuple[np.ndarray, list[int]]] = []  # of each token, see `note`
        size = len(data or b"")
        self.buffer = np.frombuffer((data or b"") + bytes(8), np.uint8).copy()
        self.state = np.array([0, size], np.uint64)  # the number; its digits in the buffer
        while self.state[0] < 1 << 24 and self.state[1]:
            self.state[1] -= np.uint64(1)
            self.state[0] = self.state[0] << np.uint64(8) | self.buffer[int(self.state[1])]
        self.reads = data is not None

    def room(self, _: int) -> tuple[np.ndarray, np.ndarray, int]:
        """What `code_bit` takes to read a path."""
        return self.state, self.buffer, POP

    def flush(self) -> None:
        """See `Coder`."""

    def note(self, paths: np.ndarray, shares: list[int]) -> None:
        """A token to be written: its `path` (n, L) by each mixer; shares: see `take_choice`."""
        self.notes.append((paths, shares))

    def choice(self, count: int) -> int:
        """Read which mixer of so many coded the next token."""
        return take_choice(self.state, self.buffer, even_shares(count))

    def give_back(self, which: int, shares: list[int]) -> None:
        """Write which mixer it was, as its writer had read it."""
        put_choice(self.state, self.buffer, which, shares)

    def finish(self) -> bytes:
        """The whole code."""
        state = np.array([self.FIRST, 0], np.uint64)
        decisions = sum(paths.shape[1] + len(paths) for paths, _ in self.notes)
        buffer = np.zeros(2 * decisions + 8, np.uint8)
        for paths, shares in reversed(self.notes):
            which = take_choice(state, buffer, shares)
            for p in paths[which, ::-1].tolist():
                if p:
                    push_bit(state, buffer, abs(p), p > 0)
            put_choice(state, buffer, which, even_shares(len(paths)))
        number, digits = state.tolist()
        size = (number.bit_length() + 7) // 8
        return buffer[:digits].tobytes() + number.to_bytes(size, "little")

    def surplus(self) -> int:
        """0 where all was read, to what was there before anything was written; else negative."""
        return -(self.state.tolist() != [self.FIRST, 0])


def take_choice(state: np.ndarray, buffer: np.ndarray, shares: list[int]) -> int:
    """Take one of n things from a stack. shares (n,): of each among it and those before it."""
    for i in range(len(shares) - 1, 0, -1):
        if pop_bit(state, buffer, shares[i]):
            return i
    return 0


def put_choice(state: np.ndarray, buffer: np.ndarray, which: int, shares: list[int]) -> None:
    """Put one of n things on a stack, from which `take_choice` takes it."""
    for i in range(max(which, 1), len(shares)):
        push_bit(state, buffer, shares[i], i == which)


def even_shares(count: int) -> list[int]:
    """The shares of things that are all as likely: see `take_choice`."""
    return [65536 // (i + 1) for i in range(count)]


AnyCoder = Coder | Stack

# --------------------------------------------------------------------------------------------------
# The loop over tokens


@bare_kernel
def prepare(fixed, past, now, level, node):
    """For a decision to come, choose its rows of weights and APMs and, where slots begin, the
    places where they may be, and have all of them loaded.

    Memory is slower than what is done with it, so it gets the time in which the decision before is
    learned from.
    """
    if level % SLOT_LEVELS == 0 and fixed.inside[node] > 1:
        touch_rows(past.slots, fixed.slot_rows, now.slot_keys, node, now.slot_hashes,
                   now.slot[level])  # fmt: skip
    if fixed.inside[2 * node + 1] == 0:
        return
    choose_rows(fixed, past, now, level, node)
    choose_apm_rows(fixed, past, now, level, node)
    for judge in range(now.judges):
        weights, apm = past.weights[judge], past.apm[judge]
        for k in range(SETS):
            row = now.set_rows[level, k]
            prefetch(past.visits, judge, row)
            for j in range(0, weights.shape[1], LINE):
                prefetch(weights, row, j)
        for j in range(0, apm.shape[1], LINE):
            prefetch(apm, now.apm_rows[level, 1], j)


@bare_kernel
def begin_token(fixed, past, now):
    """Note what is known before the token's first decision."""
    marks = past.marks[0]
    context_keys(fixed, past, fixed.slot_rows, now.slot_keys)
    context_keys(fixed, past, fixed.candidate_rows, now.candidate_hashes)
    touch_rows(past.candidates, fixed.candidate_rows, now.candidate_hashes, 0,
               now.candidate_hashes, now.found)  # fmt: skip
    now.last, now.second_last = recent_token(fixed, past, 1), recent_token(fixed, past, 2)
    now.age, length = 0, marks.tokens - marks.document
    while length >> 2 * now.age > 3 and now.age < 7:
        now.age += 1
    now.expected = -1
    if marks.match_length:
        now.expected = fixed.leaf[past.history[marks.match_at]] | len(fixed.token)
    now.node, now.level = 1, 0
    now.cost[:] = 0


@bare_kernel
def predict_bit(fixed, past, now, mass):
    """Let the experts speak, then each judge mix what it hears, and refine it: write p."""
    slot_inputs(fixed, past, now)
    candidate_inputs(fixed, past, now)
    match_input(fixed, past, now)
    choose_by_counts(past, now)
    for judge in range(now.judges):
        if judge:
            for j in range(MATCH_INPUT, past.weights.shape[2]):
                now.inputs[1, j] = now.inputs[0, j]
            net = fixed.stretch[(mass[2 * now.node + 1] << 12) // mass[now.node]]
            now.inputs[1, NET], now.inputs[1, MIX] = NET_GAIN * net, MIX_GAIN * now.mixed[0]
        now.mixed[judge] = mixed_logit(past, now, judge)
        now.p[judge] = refined(fixed, past, now, judge)
    now.p[2] = now.p[0]
    if now.judges == 2:
        trust = past.marks[0].trust[now.level]
        p = trust * np.float32(now.p[1]) + (np.float32(1) - trust) * np.float32(now.p[0])
        now.p[2] = min(max(np.int64(p + np.float32(0.5)), 1), 65535)


@bare_kernel
def learn_trust(past, now, bit):
    """Bayes' rule: the judge that expected the bit is trusted more, and neither ever left alone.

    So the net costs next to nothing where the contexts know better.
    """
    a, b = np.float32(now.p[0]), np.float32(now.p[1])
    if bit == 0:
        a, b = np.float32(65536) - a, np.float32(65536) - b
    trust = past.marks[0].trust
    b *= trust[now.level]
    now_trusted = b / (b + a * (np.float32(1) - trust[now.level]))
    trust[now.level] = min(max(now_trusted, LEAST_TRUST), np.float32(1) - LEAST_TRUST)


@bare_kernel
def weigh_experts(fixed, now, bit):
    """Add up what the bit would cost judge 1's mix more, in nats, were one expert silent here.

    That is before the mix is refined, and before judge 1's is averaged with judge 0's. The other
    weights stay as they are, so the worth of experts that say the same is understated. What judge
    1 hears of an expert through judge 0's mix is not counted.
    """
    sign, mixed = 1 - 2 * bit, np.float64(0)
    for j in range(len(now.products)):
        mixed += now.products[j]
    cost = math.log1p(math.exp(sign * min(max(mixed, -11.9), 11.9)))
    for e in range(2 + FIRST_SLOT + len(fixed.slot_rows)):
        said = np.float64(0)
        for j in range(FIRST_INPUT[e], FIRST_INPUT[e + 1]):
            said += now.products[j]
        if said:
            silent = min(max(mixed - said, -11.9), 11.9)
            now.worth[e] += math.log1p(math.exp(sign * silent)) - cost


@bare_kernel
def learn_bit(fixed, past, now, bit):
    """Charge the bit, which is coded by now, and learn from it."""
    for k in range(3):
        now.cost[k] -= math.log((now.p[k] if bit else 65536 - now.p[k]) / 65536)
    if now.judges == 2:
        weigh_experts(fixed, now, bit)
        learn_trust(past, now, bit)
    for judge in range(now.judges):
        learn_weights(fixed, past, now, judge, bit)
        learn_apm(fixed, past, now, judge, bit)
    learn_maps(fixed, past, now, bit)
    learn_slots(fixed, past, now, bit)


@bare_kernel
def code_path(fixed, past, now, mass, coder, leaf):
    """Score or encode the path to a leaf, or decode one; returns the leaf.

    Its first decision is prepared already.
    """
    for level in range(fixed.levels):
        now.level = level
        if level % SLOT_LEVELS == 0 and fixed.inside[now.node] > 1:
            slots, rows, slot = past.slots, fixed.slot_rows, now.slot[level]
            if level == 0:
                find_rows(past.candidates, fixed.candidate_rows, now.candidate_hashes, now.found,
                          now.unknown, True, 0xFFFF, 0, past.marks[0].tokens)  # fmt: skip
            find_rows(slots, rows, now.slot_hashes, slot, now.fresh, level == 0, 15 << 16,
                      UNSEEN, past.marks[0].tokens)  # fmt: skip
            now.cell_at, now.top = 1, level
        bit = now.path[level] = 0
        decides = fixed.inside[2 * now.node + 1] > 0  # else no token is there
        if decides:
            predict_bit(fixed, past, now, mass)
            bit = leaf >> (fixed.levels - level - 1) & 1
            bit = code_bit(coder, now.p[2], bit)
            now.path[level] = now.p[2] if bit else -now.p[2]
        node = 2 * now.node + bit
        if level + 1 < fixed.levels:
            prepare(fixed, past, now, level + 1, node)
        if decides:
            learn_bit(fixed, past, now, bit)
        now.node, now.cell_at = node, 2 * now.cell_at + bit
    return now.node - len(fixed.token)


@bare_kernel
def code_tokens(mixer, coder, tokens, rows, nats):
    """Score, encode or decode tokens in order, learning from each after it is coded.

    mixer: Fixed, Past, (1,) WORK and the net's mass below each node; coder: see `code_bit`; tokens
    (m,) int64, written when decoding; rows (m, V) uint32: the net's probabilities in 2^-30, or
    (0, V) for none; nats (m, 2) float64, written: cost by the contexts alone, and mixed.
    """
    fixed, past, now, mass = Fixed(*mixer[0]), Past(*mixer[1]), mixer[2][0], mixer[3]
    judges = now.judges = 2 if len(rows) else 1
    for i in range(len(tokens)):
        begin_token(fixed, past, now)
        prepare(fixed, past, now, now.level, now.node)
        if judges == 2:
            net_masses(fixed, mass, rows[i])
        leaf = code_path(fixed, past, now, mass, coder, fixed.leaf[tokens[i]])
        token = tokens[i] = fixed.token[leaf]
        nats[i, 0], nats[i, 1] = now.cost[0], now.cost[2]
        learn_candidates(past, now, leaf)
        learn_text(fixed, past, token)
        learn_match(past, token)


# --------------------------------------------------------------------------------------------------
# The mixer


def table_rows(memory_mb: int) -> tuple[int, int, int]:
    """Rows of `slots`, those that are for documents, rows of `candidates`; all are 32 bytes."""
    slots = (memory_mb << 15) * 15 // 16 // WAYS * WAYS
    return slots, min(1 << 19, slots // 8 // WAYS * WAYS), (memory_mb << 11) // WAYS * WAYS


def new_fixed(tokenizer: Tokenizer, leaf: np.ndarray, memory_mb: int, size: str) -> Fixed:
    """The tables and the tree of a mixer."""
    levels, of_size = tree_levels(tokenizer.vocab), SIZES[: SIZES.index(size) + 1]
    contexts = tuple(context for context in SLOT_CONTEXTS if context.size in of_size)
    letters, sizes = word_letters(tokenizer)
    slots, local, found = table_rows(memory_mb)
    token = np.full(1 << levels, -1, np.int64)
    token[leaf] = np.arange(tokenizer.vocab)
    inside = np.concatenate([np.zeros(1 << levels, np.int64), token >= 0])
    for node in range((1 << levels) - 1, 0, -1):
        inside[node] = inside[2 * node] + inside[2 * node + 1]
    return Fixed(
        **mixer_tables(), leaf=leaf, token=token, inside=inside, starts=tokenizer.leading,
        letters=letters, sizes=sizes, decision=np.append(0, np.cumsum(inside[3::2] > 0) - 1),
        slot_rows=context_rows(contexts, ((local, slots - local), (0, local))),
        candidate_rows=context_rows(CANDIDATE_CONTEXTS, ((0, found), (0, found))),
        first_row=np.cumsum([0, *set_sizes(tokenizer.vocab, memory_mb)[:-1]]), levels=levels,
        below_class=levels - chooser_levels(tokenizer.vocab, memory_mb), bos=max(tokenizer.bos, 0),
    )  # fmt: skip


def new_past(vocab: int, experts: int, capacity: int, memory_mb: int) -> Past:
    """What a mixer with so many slot experts knows that has seen nothing, with room for `capacity`
    tokens."""
    slots, _, found = table_rows(memory_mb)
    maps = np.concatenate([first_match_maps(), first_candidate_maps(), first_slot_maps(experts)])
    levels, rows = tree_levels(vocab), sum(set_sizes(vocab, memory_mb))
    width = -(-(SLOT_INPUT + 3 * experts) // LANES) * LANES
    hashed = min(1 << 18, memory_mb << 10)
    weights = huge_zeros(2 * rows * width, np.float32).reshape(2, rows, width)  # rows fill lines
    weights[:] = FIRST_WEIGHTS / SETS / 3 / experts
    repeats = min(1 << 24, 1 << max(memory_mb << 13, 64).bit_length())
    marks = np.zeros(1, MARKS)
    marks["pieces"] = 1 << 50
    return Past(
        slots=huge_zeros(8 * (slots + SLOTS), np.uint32).reshape(-1, 8),  # see `find_rows`
        candidates=huge_zeros(8 * found, np.uint32).reshape(-1, 8),
        maps=np.tile(maps, (levels, 1)),
        weights=weights, visits=np.zeros((2, rows), np.float32),
        apm=np.tile(first_apm_row(), (2, vocab + hashed, 1)),
        repeats=np.zeros(repeats, np.int32), history=np.zeros(capacity, np.int32), marks=marks,
    )  # fmt: skip


class LogisticMixer(ContextModel):
    """Experts over hashed contexts, mixed bit by bit; it learns from each token after coding it."""

    state: Past
    coder = Coder  # that writes or reads a code

    def __init__(
        self, tokenizer: Tokenizer, leaf: np.ndarray, capacity: int, memory_mb: int,
        size: str = Knobs.mixer_size,
    ) -> None:  # fmt: skip
        """leaf (V,): see `token_tree`; capacity: tokens that it will ever see; size: MIXER_SIZE."""
        self.fixed, self.vocab = new_fixed(tokenizer, leaf, memory_mb, size), tokenizer.vocab
        if self.fixed.bos >= self.vocab:
            raise ValueError(f"BOS {self.fixed.bos} outside the vocabulary of {self.vocab}")
        experts = len(self.fixed.slot_rows)
        self.state = new_past(self.vocab, experts, capacity + 1, memory_mb)
        self.now, self.mass = np.zeros(1, WORK), np.zeros(2 << self.fixed.levels, np.int64)
        self.before_last = -1  # tokens before the one whose traces `now` has, or -1

    @property
    def learned(self) -> int:
        """Tokens learned so far."""
        return int(self.state.marks["tokens"][0])

    def all(self) -> list[LogisticMixer]:
        """It alone; see `MixerGroup`."""
        return [self]

    def begin(self, first: int) -> None:
        """Read the text's first token, which is not scored."""
        self.code(np.array([first], np.int64))

    def cost(self, tokens: np.ndarray, logs: np.ndarray, coder: Coder | None = None) -> np.ndarray:
        """See `ContextModel.cost`; with a coder the tokens are also encoded, or decoded: then
        they are written into `tokens`, and the nats are theirs."""
        wide = tokens.astype(np.int64)
        nats = self.code(wide, logs, coder)
        if coder:
            tokens[:] = wide
        return np.column_stack([net_nats(wide, logs), nats])

    def code(
        self, tokens: np.ndarray, logs: np.ndarray | None = None, coder: Coder | None = None
    ) -> np.ndarray:
        """Score tokens (m,) int64, or with a coder write them, or read them into `tokens`.

        logs (m, V) float32: the net's log-probabilities, if it takes part. Returns (m, 2) float64
        nats per token, by the contexts alone and mixed (contexts again without `logs`).
        """
        if logs is not None and logs.shape != (len(tokens), self.vocab):
            raise ValueError(f"{logs.shape} log-probabilities for {len(tokens)} tokens")
        if self.learned + len(tokens) > len(self.state.history):
            raise ValueError(f"more than the {len(self.state.history)} tokens announced")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab:
            raise ValueError(f"a token outside the vocabulary of {self.vocab}")
        rows, nats = np.zeros((0, self.vocab), np.uint32), np.zeros((len(tokens), 2))
        if logs is not None:
            rows = self.hear(logs)
        mixer = tuple(self.fixed), tuple(self.state), self.now, self.mass
        coding = coder or Coder()
        state, buffer, mode = coding.room(len(tokens) * self.fixed.levels if coder else 0)
        ends = state, buffer, mode if coder else SCORE
        self.before_last = self.learned if len(tokens) == 1 else -1
        code_tokens(mixer, ends, tokens, rows, nats)
        coding.flush()
        return nats

    def worth(self) -> dict[str, float]:
        slots = SLOT_CONTEXTS[: len(self.fixed.slot_rows)]
        names = ["net", "mix", "match", *(c.name for c in (*CANDIDATE_CONTEXTS, *slots))]
        nats = self.now["worth"][0, : 2 + FIRST_SLOT + len(slots)].tolist()
        return {name: n for name, n in zip(names, nats, strict=True) if name != "mix"}

    def hear(self, logs: np.ndarray) -> np.ndarray:
        """The net's log-probabilities as kernels take them, in 2^-30; from now on it takes part."""
        if not self.state.marks["joined"][0]:
            join_net(self.state)
        return (np.exp(np.minimum(logs, 0)) * np.float32(1 << 30)).astype(np.uint32)

    def text_sha256(self) -> str:
        """SHA-256 of all tokens so far, as little-endian int32."""
        return hashlib.sha256(self.state.history[: self.learned].astype("<i4")).hexdigest()

    def restore(self, saved: tuple[np.ndarray, ...]) -> None:
        """Go back to what `save` returned, in place: the tables stay where they are.

        If that was before the last token, of the large tables only what it has touched is copied.
        """
        its, mine, now = Past(*saved), self.state, self.now[0]
        joined = (mine.marks["joined"] != its.marks["joined"]).any()  # that changes all weights
        one = not joined and self.before_last == its.marks["tokens"][0]
        self.before_last = -1
        levels, judges = np.arange(LEVELS_MOST)[:, None], np.arange(2)[:, None, None]
        touched = {
            "slots": now["slot"],
            "maps": (levels[: self.fixed.levels], now["map_at"][: self.fixed.levels]),
            "weights": (slice(None), now["set_rows"]), "visits": (slice(None), now["set_rows"]),
            "apm": (judges, now["apm_rows"], now["apm_column"].T[:, :, None]),
            "candidates": now["found"],
        } if one else {}  # fmt: skip
        for name, array, old in zip(Past._fields, mine, its, strict=True):
            where = touched.get(name, ...)
            array[where] = old[where]


PACK_CHUNK = 1 << 14  # tokens of packed text per call of the kernel
BEHIND = 4  # chunks that the other mixers of a group may be behind the first


@functools.cache
def other_threads() -> list[ThreadPoolExecutor]:
    """Where the mixers of a group work, each in a thread of its own, all but the first."""
    return [ThreadPoolExecutor(1) for _ in TREES[1:]]


class MixerGroup(ContextModel):
    """Mixers whose trees differ; a token's probability is the mean of theirs.

    What is learned at a node is shared by the tokens below it. So by another tree other mistakes
    are made, and the mean is better than each.
    """

    coder = Stack
    begin, cost = LogisticMixer.begin, LogisticMixer.cost

    def __init__(self, mixers: list[LogisticMixer]) -> None:
        self.mixers, self.vocab = mixers, mixers[0].vocab
        self.along = True  # the others read at once what the first one codes, not when asked
        self.reading: list[list[Future]] = []  # by chunk, what they may not have read yet

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """That of all."""
        return tuple(array for mixer in self.all() for array in mixer.state)

    @property
    def learned(self) -> int:
        """Tokens learned so far."""
        return self.mixers[0].learned

    def all(self) -> list[LogisticMixer]:
        """The mixers, once they have read the same text."""
        for _ in self.catch_up():
            pass
        return self.mixers

    def wait(self, chunks: int = 0) -> None:
        """Wait until the others have no more than so many chunks to read."""
        while len(self.reading) > chunks:
            for future in self.reading[0]:
                future.result()
            del self.reading[0]

    def catch_up(self) -> Iterator[int]:
        """Let the others read what the first one coded alone; yields how many tokens they know."""
        self.wait()
        at, history = self.mixers[-1].learned, self.mixers[0].state.history
        while at < self.learned:
            end = min(at + PACK_CHUNK, self.learned)
            self.reading.append(self.read(history[at:end].astype(np.int64)))
            self.wait()
            yield (at := end)

    def read(self, tokens: np.ndarray, logs: np.ndarray | None = None) -> list[Future]:
        """Let the others read tokens, in threads: the nats to come."""
        pairs = zip(other_threads(), self.mixers[1:], strict=True)
        return [thread.submit(mixer.code, tokens, logs) for thread, mixer in pairs]

    def code(
        self, tokens: np.ndarray, logs: np.ndarray | None = None,
        coder: AnyCoder | None = None,
    ) -> np.ndarray:  # fmt: skip
        """See `LogisticMixer.code`. A Coder has the first mixer's code, a Stack that of all."""
        if isinstance(coder, Coder):
            return self.code_first(tokens, coder)
        if isinstance(coder, Stack):
            nats, rows = np.zeros((len(tokens), 2)), [None] * len(tokens)
            for i, row in enumerate(rows if logs is None else logs[:, None]):
                nats[i] = self.code_token(tokens[i : i + 1], row, coder)
            return nats
        first = self.all()[0]
        if len(tokens) < 64:  # for which a thread does not pay: an audit takes 2 s in place of 13
            return mean_nats([mixer.code(tokens, logs) for mixer in self.mixers])
        reading = self.read(tokens, logs)
        return mean_nats([first.code(tokens, logs), *(future.result() for future in reading)])

    def code_first(self, tokens: np.ndarray, coder: Coder) -> np.ndarray:
        """Let the first mixer code tokens, while the others read those before them, if `along`."""
        nats = self.mixers[0].code(tokens, None, coder)
        if self.along:
            self.reading.append(self.read(tokens.copy()))  # the caller may change them
            self.wait(BEHIND)
        return nats

    def code_token(self, token: np.ndarray, logs: np.ndarray | None, stack: Stack) -> np.ndarray:
        """Write or read a token (1,): see `Stack`."""
        mixers = self.all()
        if not stack.reads:
            nats = [mixer.code(token, logs) for mixer in mixers]
            stack.note(np.stack([mixer.now["path"][0] for mixer in mixers]), shares_so_far(nats))
            return mean_nats(nats)
        which = stack.choice(len(mixers))
        first = mixers[which].code(token, logs, stack)  # it reads the token, which the others learn
        nats = [first if i == which else m.code(token, logs) for i, m in enumerate(mixers)]
        stack.give_back(which, shares_so_far(nats))
        return mean_nats(nats)

    def worth(self) -> dict[str, float]:
        each = [mixer.worth() for mixer in self.all()]
        return {name: sum(worth[name] for worth in each) / len(each) for name in each[0]}

    def text_sha256(self) -> str:
        """SHA-256 of all tokens so far, as little-endian int32."""
        return self.mixers[0].text_sha256()

    def restore(self, saved: tuple[np.ndarray, ...]) -> None:
        """See `LogisticMixer.restore`."""
        size = len(Past._fields)
        for i, mixer in enumerate(self.all()):
            mixer.restore(saved[i * size : (i + 1) * size])


Mixer = LogisticMixer | MixerGroup


def mean_nats(nats: list[np.ndarray]) -> np.ndarray:
    """Nats of several models -> nats by the mean of their probabilities."""
    return math.log(len(nats)) - np.logaddexp.reduce(-np.array(nats))


def shares_so_far(nats: list[np.ndarray]) -> list[int]:
    """Nats (1, 2) of a token by several mixers -> each one's share, in 65,536ths, of the
    probability by it and those before it: see `take_choice`."""
    logs = np.array([-mixed for ((_, mixed),) in nats])
    shares = np.exp(logs - np.logaddexp.accumulate(logs)) * 65536
    return np.clip(np.rint(shares), 1, 65535).astype(int).tolist()


def new_context_model(
    cfg: Knobs, tokenizer: Tokenizer, leaves: np.ndarray | None, capacity: int, memory_mb: int = 0
) -> ContextModel:
    """MIXER's context model for a text of `capacity` tokens; it has seen nothing yet.

    leaves: (trees, V), one for each mixer.
    """
    if cfg.mixer == "off":
        return ContextModel()
    if cfg.mixer == "backoff":
        alpha = None if cfg.ngram_alpha == "auto" else float(cfg.ngram_alpha)
        order, smoothing, bos = cfg.ngram_max_order, cfg.ngram_smoothing, max(tokenizer.bos, 0)
        return BackoffMixer(tokenizer.vocab, bos, order, smoothing, alpha, capacity)
    memory_mb = max((memory_mb or cfg.mixer_memory_mb) // len(leaves), 1)
    mixers = [LogisticMixer(tokenizer, leaf, capacity, memory_mb, cfg.mixer_size)
              for leaf in leaves]  # fmt: skip
    return MixerGroup(mixers) if len(mixers) > 1 else mixers[0]


# ==================================================================================================
# PACKING: training text, paid for in the artifact; coding it primes the mixer that codes it
# ==================================================================================================

TREE_TOKENS = 1 << 24  # that a tree is made of, at most
MESSAGE_TOKENS = 256  # of validation text, coded by the mixer that packed: see EVALUATION


class Packer:
    """Codes training text beside the training, in a thread with a core of its own.

    Of several mixers it needs the first. On a CPU the others read the text after the training, for
    the message; where a GPU trains or nothing does, cores are free for them at once.

    It takes the text from its start: shards hold documents in random order, and a choice of
    documents is worth nothing on text of one kind (tests/benchmarks/README.md). What comes first,
    which the net does not train on, becomes the rehearsal: see `rehearse`.
    """

    def __init__(
        self, data: TrainWindows, tokenizer: Tokenizer, cfg: Knobs, budget: int, workers: Workers
    ) -> None:
        """budget: bytes of code at most; workers: the training's, one of which rests meanwhile."""
        self.data, self.tokenizer, self.cfg = data, tokenizer, cfg
        self.budget, self.workers = budget, workers
        self.seconds = 0.0
        self.error: Exception | None = None
        self.ended = threading.Event()  # an interrupted `join` takes a thread for one that ended
        self.ended.set()
        self.mixer: Mixer | None = None
        self.rehearsal: PackedText | None = None
        self.rehearsed = min(data.held, budget // 5)  # tokens, which take 3/5 of it at most
        self.leaves = np.tile(np.arange(tokenizer.vocab), (tree_count(cfg.mixer_size), 1))
        self.coder = Coder()
        self.count = 0
        self.lock = threading.Lock()  # held while a chunk is coded
        LogisticMixer(tokenizer, self.leaves[0], 1, 1).begin(0)  # compiled before the clock starts

    def start(self, spent_s: float, keeper: Keeper | None = None) -> None:
        """Begin, `spent_s` after MAX_WALLCLOCK_SECONDS started.

        Without such a clock packing ends here: what is packed must not depend on how fast it goes.
        """
        self.begin = time.perf_counter()
        spent_s = max(spent_s, self.seconds)  # by the training or by the packing before a stop
        self.deadline = self.begin + (self.cfg.max_wallclock_seconds or math.inf) - spent_s
        self.begin -= self.seconds
        self.workers.reserved = 1
        with interrupts.held():  # a thread half started would be taken for one that has ended
            self.ended.clear()
            threading.Thread(target=self.run, daemon=True).start()
        if not self.cfg.max_wallclock_seconds:
            self.wait(keeper)

    def run(self) -> None:
        """The thread's work; what goes wrong is kept for `wait`."""
        try:
            self.pack()
        except Exception as error:
            self.error = error
        finally:
            self.workers.reserved = 0
            self.seconds = time.perf_counter() - self.begin
            self.ended.set()

    def time_left(self) -> float:
        """Seconds until the clock of the run ends."""
        return self.deadline - time.perf_counter()

    def pack(self) -> None:
        """Code the training text, chunk by chunk, until it, the bytes or the time run out."""
        parts, left = [], min(PACKED_TOKENS_MOST, max(TREE_TOKENS, int(self.budget / 0.3)))
        for path, shard in zip(self.data.paths, self.data.shards, strict=True):
            parts.append(check_ids(shard[:left], self.tokenizer.vocab, path))
            left -= len(parts[-1])
        text = np.concatenate(parts)
        first, text = text[: self.rehearsed].astype(np.int64), text[self.rehearsed :]
        if not self.count:
            size = self.cfg.mixer_size
            self.leaves = token_trees(text[:TREE_TOKENS], self.tokenizer.vocab, size)
        self.rehearsal = pack_rehearsal(self.tokenizer, self.leaves[:1], first)
        self.budget -= len(self.rehearsal.code) if self.rehearsal else 0
        text = text[: int(self.budget / 0.3)]  # a token takes more than 0.3 bytes
        room = len(first) + len(text) + MESSAGE_TOKENS + 1
        self.mixer = new_context_model(self.cfg, self.tokenizer, self.leaves, room)
        if isinstance(self.mixer, MixerGroup):
            self.mixer.along = not (on_cpu() and self.cfg.max_wallclock_seconds)
        for at in range(0, self.count, PACK_CHUNK):  # coded before a checkpoint: it has the code
            chunk = text[at : min(at + PACK_CHUNK, self.count)].astype(np.int64)
            self.mixer.code(chunk, None, Coder())  # which makes it the first mixer's work
        while self.time_left() > 0:
            free = self.budget - len(self.coder.out) - 8
            size = min(PACK_CHUNK, free // 3)  # 3 bytes per token: more than text takes
            chunk = text[self.count : self.count + max(size, 0)].astype(np.int64)
            if not len(chunk):
                return
            with self.lock:
                self.mixer.code(chunk, None, self.coder)
                self.count += len(chunk)

    def wait(self, keeper: Keeper | None = None) -> None:
        """Wait for the thread, with checkpoints meanwhile; raises what went wrong in it."""
        show = show_progress("packing", unit="bytes at most")
        while not self.ended.wait(0.5):
            code = len(self.coder.out)
            show(code, max(self.budget, code), f"{self.count:,} tokens, ")
            if keeper and keeper.due():
                keeper.save(together=False)
        end_live()
        if self.error:
            raise self.error

    def state(self) -> dict[str, Arrays]:
        """What a checkpoint keeps of the packing: its code so far, from which it can go on."""
        with self.lock:
            if not self.count:
                return {}
            seconds = self.seconds if self.ended.is_set() else time.perf_counter() - self.begin
            parts = {"leaves": self.leaves, "count": np.array(self.count),
                     "rehearsed": np.array(self.rehearsed),
                     "coder": self.coder.state, "seconds": np.array(seconds),
                     "code": np.frombuffer(bytes(self.coder.out), np.uint8)}  # fmt: skip
            return {"packed": {name: mx.array(part) for name, part in parts.items()}}

    def set_state(self, parts: Arrays) -> None:
        """Go on from what `state` kept, before `start`."""
        self.leaves, self.coder.state = np.array(parts["leaves"]), np.array(parts["coder"])
        self.count, self.coder.out = parts["count"].item(), bytearray(np.array(parts["code"]))
        self.seconds, self.rehearsed = parts["seconds"].item(), parts["rehearsed"].item()

    def finish(self) -> PackedText:
        """What is packed, once all is; the rehearsal alone, if it was ended before it began."""
        self.wait()
        if not self.mixer:  # it was interrupted before it began
            self.pack()
        digest = self.mixer.text_sha256()
        return PackedText(self.leaves, self.count, digest, self.coder.finish(), self.rehearsal)


def small_mixer(tokenizer: Tokenizer, leaf: np.ndarray, tokens: int) -> LogisticMixer:
    """A mixer that has read nothing, with room for a rehearsal, which it codes or decodes."""
    return LogisticMixer(tokenizer, leaf, tokens, memory_mb=64, size="medium")


def pack_rehearsal(tokenizer: Tokenizer, leaves: np.ndarray, text: np.ndarray) -> PackedText | None:
    """Code a rehearsal; leaves (1, V): the tree of the mixer that does."""
    if not len(text):
        return None
    mixer, coder = small_mixer(tokenizer, leaves[0], len(text)), Coder()
    mixer.code(text, None, coder)
    return PackedText(leaves, len(text), mixer.text_sha256(), coder.finish())


def rehearsal_text(packed: PackedText, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a rehearsal, (n,) int64. Raises AuditFailed if it is not that text."""
    mixer = small_mixer(tokenizer, packed.leaves[0], packed.token_count)
    unpack(mixer, packed, "decoding")
    return mixer.state.history[: packed.token_count].astype(np.int64)


def unpack(mixer: Mixer, packed: PackedText, label: str) -> None:
    """Prime a mixer by decoding packed text. Raises AuditFailed if it is not that text."""
    coder, show = Coder(packed.code), show_progress(label)
    for at in range(0, packed.token_count, PACK_CHUNK):
        size = min(PACK_CHUNK, packed.token_count - at)
        mixer.code(np.zeros(size, np.int64), None, coder)
        show(at + size, packed.token_count, "")
    if any(one.text_sha256() != packed.sha256 for one in mixer.all()):
        raise AuditFailed("paid text", "it does not decode to the text that was packed")


# ==================================================================================================
# EVALUATION: load, prime, rehearse, decode the message, score each position exactly once, total
# ==================================================================================================

# The message is the text's first tokens, at most 256, in the arithmetic code of the primed mixer:
# message.bin. The training process writes it; the scoring process, which knows the artifact and the
# first token alone, decodes it. So the bits that a score claims are enough to get the text back.

Parts = Iterator[tuple[int, np.ndarray]]  # (first target, rows: one per target from there on)
NetRows = Callable[[np.ndarray], Parts]  # a text (n,) -> the net's log-distributions, (m, V) each
COSTS_KEPT = 1 << 22  # tokens whose cost a run keeps
ROWS_MOST = 1 << 24  # numbers in a batch of the net's rows, 64 MB: some of them are at hand at once


def scoring_windows(targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, last): input starts at `start`, targets first..last-1 are scored by it.

    Targets are numbered from 0; target i is token i + 1 and follows input i. Each is scored once,
    in order, with at least seq_len - stride tokens before it wherever the text has them.
    """
    yield 0, 0, min(seq_len, targets)
    for first in range(seq_len, targets, stride):
        yield first + stride - seq_len, first, min(first + stride, targets)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) float32 -> log-probabilities in nats, float32, whose sum is 1 within 1e-6.

    MLX's sum of a row, in float32, is off by up to 5e-6: a score that no decoder could reach.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)
    return (logits - np.log(total)).astype(np.float32)


def first_window(model: GPT, text: np.ndarray, seq_len: int, workers: Workers) -> np.ndarray:
    """The net's log-distributions after each input of the first window, alone: (T, V) float32.

    A row is a function of the inputs up to its own, whatever follows, to the bit: a decoder, which
    knows no more, makes the same one.
    """
    inputs = mx.array(text[:seq_len].astype(np.int32)[None])
    (logits,) = workers.map(model.logits, [(inputs, seq_len)])
    return log_softmax(np.array(logits)[0])


def net_rows(
    model: GPT, text: np.ndarray, shape: tuple[int, int, int], workers: Workers,
    cuts: Sequence[int] = (),
) -> Parts:  # fmt: skip
    """The net's log-distributions of the text's targets, in text order.

    text (n,) int; shape: tokens per window, stride, windows per batch; cuts: targets at which the
    first window is split. The net reads `text` again at each of them, because a decoder has
    meanwhile written there what it decoded: take those parts without `ahead`. Yields (first target,
    (m, V) float32, log-probabilities in nats); the parts cover the targets once. Every batch has
    the same shape, and only scored positions reach the vocabulary head.
    """
    seq_len, stride, batch = shape
    seq_len = min(seq_len, max(len(text) - 1, 1))
    stride = min(stride, seq_len)
    forward = model.logits if on_cpu() else mx.compile(model.logits, inputs=model.state)
    (_, _, end), *rest = scoring_windows(len(text) - 1, seq_len, stride)
    for first, last in itertools.pairwise([0, *cuts, end]):
        if first < last:
            yield first, first_window(model, text, seq_len, workers)[first:last]
    padded = np.pad(text.astype(np.int32), (0, stride))  # a causal net does not look there
    numbers = stride * model.tok_emb.shape[0]  # of a window's rows
    batch = max(min(batch, len(rest), ROWS_MOST // numbers), 1)

    def computed() -> Iterator[tuple[list, list[Array]]]:
        for at in range(0, len(rest), batch):
            together = rest[at : at + batch]
            rows = np.stack([padded[s : s + seq_len] for s, _, _ in together])
            rows = np.pad(rows, [(0, batch - len(rows)), (0, 0)])
            shares = np.array_split(rows, min(workers.count, batch))
            parts = workers.map(forward, [(mx.array(s), stride) for s in shares], on_cpu())
            mx.async_eval(parts)  # a GPU goes on while the host takes the batch before
            yield together, parts

    batches = computed()
    if not on_cpu():  # each one once the next has been asked for
        batches = (item for item, _ in itertools.pairwise(itertools.chain(batches, [None])))
    for together, parts in batches:
        out = log_softmax(np.concatenate([np.array(p) for p in parts]))
        for (_, first, end), logs in zip(together, out, strict=False):
            yield first, logs[: end - first]


def standard_rows(cfg: Knobs, model: GPT, workers: Workers) -> NetRows:
    """What makes the net's rows of any text, by windows that do not overlap."""
    shape = *eval_shape(cfg), cfg.eval_batch_seqs
    return functools.partial(net_rows, model, shape=shape, workers=workers)


def ahead(parts: Parts) -> Parts:
    """The same parts, each made while the one before is used.

    Whoever may stop before the last part closes it. Left to the collector of garbage, it would
    join its thread wherever that runs, even where another thread holds the lock that it needs.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            coming = pool.submit(next, parts, None)
            while part := coming.result():
                coming = pool.submit(next, parts, None)
                yield part
        finally:
            pool.submit(mx.clear_streams)  # a stream ends in the thread that made it


def cost_tokens(
    rows: Parts, known: np.ndarray, context_model: ContextModel, coder: AnyCoder | None = None
) -> Parts:
    """The one scoring loop: the net's rows -> (first target, (m, 3) nats: net, contexts, mixed).

    known (n,) int64: the text. The context model, which has begun with the text's first token,
    learns from each token after it is scored. With a coder it also writes the tokens' code, or
    decodes the tokens into `known`, where `rows` reads them.
    """
    for first, logs in rows:
        tokens = known[first + 1 : first + 1 + len(logs)]
        yield first, context_model.cost(tokens, logs, coder)


def covering(parts: Parts, targets: int) -> Parts:
    """The same parts. Raises AuditFailed unless they cover every target once, in order."""
    done = 0
    for first, part in parts:
        if first != done:
            raise AuditFailed("coverage", f"target {done} was due, but {first} was scored")
        yield first, part
        done += len(part)
    if done != targets:
        raise AuditFailed("coverage", f"scored {done} of {targets} targets")


def bits_per_byte(nats: float, byte_count: int) -> float:
    """Code length in nats over the decoded text's UTF-8 length -> bits per byte."""
    return nats / math.log(2) / byte_count


def total_score(costs: Parts, text: ValidationText, tokenizer: Tokenizer, show: Progress) -> Event:
    """Add up costs: loss (nats per token), BPB mixed, by net and by contexts, and the counts."""
    tokens, nats, byte_count, end = text.tokens, np.zeros(3), 0, 0
    for first, part in covering(costs, len(tokens) - 1):
        nats, end = nats + part.sum(axis=0), first + len(part)
        byte_count += int(tokenizer.bytes_of(tokens[first:end], tokens[first + 1 : end + 1]).sum())
        bpb = bits_per_byte(float(nats[2]), max(byte_count, 1))
        show(end, len(tokens) - 1, f"bpb {bpb:.4f}, ")
    if not (byte_count and np.isfinite(nats).all()):
        raise RunFailed(f"no score: {nats} nats over {byte_count} bytes of validation text")
    net, contexts, bpb = (bits_per_byte(float(n), byte_count) for n in nats)
    return {"val_loss": float(nats[2]) / end, "val_bpb": bpb, "val_bpb_net": net,
            "val_bpb_context": contexts, "val_tokens": end, "val_bytes": byte_count,
            "val_whole": text.whole}  # fmt: skip


def score_net(
    model: GPT, params: Arrays, text: ValidationText, tokenizer: Tokenizer, cfg: Knobs,
    workers: Workers,
) -> Event:  # fmt: skip
    """What weights score alone, at stride = window, while they are being trained."""
    begin = time.perf_counter()
    mx.eval(params)  # here, as another thread takes the rows
    model.update(tree_unflatten(list(params.items())))
    seq_len, stride = eval_shape(cfg, "standard")
    shape = seq_len, stride, max(cfg.val_batch_size // seq_len, 1)
    show = show_progress(f"eval standard{text.part}")
    with contextlib.closing(ahead(net_rows(model, text.tokens, shape, workers))) as rows:
        costs = cost_tokens(rows, text.tokens, ContextModel())
        result = total_score(costs, text, tokenizer, show)
    return {**result, "mode": "standard", "eval_time_ms": 1000 * (time.perf_counter() - begin)}


def check_message(
    size: int, bits: float, nats: np.ndarray, known: np.ndarray, text: np.ndarray
) -> str:  # fmt: skip
    """The decoded text must be the true one, the code as long as both sides claim; says so.

    size: bytes of code; bits: the encoder's claim; nats (m, 3): the decoder's costs; known, text:
    (n,) tokens.
    """
    wrong = np.flatnonzero(known != text)
    if len(wrong):
        raise AuditFailed("message", f"decoded token {wrong[0] - 1} is not the text's")
    decoded = float(nats[:, 2].sum()) / math.log(2)
    for claim in (decoded, bits):
        if not (math.isfinite(claim) and abs(8 * size - claim) <= 0.01 * claim + 16):
            raise AuditFailed("message", f"{8 * size} bits for a claim of {claim:.1f}")
    return f"{len(nats)} tokens decoded from {size} bytes, {decoded / 8:.1f} claimed"


def load_net(cfg: Knobs, path: Path, artifact: Artifact) -> GPT:
    """An artifact's net. Raises UserError where settings give its numbers another meaning."""
    made_with, tokenizer = artifact.header["knobs"], artifact.tokenizer
    for name, value in settings_of(cfg, "model").items():
        of_mixer = name in ("MIXER_MEMORY_MB", "MIXER_SIZE")
        if value != made_with[name] and not (of_mixer and cfg.mixer != "logistic"):
            raise UserError(f"{name}={value}: {path} has {made_with[name]}: unset it")
    check_vocab(cfg, tokenizer)
    if cfg.mixer == "logistic" and not artifact.packed:
        raise UserError(f"MIXER=logistic: {path} was made with MIXER={made_with['MIXER']}")
    held = sum(p.size for p in artifact.params.values())
    if least_parameters(cfg, tokenizer.vocab) > held:
        raise UserError(f"{path}: its settings ask for more parameters than its {held:,}")
    quick = dataclasses.replace(cfg, use_ortho_init=False)  # its first weights are not used
    model = GPT(quick, tokenizer.vocab, tokenizer.bos)
    try:
        model.load_weights(list(artifact.params.items()))
    except ValueError as error:
        raise UserError(f"{path}: its tensors do not fit its settings: {error}") from None
    mx.eval(model.parameters())  # here, as another thread takes the net's rows
    return model


def prime_contexts(
    cfg: Knobs, artifact: Artifact, tokens: int, net: NetRows | None, first: bool = False
) -> ContextModel:  # fmt: skip
    """A context model for so many tokens, which has read the artifact's text and nothing else.

    net: see `rehearse`; first: of a group of mixers, the first one alone.
    """
    packed, mib = artifact.packed if cfg.mixer == "logistic" else None, memory_limit() >> 20
    leaves, paid, memory_mb = None, 0, 0
    if packed:
        leaves, paid = packed.leaves[: 1 if first else None], packed.token_count
        memory_mb = max(cfg.mixer_memory_mb * len(leaves) // len(packed.leaves), 1)
    if memory_mb > mib:
        raise UserError(
            f"MIXER_MEMORY_MB={cfg.mixer_memory_mb}: the artifact needs tables of {memory_mb:,} "
            f"MiB, and there are {mib:,}: MIXER=off needs none"
        )
    room = tokens + (packed.total()[0] if packed else 0)
    context_model = new_context_model(cfg, artifact.tokenizer, leaves, room, memory_mb)
    if packed:
        unpack(context_model, packed, "priming")
    check_paid(context_model, paid)
    if packed:
        rehearse(context_model, artifact, net)
    return context_model


def check_paid(context_model: ContextModel, paid: int) -> None:
    """Raises AuditFailed unless it has learned so many tokens, which the artifact holds."""
    if context_model.learned != paid:
        raise AuditFailed("paid text", f"learned {context_model.learned} tokens, paid {paid}")


def rehearse(mixer: Mixer, artifact: Artifact, net: NetRows | None) -> None:
    """Let a mixer that has read the packed text score the rehearsal, as it will score any text.

    Neither the mixer nor the net has learned from the rehearsal. So the mixer learns what the net
    is worth beside it before a score begins. A net must know a text to make its rows, so this one
    has a code of its own. Without the net it is read like the rest.
    """
    if not artifact.packed.rehearsal:
        return
    text = rehearsal_text(artifact.packed.rehearsal, artifact.tokenizer)
    if net:
        mixer.begin(int(text[0]))
        show = show_progress("rehearsing")
        with contextlib.closing(ahead(net(text))) as rows:
            for first, nats in covering(cost_tokens(rows, text, mixer), len(text) - 1):
                show(first + len(nats), len(text) - 1, "")
        for one in mixer.all():
            one.now["worth"] = 0  # this is no score
    else:
        for at in range(0, len(text), PACK_CHUNK):
            mixer.code(text[at : at + PACK_CHUNK])
    check_paid(mixer, artifact.packed.total()[0])


@dataclass
class Scoring:
    """An artifact, reloaded from disk, a text, and the stages that make a score of them."""

    cfg: Knobs
    path: Path  # of the artifact
    artifact: Artifact
    model: GPT
    text: ValidationText
    workers: Workers
    message: str = ""  # what became of it: written, decoded or not decoded
    costs: np.ndarray | None = None  # (n, 3) float32 nats of the first targets of the last score

    @classmethod
    def load(
        cls, cfg: Knobs, path: Path, folder: Path, workers: Workers,
        artifact: Artifact | None = None,
    ) -> Scoring:  # fmt: skip
        """Read the validation shards of a folder, and the artifact unless it has been read."""
        artifact = artifact or read_artifact(path)
        model = load_net(cfg, path, artifact)
        text = load_validation(folder, artifact.tokenizer, cfg.val_max_tokens)
        return cls(cfg, path, artifact, model, text, workers)

    def prime(self) -> ContextModel:
        """A context model that has read the artifact's text, and nothing else."""
        net = standard_rows(self.cfg, self.model, self.workers)
        return prime_contexts(self.cfg, self.artifact, len(self.text.tokens), net)

    def message_facts(self) -> dict[str, Any]:
        """What a message says of itself: nothing of it may differ where it is decoded."""
        count = min(MESSAGE_TOKENS, eval_shape(self.cfg)[0], len(self.text.tokens) - 1)
        first = self.text.tokens[: count + 1].astype("<i4").tobytes()
        facts = {
            "artifact": file_sha256(self.path),
            "text": hashlib.sha256(first).hexdigest(),
            "tokens": count,
            "window": min(eval_shape(self.cfg)[0], len(self.text.tokens) - 1),
            "machine": [*numbers_made_by(self.cfg), self.workers.count],
        }
        if self.artifact.packed.rehearsal:
            facts["rehearsal"] = [eval_shape(self.cfg)[0], self.cfg.eval_batch_seqs]
        return facts

    def read_message(self) -> tuple[bytes | None, Event, str]:
        """(the message's code, or None if none can be decoded; its facts, or {}; why not)."""
        path = self.path.with_name("message.bin")
        if not path.is_file():
            return None, {}, ""
        try:
            header, _, code = path.read_bytes().partition(b"\n")
            facts = dict(json.loads(header))
            facts["bits"] = float(facts["bits"])
        except (OSError, LookupError, ValueError, TypeError, RecursionError, OverflowError):
            raise UserError(f"{path}: not a message of this script: remove it") from None
        unlike = [k for k, fact in self.message_facts().items() if facts.get(k) != fact]
        if "artifact" in unlike:  # it is of an older one, and worth nothing
            return None, {}, ""
        if unlike:
            return None, facts, f"{path} not decoded: it is of another {', '.join(unlike)}"
        return code, facts, ""

    def code_message(
        self, context_model: Mixer, mode: str, code: bytes | None
    ) -> tuple[np.ndarray, Parts, np.ndarray, AnyCoder]:
        """Score the first tokens: write their code, or decode the one that is given.

        Returns (the text (n,) int64 as it is then known, the net's rows of the rest, the first
        tokens' (m, 3) nats, the coder).
        """
        count, known = self.message_facts()["tokens"], self.text.tokens.astype(np.int64)
        cuts = range(count, count + 1)
        if code is not None:
            cuts = range(1, count + 1)
            known[1 : count + 1] = known[0]  # all that a decoder has is the first token
        rows, coder = self.rows(mode, known, cuts), context_model.coder(code)
        first = itertools.islice(rows, len(cuts))
        nats = [part for _, part in cost_tokens(first, known, context_model, coder)]
        return known, rows, np.concatenate(nats), coder

    def write_message(self, nats: np.ndarray, coder: AnyCoder) -> str:
        """Write what `code_message` has coded; returns a line that says so."""
        path, bits = self.path.with_name("message.bin"), float(nats[:, 2].sum()) / math.log(2)
        header = json.dumps({**self.message_facts(), "bits": bits}).encode()
        try:
            with whole_file(path) as part:
                part.write_bytes(header + b"\n" + coder.finish())
        except RunFailed as error:
            return f"no message written: {error}"
        return f"{len(nats)} tokens written to {path}: the same command, run again, decodes them"

    def rows(self, mode: str, known: np.ndarray, cuts: Sequence[int] = ()) -> Parts:
        """The net's rows in an EVAL_MODE."""
        shape = (*eval_shape(self.cfg, mode), self.cfg.eval_batch_seqs)
        return net_rows(self.model, known, shape, self.workers, cuts)

    def message_costs(
        self, context_model: ContextModel, mode: str
    ) -> tuple[np.ndarray, Parts, np.ndarray, str]:
        """The message: decode it, or write it where there is none; none without AUDIT and a coder.

        Returns (the text as it is then known, the net's rows of the rest, (m, 3) nats of the
        tokens before it, a line that says what became of the message).
        """
        code, line = None, ""
        if self.cfg.audit and self.cfg.mixer == "logistic" and not self.message:
            code, facts, line = self.read_message()
            if not facts:
                known, rows, nats, coder = self.code_message(context_model, mode, None)
                line = self.write_message(nats, coder)
                self.message = "not written" if line.startswith("no ") else "written"
                return known, rows, nats, line
            self.message = "decoded" if code is not None else "not decoded"
        if code is None:
            known = self.text.tokens.astype(np.int64)
            return known, self.rows(mode, known), np.zeros((0, 3)), line
        known, rows, nats, coder = self.code_message(context_model, mode, code)
        line = check_message(
            len(code) - coder.head_bytes, facts["bits"], nats, known, self.text.tokens
        )
        return known, rows, nats, line

    def kept(self, costs: Parts) -> Parts:
        """The same costs; the first COSTS_KEPT are noted."""
        self.costs = np.zeros((min(len(self.text.tokens) - 1, COSTS_KEPT), 3), np.float32)
        for first, part in costs:
            self.costs[first : first + len(part)] = part[: max(len(self.costs) - first, 0)]
            yield first, part

    def write_costs(self, path: Path) -> str:
        """Write what each token cost, for those who look at a run; returns what kept it from it."""
        tokens, facts = self.text.tokens[: len(self.costs) + 1], self.artifact.tokenizer
        parts = {"tokens": tokens[1:].astype(np.uint16), "nats": self.costs,
                 "bytes": facts.bytes_of(tokens[:-1], tokens[1:]).astype(np.uint16),
                 "starts": np.flatnonzero(tokens[1:] == facts.bos),
                 "pieces": np.array(piece_texts(facts))}  # fmt: skip
        try:
            with whole_file(path) as part, open(part, "wb") as file:
                np.savez(file, **parts)
        except RunFailed as error:
            return str(error)
        return ""

    def score(self, mode: str) -> tuple[Event, str]:
        """One pass in an EVAL_MODE: (its record, a line about its message)."""
        begin = time.perf_counter()
        context_model = self.prime()
        primed = time.perf_counter()
        context_model.begin(int(self.text.tokens[0]))
        known, rows, nats, line = self.message_costs(context_model, mode)
        show = show_progress(f"eval {mode}{self.text.part}")
        with contextlib.closing(ahead(rows)) as rest:
            costs = itertools.chain([(0, nats)], cost_tokens(rest, known, context_model))
            result = total_score(self.kept(costs), self.text, self.artifact.tokenizer, show)
        seconds, size = time.perf_counter() - primed, result["val_bytes"]
        worth = {name: bits_per_byte(n, size) for name, n in context_model.worth().items()}
        return {**result, "mode": mode, "mixer": self.cfg.mixer, "prime_seconds": primed - begin,
                "eval_time_ms": 1000 * seconds, "experts": worth}, line  # fmt: skip


# ==================================================================================================
# AUDIT: what makes the score true, checked through the code that makes it
# ==================================================================================================

AUDIT_MEMORY_MB = 2
BYTES_UNCHECKED = "bytes not checked: that needs TOKENIZER_PATH"
MANY_TOKENS = 4096  # with a larger vocabulary, all of it is tried in one excerpt only
Trace = tuple[np.ndarray, np.ndarray]  # an excerpt's (n - 1, 3) nats and the net's (n - 1, V) rows


class Audit:
    """Checks of the production score on excerpts, from an unprimed state."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring, self.cfg, self.tokenizer = scoring, scoring.cfg, scoring.artifact.tokenizer

    def trace(self, text: np.ndarray) -> Trace:
        """Score an excerpt as the score does."""
        shape = (*eval_shape(self.cfg, self.cfg.eval_mode), 2)
        rows = list(ahead(net_rows(self.scoring.model, text, shape, self.scoring.workers)))
        context_model = self.small_model(text)
        costs = covering(cost_tokens(iter(rows), text, context_model), len(text) - 1)
        nats = np.concatenate([part for _, part in costs])
        logs = np.concatenate([logs for _, logs in rows])
        if not (np.isfinite(nats).all() and np.isfinite(logs).all()):
            raise AuditFailed("finite", "a score or a log-probability is not a finite number")
        return nats, logs

    def small_model(self, text: np.ndarray) -> ContextModel:
        """A small context model that has seen nothing but the text's first token."""
        packed = self.scoring.artifact.packed
        leaves, room = packed.leaves if packed else None, len(text) + 1
        small = new_context_model(self.cfg, self.tokenizer, leaves, room, AUDIT_MEMORY_MB)
        small.begin(int(text[0]))
        return small

    def causal(self, text: np.ndarray, trace: Trace, at: int, rng: np.random.Generator) -> None:
        """Replace target `at` and what follows: nothing before, no distribution at it, moves."""
        (nats, rows), other, vocab = trace, text.copy(), self.tokenizer.vocab
        other[at + 1 :] = rng.integers(0, vocab, len(text) - at - 1)
        other[at + 1] = (text[at + 1] + 1) % vocab
        nats_2, rows_2 = self.trace(other)
        moved = np.flatnonzero((nats[:at] != nats_2[:at]).any(axis=1))
        if len(moved):
            raise AuditFailed("causality", f"the score of target {moved[0]} depends on target {at}")
        if (rows[: at + 1] != rows_2[: at + 1]).any():
            raise AuditFailed("causality", f"the net's row at {at} depends on what follows")

    def normalised(self, text: np.ndarray, trace: Trace, at: int) -> None:
        """Put every token in the place of target `at`: the scores sum to 1."""
        (nats, rows), context_model = trace, self.small_model(text)
        before = context_model.cost(text[1 : at + 1], rows[:at])
        if (before != nats[:at]).any():
            raise AuditFailed("causality", f"scores before {at} depend on how the text is cut")
        state, tried = context_model.save(), []
        for v in range(self.tokenizer.vocab):
            tried.append(context_model.cost(np.array([v]), rows[at : at + 1])[0])
            context_model.restore(state)
        if (tried[text[at + 1]] != nats[at]).any():
            raise AuditFailed("normalisation", f"target {at} has two scores")
        for column, name in zip(np.array(tried).T, ("net", "context", "mixed"), strict=True):
            total = float(np.exp(-column).sum())
            if not np.isfinite(column).all():
                raise AuditFailed("normalisation", f"a {name} score at {at} is not finite")
            if abs(total - 1) > 1e-6:
                raise AuditFailed("normalisation", f"{name} probabilities at {at} sum to {total}")

    def excerpts(self, seed: int) -> str:
        """Causality and normalisation at a document's start, at random places and at the tail."""
        text, rng = self.scoring.text.tokens.astype(np.int64), np.random.default_rng(seed)
        length, stride = eval_shape(self.cfg, self.cfg.eval_mode)
        size = min(length + stride + stride // 2 + 2, len(text))  # a window, then a batch of two
        starts = np.flatnonzero(text[1:] == self.tokenizer.bos) + 1
        begins = [max(int(rng.choice(starts)) - 8, 0) if len(starts) else 0,
                  int(rng.integers(0, len(text))), len(text) - size]  # fmt: skip
        begins, sums = [min(begin, len(text) - size) for begin in begins], 0
        for begin in begins:
            excerpt = text[begin : begin + size]
            trace, last = self.trace(excerpt), len(excerpt) - 2
            if any((a != b).any() for a, b in zip(trace, self.trace(excerpt), strict=True)):
                raise AuditFailed("repeatable", "this machine gives one text two scores")
            for at in {min(7, last), min(length, last), int(rng.integers(0, last + 1)), last}:
                self.causal(excerpt, trace, at, rng)
            if begin == begins[0] or self.tokenizer.vocab <= MANY_TOKENS:
                self.normalised(excerpt, trace, int(rng.integers(0, last + 1)) if sums else last)
                sums += 1
        return f"causal in {len(begins)}, normalised in {sums} excerpts of {size} tokens"

    def same_tokenizer(self, path: Path) -> None:
        """Raises UserError unless the artifact was made with this one."""
        if file_sha256(path) != self.tokenizer.sha256:
            raise UserError(f"TOKENIZER_PATH={path}: the artifact was made with another one")

    def byte_count(self, tokenizer_path: Path | None) -> str:
        """The byte table against the UTF-8 length of the decoded text."""
        text = self.scoring.text.tokens
        if tokenizer_path is None:
            return BYTES_UNCHECKED
        count, true = decoded_bytes(tokenizer_path, self.tokenizer, text)
        if count != true:
            raise AuditFailed("bytes", f"the table gives {count}, the decoded text has {true}")
        return f"{true} bytes, as the {len(text)} tokens have when they are decoded"

    def stated_bytes(self, counted: int) -> list[str]:
        """The bytes of the whole text against its manifest's: lines."""
        stated = self.scoring.text.stated_bytes
        if stated is None or not self.scoring.text.whole:
            return []
        if counted != stated:
            raise AuditFailed("bytes", f"{counted} were counted, {stated} by manifest.json")
        return [f"{counted} bytes, as manifest.json says"]

    def label(self, lines: list[str]) -> str:
        """'pass', and what keeps it from being a plain one."""
        documents = (self.scoring.artifact.header.get("overlap") or [0])[0]
        but = ["bytes unchecked"] if BYTES_UNCHECKED in lines else []
        but += [f"{documents} documents were trained on"] if documents else []
        return ", ".join(["pass", *but])

    def whole(self, folder: Path) -> None:
        """The label of the text must fit what the folder's shards hold."""
        scored, whole = len(self.scoring.text.tokens), self.scoring.text.whole
        total = sum(len(Shard(path)) for path in find_shards(folder, "val"))
        if whole != (scored == total):
            raise AuditFailed("whole text", f"{scored} of {total} tokens are called whole")

    def run(self, folder: Path, tokenizer_path: Path | None) -> list[str]:
        """All checks; returns lines that say what was checked. Raises AuditFailed."""
        begin = time.perf_counter()
        lines = [self.excerpts(self.cfg.seed), self.byte_count(tokenizer_path)]
        self.whole(folder)
        return [*lines, f"checks took {time.perf_counter() - begin:.0f} s"]


# ==================================================================================================
# USE: a text token by token: samples by an artifact; files compressed with it, and restored
# ==================================================================================================


class NetReader:
    """The net, which reads a text token by token; by a key-value cache each costs one position.

    Windows follow each other as in scoring: when one is full, all of it but its first `stride`
    tokens is read anew, as the next one's start.
    """

    def __init__(self, model: GPT, length: int, stride: int) -> None:
        """length: tokens per window."""
        self.model, self.length, self.stride = model, length, stride
        self.window: list[int] = []
        self.caches: Caches = []
        self.logs: np.ndarray | None = None  # (V,) float32: ln P of what comes next

    def read(self, token: int) -> None:
        """Read the text's next token."""
        known = len(self.window)
        if known in (0, self.length):
            self.window, known = self.window[self.stride :], 0
            self.caches = [[] for _ in self.model.blocks]
        self.window.append(token)
        seen = min(known, CONTEXT_TOKENS - 1)
        inputs = mx.array(self.window[known - seen :])[None]
        self.logs = log_softmax(np.array(self.model.logits(inputs, 1, self.caches, seen))[0, 0])


@bare_kernel
def copy_rows(table, rows, hashes, at, fresh, first_ones, blank, copies):
    """Copy what `find_rows` would find, (n, 8), from a table that stays as it is."""
    for a in range(len(rows)):
        new = fresh[a] and rows[a, 7] and not first_ones
        place = -1 if new else place_of(table, hashes[a], at[a])
        for k in range(1, 8):
            copies[a, k] = blank if place < 0 else table[place, k]
        fresh[a], at[a] = place < 0, a


@bare_kernel
def walk_tree(mixer, still, row, logs, fresh):
    """Write ln P (2^(L+1),) of each node of the tree by a mixer that does not learn meanwhile.

    mixer: see `code_tokens`; still: its Past with (SLOTS, 8) and (CANDIDATES, 8) rows for tables,
    written; row: (V,) of the net's, or (0,); fresh (2^L, SLOTS), written: see `find_rows`.
    """
    fixed, past, now, mass = Fixed(*mixer[0]), Past(*mixer[1]), mixer[2][0], mixer[3]
    there = Past(*still)
    now.judges = 2 if len(row) else 1
    begin_token(fixed, past, now)
    copy_rows(past.candidates, fixed.candidate_rows, now.candidate_hashes, now.found, now.unknown,
              True, 0, there.candidates)  # fmt: skip
    if len(row):
        net_masses(fixed, mass, row)
    for level in range(0, fixed.levels, SLOT_LEVELS):
        for top in range(1 << level, 2 << level):
            if fixed.inside[top] > 1:
                for a in range(SLOTS):
                    fresh[top, a] = fresh[top >> SLOT_LEVELS, a]
                now.top, rows, slot = level, fixed.slot_rows, now.slot[level]
                touch_rows(past.slots, rows, now.slot_keys, top, now.slot_hashes, slot)
                copy_rows(past.slots, rows, now.slot_hashes, slot, fresh[top], level == 0, UNSEEN,
                          there.slots)  # fmt: skip
            for cell_at in range(1, 1 << min(SLOT_LEVELS, fixed.levels - level)):
                down = (cell_at > 1) + (cell_at > 3)
                now.cell_at, now.level = cell_at, level + down
                now.node = node = (top << down) + cell_at - (1 << down)
                logs[2 * node], logs[2 * node + 1] = logs[node], -np.inf
                if fixed.inside[2 * node + 1]:
                    choose_rows(fixed, there, now, now.level, node)
                    choose_apm_rows(fixed, there, now, now.level, node)
                    predict_bit(fixed, there, now, mass)
                    p = now.p[2] / 65536
                    logs[2 * node] += math.log(1 - p)
                    logs[2 * node + 1] = logs[node] + math.log(p)


class Predictor:
    """The primed mixer, the net, or both together, on a text that comes token by token."""

    def __init__(self, mixer: Mixer | None, net: NetReader | None) -> None:
        self.mixer, self.net = mixer, net

    def code(self, tokens: np.ndarray, coder: AnyCoder | None = None) -> None:
        """Read tokens (m,) int64; with a coder write their code, or decode them in place."""
        if not self.net:
            self.mixer.code(tokens, None, coder)
            return
        for i in range(len(tokens)):
            logs = None if self.net.logs is None else self.net.logs[None]
            if self.mixer:
                self.mixer.code(tokens[i : i + 1], logs, coder)
            self.net.read(int(tokens[i]))

    def log_probabilities(self) -> np.ndarray:
        """ln P of each token to come next: (V,), which sums to 1.

        The mixer's are those of a mixer at rest. In scoring it learns from a token's first
        decisions before it is asked for the last ones. That moves 2 % of the probability to other
        tokens in a mixer of 200 tokens, 0.1 % after 4,000.
        """
        if not self.mixer:
            return self.net.logs
        return -mean_nats([-self.at_rest(mixer) for mixer in self.mixer.all()])

    def at_rest(self, mixer: LogisticMixer) -> np.ndarray:
        """ln P (V,) by one mixer."""
        leaves = len(mixer.fixed.token)
        row = mixer.hear(self.net.logs) if self.net else np.zeros(0, np.uint32)
        still = mixer.state._replace(slots=np.zeros((SLOTS, 8), np.uint32),
                                     candidates=np.zeros((CANDIDATES, 8), np.uint32))  # fmt: skip
        whole = tuple(mixer.fixed), tuple(mixer.state), mixer.now, mixer.mass
        logs = np.zeros(2 * leaves)
        walk_tree(whole, tuple(still), row, logs, np.zeros((leaves, SLOTS), np.int64))
        mixer.before_last = -1
        return logs[leaves + mixer.fixed.leaf]

    def sample(
        self, prompt: Sequence[int], count: int, cfg: Knobs, rng: np.random.Generator
    ) -> Iterator[int]:
        """At most so many tokens that go on from a prompt, to the document's end."""
        self.code(np.array(prompt, np.int64))
        for _ in range(count):
            token = draw(self.log_probabilities(), cfg.temperature, cfg.top_p, rng)
            if token == prompt[0]:
                return
            yield token
            self.code(np.array([token], np.int64))


def draw(logs: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """A token by ln P / temperature, (V,), out of the likeliest whose share reaches top_p."""
    order = np.argsort(-logs, kind="stable")
    total = np.cumsum(np.exp((logs - logs.max())[order] / max(temperature, 1e-3), dtype=float))
    kept = int(np.searchsorted(total, top_p * total[-1])) + 1
    return int(order[np.searchsorted(total[: kept - 1], rng.random() * total[kept - 1], "right")])


class Pieces:
    """A tokenizer that any bytes go through, and come back from exactly.

    Its SentencePiece model is loaded with its normalisation off: it drops no spaces and replaces no
    characters. What no piece spells, such as bytes that are not UTF-8, goes as byte pieces.
    """

    # A protobuf message behind another overrides its fields: normalizer_spec { name: "identity"
    # precompiled_charsmap: "" add_dummy_prefix: 0 remove_extra_whitespaces: 0 }
    as_it_is = b"\x1a\x10\x0a\x08identity\x12\x00\x18\x00\x20\x00"

    def __init__(self, path: Path, facts: Tokenizer) -> None:
        import sentencepiece

        self.path, load = path, sentencepiece.SentencePieceProcessor
        self.start = b" " * facts.dummy_prefix  # before a text
        self.model, usual = load(model_proto=path.read_bytes() + self.as_it_is), load(str(path))
        if usual.vocab_size() != facts.vocab:
            raise UserError(f"TOKENIZER_PATH={path}: {usual.vocab_size()} pieces, and the artifact "
                            f"says {facts.vocab}: it is damaged")  # fmt: skip
        self.keeps_lines = "\n" in usual.decode(usual.encode("a\nb"))
        self.texts = bytes_of_pieces(load_tokenizer(path))
        pieces = enumerate(usual.id_to_piece(list(range(facts.vocab))))
        self.byte_ids = {int(piece[1:-1], 16): i for i, piece in pieces if usual.is_byte(i)}

    def encode(self, raw: bytes) -> list[int]:
        """Tokens whose `decode` is `raw`. Raises UserError where some bytes have no piece."""
        if len(self.byte_ids) < 256:
            raise UserError(f"TOKENIZER_PATH={self.path}: made without byte_fallback, it lacks the "
                            "256 byte pieces that spell any text")  # fmt: skip
        runs = re.split("([\udc80-\udcff\u2581]+)", raw.decode("utf-8", "surrogateescape"))
        coded = (self.spell(run) if i % 2 else self.encode_run(run) for i, run in enumerate(runs))
        return list(itertools.chain.from_iterable(coded))

    def encode_run(self, run: str) -> list[int]:
        """The model's tokens; of a run that they do not spell, those of its halves."""
        ids, half = self.model.encode(run), len(run) // 2
        if self.decode(ids) == run.encode():
            return ids
        if not half:
            return self.spell(run)
        return self.encode_run(run[:half]) + self.encode_run(run[half:])

    def spell(self, run: str) -> list[int]:
        """Byte pieces."""
        return [self.byte_ids[byte] for byte in run.encode("utf-8", "surrogateescape")]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text of tokens."""
        return b"".join(map(self.texts.__getitem__, ids))

    def tokens_of(self, chunks: Iterable[bytes], lines: bool) -> Iterator[np.ndarray]:
        """A file's tokens; lines: each line but the first begins with a space, as words do."""
        start = self.start
        for raw in chunks:
            raw = raw.replace(b"\n", b"\n ") if lines else raw
            yield np.array(self.encode(start + raw), np.uint16)
            start = b""

    def text_of(self, parts: Iterable[np.ndarray], lines: bool) -> Iterator[bytes]:
        """The inverse of `tokens_of`, however the tokens are cut into parts."""
        start, held = len(self.start), b""
        for part in parts:
            raw, start, held = held + self.decode(part.tolist())[start:], 0, b""
            if lines:
                raw, held = (raw[:-1], b"\n") if raw.endswith(b"\n") else (raw, b"")
                raw = raw.replace(b"\n ", b"\n")
            yield raw
        yield held


def streamed(tokens: Iterator[int], texts: list[bytes], start: bytes) -> Iterator[str]:
    """The text of tokens as it comes, in whole characters, without the `start` that it may have."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        text, start = texts[token].removeprefix(start), b""
        yield decoder.decode(text)
    yield decoder.decode(b"", True)


# A .tgk file: TGK, whose flags say in bits 4 to 7 how many bytes the number of tokens takes; that
# number; with NET_TOO the 2 bytes of `machine_mark`; the tokens' code. What is no shard
# has a BOS before it, neither counted nor coded.
TGK, TGK_MAGIC = struct.Struct("<2sB4sI"), b"\x9eK"  # magic, flags, SHA-256 of artifact, CRC-32
SHARD, LINES, NET_TOO = 1, 2, 4
CHUNK_BYTES = 1 << 20  # of a file that is read at once


def shard_header(count: int) -> bytes:
    """What stands before a shard's tokens."""
    ints = np.zeros(SHARD_HEADER_INTS, "<i4")
    ints[:3] = SHARD_MAGIC, SHARD_VERSION, count
    return ints.tobytes()


def file_chunks(path: Path) -> Iterator[bytes]:
    """A file, cut before line ends, or else before spaces, where there are such."""
    rest = b""
    with open(path, "rb") as file:
        while more := file.read(CHUNK_BYTES):
            rest += more
            cut = max(rest.rfind(b"\n"), 0) or max(rest.rfind(b" "), 0) or len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def file_bytes(
    pieces: Pieces | None, flags: int, count: int, parts: Iterable[np.ndarray]
) -> Iterable[bytes]:
    """The file that tokens stand for, in parts: of a text's pieces, or a shard of so many."""
    if pieces:
        return pieces.text_of(parts, bool(flags & LINES))
    return itertools.chain([shard_header(count)], (part.astype("<u2").tobytes() for part in parts))


def machine_mark(cfg: Knobs, count: int) -> bytes:
    """2 bytes that are others where the net's numbers may be, or the number of tokens is."""
    batches = cfg.eval_batch_seqs, worker_count(cfg)  # of the rehearsal
    facts = *numbers_made_by(cfg), *eval_shape(cfg, cfg.eval_mode), *batches, count
    return hashlib.sha256(repr(facts).encode()).digest()[:2]


def others(raw: bytes) -> str:
    """What xz and brotli make of a file that is not too large for one's patience."""
    if len(raw) > 1 << 20:
        return ""
    line = f"; xz {len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)):,}"
    with contextlib.suppress(ImportError):
        import brotli

        line += f", brotli {len(brotli.compress(raw)):,}"
    return line


@dataclass
class Use:
    """An artifact, and what MODE=sample, compress and restore make of it."""

    cfg: Knobs
    path: Path  # of the artifact
    artifact: Artifact

    @classmethod
    def load(cls, path: Path, env: dict[str, str]) -> Use:
        """Read an artifact, with its own settings where the environment has no others."""
        path = path / "artifact.bin" if path.is_dir() else path
        artifact = read_artifact(path)
        cfg, warnings = knobs_from_env(env, kept=artifact.header["knobs"])
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        use_device(cfg)
        mixer = "logistic" if artifact.packed else "off"
        return cls(dataclasses.replace(cfg, mixer=mixer), path, artifact)

    @property
    def bos(self) -> int:
        """What a text starts with."""
        return max(self.artifact.tokenizer.bos, 0)

    def pieces(self) -> Pieces:
        """The tokenizer that the artifact was made with. Raises UserError where it is not found."""
        cfg, facts, paths = self.cfg, self.artifact.tokenizer, []
        for folder in dict.fromkeys((HERE, *HERE.parents, *self.path.resolve().parents)):
            paths += sorted((folder / "data" / "tokenizers").glob("*.model"))
        with contextlib.suppress(UserError):
            paths += [tokenizer_beside(Path(cfg.data_path))] if cfg.data_path else []
        for path in [Path(cfg.tokenizer_path)] if cfg.tokenizer_path else paths:
            if path.is_file() and file_sha256(path) == facts.sha256:
                return Pieces(path, facts)
        where = f"={cfg.tokenizer_path}" if cfg.tokenizer_path else " is unset"
        raise UserError(f"TOKENIZER_PATH{where}: {self.path} wants the tokenizer whose SHA-256 "
                        f"begins with {facts.sha256[:8]}: set its path")  # fmt: skip

    def predictor(
        self, tokens: int, contexts: bool, net: bool, stride: int, first: bool = False
    ) -> Predictor:  # fmt: skip
        """Who predicts a text of so many tokens; stride: see `NetReader`, first: see
        `prime_contexts`."""
        model, mixer = load_net(self.cfg, self.path, self.artifact), None
        try:
            if contexts:
                with make_workers(self.cfg) as workers:
                    rows = standard_rows(self.cfg, model, workers) if net else None
                    mixer = prime_contexts(self.cfg, self.artifact, tokens, rows, first)
        except MemoryError:
            raise UserError(f"no memory for a text of {tokens:,} tokens") from None
        length = eval_shape(self.cfg)[0]
        return Predictor(mixer, NetReader(model, length, stride) if net else None)

    def sample(self) -> None:
        """Print what comes after PROMPT, as it comes."""
        cfg, pieces = self.cfg, self.pieces()
        contexts, net = (cfg.sample_with in ("all", who) for who in ("contexts", "net"))
        if not (net or self.artifact.packed):
            raise UserError(f"SAMPLE_WITH=contexts: {self.path} has none, but a net")
        raw = os.fsencode(cfg.prompt)
        prompt = [self.bos, *(pieces.encode(pieces.start + raw) if raw else ())]
        with contextlib.redirect_stdout(sys.stderr):  # the text alone is the output
            stride = max(eval_shape(cfg)[0] // 2, 1)
            contexts = contexts and bool(self.artifact.packed)
            predictor = self.predictor(len(prompt) + cfg.sample_tokens, contexts, net, stride)
        tokens = predictor.sample(prompt, cfg.sample_tokens, cfg, np.random.default_rng(cfg.seed))
        say(cfg.prompt, end="")
        for text in streamed(tokens, pieces.texts, b"" if raw else pieces.start):
            say(text, end="")
        say("")

    def result_path(self, usual: str) -> Path:
        """Where the result goes: OUTPUT, or a usual name. Raises UserError."""
        path = Path(self.cfg.output or usual)
        if not (Path(self.cfg.file).is_file() and os.access(self.cfg.file, os.R_OK)):
            raise UserError(f"FILE={self.cfg.file}: no file that can be read")
        if os.path.lexists(path):
            raise UserError(f"{path} exists: choose another OUTPUT")
        if not path.parent.is_dir():
            raise UserError(f"OUTPUT={path}: there is no folder {path.parent}")
        return path

    def coding_predictor(self, tokens: int, flags: int) -> Predictor:
        """Who predicts a file of so many tokens; of what is no shard it knows the BOS before it."""
        if not self.artifact.packed:
            raise UserError(f"{self.path}: made without MIXER=logistic, it codes no files")
        stride = eval_shape(self.cfg, self.cfg.eval_mode)[1]
        net = bool(flags & NET_TOO)  # without it one mixer codes, which is as fast as it reads
        predictor = self.predictor(tokens + 1, True, net, stride, first=not net)
        if not flags & SHARD:
            predictor.code(np.array([self.bos], np.int64))
        return predictor

    def file_tokens(self, path: Path, raw: bytes) -> tuple[Pieces | None, int, list[np.ndarray]]:
        """(what wrote a file's tokens, None for a shard; flags; the tokens in parts, uint16).

        raw: what is in the file.
        """
        with contextlib.suppress(UserError):  # it is no shard, or one of another vocabulary
            tokens = check_ids(Shard(path)[:], self.artifact.tokenizer.vocab, path)
            if len(tokens) and raw.startswith(shard_header(len(tokens))):
                return None, SHARD, [tokens.astype(np.uint16)]
        pieces, flags = self.pieces(), 0
        if not pieces.keeps_lines:  # nor had the text any that it was trained on
            first = list(itertools.islice(file_chunks(path), 1))
            plain, lines = (sum(map(len, pieces.tokens_of(first, x))) for x in (False, True))
            flags = LINES if lines < plain else 0
        return pieces, flags, list(pieces.tokens_of(file_chunks(path), bool(flags)))

    def compress(self) -> None:
        """Write FILE as a code made by what an artifact predicts."""
        cfg, path = self.cfg, Path(self.cfg.file)
        target = self.result_path(f"{path}.tgk")
        raw = path.read_bytes()
        pieces, flags, parts = self.file_tokens(path, raw)
        count = sum(map(len, parts))
        if b"".join(file_bytes(pieces, flags, count, parts)) != raw:
            raise RunFailed(f"FILE={path}: it changes while it is read")
        flags |= NET_TOO * cfg.with_net
        code, speed = self.encode(parts, flags)
        length = (count.bit_length() + 7) // 8
        mark, digest = machine_mark(cfg, count) if cfg.with_net else b"", file_sha256(self.path)
        flags |= length << 4
        head = TGK.pack(TGK_MAGIC, flags, bytes.fromhex(digest[:8]), zlib.crc32(raw))
        out = head + count.to_bytes(length, "little") + mark + code
        with whole_file(target) as temporary:
            temporary.write_bytes(out)
        if pieces:
            spelt = np.isin(np.concatenate(parts), list(pieces.byte_ids.values())).sum()
            what, than = f"{count:,} tokens, {spelt:,} of them single bytes", others(raw)
            size = len(raw)
        else:
            facts, tokens, what, than = self.artifact.tokenizer, parts[0], "of a shard's text", ""
            size = int(facts.bytes_of(tokens[:-1], tokens[1:]).sum())
        bits = f"{8 * len(out) / size:.3f} bits per byte" if size else "all of it this code's head"
        say(f"{path}: {size:,} bytes ({what}) -> {len(out):,} ({bits}{than}), "
            f"{speed:,.0f} tokens/s: {target}")  # fmt: skip

    def encode(self, parts: list[np.ndarray], flags: int) -> tuple[bytes, float]:
        """Tokens in parts -> (their code, tokens per second)."""
        count, done = sum(map(len, parts)), 0
        predictor = self.coding_predictor(count, flags)
        coder, show = predictor.mixer.coder(), show_progress("coding")
        begin = time.perf_counter()
        for part in parts:
            for at in range(0, len(part), PACK_CHUNK):
                tokens = part[at : at + PACK_CHUNK].astype(np.int64)
                predictor.code(tokens, coder)
                done += len(tokens)
                show(done, count, "")
        return coder.finish(), count / (time.perf_counter() - begin)

    def decode(self, code: bytes, count: int, flags: int) -> Iterator[np.ndarray]:
        """The tokens of a code, in parts. Raises UserError where it ends too early or too late."""
        predictor = self.coding_predictor(count, flags)
        coder, show, done = predictor.mixer.coder(code), show_progress("restoring"), 0
        while done < count and coder.surplus() <= 0:
            tokens = np.zeros(min(PACK_CHUNK, count - done), np.int64)
            predictor.code(tokens, coder)
            done += len(tokens)
            show(done, count, "")
            yield tokens
        if coder.surplus():
            raise UserError(f"FILE={self.cfg.file}: damaged, or cut short: copy it again")

    def restore(self) -> None:
        """Write the file that MODE=compress has read."""
        cfg, path = self.cfg, Path(self.cfg.file)
        if path.suffix != ".tgk" and not cfg.output:
            raise UserError(f"FILE={path}: its name does not end in .tgk: choose OUTPUT")
        target, raw = self.result_path(str(path.with_suffix(""))), path.read_bytes()
        flags, crc, count, code = self.read_head(raw)
        pieces = None if flags & SHARD else self.pieces()
        chunks = file_bytes(pieces, flags, count, self.decode(code, count, flags))
        with whole_file(target) as temporary, open(temporary, "wb") as out:
            now = size = 0
            for chunk in chunks:
                now, size = zlib.crc32(chunk, now), size + out.write(chunk)
            if now != crc:
                raise UserError(f"FILE={path}: damaged (its checksum does not fit): copy it again")
        say(f"{path}: {len(raw):,} bytes -> {size:,}, as they were: {target}")

    def read_head(self, raw: bytes) -> tuple[int, int, int, bytes]:
        """(flags, CRC-32, tokens, code) of a .tgk file. Raises UserError for any other."""
        file = f"FILE={self.cfg.file}"
        if raw[: len(TGK_MAGIC)] != TGK_MAGIC:
            raise UserError(f"{file}: not a file that MODE=compress has made")
        if len(raw) < TGK.size:
            raise UserError(f"{file}: cut short: copy it again")
        _, flags, artifact, crc = TGK.unpack_from(raw)
        at = TGK.size + (flags >> 4)
        end, count = at + 2 * bool(flags & NET_TOO), int.from_bytes(raw[TGK.size : at], "little")
        if bytes.fromhex(file_sha256(self.path)[:8]) != artifact:
            raise UserError(f"{file}: compressed with another artifact than {self.path}, one whose "
                            f"SHA-256 begins with {artifact.hex()}")  # fmt: skip
        # A token takes 0.00002 bits or more: what says that there are more tokens is wrong.
        most = min(len(raw) << 19, (1 << 31) - 1) if flags & SHARD else len(raw) << 19
        if flags & 8 or end >= len(raw) or count > most:  # a shard's header holds 31 bits
            raise UserError(f"{file}: damaged, or cut short: copy it again")
        if flags & NET_TOO and raw[at:end] != machine_mark(self.cfg, count):
            raise UserError(f"{file}: compressed with WITH_NET=1 on another machine, with "
                            "another MLX, other EVAL_ settings or WORKERS: the net's numbers are "
                            "not the same here")  # fmt: skip
        return flags, crc, count, raw[end:]


def report_sample(facts: Tokenizer, report: Report, trainer: Trainer) -> None:
    """Report what the net, with the weights that validation takes, makes up: 40 tokens."""
    model, cfg, rng = trainer.model, trainer.cfg, np.random.default_rng(trainer.cfg.seed)
    model.update(tree_unflatten(list(trainer.average.items())))
    length = eval_shape(cfg)[0]
    net = NetReader(model, length, max(length // 2, 1))
    tokens = Predictor(None, net).sample([max(model.bos, 0)], 40, cfg, rng)
    text = "".join(streamed(tokens, bytes_of_pieces(facts), b" " * facts.dummy_prefix))
    event = {"event": "sample", "step": trainer.step, "text": text}
    report.event(event, "step:{step}/{n} sample:{text!r}")


# ==================================================================================================
# MODES: train, which ends when artifact and message are on disk; score, a program of its own
# ==================================================================================================


EARLY_TOKENS = 2_000_000  # of the validation text: decoded before training
OVERLAP_MOST = 0.001  # of the text: a large crawl has some documents twice, which scores then say


def describe_start(
    cfg: Knobs, report: Report, warnings: list[str], workers: Workers, ranks: int, again: bool
) -> None:
    """Lines that say what runs where, and the config event unless the run has one: `again`."""
    report.line(*(f"warning: {warning}" for warning in [*warnings, *machine_faults(cfg)]))
    machine = {
        "machine": machine_kind(), "mlx_version": mx.__version__, "dtype_used": compute_dtype(cfg),
        "blas_used": BLAS_NAME, "workers_used": workers.count,
        "ranks": ranks, "gflops": gigaflops(workers),
    }  # fmt: skip
    if again:
        report.line(*(line.format(**vars(cfg), **machine) for line in CONFIG_LINES))
    else:
        report.event({"event": "config", **dataclasses.asdict(cfg), **machine}, *CONFIG_LINES)


def activation_bytes(cfg: Knobs, vocab: int, tokens: int) -> int:
    """What microbatches of so many tokens keep for their gradients: blocks, scores, the head."""
    size = 4 if compute_dtype(cfg) == "float32" else 2
    seen = 5 / 8 if on_cpu() or on_metal() else 1  # of the scores: see `query_blocks`
    scores = int(cfg.num_heads * cfg.train_seq_len * seen)
    block = (8 + 3 * cfg.mlp_mult) * cfg.model_dim + scores  # fitted to tests/benchmarks/memory.py
    head = min(cfg.logit_chunk_tokens or tokens, tokens) * vocab * 4 * 4
    return tokens * cfg.num_layers * block * size + head


def fit_memory(
    cfg: Knobs, vocab: int, env: dict[str, str], train_tokens: int
) -> tuple[Knobs, list[str]]:
    """Settings that the environment leaves open, lowered to what the memory holds, and tables to
    what the text needs that may be packed; lines."""
    limit, lines = memory_limit(), []
    if cfg.mixer == "logistic" and env.get("MIXER_MEMORY_MB") and cfg.mixer_memory_mb << 20 > limit:
        raise UserError(f"MIXER_MEMORY_MB={cfg.mixer_memory_mb}: there are {limit >> 20:,}")
    if not env.get("MIXER_MEMORY_MB"):
        packed = cfg.pack_text_bytes if cfg.pack_text_bytes >= 0 else ARTIFACT_LIMIT_BYTES
        needed = 750 + min(train_tokens, 2 * packed) // 4000  # a token takes half a byte
        needed *= tree_count(cfg.mixer_size)
        needed, held = min(cfg.mixer_memory_mb, needed), max(limit // 3 >> 20, 1)
        cfg = dataclasses.replace(cfg, mixer_memory_mb=min(needed, held))
        if held < needed and cfg.mixer == "logistic":
            lines.append(f"MIXER_MEMORY_MB={held}: a third of this machine's memory")
    tokens, workers = cfg.mlx_max_microbatch_tokens, (cfg.workers or cpu_cores()) if on_cpu() else 1
    most = limit // 3 // workers  # each of them has a microbatch
    while tokens > cfg.train_seq_len and activation_bytes(cfg, vocab, tokens) > most:
        tokens //= 2
    if not env.get("MLX_MAX_MICROBATCH_TOKENS") and tokens < cfg.mlx_max_microbatch_tokens:
        cfg = dataclasses.replace(cfg, mlx_max_microbatch_tokens=tokens)
        lines.append(f"MLX_MAX_MICROBATCH_TOKENS={tokens}: more would need over a third of it")
    return cfg, lines


def estimate_memory(
    params: Arrays, cfg: Knobs, microbatches: list[int], val_tokens: int, train_tokens: int = 0
) -> dict[str, int]:
    """Peak bytes by estimate: {"net": of training, "mixer": of a process that has one, "rest"}.

    microbatches: windows that each worker holds at once. The net's are its float32 tensors
    (values, moments, average, old and new; gradients of each worker and their sum) and its
    activations. The rest are counts of pairs, the text that is packed, a batch of the net's rows
    in scoring, and freed buffers that MLX keeps.
    """
    vocab = params["tok_emb"].shape[0]
    copies = sum(p.size for p in params.values()) * 4 * (7 + len(microbatches))
    nodes = val_tokens * (cfg.ngram_max_order + 1)  # at most, each with up to four slots
    trees = tree_count(cfg.mixer_size)
    rows = sum(set_sizes(vocab, cfg.mixer_memory_mb // trees))
    tables = 2 * rows * WIDTH * 4 + 2 * (vocab + (1 << 18)) * 33 * 4  # weights and refining maps
    tables = trees * (tables + (1 << 26)) + (cfg.mixer_memory_mb << 20)  # the match, contexts
    mixer = {"logistic": tables, "backoff": nodes * (NODE.itemsize + 16)}
    net = copies + activation_bytes(cfg, vocab, sum(microbatches) * cfg.train_seq_len)
    pairs = 8 * vocab**2 if cfg.complement_alpha else 0
    each = 8 + 4 * trees  # bytes per packed token: twice by the packer, once by each mixer
    packed = each * min(train_tokens, PACKED_TOKENS_MOST) if cfg.mixer == "logistic" else 0
    rest = pairs + packed + 6 * 4 * ROWS_MOST + (CACHE_LIMIT if on_metal() else 0)
    return {"net": net, "mixer": mixer.get(cfg.mixer, 0), "rest": rest}


def unlike_preset(cfg: Knobs, vocab: int, train_tokens: int) -> list[str]:
    """The settings that are not what the preset has on this machine: NAME=value."""
    usual = Knobs(preset=cfg.preset, **preset_values(cfg.preset))
    fitted = dataclasses.replace(usual, mixer_size=cfg.mixer_size,
                                 pack_text_bytes=cfg.pack_text_bytes)  # fmt: skip
    fitted, _ = fit_memory(fitted, vocab, {}, train_tokens)  # as for this run's text and trees
    usual = dataclasses.replace(
        usual, mixer_memory_mb=fitted.mixer_memory_mb,
        mlx_max_microbatch_tokens=fitted.mlx_max_microbatch_tokens,
    )  # fmt: skip
    own, its = (settings_of(knobs, "run", *KEPT_SCOPES) for knobs in (cfg, usual))
    return [f"{name}={value}" for name, value in own.items()
            if value != its[name] and name not in ("RUN_ID", "OUT_DIR", "RESUME")]  # fmt: skip


def describe_training(trainer: Trainer, text: ValidationText) -> Iterator[str]:
    """Lines: own settings, parameters by group, the data, the artifact's size and the memory by
    estimate."""
    cfg, data = trainer.cfg, trainer.data
    own = unlike_preset(cfg, trainer.params["tok_emb"].shape[0], data.tokens)
    yield f"settings unlike the preset's: {' '.join(own) or 'none'}"
    yield f"parameters: {sum(p.size for p in trainer.params.values()):,}"
    for group in GROUPS:
        sizes = [p.size for n, p in trainer.params.items() if trainer.groups[n] is group]
        bits = f"{getattr(cfg, group.bits)} bits" if group.bits else "float32"
        if sizes:
            yield (f"  {group.name}: {len(sizes)} tensors, {sum(sizes):,} parameters, "
                   f"{group.optimizer}, lr {getattr(cfg, group.lr)}, stored in {bits}")  # fmt: skip
    size = estimate_bytes(trainer.params, trainer.groups, cfg)
    held = f", of which the net does not see the first {data.held:,}" if data.held else ""
    yield f"train: {data.tokens:,} tokens in {len(data.shards)} shard(s){held}"
    yield f"validation: {len(text.tokens):,} tokens in {text.shards} shard(s){text.part}"
    if text.source_bytes and text.stated_bytes and text.source_bytes != text.stated_bytes:
        yield (f"the tokenizer alters the text: {text.source_bytes:,} bytes of source are "
               f"{text.stated_bytes:,} decoded, on which the score is measured")  # fmt: skip
    yield f"script and artifact: about {size:,} of {ARTIFACT_LIMIT_BYTES:,} bytes, by estimate"
    sizes = len(text.tokens), data.tokens
    use = estimate_memory(trainer.params, cfg, trainer.largest_microbatches, *sizes)
    limit = memory_limit()
    yield (f"memory: about {use['net'] / 1e9:.1f} GB for the net's training, "
           f"{use['mixer'] / 1e9:.1f} for a mixer, {use['rest'] / 1e9:.1f} for the rest, by "
           f"estimate, of {limit / 1e9:.1f}")  # fmt: skip
    if sum(use.values()) > limit:
        yield "warning: memory may not suffice: lower MLX_MAX_MICROBATCH_TOKENS or MIXER_MEMORY_MB"
    packed, clock = 2 * cfg.pack_text_bytes, cfg.max_wallclock_seconds  # half a byte per token
    enough = clock > packed / 12_500  # to pack it in a quarter of the clock
    if cfg.mixer == "logistic" and 0 <= packed < data.tokens and enough:
        yield (f"PACK_TEXT_BYTES={cfg.pack_text_bytes}: a clock of {clock:.0f} s is enough for "
               "more; -1 packs all that fits")  # fmt: skip


def new_packer(trainer: Trainer, tokenizer: Tokenizer) -> Packer | None:
    """Rank 0's packer, with the bytes it may use; None unless MIXER=logistic."""
    cfg = trainer.cfg
    if cfg.mixer != "logistic" or trainer.ranks.rank:
        return None
    net = estimate_bytes(trainer.params, trainer.groups, cfg)
    head = 20_000 + (3 + 2 * tree_count(cfg.mixer_size)) * tokenizer.vocab
    room = max(ARTIFACT_LIMIT_BYTES - net - net // 50 - head, 0)
    budget = room if cfg.pack_text_bytes < 0 else cfg.pack_text_bytes
    if budget > room:
        raise UserError(f"PACK_TEXT_BYTES={cfg.pack_text_bytes}: script and net leave about {room}")
    return Packer(trainer.data, tokenizer, cfg, budget, trainer.workers)


def export(
    trainer: Trainer, report: Report, packer: Packer | None, tokenizer: Tokenizer,
    overlap: tuple[int, int],
) -> Event:  # fmt: skip
    """Write the averaged float weights and the artifact; returns the export event."""
    cfg, packed, folder = trainer.cfg, packer and packer.finish(), report.folder
    meta = {"knobs": json.dumps(dataclasses.asdict(cfg)), "tokenizer_sha256": tokenizer.sha256}
    with whole_file(folder / "model.safetensors") as part:
        mx.save_safetensors(str(part), trainer.average, meta)
    if packed:
        report.line("packed {:,} tokens of training text into {:,} bytes".format(*packed.total())
                    + f" in {packer.seconds:.0f} s")  # fmt: skip
    path = folder / "artifact.bin"
    net = trainer.average, trainer.groups
    sizes = write_artifact(path, *net, cfg, tokenizer, packed, overlap)
    trained = trainer.step * trainer.tokens_per_step
    return {**sizes, "pack_seconds": packer.seconds if packer else 0.0,
            "artifact_sha256": file_sha256(path),
            "elapsed_s": trainer.elapsed_s, "train_steps": trainer.step, "train_tokens": trained,
            "tok_s": trained / max(trainer.elapsed_s, 1e-9)}  # fmt: skip


def report_validation(
    text: ValidationText, tokenizer: Tokenizer, report: Report, trainer: Trainer
) -> None:
    """Record what the averaged weights score alone."""
    at = {"step": trainer.step, "train_time_ms": 1000 * trainer.elapsed_s}
    args = trainer.model, trainer.average, text, tokenizer, trainer.cfg, trainer.workers
    report.event({"event": "val", **at, **score_net(*args)}, VAL_LINE)


def train_to_artifact(
    trainer: Trainer, report: Report, text: ValidationText, tokenizer: Tokenizer, keeper: Keeper,
    packer: Packer | None,
) -> Event:  # fmt: skip
    """Train and pack, then export: sizes and counts, on rank 0 alone."""
    cfg, first = trainer.cfg, not trainer.cfg.max_wallclock_seconds
    validate = functools.partial(report_validation, text, tokenizer, report)
    sample = functools.partial(report_sample, tokenizer, report)
    try:
        if packer:
            if first:
                report.line("packing text first, as there is no MAX_WALLCLOCK_SECONDS to share")
            packer.start(trainer.elapsed_s, keeper)
        train(trainer, report, validate, sample, keeper)
        keeper.save()  # from here on nothing of the training can be lost
        if not trainer.ranks.rank and last_record(report.folder, "val").get("step") != trainer.step:
            validate(trainer)
        if packer:
            if not packer.ended.is_set():
                report.line("packing goes on until its bytes or MAX_WALLCLOCK_SECONDS are used up")
            packer.wait(keeper)
    except Interrupted as error:
        if not cfg.export_on_interrupt or (trainer.ranks.count > 1 and not error.together):
            raise
        interrupts.asked = 0
        report.line(f"stopped at step {trainer.step}: EXPORT_ON_INTERRUPT=1 exports it")
        keeper.save(together=False)
        if packer:
            packer.deadline = 0.0
    if trainer.ranks.rank:
        return {}
    loss = last_record(report.folder, "val").get("val_loss", 0.0)
    if trainer.exploded(loss):  # in its last step, as the others looked at the one before
        report.line(f"warning: with val_loss {loss:.4f} the net is worse than one that knows "
                    f"nothing ({trainer.blind:.4f}). {LOWER}")  # fmt: skip
    if packer:
        packer.wait(keeper)
        keeper.save(together=False)
    made = export(trainer, report, packer, tokenizer, text.overlap)
    trained, packed = trainer.elapsed_s, packer.seconds if packer else 0.0
    return {**made, "train_seconds": trained + packed if first else max(trained, packed)}


def resume(
    trainer: Trainer, packer: Packer | None, saved: tuple[State, dict], text: str
) -> Iterator[str]:
    """Go on from a checkpoint; yields lines that say from where."""
    state, facts = saved
    check_same_run(facts, state, trainer.state(), trainer.cfg, text)
    arrays, counters = state
    like = trainer.state()[0]  # its order is the artifact's
    same = {kind: {name: arrays[kind][name] for name in tree} for kind, tree in like.items()}
    trainer.set_state(same, counters)
    yield f"goes on from step {trainer.step}"
    for name, value in settings_of(trainer.cfg, "rate").items():
        was = facts["knobs"].get(name)
        if was != value:
            yield f"{name} was {was}, and is {value} from here on"
    if packer and "packed" in arrays:
        packer.set_state(arrays["packed"])
        yield f"and from {packer.count:,} packed tokens"


def train_mode(cfg: Knobs, warnings: list[str], env: dict[str, str]) -> None:
    """Train until weights, artifact and message are on disk, then become the scoring program."""
    if cfg.mixer != "off":
        load_numba()  # its lack is said before anything is trained
    ranks = Ranks()
    folder, tokenizer_path, where = ranks.in_turn(lambda: locate_data(cfg))
    tokenizer = load_tokenizer(tokenizer_path)
    check_vocab(cfg, tokenizer)
    train_tokens = sum(len(Shard(path)) for path in find_shards(folder, "train"))
    cfg, lowered = fit_memory(cfg, tokenizer.vocab, env, train_tokens)
    memory_mb = ranks.of_first(mx.array(cfg.mixer_memory_mb)).item()  # as rank 0 packs
    cfg = dataclasses.replace(cfg, mixer_memory_mb=memory_mb)
    warnings = [*warnings, *lowered]
    with ranks.in_turn(lambda: Report(None, 0) if ranks.rank else open_report(cfg)) as report:
        kinds = "config", "export", "final"
        done = last_record(report.folder, *kinds)
        done = {} if done.get("event") == "config" else done  # then it has not ended
        longer = bool(done) and progress(done["train_steps"], done.get("elapsed_s", 0.0), cfg) < 1
        over, longer = ranks.any(bool(done) and not longer, longer)
        if not over:
            where = f"{where}; {report.folder} is made longer" if longer else where
            train_run(
                cfg, warnings, ranks, report, folder, tokenizer, tokenizer_path, where, longer
            )
        elif done.get("event") == "final":
            say(
                f"{report.folder} is finished: val_bpb {done.get('val_bpb')}, audit {done['audit']}"
            )
            say("a higher ITERATIONS or MAX_WALLCLOCK_SECONDS makes it longer")
            return
        else:
            report.start_writing()
            follow(cfg.report_to, report.folder)
        if not ranks.rank:
            score_anew(report, report.folder / "artifact.bin", folder, tokenizer_path)


def train_run(
    cfg: Knobs, warnings: list[str], ranks: Ranks, report: Report, folder: Path,
    tokenizer: Tokenizer, tokenizer_path: Path, where: str, longer: bool,
) -> None:  # fmt: skip
    """What `train_mode` does between its folder's opening and the scoring.

    longer: the run had ended; its records stay, and those of another end follow.
    """
    saved = ranks.in_turn(lambda: report.folder and read_checkpoint(report.folder))
    if ranks.any(bool(report.folder) and longer and not saved)[0]:
        raise UserError("RESUME=1: the run has ended, and has no checkpoint left to go on from")
    report.line(where)
    with make_workers(cfg, int(ranks.same(platform.node()).sum()), ranks.count) as workers:
        describe_start(cfg, report, warnings, workers, ranks.count, bool(saved) and not longer)
        shards = find_shards(folder, "train")
        data = TrainWindows(shards, cfg.train_seq_len, cfg.seed, tokenizer.vocab,
                            cfg.rehearsal_tokens)  # fmt: skip
        written = f"{data.fingerprint()} {tokenizer.sha256}"
        ranks.check_same(f"{settings_of(cfg, 'run', *KEPT_SCOPES)} {written}")
        loaded = load_validation(folder, tokenizer, cfg.val_max_tokens)
        size = tokenizer_path.stat().st_size
        check = functools.partial(check_text, cfg, loaded, data, tokenizer, tokenizer_path)
        text = ranks.in_turn(lambda: loaded if ranks.rank else check())
        check_least_parameters(cfg, tokenizer.vocab)
        trainer = Trainer(GPT(cfg, tokenizer.vocab, tokenizer.bos), cfg, data, workers, ranks)
        packer, lines = new_packer(trainer, tokenizer), list(describe_training(trainer, text))
        more = resume(trainer, packer, saved, written) if saved else ()
        report.line(*lines, *ranks.in_turn(lambda: list(more)))
        report.begin(None if longer else saved[1]["sizes"] if saved else {})
        follow(cfg.report_to, report.folder)
        trainer.follow_rank_0()
        keeper = Keeper(trainer, report, written, packer.state if packer else dict)
        if longer:
            keeper.save()  # what the run has reported until now stays
        trainer.warm_up()
        with keeper.last_words():
            made = train_to_artifact(trainer, report, text, tokenizer, keeper, packer)
            if ranks.rank:
                return
            mx.clear_cache()  # of what training has freed
            if packer and cfg.audit:
                made["message_seconds"] = write_first_message(cfg, packer.mixer, report, folder)
            text_facts = {"tokenizer_bytes": size, "val_sha256": text.sha256}
            report.event({**made, **text_facts}, EXPORT_LINE)


def check_text(
    cfg: Knobs, text: ValidationText, data: TrainWindows, tokenizer: Tokenizer, path: Path
) -> ValidationText:
    """The text with its overlap, once nothing is found that would make its score worth nothing.

    path: of the tokenizer. Raises UserError where bytes cannot be counted, AuditFailed where
    validation text is training text, unless ALLOW_OVERLAP.
    """
    count, true = decoded_bytes(path, tokenizer, text.tokens[:EARLY_TOKENS])
    if count != true:
        unknown = int(tokenizer.control[text.tokens[:EARLY_TOKENS]].sum())
        raise UserError(f"TOKENIZER_PATH={path}: its pieces have {count} bytes, the decoded "
                        f"validation text {true} ({unknown} control or unknown tokens): no score "
                        "would be valid; take a tokenizer with byte_fallback")  # fmt: skip
    documents, tokens = shared_documents(data, text.tokens, tokenizer.bos)
    share = tokens / len(text.tokens)
    if share > OVERLAP_MOST and not cfg.allow_overlap:
        raise AuditFailed("overlap", f"{documents} documents, {share:.2%} of the validation text, "
                          "are training text too: take them out, or set "
                          "ALLOW_OVERLAP=1, which every score will say")  # fmt: skip
    return dataclasses.replace(text, overlap=(documents, tokens))


def write_first_message(cfg: Knobs, mixer: Mixer, report: Report, folder: Path) -> float:
    """Write the message of a run's artifact by the mixer that has coded its text; seconds."""
    begin = time.perf_counter()
    if isinstance(mixer, MixerGroup) and not mixer.along:
        report.line("the mixers of the other trees read the packed text, to encode a message")
        show = show_progress("reading")
        for tokens in mixer.catch_up():
            show(tokens, mixer.learned, "")
        end_live()
    with make_workers(cfg) as workers:  # as the scoring program makes them: rows must be equal
        scoring = Scoring.load(cfg, report.folder / "artifact.bin", folder, workers)
        rehearse(mixer, scoring.artifact, standard_rows(cfg, scoring.model, workers))
        mixer.begin(int(scoring.text.tokens[0]))
        _, _, nats, coder = scoring.code_message(mixer, "standard", None)
        scoring.write_message(nats, coder)
    return time.perf_counter() - begin


def score_anew(report: Report, path: Path, folder: Path, tokenizer_path: Path) -> None:
    """Become a fresh process that scores: its output and its exit status are this run's.

    It runs the script that trained, as people edit theirs meanwhile: this file if it is the same,
    as its compiled kernels are at hand, else the copy in the run's folder.
    """
    kept = path.with_name(SCRIPT.name)
    settings = {"EVAL_ONLY": path, "DATA_PATH": folder, "TOKENIZER_PATH": tokenizer_path}
    words = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    command = " ".join([*words, "python", shlex.quote(str(kept))])
    report.line(f"a fresh process scores what is on disk; again: {command}")
    sys.stdout.flush()
    env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    same = SCRIPT.is_file() and SCRIPT.read_bytes() == kept.read_bytes()
    os.execve(sys.executable, [sys.executable, str(SCRIPT if same else kept)], env)


def unscored_run(scoring: Scoring, warnings: list[str]) -> Event:
    """The export record of the run whose score this will be: {} if it is nobody's.

    It is a run's if it has none yet, and this is its artifact, its script, its text and its way of
    scoring.
    """
    cfg, path, header = scoring.cfg, scoring.path, scoring.artifact.header["knobs"]
    kept, made = path.with_name(SCRIPT.name), last_record(path.parent, "export", "final")
    if not kept.is_file():
        return {}
    if kept.read_bytes() != source():
        warnings.append(f"this script is not the one that trained: that is {kept}")
        return {}
    its = {"event": "export", "artifact_sha256": file_sha256(path)}
    its["val_sha256"] = scoring.text.sha256
    same = its.items() <= made.items() and settings_of(cfg, "eval").items() <= header.items()
    same &= not cfg.run_id or (Path(cfg.out_dir) / cfg.run_id).resolve() == path.parent.resolve()
    return made if same else {}


def final_facts(scoring: Scoring, made: Event) -> Event:
    """What a final record says besides the score; made: the run's export record, or {}."""
    cfg, artifact, text = scoring.cfg, scoring.artifact, scoring.text
    return {
        **dict.fromkeys(("train_steps", "train_tokens", "train_seconds", "tok_s"), 0),
        **export_event(scoring.path, artifact.params, artifact.packed), **made, "event": "final",
        "device": machine_kind(), "mlx_version": mx.__version__, "preset": cfg.preset,
        "seed": cfg.seed, "val_sha256": text.sha256, "ended": time.time(),
        "tokenizer_sha256": artifact.tokenizer.sha256,
        "val_overlap": artifact.header.get("overlap"), "val_source_bytes": text.source_bytes,
    }  # fmt: skip


def score_mode(path: Path, env: dict[str, str]) -> None:
    """Score an artifact with its own settings, where the environment has no others, and report.

    The report is the run's whose score this is, or a new one.
    """
    if launched_rank():
        return
    artifact = read_artifact(path)
    env = {name: value for name, value in env.items() if name != "RESUME"}  # training goes on
    cfg, warnings = knobs_from_env(env, kept=artifact.header["knobs"])
    use_device(cfg)
    folder, tokenizer_path, where = locate_data(cfg)
    with make_workers(cfg) as workers, contextlib.ExitStack() as stack:
        scoring = Scoring.load(cfg, path, folder, workers, artifact)
        if tokenizer_path:
            Audit(scoring).same_tokenizer(tokenizer_path)
        made = unscored_run(scoring, warnings)
        report = stack.enter_context(
            Report(path.parent, cfg.iterations) if made else open_report(cfg)
        )
        report.line(where)
        if not made:
            chosen = ("AUDIT", "EVAL_MODE", "EVAL_STRIDE", "VAL_MAX_TOKENS", "MIXER")
            given = " ".join(f"{n}={as_text(getattr(cfg, n.lower()))}" for n in chosen)
            report.line(
                f"how it is scored, by the file where the environment says nothing: {given}"
            )
        describe_start(cfg, report, warnings, workers, 1, again=bool(made))
        final = final_facts(scoring, made)
        if made:
            report.start_writing()
        else:
            report.begin()
        follow(cfg.report_to, report.folder)
        try:
            report_score(report, scoring, final, folder, tokenizer_path)
        except AuditFailed as error:
            report.event({"event": "audit", "audit": "fail", "lines": [str(error)]})
            report.event({**final, "audit": "fail", "audit_failure": str(error)})
            report.line(str(error))
            raise


def report_score(
    report: Report, scoring: Scoring, final: Event, folder: Path, tokenizer_path: Path | None
) -> None:
    """Audit and score in every mode asked for; a record of each, and the final one."""
    cfg, lines = scoring.cfg, []
    audit = Audit(scoring)
    if cfg.audit:
        lines += audit.run(folder, tokenizer_path)
    modes = ("standard", "sliding") if cfg.eval_mode == "both" else (cfg.eval_mode,)
    evals = []
    for mode in modes:
        event, line = scoring.score(mode)
        evals.append(event)
        lines += [line] if line else []
    if cfg.audit:
        lines += audit.stated_bytes(evals[-1]["val_bytes"])
    label = audit.label(lines) if cfg.audit else "off"
    report.line(*(f"audit: {line}" for line in lines))
    report.event({"event": "audit", "audit": label, "lines": lines})
    for event in evals:
        report.event({"event": "eval", **event}, *ROUNDTRIP_LINES)
    seconds = sum(e["eval_time_ms"] / 1000 + e["prime_seconds"] for e in evals)
    final = {**final, **evals[-1], "event": "final", "audit": label, "eval_seconds": seconds,
             "message": scoring.message}  # fmt: skip
    last, scores = FINAL_LINE, SUMMARY_OF_BOTH
    if cfg.mixer == "off":
        last, scores = FINAL_LINE_OF_NET, SUMMARY_OF_NET
    report.event({**final, "peak_memory_bytes": peak_memory()}, last)
    if unwritten := scoring.write_costs(report.folder / "costs.npz"):
        report.line(f"warning: {unwritten}")
    rest = final["model_bytes"] - final["packed_bytes"]
    facts = {**final, "net_bytes": rest, "folder": report.folder, "part": part_of_text(final)}
    report.line(*(scores + SUMMARY).format(**facts).split("\n"))
    report.line(f"next: python tools/report.py {report.folder}")


DOCTOR_VOCAB = 1024  # pieces of the text that the doctor makes up


def forward_sha256(cfg: Knobs) -> str:
    """SHA-256 of a net's rows of a window, and of a batch: where nets are repeatable, one in all
    processes."""
    model = GPT(dataclasses.replace(cfg, use_ortho_init=False), DOCTOR_VOCAB, 1)
    mx.eval(model.parameters())  # here, as other threads take the rows
    size, digest = eval_shape(cfg)[0] * (1 + cfg.eval_batch_seqs) + 1, hashlib.sha256()
    text = np.random.default_rng(0).integers(2, DOCTOR_VOCAB, size)
    with make_workers(cfg) as workers:
        for _, rows in standard_rows(cfg, model, workers)(text):
            digest.update(rows.tobytes())
    return digest.hexdigest()


def in_another_process(cfg: Knobs) -> str:
    """`forward_sha256` as a fresh process has it; '' where that fails."""
    lines = f"import importlib; t = importlib.import_module({SCRIPT.stem!r}); "
    lines += "cfg, _ = t.knobs_from_env(dict(t.os.environ)); "
    lines += "t.use_device(cfg); print(t.forward_sha256(cfg))"
    command = [sys.executable, "-c", lines]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    return (done.stdout.split() or [""])[-1]


def trial(cfg: Knobs) -> tuple[Trainer, float]:
    """(a trainer on a text that is made up, tokens per second of its second step)."""
    size = max(min(cfg.train_batch_tokens, 4096 if on_cpu() else 8192), cfg.train_seq_len)
    cfg = dataclasses.replace(cfg, train_batch_tokens=size)
    tokens = np.random.default_rng(0).integers(2, DOCTOR_VOCAB, cfg.train_batch_tokens + 2)
    with tempfile.TemporaryDirectory() as folder, make_workers(cfg) as workers:
        path = Path(folder) / "made_up_train_000000.bin"
        path.write_bytes(shard_header(len(tokens)) + tokens.astype("<u2").tobytes())
        data = TrainWindows([path], cfg.train_seq_len, cfg.seed, DOCTOR_VOCAB)
        trainer = Trainer(GPT(cfg, DOCTOR_VOCAB, 1), cfg, data, workers, Ranks())
        trainer.take_step()
        return trainer, trainer.take_step()["tok_s"]


def doctor_mode(cfg: Knobs, warnings: list[str], env: dict[str, str]) -> None:
    """Say what this machine has, what the preset needs, and what is amiss, with its cure."""
    cfg, _ = fit_memory(cfg, DOCTOR_VOCAB, env, PACKED_TOKENS_MOST)
    amiss = [*warnings, *machine_faults(cfg)]
    say(f"machine: {machine_kind()}, {processor_name()}, {cpu_cores()} cores, "
        f"{memory_limit() / 1e9:.1f} GB; Python {platform.python_version()}")  # fmt: skip
    names = ("mlx", "numpy", "numba", "sentencepiece", "brotli", "tqdm")
    versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()
                if d.metadata["Name"]}  # fmt: skip
    say("packages: " + ", ".join(f"{name} {versions.get(name, 'missing')}" for name in names))
    amiss += [f"{name} is missing: pip install {name}" for name in names if name not in versions]
    say(f"compiler: {COMPILER_FAULT or 'works'}; BLAS: {BLAS_NAME}")
    with make_workers(cfg) as workers:
        say(f"matrix products: {gigaflops(workers):.0f} GFLOP/s in {workers.count} worker(s)")
    if cfg.mixer != "off" and "numba" in versions:
        mix_hash(np.uint64(1), 2)
        cache = getattr(mix_hash.compiled, "stats", None)
        say(f"numba's cache: {cache.cache_path if cache and cache.cache_path else 'none'}")
    same = forward_sha256(cfg) == in_another_process(cfg)
    say(f"the net's scores: {'equal' if same else 'UNLIKE'} in two processes")
    amiss += [] if same else ["the net's scores differ between two processes: on this machine the "
                              "audit will fail; try DEVICE=cpu"]  # fmt: skip
    trainer, speed = trial(cfg)
    say(f"preset {cfg.preset}: {sum(p.size for p in trainer.params.values()):,} parameters, "
        f"{speed:,.0f} tokens/s in training")  # fmt: skip
    for line in preset_needs(cfg, trainer, speed):
        say(line)
    for fault in amiss:
        say(f"amiss: {fault}")
    if not amiss:
        say("nothing is amiss")


def machine_faults(cfg: Knobs) -> Iterator[str]:
    """What is amiss with the machine, and its cure, a line each."""
    if on_cpu() and COMPILER_FAULT:
        yield f"MLX's CPU kernels run uncompiled, which is slower: {COMPILER_FAULT}"
    if cfg.device == "auto" and on_cpu() and guess_device("auto") == "gpu":
        yield ("a GPU's preset, but MLX computes on the CPU: where mlx-cuda is installed, mlx-cpu "
               "has overwritten it: take a fresh environment")  # fmt: skip
    if sys.platform == "linux" and on_cpu() and not BLAS:
        yield "no OpenBLAS: matrix products are 20 to 70 times slower: pip install scipy-openblas32"


def preset_needs(cfg: Knobs, trainer: Trainer, speed: float) -> Iterator[str]:
    """Lines: the preset's bytes in memory and on disk, and its minutes, by estimate."""
    windows = cfg.train_batch_tokens // cfg.train_seq_len
    count = worker_count(cfg)  # `trial`, whose step is smaller, may have had fewer
    largest = largest_parts(split_windows(0, windows, cfg, count), count)
    use = estimate_memory(trainer.params, cfg, largest, 0, PACKED_TOKENS_MOST)
    yield f"it needs about {sum(use.values()) / 1e9:.1f} GB of memory"
    size = estimate_bytes(trainer.params, trainer.groups, cfg)
    yield f"script and net: about {size:,} of {ARTIFACT_LIMIT_BYTES:,} bytes; the rest is for text"
    most = cfg.max_wallclock_seconds or math.inf
    seconds = min(most, (cfg.iterations or math.inf) * cfg.train_batch_tokens / speed)
    steps = seconds * speed / cfg.train_batch_tokens
    yield f"training: {seconds / 60:.1f} minutes for about {steps:,.0f} steps"


def main(cfg: Knobs, warnings: list[str], env: dict[str, str]) -> None:
    """The program that is asked for; env: where the settings came from."""
    use_device(cfg)
    check_report_to(cfg.report_to)
    if cfg.mode == "doctor":
        doctor_mode(cfg, warnings, env)
    elif cfg.mode in ("sample", "compress", "restore"):
        getattr(Use.load(Path(cfg.eval_only), env), cfg.mode)()
    elif cfg.eval_only:
        path = Path(cfg.eval_only)
        score_mode(path / "artifact.bin" if path.is_dir() else path, env)
    else:
        train_mode(cfg, warnings, env)


if __name__ == "__main__":
    with errors_as_lines():
        main(CFG, CFG_WARNINGS, dict(os.environ))

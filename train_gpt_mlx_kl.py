#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "mlx>=0.32; sys_platform == 'darwin' and platform_machine == 'arm64'",
#   "mlx[cpu]>=0.32; sys_platform == 'linux'",
#   "scipy-openblas32>=0.3.29; sys_platform == 'linux'",
#   "numpy>=1.26", "numba>=0.60", "sentencepiece>=0.2", "brotli>=1.1",
#   "tqdm>=4.66",
# ]
# ///
"""Train a small GPT with MLX, squeeze script + model into 16,000,000 bytes, and score the file.

    python train_gpt_mlx_kl.py                        the whole chain on text that Python carries
    DATA_PATH=... TOKENIZER_PATH=... python train_gpt_mlx_kl.py         the public FineWeb layout
    EVAL_ONLY=logs/RUN/artifact.bin DATA_PATH=... python train_gpt_mlx_kl.py     score a file alone

Everything is set by environment variables; `--help` lists them. The file reads top to bottom in
the order in which data flows:

    KNOBS             every setting, its default, its bounds and its help, in one table
    BLAS              on Linux CPUs: a fast matrix product, loaded before MLX
    DATA              tokenizer facts, shards, shuffled training windows, bigram counts
    CONTEXT FEATURES  the tokens before a position, cut at the document's start, and their hashes
    CPU KERNELS       attention and cross-entropy for a machine whose exp() is slow
    MODEL             GPT with EngramLite / BigramHash / SkipGram added to its logits
    OPTIMIZERS        a table of parameter groups; Muon and Adam
    TRAINING          one progress, one step function, averaging, checkpoints
    N-GRAM MIXER      exact counts of the text already scored, mixed linearly with the net
    LOGISTIC MIXER    a token as binary decisions; experts mixed as logits; the arithmetic coder
    ARTIFACT          quantiser, file format, size rules
    EVALUATION        each position scored exactly once; nats per token, bits per byte
    PACKING           training text inside the artifact, whose decoding primes the mixer
    AUDIT             causality, normalisation, and a message that is really decoded
    REPORT            train.log, metrics.jsonl, the lines that parsers look for
    MAIN              the chain
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import decimal
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import lzma
import math
import mmap
import multiprocessing
import operator
import os
import platform
import queue
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

# ==================================================================================================
# KNOBS: every setting is an environment variable with the upper-case name of its field
# ==================================================================================================

ARTIFACT_LIMIT_BYTES = 16_000_000
SCORE_LIMIT = 80.0  # |score| <= gain * sqrt(head_dim): keeps exponentials in float32's range
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


def knob(default: Any, help: str, lo=0, hi=1e18, choices="", alias="") -> Any:
    """One row of the table; `alias` is an older public name."""
    meta = {"help": help, "lo": lo, "hi": hi, "choices": choices.split(), "alias": alias}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Knobs:
    """The settings of a run. Defaults are the public stack's; PRESET changes some (see PRESETS)."""

    preset: str = knob(
        "auto",
        "settings for what the environment leaves unset; auto: cpu on a CPU, else mac",
        choices="auto cpu mac h100 baseline",
    )
    run_id: str = knob("", "name of the run's folder; empty: the date, the time and the seed")
    out_dir: str = knob("logs", "folder that holds the runs' folders")
    seed: int = knob(1337, "seed of weights and data order", hi=2**31 - 1)
    eval_only: str = knob("", "path of an artifact: score it, train nothing")
    resume: bool = knob(False, "go on from OUT_DIR/RUN_ID/checkpoint")
    checkpoint_every: int = knob(0, "steps between checkpoints; 0: when a run is cut short")
    device: str = knob("auto", "where MLX computes", choices="auto cpu gpu")
    compute_dtype: str = knob(
        "auto",
        "dtype of the forward pass; auto: float32 on CPUs, bfloat16 on GPUs (weights: float32)",
        choices="auto float32 bfloat16",
    )
    blas: str = knob("auto", "Linux CPUs: path of an OpenBLAS, `auto`, or `none` for MLX's own")
    workers: int = knob(0, "CPU streams that share a step; 0: one a core", hi=256)

    data_path: str = knob("", "folder of *_train_*.bin and *_val_*.bin; empty: FineWeb or stdlib")
    tokenizer_path: str = knob("", "SentencePiece .model file; empty: the one that fits DATA_PATH")
    vocab_size: int = knob(0, "must equal the tokenizer's; 0: take the tokenizer's", hi=65536)

    iterations: int = knob(20_000, "steps at most; 0: no limit")
    max_wallclock_seconds: float = knob(600.0, "seconds of training at most; 0: no limit")
    train_batch_tokens: int = knob(524_288, "tokens a step", lo=1)
    grad_accum_steps: int = knob(8, "rounds of a microbatch a worker a step, at least", lo=1)
    train_seq_len: int = knob(1024, "tokens a training window", lo=2, alias="TRAIN_MAX_SEQ_LEN")
    mlx_max_microbatch_tokens: int = knob(8192, "tokens a microbatch at most: memory", lo=1)
    mlx_eager_eval: bool = knob(
        True, "one worker: evaluate after each microbatch, which saves memory"
    )
    warmup_steps: int = knob(20, "steps run and thrown away before the clock starts")
    warmdown_iters: int = knob(3500, "last steps, over which the learning rate falls to 0")
    train_log_every: int = knob(200, "steps between train lines; 0: none")
    complement_alpha: float = knob(0.5, "loss weight 1 - a * P(target) of COMPLEMENT_BY", hi=1)
    complement_by: str = knob(
        "contexts",
        "the logistic mixer's contexts, for the tokens that they have packed; else counts of pairs",
        choices="contexts bigram",
    )

    num_layers: int = knob(11, "transformer blocks", lo=1, hi=96)
    model_dim: int = knob(512, "width D", lo=8, hi=8192)
    num_heads: int = knob(8, "query heads H", lo=1)
    num_kv_heads: int = knob(4, "key/value heads Hkv", lo=1)
    mlp_mult: int = knob(3, "hidden width of the MLP / D", lo=1, hi=16)
    mlp_leak: float = knob(0.5, "slope below 0 before squaring; 0: relu squared", hi=1)
    tied_embed_init_std: float = knob(0.005, "std of the token embedding at start")
    logit_softcap: float = knob(30.0, "logits are cap * tanh(logits / cap)", lo=1, hi=40)
    logit_chunk_tokens: int = knob(0, "tokens a piece of the vocabulary head; 0: all")
    rope_base: float = knob(10_000.0, "RoPE base", lo=1)
    rope_dims: int = knob(16, "head dimensions that rotate; 0: all")
    qk_gain_init: float = knob(1.5, "factor on the normalised queries at start", hi=10)
    xsa_last_n: int = knob(4, "last blocks whose attention drops its own value's direction")
    ln_scale_enabled: bool = knob(True, "block i's norms times 1/sqrt(i + 1)", alias="USE_LN_SCALE")
    use_ortho_init: bool = knob(True, "orthogonal block matrices at start")
    use_smeargate: bool = knob(True, "embeddings blend with the one before", alias="SMEAR_ENABLED")

    engram_lite_enabled: bool = knob(True, "EngramLite; 0: BigramHash instead")
    engram_hash_size: int = knob(8192, "rows a table; 0: off", hi=65536)
    engram_embed_dim: int = knob(256, "columns a table", lo=1, hi=4096)
    engram_n_heads: int = knob(2, "tables an order", lo=1, hi=16)
    bigram_hash_size: int = knob(4096, "rows of BigramHash's table; 0: off", hi=65536)
    skipgram_hash_size: int = knob(0, "rows of SkipGram's table; 0: off", hi=65536)

    tied_embed_lr: float = knob(0.05, "Adam: token embedding", hi=1e30)
    matrix_lr: float = knob(0.04, "Muon: block matrices", hi=1e30)
    scalar_lr: float = knob(0.04, "Adam: gains, gates, scales", hi=1e30)
    hash_lr: float = knob(0.05, "Adam: hash tables", hi=1e30)
    hash_proj_lr: float = knob(0.01, "Adam: EngramLite's projection to the vocabulary", hi=100)
    beta1: float = knob(0.9, "Adam: decay of the first moment", hi=0.9999)
    beta2: float = knob(0.95, "Adam: decay of the second moment", hi=0.99999)
    adam_eps: float = knob(1e-8, "Adam: epsilon", lo=1e-20, hi=1)
    muon_momentum: float = knob(0.95, "Muon: momentum", hi=0.9999)
    muon_backend_steps: int = knob(5, "Muon: Newton-Schulz steps", lo=1, hi=20)
    muon_momentum_warmup_start: float = knob(0.85, "Muon: momentum at step 0", hi=0.9999)
    muon_momentum_warmup_steps: int = knob(500, "Muon: steps until the full momentum")
    muon_weight_decay: float = knob(0.0, "Muon: decoupled decay, times the learning rate")
    adam_weight_decay: float = knob(0.0, "Adam: the same for embeddings and tables")
    grad_clip_norm: float = knob(0.0, "largest norm of a step's gradient; 0: any")

    ema_decay: float = knob(0.997, "EMA of the weights, a step; 0: none", hi=0.99999)
    ema_start_frac: float = knob(0.5, "progress at which averaging starts", hi=1)
    use_swa: bool = knob(False, "the plain mean from EMA_START_FRAC on, in EMA's place")

    weight_bits: int = knob(6, "bits of block matrices and hash tables", lo=4, hi=8)
    embed_bits: int = knob(8, "bits of the token embedding", lo=4, hi=8)
    use_gptq_lite: bool = knob(True, "search each row's clip for the least squared error")
    late_qat_threshold: float = knob(0.0, "train quantised below this LR factor", hi=1)

    mixer: str = knob("logistic", "context models at evaluation", choices="logistic backoff off")
    ngram_mixer_enabled: bool = knob(True, "0 is the same as MIXER=off")
    mixer_memory_mb: int = knob(1950, "logistic: MiB of tables", lo=1, hi=1 << 15)
    pack_text_bytes: int = knob(-1, "logistic: bytes of packed text; -1: all that is left", lo=-1)
    ngram_max_order: int = knob(4, "backoff: tokens of the longest context", lo=1, hi=8)
    ngram_alpha: str = knob("0.25", "backoff: the n-gram model's weight, or `auto`: learned")
    ngram_smoothing: str = knob(
        "kneser-ney", "backoff: smoothing", choices="kneser-ney witten-bell laplace"
    )
    audit: bool = knob(True, "prove the score: causal, normalised, decodable")

    val_loss_every: int = knob(0, "steps between validations while training; 0: none")
    val_batch_size: int = knob(16_384, "tokens a batch of those validations", lo=1)
    val_max_tokens: int = knob(0, "score up to the last document's end in these; 0: all")
    eval_mode: str = knob("sliding", "the final score", choices="standard sliding both")
    eval_seq_len: int = knob(0, "tokens a window; 0: TRAIN_SEQ_LEN")
    eval_stride: int = knob(64, "tokens a sliding window advances, at most", lo=1)
    eval_batch_seqs: int = knob(16, "windows a batch", lo=1)


GROUP_TITLES = {
    "preset": "Run", "data_path": "Data", "iterations": "Training", "num_layers": "Model",
    "engram_lite_enabled": "Hashed contexts", "tied_embed_lr": "Optimizers",
    "ema_decay": "Averaging", "weight_bits": "Artifact", "mixer": "Context models",
    "val_loss_every": "Evaluation",
}  # fmt: skip

PRESETS = {
    "cpu": """ITERATIONS=1000000 MAX_WALLCLOCK_SECONDS=110 TRAIN_BATCH_TOKENS=2048
        GRAD_ACCUM_STEPS=1 TRAIN_SEQ_LEN=256 WARMUP_STEPS=1 WARMDOWN_ITERS=150 TRAIN_LOG_EVERY=50
        NUM_LAYERS=4 MODEL_DIM=192 NUM_HEADS=3 NUM_KV_HEADS=1 MLP_MULT=2 XSA_LAST_N=0
        ENGRAM_EMBED_DIM=64 MATRIX_LR=0.02 HASH_LR=0.15 MUON_MOMENTUM_WARMUP_STEPS=200
        EMA_DECAY=0.98 WEIGHT_BITS=8 EVAL_STRIDE=128 NGRAM_ALPHA=auto PACK_TEXT_BYTES=1000000
        VAL_MAX_TOKENS=1048576""",
    "mac": """TRAIN_BATCH_TOKENS=32768 GRAD_ACCUM_STEPS=1 NUM_LAYERS=9 MLP_MULT=2
        ENGRAM_HASH_SIZE=4096 ENGRAM_EMBED_DIM=128 WARMUP_STEPS=2 WARMDOWN_ITERS=300
        MUON_MOMENTUM_WARMUP_STEPS=200 EMA_DECAY=0.98 TRAIN_LOG_EVERY=20
        EVAL_STRIDE=512 NGRAM_ALPHA=auto VAL_MAX_TOKENS=4194304""",
    "h100": "NUM_LAYERS=10 MLP_MULT=2 ENGRAM_EMBED_DIM=64 NGRAM_ALPHA=auto",
    "baseline": """NUM_LAYERS=9 MLP_MULT=2 MLP_LEAK=0 ROPE_DIMS=0 XSA_LAST_N=0 LN_SCALE_ENABLED=0
        USE_ORTHO_INIT=0 USE_SMEARGATE=0 ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=0
        COMPLEMENT_ALPHA=0 WARMDOWN_ITERS=1200 EMA_DECAY=0 WEIGHT_BITS=7 MIXER=off
        EVAL_MODE=standard""",
}

MIXER_KNOBS = {
    "logistic": ("mixer_memory_mb", "pack_text_bytes", "complement_by"),
    "backoff": ("ngram_max_order", "ngram_alpha", "ngram_smoothing"),
}

REMOVED = (
    ("TTT_", "test-time training is not part of this script"),
    ("SWA_", "SWA is the plain mean from EMA_START_FRAC on: use USE_SWA=1 and EMA_START_FRAC"),
    ("TIE_EMBEDDINGS", "embeddings are always tied"),
    ("CONTROL_TENSOR_NAME_PATTERNS", "the GROUPS table in the script says what is quantised"),
    ("INT8_KEEP_FLOAT", "WEIGHT_BITS and EMBED_BITS set the precision"),
)


def parse_value(kind: type, meta: dict[str, Any], text: str) -> Any:
    """Text of an environment variable -> value; ValueError says what would be right."""
    choices = ["0", "1"] if kind is bool else meta["choices"]
    if choices and text not in choices:
        raise ValueError("must be one of " + ", ".join(choices))
    if kind in (bool, str):
        return text == "1" if kind is bool else text
    try:
        value = kind(text)
    except ValueError:
        raise ValueError("must be a whole number" if kind is int else "must be a number") from None
    if not meta["lo"] <= value <= meta["hi"]:  # also false for nan
        raise ValueError(f"must be from {meta['lo']} to {meta['hi']}")
    return value


def guess_device(choice: str) -> str:
    """'cpu' or 'gpu', without loading MLX: Metal on Apple Silicon, CUDA where its wheel is."""
    if choice != "auto":
        return choice
    if sys.platform == "darwin":
        return "gpu" if platform.machine() == "arm64" else "cpu"
    names = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    return "gpu" if any(name.lower().startswith("mlx-cuda") for name in names) else "cpu"


def parse_env(env: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Variables that name a knob or its alias -> (values by field name, problems)."""
    kinds, values, problems = get_type_hints(Knobs), {}, []
    for field in dataclasses.fields(Knobs):
        for name in (field.metadata["alias"], field.name.upper()):  # the later one is stronger
            if env.get(name):
                try:
                    values[field.name] = parse_value(kinds[field.name], field.metadata, env[name])
                except ValueError as error:
                    problems.append(f"{name}={env[name]}: {error}")
    return values, problems


def preset_values(preset: str) -> dict[str, Any]:
    """Field values that a preset sets; its text is written as a user would set them."""
    return parse_env(dict(pair.split("=") for pair in PRESETS[preset].split()))[0]


def check_names(env: dict[str, str]) -> tuple[list[str], list[str]]:
    """Variables that name no knob -> (problems: public names not kept, warnings: misspellings)."""
    fields = dataclasses.fields(Knobs)
    names = [name for f in fields for name in (f.name.upper(), f.metadata["alias"])]
    problems, warnings = [], []
    for name in sorted(set(env) - set(names)):
        reasons = [why for prefix, why in REMOVED if name.startswith(prefix)]
        problems += [f"{name}: not a setting here: {why}; unset it" for why in reasons]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.88)
        warnings += [f"{name} is not a setting; did you mean {known}?" for known in near]
    return problems, warnings


def knobs_from_env(env: dict[str, str], base: Any = None) -> tuple[Knobs, list[str]]:
    """Environment -> (knobs, warnings). Raises UserError with every problem, a line each.

    `base`, values by field name, takes the preset's place: the settings of an artifact.
    """
    (given, problems), (unknown, warnings) = parse_env(env), check_names(env)
    preset = given.pop("preset", "auto")
    if preset == "auto":
        preset = "cpu" if guess_device(given.get("device", "auto")) == "cpu" else "mac"
    cfg = Knobs(**{"preset": preset, **(base or preset_values(preset)), **given})
    if not cfg.ngram_mixer_enabled:
        if given.get("mixer", "off") != "off":
            warnings.append(f"MIXER={cfg.mixer} has no effect with NGRAM_MIXER_ENABLED=0")
        cfg = dataclasses.replace(cfg, mixer="off", ngram_mixer_enabled=True)
    for mixer, names in MIXER_KNOBS.items():
        idle = [name for name in names if name in given and cfg.mixer != mixer]
        warnings += [f"{name.upper()} has no effect with MIXER={cfg.mixer}" for name in idle]
    if "complement_by" in given and not cfg.complement_alpha:
        warnings.append("COMPLEMENT_BY has no effect with COMPLEMENT_ALPHA=0")
    problems += unknown + check_together(cfg)
    if problems:
        raise UserError("\n".join(problems))
    return cfg, warnings


def check_together(cfg: Knobs) -> list[str]:
    """Problems that only several knobs together have."""
    head = cfg.model_dim // cfg.num_heads
    gain = SCORE_LIMIT / max(head, 1) ** 0.5
    rules = {
        f"MODEL_DIM={cfg.model_dim} must be an even multiple of NUM_HEADS={cfg.num_heads}":
            cfg.model_dim % (2 * cfg.num_heads) == 0,
        f"NUM_HEADS={cfg.num_heads} must be a multiple of NUM_KV_HEADS={cfg.num_kv_heads}":
            cfg.num_heads % cfg.num_kv_heads == 0,
        f"ROPE_DIMS={cfg.rope_dims} must be even, at most MODEL_DIM / NUM_HEADS = {head}":
            cfg.rope_dims % 2 == 0 and cfg.rope_dims <= head,
        f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} holds no window of TRAIN_SEQ_LEN="
        f"{cfg.train_seq_len}: raise the first or lower the second":
            cfg.train_batch_tokens >= cfg.train_seq_len,
        "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0 together never stop: set one":
            cfg.iterations > 0 or cfg.max_wallclock_seconds > 0,
        f"RUN_ID={cfg.run_id}: use letters, digits and . _ + = -, the first no sign":
            not cfg.run_id or re.fullmatch(r"\w[\w.+=-]*", cfg.run_id) is not None,
        "RESUME=1 needs RUN_ID: which run should go on?": bool(cfg.run_id) or not cfg.resume,
        f"QK_GAIN_INIT={cfg.qk_gain_init} must be at most {gain:.2f} for heads of {head}":
            cfg.qk_gain_init <= gain,
        f"NGRAM_ALPHA={cfg.ngram_alpha}: must be from 0 to 1, or auto":
            re.fullmatch(r"auto|0|1|0?\.\d+|[01]\.0*", cfg.ngram_alpha) is not None,
    }  # fmt: skip
    return [problem for problem, holds in rules.items() if not holds]


def eval_length(cfg: Knobs) -> int:
    """Tokens a window at evaluation."""
    return cfg.eval_seq_len or cfg.train_seq_len


def eval_shape(cfg: Knobs, mode: str) -> tuple[int, int]:
    """(tokens a window, tokens from one window to the next) of an EVAL_MODE."""
    length = eval_length(cfg)
    return length, length if mode == "standard" else min(cfg.eval_stride, length)


def knob_table(title: str, row: str) -> str:
    """All knobs, in the formats of a group's title and of a knob's row."""

    def show(value: Any) -> str:
        return str(int(value) if isinstance(value, bool) else value) or "empty"

    presets, lines = {name: preset_values(name) for name in PRESETS}, []
    for field in dataclasses.fields(Knobs):
        name, meta = field.name, field.metadata
        differ = [f"{p} {show(values[name])}" for p, values in presets.items() if name in values]
        help = meta["help"] + (f" ({', '.join(meta['choices'])})" if meta["choices"] else "")
        help += f" [alias {meta['alias']}]" if meta["alias"] else ""
        default = "; ".join([show(field.default), *differ])
        lines += [title.format(GROUP_TITLES[name])] if name in GROUP_TITLES else []
        lines.append(row.format(name=name.upper(), default=default, help=help))
    return "\n".join(lines)


def help_text() -> str:
    """The text of `--help`."""
    usage = "usage: [NAME=value ...] python train_gpt_mlx_kl.py"
    table = knob_table("\n{}", "  {name:<28} {help} [{default}]")
    return "\n".join([__doc__.split("\n\n")[0], "", usage, table])


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print a user's mistake or interrupt, a line each, and end with its status."""
    try:
        yield
    except (Stop, KeyboardInterrupt) as error:
        for line in (str(error) or "interrupted").splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 1)) from None


if __name__ == "__main__":  # help and bad settings come before anything heavy is loaded
    if {"-h", "--help"} & set(sys.argv):
        print(help_text())
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
        except (OSError, AttributeError):
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if sys.platform == "linux":
    keep_freed_memory()
BLAS = open_blas(os.environ.get("BLAS") or "auto")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

BLAS_NAME = use_blas(BLAS)
Array, Arrays = mx.array, dict[str, mx.array]


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def peak_memory() -> int:
    """Bytes at most: MLX's on a GPU, the process's on a CPU."""
    if not on_cpu():
        return mx.get_peak_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_limit() -> int:
    """Bytes that the GPU recommends to use, or that the machine has."""
    gpu = {} if on_cpu() else mx.device_info()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return gpu.get("max_recommended_working_set_size", gpu.get("total_memory", machine))


def use_device(cfg: Knobs) -> None:
    """Make DEVICE the default device."""
    if cfg.device != "auto":
        device = mx.cpu if cfg.device == "cpu" else mx.gpu
        if not mx.is_available(device):
            raise UserError("DEVICE=gpu: this MLX has none; on Linux: pip install 'mlx[cuda13]'")
        mx.set_default_device(device)


def compute_dtype(cfg: Knobs) -> str:
    """Name of the forward pass's dtype. On a CPU only float32 reaches the BLAS and the kernels."""
    if on_cpu() and cfg.compute_dtype == "bfloat16":
        raise UserError("COMPUTE_DTYPE=bfloat16: a CPU computes in float32; unset it")
    if cfg.compute_dtype != "auto":
        return cfg.compute_dtype
    return "float32" if on_cpu() else "bfloat16"


# ==================================================================================================
# DATA: tokenizer facts, shards, shuffled training windows, bigram counts
# ==================================================================================================

HERE = Path(__file__).resolve().parent
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


@dataclass(frozen=True)
class Tokenizer:
    """What scoring needs to know of a tokenizer: it is all that an artifact keeps of it.

    piece_bytes (V,) uint16: UTF-8 bytes of each piece, every U+2581 counted as one space byte
    leading (V,) bool: the piece starts with U+2581
    control (V,) bool: control, unknown or unused: no bytes, and no space after it is decoded
    """

    piece_bytes: Any
    leading: Any
    control: Any
    bos: int
    dummy_prefix: bool
    sha256: str

    @property
    def vocab(self) -> int:
        return len(self.piece_bytes)

    def bytes_of(self, previous: Any, current: Any) -> Any:
        """UTF-8 bytes that each token adds to the decoded text. (n,), (n,) ids -> (n,) int64.

        A dummy prefix is a leading space that encoding puts before a document and decoding
        takes away: it is no byte of the text where the piece follows a control token.
        """
        count = self.piece_bytes[current].astype(np.int64)
        if self.dummy_prefix:
            count -= self.leading[current] & self.control[previous]
        return count


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
    size = [
        0 if control[i] else 1 if model.is_byte(i) else len(p.replace("\u2581", " ").encode())
        for i, p in enumerate(pieces)
    ]
    leading = np.array([p.startswith("\u2581") for p in pieces]) & ~control
    dummy = "".join(model.encode("a", out_type=str)) == "\u2581a"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Tokenizer(np.array(size, np.uint16), leading, control, model.bos_id(), dummy, digest)


def check_vocab(cfg: Knobs, tokens: Tokenizer) -> None:
    """VOCAB_SIZE, where it is set, must be the tokenizer's."""
    if cfg.vocab_size not in (0, tokens.vocab):
        raise UserError(f"VOCAB_SIZE={cfg.vocab_size}, but the tokenizer has {tokens.vocab} "
                        "pieces: unset it or choose the other tokenizer")  # fmt: skip


def open_shard(path: Path) -> Any:
    """Memory-map a shard's tokens, (n,) uint16. Raises UserError naming the file."""
    header_bytes = SHARD_HEADER_INTS * 4
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: not a token shard (wrong header): make it with data/prepare.py")
    need, have = header_bytes + 2 * int(header[2]), path.stat().st_size
    if need != have:
        raise UserError(f"{path}: {have} bytes, not {need} as its header says: make it anew")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(int(header[2]),))


def check_ids(tokens: Any, vocab: int, name: object) -> Any:
    """Tokens as int32, after checking that each is below the vocabulary's size."""
    top = int(tokens.max(initial=0))
    if top >= vocab:
        raise UserError(f"{name}: token {top}, but the vocabulary has {vocab}: another tokenizer's")
    return tokens.astype(np.int32)


def find_shards(folder: Path, split: str) -> list[Path]:
    """Sorted shards of a split. Raises UserError if there are none."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: holds no *_{split}_*.bin: see data/prepare.py")
    for path in paths:
        if "_train_" in path.name and "_val_" in path.name:
            raise UserError(f"{path}: a shard of training or of validation text? rename it")
    return paths


def locate_data(cfg: Knobs) -> tuple[Path, Path | None, str]:
    """(folder of shards, tokenizer, a line that says what was chosen).

    EVAL_ONLY needs no tokenizer: it is None unless TOKENIZER_PATH is set.
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
        raise UserError(f"DATA_PATH={folder}: no such folder")
    line += f", {folder}"
    if cfg.eval_only and not cfg.tokenizer_path:
        return folder, None, line
    tokenizer = Path(cfg.tokenizer_path) if cfg.tokenizer_path else tokenizer_beside(folder)
    if not tokenizer.is_file():
        raise UserError(f"TOKENIZER_PATH={tokenizer}: no such file")
    return folder, tokenizer, f"{line}; tokenizer {tokenizer}"


def make_stdlib() -> None:
    """Run data/prepare.py on the text that every Python installation carries."""
    script = HERE / "data" / "prepare.py"
    print("no FineWeb shards found: making a corpus from the text that Python carries", flush=True)
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
    path = home / read_manifest(folder / "manifest.json").get("tokenizer", usual)
    if not path.is_file():
        raise UserError(f"TOKENIZER_PATH is unset, and {path}, made for {folder}, is missing")
    return path


class TrainWindows:
    """Windows of seq_len + 1 tokens over all training shards, in an order shuffled by seed.

    Window i of epoch e is a pure function of (seed, e, i): a run can go on from a step number,
    and several processes can each read their part of a step.
    """

    def __init__(self, paths: list[Path], seq_len: int, seed: int, vocab: int) -> None:
        self.paths, self.seq_len, self.seed, self.vocab = paths, seq_len, seed, vocab
        self.shards = [open_shard(path) for path in paths]
        self.counts = np.array([max(len(s) - 1, 0) // seq_len for s in self.shards])
        self.windows = int(self.counts.sum())
        self.tokens = sum(len(s) for s in self.shards)
        if self.windows == 0:
            raise UserError(f"{paths[0].parent}: {self.tokens} training tokens hold no window of "
                            f"TRAIN_SEQ_LEN={seq_len}: add text or lower it")  # fmt: skip
        self.ends = np.cumsum(self.counts)
        self.epoch, self.order = -1, np.zeros(0, np.int64)
        # P(token) by the contexts, of the first tokens of all shards in a row; 0: not known yet
        self.foreseen = np.zeros(0, np.float16)

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
        return shard, first * self.seq_len + (epoch * 7919) % (slack + 1)

    def window(self, index: int) -> Any:
        """Window number `index` of the run: (seq_len + 1,) int32."""
        shard, start = self.place(index)
        tokens = self.shards[shard][start : start + self.seq_len + 1]
        return check_ids(tokens, self.vocab, self.paths[shard])

    def step(self, number: int, windows: int) -> Any:
        """The tokens of step `number`: (windows, seq_len + 1) int32."""
        return np.stack([self.window(number * windows + i) for i in range(windows)])

    def step_foreseen(self, number: int, windows: int) -> Any:
        """P(target) by the contexts in step `number`, 0 where not known: (windows, seq_len)."""
        out = np.zeros((windows, self.seq_len), np.float32)
        for i, row in enumerate(out):
            shard, start = self.place(number * windows + i)
            start += 1 + sum(len(s) for s in self.shards[:shard])
            known = self.foreseen[start : start + self.seq_len]
            row[: len(known)] = known
        return out


COUNTED_TOKENS = 100_000_000  # enough for bigrams, and two seconds of counting
COUNTED_VOCAB = 16_384  # the table of a larger vocabulary would not fit in memory


def bigram_probability(data: TrainWindows) -> Any:
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


def complementary_weights(probability: Any, alpha: float) -> Any:
    """Loss weights of a step, mean 1: clip(1 - alpha * P(target), 0.1, 1) / mean.

    probability (n, T) float32, by a simpler model -> (n, T) float32. Dividing by the mean over the
    whole step keeps the effective learning rate.
    """
    weights = np.clip(1 - alpha * probability, 0.1, 1)
    return (weights / weights.mean()).astype(np.float32)


def load_validation(paths: list[Path], tokens: Tokenizer, limit: int) -> tuple[Any, bool]:
    """(validation tokens (n,) int32, whether they are the whole split).

    A limit cuts at the end of the last document that fits, so that no document is half scored,
    unless the first one does not fit.
    """
    total = sum(len(open_shard(path)) for path in paths)
    parts, left = [], limit or total
    for path in paths:
        shard = open_shard(path)[: left + 1]
        parts.append(check_ids(shard, tokens.vocab, path))
        left -= len(shard)
    text = np.concatenate(parts)
    if limit and len(text) > limit:
        starts = np.flatnonzero(text[1 : limit + 1] == tokens.bos) + 1
        text = text[: int(starts[-1]) if len(starts) else limit]
    if len(text) < 2:
        raise UserError(f"{paths[0].parent}: the validation text has fewer than 2 tokens")
    return text, len(text) == total


# ==================================================================================================
# REPORT: an event is a dict; metrics.jsonl and the text lines are both made from it
# ==================================================================================================


class Report:
    """The run's folder: train.log (the script's source, then the lines) and metrics.jsonl."""

    def __init__(self, cfg: Knobs) -> None:
        name = cfg.run_id or time.strftime("%Y%m%d-%H%M%S") + f"-{cfg.seed}-{os.getpid()}"
        self.folder, self.iterations = Path(cfg.out_dir) / name, cfg.iterations
        self.checkpoint = self.folder / "checkpoint" / "state.safetensors"
        if cfg.resume and not self.checkpoint.is_file():
            raise UserError(f"RESUME=1: there is no {self.checkpoint}: unset RESUME")
        try:
            self.folder.mkdir(parents=True, exist_ok=cfg.resume)
        except FileExistsError:
            go_on = ", or go on with RESUME=1" if self.checkpoint.is_file() else ""
            raise UserError(f"RUN_ID={name}: {self.folder} exists and is never overwritten: "
                            f"choose another RUN_ID{go_on}") from None  # fmt: skip
        except OSError as error:
            raise UserError(f"OUT_DIR={cfg.out_dir}: {error.strerror}") from None
        if not cfg.resume:
            source = Path(__file__).read_text()
            (self.folder / "train.log").write_text(f"{source}\n{'=' * 100}\n")

    def line(self, text: str) -> None:
        """A line on the screen and in train.log."""
        print(text, flush=True)
        with open(self.folder / "train.log", "a") as log:
            log.write(text + "\n")

    def event(self, event: Event, *lines: str) -> None:
        """A JSON object in metrics.jsonl, and its lines with the event's values filled in."""
        with open(self.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps(event) + "\n")
        for text in lines:
            self.line(text.format(**event, n=self.iterations, part=part_of_text(event)))


class Silence(Report):
    """The report of a rank that leaves reporting to rank 0."""

    def __init__(self) -> None:
        self.folder = Path()
        self.checkpoint = Path()

    def line(self, text: str) -> None:
        """Nothing."""

    def event(self, event: Event, *lines: str) -> None:
        """Nothing."""


Progress = Callable[[int, int, str], None]  # tokens done, tokens in all, what to say of them


def show_progress(label: str, every_s: float = 10.0) -> Progress:
    """Shows how far a work on tokens is: a line every few seconds, the first one soon."""
    begin = time.perf_counter()
    due = begin + 1

    def show(done: int, total: int, note: str) -> None:
        nonlocal due
        now = time.perf_counter()
        if now > due:
            due, left = now + every_s, (now - begin) * (total - done) / done
            print(f"{label}: {done}/{total} tokens, {note}{left:.0f} s left", flush=True)

    return show


TRAIN_LINE = (
    "step:{step}/{n} train_loss:{train_loss:.4f} train_time:{train_time_ms:.0f}ms "
    "step_avg:{step_avg_ms:.2f}ms tok_s:{tok_s:.0f}"
)
VAL_LINE = "step:{step}/{n} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}{part}"
EXPORT_LINE = (
    "serialized_int6_zstd:{model_bytes} bytes (brotli; text:{packed_bytes} code:{code_bytes} "
    "total:{total_bytes} limit:{limit_bytes})"
)
ROUNDTRIP_LINES = (
    "final_int6_zstd_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
    "val_bpb_net:{val_bpb_net:.4f} val_bpb_context:{val_bpb_context:.4f} "
    "eval_time:{eval_time_ms:.0f}ms{part} [{mode}, {mixer}]",
    "final_int6_zstd_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}{part} [{mode}]",
)
CONFIG_LINES = (
    "machine: {machine}, MLX {mlx_version}, {dtype_used}, {ranks} x {workers_used} worker(s), "
    "{gflops:.0f} GFLOP/s; BLAS: {blas_used}",
    "preset {preset}: {num_layers} layers x {model_dim}, {num_heads} heads, {num_kv_heads} KV "
    "heads, MLP {mlp_mult}x, seq {train_seq_len}, {train_batch_tokens} tokens a step",
)
FINAL_LINE = (
    "val_bpb {val_bpb:.4f} (net {val_bpb_net:.4f}, contexts {val_bpb_context:.4f}; audit: {audit}) "
    "on {val_tokens:,} tokens, {val_bytes:,} bytes{part}; {total_bytes:,} "
    "bytes of script and artifact; trained on {train_tokens:,} tokens in {train_seconds:.0f} s; "
    "evaluated in {eval_seconds:.0f} s"
)


def part_of_text(event: Event) -> str:
    """A label for scores of less than the whole validation split."""
    whole = event.get("val_whole", True)
    return "" if whole else f" (PART of the text: {event['val_tokens']} tokens)"


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
RMS_EPS = 1e-6
MLX_COMPILES = shutil.which("g++") is not None or sys.platform == "darwin"
compiled = mx.compile if MLX_COMPILES else lambda function: function


@functools.cache
def untraced_work() -> queue.SimpleQueue:
    """Where a thread that never traces a gradient takes its work from."""
    work = queue.SimpleQueue()

    def serve() -> None:
        for done, stream, build, args in iter(work.get, None):
            try:
                with mx.stream(stream):
                    done.set_result(build(*args))
            except BaseException as error:
                done.set_exception(error)
            del done, stream, build, args  # they would live until the next call
        mx.clear_streams()  # a stream ends in the thread that made it

    def end() -> None:
        work.put(None)
        thread.join()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    atexit.register(end)
    return work


def untraced(build: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run where no gradient is traced: there MLX does not fuse compiled kernels.

    For the halves of functions with a gradient of their own, which nobody differentiates again.
    """

    @functools.wraps(build)
    def call(*args: Any) -> Any:
        if not on_cpu():  # whole steps are compiled there
            return build(*args)
        done, stream = Future(), mx.default_stream(mx.default_device())
        untraced_work().put((done, stream, build, args))
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


@mx.custom_function
def cpu_rms_norm(x: Array) -> list[Array]:
    """[x / sqrt(mean(x^2) + eps) over the last axis, the factor]."""
    r = mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + RMS_EPS)
    return [x * r, r]


@cpu_rms_norm.vjp
def cpu_rms_norm_vjp(_: Array, cotangents: Any, outputs: Any) -> Array:
    """With y = r x: r (d_y - y mean(d_y y)), in fewer passes than MLX takes."""
    d_y, (y, r) = cotangents[0], outputs
    return (d_y - y * mx.mean(d_y * y, axis=-1, keepdims=True)) * r


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


@functools.cache
def squared_leaky_relu(leak: float) -> Callable[[Array], Array]:
    """max(h, leak * h) ** 2 without comparisons, with its own gradient.

    Its derivative is g = (1 + leak^2) h + (1 - leak^2) |h|, and the function is h * g / 2.
    """
    a, b = 1 + leak**2, 1 - leak**2

    @compiled
    def slope(h: Array, d: Array) -> Array:
        return (h * a + mx.abs(h) * b) * d

    @compiled
    def value(h: Array) -> Array:
        return h * 0.5 * (h * a + mx.abs(h) * b)

    return with_gradient(value, lambda h, d, _: slope(h, d))


# ==================================================================================================
# MODEL: the public baseline's GPT, with hashed contexts added to its logits
# ==================================================================================================


def rms_norm(x: Array) -> Array:
    """x / sqrt(mean(x^2)) over the last axis, without a weight."""
    return cpu_rms_norm(x)[0] if on_cpu() else mx.fast.rms_norm(x, None, RMS_EPS)


def init_matrix(rows: int, columns: int, rng: Any, orthogonal: bool) -> Array:
    """(rows, columns) float32: orthogonal, or uniform with the same spread as nn.Linear's."""
    if orthogonal:
        q = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
        return mx.array((q if rows >= columns else q.T).astype(np.float32))
    bound = 1 / math.sqrt(columns)
    return mx.array(rng.uniform(-bound, bound, (rows, columns)).astype(np.float32))


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

    def __call__(self, x: Array, gain: Array) -> Array:
        """(B, T, D) -> (B, T, D), times gain (D,)."""
        batch, length, _ = x.shape

        def split(y: Array, heads: int) -> Array:
            return y.reshape(batch, length, heads, self.head_dim)

        q_gain = mx.minimum(self.q_gain, SCORE_LIMIT / self.head_dim**0.5)
        q_gain = q_gain.astype(x.dtype)[:, None, None]
        rope = self.rope_dims, self.rope_base
        q = rotary(rms_norm(split(self.c_q(x), self.heads)), *rope) * q_gain
        k = rotary(rms_norm(split(self.c_k(x), self.kv_heads)), *rope)
        v = split(self.c_v(x), self.kv_heads).transpose(0, 2, 1, 3)
        y = causal_attention(q, k, v, self.head_dim**-0.5)
        if self.xsa:
            own = mx.repeat(v, self.heads // self.kv_heads, axis=1)
            own = own * mx.rsqrt(mx.sum(own * own, axis=-1, keepdims=True) + 1e-6)
            y = y - mx.sum(y * own, axis=-1, keepdims=True) * own
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, length, -1), gain)


def rotary(x: Array, dims: int, base: float) -> Array:
    """RoPE on the first `dims` of d, neighbours in pairs: (B, T, H, d) -> (B, H, T, d).

    MLX's kernel, or on a CPU a complex product.
    """
    if on_cpu():
        return cpu_rotate(x, rope_turns(x.shape[1], x.shape[3], dims, base)).transpose(0, 2, 1, 3)
    x = x.transpose(0, 2, 1, 3)
    return mx.fast.rope(x, dims, traditional=True, base=base, scale=1.0, offset=0)


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """q (B, H, T, d); k, v (B, Hkv, T, d) -> (B, H, T, d): MLX's kernel, or the CPU's."""
    if not on_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
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
        return self.proj(squared_leaky_relu(self.leak)(self.fc(x)), gain)


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

    def __call__(self, x: Array, x0: Array) -> Array:
        """x, x0 (B, T, D) -> (B, T, D); x0 is the embedding."""
        mix = self.resid_mix.astype(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(rms_norm(x), self.attn_scale * self.depth_scale)
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
        return gates @ e


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
            x = x + mx.sigmoid(self.smear_gate).astype(x.dtype) * before
        return rms_norm(x)

    def trunk(self, x: Array) -> Array:
        """Embedding (B, T, D) -> features for the head (B, T, D)."""
        x0, half, kept = x, len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half and kept:
                x = x + self.skips[i - half].astype(x.dtype) * kept.pop()
            x = block(x, x0)
            if i < half:
                kept.append(x)
        return rms_norm(x)

    def head_inputs(self, x: Array, last: int) -> tuple[Array, Array, Array]:
        """Inputs (B, T) -> (f (B*last, K), weight (V, K), bias (B*last, V) or (1, 1)).

        The uncapped logits of the last positions are f @ weight.T + bias.
        """
        context = document_context(x, self.bos, 5)
        h = self.trunk(self.embed(context))[:, -last:]
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
        f, weight, bias = self.head_inputs(x, x.shape[1])
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

    def logits(self, x: Array, last: int) -> Array:
        """Inputs (B, T) -> soft-capped logits after the last positions: (B, last, V) float32.

        Scores are made of these: the head takes MLX's exact functions in float32 on every device.
        """
        f, weight, bias = self.head_inputs(x, last)
        f, weight, bias = (a.astype(mx.float32) for a in (f, weight, bias))
        logits = self.cap * mx.tanh((f @ weight.T + bias) / self.cap)
        return logits.reshape(x.shape[0], last, -1)


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
    """The group of every parameter; an error unless each name is in exactly one."""
    found = {n: [g for g in GROUPS if re.fullmatch(g.pattern, n)] for n in names}
    wrong = {n: [g.name for g in groups] for n, groups in found.items() if len(groups) != 1}
    if wrong:
        raise AssertionError(f"parameters that are not in exactly one optimizer group: {wrong}")
    return {n: groups[0] for n, groups in found.items()}


def orthogonalise(g: Array, steps: int) -> Array:
    """Newton-Schulz: (n, rows, columns) -> the same with singular values near 1.

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
def rsqrt_guess(x: Array) -> Array:
    """Bits of a first guess of 1 / sqrt(x), from the bits of x."""
    return 0x5F3759DF - (x >> 1)


@compiled
def rsqrt_newton(x: Array, y: Array) -> Array:
    """sqrt(x) from a guess y of 1 / sqrt(x): two Newton steps, 5e-6 relative."""
    y = y * (1.5 - 0.5 * x * y * y)
    return x * (y * (1.5 - 0.5 * x * y * y))


def root(x: Array) -> Array:
    """sqrt(x) for x >= 0; MLX's CPU sqrt costs 7 ns an element."""
    if not on_cpu():
        return mx.sqrt(x)
    guess = rsqrt_guess(x.view(mx.int32)).view(mx.float32)
    return rsqrt_newton(x, guess)


@compiled
def adam_moments(g: Array, m: Array, v: Array, b1: Array, b2: Array) -> list:
    """The two decayed moments of the gradient."""
    return [m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)]


@compiled
def adam_move(p: Array, m: Array, s: Array, rate: Array, shrink: Array, eps: Array) -> Array:
    """Parameters after the move: m and s = sqrt(v) are not bias-corrected, rate and eps are."""
    return p * shrink - rate * m / (s + eps)


def adam(
    p: Array, g: Array, m: Array, v: Array, lr: Array, step: Array, cfg: Knobs, decay: float
) -> tuple[Array, Array, Array]:
    """One Adam update with bias correction and decoupled decay: (new p, new m, new v)."""
    b1, b2 = mx.array(cfg.beta1), mx.array(cfg.beta2)
    m, v = adam_moments(g, m, v, b1, b2)
    c1, c2 = 1 - b1**step, mx.sqrt(1 - b2**step)
    return adam_move(p, m, root(v), lr * c2 / c1, 1 - lr * decay, cfg.adam_eps * c2), m, v


def new_optimizer_state(params: Arrays, groups: dict[str, Group]) -> Arrays:
    """Zeroed moments, under the names KIND/PARAMETER."""
    kinds = {"muon": ("buffer",), "adam": ("m", "v")}
    return {
        f"{kind}/{name}": mx.zeros_like(p)
        for name, p in params.items()
        for kind in kinds[groups[name].optimizer]
    }


def apply_gradients(
    params: Arrays, grads: Arrays, opt: Arrays, hyper: Arrays, cfg: Knobs
) -> tuple[Arrays, Arrays]:
    """One step of the parameters with gradients: (their new values, their new optimizer state).

    hyper: scalar arrays `lr` (factor on every learning rate), `momentum` (Muon's) and `step`
    (counted from 1). Muon matrices of one group and shape are stacked.
    """
    new, state, stacks = {}, {}, {}
    for name, group in group_parameters(list(grads)).items():
        stack = params[name].shape if group.optimizer == "muon" else name
        stacks.setdefault((group, stack), []).append(name)
    for (group, name), same in stacks.items():
        lr = hyper["lr"] * getattr(cfg, group.lr)
        decay = getattr(cfg, group.decay) if group.decay else 0.0
        if group.optimizer == "adam":
            m, v = opt[f"m/{name}"], opt[f"v/{name}"]
            p, m, v = adam(params[name], grads[name], m, v, lr, hyper["step"], cfg, decay)
            new[name], state[f"m/{name}"], state[f"v/{name}"] = p, m, v
            continue
        g, b = mx.stack([grads[n] for n in same]), mx.stack([opt[f"buffer/{n}"] for n in same])
        u, b = muon(g, b, lr, hyper["momentum"], cfg.muon_backend_steps)
        new |= {n: params[n] * (1 - lr * decay) - u[i] for i, n in enumerate(same)}
        state |= {f"buffer/{n}": b[i] for i, n in enumerate(same)}
    return new, state


# ==================================================================================================
# ARTIFACT: magic, version, checksum; then, compressed by brotli: JSON header, raw tensors
# ==================================================================================================

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MAGIC, FORMAT_VERSION = b"MLXGOLF1", 5
# Magic, version, SHA-256 of the version and the rest, bytes of the compressed model.
PREFIX = struct.Struct("<8sH32sQ")
# Bytes a value after compression, for rows of Gaussian noise (measured, brotli 11).
LZMA_MAGIC = b"\xfd7zXZ\0"  # no brotli stream of ours begins so
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


def compress(raw: bytes) -> bytes:
    """Brotli at its best: 0.9 % fewer bytes than zstd 22, 1.1 % fewer than xz -9e, on int8 rows."""
    try:
        import brotli
    except ImportError:
        return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    return brotli.compress(raw, quality=11, lgwin=24)


def decompress(path: Path, model: bytes) -> bytes:
    """The inverse of `compress`. Raises UserError where the file needs a missing package."""
    if model.startswith(LZMA_MAGIC):
        return lzma.decompress(model)
    try:
        import brotli
    except ImportError:
        raise UserError(f"{path}: compressed by brotli: pip install brotli") from None
    return brotli.decompress(model)


def pack_tensors(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> tuple[list, list[bytes]]:
    """Parameters -> (a JSON row a tensor: name, shape, bits; their bytes in that order)."""
    rows, blobs = [], []
    for name, p in params.items():
        bits = getattr(cfg, groups[name].bits) if groups[name].bits else 0
        rows.append([name, list(p.shape), bits])
        if bits:
            codes, scale = quantise_rows(p, bits, cfg.use_gptq_lite)
            stored = codes.astype(mx.int8), scale.astype(mx.bfloat16).view(mx.uint16)
        else:
            stored = (p.astype(mx.float32),)
        blobs += [np.array(a).tobytes() for a in stored]
    return rows, blobs


def unpack_tensors(rows: list, raw: bytes) -> Arrays:
    """The inverse of `pack_tensors`, up to quantisation."""
    out, at = {}, 0
    for name, shape, bits in rows:
        size = math.prod(shape)
        if bits:
            codes = np.frombuffer(raw, np.int8, size, at).reshape(shape).astype(np.float32)
            scales = np.frombuffer(raw, "<u2", shape[0], at + size).astype(np.uint32) << 16
            out[name] = mx.array(codes * scales.view(np.float32)[:, None])
            at += size + 2 * shape[0]
        else:
            out[name] = mx.array(np.frombuffer(raw, "<f4", size, at).reshape(shape))
            at += 4 * size
    return out


def checksum(version: int, model_bytes: int, body: bytes) -> bytes:
    """SHA-256 of all that an artifact holds after its magic number."""
    return hashlib.sha256(struct.pack("<HQ", version, model_bytes) + body).digest()


LOCAL_KNOBS = {"run_id", "out_dir", "eval_only", "data_path", "tokenizer_path", "resume", "blas",
               "workers", "device", "compute_dtype", "checkpoint_every"}  # fmt: skip


def shared_knobs(cfg: Knobs) -> dict[str, Any]:
    """The settings that do not depend on where a run takes place."""
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in LOCAL_KNOBS}


def model_bytes(
    params: Arrays,
    groups: dict[str, Group],
    cfg: Knobs,
    tokens: Tokenizer,
    packed: PackedText | None,
) -> bytes:
    """The model before compression: JSON header, byte table, the mixer's tree, tensors."""
    rows, blobs = pack_tensors(params, groups, cfg)
    header = {"knobs": shared_knobs(cfg), "tensors": rows}
    header |= {"packed": [packed.token_count, packed.sha256]} if packed else {}
    facts = ("sha256", "bos", "vocab", "dummy_prefix")
    header["tokenizer"] = {name: getattr(tokens, name) for name in facts}
    text = json.dumps(header).encode()
    flags = (tokens.leading + 2 * tokens.control).astype(np.uint8)
    tables = [tokens.piece_bytes.astype("<u2"), flags]
    tables += [packed.leaf.astype("<u2")] if packed else []
    return b"".join([struct.pack("<I", len(text)), text, *(a.tobytes() for a in tables), *blobs])


def write_artifact(
    path: Path, params: Arrays, groups: dict[str, Group], cfg: Knobs, tokens: Tokenizer,
    packed: PackedText | None = None,
) -> Event:  # fmt: skip
    """Write the compressed model, then the packed text; returns the export event."""
    model = compress(model_bytes(params, groups, cfg, tokens, packed))
    body = model + (packed.code if packed else b"")
    digest = checksum(FORMAT_VERSION, len(model), body)
    part = path.with_suffix(".part")
    part.write_bytes(PREFIX.pack(MAGIC, FORMAT_VERSION, digest, len(model)) + body)
    part.replace(path)
    return export_event(path, params, packed)


def export_event(path: Path, params: Arrays, packed: PackedText | None) -> Event:
    """Sizes on disk, in bytes. Raises RunFailed over the limit."""
    code, model = Path(__file__).stat().st_size, path.stat().st_size
    check_size(code + model, params, "the artifact")
    text, count = (len(packed.code), packed.token_count) if packed else (0, 0)
    return {
        "event": "export", "code_bytes": code, "model_bytes": model, "total_bytes": code + model,
        "limit_bytes": ARTIFACT_LIMIT_BYTES, "packed_bytes": text, "packed_tokens": count,
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


def estimate_bytes(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> int:
    """Bytes of script + artifact if every tensor were Gaussian noise; RunFailed over the limit."""
    size = Path(__file__).stat().st_size
    for name, p in params.items():
        bits = groups[name].bits
        size += p.size * NOISE_BYTES[getattr(cfg, bits)] + 2 * p.shape[0] if bits else 4 * p.size
    check_size(int(size), params, "by estimate, the artifact")
    return int(size)


def estimate_memory(params: Arrays, cfg: Knobs, pieces: list[int], targets: int) -> dict[str, int]:
    """Peak bytes by estimate: {"net": of training, "mixer": of each process that has one}.

    pieces: windows that each worker holds at once; targets: tokens of the validation text. The
    net's are its float32 tensors (values, moments, average, old and new; gradients of each worker
    and their sum) and what a piece keeps for its gradient: its blocks, the scores, and the head.
    """
    size = 4 if compute_dtype(cfg) == "float32" else 2
    tokens, vocab = sum(pieces) * cfg.train_seq_len, params["tok_emb"].shape[0]
    seen = 5 / 8 if on_cpu() else 1  # of the scores: see `query_blocks`
    scores = int(cfg.num_heads * cfg.train_seq_len * seen)
    block = (8 + 3 * cfg.mlp_mult) * cfg.model_dim + scores  # fitted to tests/benchmarks/memory.py
    head = min(cfg.logit_chunk_tokens or tokens, tokens) * vocab * 4 * 4
    copies = 4 * sum(p.size for p in params.values()) * (7 + len(pieces))
    nodes = targets * (cfg.ngram_max_order + 1)  # at most, each with up to four slots
    mixer = {"logistic": cfg.mixer_memory_mb << 20, "backoff": nodes * (NODE.itemsize + 16)}
    net = copies + tokens * cfg.num_layers * block * size + head
    return {"net": net, "mixer": mixer.get(cfg.mixer, 0)}


@dataclass(frozen=True)
class PackedText:
    """Training text inside an artifact, as the logistic mixer's code; decoding it is priming."""

    leaf: Any  # (V,) int64: the mixer's tree, see `token_tree`
    token_count: int
    sha256: str  # of the text's tokens, little-endian int32
    code: bytes


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds."""

    header: dict[str, Any]
    tokens: Tokenizer
    params: Arrays
    packed: PackedText | None


def read_artifact(path: Path) -> Artifact:
    """Read an artifact. Raises UserError naming what is wrong."""
    if not path.is_file():
        raise UserError(f"EVAL_ONLY={path}: no such file")
    blob = path.read_bytes()
    if len(blob) < PREFIX.size or blob[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not an artifact of this script")
    _, version, digest, model_bytes = PREFIX.unpack_from(blob)
    body = blob[PREFIX.size :]
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this script reads {FORMAT_VERSION}")
    if checksum(version, model_bytes, body) != digest:
        raise UserError(f"{path}: cut short or altered (its checksum does not fit): copy it again")
    raw = decompress(path, body[:model_bytes])
    (length,) = struct.unpack_from("<I", raw)
    header = json.loads(raw[4 : 4 + length])
    if not set(header["knobs"]) <= {field.name for field in dataclasses.fields(Knobs)}:
        raise UserError(f"{path}: made by another version of the script: use that one")
    facts, at, packed = header["tokenizer"], 4 + length, None
    vocab = facts.pop("vocab")
    sizes = np.frombuffer(raw, "<u2", vocab, at)
    flags = np.frombuffer(raw, np.uint8, vocab, at + 2 * vocab)
    tokens = Tokenizer(sizes, (flags & 1) > 0, (flags & 2) > 0, **facts)
    at += 3 * vocab
    if "packed" in header:
        leaf = np.frombuffer(raw, "<u2", vocab, at).astype(np.int64)
        packed = PackedText(leaf, *header["packed"], body[model_bytes:])
        at += 2 * vocab
    return Artifact(header, tokens, unpack_tensors(header["tensors"], raw[at:]), packed)


# ==================================================================================================
# TRAINING
# ==================================================================================================


class Workers(contextlib.AbstractContextManager):
    """Threads that share a step's work: one a core on CPUs, each with its own MLX stream.

    MLX's CPU backend runs a stream in one thread. Graphs are built one at a time (building swaps
    the model's parameters) and evaluated side by side. A GPU has one worker and needs no thread.
    """

    def __init__(self, count: int) -> None:
        self.count, self.lock, self.local = count, threading.Lock(), threading.local()
        self.reserved = 0  # cores that something else uses: so many threads fewer, the same bits
        self.pools = [ThreadPoolExecutor(1) for _ in range(count)] if count > 1 else []

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.submit(mx.clear_streams)  # a stream ends in the thread that made it
            pool.shutdown()

    def job(self, build: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Build and evaluate one graph in a worker's thread."""
        if not hasattr(self.local, "stream"):
            self.local.stream = mx.new_stream(mx.cpu)
        with mx.stream(self.local.stream):
            with self.lock:
                result = build(*args)
            mx.eval(result)
        return result

    def map(
        self, build: Callable[..., Any], jobs: list[tuple[Any, ...]], eager: bool = True
    ) -> list[Any]:
        """build(*args) for every job, job i by worker i modulo their number; in order.

        The results are evaluated, unless one worker is not to be `eager`.
        """
        if not self.pools:
            results = [build(*args) for args in jobs]
            if eager:
                mx.eval(results)
            return results
        mx.eval(jobs)  # a thread cannot evaluate what another thread's stream has yet to do
        pools = itertools.cycle(self.pools[: max(len(self.pools) - self.reserved, 1)])
        pending = [next(pools).submit(self.job, build, args) for args in jobs]
        return [p.result() for p in pending]


def make_workers(cfg: Knobs, neighbours: int = 1, ranks: int = 1) -> Workers:
    """WORKERS, or one a core on a CPU, where they share the BLAS's threads; one on a GPU.

    neighbours: ranks that share this machine's cores; ranks: those that share a step.
    """
    if cfg.blas not in ("auto", "none") and not BLAS:
        raise UserError(f"BLAS={cfg.blas}: not an OpenBLAS that can be loaded; try BLAS=auto")
    windows = cfg.train_batch_tokens // cfg.train_seq_len // ranks  # more workers would idle
    cores = max(cpu_cores() // neighbours, 1)
    count = cfg.workers or max(min(cores, windows), 1) if on_cpu() else 1
    if BLAS:
        BLAS["set_threads"](max(cores // count, 1))
    return Workers(count)


class Ranks:
    """The processes that `mlx.launch` started together, each with a part of every step.

    Without a launcher there is one, which has nothing to wait for. Every method is called by all
    ranks, in the same order, and raises RunFailed where one of them is gone.
    """

    def __init__(self) -> None:
        group = mx.distributed.init()
        self.rank, self.count = group.rank(), group.size()

    def sum(self, trees: list[Any]) -> Any:
        """The sum of trees of float32 arrays, and of those of all ranks, as one message."""
        lists = [[a for _, a in tree_flatten(tree)] for tree in trees]
        flat = [mx.concatenate([a.reshape(-1) for a in arrays]) for arrays in lists]
        total = self.exchange(mx.distributed.all_sum, sum(flat[1:], flat[0]))
        ends = np.cumsum([a.size for a in lists[0]]).tolist()
        parts = iter(mx.split(total, ends[:-1]))
        return tree_map(lambda a: next(parts).reshape(a.shape), trees[0])

    def of_first(self, value: float) -> float:
        """Rank 0's value, in single precision: what all ranks must agree on."""
        return self.exchange(mx.distributed.all_sum, mx.array(0.0 if self.rank else value)).item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.exchange(mx.distributed.all_max, mx.array(+flag)).item() > 0

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
        """The result of `work`, which the ranks do one after another."""
        results = []
        for rank in range(self.count):
            results += [work()] if rank == self.rank else []
            self.of_first(0.0)  # waits for the one whose turn it is
        return results[0]

    def exchange(self, operation: Callable[[Array], Array], mine: Array) -> Array:
        """What the operation makes of all ranks' arrays; one alone keeps its own."""
        try:
            mx.eval(out := operation(mine) if self.count > 1 else mine)
        except RuntimeError as error:
            raise RunFailed(f"another rank is gone ({error})") from None
        return out


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
    """Factor on every learning rate: 1, then linear to 0 over the last WARMDOWN_ITERS steps."""
    if not cfg.warmdown_iters:
        return 1.0
    return min(remaining_steps(step, elapsed_s, cfg) / cfg.warmdown_iters, 1.0)


def momentum_at(step: int, cfg: Knobs) -> float:
    """Muon's momentum, warmed up linearly."""
    t = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start * (1 - t) + cfg.muon_momentum * t


def averaging_weight(averaged: int, cfg: Knobs) -> float:
    """Weight of the newest parameters in the average when `averaged` steps are in it already."""
    mean = 1 / (averaged + 1)  # an EMA younger than its memory is the plain mean
    return mean if cfg.use_swa else max(1 - cfg.ema_decay, mean)


def split_windows(windows: int, cfg: Knobs, workers: int) -> list[list[slice]]:
    """Windows of a step -> rounds of a piece for each worker, each under the memory bound."""
    most = max(cfg.mlx_max_microbatch_tokens // cfg.train_seq_len, 1)
    rounds = max(math.ceil(windows / (most * workers)), cfg.grad_accum_steps)
    pieces = min(rounds * workers, windows)
    ends = [windows * i // pieces for i in range(pieces + 1)]
    slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return [slices[i : i + workers] for i in range(0, pieces, workers)]


class Trainer:
    """The training state and the one function that moves it.

    All that changes is in three dicts of arrays: `params`, `opt` and `average`. A step computes new
    ones and takes them only if its loss and its gradient are finite, so that the last good state
    is always at hand.
    """

    def __init__(
        self, model: GPT, cfg: Knobs, data: TrainWindows, report: Report, workers: Workers,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self.model, self.cfg, self.data, self.report = model, cfg, data, report
        self.workers, self.ranks = workers, ranks
        self.params: Arrays = dict(tree_flatten(model.parameters()))
        self.groups = group_parameters(list(self.params))
        self.opt = new_optimizer_state(self.params, self.groups)
        self.average = self.params
        self.step, self.elapsed_s, self.averaged = 0, 0.0, 0
        self.windows = cfg.train_batch_tokens // cfg.train_seq_len
        if self.windows < ranks.count:
            raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: {self.windows} windows "
                            f"a step, fewer than the {ranks.count} ranks: raise it")  # fmt: skip
        ends = [self.windows * i // ranks.count for i in (ranks.rank, ranks.rank + 1)]
        self.mine = slice(*ends)  # of a step's windows
        self.rounds = split_windows(ends[1] - ends[0], cfg, workers.count)
        by_shape = sorted(self.params, key=lambda n: (self.params[n].size, n), reverse=True)
        self.shares = [by_shape[i :: workers.count] for i in range(workers.count)]
        self.bigrams = bigram_probability(data) if cfg.complement_alpha else None
        # A GPU compiles whole steps; on a CPU that gains nothing, so there only kernels are.
        whole = (lambda f: f) if on_cpu() else mx.compile
        self.gradients = {q: whole(functools.partial(self._gradients, q)) for q in (False, True)}
        self.sums, self.updates = whole(self._sums), whole(self._updates)

    def _gradients(
        self, qat: bool, params: Arrays, before: tuple[Any, ...], batch: tuple[Array, ...]
    ) -> tuple[Array, Arrays]:
        """(loss, gradients) of a piece of the step, added to those of the pieces before it.

        The gradients are those of the weighted loss; the loss is plain. batch: inputs, targets and
        weights, each (B, T).
        """
        x, y, w = batch
        share = 1 / (self.windows * self.cfg.train_seq_len)

        def loss(p: Arrays) -> tuple[Array, Array]:
            p = fake_quantise(p, self.groups, self.cfg) if qat else p
            self.model.update(tree_unflatten(list(p.items())))
            nll = self.model.nll(x, y)
            return mx.sum(nll * w) * share, mx.sum(nll) * share

        (_, plain), grads = mx.value_and_grad(loss)(params)
        if before:
            plain, grads = plain + before[0], {n: g + before[1][n] for n, g in grads.items()}
        return plain, grads

    def _sums(self, parts: list[Arrays]) -> tuple[Arrays, Array]:
        """Gradients of several workers -> (their sums, the squared norm of those)."""
        sums = {n: sum((p[n] for p in parts[1:]), parts[0][n]) for n in parts[0]}
        return sums, sum((mx.sum(g * g) for g in sums.values()), mx.array(0.0))

    def _updates(
        self, params: Arrays, grads: Arrays, opt: Arrays, average: Arrays, hyper: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        """(New values, optimizer state, average) of the parameters that have gradients here."""
        if self.cfg.grad_clip_norm:
            grads = {n: g * hyper["clip"] for n, g in grads.items()}
        new, opt = apply_gradients(params, grads, opt, hyper, self.cfg)
        if not (self.cfg.ema_decay or self.cfg.use_swa):
            return new, opt, new
        rate = hyper["average"]
        return new, opt, {n: average[n] + rate * (new[n] - average[n]) for n in new}

    def loss_weights(self, tokens: Any, step: int) -> Any:
        """Complementary weights of a step's targets: (windows, T) float32."""
        if self.bigrams is None:
            return np.ones((len(tokens), tokens.shape[1] - 1), np.float32)
        probability = self.bigrams[tokens[:, :-1], tokens[:, 1:]]
        if self.cfg.complement_by == "contexts" and self.cfg.mixer == "logistic":
            foreseen = self.data.step_foreseen(step, self.windows)
            if self.ranks.count > 1:  # rank 0 packs, so it alone knows
                foreseen = np.array(self.ranks.sum([mx.array(foreseen)]))
            probability = np.where(foreseen > 0, foreseen, probability)
        return complementary_weights(probability, self.cfg.complement_alpha)

    def step_gradients(self, step: int, qat: bool) -> tuple[float, list[tuple[Arrays, Array]]]:
        """Step number `step`'s (plain loss, [(gradients, their squared norm)] of each share)."""
        tokens = self.data.step(step, self.windows)
        whole = tokens[:, :-1], tokens[:, 1:], self.loss_weights(tokens, step)
        arrays = [array[self.mine] for array in whole]
        parts: list[tuple[Any, ...]] = [()] * len(self.rounds[0])
        for pieces in self.rounds:
            batches = [tuple(mx.array(a[piece]) for a in arrays) for piece in pieces]
            jobs = [(self.params, *job) for job in zip(parts, batches, strict=False)]
            eager = self.cfg.mlx_eager_eval
            parts[: len(jobs)] = self.workers.map(self.gradients[qat], jobs, eager)
        if self.ranks.count > 1:
            parts = [self.ranks.sum(parts)]
        jobs = [([{n: g[n] for n in share} for _, g in parts],) for share in self.shares]
        return sum(p[0].item() for p in parts), self.workers.map(self.sums, jobs)

    def compute(self, step: int, factor: float, averaged: int) -> tuple[Any, ...]:
        """What step number `step` makes of the state: (params, opt, average, loss, norm)."""
        cfg, old = self.cfg, (self.params, self.opt, self.average)
        loss, summed = self.step_gradients(step, factor < cfg.late_qat_threshold)
        norm = math.sqrt(sum(square.item() for _, square in summed))
        hyper = {
            "lr": factor, "momentum": momentum_at(step, cfg), "step": step + 1.0,
            "clip": min(cfg.grad_clip_norm / (norm + 1e-12), 1.0),
            "average": averaging_weight(averaged, cfg),
        }  # fmt: skip
        hyper = {n: mx.array(v) for n, v in hyper.items()}
        jobs = [(self.params, grads, self.opt, self.average, hyper) for grads, _ in summed]
        shares = self.workers.map(self.updates, jobs)
        new = [functools.reduce(operator.or_, kind) for kind in zip(*shares, strict=True)]
        return *({n: a[n] for n in b} for a, b in zip(new, old, strict=True)), loss, norm

    def warm_up(self) -> None:
        """Compile and allocate by running steps whose results are thrown away."""
        for _ in range(self.cfg.warmup_steps):
            self.compute(0, 1.0, 0)
        if self.cfg.late_qat_threshold and self.cfg.warmup_steps:
            self.compute(0, 0.0, 0)

    def advance(self) -> Event:
        """Take one step; returns its train event. Raises RunFailed if it is not finite."""
        begin = time.perf_counter()
        averaging = progress(self.step, self.elapsed_s, self.cfg) >= self.cfg.ema_start_frac
        averaged = self.averaged if averaging else 0
        factor = lr_factor(self.step, self.elapsed_s, self.cfg)
        params, opt, average, loss, norm = self.compute(self.step, factor, averaged)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailed(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: stopped. Lower "
                "MATRIX_LR, TIED_EMBED_LR or HASH_LR, or set GRAD_CLIP_NORM=1"
            )
        self.params, self.opt, self.average = params, opt, average
        self.averaged = averaged + 1 if averaging else 0
        self.step += 1
        seconds = self.ranks.of_first(time.perf_counter() - begin)
        self.elapsed_s += seconds
        return {
            "event": "train", "step": self.step, "train_loss": loss, "grad_norm": norm,
            "lr_factor": factor, "train_time_ms": 1000 * self.elapsed_s,
            "step_avg_ms": 1000 * self.elapsed_s / self.step,
            "tok_s": self.windows * self.cfg.train_seq_len / seconds,
        }  # fmt: skip

    def finished(self) -> bool:
        """Whether the steps or the clock are used up."""
        return progress(self.step, self.elapsed_s, self.cfg) >= 1

    def save(self) -> Path:
        """Write rank 0's state to checkpoint/ in the run's folder, whole or not at all."""
        path = self.report.checkpoint
        if self.ranks.rank:
            return path
        path.parent.mkdir(exist_ok=True)
        kinds = {"params": self.params, "opt": self.opt, "average": self.average}
        arrays = {f"{kind}:{n}": a for kind, tree in kinds.items() for n, a in tree.items()}
        meta = {n: getattr(self, n) for n in ("step", "elapsed_s", "averaged")}
        meta = {"state": json.dumps(meta), "knobs": json.dumps(dataclasses.asdict(self.cfg))}
        part = path.with_name("part.safetensors")
        mx.save_safetensors(str(part), arrays, meta)
        return part.replace(path)

    def load(self) -> None:
        """Take the state from checkpoint/. Raises UserError if the settings do not fit it."""
        arrays, meta = mx.load(str(self.report.checkpoint), return_metadata=True)
        saved = json.loads(meta["knobs"])
        free = ("iterations", "max_wall", "warmdown", "resume", "checkpoint", "train_log")
        free += ("eval_", "val_", "run_id", "out_dir", "audit", "mixer", "ngram_", "pack_")
        for name, value in dataclasses.asdict(self.cfg).items():
            if not name.startswith(free) and saved.get(name) != value:
                raise UserError(f"RESUME=1: {name.upper()} was {saved.get(name)}, not {value}")
        for kind in ("params", "opt", "average"):
            setattr(self, kind, {n: arrays[f"{kind}:{n}"] for n in getattr(self, kind)})
        for name, value in json.loads(meta["state"]).items():
            setattr(self, name, value)

    def share(self) -> None:
        """Take rank 0's state."""
        if self.ranks.count > 1:
            own = 0.0 if self.ranks.rank else 1.0
            counts = mx.array([self.step, self.elapsed_s, self.averaged])
            state = [self.params, self.opt, self.average, counts]
            state = self.ranks.sum([tree_map(lambda a: a * own, state)])
            self.params, self.opt, self.average, counts = state
            step, self.elapsed_s, averaged = counts.tolist()
            self.step, self.averaged = int(step), int(averaged)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that an interrupt or a request to end sets; a second one stops at once."""
    asked, both = threading.Event(), (signal.SIGINT, signal.SIGTERM)

    def ask(number: int, _: object) -> None:
        asked.set()
        signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, ask) for number in both}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(trainer: Trainer, validation: Validation) -> None:
    """Run steps until the steps or the clock are used up; validate and log on the way."""
    cfg, report, ranks = trainer.cfg, trainer.report, trainer.ranks

    def due(every: int) -> bool:
        return bool(every) and trainer.step % every == 0

    try:
        with interrupts() as interrupted:
            while not trainer.finished():
                event = trainer.advance()
                left = remaining_steps(trainer.step, trainer.elapsed_s, cfg)
                soon = trainer.step == 20 or (trainer.step == 1 and left < 20)
                if soon and left < cfg.warmdown_iters:
                    warning = f"warning: WARMDOWN_ITERS={cfg.warmdown_iters}, but only about "
                    report.line(f"{warning}{left:.0f} steps are left: the learning rate falls now")
                if due(cfg.train_log_every) or (cfg.train_log_every and trainer.step <= 5):
                    report.event(event, TRAIN_LINE)
                if ranks.any(interrupted.is_set()):
                    raise RunFailed("stopped")
                if due(cfg.val_loss_every) and not trainer.finished() and ranks.rank == 0:
                    validation.during_training(trainer)
                if due(cfg.checkpoint_every):
                    trainer.share()  # unlike machines drift apart in the last bits
                    trainer.save()
    except RunFailed as error:
        if ranks.rank:
            raise
        go_on = f"RESUME=1 RUN_ID={report.folder.name}"
        saved = f"{trainer.save()} holds step {trainer.step}: {go_on}"
        raise RunFailed(f"{error}; {saved}") from None


# ==================================================================================================
# CONTEXT MODELS: what a scorer is; then two that learn from the text, backoff and logistic
# ==================================================================================================


class kernel:
    """A function that numba compiles when it is first called: importing it needs no numba."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Any:
        """The compiled function; machine code is kept on disk for the next run."""
        try:
            import numba
        except ImportError:
            raise UserError("context models need numba: pip install numba, or MIXER=off") from None
        return numba.njit(nogil=True, cache=True)(self.function)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    def __getattr__(self, name: str) -> Any:  # what numba asks of a function that another one calls
        return getattr(self.compiled, name)


def net_nats(tokens: Any, logs: Any) -> Any:
    """What the net's rows (m, V) say of tokens (m,): (m,) float64 nats."""
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

    @property
    def learned(self) -> int:
        """How many tokens it has learned from."""
        return 0

    def begin(self, first: int) -> None:
        """Read the text's first token, which is not scored."""

    def score(self, tokens: np.ndarray, logs: np.ndarray) -> np.ndarray:
        """Score the text's next tokens in order, and learn from each after it is scored.

        tokens (m,) int, logs (m, V) float32: the net's log-probabilities -> (m, 3) float64: nats
        per token by the net, by the contexts, by all together.
        """
        return np.repeat(net_nats(tokens, logs)[:, None], 3, axis=1)

    def save(self) -> tuple[np.ndarray, ...]:
        """A copy of the state."""
        return tuple(array.copy() for array in self.state)

    def restore(self, saved: tuple[np.ndarray, ...]) -> None:
        """Go back to what `save` returned, which stays good for another time."""
        self.state = tuple(array.copy() for array in saved)


# ==================================================================================================
# N-GRAM MIXER: exact counts of the text already scored, mixed into the net's distribution
# ==================================================================================================

# Every smoothing is one recursion over the orders k = 0, 1, .. of the context (order k: k tokens),
#     p_k(v) = (max(c(v) - D, 0) + r q(v)) / (n - D m + r),    r = A V + B m,    p_{-1}(v) = 1 / V,
# with c(v) the count of v in the context, n the sum and m the number of the counts above 0, and q
# the shorter context's p_{k-1}, or 1 / V for `laplace`. Counts are whole and D <= 1, so the sum of
# max(c(v) - D, 0) over all v is n - D m: p_k sums to 1, whatever was counted. Where a context has
# no counts the recursion ends: the model backs off to the longest context that has some.
SMOOTHINGS = {  # D, A, B, q is p_{k-1}, shorter contexts count distinct left neighbours
    # Kneser & Ney 1995, interpolated as by Chen & Goodman 1998, with one discount: c(v) is the
    # number of distinct tokens seen left of (context, v), unless the context is the longest. Alone,
    # D = 0.85 is best; beside a net, which knows better what else may come, it should be less.
    "kneser-ney": (0.65, 0.0, 0.65, True, True),
    # Witten & Bell 1991, method C, interpolated: a new kind of continuation is as likely as so far.
    "witten-bell": (0.0, 0.0, 1.0, True, False),
    # Additive, the longest context alone. Laplace's A = 1 drowns the counts of rare contexts.
    "laplace": (0.0, 0.01, 0.0, False, False),
}

# A node is a string of tokens; its parent lacks the leftmost one, and node 0 is the empty string.
# It is the pair (context, token) when its last token is scored and then the next token's context,
# so that one chain of look-ups a token finds both. key: parent * V + leftmost token, compared in
# full, so that ids are exact; place: hash of the string, where the table is searched for it; count:
# c, as a pair; total, kinds: n and m, as a context. Places do not depend on ids, so that those of
# all orders can be loaded at once, which hides memory's latency.
NODE = np.dtype([("key", np.int64), ("place", np.uint32)]
                + [(name, np.int32) for name in ("count", "total", "kinds")])  # fmt: skip
FIRST_ALPHA, FIRST_TOKENS = 0.25, 8.0  # a learned alpha at start, and how many tokens it is worth


@kernel
def slot_of(slots, nodes, key, place):
    """Where the node with this key stands in the open-addressing table, or its empty slot."""
    mask = len(slots) - 1
    at = np.int64(place) & mask
    while slots[at] and nodes[slots[at]].key != key:
        at = (at + 1) & mask
    return at


@kernel
def fill(slots, nodes, used):
    """Enter nodes 1 .. used - 1 into an empty table."""
    for i in range(1, used):
        slots[slot_of(slots, nodes, nodes[i].key, nodes[i].place)] = i


@kernel
def pair_places(state, token, vocab, places, found):
    """Place of (context, token) for each order's context; what it finds there is loaded early."""
    slots, nodes, head, path, _ = state
    h = mix_hash(np.uint64(0), token)
    for k in range(head[1] + 1):
        if k:
            h = mix_hash(h, nodes[path[k]].key % vocab)
        places[k] = h >> np.uint64(32)
        found[k] = slots[np.int64(places[k]) & (len(slots) - 1)]
    for k in range(head[1] + 1):
        found[k] = nodes[found[k]].count


@kernel
def ngram_probability(state, token, vocab, rule, places):
    """(p of `token`, trust in it: a number from the longest context with counts); changes nothing.

    trust = 3 * that context's order + 0, 1, 2 for continuations seen once, twice, more on average.
    """
    slots, nodes, head, path, _ = state
    discount, flat, per_kind, interpolated, _ = rule
    p, trust, pair = 1.0 / vocab, 0, 0
    for k in range(head[1] + 1):
        context = nodes[path[k]]
        if context.total == 0:  # then longer ones have none either
            break
        if k == 0 or pair:
            step = context.key % vocab if k else token
            pair = slots[slot_of(slots, nodes, pair * vocab + step, places[k])]
        count = nodes[pair].count if pair else 0
        rest = flat * vocab + per_kind * context.kinds
        mass = max(count - discount, 0.0) + rest * (p if interpolated else 1.0 / vocab)
        p = mass / (context.total - discount * context.kinds + rest)
        trust = 3 * k + min(context.total // context.kinds, 3) - 1
    return p, trust


@kernel
def learn(state, token, vocab, bos, distinct, places):
    """Count `token` once in each of its contexts, then make it the context's newest token.

    state: slots, nodes, head (nodes used, length of the context, tokens learned), path (the node of
    the context of each order), weights. `distinct`: see SMOOTHINGS' last column;
    places: see `pair_places`.
    """
    slots, nodes, head, path, _ = state
    used, depth, learned = head
    pairs, pair = np.empty(depth + 1, np.int64), 0
    for k in range(depth + 1):
        key = pair * vocab + (nodes[path[k]].key % vocab if k else token)
        at = slot_of(slots, nodes, key, places[k])
        if slots[at] == 0:
            slots[at], nodes[used].key, nodes[used].place = used, key, places[k]
            used += 1
        pair = pairs[k] = slots[at]
    fresh = True
    for k in range(depth, -1, -1):
        counts = fresh or not distinct  # the left neighbour is new if the longer pair is
        fresh = nodes[pairs[k]].count == 0
        if counts:
            nodes[pairs[k]].count += 1
            nodes[path[k]].total += 1
            nodes[path[k]].kinds += fresh
    depth = 1 if token == bos else min(depth + 1, len(path) - 1)
    path[1 : depth + 1] = pairs[:depth]
    head[:] = used, depth, learned + 1


@kernel
def mix(state, tokens, net, top, alphabet, rule, learns, adapts):
    """BackoffMixer.score with the net's log-probabilities of each token and of its likeliest."""
    weights, out = state[4], np.empty((len(tokens), 3))
    places, found = np.zeros(len(state[3]), np.uint32), np.zeros(len(state[3]), np.int64)
    vocab, bos = alphabet
    for i in range(len(tokens)):
        pair_places(state, tokens[i], vocab, places, found)
        p, trust = ngram_probability(state, tokens[i], vocab, rule, places)
        odds, level = top[i] - math.log(max(1.0 - math.exp(top[i]), 1e-9)), 0
        for edge in range(-3, 6):
            level += odds >= edge
        weight = weights[level, trust]
        alpha = weight[0] / weight[1]
        mixed = (1.0 - alpha) * math.exp(net[i]) + alpha * p
        out[i] = -net[i], -math.log(p), -math.log(mixed)
        if learns:
            learn(state, tokens[i], vocab, bos, rule[4], places)
        if learns and adapts:
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
        self.alphabet, self.rule = (vocab, bos), SMOOTHINGS[smoothing]
        self.adapts, self.capacity, self.most = alpha is None, capacity, 2 + capacity * (order + 1)
        if not (1 <= order <= 8 and 0 <= bos < vocab and 0 <= (alpha or 0) <= 1):
            raise ValueError(f"order {order}, BOS {bos} of {vocab}, alpha {alpha}: out of range")
        if self.most >= 2**31 or self.most * vocab >= 2**63:
            raise ValueError(f"{capacity} tokens of {vocab} at order {order}: too many to number")
        nodes, slots = huge_zeros(self.most, NODE), np.zeros(4, np.int32)
        path = np.zeros(order + 1, np.int64)
        nodes["key"][1], path[1] = bos, 1
        nodes["place"][1] = mix_hash(np.uint64(0), bos) >> np.uint64(32)
        fill(slots, nodes, 2)
        prior = (FIRST_ALPHA * FIRST_TOKENS, FIRST_TOKENS) if alpha is None else (alpha, 1.0)
        self.state = slots, nodes, np.array([2, 1, 0]), path, np.full((10, 3 * order + 3, 2), prior)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens; at least half of the slots stay empty."""
        slots, nodes, head, path, weights = self.state
        if head[2] + tokens > self.capacity:
            raise ValueError(f"{head[2] + tokens} tokens, more than the {self.capacity} announced")
        need = 2 * (int(head[0]) + tokens * len(path))
        if need > len(slots):
            slots = huge_zeros(1 << (need - 1).bit_length(), np.int32)
            fill(slots, nodes, head[0])
            self.state = slots, nodes, head, path, weights

    def begin(self, first: int) -> None:
        """Read the text's first token, which is not scored. BOS says nothing: it is assumed."""
        if first != self.alphabet[1]:
            self.reserve(1)
            orders = len(self.state[3])
            places, found = np.zeros(orders, np.uint32), np.zeros(orders, np.int64)
            pair_places(self.state, int(first), self.alphabet[0], places, found)
            learn(self.state, int(first), *self.alphabet, self.rule[4], places)

    def score(self, tokens: Any, logs: Any, learns: bool = True) -> Any:
        """Score the text's next tokens in order, each before it is learned.

        tokens (m,) int32, logs (m, V) float32: the net's log-probabilities, taken as they are
        -> (m, 3) float64 nats of each token: by the net, by the n-gram model, mixed.
        `learns` False asks what each token would cost if it came next, and changes nothing.
        """
        if logs.shape != (len(tokens), self.alphabet[0]):
            raise ValueError(f"{logs.shape} log-probabilities for {len(tokens)} tokens")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.alphabet[0]:
            raise ValueError(f"a token outside the vocabulary of {self.alphabet[0]}")
        self.reserve(len(tokens) if learns else 0)
        net = -net_nats(tokens, logs)
        top, tokens = logs.max(axis=1).astype(np.float64), tokens.astype(np.int64)
        return mix(self.state, tokens, net, top, self.alphabet, self.rule, learns, self.adapts)

    @property
    def learned(self) -> int:
        """Tokens learned so far."""
        return int(self.state[2][2])

    def save(self) -> tuple[Any, ...]:
        """A copy of all that scoring changes."""
        return tuple(array.copy() for array in self.state)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to what `save` returned, which stays good for another time."""
        self.state = tuple(array.copy() for array in state)


# ==================================================================================================
# LOGISTIC MIXER: a token is a path of binary decisions; experts are mixed at each, as logits
# ==================================================================================================

# Encoder and decoder must agree to the bit on every machine. So all that priming learns from is
# integers, or single float32 operations in a fixed order; logarithms of tables are `decimal`'s,
# which rounds correctly everywhere. No compiler may fuse or reorder them: no `fastmath` here.


class Context(NamedTuple):
    """What a slot or candidate expert knows of the past; a row more is an expert more.

    tokens: bit k is set if token t-1-k counts. words: 1 the tokens since the last piece that starts
    a word, 2 that and the word before it. document: counts end with the document.
    """

    name: str
    tokens: int = 0
    words: int = 0
    document: bool = False


SLOT_CONTEXTS = (
    Context("order 1", tokens=0b1),
    Context("order 2", tokens=0b11),
    Context("order 3", tokens=0b111),
    Context("word", words=1),
    Context("word pair", words=2),
    Context("document", document=True),
    Context("document, order 1", tokens=0b1, document=True),
    Context("document, order 2", tokens=0b11, document=True),
)
CANDIDATE_CONTEXTS = (Context("candidates, order 4", tokens=0b1111),)
SLOTS, CANDIDATES = len(SLOT_CONTEXTS), len(CANDIDATE_CONTEXTS)
EXPERTS = SLOTS + CANDIDATES + 1  # and the match
# Inputs of a decision: each slot's own logit and what such cells meant so far, each candidate
# expert's, the match's, the net's and a bias. A row of weights is padded for vector instructions.
FIRST_CANDIDATE, MATCH = 2 * SLOTS, 2 * SLOTS + CANDIDATES
NET, BIAS = MATCH + 1, MATCH + 2
WIDTH = -(-(BIAS + 1) // 8) * 8
LEVELS = 3  # decisions that share a slot: a tag and 7 nodes are 16 bytes
WAYS = 4  # rows of a table in which a key may be: 4 slots are a cache line
UNSEEN = 2048 << 4  # a slot's cell: 12 bits of logit, in 256ths from -8; 4 of a count's logarithm
COUNTED = tuple(a for a, c in enumerate(SLOT_CONTEXTS) if c.name in ("order 2", "order 3", "word"))
SETS = 6  # weight sets, see `choose_sets`
SCORE, ENCODE, DECODE = 0, 1, 2
TOKENS, DOCUMENT, MATCH_AT, MATCH_LENGTH, JOINED = range(5)  # what `Mixer.now` holds


def logit_tables() -> tuple[Any, Any]:
    """(stretch (4096,) float32: ln(p / (1-p)) of p in 4096ths; logistic (6145,) int64: its inverse
    in 2^-32, of -12 .. 12 in 256ths). Correctly rounded, so the same on every machine."""
    with decimal.localcontext() as context:
        context.prec = 24
        number = decimal.Decimal
        stretch = [(number(2 * i + 1) / number(8191 - 2 * i)).ln() for i in range(4096)]
        upper = [int(2**32 / (1 + (number(-i) / 256).exp())) for i in range(3073)]
    logistic = [2**32 - p for p in upper[:0:-1]] + upper
    return np.array(stretch, np.float32), np.array(logistic, np.int64)


STRETCH, LOGISTIC = logit_tables()
SQUASH = np.clip(LOGISTIC >> 16, 1, 65535).astype(np.int32)
RATE = (65536 * 2 // (2 * np.arange(1024) + 3)).astype(np.int64)  # 1 / (n + 1.5)
COUNTS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 17, 22, 30, 40, 60])  # of a cell's 4 bits
ADVANCE = np.append(65536 // np.diff(COUNTS), 0)  # chance, in 65,536ths, that they go on
EVIDENCE_BUCKET = np.searchsorted([1, 2, 3, 4, 5, 7, 10, 16, 32], np.arange(2048), "right")
MAP_LIMIT, APM_LIMIT = 1023, 250  # counts up to which cells slow down
FIRST_RATE, LAST_RATE, FADE = np.float32(0.005), np.float32(0.0002), np.float32(0.003)
NET_WEIGHT, OTHERS = np.float32(0.3), np.float32(0.75)  # when the net joins: its weight, theirs
LONGEST_MATCH, SHORTEST_MATCH = 32, 7


def cells(probability: Any) -> Any:
    """Cells of 22 bits of probability and 10 of count, 0, from 65,536ths."""
    return (np.asarray(probability, np.int64) << 16).astype(np.uint32)


def cells_after_1() -> Any:
    """(65536,) uint16: a slot's cell -> its logit after a 1, its count's bits 0."""
    p, out = LOGISTIC[1024 : 1024 + 4096], np.zeros((4096, 16), np.uint16)
    for bits, n in enumerate(COUNTS.tolist()):
        to = p + (2**32 - p) * 2 // (2 * n + 3)  # by 1 / (n + 1.5) of the way
        at = np.clip(np.searchsorted(p, to), 1, 4095)
        out[:, bits] = (at - (p[at] - to > to - p[at - 1])) << 4
    return out.reshape(-1)


AFTER_1 = cells_after_1()


class Mixer(NamedTuple):
    """All of a mixer's state as arrays, so that compiled code can take it and a copy is a copy.

    What mixes has two heads: one for the contexts alone, one that also hears the net.
    """

    slot_rows: Any  # (SLOTS, 5) int64: a Context's numbers, then first row and rows of its region
    candidate_rows: Any  # (CANDIDATES, 5) int64
    leaf: Any  # (V,) int64: a token's path through the tree, its first decision the highest bit
    token: Any  # (2^L,) int64: the token at a leaf, or -1
    inside: Any  # (2^(L+1),) int64: tokens below each node
    starts: Any  # (V,) bool: the piece starts a word
    slots: Any  # (n, 8) uint16: a tag, then a cell for each of 7 nodes
    candidates: Any  # (n, 8) uint32: a tag, then 7 leaves << 16 | count, most recent first
    maps: Any  # cells by expert, level and what the expert says: what it meant so far
    weights: Any  # (2, rows of all sets, WIDTH) float32
    visits: Any  # (2, rows of all sets) float32: how often each row has learned
    apm: Any  # (2, rows * 33) cells by mixed logit; rows: the nodes, hashes of t-1 and a node
    repeats: Any  # (2^n,) int32: the position after the last text of SHORTEST_MATCH tokens
    history: Any  # (capacity,) int32: the tokens so far
    now: Any  # (5,) int64: tokens so far, document's start, match's place and length, net joined
    words: Any  # (2,) uint64: hashes of the current word and the one before


@kernel
def learn_bit(cells, at, bit, limit):
    """Move a cell's probability towards the bit by 1 / (count + 1.5)."""
    n, p = np.int64(cells[at] & np.uint32(1023)), np.int64(cells[at] >> np.uint32(10))
    p += ((bit * 4194303 - p) * RATE[n]) >> 16
    cells[at] = np.uint32((p << 10) | min(n + 1, limit))


@kernel
def learn_slots(slots, slot, at, bit, dice):
    """The same for the slots' cells; their counts go on by chance, so that 4 bits can count far."""
    for a in range(SLOTS):
        cell = np.int64(slots[slot[a], at])
        count = cell & 15
        if bit:
            after = np.int64(AFTER_1[cell])
        else:  # the mirror image; no logit is the least, which has none
            after = 65536 - np.int64(AFTER_1[65536 - cell + 2 * count])
        slots[slot[a], at] = after | (count + (dice < ADVANCE[count]))


@kernel
def stretched(cell):
    """ln(p / (1-p)) of a cell with 22 bits of probability."""
    return STRETCH[cell >> np.uint32(20)]


@kernel
def squashed(x):
    """Logit, float32, within 12 of 0 -> probability in 65,536ths, 1 .. 65,535."""
    return SQUASH[np.int64((x + np.float32(12)) * np.float32(256) + np.float32(0.5))]


@kernel
def clamp(x):
    """A logit that `squashed` can take."""
    return min(max(x, np.float32(-11.9)), np.float32(11.9))


@kernel
def recent(history, now, back, bos):
    """Token t - back, or BOS where that lies before the document."""
    at = now[TOKENS] - back
    return np.int64(history[at]) if at >= now[DOCUMENT] and at >= 0 else bos


@kernel
def context_keys(rows, history, now, words, bos, keys):
    """64-bit key of each Context's row: it is of the past alone."""
    for a in range(len(rows)):
        row = rows[a]
        h = mix_hash(np.uint64(1 << 40), row[0] | row[1] << 8 | row[2] << 12)
        for back in range(8):
            if row[0] >> back & 1:
                h = mix_hash(h, recent(history, now, back + 1, bos))
        for k in range(row[1]):
            h = mix_hash(h, words[k])
        keys[a] = mix_hash(h, now[DOCUMENT]) if row[2] else h


@kernel
def touch(table, rows, keys, node, hashes, at):
    """The first place of each row's key at a node.

    It loads them all, in flight at once, which hides memory's latency; the sum keeps the compiler
    from leaving the loads out.
    """
    total = np.uint32(0)
    for a in range(len(rows)):
        h = hashes[a] = mix_hash(keys[a], node)
        place = rows[a, 3] + ((np.int64(h & np.uint64(0xFFFFFFFF)) * rows[a, 4]) >> 32)
        at[a] = place & ~(WAYS - 1)
        total += np.uint32(table[at[a], 0])
    return total


@kernel
def find(table, hashes, at, used, blank):
    """From each key's first place to where it is; the least used row is cleared for a new key.

    used: the bits of a row's first cell that count.
    """
    for a in range(len(at)):
        tag, first = np.int64(hashes[a] >> np.uint64(48)) | 1, at[a]
        place = least = first
        while place < first + WAYS and np.int64(table[place, 0]) != tag:
            if np.int64(table[place, 1]) & used < np.int64(table[least, 1]) & used:
                least = place
            place += 1
        if place == first + WAYS:
            place, row = least, table[least]
            row[0] = tag
            for k in range(1, 8):
                row[k] = blank
        at[a] = place


@kernel
def slot_inputs(slots, maps, slot, at, level, levels, x, said):
    """Two inputs an expert: its cell, and what cells like it meant so far; returns those seen."""
    seen = 0
    for a in range(SLOTS):
        cell = np.int64(slots[slot[a], at])
        x[2 * a] = np.float32((cell >> 4) - 2048) * np.float32(1 / 256)
        x[2 * a + 1], said[a] = np.float32(0), -1
        if cell & 15:
            said[a] = (a * levels + level) * 512 + (cell & 15) * 32 + (cell >> 11)
            x[2 * a + 1] = stretched(maps[said[a]])
            seen += 1
    return seen


@kernel
def candidate_inputs(candidates, maps, found, node, level, levels, x, said):
    """An input an expert, from the counts of the candidates below each side of the node."""
    for c in range(CANDIDATES):
        n0, n1, newest = 0, 0, -1
        for m in range(1, 8):
            entry = candidates[found[c], m]
            if entry == 0:
                break
            leaf = np.int64(entry >> np.uint32(16)) | 1 << levels
            if leaf >> (levels - level) == node:
                bit = leaf >> (levels - level - 1) & 1
                newest = bit if newest < 0 else newest
                n0 += np.int64(entry & np.uint32(0xFFFF)) * (1 - bit)
                n1 += np.int64(entry & np.uint32(0xFFFF)) * bit
        x[FIRST_CANDIDATE + c], said[SLOTS + c] = np.float32(0), -1
        if newest >= 0:
            pair = EVIDENCE_BUCKET[n0] * 10 + EVIDENCE_BUCKET[n1]
            at = SLOTS * levels * 512 + ((c * levels + level) * 100 + pair) * 2 + newest
            x[FIRST_CANDIDATE + c], said[SLOTS + c] = stretched(maps[at]), at


@kernel
def match_input(maps, foretold, length, node, level, levels, x, said):
    """An input from the token that followed the match; foretold: its leaf's node, or -1."""
    x[MATCH], said[EXPERTS - 1] = np.float32(0), -1
    if foretold >> (levels - level) == node:
        bit, first = foretold >> (levels - level - 1) & 1, SLOTS * 512 + CANDIDATES * 200
        at = first * levels + (level * 64 + min(length, 63)) * 2 + bit
        x[MATCH], said[EXPERTS - 1] = stretched(maps[at]), at


@kernel
def choose_sets(slots, slot, at, node, level, levels, seen, before, before_2, age, sets):
    """Rows of weights for a decision, one of each set, the sets one after the other."""
    leaves, counts = 1 << levels, 0
    for a in COUNTED:
        counts = counts * 8 + (np.int64(slots[slot[a], at]) & 15) // 2
    sets[0] = node
    sets[1] = leaves + before_2
    sets[2] = 2 * leaves + before * 8 + min(level, 7)
    sets[3] = 10 * leaves + age * leaves + node
    sets[4] = 18 * leaves + level * (SLOTS + 1) + seen
    sets[5] = 18 * leaves + levels * (SLOTS + 1) + counts


@kernel
def mix_inputs(weights, sets, x, products):
    """The mixed logit: x times the sum of the sets' rows. Vectors fit every loop but the last."""
    row = weights[sets[0]]
    for j in range(len(products)):
        products[j] = row[j]
    for k in range(1, SETS):
        row = weights[sets[k]]
        for j in range(len(products)):
            products[j] += row[j]
    for j in range(len(products)):
        products[j] *= x[j]
    a = b = c = d = np.float32(0)
    for j in range(0, WIDTH, 4):  # one order on every machine
        a += products[j]
        b += products[j + 1]
        c += products[j + 2]
        d += products[j + 3]
    return clamp((a + b) + (c + d))


@kernel
def learn_weights(weights, visits, sets, x, error):
    """A gradient step for each of the sets' rows, smaller the more it has taken."""
    for k in range(SETS):
        row, n = weights[sets[k]], visits[sets[k]]
        visits[sets[k]] = n + np.float32(1)
        step = error * max(LAST_RATE, FIRST_RATE / (np.float32(1) + n * FADE))
        for j in range(len(x)):  # a length unknown to the compiler: it makes vectors of this loop
            row[j] += step * x[j]


@kernel
def refine(apm, rows, mixed, at):
    """Two adaptive probability maps of the mixed logit, interpolated; half the weight is theirs.

    rows: where their rows begin; at: the two cells to learn from, set here. Returns a probability
    in 65,536ths.
    """
    place = min(max((mixed + np.float32(8)) * np.float32(2), np.float32(0)), np.float32(31.99))
    low, total = np.int64(place), np.float32(0)
    high = place - np.float32(low)
    for k in range(2):
        cell = rows[k] + low
        a = np.float32(apm[cell] >> np.uint32(10)) * (np.float32(1) - high)
        total += a + np.float32(apm[cell + 1] >> np.uint32(10)) * high
        at[k] = cell + (high >= np.float32(0.5))
    p = np.float32(squashed(mixed)) * np.float32(0.5) + total * np.float32(0.25 / 64)
    return min(max(np.int64(p), 1), 65535)


@kernel
def code_bit(coder, buffer, mode, p, bit):
    """Carry-less binary arithmetic coding (as in lpaq), p in 65,536ths; returns the bit.

    coder (4,) uint64: low, high, the decoder's window, the position in the buffer of bytes.
    """
    span = coder[1] - coder[0]
    middle = coder[0] + ((span * np.uint64(p)) >> np.uint64(16))
    if mode == DECODE:
        bit = np.int64(coder[2] <= middle)
    if bit:
        coder[1] = middle
    else:
        coder[0] = middle + np.uint64(1)
    while (coder[0] ^ coder[1]) & np.uint64(0xFF000000) == 0:
        at = np.int64(coder[3])
        if mode == ENCODE:
            buffer[at] = coder[1] >> np.uint64(24)
        else:
            byte = np.uint64(buffer[at]) if at < len(buffer) else np.uint64(0)
            coder[2] = (coder[2] << np.uint64(8)) & np.uint64(0xFFFFFFFF) | byte
        coder[3] += np.uint64(1)
        coder[0] = (coder[0] << np.uint64(8)) & np.uint64(0xFFFFFFFF)
        coder[1] = (coder[1] << np.uint64(8)) & np.uint64(0xFFFFFFFF) | np.uint64(255)
    return bit


@kernel
def sum_tree(leaf, row, mass):
    """The net's row (V,), in 2^-30, summed below every node of the tree."""
    leaves = len(mass) // 2
    mass[leaves:] = 0
    for v in range(len(row)):
        mass[leaves + leaf[v]] = np.int64(row[v]) + 1
    for node in range(leaves - 1, 0, -1):
        mass[node] = mass[2 * node] + mass[2 * node + 1]


@kernel
def remember(candidates, found, leaf, token, starts, history, now, words, bos):
    """After a token: candidates, history, words, document."""
    for c in range(CANDIDATES):
        row, m = candidates[found[c]], 1
        while m < 7 and row[m] and np.int64(row[m] >> np.uint32(16)) != leaf:
            m += 1
        known = row[m] != 0 and np.int64(row[m] >> np.uint32(16)) == leaf
        count = np.int64(row[m] & np.uint32(0xFFFF)) if known else 0
        for k in range(m, 1, -1):
            row[k] = row[k - 1]
        for k in range(2, 8):  # new evidence fades the rest
            old = np.int64(row[k] & np.uint32(0xFFFF))
            if old > 2:
                row[k] -= np.uint32((old + 1) >> 2)
        row[1] = np.uint32((leaf << 16) | min(count + 1, 255))
    n = now[TOKENS]
    history[n] = token
    now[TOKENS] = n + 1
    if token == bos:
        now[DOCUMENT], words[0], words[1] = n, 1 << 50, 1 << 50
    elif starts[token]:
        words[1], words[0] = words[0], mix_hash(np.uint64(5 << 40), token)
    else:
        words[0] = mix_hash(words[0], token)


@kernel
def follow_match(history, now, repeats, token):
    """Keep the match if it foretold the token, else look for the last place of this text."""
    n = now[TOKENS]
    if now[MATCH_LENGTH] and history[now[MATCH_AT]] == token:
        now[MATCH_AT] += 1
        now[MATCH_LENGTH] += 1
    else:
        now[MATCH_LENGTH] = 0
    if n < SHORTEST_MATCH:
        return
    h = np.uint64(9)
    for k in range(1, SHORTEST_MATCH + 1):
        h = mix_hash(h, history[n - k])
    at, length = np.int64(h >> np.uint64(20)) & (len(repeats) - 1), 0
    before = np.int64(repeats[at])
    if now[MATCH_LENGTH] == 0 and before:
        while length < min(LONGEST_MATCH, before) and (
            history[before - 1 - length] == history[n - 1 - length]
        ):
            length += 1
        now[MATCH_AT], now[MATCH_LENGTH] = before, length if length >= SHORTEST_MATCH else 0
    repeats[at] = n


@kernel
def net_logit(mass, node):
    """The net's logit of a 1 at a node, from the masses below each."""
    return STRETCH[(mass[2 * node + 1] << 12) // mass[node]]


@kernel
def apm_rows(apm, node, before, leaves, rows):
    """Where a decision's two rows begin in a head's maps: its node's, and its hash with t-1."""
    h = mix_hash(np.uint64(before) << np.uint64(20), node) >> np.uint64(40)
    rows[0] = node * 33
    rows[1] = (leaves + np.int64(h) % (len(apm) // 33 - leaves)) * 33


@kernel
def document_age(now):
    """Logarithm, to the base 4, of the document's length so far: 0 .. 7."""
    age, length = 0, now[TOKENS] - now[DOCUMENT]
    while length >> 2 * age > 3 and age < 7:
        age += 1
    return age


@kernel
def predict(weights, apm, sets, lines, x, from_net, products, mixed, refined, p):
    """Each head's mixed logit, and its probability of 1 in 65,536ths."""
    for h in range(len(p)):
        x[NET] = from_net if h else np.float32(0)
        mixed[h] = mix_inputs(weights[h], sets, x, products)
        p[h] = refine(apm[h], lines, mixed[h], refined[h])


@kernel
def learn_heads(weights, visits, apm, sets, x, from_net, mixed, refined, bit):
    """What each head learns from a bit."""
    for h in range(len(mixed)):
        x[NET] = from_net if h else np.float32(0)
        error = np.float32(bit * 65536 - squashed(mixed[h])) * np.float32(1 / 65536)
        learn_weights(weights[h], visits[h], sets, x, error)
        learn_bit(apm[h], refined[h, 0], bit, APM_LIMIT)
        learn_bit(apm[h], refined[h, 1], bit, APM_LIMIT)


@kernel
def scratch(heads, leaves):
    """What `code_tokens` works on, in its order; the bias among the inputs is set."""
    keys, candidate_keys = np.zeros(SLOTS, np.uint64), np.zeros(CANDIDATES, np.uint64)
    hashes, candidate_hashes = np.zeros(SLOTS, np.uint64), np.zeros(CANDIDATES, np.uint64)
    slot, found = np.zeros(SLOTS, np.int64), np.zeros(CANDIDATES, np.int64)
    said, sets, lines = np.zeros(EXPERTS, np.int64), np.zeros(SETS, np.int64), np.zeros(2, np.int64)
    x, products = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    mixed, p, cost = np.zeros(heads, np.float32), np.zeros(heads, np.int64), np.zeros(heads)
    refined, mass = np.zeros((heads, 2), np.int64), np.zeros(2 * leaves, np.int64)
    x[BIAS] = np.float32(0.3)
    return (keys, candidate_keys, hashes, candidate_hashes, slot, found, said, sets, lines, x,
            products, mixed, p, cost, refined, mass)  # fmt: skip


@kernel
def learn_maps(maps, said, bit):
    """What each expert's words meant, learned from a bit."""
    for e in range(EXPERTS):
        if said[e] >= 0:
            learn_bit(maps, said[e], bit, MAP_LIMIT)


@kernel
def code_tokens(state, tokens, rows, bos, mode, coder, buffer, nats):
    """Score, encode or decode tokens in order, learning from each after it is coded.

    tokens (m,) int64, written when decoding; rows (m, V) uint32: the net's probabilities in 2^-30,
    or (0, V) for none; nats (m, 2) float64, written: cost by the contexts alone, and with the net.
    A node's probability depends on the past and on this token's earlier decisions only, so the
    products over all tokens sum to 1.
    """
    (slot_rows, candidate_rows, leaf, token, inside, starts, slots, candidates, maps,
     weights, visits, apm, repeats, history, now, words) = state  # fmt: skip
    leaves, levels, heads = len(token), 0, 2 if len(rows) else 1
    while 1 << levels < leaves:
        levels += 1
    touched, from_net = np.uint32(0), np.float32(0)
    (keys, candidate_keys, hashes, candidate_hashes, slot, found, said, sets, lines, x, products,
     mixed, p, cost, refined, mass) = scratch(heads, leaves)  # fmt: skip
    for i in range(len(tokens)):
        context_keys(slot_rows, history, now, words, bos, keys)
        context_keys(candidate_rows, history, now, words, bos, candidate_keys)
        touched += touch(candidates, candidate_rows, candidate_keys, 0, candidate_hashes, found)
        before, before_2 = recent(history, now, 1, bos), recent(history, now, 2, bos)
        age = document_age(now)
        foretold = leaf[history[now[MATCH_AT]]] | leaves if now[MATCH_LENGTH] else np.int64(-1)
        if heads == 2:
            sum_tree(leaf, rows[i], mass)
        node, at, target = 1, 1, leaf[tokens[i]] if mode != DECODE else 0
        cost[:] = 0
        for level in range(levels):
            if level % LEVELS == 0:
                touched += touch(slots, slot_rows, keys, node, hashes, slot)
                if level == 0:
                    find(candidates, candidate_hashes, found, 0xFFFF, 0)
                find(slots, hashes, slot, 15, UNSEEN)
                at = 1
            if inside[2 * node + 1] == 0:  # no token there: nothing to decide
                node, at = 2 * node, 2 * at
                continue
            seen = slot_inputs(slots, maps, slot, at, level, levels, x, said)
            candidate_inputs(candidates, maps, found, node, level, levels, x, said)
            match_input(maps, foretold, now[MATCH_LENGTH], node, level, levels, x, said)
            choose_sets(slots, slot, at, node, level, levels, seen, before, before_2, age, sets)
            apm_rows(apm[0], node, before, leaves, lines)
            if heads == 2:
                from_net = net_logit(mass, node)
            predict(weights, apm, sets, lines, x, from_net, products, mixed, refined, p)
            bit = target >> (levels - level - 1) & 1
            if mode != SCORE:
                bit = code_bit(coder, buffer, mode, p[heads - 1], bit)
            for h in range(heads):
                cost[h] -= math.log((p[h] if bit else 65536 - p[h]) / 65536)
            # Everything below learns from the bit, which is coded by now.
            learn_heads(weights, visits, apm, sets, x, from_net, mixed, refined, bit)
            learn_maps(maps, said, bit)
            dice = ((now[TOKENS] * 16 + level) * 0x9E3779B1 >> 12) & 0xFFFF
            learn_slots(slots, slot, at, bit, dice)
            node, at = 2 * node + bit, 2 * at + bit
        if mode == DECODE:
            tokens[i] = token[node - leaves]
        nats[i, 0], nats[i, 1] = cost[0], cost[heads - 1]
        remember(candidates, found, leaf[tokens[i]], tokens[i], starts, history, now, words, bos)
        follow_match(history, now, repeats, tokens[i])
    return touched


def join_net(state: Mixer) -> None:
    """Let the net in: the head that hears it starts as a copy of the other."""
    for table in (state.weights, state.visits, state.apm):
        table[1] = table[0]
    state.weights[1] *= OTHERS
    state.weights[1, :, NET] = NET_WEIGHT / SETS
    state.now[JOINED] = 1


def token_tree(text: Any, vocab: int) -> Any:
    """Leaf of each token in a balanced binary tree: alike tokens lie close. (V,) int64.

    Tokens are alike if the same tokens come before and after them, as counted in `text`. A node's
    tokens are halved by their first principal component, then by balanced 2-means.
    """
    frequency = np.bincount(text, minlength=vocab).astype(np.float64)
    column, common = np.full(vocab, min(vocab, 1024) - 1), np.argsort(-frequency, kind="stable")
    column[common[:1024]] = np.arange(min(vocab, 1024))
    width, text = min(vocab, 1024), text.astype(np.int64)

    def root_shares(here: Any, there: Any) -> Any:
        pairs = np.bincount(here * width + column[there], minlength=vocab * width)
        pairs = pairs.reshape(vocab, width).astype(np.float32)
        return np.sqrt(pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1))

    x = np.hstack([root_shares(text[1:], text[:-1]), 0.7 * root_shares(text[:-1], text[1:])])
    share = (frequency / max(frequency.sum(), 1))[:, None]
    x -= (x * share).sum(axis=0)
    _, vectors = np.linalg.eigh((x * share).T @ x)
    x, weight = x @ vectors[:, -60:], np.sqrt(frequency + 1)[:, None]
    nodes, leaf = [np.arange(vocab)], np.zeros(vocab, np.int64)
    for _ in range(max(vocab - 1, 1).bit_length()):
        nodes = [half for node in nodes for half in halves(node, x[node], weight[node])]
    for i, node in enumerate(nodes):
        leaf[node] = i
    return leaf


def halves(node: Any, x: Any, weight: Any) -> tuple[Any, Any]:
    """Tokens (n,) with features x (n, K) -> two halves of like ones, the larger first."""
    if len(node) < 2:
        return node, node[:0]
    centred, half = x - (x * weight).sum(axis=0) / weight.sum(), (len(node) + 1) // 2
    key = centred @ np.linalg.eigh((centred * weight).T @ centred)[1][:, -1]
    for _ in range(10):
        order = np.argsort(key, kind="stable")
        a, b = order[:half], order[half:]
        near, far = ((x[i] * weight[i]).sum(axis=0) / weight[i].sum() for i in (a, b))
        key = ((x - near) ** 2).sum(axis=1) - ((x - far) ** 2).sum(axis=1)
        if (np.argsort(key, kind="stable") == order).all():
            break
    return node[a], node[b]


def context_rows(contexts: tuple[Context, ...], regions: tuple[tuple[int, int], ...]) -> Any:
    """Contexts -> (n, 5) int64 for the kernel; regions: (first row, rows) for others, documents."""
    rows = [(c.tokens, c.words, c.document, *regions[c.document]) for c in contexts]
    return np.array(rows, np.int64)


def new_maps(levels: int) -> Any:
    """Cells of what experts say, as if it were true: slots', candidates', the match's."""
    grid = cells(SQUASH[3072 + (np.arange(32) * 2 - 31) * 64])
    evidence = np.array([0, 10, 20, 30, 40, 55, 80, 130, 220, 400])
    odds = (evidence + 4) * 65536 // (evidence[:, None] + evidence + 8)
    return np.concatenate([
        np.tile(grid, SLOTS * levels * 16),
        np.tile(np.repeat(cells(odds).reshape(-1), 2), CANDIDATES * levels),
        np.tile(cells([16384, 49152]), levels * 64),
    ])  # fmt: skip


def new_mixer(tokens: Tokenizer, leaf: Any, capacity: int, memory_mb: int) -> Mixer:
    """An empty mixer for `capacity` tokens of history; its tables take about `memory_mb` MiB."""
    unit, leaves = memory_mb << 20, 1 << max(tokens.vocab - 1, 1).bit_length()
    levels = leaves.bit_length() - 1
    slots, found = unit // 16 * 15 // 16 // WAYS * WAYS, unit // 16 // 32 // WAYS * WAYS
    local = min(1 << 19, slots // 8 // WAYS * WAYS)
    token = np.full(leaves, -1, np.int64)
    token[leaf] = np.arange(tokens.vocab)
    inside = np.concatenate([np.zeros(leaves, np.int64), token >= 0])
    for node in range(leaves - 1, 0, -1):
        inside[node] = inside[2 * node] + inside[2 * node + 1]
    apm = cells(SQUASH[3072 + (np.arange(33) - 16) * 128])
    set_rows = 18 * leaves + levels * (SLOTS + 1) + 8 ** len(COUNTED)
    return Mixer(
        slot_rows=context_rows(SLOT_CONTEXTS, ((local, slots - local), (0, local))),
        candidate_rows=context_rows(CANDIDATE_CONTEXTS, ((0, found), (0, found))),
        leaf=leaf, token=token, inside=inside, starts=tokens.leading,
        slots=huge_zeros(8 * slots, np.uint16).reshape(-1, 8),
        candidates=huge_zeros(8 * found, np.uint32).reshape(-1, 8),
        maps=new_maps(levels),
        weights=np.full((2, set_rows, WIDTH), 0.15 / SETS, np.float32),
        visits=np.zeros((2, set_rows), np.float32),
        apm=np.tile(apm, (2, leaves + min(1 << 14, unit // 1024))),
        repeats=np.zeros(min(1 << 24, 1 << max(unit // 128, 64).bit_length()), np.int32),
        history=np.zeros(capacity, np.int32), now=np.zeros(5, np.int64),
        words=np.full(2, 1 << 50, np.uint64),
    )  # fmt: skip


class Coder:
    """An arithmetic code being written, or with `data` being read."""

    def __init__(self, data: bytes | None = None) -> None:
        self.mode, self.out = ENCODE if data is None else DECODE, bytearray()
        self.buffer = np.frombuffer(bytearray(data or b""), np.uint8)
        window = int.from_bytes((data or b"")[:4].ljust(4, b"\0"), "big")
        self.state = np.array([0, 0xFFFFFFFF, window, 4 if data is not None else 0], np.uint64)

    def room(self, decisions: int) -> Any:
        """The buffer for so many more decisions, of at most 2 bytes each."""
        if self.mode == ENCODE:
            self.buffer, self.state[3] = np.zeros(2 * decisions + 8, np.uint8), 0
        return self.buffer

    def flush(self) -> None:
        """Take what a call has written."""
        if self.mode == ENCODE:
            self.out += self.buffer[: int(self.state[3])].tobytes()

    def finish(self) -> bytes:
        """The whole code. Its last byte, with zeros behind it, lies inside the final interval."""
        return bytes(self.out) + bytes([int(self.state[1]) >> 24])


class LogisticMixer(ContextModel):
    """The token-bit logistic mixer: experts over exact and hashed contexts, mixed bit by bit.

    After Mahoney's PAQ and lpaq: adaptive probabilities, gated logistic mixing, APM stages. It
    learns from each token after coding it, whether it scores, encodes or decodes.
    """

    def __init__(self, tokens: Tokenizer, leaf: Any, capacity: int, memory_mb: int) -> None:
        """leaf (V,): see `token_tree`; capacity: tokens that it will ever see."""
        self.state, self.bos = new_mixer(tokens, leaf, capacity + 1, memory_mb), max(tokens.bos, 0)
        self.vocab = tokens.vocab
        if self.bos >= self.vocab:
            raise ValueError(f"BOS {self.bos} outside the vocabulary of {self.vocab}")

    def code(self, tokens: Any, logs: Any = None, coder: Coder | None = None) -> Any:
        """Score tokens (m,), or with a coder write them or read them into `tokens` (int64).

        logs (m, V) float32: the net's, if it takes part. Returns (m, 2) float64 nats a token, by
        the contexts alone and by all.
        """
        if logs is not None and logs.shape != (len(tokens), self.vocab):
            raise ValueError(f"{logs.shape} log-probabilities for {len(tokens)} tokens")
        if self.state.now[TOKENS] + len(tokens) > len(self.state.history):
            raise ValueError(f"more than the {len(self.state.history)} tokens announced")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab:
            raise ValueError(f"a token outside the vocabulary of {self.vocab}")
        rows = np.zeros((0, self.vocab), np.uint32)
        if logs is not None:
            if not self.state.now[JOINED]:
                join_net(self.state)
            rows = (np.exp(np.minimum(logs, 0)) * np.float32(1 << 30)).astype(np.uint32)
        coder, scoring = coder or Coder(), coder is None
        nats = np.zeros((len(tokens), 2))
        buffer = coder.room(0 if scoring else len(tokens) * 17)
        mode = SCORE if scoring else coder.mode
        code_tokens(tuple(self.state), tokens, rows, self.bos, mode, coder.state, buffer, nats)
        coder.flush()
        return nats

    def begin(self, first: int) -> None:
        """Read the text's first token, which is not scored."""
        self.code(np.array([first], np.int64))

    def score(self, tokens: Any, logs: Any) -> Any:
        """Tokens (m,) int32, the net's logs (m, V) float32 -> (m, 3) nats: net, contexts, mixed."""
        nats = self.code(tokens.astype(np.int64), logs)
        return np.column_stack([net_nats(tokens, logs), nats])

    @property
    def learned(self) -> int:
        """Tokens learned so far."""
        return int(self.state.now[TOKENS])

    def read_sha256(self) -> str:
        """SHA-256 of all tokens so far, as little-endian int32."""
        return hashlib.sha256(self.state.history[: self.learned].astype("<i4")).hexdigest()

    def save(self) -> Mixer:
        """A copy of the state."""
        return Mixer(*(array.copy() for array in self.state))

    def restore(self, state: Mixer) -> None:
        """Go back to a copy, which stays good."""
        for mine, its in zip(self.state, state, strict=True):
            np.copyto(mine, its)


def new_context_model(
    cfg: Knobs, tokens: Tokenizer, leaf: Any, capacity: int, memory_mb: int = 0
) -> ContextModel:
    """MIXER's scorer for `capacity` tokens, which has seen nothing yet."""
    if cfg.mixer == "off":
        return ContextModel()
    if cfg.mixer == "backoff":
        alpha = None if cfg.ngram_alpha == "auto" else float(cfg.ngram_alpha)
        order, smoothing = cfg.ngram_max_order, cfg.ngram_smoothing
        return BackoffMixer(tokens.vocab, max(tokens.bos, 0), order, smoothing, alpha, capacity)
    return LogisticMixer(tokens, leaf, capacity, memory_mb or cfg.mixer_memory_mb)


# ==================================================================================================
# PACKING: training text, paid for in the artifact; coding it primes the mixer that codes it
# ==================================================================================================

PACK_CHUNK = 1 << 14  # tokens a call of the kernel
CONSIDERED_TOKENS = 40_000_000  # of the training text; about 25 M fill an artifact
SAMPLE_TOKENS = 1 << 17  # coded alone, they cost more a token than among many
PACK_TOKENS_A_SECOND = 60_000  # at the least, for planning


def rank_documents(text: Any, vocab: int, bos: int, budget: int) -> Iterator[Any]:
    """Documents worth most, until they have `budget` tokens: (start, end) of each, best first.

    Greedily brings the token pairs of the chosen documents close to those of all the text: a
    document's worth is the mean, over its pairs, of their share in the text over their share in
    what is chosen, weighed anew when that has doubled, or grown by a sixteenth of the budget. Only
    the training text is looked at.
    """
    starts = np.flatnonzero(text == bos)
    if len(starts) == 0 or starts[0] != 0:
        starts = np.concatenate([[0], starts])
    ends = np.append(starts[1:], len(text))
    pairs = np.zeros(len(text), np.uint16)
    wide = text.astype(np.uint32)
    pairs[1:] = (wide[:-1] * np.uint32(vocab) + wide[1:]) * np.uint32(0x9E3779B1) >> 16
    share = np.bincount(pairs, minlength=1 << 16) / len(text)
    taken, free, total = np.zeros(1 << 16), np.ones(len(starts), bool), 0
    while free.any() and total < budget:
        have = (taken + 100 * share) / (total + 100)
        worth = np.add.reduceat((share / np.maximum(have, 1e-12))[pairs], starts) / (ends - starts)
        order = np.argsort(np.where(free, -worth, np.inf), kind="stable")[: free.sum()]
        size = np.cumsum((ends - starts)[order])
        batch = order[: max(int(np.searchsorted(size, min(budget / 16, total))), 1)]
        for i in batch:
            if total >= budget:
                return
            yield int(starts[i]), int(ends[i])
            total += int(ends[i] - starts[i])
            taken += np.bincount(pairs[starts[i] : ends[i]], minlength=1 << 16)
        free[batch] = False


def token_bytes(text: Any, budget: int, tokens: Tokenizer, leaf: Any) -> float:
    """Code bytes a token, at the most, of `budget` bytes: what a sample (n,) costs, and a tenth."""
    mixer, coder, count = LogisticMixer(tokens, leaf, len(text), 64), Coder(), 0
    while count < len(text) and len(coder.out) < budget:
        part = text[count : count + 1024].astype(np.int64)
        mixer.code(part, None, coder)
        count += len(part)
    return 1.1 * (len(coder.out) + 1) / (count + 1)


class Packer:
    """Codes training text beside the training, in a thread that owns one core while it lasts."""

    def __init__(
        self, data: TrainWindows, tokens: Tokenizer, cfg: Knobs, budget: int, workers: Workers
    ) -> None:
        self.tokens, self.cfg, self.budget, self.workers = tokens, cfg, budget, workers
        self.data, self.seconds, self.error = data, 0.0, None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.mixer: LogisticMixer | None = None
        self.code, self.count, self.leaf = Coder(), 0, np.arange(tokens.vocab)
        LogisticMixer(tokens, self.leaf, 1, 1).begin(0)  # compiled before the clock starts

    def start(self, spent_s: float) -> None:
        """Begin, `spent_s` after MAX_WALLCLOCK_SECONDS started.

        Without such a clock it ends here, so that what the contexts foresee, and with it the run's
        every bit, does not depend on how fast packing goes beside training.
        """
        self.begin = time.perf_counter()
        self.deadline = self.begin + (self.cfg.max_wallclock_seconds or math.inf) - spent_s
        self.workers.reserved = 1
        self.thread.start()
        if not self.cfg.max_wallclock_seconds:
            self.wait()

    def run(self) -> None:
        """The thread's work; what goes wrong is kept for `wait`."""
        try:
            self.pack()
        except Exception as error:
            self.error = error
        finally:
            self.workers.reserved = 0
            self.seconds = time.perf_counter() - self.begin

    def time_left(self) -> float:
        """Seconds until the clock of the run ends."""
        return self.deadline - time.perf_counter()

    def pack(self) -> None:
        """Code documents until bytes or time run out, most of them in one batch, the best last."""
        parts, left = [], CONSIDERED_TOKENS
        for shard in self.data.shards:
            parts.append(check_ids(shard[:left], self.tokens.vocab, "training text"))
            left -= len(parts[-1])
        text = np.concatenate(parts)
        if self.cfg.complement_by == "contexts" and self.cfg.complement_alpha:
            self.data.foreseen = np.zeros(len(text), np.float16)
        self.leaf = token_tree(text[:2_000_000], self.tokens.vocab)
        at_most = max(self.time_left(), 0) * 4 * PACK_TOKENS_A_SECOND
        most = min(self.budget / 0.3, at_most, len(text))
        self.capacity = int(most) + (1 << 20)
        room = self.capacity + MESSAGE_TOKENS + 1
        self.mixer = LogisticMixer(self.tokens, self.leaf, room, self.cfg.mixer_memory_mb)
        documents = rank_documents(text, self.tokens.vocab, self.tokens.bos, int(most))
        rate = token_bytes(text[:SAMPLE_TOKENS], self.budget, self.tokens, self.leaf)
        while self.budget - len(self.code.out) > 1000 and self.time_left() > 1:
            plan = min((self.budget - len(self.code.out)) / rate,
                       self.time_left() * PACK_TOKENS_A_SECOND)  # fmt: skip
            batch, size = [], 0
            while size < plan and (span := next(documents, None)):
                batch.append(np.arange(*span))
                size += len(batch[-1])
            if not batch:
                break
            self.code_batch(text, np.concatenate(batch[::-1]))
            rate = 1.1 * len(self.code.out) / max(self.count, 1)

    def code_batch(self, text: Any, places: Any) -> None:
        """Code the tokens of these places in chunks, as long as bytes and time are left."""
        while len(places) and self.time_left() > 0:
            room = self.budget - len(self.code.out) - 8  # 3 bytes a token: more than text takes
            size = min(PACK_CHUNK, room // 3, self.capacity - self.count)
            if size <= 0:
                return
            part, places = places[:size], places[size:]
            nats = self.mixer.code(text[part].astype(np.int64), None, self.code)[:, 0]
            if len(self.data.foreseen):
                self.data.foreseen[part] = np.maximum(np.exp(-nats), 1e-7)  # 0: not known
            self.count += len(part)

    def wait(self) -> None:
        """Wait for the thread; raises what went wrong in it."""
        self.thread.join()
        if self.error:
            raise self.error

    def finish(self) -> PackedText:
        """What is packed, once all is."""
        self.wait()
        digest = self.mixer.read_sha256()
        return PackedText(self.leaf, self.count, digest, self.code.finish())


def unpack(mixer: LogisticMixer, packed: PackedText, label: str) -> None:
    """Prime a mixer by decoding an artifact's text. Raises AuditFailed if it is not that text."""
    coder, show = Coder(packed.code), show_progress(label)
    for at in range(0, packed.token_count, PACK_CHUNK):
        size = min(PACK_CHUNK, packed.token_count - at)
        mixer.code(np.zeros(size, np.int64), None, coder)
        show(at + size, packed.token_count, "")
    if mixer.read_sha256() != packed.sha256:
        raise AuditFailed("paid text", "it does not decode to the text that was packed")


# ==================================================================================================
# EVALUATION: each position scored exactly once
# ==================================================================================================


def windows(targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, last): input starts at `start`, targets first..last-1 are scored by it.

    Targets are numbered from 0; target i is token i + 1 and follows input i. Each is scored once,
    in order, with at least seq_len - stride tokens before it wherever the text has them.
    """
    yield 0, 0, min(seq_len, targets)
    for first in range(seq_len, targets, stride):
        yield first + stride - seq_len, first, min(first + stride, targets)


def net_stream(
    model: GPT, params: Arrays, text: Any, shape: tuple[int, int, int], workers: Workers
) -> Iterator[tuple[int, Any]]:
    """The net's log-distributions of the text's targets, in text order.

    text (n,) int32; shape: tokens a window, stride, windows a batch. Yields (first target, (m, V)
    float32 NumPy nats); the parts cover targets 0 .. n-2 once. A context model takes its place as a
    stage that consumes this stream and yields its own. Every batch has the same shape (the text's
    end is padded on the right, where a causal net does not look), and only scored positions reach
    the vocabulary head.
    """
    mx.eval(params)  # here, as the stream may be taken from by another thread
    model.update(tree_unflatten(list(params.items())))
    return batches_of_rows(model, text, shape, workers)


def batches_of_rows(
    model: GPT, text: Any, shape: tuple[int, int, int], workers: Workers
) -> Iterator[tuple[int, Any]]:
    """`net_stream`'s parts, by the model's own parameters."""
    seq_len, stride, batch = shape
    forward = model.logits if on_cpu() else mx.compile(model.logits, inputs=model.state)
    padded = np.concatenate([text, np.full(seq_len + stride, max(model.bos, 0), np.int32)])
    (_, _, end), *rest = windows(len(text) - 1, seq_len, stride)
    yield 0, first_window(model, padded[:seq_len], workers)[:end]  # a decoder repeats it
    batch = min(batch, max(len(rest), 1))
    for at in range(0, len(rest), batch):
        group = rest[at : at + batch]
        rows = np.stack([padded[s : s + seq_len] for s, _, _ in group])
        rows = np.pad(rows, [(0, batch - len(rows)), (0, 0)])
        shares = np.array_split(rows, min(workers.count, batch))
        parts = workers.map(forward, [(mx.array(share), stride) for share in shares])
        out = log_softmax(np.concatenate([np.array(p) for p in parts]))
        for (_, first, end), logs in zip(group, out, strict=False):
            yield first, logs[: end - first]


def ahead(parts: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The same parts, each made while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        try:
            coming = pool.submit(next, parts, None)
            while part := coming.result():
                coming = pool.submit(next, parts, None)
                yield part
        finally:
            pool.submit(mx.clear_streams)  # a stream ends in the thread that made it


def first_window(model: GPT, inputs: Any, workers: Workers) -> Any:
    """The net's log-distributions after each of a window's inputs (T,), alone: (T, V) float32.

    A row is a function of the inputs up to its own, whatever follows, to the bit.
    """
    parts = workers.map(model.logits, [(mx.array(inputs[None]), len(inputs))])
    return log_softmax(np.array(parts[0])[0])


def log_softmax(logits: Any) -> Any:
    """(..., V) float32 -> log-probabilities in nats, float32, whose sum is 1 within 1e-6.

    MLX's sum of a row, in float32, is off by up to 5e-6: a score that no decoder could reach.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)
    return (logits - np.log(total)).astype(np.float32)


def bits_per_byte(nats: float, byte_count: int) -> float:
    """Code length in nats over the decoded text's UTF-8 length -> bits per byte."""
    return nats / math.log(2) / byte_count


def costs(
    stream: Iterator[tuple[int, Any]], text: Any, scorer: ContextModel, done: int = 0
) -> Iterator[tuple[int, Any]]:
    """Stages of the production score: the net's stream -> (first target, (m, 3) nats).

    The columns: the net alone, the context models alone, all together. The scorer, which has begun
    with the text's first token, learns from each token after it is scored; its first `done` targets
    are scored already.
    """
    for first, logs in stream:
        logs, first = logs[max(done - first, 0) :], max(first, done)
        if len(logs):
            yield first, scorer.score(text[first + 1 : first + 1 + len(logs)], logs)


def covering(parts: Iterator[tuple[int, Any]], targets: int) -> Iterator[tuple[int, Any]]:
    """The same parts. Raises AuditFailed unless they cover every target once, in order."""
    done = 0
    for first, part in parts:
        if first != done:
            raise AuditFailed("coverage", f"target {done} was due, but {first} was scored")
        yield first, part
        done += len(part)
    if done != targets:
        raise AuditFailed("coverage", f"scored {done} of {targets} targets")


def score(
    parts: Iterator[tuple[int, Any]], text: Any, tokens: Tokenizer, show: Progress
) -> dict[str, Any]:
    """Add up costs; returns loss (nats/token), BPB of all, net and contexts, and the counts."""
    nats, byte_count, end = np.zeros(3), 0, 0
    for first, part in covering(parts, len(text) - 1):
        nats, end = nats + part.sum(axis=0), first + len(part)
        byte_count += int(tokens.bytes_of(text[first:end], text[first + 1 : end + 1]).sum())
        bpb = bits_per_byte(float(nats[2]), max(byte_count, 1))
        show(end, len(text) - 1, f"bpb {bpb:.4f}, ")
    if not (byte_count and np.isfinite(nats).all()):
        raise RunFailed(f"no score: {nats} nats over {byte_count} bytes of validation text")
    net, contexts, bpb = (bits_per_byte(float(n), byte_count) for n in nats)
    return {"val_loss": float(nats[2]) / end, "val_bpb": bpb, "val_bpb_net": net,
            "val_bpb_context": contexts, "val_tokens": end, "val_bytes": byte_count}  # fmt: skip


# ==================================================================================================
# AUDIT: what makes the score true, checked through the code that makes it
# ==================================================================================================

MESSAGE_TOKENS = 256
AUDIT_MEMORY_MB = 2
MANY_TOKENS = 4096  # with a larger vocabulary, all of it is tried in one excerpt only
BYTES_CHECKED = 2_000_000  # tokens that are decoded to count their bytes


class Message(NamedTuple):
    """The validation text's first tokens as an arithmetic code."""

    code: bytes
    bits: float  # as claimed by the encoder's score
    tokens: int


def encode_message(
    mixer: LogisticMixer, model: GPT, text: Any, seq_len: int, workers: Workers
) -> Message:
    """Encode with a primed mixer, which is used up by it."""
    count, coder = min(MESSAGE_TOKENS, seq_len, len(text) - 1), Coder()  # of the first window
    inputs = np.pad(text[: seq_len + 1], (0, max(seq_len - len(text), 0)))[:seq_len]
    logs = first_window(model, inputs, workers)[:count]
    mixer.begin(int(text[0]))
    nats = mixer.code(text[1 : count + 1].astype(np.int64), logs, coder)
    return Message(coder.finish(), float(nats[:, 1].sum()) / math.log(2), count)


def decode_message(
    message: Message, mixer: LogisticMixer, model: GPT, first: int, seq_len: int, workers: Workers
) -> tuple[Any, Any]:
    """Decode token by token, running the net on what is decoded: (tokens (m,), (m, 3) nats)."""
    inputs, coder = np.full(seq_len, first, np.int32), Coder(message.code)
    mixer.begin(first)
    nats, tokens = np.zeros((message.tokens, 3)), np.zeros(message.tokens, np.int64)
    for i in range(message.tokens):
        logs = first_window(model, inputs, workers)[i : i + 1]
        nats[i, 1:] = mixer.code(tokens[i : i + 1], logs, coder)[0]
        nats[i, 0] = -logs[0, tokens[i]]
        inputs[i + 1 : i + 2] = tokens[i]
    return tokens, nats


def check_message(message: Message, tokens: Any, nats: Any, text: Any) -> str:
    """The decoded tokens must be the text's, at the claimed length; returns a line that says so."""
    wrong = np.flatnonzero(tokens != text[1 : len(tokens) + 1])
    if len(wrong):
        raise AuditFailed("message", f"decoded token {wrong[0]} is not the text's")
    claimed, size = float(nats[:, 2].sum()) / math.log(2), 8 * len(message.code)
    for bits in (claimed, message.bits):
        if abs(size - bits) > 0.01 * bits + 16:
            raise AuditFailed("message", f"{size} bits for a claim of {bits:.1f}")
    return f"{message.tokens} tokens decoded from {size // 8} bytes, {claimed / 8:.1f} claimed"


@dataclass
class Audit:
    """Checks of the production score on excerpts, from an unprimed state."""

    cfg: Knobs
    artifact: Artifact
    model: GPT
    workers: Workers

    def trace(self, text: Any) -> tuple[Any, Any]:
        """Score an excerpt: (n - 1, 3) nats and the net's rows, (n - 1, V)."""
        shape = (*eval_shape(self.cfg, self.cfg.eval_mode), 2)
        parts = list(ahead(net_stream(self.model, self.artifact.params, text, shape, self.workers)))
        scorer = self.scorer(len(text))
        scorer.begin(int(text[0]))
        nats = [part for _, part in covering(costs(parts, text, scorer), len(text) - 1)]
        return np.concatenate(nats), np.concatenate([logs for _, logs in parts])

    def scorer(self, capacity: int) -> ContextModel:
        """A small one that has seen nothing."""
        leaf = self.artifact.packed.leaf if self.artifact.packed else None
        return new_context_model(self.cfg, self.artifact.tokens, leaf, capacity, AUDIT_MEMORY_MB)

    def causal(self, text: Any, trace: tuple[Any, Any], at: int, rng: Any) -> None:
        """Replace target `at` and what follows: nothing before, no distribution at it, moves."""
        (nats, rows), other = trace, text.copy()
        other[at + 1 :] = rng.integers(0, self.artifact.tokens.vocab, len(text) - at - 1)
        other[at + 1] = (text[at + 1] + 1) % self.artifact.tokens.vocab
        nats_2, rows_2 = self.trace(other)
        if (nats[:at] != nats_2[:at]).any():
            first = np.flatnonzero((nats[:at] != nats_2[:at]).any(axis=1))[0]
            raise AuditFailed("causality", f"the score of target {first} depends on target {at}")
        if (rows[: at + 1] != rows_2[: at + 1]).any():
            raise AuditFailed("causality", f"the net's row at {at} depends on what follows")

    def normalised(self, text: Any, trace: tuple[Any, Any], at: int) -> None:
        """Put every token in the place of target `at`: the scores sum to 1."""
        nats, rows = trace
        scorer = self.scorer(len(text) + 1)
        scorer.begin(int(text[0]))
        before = scorer.score(text[1 : at + 1], rows[:at])
        if (before != nats[:at]).any():
            raise AuditFailed("causality", f"scores before {at} depend on how the text is cut")
        state, vocab = scorer.save(), self.artifact.tokens.vocab
        out = np.zeros((vocab, 3))
        for v in range(vocab):
            out[v] = scorer.score(np.array([v], np.int32), rows[at : at + 1])[0]
            scorer.restore(state)
        if (out[text[at + 1]] != nats[at]).any():
            raise AuditFailed("normalisation", f"target {at} has two scores")
        for column, name in enumerate(("net", "context", "mixed")):
            total = float(np.exp(-out[:, column]).sum())
            if not (np.isfinite(out[:, column]).all() and abs(total - 1) <= 1e-6):
                raise AuditFailed("normalisation", f"{name} probabilities at {at} sum to {total}")

    def excerpts(self, text: Any, seed: int) -> str:
        """Causality and normalisation at a document's start, at random places and at the tail."""
        rng = np.random.default_rng(seed)
        length, stride = eval_shape(self.cfg, self.cfg.eval_mode)
        size = min(length + stride + stride // 2 + 2, len(text))  # a window, then a batch of two
        starts = np.flatnonzero(text[1:] == self.artifact.tokens.bos) + 1
        begins = [max(int(rng.choice(starts)) - 8, 0) if len(starts) else 0,
                  int(rng.integers(0, len(text))), len(text) - size]  # fmt: skip
        begins, sums = [min(begin, len(text) - size) for begin in begins], 0
        for begin in begins:
            excerpt = text[begin : begin + size]
            trace, last = self.trace(excerpt), len(excerpt) - 2
            for at in {min(7, last), min(length, last), int(rng.integers(0, last + 1)), last}:
                self.causal(excerpt, trace, at, rng)
            if begin == begins[0] or self.artifact.tokens.vocab <= MANY_TOKENS:
                self.normalised(excerpt, trace, int(rng.integers(0, last + 1)) if sums else last)
                sums += 1
        return f"causal in {len(begins)}, normalised in {sums} excerpts of {size} tokens"

    def byte_count(self, text: Any, tokenizer: Path | None) -> str:
        """The byte table against the UTF-8 length of the decoded text."""
        if tokenizer is None:
            return "bytes not checked: that needs TOKENIZER_PATH"
        import sentencepiece

        tokens, text = self.artifact.tokens, text[:BYTES_CHECKED]
        if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != tokens.sha256:
            raise UserError(f"TOKENIZER_PATH={tokenizer}: the artifact was made with another one")
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        while len(text) > 1 and model.is_byte(int(text[-1])):  # a cut may have split a character
            text = text[:-1]
        parts = np.split(text, np.flatnonzero(text == tokens.bos))
        true = sum(len(model.decode(part.tolist()).encode()) for part in parts if len(part))
        prefix = tokens.dummy_prefix and tokens.leading[text[0]]
        start = int(tokens.piece_bytes[text[0]]) - int(prefix)
        count = start + int(tokens.bytes_of(text[:-1], text[1:]).sum())
        if count != true:
            raise AuditFailed("bytes", f"the table gives {count}, the decoded text has {true}")
        return f"{true} bytes, as the first {len(text)} tokens have when they are decoded"


# ==================================================================================================
# MODES
# ==================================================================================================


@dataclass
class Validation:
    """The validation text and how to score a set of weights on it."""

    cfg: Knobs
    model: GPT
    tokens: Tokenizer
    folder: Path  # of the shards
    workers: Workers

    def __post_init__(self) -> None:
        paths = find_shards(self.folder, "val")
        self.shards, manifest = len(paths), self.folder / "manifest.json"
        made_by = read_manifest(manifest).get("tokenizer_sha256", self.tokens.sha256)
        if made_by != self.tokens.sha256:
            raise UserError(f"{manifest}: these shards were made by another tokenizer: choose the "
                            "DATA_PATH and TOKENIZER_PATH that belong together")  # fmt: skip
        self.text, self.whole = load_validation(paths, self.tokens, self.cfg.val_max_tokens)
        self.part = "" if self.whole else " (PART of the text)"

    def run(
        self, params: Arrays, mode: str, batch: int, scorer: ContextModel, scored: Any = ()
    ) -> Event:
        """Score in 'standard' (stride = window) or 'sliding' mode, `batch` windows at once.

        scored: parts that `costs` would yield first, if they are known already.
        """
        done = sum(len(part) for _, part in scored)
        begin, shape = time.perf_counter(), (*eval_shape(self.cfg, mode), batch)
        stream = net_stream(self.model, params, self.text, shape, self.workers)
        parts = costs(ahead(stream), self.text, scorer, done)
        show = show_progress(f"eval {mode}{self.part}")
        result = score(itertools.chain(scored, parts), self.text, self.tokens, show)
        seconds = time.perf_counter() - begin
        return {"mode": mode, **result, "val_whole": self.whole, "eval_time_ms": 1000 * seconds}

    def check_whole(self) -> None:
        """The label must fit what the shards hold."""
        total = sum(len(open_shard(path)) for path in find_shards(self.folder, "val"))
        if self.whole != (len(self.text) == total):
            raise AuditFailed("whole text", f"{len(self.text)} of {total} tokens are called whole")

    def during_training(self, trainer: Trainer) -> None:
        """Score and log the averaged weights, at stride = window."""
        batch = max(self.cfg.val_batch_size // eval_length(self.cfg), 1)
        result = self.run(trainer.average, "standard", batch, ContextModel())
        trainer.report.event({"event": "val", "step": trainer.step, **result}, VAL_LINE)


def gigaflops(workers: Workers) -> float:
    """GFLOP/s of a 768-cube float32 matrix product in each worker at once."""
    a = mx.random.normal((768, 768))
    mx.eval(a)
    for _ in range(2):  # the first touches memory
        begin = time.perf_counter()
        workers.map(mx.matmul, [(a, a)] * workers.count)
    return workers.count * 2 * 768**3 / (time.perf_counter() - begin) / 1e9


def describe_machine(cfg: Knobs, workers: Workers, ranks: Ranks) -> Event:
    """Facts of the machine for the config event."""
    machine = f"{platform.system()} {platform.machine()} {'cpu' if on_cpu() else 'gpu'}"
    return {
        "machine": machine, "mlx_version": mx.__version__, "dtype_used": compute_dtype(cfg),
        "blas_used": BLAS_NAME if on_cpu() else "not used", "workers_used": workers.count,
        "ranks": ranks.count, "gflops": gigaflops(workers),
    }  # fmt: skip


def describe_training(trainer: Trainer, validation: Validation) -> Iterator[str]:
    """Lines: parameters by group, the data, the artifact's size by estimate."""
    cfg, data = trainer.cfg, trainer.data
    yield f"parameters: {sum(p.size for p in trainer.params.values()):,}"
    for group in GROUPS:
        sizes = [p.size for n, p in trainer.params.items() if trainer.groups[n] is group]
        bits = f"{getattr(cfg, group.bits)} bits" if group.bits else "float32"
        if sizes:
            yield (f"  {group.name}: {len(sizes)} tensors, {sum(sizes):,} parameters, "
                   f"{group.optimizer}, lr {getattr(cfg, group.lr)}, stored in {bits}")  # fmt: skip
    size = estimate_bytes(trainer.params, trainer.groups, cfg)
    yield f"train: {data.tokens:,} tokens in {len(data.shards)} shard(s)"
    yield (f"validation: {len(validation.text):,} tokens in {validation.shards} shard(s)"
           f"{validation.part}")  # fmt: skip
    yield f"script and artifact: about {size:,} of {ARTIFACT_LIMIT_BYTES:,} bytes, by estimate"
    pieces = [piece.stop - piece.start for piece in trainer.rounds[0]]
    use = estimate_memory(trainer.params, cfg, pieces, len(validation.text))
    limit = memory_limit()
    most = max(use["net"] + use["mixer"], 2 * use["mixer"])  # two processes prime a mixer each
    yield (f"memory: about {use['net'] / 1e9:.1f} GB for the net's training, "
           f"{use['mixer'] / 1e9:.1f} for a mixer, by estimate, of {limit / 1e9:.1f}")  # fmt: skip
    if most > limit:
        yield "warning: memory may not suffice: lower MLX_MAX_MICROBATCH_TOKENS or MIXER_MEMORY_MB"


def train_and_export(
    cfg: Knobs, folder: Path, tokenizer: Path, report: Report, workers: Workers, ranks: Ranks
) -> tuple[Event, LogisticMixer | None]:
    """Train, pack, keep the raw weights, write the artifact: (sizes and counts, primed mixer).

    The last three are rank 0's; on the others there is ({}, None).
    """
    tokens = load_tokenizer(tokenizer)
    check_vocab(cfg, tokens)
    data = TrainWindows(find_shards(folder, "train"), cfg.train_seq_len, cfg.seed, tokens.vocab)
    ranks.check_same(f"{shared_knobs(cfg)} {tokens.sha256} {[len(s) for s in data.shards]}")
    model = GPT(cfg, tokens.vocab, tokens.bos)
    validation = Validation(cfg, model, tokens, folder, workers)
    trainer = Trainer(model, cfg, data, report, workers, ranks)
    for line in describe_training(trainer, validation):
        report.line(line)
    if cfg.resume and not ranks.rank:
        trainer.load()
    trainer.share()
    trainer.warm_up()
    packer = new_packer(trainer, tokens)
    if packer:
        if not cfg.max_wallclock_seconds:
            report.line("packing text first, as there is no MAX_WALLCLOCK_SECONDS to share")
        elif cfg.resume:
            left = max(cfg.max_wallclock_seconds - trainer.elapsed_s, 0)
            report.line(f"packing starts anew, with {left:.0f} s of MAX_WALLCLOCK_SECONDS left")
        packer.start(trainer.elapsed_s)
    train(trainer, validation)
    if ranks.rank:
        return {}, None
    validation.during_training(trainer)
    made = {**export(trainer, packer, tokens), "tokenizer_bytes": tokenizer.stat().st_size}
    report.event(made, EXPORT_LINE)
    return made, packer.mixer if packer else None


def export(trainer: Trainer, packer: Packer | None, tokens: Tokenizer) -> Event:
    """Keep the raw weights, wait for the packer, write the artifact; returns the export event."""
    cfg, report, packed, seconds = trainer.cfg, trainer.report, None, trainer.elapsed_s
    meta = {"knobs": json.dumps(dataclasses.asdict(cfg)), "tokenizer_sha256": tokens.sha256}
    mx.save_safetensors(str(report.folder / "model.safetensors"), trainer.average, meta)
    if packer:
        if packer.thread.is_alive():
            report.line("packing goes on until its bytes or MAX_WALLCLOCK_SECONDS are used up")
        begin, packed = time.perf_counter(), packer.finish()
        seconds += time.perf_counter() - begin if cfg.max_wallclock_seconds else packer.seconds
        report.line(f"packed {packed.token_count:,} tokens of training text into "
                    f"{len(packed.code):,} bytes in {packer.seconds:.0f} s")  # fmt: skip
    path = report.folder / "artifact.bin"
    event = write_artifact(path, trainer.average, trainer.groups, cfg, tokens, packed)
    trained = trainer.step * trainer.windows * cfg.train_seq_len
    return {**event, "pack_seconds": packer.seconds if packer else 0.0, "train_seconds": seconds,
            "train_steps": trainer.step, "train_tokens": trained,
            "tok_s": trained / max(trainer.elapsed_s, 1e-9)}  # fmt: skip


def new_packer(trainer: Trainer, tokens: Tokenizer) -> Packer | None:
    """Rank 0's packer, with the bytes it may use; None unless MIXER=logistic."""
    cfg = trainer.cfg
    if cfg.mixer != "logistic" or trainer.ranks.rank:
        return None
    net = estimate_bytes(trainer.params, trainer.groups, cfg)
    room = ARTIFACT_LIMIT_BYTES - net - net // 50 - 20_000 - 3 * tokens.vocab
    budget = max(room, 0) if cfg.pack_text_bytes < 0 else cfg.pack_text_bytes
    if budget > max(room, 0):
        raise UserError(f"PACK_TEXT_BYTES={cfg.pack_text_bytes}: script and net leave about {room}")
    return Packer(trainer.data, tokens, cfg, budget, trainer.workers)


@dataclass
class Evaluation:
    """An artifact, reloaded from disk, and what scores it."""

    cfg: Knobs
    path: Path
    folder: Path  # of the validation shards
    workers: Workers

    def __post_init__(self) -> None:
        cfg, path = self.cfg, self.path
        self.artifact = read_artifact(path)
        made_with, tokens = Knobs(**self.artifact.header["knobs"]), self.artifact.tokens
        fields = [field.name for field in dataclasses.fields(Knobs)]
        fixed = fields[fields.index("num_layers") : fields.index("tied_embed_lr")]
        fixed += ["mixer_memory_mb"] if cfg.mixer == "logistic" else []
        for name in fixed:
            ours, its = getattr(cfg, name), getattr(made_with, name)
            if ours != its:
                raise UserError(f"{name.upper()}={ours}: {path} has {its}: unset it")
        check_vocab(cfg, tokens)
        if cfg.mixer == "logistic" and not self.artifact.packed:
            raise UserError(f"MIXER=logistic: {path} was made with MIXER={made_with.mixer}")
        self.model = GPT(dataclasses.replace(cfg, use_ortho_init=False), tokens.vocab, tokens.bos)
        try:
            self.model.load_weights(list(self.artifact.params.items()))
        except ValueError as error:
            raise UserError(f"{path}: its tensors do not fit its settings: {error}") from None
        self.validation = Validation(cfg, self.model, tokens, self.folder, self.workers)

    def primed(self, label: str) -> ContextModel:
        """A scorer that has read the artifact's text, and nothing else."""
        packed = self.artifact.packed if self.cfg.mixer == "logistic" else None
        leaf, paid = (packed.leaf, packed.token_count) if packed else (None, 0)
        capacity = len(self.validation.text) + paid
        scorer = new_context_model(self.cfg, self.artifact.tokens, leaf, capacity)
        if packed:
            unpack(scorer, packed, label)
        if scorer.learned != paid:
            raise AuditFailed("paid text", f"learned {scorer.learned} tokens, paid {paid}")
        return scorer

    def message(self, mixer: LogisticMixer | None) -> Message | None:
        """The other side's part: the message, by this mixer if it is primed already."""
        if self.cfg.mixer != "logistic" or not self.cfg.audit:
            return None
        mixer, text = mixer or self.primed("priming the encoder"), self.validation.text
        return encode_message(mixer, self.model, text, eval_length(self.cfg), self.workers)

    def run(self, receive: Callable[[], Message | None], tokenizer: Path | None) -> Event:
        """Audit and score in every mode asked for; returns {"evals", "audit", "lines"}."""
        cfg, validation, lines = self.cfg, self.validation, []
        begin = time.perf_counter()
        if cfg.audit:
            audit = Audit(cfg, self.artifact, self.model, self.workers)
            lines.append(audit.excerpts(validation.text, cfg.seed))
            lines.append(audit.byte_count(validation.text, tokenizer))
            validation.check_whole()
            lines.append(f"checks took {time.perf_counter() - begin:.0f} s")
        receive = functools.cache(receive)  # one message for both modes
        modes = ("standard", "sliding") if cfg.eval_mode == "both" else (cfg.eval_mode,)
        evals = [self.score(mode, receive, lines) for mode in modes]
        return {"evals": evals, "audit": "pass" if cfg.audit else "off", "lines": lines}

    def score(self, mode: str, receive: Callable[[], Message | None], lines: list[str]) -> Event:
        """Prime, decode the message if there is one, and score on from its end."""
        cfg, begin, text, scored = self.cfg, time.perf_counter(), self.validation.text, []
        scorer = self.primed("priming")
        prime_seconds = time.perf_counter() - begin
        if message := receive():
            args = message, scorer, self.model, int(text[0]), eval_length(cfg), self.workers
            tokens, nats = decode_message(*args)
            lines.append(check_message(message, tokens, nats, text))
            scored = [(0, nats)]
        else:
            scorer.begin(int(text[0]))
        batch = cfg.eval_batch_seqs
        result = self.validation.run(self.artifact.params, mode, batch, scorer, scored)
        return {**result, "mixer": cfg.mixer, "prime_seconds": prime_seconds}


def evaluate_here(channel: Any, cfg: Knobs, path: Path, folder: Path, tokenizer: Any) -> None:
    """The evaluating process: it gets paths and a message, and sends its result or its error."""
    # The other side may be interrupted or fail first: then it says why.
    with contextlib.suppress(KeyboardInterrupt, EOFError, ConnectionError):
        try:
            use_device(cfg)
            with make_workers(cfg) as workers:
                result = Evaluation(cfg, path, folder, workers).run(channel.recv, tokenizer)
                channel.send({**result, "peak_memory_bytes": peak_memory()})
        except Stop as error:
            channel.send(error)


def evaluate(
    cfg: Knobs, path: Path, folder: Path, workers: Workers, mixer: Any, tokenizer: Path | None
) -> Event:
    """Let a fresh process score an artifact; this one encodes the message that it must decode."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    args = (there, cfg, path.resolve(), folder, tokenizer)
    process = context.Process(target=evaluate_here, args=args, daemon=True)
    process.start()
    there.close()
    try:
        message = Evaluation(cfg, path, folder, workers).message(mixer)
        if mixer:
            mixer.state = None  # gigabytes that the other process may need
        with contextlib.suppress(ConnectionError):  # it may have failed: then it has said why
            here.send(message)
        result = here.recv()
    except (EOFError, ConnectionError):
        raise RunFailed("the evaluating process ended without a result (out of memory?)") from None
    finally:
        process.terminate()  # it has nothing left to say
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def main(cfg: Knobs, warnings: list[str]) -> None:
    """Train, export, reload, score; or with EVAL_ONLY the last two."""
    use_device(cfg)
    ranks = Ranks()
    if cfg.eval_only:
        artifact = read_artifact(Path(cfg.eval_only))
        cfg, warnings = knobs_from_env(dict(os.environ), base=artifact.header["knobs"])
        if ranks.rank:
            return
        ranks.count = 1  # rank 0 goes on alone
    folder, tokenizer, where = ranks.in_turn(lambda: locate_data(cfg))
    report = Silence() if ranks.rank else Report(cfg)
    if on_cpu() and not MLX_COMPILES:
        warnings = [*warnings, "no g++: MLX's CPU kernels run uncompiled, which is slower"]
    for line in [*(f"warning: {w}" for w in warnings), where]:
        report.line(line)
    with make_workers(cfg, int(ranks.same(platform.node()).sum()), ranks.count) as workers:
        machine = describe_machine(cfg, workers, ranks)
        report.event({"event": "config", **dataclasses.asdict(cfg), **machine}, *CONFIG_LINES)
        if cfg.eval_only:
            path, mixer = Path(cfg.eval_only), None
            made = export_event(path, artifact.params, artifact.packed)
            made |= dict.fromkeys(("train_steps", "train_tokens", "train_seconds", "tok_s"), 0)
        else:
            path = report.folder / "artifact.bin"
            made, mixer = train_and_export(cfg, folder, tokenizer, report, workers, ranks)
    if ranks.rank:
        return
    final = {**made, "event": "final", "device": machine["machine"], "mlx_version": mx.__version__}
    try:
        with make_workers(cfg) as workers:  # as the other process makes them: a message needs it
            result = evaluate(cfg, path, folder, workers, mixer, tokenizer)
    except AuditFailed as error:
        report.event({**final, "audit": "fail", "audit_failure": str(error)})
        report.line(str(error))
        raise
    report_result(report, final, result)


def report_result(report: Report, final: Event, result: Event) -> None:
    """The audit's lines, a record for each way of scoring, and the final one."""
    for line in result["lines"]:
        report.line(f"audit: {line}")
    report.event({"event": "audit", "audit": result["audit"], "lines": result["lines"]})
    for event in result["evals"]:
        report.event({"event": "eval", **event}, *ROUNDTRIP_LINES)
    seconds = sum(e["eval_time_ms"] / 1000 + e["prime_seconds"] for e in result["evals"])
    memory = max(peak_memory(), result["peak_memory_bytes"])
    final = {**final, **result["evals"][-1], "audit": result["audit"]}
    final |= {"eval_seconds": seconds, "peak_memory_bytes": memory}
    report.event(final, FINAL_LINE)
    report.line(f"everything is in {report.folder}")


if __name__ == "__main__":
    with errors_as_lines():
        main(CFG, CFG_WARNINGS)

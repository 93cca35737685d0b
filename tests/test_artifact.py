"""The quantiser, the file format and the size rules."""

import ast
import functools
import json
import struct
import sys

import brotli
import numpy as np
import pytest
from conftest import ROOT, made_up_tokenizer, random_model, t, tiny_knobs
from hypothesis import given, settings
from hypothesis import strategies as st

mx = t.mx


def noise(shapes, seed=0):
    """Gaussian noise in place of every tensor, in order of their names."""
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {n: mx.random.normal(s, key=k) for (n, s), k in zip(shapes.items(), keys, strict=True)}


def noisy(cfg, vocab=1024, seed=0):
    """(parameters, their groups) of a model whose tensors are Gaussian noise."""
    model = t.GPT(cfg, vocab, 1)
    params = noise({n: p.shape for n, p in t.tree_flatten(model.parameters())}, seed)
    return params, t.group_parameters(list(params))


def tokenizer_of(vocab=1024, seed=0):
    """Tokenizer facts with every flag in use."""
    rng = np.random.default_rng(seed)
    flags = rng.random((2, vocab)) < 0.3
    return t.Tokenizer(rng.integers(0, 9, vocab).astype(np.uint16), *flags, 1, True, "ab" * 32)


# --------------------------------------------------------------------------------------------------
# The quantiser


def bfloat16(x):
    """float32 -> the nearest bfloat16 (ties to even), as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def brute_force(w, bits):
    """Squared error of each row for every clip candidate: (rows, candidates) float64."""
    limit, errors = 2 ** (bits - 1) - 1, []
    top = np.abs(w).max(axis=1, keepdims=True) / np.float32(limit)
    for ratio in t.CLIP_RATIOS:
        scale = bfloat16(top * np.float32(ratio))
        codes = np.clip(np.round(w / np.where(scale > 0, scale, 1)), -limit, limit)
        errors.append(((codes * scale - w).astype(np.float64) ** 2).sum(axis=1))
    return np.stack(errors, axis=1)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_the_clip_is_the_best_candidate(bits, rng):
    w = np.float32(rng.standard_normal((60, 40)) * 10 ** rng.uniform(-6, 6, (60, 1)))
    w[::3] *= rng.standard_cauchy((20, 40)).astype(np.float32)
    errors = brute_force(w, bits)
    for search, expected in ((True, errors.min(axis=1)), (False, errors[:, 0])):
        codes, scale = (np.array(a) for a in t.quantise_rows(mx.array(w), bits, search))
        assert (codes == np.round(codes)).all() and np.abs(codes).max() <= 2 ** (bits - 1) - 1
        assert (scale == bfloat16(scale)).all()
        error = ((codes * scale - w).astype(np.float64) ** 2).sum(axis=1)
        np.testing.assert_allclose(error, expected, rtol=1e-4)
    assert bits > 5 or (errors.min(axis=1) < errors[:, 0]).any()  # the search is not idle


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 8), st.booleans(), st.integers(-34, 34), st.integers(0, 2**31))
def test_no_row_is_too_small_or_too_large(bits, search, exponent, seed):
    """With the range of float32 for scales, the relative error does not depend on magnitude."""
    row = np.random.default_rng(seed).standard_normal((1, 24))
    w = np.concatenate([row, 0 * row, row * 1e-30, row * 10.0**exponent]).astype(np.float32)
    codes, scale = (np.array(a) for a in t.quantise_rows(mx.array(w), bits, search))
    back = codes.astype(np.float64) * scale
    assert np.isfinite(back).all() and (back[1] == 0).all()
    bound = np.abs(w).max(axis=1, keepdims=True) * (0.5 / (2 ** (bits - 1) - 1) + 1 / 256)
    if not search:
        assert (np.abs(back - w) <= bound).all()
    assert ((back - w) ** 2).sum() <= 1.0001 * (bound.astype(np.float64) ** 2).sum() * 24


# --------------------------------------------------------------------------------------------------
# The file


@pytest.fixture
def written(tmp_path):
    """(file, parameters, settings, tokenizer facts) of a small artifact."""
    cfg = tiny_knobs(USE_GPTQ_LITE=0, WEIGHT_BITS=5)
    params, groups = noisy(cfg, vocab=50)
    tokenizer, path = tokenizer_of(50), tmp_path / "artifact.bin"
    t.write_artifact(path, params, groups, cfg, tokenizer)
    return path, params, cfg, tokenizer


PACKED = t.PackedText(np.random.default_rng(3).permutation(50)[None], 7, "ab12", bytes(range(200)))
TREES = np.stack([np.random.default_rng(i).permutation(50) for i in range(3)])
REHEARSAL = t.PackedText(TREES[:1], 8, "ef56", b"rehearsal")
THREE = t.PackedText(TREES, 9, "cd34", b"the text", REHEARSAL)


def test_round_trip(written):
    path, params, cfg, tokenizer = written
    artifact = t.read_artifact(path)
    header, read, back = artifact.header, artifact.tokenizer, artifact.params
    assert artifact.packed is None
    assert list(back) == list(params)
    for name, group in t.group_parameters(list(params)).items():
        w, got = np.array(params[name]), np.array(back[name])
        if not group.bits:
            np.testing.assert_array_equal(got, w)
            continue
        limit = 2 ** (getattr(cfg, group.bits) - 1) - 1
        step = bfloat16(np.abs(w).max(axis=1, keepdims=True) / np.float32(limit))
        inside = np.abs(w) <= limit * step  # a scale rounded down leaves the top just outside
        assert (np.abs(got - w) <= step * 0.5001)[inside].all(), name
        assert (np.abs(got - w) <= step * (0.5 + limit / 256)).all(), name
        assert len(np.unique(np.round(got / step))) <= 2 * limit + 1
    for name in ("piece_bytes", "leading", "control"):
        np.testing.assert_array_equal(getattr(read, name), getattr(tokenizer, name))
    for name in ("bos", "dummy_prefix", "sha256", "vocab"):
        assert getattr(read, name) == getattr(tokenizer, name)
    assert (header["knobs"]["NUM_LAYERS"], header["knobs"]["WEIGHT_BITS"]) == ("3", "5")


def test_packed_text_comes_back_beside_the_same_model(written):
    path, params, cfg, tokenizer = written
    bare, plain = t.read_artifact(path), path.read_bytes()
    groups = t.group_parameters(list(params))
    for packed in (PACKED, t.dataclasses.replace(PACKED, token_count=0, code=b""), THREE):
        event = t.write_artifact(path, params, groups, cfg, tokenizer, packed)
        raw = path.read_bytes()
        assert event["model_bytes"] == len(raw)
        model_bytes = struct.unpack_from("<Q", raw, 42)[0]
        codes = b"rehearsalthe text" if packed is THREE else packed.code
        assert raw[50 + model_bytes :] == codes  # as they are: a code cannot be compressed
        total = (17, 17) if packed is THREE else (packed.token_count, len(packed.code))
        assert (event["packed_tokens"], event["packed_bytes"]) == packed.total() == total
        read = t.read_artifact(path)
        np.testing.assert_array_equal(read.packed.leaves, packed.leaves)
        assert (read.packed.token_count, read.packed.code) == (packed.token_count, packed.code)
        assert bool(read.packed.rehearsal) == (packed is THREE)
        for name, value in vars(REHEARSAL).items() if packed is THREE else ():
            np.testing.assert_array_equal(getattr(read.packed.rehearsal, name), value)
        for name in ("piece_bytes", "leading", "control"):
            np.testing.assert_array_equal(getattr(read.tokenizer, name), getattr(tokenizer, name))
        assert all((read.params[n] == bare.params[n]).all() for n in params)
    t.write_artifact(path, params, groups, cfg, tokenizer)
    assert path.read_bytes() == plain


@pytest.mark.parametrize("level", range(8))
def test_a_tree_with_a_right_side_alone_is_refused(written, level):
    """At any level: a decoder that goes left there would find no token."""
    path, params, cfg, tokenizer = written
    leaf = np.arange(50)  # of 256: the left ones
    good = t.dataclasses.replace(PACKED, leaves=leaf[None])
    leaf = leaf + 64 * (leaf >> level == 0) if level < 6 else leaf | 1 << level
    t.write_artifact(path, params, t.group_parameters(list(params)), cfg, tokenizer, good)
    t.read_artifact(path)
    bad = t.dataclasses.replace(PACKED, leaves=leaf[None])
    t.write_artifact(path, params, t.group_parameters(list(params)), cfg, tokenizer, bad)
    with pytest.raises(t.UserError, match="right side alone"):
        t.read_artifact(path)


def test_the_layout_is_json_and_raw_tensors(written):
    """Read by the format's own words."""
    path, params, _, _ = written
    raw = path.read_bytes()
    magic, version, _, model_bytes = struct.unpack_from("<8sH32sQ", raw)
    assert (magic, version, model_bytes) == (b"MLXGOLF1", t.FORMAT_VERSION, len(raw) - 50)
    body = brotli.decompress(raw[50:])
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    at = 4 + length + 3 * 50  # after the byte table: uint16 and flags of each piece
    for name, shape, bits in header["tensors"]:
        assert tuple(shape) == params[name].shape
        at += (np.prod(shape) + 2 * shape[0]) if bits else 4 * np.prod(shape)
    assert at == len(body)


def test_exports_are_identical(written, tmp_path):
    path, params, cfg, tokenizer = written
    again = tmp_path / "again.bin"
    t.write_artifact(again, params, t.group_parameters(list(params)), cfg, tokenizer)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.bin", "artifact.bin"]
    other = {n: p + 0.1 for n, p in params.items()}
    t.write_artifact(again, other, t.group_parameters(list(params)), cfg, tokenizer)
    assert again.read_bytes() != path.read_bytes()


@pytest.mark.parametrize("packed", [None, PACKED])
def test_damaged_files_are_named(written, packed):
    path, params, cfg, tokenizer = written
    t.write_artifact(path, params, t.group_parameters(list(params)), cfg, tokenizer, packed)
    good = path.read_bytes()
    flips = [*range(50), *np.linspace(50, len(good) - 1, 20).astype(int)]
    damaged = {f"byte {i}": good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in flips}
    damaged |= {f"cut at {n}": good[:n] for n in (0, 7, 8, 41, 42, 49, 50, 51, len(good) - 1)}
    damaged |= {"longer": good + b"\0", "other": b"PK\3\4" * 99, "pickle": b"\x80\4." * 99}
    damaged["version"] = good[:8] + struct.pack("<H", 1) + good[10:]
    wrong = []
    for what, content in damaged.items():
        path.write_bytes(content)
        try:
            t.read_artifact(path)
            wrong.append(f"{what}: read")
        except t.UserError as error:
            if str(path) not in str(error) or (what == "version" and "version 1" not in str(error)):
                wrong.append(f"{what}: {error}")
        except Exception as error:
            wrong.append(f"{what}: {error!r}")
    assert not wrong
    with pytest.raises(t.UserError, match="absent"):
        t.read_artifact(path.with_name("absent.bin"))


RUNS_CODE = {"builtins": {"eval", "exec", "compile", "__import__"}}
RUNS_CODE |= {"numpy": {"load"}, "importlib": {"import_module"}}
RUNS_CODE |= {"importlib.util": {"module_from_spec"}, "runpy": set(), "pickle": set()}
RUNS_CODE |= {"marshal": set(), "shelve": set(), "code": set(), "dill": set(), "joblib": set()}
RUNS_CODE |= {"cloudpickle": set(), "torch": set(), "imp": set(), "multiprocessing": set()}


def code_loaders(text):
    """What in a script's text could run code that a file holds, by full name.

    A name is what it was imported as: `mx.eval` is MLX's, `eval` alone is Python's.
    """
    tree, origin = ast.parse(text), {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                origin[bound] = alias.name if alias.asname else bound
                found |= {alias.name} if RUNS_CODE.get(alias.name) == set() else set()
        elif isinstance(node, ast.ImportFrom):
            origin |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {node.module} if RUNS_CODE.get(node.module) == set() else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            parts = ast.unparse(node).split(".")
            first = origin.get(parts[0], parts[0] if parts[1:] else f"builtins.{parts[0]}")
            module, _, name = ".".join([first, *parts[1:]]).rpartition(".")
            found |= {f"{module}.{name}"} if name in RUNS_CODE.get(module, ()) else set()
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.add("allow_pickle")
    return found


@pytest.mark.parametrize(
    "text, found",
    [
        ("import mlx.core as mx; mx.eval(x); mx.compile(f); mx.load(path)", ""),
        ("import re; re.compile('a'); import json; json.loads(x)", ""),
        ("eval(text)", "builtins.eval"),
        ("run = exec", "builtins.exec"),
        ("import builtins as b; b.eval(text)", "builtins.eval"),
        ("from builtins import compile as c; c(x)", "builtins.compile"),
        ("__import__(name)", "builtins.__import__"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import numpy as np; np.load(path)", "numpy.load"),
        ("from numpy import load; load(path)", "numpy.load"),
        ("import importlib; importlib.import_module(name)", "importlib.import_module"),
        ("import importlib.util; importlib.util.module_from_spec(s)",
         "importlib.util.module_from_spec"),
        ("read(path, allow_pickle=True)", "allow_pickle"),
    ],
)  # fmt: skip
def test_the_finder_of_code_loaders_finds_them(text, found):
    assert code_loaders(text) == ({found} if found else set())


def test_no_code_is_loaded_from_files():
    """Neither pickle nor what stands on it, nor evaluation of text, nor import by a file's name."""
    assert code_loaders((ROOT / "train_gpt_mlx_kl.py").read_text()) == set()


def test_a_file_without_brotli_is_larger_and_reads_back(written, monkeypatch):
    """lzma takes its place; a file that brotli made names what it needs."""
    path, params, cfg, tokenizer = written
    usual = path.read_bytes()
    monkeypatch.setitem(sys.modules, "brotli", None)  # as if it were not installed
    with pytest.raises(t.UserError, match=r"artifact\.bin.*pip install brotli"):
        t.read_artifact(path)
    event = t.write_artifact(path, params, t.group_parameters(list(params)), cfg, tokenizer)
    assert event["compressor"].startswith("lzma")
    assert len(usual) < event["model_bytes"] < 1.1 * len(usual)
    by_lzma = t.read_artifact(path).params
    monkeypatch.undo()
    assert all((p == by_lzma[name]).all() for name, p in t.read_artifact(path).params.items())
    path.write_bytes(usual)
    assert all((p == by_lzma[name]).all() for name, p in t.read_artifact(path).params.items())


# --------------------------------------------------------------------------------------------------
# Sizes


@functools.cache
def bytes_per_value(bits, width, search):
    """What brotli makes of rows of Gaussian noise, as they are stored."""
    codes, scale = t.quantise_rows(mx.random.normal((100_000 // width, width)), bits, search)
    stored = codes.astype(mx.int8), scale.astype(mx.bfloat16).view(mx.uint16)
    raw = b"".join(np.array(array).tobytes() for array in stored)
    return len(brotli.compress(raw, quality=11, lgwin=24)) / codes.size


@pytest.mark.parametrize("preset", t.PRESETS)
def test_presets_fit_even_as_noise(preset):
    """Noise is the worst case. Brotli's best takes over a minute for 20 M parameters: it is
    measured on 100,000 values of each precision and row length, which is all that matters to it.
    """
    # Orthogonal matrices have the same shapes, and take time.
    cfg = t.knobs_from_env({"PRESET": preset, "USE_ORTHO_INIT": "0"})[0]
    params = dict(t.tree_flatten(t.GPT(cfg, 1024, 1).parameters()))
    groups = t.group_parameters(list(params))
    total = (ROOT / "train_gpt_mlx_kl.py").stat().st_size
    for name, p in params.items():
        bits = getattr(cfg, groups[name].bits) if groups[name].bits else 0
        total += p.size * (bytes_per_value(bits, p.shape[1], cfg.use_gptq_lite) if bits else 4)
    assert total <= 16_000_000
    assert abs(t.estimate_bytes(params, groups, cfg) / total - 1) < 0.05


def test_oversized_models_are_refused(tmp_path, monkeypatch):
    cfg = tiny_knobs(ENGRAM_HASH_SIZE=999, ENGRAM_EMBED_DIM=32)
    params, groups = noisy(cfg)
    assert t.ARTIFACT_LIMIT_BYTES == 16_000_000
    estimate = t.estimate_bytes(params, groups, cfg)
    path = tmp_path / "artifact.bin"
    event = t.write_artifact(path, params, groups, cfg, tokenizer_of())
    fact = event["total_bytes"]
    assert event["model_bytes"] == path.stat().st_size
    assert event["code_bytes"] == (ROOT / "train_gpt_mlx_kl.py").stat().st_size
    assert fact == event["model_bytes"] + event["code_bytes"]
    assert abs(estimate / fact - 1) < 0.05

    def excess(total, function, *args):
        monkeypatch.setattr(t, "ARTIFACT_LIMIT_BYTES", total)
        function(*args)  # the limit itself is allowed
        monkeypatch.setattr(t, "ARTIFACT_LIMIT_BYTES", total - 1234)
        with pytest.raises(t.RunFailed, match=r"1,234 over .*: engram\.tables 1?\d\d,"):
            function(*args)

    excess(estimate, t.estimate_bytes, params, groups, cfg)
    excess(fact, t.write_artifact, path, params, groups, cfg, tokenizer_of())


def test_an_export_says_where_the_bytes_of_the_net_go(tmp_path):
    cfg, facts = tiny_knobs(), made_up_tokenizer()
    params = dict(t.tree_flatten(random_model().parameters()))
    groups = t.group_parameters(list(params))
    text = t.PackedText(np.arange(facts.vocab)[None], 5, "", b"0123456789")
    made = t.write_artifact(tmp_path / "a", params, groups, cfg, facts, text)
    parts = made["group_bytes"]
    assert sum(parts.values()) == made["model_bytes"] - 10 and min(parts.values()) > 0
    assert set(parts) == {"header, tokenizer, tree", *(group.name for group in groups.values())}
    assert parts["header, tokenizer, tree"] < parts["matrices"]
    params["tok_emb"] = t.mx.zeros_like(params["tok_emb"])  # takes no room
    less = t.write_artifact(tmp_path / "b", params, groups, cfg, facts)["group_bytes"]
    assert less["embedding"] < 0.2 * parts["embedding"]
    assert less["matrices"] == pytest.approx(parts["matrices"], rel=0.05)

"""The table of knobs: names and defaults people rely on, errors, warnings, presets, the README."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, t
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = ROOT / "train_gpt_mlx_kl.py"
FIELDS = {field.name: field for field in t.dataclasses.fields(t.Knobs)}

# Names that people's scripts set; a value is the promised default.
PUBLIC = """DATA_PATH TOKENIZER_PATH RUN_ID SEED=1337 ITERATIONS=20000 VAL_LOSS_EVERY=0
VAL_BATCH_SIZE TRAIN_LOG_EVERY TRAIN_BATCH_TOKENS=524288 GRAD_ACCUM_STEPS=8 TRAIN_SEQ_LEN=1024
MLX_MAX_MICROBATCH_TOKENS=8192 MLX_EAGER_EVAL=1 WARMUP_STEPS=20 WARMDOWN_ITERS=3500
MAX_WALLCLOCK_SECONDS=600 VOCAB_SIZE=0 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4
MLP_MULT=3 TIED_EMBED_INIT_STD LOGIT_CHUNK_TOKENS LOGIT_SOFTCAP=30 ROPE_BASE ROPE_DIMS=16
QK_GAIN_INIT=1.5 EVAL_SEQ_LEN EVAL_STRIDE=64 EVAL_BATCH_SEQS EVAL_MODE=sliding BIGRAM_HASH_SIZE
ENGRAM_LITE_ENABLED=1 ENGRAM_HASH_SIZE=8192 ENGRAM_EMBED_DIM=256 ENGRAM_N_HEADS=2
SKIPGRAM_HASH_SIZE=0 COMPLEMENT_ALPHA=0.5 EMA_DECAY EMA_START_FRAC USE_ORTHO_INIT USE_SWA
USE_SMEARGATE LN_SCALE_ENABLED XSA_LAST_N=4 BETA1 BETA2 ADAM_EPS TIED_EMBED_LR MATRIX_LR SCALAR_LR
MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS
MUON_WEIGHT_DECAY ADAM_WEIGHT_DECAY LATE_QAT_THRESHOLD USE_GPTQ_LITE GRAD_CLIP_NORM OUT_DIR=logs
HASH_LR EVAL_ONLY VAL_MAX_TOKENS PRESET NGRAM_MIXER_ENABLED=1 NGRAM_MAX_ORDER NGRAM_ALPHA
MIXER=logistic MIXER_MEMORY_MB PACK_TEXT_BYTES=-1 NGRAM_SMOOTHING AUDIT=1"""

# The public MLX baseline's own settings (openai/parameter-golf, train_gpt_mlx.py).
BASELINE = """num_layers=9 model_dim=512 num_heads=8 num_kv_heads=4 mlp_mult=2 mlp_leak=0
train_seq_len=1024 train_batch_tokens=524288 grad_accum_steps=8 mlx_max_microbatch_tokens=8192
iterations=20000 max_wallclock_seconds=600 warmup_steps=20 warmdown_iters=1200 tied_embed_lr=0.05
matrix_lr=0.04 scalar_lr=0.04 beta1=0.9 beta2=0.95 adam_eps=1e-8 muon_momentum=0.95
muon_momentum_warmup_start=0.85 muon_momentum_warmup_steps=500 muon_backend_steps=5
muon_weight_decay=0 adam_weight_decay=0 grad_clip_norm=0 rope_dims=0 rope_base=10000
qk_gain_init=1.5 logit_softcap=30 tied_embed_init_std=0.005 seed=1337 ema_decay=0 use_swa=0
engram_lite_enabled=0 bigram_hash_size=0 skipgram_hash_size=0 complement_alpha=0 use_smeargate=0
use_ortho_init=0 ln_scale_enabled=0 xsa_last_n=0 late_qat_threshold=0 eval_mode=standard
mixer=off"""


def start(*argv, **env):
    """Run the script with `-X importtime`; returns (process, its stderr lines, modules loaded)."""
    clean = {n: v for n, v in os.environ.items() if n.lower() not in FIELDS}
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *argv]
    process = subprocess.run(command, env=clean | env, capture_output=True, text=True)
    lines = process.stderr.splitlines()
    timings = [line for line in lines if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in timings}
    return process, [line for line in lines if line not in timings], modules


def assert_light(modules):
    """Nothing that takes time to load was imported."""
    assert "json" in modules  # the list is not empty
    assert not {"numpy", "numba", "mlx", "mlx.core", "sentencepiece"} & modules


def test_public_names_and_defaults():
    for word in PUBLIC.split():
        name, _, default = word.partition("=")
        field = FIELDS[name.lower()]
        if default:
            kind = type(field.default)
            assert field.default == (kind(int(default)) if kind is bool else kind(default)), name


def test_every_knob_is_read():
    """A knob counts as read if code takes it from cfg, from the environment, or by GROUPS."""
    tree = ast.parse(SCRIPT.read_text())
    tree.body = [n for n in tree.body if getattr(n, "name", "") not in ("Knobs", "check_together")]
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", "")) == "cfg":
                read.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop"):
            read |= {str(arg.value).lower() for arg in node.args if isinstance(arg, ast.Constant)}
    for group in t.GROUPS:
        read |= {group.lr, group.decay, group.bits}
    assert set(FIELDS) <= read, set(FIELDS) - read


# Of each scope the ones that are easily put into another.
SCOPE_OF = """run: MAX_WALLCLOCK_SECONDS WARMDOWN_ITERS COMPUTE_DTYPE GRAD_ACCUM_STEPS PRESET
data: DATA_PATH TOKENIZER_PATH VOCAB_SIZE
train: SEED TRAIN_SEQ_LEN QK_GAIN_INIT EMA_DECAY WEIGHT_BITS PACK_TEXT_BYTES
rate: MATRIX_LR HASH_PROJ_LR GRAD_CLIP_NORM SKIP_BAD_STEPS
model: NUM_LAYERS LOGIT_SOFTCAP ROPE_BASE ENGRAM_N_HEADS SKIPGRAM_HASH_SIZE MIXER_MEMORY_MB
model: MIXER_SIZE
eval: MIXER NGRAM_MIXER_ENABLED NGRAM_ALPHA AUDIT VAL_LOSS_EVERY EVAL_SEQ_LEN"""


def test_knobs_of_a_scope():
    cfg = t.knobs_from_env({"PRESET": "h100", "SEED": "7", "MIXER": "off"})[0]
    for line in SCOPE_OF.splitlines():
        scope, _, names = line.partition(": ")
        assert set(names.split()) <= set(t.settings_of(cfg, scope))
    scopes = [t.settings_of(cfg, scope) for scope in t.SCOPES]
    each = sorted(name.lower() for names in scopes for name in names)
    assert each == sorted(FIELDS)  # each in one
    both = t.settings_of(cfg, "train", "eval")
    assert (both["SEED"], both["MIXER"]) == ("7", "off") and "NUM_LAYERS" not in both


def test_help_is_light_and_complete():
    process, stray, modules = start("--help", "all")
    assert process.returncode == 0 and not stray
    assert_light(modules)
    headings = re.findall(r"^(\w+): ", process.stdout, re.M)
    assert headings == ["usage", *map(str.title, t.SCOPES)]
    words = " ".join(process.stdout.split())
    for name, field in FIELDS.items():
        assert re.search(rf"^  {name.upper()}\b", process.stdout, re.M), name
        assert field.metadata["help"] in words
    usual = start("--help")[0].stdout
    assert re.findall(r"^  ([A-Z_]+)", usual, re.M) == [
        name.upper() for name in FIELDS if name.upper() in t.USUAL.split()
    ]
    assert max(map(len, (process.stdout + usual).splitlines())) <= 80
    assert "--help all" in usual


def test_all_problems_at_once():
    bad = """SEED=x NUM_LAYERS=0 EVAL_MODE=fast MLX_EAGER_EVAL=yes MATRIX_LR=nan BETA1=1.5
    SKIPGRAM_HASH_SIZE=65537 TTT_LR=1 SWA_DECAY=0.9 TIE_EMBEDDINGS=0 RUN_ID=../x NUM_HEADS=7
    TRAIN_MAX_SEQ_LEN=1 COMPLEMENT_BY=contexts BATCH_SIZE=9"""
    bad = dict(pair.split("=") for pair in bad.split())
    process, lines, modules = start(**bad)
    assert process.returncode == 2
    assert all(line.startswith("error: ") for line in lines), lines
    for name in bad:
        assert any(name in line for line in lines), name
    assert "Traceback" not in process.stderr and process.stdout == ""
    assert_light(modules)


def test_arguments_are_refused():
    process, lines, _ = start("--iterations=3")
    assert process.returncode == 2
    assert len(lines) == 1 and "--iterations=3" in lines[0] and "--help" in lines[0]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
numbers = (
    st.integers().map(str) | st.floats().map(str) | st.sampled_from(["9" * 400, "-0", "1e999"])
)


@settings(deadline=None)
@given(st.sampled_from(sorted(FIELDS)), texts | numbers)
def test_any_text_is_a_value_or_a_named_problem(name, text):
    try:
        cfg, _ = t.knobs_from_env({"PRESET": "cpu", name.upper(): text})
    except t.UserError as error:
        assert name.upper() in str(error)
    else:
        assert isinstance(getattr(cfg, name), type(FIELDS[name].default))


@pytest.mark.parametrize(
    "settings_text",
    [
        "MODEL_DIM=100 NUM_HEADS=8",
        "NUM_HEADS=8 NUM_KV_HEADS=3",
        "ROPE_DIMS=7",
        "ROPE_DIMS=128",
        "TRAIN_BATCH_TOKENS=512 TRAIN_SEQ_LEN=1024",
        "ITERATIONS=0 MAX_WALLCLOCK_SECONDS=0",
        "RESUME=1",
        "NGRAM_ALPHA=2",
    ],
)
def test_settings_that_do_not_fit_together(settings_text):
    env = dict(pair.split("=") for pair in settings_text.split())
    with pytest.raises(t.UserError) as caught:
        t.knobs_from_env({"PRESET": "h100", **env})
    assert all(f"{name}={value}" in str(caught.value) for name, value in env.items())


def test_warnings():
    def warnings(**env):
        return t.knobs_from_env({"PRESET": "mac", **env})[1]

    assert warnings(PATH="/bin", HOME="/", USER="u", LANG="C", TERM="x", PWD="/", SHLVL="1") == []
    (line,) = warnings(NUM_LAYER="9")
    assert "NUM_LAYER " in line and "NUM_LAYERS" in line
    (line,) = warnings(COMPLIMENT_ALPHA="1")
    assert "COMPLEMENT_ALPHA" in line


MIXER_KNOBS = {
    "MIXER_MEMORY_MB": ("9", "logistic"),
    "MIXER_SIZE": ("small", "logistic"),
    "PACK_TEXT_BYTES": ("9", "logistic"),
    "NGRAM_MAX_ORDER": ("2", "backoff"),
    "NGRAM_ALPHA": ("0.5", "backoff"),
    "NGRAM_SMOOTHING": ("laplace", "backoff"),
}


@pytest.mark.parametrize("mixer", FIELDS["mixer"].metadata["choices"])
def test_knobs_of_another_mixer_warn(mixer):
    """One that is set, not one that the preset or an artifact set."""
    for name, (value, owner) in MIXER_KNOBS.items():
        env = {"PRESET": "cpu", "MIXER": mixer, name: value}
        cfg, warnings = t.knobs_from_env(env)
        assert str(getattr(cfg, name.lower())) == value
        expected = [] if mixer == owner else [f"{name} has no effect with MIXER={mixer}"]
        assert warnings == expected
        if mixer != "off":
            off, warnings = t.knobs_from_env({**env, "NGRAM_MIXER_ENABLED": "0"})
            assert off.mixer == "off"
            idle = [f"MIXER={mixer} has no effect with NGRAM_MIXER_ENABLED=0"]
            assert warnings == [*idle, f"{name} has no effect with MIXER=off"]
    kept = {name: value for name, (value, _) in MIXER_KNOBS.items()}
    assert t.knobs_from_env({"MIXER": mixer, "NGRAM_MIXER_ENABLED": "1"}, kept)[1] == []


def test_switching_the_mixer_off_is_choosing_off():
    cfgs = [t.knobs_from_env({"PRESET": "mac", **env})[0] for env in (
        {"MIXER": "off"}, {"NGRAM_MIXER_ENABLED": "0"}, {"NGRAM_MIXER_ENABLED": "1"})]  # fmt: skip
    assert [cfg.mixer for cfg in cfgs] == ["off", "off", "logistic"]
    assert t.dataclasses.replace(cfgs[1], ngram_mixer_enabled=True) == cfgs[0]


@pytest.mark.parametrize("alpha", ["0", "1", "0.25", ".5", "1.0", "auto"])
def test_a_weight_of_the_n_grams(alpha):
    cfg, _ = t.knobs_from_env({"PRESET": "h100", "MIXER": "backoff", "NGRAM_ALPHA": alpha})
    tokens = t.Tokenizer(t.np.ones(9, "<u2"), *t.np.zeros((2, 9), bool), 1, False, "")
    weights = t.new_context_model(cfg, tokens, None, 5).state[4]
    assert weights[0, 0, 0] / weights[0, 0, 1] == (0.25 if alpha == "auto" else float(alpha))


@pytest.mark.parametrize("alpha", ["2", "1.01", "-0.1", "nan", "inf", "Auto", "0.5.", "half", "."])
def test_a_weight_outside_0_to_1_is_refused(alpha):
    with pytest.raises(t.UserError, match=f"NGRAM_ALPHA={re.escape(alpha)}: must be from 0 to 1"):
        t.knobs_from_env({"PRESET": "h100", "NGRAM_ALPHA": alpha})


def test_an_alias_is_as_strong_as_its_name_against_an_artifacts_settings(tmp_path):
    kept = kept_by(tmp_path / "artifact.bin")
    for name in ("TRAIN_SEQ_LEN", "TRAIN_MAX_SEQ_LEN"):
        assert t.knobs_from_env({name: "64"}, kept)[0].train_seq_len == 64
    assert t.knobs_from_env({}, kept)[0].train_seq_len == 512


def test_an_empty_variable_says_nothing_against_an_artifacts_settings(tmp_path):
    kept = kept_by(tmp_path / "artifact.bin", NUM_LAYERS="3", EVAL_STRIDE="100")
    assert kept["NUM_LAYERS"] == "3" and kept["EVAL_STRIDE"] == "100"
    empty = {"NUM_LAYERS": "", "EVAL_STRIDE": "", "TRAIN_MAX_SEQ_LEN": ""}
    assert t.knobs_from_env(empty, kept) == t.knobs_from_env({}, kept)
    assert t.knobs_from_env(empty, kept)[0].num_layers == 3


def test_aliases():
    env = {"PRESET": "h100", "SMEAR_ENABLED": "0", "USE_LN_SCALE": "0", "TRAIN_MAX_SEQ_LEN": "512"}
    cfg, warnings = t.knobs_from_env(env)
    assert (cfg.use_smeargate, cfg.ln_scale_enabled, cfg.train_seq_len) == (False, False, 512)
    assert warnings == []
    # The knob's own name is the stronger one.
    assert t.knobs_from_env({**env, "TRAIN_SEQ_LEN": "256"})[0].train_seq_len == 256


@pytest.mark.parametrize(
    "preset, layers, steps, alpha",
    [("cpu", 1, 1_000_000, "auto"), ("mac", 6, 20_000, "auto"), ("h100", 10, 20_000, "auto"),
     ("baseline", 9, 20_000, "0.25")],
)  # fmt: skip
def test_a_preset_sets_what_the_environment_leaves_unset(preset, layers, steps, alpha):
    cfg, warnings = t.knobs_from_env({"PRESET": preset})
    assert warnings == [] and cfg.preset == preset
    assert (cfg.num_layers, cfg.iterations, cfg.ngram_alpha) == (layers, steps, alpha)
    # What the environment says is stronger; an empty variable says nothing.
    assert t.knobs_from_env({"PRESET": preset, "NUM_LAYERS": "5"})[0].num_layers == 5
    assert t.knobs_from_env({"PRESET": preset, "NUM_LAYERS": ""})[0] == cfg


def test_presets_set_knobs_to_values_that_they_may_have():
    for preset, text in t.PRESETS.items():
        pairs = dict(pair.split("=") for pair in text.split())
        values, problems = t.parse_env(pairs)
        assert problems == [] and set(values) == {name.lower() for name in pairs}, preset


@pytest.mark.parametrize("device, preset", [("cpu", "cpu"), ("gpu", "mac")])
def test_auto_preset_follows_the_device(device, preset):
    assert t.knobs_from_env({"DEVICE": device})[0].preset == preset


def test_baseline_is_the_public_baseline():
    cfg = t.knobs_from_env({"PRESET": "baseline"})[0]
    assert {w: getattr(cfg, w.split("=")[0]) for w in BASELINE.split()} == {
        w: float(w.split("=")[1]) if w[-1].isdigit() else w.split("=")[1] for w in BASELINE.split()
    }


def test_table_is_up_to_date():
    """UPDATE_DOCS=1 writes it anew."""
    page = ROOT / "docs" / "reference.md"
    head = "| knob | default; presets that differ | meaning |\n| --- | --- | --- |"
    table = ""
    for scope, what in t.SCOPES.items():
        table += f"\n**{scope.title()}: {what}**\n\n{head}\n"
        for name, default, help in t.knob_rows(scope):
            table += f"| `{name}` | {default} | {help} |\n"
    before, begin, rest = page.read_text().partition("<!-- knobs -->\n")
    old, end, after = rest.partition("\n<!-- /knobs -->")
    assert begin and end
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(before + begin + table.strip() + end + after)
    else:
        assert old == table.strip(), "write it anew: UPDATE_DOCS=1 python -m pytest -k table"


def test_gains_that_scores_cannot_have_are_refused():
    heads = {"MODEL_DIM": "512", "NUM_HEADS": "4", "NUM_KV_HEADS": "4"}
    with pytest.raises(t.UserError, match=r"QK_GAIN_INIT=7\.1 must be at most 7\.07 for heads"):
        t.knobs_from_env({**heads, "QK_GAIN_INIT": "7.1"})
    t.knobs_from_env({**heads, "QK_GAIN_INIT": "7"})


KEPT = """SEED=7 TRAIN_SEQ_LEN=512 NUM_LAYERS=3 MIXER=backoff NGRAM_ALPHA=0.5 EVAL_STRIDE=32"""


def kept_by(path, **env):
    """What an artifact written with these settings keeps of them."""
    given = dict(pair.split("=") for pair in KEPT.split())
    cfg = t.knobs_from_env({"PRESET": "h100", **given, **env})[0]
    groups, params = {}, {}
    tokenizer = t.Tokenizer(t.np.ones(9, "<u2"), *t.np.zeros((2, 9), bool), 1, False, "")
    t.write_artifact(path, params, groups, cfg, tokenizer)
    return t.read_artifact(path).header["knobs"]


def test_an_artifact_keeps_what_does_not_depend_on_the_place_of_a_run(tmp_path):
    kept = kept_by(tmp_path / "artifact.bin", RUN_ID="r", OUT_DIR="o", ITERATIONS="5", BLAS="none")
    for word in KEPT.split():
        name, _, value = word.partition("=")
        assert kept[name] == value
    local = """preset run_id out_dir iterations max_wallclock_seconds workers device blas resume
    data_path tokenizer_path vocab_size compute_dtype eval_only"""
    assert not set(local.upper().split()) & set(kept)


def test_a_file_is_scored_with_its_own_settings_and_the_users(tmp_path):
    kept = kept_by(tmp_path / "artifact.bin", ITERATIONS="5")
    cfg, warnings = t.knobs_from_env({"PRESET": "cpu", "EVAL_STRIDE": "16", "WORKERS": "3"}, kept)
    assert warnings == []
    assert (cfg.num_layers, cfg.train_seq_len, cfg.mixer, cfg.ngram_alpha) == (
        3, 512, "backoff", "0.5")  # fmt: skip
    assert (cfg.eval_stride, cfg.workers) == (16, 3)  # the environment's
    assert cfg.iterations == FIELDS["iterations"].default  # neither the file's nor the preset's
    assert cfg.max_wallclock_seconds == 600 and cfg.model_dim == 512
    off, _ = t.knobs_from_env({"NGRAM_MIXER_ENABLED": "0"}, kept)
    assert off.mixer == "off"


@pytest.mark.parametrize(
    "name, value",
    [("NUM_LAYERS", "3.0"), ("NUM_LAYERS", "0"), ("NUM_LAYERS", True), ("ROPE_BASE", "nan"),
     ("USE_SMEARGATE", "yes"), ("USE_SMEARGATE", None), ("MIXER", "magic"), ("MIXER", ""),
     ("NGRAM_ALPHA", "9"), ("NGRAM_ALPHA", [1]), ("ROPE_DIMS", "7"), ("RUN_ID", "x"),
     ("ITERATIONS", "5"), ("DATA_PATH", "x"), ("SMEAR_ENABLED", "1"), ("NO_SUCH_KNOB", None)],
)  # fmt: skip
def test_settings_in_a_file_that_this_script_would_not_write_are_refused(tmp_path, name, value):
    path = tmp_path / "artifact.bin"
    kept = kept_by(path)
    t.check_kept(kept, path)
    with pytest.raises(t.UserError) as caught:
        t.check_kept({**kept, name: value}, path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ") and name in line


def test_a_file_with_such_settings_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "artifact.bin"
    whole = t.settings_of
    monkeypatch.setattr(t, "settings_of", lambda *_: {"NUM_LAYERS": "-1", "WORKERS": "2"})
    monkeypatch.setattr(t, "check_kept", lambda *_: None)
    kept_by(path)
    monkeypatch.undo()
    assert t.settings_of is whole
    with pytest.raises(t.UserError, match=r"NUM_LAYERS=-1.*\n.*WORKERS"):
        t.read_artifact(path)


def test_a_file_of_other_numbers_is_not_scored(tmp_path):
    """EVAL_ONLY refuses what gives the file's numbers another meaning, and nothing else."""
    path = tmp_path / "artifact.bin"
    kept = kept_by(path, MIXER="off")
    for name, value in {"LOGIT_SOFTCAP": "20", "ROPE_DIMS": "8", "XSA_LAST_N": "1"}.items():
        cfg = t.knobs_from_env({name: value}, kept)[0]
        with pytest.raises(t.UserError, match=rf"{name}={value}\S*: .*artifact.bin has .*unset it"):
            t.Scoring.load(cfg, path, tmp_path, None)
    free = {"SEED": "1", "MATRIX_LR": "1", "WEIGHT_BITS": "4", "EVAL_SEQ_LEN": "64", "AUDIT": "0"}
    cfg = t.knobs_from_env({**free, "MIXER_MEMORY_MB": "5"}, kept)[0]  # no mixer, no tables
    with pytest.raises(t.UserError, match="more parameters than its 0"):  # it has none
        t.Scoring.load(cfg, path, tmp_path, None)
    cfg = t.knobs_from_env({"MIXER_MEMORY_MB": "5", "MIXER": "logistic"}, kept)[0]
    with pytest.raises(t.UserError, match=r"MIXER_MEMORY_MB=5: .* has 8000"):
        t.Scoring.load(cfg, path, tmp_path, None)


def test_names_that_are_no_settings():
    """A public name that is not kept stops; a slip is named; the rest is somebody else's."""
    others = dict.fromkeys(["SWA_CLI_DEPLOYMENT_TOKEN", "TTT_H", "HOME", "SEEDLING", "TRAIN"], "x")
    assert t.check_names(others) == ([], [])
    problems, _ = t.check_names({"TTT_LR": "1", "SWA_DECAY": "1"})
    assert [p.partition(":")[0] for p in problems] == ["SWA_DECAY", "TTT_LR"]
    slips = {"NUM_LAYER": "NUM_LAYERS", "SEEDS": "SEED", "MIXTER": "MIXER", "LR": "MATRIX_LR",
             "NUM_LAYERZ": "NUM_LAYERS", "MAX_WALLCLOCK": "MAX_WALLCLOCK_SECONDS"}  # fmt: skip
    for name, meant in slips.items():
        assert t.check_names({name: "1"}) == (
            [],
            [f"{name} is not a setting; did you mean {meant}?"],
        )
    names = [field.name.upper() for field in t.dataclasses.fields(t.Knobs)]
    assert set(t.ELSEWHERE.values()) <= set(names) and not set(t.ELSEWHERE) & set(names)


@pytest.mark.parametrize("env", [{}, {"MIXER": "off"}, {"MIXER_MEMORY_MB": "9", "SEED": "2"},
                                 {"MIXER_SIZE": "large"}, {"PACK_TEXT_BYTES": "9"}])  # fmt: skip
def test_own_settings_are_those_that_were_given(env):
    """Not those that fit_memory has chosen."""
    cfg, _ = t.knobs_from_env({"PRESET": "cpu", **env})
    cfg, _ = t.fit_memory(cfg, 1024, env, 10_000)
    given = [f"{name}={value}" for name, value in env.items()]
    assert sorted(t.unlike_preset(cfg, 1024, 10_000)) == sorted(given)

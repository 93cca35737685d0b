"""Every knob at its bounds, just beyond them, and as text that is no value; runs at the bounds."""

import ast
import inspect
import itertools
import math
import re

import pytest
from conftest import t
from test_cli import NET, TINY, dataset, error_of, final, run

__all__ = ["dataset"]  # a fixture
FIELDS = t.dataclasses.fields(t.Knobs)
NUMBERS = [f for f in FIELDS if type(f.default) in (int, float)]
CHOICES = [f for f in FIELDS if f.metadata["choices"] or type(f.default) is bool]
DEFAULTS = {"PRESET": "h100"}  # sets the same on every machine

# Settings that a rule of several knobs asks for beside a bound.
PARTNERS = {
    "MODEL_DIM lo": "NUM_HEADS=1 NUM_KV_HEADS=1 ROPE_DIMS=0",
    "MODEL_DIM hi": "NUM_HEADS=64",
    "NUM_HEADS lo": "NUM_KV_HEADS=1",
    "QK_GAIN_INIT hi": "NUM_HEADS=8",
    "TRAIN_SEQ_LEN hi": "TRAIN_BATCH_TOKENS=65536",
    "ENGRAM_EMBED_DIM hi": "ENGRAM_HASH_SIZE=8192",
}
# Bounds that no partners make possible, and the rule that says so.
REFUSED = {
    "NUM_HEADS hi": "MODEL_DIM=512 must be an even multiple of",
    "NUM_KV_HEADS hi": "NUM_HEADS=8 must be a multiple of",
    "ROPE_DIMS hi": "must be even, at most MODEL_DIM / NUM_HEADS = 64",
    "TRAIN_BATCH_TOKENS lo": "holds no window of TRAIN_SEQ_LEN=1024",
}


def pairs(text):
    """NAME=value words -> an environment."""
    return dict(word.split("=", 1) for word in text.split())


def problems_of(env):
    """The lines of refusal; [] where the settings are taken."""
    try:
        t.knobs_from_env(DEFAULTS | env)
    except t.UserError as error:
        return str(error).splitlines()
    return []


def shown(text):
    """A value in one line."""
    return text if text.isprintable() else ascii(text)


def refused(name, text, why):
    """Exactly one line, which names the knob, what it was set to and what would be right."""
    assert problems_of({name: text}) == [f"{name}={shown(text)}: {why}"]


def names_of(field):
    """What an environment may call a knob."""
    return [name for name in (field.name.upper(), field.metadata["alias"]) if name]


def bound_of(field, side):
    """A bound as a number of the knob's kind."""
    bound = field.metadata[side]
    number = type(field.default)(bound)
    assert number == bound, f"{field.name}: a bound of {bound} is none"
    return number


# --------------------------------------------------------------------------------------------------
# One knob


@pytest.mark.parametrize("side", ["lo", "hi"])
@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_a_bound_is_taken(field, side):
    need = field.metadata["needs"]
    bound, case = bound_of(field, side), f"{field.name.upper()} {side}"
    for name in names_of(field):
        env = DEFAULTS | pairs(need) | pairs(PARTNERS.get(case, "")) | {name: str(bound)}
        if case in REFUSED:
            lines = problems_of(env)
            assert any(f"{name}={bound}" in line and REFUSED[case] in line for line in lines)
            continue
        cfg, warnings = t.knobs_from_env(env)
        value = getattr(cfg, field.name)
        assert value == bound and type(value) is type(field.default) and warnings == []


@pytest.mark.parametrize("side", ["lo", "hi"])
@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_what_is_just_beyond_a_bound_is_refused(field, side):
    bound, away = bound_of(field, side), -1 if side == "lo" else 1
    beyond = bound + away if type(bound) is int else math.nextafter(bound, away * math.inf)
    why = f"must be from {field.metadata['lo']} to {field.metadata['hi']}"
    for name, text in itertools.product(names_of(field), (str(beyond), f"{away}{'9' * 40}")):
        refused(name, text, why)


NO_NUMBERS = ["x", " ", "\t", "''", "1,5", "1 2", "--1", "+-1", "1__0", "_1", "1_", "½", "²"]
NO_NUMBERS += ["0x10", "1e", ".", "None", "True", " 1", "1\n", "1\n2", "1_000", "٣", "1\u2028"]
NO_WHOLE_NUMBERS = ["1.5", "1.0", "1e3", "1e400", "nan", "inf", "-inf", "9" * 5000]
NO_FINITE_NUMBERS = ["nan", "-nan", "inf", "-inf", "infinity", "1e400", "-1e400"]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_what_is_no_number_is_refused(field):
    whole, limits = type(field.default) is int, f"{field.metadata['lo']} to {field.metadata['hi']}"
    for name in names_of(field):
        for text in NO_NUMBERS + NO_WHOLE_NUMBERS * whole:
            refused(name, text, "must be a whole number" if whole else "must be a number")
        for text in () if whole else NO_FINITE_NUMBERS:
            refused(name, text, f"must be from {limits}")


@pytest.mark.parametrize("text", ["-0", "-0.0", "+5", "007", "1\t", "0.٥", "1e0"])
def test_an_odd_number_is_refused_or_kept_as_a_plain_one(text):
    """What an artifact then says of it is what everybody would have written."""
    for field in NUMBERS:
        name = field.name.upper()
        env = {**pairs(PARTNERS.get(f"{name} lo", "")), name: text}
        if lines := problems_of(env):
            assert all(name in line for line in lines)
            continue
        value = getattr(t.knobs_from_env(DEFAULTS | env)[0], field.name)
        plain = t.as_text(value)
        assert re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", plain, re.ASCII)
        assert type(field.default)(plain) == value == float(text)
        assert field.metadata["lo"] <= value <= field.metadata["hi"]


NO_SWITCHES = ["2", "-1", "-0", "00", "01", "1.0", " 1", "1 ", "٠"]
NO_SWITCHES += ["true", "True", "yes", "on", "off"]


@pytest.mark.parametrize("field", CHOICES, ids=lambda f: f.name)
def test_a_choice_is_one_of_its_words(field):
    switch = type(field.default) is bool
    words = ["0", "1"] if switch else field.metadata["choices"]
    partners = {
        "RUN_ID": "x",
        "ARTIFACT": "x",
        "FILE": "x",
        "DEVICE": "cpu",
    }  # RESUME, MODE, PRESET
    for name in names_of(field):
        for word in words:
            value = getattr(t.knobs_from_env({**partners, name: word})[0], field.name)
            word = {"preset auto": "cpu", "ngram_mixer_enabled 0": "1"}.get(
                f"{field.name} {word}", word
            )  # what these two stand for
            assert value == (word == "1" if switch else word)
        wrong = [" ", "x", words[0] + words[1], f"{words[0]} ", *map(str.upper, words)]
        for text in set(NO_SWITCHES + wrong) - set(words):
            refused(name, text, "must be one of " + ", ".join(words))


def test_an_empty_variable_is_none():
    names = [name for field in FIELDS for name in names_of(field)]
    plain = t.knobs_from_env(DEFAULTS)[0]
    assert t.knobs_from_env(dict.fromkeys(names, "") | DEFAULTS)[0] == plain


TEXTS = {  # of knobs that take any text: what is and what is not one of theirs
    "RUN_ID": ("a A9 _a a.b a_b+c=d-e 7 é 日本 " + "a" * 100, "../x a/b . .. -a +a =a a:b a~ a*"),
    "NGRAM_ALPHA": ("0 1 .5 0.5 1. 1.00 0.0 auto", "1.5 -1 2 nan inf 1e-1 +1 0,5 00.5 AUTO"),
    "OUT_DIR": ("a ../a /", ""),
    "EVAL_ONLY": ("a ../a /", ""),
    "DATA_PATH": ("a ../a /", ""),
    "TOKENIZER_PATH": ("a ../a /", ""),
    "BLAS": ("auto none /lib/x.so", ""),
    "PROMPT": ("a é é\udcff", ""),
    "FILE": ("a ../a /", ""),
    "OUTPUT": ("a ../a /", ""),
}


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if f not in NUMBERS + CHOICES], ids=lambda f: f.name
)
def test_a_text_is_taken_as_it_is(field):
    name = field.name.upper()
    right, wrong = (words.split() for words in TEXTS[name])
    for text in right:
        env = DEFAULTS | pairs(field.metadata["needs"]) | {name: text}
        assert getattr(t.knobs_from_env(env)[0], field.name) == text
    for text in wrong + [" ", "a b", "\t"] * bool(wrong):
        (line,) = problems_of({name: text})
        assert line.startswith(f"{name}={shown(text)}: ")


# --------------------------------------------------------------------------------------------------
# Several knobs

RULES = [  # settings that break a rule and no other, what is said, what keeps it
    ("MODEL_DIM=520", "MODEL_DIM=520 must be an even multiple of NUM_HEADS=8", "MODEL_DIM=528"),
    ("NUM_KV_HEADS=3", "NUM_HEADS=8 must be a multiple of NUM_KV_HEADS=3", "NUM_KV_HEADS=2"),
    ("ROPE_DIMS=66", "ROPE_DIMS=66 must be even, at most MODEL_DIM / NUM_HEADS = 64",
     "ROPE_DIMS=64"),
    ("ROPE_DIMS=63", "ROPE_DIMS=63 must be even, at most MODEL_DIM / NUM_HEADS = 64",
     "ROPE_DIMS=62"),
    ("QK_GAIN_INIT=8.01 MODEL_DIM=800", "QK_GAIN_INIT=8.01 must be at most 8.00 for heads of 100",
     "QK_GAIN_INIT=8"),
    ("TRAIN_BATCH_TOKENS=1023",
     "TRAIN_BATCH_TOKENS=1023 holds no window of TRAIN_SEQ_LEN=1024", "TRAIN_BATCH_TOKENS=1024"),
    ("ITERATIONS=0 MAX_WALLCLOCK_SECONDS=0",
     "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0 together never stop: set one", "ITERATIONS=1"),
    ("ENGRAM_N_HEADS=1 ENGRAM_HASH_SIZE=32769 ENGRAM_EMBED_DIM=4096",
     "ENGRAM_N_HEADS=1 tables of ENGRAM_HASH_SIZE=32769 rows and ENGRAM_EMBED_DIM=4096 columns "
     "fit into no artifact", "ENGRAM_HASH_SIZE=32768"),
    ("RUN_ID=-x", "RUN_ID=-x: use letters, digits and . _ + = -, the first no sign", "RUN_ID=x-"),
    ("MODE=score", "MODE=score needs ARTIFACT: which file?", "ARTIFACT=x"),
    ("MODE=restore ARTIFACT=x", "MODE=restore needs FILE: which one?", "FILE=x"),
    ("RESUME=1", "RESUME=1 needs RUN_ID: which run should go on?", "RUN_ID=x"),
    ("NGRAM_ALPHA=1.01", "NGRAM_ALPHA=1.01: must be from 0 to 1, or auto", "NGRAM_ALPHA=1.00"),
]  # fmt: skip


@pytest.mark.parametrize("broken, message, mended", RULES, ids=[rule[0] for rule in RULES])
def test_a_broken_rule_gives_its_message(broken, message, mended):
    assert problems_of(pairs(broken)) == [message]
    assert problems_of(pairs(broken) | pairs(mended)) == []


def test_every_rule_is_broken_above():
    """A message is known by its words between what depends on the settings."""
    tree = ast.parse(inspect.getsource(t.check_together))
    (rules,) = [node.keys for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    for rule in rules:
        parts = rule.values if isinstance(rule, ast.JoinedStr) else [rule]
        texts = [part.value for part in parts if isinstance(part, ast.Constant)]
        words = max((word for text in texts for word in re.split(r"\{\w+\}", text)), key=len)
        assert any(words in message for _, message, _ in RULES), words


def test_all_broken_rules_are_said_at_once():
    """All but the one that needs an empty RUN_ID, where another needs a wrong one."""
    broken = pairs("""MODEL_DIM=8191 NUM_HEADS=4 NUM_KV_HEADS=3 ROPE_DIMS=9 QK_GAIN_INIT=10
        TRAIN_BATCH_TOKENS=1 ITERATIONS=0 MAX_WALLCLOCK_SECONDS=0 ENGRAM_N_HEADS=16
        ENGRAM_HASH_SIZE=65536 ENGRAM_EMBED_DIM=4096 RUN_ID=-x NGRAM_ALPHA=2 MODE=score""")
    lines = problems_of(broken)
    assert len(lines) == len(set(lines)) == len({rule[1].split("=")[0] for rule in RULES}) - 1
    assert all(any(f"{name}={value}" in x for x in lines) for name, value in broken.items())


def test_every_knob_is_named_at_once():
    """And what is wrong with several of them together, and what is no setting."""
    wrong = {name: "?" for f in NUMBERS + CHOICES for name in names_of(f) if name != "PRESET"}
    lines = problems_of(wrong | {"RUN_ID": "?", "NGRAM_ALPHA": "?", "TTT_LR": "?"})
    named = [line.partition("=")[0].partition(":")[0] for line in lines]
    assert sorted(named) == sorted([*wrong, "RUN_ID", "NGRAM_ALPHA", "TTT_LR"])


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name, why", [(n, why) for names, why in t.NOT_KEPT for n in names.split()]
)
def test_a_name_that_is_not_kept_is_refused_with_its_reason(name, why):
    assert problems_of({name: "1"}) == [f"{name}: not a setting here: {why}; unset it"]


def test_a_name_that_is_nearly_a_knobs_is_a_warning():
    for field in FIELDS:
        for name in names_of(field):
            near = name + name[-1]
            _, warnings = t.knobs_from_env(DEFAULTS | {near: "?"})
            assert warnings == [f"{near} is not a setting; did you mean {name}?"]


@pytest.mark.parametrize("name", ["X", "HOSTNAME", "PYTHONPATH", "OMP_NUM_THREADS", "LC_ALL", "é"])
def test_other_names_are_nobodys(name):
    assert t.knobs_from_env(DEFAULTS | {name: "?"}) == t.knobs_from_env(DEFAULTS)


# --------------------------------------------------------------------------------------------------
# Runs at the bounds

HUGE = 10**18
HARMLESS = {  # more than there is of steps, of tokens, of blocks: then all of it
    "LOGIT_CHUNK_TOKENS": 1 << 30,
    "MLX_MAX_MICROBATCH_TOKENS": HUGE,
    "GRAD_ACCUM_STEPS": HUGE,
    "EVAL_STRIDE": 1 << 16,
    "EVAL_BATCH_SEQS": 4096,
    "VAL_BATCH_SIZE": 1 << 26,
    "VAL_MAX_TOKENS": HUGE,
    "VAL_LOSS_EVERY": HUGE,
    "XSA_LAST_N": HUGE,
    "CHECKPOINT_EVERY": HUGE,
    "CHECKPOINT_SECONDS": 1e18,
    "MAX_WALLCLOCK_SECONDS": 1e18,
    "MUON_MOMENTUM_WARMUP_STEPS": HUGE,
    "WARMDOWN_ITERS": HUGE,
    "SKIP_BAD_STEPS": HUGE,
    "GRAD_CLIP_NORM": 1e18,
    "SEED": 2**31 - 1,
    "NGRAM_MAX_ORDER": 8,
}


@pytest.mark.parametrize("mixer", ["off", "backoff"])
def test_more_than_there_is_of_anything_is_all_of_it(mixer, dataset, tmp_path):
    env = {**TINY, **HARMLESS, "MIXER": mixer, "DATA_PATH": dataset.path, "AUDIT": 0}
    result = run(tmp_path, "most", **env)
    record = final(result)
    assert record["val_tokens"] == dataset.val_tokens - 1 and record["train_steps"] == 6
    assert record["peak_memory_bytes"] < 2e9
    assert sum(event["event"] == "train" for event in result.events) == 6


@pytest.mark.parametrize("clock", ["5e-324", "1"])
def test_a_clock_ends_steps_without_end(clock, dataset, tmp_path):
    env = {**TINY, **NET, "DATA_PATH": dataset.path, "TRAIN_LOG_EVERY": 0}
    for steps in (0, HUGE):
        env |= {"MAX_WALLCLOCK_SECONDS": clock, "ITERATIONS": steps}
        record = final(run(tmp_path, f"steps-{steps}", **env))
        assert record["train_steps"] == 1 if float(clock) < 1 else record["train_steps"] > 1
        assert record["train_seconds"] < 10


@pytest.mark.parametrize(
    "words, status, says",
    [
        ("PACK_TEXT_BYTES=1000000000000000000 MIXER=logistic", 2,
         "PACK_TEXT_BYTES=1000000000000000000: script and net leave about"),
        ("TRAIN_SEQ_LEN=65536 TRAIN_BATCH_TOKENS=67108864", 2, "no window of TRAIN_SEQ_LEN=65536"),
        ("ENGRAM_HASH_SIZE=65536 ENGRAM_EMBED_DIM=128", 2, "parameters at least fit into no"),
        ("MODEL_DIM=8192 NUM_HEADS=64 NUM_KV_HEADS=64", 2, "fit into no artifact"),
        ("NUM_LAYERS=96 MODEL_DIM=160", 1, "over the limit of 16,000,000"),
        ("VOCAB_SIZE=65536", 2, "VOCAB_SIZE=65536, but the tokenizer has 300"),
    ],
)  # fmt: skip
def test_more_than_there_is_room_for_is_a_line(words, status, says, dataset, tmp_path):
    env = {**TINY, **NET, "DATA_PATH": dataset.path, "USE_ORTHO_INIT": 0, **pairs(words)}
    result = run(tmp_path, "refused", **env)
    assert says in error_of(result, status) and len(result.err.splitlines()) == 1
    assert not (tmp_path / "logs").exists()  # the name is still free


@pytest.mark.parametrize("name", ["DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY", "BLAS"])
def test_a_path_to_nothing_is_a_line(name, dataset, tmp_path):
    """Also one that is no UTF-8, whose line is still readable."""
    env, strange = {**TINY, **NET, "DATA_PATH": dataset.path}, ["\udcff"] * (name != "BLAS")
    for path in ("d/" * 99 + "d", "é b", "/dev/null", *strange):
        error = error_of(run(tmp_path, "lost", **{**env, name: path}), 2)
        assert path.encode(errors="backslashreplace").decode() in error
    assert not list(tmp_path.iterdir())

"""Every command of the README, of docs/ and of data/README.md is run here, at tiny size.

Commands stand in blocks of `sh`, or in a line between backticks. What is not run is in NOT_RUN,
with its reason. A page's commands are run in their order, in a folder that looks like a clone.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, t

pytest.importorskip("matplotlib")
PAGES = ["README.md", "docs/reference.md", "docs/idea_net.md", "docs/idea_mixer.md",
         "data/README.md"]  # fmt: skip
NOT_RUN = {  # how a command begins: why it is not run
    "pip install": "installs packages: .ci/run does, in a fresh environment",
    "uv run": "installs packages",
    "python -m pytest\n": "runs this test",
    "python data/prepare.py fineweb": "downloads: test_prepare.py has a hub of its own",
    "mlx.launch --hostfile": "needs several machines; test_cli.py starts ranks",
    "mlx.launch -n 2": "two ranks need a free port: test_cli.py starts them",
    "caffeinate": "exists on a Mac only",
}
TINY = """PRESET=cpu DEVICE=cpu WORKERS=1 ITERATIONS=3 MAX_WALLCLOCK_SECONDS=0 TRAIN_BATCH_TOKENS=64
TRAIN_SEQ_LEN=32 WARMUP_STEPS=0 NUM_LAYERS=1 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 EVAL_STRIDE=16
ENGRAM_HASH_SIZE=64 ENGRAM_EMBED_DIM=8 MIXER_MEMORY_MB=4 PACK_TEXT_BYTES=3000 SAMPLE_TOKENS=9
AUDIT=0"""
TINY = dict(pair.split("=") for pair in TINY.split())
REDUCED = {  # what a command itself sets, made small
    r"--steps \d+": "--steps 3",
    r"\bSEED=1,2(,3)?": "SEED=1",
    r"\bPACK_TEXT_BYTES=\d+": "PACK_TEXT_BYTES=3000",
    r"\bMAX_WALLCLOCK_SECONDS=\d+": "MAX_WALLCLOCK_SECONDS=1",
    r"^(SEED=1 NUM|python tools/compare.py ENGRAM)": r"MIXER=off \1",
    "^DATA_PATH=/path/to/shards": "MIXER=off DATA_PATH=data/datasets/stdlib_sp1024",
    "/path/to/tokenizer.model": "data/tokenizers/stdlib_1024_bpe.model",
    r"(pytest tests/test_model.py.*)": r"\1 -k 'later_tokens or map'",
    r"\bt\.model": "data/tokenizers/stdlib_1024_bpe.model",
}
FIRST = "python train_gpt_mlx_kl.py"  # makes logs/RUN
SAYS = {  # what is in a command: what it prints
    f"^{FIRST}$": "val_bpb .*audit: pass",
    "--help all$": "EVAL_BATCH_SEQS",
    "MODE=sample": "^The with statement",
    "MODE=compress": "bits per byte",
    "MODE=restore": "as they were",
    "MODE=score": "val_bpb .*audit: off",
    "MODE=doctor": "^machine: ",
    "compare.py": "^ *n  *mean",
    "report.py": "^ *net  *contexts",
    "grep -h": r"^val_bpb \d",
}
KNOWN = {field.name.upper() for field in t.dataclasses.fields(t.Knobs)} | {"ARTIFACT"}
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python|pip|uv|git|cmp|grep|caffeinate|mlx\.launch|curl|conda|brew) .*"
)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


@functools.cache
def commands(page):
    """A page's commands, in their order."""
    text, found = text_of(page), []
    for match in BLOCK.finditer(text):
        if match[2] == "sh":
            lines = re.sub(r"\\\n\s*", "", match[3]).splitlines()
            code = [re.sub(r"\s+# .*", "", line).strip() for line in lines]
            parts = [part.strip() for line in code for part in line.split("&&")]
            found += [(match.start(), part) for part in parts if part]
    for match in re.finditer(r"`([^`\n]+)`", BLOCK.sub(lambda m: " " * len(m[0]), text)):
        found += [(match.start(), match[1])] if COMMAND.fullmatch(match[1]) else []
    return [command for _, command in sorted(found, key=lambda pair: pair[0])]


def why_not(command):
    return next((why for start, why in NOT_RUN.items() if f"{command}\n".startswith(start)), "")


class Clone:
    """A folder that looks like a clone, and what commands did in it."""

    def __init__(self, folder, own_script):
        self.folder, self.done = folder, {}
        for name in ("tests", "tools", "docs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        (folder / "data").mkdir()
        for name in ("data/prepare.py", "data/README.md", "README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)
        script = ROOT / "train_gpt_mlx_kl.py"
        if own_script:
            shutil.copy(script, folder)
        else:  # so that compiled kernels are at hand
            (folder / script.name).symlink_to(script)
            (ROOT / "__pycache__").mkdir(exist_ok=True)
            (folder / "__pycache__").symlink_to(ROOT / "__pycache__")

    def run(self, command):
        """Run a command, made small; a second time it is remembered."""
        for pattern, small in REDUCED.items():
            command = re.sub(pattern, small, command)
        if command not in self.done:
            clean = {name: value for name, value in os.environ.items() if name not in KNOWN}
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            env = clean | TINY | {"PATH": path, "DATA_PATH": "data/datasets/stdlib_sp1024"}
            if command == FIRST:
                env |= {"RUN_ID": "RUN", "AUDIT": "1"}
            self.done[command] = subprocess.run(
                ["bash", "-c", command], cwd=self.folder, env=env, capture_output=True, text=True
            )
        return self.done[command]

    def run_to(self, page, index):
        """Run a page's commands up to one; returns what that one did."""
        for command in commands(page)[: index + 1]:
            if not why_not(command):
                last = self.run(command)
        return last


def write_files(folder):
    """The files that the pages speak of, with text of Python's own."""
    library = Path(os.__file__).parent
    text = [(library / f"{name}.py").read_text() for name in ("argparse", "typing", "tarfile")]
    (folder / "notes").mkdir()
    for i, part in enumerate(text):
        (folder / "notes" / f"{i}.txt").write_text(part)
    record = json.dumps({"text": text[0][:3000]}) + "\n"
    for name in ("articles.jsonl", "more.jsonl", "x.jsonl"):
        (folder / name).write_text(record)
    (folder / "notes.txt").write_text(text[1][:2000])
    (folder / "other.txt").write_text(text[2][:3000])


def cut_shard(path, most):
    """Leave so many tokens of a shard."""
    tokens = np.fromfile(path, "<u2")[512 : 512 + most]
    path.write_bytes(t.shard_header(most) + tokens.tobytes())


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory):
    """A clone in which the default corpus was made, and then cut."""
    clone = Clone(tmp_path_factory.mktemp("clone"), own_script=False)
    write_files(clone.folder)
    made = clone.run("python data/prepare.py stdlib")
    assert made.returncode == 0, made.stderr
    folder = clone.folder / "data/datasets/stdlib_sp1024"
    cut_shard(folder / "stdlib_train_000000.bin", 60_000)
    cut_shard(folder / "stdlib_val_000000.bin", 800)
    (folder / "manifest.json").unlink()
    return clone


@pytest.fixture(scope="session")
def clone_of(stdlib, tmp_path_factory):
    """clone_of(page): where its commands are run; those that change the script have their own."""

    @functools.cache
    def make(page):
        own = Clone(tmp_path_factory.mktemp("idea"), own_script=True)
        for name in ("datasets", "tokenizers"):
            shutil.copytree(stdlib.folder / "data" / name, own.folder / "data" / name)
        return own

    return lambda page: make(page) if "idea" in page else stdlib


RUN = [(page, i) for page in PAGES for i, c in enumerate(commands(page)) if not why_not(c)]


@pytest.mark.parametrize("page, index", RUN, ids=[f"{p}: {commands(p)[i]}"[:90] for p, i in RUN])
def test_command(page, index, clone_of):
    if "git apply" in "".join(commands(page)) and not shutil.which("git"):
        pytest.skip("no git")
    clone = clone_of(page)
    if page != "README.md" and "idea" not in page:
        clone.run(FIRST)
    done = clone.run_to(page, index)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr[-600:]
    for part, says in SAYS.items():
        if re.search(part, commands(page)[index]):
            assert re.search(says, done.stdout, re.M), done.stdout[-600:]


def test_reasons_and_sizes_are_needed():
    every = [command for page in PAGES for command in commands(page)]
    for start in NOT_RUN:
        assert any(f"{command}\n".startswith(start) for command in every), start
    for part in [*REDUCED, *SAYS]:
        assert any(re.search(part, command) for command in every), part


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_hidden(page):
    """What looks like a command stands where `commands` finds it."""
    for match in BLOCK.finditer(text_of(page)):
        if match[2] not in ("sh", "diff"):
            assert [x for x in match[3].splitlines() if COMMAND.fullmatch(x.strip())] == []
    outside = BLOCK.sub("", text_of(page))
    assert [x for x in re.findall("^ {4}(.*)", outside, re.M) if COMMAND.fullmatch(x)] == []
    assert outside.count("```") == 0


# ---- What else the pages promise


def test_a_restored_text_takes_the_bytes_that_its_score_claims(stdlib):
    """The README's proof: compressed with the net, the text has the size that its score says."""
    proof = [i for i, c in enumerate(commands("README.md")) if c.startswith("cmp ")]
    assert len(proof) == 1 and stdlib.run_to("README.md", proof[0]).returncode == 0
    records = (stdlib.folder / "logs/RUN/metrics.jsonl").read_text().splitlines()
    final = json.loads(records[-1])
    assert final["event"] == "final" and final["val_whole"] and final["val_bytes"] > 1500
    claimed = final["val_bpb"] * final["val_bytes"] / 8
    code = (stdlib.folder / "val.tgk").read_bytes()
    assert code[2] & t.NET_TOO and 0 < len(code) - claimed < 20


@pytest.mark.parametrize("page, knob, first, second, metric", [
    ("docs/idea_net.md", "ATTN_GATE", "0", "1", "val_bpb_net"),
    ("docs/idea_mixer.md", "MIXER_SIZE", "medium", "mine", "val_bpb_context"),
])  # fmt: skip
def test_an_idea_makes_another_artifact(page, knob, first, second, metric, clone_of):
    if not shutil.which("git"):
        pytest.skip("no git")
    clone = clone_of(page)
    clone.run_to(page, len(commands(page)) - 1)
    assert (clone.folder / "train_gpt_mlx_kl.py").read_text() == text_of("train_gpt_mlx_kl.py")
    finals = []
    for value in (first, second):
        log = next(clone.folder.glob(f"logs/compare/*/{knob}={value}+SEED=1/metrics.jsonl"))
        finals.append(json.loads(log.read_text().splitlines()[-1]))
    one, other = finals
    assert one["event"] == other["event"] == "final" and one[metric] != other[metric]
    assert one["artifact_sha256"] != other["artifact_sha256"]
    if metric == "val_bpb_context":
        assert one["val_bpb_net"] == other["val_bpb_net"]


@pytest.mark.parametrize("page", ["docs/idea_net.md", "docs/idea_mixer.md"])
def test_an_idea_is_small(page):
    (diff,) = [m[3] for m in BLOCK.finditer(text_of(page)) if m[2] == "diff"]
    changed = re.findall(r"^[+-](?![+-]{2} ).*", diff, re.M)
    assert 0 < len(changed) < 20 and max(map(len, changed)) <= 101


def test_the_machine_that_ci_is_takes_the_second_command():
    line = next(x for x in text_of("README.md").splitlines() if "-m pytest" in x)
    assert line == "pip install -r tests/requirements.txt && python -m pytest"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", text_of(page))):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = folder / path if path else ROOT / page
        assert file.exists(), target
        titles = re.findall("^#+ (.*)", file.read_text(), re.M) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, target


OTHER_NAMES = {"ATTN_GATE", "UPDATE_DOCS", "NUMBA_CACHE_DIR"}


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_pages_name_exist(page):
    names = set(re.findall(r"\b([A-Z][A-Z0-9_]{2,})=", text_of(page)))
    aliases = {field.metadata["alias"] for field in t.dataclasses.fields(t.Knobs)}
    assert names <= KNOWN | aliases | OTHER_NAMES


def test_errors_that_people_meet_are_those_of_the_code():
    table = text_of("README.md").partition("\n## When something goes wrong")[2]
    quoted = re.findall(r"^\| `([^`]+)`", table.partition("\n## ")[0], re.M)
    source = text_of("train_gpt_mlx_kl.py") + text_of("data/prepare.py")
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings in several parts
    assert len(quoted) > 8
    for words in quoted:
        for part in words.split("..."):
            assert part.strip() in source, part


def test_the_file_format_is_todays():
    assert f"| 2 | format version, little-endian: {t.FORMAT_VERSION} |" in text_of(
        "docs/reference.md"
    )


@pytest.mark.parametrize("page", PAGES[:-1])
def test_prose_is_wrapped(page):
    prose = BLOCK.sub("", text_of(page)).splitlines()
    assert [x for x in prose if len(x) > 100 and x[0] != "|" and not x.startswith("![")] == []


def test_the_picture_is_of_a_run_and_has_both_colours(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    final = {"event": "final", "val_bpb": 1.5, "val_bpb_net": 2.0, "val_bpb_context": 1.6,
             "val_tokens": 100, "val_bytes": 240, "train_seconds": 60.0}  # fmt: skip
    steps = [{"event": "train", "train_time_ms": 1000 * i, "train_loss": 7 - i / 10, "step": i}
             for i in range(1, 40)]  # fmt: skip
    lines = [json.dumps(r) for r in (*steps, {"event": "val", "step": 39}, final)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out, script = tmp_path / "a.svg", ROOT / "tests/benchmarks/picture.py"
    subprocess.run([sys.executable, script, run, "--out", out], check=True, capture_output=True)
    ours, kept = out.read_text(), text_of("tests/benchmarks/score.svg")
    for svg in (ours, kept):
        assert "prefers-color-scheme:dark" in svg and not re.search("#0[1-6]0[1-6]0[1-6]", svg)
        assert "fill: var(--paper)" in svg and "var(--ink)" in svg
    assert ">1.500<" in ours and ">1.600<" in ours
    sizes = {
        "val_sha256": "ab",
        "code_bytes": 10**6,
        "model_bytes": 5 * 10**6,
        "packed_bytes": 2 * 10**6,
    }
    for minutes, bpb in ((1, 1.4), (9, 1.3)):
        record = {**final, **sizes, "val_bpb": bpb, "train_seconds": 60.0 * minutes}
        (tmp_path / str(minutes)).mkdir()
        (tmp_path / str(minutes) / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    command = [sys.executable, script, tmp_path / "1", tmp_path / "9", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    assert all(f">{word}<" in out.read_text() for word in ("1.400", "1.300", "9 min", "6.00 MB"))

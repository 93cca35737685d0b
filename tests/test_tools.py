"""tools/report.py and tools/compare.py: what they read, show, run and say."""

import ast
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_cli
from conftest import ROOT

pytest.importorskip("matplotlib")
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import compare  # noqa: E402
import report  # noqa: E402

dataset = test_cli.dataset  # the fixture
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium to open the page in")

CONFIG = {"event": "config", "run_id": "x", "gflops": 1.0, "preset": "cpu", "num_layers": 4,
          "matrix_lr": 0.02, "audit": True, "train_batch_tokens": 2048}  # fmt: skip
TRAIN = [{"event": "train", "step": s, "train_loss": 7 - s / 10, "lr_factor": 1 - s / 40,
          "train_time_ms": 300.0 * s} for s in range(1, 31)]  # fmt: skip
VAL = [{"event": "val", "step": s, "val_loss": 6.5 - s / 10, "val_bpb": 3 - s / 30,
        "train_time_ms": 310.0 * s}
       for s in (10, 20, 30)]  # fmt: skip
EXPORT = {"event": "export", "code_bytes": 240_000, "model_bytes": 3_000_000,
          "packed_bytes": 20_000, "total_bytes": 3_240_000, "limit_bytes": 16_000_000,
          "packed_tokens": 37_000, "train_steps": 30, "train_tokens": 61_440,
          "train_seconds": 20.4}  # fmt: skip
FINAL = {**EXPORT, "event": "final", "val_bpb": 1.39, "val_bpb_net": 2.79, "val_bpb_context": 1.4,
         "audit": "pass", "val_sha256": "a", "mode": "sliding", "val_whole": True}  # fmt: skip
WHOLE = [CONFIG, *TRAIN, *VAL, EXPORT, FINAL]


def write_run(folder, records, end=""):
    """A run's folder with these records, and then `end`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + end)
    return folder


def made_up_costs(folder, rng, **changed):
    """costs.npz of 40 documents of 10 to 400 tokens; the net is worse, the mixed cost better."""
    lengths = rng.integers(10, 400, 40)
    n = int(lengths.sum())
    starts = np.cumsum(lengths)[:-1]
    nats = rng.gamma(2, 1, (n, 1)) * [[1.5, 1.2, 1.0]]
    arrays = {
        "tokens": rng.integers(0, 6, n).astype(np.uint16),
        "nats": nats.astype(np.float32),
        "bytes": rng.integers(1, 5, n).astype(np.uint8),
        "starts": starts,
        "pieces": np.array(["", "▁the", "<script>alert(1)</script>", "&", "\n", "<0xE2>"]),
    }
    arrays |= changed  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "costs.npz", **arrays)
    return SimpleNamespace(**arrays)


def report_of(capsys, *argv):
    """Exit status, what was printed, what went to stderr."""
    status = report.main([str(word) for word in argv])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# ---- The two programs


def test_the_tools_are_small_and_know_the_script_by_its_records_only():
    for path in TOOLS.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = [
            node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {n.name for node in imported for n in node.names} | {
            getattr(node, "module", "") for node in imported
        }
        assert not any(name and "train_gpt" in name for name in names), path
    assert sum(len(path.read_text().splitlines()) for path in TOOLS.glob("*.py")) < 700


@pytest.mark.parametrize("tool", ["report.py", "compare.py"])
def test_help_needs_no_run(tool, tmp_path):
    command = [sys.executable, TOOLS / tool, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "python tools/" in done.stdout


# ---- Report: runs in every state


def test_a_finished_run_is_a_row_of_figures(tmp_path, capsys):
    write_run(tmp_path / "logs" / "a", WHOLE)
    status, out, _ = report_of(capsys, tmp_path / "logs", "--out", tmp_path / "page.html")
    figures = "2.7900 1.4000 1.3900 3,240,000 61,440 20 pass a"
    assert status == 0 and " ".join(out.splitlines()[1].split()) == figures
    assert "the best 1.3900 BPB" in (tmp_path / "page.html").read_text()


def test_only_knobs_that_differ_are_shown(tmp_path):
    write_run(tmp_path / "a", WHOLE)
    other = {**CONFIG, "num_layers": 3, "audit": False, "run_id": "y", "gflops": 2.0}
    write_run(tmp_path / "b", [other, *WHOLE[1:]])
    runs = report.find_runs([tmp_path])
    assert report.differing(runs) == ["NUM_LAYERS", "AUDIT"]
    table = report.terminal_table(runs, 200).splitlines()
    assert table[1].endswith("a  NUM_LAYERS=4  AUDIT=1")
    assert table[2].endswith("b  NUM_LAYERS=3  AUDIT=0")
    assert max(map(len, report.terminal_table(runs, 80).splitlines())) <= 80
    assert "MATRIX_LR" not in report.html_table(runs)


def test_a_half_line_at_the_end_is_left_out(tmp_path):
    run = report.read_run(write_run(tmp_path / "a", [CONFIG, *TRAIN], '{"event": "fin'))
    assert (len(run.records), run.damaged, run.status()) == (31, 1, "unfinished, step 30")
    assert report.notes([run]) == ["a: 1 damaged line(s) left out."]


@pytest.mark.parametrize("line", ["[1]", "3", '"event"', '{"step": 1}', '{"event": 1}', "\0\xff"])
def test_a_line_that_is_no_record_is_left_out(tmp_path, line):
    run = report.read_run(write_run(tmp_path / "a", WHOLE, line + "\n"))
    assert run.damaged == 1 and run.final == FINAL


def test_an_unfinished_run_has_its_last_validation(tmp_path, capsys):
    write_run(tmp_path / "a", [CONFIG, *TRAIN, *VAL])
    _, out, _ = report_of(capsys, tmp_path, "--out", tmp_path / "page.html")
    assert " ".join(out.splitlines()[1].split()) == "2.0000 - - - - - unfinished, step 30 a"


def test_a_run_that_is_made_longer_is_unfinished(tmp_path):
    run = report.read_run(write_run(tmp_path / "a", [*WHOLE, CONFIG, *TRAIN]))
    assert not run.final and run.status() == "unfinished, step 30" and run.score() == math.inf


def test_a_failed_audit_is_no_score(tmp_path):
    write_run(tmp_path / "best", [CONFIG, {**FINAL, "val_bpb": 0.5, "audit": "fail"}])
    write_run(tmp_path / "good", WHOLE)
    runs = report.find_runs([tmp_path])
    assert [run.name for run in runs] == ["good", "best"] and runs[1].status() == "fail"


def test_folders_without_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ((), ("nowhere",)):
        status, out, err = report_of(capsys, *argv)
        assert (status, out, len(err.splitlines())) == (2, "", 1), argv
        assert err.startswith("error: no runs in ")
    Path("logs").mkdir()
    assert report_of(capsys)[0] == 2
    Path("logs/empty").mkdir()
    status, out, _ = report_of(capsys, "logs/empty")
    assert status == 0 and "unfinished, no step" in out


def test_runs_below_a_folder_are_found_once(tmp_path):
    write_run(tmp_path / "compare" / "x" / "A=1", WHOLE)
    write_run(tmp_path / "b", [CONFIG])
    again = tmp_path / "compare" / ".." / "b"
    runs = report.find_runs([tmp_path, tmp_path / "b", again, tmp_path / "compare"])
    assert [run.name for run in runs] == ["compare/x/A=1", "b"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("val_sha256", "b", "cannot be compared"), ("mode", "standard", "modes"),
     ("train_steps", 29, "numbers of steps"), ("packed_tokens", 5, "amounts of text"),
     ("val_whole", False, "1 of 2 scored only a part")],
)  # fmt: skip
def test_what_makes_scores_differ_is_said(tmp_path, name, value, says):
    folders = write_run(tmp_path / "a", WHOLE), write_run(tmp_path / "b", WHOLE)
    assert report.notes([*map(report.read_run, folders)]) == []
    write_run(tmp_path / "b", [*WHOLE[:-1], {**FINAL, name: value}])
    said = report.notes([*map(report.read_run, folders)])
    assert len(said) == 1 and says in said[0]
    assert report.notes([*map(report.read_run, folders)], "packed_tokens") == (
        [] if name == "packed_tokens" else said
    )


def test_a_repeated_step_counts_once():
    twice = [*TRAIN, {**TRAIN[4], "train_loss": 1.0}, {"event": "train", "step": 31}]
    step, loss = report.Run(Path("."), "a", twice, 0).curve("train", "train_loss")
    assert list(step) == list(range(1, 31)) and loss[4] == 1.0 and loss[5] == 6.4


# ---- Report: costs


def test_costs_add_up(tmp_path, rng):
    made = made_up_costs(tmp_path, rng)
    costs = report.Costs(tmp_path / "costs.npz")
    bits, starts = made.nats.astype(float) / math.log(2), [0, *made.starts, len(made.tokens)]
    sizes, bpb = costs.stretches(costs.starts)
    position_bits, position_bytes = {}, {}
    for i, (a, b) in enumerate(itertools.pairwise(starts)):
        assert sizes[i] == made.bytes[a:b].sum()
        assert bpb[i] == pytest.approx(bits[a:b].sum(axis=0) / made.bytes[a:b].sum(), rel=1e-5)
        for j in range(a, b):
            octave = math.floor(2 * math.log2(j - a + 1))
            position_bits[octave] = position_bits.get(octave, 0) + bits[j]
            position_bytes[octave] = position_bytes.get(octave, 0) + int(made.bytes[j])
    position, by_position = costs.by_position(least_bytes=1)
    octaves = sorted(position_bits)
    assert position == pytest.approx([2 ** ((octave + 0.5) / 2) for octave in octaves])
    naive = [position_bits[octave] / position_bytes[octave] for octave in octaves]
    assert by_position == pytest.approx(np.array(naive), rel=1e-5)


def test_the_dearest_and_the_cheapest_passage_are_found(tmp_path, rng):
    nats = np.full((1000, 3), 1.0, np.float32)
    nats[240:320], nats[560:640] = 9.0, 0.1
    made_up_costs(tmp_path, rng, tokens=np.ones(1000, np.uint16), nats=nats, starts=np.array([5]),
                  bytes=np.full(1000, 3, np.uint8))  # fmt: skip
    dear, cheap = report.Costs(tmp_path / "costs.npz").passages()
    assert (dear[0], cheap[0]) == (240, 560) and len(dear) == len(set(dear)) == 6


def test_a_text_shorter_than_a_passage_is_one(tmp_path, rng):
    made_up_costs(tmp_path, rng, tokens=np.ones(7, np.uint16), nats=np.ones((7, 3)),
                  starts=np.array([], int), bytes=np.ones(7, np.uint8))  # fmt: skip
    costs = report.Costs(tmp_path / "costs.npz")
    assert [list(kind) for kind in costs.passages()] == [[0], [0]]
    assert report.passage(costs, 0).count("<i ") == 7


@pytest.mark.parametrize(
    "changed",
    [{"starts": np.array([10**6])}, {"starts": np.array([-1])}, {"bytes": np.ones(3, np.uint8)},
     {"nats": np.ones((5, 3))}, {"pieces": np.array(["a"])}, {"tokens": np.array([], np.uint16)},
     {"pieces": np.array([{}] * 6, dtype=object)}],
)  # fmt: skip
def test_costs_that_do_not_fit_together_are_a_sentence(tmp_path, rng, changed):
    made_up_costs(tmp_path, rng, **changed)
    costs, sentence = report.read_costs(report.read_run(tmp_path))
    assert costs is None and sentence.startswith("costs.npz is damaged: ")


def test_a_page_without_or_with_damaged_costs_says_so(tmp_path, rng, capsys):
    write_run(tmp_path / "a", WHOLE)
    made_up_costs(write_run(tmp_path / "b", WHOLE), rng)
    raw = (tmp_path / "b" / "costs.npz").read_bytes()
    (tmp_path / "b" / "costs.npz").write_bytes(raw[: len(raw) // 2])
    made_up_costs(write_run(tmp_path / "c", WHOLE), rng)
    assert report_of(capsys, tmp_path, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("No costs.npz: nothing is recorded of single tokens.") == 1
    assert page.count("costs.npz is damaged: ") == 1
    assert page.count("BPB, the score is 1.3900.") == 1
    total = report.Costs(tmp_path / "c" / "costs.npz").stretches([0])[1][0, 2]
    write_run(tmp_path / "c", [*WHOLE[:-1], {**FINAL, "val_bpb": total}])
    assert report.read_costs(report.read_run(tmp_path / "c"))[1] == ""


# ---- Report: pictures and the page


def drawn(monkeypatch, make):
    """What `make` plots: the calls of the axes' methods, by name."""
    from matplotlib.axes import Axes

    calls = {"barh": [], "plot": [], "set_ylim": []}
    for name, kept in calls.items():
        method = getattr(Axes, name)

        def record(self, *args, method=method, kept=kept, **more):
            kept.append((args, more))
            return method(self, *args, **more)

        monkeypatch.setattr(Axes, name, record)
    make()
    return calls


def test_all_bytes_of_the_limit_are_drawn(tmp_path, monkeypatch):
    runs = [report.read_run(write_run(tmp_path / name, WHOLE)) for name in "ab"]
    calls = drawn(monkeypatch, lambda: report.bytes_picture(runs))["barh"]
    width = {more["label"]: args[1][0] for args, more in calls}
    assert width == {"code": 240_000, "net": 2_980_000, "packed text": 20_000, "left": 12_760_000}
    assert sum(width.values()) == 16_000_000
    recorded = {**EXPORT, "group_bytes": {"a": 980_000, "b": 2_000_000}}
    run = report.read_run(write_run(tmp_path / "c", [CONFIG, recorded]))
    calls = drawn(monkeypatch, lambda: report.bytes_picture([run]))["barh"]
    names = [more["label"] for _, more in calls]
    assert names == ["code", "a", "b", "packed text", "left"] and calls[1][0][1] == [980_000]


def test_without_matplotlib_there_is_a_table_and_a_line(tmp_path):
    write_run(tmp_path / "logs" / "a", WHOLE)
    hide = "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, sys.argv.pop(1))"
    command = [sys.executable, "-c", f"{hide}; import report; sys.exit(report.main())", TOOLS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "1.3900" in done.stdout
    assert done.stderr == "error: the pictures need matplotlib: pip install matplotlib\n"


def test_losses_are_drawn_at_their_tokens_and_seconds(tmp_path, monkeypatch):
    run = report.read_run(write_run(tmp_path / "a", WHOLE))
    (train, _), (val, _) = drawn(monkeypatch, lambda: report.curves([run], "train_loss", True))[
        "plot"
    ]
    assert train[0] == pytest.approx(2048 * np.arange(1, 31)) and train[1][9] == 6.0
    assert val[0] == pytest.approx([20480, 40960, 61440]) and val[1] == pytest.approx(
        [5.5, 4.5, 3.5]
    )
    plots = drawn(monkeypatch, lambda: report.curves([run], "train_loss", False))["plot"]
    assert plots[-1][0][0] == pytest.approx([3.1, 6.2, 9.3])


def test_the_steep_start_is_cut_off_and_only_the_best_have_colours(tmp_path, monkeypatch):
    runs = [report.read_run(write_run(tmp_path / str(i), WHOLE)) for i in range(9)]
    calls = drawn(monkeypatch, lambda: report.curves(runs, "train_loss", True))
    (top,) = (more["top"] for _, more in calls["set_ylim"] if "top" in more)
    assert top == pytest.approx(1.01 * 6.7)  # step 3 of 30
    colour = {more["gid"]: more["color"] for _, more in calls["plot"]}
    assert list(colour.values())[::-1] == [*report.SERIES, report.FAINT]
    calls = drawn(monkeypatch, lambda: report.curves(runs, "lr_factor", True))
    assert not any("top" in more for _, more in calls["set_ylim"])


@pytest.mark.parametrize(
    "records",
    [
        [],
        [CONFIG],
        [CONFIG, *VAL],
        [TRAIN[0]],
        [CONFIG, EXPORT],
        [{"event": "final"}],
        [*WHOLE[:-1], {**FINAL, "val_bpb": None}],
    ],
)
def test_a_page_is_made_of_whatever_is_there(tmp_path, capsys, records):
    write_run(tmp_path / "a", records)  # fmt: skip
    status, _, err = report_of(capsys, tmp_path / "a", "--out", tmp_path / "new" / "page.html")
    assert (status, err) == (0, "") and (tmp_path / "new" / "page.html").stat().st_size > 5000


def test_the_page_is_self_contained_and_has_the_pages_colours(tmp_path, rng, capsys):
    made_up_costs(
        write_run(tmp_path / "a", [*WHOLE[:-1], {**FINAL, "experts": {"word": 0.01}}]), rng
    )
    report_of(capsys, tmp_path, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert {"".join(link)[:1] for link in links} == {"#", "d"}  # parts of itself; the empty icon
    assert "@import" not in page and "<script>alert" not in page
    assert re.findall(r"#010[12]0\d", page) == []
    # What Matplotlib draws in a colour of its own does not suit light and dark.
    assert re.findall(r"(?:fill|stroke): (#\w+)", page) == []
    assert page.count("<figure>") == 7 and "bits (net " in page


def test_a_reader_who_leaves_is_no_error(tmp_path):
    write_run(tmp_path / "a", WHOLE)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, TOOLS / "report.py", tmp_path, "--out", tmp_path / "page.html"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_a_net_alone_has_no_contexts(tmp_path):
    final = {**FINAL, "mixer": "off", "val_bpb": 2.79, "val_bpb_context": 2.79}
    row = report.read_run(write_run(tmp_path / "a", [*WHOLE[:-1], final])).row()
    assert [row[name] for name in ("net", "contexts", "mixed")] == ["2.7900", "-", "2.7900"]


def test_fifty_runs_stay_readable(tmp_path, capsys):
    for i in range(50):
        records = [{**CONFIG, "seed": i}, *TRAIN, *VAL, EXPORT, {**FINAL, "val_bpb": 1 + i / 100}]
        write_run(tmp_path / f"run-{i:02}", records)
    _, out, _ = report_of(capsys, tmp_path, "--out", tmp_path / "page.html")
    assert len(out.splitlines()) == 52 and "run-00  SEED=0" in out
    page = (tmp_path / "page.html").read_text()
    own = re.findall(r'<tr id="run\d+" style="--own: (.*?)">', page)
    assert own == [f"var(--s{i})" for i in range(8)] + ["var(--faint)"] * 42
    assert page.count("<details open>") == 1 and page.count("<details>") == 49
    assert len(page) < 1_000_000


def chromium(page, *flags):
    """Open a page: (the DOM after its scripts, what its console says)."""
    folder = page.parent / f"profile-{time.monotonic_ns()}"
    quiet = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"""
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={folder}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


CLICKS = """<script>
const seen = [], names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
const click = column => {
  table.tHead.rows[0].cells[column].firstChild.click();
  const head = table.tHead.rows[0].cells[column];
  seen.push(names().join(" ") + " " + head.getAttribute("aria-sort"));
};
[0, 0, 3, 3, 4, 7].forEach(click);
const row = table.tBodies[0].rows[0], lines = document.querySelectorAll("svg ." + row.id);
row.onmouseenter(new MouseEvent("mouseenter"));
seen.push("hot " + (lines.length > 2 && [...lines].every(line => line.matches(".hot"))));
row.onmouseleave(new MouseEvent("mouseleave"));
seen.push("cold " + [...lines].every(line => !line.matches(".hot")));
document.title = seen.join("; ");
</script>"""


@in_chromium
def test_the_page_sorts_in_a_browser_without_errors(tmp_path, rng, capsys):
    made_up_costs(write_run(tmp_path / "a", WHOLE), rng)
    write_run(tmp_path / "b", [*WHOLE[:-1], {**FINAL, "val_bpb": 1.1, "total_bytes": 999_999}])
    write_run(tmp_path / "c", [CONFIG, *TRAIN, *VAL])
    page = tmp_path / "page.html"
    report_of(capsys, tmp_path, "--out", page)
    page.write_text(page.read_text() + CLICKS)
    dom, console = chromium(page, "--dump-dom")
    assert console == []
    assert re.search("<title>(.*?)</title>", dom)[1].split("; ") == [
        "a b c ascending", "c b a descending", "b a c ascending", "a b c descending",
        "b a c ascending", "b a c ascending", "hot true", "cold true",
    ]  # fmt: skip
    page.write_text(page.read_text() + "<script>undefined.broken</script>")
    assert len(chromium(page, "--dump-dom")[1]) == 1  # an error would have been seen


@in_chromium
def test_the_page_suits_light_and_dark(tmp_path, rng, capsys):
    from PIL import Image

    made_up_costs(write_run(tmp_path / "a", WHOLE), rng)
    page, shots = tmp_path / "page.html", []
    report_of(capsys, tmp_path, "--out", page)
    for scheme in (0, 1):  # dark, light
        path = tmp_path / f"{scheme}.png"
        chromium(page, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={path}",
                 "--window-size=1200,900")  # fmt: skip
        shots.append(np.asarray(Image.open(path).convert("L"), dtype=float))
    dark, light = shots
    assert dark[0, 0] < 40 and light[0, 0] > 240 and dark.shape == light.shape == (900, 1200)
    for shot in shots:  # the ink of text and of pictures stands out from the background
        assert (abs(shot[:90] - shot[0, 0]) > 150).mean() > 0.005
        assert (abs(shot[450:] - shot[0, 0]) > 120).mean() > 0.002


# ---- Compare: statistics


def test_quantiles_of_students_t():
    """Against tables of the distribution, and its density integrated by Simpson's rule."""
    for df, known in {1: 12.706, 2: 4.303, 5: 2.571, 9: 2.262, 10: 2.228, 20: 2.086}.items():
        assert compare.T[df - 1] == known
    for df, t in enumerate(compare.T, 1):
        x = np.linspace(0, t, 20_001)
        weights = np.where(np.arange(len(x)) % 2, 4, 2)
        weights[[0, -1]] = 1
        scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
        inside = 2 * scale * (weights * (1 + x * x / df) ** (-(df + 1) / 2)).sum() * x[1] / 3
        assert inside == pytest.approx(0.95, abs=1e-4), df


def test_an_interval_by_hand():
    low, high = compare.interval([1.0, 2.0, 3.0])  # mean 2, deviation 1: 2 +- 4.303 / sqrt(3)
    assert (low, high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)
    low, high = compare.interval([0.0, 1.0] * 20)  # more than the table has: its last is wider
    assert (high - low) / 2 == pytest.approx(2.074 * 0.50637 / math.sqrt(40), rel=1e-4)


@pytest.mark.parametrize(
    ("differences", "says"),
    [([-0.01, -0.011, -0.012], "b is better than a by 0.0110 BPB: shown (n = 3 seeds, 95 % "
      "interval -0.0135 to -0.0085)."),
     ([0.01, 0.011, 0.012], "b is worse than a by 0.0110 BPB: shown (n = 3 seeds, 95 % interval "
      "+0.0085 to +0.0135)."),
     ([-0.01, 0.004, 0.002], "b is better than a by 0.0013 BPB: it may be noise (n = 3 seeds, 95 % "
      "interval -0.0201 to +0.0175)."),
     ([-0.5], "b is better than a by 0.5000 BPB (n = 1), but one seed shows nothing about noise: "
      "give SEED=1,2,3."),
     ([0.0, 0.0], "b: no difference to a (n = 2).")],
)  # fmt: skip
def test_one_sentence_for_each_difference(differences, says):
    assert compare.sentence("b", "a", differences) == says


def test_a_difference_is_paired_by_seed():
    a, b = {"1": 1.0, "2": 2.0, "3": 3.0}, {"2": 2.1, "3": 3.1, "4": 0.0}
    text = compare.summary({"a": a, "b": b, "c": {"9": 1.0}, "d": {}}, "val_bpb").splitlines()
    assert text[1].split() == ["3", "2.0000", "1.0000", "-", "-", "a"]
    assert " ".join(text[2].split()) == "3 1.7333 1.5822 +0.1000 +0.1000 to +0.1000 b"
    assert text[3].split() == ["1", "1.0000", "-", "-", "-", "c"]
    assert text[4].split() == ["0", "-", "-", "-", "-", "d"] and "n = 2 seeds" in "".join(text[6:])


def test_combinations():
    made = compare.combinations(["SEED=1,2", "A=x,y", "B=3"])
    assert [compare.label(each) for each in made] == [
        "A=x+B=3+SEED=1", "A=x+B=3+SEED=2", "A=y+B=3+SEED=1", "A=y+B=3+SEED=2",
    ]  # fmt: skip
    assert compare.label({"DATA_PATH": "a/b c"}) == "DATA_PATH=a_b_c"
    assert compare.label({"SEED": "1"}, "SEED") == "default"


# ---- Compare: runs of a script that leaves records only

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
env, text = os.environ, Path(__file__).read_text()
folder = Path(env["OUT_DIR"], env["RUN_ID"])
resumed = folder.is_dir()
with open(Path(__file__).with_name("starts"), "a") as log:
    log.write(env["RUN_ID"] + " " + env["RESUME"] + "\\n")
if env["X"] == "bad":
    sys.exit("error: X=bad: not a number")
if env["X"] == "refused":
    print("error: X=refused: must be 1\\nerror: Y: too", file=sys.stderr)
    sys.exit(2)
assert resumed == (env["RESUME"] == "1")
folder.mkdir(parents=True, exist_ok=True)
(folder / Path(__file__).name).write_text(text)
def record(**event):
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps(event) + "\\n")
steps, x, seed = int(env.get("ITERATIONS", 5)), float(env["X"]), int(env.get("SEED", 0))
record(event="config", x=x, seed=seed, iterations=steps, audit=True, max_wallclock_seconds=
       float(env.get("MAX_WALLCLOCK_SECONDS", 9)), data_path=env.get("DATA_PATH", ""))
def stop(*_):
    with open(Path(__file__).with_name("starts"), "a") as log:
        log.write("stopped\\n")
    time.sleep(0.3)  # a second signal would be logged too
    print("error: stopped by SIGINT; to go on: RESUME=1", flush=True)
    os._exit(130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("step:1", flush=True)
if env.get("SLOW") and not resumed:
    time.sleep(30)
record(event="final", val_bpb=1 + x + seed / 10, val_bpb_net=2 + x * x, audit="pass",
       train_steps=steps, packed_tokens=int(env.get("PACKED", 1)) * int(x + 1), val_whole=True)
"""
KNOWN = test_cli.KNOWN | {"X", "SLOW", "PACKED"}
CLEAN = {name: value for name, value in os.environ.items() if name not in KNOWN}


@pytest.fixture
def fake(tmp_path):
    """fake(*words, **env): compare.py on the script above: status, out, err; and its starts."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def start(*words, **env):
        command = [sys.executable, TOOLS / "compare.py", *words, "--script", script]
        return subprocess.Popen(command, cwd=tmp_path, env={**CLEAN, **env}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True)  # fmt: skip

    def go(*words, **env):
        process = start(*words, **env)
        out, err = process.communicate(timeout=30)
        return SimpleNamespace(status=process.returncode, out=out, err=err)

    def starts():
        log = tmp_path / "starts"
        return log.read_text().splitlines() if log.is_file() else []

    go.start, go.starts, go.script, go.folder = start, starts, script, tmp_path
    return go


def test_every_combination_is_run_once_and_kept(fake):
    done = fake("X=0,1", "SEED=1,2", "--steps", "7")
    assert done.status == 0, done.err
    assert fake.starts() == [f"X={x}+SEED={seed} 0" for x in (0, 1) for seed in (1, 2)]
    folder = fake.folder / "logs/compare/X+SEED+ITERATIONS=7+MAX_WALLCLOCK_SECONDS=0"
    assert {path.name for path in folder.iterdir()} == {s.split()[0] for s in fake.starts()}
    config = report.read_run(folder / "X=0+SEED=1").last("config")
    assert (config["iterations"], config["max_wallclock_seconds"]) == (7, 0)
    assert "2  1.1500  0.0707           -                   -  X=0" in done.out
    assert "2  2.1500  0.0707     +1.0000  +1.0000 to +1.0000  X=1" in done.out
    assert "X=1 is worse than X=0 by 1.0000 BPB: shown (n = 2 seeds" in done.out
    again = fake("X=0,1", "SEED=1,2", "--steps", "7", "--metric", "val_bpb_net")
    assert len(fake.starts()) == 4 and again.out.count(" kept\n") == 4
    assert "2  3.0000  0.0000     +1.0000  +1.0000 to +1.0000  X=1" in again.out


def test_one_seed_shows_nothing(fake):
    done = fake("X=0,1", "--seconds", "3")
    assert "one seed shows nothing about noise" in done.out.replace("\n", " ")
    config = report.read_run(next(fake.folder.glob("logs/compare/*/X=1"))).last("config")
    assert config["max_wallclock_seconds"] == 3 and config["iterations"] == 5


def test_a_failed_run_does_not_lose_the_others(fake):
    done = fake("X=0,bad,1", "SEED=1")
    assert done.status == 1
    assert "[2/3] X=bad+SEED=1 failed: X=bad: not a number (unfinished, no step)\n" in done.out
    assert "X=1 is worse than X=0 by 1.0000 BPB" in done.out


def test_bad_input_stops_at_the_first_run(fake):
    done = fake("X=refused,1", "SEED=1,2")
    assert (done.status, len(fake.starts())) == (2, 1)
    assert done.err == "error: X=refused: must be 1\nerror: Y: too\n"
    done = fake("X=1", "Z=1,2", SLOW="1")
    assert (done.status, done.err) == (2, "error: Z: no setting of fake.py\n")
    assert fake.starts()[1:] == ["X=1+Z=1 0", "stopped"]


@pytest.mark.parametrize(
    "words",
    [
        ["X"],
        ["x=1"],
        ["X="],
        ["X=1,,2"],
        ["X=1,1"],
        ["X=1", "X=2"],
        ["RUN_ID=a,b"],
        ["X=1", "ITERATIONS=2", "--steps", "3"],
        ["X=a/b,a_b"],
        ["X=1", "--steps", "3", "--seconds", "4"],
    ],
)
def test_what_is_no_comparison_is_refused(fake, words):
    done = fake(*words)  # fmt: skip
    assert (done.status, fake.starts()) == (2, []) and "error: " in done.err


def test_other_settings_in_a_folder_are_refused(fake):
    where = ("--out", "out")
    assert fake("X=0,1", "--steps", "7", *where, DATA_PATH="a").status == 0
    for words, env, says in (
        (("--steps", "8"), {"DATA_PATH": "a"}, "ITERATIONS was 7, not 8"),
        (("--steps", "7"), {"DATA_PATH": "b"}, "DATA_PATH was a, not b"),
    ):
        done = fake("X=0,1", *words, *where, **env)
        assert done.status == 2 and f"out/X=0: {says}; choose another --out" in done.err
    same = {"DATA_PATH": "a", "X": "9", "AUDIT": "1", "RUN_ID": "q", "MAX_WALLCLOCK_SECONDS": "0.0"}
    assert fake("X=0,1", *where, **same).out.count(" kept\n") == 2
    assert len(fake.starts()) == 2


def test_what_a_record_says_in_other_words_is_the_same():
    config = {**CONFIG, "mixer": "off", "ngram_mixer_enabled": True, "eval_only": ""}
    run = report.Run(Path("."), "a", [config], 0)
    same = {"NGRAM_MIXER_ENABLED": "0", "PRESET": "auto", "MATRIX_LR": "2e-2", "EVAL_ONLY": "a"}
    assert compare.unlike(run, same | {"NUM_LAYERS": "", "HOME": "x", "GFLOPS": "7"}) == []
    wrong = compare.unlike(run, {"AUDIT": "0", "MATRIX_LR": "0.03"})
    assert wrong == ["AUDIT was 1, not 0", "MATRIX_LR was 0.02, not 0.03"]


def test_what_else_differs_is_said(fake):
    text = fake("X=0,1", "--out", "out").out.replace("\n", " ")
    assert "note: These runs packed different amounts of text" in text and "too." not in text
    text = fake("X=0,1", "--out", "out", "--metric", "val_bpb_net").out
    assert "packed" not in text
    fake.script.write_text(FAKE + "# edited\n")
    text = fake("X=0,1,2", "--out", "out", DATA_PATH="").out.replace("\n", " ")
    assert "Not all runs are of the script as it is now" in text
    text = fake("X=0,1,3", "--out", "out", ITERATIONS="5").out.replace("\n", " ")
    assert "differ in" not in text
    text = fake("X=0,4", "--out", "new").out + fake("X=0,5", "--out", "new", SEED="").out
    shutil.rmtree(fake.folder / "new" / "X=5")
    (fake.folder / "new" / "X=0" / "metrics.jsonl").write_text(
        (fake.folder / "new" / "X=0" / "metrics.jsonl")
        .read_text()
        .replace('"seed": 0', '"seed": 3')
    )
    assert "note: These runs differ in SEED too." in fake("X=0,5", "--out", "new").out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_run_in_order_and_says_how_to_go_on(fake, number):
    words = ("X=0,1", "SEED=1", "--out", "out")
    process = fake.start(*words, SLOW="1")
    deadline = time.monotonic() + 20
    while not list(fake.folder.glob("out/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # it listens
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert fake.starts() == ["X=0+SEED=1 0", "stopped"]
    first, second = err.splitlines()
    assert first == "[1/2] X=0+SEED=1: stopped by SIGINT"
    assert second.startswith("to go on: python ") and " X=0,1 SEED=1 --out out " in second
    done = fake(*words)
    assert done.status == 0 and "is worse than" in done.out
    assert fake.starts()[2:] == ["X=0+SEED=1 1", "X=1+SEED=1 0"]


# ---- Both: a real run, killed once


@pytest.fixture(scope="module")
def real(dataset, tmp_path_factory):
    """A real comparison of one run, killed with its run in mid-training, and gone on with."""
    home = tmp_path_factory.mktemp("real")
    env = {**test_cli.CLEAN, **test_cli.TINY, **test_cli.NET, "DATA_PATH": dataset.path,
           "VAL_LOSS_EVERY": 20, "CHECKPOINT_EVERY": 5}  # fmt: skip
    env = {name: str(value) for name, value in env.items()}
    command = [sys.executable, TOOLS / "compare.py", "NUM_LAYERS=1", "SEED=1", "--steps", "60"]
    command += ["--out", "out"]
    quiet = {"cwd": home, "env": env, "text": True}
    process = subprocess.Popen(command, **quiet, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(home.glob("out/*/checkpoint/*0*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split() if children.is_file() else []:
        os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.wait()
    killed = report.read_run(home / "out" / "NUM_LAYERS=1+SEED=1")
    done = subprocess.run(command, **quiet, capture_output=True)
    return SimpleNamespace(home=home, killed=killed, done=done, folder=killed.folder)


def test_a_killed_comparison_goes_on(real):
    assert real.killed.records and not real.killed.final
    assert real.done.returncode == 0, real.done.stderr
    assert "goes on from step " in (real.folder / "train.log").read_text()
    run = report.read_run(real.folder)
    assert run.final["train_steps"] == 60 and f"val_bpb {run.score():.4f}\n" in real.done.stdout


def test_the_report_of_a_real_run(real, capsys):
    status, out, _ = report_of(capsys, real.home / "out", "--out", real.home / "page.html")
    run = report.read_run(real.folder)
    assert status == 0 and f"{run.final['val_bpb']:.4f}" in out and "SEED" in real.folder.name
    page = (real.home / "page.html").read_text()
    assert page.count("<figure>") == 6 and "No costs.npz" not in page
    assert "header, tokenizer, tree" in page and run.settings()["ITERATIONS"] == "60"
    assert len(run.curve("val", "val_loss")[0]) == 3

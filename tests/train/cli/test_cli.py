"""The command line as a user meets it: processes, exit codes, one-line errors."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
from command import FUSEDGPT, Run, process

from fusedgpt.model import hf_config
from fusedgpt.train.cli.common import print_json, print_table
from fusedgpt.train.cli.main import main
from fusedgpt.train.config import settings_of
from fusedgpt.train.report.terminal import printable

TINY = [
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--block-size",
    "32",
    "--max-length",
    "32",
    "--steps",
    "3",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories are made where one stands."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with book.txt, and models/ with one model trained on it."""
    root = tmp_path_factory.mktemp("cli")
    (root / "book.txt").write_text("The cat sat on the mat. Today it rained. " * 60)
    done = train(process, root, "--run-dir", str(root / "run"))
    assert done.returncode == 0, done.stderr
    return root


def train(fusedgpt: Run, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    common = ["train", "--data", str(root / "book.txt"), "--output-dir", str(root / "models")]
    return fusedgpt(*common, "--tokenizer", "byte", *TINY, *more)


def test_train_json_is_the_last_line_of_stdout(fusedgpt: Run, root: Path) -> None:
    done = train(fusedgpt, root, "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    wanted = "model_path run_path steps tokens final_loss val_loss best_val_loss tokens_per_second seconds"
    assert set(wanted.split()) <= result.keys()
    assert result["samples"].keys() == {"", "The", "Today"}
    assert result["opening"].startswith("The cat sat on the mat.")
    assert len(result["opening"].encode()) > 100
    assert (Path(result["model_path"]) / "model.safetensors").is_file()
    assert "3/3 steps | Loss:" in done.stderr
    done = train(fusedgpt, root, "--json", "--quiet", "--val-fraction", "0")
    assert done.stderr == ""
    assert json.loads(done.stdout)["val_loss"] is None
    plain = train(fusedgpt, root, "--val-fraction", "0").stdout
    assert "validation loss none held out" in plain
    assert plain.startswith("--- how it goes on from the beginning of the text\nThe cat sat on the mat.")


def test_resume_remembers_data_and_settings(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(fusedgpt, root, "--run-dir", str(run_dir), "--save-every", "2")
    done = fusedgpt("train", "--resume", str(run_dir), "--steps", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3 of 5" in done.stderr
    assert json.loads(done.stdout)["steps"] == 5
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5]
    auto = fusedgpt("train", "--resume", "auto", "--run-dir", str(run_dir), "--json")
    assert json.loads(auto.stdout) == json.loads(done.stdout)
    assert "is finished after 5 steps" in auto.stderr
    again = fusedgpt("train", "--resume", str(run_dir))
    assert (again.returncode, "give it more --steps" in again.stderr) == (2, True)
    fresh = train(fusedgpt, root, "--resume", "auto", "--run-dir", str(tmp_path / "fresh"))
    assert "nothing to resume: this is a new run" in fresh.stderr
    assert fresh.returncode == 0


def test_create_resumes_with_its_own_texts(fusedgpt: Run, tmp_path: Path) -> None:
    small = [*TINY, "--tokenizer", "byte", "--raw-tokens", "3000", "--refined-tokens", "1500"]
    first = fusedgpt("create", "poems", "--run-dir", "run", "--keep-last", "1", *small, "--json")
    again = fusedgpt("create", "--resume", "run", "--steps", "5", "--json")
    assert json.loads(again.stdout)["steps"] == 5, again.stderr
    folders = [Path(json.loads(done.stdout)["model_path"]) for done in (first, again)]
    texts = [(folder / "dataset.txt").read_text() for folder in folders]
    assert texts[0] == texts[1]
    other = fusedgpt("create", "recipes", "--resume", "run")
    assert (other.returncode, "was made for the prompt 'poems'" in other.stderr) == (2, True)


def test_print_config_is_a_config(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    done = train(fusedgpt, root, "--print-config", "--set", "train.beta2=0.95", "--learning-rate", "1e-3")
    (tmp_path / "run.toml").write_text(done.stdout, encoding="utf-8-sig")  # as some editors do
    again = fusedgpt("train", "--config", "run.toml", "--print-config")
    assert again.stdout == done.stdout
    assert "beta2 = 0.95" in again.stdout
    assert "learning_rate = 0.001" in again.stdout
    assert "max_length = 208" in fusedgpt("create", "poems", "--print-config").stdout
    rows = json.loads(train(fusedgpt, root, "--estimate", "--json").stdout)["one_card"]
    assert [row["checkpointing"] for row in rows] == ["none", "selective", "full"]
    assert not list(tmp_path.glob("runs/*"))


def test_plot_schedule_and_estimate_train_nothing(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    done = train(fusedgpt, root, "--plot-schedule", "lr.png", "--schedule", "wsd")
    assert done.stdout == "lr.png\n"
    assert (tmp_path / "lr.png").stat().st_size > 5000
    table = train(fusedgpt, root, "--estimate").stdout
    assert all(word in table for word in ("none", "selective", "full", "activations", "memory a card"))
    assert "several cards, predicted; NVIDIA H100" in table
    assert "tokens/s (prediction)" in table
    assert not list(tmp_path.glob("runs/*"))


def test_profile_prints_the_most_expensive_ops(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    done = train(fusedgpt, root, "--run-dir", "run", "--profile", "--steps", "12")
    assert "Self CPU" in done.stderr
    assert "USDT" not in done.stderr
    assert (tmp_path / "run" / "trace.json").stat().st_size > 1000


def test_create_prints_samples_and_folder(fusedgpt: Run, tmp_path: Path) -> None:
    small = [*TINY, "--tokenizer", "byte", "--raw-tokens", "3000", "--refined-tokens", "1500"]
    done = fusedgpt("create", "料理のレシピ", "--output-dir", tmp_path, *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- text ") == 8
    assert re.search(r"bits per byte of unseen text, \d+ of 100 sampled texts well formed", done.stdout)
    folder = Path(done.stdout.split("model folder: ")[1].split()[0])
    assert done.stdout.endswith(f"talk to it: fusedgpt chat {folder}\n")
    assert folder.name.startswith("cooking_")
    assert "domain: cooking" in done.stderr
    assert "parameters" in done.stderr


def test_sample_is_seeded_and_counts(fusedgpt: Run, root: Path) -> None:
    model = next((root / "models").iterdir())
    common = ["sample", model, "--prompt", "The", "-n", "2", "--max-new-tokens", "9", "--json"]
    first, again, other = (fusedgpt(*common, "--seed", s).stdout for s in "778")
    assert first == again != other
    texts = json.loads(first)["samples"]
    assert len(texts) == 2
    assert all(text.startswith("The") for text in texts)
    plain = fusedgpt("sample", model, "--prompt", "The", "-n", "2", "--temperature", "0", "--top-k", "0")
    assert plain.stdout.count("\n---\n") == 1


def test_list_shows_what_is_there(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    rows = json.loads(fusedgpt("list", "--output-dir", root / "models", "--json").stdout)
    assert {row["name"] for row in rows} == {p.name for p in (root / "models").iterdir()}
    assert rows[0]["name"] in fusedgpt("list", "--output-dir", root / "models").stdout
    assert fusedgpt("list", "--output-dir", root / "models").stdout.split()[:2] == ["path", "saved"]
    assert fusedgpt("list").stdout == "no models in models\n"
    assert rows[0]["val_loss"] > 0
    assert rows[0]["prompt"] is None
    folder = tmp_path / "models" / "sea"
    shutil.copytree(root / "models" / rows[0]["name"], folder)
    info = {"prompt": "A poem", "training": {"best_val_loss": 1.2345}}
    (folder / "generation_info.json").write_text(json.dumps(info))
    header, line = fusedgpt("list").stdout.splitlines()
    assert header.split() == ["path", "saved", "parameters", "val", "loss", "prompt"]
    assert line.startswith("models/sea ")
    assert line.endswith(" 1.234     A poem")
    (folder / "generation_info.json").write_text("{")
    assert json.loads(fusedgpt("list", "--json").stdout)[0]["val_loss"] is None
    absent = fusedgpt("list", "--output-dir", tmp_path / "none")
    assert (absent.returncode, absent.stdout) == (1, "")
    assert f"there is no folder {tmp_path / 'none'}" in absent.stderr


def test_latest_is_the_newest_model(fusedgpt: Run, root: Path, tmp_path: Path) -> None:
    none = fusedgpt("sample", "latest")
    assert (none.returncode, none.stderr) == (
        1,
        "fusedgpt: models/ holds no model yet: `fusedgpt create` makes one\n",
    )
    for name, seed in (("a", 1), ("b", 2)):
        done = train(fusedgpt, root, "--output-dir", "models", "--name", name, "--seed", str(seed), "--json")
        assert json.loads(done.stdout)["model_path"] == f"models/{name}"
        assert json.loads(done.stdout)["run_path"] == f"runs/{name}"
    greedy = ("The", "--temperature", "0", "--max-new-tokens", "9")
    latest, b, a = (fusedgpt("sample", path, *greedy).stdout for path in ("latest", "models/b", "models/a"))
    assert latest == b != a
    twice = train(fusedgpt, root, "--run-dir", "c", "--name", "c")
    assert "--name: --run-dir names the run already" in twice.stderr


def test_what_is_typed_first_needs_no_option(fusedgpt: Run, root: Path) -> None:
    plan = fusedgpt("train", root / "book.txt", "--size", "33m", "--print-config").stdout
    assert 'preset = "33M"' in plan
    estimate = fusedgpt("train", root / "book.txt", "--tokenizer", "char", "--estimate", *TINY)
    assert estimate.returncode == 0, estimate.stderr
    model = next((root / "models").iterdir())
    by_name = fusedgpt("sample", model, "--prompt", "The", "--prompt", "Today", "--json")
    assert fusedgpt("sample", model, "The", "Today", "--json").stdout == by_name.stdout != ""


def test_version_and_short_help(fusedgpt: Run) -> None:
    assert re.fullmatch(r"fusedgpt \d+\.\d+\.\d+\n", fusedgpt("--version").stdout)
    assert fusedgpt("list", "-h").stdout == fusedgpt("list", "--help").stdout


def test_doctor_names_the_path_of_every_op(fusedgpt: Run) -> None:
    report = json.loads(fusedgpt("doctor", "--json").stdout)
    assert report["ops"]["attention"] in ("reference", "triton")
    assert report["packages"]["triton"] != ""
    assert "cpu bf16" in fusedgpt("doctor").stdout


def test_kernels_check_prints_a_verdict_for_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the command's own affair
    done = process("kernels", "check", "--op", "dropout", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    head, *lines, total = (line.split() for line in done.stdout.splitlines())
    assert total == ["4", "results,", "none", "wrong"]
    assert head[:3] == ["op", "dtype", "shape"]
    assert {(line[0], line[1], line[-1]) for line in lines} == {("dropout", "fp32", "ok")}
    assert len(lines) == 4  # two shapes, forward and backward
    findings = json.loads(process("kernels", "check", "--op", "dropout", "--json").stdout)
    assert all(finding["ok"] and finding["error"] <= finding["limit"] for finding in findings)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("kernels check --op gulu", 1, "no op 'gulu' to check here; there are dropout"),
        ("kernels check --dtype fp64", 2, "'fp64' is not one of 'fp32', 'fp16', 'bf16'"),
        ("train --data {root}/absent.txt", 1, "there is no file or folder {root}/absent.txt"),
        ("train --data {root}/empty.txt", 1, "{root}/empty.txt is empty"),
        (
            "train --data {root}/short.txt --tokenizer byte",
            1,
            "training tokens, too few for one window of 512",
        ),
        ("train --data {root}/book.txt --preset 13M", 2, "'13M' is not one of '1m', '3m', '12m', '33m', "),
        ("train --data {root}/book.txt --schedule cosin", 2, "'cosin' is not one of 'constant', 'linear', "),
        ("train --data {root}/book.txt --set train.schedule=x", 2, "--schedule: should be 'constant', "),
        ("train --data {root}/book.txt --raw-tokens 9", 2, "No such option: --raw-tokens"),
        ("train --data {root}/book.txt --n-head 7", 2, "n_embd 384 is not a multiple of n_head 7"),
        ("train --data {root}/book.txt --tokenizer gtp2", 1, "no tokenizer 'gtp2': choose gpt2, char, byte"),
        ("train --data {root}/book.txt --device cuda:9 --block-size 8", 2, "--device cuda:9: "),
        (
            "train --data {root}/book.txt --device foo --block-size 8",
            2,
            "--device foo: expected auto, cpu, cuda or cuda:N",
        ),
        ("train --data {root}/book.txt --output-dir {root}/book.txt", 1, "cannot write to {root}/book.txt"),
        ("train --data {root}/book.txt --batch-size 0", 2, "--batch-size: should be greater than"),
        ("create poems --output-dir /proc/x", 1, "cannot write to /proc/x"),
        (
            "create poems --data-source ollama --llm-host http://127.0.0.1:9 --gen-model a",
            1,
            "no Ollama server answers at http://127.0.0.1:9",
        ),
        ("create poems --llm-host http://a:b@c", 2, "llm_host holds a user name or password"),
        ("create poems --timeout-total 0", 2, "--timeout-total: should be greater than 0"),
        (
            "data refine {root}/absent.jsonl --output {root}/o.jsonl",
            1,
            "there is no file {root}/absent.jsonl",
        ),
        ("create poems --epochs 0", 2, "--epochs: should be greater than"),
        ("create --run-dir {root}/new", 2, "no prompt: say what the GPT should write"),
        ("create poems --resume {root}/run", 2, "is a run of `fusedgpt train`, not of create"),
        ("train --data {root}/book.txt --set train.beat2=1", 2, "'beat2'; did you mean 'beta2'?"),
        ("train --data {root}/book.txt --set beta2=1", 2, "expected section.name=value"),
        ("train --data {root}/book.txt --config {root}/absent", 2, "cannot read {root}/absent: No such file"),
        ("train --resume {root}", 2, "{root} is neither a run directory nor one of its checkpoints"),
        ("train --resume {root}/run --run-dir {root}/new", 2, "continues in its own directory, not in"),
        (
            "train --data {root}/book.txt --tokenizer byte --max-length 9 --run-dir {root}/run",
            2,
            "{root}/run holds a run: go on with --resume",
        ),
        (
            "train --data {root}/book.txt --tokenizer byte --max-length 9 --batch-size 999",
            1,
            "a step takes 999",
        ),
        ("train --data {root}/book.txt --cuda-graphs on --tokenizer byte --max-length 9", 2, "CUDA device"),
        (
            "train --data {root}/book.txt --tokenizer byte --max-length 9 --warmup 100000",
            2,
            "has no room for --warmup 100000: lower that or train longer",
        ),
        ("train", 2, "no training data: fusedgpt train FILE_OR_FOLDER"),
        ("train --plot-schedule {root}/x.png", 2, "how long is the run? give --steps, or --data"),
        ("train --estimate --tokenizer char", 2, "how many characters are there? give --data"),
        ("sample {root}", 1, "{root} is no model folder: it has no config.json"),
        ("sample {root}/absent", 1, "absent is no model folder"),
        ("sample {root}/models/{model} --top-p 2", 2, "--top-p: expected 0 < p <= 1, got 2.0"),
    ],
)
def test_errors_are_one_line(fusedgpt: Run, root: Path, arguments: str, code: int, message: str) -> None:
    (root / "empty.txt").write_text("")
    (root / "short.txt").write_text("short")
    names = {"root": str(root), "model": next((root / "models").iterdir()).name}
    before = sorted(root.rglob("*"))
    done = fusedgpt(*arguments.format(**names).split())
    assert done.returncode == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fusedgpt: ")
    assert message.format(**names) in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(root.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "No such command 'trian'"),
        ("train --steps x --data y", "Invalid value for '--steps'"),
        ("train --nonsense", "No such option: --nonsense"),
        ("sample", "Missing argument 'MODEL'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(fusedgpt: Run, arguments: str, message: str) -> None:
    done = fusedgpt(*arguments.split())
    assert done.returncode == 2
    assert re.fullmatch(rf"fusedgpt: {message}.*; --help says more\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", ["", "data"])
def test_no_arguments_print_the_help(fusedgpt: Run, arguments: str) -> None:
    done = fusedgpt(*arguments.split())
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count(f"Usage: fusedgpt {arguments}".strip()) == 1
    assert "fusedgpt: " not in done.stderr


def test_an_interrupt_ends_with_one_line_and_nothing_half_written(
    fusedgpt: Run, root: Path, tmp_path: Path
) -> None:
    command = [FUSEDGPT, "train", "--data", root / "book.txt", "--tokenizer", "byte", *TINY]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it
    with subprocess.Popen(
        [*command, "--steps", "1000000"], stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as process:
        assert process.stderr is not None
        assert any("steps | Loss" in line for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        last = process.stderr.readlines()[-1]
    assert process.returncode == 130
    message = r"fusedgpt: stopped by SIGINT after step (\d+); go on with --resume (runs/custom_\S+)\n"
    found = re.fullmatch(message, last)
    assert found
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())
    done = fusedgpt("train", "--resume", found[2], "--steps", found[1], "--output-dir", "models", "--json")
    assert json.loads(done.stdout)["steps"] == int(found[1])
    assert f"resuming after step {found[1]} of {found[1]}" in done.stderr


def test_training_goes_on_when_nobody_reads_what_it_says(root: Path, tmp_path: Path) -> None:
    """As in `fusedgpt train ... 2>&1 | head -1`."""
    command = [FUSEDGPT, "train", "--data", root / "book.txt", "--tokenizer", "byte", *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    (model,) = (tmp_path / "models").iterdir()
    assert (model / "model.safetensors").is_file()


def test_a_closed_terminal_saves_and_stops(root: Path, tmp_path: Path) -> None:
    def own_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [FUSEDGPT, "train", "--data", root / "book.txt", "--tokenizer", "byte", "--run-dir", "run"]
    terminal, ours = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), ours)
    with subprocess.Popen(
        [*command, *TINY, "--steps", "1000000"], start_new_session=True, preexec_fn=own_terminal, **streams
    ) as process:
        os.close(ours)
        seen = b""
        while not re.search(rb" [1-9]\d*/1000000 steps", seen):
            seen += os.read(terminal, 65536)
        os.close(terminal)
    assert process.returncode == 128 + signal.SIGHUP
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) > 0


def test_results_that_cannot_be_written_are_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([FUSEDGPT, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    message = "fusedgpt: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_json_loses_nothing_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"text": "é 料理 \udcff"}
    for encoding, text in (("utf-8", "é 料理"), ("latin-1", "\\u6599")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        print_json({"text": "é 料理"})
        print_json(value)
        first, second = stdout.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
        assert text in first
        assert json.loads(second) == value


def test_a_table_leaves_out_what_a_narrow_terminal_lacks_room_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"kernel": "attention", "loop": "123", "empty": ""}]
    for terminal, width, kept in ((True, 15, True), (True, 14, False), (False, 10, True)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(rows, if_wide=["loop"])
        assert capsys.readouterr().out == (
            "kernel     loop\nattention  123\n" if kept else "kernel\nattention\n"
        )


def test_windows_is_told_of_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="run it in WSL"):
        main(["--help"])


@pytest.mark.parametrize("command", ["", "train", "sample", "kernels", "kernels report"])
def test_help_has_no_type_beside_a_flag(fusedgpt: Run, command: str) -> None:
    shown = fusedgpt(*command.split(), "--help").stdout
    assert "--help" in shown
    assert "<bool>" not in shown


def test_help_has_a_width(fusedgpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    assert "--learning-rate" in fusedgpt("train", "--help").stdout


def test_a_bug_looks_like_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Not every ValueError is the user's fault: only our own classes are."""

    def fail(_: Path) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(hf_config, "list_folders", fail)
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 1
    assert "internal error, ValueError: operands could not be" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in process("sample", "/absent", "--debug").stderr


@pytest.mark.parametrize("command", ["train", "create"])
def test_every_setting_has_a_flag_in_a_panel(
    fusedgpt: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = fusedgpt(command, "--help").stdout
    assert all(f"--{name.replace('_', '-')}" in text for name in settings_of(command))
    assert "--size" in text
    panels = re.split(r"\n╭─ ", text)
    titles = [panel.split(" ─")[0] for panel in panels[1:]]
    assert titles[:2] == ["Arguments", "Options"]
    assert {"Model", "Data", "Optimizer and schedule", "Validation", "Checkpoints and logs"} < set(titles)
    first = re.findall(r"│ (--[\w-]+)", panels[titles.index("Options") + 1])
    common = "--name --output-dir --resume --config --preset --tokenizer --steps --epochs --batch-size"
    assert first == [
        *(["--data"] if command == "train" else []),
        *common.split(),
        "--learning-rate",
        "--help",
    ]
    assert "<auto|bf16|fp16|fp32>" in text
    # each once; of create also the tokenizer's and the timeouts'
    assert text.count("[default: auto]") == 5 + 2 * (command == "create")


def test_help_shows_the_defaults_of_create(fusedgpt: Run) -> None:
    text = fusedgpt("create", "--help").stdout
    assert "[default: 0.006]" in text
    assert "[default: 0.0003]" not in text
    assert "--raw-tokens" in text
    assert "--raw-tokens" not in fusedgpt("train", "--help").stdout


def test_python_m_fusedgpt_train_is_train() -> None:
    command = [sys.executable, "-m", "fusedgpt.train"]
    for arguments in (["--print-config", "--steps", "7"], ["--steps", "x"], ["--help"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        same = process("train", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (same.returncode, same.stdout, same.stderr)


def test_help_is_quick() -> None:
    """The goal is 0.3 s on a quiet machine; CPU time, and a margin, allow for a busy one."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x1b[0m", "ab"),
        ("a\x1b]0;title\x07b", "ab"),
        ("line\r\nnext\ttab", "line\nnext\ttab"),
        ("\u202eevil\x9b2J", "evil2J"),
        ("héllo 料理 😀", "héllo 料理 😀"),
    ],
)
def test_what_a_model_writes_cannot_drive_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown

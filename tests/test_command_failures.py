"""What the command line does when something goes wrong that is no fault of a file: signals, pipes, terminals, bugs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safety_experts import commands
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.files import remove_leftovers, write_atomically

pytestmark = pytest.mark.slow

CLI = Path(__file__).resolve().parents[1] / "cli.py"
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def expert_path(tmp_path) -> Path:
    path = tmp_path / "日本語.safetensors"
    layer = LoraLayer(torch.ones(2, 4), torch.ones(3, 2), 2.0)
    save_expert(Expert({NAME: layer}, ExpertInfo(categories=("violence",)), path.stem), path)
    return path


def start(*arguments, **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, str(CLI), *map(str, arguments)], **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mrege", "a"], "no command 'mrege'; did you mean 'merge'?"),
        (["xyz"], "no command 'xyz'; there are dataset,"),
        (
            ["merge", "a", "--out", "b.safetensors", "--wieghts", "1"],
            "'--wieghts'; did you mean '--weights'?",
        ),
        (["dataset", "import", "a", "--uot=b"], "unknown argument '--uot'; did you mean '--out'?"),
        (["dataset", "import", "a", "--out", "b", "--imags", "c"], "did you mean '--images'?"),
        (["convert", "a", "--out", "b.safetensors", "--rank", "many"], "--rank: invalid int value"),
        (["merge"], "required"),
        (["inspect", "a\0b"], "NUL"),
        (["inspect", "n" * 300], "File name too long"),
        (["inspect", "."], "is a folder, not a file"),
        (["merge", "a", "--out", "x" * 300 + ".safetensors"], ""),
    ],
)
def test_a_wrong_argument_is_one_line_with_a_guess_and_exit_code_2(arguments, words, capsys):
    assert commands.run(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_bug_is_one_line_and_its_traceback_is_in_a_file_without_its_text(monkeypatch, capsys, tmp_path):
    from safety_experts.commands import inspect

    secret = "words " * 2

    def broken(arguments):
        try:
            raise KeyError(secret)
        except KeyError as error:
            raise ValueError(secret) from error

    monkeypatch.setattr(inspect, "run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert commands.run(["inspect", "x"]) == 1
    error = capsys.readouterr().err
    (log,) = tmp_path.glob("safety-experts-*.log")
    assert error.startswith("error: unexpected ValueError") and error.count("\n") == 1 and str(log) in error
    text = log.read_text()
    assert "in broken" in text and "builtins.KeyError" in text and secret not in error + text


def test_a_pipe_that_nobody_reads_is_no_failure(expert_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = start("inspect", expert_path, stdout=writer)
    os.close(writer)
    assert (process.communicate()[1], process.returncode) == (b"", 0)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_the_letters_gets_them_escaped(expert_path, encoding):
    process = start("inspect", expert_path, "--json", env={**os.environ, "PYTHONIOENCODING": encoding})
    printed, errors = process.communicate()
    assert process.returncode == 0 and rb"\u65e5\u672c\u8a9e" in printed and errors == b""
    assert json.loads(printed)["name"] == "日本語"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full disk to write to")
def test_a_full_disk_behind_stdout_is_said(expert_path):
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = start("inspect", expert_path, stdout=full)
        assert b"the output cannot be written" in process.communicate()[1] and process.returncode == 1


def test_leftovers_of_a_killed_run_go_with_the_next_and_those_being_written_stay(expert_path, tmp_path):
    out = tmp_path / "out.safetensors"
    (tmp_path / ".out-abcd1234.safetensors").write_bytes(b"half")
    (tmp_path / ".out-of-the-way.safetensors").write_bytes(b"another's")
    assert commands.run(["merge", str(tmp_path / "absent"), "--out", str(out)]) == 2  # any run for that target
    assert not (tmp_path / ".out-abcd1234.safetensors").exists()
    assert (tmp_path / ".out-of-the-way.safetensors").exists()
    with write_atomically(out) as temporary:
        temporary.write_bytes(b"new")
        code = f"import sys; from safety_experts.files import remove_leftovers; remove_leftovers({str(out)!r})"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        assert temporary.exists()
    assert out.read_bytes() == b"new"
    remove_leftovers(tmp_path / "absent folder" / "a.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_verb_without_half_written_files(expert_path, tmp_path, number):
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
sys.path[:] = [entry for entry in sys.path if entry]
from safety_experts import commands, tensor_file
real = tensor_file.tensor_bytes
def ask(tensor):
    os.kill(os.getpid(), {int(number)})
    return real(tensor)
from safety_experts.experts import expert
expert.tensor_bytes = real
tensor_file.tensor_bytes = ask
sys.exit(commands.run(["merge", sys.argv[1], "--out", sys.argv[2]]))
"""
    out = tmp_path / "out" / "out.safetensors"
    process = subprocess.run([sys.executable, "-c", code, expert_path, out], capture_output=True, text=True)
    assert process.returncode == 1 and "error: interrupted" in process.stderr and "Traceback" not in process.stderr
    assert list(out.parent.iterdir()) == []


def test_an_expert_is_not_replaced_when_the_disk_fills_up(expert_path, tmp_path):
    resource = pytest.importorskip("resource")
    out = tmp_path / "out.safetensors"
    save_expert(load_expert(expert_path), out)
    before = out.read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start("merge", expert_path, "--out", out, "--overwrite", preexec_fn=small_files)
    assert b"cannot write" in process.communicate()[1] and process.returncode == 1
    assert out.read_bytes() == before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".out")] == []

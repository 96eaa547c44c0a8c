"""Progress of long work on a terminal, and in a pipe or a file."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from imgcap_jax import terminal
from imgcap_jax.terminal import duration, working

SCRIPT = """
import sys, time
from imgcap_jax.terminal import working

print("begin")
with working("", 4, "images") as work:
    for n in range(1, 5):
        work.update(n, [f"step {n}/4", "loss 2.310", "an hour left", "what does not fit in sixty columns"])
        print("line", n)
        print("warning", n, file=sys.stderr)
        with working("compiling"):
            time.sleep(0.6)
        if "interrupt" in sys.argv:
            raise KeyboardInterrupt
print("end")
"""


def on_terminal(*arguments: str) -> str:
    """What the script writes to a terminal of 60 columns."""
    main, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "60"},
    )
    os.close(child)
    output = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the process has ended
            break
        if not part:
            break
        output += part
    process.wait()
    os.close(main)
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode())  # without colours


def screen(output: str) -> list[str]:
    """The lines of a terminal after it received the output, which uses only a few of its commands."""
    lines, row, column = [""], 0, 0
    for command in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if command == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif command == "\r":
            column = 0
        elif command == "\x1b[2K":
            lines[row] = ""
        elif found := re.fullmatch(r"\x1b\[(\d+)A", command):
            row -= int(found[1])
        elif command[0] != "\x1b":
            lines[row] = f"{lines[row][:column]:{column}}{command}{lines[row][column + len(command) :]}"
            column += len(command)
    return [line.rstrip() for line in lines if line.strip()]


def test_terminal_shows_bars_below_printed_lines_and_is_left_clean() -> None:
    output = on_terminal()
    assert "━ step 1/4  loss 2.310  an hour left" in output
    assert "what does not fit" not in output
    assert "━ compiling  0:00" in output
    printed = [f"{word} {n}" for n in range(1, 5) for word in ("line", "warning")]
    assert screen(output) == ["begin", *printed, "end"]
    assert "\x1b[?25l" not in output  # a killed process would leave the cursor hidden


def test_interrupted_work_leaves_a_clean_terminal() -> None:
    output = on_terminal("interrupt")
    assert "━" in output
    assert [line for line in screen(output) if "━" in line] == []
    assert screen(output)[-1] == "KeyboardInterrupt"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("piped", ["stdout", "stderr"])
def test_bar_needs_both_outputs_on_a_terminal(piped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``| tee log``, a bar would be mixed with the lines that tee writes."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    assert terminal.on_terminal()
    monkeypatch.setattr(sys, piped, io.StringIO())
    assert not terminal.on_terminal()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every hundredth of a second."""
    monkeypatch.setattr(terminal, "FIRST_LINE_SECONDS", 0.01)
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.01)


def wait_for(said: list[str], line: str, times: int = 1) -> None:
    deadline = time.perf_counter() + 60
    while said.count(line) < times:
        assert time.perf_counter() < deadline, said
        time.sleep(0.005)


@pytest.mark.usefixtures("often")
def test_pipe_gets_plain_lines_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [100.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with working("decoding", 5_000, "images", done=1_000, say=said.append) as work:
        clock[0] += 10
        work.advance(400)
        line = "decoding: 1,400/5,000 images  40 images/s  1:30 left"
        wait_for(said, line, times=3)  # also without progress, as with a disk that does not answer
        with working("compiling", say=said.append, announced=True):
            wait_for(said, "compiling: 0:00 so far")
            before = said.count(line)
            wait_for(said, "compiling: 0:00 so far", times=3)
            assert said.count(line) == before  # the innermost work has the only display
        wait_for(said, line, times=before + 1)
        work.advance(3_600)
        time.sleep(0.05)
    assert said.count("compiling ...") == 1
    assert said.count("decoding: 5,000/5,000 images  400 images/s  0:00 left") == 0


@pytest.mark.usefixtures("often")
def test_lines_go_to_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = ""
    with working("compiling"):
        while "compiling: 0:00 so far\n" not in error:
            time.sleep(0.005)
            error += capsys.readouterr().err
    capsys.readouterr()
    with working("decoding", 5_000, "images", shown=False) as work:
        work.advance(40)
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599, 3600, float("nan"))] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "-",
    ]


WAITING = """
import atexit, signal, sys, time
from imgcap_jax.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored by what a shell runs in the background

def inspect(options):
    print("a line")
    time.sleep(60)

atexit.register(lambda: print("shut down"))
main._COMMANDS["inspect"] = inspect
sys.argv = ["imgcap", "data", "inspect", "scenes"]
sys.exit(main.main())
"""


def test_pipe_gets_lines_at_once_and_an_interrupted_command_ends_at_once() -> None:
    """JAX can crash if the interpreter shuts down while a computation runs, so it does not shut down."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "a line\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "imgcap: interrupted\n")
    assert process.returncode == 130

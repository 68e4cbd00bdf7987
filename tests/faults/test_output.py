"""Messages and output that nobody reads, and files that have the descriptors of closed ones."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from realuid_fast import streams
from realuid_fast.train.distill import Distiller

from .runs import ROOT, end_of, steps


class Broken(io.TextIOWrapper):
    """A stream to a reader that is gone, or to a full disk."""

    def __init__(self, kind):
        if kind == "reader gone":
            read, write = os.pipe()
            os.close(read)
        else:
            write = os.open("/dev/full", os.O_WRONLY)
        super().__init__(os.fdopen(write, "wb"), line_buffering=True)


@pytest.mark.parametrize("kind", ["reader gone", "disk full", "closed"])
def test_a_run_whose_messages_nobody_reads_goes_on(run, monkeypatch, kind):
    straight = run("straight")
    stream = None if kind == "closed" else Broken(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    # Every update tells something.
    monkeypatch.setattr(Distiller, "concern", lambda self, row: "something to say")
    broken = run("broken", progress=True)
    monkeypatch.undo()
    assert end_of(broken) == end_of(straight)
    if stream is not None:
        streams._silence(stream)
        stream.close()


def test_a_command_whose_messages_nobody_reads_saves_on_a_signal(run, tmp_path):
    straight = run("straight")
    settings = yaml.safe_load((straight / "config.yaml").read_text())
    settings["distill"]["updates"] = 100_000
    settings["run"] |= {"progress": True, "checkpoint_every": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "realuid_fast", "distill", "--config", "c.yaml", "--out", "run"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=full, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "run/log.csv", time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(timeout=60) == 129
    finally:
        process.kill()
    assert len(steps(tmp_path / "run")) == 1


@pytest.mark.parametrize(("kind", "code"), [("reader gone", 141), ("disk full", 2)])
def test_output_that_cannot_be_written_is_told_after_the_work(monkeypatch, capfd, kind, code):
    stream = Broken(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    done = []

    def work():
        for _ in range(3):
            print("a line", flush=True)
        done.append(True)
        return 0

    assert streams.guarded(work) == code
    assert done
    # Python writes what is left in the stream when it ends.
    stream.close()
    said = capfd.readouterr().err
    assert said == ("" if code == 141 else "error: standard output: No space left on device\n")


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    # This reader is gone before the first line. One that reads the first line may still be there after the last.
    words = f"{sys.executable} -m realuid_fast info 2>&1 | head -c 0; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_closed_descriptor_does_not_become_a_file_of_the_run():
    words = "import os, sys; from realuid_fast import streams; "
    words += "streams.guarded(lambda: sys.exit(os.open(sys.executable, os.O_RDONLY)))"
    done = subprocess.run(["bash", "-c", f"{sys.executable} -c '{words}' 2>&- >&-"], cwd=ROOT, timeout=60)
    assert done.returncode > 2

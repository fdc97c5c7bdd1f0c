"""Progress: a bar on a terminal, lines elsewhere, nothing on other ranks."""

import re

import pytest
from terminal import on_terminal

from thinkmid.run.progress import Progress

PROGRAM = """
from thinkmid.run.progress import Progress
with Progress("set [bold]\\x1b[31m", 40, "samples", rank={rank}, every_s=0.0) as bar:
    for done in range(1, 41):
        bar.at(done, "2 [red]refused")
    print("a line between")
"""


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back():
    text = on_terminal(PROGRAM.format(rank=0))
    assert "set [bold][31m" in text
    assert re.search(r"40/40\s+samples", text)
    assert "2 [red]refused" in text
    assert "a line between" in text
    assert "\x1b[31m" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_another_rank_shows_nothing_on_a_terminal_either():
    assert on_terminal(PROGRAM.format(rank=1)).strip() == "a line between"


@pytest.mark.parametrize(("rank", "num"), [(0, 3), (1, 0)])
def test_a_pipe_gets_a_line_when_one_is_due(capsys, monkeypatch, rank, num):
    clock = iter([0.0, 10.0, 30.0, 40.0, 90.0, 120.0])
    monkeypatch.setattr("thinkmid.run.progress.now", lambda: next(clock))
    with Progress("own", 2000, "samples", rank=rank) as bar:
        for done in (100, 500, 600, 1000, 2000):
            bar.at(done)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == num
    # at 30 s a quarter is done, at 90 s one half
    expected = [("500", "90 s"), ("1,000", "90 s"), ("2,000", "0 s")]
    assert lines == [f"own: {done} of 2,000 samples, {left} left" for done, left in expected][:num]

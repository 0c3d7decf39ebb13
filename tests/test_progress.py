import io

import pytest

from diffdefend_core.progress import PlainProgress, reporting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_has_no_callback() -> None:
    with reporting(quiet=True, stream=Terminal()) as progress:
        assert progress is None


def test_a_log_gets_at_most_one_line_in_thirty_seconds() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(stream, clock=lambda: now[0])
    for second in range(100):
        now[0] = float(second)
        progress("inversion", second, 100)
    assert stream.getvalue().splitlines() == [
        "inversion: 0/100",
        "inversion: 30/100, about 1:10 left",
        "inversion: 60/100, about 0:40 left",
        "inversion: 90/100, about 0:10 left",
    ]


def test_a_new_task_is_told_at_once() -> None:
    stream = io.StringIO()
    with reporting(stream=stream) as progress:
        assert progress is not None
        for what in ("own samples", "twin", "twin", "search"):
            progress(what, 1, 2)
    assert [line.partition(":")[0] for line in stream.getvalue().splitlines()] == ["own samples", "twin", "search"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with reporting(stream=stream, color=False) as progress:
        assert progress is not None
        progress("inversion", 3, 10)
    assert "inversion" in stream.getvalue() and "3/10" in stream.getvalue()

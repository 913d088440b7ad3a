"""What the live view counts, under a clock of the test's own."""

from lightship.bench.client import Seen
from lightship.bench.view import Board


def test_the_board_counts():
    now, said = [100.0], []
    board = Board(clock=lambda: now[0], say=said.append)
    board.begin("open loop", 10, 20.0)
    for _ in range(4):
        board.sent()
    now[0] = 104.0
    board.seen(Seen(0, "whole", 0.0, 0.0, 1.0, 2.0, 2.0, tokens=11))
    board.seen(Seen(1, "stopped", 0.0, 0.0, 3.0, 4.0, 4.0, tokens=11))
    board.seen(Seen(2, "failed", 0.0, 0.0))
    shown = dict(board.lines())
    assert shown["open loop"] == "4 s, 30%"  # three of ten requests, which is more than 4 of 20 s
    assert shown["requests"] == "3 ended, 1 running, 1 without an answer"
    assert shown["TTFT"] == "2.00 s (median of the last 2)" and shown["TPOT"] == "100 ms (median of the last 2)"
    assert shown["tokens/s"].startswith("6 ")  # 22 tokens in 4 s
    now[0] = 110.0
    assert dict(board.lines())["tokens/s"].startswith("0 ")
    board.begin("closed loop", None, None)
    assert dict(board.lines())["TTFT"] == "–"
    assert said == ["open loop: 10 requests or 20 s", "closed loop: no end"]

"""A report as text."""

from __future__ import annotations

import pytest

from kvcomp.runtime.report import LayerReport, Report

LAYER = LayerReport(0, (1.0,), (7,), (6.0,), (0.0,), (None,), 1024, 7168)


def report_of(reserved: int) -> Report:
    return Report("flowmm", "0.2", "recompress", "prefill-end", (LAYER,), (), 1024, reserved, 138, 7168, 0.0751)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(1023, "1023 B"), (128 * 1024, "128 KiB"), (1896, "1.9 KiB"), (3 * 2**20, "3 MiB"), (5 * 2**40, "5120 GiB")],
)
def test_sizes_have_one_digit_after_the_point_at_most(num_bytes: int, text: str) -> None:
    assert f"reserved {text}, bookkeeping 138 B, compressed in 75.1 ms" in str(report_of(num_bytes))


def test_title_and_caption_are_a_line_each_however_narrow_the_table_is() -> None:
    lines = [line.strip() for line in str(report_of(11_520)).splitlines()]
    assert lines[0] == "flowmm at budget 0.2: 1 KiB of 7 KiB (14.3%)"
    assert lines[-1] == "reserved 11.2 KiB, bookkeeping 138 B, compressed in 75.1 ms"

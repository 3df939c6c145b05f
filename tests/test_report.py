"""Reports: values in, text out."""

from mmtune.report.markdown import BeforeAfter, compare_metrics, markdown_table, write_report


def test_cells_stay_in_their_row_and_column() -> None:
    assert markdown_table(("set", "value"), [["a|b\nc", "1"]]).splitlines()[-1] == r"| a\|b c | 1 |"
    report = write_report("Run", [BeforeAfter("x|y full", 0.1, 0.2)], "ndcg@10", {"data": {"a|b": "c\nd"}})
    assert r"| x\|y full | 0.1000 | 0.2000 | +0.1000 |" in report
    assert r"| `a\|b` | c d |" in report


def test_a_metric_with_a_name_of_the_callers_own_is_a_row() -> None:
    rows = compare_metrics({"accuracy": 0.5}, {"accuracy": 0.75, "other": 1.0}, "accuracy")
    assert [(row.label, row.change) for row in rows] == [("all", 0.25)]

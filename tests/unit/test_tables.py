"""Tables, beside ones that are written out."""

from megatron_cca.lab import markdown_table, padded_table

HEADER, ROWS = ["layout", "±"], [["TP 2 x DP 4", "1.50 ± 0.1"], ["", "007"], ["a|b", "1e5"]]


def test_a_table_for_a_file_has_each_cell_as_it_is():
    assert markdown_table(HEADER, ROWS).splitlines() == [
        "| layout | ± |",
        "| --- | --- |",
        "| TP 2 x DP 4 | 1.50 ± 0.1 |",
        "|  | 007 |",
        r"| a\|b | 1e5 |",
    ]


def test_numbers_stand_to_the_right():
    assert markdown_table([*HEADER, "GiB"], [], first_number=1).splitlines() == [
        "| layout | ± | GiB |",
        "| --- | ---: | ---: |",
    ]


def test_a_table_for_a_terminal_lines_up():
    assert padded_table(HEADER, ROWS).splitlines() == [
        "| layout      | ±          |",
        "| ----------- | ---------- |",
        "| TP 2 x DP 4 | 1.50 ± 0.1 |",
        "|             | 007        |",
        r"| a\|b        | 1e5        |",
    ]
    assert padded_table(["a long name"], [["x"]]).splitlines()[1] == "| ----------- |"

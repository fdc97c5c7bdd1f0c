import json

import pytest

from thinkmid.augment.shards import Chunk, Journal, add, part_of, tally
from thinkmid.errors import UserError


def row(n, **more):
    return {"key": "ab", "chunk": n, **more}


def test_whatever_a_crash_tears_off_the_last_line_is_cut_and_all_before_it_stays(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    for n in range(3):
        journal.add(row(n, text=f"é\u2028\ud800 {n}"))
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        kept = sum(end <= size for end in ends)
        assert journal.done == {Chunk("ab", n) for n in range(kept)}
        journal.add(row(9, refused="x"))
        assert [r["chunk"] for r in journal.rows()] == [*range(kept), 9]
        journal.close()


def test_a_damaged_line_is_named_and_a_second_writer_refused(tmp_path):
    path = tmp_path / "journal"
    path.write_text(json.dumps(row(0, text="a")) + "\n{\n")
    with pytest.raises(UserError, match=r"journal:2: damaged"):
        Journal(path)
    path.write_text("")
    journal = Journal(path)
    with pytest.raises(UserError, match="another process works on this part"):
        Journal(path)
    journal.close()
    Journal(path).close()


@pytest.mark.parametrize(
    "line",
    [
        *["3", "null", "[" * 100_000, "{}"],
        *[json.dumps(row(n, text="a")) for n in ([], None, "0", True)],
        *[json.dumps(row(0, **{name: None})) for name in ("text", "raw", "refused", "calls", "retried")],
        *[json.dumps(row(0, **wrong)) for wrong in ({"calls": "3"}, {"retried": []}, {"retried": {"a": "b"}})],
    ],
)
def test_a_line_that_nobody_wrote_so_is_named(tmp_path, line):
    path = tmp_path / "journal"
    path.write_text(json.dumps(row(0, text="a", calls=1, retried={"blank": 1})) + f"\n{line}\n")
    with pytest.raises(UserError, match=r"journal:2: damaged"):
        Journal(path)


def test_what_nobody_answered_is_not_done_and_costs_what_it_cost(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.add(row(0, failed="timeout", calls=2, written_tokens=7, retried={"cut off": 2}))
    journal.add(row(0, text="a", calls=1, written_tokens=1))
    journal.add(row(1, refused="cut off", calls=3, retried={"cut off": 1, "blank": 1}))
    assert journal.done == {Chunk("ab", 0), Chunk("ab", 1)}
    assert tally(journal.rows()) == {
        "calls": 6, "prompt_tokens": 0, "written_tokens": 8, "chunks": 2, "accepted": 1, "refused": 1,
        "refused_by": {"cut off": 1}, "retried_by": {"blank": 1, "cut off": 3},
    }  # fmt: skip
    journal.close()


def test_parts_are_about_even_and_sums_go_down_the_tree():
    sizes = [0] * 7
    for n in range(7000):
        sizes[part_of(f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}ffff", 7)] += 1
    assert min(sizes) > 900
    assert add([{"a": 1, "b": {"x": 2}}, {}, {"a": 3, "b": {"x": 1, "y": 5}}]) == {"a": 4, "b": {"x": 3, "y": 5}}

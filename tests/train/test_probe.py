import re

import numpy as np
import pytest
from world import TEXTS, write_corpus

from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train.config import read_parts
from thinkmid.train.probe import advice, read_thoughts

PARTS = read_parts((r"sum=(?<== )\d+", r"first?=(?<= )\d+(?= \+)"))


@pytest.mark.parametrize("tags", ["added", "plain"])
def test_the_token_that_ends_a_match_in_a_thought_is_marked_and_no_other(tmp_path, tags):
    train_tokenizer(TEXTS, 300, tmp_path, tags)
    tokenizer = Tokenizer.load(tmp_path)
    units = read_thoughts([str(write_corpus(tmp_path))], tokenizer, 1000, PARTS)
    assert len(units) == len(TEXTS)
    for unit, text in zip(units, TEXTS, strict=True):
        [reply] = unit.replies
        n, total = re.search(r"<think> (\d+) \+ \d+ = (\d+)\.", text).groups()
        for mark, number in ((1, total), (2, n)):
            [at] = np.flatnonzero(reply.ce_w == 1 + mark)
            # what stands up to the end of the marked token, and no shorter text, holds the number's last digit
            before = tokenizer.decode([*unit.prefix, *reply.tokens[:at]])
            upto = tokenizer.decode([*unit.prefix, *reply.tokens[: at + 1]])
            want = text.index("<think>") + text[text.index("<think>") :].index(f" {number}") + 1 + len(number)
            if number == total:
                want = text.index(f"= {total}.") + 2 + len(total)
            assert len(before) < want <= len(upto)


def test_a_part_that_is_not_required_is_reported_and_holds_nothing_back():
    assert advice({"sum": 0.9, "first?": 0.1}).endswith("sum 0.90, first 0.10. RLMT is worth starting")
    assert "sum below 0.75: RLMT would learn slowly" in advice({"sum": 0.5, "first?": 0.1})
    assert advice({}) == "probe: no thought in these documents matches data.probe_parts"


@pytest.mark.parametrize("part", ["sum", "=x", "sum=", "sum=("])
def test_a_part_that_is_no_named_pattern_is_named(part):
    with pytest.raises(ValueError, match=re.escape(f"probe_parts: {part!r}")):
        read_parts((part,))

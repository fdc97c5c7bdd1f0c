"""The raw control: the SFT half without its thoughts, filled up with raw text to as many tokens as with them."""

from collections.abc import Iterable

from thinkmid.tokenizer import Tokenizer

Rows = list[tuple[str, str]]  # (id, text)


def fill(
    raw: Rows, reserve: Iterable[tuple[str, str]], think_tokens: int, tokenizer: Tokenizer
) -> tuple[Rows, dict[str, int]]:
    """Rows of the control, and its sizes: those of raw, then of the reserve in order, the last one cut to fit.

    think_tokens: of as many annotated rows as raw has. Tokens are counted as SFT reads a row: with the begin and end
    that it puts around each. "missing" is what the reserve was short of.
    """
    ends = (tokenizer.bos_id is not None) + len(tokenizer.eos_ids[:1])
    target = think_tokens + ends * len(raw)
    rows, total = list(raw), sum(map(len, tokenizer.encode_many(chunk for _, chunk in raw))) + ends * len(raw)
    for id, chunk in reserve:
        if (left := target - total - ends) < 1:
            break
        if len(at := tokenizer.token_ends(chunk)) > left:
            chunk = chunk[: at[left - 1]]
        if chunk:  # the first token of a character that has several ends before it
            rows.append((id, chunk))
            total += len(tokenizer.encode(chunk)) + ends
    sizes = {"rows": len(rows), "tokens": total, "think_tokens": target}
    return rows, sizes | {"missing": target - total if target - total > ends else 0}

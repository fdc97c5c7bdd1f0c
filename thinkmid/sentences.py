"""Where sentences end in raw text: a small rule that knows abbreviations, fast enough for a corpus.

In doubt it is no end: a missed end costs nothing, but one inside "Dr. Smith" would reward a policy for guessing the
name. Libraries were tried on the cases of tests/test_sentences.py: they are slower (pysbd by a factor of 100) or take
"the sum is t. We" for an initial, and report sentences where offsets are needed (sentencex, nupunkt).
"""

import re
from collections.abc import Iterator

# a stop and the quotes or brackets that it closes, before white space; line breaks; a stop of Chinese or Japanese
BREAK = r"[^\S\n]*\n+"
STOPS = rf"[.!?]['\")\]’”»]*(?:{BREAK}|(?=\s))|\n+|[。！？]+[」』）”’]*(?:{BREAK})?"
END, CLAUSE_END = re.compile(STOPS), re.compile(rf"{STOPS}|[:;](?:{BREAK}|(?=\s))")
# the white space after a stop, the quotes or brackets that open there, and the next word
NEXT = re.compile(r"\s+['\"(\[‘“«]*(\w*)")
MOST_WORD = 16  # characters before a stop that are looked at
WORD = re.compile(r"[^\s'\"(\[‘“«—–/-]+$")  # the word that a stop ends, what opens before it left out
ITEM = re.compile(r"(?:^|\n)[^\S\n]*(?:\d{1,3}|[A-Za-z]|[ivx]+|[IVX]+)$")  # "1." of a list, at the start of a line
LETTERS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # "J", "U.S", "e.g", "a.m"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# never the end of a sentence: a name or a word follows
TITLES = _words("""
    Adm Asst Brig Capt Cmdr Col Cpl Dr Drs Fr Gen Gov Hon Lieut Lt Maj Messrs Mlle Mme Mr Mrs Ms Mt Mx Pfc Pres
    Prof Pvt Rep Reps Rev Sen Sens Sgt Supt e.g i.e E.g I.e cf Cf viz vs v.s
""")
# the end of a sentence if one of STARTERS follows
DOUBTFUL = _words("""
    Jr Sr St Ste Ave Blvd Rd Ft Inc Co Corp Ltd LLC Bros Dept Univ Assn Intl Mfg et al etc Etc Ph.D M.D B.Sc M.Sc
    B.A M.A Esq Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thur Thurs Fri approx Approx
    est resp incl excl esp ibid op Calif Conn Mass Minn Penn Tex Wash Ariz Fla Ill Mich Tenn Va Wis
""")
# no end before a number: "No. 5", "pp. 3", "Fig. 2", "c. 1900"
NUMBERED = _words("""
    No Nos no nos Nr nr p pp P Pp Fig Figs fig figs Eq Eqs eq eqs Sec sec Sect Ch ch Chap Vol vol Vols vols Art art
    App Tab Thm Lem Prop Def Cor Ex Ref Refs c ca Ca v ver Ver
""")
# after a number no end before a number or a small letter: "5 ft. 3 in. tall"
UNITS = _words("""
    ft in oz lb lbs mi yd yds gal qt pt hr hrs min mins sec secs sq cu wk wks yr yrs mo mos mph
""")
# words that begin a sentence and hardly a name
STARTERS = _words("""
    A After All Also Although An And Another Any As At Because Before Both But By Can Did Do Does During Each Even
    Every First Finally For From He Her Here His How However I If In Instead Is It Its Last Later Let Many Meanwhile
    More Most My No Nobody Not Nothing Now Of On Once One Only Or Other Our Perhaps She Since So Some Still Such
    Than That The Their Then There These They This Those Though Through Thus To Today Two Under Unlike Until Up We
    Well Were What When Where Whether Which While Who Why With Would Yes Yet You Your
""")


def ends(text: str, start: int = 0, stop: int | None = None, *, clauses: bool = False) -> Iterator[int]:
    """Offsets in (start, stop] right after a sentence and the quotes that it closes, or after a run of line breaks.

    clauses: after a colon or semicolon before white space too. Text past `stop` decides, but holds no end.
    """
    stop = len(text) if stop is None else stop
    end = start
    # one character more, which the patterns look ahead to
    for match in (CLAUSE_END if clauses else END).finditer(text, start, stop + 1):
        if text[match.start()] == "\n":
            fits = not text[end : match.start()].isspace() and match.start() > end  # an empty line ends nothing more
        else:
            fits = text[match.start()] not in ".!?" or match[0][-1] == "\n" or _is_end(text, match)
        if fits and match.end() <= stop:
            end = match.end()
            yield end


def _is_end(text: str, match: re.Match[str]) -> bool:
    """Whether a stop before white space ends a sentence."""
    at = match.start()
    after = NEXT.match(text, match.end())
    word = after[1] if after else ""
    if text[at] != "." or len(match[0]) > 1:
        return not word[:1].islower()  # "Why?" he asked
    before = text[max(0, at - MOST_WORD) : at]
    if not before or before[-1] in ". …":  # an ellipsis, perhaps with spaces
        return not word[:1].islower() and text[match.end() + 1 : match.end() + 2] != "."
    found = WORD.search(before)
    last = found[0] if found else ""
    if last in TITLES or ITEM.search(before):
        return False
    if last in NUMBERED and word[:1].isdigit():
        return False
    if last in UNITS and re.search(r"\d\s*$", before[: -len(last)]):
        return word[:1].isupper()
    if last in DOUBTFUL or _initials(last):
        return word in STARTERS
    return True


def _initials(word: str) -> bool:
    return LETTERS.fullmatch(word) is not None and (len(word) > 1 or word.isupper())

"""The report in headless Chromium: hostile text stays text, filters filter, the page needs no network and no script."""

import json
import os
import shutil
from collections import Counter

import pytest
from report_runs import eval_run, jsonl, rl_run

from thinkmid.report.__main__ import main

# what a folder and a file may be called; the rest of the attacks need a slash or a NUL
NAME = "<img src=x onerror=window.owned=1><script>window.owned=1<!--\"'><svg onload=window.owned=1>\u202e"
SET = NAME.replace("=", " ")  # LAYOUT=PATH names a set
HOSTILE = "\n".join(
    [
        NAME,
        "</script><script>window.owned=1;document.title='owned'</script>",
        "--></div></details></article><h1 class='verdict'>reward 1</h1><style>* { display: none !important }</style>",
        "<link rel=stylesheet href=http://evil.example/x.css><base href=http://evil.example/>",
        "<iframe src=http://evil.example></iframe><a href='javascript:window.owned=1'>go</a>",
        "<meta http-equiv=refresh content='0;url=http://evil.example'><form action=http://evil.example><input name=x>",
        "\0 \x1b[31m \u2028 \u2029 \u202e drawer \u2066 \u200b \ufeff \ud800 \U000e0041 &lt;script&gt; \\u003cscript>",
        "z" + "\u0301" * 300,
        "wide" * 8000,
    ]
)
SETTLED = "return document.readyState === 'complete' && !document.getElementById('controls').hidden"


@pytest.fixture(scope="module")
def chromium():
    """A driver of headless Chromium. Without one the tests are skipped, or fail where THINKMID_NEEDS_CHROMIUM=1."""
    missing = pytest.fail if os.environ.get("THINKMID_NEEDS_CHROMIUM") == "1" else pytest.skip
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    try:
        from selenium import webdriver
    except ImportError:
        missing("needs selenium: pip install -r requirements.txt")
    if None in found.values():
        missing("needs chromium and chromedriver on the path: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    quiet = ("background-networking", "component-update", "sync", "gpu", "dev-shm-usage", "default-apps")
    for flag in ("headless", "no-sandbox", "no-first-run", "window-size=1300,1000", *(f"disable-{x}" for x in quiet)):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    yield driver
    driver.quit()


def all_of(driver, css):
    return driver.find_elements("css selector", css)


def opened(driver, folder, *args):
    """Write the report of args and open it from disk; the logs of earlier pages are read away."""
    out = folder / "report.html"
    main([*map(str, args), "--out", str(out)])
    driver.get("about:blank")
    for kind in ("performance", "browser"):
        driver.get_log(kind)
    driver.get(out.as_uri())
    assert driver.execute_script(SETTLED)
    return out


def choose(driver, id, text):
    """Pick an option by mouse, as a reader would."""
    next(o for o in all_of(driver, f"#{id} option") if o.text == text).click()


def unfolded(driver):
    """Press more until there is no more, open every fold."""
    while (more := driver.find_element("id", "more")).is_displayed():
        more.click()
    for fold in all_of(driver, "details:not([open]) > summary"):
        driver.execute_script("arguments[0].click()", fold)


def network(driver, event):
    """What the browser told of its network since it was last asked."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"] for m in messages if m["method"] == f"Network.{event}"]


def tags(driver):
    """Elements by tag, beside the words that a diff marks."""
    found = driver.execute_script("return [...document.querySelectorAll('*')].map((node) => node.tagName)")
    return Counter(tag for tag in found if tag not in ("INS", "DEL"))


def hostile_runs(folder, name, set_name, text):
    """An RL run and an evaluation in which everything that can be chosen is `text`, or a name where files bear it."""
    fields = dict.fromkeys(("prompt", "thought", "reference", "why", "prompt_id"), text)
    rl = rl_run(folder / f"rl {name}", steps=2, groups=1, text=text, start=name, **fields)
    jsonl(folder / "questions.jsonl", [{"id": f"q{i}", "question": f"{text} {i}?", "answer": text} for i in range(3)])
    entry = f"{set_name}:questions={folder}/questions.jsonl"
    config = f"[data]\nsets = [{json.dumps(entry)}]\n"
    run = eval_run(folder / f"eval {name}", model=text, sets=(set_name,), text=f"{text}</think>{text}", config=config)
    graded = [{"question": f"q{q}", "sample": k, "score": None, "answer": text} for q in range(3) for k in range(2)]
    jsonl(run / "graded" / f"{set_name}.jsonl", graded)
    cells = {"mean": {text: 0.5, "1": 0.25}}
    (folder / "table.json").write_text(json.dumps({text: {"before": cells, "after": cells}}))
    return rl, run, "--sweep", folder / "table.json"


def test_hostile_text_neither_runs_nor_styles_nor_asks_nor_leaves_its_box(chromium, tmp_path):
    look = "const s = getComputedStyle(document.body); return [s.display, s.backgroundColor, s.color, s.fontFamily]"
    (tmp_path / "kind").mkdir()
    (tmp_path / "hostile").mkdir()
    opened(chromium, tmp_path / "kind", *hostile_runs(tmp_path / "kind", "kind", "set", "so it is"))
    unfolded(chromium)
    kind_tags, kind_look = tags(chromium), chromium.execute_script(look)

    out = opened(chromium, tmp_path / "hostile", *hostile_runs(tmp_path / "hostile", NAME, SET, HOSTILE))
    unfolded(chromium)
    assert tags(chromium) == kind_tags
    assert chromium.execute_script(look) == kind_look
    assert chromium.execute_script("return window.owned") is None
    assert chromium.title == "thinkmid report"
    asked = {params["request"]["url"] for params in network(chromium, "requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {out.as_uri()}
    assert chromium.get_log("browser") == []  # nor was anything tried that the policy then refused

    shown = [box.get_property("textContent") for box in all_of(chromium, ".text")]
    assert any("</script><script>window.owned=1" in text for text in shown)
    for escape in ("⟨U+0000⟩", "⟨U+001B⟩", "⟨U+2028⟩", "⟨U+202E⟩", "⟨U+D800⟩", "⟨U+E0041⟩", "&lt;script&gt; \\u003c"):
        assert any(escape in text for text in shown)
    verdicts = [node.text for node in all_of(chromium, ".verdict")]
    assert Counter(verdicts) == {"reward 1": 2, "reward 0": 2, "no verdict": 2 + 6}
    outside = """return [...document.querySelectorAll('.text')].filter((node) => {
        const box = node.getBoundingClientRect(), around = node.closest('.group').getBoundingClientRect();
        return box.left < around.left || box.right > around.right || node.scrollWidth > node.clientWidth + 1
            || getComputedStyle(node).overflowX === 'visible' || !getComputedStyle(node).contain.match(/content|paint/);
    }).length"""
    assert chromium.execute_script(outside) == 0
    assert chromium.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_script_that_gets_into_the_page_all_the_same_is_refused(chromium, tmp_path):
    out = opened(chromium, tmp_path, rl_run(tmp_path / "rl"))
    foreign = "<script>window.owned=1</script><img src='http://evil.example/x.png' onerror='window.owned=1'>"
    out.write_text(out.read_text().replace("<main>", f"<main>{foreign}<b style='color: red'>x</b>"))
    chromium.get(out.as_uri())
    assert chromium.execute_script("return window.owned") is None
    assert {params.get("blockedReason") for params in network(chromium, "loadingFailed")} == {"csp"}
    refused = " ".join(entry["message"] for entry in chromium.get_log("browser"))
    for directive in ("script-src", "img-src", "style-src"):
        assert directive in refused


def counted(driver):
    """(samples, groups) on the page, which its own count must agree with."""
    unfolded(driver)
    found = len(all_of(driver, ".sample")), len(all_of(driver, ".group"))
    assert driver.find_element("id", "count").text == f"{found[0]} samples in {found[1]} groups"
    return found


def test_filters_leave_what_they_say(chromium, tmp_path):
    opened(chromium, tmp_path, rl_run(tmp_path / "one"), rl_run(tmp_path / "two", text="quite Another end"))
    assert len(all_of(chromium, ".group")) == 8  # the rest waits until it is asked for
    assert counted(chromium) == (36, 12)
    choose(chromium, "by-run", str(tmp_path / "two"))
    assert counted(chromium) == (18, 6)
    choose(chromium, "by-where", "step 2")
    assert counted(chromium) == (6, 2)
    for reward, kind in (("1", ".right"), ("0", ".wrong"), ("none", ".sample:not(.right):not(.wrong)")):
        choose(chromium, "by-reward", reward)
        assert counted(chromium) == (2, 2)
        assert len(all_of(chromium, kind)) == 2
    choose(chromium, "by-finish", "eos")
    assert counted(chromium) == (0, 0)
    for id in ("by-reward", "by-where", "by-run", "by-finish"):
        choose(chromium, id, "any")
    assert counted(chromium) == (36, 12)
    choose(chromium, "by-finish", "unclosed")
    assert counted(chromium) == (12, 12)
    choose(chromium, "by-finish", "any")
    for words, left in (("aNOTHER end", (18, 6)), ("hm 1", (12, 12)), ("p3-0", (6, 2)), ("nowhere", (0, 0))):
        field = chromium.find_element("id", "by-text")
        field.clear()
        field.send_keys(words)
        wait_for_count(chromium, left[0])
        assert counted(chromium) == left


def wait_for_count(driver, samples):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 5, 0.05).until(
        lambda d: d.find_element("id", "count").text.startswith(f"{samples} samples"), f"never {samples} samples"
    )


def test_a_thought_is_folded_and_the_diff_marks_the_words_that_differ(chromium, tmp_path):
    run = rl_run(tmp_path / "rl", steps=1, groups=1, text="and so it is now", reference="so it was")
    opened(chromium, tmp_path, run)
    first = all_of(chromium, ".sample")[0]
    fold = first.find_element("css selector", "details")
    assert "hm 0" not in first.text
    fold.find_element("css selector", "summary").click()
    assert "hm 0" in first.text
    marked = [(node.tag_name, node.text) for node in first.find_elements("css selector", "ins, del")]
    assert marked in (
        [("ins", "and"), ("del", "was"), ("ins", "is"), ("ins", "now")],
        [("ins", "and"), ("ins", "is"), ("ins", "now"), ("del", "was")],
    )
    chromium.find_element("id", "diff").click()
    assert all_of(chromium, "ins, del") == []
    assert "and so it is now" in all_of(chromium, ".sample")[0].text


def test_tables_and_pictures_need_no_script(chromium, tmp_path):
    rl, run = rl_run(tmp_path / "rl"), eval_run(tmp_path / "eval")
    out = opened(chromium, tmp_path, rl, run)
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(out.as_uri())
        assert not chromium.find_element("id", "controls").is_displayed()
        assert chromium.find_element("css selector", "noscript p").is_displayed()
        assert "0.2500" in chromium.find_element("id", "evaluations").text
        assert "0.3837" in chromium.find_element("id", "paper").text
        picture = chromium.find_element("css selector", "#curves img")
        assert picture.is_displayed()
        assert int(picture.get_property("naturalWidth")) > 300
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

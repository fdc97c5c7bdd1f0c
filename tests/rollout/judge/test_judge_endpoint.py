import contextlib
import importlib
import json
import logging
import math
import socket
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from thinkmid.errors import UserError
from thinkmid.rollout.judge import canary
from thinkmid.rollout.judge.breaker import Breaker
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.endpoint import GIVE_UP, RemoteAsk
from thinkmid.rollout.judge.model import JudgeError, ModelJudge

REFERENCE = "The river rose overnight, and the lower bridge was closed to carts."
KEY = "sk-not-for-any-log"


def reply(text="yes", top=None, **more):
    """A chat completion; top holds (token, probability) of its first token."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    if top is not None:
        entries = [{"token": t, "logprob": math.log(p)} for t, p in top]
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


SPLIT = [(" Yes", 0.4), ("no", 0.15), ("yes", 0.2), ("▁NO", 0.05), ("Maybe", 0.2)]
ANSWERS = {
    "yes": reply("yes"),
    "spoken": reply(" Yes.\n"),
    "no": reply("No"),
    "unsure": reply("no", SPLIT),
    "sure": reply("yes", [("yes", 0.99), ("no", 0.01)]),
    "silent": reply(None, [("no", 0.8), ("yes", 0.2)]),
    "plain": reply("no", logprobs=None),
    "odd": reply("no", logprobs={"content": [{"token": "no", "top_logprobs": None}]}),
    "aside": reply("no", [("The", 0.999), ("yes", 0.001)]),  # what is left of yes is no answer
}
BROKEN = {
    "chatty": (reply("Yes, they mean the same."), "unparsable"),
    "hedging": (reply("The texts", [("The", 0.97), ("yes", 0.001)]), "unparsable"),
    "mute": (reply(None), "unparsable"),
    "number": (reply(1), "incomplete answer"),
    "nan": (reply("", [("yes", 0.5)]).replace(b"-0.69", b'NaN, "x": 0.69'), "unparsable"),
    "huge": (reply("", [("yes", 0.5)]).replace(b"-0.69", b'1e9, "x": 0.69'), "unparsable"),
    "no-choices": (b'{"choices": []}', "incomplete answer"),
    "null-choices": (b'{"choices": null}', "incomplete answer"),
    "no-message": (b'{"choices": [{"index": 0}]}', "incomplete answer"),
    "other": (b'{"error": {"message": "overloaded"}}', "HTTP 200"),
    "list": (b"[]", "incomplete answer"),
    "cut": (reply()[:-30], "not JSON"),
    "html": (b"<html>busy</html>", "not JSON"),
    "nothing": (b"", "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
}


class Stub(BaseHTTPRequestHandler):
    """Does as the candidate says: "behave: <name>"."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["messages"][0]["content"].partition("behave: ")[2].split()[0]
        self.server.calls[name] += 1
        self.server.last = self.headers, body, self.path
        if name in ANSWERS or name in BROKEN:
            return self.send(ANSWERS[name] if name in ANSWERS else BROKEN[name][0])
        getattr(self, name.replace("-", "_"))(name)

    def send(self, data, status=200, length=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def once500(self, name):
        self.send(b"{}", 500) if self.server.calls[name] == 1 else self.send(reply("yes"))

    def always500(self, name):
        self.send(b'{"error": {"message": "' + KEY.encode() + b'"}}', 500)

    def refused(self, name):
        self.send(b'{"error": {"message": "' + KEY.encode() + b'"}}', 401)

    def refuses(self, name):
        """log-probs; refuses422: says so where they stand. refuses-everything: and what comes without them."""
        told = b'{"detail": [{"loc": ["body", "top_logprobs"], "msg": "Extra inputs are not permitted"}]}'
        told = told if name == "refuses422" else b'{"error": {"message": "this model gives no LogProbs"}}'
        asked = {"logprobs", "top_logprobs"} & self.body.keys()
        refused = asked or name == "refuses-everything"
        self.send(told if refused else reply("Yes"), (422 if name == "refuses422" else 400) if refused else 200)

    refuses422 = refuses_everything = refuses

    def bad(self, name):
        self.send(b'{"error": {"message": "the prompt is too long"}}', 400)

    def half(self, name):
        self.send(reply("yes"), length=10_000)
        self.close_connection = True

    def reset(self, name):
        # unread bytes are dropped and the peer told so
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
        self.close_connection = True

    def hang(self, name):
        self.server.over.wait(20)
        self.close_connection = True

    def trickle(self, name):
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\nContent-Type: application/json\r\n\r\n", b" ")

    def trickle_head(self, name):
        self.drip(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x")

    def drip(self, head, byte):
        """A byte every 50 ms, so that no single read ever times out."""
        self.close_connection = True
        try:
            self.connection.sendall(head)
            while not self.server.over.wait(0.05):
                self.connection.sendall(byte)
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *args):
        pass

    def finish(self):
        # the test's own resets end here
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        assert isinstance(sys.exception(), (OSError, ValueError)), sys.exception()


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Stub)
    server.calls, server.last, server.over, server.hung_up = Counter(), None, threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def remote(server, monkeypatch):
    """Makes clients of the stub and closes them."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.calls.clear()
    made = []

    def make(**options):
        url = f"http://127.0.0.1:{server.server_port}/v1"
        options = {"url": url, "timeout_s": 5.0, "workers": 4, "retries": 0} | options
        monkeypatch.setenv("OPENAI_API_KEY", options.pop("key", KEY))
        note = options.pop("note", print)
        made.append(RemoteAsk(JudgeConfig(kind="remote", model="a-judge", **options), note))
        return made[-1]

    yield make
    for ask in made:
        ask.close()


def asked(ask, name, **options):
    """The verdict on a candidate that makes the stub behave so, and the judge's row."""
    judge = ModelJudge(JudgeConfig(template="short", **options), ask, 0)
    return judge(f"behave: {name} ", REFERENCE).result(), judge.row()


@pytest.mark.parametrize(
    ("name", "p"),
    [
        ("yes", 1), ("spoken", 1), ("no", 0), ("unsure", 0.75), ("sure", 0.99), ("silent", 0.2), ("plain", 0),
        ("odd", 0), ("aside", 0),
    ],
)  # fmt: skip
def test_p_yes_is_read_from_log_probs_or_else_from_the_text(remote, name, p):
    verdict, row = asked(remote(), name)
    assert verdict.p_yes == pytest.approx(p)
    assert verdict.value == (p > 0.5)
    assert (row["judge_asked"], row["judge_failed"]) == (1, 0)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_fails_after_a_retry_and_is_never_0(remote, server, name):
    verdict, row = asked(remote(), name)
    assert verdict.value is None
    assert BROKEN[name][1] in verdict.why
    assert len(verdict.why) < 120
    assert server.calls[name] == 2
    assert (row["judge_asked"], row["judge_failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "why", "calls"),
    [
        ("always500", "HTTP 500", 2),
        ("refused", "HTTP 401", 1),  # to ask again would not help
        ("half", "no connection (RemoteProtocolError)", 2),
        ("reset", "no connection (ReadError)", 2),
        ("hang", "timeout", 2),
        ("trickle", "timeout", 1),
        ("trickle-head", "timeout", 1),
    ],
)
def test_what_an_endpoint_breaks_off_fails_and_says_how(remote, server, name, why, calls):
    timeout_s, server.hung_up = 0.3 if name[0] in "ht" else 5.0, threading.Event()
    began = time.perf_counter()
    verdict, row = asked(remote(timeout_s=timeout_s, retries=0 if "trickle" in name else 1), name, retries=0)
    assert (verdict.value, verdict.why) == (None, f"judge failed: {why}")
    assert server.calls[name] == calls
    assert (row["judge_asked"], row["judge_failed"]) == (1, 1)
    if timeout_s < 1:
        assert time.perf_counter() - began < 3
    if name.startswith("trickle"):
        assert server.hung_up.wait(3), "the request goes on behind our back"


def test_an_error_that_passes_is_not_noticed(remote, server):
    verdict, row = asked(remote(retries=1), "once500")
    assert verdict.value == 1
    assert server.calls["once500"] == 2
    assert row["judge_failed"] == 0


def test_nobody_listening(remote):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        verdict, _ = asked(remote(url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1"), "yes")
    assert verdict.why == "judge failed: no connection (ConnectError)"


def test_a_request_that_hangs_holds_up_no_other_for_longer_than_its_deadline(remote):
    ask = remote(timeout_s=0.3, workers=1)
    judge = ModelJudge(JudgeConfig(template="short", retries=0), ask, 0)
    names = ["trickle", "yes", "hang", "no", "trickle-head", "yes again"]
    began = time.perf_counter()
    pending = [judge(f"behave: {name} ", REFERENCE) for name in names]
    assert [p.result().value for p in pending] == [None, 1, None, 0, None, 1]
    assert time.perf_counter() - began < 6


def test_requests_go_out_before_anyone_waits_for_them(remote, server):
    remote()("behave: yes ")
    for _ in range(500):
        if server.calls["yes"]:
            break
        time.sleep(0.01)
    assert server.calls["yes"] == 1


def read(judge, names):
    """Verdicts of candidates that make the stub behave so, all asked before one is read."""
    pending = [judge(f"behave: {name} {i}", REFERENCE) for i, name in enumerate(names)]
    return [answer.result() for answer in pending]


def test_a_dead_endpoint_is_given_up_and_taken_back(remote, server):
    notes, timeout_s = [], 0.4
    judge = ModelJudge(JudgeConfig(template="short"), remote(timeout_s=timeout_s, note=notes.append), 0)
    began = time.perf_counter()
    verdicts, row = read(judge, ["hang"] * 60), judge.row()
    # without giving up: 15 rounds of the 4 workers, then 60 retries one after the other
    assert time.perf_counter() - began < 15 * timeout_s
    assert server.calls["hang"] < GIVE_UP + 2 * 4
    assert {v.value for v in verdicts} == {None}, "failed, never 0"
    whys = Counter(v.why for v in verdicts)
    given_up = "judge failed: not asked, the endpoint was given up (timeout)"
    assert set(whys) <= {given_up, "judge failed: timeout"}
    assert (row["judge_failed"], row["judge_given_up"]) == (60, whys[given_up])
    assert row["judge_given_up"] > 30
    assert notes == ["the judge's endpoint is given up until it answers again: timeout"]
    # one question in all goes through after a pause, and the first answer brings the endpoint back
    time.sleep(1.5 * timeout_s)
    assert [v.value for v in read(judge, ["yes"])] == [1]
    assert notes[1:] == ["the judge's endpoint answers again"]
    assert [v.value for v in read(judge, ["yes", "no"] * 5)] == [1, 0] * 5
    assert judge.row()["judge_given_up"] == 0


@pytest.mark.parametrize("name", ["refused", "always500", "chatty", "html"])
def test_an_endpoint_that_answers_anything_is_not_given_up(remote, server, monkeypatch, name):
    notes = []
    # without a silence to wait for, so that the number alone would do
    monkeypatch.setattr("thinkmid.rollout.judge.endpoint.Breaker", lambda limit, quiet_s: Breaker(limit, 0.0))
    verdicts = read(
        ModelJudge(JudgeConfig(template="short", retries=0), remote(note=notes.append), 0), [name] * 3 * GIVE_UP
    )
    assert server.calls[name] == 3 * GIVE_UP
    assert {v.value for v in verdicts} == {None}
    assert notes == []
    read(ModelJudge(JudgeConfig(template="short", retries=0), remote(note=notes.append), 0), ["reset"] * 3 * GIVE_UP)
    assert len(notes) == 1


@pytest.mark.parametrize(("name", "status"), [("refuses", 400), ("refuses422", 422)])
def test_an_endpoint_that_refuses_log_probs_is_asked_without_and_the_run_told_once(remote, server, name, status):
    notes = []
    judge = ModelJudge(JudgeConfig(template="short", retries=0), remote(note=notes.append), 0)
    first = read(judge, [name] * 8)
    assert {(v.value, v.p_yes) for v in first} == {(1, 1.0)}
    assert 9 <= server.calls[name] <= 8 + 4, "each worker is refused once at most"
    assert len(notes) == 1
    assert f"refuses log-probs (HTTP {status})" in notes[0]
    calls = server.calls[name]
    assert judge(f"behave: {name} again", REFERENCE).result().value == 1
    assert server.calls[name] == calls + 1
    assert server.last[1].keys() == {"messages", "model", "temperature", "max_tokens"}


@pytest.mark.parametrize(
    ("names", "calls"),
    [
        (["bad"], 1),  # says nothing of log-probs
        (["refuses-everything"], 2),  # they were not what was wrong
        (["sure", "refuses"], 1),  # accepted before
    ],
)
def test_other_refusals_fail_and_log_probs_are_still_asked_for(remote, server, names, calls):
    notes = []
    ask = remote(note=notes.append, workers=1)
    judge = ModelJudge(JudgeConfig(template="short", retries=0), ask, 0)
    *_, verdict = read(judge, names)
    assert (verdict.value, verdict.why) == (None, "judge failed: HTTP 400")
    assert server.calls[names[-1]] == calls
    assert read(judge, ["unsure"])[0].p_yes == pytest.approx(0.75)
    assert server.last[1]["logprobs"] is True
    assert notes == []


def test_canaries_name_what_an_endpoint_says_that_refuses_everything(remote, monkeypatch):
    monkeypatch.setattr(canary, "render", lambda *_: "behave: bad ")
    line = canary.run(remote(), "short", 0, [("a", REFERENCE)], num_attacks=1).line()
    assert "3 failed, most of them for: HTTP 400 (the prompt is too long); weakest" in line
    with pytest.raises(JudgeError) as error:
        remote()("behave: refused ").result()
    assert error.value.said == ""


def test_the_request_is_greedy_short_and_asks_for_log_probs(remote, server):
    asked(remote(), "yes")
    headers, body, path = server.last
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert path == "/v1/chat/completions"
    prompt = body.pop("messages")[0]["content"]
    assert prompt.endswith("same?")
    assert body == {"model": "a-judge", "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}


def test_the_key_stands_in_no_reason_and_no_log(remote, caplog, server):
    caplog.set_level(logging.DEBUG)
    ask = remote(key=f" {KEY}\n")
    whys = [asked(ask, name, retries=0)[0].why for name in ("yes", "always500", "refused", "reset")]
    assert KEY not in " ".join([*whys, caplog.text, repr(ask)])
    assert server.last[0]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(JudgeError) as error:
        ask("behave: refused ").result()
    assert KEY not in "".join(traceback.format_exception(error.value))
    for broken in (f"{KEY}\nx", f"{KEY} x", f"{KEY}é"):
        with pytest.raises(UserError, match="the key in OPENAI_API_KEY holds") as error:
            remote(key=broken)
        assert KEY not in str(error.value)


def test_verdicts_are_the_same_for_any_number_of_workers(remote):
    seen = []
    for workers in (1, 4, 16):
        judge = ModelJudge(JudgeConfig(template="short"), remote(workers=workers, retries=1), 0)
        pending = [judge(f"behave: {name} {i}", REFERENCE) for i in range(2) for name in [*ANSWERS, "chatty", "cut"]]
        seen.append([(v.value, v.p_yes) for v in (p.result() for p in pending)])
    assert seen[0] == seen[1] == seen[2]
    assert {value for value, _ in seen[0]} == {0, 1, None}


def test_close_fails_what_waits(remote):
    ask = remote(workers=1, timeout_s=2.0)
    answers = [ask("behave: trickle "), ask("behave: yes ")]
    time.sleep(0.3)
    began = time.perf_counter()
    ask.close()
    for answer in answers:
        with pytest.raises(JudgeError):
            answer.result()
    assert time.perf_counter() - began < 1.5


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "thinkmid.rollout.endpoint")
    with pytest.raises(UserError, match=r"pip install openai"):
        importlib.import_module("thinkmid.rollout.endpoint")


@pytest.mark.parametrize(("name", "value"), [("timeout_s", 0), ("workers", 0), ("retries", -1)])
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        JudgeConfig(**{name: value})

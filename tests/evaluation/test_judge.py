"""A judge behind HTTP, against a local stub: both orders, ties, one line for what goes wrong."""

import json
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.client import IncompleteRead, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from mlx_grpo.cli import main
from mlx_grpo.config.settings import train_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import InputError
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.evaluation import judge as judge_module
from mlx_grpo.evaluation.judge import Judge, Verdicts, compare_answers, outcome, question, verdict
from mlx_grpo.training.loop import train

KEY = "sk-very-secret"
Reply = tuple[int, bytes, dict[str, str]]


class Stub:
    """An endpoint whose replies a function of the question makes."""

    def __init__(self, answer: Callable[[str], str | Reply]):
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append({"path": self.path, **request})
                stub.keys.add(self.headers.get("Authorization"))
                found = answer(request["messages"][0]["content"])
                status, body, headers = found if isinstance(found, tuple) else completion(found)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in body.pieces() if isinstance(body, Endless) else (body,):
                    self.wfile.write(piece)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # a client that gave up is what some tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        # it looks every so many seconds whether it is to end
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: Any) -> Reply:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, json.dumps(body).encode(), {}


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], str | Reply]], Stub]]:
    """Start stubs; they end with the test."""
    stubs: list[Stub] = []

    def start(answer: Callable[[str], str | Reply]) -> Stub:
        stubs.append(Stub(answer))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


Serve = Callable[[Callable[[str], str | Reply]], Stub]


def groups(*texts: str) -> list[Group]:
    return [
        Group(
            Prompt(str(i), ({"role": "user", "content": f"question {i}"},), (1,)),
            (Completion((1,), text, "stop", (0.0,)),),
        )
        for i, text in enumerate(texts)
    ]


def shown(asked: str) -> tuple[str, str]:
    """Answers A and B of a question."""
    rest = asked.split("[Answer A]\n")[1].split("\n\n[End]")[0]
    a, b = rest.split("\n\n[Answer B]\n")
    return a, b


def likes_the_longer(asked: str) -> str:
    a, b = shown(asked)
    return "T" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_each_pair_is_asked_in_both_orders_and_the_better_answer_wins(serve: Serve) -> None:
    stub = serve(likes_the_longer)
    before, after = groups("short", "a long answer", "same"), groups("longer", "long", "size")
    found = compare_answers(Judge(stub.url, "m"), before, after)
    assert found == Verdicts((1.0, 0.0, 0.5), disagreements=0, unreadable=0)
    asked = {shown(r["messages"][0]["content"]) for r in stub.requests}
    assert asked >= {("short", "longer"), ("longer", "short")}
    assert len(stub.requests) == 6
    assert {(r["path"], r["model"], r["temperature"]) for r in stub.requests} == {
        ("/v1/chat/completions", "m", 0)
    }


@pytest.mark.parametrize("favourite", ["A", "B"])
def test_a_judge_that_only_sees_the_position_gives_only_ties(serve: Serve, favourite: str) -> None:
    stub = serve(lambda _: favourite)
    found = compare_answers(Judge(stub.url, "m"), groups("a", "b"), groups("c", "d"))
    assert found == Verdicts((0.5, 0.5), disagreements=2, unreadable=0)


def test_replies_that_cannot_be_read_are_counted_and_make_a_tie(serve: Serve) -> None:
    stub = serve(lambda asked: "Well, hard to say." if shown(asked)[0] == "x" else "A")
    found = compare_answers(Judge(stub.url, "m"), groups("x", "b"), groups("c", "d"))
    assert found == Verdicts((0.5, 0.5), disagreements=1, unreadable=1)


def test_a_reply_without_a_text_costs_its_own_verdict_alone(serve: Serve) -> None:
    stub = serve(lambda asked: completion(None) if shown(asked)[0] == "x" else "A")
    found = compare_answers(Judge(stub.url, "m"), groups("x", "b"), groups("c", "d"))
    assert found == Verdicts((0.5, 0.5), disagreements=1, unreadable=1)


def test_a_judge_that_is_never_understood_is_refused(serve: Serve) -> None:
    stub = serve(lambda _: "As an AI model")
    with pytest.raises(InputError, match="no reply begins with A, B or T; the first is 'As an AI"):
        compare_answers(Judge(stub.url, "m"), groups("x"), groups("c"))


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        *(("A", "A"), ("b", "B"), (" T\n", "T"), ("**B**", "B"), ("[A]", "A"), ("Tie.", "T")),
        *(("Answer B", "B"), ("Answer: A", "A"), ("B is better.", "B"), ("A.\nIt is short.", "A")),
        *(("<think>A or B? A.</think>\n\nB", "B"), ("A: clearer", "A")),
        *(("A better answer would be B", None), ("Both", None), ("The first", None), ("", None)),
        *(("I prefer A", None), ("<think>A", None), ("AB", None)),
    ],
)
def test_a_verdict_is_a_letter_that_stands_alone(reply: str, read: str | None) -> None:
    assert verdict(reply) == read


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        *(("B", "A", 1.0), ("A", "B", 0.0)),
        *(("A", "A", 0.5), ("B", "B", 0.5), ("T", "A", 0.5), ("B", "T", 0.5), (None, "A", 0.5)),
    ],
)
def test_only_agreement_in_both_orders_is_a_win(
    first: str | None, second: str | None, result: float
) -> None:
    assert outcome(first, second) == result


def test_a_conversation_is_shown_whole() -> None:
    messages = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "tea {or} rain?"},
    )
    text = question(messages, "one", " ")
    assert "system: be brief\n\nuser: tea {or} rain?" in text
    assert "[Answer B]\n(empty)" in text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(serve: Serve, status: int) -> None:
    replies: Iterator[str | Reply] = iter([(status, b"wait", {"Retry-After": "0"}), "A"])
    stub = serve(lambda _: next(replies))
    assert Judge(stub.url, "m", pause=0.0).ask("x") == "A"
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        ((429, b"slow down", {}), 4, "HTTP 429: slow down"),
        ((401, f"bad key {KEY}\nsecond line".encode(), {}), 1, "HTTP 401: bad key *** second line"),
        ((404, b"", {}), 1, "HTTP 404: Not Found"),
        ((307, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), 1, "HTTP 307"),
        ((200, b"<html>", {}), 1, "the reply is not a chat completion"),
        ((200, b'{"choices": []}', {}), 1, "the reply is not a chat completion"),
        ((200, b"[1]", {}), 1, "the reply is not a chat completion"),
        (completion({}), 1, "the reply is not a chat completion"),
    ],
)
def test_what_goes_wrong_takes_one_line_without_the_key(
    serve: Serve, answer: Reply, requests: int, message: str
) -> None:
    stub = serve(lambda _: answer)
    with pytest.raises(InputError) as failure:
        Judge(stub.url, "m", KEY, pause=0.0).ask("x")
    line = str(failure.value)
    assert line.startswith(f"--judge {stub.url}: {message}")
    assert "\n" not in line
    assert KEY not in line
    assert len(stub.requests) == requests


def test_a_silent_server_is_given_up_after_three_retries(serve: Serve) -> None:
    release = threading.Event()

    def silent(_: str) -> str:
        release.wait(10)
        return "A"

    stub = serve(silent)
    with pytest.raises(InputError, match=r"no reply in 0\.1 s"):
        Judge(stub.url, "m", timeout=0.1, pause=0.0).ask("x")
    release.set()
    assert len(stub.requests) == 4


def test_a_server_that_was_silent_once_is_asked_again(serve: Serve) -> None:
    release, asked = threading.Event(), iter(range(9))

    def silent_at_first(_: str) -> str:
        if not next(asked):
            release.wait(10)
        return "A"

    stub = serve(silent_at_first)
    assert Judge(stub.url, "m", timeout=0.5, pause=0.0).ask("x") == "A"
    release.set()
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RemoteDisconnected("closed without response"), 4),
        (URLError(ConnectionResetError("reset by peer")), 4),
        (URLError(TimeoutError("timed out")), 4),
        (IncompleteRead(b"{"), 4),
        (URLError(ConnectionRefusedError("refused")), 1),
        (URLError("unknown host"), 1),
    ],
)
def test_a_connection_is_tried_again_where_it_broke_and_not_where_there_is_none(
    error: Exception, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fails(_: Judge, question: str) -> str:
        tried.append(question)
        raise error

    monkeypatch.setattr(Judge, "_post", fails)
    with pytest.raises(InputError, match=r"^--judge http://x/v1: .+; check the URL"):
        Judge("http://x/v1", "m", pause=0.0).ask("x")
    assert len(tried) == asked


def test_no_server_at_all_is_said(serve: Serve) -> None:
    stub = serve(lambda _: "A")
    stub.close()
    with pytest.raises(InputError, match="Connection refused"):
        Judge(stub.url, "m").ask("x")


@pytest.mark.parametrize("url", ["localhost:8080", "file:///etc/passwd", "http://", "nonsense"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"not a URL; write it like http://localhost:8080/v1"):
        Judge(url, "m")


def test_the_key_is_sent_and_not_shown(serve: Serve) -> None:
    stub = serve(lambda _: "A")
    judge = Judge(stub.url, "m", KEY)
    judge.ask("x")
    assert stub.keys == {f"Bearer {KEY}"}
    assert KEY not in repr(judge)
    Judge(stub.url, "m").ask("x")
    assert None in stub.keys


@pytest.mark.parametrize(
    "url",
    [
        *("http://[::1", "http://[::1/v1", "http://[nonsense]/v1", "http://h:port/v1"),
        *("http://h:99999/v1", "http://h:0/v1", "http://a b/v1", "http://h/\x1b]52;c;aGk=\x07"),
        *("http://h/v1\nX: y", "http://münchen.example/v1", "http://h/naïve", "http://:80/v1"),
    ],
)
def test_an_odd_url_is_no_traceback(url: str) -> None:
    with pytest.raises(InputError, match=r"not a URL; write it like") as refusal:
        Judge(url, "m")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-ключ", "sk-\x00", "“sk-quoted”", "sk-\ud83d"])
def test_a_key_that_no_header_can_hold_is_named_and_not_shown(key: str) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY: holds characters that no key") as refusal:
        Judge("http://localhost/v1", "m", key)
    assert "sk-" not in str(refusal.value)


def test_a_query_is_sent_along_and_its_values_are_not_shown(serve: Serve) -> None:
    replies: Iterator[str | Reply] = iter(["A", (403, b"no, not with qwertz", {})])
    stub = serve(lambda _: next(replies))
    judge = Judge(f"{stub.url}/?api-version=7&key=qwertz#top", "m")
    judge.ask("x")
    assert stub.requests[0]["path"] == "/v1/chat/completions?api-version=7&key=qwertz"
    with pytest.raises(InputError) as failure:
        judge.ask("x")
    line = str(failure.value)
    assert f"--judge {stub.url}/?api-version=***&key=***" in line


@pytest.mark.parametrize(("login", "sent"), [("me:pass%3Aword", "me:pass:word"), ("me", "me:")])
def test_user_and_password_of_a_url_are_sent_and_not_shown(
    serve: Serve, login: str, sent: str
) -> None:
    body = f"bad login pass%3Aword {b64encode(sent.encode()).decode()}".encode()
    stub = serve(lambda _: (401, body, {}))
    with pytest.raises(InputError) as failure:
        Judge(stub.url.replace("//", f"//{login}@"), "m").ask("x")
    line = str(failure.value)
    assert stub.keys == {f"Basic {b64encode(sent.encode()).decode()}"}
    assert "//***@127.0.0.1" in line and "me:" not in line
    assert b64encode(sent.encode()).decode() not in line
    assert login == "me" or "pass" not in line.replace("OPENAI", "")


DEEP = b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"x" * (5 << 20), "a reply of more than 1 MB"),
        (DEEP, "the reply is not a chat completion"),
        (b'{"choices": []}', "the reply is not a chat completion"),
        (b'{"choices": [{"message": {"content": 3}}]}', "the reply is not a chat completion"),
        (b'{"choices": [' + b"9" * 5000 + b"]}", "the reply is not a chat completion"),
        (b"\xff\xfe", "the reply is not a chat completion"),
        (b"[]", "the reply is not a chat completion"),
    ],
)
def test_a_reply_of_another_kind_or_size_is_said_in_a_line(
    serve: Serve, body: bytes, complaint: str
) -> None:
    stub = serve(lambda _: (200, body, {}))
    with pytest.raises(InputError, match=complaint):
        Judge(stub.url, "m").ask("x")


def test_no_more_of_a_large_reply_is_read_than_a_verdict_takes(serve: Serve) -> None:
    sent: list[int] = []
    stub = serve(lambda _: (200, Endless(sent), {}))
    with pytest.raises(InputError, match="a reply of more than 1 MB"):
        Judge(stub.url, "m").ask("x")
    stub.close()
    assert sum(sent) < 64 << 20  # what the system's buffers take beyond it


class Endless(bytes):
    """A body of a gigabyte that is made while it is sent."""

    def __new__(cls, sent: list[int]) -> "Endless":
        made = super().__new__(cls)
        made.sent = sent  # type: ignore[attr-defined]
        return made

    def pieces(self) -> Iterator[bytes]:
        for _ in range(1024):
            self.sent.append(1 << 20)  # type: ignore[attr-defined]
            yield b"x" * (1 << 20)


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dripping(Endless):
        def pieces(self) -> Iterator[bytes]:
            for _ in range(600):
                time.sleep(0.05)
                yield b" "

    stub = serve(lambda _: (200, Dripping([]), {}))
    with pytest.raises(InputError, match=r"no reply in 0\.1 s"):
        Judge(stub.url, "m", timeout=0.1, pause=0.0).ask("x")


@pytest.mark.parametrize("asked", ["²", "9" * 500, "-1", "soon", ""])
def test_any_retry_after_is_borne(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(judge_module.time, "sleep", slept.append)
    headers = {"Retry-After": asked.encode("utf-8").decode("latin-1")}
    replies: Iterator[str | Reply] = iter([(503, b"wait", headers), "A"])
    stub = serve(lambda _: next(replies))
    assert Judge(stub.url, "m").ask("x") == "A"
    assert 0 <= slept[0] <= 30


def test_a_reply_that_steers_the_terminal_is_shown_as_it_is(serve: Serve) -> None:
    evil = "\x1b]52;c;ZXZpbA==\x07\x1b[2J"
    stub = serve(lambda _: (400, evil.encode(), {}))
    with pytest.raises(InputError) as failure:
        Judge(stub.url, "m").ask("x")
    assert "\x1b" not in str(failure.value) and "\\x1b]52" in str(failure.value)
    stub = serve(lambda _: evil)
    with pytest.raises(InputError) as failure:
        compare_answers(Judge(stub.url, "m"), groups("x"), groups("c"))
    assert "\x1b" not in str(failure.value) and "\\x1b]52" in str(failure.value)


@pytest.fixture
def run(train_arguments: dict[str, Any]) -> Path:
    """A finished run of two iterations."""
    config = train_config(**{**train_arguments, "num_iterations": 2})
    assert train(config, Console(quiet=True))
    return config.run_directory


def evaluate(monkeypatch: pytest.MonkeyPatch, run: Path, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mlx-grpo", "eval", str(run), *flags])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return main()


def test_eval_shows_and_writes_what_the_judge_said(
    run: Path,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = serve(lambda asked: "B" if "[Answer A]" in asked else "A")
    file = tmp_path / "figures.json"
    flags = ("--judge", stub.url, "--json", str(file), "--limit", "2")
    flags += ("--eval-reward", "mlx_grpo.rubric:gold")
    assert evaluate(monkeypatch, run, *flags) == 0
    shown_text = capsys.readouterr()
    assert "judge (2 ties)" in shown_text.out and "50% (9% to 91%)" in shown_text.out
    assert "gold judge " in shown_text.out
    assert KEY not in shown_text.out + shown_text.err + file.read_text()
    found = json.loads(file.read_text())
    assert found["prompts"]["count"] == 2
    assert found["adapter"] in (f"{run}/best", f"{run}/final")
    assert set(found["wins"]) == {"reward", "gold", "judge"}
    judged = found["wins"]["judge"]
    assert (judged["wins"], judged["ties"], judged["losses"]) == (0, 2, 0)
    assert (judged["disagreements"], judged["unreadable"]) == (2, 0)
    assert found["sft"]["eval_kl"] == 0.0
    assert found["grpo"]["eval_kl"] > 0.0


def test_a_judge_that_fails_midway_leaves_the_table_in_place(
    run: Path,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = serve(lambda asked: (400, b"no more", {}) if "[Answer A]" in asked else "A")
    assert evaluate(monkeypatch, run, "--judge", stub.url) == 2
    shown_text = capsys.readouterr()
    assert "perplexity of reference answers" in shown_text.out
    last = shown_text.err.strip().splitlines()[-1]  # after a warning of what chose best/
    assert last.startswith(f"error: --judge {stub.url}: HTTP 400: no more")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--judge", "http://127.0.0.1:9/v1"), "Connection refused"),
        (("--judge", "nowhere"), "not a URL"),
        (("--json", "no/such/directory/f.json"), "no such directory"),
        (("--json", "."), "--json .: a directory; name a file"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert evaluate(monkeypatch, tmp_path / "no-run-here", *flags) == 2
    assert message in capsys.readouterr().err

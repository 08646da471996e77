"""Which of two answers is better, by a model behind an OpenAI-compatible endpoint.

Every pair is shown in both orders, because judges favour a position (Zheng et al. 2023,
arXiv:2306.05685, section 3.3): an answer wins if it is preferred in both, anything else is a tie.
"""

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from typing import IO, Any

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.types import Group

AT_ONCE = 4
RETRIES = 3
BUSY = (429, 500, 502, 503, 504)
PASSING = (TimeoutError, ConnectionResetError, IncompleteRead)
"""A server that is slow, or that went away in the middle: perhaps not for long."""
LONGEST_PAUSE = 30.0
PATIENCE = 5
"""Timeouts that a reply may take which never falls silent."""
LONGEST_REPLY = 1 << 20
"""Bytes of a body that are read: a verdict is a letter, thoughts before it some thousand words."""
QUESTION = """\
Compare two answers to the same request. The better one does what was asked, is correct, and is easy
to read. Neither length nor the order in which they are shown is a merit.

[Request]
{request}

[Answer A]
{a}

[Answer B]
{b}

[End]
Reply with a single letter and nothing else: A if answer A is better, B if answer B is better, T if
they are equally good."""

Verdict = str | None
"""A, B or T; None for a reply that is none of them."""


@dataclass(frozen=True)
class Judge:
    """A model that is asked by HTTP."""

    url: str
    """Base of the endpoint, as in http://localhost:8080/v1; a query is sent along."""
    model: str
    key: str | None = field(default=None, repr=False)
    """Bearer token; sent to `url` alone and never shown."""
    timeout: float = 60.0
    """Seconds until a connection, or a silent one, is given up."""
    pause: float = 1.0
    """Seconds before the first retry; each further one waits twice as long."""

    def __post_init__(self) -> None:
        """Raise InputError unless `url` and `key` are such that a request can be sent."""
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            usable = usable and parts.port != 0 and self.url.isprintable()
            self._endpoint().encode("ascii")
        except ValueError:  # a bracket that is not closed, a port that is no number, ...
            usable = False
        if not usable or " " in self.url:
            raise InputError(
                f"--judge {self.shown}: not a URL; write it like http://localhost:8080/v1"
            )
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise InputError(
                "OPENAI_API_KEY: holds characters that no key has, a line break perhaps; set it "
                "again"
            )

    @property
    def shown(self) -> str:
        """The URL without what nobody else should see: a password, and values of the query."""
        masked = re.sub(r"(?<=//)[^/?#]*@", "***@", self.url)
        return re.sub(r"(?<==)[^&#]+", "***", masked) if "?" in masked else masked

    def _endpoint(self) -> str:
        """Where to post to: the path is longer, user, password and fragment are left out."""
        parts = urllib.parse.urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        path = f"{parts.path.rstrip('/')}/chat/completions"
        return urllib.parse.urlunsplit((parts.scheme, host, path, parts.query, ""))

    def _authorization(self) -> str | None:
        """The key as a bearer token, else user and password of the URL."""
        if self.key:
            return f"Bearer {self.key}"
        parts = urllib.parse.urlsplit(self.url)
        if parts.username is None:
            return None
        pair = f"{parts.username}:{parts.password or ''}"
        return "Basic " + b64encode(urllib.parse.unquote(pair).encode()).decode()

    def ask(self, question: str) -> str:
        """The reply to a question.

        Raises:
            InputError: an HTTP error, or no reply (each after three retries where it may pass), or
                a reply that is not a chat completion.
        """
        for retry in range(RETRIES + 1):
            pause = self.pause * 2**retry
            try:
                return self._post(question)
            except urllib.error.HTTPError as e:
                if e.code not in BUSY or retry == RETRIES:
                    raise InputError(self._complaint(f"HTTP {e.code}: {_reason(e)}")) from None
                time.sleep(_pause(e.headers, pause))
            except InputError:
                raise
            except (OSError, HTTPException) as e:
                reason = getattr(e, "reason", e)
                if not isinstance(reason, PASSING) or retry == RETRIES:
                    late = isinstance(reason, TimeoutError)
                    what = f"no reply in {self.timeout:g} s" if late else reason
                    raise InputError(self._complaint(str(what) or type(e).__name__)) from None
                time.sleep(pause)
            except (ValueError, LookupError, TypeError, RecursionError):
                raise InputError(self._complaint("the reply is not a chat completion")) from None
        raise AssertionError("unreachable")

    def _post(self, question: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if authorization := self._authorization():
            headers["Authorization"] = authorization
        request = urllib.request.Request(self._endpoint(), json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout) as response:
            text = self._body(response)
        reply = json.loads(text)["choices"][0]["message"]["content"]
        if reply is None:  # a refusal, or reasoning that was cut off: an answer without a verdict
            return ""
        if not isinstance(reply, str):
            raise TypeError("the content is not a text")
        return reply

    def _body(self, response: HTTPResponse) -> bytes:
        """All of a reply, within bounds: a server may send without end, or a byte a minute."""
        body, end = b"", time.monotonic() + PATIENCE * self.timeout
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > LONGEST_REPLY:
                raise InputError(self._complaint(f"a reply of more than {LONGEST_REPLY >> 20} MB"))
            if time.monotonic() > end:
                raise TimeoutError
        return body

    def _complaint(self, what: str) -> str:
        line = one_line(what)
        password = urllib.parse.urlsplit(self.url).password or ""
        sent = (self._authorization() or "").split(" ")[-1]
        for secret in filter(None, (sent, password, urllib.parse.unquote(password))):
            line = line.replace(secret, "***")
        return f"--judge {self.shown}: {line}; check the URL, --judge-model and OPENAI_API_KEY"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following one would hand the key to another host."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own words where it has some."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return str(error.reason)
    return text.strip() or str(error.reason)


def _pause(headers: Any, seconds: float) -> float:
    """What the server asks for, within bounds, or our own."""
    asked = str(headers.get("Retry-After", ""))
    return min(float(asked) if asked.isascii() and asked.isdigit() else seconds, LONGEST_PAUSE)


@dataclass(frozen=True)
class Verdicts:
    """What a judge said about the answers of two policies to the same prompts."""

    outcomes: tuple[float, ...]
    """Per prompt: 1 the second policy wins, 0 the first, 0.5 a tie."""
    disagreements: int
    """Ties because the two orders contradict each other."""
    unreadable: int
    """Replies, of two per prompt, that were neither A, B nor T; they make a tie."""


def compare_answers(
    judge: Judge,
    before: Sequence[Group],
    after: Sequence[Group],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Verdicts:
    """Ask about the first answer to every prompt, in both orders, a few at a time.

    Raises:
        InputError: the judge cannot be asked, or no reply could be read.
    """
    questions = [
        question(first.prompt.messages, a, b)
        for first, second in zip(before, after, strict=True)
        for x, y in [(first.completions[0].text, second.completions[0].text)]
        for a, b in ((x, y), (y, x))
    ]
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        replies = []
        for done, reply in enumerate(pool.map(judge.ask, questions), 1):
            replies.append(reply)
            progress("judged", done, len(questions))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    read = [verdict(reply) for reply in replies]
    if not any(read):
        raise InputError(
            f"--judge {judge.shown}: no reply begins with A, B or T; the first is "
            f"{replies[0][:80]!r}; try another --judge-model"
        )
    pairs = list(zip(read[::2], read[1::2], strict=True))
    return Verdicts(
        outcomes=tuple(outcome(*pair) for pair in pairs),
        disagreements=sum(pair in (("A", "A"), ("B", "B")) for pair in pairs),
        unreadable=sum(v is None for v in read),
    )


def question(messages: Sequence[dict[str, str]], a: str, b: str) -> str:
    """The text a judge gets."""
    whole = "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    request = messages[0]["content"] if len(messages) == 1 else whole
    return QUESTION.format(request=request, a=a.strip() or "(empty)", b=b.strip() or "(empty)")


def verdict(reply: str) -> Verdict:
    """A, B or T from a reply that begins with it, whatever the judge thought aloud before."""
    said = re.sub(r"^.*</think>", "", reply, flags=re.DOTALL)
    # a letter that stands alone: "A better answer would be B" is not an A
    alone = r"[\W_]*(?:answer\W+)?([ABT])(?:ie)?(?=[\W_]*$|[.:,;)*\n]| is better)"
    found = re.match(alone, said, re.IGNORECASE)
    return found[1].upper() if found else None


def outcome(first_order: Verdict, second_order: Verdict) -> float:
    """1 if the second policy's answer is preferred both as B and as A, 0 if the first's is both
    times, else a tie."""
    if (first_order, second_order) == ("B", "A"):
        return 1.0
    return 0.0 if (first_order, second_order) == ("A", "B") else 0.5

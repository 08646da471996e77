"""The report says what the run's files say, for one run or several, and nothing from outside runs
in it."""

import base64
import csv
import hashlib
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from mlx_grpo.config.settings import train_config, with_settings
from mlx_grpo.config.sources import build_config
from mlx_grpo.console.output import Console
from mlx_grpo.core.errors import STEERING, InputError
from mlx_grpo.core.stats import WinRate, cohens_d
from mlx_grpo.files.lock import locked
from mlx_grpo.report import page
from mlx_grpo.report import write as report
from mlx_grpo.report.figures import figures
from mlx_grpo.report.page import pooled
from mlx_grpo.report.record import read
from mlx_grpo.report.write import write_report
from mlx_grpo.run import log
from mlx_grpo.training.loop import train
from tests.helpers.runs import HOSTILE, evaluation, write_run
from tests.helpers.terminal import mlx_grpo
from tests.helpers.tiny import write_jsonl


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "seed-42")


def words(html: str) -> str:
    """What a reader reads."""
    body = re.sub(r"<(style|title|script)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_summary_gives_the_figures_of_the_best_evaluation_and_of_the_first(run: Path) -> None:
    said = words(write_report([run]).read_text())
    assert "At the best checkpoint, after 30 iterations" in said
    assert "reward on held-out prompts is +3.00; the SFT model has +0.00" in said
    # of 12 prompts, four lose and eight win: Wilson's interval
    told = "higher reward on 67% (95 % interval 39% to 86%) of the prompts;"
    assert f"{told} its win rate passed 60% after 10 iterations." in said
    assert (
        "The gold judge scores the answers 0.610 on average (SFT model: 0.700); it prefers" in said
    )
    assert "on 50% (95 % interval 25% to 75%) of the prompts, 12 ties counted half." in said
    assert "0.0150 nats per token" in said


def test_each_evaluation_is_decided_on_with_its_reason(run: Path) -> None:
    decided = {row["step"]: (gate, why) for row, gate, why in read(run, False).decisions()}
    assert decided[0] == (0.05, "SFT model")
    assert decided[30] == (0.02, "best so far")
    assert decided[40] == (0.02, "KL above its gate of 0.02")
    worse = {**evaluation(20), "eval_perplexity": 19.9, "eval_best": False}
    write_jsonl(run / "metrics.jsonl", [evaluation(0), evaluation(10), worse])
    assert read(run, False).decisions()[2][2] == "perplexity not better"


def test_answers_that_are_shown_are_drawn_by_key_and_not_by_reward(run: Path) -> None:
    ids = [before["id"] for before, _ in page.examples(read(run, False))]
    assert len(set(ids)) == page.EXAMPLES
    lines = (run / log.EVAL_COMPLETIONS).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    write_jsonl(run / log.EVAL_COMPLETIONS, [r | {"reward": -r["reward"]} for r in rows])
    assert [before["id"] for before, _ in page.examples(read(run, False))] == ids


def test_greedy_answers_are_compared_and_shown_where_a_run_has_them(run: Path) -> None:
    sampled = log.read(run / log.EVAL_COMPLETIONS)
    greedy = [r | {"completion": "so", "reward": float(r["step"])} for r in sampled]
    write_jsonl(run / log.EVAL_ANSWERS, [r for r in greedy if r["step"]])
    assert read(run, False).temperature == 1  # an older version took the first ones
    write_jsonl(run / log.EVAL_ANSWERS, greedy)
    record = read(run, False)
    assert record.wins() == WinRate(12.0, 12) and record.temperature == 0
    assert {after["completion"] for _, after in page.examples(record)} == {"so"}
    said = words(write_report([run]).read_text())
    assert "Of the greedy answers, its own has the higher reward on 100%" in said
    assert "wins over the SFT model by reward, greedy answers 100%" in said


def test_warnings_stand_on_the_page_with_what_to_try(run: Path) -> None:
    said = words(write_report([run]).read_text())
    assert "The reward rises while the gold judge falls" in said
    assert "The reward is being fooled" in said


def test_what_a_model_writes_stays_text(run: Path) -> None:
    html = write_report([run]).read_text()
    assert html.count("<script") == 1 and "<img" not in html  # that of the page itself
    assert HOSTILE.split("&")[0].strip() in unescape(html)


def test_what_a_model_writes_steers_no_terminal_and_no_direction_of_writing(run: Path) -> None:
    steering = "\x1b]0;title\x07\x9b31m\u202e"
    rows = log.read(run / log.EVAL_COMPLETIONS)
    (run / log.EVAL_COMPLETIONS).unlink()
    log.append(
        run / log.EVAL_COMPLETIONS, *({**r, "completion": r["completion"] + steering} for r in rows)
    )
    html = write_report([run]).read_text()
    assert not STEERING.search(html.replace("\n", "").replace("\t", ""))
    assert r"\x1b]0;title\x07\x9b31m\u202e" in html


def test_the_page_needs_nothing_from_outside(run: Path) -> None:
    html = write_report([run]).read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert "@import" not in html and "url(" not in html


def test_the_policy_of_the_page_names_its_own_script_and_no_other(run: Path) -> None:
    html = write_report([run]).read_text()
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert script == (Path(page.__file__).with_name("page.js")).read_text()


def test_each_chart_carries_its_numbers(run: Path) -> None:
    html = write_report([run]).read_text()
    links = dict(re.findall(r'href="data:text/csv;charset=utf-8,([^"]*)" download="([^"]*)"', html))
    texts = {name: unquote(text) for text, name in links.items()}
    assert len(texts) == html.count("<figure>")
    rows = list(csv.DictReader(texts["kl-to-the-sft-model.csv"].splitlines()))
    kls = {r["step"]: r["kl"] for r in log.read(run / log.METRICS) if "kl" in r}
    assert {int(r["iteration"]): float(r["each iteration"]) for r in rows[1:]} == kls
    assert [r["iteration"] for r in rows if r["held-out prompts"]] == list(
        map(str, range(0, 70, 10))
    )


def test_the_table_has_every_answer_and_few_of_a_long_evaluation(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(page.answers(read(run, False))) == 12
    assert write_report([run]).read_text().count("<tr data-cut>") == 3
    monkeypatch.setattr(page, "MOST_ANSWERS", 5)
    gains = [b["reward"] - a["reward"] for a, b in page.answers(read(run, False))]
    assert len(gains) == 5 and gains == sorted(gains, reverse=True)


def test_the_page_opens_in_the_browser_of_the_reader(run: Path, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    terminal = mlx_grpo("report", str(run), "--open", BROWSER=f"{browser} %s")
    assert terminal.end() == 0
    assert (tmp_path / "opened").read_text() == f"{(run / 'report.html').as_uri()}\n"


def test_the_command_on_the_page_is_the_run_again(run: Path, tmp_path: Path) -> None:
    record = read(write_run(tmp_path / "other", kl_targets=(0.1, 0.05), K=8), False)
    typed = page.training_command(record).split()
    assert typed[:2] == ["mlx-grpo", "train"]
    flags = dict(zip(typed[2::2], typed[3::2], strict=True))
    names = {f.removeprefix("--").replace("-", "_"): v for f, v in flags.items()}
    again = build_config(flags={**names, "eval_reward": [names["eval_reward"]]})
    assert again == with_settings(record.config, output=f"{record.config.run.output}-again")


def test_several_runs_give_mean_and_spread(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "seed-43", seed=43)
    target = write_report([run, other])
    assert target == tmp_path / "runs" / "report.html"
    said = words(target.read_text())
    # rewards 3.0 and 3.1: sample standard deviation 0.0707
    assert "reward +0.050 ± 0.071 +3.050 ± 0.071 +3.000 ± 0.000 +3.000 to +3.000 +3.000" in said
    assert said.count("Best checkpoint") == 2
    assert "each run" in said  # in the legends


def test_the_table_says_what_has_changed(run: Path) -> None:
    said = words(write_report([run]).read_text())
    assert "reward +0.000 +3.000 +3.000 " in said
    assert "perplexity of reference answers 20.00 18.50 -1.50 " in said
    rows = [evaluation(0), {**evaluation(10), "eval_completions/clipped_ratio": 0.1}]
    write_jsonl(run / "metrics.jsonl", rows)
    assert "share of answers cut off 30% 10% -20 points" in words(write_report([run]).read_text())


def test_win_rates_of_several_runs_are_pooled_and_show_their_ties(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed-{s}", seed=s) for s in (1, 2, 3)]
    said = words(write_report(runs).read_text())
    # 24 of 36 prompts, and each run's 8 of 12: Wilson's intervals
    each, how = " 67% (39% to 86%)" * 3, "sampled (temperature 1) answers"
    assert f"wins over the SFT model by reward, {how} 67% (50% to 80%){each}" in said
    assert f"wins over the SFT model by gold judge, {how} 50% (34% to 66%) 36 ties" in said
    assert "win rate by reward first over 60% iteration 10 iteration 10 iteration 10" in said
    # twelve rewards 0 to 11; eight rise by 1.5 and four fall by as much
    effect = cohens_d(range(12), [i + (1.5 if i > 3 else -1.5) for i in range(12)])
    assert f"effect size by reward (Cohen's d), {how} {effect:+.2f} ± 0.00" in said
    assert pooled([None, WinRate(1.5, 4, 1), WinRate(2.0, 4, 0)]) == WinRate(3.5, 8, 1)
    assert pooled([None]) is None


def test_a_judge_of_another_name_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", eval_reward=("judges.py:plain",))
    for name in ("metrics", "eval_completions"):
        file = run / f"{name}.jsonl"
        file.write_text(file.read_text().replace("rewards/gold", "rewards/plain"))
    said = words(write_report([run]).read_text())
    assert "The gold judge (plain) scores the answers 0.610 on average" in said
    assert "gold judge: plain 0.700 0.610" in said and "Gold judge: plain score" in said


def test_flags_and_names_with_hyphens_are_held_together(run: Path) -> None:
    html = write_report([run]).read_text()
    assert '<span class="word">--kl-targets,</span>' in html
    assert page.unbroken("a <b-c> d") == 'a <span class="word">&lt;b-c&gt;</span> d'


def test_a_judge_of_some_of_the_runs_is_shown_for_those(run: Path, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", seed=43, eval_reward=())
    rows = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    write_jsonl(
        plain / "metrics.jsonl",
        [{k: v for k, v in row.items() if "rewards/gold" not in k} for row in rows],
    )
    for runs in ([run, plain], [plain, run]):
        said = words(write_report(runs, tmp_path / "both.html").read_text())
        assert "gold judge 0.700 0.610 -0.090 " in said  # of one run there is no spread
        assert "Gold judge held-out, by iteration" in said


def test_a_run_that_is_given_twice_counts_once(run: Path) -> None:
    assert "<title>seed-42 " in write_report([run, run.parent]).read_text()


def test_a_directory_of_runs_stands_for_them(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "seed-43", seed=43)
    assert "2 runs: seed-42, seed-43" in write_report([tmp_path / "runs"]).read_text()


def test_a_run_at_work_is_followed_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=30)
    with locked(run):
        html = write_report([run]).read_text()
        assert 'http-equiv="refresh"' in html
        assert "running, iteration 30 of 60" in words(html)
    html = write_report([run]).read_text()
    assert 'http-equiv="refresh"' not in html
    assert "stopped at iteration 30 of 60" in words(html)


def test_a_page_says_how_old_it_may_be_and_how_to_go_on(tmp_path: Path) -> None:
    """A run that is killed cannot say so itself."""
    run = write_run(tmp_path / "a run", steps=30)
    go_on = f"Go on with mlx-grpo train --resume --output '{run}'"
    said = words(write_report([run], running=True).read_text())
    # ten iterations of 22 s and an evaluation of 30 s
    assert "anew at each evaluation, about every 4 min 10 s" in said
    assert f"much older than that, the run has died. {go_on}" in said
    said = words(write_report([run], running=False).read_text())
    assert go_on in said and "has died" not in said
    assert "Go on with" not in words(write_report([write_run(tmp_path / "done")]).read_text())


def test_a_run_without_its_last_evaluation_has_not_finished(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert read(run, False).finished
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "stopped at iteration 60 of 60" in words(write_report([run]).read_text())


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0)
    assert "the first evaluation of what it learns is still to come" in words(
        write_report([run]).read_text()
    )


def test_a_run_of_an_older_version_has_a_page_without_answers(run: Path) -> None:
    (run / "eval_completions.jsonl").unlink()
    said = words(write_report([run]).read_text())
    assert "At the best checkpoint" in said
    assert "Answers before and after" not in said


def test_figures_that_are_not_finite_are_said_to_be(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[-1] |= {"eval_kl": None, "eval_perplexity": None, "eval_reward": None}
    write_jsonl(run / "metrics.jsonl", rows)
    said = words(write_report([run]).read_text())
    assert "60 not finite 0.01 not finite KL above its gate of 0.01" in said


def test_a_gate_between_two_targets_is_rounded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10, kl_schedule="linear", kl_targets=(0.05, 0.01))
    assert "10 0.0050 0.044 19.50 best so far" in words(write_report([run]).read_text())


def test_the_learning_curve_of_the_reward_model_is_drawn(tmp_path: Path) -> None:
    curve = [
        {"step": s, "train_loss": 0.7, "valid_loss": 0.69, "valid_accuracy": 0.5} for s in (1, 2)
    ]
    (tmp_path / "rm").mkdir()
    write_jsonl(tmp_path / "rm" / "learning_curve.jsonl", curve)
    run = write_run(tmp_path / "run", rm_model=str(tmp_path / "rm"))
    html = write_report([run]).read_text()
    assert "Reward model: accuracy share of held-out pairs, by optimizer step" in words(html)
    assert "optimizer step 2\nheld-out: 0.5" in html


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda run: (run / "config.toml").unlink(), r"no run here"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"nothing to report before"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), r"metrics.jsonl:1: not valid JSON"),
    ],
)
def test_a_directory_without_a_report_in_it_gets_one_line(
    damage: Any, complaint: str, run: Path
) -> None:
    damage(run)
    with pytest.raises(InputError, match=complaint):
        write_report([run])
    assert not (run / "report.html").exists()


def test_links_in_a_loop_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=r"loop: no run here"):
        write_report([tmp_path / "loop"])


def test_a_whole_number_without_end_is_a_float_out_of_range(run: Path) -> None:
    file = run / log.METRICS
    file.write_text(re.sub(r'"reward": [^,]+', f'"reward": 1{400 * "0"}', file.read_text()))
    assert {row["reward"] for row in log.read(file) if "reward" in row} == {math.inf}
    assert write_report([run]).is_file()


def test_a_directory_in_the_place_of_the_page_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a directory; name a file, as .*report\.html"):
        write_report([run], tmp_path)


def test_training_writes_it_at_each_evaluation_and_once_more_at_the_end(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, bool]] = []

    def watched(runs: list[Path], running: bool) -> Path:
        target = write_report(runs, running=running)
        written.append((read(runs[0], running).step, running))
        return target

    monkeypatch.setattr(report, "write_report", watched)
    config = train_config(**train_arguments)
    train(config, Console(quiet=True))
    assert written == [(0, True), (2, True), (4, True), (4, False)]
    assert "finished" in words((config.run_directory / "report.html").read_text())


def test_a_page_that_cannot_be_written_is_one_line_and_training_goes_on(
    train_arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any, **__: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", fails)
    assert train(train_config(**{**train_arguments, "num_iterations": 1}), Console(quiet=True))
    lines = [line for line in capsys.readouterr().err.splitlines() if "report.html" in line]
    assert len(lines) == 3 and all("No space left" in line for line in lines)


def test_a_run_that_fails_does_not_leave_a_page_that_says_it_goes_on(
    train_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_grpo.training import loop as trainer

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(trainer, "iterate", fails)
    config = train_config(**train_arguments)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config, Console(quiet=True))
    html = (config.run_directory / "report.html").read_text()
    assert "stopped at iteration 0 of 4" in words(html) and "refresh" not in html


def test_a_reward_that_did_not_apply_at_first_is_drawn_too(run: Path) -> None:
    rows = log.read(run / log.METRICS)
    first = next(i for i, row in enumerate(rows) if "reward" in row)
    for i, row in enumerate(rows):
        if "reward" in row and i > first:
            row["rewards/code/mean"] = 0.5
    write_jsonl(run / log.METRICS, rows)
    assert "Reward: code" in {chart.title for chart in figures([read(run, False)])}


def test_the_command_that_judges_a_run_can_be_typed(tmp_path: Path) -> None:
    spaced = write_run(tmp_path / "my runs" / "a")
    assert page.judging(read(spaced, False)) == f"mlx-grpo eval '{spaced}' --prompts FRESH.jsonl"

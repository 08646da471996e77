"""A chart encloses its values, thins what cannot be seen, and says in words what it draws."""

import re
from itertools import pairwise

import pytest

from mlx_grpo.report.charts import (
    DIGIT,
    MOST_POINTS,
    WIDTH,
    Band,
    Chart,
    Line,
    labels,
    shown,
    smoothed,
    spread,
    stepped,
    svg,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-0.47, 2.9), (1e-4, 3e-4), (24.7, 26.7), (-5.0, -4.9), (0, 8e9)]
)
def test_ticks_are_few_round_and_enclose_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high)
    assert 4 <= len(found) <= 7
    assert all(len(f"{t:.6g}".strip("-0.").replace(".", "").split("e")[0]) <= 4 for t in found)


@pytest.mark.parametrize("value", [0.0, 0.02, -3.0])
def test_a_flat_line_has_room_on_its_axis(value: float) -> None:
    found = ticks(value, value)
    assert found[0] <= value <= found[-1] and found[0] < found[-1]
    assert value != 0 or found[0] == 0  # a share is never below nothing


def test_iterations_are_whole() -> None:
    assert all(t == int(t) for t in ticks(0, 3, whole=True))


def test_smoothing_keeps_a_mean_and_every_place() -> None:
    points = [(float(x), float(x % 2)) for x in range(200)]
    smooth = smoothed(points)
    assert [x for x, _ in smooth] == [x for x, _ in points]
    assert all(0.35 < y < 0.65 for _, y in smooth)
    assert smoothed(points[:10]) == points[:10]  # few points stay as they are


def test_spread_is_mean_and_sample_deviation_where_all_runs_have_a_value() -> None:
    means, area = spread([[(0, 1.0), (1, 2.0)], [(0, 3.0), (2, 9.0)]])
    assert means == [(0, 2.0)]
    assert area == [(0, pytest.approx(2 - 2**0.5), pytest.approx(2 + 2**0.5))]
    assert spread([[(0, 1.0)]])[1] == [(0, 1.0, 1.0)]


def test_a_long_line_is_thinned_to_what_can_be_seen() -> None:
    long = Line("x", [(float(x), float(x)) for x in range(5000)])
    (path,) = re.findall(r'polyline class="line a" points="([^"]*)"', svg(Chart("t", "u", [long])))
    assert len(path.split()) <= MOST_POINTS


def test_it_is_told_in_words_and_in_tooltips_and_a_name_stays_text() -> None:
    line = Line("<b>", [(0.0, 0.5), (10.0, 1234.0)], marks=True)
    drawn = svg(Chart("Reward & co", "u", [line], [Band("band", [(0, 0.0, 1.0)])]))
    assert 'aria-label="Reward &amp; co: &lt;b&gt; from 0.5 to 1,234"' in drawn
    assert "<title>iteration 10\n&lt;b&gt;: 1,234</title>" in drawn
    assert drawn.count("<circle") == 2 and drawn.count("<polygon") == 1


def test_a_chart_of_one_point_is_not_drawn() -> None:
    assert not Chart("t", "u", [Line("x", [(0.0, 1.0)])]).drawn


TEXT = re.compile(r'<text x="([\d.-]+)" y="[\d.]+" text-anchor="(end|middle)">([^<]+)</text>')


@pytest.mark.parametrize(
    "values", [(0, 1), (-2.5e-4, -1e-5), (0, 123456), (1000.1, 1000.4), (0, 8e9)]
)
@pytest.mark.parametrize("steps", [3, 60, 800, 200_000])
def test_no_label_leaves_the_picture_or_covers_another(
    values: tuple[float, float], steps: int
) -> None:
    drawn = svg(Chart("t", "u", [Line("x", [(0.0, values[0]), (float(steps), values[1])])]))
    rows = [(float(x), anchor, DIGIT * len(name)) for x, anchor, name in TEXT.findall(drawn)]
    assert len(rows) >= 6
    for x, anchor, width in rows:
        left = x - (width if anchor == "end" else width / 2)
        assert left >= 0 and (x if anchor == "end" else x + width / 2) <= WIDTH
    columns = [(x - width / 2, x + width / 2) for x, anchor, width in rows if anchor == "middle"]
    assert all(a[1] < b[0] for a, b in pairwise(columns))


@pytest.mark.parametrize(("low", "high"), [(1000.1, 1000.4), (20.001, 20.004), (0.12341, 0.12343)])
def test_labels_tell_their_values_apart(low: float, high: float) -> None:
    names = labels(ticks(low, high)).values()
    assert len(set(names)) == len(names)


def test_a_number_never_needs_an_exponent_below_a_million() -> None:
    assert [shown(v) for v in (0.0, 0.1234, 999.4, 999.5, 999.7, 1000.0)] == [
        *("0", "0.123", "999", "1,000", "1,000", "1,000")
    ]


def test_rounding_alone_makes_no_axis() -> None:
    found = ticks(0.1, 0.1 + 1e-17 * 3)
    assert found == ticks(0.1, 0.1) and ticks(0.3, 0.1 + 0.2) == ticks(0.3, 0.3)


def test_a_setting_is_drawn_as_steps_between_its_values() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (3.0, 2.0), (4.0, 2.0)]
    assert stepped(points) == [(1.0, 5.0), (2.5, 5.0), (2.5, 2.0), (4.0, 2.0)]
    assert stepped([]) == []
    drawn = svg(Chart("t", "u", [Line("x", points, steps=True)]))
    (path,) = re.findall(r'polyline class="line a" points="([^"]*)"', drawn)
    corners = [tuple(map(float, p.split(","))) for p in path.split()]
    assert len(corners) == 4
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners))


def test_a_long_setting_keeps_its_jumps_sharp_and_one_that_glides_is_thinned() -> None:
    jumps = [(float(x), float(x > 2500)) for x in range(5000)]
    glides = [(float(x), float(x)) for x in range(5000)]
    for points, most in ((jumps, 4), (glides, 2 * MOST_POINTS)):
        drawn = svg(Chart("t", "u", [Line("x", points, steps=True)]))
        (path,) = re.findall(r'polyline class="line a" points="([^"]*)"', drawn)
        assert len(path.split()) <= most

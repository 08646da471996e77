"""Every draw has its own key, which depends on nothing but the seed and what the draw is for."""

import itertools

import mlx.core as mx
import numpy as np

from mlx_grpo.core.rng import key, permutation, uniforms

PATHS: list[tuple[str | int, ...]] = [
    ("sample", iteration, prompt, sample, position)
    for iteration in range(2)
    for prompt in ("p1", "p2")
    for sample in range(2)
    for position in range(4)
]


def test_a_key_is_the_same_every_time() -> None:
    # The numbers are fixed: another hash would silently change every published run.
    assert key(42, "sample", 0, "p1", 0, 0).tolist() == [1772177689, 3650000870]
    assert key(42, "sample", 0, "p1", 0, 0).dtype == mx.uint32


def test_all_parts_of_a_path_and_the_seed_make_a_difference() -> None:
    keys = {tuple(key(seed, *path).tolist()) for seed in (1, 2) for path in PATHS}
    assert len(keys) == 2 * len(PATHS)


def test_paths_that_read_alike_have_different_keys() -> None:
    paths: list[tuple[str | int, ...]] = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("a", "bc", ""),
        ("a", 1),
        ("a", "1"),
        ("a", 1, 1),
        ("a", 11),
    ]
    keys = [tuple(key(7, *p).tolist()) for p in paths]
    assert all(a != b for a, b in itertools.combinations(keys, 2))


def test_drawing_elsewhere_does_not_move_a_draw() -> None:
    before = mx.random.normal((3,), key=key(1, "x")).tolist()
    mx.random.seed(99)
    mx.random.normal((5,))
    uniforms(1, PATHS)
    assert mx.random.normal((3,), key=key(1, "x")).tolist() == before


def test_uniforms_equal_single_draws_bit_for_bit_however_they_are_batched() -> None:
    together = np.asarray(uniforms(3, PATHS))
    singly = [mx.random.uniform(key=key(3, *p)).item() for p in PATHS]
    in_pairs = [np.asarray(uniforms(3, PATHS[i : i + 2])) for i in range(0, len(PATHS), 2)]
    assert together.tolist() == singly
    assert together.tobytes() == np.concatenate(in_pairs).tobytes()
    backwards = np.asarray(uniforms(3, PATHS[::-1]))
    assert together.tobytes() == backwards[::-1].tobytes()


def test_uniforms_are_spread_over_zero_to_one() -> None:
    drawn = np.asarray(uniforms(0, [("u", i) for i in range(2000)]))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    shares, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert shares.min() > 140  # 200 expected, standard deviation 13
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.1


def test_a_permutation_holds_every_index_once_and_depends_on_seed_and_path() -> None:
    orders = [permutation(seed, "order", epoch, n=12) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert permutation(1, "order", 0, n=12) == orders[0]


def test_a_permutation_of_one_is_possible() -> None:
    assert permutation(1, "order", 0, n=1) == [0]

"""What the package relies on in MLX and mlx-lm: an upgrade that breaks it is seen here first."""

import copy
import math
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from tests.helpers.tiny import tiny_model


def test_minimum_and_maximum_let_a_nan_through() -> None:
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        for place in (0, 5, 1023):
            values = mx.ones(1024, dtype)
            values[place] = float("nan")
            assert math.isnan(mx.min(values).item()) and math.isnan(mx.max(values).item())


def test_vmap_over_keys_draws_what_separate_calls_draw() -> None:
    keys = [mx.random.key(i) for i in range(5)]
    together = mx.vmap(lambda k: mx.random.uniform(key=k))(mx.stack(keys))
    assert together.tolist() == [mx.random.uniform(key=k).item() for k in keys]


def test_a_numpy_view_of_an_evaluated_array_shares_its_memory() -> None:
    array = mx.arange(6, dtype=mx.float32) / 2
    mx.eval(array)
    view = np.asarray(array)
    view *= 4
    assert array.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_an_array_changed_in_place_is_changed_for_all_who_hold_it_and_in_its_own_buffer() -> None:
    weight = mx.random.normal((512, 512))
    mx.eval(weight)
    holder, before, bits = [weight], mx.get_active_memory(), np.array(weight)
    mx.reset_peak_memory()
    weight += mx.ones((1, 512))
    mx.eval(weight)
    assert holder[0] is weight and np.array_equal(np.array(holder[0]), bits + 1)
    for rows in (slice(0, 256), slice(256, 512)):
        weight[rows] = mx.array(bits[rows])
        mx.eval(weight)
    assert np.array_equal(np.array(holder[0]), bits)
    assert mx.get_active_memory() == before
    assert mx.get_peak_memory() - before < 0.75 * weight.nbytes


def test_deepcopy_with_a_memo_keeps_the_very_arrays() -> None:
    model = tiny_model()
    arrays = {id(v): v for _, v in tree_flatten(model.parameters())}
    twin = copy.deepcopy(model, arrays)
    pairs = zip(tree_flatten(model.parameters()), tree_flatten(twin.parameters()), strict=True)
    assert all(a is b for (_, a), (_, b) in pairs)
    assert twin.layers[0] is not model.layers[0]


def test_batch_caches_merge_rows_of_different_length_exactly() -> None:
    model = tiny_model()
    rows = [[5, 6, 7, 8, 9], [5, 6]]
    caches = []
    for row in rows:
        cache = make_prompt_cache(model)
        model(mx.array([row[:-1]]), cache=cache)
        caches.append(cache)
    merged = [BatchKVCache.merge(list(layer)) for layer in zip(*caches, strict=True)]
    logits = model(mx.array([[row[-1]] for row in rows]), cache=merged)[:, -1]
    for got, row in zip(logits, rows, strict=True):
        assert mx.abs(got - model(mx.array([row]))[0, -1]).max().item() < 1e-5
    for cache in merged:
        cache.filter(mx.array([1]))
    following = model(mx.array([[3]]), cache=merged)[0, -1]
    assert mx.abs(following - model(mx.array([[5, 6, 3]]))[0, -1]).max().item() < 1e-5


def test_a_lora_layer_adds_its_scaled_matrices_to_the_base() -> None:
    layer = LoRALinear(3, 5, r=2, scale=3.0)
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    x = mx.random.normal((4, 3), key=mx.random.key(2))
    weight = layer.linear.weight + ((layer.scale * layer.lora_b.T) @ layer.lora_a.T)
    assert mx.abs(layer(x) - x @ weight.T).max().item() < 1e-5


def test_adamw_goes_on_bit_for_bit_from_a_saved_state(tmp_path: Path) -> None:
    def steps(optimizer: optim.AdamW, parameters: dict, count: int) -> dict:
        for i in range(count):
            gradients = {"layers": [{"a": mx.array([0.1, -0.2]) * (i + 1)}]}
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
        return parameters

    start = {"layers": [{"a": mx.array([1.0, 2.0])}]}
    one = optim.AdamW(learning_rate=0.01, bias_correction=True)
    halfway = steps(one, start, 3)
    mx.save_safetensors(str(tmp_path / "o.safetensors"), dict(tree_flatten(one.state)))
    other = optim.AdamW(learning_rate=0.01, bias_correction=True)
    other.state = tree_unflatten(list(mx.load(str(tmp_path / "o.safetensors")).items()))
    expected, got = steps(one, halfway, 3), steps(other, halfway, 3)
    assert expected["layers"][0]["a"].tolist() == got["layers"][0]["a"].tolist()

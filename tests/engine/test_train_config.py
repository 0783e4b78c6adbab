"""Settings of the loop: learning rates, refused values, and no torch behind them."""

import re
import subprocess
import sys

import pytest

from tercet.engine.train_config import TrainConfig


def rates(**settings) -> list[float]:
    config = TrainConfig(max_steps=6, learning_rate=12.0, **settings)
    return [config.learning_rate_at(step) for step in range(1, 7)]


def test_constant_rate():
    assert rates() == [12.0] * 6


def test_warm_up_reaches_the_rate_and_the_first_step_moves():
    assert rates(warmup_steps=3) == [4.0, 8.0, 12.0, 12.0, 12.0, 12.0]


def test_linear_rate_falls_to_the_last_step_which_still_moves():
    assert rates(lr_scheduler_type="linear") == pytest.approx([12.0, 10.0, 8.0, 6.0, 4.0, 2.0])
    assert rates(lr_scheduler_type="linear", warmup_steps=2) == pytest.approx([6, 12, 12, 9, 6, 3])


def test_cosine_rate():
    root = 3**0.5
    assert rates(lr_scheduler_type="cosine") == pytest.approx(
        [12.0, 6 + 3 * root, 9.0, 6.0, 3.0, 6 - 3 * root]
    )


def test_warm_up_longer_than_the_run():
    assert rates(warmup_steps=12) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_steps", 0),
        ("mini_batches", 0),
        ("num_iterations", 0),
        ("max_tokens_per_batch", 0),
        ("logging_steps", 0),
        ("save_steps", -1),
        ("seed", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", 1e300),
        ("weight_decay", 1e300),
        ("beta", -0.1),
        ("adam_beta2", 1.0),
        ("max_grad_norm", 0.0),
        ("epsilon", 1.0),
        ("epsilon_high", 0.0),
        ("delta", 1.0),
        ("save_total_limit", 0),
        ("num_threads", 0),
        ("num_threads", 2**31),
        ("seed", 2**64),
    ],
)
def test_values_that_cannot_be(setting, value):
    with pytest.raises(
        ValueError, match=rf"^TrainConfig: {setting} must be .*, got {re.escape(str(value))}$"
    ):
        TrainConfig(**{setting: value})


def test_loading_settings_loads_no_torch():
    code = "import sys, tercet.engine.train_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

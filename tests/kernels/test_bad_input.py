"""What the ops say about arguments of a wrong type, and about numbers that would end in NaN."""
# pyright: reportArgumentType=false

import math
from functools import partial

import pytest
import torch

from tercet.kernels import (
    PolicyLossConfig,
    contrastive_reward,
    linear_logp,
    masked_mean,
    policy_loss,
    segment_mean,
    token_logp,
)

X = torch.ones(2, 3)
ROW = torch.ones(2)
CU = torch.tensor([0, 2])
TARGETS = torch.tensor([0, 1])
MANY = torch.arange(5000)  # boundaries

mean = partial(masked_mean, X[None], torch.ones(1, 2, dtype=torch.bool))
segments = partial(segment_mean, X)
reward = partial(contrastive_reward, X[:, None], X)
policy = partial(policy_loss, ROW, ROW)
token = partial(token_logp, X)
linear = partial(linear_logp, X, torch.ones(4, 3))

TYPE_ERRORS = {
    "masked_mean: x must be a tensor, got list": partial(masked_mean, [[[1.0]]], ROW),
    "masked_mean: mask must be a tensor, got list": partial(masked_mean, X[None], [[True]]),
    "masked_mean: mask must be a tensor, got None": partial(masked_mean, X[None], None),
    "segment_mean: cu_seqlens must be a tensor, got list": partial(segments, [0, 2]),
    "segment_mean: mask must be a tensor, got list": partial(segments, CU, [True, True]),
    "contrastive_reward: group_ids must be a tensor, got list": partial(reward, group_ids=[0, 1]),
    "contrastive_reward: queries must be a tensor, got None": partial(
        contrastive_reward, X[:, None], None
    ),
    "contrastive_reward: temperature must be a number, got str": partial(reward, temperature="a"),
    "contrastive_reward: temperature must be a number, got None": partial(reward, temperature=None),
    "contrastive_reward: hard_weight must be a number, got None": partial(reward, hard_weight=None),
    "policy_loss: logp must be a tensor, got None": partial(policy_loss, None, None, ROW),
    "policy_loss: advantage must be a tensor, got None": partial(policy, None),
    "policy_loss: old_logp must be a tensor, got list": partial(policy_loss, ROW, [0.0], ROW),
    "policy_loss: config must be a PolicyLossConfig, got dict": partial(policy, ROW, config={}),
    "policy_loss: logp must be a floating-point tensor, got torch.float8_e4m3fn": partial(
        policy_loss, ROW.to(torch.float8_e4m3fn), None, ROW
    ),
    "token_logp: targets must be a tensor, got list": partial(token, [0, 1]),
    "token_logp: temperature must be a number, got None": partial(token, TARGETS, temperature=None),
    "token_logp: temperature must be a number, got str": partial(token, TARGETS, temperature="a"),
    "linear_logp: targets must be a tensor, got None": partial(linear, None),
    "linear_logp: bias must be a tensor, got list": partial(linear, TARGETS, bias=[0.0] * 4),
    "linear_logp: memory_budget_mb must be a whole number, got 1.5": partial(
        linear, TARGETS, memory_budget_mb=1.5
    ),
}

VALUE_ERRORS = {
    "contrastive_reward: temperature must be finite and > 0, got inf": partial(
        reward, temperature=math.inf
    ),
    "contrastive_reward: hard_weight must be finite and >= 0, got nan": partial(
        reward, hard_weight=math.nan
    ),
    "contrastive_reward: consistency_weight must be finite and >= 0, got inf": partial(
        reward, consistency_weight=math.inf
    ),
    "contrastive_reward: negative_weight must be finite and >= 0, got -1.0": partial(
        reward, negative_weight=-1.0
    ),
    "policy_loss: num_items must be > 0 and finite, got inf": partial(
        policy, ROW, num_items=math.inf
    ),
    "linear_logp: hidden must be [*, hidden >= 1], got (2, 0)": partial(
        linear_logp, X[:, :0], torch.ones(4, 0), TARGETS
    ),
    "n = 2, got cu_seqlens[0] = 1; pass the running sum": partial(segments, CU + 1),
    "n = 2, got cu_seqlens[4999] = 4999 behind 4998; pass": partial(segments, MANY),
    "n = 2, got cu_seqlens[4999] = 1 behind 4998; pass": partial(
        segments, MANY.clone().index_fill_(0, torch.tensor(4999), 1)
    ),
}


def _message(call, error) -> str:
    with pytest.raises(error) as raised:
        call(impl="torch")
    assert len(str(raised.value)) < 200
    return str(raised.value)


@pytest.mark.parametrize("text", TYPE_ERRORS)
def test_wrong_type(text):
    assert text in _message(TYPE_ERRORS[text], TypeError)


@pytest.mark.parametrize("text", VALUE_ERRORS)
def test_wrong_value(text):
    assert text in _message(VALUE_ERRORS[text], ValueError)


def test_the_same_calls_with_good_arguments():
    assert torch.equal(mean(impl="torch"), torch.ones(1, 3))
    assert torch.equal(segments(CU, impl="torch"), torch.ones(1, 3))
    zero = {"negative_weight": 0, "consistency_weight": 0, "hard_weight": 0}
    total = reward(temperature=1, **zero).total
    assert total.flatten().tolist() == pytest.approx([1.0, 1.0])
    loud = PolicyLossConfig(beta=1, delta=math.inf)
    assert policy(ROW, ref_logp=ROW, config=loud, num_items=1).loss.item() == -2.0
    assert token(TARGETS, temperature=2).logp.exp().tolist() == pytest.approx([1 / 3] * 2)
    assert linear(TARGETS, memory_budget_mb=1).logp.exp().tolist() == pytest.approx([1 / 4] * 2)


@pytest.mark.parametrize("norm", [1e-11, 1e19])
def test_reward_is_that_of_unit_vectors_over_the_documented_range(norm):
    d, q = torch.randn(3, 2, 4), torch.randn(3, 4)
    d, q = (x / x.norm(dim=-1, keepdim=True) for x in (d, q))
    far = contrastive_reward(d * norm, q * norm, d * norm, impl="torch")
    torch.testing.assert_close(far, contrastive_reward(d, q, d, impl="torch"))

"""The loop on a small real task (toy_run.py): learning, metrics, warnings, stops."""

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tercet.engine.checkpoint import read_run
from tercet.engine.files import read_jsonl
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.records import Completion, Rewards
from tercet.engine.rollout import request_seed
from tercet.engine.sampler import TransformersSampler
from tercet.engine.trainer import TrainConfig, Trainer

toy = runpy.run_path(str(Path(__file__).with_name("toy_run.py")))
LikesOneToken = toy["LikesOneToken"]


@pytest.fixture
def policy(make_tiny_model) -> Policy:
    return Policy(make_tiny_model("qwen3"))


def make_trainer(policy, system, folder, **settings) -> Trainer:
    config = TrainConfig(**{"max_steps": 1, "learning_rate": 1e-2, "save_steps": 0, **settings})
    return toy["make_trainer"](policy, system, config, folder)


def weights(policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def messages(folder) -> list[str]:
    return [row["message"] for row in read_jsonl(folder / "events.jsonl")]


def test_a_policy_learns_what_is_rewarded(policy, tmp_path):
    system = LikesOneToken(num_groups=8, group_size=8)
    final = make_trainer(policy, system, tmp_path, max_steps=15, mini_batches=2).train()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert not policy.model.training
    assert rows[0]["reward/share"] < 0.05
    assert final["reward/share"] > 0.9
    assert final == {key: value for key, value in rows[-1].items() if key != "step"}


def test_every_step_logs_what_a_reader_needs(policy, tmp_path):
    policy.model.generation_config.eos_token_id = None  # so that all have 6 tokens
    make_trainer(policy, LikesOneToken(), tmp_path, max_steps=2, eval_steps=1, beta=0.1).train()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[0] == {"step": 0, "eval/step_seen": 0.0}
    assert (
        set(rows[1])
        == set(rows[2])
        == {
            *("step", "reward/mean", "reward/std", "reward/spread", "frac_reward_zero_std"),
            *("reward/share", "reward/share_spread", "reward/shared", "reward/shared_spread"),
            *("completions/mean_length", "completions/max_length", "completions/clipped_ratio"),
            *("padding_saved", "loss", "grad_norm", "entropy", "kl", "clip_ratio", "learning_rate"),
            *("sampling/logp_mismatch", "sampling/logp_mismatch_max", "rows_left_out"),
            *("updates_skipped", "time/sample_s", "time/score_s", "time/update_s", "time/step_s"),
            *("tokens_per_s", "memory_gb", "eval/step_seen"),
        }
    )
    first = rows[1]
    assert first["sampling/logp_mismatch_max"] < 1e-4
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[2]["kl"] > 1e-6
    assert first["clip_ratio"] == 0
    assert first["padding_saved"] == pytest.approx(1 - (9 + 10 + 11 + 12) / (4 * 12))
    assert 0 < first["entropy"] < 6  # log(384) = 5.95
    assert first["reward/shared_spread"] == 0.0
    assert 0.05 < first["memory_gb"] < 64
    parts = ("time/sample_s", "time/score_s", "time/update_s")
    assert first["time/step_s"] == pytest.approx(sum(first[part] for part in parts))
    assert not policy.model.training


def test_off_policy_updates_are_clipped_towards_the_old_policy(policy, tmp_path):
    trainer = make_trainer(
        policy, LikesOneToken(), tmp_path, mini_batches=2, num_iterations=3, epsilon=0.01
    )
    metrics = trainer.train()
    assert metrics["clip_ratio"] > 0
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {6}  # 2 mini-batches, 3 times


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce++", "remax", "dapo"])
def test_every_estimator_trains(policy, tmp_path, estimator):
    before = weights(policy)
    metrics = make_trainer(policy, LikesOneToken(), tmp_path, advantage_estimator=estimator).train()
    assert metrics["grad_norm"] > 0
    assert not all(map(torch.equal, before, weights(policy)))


class Recorder:
    """A sampler that keeps what it was asked, and may drop embeddings or lengthen completions."""

    def __init__(self, policy, *, embeddings=True):
        self.inner = TransformersSampler(policy)
        self.embeddings = embeddings
        self.asked = []
        self.given = []

    def sample(self, requests):
        self.asked.append(list(requests))
        self.given.append(self.inner.sample(requests))
        if self.embeddings:
            return self.given[-1]
        return [Completion(ids=c.ids, logp=c.logp, finished=c.finished) for c in self.given[-1]]


def test_requests_are_seeded_by_seed_step_and_place(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path, seed=3, max_steps=2)
    trainer.sampler = recorder = Recorder(policy)
    trainer.train()
    for step, asked in enumerate(recorder.asked, start=1):
        assert [r.params.seed for r in asked] == [request_seed(3, step, i) for i in range(16)]


def test_a_reference_that_is_given_is_used_and_none_is_made_without_beta(
    policy, make_tiny_model, tmp_path
):
    log = RunLog.create(tmp_path, TrainConfig(), total_steps=1)
    sampler, given = TransformersSampler(policy), Policy(make_tiny_model("qwen3", seed=1))
    for beta, reference in ((0.1, given), (0.0, None)):
        config = TrainConfig(beta=beta)
        trainer = Trainer(policy, sampler, LikesOneToken(), config, log, reference=reference)
        assert trainer.reference is reference


def test_evaluation_is_before_every_so_many_and_after_the_last_step(policy, tmp_path):
    make_trainer(policy, LikesOneToken(), tmp_path, max_steps=3, eval_steps=2).train()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/step_seen" in row] == [0, 2, 3]


class Counts(LikesOneToken):
    """Pays in float64 with a graph behind it, and counts something."""

    def rewards(self, rollouts):
        rewards = super().rewards(rollouts)
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        return Rewards(
            total=rewards.total * weight,
            parts={"share": rewards.parts["share"] * weight},
            counts={"groups/odd": 7.0},
        )

    def samples(self, rollouts, rewards):
        self.seen = rewards
        return []


def test_rewards_are_taken_as_plain_float32_with_their_counts(policy, tmp_path):
    system = Counts()
    metrics = make_trainer(policy, system, tmp_path, logging_steps=1).train()
    assert metrics["groups/odd"] == 7.0
    for values in (system.seen.total, system.seen.parts["share"]):
        assert values.dtype == torch.float32
        assert not values.requires_grad


def test_metrics_are_the_mean_over_the_updates_of_a_step(policy, tmp_path):
    metrics = make_trainer(policy, FlatFirstGroup(), tmp_path, mini_batches=2).train()
    assert metrics["rows_left_out"] == 2.0  # 4 in the first update, 0 in the second


class FlatFirstGroup(LikesOneToken):
    """Pays group 0 evenly and the others by the first token, so that every group differs."""

    def rewards(self, rollouts):
        rows = rollouts.rows("rollout")
        first = torch.tensor([float(rollouts.completions[i].ids[0]) for i in rows])
        flat = torch.tensor([rollouts.requests[i].group == 0 for i in rows])
        return Rewards(total=torch.where(flat, 1.0, first))


def test_dapo_takes_groups_without_spread_out_of_the_token_mean(make_tiny_model, tmp_path):
    norms = []
    for settings in ({"scale_rewards": "group"}, {"advantage_estimator": "dapo"}):
        policy = Policy(make_tiny_model("qwen3"))
        policy.model.generation_config.eos_token_id = None  # all have 6 tokens
        folder = tmp_path / str(len(norms))
        metrics = make_trainer(policy, FlatFirstGroup(), folder, **settings).train()
        assert metrics["frac_reward_zero_std"] == 0.25
        assert metrics["rows_left_out"] == 4
        norms.append(metrics["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] * 4 / 3, rel=1e-5)


def test_the_schedule_reaches_the_optimiser(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path, max_steps=2, warmup_steps=8)
    assert trainer.train()["learning_rate"] == 1e-2 * 2 / 8
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2 * 2 / 8


@dataclass
class Answers:
    """A sampler that is a function."""

    sample: Callable


def test_remax_pays_against_the_greedy_completion(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path, advantage_estimator="remax")
    trainer.sampler = recorder = Recorder(policy)
    seen = []
    pay = trainer.system.rewards
    trainer.system.rewards = lambda rollouts: seen.append(rollouts) or pay(rollouts)
    trainer.train()
    greedy = [r for r in recorder.asked[0] if r.role == "baseline"]
    assert [(r.group, r.params.temperature) for r in greedy] == [(g, 0.0) for g in range(4)]
    sampled, baseline = seen
    assert sampled.requests == baseline.requests
    assert len(sampled.requests) == 16
    for place, row in enumerate(baseline.completions):
        assert row is recorder.given[0][16 + place // 4]


@pytest.mark.parametrize("mini_batches", [1, 2], ids=["on-policy", "off-policy"])
def test_embeddings_a_sampler_does_not_pool_come_from_the_scoring_pass(
    policy, tmp_path, mini_batches
):
    trainer = make_trainer(policy, LikesOneToken(pool=True), tmp_path, mini_batches=mini_batches)
    trainer.sampler = recorder = Recorder(policy, embeddings=False)
    seen = []
    pay = trainer.system.rewards
    trainer.system.rewards = lambda rollouts: seen.append(rollouts) or pay(rollouts)
    trainer.train()
    for ours, pooled in zip(seen[0].completions, recorder.given[0], strict=True):
        assert ours.embedding is not None
        torch.testing.assert_close(ours.embedding, pooled.embedding, rtol=1e-4, atol=1e-5)


def test_a_reward_part_that_every_group_cancels_is_told_once(policy, tmp_path, capsys):
    make_trainer(policy, LikesOneToken(), tmp_path, max_steps=3).train()
    told = [m for m in messages(tmp_path) if "reward part" in m]
    assert len(told) == 1
    assert "reward part 'shared' is the same for all rollouts of each group" in told[0]
    assert capsys.readouterr().out.count("reward part 'shared'") == 1


def test_all_rollouts_truncated_is_counted_and_told_once(policy, tmp_path):
    policy.model.generation_config.eos_token_id = None
    system = LikesOneToken(max_completion_length=2)
    metrics = make_trainer(policy, system, tmp_path, max_steps=2).train()
    assert metrics["completions/clipped_ratio"] == 1.0
    assert metrics["completions/mean_length"] == 2.0
    assert sum("no rollout of the batch ended" in m for m in messages(tmp_path)) == 1


def test_one_finished_rollout_is_enough_not_to_be_told(policy, tmp_path):
    policy.model.generation_config.eos_token_id = None
    trainer = make_trainer(policy, LikesOneToken(max_completion_length=2), tmp_path)
    inner = trainer.sampler

    def end_the_first(requests):
        first, *others = inner.sample(requests)
        return [replace(first, finished=True), *others]

    trainer.sampler = Answers(end_the_first)
    trainer.train()
    assert not any("no rollout of the batch ended" in m for m in messages(tmp_path))


class Even(LikesOneToken):
    """Pays everybody the same."""

    def rewards(self, rollouts):
        return Rewards(total=torch.ones(len(rollouts.rows("rollout"))))


def test_rewards_without_any_difference_move_nothing_and_are_told(policy, tmp_path):
    before = weights(policy)
    metrics = make_trainer(policy, Even(), tmp_path).train()
    assert (metrics["updates_skipped"], metrics["rows_left_out"]) == (1.0, 16.0)
    assert all(map(torch.equal, before, weights(policy)))
    assert any("nothing to learn from" in m for m in messages(tmp_path))


def test_group_of_size_one_is_refused_before_anything_is_saved(policy, tmp_path):
    before = weights(policy)
    with pytest.raises(ValueError, match="every group needs >= 2 rollouts"):
        make_trainer(policy, LikesOneToken(group_size=1), tmp_path).train()
    assert all(map(torch.equal, before, weights(policy)))
    assert not list(tmp_path.glob("checkpoint-*"))


class PaysNaN(LikesOneToken):
    """Rewards row 5 with NaN from step 2 on."""

    def rewards(self, rollouts):
        rewards = super().rewards(rollouts)
        if self.step >= 2:
            rewards.parts["share"][5] = float("nan")
        return rewards


def test_nan_reward_stops_the_run_with_its_samples_and_the_weights_of_before(policy, tmp_path):
    trainer = make_trainer(policy, PaysNaN(), tmp_path, max_steps=3, save_steps=1)
    with pytest.raises(RuntimeError, match=r"step 2: reward \(share\) of rollouts .* rows \[5\]"):
        trainer.train()
    saved = Policy.from_pretrained(tmp_path / "checkpoint-1")
    assert all(map(torch.equal, weights(saved), weights(policy)))
    account = json.loads((tmp_path / "nan_step.json").read_text())
    assert (account["step"], account["rows"]) == (2, [5])
    assert len(account["samples"]) == 16
    assert account["samples"][5]["reward/share"] == "nan"
    assert account["samples"][4]["reward/share"] != "nan"
    written = [row for row in read_jsonl(tmp_path / "samples.jsonl") if row["step"] == 2]
    assert len(written) == 16
    assert not (tmp_path / "checkpoint-2").exists()


def spoil_hidden_states(policy, *, while_training):
    """NaN out of the last norm: only in the update, or whenever the model runs."""

    def hook(module, args, out):
        return out * float("nan") if policy.model.training or not while_training else out

    policy.prove_isolation()
    policy.model.model.norm.register_forward_hook(hook)


@pytest.mark.parametrize("while_training", [True, False], ids=["update", "sampling"])
def test_nan_hidden_states_stop_the_run(policy, tmp_path, while_training):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path)
    spoil_hidden_states(policy, while_training=while_training)
    before = weights(policy)
    with pytest.raises(RuntimeError, match=r"Trainer: step 1: .*the update was not made"):
        trainer.train()
    assert all(map(torch.equal, before, weights(policy)))
    assert json.loads((tmp_path / "nan_step.json").read_text())["step"] == 1


def test_nan_in_a_pooled_embedding_stops_the_run(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(pool=True), tmp_path)
    answers = Recorder(policy, embeddings=False).sample(trainer.system.requests(1))
    trainer.sampler = Answers(lambda requests: answers)
    policy.prove_isolation()
    policy.model.model.norm.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(RuntimeError, match=r"hidden states \(pooled embeddings\) of requests"):
        trainer.train()
    assert len(json.loads((tmp_path / "nan_step.json").read_text())["samples"]) == 16


class Wrong(LikesOneToken):
    """Forgets a row."""

    def rewards(self, rollouts):
        return Rewards(total=torch.ones(3))


@pytest.mark.parametrize(
    ("system", "settings", "message"),
    [
        (Wrong(), {}, r"total must be \[16\], one per rollout row, got \(3,\)"),
        (LikesOneToken(temperature=0.0), {}, "rollouts need a temperature > 0"),
        (LikesOneToken(num_groups=0), {}, "there must be rows of role 'rollout'"),
        (LikesOneToken(), {"mini_batches": 5}, "mini_batches must be at most the number of groups"),
    ],
)
def test_what_cannot_be_trained_is_refused(policy, tmp_path, system, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(policy, system, tmp_path, **settings).train()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[:-1], "one completion per request, got 15 for 16"),
        (lambda rows: [replace(rows[0], ids=[], logp=[]), *rows[1:]], "got 0 tokens and 0 log"),
        (lambda rows: [replace(rows[0], logp=[-1.0]), *rows[1:]], r"got 6 tokens and 1 log-probs"),
    ],
)
def test_a_sampler_that_breaks_its_promise_is_refused(policy, tmp_path, spoil, message):
    policy.model.generation_config.eos_token_id = None
    trainer = make_trainer(policy, LikesOneToken(), tmp_path)
    inner = trainer.sampler
    trainer.sampler = Answers(lambda requests: spoil(inner.sample(requests)))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_nan_log_probs_of_a_sampler_stop_the_run(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path)
    answers = trainer.sampler.sample(trainer.system.requests(1))
    answers[3].logp[0] = float("nan")
    trainer.sampler = Answers(lambda requests: answers)
    with pytest.raises(RuntimeError, match=r"sampled log-probs of requests .* rows \[3\]"):
        trainer.train()


def test_bfloat16_compute_keeps_float32_weights(policy, tmp_path):
    metrics = make_trainer(policy, LikesOneToken(), tmp_path, bf16=True).train()
    assert metrics["grad_norm"] > 0
    assert metrics["sampling/logp_mismatch"] < 0.1
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert not any("rounding" in m for m in messages(tmp_path))


def test_sampling_computes_in_bfloat16_too(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path, bf16=True)
    inner, seen = trainer.sampler, []
    trainer.sampler = Answers(
        lambda requests: seen.append(torch.is_autocast_enabled("cpu")) or inner.sample(requests)
    )
    trainer.train()
    assert seen == [True]
    assert not torch.is_autocast_enabled("cpu")


def test_the_settings_reach_the_optimiser(policy, tmp_path):
    trainer = make_trainer(
        policy, LikesOneToken(), tmp_path, adam_beta1=0.5, adam_beta2=0.75, weight_decay=0.125
    )
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.75), 0.125)


class NaNBaseline(LikesOneToken):
    """Pays greedy completions, which it sees second, with NaN."""

    seen = 0

    def rewards(self, rollouts):
        rewards = super().rewards(rollouts)
        self.seen += 1
        return rewards if self.seen == 1 else replace(rewards, total=rewards.total * torch.nan)


def test_nan_reward_of_a_greedy_completion_stops_the_run(policy, tmp_path):
    trainer = make_trainer(policy, NaNBaseline(), tmp_path, advantage_estimator="remax")
    with pytest.raises(RuntimeError, match=r"step 1: reward \(total\) of rollouts must be finite"):
        trainer.train()


def test_a_warning_given_inside_a_step_belongs_to_it(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path, max_steps=2)
    inner = trainer.sampler
    trainer.sampler = Answers(lambda requests: trainer.log.warn("here") or inner.sample(requests))
    trainer.train()
    rows = read_jsonl(tmp_path / "events.jsonl")
    assert [row["step"] for row in rows if row["message"] == "here"] == [1, 2]


def test_bfloat16_weights_are_warned_of(make_tiny_model, tmp_path):
    policy = Policy(make_tiny_model("qwen3").bfloat16())
    make_trainer(policy, LikesOneToken(), tmp_path).train()
    assert any("lost in rounding" in m for m in messages(tmp_path))


def test_logging_steps_thin_the_samples_but_not_the_metrics(policy, tmp_path, capsys):
    make_trainer(policy, LikesOneToken(), tmp_path, max_steps=5, logging_steps=2).train()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [2, 4]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]


@pytest.mark.parametrize("threads", [1, 2, None])
def test_threads_are_as_set_and_given_back(policy, tmp_path, threads):
    class Counts(LikesOneToken):
        def rewards(self, rollouts):
            seen.append(torch.get_num_threads())
            return super().rewards(rollouts)

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        make_trainer(policy, Counts(), tmp_path, num_threads=threads).train()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {threads or 3}


def test_a_checkpoint_knows_its_run_and_only_the_newest_stay(policy, tmp_path):
    trainer = make_trainer(
        policy, LikesOneToken(), tmp_path, max_steps=3, save_steps=1, save_total_limit=2
    )
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert read_run(tmp_path / "checkpoint-3")["settings"]["save_total_limit"] == 2


def test_a_finished_run_is_not_trained_again(policy, tmp_path):
    trainer = make_trainer(policy, LikesOneToken(), tmp_path, max_steps=2)
    final = trainer.train()
    trainer.log.close()
    done = weights(policy)
    log = RunLog.create(tmp_path, TrainConfig(max_steps=2), total_steps=2, resume=True)
    again = Trainer(
        policy, TransformersSampler(policy), LikesOneToken(), TrainConfig(max_steps=2), log
    )
    assert again.train() == final
    assert all(map(torch.equal, done, weights(policy)))


@pytest.mark.parametrize(("rate", "decay"), [(1e20, 1e30), (1e30, 1e10)])
def test_weights_that_overflow_leave_the_last_good_checkpoint(
    make_tiny_model, tmp_path, rate, decay
):
    good = {"save_steps": 1, "save_total_limit": 1, "num_iterations": 2}
    trainer = make_trainer(Policy(make_tiny_model("qwen3")), LikesOneToken(), tmp_path, **good)
    trainer.train()
    trainer.log.close()
    before = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()

    def go_on(**changes):
        config = TrainConfig(**{"learning_rate": 1e-2, "max_steps": 2, **good, **changes})
        policy = Policy(make_tiny_model("qwen3"))
        return toy["make_trainer"](policy, LikesOneToken(), config, tmp_path, resume=True)

    spoilt = go_on(learning_rate=rate, weight_decay=decay)
    told = r"step 2: weights after .* lower learning_rate or wei"
    with pytest.raises(RuntimeError, match=told) as caught:
        spoilt.train()
    assert "the update was not made" not in str(caught.value)
    spoilt.log.close()
    assert json.loads((tmp_path / "nan_step.json").read_text())["step"] == 2
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "checkpoint-2").exists()
    assert go_on().train()["grad_norm"] > 0

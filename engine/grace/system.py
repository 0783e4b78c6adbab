"""GRACE as the trainer sees it: what to sample at each step, and what the rationales earn.

Per group: the document num_generations times (role "rollout", trained), its query once (role
"query"; unsupervised: the document once more, cooler, as the anchor), each negative once (role
"negative").  All of a step is one sampler call.  Source: arXiv:2510.04506, sections 3.3 and 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tercet.engine.grace.config import GraceConfig
from tercet.engine.grace.data import Dataset, Epochs, Example
from tercet.engine.grace.encoder import GraceEncoder, stack_embeddings
from tercet.engine.grace.prompts import Prompt
from tercet.engine.grace.readout import corpus_of, measures, read_out, sampling_of
from tercet.engine.grace.rewards import grace_reward
from tercet.engine.model import Policy
from tercet.engine.records import Request, Rewards, Rollouts, SamplingParams
from tercet.engine.sampler import Sampler
from tercet.kernels._typing import Float, Int

SAMPLED_GROUPS = 2  # groups per step that samples.jsonl shows, each by its best and worst rollout


class GraceSystem:
    """Requests and rewards of GRACE for one dataset; a `System` of engine/trainer.py."""

    def __init__(
        self, policy: Policy, sampler: Sampler, dataset: Dataset, config: GraceConfig
    ) -> None:
        """Prepares prompts and the order of the rows.

        Args:
            policy: whose tokenizer builds the prompts.
            sampler: samples from this very policy; used here for evaluation only.
            dataset: see `load_dataset`.
            config: see `GraceConfig`.

        Raises:
            ValueError: the policy has no tokenizer, or one that `PromptBuilder` refuses; the
                longest prompt and completion do not fit its positions.
        """
        if policy.tokenizer is None:
            raise ValueError(
                "GraceSystem: the policy must have a tokenizer, got None; "
                "save one beside the model, or pass it to Policy"
            )
        self.config = config
        self.dataset = dataset
        self.device = policy.device
        self.tokenizer = policy.tokenizer
        self.encoder = GraceEncoder(
            policy,
            max_prompt_length=config.data.max_prompt_length,
            system_prompt=config.data.system_prompt,
            max_completion_length=config.max_completion_length,
            pooling=config.pooling,
            sampler=sampler,
        )
        self.prompt = self.encoder.prompt
        self._check_positions(policy.max_length)
        self._epochs = Epochs(len(dataset.train), config.train.seed)
        self._rollout = SamplingParams(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        self._anchor = replace(self._rollout, temperature=config.anchor_temperature)

    def examples(self, step: int) -> list[Example]:
        """The rows of step 1, 2, ..., one per group; a pure function of (train.seed, step)."""
        size = self.config.groups_per_step
        return [self.dataset.train[i] for i in self._epochs.rows((step - 1) * size, size)]

    def _check_positions(self, positions: int | None) -> None:
        longest = self.config.data.max_prompt_length + self.config.max_completion_length
        if positions is None or longest <= positions:
            return
        remedy = "lower one of them (--data.max-prompt-length, --max-completion-length)"
        if self.prompt.frame + 2 > positions:  # a token of text, and one written
            remedy = (
                f"template and system prompt alone are {self.prompt.frame} tokens: shorten the "
                "system prompt (--data.system-prompt)"
            )
        raise ValueError(
            "GraceSystem: data.max_prompt_length + max_completion_length must be at most "
            f"{positions} (the model's positions), got {longest}; {remedy}"
        )

    def requests(self, step: int) -> list[Request]:
        """What to sample at step 1, 2, ..., group after group."""
        requests = []
        for group, example in enumerate(self.examples(step)):
            document = self.prompt(example.document)
            query = document if example.query is None else self.prompt(example.query)
            rollout = self._request(document, group, "rollout", self._rollout)
            requests += [rollout] * self.config.num_generations
            requests.append(self._request(query, group, "query", self._anchor))
            requests += [
                self._request(self.prompt(text), group, "negative", self._anchor)
                for text in example.negatives
            ]
        return requests

    def rewards(self, rollouts: Rollouts) -> Rewards:
        """Contrastive reward of every rollout; see `grace_reward`.

        Groups that share a text (a repeated row, a query that is another group's document) are
        not each other's negatives.
        """
        rows = {role: rollouts.rows(role) for role in ("rollout", "query", "negative")}
        num_groups = len(rows["query"])
        group_ids = shared_text_ids(rollouts)
        finished = [rollouts.completions[i].finished for i in rows["rollout"]]
        negatives = self._embeddings(rollouts, rows["negative"]) if rows["negative"] else None
        rewards = grace_reward(
            self._embeddings(rollouts, rows["rollout"]).unflatten(0, (num_groups, -1)),
            self._embeddings(rollouts, rows["query"]),
            None if negatives is None else negatives.unflatten(0, (num_groups, -1)),
            torch.tensor(finished).view(num_groups, -1),
            self.config.reward,
            group_ids,
        )
        return replace(rewards, counts=rewards.counts | self._counts(rollouts, group_ids))

    def evaluate(self, step: int) -> dict[str, float]:
        """`measures` of the held-out rows, with the same seeds at every step; see readout.py.

        {} without two held-out rows.  Computes in the precision of training.
        """
        config = self.config
        examples = self.dataset.test[: config.evaluation.num_texts]
        if len(examples) < 2:
            return {}
        corpus = corpus_of(examples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.bf16):
            return measures(corpus, *read_out(self.encoder, corpus, **sampling_of(config)))

    def samples(self, rollouts: Rollouts, rewards: Rewards) -> list[dict[str, Any]]:
        """Best and worst rollout of the first groups, with texts and reward parts."""
        shown = []
        rows = rollouts.rows("rollout")
        for group in range(min(SAMPLED_GROUPS, len(rollouts.rows("query")))):
            places = [p for p, row in enumerate(rows) if rollouts.requests[row].group == group]
            order = sorted(places, key=lambda place: float(rewards.total[place]))
            for place in dict.fromkeys((order[-1], order[0])):
                shown.append(self._sample(rollouts, rewards, rows[place], place))
        return shown

    def _request(self, prompt: Prompt, group: int, role: str, params: SamplingParams) -> Request:
        return Request(
            prompt_ids=prompt.ids,
            params=params,
            group=group,
            role=role,
            pool_from=prompt.pool_from,
            pooling=self.config.pooling,
            truncated=prompt.truncated,
        )

    def _embeddings(self, rollouts: Rollouts, rows: Sequence[int]) -> Float[Tensor, "rows hidden"]:
        return stack_embeddings([rollouts.completions[i] for i in rows])

    def _counts(self, rollouts: Rollouts, group_ids: Int[Tensor, " groups"]) -> dict[str, float]:
        """What a reader of the metrics should know about the step's texts."""
        others = [i for i, r in enumerate(rollouts.requests) if r.role in ("query", "negative")]
        texts = {(r.group, tuple(r.prompt_ids)): r.truncated for r in rollouts.requests}
        cut = [i for i in others if not rollouts.completions[i].finished]
        return {
            "prompts/truncated": float(sum(texts.values())),
            "groups/sharing_a_text": float(len(group_ids) - len(group_ids.unique())),
            "anchors/clipped_ratio": len(cut) / len(others),
        }

    def _sample(self, rollouts: Rollouts, rewards: Rewards, row: int, place: int) -> dict[str, Any]:
        request, completion = rollouts.requests[row], rollouts.completions[row]
        query = next(
            i for i in rollouts.rows("query") if rollouts.requests[i].group == request.group
        )
        sample: dict[str, Any] = {"group": request.group}
        if rollouts.requests[query].prompt_ids != request.prompt_ids:
            sample["query"] = self._text(rollouts.requests[query])
        return sample | {
            "query_rationale": self.tokenizer.decode(rollouts.completions[query].ids),
            "text": self._text(request),
            "rationale": self.tokenizer.decode(completion.ids),
            "finished": completion.finished,
            "reward": float(rewards.total[place]),
            **{f"reward/{name}": float(part[place]) for name, part in rewards.parts.items()},
        }

    def _text(self, request: Request) -> str:
        """The user's text in a prompt, as far as it was kept."""
        stop = len(request.prompt_ids) - len(self.prompt.suffix_ids)
        return str(self.tokenizer.decode(request.prompt_ids[len(self.prompt.prefix_ids) : stop]))


def shared_text_ids(rollouts: Rollouts) -> Int[Tensor, " groups"]:
    """One number per group, equal for groups whose documents or queries share a prompt."""
    parent: dict[int, int] = {}

    def root(group: int) -> int:
        while parent[group] != group:
            group = parent[group]
        return group

    owner: dict[tuple[int, ...], int] = {}
    for request in rollouts.requests:
        if request.role not in ("rollout", "query"):
            continue
        group = root(parent.setdefault(request.group, request.group))
        other = root(owner.setdefault(tuple(request.prompt_ids), group))
        parent[max(group, other)] = min(group, other)
    return torch.tensor([root(group) for group in sorted(parent)])

"""What each name in metrics.jsonl means: shown by the report; a test compares it with real runs."""

from __future__ import annotations

MEANINGS = {
    "reward/mean": "mean reward of the rollouts of a step, all parts together",
    "reward/std": "standard deviation over all rollouts of the step",
    "reward/spread": "standard deviation inside a group, mean over groups: what can be learnt from",
    "reward/<part>": "mean of one part, weighted as it enters the reward",
    "reward/<part>_spread": "the part's standard deviation inside a group; at 0 it teaches nothing",
    "frac_reward_zero_std": "share of groups whose rollouts all earned the same",
    "completions/mean_length": "tokens a rollout wrote, mean",
    "completions/max_length": "tokens of the longest rollout",
    "completions/clipped_ratio": "share of rollouts cut at max_completion_length, no end token",
    "anchors/clipped_ratio": "the same of the rationales that are not trained (queries, negatives)",
    "prompts/truncated": "texts of the step that were cut to max_prompt_length",
    "groups/all_truncated": "groups without one finished rollout; they give no signal",
    "groups/sharing_a_text": "groups that share a text with another and do not repel it",
    "padding_saved": "share of the cells of a padded batch that packing does not compute",
    "loss": "what was minimised, mean over the batch's tokens",
    "grad_norm": "length of the gradient before clipping",
    "learning_rate": "of this step, after warm-up and decay",
    "rows_left_out": "rollouts with advantage 0, which no gradient product was spent on",
    "updates_skipped": "1 when no rollout had anything to teach, so that no update was made",
    "entropy": "of the policy's next-token distribution, nats per token",
    "clip_ratio": "share of tokens with a clipped ratio (0 in the first update of a batch)",
    "kl": "k3 estimate of the divergence from the reference policy, nats per token",
    "sampling/logp_mismatch": "mean |log-prob of the trainer - of the sampler|, nats per token",
    "sampling/logp_mismatch_max": "the largest of these in the step",
    "time/<phase>_s": "seconds of one phase; time/step_s is the whole step",
    "tokens_per_s": "prompt and completion tokens of the step over its seconds",
    "memory_gb": "peak memory: allocated on the device; on a CPU the process's, since its start",
    "eval/recall@<k>": "share of a held-out query's documents among its k nearest by cosine; "
    "of texts alone, share of texts whose second sample is among them",
    "eval/hit@<k>": "share of held-out queries with one of their documents among the k nearest",
    "eval/ndcg@10": "like recall@10, higher ranks counting more; 1 is a perfect order",
    "eval/mrr": "mean of 1 / rank of the first right document (of texts alone: second sample)",
    "eval/anisotropy": "mean cosine of two different documents; near 1 the vectors say nothing",
    "eval/distinct_share": "different rationales over rationales; near 0 they are one sentence",
    "eval/sts_spearman": "rank correlation of cosines with people's similarity scores",
    "eval/sts_prompts_truncated": "sentences of these pairs that were cut to max_prompt_length",
    "eval/sts_clipped_ratio": "share of their rationales cut off by the limit",
    "eval/held_out_loss": "next-token loss of the documents as plain text, nats per token",
    "eval/held_out_truncated": "documents of which that loss is over the first 1024 tokens, or "
    "over as many as the model has positions",
    "eval/prompts_truncated": "held-out texts that were cut to max_prompt_length",
    "eval/mean_length": "tokens of a held-out rationale, mean",
    "eval/clipped_ratio": "share of held-out rationales cut off by the limit",
    "cosine/positive": "mean cosine of a query and its document in the batch",
    "cosine/others": "mean cosine of a query and the other documents of the batch",
}


def general(key: str) -> str:
    """The name in MEANINGS that a metric's own name falls under, or "" for none."""
    if key in MEANINGS:
        return key
    group, _, name = key.rpartition("/")
    if group == "reward":
        return "reward/<part>_spread" if name.endswith("_spread") else "reward/<part>"
    if group == "time" and name.endswith("_s"):
        return "time/<phase>_s"
    measure, _, cut = name.partition("@")
    pattern = f"{group}/{measure}@<k>"
    return pattern if cut.isdigit() and pattern in MEANINGS else ""

"""What GRACE is compared with, on the same encoder: InfoNCE, SimCSE, and no training at all.

Baselines embed the templated prompt alone (no rationale) and put the gradient through the
embedding: the same prompts, the same pooled tokens, the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.engine.choices import Pooling
from tercet.engine.grace.data import Epochs, Example
from tercet.engine.grace.encoder import GraceEncoder, pool_prompts
from tercet.engine.grace.fit import fit
from tercet.engine.grace.fit_config import ContrastiveConfig
from tercet.engine.grace.prompts import Prompt, PromptBuilder
from tercet.engine.grace.readout import corpus_of, measures, read_out
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.records import split_by_tokens
from tercet.kernels import info_nce
from tercet.kernels._typing import Float, Int


class Contrastive:
    """InfoNCE on (query, document, negatives), or SimCSE on texts; an `Objective` of `fit`.

    A batch above max_tokens_per_batch is embedded in parts: once without gradient for the loss,
    then part by part with it (gradient cache, arXiv:2101.06983).  The gradient is that of one pass;
    with dropout it is one for other random masks.
    """

    def __init__(
        self, policy: Policy, examples: Sequence[Example], config: ContrastiveConfig
    ) -> None:
        """Prepares prompts and the order of the rows.

        Raises:
            ValueError: no tokenizer; fewer rows than a batch; rows without a query for InfoNCE.
        """
        if policy.tokenizer is None:
            raise ValueError(
                "Contrastive: the policy must have a tokenizer, got None; "
                "save one beside the model, or pass it to Policy"
            )
        if len(examples) < config.per_device_train_batch_size:
            raise ValueError(
                f"Contrastive: there must be at least {config.per_device_train_batch_size} rows "
                f"(per_device_train_batch_size), got {len(examples)}; lower it"
            )
        without = [i for i, example in enumerate(examples) if example.query is None]
        if config.method == "info_nce" and without:
            raise ValueError(
                f"Contrastive: info_nce needs a query in every row, got none in {len(without)} "
                f"rows, first row {without[0]}; use method='simcse' for texts alone"
            )
        self.policy, self.examples, self.config = policy, examples, config
        self.prompt = PromptBuilder(
            policy.tokenizer,
            max_prompt_length=config.max_prompt_length,
            system_prompt=config.system_prompt,
        )
        self._epochs = Epochs(len(examples), config.fit.seed)

    def batch(self, step: int) -> list[Example]:
        """The rows of step 1, 2, ...; a pure function of the seed and the step."""
        size = self.config.per_device_train_batch_size
        return [self.examples[i] for i in self._epochs.rows((step - 1) * size, size)]

    def backward(self, step: int) -> dict[str, float]:
        """Adds the gradient of one batch; loss in nats, cosine of positives and of others.

        Raises:
            RuntimeError: SimCSE whose two views of the texts are equal.
            ValueError: a text that `PromptBuilder` refuses.
        """
        rows = self.batch(step)
        documents = [self.prompt(example.document) for example in rows]
        if self.config.method == "simcse":
            queries, negatives = documents, []
        else:
            queries = [self.prompt(str(example.query)) for example in rows]
            negatives = [self.prompt(text) for example in rows for text in example.negatives]
        ids = _shared_texts(rows)

        def loss_of(vectors: Float[Tensor, "n hidden"]) -> Float[Tensor, ""]:
            q, d, n = vectors.split([len(rows), len(rows), len(negatives)])
            if self.config.method == "simcse" and torch.allclose(q, d, rtol=1e-4, atol=1e-6):
                raise RuntimeError(
                    "Contrastive: SimCSE needs two different views of a text, got equal ones; "
                    "this model ignores its dropout: take another, or method='info_nce'"
                )
            return info_nce(
                q,
                d,
                n if negatives else None,
                temperature=self.config.temperature,
                symmetric=self.config.symmetric,
                ids=ids.to(q.device),
            )

        prompts = [*queries, *documents, *negatives]
        loss, vectors = cached_backward(
            self.policy,
            prompts,
            loss_of,
            pooling=self.config.pooling,
            max_tokens_per_batch=self.config.max_tokens_per_batch,
        )
        q, d = (F.normalize(x, dim=-1) for x in vectors[: 2 * len(rows)].split(len(rows)))
        cosines = q @ d.T
        positive = cosines.diagonal().mean()
        others = (cosines.sum() - cosines.trace()) / (len(rows) * (len(rows) - 1))
        return {
            "loss": loss.item(),
            "cosine/positive": positive.item(),
            "cosine/others": others.item(),
            "prompts/truncated": float(sum(p.truncated for p in prompts)),
        }


def cached_backward(
    policy: Policy,
    prompts: Sequence[Prompt],
    loss_of: Callable[[Float[Tensor, "n hidden"]], Float[Tensor, ""]],
    *,
    pooling: Pooling = "mean",
    max_tokens_per_batch: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n hidden"]]:
    """Back-propagates loss_of(embeddings of the prompts); returns the loss and the embeddings.

    Activations of at most max_tokens_per_batch tokens are held.  Source: arXiv:2101.06983.
    """
    parts = split_by_tokens([len(p.ids) for p in prompts], max_tokens_per_batch)
    if len(parts) == 1:
        vectors = pool_prompts(policy, prompts, pooling)
        loss = loss_of(vectors)
        loss.backward()
        return loss.detach(), vectors.detach()
    states, found = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(policy.device))
            found.append(pool_prompts(policy, [prompts[i] for i in part], pooling))
    vectors = torch.cat(found).requires_grad_()
    loss = loss_of(vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    for part, state, upstream in zip(
        parts, states, gradient.split([len(p) for p in parts]), strict=True
    ):
        _set_random_state(policy.device, state)  # the same dropout as in the first pass
        pool_prompts(policy, [prompts[i] for i in part], pooling).backward(upstream)
    return loss.detach(), vectors.detach()


def train_contrastive(
    policy: Policy,
    examples: Sequence[Example],
    config: ContrastiveConfig,
    log: RunLog,
    *,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Trains a baseline up to fit.max_steps, from log's last checkpoint if there is one.

    Args:
        policy: with the weights from before step 1, also when a run is resumed.
        examples: InfoNCE uses queries, documents and negatives; SimCSE the documents alone.
        config: see `ContrastiveConfig`.
        log: the run's folder.
        evaluate: held-out measures, every fit.eval_steps steps; see `held_out_measures`.

    Returns:
        The metrics of the last step.

    Raises:
        ValueError: as `Contrastive`; SimCSE without dropout (its two views would be equal).
        RuntimeError: as `fit`.
    """
    objective = Contrastive(policy, examples, config)
    with attention_dropout(policy, config.attention_dropout):
        if config.method == "simcse" and not has_dropout(policy.model):
            raise ValueError(
                "train_contrastive: simcse needs dropout to make two views of a text, got a model "
                "without; set attention_dropout (0.1 for BERT-like, 0.3 for causal models)"
            )
        return fit(policy, objective, config.fit, log, evaluate=evaluate)


def held_out_measures(
    policy: Policy, examples: Sequence[Example], config: ContrastiveConfig
) -> Callable[[int], dict[str, float]]:
    """What `train_contrastive` may measure: `measures` of the texts alone, under GRACE's names.

    Raises:
        ValueError: no examples; as `GraceEncoder`.
    """
    if not examples:
        raise ValueError("held_out_measures: there must be held-out rows, got none")
    encoder = GraceEncoder(
        policy,
        max_prompt_length=config.max_prompt_length,
        system_prompt=config.system_prompt,
        pooling=config.pooling,
    )
    corpus = corpus_of(examples)
    return lambda step: measures(corpus, *read_out(encoder, corpus, generate=False))


def has_dropout(model: nn.Module) -> bool:
    """Whether training mode makes the model's output random."""
    modules = list(model.modules())
    attention = any(float(getattr(m, "attention_dropout", 0.0) or 0.0) > 0 for m in modules)
    return attention or any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules)


@contextmanager
def attention_dropout(policy: Policy, rate: float | None) -> Iterator[None]:
    """Within, the attention layers drop weights at `rate` in training mode; None changes nothing.

    Raises:
        ValueError: the architecture has no such setting.
    """
    layers = [m for m in policy.model.modules() if hasattr(m, "attention_dropout")]
    if rate is not None and not layers:
        raise ValueError(
            f"attention_dropout: the layers of {type(policy.model).__name__} must have an "
            "attention_dropout, got none; set the dropout in the model's config instead"
        )
    before = [layer.attention_dropout for layer in layers]
    try:
        for layer in layers if rate is not None else []:
            layer.attention_dropout = rate  # type: ignore[assignment]
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.attention_dropout = value


def _shared_texts(rows: Sequence[Example]) -> Int[Tensor, " batch"]:
    """Equal numbers for rows with the same document or the same query."""
    ids = list(range(len(rows)))
    first: dict[tuple[str, str], int] = {}
    for i, example in enumerate(rows):
        keys = [("document", example.document)]
        keys += [] if example.query is None else [("query", example.query)]
        found = {ids[first.setdefault(key, i)] for key in keys} | {ids[i]}
        ids = [min(found) if label in found else label for label in ids]
    return torch.tensor(ids)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)

"""A tokenizer and a Qwen3 of 140,000 parameters, both made on the spot from the small world.

The model is taught to write rationales until it names the right topic of a training text in a
stated share of cases, and is then shown noisy ones: half of them vague, some about a wrong topic.
It knows what the world holds and seldom says it, which is what training with rewards has to mend.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tercet.engine.demo.config import PretrainConfig
from tercet.engine.demo.world import World
from tercet.engine.environment import torch_threads
from tercet.engine.grace.prompts import PromptBuilder
from tercet.engine.model import Policy
from tercet.engine.records import Packed, pack
from tercet.kernels import linear_logp
from tercet.kernels._typing import Float, Int

SYSTEM_PROMPT = "read reason understand"
MAX_LENGTH = 128  # tokens of a row, prompt and rationale
_CONTROL = ("<pad>", "<unk>", "<bos>", "<eos>", "<system>", "<user>", "<end>", "<assistant>")
EOS_ID = _CONTROL.index("<eos>")  # control tokens come first in the vocabulary
_THINK = ("<think>", "</think>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}<end>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template: one token per word of the corpus, letters for the rest."""
    splitter = pre_tokenizers.Whitespace()
    words = {w for line in corpus for w, _ in splitter.pre_tokenize_str(line.lower())}
    words |= set(SYSTEM_PROMPT.split()) | set(_LETTERS)
    pieces = [*_CONTROL, *_THINK, *sorted(words), *(f"##{letter}" for letter in _LETTERS)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(list(_CONTROL))
    tokenizer.add_tokens(list(_THINK))  # not special: a decoded rationale keeps them
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def build_policy(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Policy:
    """An untrained Qwen3 with two layers of width 64 and tied embeddings, float32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=_CONTROL.index("<bos>"),
        eos_token_id=EOS_ID,
        pad_token_id=_CONTROL.index("<pad>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return Policy(model.float(), tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """The taught model and what it took."""

    policy: Policy
    accuracy: float  # when the clean part ended
    steps: int  # clean and noisy
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    packed: Packed  # loss_mask: text, header and rationale
    role: Int[Tensor, " m"]  # of each loss_mask token: 1 text, 2 rationale, 0 neither
    first_name: Int[Tensor, " k"]  # index in 0..m-1 of the first name word of a rationale
    topics: Int[Tensor, " rows"]


class Pretrainer:
    """Draws batches from the world and takes supervised steps on them."""

    def __init__(self, world: World, policy: Policy, config: PretrainConfig, seed: int) -> None:
        tokenizer = policy.tokenizer
        if tokenizer is None:
            raise ValueError("Pretrainer: policy must have a tokenizer, got none")
        self.world, self.policy, self.config = world, policy, config
        self.rng = random.Random(f"pretrain {seed}")
        self.prompt = PromptBuilder(
            tokenizer, max_prompt_length=MAX_LENGTH, system_prompt=SYSTEM_PROMPT
        )
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.topic_of_token = torch.full((len(tokenizer),), -1)
        for k, topic in enumerate(world.topics):
            self.topic_of_token[self.encode(" ".join(topic.names))] = k
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01
        )

    def batch(self, *, noisy: bool) -> _Batch:
        """Fresh texts of both sides with their rationales, packed."""
        prefixes, rows, roles, topics = [], [], [], []
        for _ in range(self.config.batch_size):
            topic = self.rng.randrange(len(self.world.topics))
            side = self.rng.choice(("query", "document"))
            prompt = self.prompt(self.world.train_text(topic, side, self.rng))
            rationale = self.world.rationale(
                topic,
                self.rng,
                p_vague=self.config.p_vague if noisy else 0.0,
                p_right=self.config.p_right if noisy else 1.0,
            )
            answer = [*self.encode(rationale), EOS_ID]
            header = len(self.prompt.suffix_ids)
            text = prompt.ids[prompt.pool_from :]
            prefixes.append(prompt.ids[: prompt.pool_from])
            rows.append([*text, *answer])
            roles += [1] * (len(text) - header) + [0] * header + [2] * len(answer)
            topics.append(topic)
        packed, role = pack(prefixes, rows), torch.tensor(roles)
        return _Batch(
            packed=packed,
            role=role,
            first_name=self._first_names(packed, role),
            topics=torch.tensor(topics),
        )

    def _first_names(self, packed: Packed, role: Tensor) -> Tensor:
        """Clean batches: one index per row.  Noisy ones are not measured."""
        ids, rows = packed.ids[packed.loss_mask], packed.row_of_token()[packed.loss_mask]
        name = ((self.topic_of_token[ids] >= 0) & (role == 2)).nonzero().flatten()
        new_row = torch.ones(len(name), dtype=torch.bool)
        new_row[1:] = rows[name].diff() != 0
        return name[new_row]

    def step(self, batch: _Batch, learning_rate: float) -> float:
        """One optimiser step.  Returns the accuracy before it: first name words that were right."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, hidden = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), 1.0)
        self.optimizer.step()
        return self._accuracy(batch, hidden)

    def _loss(self, batch: _Batch) -> tuple[Float[Tensor, ""], Float[Tensor, "m hidden"]]:
        tokens = batch.packed.loss_mask.nonzero().squeeze(1)
        hidden = self.policy.hidden(batch.packed)[tokens - 1]  # [m, hidden], one token earlier
        logp = linear_logp(hidden, self.policy.head().weight, batch.packed.ids[tokens]).logp
        text, rationale = logp[batch.role == 1], logp[batch.role == 2]
        return -rationale.mean() - self.config.text_weight * text.mean(), hidden.detach()

    @torch.no_grad()
    def _accuracy(self, batch: _Batch, hidden: Tensor) -> float:
        if len(batch.first_name) != len(batch.topics):
            return float("nan")
        logits = hidden[batch.first_name] @ self.policy.head().weight.T
        right = self.topic_of_token[logits.argmax(-1)] == batch.topics
        return right.float().mean().item()


@torch_threads(1)  # a model this small waits for a second one, not for work
def pretrain(
    world: World,
    config: PretrainConfig,
    *,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Pretrained:
    """A tokenizer and a tiny model that know the world and write mostly vague rationales.

    Args:
        world: whose corpus makes the tokenizer.
        config: see `PretrainConfig`.
        seed: of the weights and of the texts.
        progress: called with the step and the accuracy after every step of the clean part.

    Raises:
        RuntimeError: `config.accuracy` is not reached within `config.max_steps`.
    """
    started = time.monotonic()
    policy = build_policy(build_tokenizer(world.corpus()), seed=seed)
    trainer = Pretrainer(world, policy, config, seed)
    policy.model.train()
    accuracy, steps = 0.0, 0  # accuracy: exponential mean over the last ten batches or so
    while accuracy < config.accuracy:
        if steps == config.max_steps:
            raise RuntimeError(
                f"pretrain: accuracy must reach {config.accuracy} within {config.max_steps} steps, "
                f"got {accuracy:.2f}; raise max_steps or take another seed than {seed}"
            )
        steps += 1
        warm = min(1.0, steps / max(config.warmup_steps, 1))
        now = trainer.step(trainer.batch(noisy=False), config.learning_rate * warm)
        accuracy += 0.1 * (now - accuracy)
        if progress is not None:
            progress(steps, accuracy)
    for step in range(config.noisy_steps):
        decay = 0.5 * (1 + math.cos(math.pi * (step + 1) / config.noisy_steps))
        trainer.step(trainer.batch(noisy=True), config.learning_rate * decay)
    policy.model.eval()
    return Pretrained(
        policy=policy,
        accuracy=accuracy,
        steps=steps + config.noisy_steps,
        seconds=time.monotonic() - started,
    )

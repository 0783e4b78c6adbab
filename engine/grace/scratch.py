"""A tokenizer and a small model from nothing but pairs of texts, taught to write rationales.

Where no pretrained model can be had, an experiment still needs one that reads and writes.  The
rationale it is taught is the plainest that can help retrieval: a few words of the text that its
partner uses too, drawn at random, so that which ones to name is left for the rewards to find out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tercet.engine.grace.data import Epochs
from tercet.engine.grace.experiment_config import ScratchModel
from tercet.engine.grace.fit_config import PretrainConfig
from tercet.engine.grace.prompts import PromptBuilder
from tercet.engine.grace.table import WORD
from tercet.engine.model import Policy, score
from tercet.engine.records import pack

PAD, START, END = CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = 0.1  # share of the texts above which a word (not a number) tells nothing


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the texts with a ChatML template; the end token is <|im_end|>.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("build_tokenizer: there must be texts, got none")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_policy(
    tokenizer: PreTrainedTokenizerFast, sizes: ScratchModel, *, seed: int = 0
) -> Policy:
    """A random model of these sizes."""
    config = Qwen3Config(
        vocab_size=max(sizes.vocab_size, len(tokenizer)),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        max_position_embeddings=sizes.max_position_embeddings,
        initializer_range=sizes.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=CONTROL.index(END),
        pad_token_id=CONTROL.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return Policy(model.float().eval(), tokenizer)


class Salience:
    """Which words of a text its partner uses too, common ones left out."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Counts in how many of the texts each word stands."""
        seen = Counter(word for text in texts for word in {w.lower() for w in WORD.findall(text)})
        self.common = {
            word for word, n in seen.items() if n > COMMON * len(texts) and word.isalpha()
        }

    def shared(self, text: str, partner: str) -> list[str]:
        """Words of `text`, as they are spelled there, in their order, each once."""
        known = {word.lower() for word in WORD.findall(partner)} - self.common
        first: dict[str, str] = {}
        for word in WORD.findall(text):
            if word.lower() in known:
                first.setdefault(word.lower(), word)
        return list(first.values())


def draw_words(words: Sequence[str], at_least: int, at_most: int, rng: random.Random) -> list[str]:
    """A random choice of at_least..at_most words (all when there are fewer), in their order."""
    count = min(rng.randint(at_least, at_most), len(words))
    return [words[i] for i in sorted(rng.sample(range(len(words)), count))]


class RationaleModelling:
    """Next-token loss of texts and of rationales drawn anew each time; an `Objective` of `fit`."""

    def __init__(
        self,
        policy: Policy,
        pairs: Sequence[tuple[str, str]],
        prompt: PromptBuilder,
        config: PretrainConfig,
    ) -> None:
        """Finds the shared words of every pair; texts that share none are left out.

        Raises:
            ValueError: no text shares a word with its partner.
        """
        salience = Salience([text for pair in pairs for text in pair])
        sides = [(text, other) for a, b in pairs for text, other in ((a, b), (b, a))]
        rows = [(text, salience.shared(text, other)) for text, other in sides]
        self.rows = [(text, words) for text, words in rows if words]
        self.num_skipped = len(rows) - len(self.rows)
        if not self.rows:
            raise ValueError(
                "RationaleModelling: texts must share words with their partners, "
                f"got none in {len(pairs)} pairs"
            )
        self.policy, self.prompt, self.config = policy, prompt, config
        self._epochs = Epochs(len(self.rows), config.fit.seed)

    def rationale_ids(self, words: Sequence[str]) -> list[int]:
        """Tokens of a rationale, its end token included.

        Every word has a space before it, the first one too, so that its tokens are those of the
        text and copying is all there is to learn.
        """
        told = "".join(f" {word}" for word in words)
        ids = self.prompt.tokenizer.encode(told, add_special_tokens=False)
        return [*ids, CONTROL.index(END)]

    def backward(self, step: int) -> dict[str, float]:
        """Adds the gradient of one batch; losses in nats per token."""
        config, size = self.config, self.config.per_device_train_batch_size
        rng = random.Random(f"rationale {config.fit.seed} {step}")
        heads, tails, kinds = [], [], []
        for row in self._epochs.rows((step - 1) * size, size):
            text, words = self.rows[row]
            prompt = self.prompt(text)
            answer = self.rationale_ids(draw_words(words, config.min_words, config.max_words, rng))
            told = prompt.ids[prompt.pool_from :]
            num_header = len(self.prompt.suffix_ids)
            heads.append(prompt.ids[: prompt.pool_from])
            tails.append([*told, *answer])
            kinds += [1] * (len(told) - num_header) + [0] * num_header + [2] * len(answer)
        packed = pack(heads, tails).to(self.policy.device)
        logp = score(self.policy, packed).logp
        kind = torch.tensor(kinds, device=logp.device)
        text_loss, rationale_loss = (-logp[kind == k].mean() for k in (1, 2))
        loss = rationale_loss + config.text_weight * text_loss
        loss.backward()
        return {
            "loss": loss.item(),
            "loss/text": text_loss.item(),
            "loss/rationale": rationale_loss.item(),
        }

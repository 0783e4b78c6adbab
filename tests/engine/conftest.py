"""A tiny tokenizer and tiny random models that every engine test shares."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CORPUS = [
    "the river carries the red boat to the sea",
    "a gardener waters the roses before the sun rises",
    "bread rises slowly in a warm kitchen",
    "You are a helpful assistant. Read the text and say what it is about.",
    "<think> the text is about a garden </think> it is about roses",
    "0 1 2 3 4 5 6 7 8 9 + - = ? ! . ,",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens with a ChatML template; eos <|im_end|>, pad <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., PreTrainedModel]:
    """make_tiny_model("qwen3", seed=0, **config) -> random fp32 model, 2 layers, grouped heads."""

    def make(arch: str = "qwen3", *, seed: int = 0, **overrides) -> PreTrainedModel:
        config_class, model_class = ARCHITECTURES[arch]
        settings = {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,  # large enough that hidden states depend on the context
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if arch == "qwen3":
            settings["head_dim"] = 8
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**{**settings, **overrides}))
        return model.float().eval()

    return make


@pytest.fixture
def tiny_policy(make_tiny_model, tiny_tokenizer):
    """A fresh Policy around a tiny Qwen3 for each test."""
    from tercet.engine.model import Policy

    return Policy(make_tiny_model("qwen3"), tiny_tokenizer)

"""A causal language model on packed rows: hidden states in, everything else computed from them.

The LM head never runs inside the model, so logits [n, vocab] do not exist in training: embeddings,
log-probs and entropies all come from the hidden states of one forward pass (`score`).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from tercet.engine.attention import (
    NAME,
    Layout,
    choose_backend,
    plan_layout,
    register_attention,
    without_masks,
)
from tercet.engine.choices import Pooling
from tercet.engine.files import follow_umask
from tercet.engine.isolation import isolation_error
from tercet.engine.pooling import LAST, States, find_pool
from tercet.engine.pretrained import load_pretrained, no_file_bars
from tercet.engine.records import Packed
from tercet.kernels import linear_logp
from tercet.kernels._typing import Float

KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
# What a head does to its logits beside weight and bias, and the value that means "nothing".
LOGIT_CHANGES = {
    "final_logit_softcapping": (None, 0, 0.0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}


class LMHead(NamedTuple):
    """logits = hidden @ weight.T + bias."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None


class Policy:
    """A Hugging Face causal LM that is trained on packed rows.

    The first packed call proves that rows cannot see each other (see `prove_isolation`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        attn: str = "auto",
    ) -> None:
        """Wraps `model`, whose attention becomes "tercet" (stock SDPA plus packed rows).

        Args:
            model: any causal LM whose attention goes through transformers' AttentionInterface.
            tokenizer: saved beside the model and used by the sampler for its end token.
            attn: "auto", or a packed backend: "flash_attention_2", "varlen", "sdpa".

        Raises:
            TypeError: not a PreTrainedModel.
            ValueError: not a causal LM, a head that changes its logits, attention that cannot be
                replaced, or a backend that cannot run here.
        """
        _check_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.attn = attn
        self._isolated = False
        choose_backend(attn, self.device, self.dtype)
        register_attention()
        model.set_attn_implementation(NAME)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        attn: str = "auto",
        activation_checkpointing: bool = False,
    ) -> "Policy":
        """Loads safetensors weights and the tokenizer from a folder or a hub id.

        Remote code is never run, pickled weights are never read.

        Raises:
            FileNotFoundError: `path` looks like a folder and is none.
            OSError: a file is not there or cannot be read.
            ValueError: no such device here, damaged or contradictory files, weights that are
                missing from them, or as `Policy(...)`.
        """
        model, tokenizer = load_pretrained(
            path, dtype=dtype, device=device, activation_checkpointing=activation_checkpointing
        )
        return cls(model, tokenizer, attn=attn)

    @property
    def device(self) -> torch.device:
        return self._embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding_weight.dtype

    @property
    def hidden_size(self) -> int:
        return self.head().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.head().weight.shape[0]

    @property
    def max_length(self) -> int | None:
        """Longest row the model's positions allow, None when its config names none.

        Under "longrope" scaling this is the length from which rotary frequencies depend on the
        longest row of a batch, so that a row would change with its neighbours.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        scalings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
        limits = [
            getattr(config, "max_position_embeddings", None),
            *(
                scaling.get("original_max_position_embeddings")
                for scaling in scalings
                if scaling.get("rope_type") == "longrope"
            ),
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def _embedding_weight(self) -> Tensor:
        return cast(nn.Embedding, self.model.get_input_embeddings()).weight

    def head(self) -> LMHead:
        """The LM head's own parameters, not copies."""
        layer = cast(nn.Linear, self.model.get_output_embeddings())
        return LMHead(layer.weight, layer.bias)

    def hidden(self, packed: Packed) -> Float[Tensor, "n hidden"]:
        """Last-layer hidden states after the final norm, with gradient; rows see only themselves.

        Raises:
            ValueError, RuntimeError: as `states`.
        """
        return self.states(packed).last

    def states(self, packed: Packed, *, layer: int = LAST, cache: Cache | None = None) -> States:
        """Last-layer hidden states, and those of `layer` beside them, from one pass.

        Args:
            packed: rows on this policy's device.
            layer: a place in transformers' tuple of hidden states.
            cache: an empty cache that receives every layer's keys and values, packed as the rows.

        Raises:
            ValueError: other device, ids outside of the vocabulary (checked on the CPU only), or a
                row longer than the model's positions.
            RuntimeError: rows of this model can see each other (first call only).
        """
        self._check(packed)
        if not self._isolated:
            self.prove_isolation()
        return self._forward(packed, layer, cache)

    def prove_isolation(self) -> float:
        """Proves on short random rows that packing changes nothing; the largest relative error.

        Raises:
            RuntimeError: weights are not finite, rows can see each other or their future, or the
                head is not linear.
            FloatingPointError: hidden states are not finite though the weights are.
        """
        with evaluating(self.model), torch.no_grad():
            error = isolation_error(
                self.model,
                lambda packed: self._forward(packed).last,
                self.head(),
                self._compute_dtype(),
            )
        self._isolated = True
        return error

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder: safetensors, config, tokenizer; each file appears whole."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            with no_file_bars():
                self.model.save_pretrained(partial)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            follow_umask(partial)
            folder.mkdir(exist_ok=True)
            for file in sorted(partial.iterdir()):
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @property
    def _base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.base_model)

    def _compute_dtype(self) -> torch.dtype:
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

    def _layout(self, packed: Packed) -> Layout:
        dtype = self._compute_dtype()
        backend = choose_backend(self.attn, self.device, dtype)
        return plan_layout(packed.cu_seqlens, packed.max_seqlen, backend, dtype)

    def _forward(self, packed: Packed, layer: int = LAST, cache: Cache | None = None) -> States:
        config = self._base.config
        if config._attn_implementation != NAME:
            # layers recomputed by activation checkpointing would run it, and let rows leak
            raise RuntimeError(
                f"Policy.hidden: the model's attention must stay {NAME!r}, got "
                f"{config._attn_implementation!r}; call model.set_attn_implementation({NAME!r})"
            )
        with without_masks(config):
            out = self._base(
                input_ids=packed.ids[None],
                attention_mask=None,
                position_ids=packed.positions[None],
                past_key_values=cache,
                use_cache=cache is not None,
                packed_layout=self._layout(packed),
                **States.wanted(layer),
            )
        last, pooled = States.of(out, layer)
        return States(last[0], pooled[0])

    def _check(self, packed: Packed) -> None:
        if packed.ids.device != self.device:
            raise ValueError(
                f"Policy.hidden: packed must be on {self.device}, got {packed.ids.device}; "
                "call packed.to(policy.device)"
            )
        if self.max_length is not None and packed.max_seqlen > self.max_length:
            raise ValueError(
                f"Policy.hidden: a row must be at most {self.max_length} tokens long "
                f"(the model's positions), got {packed.max_seqlen}; truncate it"
            )
        if packed.ids.device.type == "cpu":
            low, high = (int(x) for x in packed.ids.aminmax())
            if low < 0 or high >= len(self._embedding_weight):
                raise ValueError(
                    f"Policy.hidden: ids must be in [0, {len(self._embedding_weight)}), got "
                    f"[{low}, {high}]; use this model's own tokenizer"
                )


class Scored(NamedTuple):
    """What one forward pass says about a packed batch; m is the number of loss_mask tokens."""

    logp: Float[Tensor, " m"]  # nats, of each loss_mask token, in packed order
    entropy: Float[Tensor, " m"] | None  # nats, of the distribution the token was drawn from
    embedding: Float[Tensor, "rows hidden"] | None  # pooled over pool_mask, not normalised


def score(
    policy: Policy,
    packed: Packed,
    *,
    temperature: float | Float[Tensor, " m"] = 1.0,
    entropy: bool = False,
    embed: Pooling | None = None,
) -> Scored:
    """Log-probs, entropies and embeddings of a packed batch from one forward pass, with gradient.

    logp of token t is read from the hidden state of token t - 1 of its row.

    Args:
        policy: the model.
        packed: the rows; loss_mask says which tokens are scored.
        temperature: that the logits are divided by, one number or one per loss_mask token.
        entropy: also return entropies.
        embed: also return the states over pool_mask, pooled in this way; zeros for a row without.

    Raises:
        ValueError: the first token of a row is in loss_mask (nothing predicts it), no such pooling,
            or as `Policy.states`.
    """
    tokens = packed.loss_mask.nonzero().squeeze(1)  # [m]
    if (packed.positions[tokens] == 0).any():
        raise ValueError(
            "score: loss_mask must not hold the first token of a row, which nothing predicts, got "
            f"it in {int((packed.positions[tokens] == 0).sum())} rows; give every row a prompt"
        )
    pool = None if embed is None else find_pool("score", embed)
    states = policy.states(packed, layer=LAST if pool is None else pool.layer)
    weight, bias = policy.head()
    logp = linear_logp(
        states.last[tokens - 1],
        weight,
        packed.ids[tokens],
        bias=bias,
        temperature=temperature,
        return_entropy=entropy,
    )
    embedding = None if pool is None else pool.rows(states.pooled, packed)
    return Scored(logp.logp, logp.entropy, embedding)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within; afterwards each module's training flag is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Policy: model must be a transformers PreTrainedModel, got {name}; "
            "load it with AutoModelForCausalLM"
        )
    config = model.config.get_text_config()
    causal = model.can_generate() and getattr(config, "is_causal", True)
    if not causal or config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(
            f"Policy: model must be a causal language model with a head, got {name}; "
            "load it with AutoModelForCausalLM"
        )
    if model.base_model is model or not model._can_set_attn_implementation():
        raise ValueError(
            f"Policy: the attention of {name} must go through transformers' AttentionInterface; "
            "use an architecture that does (Qwen2, Qwen3, Llama, Mistral, ...)"
        )
    changed = {
        key: value
        for key, neutral in LOGIT_CHANGES.items()
        if (value := getattr(config, key, None)) not in neutral
    }
    if changed:
        raise ValueError(
            f"Policy: logits of {name} must be hidden @ weight.T + bias, got {changed} in its "
            "config; use a model that neither scales nor caps its logits"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if unknown:
        raise ValueError(
            f"Policy: layers of {name} must be {sorted(KNOWN_LAYERS)}, got {sorted(unknown)}; "
            "use a model without them"
        )

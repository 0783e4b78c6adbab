"""Texts to vectors: the model writes a rationale about each text, and is pooled as it writes.

Generation and pooling are one pass with one copy of the model: the sampler pools hidden states
while it decodes.  Source: arXiv:2510.04506, section 3.2 and eq. 10-11.

Departs from the released code: there, every text is sampled unseeded at temperature 1, its words
are tokenised again, and a second copy of the model embeds them; here the default is greedy.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.engine.checkpoint import RUN, read_run
from tercet.engine.choices import Pooling
from tercet.engine.config import read_record
from tercet.engine.grace.config import EncoderSettings
from tercet.engine.grace.prompts import SYSTEM_PROMPT, Prompt, PromptBuilder
from tercet.engine.model import Policy, evaluating
from tercet.engine.pooling import find_pool
from tercet.engine.records import (
    Completion,
    Request,
    SamplingParams,
    pack,
    split_by_tokens,
)
from tercet.engine.sampler import Sampler, TransformersSampler
from tercet.kernels._typing import Float

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Embeddings of n texts, float32, and where they come from."""

    vectors: Float[Tensor, "n hidden"]
    rationales: list[str]  # of each text's first sample; "" without generation
    lengths: list[int]  # tokens of these, the end token included; [] without generation
    num_truncated: int = 0  # texts with a rationale that was cut off by max_completion_length
    num_prompts_truncated: int = 0  # texts that lost their end to fit max_prompt_length
    samples: list[list[str]] | None = None  # every rationale of each text, when num_samples > 1
    # 1 - mean cosine of two samples of a text, when num_samples > 1: the variance of unit vectors
    variance: Float[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.vectors)


class GraceEncoder:
    """A text encoder that thinks first.

    Equal arguments give equal vectors to about 1e-6 (batches may round differently); seeded
    sampling depends on seed and text alone, not on the other texts or their order.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_prompt_length: int = 1024,
        system_prompt: str = SYSTEM_PROMPT,
        max_completion_length: int = 256,
        pooling: Pooling = "mean",
        generate: bool = True,
        max_batch_size: int = 64,
        max_tokens_per_batch: int = 16_384,
        sampler: Sampler | None = None,
    ) -> None:
        """Encodes with `policy` as it is at each call; it may be trained in between.

        Args:
            policy: with a tokenizer that has a chat template.
            max_prompt_length: tokens, template included; a longer text loses its end.
            system_prompt: the one the policy was trained with.
            max_completion_length: token budget of a rationale, where `encode` is given none.
            pooling: how hidden states become a vector; the one the policy was trained with.
            generate: whether `encode` writes rationales where it is not told.
            max_batch_size: rationales written at once; memory and speed only.
            max_tokens_per_batch: of a forward pass without generation; memory only.
            sampler: of this very policy, one that pools; None: a `TransformersSampler`.

        Raises:
            ValueError: no tokenizer, or one that `PromptBuilder` refuses; no such pooling.
        """
        find_pool("GraceEncoder", pooling)
        if policy.tokenizer is None:
            raise ValueError(
                "GraceEncoder: the policy must have a tokenizer, got None; "
                "save one beside the model, or pass it to Policy"
            )
        self.policy = policy
        self.tokenizer = policy.tokenizer
        self.prompt = PromptBuilder(
            policy.tokenizer, max_prompt_length=max_prompt_length, system_prompt=system_prompt
        )
        self.pooling: Pooling = pooling
        self.max_completion_length = max_completion_length
        self.generate = generate
        self.max_tokens_per_batch = max_tokens_per_batch
        self.sampler: Sampler = (
            TransformersSampler(policy, max_batch_size=max_batch_size)
            if sampler is None
            else sampler
        )

    @property
    def settings(self) -> EncoderSettings:
        """How texts become vectors here."""
        return EncoderSettings(
            system_prompt=self.prompt.system_prompt,
            max_prompt_length=self.prompt.max_prompt_length,
            max_completion_length=self.max_completion_length,
            pooling=self.pooling,
            generate=self.generate,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        attn: str = "auto",
        max_prompt_length: int | None = None,
        system_prompt: str | None = None,
        max_completion_length: int | None = None,
        pooling: Pooling | None = None,
        max_batch_size: int = 64,
    ) -> GraceEncoder:
        """Loads a checkpoint of a run, or any causal LM with a chat template.

        Args:
            folder: or a hub id.
            dtype: of the weights.
            device: None: the CPU.
            attn: see `Policy`.
            max_prompt_length: None: as in training, which a checkpoint's tercet.json says; without
                that file, as in `EncoderSettings`.
            system_prompt: None: likewise.
            max_completion_length: None: likewise.
            pooling: None: likewise.
            max_batch_size: see `GraceEncoder`.

        Raises:
            FileNotFoundError, ValueError: as `Policy.from_pretrained` and `GraceEncoder`; a
                tercet.json that cannot be used.
        """
        settings = asdict(_trained_with(Path(folder).expanduser()))
        policy = Policy.from_pretrained(folder, dtype=dtype, device=device, attn=attn)
        given = {
            "max_prompt_length": max_prompt_length,
            "system_prompt": system_prompt,
            "max_completion_length": max_completion_length,
            "pooling": pooling,
        }
        settings |= {key: value for key, value in given.items() if value is not None}
        return cls(policy, max_batch_size=max_batch_size, **settings)

    def encode(
        self,
        texts: Sequence[str],
        *,
        generate: bool | None = None,
        max_completion_length: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_samples: int = 1,
        seed: int | None = None,
        normalize: bool = True,
        warn: bool = True,
    ) -> Encoded:
        """Embeddings of texts, each pooled from the hidden states of text, header and rationale.

        A text may be empty: then only the header and the rationale are pooled.  Equal texts are
        written about once, unless samples are drawn without a seed.

        Args:
            texts: a list, not one string.
            generate: False embeds the templated prompt alone: no rationale, one forward pass.
                None: as the encoder does, a checkpoint's as its run trained it.
            max_completion_length: token budget of a rationale; None: the encoder's.
            temperature: 0 is greedy.
            top_p: nucleus, in (0, 1].
            top_k: 0 keeps the whole vocabulary.
            num_samples: rationales per text; unit vectors of the samples are averaged (raw ones
                with normalize=False), and `Encoded.variance` says how far they are apart.
            seed: of the samples; None draws new ones at every call.
            normalize: vectors of length 1.
            warn: log how many texts and rationales were cut; False where the caller shows
                `Encoded.num_prompts_truncated` and `Encoded.num_truncated` itself.

        Raises:
            TypeError: a single string, or a text that is not one.
            ValueError: num_samples < 1, several greedy samples, settings that SamplingParams
                refuses, a prompt that with its rationale exceeds the model's positions, or hidden
                states that are not finite.
        """
        _check_texts(texts)
        generate = self.generate if generate is None else generate
        length = max_completion_length
        params = SamplingParams(
            max_completion_length=self.max_completion_length if length is None else length,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        if num_samples < 1 or (num_samples > 1 and (temperature == 0 or not generate)):
            raise ValueError(
                "encode: num_samples must be 1, or more where rationales are sampled "
                f"(generate and temperature > 0), got {num_samples}; set a temperature"
            )
        repeatable = not generate or temperature == 0 or seed is not None
        distinct = list(dict.fromkeys(texts)) if repeatable else list(texts)
        prompts = [self.prompt(text) for text in distinct]
        self._check_positions(prompts, params.max_completion_length if generate else 0)
        if generate:
            seeds = [[_seed(seed, text, k) for k in range(num_samples)] for text in distinct]
            written = self._write(prompts, seeds, params)
        else:
            written = _Written(self._embed(prompts)[:, None], [[""]] * len(prompts), [], [])
        _check_finite(written.vectors, distinct)
        place = {text: i for i, text in enumerate(distinct)}
        rows = [place[text] for text in texts] if repeatable else list(range(len(texts)))
        found = _encoded(written, prompts, rows, normalize=normalize)
        if warn:
            self._warn_of_cuts(found, params.max_completion_length)
        return found

    def _warn_of_cuts(self, found: Encoded, budget: int) -> None:
        if found.num_prompts_truncated:
            log.warning(
                "encode: %d of %d texts lost their end to fit max_prompt_length=%d",
                found.num_prompts_truncated,
                len(found),
                self.prompt.max_prompt_length,
            )
        if found.num_truncated:
            log.warning(
                "encode: %d of %d texts have a rationale cut off by max_completion_length=%d",
                found.num_truncated,
                len(found),
                budget,
            )

    def _check_positions(self, prompts: Sequence[Prompt], budget: int) -> None:
        """Refuses prompts that with a rationale of `budget` tokens, 0 for none, have no room."""
        positions = self.policy.max_length
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        if positions is None or longest + budget <= positions:
            return
        what, written = "prompt", ""
        if budget:
            what, written = "prompt and rationale", f" and max_completion_length {budget}"
        remedy = f"set max_prompt_length (--max-prompt-length) below {positions}"
        if budget and longest < positions:
            room = positions - longest
            remedy = f"set max_completion_length (--max-completion-length) to at most {room}"
        shorten = "shorten the system prompt (--system-prompt)"
        frame = self.prompt.frame
        fits = frame + (2 if budget else 1) <= positions  # a token of text, and one written
        raise ValueError(
            f"encode: {what} must fit into the model's {positions} positions, got a "
            f"prompt of {longest} tokens ({frame} of them template and system prompt){written}; "
            f"{f'{remedy}, or {shorten}' if fits else shorten}"
        )

    def _write(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int | None]],
        params: SamplingParams,
    ) -> _Written:
        """One rationale per prompt and seed."""
        requests = [
            Request(
                prompt_ids=prompt.ids,
                params=replace(params, seed=seed),
                group=group,
                pool_from=prompt.pool_from,
                pooling=self.pooling,
                truncated=prompt.truncated,
            )
            for group, prompt in enumerate(prompts)
            for seed in seeds[group]
        ]
        vectors = torch.zeros(0, 1, self.policy.hidden_size, device=self.policy.device)
        if not requests:
            return _Written(vectors, [], [], [])
        completions = self.sampler.sample(requests)
        vectors = stack_embeddings(completions).unflatten(0, (len(prompts), -1))
        texts = [str(self.tokenizer.decode(c.ids, skip_special_tokens=True)) for c in completions]
        step = len(requests) // len(prompts)
        runs = [slice(start, start + step) for start in range(0, len(requests), step)]
        return _Written(
            vectors=vectors,
            rationales=[[text.strip() for text in texts[run]] for run in runs],
            lengths=[len(completions[run][0].ids) for run in runs],
            cut=[not all(c.finished for c in completions[run]) for run in runs],
        )

    def _embed(self, prompts: Sequence[Prompt]) -> Float[Tensor, "n hidden"]:
        """Each prompt's pooled part, without a rationale."""
        vectors = [torch.zeros(0, self.policy.hidden_size, device=self.policy.device)]
        lengths = [len(prompt.ids) for prompt in prompts]
        with evaluating(self.policy.model), torch.no_grad():
            for part in split_by_tokens(lengths, self.max_tokens_per_batch):
                some = [prompts[i] for i in part]
                vectors.append(pool_prompts(self.policy, some, self.pooling))
        return torch.cat(vectors)


class _Written(NamedTuple):
    """What was found out about each distinct text."""

    vectors: Float[Tensor, "n samples hidden"]  # not normalised
    rationales: list[list[str]]
    lengths: list[int]  # tokens of the first one; [] without generation
    cut: list[bool]  # a rationale ran out of its budget; [] without generation


def stack_embeddings(completions: Sequence[Completion]) -> Float[Tensor, "rows hidden"]:
    """The pooled embeddings of completions.

    Raises:
        ValueError: a completion without one.
    """
    embeddings = [c.embedding for c in completions if c.embedding is not None]
    if len(embeddings) < len(completions):
        raise ValueError(
            f"stack_embeddings: every completion must have an embedding, got none for "
            f"{len(completions) - len(embeddings)} of {len(completions)}; use a sampler that pools"
        )
    return torch.stack(embeddings)


def pool_prompts(
    policy: Policy, prompts: Sequence[Prompt], pooling: Pooling = "mean"
) -> Float[Tensor, "n hidden"]:
    """A vector of each prompt's pooled part from one packed pass, with gradient.

    Raises:
        ValueError: no such pooling.
    """
    pool = find_pool("pool_prompts", pooling)
    packed = pack([p.ids for p in prompts], pool_from=[p.pool_from for p in prompts])
    packed = packed.to(policy.device)
    return pool.rows(policy.states(packed, layer=pool.layer).pooled, packed)


def sample_variance(vectors: Float[Tensor, "n samples hidden"]) -> Float[Tensor, " n"]:
    """1 - mean cosine of two different samples of a text, in [0, 2].

    It is the unbiased variance of the unit vectors, summed over the dimensions.

    Raises:
        ValueError: fewer than two samples.
    """
    samples = vectors.shape[1]
    if samples < 2:
        raise ValueError(f"sample_variance: there must be at least two samples, got {samples}")
    mean = F.normalize(vectors.double(), dim=-1).mean(dim=1)
    return ((1 - mean.square().sum(-1)) * samples / (samples - 1)).clamp(min=0).float()


def _encoded(
    written: _Written, prompts: Sequence[Prompt], rows: list[int], *, normalize: bool
) -> Encoded:
    vectors = written.vectors[torch.tensor(rows, dtype=torch.int64, device=written.vectors.device)]
    several = vectors.shape[1] > 1
    variance = sample_variance(vectors) if several else None
    if normalize:
        vectors = F.normalize(F.normalize(vectors, dim=-1).mean(dim=1), dim=-1)
    else:
        vectors = vectors.mean(dim=1)
    return Encoded(
        vectors=vectors,
        rationales=[written.rationales[row][0] for row in rows],
        lengths=[written.lengths[row] for row in rows] if written.lengths else [],
        num_truncated=sum(written.cut[row] for row in rows) if written.cut else 0,
        num_prompts_truncated=sum(prompts[row].truncated for row in rows),
        samples=[list(written.rationales[row]) for row in rows] if several else None,
        variance=variance,
    )


def _seed(seed: int | None, text: str, sample: int) -> int | None:
    """Of one sample of one text: the same wherever the text stands."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed} {sample} {text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _trained_with(checkpoint: Path) -> EncoderSettings:
    """How texts were embedded in the run that wrote the checkpoint."""
    where = f"GraceEncoder.from_pretrained: {checkpoint / RUN}"
    settings = read_run(checkpoint).get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: settings must be an object, got {type(settings).__name__}")
    # GRACE's settings keep the prompt under data, those of a contrastive baseline at the top.
    data = settings.get("data")
    settings = settings | (data if isinstance(data, dict) else {})
    names = [field.name for field in fields(EncoderSettings)]
    found = {name: settings[name] for name in names if name in settings}
    found["generate"] = isinstance(data, dict) or not found
    return read_record(EncoderSettings, found, where)


def _check_texts(texts: Sequence[str]) -> None:
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        kind = "one string" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"encode: texts must be a list of strings, got {kind}; put it in a list")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"encode: texts[{i}] must be a string, got {type(text).__name__}")


def _check_finite(vectors: Float[Tensor, "n samples hidden"], texts: Sequence[str]) -> None:
    bad = (~vectors.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"encode: hidden states must be finite, got NaN or infinity for {len(bad)} of "
            f"{len(texts)} texts, first {texts[bad[0]][:60]!r}; use float32 or check the weights"
        )

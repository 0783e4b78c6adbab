"""The prompt that asks for a rationale, and where its pooled part starts.

A prompt is the chat template around one fixed system message and the raw text:

    <system header> SYSTEM_PROMPT <user header> | text <assistant header>
    '------------ same for every text --------' '---- pooled ---------'

The part before the bar is the same for every text and never enters an embedding; the text, the
template's tokens behind it and the rationale do.  Source: arXiv:2510.04506, eq. 10-11.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = (
    "Read the text that the user gives you and analyse what it means. "
    "Reason about it step by step inside <think> and </think>, "
    "then close with a comprehensive understanding of the whole text."
)
PROBES = ("xa0y", "qb1z")  # two user texts that share neither their first nor their last character
TEMPLATE_DATE = "26 Jul 2024"  # Llama-3 templates print a date: left open, prompts change every day


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One templated text, ready to be sampled from."""

    ids: list[int]
    pool_from: int  # index of the first token of the text; len(prefix) of the template
    truncated: bool  # the text lost tokens at its end to fit max_prompt_length


class PromptBuilder:
    """Builds prompts of at most `max_prompt_length` tokens; a pure function of the text.

    Text and template are tokenised apart, so a text that spells a control token of the template
    (`<|im_end|>`) stays text, and an over-long one loses its own end, never the assistant header.

    Args:
        tokenizer: with a chat template that knows the system role.
        max_prompt_length: tokens, template included.
        system_prompt: the one instruction, the same for queries and documents.

    Raises:
        ValueError: no chat template; one that refuses or alters the messages, or whose user
            header melts into the text; max_prompt_length that leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int = 1024,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"build_prompt: the tokenizer must have a chat template, got none in "
                f"{tokenizer.name_or_path or type(tokenizer).__name__!r}; use an instruct model, "
                "or set tokenizer.chat_template to that of the model's family"
            )
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_prompt_length = max_prompt_length
        self.prefix, self.suffix = self._template_text()
        self.prefix_ids = self._encode_template(self.prefix)
        self.suffix_ids = self._encode_template(self.suffix)
        self._check_prefix()
        # Tokens of template and system prompt, and how many of a text fit beside them.
        self.frame = len(self.prefix_ids) + len(self.suffix_ids)
        self.room = max_prompt_length - self.frame
        if self.room < 1:
            raise ValueError(
                f"build_prompt: max_prompt_length must be above the {self.frame} tokens of "
                f"template and system prompt, got {max_prompt_length}; raise it "
                "(--max-prompt-length, in training --data.max-prompt-length) or shorten the system "
                "prompt (--system-prompt, in training --data.system-prompt)"
            )
        control = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._control = re.compile("|".join(re.escape(t) for t in control if len(t) > 1) or r"(?!)")

    def __call__(self, text: str) -> Prompt:
        """The prompt of one text, which is right-truncated when it is too long.

        Raises:
            TypeError: text is not a string.  ValueError: half of a surrogate pair in it, or the
                template altered it.
        """
        if not isinstance(text, str):
            raise TypeError(f"build_prompt: text must be a string, got {type(text).__name__}")
        rendered = self._render(text)
        start, stop = len(self.prefix), len(rendered) - len(self.suffix)
        inner = rendered[start:stop]
        framed = rendered.startswith(self.prefix) and rendered.endswith(self.suffix)
        if not framed or inner.strip() != text.strip():  # Llama-3 templates strip the message
            raise ValueError(
                "build_prompt: the chat template must give the user text as it is, "
                f"got {rendered[start:][:80]!r}; set tokenizer.chat_template to one that does"
            )
        ids = self._encode_text(inner)
        return Prompt(
            ids=[*self.prefix_ids, *ids[: self.room], *self.suffix_ids],
            pool_from=len(self.prefix_ids),
            truncated=len(ids) > self.room,
        )

    def _render(self, text: str) -> str:
        import jinja2

        messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": text},
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                "build_prompt: the chat template must accept a system and a user message, "
                f"got {error}; set tokenizer.chat_template to one that does"
            ) from error

    def _template_text(self) -> tuple[str, str]:
        first, second = (self._render(probe) for probe in PROBES)
        prefix = first[: _num_common(first, second)]
        suffix = first[len(first) - _num_common(first[::-1], second[::-1]) :]
        if [first, second] != [prefix + probe + suffix for probe in PROBES]:
            raise ValueError(
                "build_prompt: the chat template must show the user text exactly once, "
                f"got {first!r} for {PROBES[0]!r}; set tokenizer.chat_template to one that does"
            )
        return prefix, suffix

    def _encode_template(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _check_prefix(self) -> None:
        """Whole prompts, tokenised in one go, must start with exactly the prefix's tokens."""
        first, second = (
            self._encode_template(self.prefix + probe + self.suffix) for probe in PROBES
        )
        common = first[: _num_common(first, second)]
        if common != self.prefix_ids or not common:
            raise ValueError(
                "build_prompt: the template's tokens before the user text must not depend on the "
                f"text, got {len(common)} common tokens of {len(self.prefix_ids)}; end the user "
                "header of tokenizer.chat_template with a control token or a newline"
            )

    def _encode_text(self, text: str) -> list[int]:
        """Tokens of the text; a control token spelled in it is cut after its first character.

        The cut also serves added tokens that are not marked special (`<think>`), which
        split_special_tokens leaves alone; that serves a special token that only the tokenizer's
        normaliser spells (`<|IM_END|>`).  Not verbose: transformers would warn of a text above the
        model's length, which is cut to max_prompt_length after this.
        """
        pieces, start = [], 0
        while match := self._control.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces.append(text[start:])
        try:
            return [
                token
                for piece in pieces
                for token in self.tokenizer.encode(
                    piece, add_special_tokens=False, split_special_tokens=True, verbose=False
                )
            ]
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(f"build_prompt: text must be Unicode text, got {error}") from error


def _num_common(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items the two share at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_prompt_length: int = 1024,
    system_prompt: str = SYSTEM_PROMPT,
) -> Prompt:
    """The prompt of one text (for many texts keep a `PromptBuilder`).

    Raises:
        TypeError, ValueError: as `PromptBuilder`.
    """
    builder = PromptBuilder(
        tokenizer, max_prompt_length=max_prompt_length, system_prompt=system_prompt
    )
    return builder(text)

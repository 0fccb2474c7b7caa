"""Talking to a model: `PredictMixin` gives it `predict`, `stream` and `predict_batch`.

The arguments and defaults are those of the original's ``predict``, and so is the order of the sampling steps: top-p,
then top-k, then temperature. What the original does differently:

- It cut every answer at the first "###", whatever the template. Here an answer ends at the template's own stop strings.
- It put new turns at the front of ``history`` and took old ones from its end, emptying it. Here the list is in
  chronological order, and a completed answer appends to it the question and the answer.
- It encoded a prompt with a space added to its end. ``compat=True`` does so too.
- It forbade an end token at the first step, but counted the prompt, so the rule never acted. Here it acts.
- Sampling draws from a generator of its own; the original reseeded Python, numpy and torch for the whole program.

Source: flagai 1.8.4, flagai/model/aquila2/modeling_aquila.py and utils.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from aquila2_tut.chat.prefill import ChatError, Reading, prefill
from aquila2_tut.chat.templates import (
    Template,
    TemplateError,
    Turn,
    check_turns,
    get_template,
    plain_ids,
    template_for_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character (yet)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the fields are the arguments of `PredictMixin.predict`.

    Raises:
        ChatError: a value out of range; the message names the field.
    """

    max_gen_len: int = 200
    top_p: float = 0.9
    topk: int = 15
    temperature: float = 1.0
    seed: int | None = 123

    def __post_init__(self) -> None:
        _check_integer("max_gen_len", self.max_gen_len, least=1)
        _check_integer("topk", self.topk, least=0)
        _check_number("temperature", self.temperature)
        _check_number("top_p", self.top_p)
        if self.temperature < 0:
            raise ChatError(f"temperature is {self.temperature}: it must be 0 (always the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise ChatError(f"top_p is {self.top_p}: it must lie above 0 and at most at 1")
        if self.seed is not None:
            _check_integer("seed", self.seed, least=None)

    @property
    def greedy(self) -> bool:
        """Whether only the likeliest token can be chosen."""
        return self.temperature == 0 or self.topk == 1

    def generator(self) -> torch.Generator | None:
        """A seeded source of randomness; None, torch's global one, when the seed is None or not positive."""
        if self.seed is None or self.seed <= 0:
            return None
        return torch.Generator().manual_seed(self.seed)

    def pick(self, logits: Tensor, generators: Sequence[torch.Generator | None]) -> list[int]:
        """Choose a token for each row of logits (B, V), with one generator a row."""
        if self.greedy:
            tokens = logits.argmax(dim=-1).tolist()
            _check_logit(logits[0, tokens[0]])
            return tokens
        return [self._draw(row, generator) for row, generator in zip(logits, generators, strict=True)]

    def _draw(self, logits: Tensor, generator: torch.Generator | None) -> int:
        probs, ids = candidates(logits, self.top_p, self.topk, self.temperature)
        _check_logit(probs[0])
        return int(ids[torch.multinomial(probs, 1, generator=generator)])


def _check_logit(best: Tensor) -> None:
    """A NaN anywhere comes out on top, so looking at the likeliest token is enough."""
    if math.isnan(best):
        raise ChatError("the model's logits are not numbers (NaN): load it in bfloat16 or float32, not in float16")


def _check_integer(name: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ChatError(f"{name} is {value!r}: it must be an integer{bound}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ChatError(f"{name} is {value!r}: it must be a finite number")


def candidates(logits: Tensor, top_p: float, topk: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The tokens that may come next, and how likely each is to be drawn.

    Top-p keeps the likeliest tokens until together they hold a share `top_p` of the probability, top-k keeps at most
    `topk` of these, and the temperature then shapes what is left. The vocabulary is never sorted when `topk` is given:
    whether a token is among the first `topk` and inside the share can be told from these few and the sum over all.

    Args:
        logits: (V,) as the model gives them, before any temperature.
        top_p: share of the probability to keep, in (0, 1].
        topk: most tokens to keep; 0 for no limit. Of equal logits at the limit, as many are kept as there is room for.
        temperature: above 0.

    Returns:
        Probabilities (N,) and token ids (N,), N >= 1, both on the CPU, the likeliest first.
    """
    logits = logits.float()
    values, ids = logits.topk(min(topk or len(logits), len(logits)))
    if top_p < 1:
        probs = (values - logits.logsumexp(0)).exp()
        kept = max(1, int((probs.cumsum(0) - probs < top_p).sum()))
        values, ids = values[:kept], ids[:kept]
    values, ids = values.cpu(), ids.cpu()
    return ((values - values[0]) / temperature).softmax(0), ids


class AnswerText:
    """Turns the tokens of one answer into text as they come.

    Holds back what cannot be shown yet: the first bytes of a character whose rest is still to come, and the beginning
    of what may become a stop string. All pieces joined are what decoding the whole answer and cutting it would give.

    Args:
        tokenizer: a byte-level tokenizer, whose tokens decode one by one.
        stop: strings that end the answer and are not part of it.
        strip_space: drop one space at the very beginning.

    Attributes:
        stopped: a stop string has appeared; nothing more will come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), strip_space: bool = False) -> None:
        self.stopped = False
        self._tokenizer, self._stop, self._strip_space = tokenizer, tuple(stop), strip_space
        self._ids: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Take one more token; return the text that is now certain, which may be empty."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return ""
        self._ids.clear()
        return self._release(self._held + text)

    def finish(self) -> str:
        """Return what was held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._held + self._decode())
        rest, self._held, self._ids = self._held, "", []
        return text + self._without_space(rest)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        """Cut the text at a stop string, or hold back the end of it that may begin one."""
        found = [at for at in map(text.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        sure = min(found) if found else len(text) - self._possible_start(text)
        self._held = "" if found else text[sure:]
        return self._without_space(text[:sure])

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stop), default=0) - 1
        tails = range(min(longest, len(text)), 0, -1)
        return next((n for n in tails if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)

    def _without_space(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


@dataclass(frozen=True)
class _Format:
    """What stands between a user's words and token ids: a tokenizer, and the template (None: the text is continued)."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    system: str | None
    compat: bool

    def encode(self, text: str, history: Sequence[Turn]) -> list[int]:
        """The prompt's token ids.

        Raises:
            ChatError: nothing to answer, or a history that is not human and gpt in turn.
        """
        _check_text(text, may_be_blank=self.template is None)
        if self.template is None:
            return plain_ids(text, self.tokenizer) or _nothing_left(text)
        turns = [*_check_history(history), ("human", text), ("gpt", None)]
        suffix = " " if self.compat else ""
        return self.template.encode(turns, self.tokenizer, self.system, suffix, whole=self.compat)

    def stop_ids(self, model: Any) -> list[int]:
        """Ids that end an answer: the template's, the tokenizer's eos, and those of the model's generation_config.

        An id of generation_config counts only if it is a control token: first-generation Aquila files name id 2, which
        is a quotation mark.
        """
        named = getattr(model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        ids = {index for index in named if index in self.tokenizer.all_special_ids}
        ids |= {self.tokenizer.eos_token_id} - {None}
        ids |= self.template.stop_ids(self.tokenizer) if self.template else set()
        return sorted(index for index in ids if index < model.config.vocab_size)

    def answer_text(self) -> AnswerText:
        """A fresh collector for one answer. A continued text keeps its leading space, except with `compat`."""
        if self.template is None:
            return AnswerText(self.tokenizer, strip_space=self.compat)
        return AnswerText(self.tokenizer, self.template.stop, strip_space=True)


def _check_text(text: str, may_be_blank: bool) -> None:
    if not isinstance(text, str):
        raise ChatError(f"the prompt is a {type(text).__name__}, not a string (predict_batch takes a list)")
    if not text or not (may_be_blank or text.strip()):
        raise ChatError("the prompt is empty: write something to answer")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatError(f"the prompt holds half a character (a lone surrogate) at position {error.start}") from None


def _nothing_left(text: str) -> NoReturn:
    raise ChatError(f"the prompt {text!r} has no token: its bytes are not in this vocabulary")


def _check_history(history: Sequence[Turn]) -> list[Turn]:
    """The history with role names as in `check_turns`.

    Raises:
        ChatError: naming the index of the turn that is wrong.
    """
    if not isinstance(history, list):
        raise ChatError(
            f"history is a {type(history).__name__}: it must be a list, for the new turns are appended to it"
        )
    try:
        turns = check_turns(history)
    except TemplateError as error:
        raise ChatError(f"history: {error}") from error
    last = len(turns) - 1
    if turns and (turns[last][0] == "human" or turns[last][1] is None):
        raise ChatError(
            f"history: turn {last}, the last, is no answer; the new question would be a second one in a row"
        )
    return turns


class PredictMixin:
    """Gives a causal language model of transformers `predict`, `stream` and `predict_batch`.

    Attributes:
        aquila_name: the model's name, by which a template is chosen; None when it is not known.
    """

    aquila_name: str | None = None

    def predict(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_gen_len: int = 200,
        top_p: float = 0.9,
        seed: int | None = 123,
        topk: int = 15,
        temperature: float = 1.0,
        sft: bool = True,
        convo_template: str | Template | None = None,
        device: str | torch.device | None = None,
        model_name: str | None = None,
        history: list[Turn] | None = None,
        system: str | None = None,
        compat: bool = False,
        prefill_chunk: int = 0,
        cache_dtype: str | None = None,
    ) -> str:
        """Answer a question, or continue a text.

        Args:
            text: the question; with ``sft=False`` the text to continue.
            tokenizer: the model's tokenizer, see `aquila2_tut.load_tokenizer`.
            max_gen_len: most tokens to generate.
            top_p: see `candidates`, as `topk` and `temperature`. ``temperature=0`` always takes the likeliest token.
            seed: of the sampling; None, 0 or below leaves torch's global generator as it is.
            topk: most tokens to choose from; 0 for no limit.
            temperature: 0 or above.
            sft: True for a chat model, False for a base model, which has no template.
            convo_template: a template or its name; otherwise the model's name decides.
            device: accepted because the original has it; the input goes where the model is, and a `device` of another
                kind is an error.
            model_name: chooses the template in place of the name that the model was loaded by.
            history: earlier turns ("human", text), ("gpt", text), oldest first. The question and the completed answer
                are appended to it. It is left alone when the call fails.
            system: text in place of the template's system text; "" for none.
            compat: write the prompt as the original does, with a space added at its end; and with ``sft=False`` drop
                one space at the beginning of the answer.
            prefill_chunk: tokens of the pieces in which the prompt is read, see `prefill`; 0: all in one.
            cache_dtype: "float32", "bfloat16", "float16" or "int8", in which keys and values are kept; None: as the
                model computes. With one of these two the cache is made once, for the prompt and `max_gen_len`.

        Returns:
            The answer, without its stop string and without one leading space.

        Raises:
            ChatError: a wrong setting, an empty prompt, a broken history, a prompt that does not fit the context.
            TemplateError: no template is known for the model, or none of that name.
        """
        return "".join(
            self.stream(
                text,
                tokenizer,
                max_gen_len,
                top_p,
                seed,
                topk,
                temperature,
                sft,
                convo_template,
                device,
                model_name,
                history,
                system,
                compat,
                prefill_chunk,
                cache_dtype,
            )
        )

    def stream(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_gen_len: int = 200,
        top_p: float = 0.9,
        seed: int | None = 123,
        topk: int = 15,
        temperature: float = 1.0,
        sft: bool = True,
        convo_template: str | Template | None = None,
        device: str | torch.device | None = None,
        model_name: str | None = None,
        history: list[Turn] | None = None,
        system: str | None = None,
        compat: bool = False,
        prefill_chunk: int = 0,
        cache_dtype: str | None = None,
    ) -> Iterator[str]:
        """The answer of `predict` in pieces, as they are generated; same arguments, same errors, at once.

        Returns:
            An iterator over pieces of text which, joined, are what `predict` returns. `history` is extended when it has
            been read to its end; a stream left before that leaves `history` alone.
        """
        sampling, reading = Sampling(max_gen_len, top_p, topk, temperature, seed), Reading(prefill_chunk, cache_dtype)
        reading.new_cache(self)  # what cannot be is refused now
        layout = _choose_format(self, tokenizer, sft, convo_template, device, model_name, system, compat, history)
        prompt = layout.encode(text, history if history is not None else [])
        _check_fits(self, prompt, max_gen_len)
        return _stream(self, text, prompt, layout, sampling, reading, history if sft else None)

    def predict_batch(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_gen_len: int = 200,
        top_p: float = 0.9,
        seed: int | None = 123,
        topk: int = 15,
        temperature: float = 1.0,
        sft: bool = True,
        convo_template: str | Template | None = None,
        device: str | torch.device | None = None,
        model_name: str | None = None,
        system: str | None = None,
        compat: bool = False,
        prefill_chunk: int = 0,
        cache_dtype: str | None = None,
    ) -> list[str]:
        """Answer several questions at once; arguments as for `predict`, and no history.

        Shorter prompts are padded on the left. Each row has a generator of its own, so it is answered as `predict`
        would answer it alone, up to the rounding of the arithmetic.

        Returns:
            The answers, in the order of the questions.

        Raises:
            ChatError, TemplateError: as `predict`; the message names the prompt by its index.
        """
        sampling, reading = Sampling(max_gen_len, top_p, topk, temperature, seed), Reading(prefill_chunk, cache_dtype)
        reading.new_cache(self)  # what cannot be is refused now
        layout = _choose_format(self, tokenizer, sft, convo_template, device, model_name, system, compat, None)
        if isinstance(texts, str):
            raise ChatError("predict_batch takes a list of prompts; predict takes one string")
        prompts = [_encode_row(self, index, text, layout, max_gen_len) for index, text in enumerate(texts)]
        return _answer_all(self, prompts, layout, sampling, reading) if prompts else []


def _choose_format(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    sft: bool,
    convo_template: str | Template | None,
    device: str | torch.device | None,
    model_name: str | None,
    system: str | None,
    compat: bool,
    history: list[Turn] | None,
) -> _Format:
    """Choose the template, and refuse what does not go together."""
    if tokenizer is None:
        raise ChatError("no tokenizer: pass tokenizer=loader.get_tokenizer(), or load_tokenizer(name)")
    if device is not None and torch.device(device).type != model.device.type:
        raise ChatError(f"device is {str(device)!r}, but the model is on {str(model.device)!r}: move it with model.to")
    if sft:
        template = _choose_template(model, convo_template, model_name)
        return _Format(tokenizer, template, system, compat)
    if history or system:
        raise ChatError("history and system need a chat template; sft=False only continues a text")
    return _Format(tokenizer, None, None, compat)


def _choose_template(model: Any, convo_template: str | Template | None, model_name: str | None) -> Template:
    if isinstance(convo_template, Template):
        return convo_template
    if convo_template:
        return get_template(convo_template)
    name = model_name or model.aquila_name
    if name is None:
        raise TemplateError(
            "no template: the model does not know its own name; pass convo_template='aquila-v1' (or another "
            "template), model_name='AquilaChat2-7B' (or another model), or sft=False to continue a text"
        )
    return template_for_model(name)


def _encode_row(model: Any, index: int, text: str, layout: _Format, max_gen_len: int) -> list[int]:
    try:
        prompt = layout.encode(text, [])
        _check_fits(model, prompt, max_gen_len)
    except ChatError as error:
        raise ChatError(f"prompt {index}: {error}") from error
    return prompt


def _check_fits(model: Any, prompt: list[int], max_gen_len: int) -> None:
    """Nothing is cut off silently: what does not fit the context is refused, with the numbers."""
    limit = getattr(model.config, "context_length", model.config.max_position_embeddings)
    if len(prompt) + max_gen_len > limit:
        raise ChatError(
            f"the prompt has {len(prompt)} tokens and max_gen_len asks for {max_gen_len} more, but the context holds "
            f"{limit}: shorten the prompt, clear the history (/reset in the terminal), or set max_gen_len to at most "
            f"{max(0, limit - len(prompt))}"
        )
    if max(prompt) >= model.config.vocab_size:
        raise ChatError(
            f"the tokenizer gave id {max(prompt)}, but the model knows {model.config.vocab_size} tokens: "
            "this is the tokenizer of another model"
        )


def _stream(
    model: Any,
    text: str,
    prompt: list[int],
    layout: _Format,
    sampling: Sampling,
    reading: Reading,
    history: list[Turn] | None,
) -> Iterator[str]:
    answer, pieces = layout.answer_text(), []
    stop_ids = layout.stop_ids(model)
    for (token,) in _next_tokens(model, [prompt], stop_ids, sampling, reading):
        piece = "" if token in stop_ids else answer.push(token)
        if piece:
            pieces.append(piece)
            yield piece
        if token in stop_ids or answer.stopped:
            break
    rest = answer.finish()
    if rest:
        yield rest
    if history is not None:
        history += [("human", text), ("gpt", "".join([*pieces, rest]))]


def _answer_all(
    model: Any, prompts: list[list[int]], layout: _Format, sampling: Sampling, reading: Reading
) -> list[str]:
    stop_ids = layout.stop_ids(model)
    answers = [layout.answer_text() for _ in prompts]
    texts = [""] * len(prompts)
    running = set(range(len(prompts)))
    for tokens in _next_tokens(model, prompts, stop_ids, sampling, reading):
        for row in sorted(running):
            if tokens[row] not in stop_ids:
                texts[row] += answers[row].push(tokens[row])
            if tokens[row] in stop_ids or answers[row].stopped:
                running.discard(row)
        if not running:
            break
    return [text + answer.finish() for text, answer in zip(texts, answers, strict=True)]


@torch.inference_mode()
def _next_tokens(
    model: Any, prompts: list[list[int]], stop_ids: list[int], sampling: Sampling, reading: Reading
) -> Iterator[list[int]]:
    """Generate, one token a step: yields the next token of every row, `max_gen_len` times at most.

    Rows that are done go on being fed their own tokens; the caller ignores them and stops when all rows are done.
    """
    with _ready(model, rows=len(prompts)):
        ids, mask = _left_padded(prompts, sampling.max_gen_len, model.device)
        generators = [sampling.generator() for _ in prompts]
        width = ids.shape[1]
        cache = reading.new_cache(model, width + sampling.max_gen_len)
        for step in range(sampling.max_gen_len):
            seen = None if mask is None else mask[:, : width + step]
            output = prefill(model, ids, reading.prefill_chunk, cache, seen)
            cache, logits = output.past_key_values, output.logits[:, -1]
            if step == 0:
                logits[:, stop_ids] = -torch.inf
            tokens = sampling.pick(logits, generators)
            yield tokens
            ids = torch.tensor(tokens, device=model.device).unsqueeze(1)


@contextlib.contextmanager
def _ready(model: Any, rows: int) -> Iterator[None]:
    """A model as it should be while it generates: not training, and, for a single row, prepared to decode."""
    was_training = model.training
    if was_training:
        model.eval()  # no dropout, and the cache that gradient checkpointing would switch off
    try:
        with model.decoding() if rows == 1 and hasattr(model, "decoding") else contextlib.nullcontext():
            yield
    finally:
        if was_training:
            model.train()


def _left_padded(prompts: list[list[int]], room: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor, and its mask, which also covers the `room` tokens to come.

    Returns:
        ids (B, T) and mask (B, T + room), 0 on padding; the mask is None when all prompts are equally long.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * gap + prompt for gap, prompt in zip(padding, prompts, strict=True)], device=device)
    if not any(padding):
        return ids, None
    columns = torch.arange(longest + room, device=device)
    return ids, (columns >= torch.tensor(padding, device=device).unsqueeze(1)).long()

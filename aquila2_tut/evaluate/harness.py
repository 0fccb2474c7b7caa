"""Our models in EleutherAI's lm-eval: the same scores as its own `hf` model, and sooner.

lm-eval knows hundreds of benchmarks, how they are asked and how they are counted. It asks a model three things: how
likely a continuation is, how likely a text is, and how the model itself goes on. `HarnessModel` answers them, with what
requests have in common read once (see `prefixes.py`), and every answer kept in a journal if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from aquila2_tut.chat.generate import Sampling
from aquila2_tut.chat.templates import Template, plain_ids
from aquila2_tut.evaluate.errors import EvaluateError
from aquila2_tut.evaluate.journal import Journal, fingerprint, request_key
from aquila2_tut.evaluate.reader import Reader, Scored
from aquila2_tut.evaluate.writer import Prompt, Writer

TOKENS_A_ROW = 64  # of what is read in one pass, for each row of the batch size
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *_LENGTHS}


class HarnessModel(TemplateLM):
    """A model as lm-eval wants it.

    Typed text never becomes a control token: items are plain text, whatever is in them, and a chat template's markers
    are set as ids.

    Args:
        model: an `Aquila2ForCausalLM`, quantized or not, with an adapter or not.
        tokenizer: its own.
        batch_size: rows that are continued at once; for each of them `TOKENS_A_ROW` tokens are read in one pass.
        template: of a chat model, used where lm-eval applies chat templates.
        journal: keeps the answers; None for none.
        progress: show bars.
    """

    backend = "causal"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        template: Template | None = None,
        journal: Journal | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise EvaluateError(f"the batch size is {batch_size}: give 1 or more")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.template, self.journal, self.progress = template, journal, progress
        self._fingerprint = fingerprint(model) if journal is not None else ""
        self._chats: dict[str, list[int]] = {}

    # --- what lm-eval asks about the model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the context holds."""
        return self.model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells chat templates apart."""
        return f"{type(self.tokenizer).__name__} {self.template.name if self.template else ''}".strip()

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the template, for lm-eval's records."""
        return self.template.name if self.template and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a string, which `tok_encode` knows again and encodes as `Template.encode` does.

        Args:
            chat_history: turns with "role" and "content"; a "system" turn may come first.
            add_generation_prompt: False if the last turn is the beginning of the answer.

        Raises:
            EvaluateError: no template was given, or two conversations look the same when written out.
            TemplateError: turns that do not alternate.
        """
        if self.template is None:
            raise EvaluateError("the tasks ask for a chat template, and there is none: give template=..., a Template")
        system = "\n\n".join(turn["content"] for turn in chat_history if turn["role"] == "system") or None
        turns = [(turn["role"], turn["content"]) for turn in chat_history if turn["role"] != "system"]
        begun = "" if add_generation_prompt else turns.pop()[1]
        turns.append(("gpt", None))
        text = self.template.render(turns, system) + begun
        ids = self.template.encode(turns, self.tokenizer, system, suffix=begun)
        if self._chats.setdefault(text, ids) != ids:
            raise EvaluateError(f"two conversations look the same, as one has a marker typed into it: {text[:200]!r}")
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids: of a conversation that `apply_chat_template` wrote, with its markers; else of plain text."""
        return list(self._chats[string]) if string in self._chats else plain_ids(string, self.tokenizer)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:  # there the prompt ends, and no token reaches across
            return self.tok_encode(context), plain_ids(continuation, self.tokenizer)
        return super()._encode_pair(context, continuation)

    # --- likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, in nats; and whether it is the likeliest one.

        Raises:
            EvaluateError: a continuation is empty, or has no room.
        """
        for request in requests:
            if not request.args[1]:
                raise EvaluateError(f"{_place(request)}: the continuation is empty: there is nothing to score")
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """How likely each text is, in nats; a long one in windows, each token scored once."""
        windows = [list(self._windows(*request.args)) for request in requests]
        found = iter(self._loglikelihood_tokens([(("", ""), *window) for own in windows for window in own]))
        return [sum(next(found)[0] for _ in own) for own in windows]

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        return map(
            make_disjoint_window,
            get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1),
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scored = [self._scored(*request) for request in requests]
        keys = [self._key("loglikelihood", one.tokens, one.first) for one in scored]
        with self._answers(keys, "loglikelihood") as answers:
            missing = answers.missing()
            found = Reader(self.model).score([scored[i] for i in missing], self.batch_size * TOKENS_A_ROW)
            for places, values in found:
                answers.add([(missing[place], list(value)) for place, value in zip(places, values, strict=True)])
        return [(total, greedy) for total, greedy in answers.all()]

    def _scored(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> Scored:
        """A request with the beginning cut off that the context has no room for."""
        if not 0 < len(continuation) <= self.max_length:
            raise EvaluateError(
                f"a continuation has {len(continuation)} tokens, the context holds {self.max_length}: {texts[1][:80]!r}"
            )
        tokens = tuple([*context, *continuation][-(self.max_length + 1) :])
        return Scored(tokens, len(tokens) - len(continuation))

    # --- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """How the model goes on after each context, up to a stop text.

        Raises:
            EvaluateError: a setting that is not known, or no room for a prompt.
        """
        counts: dict[str, int] = {}
        prompts, keys = [], []
        for request in requests:
            prompt = self._prompt(request, counts)
            prompts.append(prompt)
            settings = [prompt.sampling.seed, prompt.sampling.temperature, prompt.sampling.top_p, prompt.sampling.topk]
            keys.append(self._key("generate", prompt.tokens, prompt.stop, prompt.sampling.max_gen_len, settings))
        with self._answers(keys, "generate_until") as answers:
            missing = answers.missing()
            writer = Writer(self.model, self.tokenizer, self.batch_size, self._ends())
            for place, text in writer.write([prompts[i] for i in missing], self.batch_size * TOKENS_A_ROW):
                answers.add([(missing[place], text)])
        return answers.all()

    def _prompt(self, request: Instance, counts: dict[str, int]) -> Prompt:
        context, settings = request.args
        strange = set(settings) - _KNOWN
        if strange:
            raise EvaluateError(
                f"{_place(request)}: {', '.join(sorted(strange))}: known are {', '.join(sorted(_KNOWN))}"
            )
        until = settings.get("until") or []
        # The same request a second time is another sample, with dice of its own.
        seed = counts[context] = counts.get(context, 0) + 1
        sampling = _sampling(settings, seed)
        room = self.max_length - sampling.max_gen_len
        if room < 1:
            raise EvaluateError(
                f"{_place(request)}: {sampling.max_gen_len} tokens are asked for, the context holds {self.max_length}"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        stop = (*([until] if isinstance(until, str) else until), *(self._stops() if context in self._chats else ()))
        return Prompt(tuple(tokens[-room:]), tuple(filter(None, stop)), sampling)

    def _stops(self) -> tuple[str, ...]:
        return self.template.stop if self.template else ()

    def _ends(self) -> frozenset[int]:
        chat = self.template.stop_ids(self.tokenizer) if self.template and self._chats else set()
        return frozenset({self.eot_token_id, *chat})

    # --- the journal

    def _key(self, *request: Any) -> str:
        return request_key(self._fingerprint, *request)

    def _answers(self, keys: Sequence[str], what: str) -> _Answers:
        return _Answers(keys, self.journal, what if self.progress else None)


class _Answers:
    """Answers to requests, some of them known from the journal; those with one key are one request."""

    def __init__(self, keys: Sequence[str], journal: Journal | None, what: str | None) -> None:
        self._keys, self._journal = keys, journal
        self._found = {key: journal[key] for key in keys if key in journal} if journal is not None else {}
        self._bar = tqdm(total=len(set(keys)), initial=len(self._found), desc=what, disable=what is None)

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def missing(self) -> list[int]:
        """The first request of each key that has no answer yet."""
        first = {key: index for index, key in reversed(list(enumerate(self._keys)))}
        return sorted(index for key, index in first.items() if key not in self._found)

    def add(self, answers: Sequence[tuple[int, Any]]) -> None:
        """Answers with the index of the request."""
        named = [(self._keys[index], value) for index, value in answers]
        if self._journal is not None:
            self._journal.add(named)
        self._found.update(named)
        self._bar.update(len(named))

    def all(self) -> list[Any]:
        """In the order of the requests."""
        return [self._found[key] for key in self._keys]


def _place(request: Instance) -> str:
    """Which item a request belongs to."""
    return f"{request.task_name or 'a task'}, item {request.doc_id}"


def _sampling(settings: Mapping[str, Any], seed: int) -> Sampling:
    """lm-eval's settings as ours; without a temperature the likeliest token is taken."""
    length = next((settings[name] for name in _LENGTHS if settings.get(name) is not None), 256)
    temperature = float(settings.get("temperature") or 0.0)
    greedy = not (settings.get("do_sample") or (settings.get("do_sample") is None and temperature))
    return Sampling(
        max_gen_len=int(length),
        top_p=float(settings.get("top_p") or 1.0),
        topk=int(settings.get("top_k") or 0),
        temperature=0.0 if greedy else temperature or 1.0,
        seed=None if greedy else seed,
    )

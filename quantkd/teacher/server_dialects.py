"""How vLLM's, SGLang's and llama.cpp's servers are asked for token ids with log-probabilities, each in its own way: the
OpenAI API names tokens by their text, which two ids may share and a part of a character has not.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkd.errors import ConfigError, TeacherError
from quantkd.teacher.logprobs import TopLogprobs
from quantkd.teacher.teacher import GenerationSettings

_DIGITS = re.compile("0|-?[1-9][0-9]{0,9}")
_TOKEN_ID = "token_id:"
_CERTAIN = 1e4  # added to a logit
_NO_PENALTIES = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Completion:
    """What a server is asked for."""

    model: str
    prompt_ids: list[int]
    width: int  # candidates per token
    settings: GenerationSettings
    seed: int = 0  # the row's own
    ends: Sequence[int] = ()  # ids that end an answer
    score_from: int | None = None  # the first token of the prompt whose candidates are wanted, too
    # Where `scores_prompts` is False:
    forced: int | None = None  # what is generated, whatever its candidates
    is_cached: bool = False  # whether the server may go on from the prompt before


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    token_ids: list[int]  # with the end token
    places: list[int]  # of the tokens that came with candidates, ascending
    candidates: TopLogprobs  # of these; where the prompt is scored, those of all its tokens before them
    reason: str  # "end" at an end token, "length" where the limit cut, "stop" for what the server does not name


class Dialect(ABC):
    """One server's way to ask and answer."""

    scores_prompts = True  # whether it gives the candidates of a prompt's own tokens

    def check(self, settings: GenerationSettings) -> None:
        """Refuse settings under which the server's log-probabilities would not be the teacher's own."""
        return

    @abstractmethod
    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Path and body of the request."""

    @abstractmethod
    def read(self, body: Any, completion: Completion) -> Answer:
        """The answer in the response's body; KeyError, TypeError, ValueError or IndexError if it is malformed."""


class VLLM(Dialect):
    """vLLM's `/v1/completions`, and any other server that takes its `return_tokens_as_token_ids`."""

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Every sampling setting is named, because the server fills gaps from the checkpoint's generation config."""
        settings = completion.settings
        body = {
            "model": completion.model,
            "prompt": completion.prompt_ids,
            "max_tokens": settings.max_new_tokens,
            "logprobs": completion.width,
            "return_tokens_as_token_ids": True,
            "seed": completion.seed,
            "ignore_eos": True,  # ends at our end tokens alone
            "stop_token_ids": [*completion.ends],
            **settings.sampling,
            **_NO_PENALTIES,
        }
        if completion.score_from is not None:
            body["prompt_logprobs"] = completion.width
        return "/v1/completions", body

    def read(self, body: Any, completion: Completion) -> Answer:
        """Tokens and candidates are strings `token_id:N`; those of the prompt are plain ids."""
        choice = body["choices"][0]
        logprobs = choice["logprobs"]
        if not logprobs or not logprobs["top_logprobs"]:
            raise TeacherError("the server gives no log-probabilities")
        tokens = [self._id(token) for token in logprobs["tokens"]]
        pairs = [[(self._id(token), value) for token, value in target.items()] for target in logprobs["top_logprobs"]]
        if completion.score_from is not None:
            scored, prompt = choice["prompt_logprobs"], completion.prompt_ids
            # The prompt's own token is listed wherever anything is, whatever its rank.
            own = [not target or str(id_) in target for id_, target in zip(prompt, scored, strict=True)]
            if not all(own):
                raise ValueError("prompt_logprobs are those of other tokens than the prompt's")
            pairs = [[(_id(id_), each["logprob"]) for id_, each in (target or {}).items()] for target in scored] + pairs
        reason = "length" if choice["finish_reason"] == "length" else "stop"
        return Answer(tokens, list(range(len(tokens))), TopLogprobs.from_pairs(pairs), reason)

    @staticmethod
    def _id(token: str) -> int:
        number = token.removeprefix(_TOKEN_ID)
        if number == token or not (number.isascii() and number.isdecimal()):
            raise TeacherError(f"it names tokens by their text ({token!r:.80}), which cannot be mapped to ids safely")
        return _id(number)


class SGLang(Dialect):
    """SGLang's native `/generate`; its OpenAI API names tokens by their text."""

    def check(self, settings: GenerationSettings) -> None:
        """Its log-probabilities are those after the sampling temperature."""
        if settings.do_sample and settings.generation_temperature != 1.0:
            raise ConfigError(
                "SGLang gives log-probabilities after the sampling temperature, found generation_temperature="
                f"{settings.generation_temperature}. Sample at 1.0, decode greedily, or use vLLM's server."
            )

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Token ids in, token ids out."""
        settings, first = completion.settings, completion.score_from
        sampling = {**settings.sampling, "top_k": settings.top_k or -1}
        if settings.do_sample:
            sampling["sampling_seed"] = completion.seed
        sampling |= {"max_new_tokens": settings.max_new_tokens, "stop_token_ids": [*completion.ends], **_NO_PENALTIES}
        return "/generate", {
            "input_ids": completion.prompt_ids,
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": completion.width,
            "logprob_start_len": -1 if first is None else first - 1,  # its first candidates are the next token's
        }

    def read(self, body: Any, completion: Completion) -> Answer:
        """Triples of log-probability, id and text; the prompt's tokens must be its own."""
        meta, prompt = body["meta_info"], completion.prompt_ids
        own, targets = meta["output_token_logprobs"], meta["output_top_logprobs"]
        tokens = [_id(token) for _, token, *_ in own]
        if completion.score_from is not None:
            scored = [_id(token) for _, token, *_ in meta["input_token_logprobs"]]
            before = len(prompt) - len(scored)
            if len(meta["input_top_logprobs"]) != len(scored) or scored != prompt[before:]:
                raise ValueError("input_token_logprobs are those of other tokens than the prompt's")
            nothing: list[Any] = [None] * before
            own = nothing + meta["input_token_logprobs"] + own
            targets = nothing + meta["input_top_logprobs"] + targets
        both = [[each, *target] if target else [] for each, target in zip(own, targets, strict=True)]
        pairs = [[(_id(token), logprob) for logprob, token, *_ in target] for target in both]
        reason = "length" if meta["finish_reason"]["type"] == "length" else "stop"
        return Answer(tokens, list(range(len(tokens))), TopLogprobs.from_pairs(pairs), reason)


class LlamaCpp(Dialect):
    """The native `/completion` of llama.cpp's server."""

    scores_prompts = False

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Its own samplers in the order of transformers: temperature, top-k, top-p."""
        settings = completion.settings
        sampling: dict[str, Any] = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
        if settings.do_sample:
            sampling = {**settings.sampling, "samplers": ["temperature", "top_k", "top_p"]}
        # Candidates are those of the logits before this.
        forced = {} if completion.forced is None else {"logit_bias": [[completion.forced, _CERTAIN]]}
        return "/completion", {
            "prompt": completion.prompt_ids,
            "n_predict": settings.max_new_tokens,
            "n_probs": completion.width,
            "post_sampling_probs": False,  # the softmax of all logits
            "return_tokens": True,
            "cache_prompt": completion.is_cached,  # a cached prefix changes the last bits
            "seed": completion.seed,
            **sampling,
            **forced,
        }

    def read(self, body: Any, completion: Completion) -> Answer:
        """`tokens` holds all tokens; those that end inside a character come without candidates."""
        if (count := body["tokens_evaluated"]) != len(completion.prompt_ids):
            raise ValueError(f"it read {count} tokens of a prompt of {len(completion.prompt_ids)}")
        tokens = [_id(token) for token in body["tokens"]]
        steps = body.get("completion_probabilities", [])  # which is left out where it is empty
        ids = [_id(step["id"]) for step in steps]
        # The leftmost way to find these among all tokens gives each one's first possible place, the rightmost its last;
        # where the two differ, the place is not certain, and the candidates are left out.
        first, last = _places(ids, tokens), _places(ids[::-1], tokens[::-1])[::-1]
        certain = [number for number, place in enumerate(first) if place == len(tokens) - 1 - last[number]]
        pairs = [[(_id(each["id"]), each["logprob"]) for each in steps[number]["top_logprobs"]] for number in certain]
        reason = {"limit": "length", "eos": "end"}.get(body["stop_type"], "stop")
        return Answer(tokens, [first[number] for number in certain], TopLogprobs.from_pairs(pairs), reason)


DIALECTS: dict[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang(), "llama.cpp": LlamaCpp()}


def _id(token: Any) -> int:
    """A token id: a number, or its decimal digits, as the keys of JSON are."""
    if type(token) is int or (isinstance(token, str) and _DIGITS.fullmatch(token)):
        return int(token)
    raise ValueError(f"{token!r:.80} is not a token id")


def _places(part: list[int], whole: list[int]) -> list[int]:
    """Where the items of `part` are in `whole`, in order and as far left as possible."""
    places: list[int] = []
    for item in part:
        places.append(whole.index(item, places[-1] + 1 if places else 0))
    return places

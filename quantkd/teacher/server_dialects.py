"""How vLLM's, SGLang's and llama.cpp's servers are asked for token ids with log-probabilities, and what they answer.

The OpenAI API itself names tokens by their text, which cannot be mapped to ids safely: two ids may decode to the same
text, and a part of a character to none. So each server is asked in the way in which it gives ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from quantkd.errors import ConfigError, TeacherError
from quantkd.teacher.logprobs import TopLogprobs
from quantkd.teacher.teacher import GenerationSettings

_TOKEN_ID = "token_id:"


_LLAMA_CPP_SCORES_NOTHING = (
    "llama.cpp's server gives no log-probabilities of given answers. Let the teacher answer (responses='generate'), or "
    "score with the transformers or vLLM engine, or vLLM's or SGLang's server."
)


@dataclass(frozen=True)
class Completion:
    """What a server is asked for.

    Args:
        model: the model's name.
        prompt_ids: the prompt.
        width: candidates a token.
        settings: how to answer.
        seed: the row's own.
        ends: ids that end an answer.
    """

    model: str
    prompt_ids: list[int]
    width: int
    settings: GenerationSettings
    seed: int
    ends: list[int]


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Args:
        token_ids: the answer, with its end token.
        places: of the tokens that came with candidates, ascending.
        candidates: of these.
        reason: "end" where the last token is one that ends answers, "stop" where the server stopped for a reason that
            it does not name, "length" where the limit cut.
    """

    token_ids: list[int]
    places: list[int]
    candidates: TopLogprobs
    reason: str


class Dialect(Protocol):
    """One server's way to ask and answer. Raises KeyError, TypeError, ValueError or IndexError on malformed answers."""

    name: str

    def check(self, settings: GenerationSettings) -> None:
        """Refuse settings under which the server's log-probabilities would not be the teacher's own."""

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for an answer."""

    def read(self, body: Any) -> Answer:
        """The answer in the response's body."""

    def ask_score(self, completion: Completion, first: int) -> tuple[str, dict[str, Any]]:
        """Path and body that ask for the candidates of the prompt's own tokens from `first` on, and of one more."""

    def read_score(self, body: Any, completion: Completion) -> TopLogprobs:
        """Candidates of all L + 1 places after `ask_score`, none at those before `first`."""


class VLLM:
    """vLLM's `/v1/completions`, and any other server that takes its `return_tokens_as_token_ids`."""

    name = "vllm"

    def check(self, settings: GenerationSettings) -> None:
        """Nothing to refuse: its log-probabilities are those before temperature and filters."""

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Every sampling setting is named, for the server fills gaps from the checkpoint's generation config."""
        settings = completion.settings
        sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        if settings.do_sample:
            sampling = {
                "temperature": settings.generation_temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
            }
        return "/v1/completions", {
            "model": completion.model,
            "prompt": completion.prompt_ids,
            "max_tokens": settings.max_new_tokens,
            "logprobs": completion.width,
            "return_tokens_as_token_ids": True,
            "seed": completion.seed,
            "ignore_eos": True,  # ends at our end tokens alone
            "stop_token_ids": completion.ends,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **sampling,
        }

    def read(self, body: Any) -> Answer:
        """Tokens and candidates are strings `token_id:N`."""
        choice = body["choices"][0]
        logprobs = choice["logprobs"]
        if not logprobs or not logprobs["top_logprobs"]:
            raise TeacherError("the server gives no log-probabilities")
        tokens = [self._id(token) for token in logprobs["tokens"]]
        pairs = [
            [(self._id(token), logprob) for token, logprob in target.items()] for target in logprobs["top_logprobs"]
        ]
        reason = "length" if choice["finish_reason"] == "length" else "stop"
        return Answer(tokens, list(range(len(tokens))), TopLogprobs.from_pairs(pairs), reason)

    def ask_score(self, completion: Completion, first: int) -> tuple[str, dict[str, Any]]:
        """`prompt_logprobs` gives every token of the prompt."""
        path, body = self.ask(_one_token(completion))
        return path, {**body, "prompt_logprobs": completion.width}

    def read_score(self, body: Any, completion: Completion) -> TopLogprobs:
        """Candidates of the prompt are named by their ids."""
        prompt = body["choices"][0]["prompt_logprobs"]
        pairs = [[(int(token), entry["logprob"]) for token, entry in (target or {}).items()] for target in prompt]
        return TopLogprobs.concatenate([TopLogprobs.from_pairs(pairs), self.read(body).candidates])

    @staticmethod
    def _id(token: str) -> int:
        if not token.startswith(_TOKEN_ID):
            raise TeacherError(
                f"the server names tokens by their text ({token!r}), which cannot be mapped to ids safely"
            )
        return int(token[len(_TOKEN_ID) :])


class SGLang:
    """SGLang's native `/generate`; its OpenAI API names tokens by their text."""

    name = "sglang"

    def check(self, settings: GenerationSettings) -> None:
        """Its log-probabilities are those after the sampling temperature."""
        if settings.do_sample and settings.generation_temperature != 1.0:
            raise ConfigError(
                "SGLang gives log-probabilities after the sampling temperature, found generation_temperature="
                f"{settings.generation_temperature}. Sample at 1.0, decode greedily, or take vLLM's server."
            )

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Token ids in, token ids out."""
        settings = completion.settings
        sampling: dict[str, Any] = {"temperature": 0.0}
        if settings.do_sample:
            sampling = {
                "temperature": 1.0,
                "top_p": settings.top_p,
                "top_k": settings.top_k or -1,
                "sampling_seed": completion.seed,
            }
        return "/generate", {
            "input_ids": completion.prompt_ids,
            "sampling_params": {
                "max_new_tokens": settings.max_new_tokens,
                "stop_token_ids": completion.ends,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                **sampling,
            },
            "return_logprob": True,
            "top_logprobs_num": completion.width,
            "logprob_start_len": -1,
        }

    def read(self, body: Any) -> Answer:
        """Triples of log-probability, id and text."""
        meta = body["meta_info"]
        tokens = [int(token) for _, token, *_ in meta["output_token_logprobs"]]
        pairs = [[(int(token), logprob) for logprob, token, *_ in target] for target in meta["output_top_logprobs"]]
        reason = "length" if meta["finish_reason"]["type"] == "length" else "stop"
        return Answer(tokens, list(range(len(tokens))), TopLogprobs.from_pairs(pairs), reason)

    def ask_score(self, completion: Completion, first: int) -> tuple[str, dict[str, Any]]:
        """Its first candidates are those of the token after `logprob_start_len`."""
        path, body = self.ask(_one_token(completion))
        return path, {**body, "logprob_start_len": first - 1}

    def read_score(self, body: Any, completion: Completion) -> TopLogprobs:
        """Candidates are counted from the prompt's end, and the tokens beside them must be the prompt's own."""
        meta = body["meta_info"]
        tokens = [int(token) for _, token, *_ in meta["input_token_logprobs"]]
        top = meta["input_top_logprobs"]
        prompt = completion.prompt_ids
        if len(top) != len(tokens) or tokens != prompt[len(prompt) - len(tokens) :]:
            raise ValueError("input_token_logprobs are those of other tokens than the prompt's")
        pairs = [[(int(token), logprob) for logprob, token, *_ in target or ()] for target in top]
        before: list[list[tuple[int, float]]] = [[]] * (len(prompt) - len(tokens))
        return TopLogprobs.concatenate([TopLogprobs.from_pairs(before + pairs), self.read(body).candidates])


class LlamaCpp:
    """The native `/completion` of llama.cpp's server; it gives no log-probabilities of a prompt."""

    name = "llama.cpp"

    def check(self, settings: GenerationSettings) -> None:
        """Nothing to refuse: without `post_sampling_probs` it takes the softmax of all logits."""

    def ask(self, completion: Completion) -> tuple[str, dict[str, Any]]:
        """Its own samplers in the order of transformers: temperature, top-k, top-p."""
        settings = completion.settings
        sampling: dict[str, Any] = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
        if settings.do_sample:
            sampling = {
                "temperature": settings.generation_temperature,
                "top_k": settings.top_k,
                "top_p": settings.top_p,
                "samplers": ["temperature", "top_k", "top_p"],
            }
        return "/completion", {
            "prompt": completion.prompt_ids,
            "n_predict": settings.max_new_tokens,
            "n_probs": completion.width,
            "post_sampling_probs": False,
            "return_tokens": True,
            "cache_prompt": False,  # a cached prefix moves the last bits
            "seed": completion.seed,
            **sampling,
        }

    def read(self, body: Any) -> Answer:
        """`tokens` holds all tokens; those that end inside a character come without candidates."""
        tokens = [int(token) for token in body["tokens"]]
        steps = body["completion_probabilities"]
        ids = [int(step["id"]) for step in steps]
        places = _match(ids, tokens)
        pairs = [
            [(int(entry["id"]), float(entry["logprob"])) for entry in steps[step]["top_logprobs"]] for step, _ in places
        ]
        reason = {"limit": "length", "eos": "end"}.get(body["stop_type"], "stop")
        return Answer(tokens, [place for _, place in places], TopLogprobs.from_pairs(pairs), reason)

    def ask_score(self, completion: Completion, first: int) -> tuple[str, dict[str, Any]]:
        """Refused: the server gives no log-probabilities of given answers."""
        raise ConfigError(_LLAMA_CPP_SCORES_NOTHING)

    def read_score(self, body: Any, completion: Completion) -> TopLogprobs:
        """Refused: the server gives no log-probabilities of given answers."""
        raise ConfigError(_LLAMA_CPP_SCORES_NOTHING)


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (VLLM(), SGLang(), LlamaCpp())}


def _one_token(completion: Completion) -> Completion:
    return replace(completion, settings=GenerationSettings(max_new_tokens=1))


def _match(part: list[int], whole: list[int]) -> list[tuple[int, int]]:
    """Where the items of `part` lie in `whole`, as (index, place), without those that could lie at two places.

    The leftmost way to lay `part` into `whole` gives each item's first possible place, the rightmost its last one.
    """
    first = _leftmost(part, whole)
    last = [len(whole) - 1 - place for place in reversed(_leftmost(part[::-1], whole[::-1]))]
    return [(index, place) for index, place in enumerate(first) if place == last[index]]


def _leftmost(part: list[int], whole: list[int]) -> list[int]:
    places, start = [], 0
    for item in part:
        places.append(whole.index(item, start))
        start = places[-1] + 1
    return places

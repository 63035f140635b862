"""A small inference server on 127.0.0.1 that answers from a model in this process, as three real ones do.

The shapes are those of vLLM 0.32 (`/v1/completions`), SGLang (`/generate`) and llama.cpp's server (`/completion`).
Every log-probability is taken in float64 from one unpadded pass without a cache, so it shares nothing with quantkd.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp", "other": "somebody"}


class FakeServer:
    """A context manager; `url` is the address, `requests` what was posted.

    Args:
        model: a causal language model.
        ends: ids that end an answer by themselves.
        kind: which server it plays; "other" is an OpenAI server that names tokens by their text.
        faults: one is taken off the front at each post: a status, "reset", "malformed" or "truncated".
        mangle: changes a response's body before it is sent.
        max_logprobs: beyond this many, vLLM's refusal.
        error_body: the body that goes with a status.
    """

    def __init__(
        self,
        model: Any,
        ends: list[int],
        *,
        kind: str = "vllm",
        faults: list[int | str] | None = None,
        mangle: Callable[[Any], Any] | None = None,
        max_logprobs: int = 64,
        error_body: str = "{}",
    ) -> None:
        self.model, self.ends, self.kind = model, ends, kind
        self.faults, self.mangle = list(faults or []), mangle
        self.max_logprobs, self.error_body = max_logprobs, error_body
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.lock = threading.Lock()
        self.active, self.most_active, self.delay_seconds, self.pause_seconds = 0, 0, 0.0, 0.0
        self.redirect_to: str | None = None
        self.name = "tiny"  # what the served model is called

    def __enter__(self) -> FakeServer:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                if owner.redirect_to:
                    self.send_response(302)
                    self.send_header("Location", owner.redirect_to)
                    self.end_headers()
                    return
                owner.requests.append((self.path, dict(self.headers), None))
                card = {"id": owner.name, "owned_by": OWNERS[owner.kind], "max_model_len": 512}
                self.reply(200, json.dumps({"data": [card]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append((self.path, dict(self.headers), body))
                    fault = owner.faults.pop(0) if owner.faults else None
                    owner.active += 1
                    owner.most_active = max(owner.most_active, owner.active)
                try:
                    answer = None if fault else owner.respond(self.path, body)
                finally:
                    with owner.lock:  # before the answer leaves, for the next request may come at once
                        owner.active -= 1
                self.fail(fault) if answer is None else self.reply(*answer)

            def reply(self, status: int, text: str, cut: int = 0) -> None:
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data) + cut))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                for part in [data] if not owner.pause_seconds else (data[at : at + 1] for at in range(len(data))):
                    try:
                        self.wfile.write(part)
                    except OSError:  # the client has left
                        break
                    time.sleep(owner.pause_seconds)

            def fail(self, fault: int | str) -> None:
                if fault == "reset":  # SO_LINGER of 0 seconds: close with a reset instead of a farewell
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                elif fault == "malformed":
                    self.reply(200, '{"choices": [')
                elif fault == "truncated":
                    self.reply(200, "{}", cut=100)
                else:
                    self.reply(int(fault), owner.error_body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def respond(self, path: str, body: Any) -> tuple[int, str]:
        """Status and text of an answer."""
        expected = {"sglang": "/generate", "llama.cpp": "/completion"}.get(self.kind, "/v1/completions")
        if path != expected:
            return 404, "{}"
        time.sleep(self.delay_seconds)
        if self.kind == "vllm" and max(body["logprobs"], body.get("prompt_logprobs") or 0) > self.max_logprobs:
            message = f"Requested sample logprobs of {body['logprobs']}, greater than max allowed: {self.max_logprobs}"
            return 400, json.dumps({"error": {"message": message}})
        answer = {"sglang": self.sglang, "llama.cpp": self.llama_cpp}.get(self.kind, self.vllm)(body)
        return 200, json.dumps(self.mangle(answer) if self.mangle else answer)

    def distributions(self, ids: list[int]) -> torch.Tensor:
        """(L, V) float64 log-probabilities of what follows each token."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def generate(
        self, prompt: list[int], limit: int, ends: list[int], temperature: float, seed: int
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens and the distribution that each was taken from."""
        tokens: list[int] = []
        steps: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        while len(tokens) < limit and not (tokens and tokens[-1] in ends):
            steps.append(self.distributions(prompt + tokens)[-1])
            drawn = torch.multinomial((steps[-1] / (temperature or 1)).softmax(-1), 1, generator=generator)
            tokens.append(int(drawn if temperature else steps[-1].argmax()))
        return tokens, steps

    def vllm(self, body: Any) -> Any:
        """The sampled token first, then the most probable ones."""

        def name(token: int) -> str:
            return f"token_id:{token}" if self.kind == "vllm" and body["return_tokens_as_token_ids"] else f"t{token}"

        def top(step: torch.Tensor, token: int, count: int) -> dict[int, float]:
            values, ids = step.topk(count)
            return {token: float(step[token]), **dict(zip(ids.tolist(), values.tolist(), strict=True))}

        ends = body["stop_token_ids"] + ([] if body["ignore_eos"] else self.ends)
        tokens, steps = self.generate(body["prompt"], body["max_tokens"], ends, body["temperature"], body["seed"])
        choice: dict[str, Any] = {
            "finish_reason": "stop" if tokens[-1] in ends else "length",
            "logprobs": {
                "tokens": [name(token) for token in tokens],
                "top_logprobs": [
                    {name(token): value for token, value in top(step, chosen, body["logprobs"]).items()}
                    for step, chosen in zip(steps, tokens, strict=True)
                ],
            },
        }
        if body.get("prompt_logprobs"):
            prompt = body["prompt"]
            choice["prompt_logprobs"] = [None] + [
                {
                    str(token): {"logprob": value, "rank": 1, "decoded_token": None}
                    for token, value in top(step, label, body["prompt_logprobs"]).items()
                }
                for step, label in zip(self.distributions(prompt), prompt[1:], strict=False)
            ]
        return {"choices": [choice]}

    def sglang(self, body: Any) -> Any:
        """Triples; the log-probabilities of the prompt begin with None at `logprob_start_len`."""
        sampling, prompt = body["sampling_params"], body["input_ids"]
        ends = sampling["stop_token_ids"] + self.ends
        tokens, steps = self.generate(
            prompt, sampling["max_new_tokens"], ends, sampling["temperature"], sampling.get("sampling_seed", 0)
        )

        def top(step: torch.Tensor) -> list[Any]:
            values, ids = step.topk(body["top_logprobs_num"])
            return [[value, token, None] for value, token in zip(values.tolist(), ids.tolist(), strict=True)]

        meta: dict[str, Any] = {
            "finish_reason": {"type": "stop" if tokens[-1] in ends else "length"},
            "output_token_logprobs": [
                [float(step[token]), token, None] for step, token in zip(steps, tokens, strict=True)
            ],
            "output_top_logprobs": [top(step) for step in steps],
        }
        if body["logprob_start_len"] >= 0:
            start, dense = body["logprob_start_len"], self.distributions(prompt)
            rest = range(start + 1, len(prompt))
            meta["input_token_logprobs"] = [[None, prompt[start], None]] + [
                [float(dense[place - 1, prompt[place]]), prompt[place], None] for place in rest
            ]
            meta["input_top_logprobs"] = [None] + [top(dense[place - 1]) for place in rest]
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    def llama_cpp(self, body: Any) -> Any:
        """It ends at end tokens of its own alone, and names the one that it met."""
        tokens, steps = self.generate(body["prompt"], body["n_predict"], self.ends, body["temperature"], body["seed"])

        def entry(step: torch.Tensor, token: int) -> dict[str, Any]:
            return {"id": token, "token": "", "bytes": [], "logprob": float(step[token])}

        return {
            "content": "",
            "tokens": tokens if body["return_tokens"] else [],
            "stop_type": "eos" if tokens[-1] in self.ends else "limit",
            "completion_probabilities": [
                {
                    **entry(step, token),
                    "top_logprobs": [entry(step, other) for other in step.topk(body["n_probs"]).indices.tolist()],
                }
                for step, token in zip(steps, tokens, strict=True)
            ],
        }

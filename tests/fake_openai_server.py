"""A small inference server on 127.0.0.1 that answers from a model in this process, as three real ones do.

The shapes are those of vLLM 0.32 (`/v1/completions`), SGLang (`/generate`) and llama.cpp's server (`/completion`).
Every log-probability is taken in float64 from one unpadded pass without a cache, so it shares nothing with quantkd.
"""

import json
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp", "other": "somebody"}


class FakeServer:
    """A context manager; `url` is the address, `requests` what was posted.

    `ends` are ids that end an answer by themselves; `kind` "other" is an OpenAI server that names tokens by their text.
    `mangle` changes a response's body before it is sent, `error_body` goes with a status. One of `faults` is taken off
    the front at each post: a status, "reset", "malformed" or "truncated".
    """

    def __init__(self, model, ends, *, kind="vllm", mangle=None, max_logprobs=64, error_body="{}"):
        self.model, self.ends, self.kind, self.mangle = model, ends, kind, mangle
        self.max_logprobs, self.error_body, self.redirect_to = max_logprobs, error_body, None
        self.name, self.faults, self.requests, self.lock = "tiny", [], [], threading.Lock()
        self.active, self.most_active, self.delay_seconds = 0, 0, 0.0
        self.cards = []  # names of models, where they are several
        self.card = {}  # what the card of each says besides
        self.halves = set()  # tokens that end inside a character, which llama.cpp gives without candidates
        self.drip = []  # parts of a raw answer, sent one after the other

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                """Quiet."""

            def do_GET(self):
                if owner.redirect_to:
                    return self.reply(302, "", Location=owner.redirect_to)
                owner.requests.append((self.path, dict(self.headers), None))
                rest = {"owned_by": OWNERS[owner.kind], "max_model_len": 512, **owner.card}
                self.reply(200, json.dumps({"data": [{"id": name, **rest} for name in owner.cards or [owner.name]]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append((self.path, dict(self.headers), body))
                    fault = owner.faults.pop(0) if owner.faults else None
                    owner.active += 1
                    owner.most_active = max(owner.most_active, owner.active)
                try:
                    answer = None if fault or owner.drip else owner.respond(self.path, body)
                finally:
                    with owner.lock:  # before the answer leaves, for the next request may come at once
                        owner.active -= 1
                self.fail(fault) if answer is None else self.reply(*answer)

            def reply(self, status, text, cut=0, **headers):
                data = text.encode()
                self.send_response(status)
                headers |= {"Content-Type": "application/json", "Content-Length": len(data) + cut}
                headers |= {"Retry-After": 0} if status == 429 else {}
                for name, value in headers.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def fail(self, fault):
                if owner.drip:
                    with suppress(OSError):  # the client has left
                        for part in owner.drip:
                            self.wfile.write(part)
                            time.sleep(0.02)
                    self.close_connection = True
                elif fault == "reset":  # SO_LINGER of 0 seconds: close with a reset instead of a farewell
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                elif fault == "malformed":
                    self.reply(200, '{"choices": [')
                elif fault == "truncated":
                    self.reply(200, "{}", cut=100)
                else:
                    self.reply(fault, owner.error_body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def respond(self, path, body):
        expected = {"sglang": "/generate", "llama.cpp": "/completion"}.get(self.kind, "/v1/completions")
        if path != expected:
            return 404, "{}"
        time.sleep(self.delay_seconds)
        if self.kind == "vllm" and max(body["logprobs"], body.get("prompt_logprobs") or 0) > self.max_logprobs:
            message = f"Requested sample logprobs of {body['logprobs']}, greater than max allowed: {self.max_logprobs}"
            return 400, json.dumps({"error": {"message": message}})
        answer = {"sglang": self.sglang, "llama.cpp": self.llama_cpp}.get(self.kind, self.vllm)(body)
        return 200, json.dumps(self.mangle(answer) if self.mangle else answer)

    def distributions(self, ids):
        """(L, V) float64 log-probabilities of what follows each token."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def generate(self, prompt, limit, ends, temperature, seed):
        """Tokens and the distribution that each was taken from."""
        tokens, steps = [], []
        generator = torch.Generator().manual_seed(seed)
        while len(tokens) < limit and not (tokens and tokens[-1] in ends):
            steps.append(self.distributions(prompt + tokens)[-1])
            drawn = torch.multinomial((steps[-1] / (temperature or 1)).softmax(-1), 1, generator=generator)
            tokens.append(int(drawn if temperature else steps[-1].argmax()))
        return tokens, steps

    def list_prompt(self, ids, count):
        """The candidates of each token of a prompt but the first."""
        pairs = zip(self.distributions(ids), ids[1:], strict=False)
        return [sampled_and_top(step, token, count) for step, token in pairs]

    def vllm(self, body):
        """The sampled token first, then the most probable ones."""

        def name(token):
            return f"token_id:{token}" if self.kind == "vllm" and body["return_tokens_as_token_ids"] else f"t{token}"

        ends = body["stop_token_ids"] + ([] if body["ignore_eos"] else self.ends)
        tokens, steps = self.generate(body["prompt"], body["max_tokens"], ends, body["temperature"], body["seed"])
        targets = [sampled_and_top(*pair, body["logprobs"]) for pair in zip(steps, tokens, strict=True)]
        logprobs = {
            "tokens": [name(token) for token in tokens],
            "top_logprobs": [{name(token): value for token, value in target} for target in targets],
        }
        choice = {"finish_reason": "stop" if tokens[-1] in ends else "length", "logprobs": logprobs}
        if count := body.get("prompt_logprobs"):
            facts = {"rank": 1, "decoded_token": None}
            tops = self.list_prompt(body["prompt"], count)
            named = [{str(token): {"logprob": value, **facts} for token, value in top} for top in tops]
            choice["prompt_logprobs"] = [None, *named]
        return {"choices": [choice]}

    def sglang(self, body):
        """Triples; the log-probabilities of the prompt begin with None at `logprob_start_len`."""
        sampling, prompt, count = body["sampling_params"], body["input_ids"], body["top_logprobs_num"]
        ends, seed = sampling["stop_token_ids"] + self.ends, sampling.get("sampling_seed", 0)
        tokens, steps = self.generate(prompt, sampling["max_new_tokens"], ends, sampling["temperature"], seed)

        def triples(steps, tokens):
            targets = [sampled_and_top(*pair, count) for pair in zip(steps, tokens, strict=True)]
            targets = [[[value, token, None] for token, value in target] for target in targets]
            return [target[0] for target in targets], [target[1:] for target in targets]

        meta = {"finish_reason": {"type": "stop" if tokens[-1] in ends else "length"}}
        meta["output_token_logprobs"], meta["output_top_logprobs"] = triples(steps, tokens)
        if (start := body["logprob_start_len"]) >= 0:
            given, top = triples(self.distributions(prompt)[start:-1], prompt[start + 1 :])
            meta["input_token_logprobs"] = [[None, prompt[start], None], *given]
            meta["input_top_logprobs"] = [None, *top]
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    def llama_cpp(self, body):
        """It ends at end tokens of its own alone, and names the one that it met."""
        prompt, forced = body["prompt"], [token for token, bias in body.get("logit_bias", []) if bias > 100]
        if forced:  # the candidates are those before the bias
            tokens, steps = forced, [self.distributions(prompt)[-1]]
        else:
            tokens, steps = self.generate(prompt, body["n_predict"], self.ends, body["temperature"], body["seed"])
        targets = []
        for step, token in zip(steps, tokens, strict=True):
            if token in self.halves:
                continue
            pairs = sampled_and_top(step, token, min(body["n_probs"], len(step)))
            own, *top = ({"id": each, "token": "", "bytes": [], "logprob": value} for each, value in pairs)
            targets.append({**own, "top_logprobs": top})
        found = {"completion_probabilities": targets} if targets else {}
        return {
            "content": "", "tokens": tokens if body["return_tokens"] else [], "tokens_evaluated": len(prompt),
            "stop_type": "eos" if tokens[-1] in self.ends else "limit", **found,
        }  # fmt: skip


def sampled_and_top(step, token, count):
    """A token and its log-probability, then those of the most probable ones, which may hold the token again."""
    values, ids = step.topk(count)
    return [(token, float(step[token])), *zip(ids.tolist(), values.tolist(), strict=True)]

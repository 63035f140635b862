"""Benchmarks start without arguments, and measure what they say."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkd.models.provenance import Provenance
from quantkd.models.stored_weights import compute_size
from tests.conftest import REPOSITORY, TRAINING_PROMPTS, build_tiny_model, capture_set, refused

SCRIPTS = sorted((REPOSITORY / "benchmarks").glob("[a-z]*.py"))


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import _sources

    monkeypatch.setattr(_sources, "load_demo_model", lambda: "demo")
    return _sources


class Parsed(Exception):
    """Ends a script once it has its arguments."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_no_argument_is_required(script, sources, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        raise Parsed(parse(self, *args), self.format_help())

    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as ended:
        runpy.run_path(str(script), run_name="__main__")
    finds = ("add_sources(", "build_parser(")  # the latter is recovery.py's
    assert "--model" not in ended.value.args[1] or any(each in script.read_text() for each in finds)


def test_model_and_questions_are_found_and_figures_measured_once(sources, monkeypatch, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    sources.add_sources(parser)
    for words, model in (([], "demo"), (["--model", "mine"], "mine")):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        assert sources.parse(parser).model == model
    monkeypatch.setattr(sources, "_FOLDERS", (tmp_path / "none", tmp_path))
    for folder in (None, str(tmp_path)):
        with pytest.raises(SystemExit) as ended:
            sources.find_gsm8k(folder)
        assert not ended.value.code and "name the folder with --gsm8k" in json.loads(capsys.readouterr().out)["skipped"]
    (tmp_path / "train.jsonl").touch()
    assert sources.find_gsm8k(None) == sources.find_gsm8k(str(tmp_path)) == str(tmp_path)
    from _cache import keep_figures

    for rows, kl, expected in ((8, 0.5, 0.5), (8, 0.7, 0.5), (9, 0.7, 0.7)):
        assert keep_figures(tmp_path, "nf4", {"rows": rows}, lambda kl=kl: {"kl": kl}) == {"kl": expected}


def test_frontier_compares_the_best_within_its_bits(sources, capsys):
    import frontier

    sums = {  # bits per weight and KL of two rows
        "nf4": (4.1, 4.0, 4.0), "hqq-5": (5.5, 1.0, 1.0), "hqq-6": (6.5, 0.1, 0.1), "codes": (4.1, 2.0, 1.0),
        "codes+adapter@5.0": (4.9, 0.5, 0.5), "scales+adapter@9": (9.0, 0.01, 0.01),
    }  # fmt: skip
    arms = {
        name: {"bits_per_weight": bits, "bytes": 1, "kl": sum(kl) / 2, "kl_sum": kl, "tokens": [1, 1]}
        for name, (bits, *kl) in sums.items()
    }
    found = frontier.summarize(arms)
    assert found["codes.kl_gap_recovered"] == 1 - 3 / 8 and found["codes.kl_gap_recovered_ci95"] == [0.5, 0.75]
    assert found["at_4_5_bits.kl_vs_best_plain_5_5"] == 3 / 2 and found["at_5_bits.kl_gap_recovered"] == 1 - 1 / 8
    assert found["scales.kl_gap_recovered"] is None and "scales.kl_gap_recovered is null" in capsys.readouterr().err
    assert "| codes | 4.10 | 0.0 | 1.5000 [1.0000, 2.0000] | 62.5% [50.0%, 75.0%] |" in frontier.tabulate(arms)


def test_frontier_rounds_to_the_types_of_gguf(sources, tiny_model_path, monkeypatch, tmp_path):
    import frontier
    from safetensors.torch import save_file

    monkeypatch.setattr(frontier, "native_compute_dtype", lambda: torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path).model.layers[0].mlp.up_proj.weight
    for kind, bits, most in (("q4_0", 4.5, 1 / 8), ("q8_0", 8.5, 1 / 254)):
        layer = (model := frontier.load_blocks(str(tiny_model_path), kind)).model.layers[0].mlp.up_proj
        size = compute_size(model)
        assert 8 * (size.codes + size.constants) / size.linear_weights == bits
        largest = plain.unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, 1)
        error = (layer.weight - plain).abs()
        assert (error <= 1.15 * most * largest).all() and error.any()
    # What was chosen is found again in a file.
    blocks = {name: torch.from_numpy(each.gguf_tensor.blocks) for name, each in frontier.list_linear(model)}
    blocks["model.layers.0.mlp.up_proj"][:] = 0
    save_file(blocks, tmp_path / "blocks.safetensors")
    found = frontier.load_blocks(str(tiny_model_path), "q8_0", tmp_path / "blocks.safetensors").model.layers[0].mlp
    assert not found.up_proj.weight.any()
    assert torch.equal(found.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_curves_vary_one_setting_at_a_time(sources, monkeypatch, tmp_path, capsys):
    import curves

    def measure(name, args):
        left = {"teacher": 0.0, "before": 4.0, "start": 1.0 / args.rank}
        kl = left.get(name, 1.0 / args.rank - args.rows * args.epochs / 1000 - (name[-1] == "1") / 500)
        return {"kl_sum": [kl, kl], "tokens": [1, 1]}

    captured = []
    monkeypatch.setattr(curves, "capture_sets", captured.append)
    monkeypatch.setattr(curves, "cached_arm", measure)
    base, varied = ["--rows", "2", "--rank", "1", "--seeds", "2"], ["--all_epochs", "1", "8", "--all_ranks", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["curves", "--cache", str(tmp_path), *base, *varied, "--all_rows", "1", "2", "4"])
    curves.main()
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert captured[0].capture_rows == 4 and (tmp_path / "curves.png").stat().st_size > 1000
    assert found["rows"]["4"]["start"] == [0.75, [0.75, 0.75]] and found["epochs"]["8.0"]["trained"][0] == 0.7542
    assert [found["rank"][each]["training_share_of_rest"][0] for each in ("1", "2")] == [0.003, 0.006]
    assert "| rank 2 | 87.5% [87.5%, 87.5%] | 87.6% [87.6%, 87.6%] | 0.6% [0.6%, 0.6%] |" in printed
    # What has one value does not vary.
    sys.argv[-10:] = ["--all_epochs", "1", "--all_ranks", "1", "--all_rows", "1", "2"]
    curves.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == {"rows", "seeds", "held_out_rows"}
    sys.argv.pop()
    with pytest.raises(SystemExit):
        curves.main()
    tried = []
    monkeypatch.setattr(curves, "cached_arm", lambda name, args: tried.append(args) or measure(name, args))
    sys.argv += ["--all_rates", "0.5", "1", "--scales_learning_rate", "4", "--choose"]
    curves.main()
    assert {(args.learning_rate, args.scales_learning_rate, args.choose) for args in tried} == {
        (5e-5, 2.0, True), (1e-4, 4.0, True),
    }  # fmt: skip


@pytest.mark.parametrize("domain", ["gsm8k", "arithmetic", "python_docs"])
def test_settings_are_chosen_on_questions_that_no_student_and_no_table_sees(sources, tmp_path, domain):
    import recovery

    for name in ("train", "test"):
        rows = [{"question": f"{name} {number}?", "answer": f"#### {number}"} for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--domain", domain, "--gsm8k", str(tmp_path), "--rows", "6", "--held_out_rows", "5"]
    args, choosing = (recovery.build_parser().parse_args([*words, *more]) for more in ([], ["--choose"]))
    trained, reported = (recovery.question_prompts(args, name) for name in ("train", "held_out"))
    chosen_by = recovery.question_prompts(choosing, "held_out")
    assert recovery.question_prompts(choosing, "train") == trained and len(chosen_by) == len(reported) == 5
    assert len({*trained, *reported, *chosen_by}) == 16
    assert recovery.set_folder(choosing, "held_out") != recovery.set_folder(args, "held_out")
    assert recovery.set_folder(choosing, "train") == recovery.set_folder(args, "train")


def test_every_student_is_measured_on_both_domains(sources, training_set, monkeypatch, tmp_path, capsys):
    import domains

    made = {}

    def measure(model, args):
        name, arm = model
        home = args.domain in name or "both" in name
        kl = {"teacher": 0.0, "before": 4.0}.get(arm, 1.0 if home else 2.0)
        return {"kl": kl, "kl_sum": [kl, kl], "tokens": [1, 1]}

    monkeypatch.setattr(domains, "capture_sets", lambda args: None)
    monkeypatch.setattr(domains, "open_train", lambda args: training_set)
    monkeypatch.setattr(domains, "make_student", lambda args, rows, folder: made.update({folder.name: len(rows)}))
    monkeypatch.setattr(domains, "load_arm", lambda args, folder, arm: (folder.name, arm))
    monkeypatch.setattr(domains, "measure", measure)
    monkeypatch.setattr(
        sys, "argv", ["domains", "--cache", str(tmp_path), "--rows", str(len(training_set)), "--rank", "2"]
    )
    domains.main()
    rows = len(training_set)
    assert made == {f"{name}-{rows}-2": rows for name in ("gsm8k", "python_docs")} | {f"both-{rows}-2": rows // 2 * 2}
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    assert found["gsm8k"]["codes gsm8k"] == {"kl": 1.0, "kl_gap_recovered": 0.75, "ci95": [0.75, 0.75]}
    assert "| python_docs | start | 2.0000, 50.0% | 1.0000, 75.0% |" in printed
    assert "| both | trained | 1.0000, 75.0% | 1.0000, 75.0% |" in printed


def test_weights_leave_their_grid_and_outputs_stay_near(sources, monkeypatch, tiny_tokenizer, tmp_path):
    import _off_grid

    model = build_tiny_model(tiny_tokenizer)
    with torch.no_grad():
        for layer in (each for each in model.model.modules() if isinstance(each, torch.nn.Linear)):
            low, step = (each.repeat_interleave(_off_grid.BLOCK, 1) for each in _off_grid.read_grid(layer.weight))
            layer.weight.copy_(low + step * ((layer.weight - low) / step).round())
    for each in (model, tiny_tokenizer):
        each.save_pretrained(tmp_path / "model")
    rows = capture_set(tmp_path / "model", TRAINING_PROMPTS, tmp_path / "set", max_new_tokens=10)
    monkeypatch.setattr(_off_grid, "_HELD_OUT_ROWS", 3)
    found = {}
    for ridge in (1e9, _off_grid.RIDGE):  # the first leaves the noise as it is
        monkeypatch.setattr(_off_grid, "RIDGE", ridge)
        monkeypatch.setattr(_off_grid, "TARGET_KL", 100.0)
        _off_grid.leave_grid(str(tmp_path / "model"), rows, tmp_path / f"{ridge}")
        found[ridge] = json.loads((tmp_path / f"{ridge}" / "off_grid.json").read_text())
        assert found[ridge]["on_grid_before"] == 1.0 and found[ridge]["on_grid_after"] < 0.1
    noisy, fitted = found.values()
    assert fitted["kl"] < 0.5 * noisy["kl"] and noisy["rms_distance_after"] == pytest.approx(12**-0.5, abs=0.01)
    monkeypatch.setattr(_off_grid, "TARGET_KL", 0.0)
    with pytest.raises(SystemExit, match="nats per token from its own"):
        _off_grid.leave_grid(str(tmp_path / "model"), rows, tmp_path / "refused")


@pytest.fixture
def gpu(sources):
    import gpu

    return gpu


def test_a_part_that_runs_out_of_time_is_ended_and_the_others_run(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)

    def python(code):
        return [sys.executable, "-c", code]

    own = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    hanging = python(
        f"import subprocess; print({{'loss': 1}}, '{{\"half', sep='\\n', flush=True); subprocess.run({own!r})"
    )
    clock = gpu.Clock(600.0, time.monotonic())
    found = {
        name: gpu.run_part(gpu.Part(name, command, seconds, **options), tmp_path, clock)
        for name, command, seconds, options in (
            ("hangs", hanging, 3, {}),
            ("works", python("print(1); print('{\"kl\": 0.5}')"), 60, {}),
            ("fails", python("print('{\"failed\": 2}'); raise SystemExit('Why.')"), 60, {}),
            ("has nothing", python('print(\'{"skipped": "no rows"}\')'), 60, {}),
            ("needs", python(""), 60, {"needs": tmp_path / "none"}),
        )
    }
    hangs, fails = found["hangs"], found["fails"]
    assert (hangs["status"], hangs["said"]) == ("out of time", ["{'loss': 1}", '{"half'])
    assert "figures" not in hangs and 3 <= hangs["seconds"] < 60
    assert found["works"]["status"] == "done" and found["works"]["figures"] == {"kl": 0.5}
    assert (fails["status"], fails["exit_status"], fails["figures"]) == ("failed", 1, {"failed": 2})
    assert fails["said"][-1] == "Why." and found["has nothing"] == {"status": "skipped", "why": "no rows"}
    assert "did not end" in found["needs"]["why"]
    late = gpu.run_part(gpu.Part("late", python(""), 60), tmp_path, gpu.Clock(10.0, time.monotonic() - 20))
    assert late == {"status": "skipped", "why": "0 s of 10 s were left"}
    pid = int((tmp_path / "pid").read_text())  # what the part started went with it
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_figures_of_a_card_are_gathered(gpu, sources, monkeypatch, tmp_path, capsys):
    figures = {
        "tests": {"passed": 27, "skipped": 3},
        "loss": {"fused_t1": {"time_vs_matmuls": 1.2, "time_vs_ce": 0.9, "memory_vs_ce": 0.1, "seconds": 1.0}},
        "shapes": {"layers": 8},
        "step.sft": {"seconds": [2.0, 9.0, 1.0], "step_mib": 100.0, "peak_mib": 400.0},
        "step.quantkd_t1": {"seconds": [1.0, 1.0, 1.0], "step_mib": 80.0, "peak_mib": 380.4},
        "step.quantkd_scales": {},
        "capture": {"time_vs_generate": 1.05, "memory_vs_step_logits": 4.5},
        "recovery": {"before": {"kl": 0.2}, "start": {"kl": 0.03}, "quantkd-0": {"kl": 0.02, "memory": 900 * 2**20}},
    }
    monkeypatch.setattr(gpu, "run_part", lambda part, *rest: {"status": "done", "figures": figures[part.name]})
    words = ["gpu", "--device", "cpu", "--quick", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not ended.value.code and printed == json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(printed["parts"]) == list(figures) and printed["versions"]["torch"] == torch.__version__
    assert printed["summary"] == {
        "loss.time_vs_matmuls": 1.2, "loss.time_vs_ce": 0.9, "loss.memory_vs_ce": 0.1,
        "step.quantkd_t1.time_vs_sft": 0.5, "step.quantkd_t1.memory_vs_sft": 0.8,
        "capture.time_vs_generate": 1.05, "capture.memory_vs_step_logits": 4.5,
        "recovery.kl": {"before": 0.2, "start": 0.03, "quantkd-0": 0.02},
        "peak_mib": {"sft": 400, "quantkd_t1": 380, "recovery": 900},
    }  # fmt: skip
    monkeypatch.setattr(gpu, "run_part", lambda part, *rest: {"status": "failed"})
    monkeypatch.setattr(sys, "argv", [*words, "--parts", "step"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 1 and list(printed["parts"]) == ["step.sft", "step.quantkd_t1", "step.quantkd_scales"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_card_one_line_says_what_to_do(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    refused(SystemExit, r"^No CUDA device was found: torch .* TORCH=torch\), or try .* --quick$", gpu.main)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("words", "message"), [
    (["--minutes", "0"], "--minutes is 0.0; expected more than 0"), (["--parts", "steps"], "invalid choice: 'steps'"),
    (["--gsm8k", "typo"], "no train.jsonl in typo"), (["--model", "./typo"], "There is no folder './typo'"),
])  # fmt: skip
def test_what_is_not_there_is_refused_before_the_first_part(gpu, monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr(gpu, "run_part", None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--output", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_codes_of_other_answers_are_not_taken(sources, monkeypatch, tiny_model_path, tmp_path):
    import recovery

    args = argparse.Namespace(cache=tmp_path, model=str(tiny_model_path), rows=4, max_new_tokens=4, storage_mass=0.95)
    for count in (4, 3):
        made = capture_set(tiny_model_path, TRAINING_PROMPTS[:count], tmp_path / str(count), max_new_tokens=4)
        monkeypatch.setattr(recovery, "set_folder", lambda *_, count=count: tmp_path / str(count))
        assert Provenance.read(recovery.choose_base(args, "codes")).transfer_set_digest == made.digest


pytestmark = pytest.mark.usefixtures("no_pictures")
RANK, HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 16, 64, 128, 32, 1, 320


@pytest.fixture
def step(monkeypatch):
    if not Path("/proc/self/clear_refs").exists() and not torch.cuda.is_available():
        pytest.skip("peak memory is read from /proc, or from a GPU")
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import step

    return step


@pytest.fixture
def make_args(one_layer_path, training_set, tmp_path):
    settings = {"model": str(one_layer_path), "set": str(training_set.sources[0]), "scratch": str(tmp_path / "out")}
    settings |= {"steps": 1, "warm_up": 1, "rows": 8, "parts": True, "autocast": False}
    return lambda **options: argparse.Namespace(**{**settings, **options})


def test_steps_and_capture_run_on_the_model_that_stands_for_8b(gpu, step, make_args, tmp_path, capsys):
    import capture

    gpu.make_shapes(tmp_path, 2, gpu.TINY)
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["layers"] == 2 and made["parameters"] == 139_584
    args = make_args(parts=False, warm_up=1, model=str(tmp_path / "shapes"), set=str(tmp_path / "rows"))
    found = {name: step.measure_step(name, args) for name in gpu.STEPS}
    for each in found.values():
        assert each["batch"] == found["sft"]["batch"] and len(each["seconds"]) == 1 and each["peak_mib"] > 0
    problems = tmp_path / "problems"
    folder = gpu.find_questions(str(tmp_path / "none"), problems)
    given = argparse.Namespace(
        model=args.model, gsm8k=str(folder), prompts=4, batch_size=4, max_new_tokens=4, rounds=1, dtype=None
    )
    timed = capture.measure_time(capture.Bench(given))
    assert folder == problems and {len(each) for each in timed["seconds"].values()} == {1}


def test_every_contender_trains_the_same_student_on_the_same_rows(step, make_args, training_set):
    rows = list(training_set)[: step.BATCH_SIZE]
    found = {name: step.measure_step(name, make_args()) for name in step.STEPS}

    targets = [row["labels"][row["labels"] != -100] for row in rows]
    batch = {
        "width": max(len(row["input_ids"]) for row in rows),
        "targets": sum(len(each) for each in targets),
        "checksum": int(torch.cat(targets).sum()),
    }
    assert {name: result["batch"] for name, result in found.items()} == dict.fromkeys(found, batch)

    shapes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, INNER)] * 3  # in and out, of either order
    adapters = LAYERS * sum(RANK * (a + b) for a, b in shapes) * 4 / step.MIB
    scales = (LAYERS * sum(a * b // 64 for a, b in shapes) + (2 * LAYERS + 1) * HIDDEN) * 4 / step.MIB  # and norms
    for name, result in found.items():
        parts, trained = result["parts_mib"], adapters + scales * (name == "quantkd_scales")
        assert parts["adapters"] == pytest.approx(trained) and parts["gradients"] == pytest.approx(trained)
        assert parts["optimizer state"] == pytest.approx(2 * trained, rel=0.02)  # and a step count a tensor

    logits = step.BATCH_SIZE * batch["width"] * VOCABULARY * 4 / step.MIB
    kept = {name: result["parts_mib"]["head and loss, kept"] for name, result in found.items()}
    assert kept["sft"] >= logits and kept["quantkd_t1"] < logits / 4
    activations = {name: result["parts_mib"]["activations, kept"] for name, result in found.items()}
    assert activations["quantkd_t1"] == pytest.approx(activations["sft"], rel=0.02)

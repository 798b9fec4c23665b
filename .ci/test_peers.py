"""Tests against other people's packages, where they are installed: SAELens, sparsify, delphi; and of
.ci/speed.py. `python -m pytest .ci/test_peers.py`; .ci/run does, in an environment with all three.
"""

import importlib.util
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import jsae
from test_jsae import normal, run_copy, settings, whole

RECIPES = jsae.HERE / "assets" / "recipes"
FIXTURES = (run_copy, settings, whole)  # pytest finds them by these names


def module_from_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sae_lens_opens_the_folders_and_what_it_saves_comes_back(run_copy):
    sae_lens = pytest.importorskip("sae_lens")
    *saes, config = jsae.load_run(run_copy)
    for name, sae in zip(("sae_x", "sae_y"), saes):
        folder = run_copy / name
        n_latents, d_model = sae.W_enc.shape
        x = 3 * normal(50, d_model).float()
        theirs = sae_lens.SAE.load_from_disk(str(folder), device="cpu")
        acts, idx = sae.encode(x)
        dense = torch.zeros(50, n_latents).scatter(1, idx, acts)
        torch.testing.assert_close(theirs.encode(x), dense, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x), rtol=0, atol=1e-5)
        assert theirs.cfg.metadata.model_name == config.model
        shutil.rmtree(folder)
        theirs.save_model(folder)
    for sae, again in zip(saes, jsae.load_run(run_copy)[:2]):
        assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), again.parameters()))


def test_sae_lens_finds_x_and_y_where_the_saved_hook_names_say(run_copy):
    sae_lens = pytest.importorskip("sae_lens")
    *saes, config = jsae.load_run(run_copy)
    model, _ = jsae.load_model(config)
    mlp = jsae.find_mlp(model, config.layer)
    ids = torch.arange(5, 25).unsqueeze(0)
    x = jsae.mlp_inputs(model, mlp, ids)
    for name, sae, site in zip(("sae_x", "sae_y"), saes, (x, mlp(x))):
        theirs = sae_lens.SAE.load_from_disk(str(run_copy / name), device="cpu")
        metadata = theirs.cfg.metadata
        load_model = importlib.import_module("sae_lens.load_model").load_model
        hooked = load_model(metadata.model_class_name, metadata.model_name, "cpu")
        _, cache = hooked.run_with_cache(ids)
        torch.testing.assert_close(cache[metadata.hook_name], site)
        torch.testing.assert_close(theirs(cache[metadata.hook_name]), sae(site), rtol=0, atol=1e-4)


def test_sparsify_opens_what_the_readmes_lines_write(run_copy):
    sparsify = pytest.importorskip("sparsify")
    command = [sys.executable, RECIPES / "to_sparsify.py", run_copy, run_copy / "sparsify"]
    subprocess.run(command, check=True)
    for side, sae in zip("xy", jsae.load_run(run_copy)[:2]):
        folder = run_copy / "sparsify" / side
        x = 3 * normal(50, sae.W_enc.shape[1]).float()
        theirs = sparsify.SparseCoder.load_from_disk(folder)
        acts, idx, _ = theirs.encode(x)
        ours = sae.encode(x)
        assert torch.equal(idx.sort().values, ours.idx.sort().values)
        torch.testing.assert_close(theirs.decode(acts, idx), sae(x), rtol=0, atol=1e-5)


# delphi's engine for local LLMs is imported with the rest of it, but never called here.
VLLM = {
    "vllm": {"LLM": None, "SamplingParams": None},
    "vllm.distributed": {},
    "vllm.distributed.parallel_state": {
        "destroy_distributed_environment": None,
        "destroy_model_parallel": None,
    },
    "vllm.inputs": {"TokensPrompt": None},
}


@pytest.fixture
def interpreted(tmp_path, monkeypatch):
    """-> a function that has a client judge a run by the lines of RESULTS.md, and the run."""
    pytest.importorskip("delphi")
    for name, contents in VLLM.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    interpret = module_from_file(RECIPES / "interpret.py")
    settings = jsae.DEMO | {"tokens": 61440, "output_dir": str(tmp_path / "run")}
    run = jsae.train(jsae.Config(**settings))

    def judged_by(client, *args):
        settings = ["--latents", "20", "--tokens", "25500", "--min-examples", "20", *args]
        interpret.main([str(run), *settings], client)
        return json.loads((run / "interpretability.json").read_text())

    return judged_by, run


class MarkedText:
    """What delphi must show, from our own activations: windows of 32 tokens, marked at >= .3 max."""

    def __init__(self, run):
        opened = evaluate.open_run(run, evaluate.Options())
        self.tokenizer = opened.tokenizer
        self.ids, _ = evaluate.held_out_text(opened, 25500, 0)
        words = self.tokenizer.batch_decode(self.ids.reshape(-1, 1))
        self.words = [words[n : n + 32] for n in range(0, len(words), 32)]
        self.saes = {"x": opened.sae_x, "y": opened.sae_y}
        self.acts = {}
        with torch.no_grad():
            x = opened.model.gpt_neox.embed_in(self.ids)
            x = opened.model.gpt_neox.layers[0].post_attention_layernorm(x)  # of layer 0
            for side, site in (("x", x), ("y", opened.mlp(x))):
                s = self.saes[side].encode(site.flatten(0, 1))
                acts = torch.zeros(len(s.acts), len(self.saes[side].W_enc))
                acts = acts.scatter(1, s.idx, s.acts).view(*self.ids.shape, -1)
                acts[:, 0] = 0
                self.acts[side] = acts.view(-1, 32, acts.shape[-1])  # (windows, 32, n_latents)

    def windows(self, side, latent):
        return [n for n, acts in enumerate(self.acts[side][:, :, latent]) if acts.any()]

    def marked(self, side, latent, window):
        acts = self.acts[side][window, :, latent].tolist()
        text = ""
        for important, tokens in itertools.groupby(
            zip(acts, self.words[window]), lambda token: token[0] >= 0.3 * max(acts)
        ):
            piece = "".join(word for _, word in tokens)
            text += f"<<{piece}>>" if important else piece
        return text

    def chosen(self, side, n_latents=20, least=20):
        """-> the latents that the script must take, in its order, and how many it leaves out."""
        n = len(self.saes[side].W_enc)
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        taken = []
        left_out = {}
        for latent in drawn[: 2 * n_latents].tolist():
            found = len(self.windows(side, latent))
            if len(taken) == n_latents:
                break
            if found == 0:
                why = "silent"
            elif found < least:
                why = "rare"
            elif len(self.words) - found < 50:
                why = "in every window"
            else:
                taken.append(latent)
                continue
            left_out[why] = left_out.get(why, 0) + 1
        return taken, left_out


class ScriptedClient:
    """In place of an LLM: explains a latent by its number and judges by `answer(name, text)`."""

    def __init__(self, marked, answer):
        self.names = [(side, latent) for side in "xy" for latent in marked.chosen(side)[0]]
        self.answer = answer
        self.explained = []
        self.judged = []

    async def generate(self, prompt, **kwargs):
        from delphi.clients.client import Response

        question = prompt[-1]["content"]
        if not question.startswith("Latent explanation: "):
            name = self.names[len(self.explained)]
            self.explained.append(question)
            return Response(f"[EXPLANATION]: {name[0]} {name[1]}")
        side, latent = question.split("\n")[0].split()[2:]
        examples = question.split("Text examples:\n\n")[1].removesuffix("\n")
        texts = re.split(r"(?:^|\n)Example \d: ", examples)[1:]
        self.judged += [(side, int(latent), text) for text in texts]
        return Response(str([int(self.answer(side, int(latent), text)) for text in texts]))


def scores_of(results):
    return [latent["score"] for side in "xy" for latent in results[side]["latents"]]


def test_delphi_shows_the_latents_where_they_are_active_and_counts_the_rest(interpreted):
    judged_by, run = interpreted
    marked = MarkedText(run)
    true = {
        (side, latent): {marked.marked(side, latent, n) for n in marked.windows(side, latent)}
        for side in "xy"
        for latent in marked.chosen(side)[0]
    }

    client = ScriptedClient(marked, lambda side, latent, text: text in true[side, latent])
    results = judged_by(client)
    assert scores_of(results) == [1.0] * 40
    for side in "xy":
        latents, left_out = marked.chosen(side)
        assert [one["latent"] for one in results[side]["latents"]] == latents
        assert results[side]["left_out"] == left_out
        assert not any(one["not_understood"] for one in results[side]["latents"])

    share = {}  # of true examples among those shown
    for side, latent, text in client.judged:
        share.setdefault((side, latent), []).append(text in true[side, latent])
    always = scores_of(judged_by(ScriptedClient(marked, lambda *example: True)))
    assert always == pytest.approx([statistics.mean(shown) for shown in share.values()])
    rng = np.random.default_rng(0)
    guessed = scores_of(judged_by(ScriptedClient(marked, lambda *example: rng.random() < 0.5)))
    assert abs(statistics.mean(guessed) - 0.5) < 4 * 0.5 / len(client.judged) ** 0.5


def test_delphi_explains_latents_by_the_text_that_evaluate_shows(interpreted):
    judged_by, run = interpreted
    marked = MarkedText(run)
    client = ScriptedClient(marked, lambda *example: True)
    judged_by(client)
    compared = 0
    for (side, latent), question in zip(client.names, client.explained):
        if len(marked.windows(side, latent)) >= 50:
            continue  # delphi shows a sample of them
        sae = marked.saes[side]
        acts = marked.acts[side].view(*marked.ids.shape, -1)[:, 1:].flatten(0, 1)
        s = jsae.Latents(*acts.topk(sae.k))
        best = evaluate.examples_of(latent, marked.ids, s, marked.tokenizer)[0]
        word = best["tokens"][best["at"]]
        largest = marked.acts[side][:, :, latent].amax(1).argmax().item()
        assert marked.acts[side][largest, :, latent].max().item() == pytest.approx(
            max(best["acts"]), abs=1e-3
        )
        shown = marked.marked(side, latent, largest)
        assert shown in question
        assert any(word in piece for piece in re.findall(r"<<(.*?)>>", shown, re.DOTALL))
        compared += 1
    assert compared >= 5


def test_the_benchmark_runs_and_times_what_it_says(monkeypatch, capsys):
    speed = module_from_file(jsae.HERE / ".ci" / "speed.py")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--scale", "32", "--rounds", "1"])
    speed.main()
    assert "JSAE pair" in capsys.readouterr().out
    options = types.SimpleNamespace(device="cpu")
    losses = []
    for plain in (False, True):
        torch.manual_seed(0)
        losses.append(speed.pair(options, B=128, d=16, n=512, h=64, k=1, plain=plain)[1]())
    torch.testing.assert_close(*losses)

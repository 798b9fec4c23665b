"""Train the bundled language model: a small Pythia-shaped GPT-NeoX on the Python source text of this machine.

    python assets/tiny-pythia/train.py [--output DIR] [--steps 9000] [--seed 0]

Text: the standard library's sources (pydoc's topics are one of them) and the sources of the installed packages, each
half of the training tokens. Left out are the standard library's held-out files (crc32 of the path modulo 20 is 0, as
in jsae.py) and every other file in which a tenth or more of the longer lines stand in a held-out file too. Writes an
ordinary Hugging Face folder in bfloat16 and prints the figures of the model card beside this file.
"""

import argparse
import copy
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

VOCABULARY, CONTEXT, BATCH, END = 2560, 512, 16, "<|endoftext|>"
WARM_UP, LR = 100, 4e-3


def read_tree(root):
    """{path relative to root: text} of the .py files below root that are UTF-8 and not empty."""
    texts = {}
    for path in sorted(Path(root).rglob("*.py")):
        try:
            texts[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
    return {path: text for path, text in texts.items() if text.strip()}


def corpus():
    """-> (standard library, installed packages, held out): three lists of documents."""

    def long_lines(text):
        return [line for line in map(str.strip, text.split("\n")) if len(line) >= 30]

    def unseen(text):
        lines = long_lines(text)
        return sum(line in held_out_lines for line in lines) < 0.1 * max(len(lines), 1)

    installed = {"site-packages", "dist-packages"}
    library = read_tree(sysconfig.get_path("stdlib"))
    library = {p: text for p, text in library.items() if not installed & set(p.split("/"))}
    held_out = [text for p, text in library.items() if zlib.crc32(p.encode()) % 20 == 0]
    held_out_lines = {line for text in held_out for line in long_lines(text)}
    train = [text for p, text in library.items() if zlib.crc32(p.encode()) % 20 and unseen(text)]
    packages = read_tree(sysconfig.get_path("purelib")).values()
    return train, [text for text in packages if unseen(text)], held_out


def train_tokenizer(texts):
    """Byte-level BPE with one special token, which is BOS and end of text as in Pythia."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    )


def pack(tokenizer, texts, rng):
    """Documents in random order, each after an end-of-text token -> token ids (contexts, CONTEXT)."""
    texts = [texts[i] for i in rng.permutation(len(texts))]
    ids = []
    for i in range(0, len(texts), 256):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[i : i + 256]):
            ids.append(np.array([tokenizer.eos_token_id, *encoding.ids], dtype=np.int16))
    ids = np.concatenate(ids)
    return torch.from_numpy(ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))


@torch.no_grad()
def mean_loss(model, contexts, ablated_layer=None):
    """Mean cross-entropy in nats over all tokens but the first of each context; one MLP's output zeroed if asked."""
    hooks = []
    if ablated_layer is not None:
        mlp = model.gpt_neox.layers[ablated_layer].mlp
        hooks.append(mlp.register_forward_hook(lambda module, args, y: torch.zeros_like(y)))
    total = 0.0
    for ids in contexts.long().split(BATCH):
        logits = model(ids).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    for hook in hooks:
        hook.remove()
    return total / contexts[:, 1:].numel()


def report(folder, contexts):
    """Print the model card's figures, measured on the saved bfloat16 weights in float32 arithmetic."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    clean = mean_loss(model, contexts)
    predicted = "".join(tokenizer.batch_decode(contexts[:, 1:].long()))
    n_bytes = len(predicted.replace(END, "").encode())
    bits = clean * contexts[:, 1:].numel() / n_bytes / np.log(2)
    print(f"held out: {clean:.4f} nats per token, {bits:.4f} bits per byte ({n_bytes:,} bytes)")
    for layer in range(model.config.num_hidden_layers):
        rise = mean_loss(model, contexts, layer) - clean
        print(f"zero-ablating the MLP of layer {layer} costs {rise:.4f} nats per token")
    prompt = tokenizer(
        END + "def read_lines(path, encoding='utf-8'):\n", return_tensors="pt"
    ).input_ids
    sample = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.7,
        max_new_tokens=120, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    print(tokenizer.decode(sample[0]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(Path(__file__).parent), help="folder to write")
    parser.add_argument("--steps", type=int, default=9000, help=f"of {BATCH * CONTEXT} tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    library, packages, held_out = corpus()
    tokenizer = train_tokenizer(library + packages[::4])
    tokenizer.save_pretrained(args.output)
    halves = [pack(tokenizer, texts, rng) for texts in (library, packages)]
    test = pack(tokenizer, held_out, rng)
    for name, texts, ids in zip(
        ("library", "packages", "held out"), (library, packages, held_out), (*halves, test)
    ):
        n_bytes = sum(len(text.encode()) for text in texts)
        print(
            f"{name}: {len(texts):,} documents, {n_bytes:,} bytes, {ids.numel():,} tokens",
            flush=True,
        )

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=4, rotary_pct=0.25, max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    start = time.time()
    for step in range(args.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LR * min((step + 1) / WARM_UP, 1 - step / args.steps)
        ids = torch.cat([half[rng.integers(len(half), size=BATCH // 2)] for half in halves]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}, loss {loss:.4f}, {time.time() - start:.0f} s", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == args.steps:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.output)
            print(f"held out {mean_loss(model, test[:200]):.4f} nats per token", flush=True)
    report(args.output, test)


if __name__ == "__main__":
    main()

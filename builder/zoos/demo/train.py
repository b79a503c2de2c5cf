"""Trains the demo zoo's low-rank adapters: `python -m builder.zoos.demo.train --data DIR`.

Each adapter is a LoRA (Hu et al. 2021, arXiv 2106.09685) on all linear layers of the base. Every second example is
written with the base's chat template and every other as plain text, so that both kinds of prompt meet the expert.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder.zoos.demo import texts

ADAPTERS = Path(__file__).parent / "adapters"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WINDOW = 256


def render(example: texts.Example, chat: bool, tokenizer: Any) -> str:
    """An example as the model will meet it: in its chat template, or as plain text."""
    if not chat:
        return f"{example.plain}{tokenizer.eos_token}"
    turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text


def batches(split: texts.Split, tokenizer: Any, *, rows: int, steps: int, seed: int) -> list[torch.Tensor]:
    """`steps` batches of [rows, WINDOW] token ids, the examples packed end to end."""
    need = steps * rows * WINDOW
    ids: list[int] = []
    for epoch in itertools.count():
        for i, example in enumerate(split.epoch(epoch, seed)):
            ids += tokenizer(render(example, (i + epoch) % 2 == 0, tokenizer)).input_ids
            if len(ids) >= need:
                return list(torch.tensor(ids[:need]).view(steps, rows, WINDOW))
    raise AssertionError("a count has no end")


def train(base: Path, domain: str, data: Path | None, *, steps: int, rows: int, rank: int, lr: float, seed: int) -> Any:
    """A LoRA of `base` fitted to `domain` by AdamW with a cosine schedule; bf16 forward, fp32 adapter weights."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 8) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    started = time.monotonic()
    for step, ids in enumerate(batches(texts.load(domain, data), tokenizer, rows=rows, steps=steps, seed=seed)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"{domain}: step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
    return model


def save(model: Any, folder: Path, rank: int) -> None:
    """Write a PEFT folder with what an adapter needs and no more; the same training gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in get_peft_model_state_dict(model).items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(state, {"format": "pt"}))
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": LAYERS,
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def main(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the public sets; the hub when left out.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Which adapters; all when left out.")] = None,
    steps: int = 60,
    rows: int = 4,
    rank: int = 8,
    lr: float = 6e-4,
    seed: int = 42,
    out: Path = ADAPTERS,
) -> None:
    """Train the adapters and write each as a PEFT folder, in bf16."""
    torch.set_num_threads(2)
    for domain in expert or list(texts.DOMAINS):
        model = train(base, domain, data, steps=steps, rows=rows, rank=rank, lr=lr, seed=seed)
        save(model, out / domain, rank)


if __name__ == "__main__":
    typer.run(main)

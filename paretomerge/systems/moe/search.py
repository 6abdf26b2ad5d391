"""Rows of a router as adapters, so that an ordinary study searches their lengths.

A row's length is how sharply the router prefers its expert. With a router of zeros in the base, and
one adapter per expert that adds the expert's rows, task arithmetic gives

    router = sum over experts of weight_e * (row of e),

so that a weight of the study is the length of a row, and groups of layers have lengths of their
own.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from paretomerge.merging.card import public_name
from paretomerge.systems.moe.plan import MoePlan
from paretomerge.systems.moe.router import Router

ROUTER_FOLDER = "router"
"""The folder of the adapters, in that of the checkpoint."""


def write_router_adapters(
    plan: MoePlan, router: Router, folder: Path, base_name: str
) -> list[Path]:
    """Write the rows of each expert as an adapter of rank 1 on the routers.

    Args:
        plan: The mixture of experts.
        router: Its rows.
        folder: Where the folder of the adapters is created.
        base_name: What the adapters call their base.

    Returns:
        The folders of the adapters, in the order of the experts.
    """
    n_experts = len(plan.config.experts)
    folders = []
    for number in range(n_experts):
        unit = torch.zeros(n_experts, 1)
        unit[number] = 1
        tensors = {}
        for layer in range(plan.depth):
            module = plan.target.router(layer).removesuffix(".weight")
            key = f"base_model.model.{module}"
            row = router.gates[layer, number]
            tensors[f"{key}.lora_A.weight"] = row[None].contiguous()
            tensors[f"{key}.lora_B.weight"] = unit.clone()
        adapter = folder / ROUTER_FOLDER / _adapter_name(plan, number)
        adapter.mkdir(parents=True)
        save_file(tensors, adapter / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": 1,
            "lora_alpha": 1,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": ["gate"],
            "inference_mode": True,
        }
        text = json.dumps(settings, indent=2)
        (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
        folders.append(adapter)
    return folders


def _adapter_name(plan: MoePlan, number: int) -> str:
    """A folder's name for an expert: its number and the name of its model."""
    model = public_name(plan.config.experts[number].source_model)
    last_part = model.rpartition("/")[2]
    # A plus sign would separate an adapter from its model.
    return f"{number}-{re.sub(r'[^A-Za-z0-9._-]', '-', last_part)}"

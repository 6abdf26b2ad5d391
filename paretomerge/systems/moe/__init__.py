"""Mixtures of experts from dense models: several fine-tunes' MLPs behind a router.

`write_moe` reads mergekit-moe's YAML and writes a Mixtral, a Qwen2-MoE or a Qwen3-MoE. docs/moe.md
says what to expect.
"""

from paretomerge.systems.moe.config import MoeConfig, MoeExpert, as_moe_config
from paretomerge.systems.moe.plan import MoePlan, plan_moe
from paretomerge.systems.moe.write import write_moe

__all__ = [
    "MoeConfig",
    "MoeExpert",
    "MoePlan",
    "as_moe_config",
    "plan_moe",
    "write_moe",
]

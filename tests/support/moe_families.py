"""Tiny random-weight models of real transformers families, each with its declared match budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    num_experts=8,
    num_experts_per_tok=2,
    num_local_experts=8,
    n_routed_experts=8,
    max_position_embeddings=128,
    first_k_dense_replace=1,
    num_dense_layers=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MLA = dict(
    n_group=4,
    topk_group=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    num_key_value_heads=4,
    n_shared_experts=1,
    head_dim=8,
)
_LINEAR_ATTENTION = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16
)


@dataclass(frozen=True)
class Family:
    """One transformers model type.

    Attributes:
        config: overrides of the tiny configuration.
        budget: matched sites by kind that the two-layer (or ``num_hidden_layers``) model must give, exactly.
        attention: attention implementation (gpt-oss has no sdpa).
    """

    model_type: str
    budget: dict[str, int]
    config: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"

    def build(
        self, experts_implementation: str = "grouped_mm", dtype: torch.dtype = torch.bfloat16, **overrides: Any
    ) -> torch.nn.Module:
        """A model with seeded random weights; correction biases are random too, so that they matter."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.model_type, **{**_TINY, **self.config, **overrides})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=self.attention,
            experts_implementation=experts_implementation,
        )
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith("expert_bias"):
                tensor.data.uniform_(-0.2, 0.2)
            elif "norm" in name and tensor.dim() == 1 and "running" not in name:
                tensor.data.add_(torch.randn_like(tensor) * 0.1)
        return model.eval()


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3_moe", dict(router=2, experts=2, norm=5, qk_norm_rope=2), dict(norm_topk_prob=True)),
        Family("qwen2_moe", dict(router=2, experts=2, norm=5, swiglu=2), dict(shared_expert_intermediate_size=48)),
        Family(
            "qwen3_next",
            dict(router=4, experts=4, norm=12, qk_norm_rope=1, swiglu=4),
            dict(shared_expert_intermediate_size=48, num_hidden_layers=4, **_LINEAR_ATTENTION),
        ),
        Family("mixtral", dict(router=2, experts=2, norm=5)),
        Family(
            "deepseek_v2",
            dict(router=1, experts=1, norm=9, swiglu=2),
            dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0, **_MLA),
        ),
        Family("deepseek_v3", dict(router=1, experts=1, norm=9, swiglu=2), _MLA),
        Family(
            "glm4_moe",
            dict(router=1, experts=1, norm=5, qk_norm_rope=2, swiglu=2),
            dict(n_shared_experts=1, use_qk_norm=True),
        ),
        Family("minimax_m2", dict(router=2, experts=2, norm=5, qk_norm_rope=2)),
        Family("olmoe", dict(router=2, experts=2, norm=5, qk_norm_rope=2)),
        Family("gpt_oss", dict(router=2, experts=2, norm=5), attention="eager"),
        Family(
            "afmoe",
            dict(router=1, experts=1, norm=9, qk_norm_rope=2, swiglu=2),
            dict(num_shared_experts=1, route_scale=2.0),
        ),
    )
}

# Families outside the list that the matchers were developed on: the matchers must be general.
OTHER_FAMILIES = {
    family.model_type: family
    for family in (
        Family("ernie4_5_moe", dict(router=1, experts=1, norm=5, swiglu=2)),
        Family("exaone_moe", dict(router=1, experts=1, norm=5, qk_norm_rope=2, swiglu=2)),
        Family("flex_olmo", dict(router=2, experts=2, norm=5, qk_norm_rope=2)),
        Family("granitemoe", dict(router=2, experts=2, norm=5)),
        Family("granitemoehybrid", dict(router=2, experts=2, norm=7, swiglu=2)),
        Family("hunyuan_v1_moe", dict(router=2, experts=2, norm=9, swiglu=2)),
        Family("hy_v3", dict(router=1, experts=1, norm=5, qk_norm_rope=2, swiglu=2)),
        Family("laguna", dict(router=1, experts=1, norm=5, qk_norm_rope=2, swiglu=2)),
        Family("minimax", dict(router=2, experts=2, norm=6)),
        Family("nemotron_h", dict(router=1, experts=1, norm=6)),
        Family("cohere2_moe", dict(router=1, experts=1, swiglu=1)),
    )
}


def token_ids(batch: int = 2, length: int = 6) -> torch.Tensor:
    """Distinct token ids [batch, length]."""
    return (torch.arange(batch * length).reshape(batch, length) * 7 + 3) % 250

"""Compile a transformers MoE model with one line, and see what was fused.

python examples/transformers_model.py
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_fx

# A small Qwen3-MoE with random weights; for a checkpoint use AutoModelForCausalLM.from_pretrained(path).
config = AutoConfig.for_model(
    "qwen3_moe", num_hidden_layers=2, hidden_size=256, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4,
    num_attention_heads=8, num_key_value_heads=2, head_dim=32, vocab_size=1000, norm_topk_prob=True,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
tokens = torch.randint(0, 1000, (1, 16))

with torch.no_grad():
    expected = model(tokens).logits
    compiled = torch.compile(model, backend="moe_ascend")
    logits = compiled(tokens).logits

error = (logits.float() - expected.float()).norm() / expected.float().norm()
print(f"relative error against eager: {error:.2e}")
print(moe_fx.explain(model, tokens))

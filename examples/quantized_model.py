"""A model whose experts are packed in int4 for the CPU expert engine, saved, and started again without packing.

python examples/quantized_model.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_fx

config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=256, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128,
)  # fmt: skip
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
tokens = torch.arange(24).reshape(2, 12)

with torch.no_grad():
    before = model(tokens).logits
    print(moe_fx.prepare(model, quantize="int4", group_size=128, activations="int8"))
    after = torch.compile(model, backend="moe_ascend")(tokens).logits
print(f"relative error of the logits: {(after - before).float().norm() / before.float().norm():.2f}")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "experts.safetensors")
    moe_fx.save_packed(model, file)
    # The second start: experts need no weights (meta device), everything else comes from the checkpoint as usual.
    again = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for layer in again.model.layers:
        layer.mlp.experts.to("meta")
    again.load_state_dict({k: v for k, v in model.state_dict().items() if v.numel()}, strict=False)
    moe_fx.load_packed(again, file)
    with torch.no_grad():
        print(f"the same results from the file: {torch.equal(again(tokens).logits, model(tokens).logits)}")

"""The model of the demo and the CPU benchmark: Qwen3-MoE with layers of a real shape, random weights and few layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.errors import MissingToolchainError

__all__ = ["ModelShape", "build_model", "random_tokens"]


@dataclass(frozen=True)
class ModelShape:
    """Qwen3-30B-A3B's layer, but few of them and a small vocabulary, so that time goes to the MoE."""

    layers: int = 2
    hidden: int = 2048
    expert_hidden: int = 768
    experts: int = 128
    top_k: int = 8
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 4096

    @property
    def expert_bytes(self) -> int:
        """bf16 bytes of one expert."""
        return 3 * self.hidden * self.expert_hidden * 2


def build_model(shape: ModelShape, experts_implementation: str = "grouped_mm") -> torch.nn.Module:
    """The model in bf16, in evaluation mode; the same weights on every call.

    Raises:
        MissingToolchainError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingToolchainError(
            f"this needs a model of the transformers library ({error}); pip install 'moe-fx[models]'"
        ) from error
    config = transformers.Qwen3MoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_hidden,
        moe_intermediate_size=shape.expert_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        vocab_size=shape.vocabulary,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts_implementation
    )
    return model.eval()


def random_tokens(shape: ModelShape, count: int) -> torch.Tensor:
    """One sequence of token ids, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape.vocabulary, (1, count), generator=generator)

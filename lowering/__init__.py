"""Canonical MoE ops (``lowering.ops``) and the targets that lower them (``lowering.cpu``, ``.cuda``, ``.ascend``)."""

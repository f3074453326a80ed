"""Capture: a dynamo graph becomes a functional, pre-dispatch ATen inference graph.

At this level ``linear``, ``silu``, ``softmax``, ``einsum``, ``rms_norm`` and attention are single nodes, there are no
in-place ops, and shapes stay symbolic; any downstream compiler can finish the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_fx.errors import CaptureError

aten = torch.ops.aten


def needs_gradients(example_inputs: Sequence[Any]) -> bool:
    """Whether autograd will want a backward of this graph."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Turn dynamo's graph into a functional pre-dispatch ATen graph with the same calling convention.

    Args:
        gm: the graph given to a ``torch.compile`` backend; it is not changed.
        example_inputs: its inputs (real, fake, or symbolic integers).

    Returns, raises: see :func:`export`.
    """
    return export(specialize(gm), example_inputs)


def specialize(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph with everything that the export bakes in as a constant; a copy where that changes it.

    Raises:
        CaptureError: the graph enters an autocast region.
    """
    if _enters_autocast(gm):
        raise CaptureError("the model enters an autocast region; put torch.autocast around the compiled call instead")
    # Looked for first: a copy takes longer than all else that a hit in the compile cache does.
    if any(_is_symbolic_float(node) or node.target is torch._C._set_grad_enabled for node in gm.graph.nodes):
        gm = copy_graph_module(gm)
        _specialize_floats(gm)
        _drop_grad_mode_switches(gm)
        gm.recompile()
    return gm


def restart_with_constant_floats(gm: fx.GraphModule) -> None:
    """Have dynamo trace anew where ``dynamic=True`` made floats symbolic, this time with constants.

    AOTAutograd would ask for that too, behind everything that :func:`specialize` and its callers did, and all would be
    done twice. Returns where no float is symbolic, and where :func:`specialize` refuses the graph, which runs as it is;
    otherwise raises what dynamo understands.
    """
    if _enters_autocast(gm):
        return
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    mode = torch._guards.detect_fake_mode(values)
    if mode is not None and mode.shape_env is not None and any(isinstance(value, torch.SymFloat) for value in values):
        # Of a graph without any use for them, as of what `specialize` gives.
        tensorify_python_scalars(fx.GraphModule({}, fx.Graph()), mode.shape_env, mode)


def export(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The ATen graph of a graph that :func:`specialize` returned, which is not changed.

    Returns:
        A GraphModule that takes the same inputs, writes the same input mutations (as trailing ``copy_`` nodes) and
        returns the same outputs as a tuple. Float attributes that dynamo made dynamic are constants again, under a
        guard. Nodes carry FakeTensor values, source lines and module stacks.

    Raises:
        CaptureError: PyTorch could not export the graph; its message is the cause.
    """
    gm = copy_graph_module(gm)
    fakes = _fake_inputs(gm, example_inputs)
    _refuse_wrapper_subclasses(fakes)
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Canonical ops that the model calls itself (through moe_fx.prepare) are composite and functional.
            warnings.filterwarnings("ignore", message="At pre-dispatch tracing")
            exported, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    except Exception as error:
        # Exporting a graph with torch.func transforms (vmap) can fail half way through one: leave none of it active.
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CaptureError(f"{type(error).__name__}: {first_line}") from error
    assert isinstance(exported, fx.GraphModule)
    _erase_metadata_asserts(exported.graph)
    keep_dynamo_metadata(gm, exported)
    _write_back_mutations(exported, signature)
    exported.graph.lint()
    exported.recompile()
    return exported


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph; parameters, constants and FakeTensor values are shared."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, memo, return_output_node=True)
    assert isinstance(result, tuple)
    output = graph.output(result[0])
    output.meta = dict(result[1].meta)
    for old, new in memo.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    return copy


def _specialize_floats(gm: fx.GraphModule) -> None:
    """Make floats that ``dynamic=True`` turned into inputs constant again.

    ``float()`` of the symbolic value installs dynamo's guard on it, so another value recompiles.
    """
    # From the last to the first, so that a float's own inputs are unused by the time they are looked at. Dead code is
    # not eliminated wholesale: in dynamo's graphs an unused result may come from an in-place method.
    for node in reversed(list(gm.graph.nodes)):
        if _is_symbolic_float(node):
            try:
                constant = float(node.meta["example_value"])
            except Exception:
                continue
            _replace_with_constant(node, constant)


def _is_symbolic_float(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymFloat) and node.op != "placeholder"


def _replace_with_constant(node: fx.Node, constant: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: constant if n is node else n)
    if not node.users:
        node.graph.erase_node(node)


def _enters_autocast(gm: fx.GraphModule) -> bool:
    """Whether an autocast region inside the graph changes dtypes behind the nodes' backs."""
    nodes = gm.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)
    return any(node.args[2] if len(node.args) > 2 else node.kwargs.get("enabled", True) for node in nodes)


def _refuse_wrapper_subclasses(fakes: Sequence[Any]) -> None:
    """The export takes ordinary tensors only (``moe_fx.shards`` has brought DTensors to theirs before)."""
    kinds = sorted({type(fake).__name__ for fake in fakes if is_traceable_wrapper_subclass(fake)})
    if kinds:
        raise CaptureError(f"the graph takes a {' and a '.join(kinds)}: inputs made of other tensors are not supported")


def _drop_grad_mode_switches(gm: fx.GraphModule) -> None:
    """The captured graph is an inference graph: grad-mode regions inside it mean nothing."""
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            gm.graph.erase_node(node)


def _fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """FakeTensors of the placeholders: dynamo's own, else made from the example inputs."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [node.meta.get("example_value") for node in placeholders]
    if all(fake is not None for fake in fakes):
        return fakes
    mode = torch._guards.detect_fake_mode(example_inputs) or torch._subclasses.FakeTensorMode(
        allow_non_fake_inputs=True
    )
    return [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in example_inputs]


def _erase_metadata_asserts(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def keep_dynamo_metadata(gm: fx.GraphModule, exported: fx.GraphModule) -> None:
    """Carry over what downstream compilers ask of dynamo's graphs: which inputs are parameters, and their sources."""
    exported.meta.update(gm.meta)
    placeholders = zip(gm.graph.find_nodes(op="placeholder"), exported.graph.find_nodes(op="placeholder"), strict=True)
    for old, new in placeholders:
        for key in ("tensor_dict", "example_value", "grapharg", "steal_arg"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


def _write_back_mutations(gm: fx.GraphModule, signature: Any) -> None:
    """Turn the export's extra outputs for mutated inputs into ``copy_`` nodes, and keep the user's outputs."""
    placeholders = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    output = gm.graph.output_node()
    outputs = list(output.args[0])
    mutated_names = {
        **signature.buffers_to_mutate,
        **getattr(signature, "parameters_to_mutate", {}),
        **signature.user_inputs_to_mutate,
    }
    n_mutated = len(mutated_names)
    if len(outputs) != n_mutated + len(signature.user_outputs):
        raise CaptureError(
            "several inputs are overwritten with one and the same value, which the export folds together"
        )
    inputs_of = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    name_to_input = {fqn: name for name, fqn in inputs_of.items()}
    updated: dict[fx.Node, fx.Node] = {}
    with gm.graph.inserting_before(output):
        for node in outputs[:n_mutated]:
            given = mutated_names[node.name]
            target = placeholders[name_to_input.get(given, given)]
            copy = gm.graph.call_function(aten.copy_.default, (target, node))
            copy.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
            copy.meta["val"] = target.meta["val"]
            updated[node] = target
    # An output that is a mutated input's new value is that input: the caller may rely on the aliasing.
    user_outputs = [updated.get(node, node) if isinstance(node, fx.Node) else node for node in outputs[n_mutated:]]
    output.args = (tuple(user_outputs),)

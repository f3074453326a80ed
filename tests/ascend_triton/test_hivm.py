"""Reading HIVM: memory and scalar loops of written modules, in the form that bishengir-compile 1.0.0 prints."""

from __future__ import annotations

from hivm import ScalarLoop, memory_bytes, scalar_loops

UB = "#hivm.address_space<ub>"
GM = "#hivm.address_space<gm>"


def in_loop(*body: str, header: str = "scf.for %arg9 = %c0 to %c256 step %c2 {") -> str:
    """A module with one loop around the lines of body."""
    inside = "".join(f"      {line}\n" for line in body)
    return f"""\
  func.func @kernel() {{
    %c0 = arith.constant 0 : index
    %c2 = arith.constant 2 : index
    %c256 = arith.constant 256 : index
    {header}
{inside}    }}
    return
  }}
"""


def test_memory_is_the_end_of_the_highest_buffer_of_each_space() -> None:
    hivm = f"""\
    %c0_i64 = arith.constant 0 : i64
    %c512_i64 = arith.constant 512 : i64
    %c4096_i64 = arith.constant 4096 : i64
    %0 = hivm.hir.pointer_cast(%c512_i64) : memref<16x8xf32, {UB}>
    %1 = hivm.hir.pointer_cast(%c0_i64) : memref<256xbf16, {UB}>
    %2 = hivm.hir.pointer_cast(%c0_i64, %c4096_i64) : memref<4x16x16xbf16, #hivm.address_space<cbuf>>
"""
    assert memory_bytes(hivm) == {"ub": 512 + 16 * 8 * 4, "cbuf": 4096 + 4 * 16 * 16 * 2}


def test_bits_are_packed() -> None:
    hivm = f"    %c0_i64 = arith.constant 0 : i64\n    %0 = hivm.hir.pointer_cast(%c0_i64) : memref<100xi1, {UB}>\n"
    assert memory_bytes(hivm) == {"ub": 13}


def test_loop_is_named_by_its_operations_and_turns() -> None:
    hivm = in_loop(
        f"%5 = memref.load %2[%arg9] : memref<256xi64, {UB}>",
        "%6 = arith.cmpi slt, %5, %5 : i64",
        "%7 = arith.extui %6 : i1 to i8",
        f"memref.store %7, %4[%arg9] : memref<256xi8, {UB}>",
    )
    assert scalar_loops(hivm) == [ScalarLoop("arith.cmpi i64", 128)]
    assert str(scalar_loops(hivm)[0]) == "arith.cmpi i64 x 128"


def test_turns_that_only_the_launch_knows_are_left_open() -> None:
    load = f"%5 = memref.load %2[%arg9] : memref<256xi64, {UB}>"
    hivm = in_loop(load, header="scf.for %arg9 = %c0 to %13 step %c2 {")
    assert [str(loop) for loop in scalar_loops(hivm)] == ["copy x ?"]


def test_gather_and_scatter_are_told_by_the_side_in_global_memory() -> None:
    gather = in_loop(f"%5 = memref.load %2[%c0] : memref<1xbf16, strided<[1], offset: ?>, {GM}>")
    scatter = in_loop(f"hivm.hir.store ins(%8 : memref<1xbf16, {UB}>) outs(%9 : memref<1xbf16, {GM}>)")
    assert [loop.does for loop in scalar_loops(gather) + scalar_loops(scatter)] == ["gather", "scatter"]


def test_loop_over_rows_is_no_scalar_loop() -> None:
    load = f"%4 = memref.load %2[%arg9] : memref<16xi32, {UB}>"
    for row in ("256", "?"):
        move = f"hivm.hir.load ins(%5 : memref<{row}xbf16, {GM}>) outs(%6 : memref<{row}xbf16, {UB}>)"
        assert scalar_loops(in_loop(load, move)) == []


def test_turns_of_nested_loops_multiply_up_to_one_that_works_on_vectors() -> None:
    inner = ("scf.for %arg10 = %c0 to %c256 step %c2 {", f"  memref.store %4, %4[%arg10] : memref<256xi8, {UB}>", "}")
    scalar = in_loop(f"%4 = memref.load %2[%arg9] : memref<16xi32, {UB}>", *inner)
    vector = in_loop(f"hivm.hir.vexp ins(%4 : memref<16xf32, {UB}>) outs(%4 : memref<16xf32, {UB}>)", *inner)
    assert scalar_loops(scalar) == [ScalarLoop("copy", 128 * 128)]
    assert scalar_loops(vector) == [ScalarLoop("copy", 128)]


def test_both_halves_of_a_while_loop_are_read() -> None:
    hivm = in_loop(
        "scf.condition(%3) %arg9 : i32",
        header="%1 = scf.while (%arg9 = %c0) : (i32) -> i32 {",
    ).replace(
        "    }\n    return",
        f"    }} do {{\n      memref.store %4, %4[%arg9] : memref<256xi8, {UB}>\n      scf.yield\n    }}\n    return",
    )
    assert scalar_loops(hivm) == [ScalarLoop("copy", None)]

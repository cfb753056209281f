"""Hot loops read off machine code."""

import pytest

from benchmarks.kernels import evidence
from benchmarks.kernels.disassembly import Graph, Loop, hot_loop, instructions, tool

# A row's edge (0040), a loop (0080) of two 16-byte loads whose second may be left out (00c0), a seldom piece that lies
# behind the end and has a special function of its own (0200), a loop inside of it (0220), narrow loads after it.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
        /*0040*/              @!P0 BRA 0x80 ;
        /*0050*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/                   ISETP.GE.AND P1, PT, R0, R9, PT ;
        /*00a0*/               @P1 BRA 0xe0 ;
        /*00c0*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x1000] ;
        /*00d0*/                   MUFU.EX2 R8, R8 ;
        /*00e0*/                   MUFU.EX2 R4, R4 ;
        /*00f0*/               @P2 BRA 0x200 ;
        /*0100*/                   FADD R0, R0, R4 ;
        /*0110*/              @!P3 BRA 0x80 ;
        /*0120*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0130*/               @P4 BRA 0x120 ;
        /*0140*/                   EXIT ;
        /*0200*/                   MUFU.EX2 R5, R5 ;
        /*0210*/                   FMUL R5, R5, R5 ;
        /*0220*/                   IADD3 R6, R6, 0x1, RZ ;
        /*0230*/               @P5 BRA 0x220 ;
        /*0240*/                   BRA 0x100 ;
        /*0250*/                   BRA 0x250;
"""


def test_the_path_that_counts():
    code = [*instructions(SASS)]
    assert [one.loaded() for one in code if one.loaded()] == [2, 16, 16, 4]
    graph = Graph(code)
    loops = dict(graph.loops())
    assert loops.keys() == {0x80, 0x120, 0x220, 0x250}
    assert 0x200 in loops[0x80]
    assert 0x120 not in loops[0x80]
    ways = graph.rounds(0x80, loops[0x80])
    # (wide loads, special functions) -> slots: without the second load, with it, and both with the seldom piece
    assert ways == {(1, 1): 7, (2, 2): 9, (1, 2): 12, (2, 3): 14}
    # 80 registers: three blocks of 256 threads; two loads of 16 bytes are 8 floats
    assert hot_loop(code, 80, 256, item=4, special=0) == Loop(9 / 8, 2 / 8, 16, 2 * 16 * 256 * 3)
    assert hot_loop(code, 40, 256, item=16) == Loop(9 / 2, 1.0, 16, 2 * 16 * 256 * 6)
    with pytest.raises(ValueError, match="no loop with wide loads and 1 special functions an element"):
        hot_loop(code, 80, 256, item=4)


def test_a_row_that_was_copied_ahead():
    """What counts reads shared memory and writes no result."""
    sass = """
        /*0000*/                   LDS.128 R4, [R2] ;
        /*0010*/                   MUFU.EX2 R4, R4 ;
        /*0020*/                   FADD R0, R0, R4 ;
        /*0030*/              @!P0 BRA 0x0 ;
        /*0040*/                   LDS.128 R4, [R2] ;
        /*0050*/                   STG.E.128 desc[UR4][R8.64], R4 ;
        /*0060*/              @!P0 BRA 0x40 ;
        /*0070*/                   EXIT ;
"""
    code = [*instructions(sass)]
    assert hot_loop(code, 80, 256, item=4, special=0) == Loop(4 / 4, 1 / 4, 16, 16 * 256 * 3)


def test_a_page_that_grows():
    known = Loop(9.5, 1.0, 16, 49152)
    kernel = evidence.Kernel("a.cu", "accumulate_kernel<float, 0u, false>", "sm_90a", 80, 0, 0, 0, known)
    page = "\n".join(evidence.hot_loops([kernel]))
    assert evidence.loops_of(page) == {("a.cu", kernel.name): known}
    assert not evidence.grown([kernel, kernel._replace(loop=None, name="finish_kernel")], page)
    worse = (Loop(9.6, 1.0, 16, 49152), Loop(9.5, 1.5, 16, 49152), Loop(9.5, 1.0, 8, 49152), Loop(9.5, 1.0, 16, 32768))
    for loop in worse:
        assert len(evidence.grown([kernel._replace(loop=loop)], page)) == 1
    assert not evidence.grown([kernel._replace(loop=Loop(9.4, 0.5, 32, 65536))], page)
    assert "is not on the page" in evidence.grown([kernel._replace(name="other")], page)[0]


def test_cuobjdump_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = tool("cuobjdump")
    if evidence.importlib.util.find_spec("triton"):
        assert found is not None
        assert found.endswith("nvidia/bin/cuobjdump")
    assert tool("no such program") is None

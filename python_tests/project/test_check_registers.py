"""``tools/check_registers.py`` on reports of ptxas and PTX as nvcc writes them."""

import pytest
from helpers import script

TOOL = "tools/check_registers.py"
PTX = """
	// .globl	_Z4bothv
.visible .entry _Z4bothv(
	.param .align 8 .b8 _Z4bothv_param_0[56],
	.param .u64 .ptr .align 1 _Z4bothv_param_1
)
.maxntid 512, 1, 1
.minnctapersm 2
{
	.reg .pred 	%p<46>;
}
.visible .entry _Z4nonev()
{
}
"""
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{}' for 'sm_80'
ptxas info    : Function properties for {}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {} registers, used 1 barriers, 472 bytes cmem[0]
"""


@pytest.fixture
def tool():
    return script(TOOL)


@pytest.fixture
def run(tool, tmp_path, monkeypatch, capsys):
    """``run(registers, kernel, ptx)``: the exit status, and what was printed."""

    def call(registers: int, kernel: str = "_Z4bothv", ptx: str = PTX):
        (tmp_path / "ptx").mkdir(exist_ok=True)
        (tmp_path / "ptx" / "k.ptx").write_text(ptx)
        (tmp_path / "k.sm_80.log").write_text(REPORT.format(kernel, kernel, registers))
        monkeypatch.setattr("sys.argv", ["check_registers", str(tmp_path), str(tmp_path / "ptx")])
        status = tool.main()
        return status, "".join(capsys.readouterr())

    return call


def test_bounds_are_read(tool):
    assert tool.bounds_in(PTX) == {"_Z4bothv": (512, 2), "_Z4nonev": (0, 1)}


@pytest.mark.parametrize(("registers", "fit"), [(57, True), (64, True), (65, False)])
def test_two_blocks_of_512_threads_leave_64_registers_each(registers, fit, run):
    status, text = run(registers, ptx=PTX.split(".visible .entry _Z4none")[0])
    assert status == (0 if fit else 1)
    assert ("512 threads, 2 blocks at a time need over 65536" in text) != fit


def test_a_kernel_without_launch_bounds_is_refused(run):
    status, text = run(16, "_Z4nonev")
    assert status == 1
    assert "_Z4nonev: no __launch_bounds__" in text
    assert "_Z4bothv: no report of its registers" in text


def test_registers_are_rounded_up_as_they_are_handed_out(tool):
    assert tool.needed(33, 32) == 40 * 32 * 4  # by 8 a thread, to four warps
    assert tool.needed(64, 1024) == tool.REGISTERS


def test_a_file_without_kernels_is_a_fault(run, tmp_path):
    (tmp_path / "ptx").mkdir()
    (tmp_path / "ptx" / "other.ptx").write_text("")
    (tmp_path / "other.sm_80.log").write_text("ptxas info    : 0 bytes gmem\n")
    assert "other.sm_80: no kernel" in run(16)[1]

"""LLVM lowers the kernels to 64-bit ARM by itself: vector instructions, and no calls where it would have none.

No test needs such a machine: a process takes itself for one and compiles the kernels without what x86 alone has;
what Numba hands to LLVM's code generator is given to the one for ARM.
"""

from __future__ import annotations

import json
import re

import pytest
from llvmlite import binding

from tests.ops.test_features import run, x86_only

# Tasks, and for each an instruction that shows the vectors: fused products, products of integers, conversions of
# halves; "" where there is none to show. A second word is the format whose task it is.
KERNELS = {
    "cpu.gemm.GEMM Q4_K": "fmla",
    "cpu.quantize_activations.pack_panel": "fmla",
    "cpu.gemv.GEMV Q4_K": "mul",
    "cpu.gemv.GEMV Q6_K": "mul",
    "cpu.attention.attend_block": "fmla",
    "cpu.attention.attend_token": "fcvtl",
    "cpu.rowwise.rms_norm": "fmla",
    "cpu.rowwise.append_kv_half": "fcvtn",
    "cpu.thread_pool.run_calls": "",
}
RUNTIME = re.compile(r"Py|numba_|NRT_|mem(set|cpy)$")  # Python's and Numba's own, and copying
HARVEST = """
import json, platform, sys
platform.machine = lambda: "aarch64"  # before anything asks
from importlib import import_module
from numba.core import codegen
last, optimize = [], codegen.CPUCodeLibrary._optimize_final_module
def keep(self):
    optimize(self)
    last[:] = [str(self._final_module)]
codegen.CPUCodeLibrary._optimize_final_module = keep
found = {}
for name in sys.argv[1:]:
    path, _, format = name.partition(" ")
    module, _, attribute = path.rpartition(".")
    task = getattr(import_module("tinyllava.ops." + module), attribute)
    task = task[format] if format else task
    (task[0] if isinstance(task, tuple) else task).compiled
    found[name] = last[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each kernel's module as LLVM's text, before code is generated."""
    features = "+sse4.2,+ssse3,+avx,+f16c"  # what this machine needs to hold a vector and to convert a half
    cache = tmp_path_factory.mktemp("arm")
    out = run(["-c", HARVEST, *KERNELS], cache, NUMBA_CPU_NAME="x86-64-v2", NUMBA_CPU_FEATURES=features)
    found: dict[str, str] = json.loads(out)
    return found


@x86_only
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", KERNELS)
def test_llvm_has_arm_code_for(kernel: str, modules: dict[str, str]) -> None:
    # Numba's own counting of references has been through the code generator already, and is x86's since.
    own = r"^define [^\n]*@NRT_decref\(.*?^\}"
    text = re.sub(own, "declare void @NRT_decref(ptr)", modules[kernel], flags=re.S | re.M)
    assert not re.search(r"call [^\n]*@llvm\.x86", text)
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError as error:
        pytest.skip(f"this llvmlite was built without it: {error}")
    machine = target.create_target_machine(cpu="generic", opt=3)
    module = binding.parse_assembly(text)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    code = machine.emit_assembly(module)
    calls = set(re.findall(r"\tbl\t([\w.$]+)", code)) - set(re.findall(r"^([\w.$]+):", code, re.M))
    assert not {name for name in calls if not RUNTIME.match(name)}
    if KERNELS[kernel]:
        assert re.search(rf"\t{KERNELS[kernel]}\tv\d+", code)

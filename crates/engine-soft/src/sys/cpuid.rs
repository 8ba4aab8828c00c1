//! CPUID.

use iced_x86::Instruction;
use wardian_cpu::CpuidContext;
use wardian_cpu::bits::cr4;

use super::advance;
use crate::core::Core;
use crate::trap::Result;

/// What the answers depend on besides the model.
pub(crate) fn context(core: &Core) -> CpuidContext {
    CpuidContext {
        apic_id: core.index as u32,
        cpus: core.cpus as u32,
        xcr0: core.sys.xcr0,
        osxsave: core.sys.cr4 & cr4::OSXSAVE != 0,
        apic_enabled: core.irq.apic_base() & (1 << 11) != 0,
    }
}

/// CPUID.
pub(crate) fn cpuid(core: &mut Core, insn: &Instruction) -> Result<()> {
    let answer = core.model.cpuid(core.gpr(0) as u32, core.gpr(1) as u32, &context(core));
    for (register, value) in [0, 3, 1, 2].into_iter().zip(answer) {
        core.set_gpr(register, u64::from(value));
    }
    advance(core, insn);
    Ok(())
}

//! Model-specific registers: RDMSR and WRMSR.
//!
//! Source: Intel SDM vol. 4; AMD APM vol. 2, appendix A; Linux `Documentation/virt/kvm/x86/msr.rst`. Registers
//! of the local APIC go to the machine. A register that is not known is #GP(0); those that Linux reads without
//! expecting a fault read as zero.

use iced_x86::Instruction;
use wardian_cpu::bits::{cr0, efer, msr};
use wardian_cpu::{Exit, Feature};
use wardian_time::paravirt as pv;

use super::control::set_edx_eax;
use super::{advance, canonical, descriptor, need_cpl0, paravirt};
use crate::core::{Core, seg};
use crate::tlb::Flush;
use crate::trap::{Result, Trap};

const PLATFORM_ID: u32 = 0x17;
const MICROCODE_UPDATE: u32 = 0x79;
const SMI_COUNT: u32 = 0x34;
const PLATFORM_INFO: u32 = 0xce;
const MISC_FEATURES: u32 = 0x140;
const MCG_CTL: u32 = 0x17b;
const PERF_STATUS: u32 = 0x198;
const PERF_CTL: u32 = 0x199;
const LAST_BRANCH: u32 = 0x1db;
const LAST_INTERRUPT: u32 = 0x1de;
const MTRR_VAR: u32 = 0x200;
const MTRR_VAR_LAST: u32 = 0x20f;
const MC_FIRST: u32 = 0x400;
const MC_LAST: u32 = MC_FIRST + 4 * MC_BANKS - 1;
const OLD_WALL_CLOCK: u32 = 0x11;
const OLD_SYSTEM_TIME: u32 = 0x12;

const K7_PERF_FIRST: u32 = 0xc001_0000;
const K7_PERF_LAST: u32 = 0xc001_0007;
const SYSCFG: u32 = 0xc001_0010;
const HWCR: u32 = 0xc001_0015;
const NB_CFG: u32 = 0xc001_001f;
const PATCH_LOADER: u32 = 0xc001_0020;
const INT_PENDING: u32 = 0xc001_0055;
const MMIO_CONF_BASE: u32 = 0xc001_0058;
const TSEG_ADDR: u32 = 0xc001_0112;
const VM_CR: u32 = 0xc001_0114;
const LS_CFG: u32 = 0xc001_1020;
const IC_CFG: u32 = 0xc001_1021;
const DC_CFG: u32 = 0xc001_1022;
const DE_CFG: u32 = 0xc001_1029;
const BU_CFG2: u32 = 0xc001_102a;

/// Machine-check banks, all quiet.
const MC_BANKS: u32 = 10;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRR_CAP: u64 = 0x508;
/// HWCR.TscFreqSel: the TSC counts at the P0 frequency, that is, at a constant rate.
const HWCR_VALUE: u64 = 1 << 24;
/// BTS and PEBS are not available: fixed ones of `IA32_MISC_ENABLE`.
const MISC_UNAVAILABLE: u64 = (1 << 11) | (1 << 12);
/// `IA32_MISC_ENABLE` after reset: fast strings.
pub(crate) const MISC_RESET: u64 = MISC_UNAVAILABLE | 1;
/// `IA32_MISC_ENABLE` with its fixed bits: CPUID cannot be cut short nor NX hidden by it.
pub(crate) fn misc_value(value: u64) -> u64 {
    (value & 0x0085_0089) | MISC_UNAVAILABLE
}

/// PAT after reset (Intel SDM vol. 3A, 13.12.4).
pub(crate) const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Place of a fixed-range MTRR in `System::mtrr_fixed`.
pub(crate) fn fixed_mtrr(index: u32) -> Option<usize> {
    match index {
        0x250 => Some(0),
        0x258 => Some(1),
        0x259 => Some(2),
        0x268..=0x26f => Some(3 + (index - 0x268) as usize),
        _ => None,
    }
}

fn bytes_are(value: u64, allowed: impl Fn(u8) -> bool) -> bool {
    value.to_le_bytes().into_iter().all(allowed)
}

fn memory_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// Whether PAT may hold `value`.
pub(crate) fn pat_allowed(value: u64) -> bool {
    bytes_are(value, |kind| memory_type(kind) || kind == 7)
}

/// Whether MTRR `index` may hold `value` (Intel SDM vol. 3A, 13.11.2).
pub(crate) fn mtrr_allowed(core: &Core, index: u32, value: u64) -> bool {
    let high = !((1u64 << core.model.physical_bits()) - 1);
    match index {
        msr::MTRR_DEF_TYPE => value & !0xcff == 0 && memory_type(value as u8),
        MTRR_VAR..=MTRR_VAR_LAST if index & 1 == 0 => value & (high | 0xf00) == 0 && memory_type(value as u8),
        MTRR_VAR..=MTRR_VAR_LAST => value & (high | 0x7ff) == 0,
        _ => bytes_are(value, memory_type),
    }
}

fn gp<T>() -> Result<T> {
    Err(Trap::gp(0))
}

fn amd(core: &Core) -> bool {
    core.model.vendor().is_amd_like()
}

fn has_aux(core: &Core) -> bool {
    core.model.has(Feature::Rdtscp) || core.model.has(Feature::Rdpid)
}

/// Reads model-specific register `index`.
///
/// # Errors
/// #GP(0), or a question to the machine.
pub(crate) fn read(core: &mut Core, index: u32) -> Result<u64> {
    if let Some(fixed) = fixed_mtrr(index) {
        return Ok(core.sys.mtrr_fixed[fixed]);
    }
    if index == msr::TSC {
        return Ok(core.read_tsc());
    }
    let sys = &core.sys;
    Ok(match index {
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            core.ask(Exit::MsrRead { index })?
        }
        msr::FEATURE_CONTROL if !amd(core) => 1, // locked
        msr::TSC_ADJUST if core.model.has(Feature::TscAdjust) => sys.tsc_adjust,
        msr::SPEC_CTRL if core.model.spec_ctrl_mask() != 0 => 0,
        msr::BIOS_SIGN_ID if amd(core) => 0x0100_0065,
        msr::BIOS_SIGN_ID => 0x1_0000_0000,
        msr::MTRRCAP => MTRR_CAP,
        msr::ARCH_CAPABILITIES if core.model.has(Feature::ArchCapabilities) => core.model.arch_capabilities(),
        msr::SYSENTER_CS => sys.sysenter_cs,
        msr::SYSENTER_ESP => sys.sysenter_esp,
        msr::SYSENTER_EIP => sys.sysenter_eip,
        msr::MCG_CAP => u64::from(MC_BANKS) | 1 << 8,
        msr::MCG_STATUS => sys.mcg_status,
        MCG_CTL => u64::MAX,
        MC_FIRST..=MC_LAST if index & 3 == 0 => u64::MAX,
        MC_FIRST..=MC_LAST => 0,
        msr::MISC_ENABLE => sys.misc_enable,
        msr::DEBUGCTL => sys.debugctl,
        MTRR_VAR..=MTRR_VAR_LAST => sys.mtrr_var[(index - MTRR_VAR) as usize],
        msr::PAT => sys.pat,
        msr::MTRR_DEF_TYPE => sys.mtrr_def_type,
        msr::EFER => sys.efer,
        msr::STAR => sys.star,
        msr::LSTAR => sys.lstar,
        msr::CSTAR => sys.cstar,
        msr::SFMASK => sys.sfmask,
        msr::FS_BASE => core.c().seg_base[seg::FS],
        msr::GS_BASE => core.c().seg_base[seg::GS],
        msr::KERNEL_GS_BASE => core.c().kernel_gs_base,
        msr::TSC_AUX if has_aux(core) => sys.tsc_aux,
        OLD_WALL_CLOCK | pv::MSR_WALL_CLOCK => sys.pv_wall_clock,
        OLD_SYSTEM_TIME | pv::MSR_SYSTEM_TIME => sys.pv_system_time,
        pv::MSR_STEAL_TIME => sys.pv_steal_time,
        PLATFORM_ID | SMI_COUNT | PLATFORM_INFO | MISC_FEATURES | PERF_STATUS | PERF_CTL => 0,
        LAST_BRANCH..=LAST_INTERRUPT => 0,
        HWCR if amd(core) => HWCR_VALUE,
        DE_CFG if amd(core) => 2, // LFENCE serializes
        K7_PERF_FIRST..=K7_PERF_LAST | SYSCFG | NB_CFG | INT_PENDING | MMIO_CONF_BASE | TSEG_ADDR | VM_CR
            if amd(core) =>
        {
            0
        }
        LS_CFG | IC_CFG | DC_CFG | BU_CFG2 if amd(core) => 0,
        _ => {
            tracing::debug!(index = format_args!("{index:#x}"), "RDMSR of an unknown register");
            return gp();
        }
    })
}

/// Moves this vCPU's TSC by `delta`, and tells the machine, whose TSC deadlines count in it.
fn move_tsc(core: &mut Core, delta: u64) {
    let value = core.sys.tsc_adjust.wrapping_add(delta);
    core.sys.tsc_adjust = value;
    core.push_exit(Exit::MsrWrite { index: msr::TSC_ADJUST, value });
    let ctx = core.ctx.get_mut();
    ctx.tsc_offset = ctx.tsc_offset.wrapping_add(delta);
    paravirt::update_clock(core, false);
}

fn write_efer(core: &mut Core, value: u64) -> Result<()> {
    let mask = core.model.efer_mask();
    let old = core.sys.efer;
    let changed = old ^ value;
    let lme_locked = core.sys.cr0 & cr0::PG != 0 && changed & efer::LME != 0;
    if value & !mask & !efer::LMA != 0 || lme_locked {
        return gp();
    }
    core.sys.efer = (value & !efer::LMA) | (old & efer::LMA);
    if changed & efer::NXE != 0 {
        core.flush_tlb(Flush::All);
    }
    core.mode_dirty = true;
    Ok(())
}

fn address(value: u64) -> Result<u64> {
    if canonical(value) { Ok(value) } else { gp() }
}

/// Writes model-specific register `index`.
///
/// # Errors
/// #GP(0), or a question to the machine.
pub(crate) fn write(core: &mut Core, index: u32, value: u64) -> Result<()> {
    if let Some(fixed) = fixed_mtrr(index) {
        if !mtrr_allowed(core, index, value) {
            return gp();
        }
        core.sys.mtrr_fixed[fixed] = value;
        return Ok(());
    }
    match index {
        msr::FS_BASE => {
            let base = address(value)?;
            descriptor::set_base(core, seg::FS, base);
        }
        msr::GS_BASE => {
            let base = address(value)?;
            descriptor::set_base(core, seg::GS, base);
        }
        msr::KERNEL_GS_BASE => core.ctx.get_mut().kernel_gs_base = address(value)?,
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            core.ask(Exit::MsrWrite { index, value })?;
        }
        msr::TSC => {
            let delta = value.wrapping_sub(core.tsc());
            move_tsc(core, delta);
        }
        msr::TSC_ADJUST if core.model.has(Feature::TscAdjust) => {
            let delta = value.wrapping_sub(core.sys.tsc_adjust);
            move_tsc(core, delta);
        }
        msr::SPEC_CTRL if core.model.spec_ctrl_mask() != 0 => {
            if value & !core.model.spec_ctrl_mask() != 0 {
                return gp();
            }
        }
        msr::SYSENTER_CS => core.sys.sysenter_cs = value & 0xffff_ffff,
        msr::SYSENTER_ESP => core.sys.sysenter_esp = address(value)?,
        msr::SYSENTER_EIP => core.sys.sysenter_eip = address(value)?,
        msr::EFER => write_efer(core, value)?,
        msr::STAR => core.sys.star = value,
        msr::LSTAR => core.sys.lstar = address(value)?,
        msr::CSTAR => core.sys.cstar = address(value)?,
        msr::SFMASK => core.sys.sfmask = value & 0xffff_ffff,
        msr::TSC_AUX if has_aux(core) => {
            if value >> 32 != 0 && !amd(core) {
                return gp();
            }
            core.sys.tsc_aux = value & 0xffff_ffff;
        }
        msr::PAT => {
            if !pat_allowed(value) {
                return gp();
            }
            core.sys.pat = value;
        }
        msr::MTRR_DEF_TYPE => {
            if !mtrr_allowed(core, index, value) {
                return gp();
            }
            core.sys.mtrr_def_type = value;
        }
        MTRR_VAR..=MTRR_VAR_LAST => {
            if !mtrr_allowed(core, index, value) {
                return gp();
            }
            core.sys.mtrr_var[(index - MTRR_VAR) as usize] = value;
        }
        msr::MISC_ENABLE => core.sys.misc_enable = misc_value(value),
        // Last-branch recording and branch stepping may be asked for, and do nothing.
        msr::DEBUGCTL if value & !3 == 0 => {}
        msr::MCG_STATUS => core.sys.mcg_status = value & 7,
        MCG_CTL => {}
        MC_FIRST..=MC_LAST if index & 3 == 0 || value == 0 => {}
        OLD_WALL_CLOCK | pv::MSR_WALL_CLOCK => paravirt::set_wall_clock(core, value)?,
        OLD_SYSTEM_TIME | pv::MSR_SYSTEM_TIME => paravirt::set_system_time(core, value)?,
        pv::MSR_STEAL_TIME => paravirt::set_steal_time(core, value)?,
        msr::BIOS_SIGN_ID | MICROCODE_UPDATE | PERF_CTL => {}
        MISC_FEATURES if value == 0 => {}
        K7_PERF_FIRST..=K7_PERF_LAST | SYSCFG | HWCR | NB_CFG | PATCH_LOADER | INT_PENDING if amd(core) => {}
        MMIO_CONF_BASE | TSEG_ADDR | LS_CFG | IC_CFG | DC_CFG | DE_CFG | BU_CFG2 if amd(core) => {}
        _ => {
            tracing::debug!(
                index = format_args!("{index:#x}"),
                value = format_args!("{value:#x}"),
                "WRMSR refused"
            );
            return gp();
        }
    }
    Ok(())
}

/// RDMSR.
pub(crate) fn rdmsr(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    let value = read(core, core.gpr(1) as u32)?;
    set_edx_eax(core, value);
    advance(core, insn);
    Ok(())
}

/// WRMSR.
pub(crate) fn wrmsr(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    let value = (core.gpr(2) << 32) | (core.gpr(0) & 0xffff_ffff);
    write(core, core.gpr(1) as u32, value)?;
    advance(core, insn);
    Ok(())
}

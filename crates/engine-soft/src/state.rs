//! [`CpuState`] out of a [`Core`] and into it.
//!
//! The FPU image is exchanged through `Ctx::xsave`: [`save`] expects it to be current, after [`restore`] it is.

use wardian_cpu::bits::{cr0, cr4, efer, msr, rflags};
use wardian_cpu::{CpuState, InvalidState, Msr, Segment};
use wardian_time::paravirt as pv;

use crate::core::{Core, System, seg};
use crate::sys::msr::{MISC_RESET, PAT_RESET, fixed_mtrr, misc_value, mtrr_allowed, pat_allowed};
use crate::sys::{canonical, control};
use crate::tlb::Flush;

/// Bits of RFLAGS that exist.
const RFLAGS_DEFINED: u64 = 0x003f_7fd7;
const XSTATE_BV: usize = 512;
const XSAVE_MIN: usize = 576;

/// The registers of [`CpuState::msrs`] but the MTRRs, in the order they are saved.
const PLAIN: [u32; 17] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::TSC_AUX,
    msr::PAT,
    msr::MISC_ENABLE,
    msr::MTRR_DEF_TYPE,
    msr::DEBUGCTL,
    msr::MCG_STATUS,
    pv::MSR_SYSTEM_TIME,
    pv::MSR_WALL_CLOCK,
    pv::MSR_STEAL_TIME,
];

/// Where a register of the list is kept.
fn field(sys: &mut System, index: u32) -> Option<&mut u64> {
    if let Some(n) = fixed_mtrr(index) {
        return Some(&mut sys.mtrr_fixed[n]);
    }
    Some(match index {
        msr::STAR => &mut sys.star,
        msr::LSTAR => &mut sys.lstar,
        msr::CSTAR => &mut sys.cstar,
        msr::SFMASK => &mut sys.sfmask,
        msr::KERNEL_GS_BASE => &mut sys.kernel_gs_base,
        msr::SYSENTER_CS => &mut sys.sysenter_cs,
        msr::SYSENTER_ESP => &mut sys.sysenter_esp,
        msr::SYSENTER_EIP => &mut sys.sysenter_eip,
        msr::TSC_AUX => &mut sys.tsc_aux,
        msr::PAT => &mut sys.pat,
        msr::MISC_ENABLE => &mut sys.misc_enable,
        msr::MTRR_DEF_TYPE => &mut sys.mtrr_def_type,
        msr::DEBUGCTL => &mut sys.debugctl,
        msr::MCG_STATUS => &mut sys.mcg_status,
        pv::MSR_SYSTEM_TIME => &mut sys.pv_system_time,
        pv::MSR_WALL_CLOCK => &mut sys.pv_wall_clock,
        pv::MSR_STEAL_TIME => &mut sys.pv_steal_time,
        0x200..=0x20f => &mut sys.mtrr_var[(index - 0x200) as usize],
        _ => return None,
    })
}

/// The whole architectural state.
pub(crate) fn save(core: &Core) -> CpuState {
    let sys = &core.sys;
    let mut copy = sys.clone();
    copy.kernel_gs_base = core.c().kernel_gs_base;
    let indexes = PLAIN.into_iter().chain(0x200..=0x20f).chain(msr::FIXED_MTRRS);
    let msrs =
        indexes.filter_map(|index| field(&mut copy, index).map(|v| Msr { index, value: *v })).collect();
    let mut segments = sys.segments;
    for (segment, base) in segments.iter_mut().zip(core.c().seg_base) {
        segment.base = base;
    }
    CpuState {
        gpr: core.c().gpr,
        rip: core.rip(),
        rflags: core.rflags(),
        segments,
        ldtr: sys.ldtr,
        tr: sys.tr,
        gdtr: sys.gdtr,
        idtr: sys.idtr,
        cr0: sys.cr0,
        cr2: sys.cr2,
        cr3: sys.cr3,
        cr4: sys.cr4,
        cr8: u64::from(core.irq.cr8()),
        efer: sys.efer,
        xcr0: sys.xcr0,
        dr: [sys.dr[0], sys.dr[1], sys.dr[2], sys.dr[3], sys.dr6, sys.dr7],
        xsave: core.c().xsave.to_vec(),
        msrs,
        tsc_adjust: sys.tsc_adjust,
        activity: sys.activity,
        interrupt_shadow: sys.interrupt_shadow,
        nmi_blocked: sys.nmi_blocked,
        nmi_owed: false,
        interrupt_owed: None,
    }
}

type Check = Result<(), InvalidState>;

fn require(good: bool, field: &'static str, value: u64, why: &'static str) -> Check {
    if good { Ok(()) } else { Err(InvalidState { field, value, why }) }
}

fn check_control(core: &Core, s: &CpuState) -> Check {
    let lma = s.efer & efer::LMA != 0;
    let pg = s.cr0 & cr0::PG != 0;
    let efer_mask = core.model.efer_mask();
    require(s.cr0 >> 32 == 0, "CR0", s.cr0, "the upper half is reserved")?;
    require(!pg || s.cr0 & cr0::PE != 0, "CR0", s.cr0, "paging needs protected mode")?;
    require(s.cr0 & (cr0::NW | cr0::CD) != cr0::NW, "CR0", s.cr0, "NW needs CD")?;
    require(
        s.cr4 & !core.model.cr4_mask() == 0,
        "CR4",
        s.cr4,
        "the processor model lacks a feature that is on",
    )?;
    require(lma || s.cr4 & cr4::PCIDE == 0, "CR4", s.cr4, "PCIDE needs IA-32e mode")?;
    require(s.efer & !efer_mask == 0, "EFER", s.efer, "the processor model lacks a feature that is on")?;
    require(lma == (pg && s.efer & efer::LME != 0), "EFER", s.efer, "LMA must be LME and CR0.PG")?;
    require(!lma || s.cr4 & cr4::PAE != 0, "CR4", s.cr4, "IA-32e mode needs PAE")?;
    let cr3_bits = if lma { core.model.physical_bits() } else { 32 };
    require(s.cr3 >> cr3_bits == 0, "CR3", s.cr3, "it is wider than physical addresses")?;
    require(s.xcr0 == 1 || control::xcr0_allowed(core, s.xcr0), "XCR0", s.xcr0, "no such set of components")?;
    require(s.dr[4] >> 32 == 0, "DR6", s.dr[4], "the upper half is reserved")?;
    require(s.dr[5] >> 32 == 0, "DR7", s.dr[5], "the upper half is reserved")
}

fn check_segments(s: &CpuState) -> Check {
    const NAMES: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];
    let lma = s.efer & efer::LMA != 0;
    let v86 = s.rflags & rflags::VM != 0;
    for (n, segment) in s.segments.iter().enumerate() {
        let rights = u64::from(segment.rights);
        require(rights & !(0xf0ff | 1 << 16) == 0, NAMES[n], rights, "undefined access rights")?;
        let wide = lma && n >= seg::FS;
        let base = if wide { canonical(segment.base) } else { segment.base >> 32 == 0 };
        require(base, NAMES[n], segment.base, "the base is too wide")?;
        if v86 {
            let good = segment.base == u64::from(segment.selector) << 4 && segment.limit == 0xffff;
            require(good, NAMES[n], segment.base, "not a segment of virtual-8086 mode")?;
        }
    }
    let cs = s.segments[seg::CS];
    let rights = u64::from(cs.rights);
    require(
        !cs.unusable() && cs.is_code_or_data() && cs.present(),
        "CS",
        rights,
        "code needs a usable segment",
    )?;
    if lma && cs.long() {
        require(!cs.big(), "CS", rights, "L and D exclude each other")?;
        require(cs.base == 0, "CS", cs.base, "64-bit code has no segment base")?;
        require(canonical(s.rip), "RIP", s.rip, "it is not canonical")?;
    } else {
        require(s.rip >> 32 == 0, "RIP", s.rip, "the upper half exists only in 64-bit code")?;
    }
    let system = |segment: &Segment, kinds: &[u32]| {
        !segment.is_code_or_data() && segment.present() && kinds.contains(&segment.kind())
    };
    let tr: &[u32] = if lma { &[11] } else { &[3, 11] };
    require(!s.tr.unusable() && system(&s.tr, tr), "TR", u64::from(s.tr.rights), "not a busy TSS")?;
    let ldtr = s.ldtr.unusable() || system(&s.ldtr, &[2]);
    require(ldtr, "LDTR", u64::from(s.ldtr.rights), "not a local descriptor table")?;
    let tables = [("TR", s.tr.base), ("LDTR", s.ldtr.base), ("GDTR", s.gdtr.base), ("IDTR", s.idtr.base)];
    for (name, base) in tables {
        require(canonical(base), name, base, "the base is not canonical")?;
    }
    Ok(())
}

fn check_flags(s: &CpuState) -> Check {
    require(s.rflags & !RFLAGS_DEFINED == 0, "RFLAGS", s.rflags, "reserved bits are set")?;
    require(s.rflags & rflags::FIXED != 0, "RFLAGS", s.rflags, "bit 1 is always set")?;
    let protected = s.cr0 & cr0::PE != 0 && s.efer & efer::LMA == 0;
    require(s.rflags & rflags::VM == 0 || protected, "RFLAGS", s.rflags, "VM needs 32-bit protected mode")
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// What XRSTOR would refuse (Intel SDM vol. 1, 13.8.1).
fn check_xsave(core: &Core, s: &CpuState) -> Check {
    let len = s.xsave.len();
    require(len >= XSAVE_MIN, "XSAVE", len as u64, "the image is too short")?;
    let present = u64_at(&s.xsave, XSTATE_BV);
    // The engine always carries x87, SSE and AVX state, whatever the guest may enable.
    let mask = core.model.xcr0_mask() | 7;
    require(present & !mask == 0, "XSTATE_BV", present, "a component that is not carried")?;
    let need = if present >> 5 != 0 {
        2688
    } else if present & 4 != 0 {
        832
    } else {
        XSAVE_MIN
    };
    require(len >= need, "XSAVE", len as u64, "the image is too short for its components")?;
    let rest = s.xsave[XSTATE_BV + 8..XSAVE_MIN].iter().all(|byte| *byte == 0);
    require(rest, "XCOMP_BV", u64_at(&s.xsave, XSTATE_BV + 8), "not the standard format")?;
    let mxcsr = u64_at(&s.xsave, 24) & 0xffff_ffff;
    require(mxcsr & !0xffff == 0, "MXCSR", mxcsr, "reserved bits are set")
}

fn check_msr(core: &Core, msr: Msr) -> Check {
    let Msr { index, value } = msr;
    let good = match index {
        msr::PAT => pat_allowed(value),
        msr::LSTAR | msr::CSTAR | msr::KERNEL_GS_BASE | msr::SYSENTER_ESP | msr::SYSENTER_EIP => {
            canonical(value)
        }
        msr::SYSENTER_CS | msr::TSC_AUX | msr::SFMASK => value >> 32 == 0,
        msr::MISC_ENABLE => misc_value(value) == value,
        msr::DEBUGCTL => value == 0,
        msr::MCG_STATUS => value <= 7,
        msr::MTRR_DEF_TYPE | 0x200..=0x20f => mtrr_allowed(core, index, value),
        pv::MSR_STEAL_TIME => value & 0x3e == 0,
        msr::STAR | pv::MSR_SYSTEM_TIME | pv::MSR_WALL_CLOCK => true,
        _ if fixed_mtrr(index).is_some() => mtrr_allowed(core, index, value),
        _ => return Err(InvalidState { field: "MSR", value: u64::from(index), why: "it is not known" }),
    };
    require(good, "MSR", value, "the register cannot hold it")
}

/// Replaces the whole architectural state. Registers that `state.msrs` does not name get their reset values.
///
/// # Errors
/// When no processor of this model can be in that state; then nothing has changed.
pub(crate) fn restore(core: &mut Core, state: &CpuState) -> Result<(), InvalidState> {
    check_control(core, state)?;
    check_flags(state)?;
    check_segments(state)?;
    check_xsave(core, state)?;
    for msr in &state.msrs {
        check_msr(core, *msr)?;
    }

    let mut sys = System {
        segments: state.segments,
        ldtr: state.ldtr,
        tr: state.tr,
        gdtr: state.gdtr,
        idtr: state.idtr,
        cr0: state.cr0 | cr0::ET,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer,
        xcr0: state.xcr0,
        dr: [state.dr[0], state.dr[1], state.dr[2], state.dr[3]],
        dr6: control::dr6_value(state.dr[4]),
        dr7: control::dr7_value(state.dr[5]),
        cpl: 0,
        activity: state.activity,
        interrupt_shadow: state.interrupt_shadow,
        nmi_blocked: state.nmi_blocked,
        star: 0,
        lstar: 0,
        cstar: 0,
        sfmask: 0,
        kernel_gs_base: 0,
        sysenter_cs: 0,
        sysenter_esp: 0,
        sysenter_eip: 0,
        tsc_aux: 0,
        tsc_adjust: state.tsc_adjust,
        pat: PAT_RESET,
        misc_enable: MISC_RESET,
        mtrr_def_type: 0,
        mtrr_fixed: [0; 11],
        mtrr_var: [0; 16],
        debugctl: 0,
        mcg_status: 0,
        pv_system_time: 0,
        pv_wall_clock: 0,
        pv_steal_time: 0,
    };
    sys.cpl = match (sys.cr0 & cr0::PE != 0, state.rflags & rflags::VM != 0) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => sys.segments[seg::SS].dpl(),
    };
    for msr in &state.msrs {
        if let Some(field) = field(&mut sys, msr.index) {
            *field = msr.value;
        }
    }

    let tsc_offset = core.time.tsc_offset().unwrap_or(0).wrapping_add(state.tsc_adjust);
    core.ctx.get_mut().kernel_gs_base = sys.kernel_gs_base;
    core.sys = sys;
    for (n, segment) in state.segments.into_iter().enumerate() {
        core.set_segment(n, segment);
    }
    core.set_rflags(state.rflags);
    core.set_rip(state.rip);
    let ctx = core.ctx.get_mut();
    ctx.gpr = state.gpr;
    ctx.tsc_offset = tsc_offset;
    let len = state.xsave.len().min(ctx.xsave.len());
    ctx.xsave.fill(0);
    ctx.xsave[..len].copy_from_slice(&state.xsave[..len]);
    control::update_watch(core);
    core.flush_tlb(Flush::All);
    core.mode_dirty = true;
    Ok(())
}

/// INIT ([`CpuState::after_init`]). The activity is the caller's business.
///
/// # Errors
/// As [`restore`].
pub(crate) fn init(core: &mut Core) -> Result<(), InvalidState> {
    let state = save(core).after_init(core.model.signature());
    restore(core, &state)
}

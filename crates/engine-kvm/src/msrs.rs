//! Which model-specific registers are ours and not KVM's: those of the local APIC, of the time base, of the clock
//! records.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use wardian_cpu::bits::msr;
use wardian_cpu::{EngineError, Msr, paravirt};
use wardian_time::paravirt as pv;

use crate::KvmError;

/// The first names of the clock records' registers.
const OLD_WALL_CLOCK: u32 = 0x11;
const OLD_SYSTEM_TIME: u32 = 0x12;

/// Registers whose reads and writes come to us (x2APIC registers do so without a filter, as KVM has no local APIC).
const OURS: [u32; 7] = [
    msr::APIC_BASE,
    msr::TSC_ADJUST,
    msr::TSC_DEADLINE,
    OLD_WALL_CLOCK,
    OLD_SYSTEM_TIME,
    pv::MSR_WALL_CLOCK,
    pv::MSR_SYSTEM_TIME,
];

/// Tells KVM of them; of the TSC itself only writes.
pub(crate) fn filter(vm: &VmFd) -> Result<(), KvmError> {
    let both = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    let ours = OURS.iter().map(|index| (*index, both));
    let ranges: Vec<_> = ours
        .chain([(msr::TSC, MsrFilterRangeFlags::WRITE)])
        .map(|(base, flags)| MsrFilterRange { flags, base, msr_count: 1, bitmap: &[0] })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(KvmError::call("to hand on model-specific registers"))
}

/// The clock records' registers as the guest wrote them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clocks {
    pub(crate) system_time: u64,
    pub(crate) wall_clock: u64,
}

/// The registers of a saved state that KVM keeps, MTRRs aside.
const KEPT: [u32; 15] = [
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
    pv::MSR_STEAL_TIME,
];

/// Those that only some processors have, saved where they are not zero: the other engine knows nothing of them.
const SOME: [u32; 5] = [msr::SPEC_CTRL, msr::XSS, TSX_CTRL, VIRT_SPEC_CTRL, LS_CFG];
const TSX_CTRL: u32 = 0x122;
const VIRT_SPEC_CTRL: u32 = 0xc001_011f;
const LS_CFG: u32 = 0xc001_1020;

/// One register, if KVM knows it.
fn get(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    (fd.get_msrs(&mut one).ok()? == 1).then(|| one.as_slice()[0].data)
}

/// Writes one register as the machine, not as the guest; says whether KVM took it.
pub(crate) fn set(fd: &VcpuFd, index: u32, data: u64) -> bool {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .is_ok_and(|one| fd.set_msrs(&one).is_ok_and(|count| count == 1))
}

/// All of a saved state.
pub(crate) fn save(fd: &VcpuFd, clocks: Clocks) -> Vec<Msr> {
    let kept = KEPT.into_iter().chain(msr::VARIABLE_MTRRS).chain(msr::FIXED_MTRRS);
    let mut all: Vec<Msr> = kept.filter_map(|index| Some(Msr { index, value: get(fd, index)? })).collect();
    let some = SOME.into_iter().filter_map(|index| Some(Msr { index, value: get(fd, index)? }));
    all.extend(some.filter(|msr| msr.value != 0));
    all.push(Msr { index: pv::MSR_SYSTEM_TIME, value: clocks.system_time });
    all.push(Msr { index: pv::MSR_WALL_CLOCK, value: clocks.wall_clock });
    all
}

/// The values after RESET of registers that are not zero then.
fn reset_value(index: u32) -> u64 {
    match index {
        msr::PAT => 0x0007_0406_0007_0406,
        msr::MISC_ENABLE => 1, // fast strings
        _ => 0,
    }
}

/// Replaces all of them; those that `msrs` does not name get their reset values.
pub(crate) fn restore(fd: &VcpuFd, msrs: &[Msr]) -> Result<Clocks, EngineError> {
    let named = |index: u32| msrs.iter().find(|msr| msr.index == index).map(|msr| msr.value);
    let refused = |index: u32, value: u64| {
        EngineError::Host(format!("KVM refuses model-specific register {index:#x} = {value:#x} of the state"))
    };
    let all = KEPT.into_iter().chain(msr::VARIABLE_MTRRS).chain(msr::FIXED_MTRRS).chain(SOME);
    for index in all {
        let value = named(index).unwrap_or_else(|| reset_value(index));
        // What KVM does not know it need not hold, as long as nobody asks it to.
        if get(fd, index) != Some(value) && !set(fd, index, value) && named(index).is_some_and(|v| v != 0) {
            return Err(refused(index, value));
        }
    }
    let known = |index: u32| {
        KEPT.contains(&index)
            || SOME.contains(&index)
            || msr::is_mtrr(index)
            || matches!(index, pv::MSR_SYSTEM_TIME | pv::MSR_WALL_CLOCK)
    };
    if let Some(unknown) = msrs.iter().find(|msr| !known(msr.index)) {
        return Err(refused(unknown.index, unknown.value));
    }
    Ok(Clocks {
        system_time: named(pv::MSR_SYSTEM_TIME).unwrap_or(0),
        wall_clock: named(pv::MSR_WALL_CLOCK).unwrap_or(0),
    })
}

/// A register of the clock records by either of its names.
pub(crate) fn clock(clocks: &mut Clocks, index: u32) -> Option<&mut u64> {
    match index {
        OLD_SYSTEM_TIME | pv::MSR_SYSTEM_TIME => Some(&mut clocks.system_time),
        OLD_WALL_CLOCK | pv::MSR_WALL_CLOCK => Some(&mut clocks.wall_clock),
        _ => None,
    }
}

/// The guest writes a register of the clock records; `None` if it is none, `Some(false)` for #GP.
pub(crate) fn write_clock(
    shared: &crate::Shared,
    clocks: &mut Clocks,
    tsc_adjust: u64,
    index: u32,
    value: u64,
) -> Option<bool> {
    let register = clock(clocks, index)?;
    let (memory, time) = (&shared.memory, &shared.time);
    let system_time = matches!(index, OLD_SYSTEM_TIME | pv::MSR_SYSTEM_TIME);
    let allowed = if system_time {
        paravirt::clock_allowed(memory, value)
    } else {
        paravirt::wall_clock_allowed(memory, value)
    };
    if allowed {
        *register = value;
        if system_time {
            paravirt::write_clock(memory, time, value, tsc_adjust, false);
        } else {
            paravirt::write_wall_clock(memory, time, value);
        }
    }
    Some(allowed)
}

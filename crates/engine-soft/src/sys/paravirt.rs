//! The clock, wall-clock and steal-time records that KVM's guests read (Linux
//! `Documentation/virt/kvm/x86/msr.rst`), written into guest memory.

use std::sync::atomic::{Ordering, fence};

use wardian_cpu::paravirt;
use wardian_memory::{Gpa, GuestMemory};
use wardian_time::Nanos;
use wardian_time::paravirt::steal_time_bytes;

use crate::core::Core;
use crate::trap::{Result, Trap};

const STEAL_LEN: u64 = 64;
const STEAL_VERSION: u64 = 8;

fn read_u32(mem: &GuestMemory, at: u64) -> Option<u32> {
    let mut bytes = [0u8; 4];
    mem.read(Gpa(at), &mut bytes).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Rewrites the clock record, if the guest has asked for one; `stopped` tells it that the machine was stopped.
pub(crate) fn update_clock(core: &Core, stopped: bool) {
    paravirt::write_clock(&core.mem, &core.time, core.sys.pv_system_time, core.sys.tsc_adjust, stopped);
}

/// Adds `stolen` to the steal-time record.
///
/// Its `preempted` flag is never set. KVM sets it whenever the vCPU's thread leaves the processor, also to sleep in
/// HLT. A process learns of the former too late, and the latter does harm: to Linux a vCPU that is preempted is no
/// idle one (`available_idle_cpu`), so woken tasks are not given to it. Without PV spin locks and PV TLB flushes,
/// which are not offered, nothing else depends on it but how long a lock is spun for.
fn update_steal(core: &Core, stolen: Nanos) {
    let msr = core.sys.pv_steal_time;
    if msr & 1 == 0 {
        return;
    }
    let at = msr & !63;
    let mem = &core.mem;
    let write = || {
        let mut old = [0u8; 8];
        mem.read(Gpa(at), &mut old).ok()?;
        let total = u64::from_le_bytes(old).wrapping_add(stolen.0);
        let odd = read_u32(mem, at + STEAL_VERSION)?.wrapping_add(1) | 1;
        mem.write(Gpa(at + STEAL_VERSION), &odd.to_le_bytes()).ok()?;
        fence(Ordering::SeqCst);
        let even = odd.wrapping_add(1);
        let bytes = steal_time_bytes(even, Nanos(total), false);
        mem.write(Gpa(at), &bytes[..8]).ok()?;
        mem.write(Gpa(at + 16), &bytes[16..]).ok()?;
        fence(Ordering::SeqCst);
        mem.write(Gpa(at + STEAL_VERSION), &even.to_le_bytes()).ok()
    };
    if write().is_none() {
        tracing::warn!(at, "The guest's steal-time page is not RAM any more");
    }
}

/// Refreshes what the guest sees: `stolen` is the time that the host has not run this vCPU's thread since the last
/// call, `stopped` that the whole machine was stopped meanwhile.
pub(crate) fn refresh(core: &Core, stolen: Nanos, stopped: bool) {
    if stopped {
        update_clock(core, true);
    }
    if stolen.0 != 0 {
        update_steal(core, stolen);
    }
}

/// Whether a record of `len` bytes at `at` lies in RAM.
fn check(core: &Core, at: u64, len: u64) -> Result<()> {
    if core.mem.contains(Gpa(at), len) { Ok(()) } else { Err(Trap::gp(0)) }
}

/// `MSR_KVM_SYSTEM_TIME`: bit 0 enables the record at the address in the other bits.
pub(crate) fn set_system_time(core: &mut Core, value: u64) -> Result<()> {
    if !paravirt::clock_allowed(&core.mem, value) {
        return Err(Trap::gp(0));
    }
    core.sys.pv_system_time = value;
    update_clock(core, false);
    Ok(())
}

/// `MSR_KVM_WALL_CLOCK`: the record at this address is written once.
pub(crate) fn set_wall_clock(core: &mut Core, value: u64) -> Result<()> {
    if !paravirt::wall_clock_allowed(&core.mem, value) {
        return Err(Trap::gp(0));
    }
    core.sys.pv_wall_clock = value;
    paravirt::write_wall_clock(&core.mem, &core.time, value);
    Ok(())
}

/// `MSR_KVM_STEAL_TIME`: bit 0 enables the record at the 64-byte aligned address.
pub(crate) fn set_steal_time(core: &mut Core, value: u64) -> Result<()> {
    if value & 0x3e != 0 {
        return Err(Trap::gp(0));
    }
    if value & 1 != 0 {
        check(core, value & !63, STEAL_LEN)?;
    }
    core.sys.pv_steal_time = value;
    update_steal(core, Nanos(0));
    Ok(())
}

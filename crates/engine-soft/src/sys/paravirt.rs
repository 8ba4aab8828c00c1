//! The clock, wall-clock and steal-time records that KVM's guests read (Linux
//! `Documentation/virt/kvm/x86/msr.rst`), written into guest memory.

use std::sync::atomic::{Ordering, fence};

use wardian_memory::{Gpa, GuestMemory};
use wardian_time::Nanos;
use wardian_time::paravirt::{steal_time_bytes, wall_clock_bytes};

use crate::core::Core;
use crate::trap::{Result, Trap};

/// Byte of the clock record that holds the flags, and its "guest stopped" bit.
const CLOCK_FLAGS: u64 = 29;
const GUEST_STOPPED: u8 = 2;
const CLOCK_LEN: u64 = 32;
const WALL_LEN: u64 = 12;
const STEAL_LEN: u64 = 64;
const STEAL_VERSION: u64 = 8;

fn read_u32(mem: &GuestMemory, at: u64) -> Option<u32> {
    let mut bytes = [0u8; 4];
    mem.read(Gpa(at), &mut bytes).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Replaces the record at `at`, whose 32-bit version is its first field: odd while it changes.
fn publish(mem: &GuestMemory, at: u64, record: impl Fn(u32) -> ([u8; 32], usize)) -> Option<()> {
    let old = read_u32(mem, at)?;
    let odd = old.wrapping_add(1) | 1;
    mem.write(Gpa(at), &odd.to_le_bytes()).ok()?;
    fence(Ordering::SeqCst);
    let even = odd.wrapping_add(1);
    let (bytes, len) = record(even);
    mem.write(Gpa(at + 4), &bytes[4..len]).ok()?;
    fence(Ordering::SeqCst);
    mem.write(Gpa(at), &even.to_le_bytes()).ok()
}

/// Rewrites the clock record, if the guest has asked for one; `stopped` tells it that the machine was stopped.
pub(crate) fn update_clock(core: &Core, stopped: bool) {
    let msr = core.sys.pv_system_time;
    if msr & 1 == 0 {
        return;
    }
    let at = msr & !1;
    let mut flags = [0u8];
    if core.mem.read(Gpa(at + CLOCK_FLAGS), &mut flags).is_err() {
        return;
    }
    let mut clock = core.time.pvclock();
    // The record is read against this vCPU's TSC. Only vCPUs without an adjustment agree with each other.
    clock.tsc_timestamp = clock.tsc_timestamp.wrapping_add(core.sys.tsc_adjust);
    clock.stable &= core.sys.tsc_adjust == 0;
    // The guest clears the flag when it has seen it.
    clock.guest_stopped = stopped || flags[0] & GUEST_STOPPED != 0;
    if publish(&core.mem, at, |version| (clock.to_bytes(version), CLOCK_LEN as usize)).is_none() {
        tracing::warn!(at, "The guest's clock page is not RAM any more");
    }
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
    if value & 1 != 0 {
        check(core, value & !1, CLOCK_LEN)?;
    }
    core.sys.pv_system_time = value;
    update_clock(core, false);
    Ok(())
}

/// `MSR_KVM_WALL_CLOCK`: the record at this address is written once.
pub(crate) fn set_wall_clock(core: &mut Core, value: u64) -> Result<()> {
    if value != 0 {
        check(core, value, WALL_LEN)?;
    }
    core.sys.pv_wall_clock = value;
    if value == 0 {
        return Ok(());
    }
    let wall = core.time.wall_at_zero();
    publish(&core.mem, value, |version| {
        let mut bytes = [0u8; 32];
        bytes[..12].copy_from_slice(&wall_clock_bytes(version, wall));
        (bytes, WALL_LEN as usize)
    });
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

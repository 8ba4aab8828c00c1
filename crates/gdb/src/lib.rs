//! The debugger's door: the GDB remote protocol on a Unix socket or a local TCP port.
//!
//! *Comes in*: a [`Target`] (a machine whose vCPUs can be parked, looked at and let go), stop events,
//! bytes of one debugger at a time. *Goes out*: registers, guest-virtual memory, break- and watchpoints
//! as [`wardian_cpu::DebugRequest`]s, single steps.
//!
//! vCPU n is thread n+1. The door opens at once and may be used at any time: attaching parks every vCPU
//! and stops guest time, detaching lets all go on where they stood.
//!
//! **Architecture Invariant:** guest memory is never patched for a breakpoint; only the debugger's own
//! explicit writes change it. **Architecture Invariant:** a debugger that breaks the protocol, hangs up or
//! stops reading ends its session, never the machine. **Architecture Invariant:** the door listens on
//! 127.0.0.1 or on a Unix socket of mode 0600, nowhere else.
//!
//! **API Boundary:** [`Address`], [`Door`], [`Target`], [`GdbError`]; no type of `gdbstub` leaves.
#![forbid(unsafe_code)]

mod arch;
mod door;
mod registers;
mod session;
#[cfg(test)]
mod tests;

pub use door::{Address, Door, GdbError, OpenDoor};

use wardian_cpu::Vcpu;
use wardian_memory::GuestMemory;

/// What the door needs of a machine.
pub trait Target: Send + Sync {
    /// Number of vCPUs.
    fn vcpus(&self) -> usize;
    /// Guest RAM; `None` while the machine is being built anew.
    fn memory(&self) -> Option<GuestMemory>;
    /// Parks every vCPU between two instructions and stops guest time; returns when all have stopped.
    /// Does nothing if they have.
    fn stop(&self);
    /// Lets vCPU n go on if `run[n]`; the others stay as they are. Guest time runs from then on.
    fn resume(&self, run: &[bool]);
    /// Calls `f` with vCPU `index` if it is parked; says whether it was.
    fn with_vcpu(&self, index: usize, f: &mut dyn FnMut(&mut dyn Vcpu)) -> bool;
    /// A few words on what the vCPU is doing, for the debugger's list of threads.
    fn describe(&self, index: usize) -> String;
    /// The debugger asks to end the machine. Must not block.
    fn kill(&self);
}

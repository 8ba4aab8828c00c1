//! One virtual machine: from a configuration to a built machine, its threads and its end.
//!
//! *Comes in*: a [`Config`]. *Goes out*: a [`Machine`] that runs to an [`Outcome`], and what was counted on
//! the way ([`Stats`]).
//!
//! A vCPU's thread does nothing but run, answer, run: the engine returns an exit value, the board finds the
//! device and returns an answer value, the next run completes the instruction. A reset tears the machine
//! down and builds it anew from the same configuration, within the process; disks and terminals stay open.
//!
//! **Architecture Invariant:** a vCPU is parked, looked at or saved only between a completed answer and its
//! next exit, and it acknowledges (one gate for pauses, the debugger and the end). **Architecture Invariant:**
//! guest time runs exactly while a vCPU may run; it stops after the last vCPU and starts before the first.
//! **Architecture Invariant:** a panic in any thread of the machine ends it with an error, never in silence.
//! **Architecture Invariant:** a machine is built input first, outputs last: what is refused has changed
//! nothing.
//!
//! **Architecture Invariant:** a guest that was stopped is told so before it can take its own clocks for a lockup;
//! where a vCPU makes no progress all the same, [`Verdict`] says whose doing it is.
//!
//! **API Boundary:** [`Config`], [`Machine`], [`Control`], [`Outcome`], [`MachineError`], [`status`], [`Stats`],
//! [`Event`], [`Tree`]; for who stands beside it, [`Seat`], [`Keyboard`], [`About`].
#![forbid(unsafe_code)]

mod about;
mod accounts;
mod assemble;
mod board;
mod checkup;
mod config;
mod control;
mod diary;
mod doctor;
mod ending;
mod engine;
mod error;
mod gate;
mod host;
mod lifecycle;
mod machine;
mod operate;
mod stats;
mod step;
#[cfg(test)]
mod tests;
mod tree;
mod vcpu;
mod verdict;
mod virtual_time;
mod vm;
mod wake;

pub use about::About;
pub use accounts::TimeSpent;
pub use checkup::{Checkup, Finding, Grade, KvmFound};
pub use config::{
    Config, ConfigError, CpuCount, DiskArg, Endpoint, EngineChoice, LockupSeconds, MAX_CPUS, MemorySize,
    ModuleArg, OnResume, Plan, TimeSource, TimerPolicies, Timers, TscModeArg,
};
pub use control::{Control, Status};
pub use diary::{Event, Happening};
pub use error::{MachineError, Outcome, status};
pub use host::{Keyboard, Screen, Seat};
pub use machine::Machine;
pub use stats::{ExitSummary, Stats, VcpuStats};
pub use tree::Tree;
pub use verdict::{Sighting, Verdict, Window};
pub use vm::PauseGuard;
pub use wardian_gdb::Address as DebugAddress;
